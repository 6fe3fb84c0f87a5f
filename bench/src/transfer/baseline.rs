//! What a transfer is held against: blocking TCP between the same two processes, plain and under TLS, and a copy
//! within one.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, StreamOwned};

use super::link;

/// The first byte on a connection: what follows is plain.
pub(super) const PLAIN: u8 = 0;
/// What follows is TLS.
pub(super) const TLS: u8 = 1;
/// What follows is plain and comes out of memory of as many MiB as the next four bytes say, little-endian.
pub(super) const BETWEEN_POOLS: u8 = 2;
/// Bytes of a read or a write.
pub(super) const PIECE_BYTES: usize = 1 << 20;
/// Of TCP in Linux, as far as they are of interest here.
const CONGESTION_CONTROLS: [&str; 2] = ["cubic", "bbr"];

/// Over a link, a connection under each congestion control that the kernel has at the sender.
pub(super) fn connect_under_each(addr: SocketAddr) -> anyhow::Result<Vec<(&'static str, Tcp)>> {
    let mut connections = Vec::new();
    for name in CONGESTION_CONTROLS {
        if link::set_congestion_control(Some(name)).is_ok() {
            let mut tcp = Tcp::connect(addr)?;
            // What is answered has been accepted.
            tcp.receive(1)?;
            connections.push((name, tcp));
        }
    }
    link::set_congestion_control(None)?;
    Ok(connections)
}

/// What the other process sends to whoever asks.
pub(super) trait Asked: Send {
    /// Asks for `num_bytes` and has them where they belong.
    fn receive(&mut self, num_bytes: usize) -> anyhow::Result<Duration>;
}

/// Asks so many times for `num_bytes`, on a thread of its own: connections of the fabric live on meanwhile.
pub(super) async fn receive(
    asked: &Arc<Mutex<dyn Asked>>,
    num_bytes: usize,
    num_times: u32,
) -> anyhow::Result<Vec<Duration>> {
    let asked = asked.clone();
    let receiving = move || {
        let mut asked = asked.lock().expect("nobody panics with it");
        (0..num_times).map(|_| asked.receive(num_bytes)).collect()
    };
    tokio::task::spawn_blocking(receiving).await.context("read on another thread")?
}

trait Connection: Read + Write + Send {}

impl<C: Read + Write + Send> Connection for C {}

/// One blocking TCP connection, without digest.
pub(super) struct Tcp {
    stream: Box<dyn Connection>,
    /// Filled from the beginning by every answer, over and over if it is larger.
    buffer: Vec<u8>,
}

fn connect(addr: SocketAddr, kind: u8) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect(addr).context("connect for the TCP baseline")?;
    stream.set_nodelay(true).context("turn Nagle's algorithm off")?;
    stream.write_all(&[kind]).context("say what follows over TCP")?;
    Ok(stream)
}

/// As the fabric has it: AES-128-GCM of aws-lc.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.cipher_suites.retain(|suite| suite.suite() == rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// TLS 1.3 of the sender, whose certificate lies in `dir`.
pub(super) fn tls_server(dir: &Path) -> anyhow::Result<Arc<ServerConfig>> {
    let certificate = CertificateDer::from_pem_file(dir.join("sender.pem")).context("read the sender's certificate")?;
    let key = PrivateKeyDer::from_pem_file(dir.join("sender.key")).context("read the sender's key")?;
    let config = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
    Ok(Arc::new(config.with_no_client_auth().with_single_cert(vec![certificate], key)?))
}

/// TLS 1.3 of the receiver; the CA lies in `dir`.
pub(super) fn tls_client(dir: &Path) -> anyhow::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(dir.join("ca.pem")).context("read the CA's certificate")?)?;
    let config = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
    Ok(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
}

impl Tcp {
    pub(super) fn connect(addr: SocketAddr) -> anyhow::Result<Self> {
        Ok(Self { stream: Box::new(connect(addr, PLAIN)?), buffer: vec![0; PIECE_BYTES] })
    }

    /// Out of `mib` MiB of memory into as much: what KV does, where the other two stay within the caches.
    pub(super) fn connect_between_pools(addr: SocketAddr, mib: u32) -> anyhow::Result<Self> {
        let mut stream = connect(addr, BETWEEN_POOLS)?;
        stream.write_all(&mib.to_le_bytes()).context("say what is asked for over TCP")?;
        Ok(Self { stream: Box::new(stream), buffer: vec![0; mib as usize * PIECE_BYTES] })
    }

    /// Under TLS 1.3; the CA lies in `dir`.
    pub(super) fn connect_tls(addr: SocketAddr, dir: &Path, name: &str) -> anyhow::Result<Self> {
        let config = tls_client(dir)?;
        let name = ServerName::try_from(name.to_string()).context("the name in the sender's certificate")?;
        let stream = StreamOwned::new(ClientConnection::new(config, name)?, connect(addr, TLS)?);
        Ok(Self { stream: Box::new(stream), buffer: vec![0; PIECE_BYTES] })
    }
}

impl Asked for Tcp {
    fn receive(&mut self, num_bytes: usize) -> anyhow::Result<Duration> {
        let started_at = Instant::now();
        self.stream.write_all(&(num_bytes as u64).to_le_bytes()).context("ask for bytes over TCP")?;
        let mut left = num_bytes;
        while left > 0 {
            for piece in self.buffer.chunks_mut(PIECE_BYTES) {
                let count = left.min(piece.len());
                self.stream.read_exact(&mut piece[..count]).context("read over TCP")?;
                left -= count;
            }
        }
        Ok(started_at.elapsed())
    }
}

/// A plain copy of `num_bytes` on one thread, from memory that is larger than the caches.
pub(super) struct Memcpy {
    from: Vec<u8>,
    into: Vec<u8>,
}

impl Memcpy {
    pub(super) fn new(num_bytes: usize) -> Self {
        Self { from: vec![0xa5; num_bytes], into: vec![0; num_bytes] }
    }

    pub(super) fn copy(&mut self) -> Duration {
        let started_at = Instant::now();
        self.into.copy_from_slice(&self.from);
        std::hint::black_box(&self.into);
        started_at.elapsed()
    }
}
