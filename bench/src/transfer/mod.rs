//! How fast KV moves between two processes: every transport against blocking TCP and a plain copy.
//!
//! ```text
//! this process (decode node's part)                       a process per row (prefill node's part)
//!   dial, mutual TLS, bulk connection  ─────────────────>  Fabric over a pool full of noise
//!   reserve, Prefill                   ─────────────────>  seal (digest) and send, extents in a window
//!   land, verify the digest            <═════ KV ════════
//! ```
//!
//! The path is the nodes' own: [`ExtentSource`](kv_connector::transfer::ExtentSource), `BulkSender`, landing
//! zone, digests on both sides. What is missing is the engine. Rows are measured in turn, round after round, so
//! that drift of the machine hits all of them alike; figures are medians over the rounds.
//!
//! 1. `kv_workload`: shapes and messages that both ends agree on.
//! 2. `sender`, `receiver`: the two processes.
//! 3. `baseline`: TCP and memcpy. `parts`: what the machine can do with the parts of a transfer.
//! 4. `report`: the table.
//! 5. `link`: a long or lossy link between the two, for QUIC and TCP alike.

mod baseline;
mod link;
mod parts;
mod receiver;
mod report;
mod sender;

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use common::config::{CongestionControl, KvQuicArgs, parse_busy_poll};
use common::ids::NodeId;
use kv_connector::BusyPolling;

use crate::cores::pin;
use crate::kv_workload as workload;

pub use link::{LinkArgs, TransferLinkArgs, run_link};
pub use report::Report;

/// What is measured.
#[derive(Debug, Args)]
pub struct TransferBenchArgs {
    /// Transports to measure.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "TRANSPORTS", default_values_t = [Transport::Quic, Transport::Shm])]
    pub transports: Vec<Transport>,
    /// Tokens of an extent; one token is 1 KiB here (4 KV heads of 64 in bf16, one layer), at most 1024.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "64,256,1024")]
    pub extent_tokens: Vec<usize>,
    /// KV of one request, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub request_mib: u32,
    /// Extents on the way at once.
    #[arg(long, value_name = "EXTENTS", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub window: u32,
    /// Rounds over all rows; each figure is the median of its rounds.
    #[arg(long, value_name = "ROUNDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// Requests of one extent each, for the latency of every round.
    #[arg(long, value_name = "REQUESTS", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub num_single: u32,
    /// Largest UDP payloads to measure quic with: 1472 and 8972 are those of networks with an MTU of 1500 and 9000
    /// bytes, 65507 is what loopback carries. A row each.
    #[arg(long, value_name = "BYTES", value_delimiter = ',', default_value = "65507")]
    pub max_udp_payload_size: Vec<u64>,
    /// Who decides how much may be on the way over quic. A row each.
    #[arg(long, value_enum, value_name = "ALGORITHMS", value_delimiter = ',', default_values_t = [CongestionControl::Cubic])]
    pub congestion_control: Vec<CongestionControl>,
    /// Connections that KV over quic is divided among, as --kv-connections of the nodes. A row each.
    ///
    /// More than one is of use only where both ends have cores for them: give each end more than one, or none of its
    /// own, with --cores.
    #[arg(long, value_name = "CONNECTIONS", value_delimiter = ',', default_value = "1")]
    pub connections: Vec<u16>,
    /// KV that may be on the way over quic.
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 20)]
    pub window_bytes: u64,
    /// How long both ends look for datagrams before they sleep, as nodes do whose engine is idle.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = parse_busy_poll)]
    pub busy_poll: Duration,
    /// Cores for the receiver and the senders, which are pinned with taskset. Without it, and without two cores,
    /// nothing is pinned.
    #[arg(long, value_name = "CORES", value_delimiter = ',', default_value = "0,1")]
    pub cores: Vec<usize>,
    /// The link between the two.
    #[command(flatten)]
    pub link: LinkArgs,
}

impl TransferBenchArgs {
    /// What the nodes of one row are set to.
    fn kv_quic(
        &self,
        max_udp_payload_size: u64,
        kv_congestion_control: CongestionControl,
        connections: u16,
    ) -> KvQuicArgs {
        KvQuicArgs {
            kv_congestion_control,
            kv_window_bytes: Some(self.window_bytes),
            kv_connections: connections,
            kv_max_udp_payload_size: max_udp_payload_size,
        }
    }

    /// The rows of KV: transport, what is particular to it, and tokens of an extent. Sizes of datagrams and who decides
    /// about them mean nothing to shared memory, and shared memory nothing to a link.
    fn rows(&self) -> Vec<(Transport, KvQuicArgs, usize)> {
        let quic = self.max_udp_payload_size.iter().flat_map(|size| {
            self.congestion_control.iter().flat_map(move |algorithm| {
                let of = move |number: &u16| (Transport::Quic, self.kv_quic(*size, *algorithm, *number));
                self.connections.iter().map(of)
            })
        });
        let is_linked = self.link.rtt.is_some();
        let paths = self.transports.iter().flat_map(|transport| match transport {
            Transport::Quic => quic.clone().collect::<Vec<_>>(),
            Transport::Shm if is_linked => Vec::new(),
            Transport::Shm => quic.clone().take(1).map(|(_, kv_quic)| (Transport::Shm, kv_quic)).collect(),
        });
        paths
            .flat_map(|(transport, kv_quic)| {
                self.extent_tokens.iter().map(move |tokens| (transport, kv_quic.clone(), *tokens))
            })
            .collect()
    }

    /// What a row is called: what tells it from the others.
    fn row_name(&self, transport: Transport, kv_quic: &KvQuicArgs, extent_tokens: usize) -> String {
        let mut name = transport.as_str().to_string();
        if transport == Transport::Quic && self.max_udp_payload_size.len() > 1 {
            name += &format!(" {}", kv_quic.kv_max_udp_payload_size);
        }
        if transport == Transport::Quic && self.congestion_control.len() > 1 {
            name += &format!(" {}", kv_quic.kv_congestion_control);
        }
        if transport == Transport::Quic && self.connections.len() > 1 {
            name += &format!(" x{}", kv_quic.kv_connections);
        }
        name + &format!(", {} KiB", extent_tokens * workload::TOKEN_BYTES / 1024)
    }

    /// What the row of such a transport is held against: that of what it is made of.
    fn parts_name(&self, transport: Transport, kv_quic: &KvQuicArgs, extent_tokens: usize) -> String {
        match transport {
            Transport::Quic => parts_name("UDP, AES", kv_quic.kv_max_udp_payload_size),
            Transport::Shm => copies_name(extent_tokens),
        }
    }

    /// Where the sender and the receiver are.
    fn addresses(&self) -> [IpAddr; 2] {
        match self.link.rtt {
            Some(_) => [link::SENDER.into(), link::RECEIVER.into()],
            None => [Ipv4Addr::LOCALHOST.into(); 2],
        }
    }
}

/// A row over datagrams of one size.
fn parts_name(what: &str, datagram_bytes: u64) -> String {
    format!("{what}, {datagram_bytes}")
}

/// A row of extents of one size.
fn copies_name(extent_tokens: usize) -> String {
    format!("copies, {} KiB", extent_tokens * workload::TOKEN_BYTES / 1024)
}

/// The sender's certificate names its role so.
const TLS_NAME: &str = "prefill-node.role.tandem";

/// The processes, as nodes.
fn node(name: &str) -> NodeId {
    NodeId::new(name).expect("the names here are valid")
}

/// A way that KV may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// Between any two nodes.
    Quic,
    /// Between two processes of one host.
    Shm,
}

impl Transport {
    fn as_str(self) -> &'static str {
        match self {
            Transport::Quic => "quic",
            Transport::Shm => "shm",
        }
    }
}

/// The other process; started by `transfer`, not by people.
#[derive(Debug, Args)]
pub struct TransferSenderArgs {
    /// Where certificate and key are.
    #[arg(long)]
    pub identity: PathBuf,
    /// Tokens per extent.
    #[arg(long)]
    pub extent_tokens: usize,
    /// Tokens of the largest request.
    #[arg(long)]
    pub num_tokens: usize,
    /// Extents on the way at once.
    #[arg(long)]
    pub window: usize,
    /// Whether the pool may be read by the receiver.
    #[arg(long)]
    pub is_shared: bool,
    /// As the nodes have it.
    #[arg(long, value_parser = parse_busy_poll)]
    pub busy_poll: Duration,
    /// Where it listens.
    #[arg(long)]
    pub address: IpAddr,
    /// As the nodes have them.
    #[command(flatten)]
    pub kv_quic: KvQuicArgs,
}

/// Runs the measurement.
///
/// # Errors
/// If a process cannot be started or a transfer fails; also if a transport that was asked for is not what the
/// nodes agreed on.
pub fn run(args: &TransferBenchArgs) -> anyhow::Result<Report> {
    for tokens in &args.extent_tokens {
        if !(16..=1024).contains(tokens) || !tokens.is_multiple_of(16) {
            bail!("--extent-tokens {tokens} is not supported: use a multiple of 16 up to 1024");
        }
        let held = workload::num_tokens(args.request_mib);
        if *tokens > held {
            let mib = args.request_mib;
            bail!(
                "--request-mib {mib} holds {held} tokens, less than an extent of {tokens}: raise it or lower --extent-tokens"
            );
        }
    }
    let rows = args.rows();
    if rows.is_empty() {
        bail!("nothing is left to measure: --rtt emulates a link between hosts, so use --transports quic with it");
    }
    for (_, kv_quic, _) in rows {
        kv_quic.validate()?;
    }
    if args.link.rtt.is_some() && !args.link.is_in_namespace {
        link::enter_namespace()?;
    }
    let pinned = pin(&args.cores);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")?;
    runtime.block_on(receiver::measure(args, pinned))
}

/// Runs the other process until its standard input ends.
///
/// # Errors
/// If the fabric cannot be started.
pub fn run_sender(args: &TransferSenderArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")?;
    runtime.block_on(sender::serve(args))
}

/// As nodes have it whose engine is idle.
fn busy_polling(time_max: Duration) -> Option<BusyPolling> {
    (!time_max.is_zero()).then(|| BusyPolling { time_max, may_poll: Arc::new(|| true) })
}
