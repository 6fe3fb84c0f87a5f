//! The decode node's part: asks and looks at the clock, while KV lands or does not.

use std::cell::Cell;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use common::content::ContentChain;
use common::ids::Role;
use common::tokens::Token;
use common::wire::{Open, PrefillControl, PrefillEvent};
use engine::pool::KvPool;
use kv_connector::transfer::{BulkReceiver, LandingEvent, LandingPlan};
use kv_connector::{ClusterCa, ControlReceiver, ControlSender, Fabric, FabricConfig, Link};

use super::report::{Report, Row};
use super::{ControlBenchArgs, QUESTIONS, node_of};
use crate::cores::on_core;
use crate::kv_workload as workload;
use crate::own_program::own_program;

/// Killed with this value: it has nothing to put in order.
struct NodeProcess(Child);

impl Drop for NodeProcess {
    fn drop(&mut self) {
        // Fails if it has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One node, over one transport.
struct Pair {
    fabric: Fabric,
    link: Link,
    _bulk: BulkReceiver,
    questions: (ControlSender, ControlReceiver),
    _process: NodeProcess,
    row: Row,
}

/// Where KV lands, over and over in the same blocks.
struct Landings {
    pool: Arc<KvPool>,
    tokens: Vec<Token>,
    chain: ContentChain,
    number: u64,
}

/// Measures every row in every round.
pub(super) async fn measure(args: &ControlBenchArgs, node_core: Option<usize>) -> anyhow::Result<Report> {
    let ca = ClusterCa::generate()?;
    // Removed however this ends: there are keys in it.
    let dir = tempfile::Builder::new().prefix("tandem-control-bench-").tempdir().context("make a temporary folder")?;
    ca.issue(Role::PrefillNode, &node_of(Role::PrefillNode))?.save(dir.path())?;
    std::fs::write(dir.path().join("ca.pem"), ca.certificate_pem()).context("write the CA's certificate")?;
    measure_in(args, node_core, &ca, dir.path()).await
}

async fn measure_in(
    args: &ControlBenchArgs,
    node_core: Option<usize>,
    ca: &ClusterCa,
    dir: &Path,
) -> anyhow::Result<Report> {
    let num_tokens = workload::num_tokens(args.request_mib);
    let num_blocks = workload::num_blocks(num_tokens);
    let pool = Arc::new(KvPool::new(&workload::kv_spec(workload::NUM_LAYERS), workload::BLOCK_SIZE, num_blocks)?);
    let tokens = workload::tokens(num_tokens);
    let chain = workload::chain(&tokens);
    let mut landings = Landings { pool, tokens, chain, number: 1 };
    let mut pairs = Vec::new();
    for transport in ["quic", "shm"] {
        let mut pair = Pair::start(args, transport, node_core, ca, dir, num_tokens).await?;
        landings.request(&pair).await?; // the first touches every page
        pair.ask().await?;
        pairs.push(pair);
    }
    let mut idle = Row::new("nothing beside it");
    for _ in 0..args.rounds {
        for _ in 0..args.questions {
            let took = pairs[0].ask().await?;
            idle.observe(took);
        }
        for pair in &mut pairs {
            pair.measure_beside_kv(args.questions, &mut landings).await?;
        }
    }
    let rows = std::iter::once(idle).chain(pairs.iter().map(|pair| pair.row.clone())).collect();
    for pair in pairs {
        let fabric = pair.fabric.clone();
        drop(pair);
        fabric.close().await;
    }
    Ok(Report { rows, is_pinned: node_core.is_some() })
}

impl Pair {
    async fn start(
        args: &ControlBenchArgs,
        transport: &str,
        core: Option<usize>,
        ca: &ClusterCa,
        dir: &Path,
        num_tokens: usize,
    ) -> anyhow::Result<Self> {
        let (process, addr) = start_node(args, transport, core, dir)?;
        let role = Role::DecodeNode;
        let identity = ca.issue(role, &node_of(role))?;
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut config = FabricConfig::new(loopback, identity, workload::hello(node_of(role), role, num_tokens));
        config.is_reading_shared_pools = transport == "shm";
        let fabric = Fabric::bind(config)?;
        let link = fabric.dial(addr, Role::PrefillNode, None).await?;
        let bulk = fabric.connect_bulk(&link, &fabric.landing_zone()).await?;
        let found = bulk.transport_name();
        ensure!(
            found == transport,
            "KV comes over {found}, expected {transport}: the two processes did not agree on it"
        );
        let questions = link.open(&Open::Prefill(Box::new(workload::prefill(QUESTIONS, &[], 0)))).await?;
        let row = Row::new(&format!("KV over {transport}"));
        Ok(Self { fabric, link, _bulk: bulk, questions, _process: process, row })
    }

    /// There and back.
    async fn ask(&mut self) -> anyhow::Result<Duration> {
        ask(&mut self.questions).await
    }

    /// Asks while request after request lands.
    async fn measure_beside_kv(&mut self, num_questions: u32, landings: &mut Landings) -> anyhow::Result<()> {
        let Self { link, fabric, questions, row, .. } = self;
        let is_done = Cell::new(false);
        let landing = async {
            let mut num_bytes = 0;
            // The last one to its end: nothing is on its way when the next row is measured.
            while !is_done.get() {
                num_bytes += landings.request_over(fabric, link).await?;
            }
            anyhow::Ok(num_bytes)
        };
        let asking = async {
            let mut took = Vec::with_capacity(num_questions as usize);
            for _ in 0..num_questions {
                took.push(ask(questions).await?);
            }
            is_done.set(true);
            anyhow::Ok(took)
        };
        let started_at = Instant::now();
        let (num_bytes, took) = tokio::try_join!(landing, asking)?;
        row.observe_kv(num_bytes, started_at.elapsed());
        took.into_iter().for_each(|took| row.observe(took));
        Ok(())
    }
}

async fn ask((sender, receiver): &mut (ControlSender, ControlReceiver)) -> anyhow::Result<Duration> {
    let started_at = Instant::now();
    sender.send(&PrefillControl::Credit { bytes: 1 }).await?;
    receiver.recv::<PrefillEvent>().await?.context("the other end answers no more")?;
    Ok(started_at.elapsed())
}

impl Landings {
    async fn request(&mut self, pair: &Pair) -> anyhow::Result<u64> {
        self.request_over(&pair.fabric, &pair.link).await
    }

    /// From asking to the last extent verified; says how many bytes came.
    async fn request_over(&mut self, fabric: &Fabric, link: &Link) -> anyhow::Result<u64> {
        self.number += 1;
        let prefill = workload::prefill(self.number, &self.tokens, workload::NUM_LAYERS);
        let num_tokens = self.tokens.len();
        let (_landing, mut landed) = fabric.landing_zone().open(LandingPlan {
            request: prefill.request,
            attempt: prefill.attempt,
            generation: prefill.generation,
            blocks: workload::blocks(num_tokens),
            chain: self.chain.clone(),
            tokens: self.tokens.clone(),
            first_token: 0,
            num_tokens,
            kv_spec: workload::kv_spec(workload::NUM_LAYERS),
            memory: self.pool.clone(),
            conversion: None,
        });
        let _stream = link.open(&Open::Prefill(Box::new(prefill))).await?;
        let landing = async {
            let mut sum = 0;
            loop {
                match landed.recv().await.context("the landing was closed")? {
                    LandingEvent::ExtentVerified { num_bytes, is_complete, .. } => {
                        sum += num_bytes;
                        if is_complete {
                            return anyhow::Ok(sum);
                        }
                    }
                    LandingEvent::ExtentRefused { reason } => bail!("an extent was refused: {reason}"),
                }
            }
        };
        tokio::time::timeout(workload::DEADLINE, landing).await.context("the KV did not arrive in time")?
    }
}

fn start_node(
    args: &ControlBenchArgs,
    transport: &str,
    core: Option<usize>,
    dir: &Path,
) -> anyhow::Result<(NodeProcess, SocketAddr)> {
    let (program, role) = own_program()?;
    let mut command = on_core(core, &program);
    command.args(role);
    command.arg("control-node").arg("--identity").arg(dir);
    command.args(["--request-mib", &args.request_mib.to_string()]);
    if transport == "shm" {
        command.arg("--is-shared");
    }
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut process = NodeProcess(spawned.context("start the other process")?);
    let stdout = process.0.stdout.take().context("the pipe that was asked for is there")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).context("read where the other process listens")?;
    let addr = line.trim().parse();
    Ok((process, addr.with_context(|| format!("the other process did not start: it said {line:?}"))?))
}
