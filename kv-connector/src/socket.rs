//! UDP sockets and QUIC transport parameters.
//!
//! Datagram size decides how fast QUIC is (per-packet work dominates), so:
//!
//! ```text
//! peer on                datagrams                       segments per send
//! loopback, bulk         65,507 bytes from the start     1   (segmentation off)
//! loopback, control      1,200, searched up to 8,952     up to 7
//! a network              1,200, searched up to 8,952     up to 7
//! ```
//!
//! Three traps that decide these numbers. One send of several segments may not exceed 65,507 bytes in
//! all, or the kernel refuses it and the connection falls back to small datagrams: the socket allows 7
//! segments, and loopback bulk one. A congestion window that starts below the datagram size never sends:
//! the bulk window starts at several datagrams. Loopback loses what does not fit the receiving socket's
//! buffer, 3 % of all datagrams with a window of twice the buffer: there a receiver grants half of it. And
//! a node announces the datagrams it takes
//! (`max_udp_payload_size`), which is 1,472 unless raised. A path that takes less than was assumed is
//! found out by QUIC's own black-hole detection and falls back to 1,200 bytes.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::congestion::CubicConfig;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, Runtime, TokioRuntime};
use quinn::{ServerConfig, TransportConfig, UdpPoller, VarInt};

use crate::limits::FabricLimits;

/// Largest UDP payload over IPv4; over IPv6 20 bytes more would fit.
const LOOPBACK_DATAGRAM_BYTES: u16 = 65_507;
/// UDP payload of a 9,000-byte MTU over IPv6.
const NETWORK_DATAGRAM_BYTES: u16 = 8_952;
/// 7 x 8,952 = 62,664 <= 65,507.
const NUM_SEGMENTS_MAX: usize = 7;
/// Asked of the kernel, which caps it at `net.core.rmem_max` and `wmem_max`.
const BULK_SOCKET_BYTES: usize = 8 << 20;
const CONTROL_SOCKET_BYTES: usize = 2 << 20;
/// Extents are large and windows few: the first round trip already carries this much.
const BULK_INITIAL_WINDOW_BYTES: u64 = 512 << 10;

/// What a socket carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Traffic {
    /// Messages.
    Control,
    /// KV.
    Bulk,
}

impl Traffic {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Traffic::Control => "control",
            Traffic::Bulk => "bulk",
        }
    }
}

/// A bound endpoint. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Socket {
    pub(crate) endpoint: Endpoint,
    pub(crate) traffic: Traffic,
    /// What the kernel granted for datagrams that wait to be read.
    buffer_bytes: usize,
}

/// Binds an endpoint. With `server` it also accepts.
pub(crate) fn bind(addr: SocketAddr, traffic: Traffic, server: Option<ServerConfig>) -> io::Result<Socket> {
    let domain = socket2::Domain::for_address(addr);
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, Some(socket2::Protocol::UDP))?;
    let num_bytes = match traffic {
        Traffic::Control => CONTROL_SOCKET_BYTES,
        Traffic::Bulk => BULK_SOCKET_BYTES,
    };
    // Less than asked for is slower, not wrong.
    let _ = socket.set_recv_buffer_size(num_bytes);
    let _ = socket.set_send_buffer_size(num_bytes);
    let buffer_bytes = socket.recv_buffer_size()?;
    socket.bind(&addr.into())?;
    let mut config = EndpointConfig::default();
    let max_payload = match traffic {
        Traffic::Control => NETWORK_DATAGRAM_BYTES,
        Traffic::Bulk => LOOPBACK_DATAGRAM_BYTES,
    };
    config.max_udp_payload_size(max_payload).map_err(io::Error::other)?;
    let inner = TokioRuntime.wrap_udp_socket(UdpSocket::from(socket))?;
    let socket = Arc::new(SegmentCap { inner });
    let endpoint = Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime))?;
    Ok(Socket { endpoint, traffic, buffer_bytes })
}

impl Socket {
    /// Transport parameters of a connection with `remote`.
    pub(crate) fn transport(&self, limits: &FabricLimits, remote: SocketAddr) -> Arc<TransportConfig> {
        Arc::new(match self.traffic {
            Traffic::Control => control_transport(limits),
            Traffic::Bulk => self.bulk_transport(limits, remote.ip().to_canonical().is_loopback()),
        })
    }

    fn bulk_transport(&self, limits: &FabricLimits, is_loopback: bool) -> TransportConfig {
        let mut config = common(limits);
        let mut congestion = CubicConfig::default();
        congestion.initial_window(BULK_INITIAL_WINDOW_BYTES);
        let mut window_bytes = limits.bulk_window_bytes;
        if is_loopback {
            let buffered = u32::try_from(self.buffer_bytes / 2).unwrap_or(u32::MAX);
            window_bytes = window_bytes.min(buffered.max(2 * u32::from(LOOPBACK_DATAGRAM_BYTES)));
            config.initial_mtu(LOOPBACK_DATAGRAM_BYTES).mtu_discovery_config(None).enable_segmentation_offload(false);
        }
        config
            // The hello, and nothing else.
            .max_concurrent_bidi_streams(VarInt::from_u32(1))
            .max_concurrent_uni_streams(VarInt::from_u32(limits.num_extents_max))
            .stream_receive_window(VarInt::from_u32(window_bytes))
            .receive_window(VarInt::from_u32(window_bytes))
            .send_window(u64::from(limits.bulk_window_bytes))
            // Whole extents one after another: the first is complete, and of use, as early as can be.
            .send_fairness(false)
            .congestion_controller_factory(Arc::new(congestion));
        config
    }
}

fn control_transport(limits: &FabricLimits) -> TransportConfig {
    let mut config = common(limits);
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(limits.num_streams_max))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(1 << 20))
        .receive_window(VarInt::from_u32(16 << 20))
        .send_window(32 << 20);
    config
}

fn common(limits: &FabricLimits) -> TransportConfig {
    let mut config = TransportConfig::default();
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(NETWORK_DATAGRAM_BYTES);
    let idle = IdleTimeout::try_from(limits.idle_timeout).expect("an idle limit of seconds fits a QUIC integer");
    config
        .keep_alive_interval(Some(limits.keep_alive))
        .max_idle_timeout(Some(idle))
        .mtu_discovery_config(Some(discovery))
        .datagram_receive_buffer_size(None);
    config
}

/// A socket that never sends more than [`NUM_SEGMENTS_MAX`] segments at once.
struct SegmentCap {
    inner: Arc<dyn AsyncUdpSocket>,
}

impl fmt::Debug for SegmentCap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl AsyncUdpSocket for SegmentCap {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(NUM_SEGMENTS_MAX)
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use bytes::Bytes;
    use common::ids::{NodeId, Role};

    use crate::{certs::ClusterCa, certs::role_name, tls};

    const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

    /// The three traps of large datagrams would each show here: as small datagrams, as losses, or as
    /// nothing arriving at all.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn loopback_bulk_travels_in_large_datagrams_and_loses_none() {
        let (ca, limits) = (ClusterCa::generate().unwrap(), FabricLimits::default());
        let identity = ca.issue(Role::PrefillNode, &NodeId::new("p0").unwrap()).unwrap();
        let alpn = || vec![b"test".to_vec()];
        let mut server = ServerConfig::with_crypto(tls::server(&identity, alpn()).unwrap());
        let receiver = bind(LOOPBACK, Traffic::Bulk, None).unwrap();
        let sender = bind(LOOPBACK, Traffic::Bulk, Some(server.clone())).unwrap();
        let addr = sender.endpoint.local_addr().unwrap();
        server.transport_config(sender.transport(&limits, LOOPBACK));
        let mut client = quinn::ClientConfig::new(tls::client(&identity, alpn()).unwrap());
        client.transport_config(receiver.transport(&limits, addr));
        let accepting = async {
            let incoming = sender.endpoint.accept().await.unwrap();
            incoming.accept_with(Arc::new(server)).unwrap().await.unwrap()
        };
        let connecting = receiver.endpoint.connect_with(client, addr, &role_name(Role::PrefillNode)).unwrap();
        let (from, to) = tokio::join!(accepting, connecting);
        let (from, to) = (from, to.unwrap());

        const NUM_BYTES: usize = 64 << 20;
        let writing = tokio::spawn({
            let from = from.clone();
            async move {
                let mut stream = from.open_uni().await.unwrap();
                stream.write_all_chunks(&mut [Bytes::from(vec![7; NUM_BYTES])]).await.unwrap();
                stream.finish().unwrap();
                stream.stopped().await.unwrap();
            }
        });
        let mut stream = to.accept_uni().await.unwrap();
        assert_eq!(stream.read_to_end(NUM_BYTES).await.unwrap().len(), NUM_BYTES);
        writing.await.unwrap();
        let stats = from.stats();
        assert_eq!(stats.path.current_mtu, LOOPBACK_DATAGRAM_BYTES);
        assert_eq!(stats.path.black_holes_detected, 0);
        assert!(stats.udp_tx.datagrams < 2 * (NUM_BYTES as u64 / u64::from(LOOPBACK_DATAGRAM_BYTES)), "{stats:?}");
        assert!(stats.path.lost_packets * 100 <= stats.path.sent_packets, "{stats:?}");
    }
}
