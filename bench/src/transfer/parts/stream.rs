//! quinn as Tandem has it, and one stream over it: what is left between this and `quic` is Tandem's, what is between
//! this and bare datagrams is quinn's.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, mpsc as blocking};
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, ClientConfig, Connection, Endpoint, EndpointConfig, Runtime as _, ServerConfig};
use quinn::{MtuDiscoveryConfig, TokioRuntime, TransportConfig, UdpPoller, VarInt};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::{STREAM, ask_for, exchange_ports, noise, read_number};
use crate::transfer::TLS_NAME;
use crate::transfer::baseline::{self, Asked};

const SEND_BYTES_MAX: usize = 65_507;
/// Half of what a kernel of this kind grants a socket.
const WINDOW_BYTES: u32 = 4 << 20;
const SEND_WINDOW_BYTES: u64 = 16 << 20;
const INITIAL_WINDOW_BYTES: u64 = 512 << 10;
const SOCKET_BYTES: usize = 8 << 20;
const NUM_CHUNKS_PER_READ: usize = 64;

/// A socket that is not given more than the kernel takes at once.
struct Capped {
    inner: Arc<dyn AsyncUdpSocket>,
    num_segments_max: usize,
}

impl fmt::Debug for Capped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl AsyncUdpSocket for Capped {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut TaskContext<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        // Few enough to be in a cache still when they are decrypted.
        let num_buffers = bufs.len().min(4);
        self.inner.poll_recv(cx, &mut bufs[..num_buffers], meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(self.num_segments_max)
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments().min(self.num_segments_max + 1)
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

fn transport(datagram_bytes: u16) -> Arc<TransportConfig> {
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW_BYTES);
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(datagram_bytes);
    let mut config = TransportConfig::default();
    config
        .mtu_discovery_config(Some(discovery))
        .enable_segmentation_offload(2 * usize::from(datagram_bytes) <= SEND_BYTES_MAX)
        .stream_receive_window(VarInt::from_u32(WINDOW_BYTES))
        .receive_window(VarInt::from_u32(WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        .send_fairness(false)
        .congestion_controller_factory(Arc::new(congestion))
        // Between two questions other rows are measured.
        .max_idle_timeout(None);
    Arc::new(config)
}

/// To be called within a runtime.
fn endpoint(ip: IpAddr, datagram_bytes: u16, server: Option<ServerConfig>) -> anyhow::Result<Endpoint> {
    let socket = UdpSocket::bind((ip, 0)).context("bind a UDP socket")?;
    let state = quinn::udp::UdpSocketState::new((&socket).into()).context("prepare a UDP socket")?;
    // Less than asked for is slower, not wrong.
    let _ = state.set_recv_buffer_size((&socket).into(), SOCKET_BYTES);
    let _ = state.set_send_buffer_size((&socket).into(), SOCKET_BYTES);
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(datagram_bytes).context("the size of datagrams")?;
    let inner = TokioRuntime.wrap_udp_socket(socket).context("hand a UDP socket to the runtime")?;
    let socket = Capped { inner, num_segments_max: SEND_BYTES_MAX / usize::from(datagram_bytes) };
    let runtime = Arc::new(TokioRuntime);
    Endpoint::new_with_abstract_socket(config, server, Arc::new(socket), runtime).context("make an endpoint")
}

fn runtime() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")
}

/// A thread with a runtime of its own, which asks when it is asked, and acknowledges what comes also in between.
pub(in crate::transfer) struct Stream {
    questions: mpsc::Sender<usize>,
    answers: blocking::Receiver<anyhow::Result<Duration>>,
}

impl Stream {
    /// The CA lies in `dir`.
    pub(in crate::transfer) fn connect(
        addr: SocketAddr,
        datagram_bytes: u16,
        mib: u32,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        let (questions, mut asked) = mpsc::channel(1);
        let (answer, answers) = blocking::channel();
        let crypto = QuicClientConfig::try_from(baseline::tls_client(dir)?).context("TLS for QUIC")?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(transport(datagram_bytes));
        std::thread::spawn(move || {
            // Whoever asked is gone if it does not hear the end.
            if let Err(error) = ask(addr, datagram_bytes, mib, config, &mut asked, &answer) {
                let _ = answer.send(Err(error));
            }
        });
        let stream = Self { questions, answers };
        stream.answer()?; // that it is connected
        Ok(stream)
    }

    fn answer(&self) -> anyhow::Result<Duration> {
        self.answers.recv().context("the thread that asks over quinn is gone")?
    }
}

impl Asked for Stream {
    fn receive(&mut self, num_bytes: usize) -> anyhow::Result<Duration> {
        self.questions.try_send(num_bytes).context("the thread that asks over quinn is gone")?;
        self.answer()
    }
}

fn ask(
    addr: SocketAddr,
    datagram_bytes: u16,
    mib: u32,
    config: ClientConfig,
    asked: &mut mpsc::Receiver<usize>,
    answer: &blocking::Sender<anyhow::Result<Duration>>,
) -> anyhow::Result<()> {
    let mut tcp = TcpStream::connect(addr).context("connect to who sends a stream")?;
    ask_for(&mut tcp, STREAM, datagram_bytes, mib)?;
    let runtime = runtime()?;
    let _entered = runtime.enter();
    let endpoint = endpoint(tcp.local_addr()?.ip(), datagram_bytes, None)?;
    let port = exchange_ports(&mut tcp, endpoint.local_addr()?.port())?;
    let connecting = endpoint.connect_with(config, SocketAddr::new(addr.ip(), port), TLS_NAME)?;
    let connection = runtime.block_on(connecting).context("connect over quinn")?;
    let mut into = vec![0; mib as usize * (1 << 20)];
    answer.send(Ok(Duration::ZERO))?;
    runtime.block_on(async {
        // Until the other end of the channel is gone.
        while let Some(num_bytes) = asked.recv().await {
            let started_at = Instant::now();
            let received = receive(&connection, num_bytes, &mut into).await;
            answer.send(received.map(|()| started_at.elapsed()))?;
        }
        Ok(())
    })
}

async fn receive(connection: &Connection, num_bytes: usize, into: &mut [u8]) -> anyhow::Result<()> {
    let (mut question, mut answer) = connection.open_bi().await.context("ask over quinn")?;
    question.write_all(&(num_bytes as u64).to_le_bytes()).await.context("ask over quinn")?;
    question.finish().context("ask over quinn")?;
    let mut chunks = [const { Bytes::new() }; NUM_CHUNKS_PER_READ];
    let mut at = 0;
    while let Some(count) = answer.read_chunks(&mut chunks).await.context("read over quinn")? {
        for chunk in &mut chunks[..count] {
            let chunk = std::mem::take(chunk);
            let place = into.get_mut(at..at + chunk.len()).context("more came than was asked for")?;
            place.copy_from_slice(&chunk);
            at += chunk.len();
        }
    }
    ensure!(at == num_bytes, "{at} bytes came instead of {num_bytes}");
    Ok(())
}

/// Sends as many bytes as each question on a stream of its own asks for, until `tcp` or the connection ends. The
/// sender's certificate lies in `dir`.
pub(super) fn serve(mut tcp: TcpStream, datagram_bytes: u16, mib: u32, dir: &Path) -> anyhow::Result<()> {
    let runtime = runtime()?;
    let crypto = QuicServerConfig::try_from(baseline::tls_server(dir)?).context("TLS for QUIC")?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(transport(datagram_bytes));
    let endpoint = {
        let _entered = runtime.enter();
        endpoint(tcp.local_addr()?.ip(), datagram_bytes, Some(config))?
    };
    exchange_ports(&mut tcp, endpoint.local_addr()?.port())?;
    let pool = Bytes::from(noise(mib));
    let ended = runtime.spawn_blocking(move || read_number(&mut tcp).is_ok());
    runtime.block_on(async {
        tokio::select! {
            served = answer(&endpoint, &pool) => served,
            _ = ended => Ok(()),
        }
    })
}

async fn answer(endpoint: &Endpoint, pool: &Bytes) -> anyhow::Result<()> {
    let connection = endpoint.accept().await.context("nobody connects")?.await.context("accept over quinn")?;
    // Ends with the connection.
    while let Ok((mut sender, mut receiver)) = connection.accept_bi().await {
        let mut question = [0; 8];
        receiver.read_exact(&mut question).await.context("read a question")?;
        let num_bytes = u64::from_le_bytes(question) as usize;
        ensure!(num_bytes <= pool.len(), "more is asked for than there is");
        sender.write_all_chunks(&mut [pool.slice(..num_bytes)]).await.context("answer over quinn")?;
        sender.finish().context("answer over quinn")?;
    }
    Ok(())
}
