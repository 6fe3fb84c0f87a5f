//! A peer that speaks QUIC with a certificate of the cluster, and whatever a test wants beyond that.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::ids::Role;
use common::wire::{self, Hello, HelloReply, Message, Open, Registration};
use quinn::{Connection, RecvStream};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::{Cluster, LOOPBACK, node, soon};

/// Version 1 as it is on the wire: control and bulk connections.
pub const ALPN_CONTROL: &[u8] = b"tandem/1";
pub const ALPN_BULK: &[u8] = b"tandem-bulk/1";

/// Certificate and key of a node of the cluster, for use without a fabric.
pub struct Raw {
    roots: Arc<rustls::RootCertStore>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

impl Raw {
    pub fn new(cluster: &Cluster, name: &str, role: Role) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let unique = COUNT.fetch_add(1, Ordering::SeqCst);
        let dir = std::env::temp_dir().join(format!("tandem-hostile-{}-{unique}", std::process::id()));
        cluster.ca.issue(role, &node(name)).unwrap().save(&dir).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(cluster.ca.certificate_pem().as_bytes()).unwrap()).unwrap();
        let certificate = CertificateDer::from_pem_file(dir.join(format!("{name}.pem"))).unwrap();
        let key = PrivateKeyDer::from_pem_file(dir.join(format!("{name}.key"))).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
        Self { roots: Arc::new(roots), certificate, key }
    }

    pub async fn dial(&self, addr: SocketAddr, role: Role, alpn: &[u8]) -> Result<Connection, quinn::ConnectionError> {
        let mut tls = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(self.roots.clone())
            .with_client_auth_cert(vec![self.certificate.clone()], self.key.clone_key())
            .unwrap();
        tls.alpn_protocols = vec![alpn.to_vec()];
        let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
        let endpoint = quinn::Endpoint::client(LOOPBACK).unwrap();
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        let mut transport = quinn::TransportConfig::default();
        transport.keep_alive_interval(Some(Duration::from_millis(100)));
        config.transport_config(Arc::new(transport));
        endpoint.connect_with(config, addr, &format!("{role}.role.tandem")).unwrap().await
    }

    pub fn listen(&self, alpn: &[u8]) -> quinn::Endpoint {
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(self.roots.clone(), provider());
        let mut tls = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(vec![self.certificate.clone()], self.key.clone_key())
            .unwrap();
        tls.alpn_protocols = vec![alpn.to_vec()];
        let tls = quinn::crypto::rustls::QuicServerConfig::try_from(tls).unwrap();
        quinn::Endpoint::server(quinn::ServerConfig::with_crypto(Arc::new(tls)), LOOPBACK).unwrap()
    }
}

pub fn frame<M: Message>(message: &M) -> Vec<u8> {
    let body = wire::encode(message).unwrap();
    [&(body.len() as u32).to_le_bytes()[..], &body].concat()
}

pub async fn read_frame<M: Message>(stream: &mut RecvStream) -> M {
    next_frame(stream).await.expect("the connection is there")
}

/// `None` if the connection ends instead.
pub async fn next_frame<M: Message>(stream: &mut RecvStream) -> Option<M> {
    let mut length = [0; 4];
    soon("a length", stream.read_exact(&mut length)).await.ok()?;
    let mut body = vec![0; u32::from_le_bytes(length) as usize];
    soon("a body", stream.read_exact(&mut body)).await.unwrap();
    Some(wire::decode(&body).unwrap())
}

pub async fn greet(connection: &Connection, hello: Hello) -> HelloReply {
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&frame(&Open::Hello(hello))).await.unwrap();
    read_frame(&mut recv).await
}

pub async fn welcome(connection: &Connection, hello: Hello) {
    welcome_with(connection, hello, None).await;
}

pub async fn welcome_with(connection: &Connection, hello: Hello, registration: Option<Registration>) {
    let (mut send, mut recv) = soon("a hello", connection.accept_bi()).await.unwrap();
    let _: Open = read_frame(&mut recv).await;
    send.write_all(&frame(&HelloReply::Welcome { hello: Box::new(hello), registration })).await.unwrap();
    send.finish().unwrap();
}
