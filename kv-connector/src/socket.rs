//! UDP sockets and QUIC transport parameters.
//!
//! Datagram size decides how fast QUIC is (per-packet work dominates). Every connection begins with the 1,200
//! bytes that any path carries and probes from there up to what both ends announce
//! (`max_udp_payload_size`): 8,952 bytes for messages, 65,507 for KV. Probes that a path does not carry are
//! lost without harm, datagrams are never fragmented, and a path that comes to carry less is noticed by the
//! losses and falls back to 1,200. So loopback ends at 65,507, a jumbo network at about 8,950 and an ordinary
//! one at about 1,450, without a setting.
//!
//! Traps that decide the rest. One send of several segments may not exceed 65,507 bytes
//! ([`segments`](crate::segments)). A congestion window below the datagram size never sends: windows begin
//! above 1,200 bytes and rise with what is discovered. Loopback loses what does not fit the receiving socket's
//! buffer, 3 % of all datagrams with a window of twice the buffer: there a receiver grants half of it.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use common::config::CongestionControl;
use quinn::{Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, Runtime};
use quinn::{ServerConfig, Side, TransportConfig, VarInt};
use tokio::runtime::Handle;

use crate::busy_poll::{Activity, PolledSocket};
use crate::congestion;
use crate::kv_threads::QuicOn;
use crate::limits::FabricLimits;
use crate::segments::{SEND_BYTES_MAX, SegmentedSocket};

/// Largest UDP payload over IPv4; over IPv6 20 bytes more would fit.
const DATAGRAM_BYTES_MAX: u16 = 65_507;
/// UDP payload of a 9,000-byte MTU over IPv6.
const CONTROL_DATAGRAM_BYTES: u16 = 8_952;
/// Asked of the kernel, which caps it at `net.core.rmem_max` and `wmem_max`.
const BULK_SOCKET_BYTES: usize = 8 << 20;
const CONTROL_SOCKET_BYTES: usize = 2 << 20;
/// Streams that a peer may have open on a control connection it has just dialled. quinn keeps 68 bytes and more for
/// each that may be opened, open or not, so more are allowed once it has opened some
/// ([`accept`](crate::accept)).
pub(crate) const NUM_STREAMS_AT_FIRST: u32 = 64;

/// How KV travels over QUIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BulkPath {
    /// Who decides how much may be on the way.
    pub congestion_control: CongestionControl,
    /// Largest UDP payload sent or received; from 1,200 to 65,507.
    pub max_udp_payload_bytes: u16,
}

impl Default for BulkPath {
    fn default() -> Self {
        Self { congestion_control: CongestionControl::Cubic, max_udp_payload_bytes: DATAGRAM_BYTES_MAX }
    }
}

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
    path: BulkPath,
    /// What the kernel granted for datagrams that wait to be read.
    buffer_bytes: usize,
}

/// Who else may receive on the port of a socket. The kernel divides peers among those that share one, by both ends'
/// addresses and ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Port {
    /// Nobody.
    Own,
    /// It had none when it was bound, and further sockets of this user may join.
    First,
    /// A further one.
    Joins,
}

/// Binds an endpoint. With `server` it also accepts; `path` is that of KV; with `activity` it is looked at a little
/// longer before its thread sleeps. All that it does by itself, it does on `threads`.
pub(crate) fn bind(
    (addr, port): (SocketAddr, Port),
    traffic: Traffic,
    path: BulkPath,
    server: Option<ServerConfig>,
    activity: Option<&Arc<Activity>>,
    threads: &Handle,
) -> io::Result<Socket> {
    let domain = socket2::Domain::for_address(addr);
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, Some(socket2::Protocol::UDP))?;
    let (num_bytes, max_payload) = match traffic {
        Traffic::Control => (CONTROL_SOCKET_BYTES, CONTROL_DATAGRAM_BYTES),
        Traffic::Bulk => (BULK_SOCKET_BYTES, path.max_udp_payload_bytes),
    };
    // Less than asked for is slower, not wrong.
    let _ = socket.set_recv_buffer_size(num_bytes);
    let _ = socket.set_send_buffer_size(num_bytes);
    let buffer_bytes = socket.recv_buffer_size()?;
    // Set before, the first would share the port with whoever has it, be it another node.
    socket.set_reuse_port(port == Port::Joins)?;
    socket.bind(&addr.into())?;
    socket.set_reuse_port(port != Port::Own)?;
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(max_payload).map_err(io::Error::other)?;
    let socket = UdpSocket::from(socket);
    let another = activity.map(|activity| PolledSocket::new(socket.try_clone()?, activity.clone()));
    let polled = another.transpose()?;
    let runtime = Arc::new(QuicOn(threads.clone()));
    let inner = runtime.wrap_udp_socket(socket)?;
    let socket = Arc::new(SegmentedSocket::new(inner, max_payload, polled));
    let endpoint = Endpoint::new_with_abstract_socket(config, server, socket, runtime)?;
    Ok(Socket { endpoint, traffic, path, buffer_bytes })
}

impl Socket {
    /// Transport parameters of a connection with `remote`, on which this end is `side`; one of `num_connections` for
    /// KV.
    pub(crate) fn transport(
        &self,
        limits: &FabricLimits,
        remote: SocketAddr,
        side: Side,
        num_connections: u16,
    ) -> Arc<TransportConfig> {
        Arc::new(match self.traffic {
            Traffic::Control => control_transport(limits, side),
            Traffic::Bulk => self.bulk_transport(limits, remote, num_connections),
        })
    }

    /// KV that one of `num_connections` with `remote` may have unread here.
    pub(crate) fn receive_window(&self, limits: &FabricLimits, remote: SocketAddr, num_connections: u16) -> VarInt {
        let part = limits.bulk_window_bytes / u32::from(num_connections.max(1));
        VarInt::from_u32(self.window_of_a_stream(limits, remote).min(part.max(2 * u32::from(DATAGRAM_BYTES_MAX))))
    }

    /// KV that one of `num_connections` may have on the way from here.
    pub(crate) fn send_window(limits: &FabricLimits, num_connections: u16) -> u64 {
        u64::from(limits.bulk_window_bytes / u32::from(num_connections.max(1)))
    }

    fn window_of_a_stream(&self, limits: &FabricLimits, remote: SocketAddr) -> u32 {
        if !is_loopback(remote) {
            return limits.bulk_window_bytes;
        }
        let buffered = u32::try_from(self.buffer_bytes / 2).unwrap_or(u32::MAX);
        limits.bulk_window_bytes.min(buffered.max(2 * u32::from(DATAGRAM_BYTES_MAX)))
    }

    fn bulk_transport(&self, limits: &FabricLimits, remote: SocketAddr, num_connections: u16) -> TransportConfig {
        let BulkPath { congestion_control, max_udp_payload_bytes } = self.path;
        let mut config = common(limits, max_udp_payload_bytes);
        let is_loopback = is_loopback(remote);
        if is_loopback {
            // No two of the datagrams that are soon found would fit one send.
            config.enable_segmentation_offload(2 * usize::from(max_udp_payload_bytes) <= SEND_BYTES_MAX);
        }
        config
            // One after the other: the hello, and what asks for a device's pool. Whose device copies allows more, once
            // it does.
            .max_concurrent_bidi_streams(VarInt::from_u32(1))
            .max_concurrent_uni_streams(VarInt::from_u32(limits.num_extents_max))
            .stream_receive_window(VarInt::from_u32(self.window_of_a_stream(limits, remote)))
            .receive_window(self.receive_window(limits, remote, num_connections))
            .send_window(Self::send_window(limits, num_connections))
            // Whole extents one after another: the first is complete, and of use, as early as can be.
            .send_fairness(false)
            .congestion_controller_factory(congestion::factory(congestion_control, is_loopback));
        config
    }
}

fn is_loopback(remote: SocketAddr) -> bool {
    remote.ip().to_canonical().is_loopback()
}

fn control_transport(limits: &FabricLimits, side: Side) -> TransportConfig {
    let mut config = common(limits, CONTROL_DATAGRAM_BYTES);
    let num_streams = match side {
        // Nothing in the protocol is opened by the end that was dialled.
        Side::Client => 0,
        Side::Server => NUM_STREAMS_AT_FIRST.min(limits.num_streams_max),
    };
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(num_streams))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(1 << 20))
        .receive_window(VarInt::from_u32(16 << 20))
        .send_window(32 << 20);
    config
}

fn common(limits: &FabricLimits, max_udp_payload_bytes: u16) -> TransportConfig {
    let mut config = TransportConfig::default();
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(max_udp_payload_bytes);
    let idle = IdleTimeout::try_from(limits.idle_timeout).expect("an idle limit of seconds fits a QUIC integer");
    config
        .keep_alive_interval(Some(limits.keep_alive))
        .max_idle_timeout(Some(idle))
        .mtu_discovery_config(Some(discovery))
        .datagram_receive_buffer_size(None);
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::time::Duration;

    use bytes::Bytes;
    use common::ids::{NodeId, Role};

    use crate::{certs::ClusterCa, certs::role_name, tls};

    const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

    /// Each trap of large datagrams would show here: as small datagrams, as losses, or as nothing arriving at all.
    async fn loopback_bulk(path: BulkPath) {
        let (ca, limits) = (ClusterCa::generate().unwrap(), FabricLimits::default());
        let identity = ca.issue(Role::PrefillNode, &NodeId::new("p0").unwrap()).unwrap();
        let alpn = || vec![b"test".to_vec()];
        let mut server = ServerConfig::with_crypto(tls::server(&identity, alpn()).unwrap());
        let bound = |server: Option<ServerConfig>| {
            bind((LOOPBACK, Port::Own), Traffic::Bulk, path, server, None, &Handle::current()).unwrap()
        };
        let (receiver, sender) = (bound(None), bound(Some(server.clone())));
        let addr = sender.endpoint.local_addr().unwrap();
        server.transport_config(sender.transport(&limits, LOOPBACK, Side::Server, 1));
        let mut client = quinn::ClientConfig::new(tls::client(&identity, alpn()).unwrap());
        client.transport_config(receiver.transport(&limits, addr, Side::Client, 1));
        let accepting = async {
            let incoming = sender.endpoint.accept().await.unwrap();
            incoming.accept_with(Arc::new(server)).unwrap().await.unwrap()
        };
        let connecting = receiver.endpoint.connect_with(client, addr, &role_name(Role::PrefillNode)).unwrap();
        let (from, to) = tokio::join!(accepting, connecting);
        let (from, to) = (from, to.unwrap());
        let discovered = async {
            while from.stats().path.current_mtu != path.max_udp_payload_bytes {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), discovered).await.expect("the path's size is found");

        const NUM_BYTES: usize = 32 << 20;
        let before = from.stats();
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
        assert_eq!((stats.path.current_mtu, stats.path.black_holes_detected), (path.max_udp_payload_bytes, 0));
        let num_datagrams = stats.udp_tx.datagrams - before.udp_tx.datagrams;
        assert!(num_datagrams < 2 * (NUM_BYTES as u64 / u64::from(path.max_udp_payload_bytes)), "{stats:?}");
        assert!(stats.path.lost_packets * 100 <= stats.path.sent_packets, "{stats:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn loopback_bulk_travels_in_large_datagrams_and_loses_none() {
        loopback_bulk(BulkPath::default()).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn segments_beyond_one_send_are_divided() {
        let congestion_control = CongestionControl::Fixed;
        loopback_bulk(BulkPath { congestion_control, max_udp_payload_bytes: 30_000 }).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn datagrams_are_never_larger_than_they_may_be() {
        let congestion_control = CongestionControl::Bbr;
        loopback_bulk(BulkPath { congestion_control, max_udp_payload_bytes: 1472 }).await;
    }
}
