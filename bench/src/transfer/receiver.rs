//! The decode node's part, and the clock.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail, ensure};
use common::config::KvQuicArgs;
use common::content::ContentChain;
use common::ids::Role;
use common::tokens::Token;
use common::wire::Open;
use engine::pool::KvPool;
use kv_connector::transfer::{BulkReceiver, LandingEvent, LandingPlan};
use kv_connector::{ClusterCa, Fabric, FabricConfig, Link};

use super::baseline::Asked;
use super::report::{CpuTime, Report, Row};
use super::{TLS_NAME, TransferBenchArgs, Transport, baseline, copies_name, link, node, parts, parts_name};
use crate::cores::on_core;
use crate::kv_workload as workload;
use crate::own_program::own_program;
use crate::usage::of_process;

/// One row: a process that sends, and the connections to it.
struct Pair {
    transport: Transport,
    extent_tokens: usize,
    fabric: Fabric,
    link: Link,
    _bulk: BulkReceiver,
    process: SenderProcess,
    said: BufReader<ChildStdout>,
    row: Row,
}

/// Killed with this value: it has nothing to put in order.
struct SenderProcess(Child);

impl Drop for SenderProcess {
    fn drop(&mut self) {
        // Fails if it has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One row of what a transfer is held against.
struct Baseline {
    asked: Arc<Mutex<dyn Asked>>,
    row: Row,
    /// Bytes of a small question, for the time it takes.
    single_bytes: Option<usize>,
}

impl Baseline {
    fn new(name: &str, asked: impl Asked + 'static) -> Self {
        Self { asked: Arc::new(Mutex::new(asked)), row: Row::new(name.to_string()), single_bytes: None }
    }

    fn with_singles(self, single_bytes: usize) -> Self {
        Self { single_bytes: Some(single_bytes), ..self }
    }

    fn made_of(self, parts: String) -> Self {
        Self { row: self.row.made_of(parts), ..self }
    }
}

/// Where KV lands, over and over in the same blocks.
struct Landings {
    pool: Arc<KvPool>,
    tokens: Vec<Token>,
    chain: ContentChain,
    number: u64,
}

/// Measures every row in every round.
pub(super) async fn measure(args: &TransferBenchArgs, sender_core: Option<usize>) -> anyhow::Result<Report> {
    let ca = ClusterCa::generate()?;
    // Removed however this ends: there are keys in it.
    let dir = tempfile::Builder::new().prefix("tandem-transfer-bench-").tempdir().context("make a temporary folder")?;
    ca.issue(Role::PrefillNode, &node("sender"))?.save(dir.path())?;
    std::fs::write(dir.path().join("ca.pem"), ca.certificate_pem()).context("write the CA's certificate")?;
    measure_in(args, sender_core, &ca, dir.path()).await
}

async fn measure_in(
    args: &TransferBenchArgs,
    sender_core: Option<usize>,
    ca: &ClusterCa,
    dir: &std::path::Path,
) -> anyhow::Result<Report> {
    let num_tokens = workload::num_tokens(args.request_mib);
    let num_blocks = workload::num_blocks(num_tokens);
    let pool = Arc::new(KvPool::new(&workload::kv_spec(workload::NUM_LAYERS), workload::BLOCK_SIZE, num_blocks)?);
    let tokens = workload::tokens(num_tokens);
    let chain = workload::chain(&tokens);
    let mut landings = Landings { pool, tokens, chain, number: 0 };

    let running_link = args.link.rtt.map(|_| link::Link::start(&args.link)).transpose()?;
    let [_, own_address] = args.addresses();
    let mut pairs = Vec::new();
    let mut listens_at = None;
    for (transport, kv_quic, extent_tokens) in args.rows() {
        let (process, said, addr, tcp_addr) = start_sender(args, transport, &kv_quic, extent_tokens, sender_core, dir)?;
        let identity = ca.issue(Role::DecodeNode, &node("receiver"))?;
        let hello = workload::hello(node("receiver"), Role::DecodeNode, num_tokens);
        let mut config = FabricConfig::new(SocketAddr::from((own_address, 0)), identity, hello);
        config.is_reading_shared_pools = transport == Transport::Shm;
        config.set_kv_quic(&kv_quic);
        if running_link.is_some() {
            link::be_patient(&mut config);
        }
        config.busy_polling = super::busy_polling(args.busy_poll);
        let fabric = Fabric::bind(config)?;
        let link = fabric.dial(addr, Role::PrefillNode, None).await?;
        let bulk = fabric.connect_bulk(&link, &fabric.landing_zone()).await?;
        let (found, expected) = (bulk.transport_name(), transport.as_str());
        ensure!(found == expected, "KV comes over {found}, expected {expected}: the two processes did not agree on it");
        if transport == Transport::Quic {
            all_connections(&bulk, kv_quic.kv_connections.into()).await?;
        }
        listens_at = Some(tcp_addr);
        let mut row = Row::new(args.row_name(transport, &kv_quic, extent_tokens));
        if running_link.is_none() {
            row = row.made_of(args.parts_name(transport, &kv_quic, extent_tokens));
        }
        pairs.push(Pair { transport, extent_tokens, fabric, link, _bulk: bulk, process, said, row });
    }
    let tcp_addr = listens_at.context("no transport was asked for")?;
    let last = pairs.last().context("no extent size was asked for")?.process.0.id();
    let num_bytes = args.request_mib as usize * (1 << 20);
    let mut memcpy = baseline::Memcpy::new(num_bytes);
    let mut baselines = Vec::<Baseline>::new();
    if running_link.is_some() {
        for (name, tcp) in baseline::connect_under_each(tcp_addr)? {
            baselines.push(Baseline::new(&format!("TCP, {name}"), tcp));
        }
    } else {
        baselines = made_of(args, tcp_addr, last, dir)?;
    }
    let mib = args.request_mib;
    baselines.push(Baseline::new("TCP between pools", baseline::Tcp::connect_between_pools(tcp_addr, mib)?));
    baselines.push(Baseline::new("TLS over TCP", baseline::Tcp::connect_tls(tcp_addr, dir, TLS_NAME)?));
    baselines.push(Baseline::new("TCP, blocking", baseline::Tcp::connect(tcp_addr)?));
    let mut memcpy_row = Row::new("memcpy".to_string());
    for pair in &mut pairs {
        landings.request(pair, num_tokens, workload::NUM_LAYERS).await?; // the first touches every page
    }
    memcpy.copy();
    for baseline in &baselines {
        baseline::receive(&baseline.asked, num_bytes, 1).await?;
    }
    for round in 0..args.rounds {
        eprint!("\rround {} of {}", round + 1, args.rounds);
        for pair in &mut pairs {
            let cpu = Cpu::now(pair.process.0.id())?;
            let (took, _) = landings.request(pair, num_tokens, workload::NUM_LAYERS).await?;
            pair.row.observe(num_bytes, took, cpu.since(pair.process.0.id())?);
            for _ in 0..args.num_single {
                let (took, way) = landings.request(pair, pair.extent_tokens, 1).await?;
                pair.row.observe_single(took, way);
            }
        }
        for Baseline { asked, row, single_bytes } in &mut baselines {
            let cpu = Cpu::now(last)?;
            for took in baseline::receive(asked, num_bytes, 1).await? {
                row.observe(num_bytes, took, cpu.since(last)?);
            }
            if let Some(single_bytes) = *single_bytes {
                for took in baseline::receive(asked, single_bytes, args.num_single).await? {
                    row.observe_single_asked(took);
                }
            }
        }
        let cpu = Cpu::now(last)?;
        let took = memcpy.copy();
        memcpy_row.observe(num_bytes, took, cpu.since(last)?);
    }
    eprintln!();
    let baselines = baselines.into_iter().map(|baseline| baseline.row);
    let rows = pairs.iter().map(|pair| pair.row.clone()).chain(baselines).chain([memcpy_row]).collect();
    for pair in pairs {
        let fabric = pair.fabric.clone();
        drop(pair);
        fabric.close().await;
    }
    let mut report = Report::new(rows, sender_core.is_some());
    if let Some(link) = running_link {
        report = report.over_link(format!("{}\n{}", args.link, link.end()?), args.link.bytes_per_second());
    }
    Ok(report)
}

/// Resolves when as many are there as were asked for: they come one by one.
async fn all_connections(bulk: &BulkReceiver, number: usize) -> anyhow::Result<()> {
    let came = async {
        while bulk.num_connections() < number {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let came = tokio::time::timeout(workload::DEADLINE, came).await;
    came.with_context(|| format!("{} of {number} connections came", bulk.num_connections()))
}

/// The rows of what transfers are made of: for each size of datagrams, and for each of extents.
fn made_of(
    args: &TransferBenchArgs,
    addr: SocketAddr,
    sender: u32,
    dir: &std::path::Path,
) -> anyhow::Result<Vec<Baseline>> {
    let (mut baselines, mib) = (Vec::new(), args.request_mib);
    let extent_bytes = |tokens: &usize| tokens * workload::TOKEN_BYTES;
    let smallest_bytes = args.extent_tokens.iter().map(extent_bytes).min().context("no extent size was asked for")?;
    if args.transports.contains(&Transport::Quic) {
        for datagram_bytes in &args.max_udp_payload_size {
            let name = parts_name("UDP, AES", *datagram_bytes);
            let datagram_bytes = u16::try_from(*datagram_bytes).context("datagrams of this size do not exist")?;
            let stream = parts::Stream::connect(addr, datagram_bytes, mib, dir)?;
            let row = Baseline::new(&parts_name("quinn alone", datagram_bytes.into()), stream);
            baselines.push(row.with_singles(smallest_bytes).made_of(name.clone()));
            let datagrams = parts::Datagrams::connect(addr, datagram_bytes, mib)?;
            baselines.push(Baseline::new(&name, datagrams).with_singles(smallest_bytes));
        }
    }
    if args.transports.contains(&Transport::Shm) {
        let copies = |extent_bytes: usize, looks: bool| parts::Copies::connect(dir, sender, extent_bytes, mib, looks);
        for tokens in &args.extent_tokens {
            let extent_bytes = extent_bytes(tokens);
            let row = Baseline::new(&copies_name(*tokens), copies(extent_bytes, false)?);
            baselines.push(row.with_singles(extent_bytes));
        }
        let row = Baseline::new("copies, awake", copies(smallest_bytes, true)?);
        baselines.push(row.with_singles(smallest_bytes));
    }
    Ok(baselines)
}

fn start_sender(
    args: &TransferBenchArgs,
    transport: Transport,
    kv_quic: &KvQuicArgs,
    extent_tokens: usize,
    core: Option<usize>,
    dir: &std::path::Path,
) -> anyhow::Result<(SenderProcess, BufReader<ChildStdout>, SocketAddr, SocketAddr)> {
    let (program, role) = own_program()?;
    let mut command = on_core(core, &program);
    command.args(role);
    let [address, _] = args.addresses();
    command.arg("transfer-sender").arg("--identity").arg(dir).arg("--address").arg(address.to_string());
    command.arg("--extent-tokens").arg(extent_tokens.to_string());
    command.arg("--num-tokens").arg(workload::num_tokens(args.request_mib).to_string());
    command.arg("--window").arg(args.window.to_string());
    command.arg("--busy-poll").arg(format!("{}us", args.busy_poll.as_micros()));
    command.arg("--kv-congestion-control").arg(kv_quic.kv_congestion_control.to_string());
    command.arg("--kv-window-bytes").arg(kv_quic.window_bytes().to_string());
    command.arg("--kv-connections").arg(kv_quic.kv_connections.to_string());
    command.arg("--kv-max-udp-payload-size").arg(kv_quic.kv_max_udp_payload_size.to_string());
    if transport == Transport::Shm {
        command.arg("--is-shared");
    }
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut process = SenderProcess(spawned.context("start the process that sends")?);
    let stdout = process.0.stdout.take().context("the pipe that was asked for is there")?;
    let mut said = BufReader::new(stdout);
    let mut line = String::new();
    said.read_line(&mut line).context("read where the sender listens")?;
    let Some((fabric, tcp)) = line.trim().split_once(' ') else {
        bail!("the process that sends did not start: it said {line:?}");
    };
    let [fabric, tcp] = [fabric, tcp].map(|text| text.parse().map(link::far));
    Ok((process, said, fabric.context("the fabric's address")?, tcp.context("the TCP address")?))
}

impl Landings {
    /// From asking to the last extent verified, and from the sender's turning to the first one to then. Both processes
    /// read one clock.
    async fn request(
        &mut self,
        pair: &mut Pair,
        num_tokens: usize,
        num_layers: u32,
    ) -> anyhow::Result<(Duration, Duration)> {
        self.number += 1;
        let prefill = workload::prefill(self.number, &self.tokens[..num_tokens], num_layers);
        let plan = LandingPlan {
            request: prefill.request,
            attempt: prefill.attempt,
            generation: prefill.generation,
            blocks: workload::blocks(num_tokens),
            chain: self.chain.clone(),
            tokens: self.tokens[..num_tokens].to_vec(),
            first_token: 0,
            num_tokens,
            kv_spec: workload::kv_spec(num_layers),
            memory: self.pool.clone(),
            conversion: None,
        };
        let open = Open::Prefill(Box::new(prefill));
        let (_landing, mut landed) = pair.fabric.landing_zone().open(plan);
        let started_at = Instant::now();
        let (link, transport) = (&pair.link, pair.transport);
        let landing = async {
            let _stream = link.open(&open).await.context("ask for KV")?;
            loop {
                match landed.recv().await.context("the landing ended")? {
                    LandingEvent::ExtentVerified { is_complete: true, .. } => {
                        return Ok((started_at.elapsed(), SystemTime::now()));
                    }
                    LandingEvent::ExtentVerified { .. } => {}
                    LandingEvent::ExtentRefused { reason } => {
                        bail!("{}: an extent was refused: {reason:?}", transport.as_str())
                    }
                }
            }
        };
        let landed = tokio::time::timeout(workload::DEADLINE, landing).await;
        let (took, verified_at) = landed.context("the KV did not arrive in time")??;
        let mut line = String::new();
        pair.said.read_line(&mut line).context("read when the sender began")?;
        let sent_nanos = line.trim().parse().with_context(|| format!("the sender says when it began: {line:?}"))?;
        let sent_at = SystemTime::UNIX_EPOCH + Duration::from_nanos(sent_nanos);
        Ok((took, verified_at.duration_since(sent_at).unwrap_or_default()))
    }
}

/// CPU time of both processes so far.
struct Cpu(CpuTime);

impl Cpu {
    fn now(sender: u32) -> anyhow::Result<Self> {
        let of = |process| of_process(process).map(|usage| Duration::from_secs_f64(usage.cpu_seconds));
        let (sender, receiver) = of(sender).zip(of(std::process::id())).context("read CPU times from /proc")?;
        Ok(Self(CpuTime { sender, receiver }))
    }

    fn since(&self, sender: u32) -> anyhow::Result<CpuTime> {
        let now = Self::now(sender)?.0;
        Ok(CpuTime {
            sender: now.sender.saturating_sub(self.0.sender),
            receiver: now.receiver.saturating_sub(self.0.receiver),
        })
    }
}
