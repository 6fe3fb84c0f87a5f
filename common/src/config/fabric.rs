//! Who a process is in the cluster, and where it listens.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::InvalidSettings;
use super::values::{HostPort, parse_busy_poll, parse_bytes_above_zero, parse_duration, parse_port};
use crate::ids::NodeId;

/// Name, certificates and farewell of any process of the cluster.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Identity")]
pub struct IdentityArgs {
    /// Name in the cluster, unique, and the one in the certificate: a-z, 0-9 and '-'. Default: the role's name.
    #[arg(long, value_name = "NAME")]
    pub node_id: Option<NodeId>,

    /// Folder that `tandem certs` made: ca.pem, NAME.pem and NAME.key are read from it.
    #[arg(long, value_name = "FOLDER")]
    pub tls_dir: Option<PathBuf>,

    /// The cluster's CA certificate (PEM), instead of the one in --tls-dir.
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,

    /// This process's certificate chain (PEM), instead of the one in --tls-dir.
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert (PEM), instead of the one in --tls-dir.
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,

    /// How long running requests may go on after SIGTERM or Ctrl-C. 0s: they are cut at once.
    ///
    /// Longer loses fewer requests; shorter makes roll-outs quicker.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub drain_timeout: Duration,
}

/// The three files of mutual TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsPaths {
    /// Certificate of the cluster's CA.
    pub ca: PathBuf,
    /// Certificate chain of this process.
    pub cert: PathBuf,
    /// Private key of `cert`.
    pub key: PathBuf,
}

impl IdentityArgs {
    /// The name in the cluster, `default` if none was given.
    pub fn node_id_or(&self, default: NodeId) -> NodeId {
        self.node_id.clone().unwrap_or(default)
    }

    /// Where the certificates of the process called `node` are.
    ///
    /// # Errors
    /// [`InvalidSettings`] if one of the three is given neither alone nor by --tls-dir.
    pub fn tls_paths(&self, node: &NodeId) -> Result<TlsPaths, InvalidSettings> {
        let pick = |given: &Option<PathBuf>, name: String, flag: &str| {
            given.clone().or_else(|| self.tls_dir.as_ref().map(|dir| dir.join(name))).ok_or_else(|| {
                InvalidSettings(format!(
                    "no certificates: {flag} is missing and there is no --tls-dir; make them with `tandem certs` and \
                     give its folder as --tls-dir"
                ))
            })
        };
        Ok(TlsPaths {
            ca: pick(&self.tls_ca, "ca.pem".into(), "--tls-ca")?,
            cert: pick(&self.tls_cert, format!("{node}.pem"), "--tls-cert")?,
            key: pick(&self.tls_key, format!("{node}.key"), "--tls-key")?,
        })
    }
}

/// Where a prefill or decode node listens, and to whom it announces itself.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Fabric")]
pub struct FabricArgs {
    /// Name and certificates.
    #[command(flatten)]
    pub identity: IdentityArgs,

    /// Address to listen on. 0.0.0.0 or :: takes connections from other hosts.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", help_heading = "Fabric")]
    pub host: String,

    /// UDP port of control connections. 0 takes a free one: then the node must --register.
    #[arg(long, value_name = "PORT", default_value_t = 0, value_parser = parse_port, help_heading = "Fabric")]
    pub port: u16,

    /// Fabric address of a proxy to announce this node to, host:port; repeat it for several.
    ///
    /// Without it the proxy must list the node (--prefill-node, --decode-node).
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',', help_heading = "Fabric")]
    pub register: Vec<HostPort>,

    /// Ways that KV may take from prefill to decode nodes: quic, and any of shm, cuda-ipc and nixl.
    ///
    /// With shm at both ends, a decode node on the same host (and in the same network namespace, as the same
    /// user) reads KV where it lies in the prefill node's memory, in one pass and without encryption; any other
    /// pair of nodes uses quic. Nodes joined by shm are one trust domain: each decode node can read the whole
    /// KV pool of the prefill node. The pool of a prefill node with shm is in huge pages only if
    /// /sys/kernel/mm/transparent_hugepage/shmem_enabled says advise. quic alone turns shm off.
    ///
    /// cuda-ipc is the same between GPUs of one host: where both pools are in GPUs' memory, the decode node's GPU
    /// copies KV out of the prefill node's, and the hosts see none of it. The log says why where it cannot be had.
    ///
    /// With nixl at both ends, the decode node fetches KV out of the prefill node's memory, or its GPU's, through
    /// NVIDIA's NIXL library (see --nixl-library): InfiniBand, RoCE, and what else its UCX can do; UCX's own settings
    /// (UCX_TLS and others) are taken from the environment. NIXL authenticates nobody and encrypts nothing, and whoever
    /// reaches it can write to the node's memory, too: only on a network that nobody else reaches. A node that lists it
    /// and cannot load it does not start; where only its GPU cannot be used with it, the log says why, and KV takes
    /// another way.
    #[arg(
        long,
        value_enum,
        value_name = "TRANSPORTS",
        value_delimiter = ',',
        default_values_t = [KvTransport::Quic, KvTransport::Shm, KvTransport::CudaIpc],
        help_heading = "Fabric"
    )]
    pub kv_transports: Vec<KvTransport>,

    /// KV through NIXL.
    #[command(flatten)]
    pub nixl: NixlArgs,

    /// KV over quic.
    #[command(flatten)]
    pub kv_quic: KvQuicArgs,

    /// How long a node looks for the next message or KV before its network threads sleep. Default: not at all.
    ///
    /// Behind each datagram sent or received, and only while the node's engine has nothing to compute: 50us for
    /// example, at most 1ms. To be woken takes 15 to 35us, so this can shorten what follows at once: small transfers,
    /// the last part of a large one. It costs a core for that time, so only where the node has its cores for itself.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = parse_busy_poll, help_heading = "Fabric")]
    pub busy_poll: Duration,

    /// TCP port of the node's own /metrics and /health on --host. 0 takes a free one. Default: off.
    #[arg(long, value_name = "PORT", value_parser = parse_port, help_heading = "Fabric")]
    pub metrics_port: Option<u16>,
}

/// KV through NIXL.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
#[command(next_help_heading = "Fabric")]
pub struct NixlArgs {
    /// NIXL's C library, for --kv-transports nixl: libnixl_capi.so of version 1.5.
    ///
    /// A name without a slash is looked for as by any program, in LD_LIBRARY_PATH first.
    #[arg(long, value_name = "FILE", default_value = "libnixl_capi.so")]
    pub nixl_library: PathBuf,
}

/// A way that KV may take between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvTransport {
    /// Serves between any two nodes.
    Quic,
    /// Memory of the prefill node that a decode node on the same host reads.
    Shm,
    /// Memory of the prefill node's GPU that a decode node's GPU in the same host reads.
    CudaIpc,
    /// Memory of the prefill node, or of its GPU, that a decode node fetches from through NVIDIA's NIXL.
    Nixl,
}

impl KvTransport {
    /// Checks a node's list.
    ///
    /// # Errors
    /// [`InvalidSettings`] without quic.
    pub fn check(transports: &[KvTransport]) -> Result<(), InvalidSettings> {
        if transports.contains(&KvTransport::Quic) {
            return Ok(());
        }
        Err(InvalidSettings(
            "--kv-transports does not list quic: add quic, which is what serves between hosts and wherever nothing else can be had"
                .into(),
        ))
    }
}

/// How KV travels over QUIC.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Fabric")]
pub struct KvQuicArgs {
    /// How a node that sends KV over quic decides how much may be on the way.
    ///
    /// cubic serves a data centre, and shares any network with others as TCP does. On a link that loses packets for
    /// other reasons than congestion, or of many milliseconds, bbr keeps its speed where cubic collapses: it finds out
    /// what the path carries and puts up to twice that on the way. Beside others' TCP under cubic it takes more than
    /// its share. fixed never slows down and is for links that carry nothing else: it takes from others whatever it
    /// can, and needs a --kv-window-bytes of the link's.
    #[arg(long, value_enum, value_name = "ALGORITHM", default_value_t = CongestionControl::Cubic)]
    pub kv_congestion_control: CongestionControl,

    /// KV that may be on the way from one node: unread, or unacknowledged.
    ///
    /// It bounds the speed to this many bytes per round trip, so a fast or long link needs bandwidth times round trip:
    /// 16MiB, the default, carry 100 Gbit/s over 1.3 ms. Each node takes it from the 1GiB of receive memory; where KV
    /// comes over several connections (--kv-connections), each of them has its part. With --kv-congestion-control fixed
    /// it has no default: what is beyond bandwidth times round trip and the link's queue, or beyond the kernel's
    /// receive buffer (net.core.rmem_max), is lost and sent again.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes_above_zero)]
    pub kv_window_bytes: Option<u64>,

    /// Connections that this node makes to one peer for KV over quic, from 1 to 16.
    ///
    /// One connection is driven by one thread at a time, which carries some 1 to 2 GB/s. Set more where the network is
    /// faster than that and cores are idle: up to one for every two cores. On a full link every connection takes a share
    /// like TCP's. Extents are divided among the connections, --kv-window-bytes is too, and if one is lost, its extents go
    /// over the others. The node that dials decides: decode nodes, and prefill nodes that fetch prefixes; a node that is
    /// dialled listens with as many sockets, on the one port. Peers of an earlier version get one connection, and so do
    /// peers that KV goes to in another way.
    #[arg(long, value_name = "CONNECTIONS", default_value_t = 1)]
    pub kv_connections: u16,

    /// Largest UDP payload of KV over quic, sent or received.
    ///
    /// What a path really carries is found out by probing, from 1200 up to this. Lower it only to measure, or where
    /// probes do harm.
    #[arg(long, value_name = "BYTES", default_value = "65507", value_parser = parse_bytes_above_zero)]
    pub kv_max_udp_payload_size: u64,
}

/// Every path of QUIC carries this.
const UDP_PAYLOAD_BYTES_MIN: u64 = 1200;
/// What fits a UDP datagram over IPv4.
const UDP_PAYLOAD_BYTES_MAX: u64 = 65_507;
/// Unless it is said.
const WINDOW_BYTES: u64 = 16 << 20;
/// Less holds no two of the largest datagrams.
pub const WINDOW_BYTES_MIN: u64 = 256 << 10;
/// A node's receive memory.
const WINDOW_BYTES_MAX: u64 = 1 << 30;
/// Connections for KV between two nodes, at most.
pub const KV_CONNECTIONS_MAX: u16 = 16;

impl Default for KvQuicArgs {
    fn default() -> Self {
        Self {
            kv_congestion_control: CongestionControl::Cubic,
            kv_window_bytes: None,
            kv_connections: 1,
            kv_max_udp_payload_size: UDP_PAYLOAD_BYTES_MAX,
        }
    }
}

impl KvQuicArgs {
    /// KV that may be on the way from one node.
    pub fn window_bytes(&self) -> u64 {
        self.kv_window_bytes.unwrap_or(WINDOW_BYTES)
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`InvalidSettings`] if one cannot be, is missing, or two not together.
    pub fn validate(&self) -> Result<(), InvalidSettings> {
        let (window, payload) = (self.window_bytes(), self.kv_max_udp_payload_size);
        if self.kv_congestion_control == CongestionControl::Fixed && self.kv_window_bytes.is_none() {
            return Err(InvalidSettings(
                "--kv-congestion-control fixed needs --kv-window-bytes: the link's bandwidth times its round trip, and \
                 what its queue may hold; bbr finds that out by itself"
                    .into(),
            ));
        }
        if !(UDP_PAYLOAD_BYTES_MIN..=UDP_PAYLOAD_BYTES_MAX).contains(&payload) {
            return Err(InvalidSettings(format!(
                "--kv-max-udp-payload-size is {payload}: use {UDP_PAYLOAD_BYTES_MIN}, which QUIC needs, to \
                 {UDP_PAYLOAD_BYTES_MAX}, the most that UDP carries"
            )));
        }
        if !(WINDOW_BYTES_MIN..=WINDOW_BYTES_MAX).contains(&window) {
            return Err(InvalidSettings(format!(
                "--kv-window-bytes is {window}: use 256KiB, below which large datagrams do not fit, to 1GiB, which is \
                 all receive memory of a node"
            )));
        }
        let connections = self.kv_connections;
        if !(1..=KV_CONNECTIONS_MAX).contains(&connections) {
            return Err(InvalidSettings(format!("--kv-connections is {connections}: use 1 to {KV_CONNECTIONS_MAX}")));
        }
        // Each has a part of the window that holds two of the largest datagrams.
        let needed = u64::from(connections) * WINDOW_BYTES_MIN;
        if window < needed {
            return Err(InvalidSettings(format!(
                "--kv-window-bytes is {window} and divided among --kv-connections {connections}: use {needed} or more, or \
                 fewer connections"
            )));
        }
        Ok(())
    }
}

/// Who decides how much KV may be on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CongestionControl {
    /// RFC 9438: what TCP does on most hosts; slows down for every loss.
    Cubic,
    /// By measured bandwidth and round trip; losses slow it down only beyond 2 %.
    Bbr,
    /// As much as the receiver's window takes, whatever is lost.
    Fixed,
}

impl std::fmt::Display for CongestionControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let value = self.to_possible_value().expect("no variant is hidden");
        f.write_str(value.get_name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_cannot_be_are_refused_in_words() {
        assert!(KvQuicArgs::default().validate().is_ok());
        let payload = |bytes| KvQuicArgs { kv_max_udp_payload_size: bytes, ..KvQuicArgs::default() }.validate();
        let window = |bytes| KvQuicArgs { kv_window_bytes: Some(bytes), ..KvQuicArgs::default() }.validate();
        assert!(payload(1200).is_ok() && payload(1472).is_ok());
        assert!(payload(1199).unwrap_err().0.contains("use 1200, which QUIC needs, to 65507"));
        assert!(payload(65_508).is_err() && payload(1 << 40).is_err());
        assert!(window(256 << 10).is_ok() && window(1 << 30).is_ok());
        assert!(window(1).unwrap_err().0.contains("--kv-window-bytes is 1: use 256KiB"));
        assert!(window((1 << 30) + 1).is_err());
        let connections = |number, bytes| {
            let args = KvQuicArgs { kv_connections: number, kv_window_bytes: Some(bytes), ..KvQuicArgs::default() };
            args.validate()
        };
        assert!(connections(1, 256 << 10).is_ok() && connections(16, 4 << 20).is_ok());
        assert!(connections(0, 16 << 20).unwrap_err().0.contains("--kv-connections is 0: use 1 to 16"));
        assert!(connections(17, 16 << 20).is_err());
        assert!(connections(3, 512 << 10).unwrap_err().0.contains("use 786432 or more, or fewer connections"));
    }

    #[test]
    fn fixed_window_has_to_be_said() {
        let fixed = |kv_window_bytes| {
            let kv_congestion_control = CongestionControl::Fixed;
            KvQuicArgs { kv_congestion_control, kv_window_bytes, ..KvQuicArgs::default() }.validate()
        };
        assert!(fixed(None).unwrap_err().0.contains("fixed needs --kv-window-bytes"));
        assert!(fixed(Some(1 << 20)).is_ok());
        assert_eq!(KvQuicArgs::default().window_bytes(), 16 << 20);
    }

    #[test]
    fn quic_is_always_among_the_transports() {
        assert!(KvTransport::check(&[KvTransport::Quic]).is_ok());
        assert!(KvTransport::check(&[KvTransport::Shm, KvTransport::Quic]).is_ok());
        assert!(KvTransport::check(&[KvTransport::Shm]).unwrap_err().0.contains("add quic"));
    }
}
