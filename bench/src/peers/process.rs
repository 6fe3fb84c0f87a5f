//! The two nodes: one with a simulated engine that is dialled, one that dials it over and over.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, bail};
use common::eviction::EvictionPolicy;
use common::ids::{Epoch, NodeId, Role};
use common::model::ModelInfo;
use common::scheduler::SchedulerLimits;
use common::wire::{Hello, Open};
use engine::core::EngineOptions;
use engine::runner::Runner;
use engine::sim::{SimOptions, SimRunner};
use kv_connector::certs::Identity;
use kv_connector::membership::NodePresence;
use kv_connector::{Fabric, FabricConfig, FabricLimits};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::PeersNodeArgs;
use super::holding::Held;

/// Handshakes in progress at a time: more of them would only wait for each other.
const NUM_DIALLED_AT_ONCE: usize = 4;
/// Tries to make one connection, on a machine that is busy with other things.
const NUM_TRIES: usize = 10;
/// For a handshake among others that are in progress on one core, and for the silence of a process that is given no
/// CPU time: what is measured is what connections cost, not how soon a lost one is noticed.
const PATIENCE: Duration = Duration::from_secs(60);
/// For all connections of a row.
const MAKING: Duration = Duration::from_secs(600);

/// The names of the two nodes.
pub(super) fn node(is_dialled: bool) -> NodeId {
    NodeId::new(if is_dialled { "dialled" } else { "dialler" }).expect("the names here are valid")
}

/// Says when it is ready; the one that is dialled, where. The other one dials at a line on standard input, and says
/// when it has done so. Both serve until standard input ends.
pub(super) async fn serve(args: &PeersNodeArgs) -> anyhow::Result<()> {
    let lines = lines_of_stdin();
    match args.dial {
        Some(address) => dial(args, address, lines).await,
        None => be_dialled(args, lines).await,
    }
}

/// Lines of standard input, until it ends.
fn lines_of_stdin() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

fn say(line: &str) -> anyhow::Result<()> {
    println!("{line}");
    std::io::stdout().flush().context("tell the process that measures")
}

fn runner() -> anyhow::Result<SimRunner> {
    Ok(SimRunner::new(SimOptions { num_blocks: 64, ..SimOptions::default() })?)
}

fn fabric(args: &PeersNodeArgs, role: Role, model: Option<ModelInfo>) -> anyhow::Result<Fabric> {
    let node = node(role == Role::PrefillNode);
    let identity = Identity::load_from_dir(&args.identity, &node)?;
    let hello = Hello { node, role, epoch: Epoch(1), model, bulk_port: None };
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut config = FabricConfig::new(loopback, identity, hello);
    config.bulk_listen = (role == Role::PrefillNode).then_some(loopback);
    let defaults = FabricLimits::default();
    let num_connections_max = args.count as usize + 1;
    config.limits = FabricLimits {
        num_connections_max,
        // The share of each is promised, not taken.
        receive_bytes_max: num_connections_max * defaults.bulk_window_bytes as usize,
        hello_deadline: PATIENCE,
        idle_timeout: PATIENCE,
        ..defaults
    };
    Ok(Fabric::bind(config)?)
}

async fn be_dialled(args: &PeersNodeArgs, mut lines: mpsc::Receiver<String>) -> anyhow::Result<()> {
    let runner = runner()?;
    let model = runner.model().clone();
    let limits = SchedulerLimits {
        block_size: model.block_size as usize,
        num_blocks: model.num_blocks as usize,
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        max_num_prefill_tokens: 64,
        max_num_waiting: 8,
        max_model_len: model.max_model_len as usize,
        growth_blocks: 0,
        max_num_parked_blocks: 0,
        max_num_copied_blocks: 1,
        is_prefix_caching: true,
        eviction_policy: EvictionPolicy::default(),
    };
    let role = Role::PrefillNode;
    let name = node(true).to_string();
    let options = EngineOptions { limits, host_budget: Default::default(), role: role.as_str(), node: name };
    let engine = engine::core::start(Box::new(runner), options).context("start the simulated engine")?;
    let status = engine.status();
    let presence = NodePresence::new(move || status.borrow().load);
    let fabric = fabric(args, role, Some(model))?;
    say(&fabric.local_addr().to_string())?;
    loop {
        let stream = tokio::select! {
            line = lines.recv() => match line {
                Some(_) => continue,
                None => break,
            },
            stream = fabric.accept() => stream,
        };
        let Some(stream) = stream else { break };
        if let Open::Watch(_) = stream.open {
            let presence = presence.clone();
            tokio::spawn(async move {
                let _directory = stream.receiver;
                presence.serve_watch(stream.sender).await;
            });
        }
    }
    fabric.close().await;
    engine.shutdown();
    Ok(())
}

async fn dial(args: &PeersNodeArgs, address: SocketAddr, mut lines: mpsc::Receiver<String>) -> anyhow::Result<()> {
    let role = args.holding.dialler();
    let model = if role == Role::Proxy { None } else { Some(runner()?.model().clone()) };
    let fabric = fabric(args, role, model)?;
    say("ready")?;
    lines.recv().await.context("nobody wants connections")?;
    let making = tokio::time::timeout(MAKING, make(args, &fabric, address)).await;
    let mut held = making.context("the connections were not there in time")??;
    say("held")?;
    tokio::select! {
        _ = lines.recv() => {}
        Some(lost) = held.join_next() => bail!("an idle connection was lost: {}", lost.context("a task failed")?),
    }
    held.shutdown().await;
    fabric.close().await;
    Ok(())
}

/// Makes all connections; the tasks of the result hold one each, until it is lost.
async fn make(args: &PeersNodeArgs, fabric: &Fabric, address: SocketAddr) -> anyhow::Result<JoinSet<String>> {
    let mut held = JoinSet::new();
    let mut dialling = JoinSet::new();
    for number in 0..args.count {
        if number > 0 && number.is_multiple_of(100) {
            eprintln!("{}: {number} of {} connections", args.holding.as_str(), args.count);
        }
        while dialling.len() >= NUM_DIALLED_AT_ONCE {
            keep(&mut dialling, &mut held).await?;
        }
        let (fabric, holding) = (fabric.clone(), args.holding);
        dialling.spawn(async move {
            let mut num_tries = 0;
            loop {
                num_tries += 1;
                match fabric.dial(address, Role::PrefillNode, None).await {
                    Ok(link) => return holding.hold(&fabric, link).await,
                    Err(error) if error.is_worth_a_retry() && num_tries < NUM_TRIES => {}
                    Err(error) => return Err(error.into()),
                }
            }
        });
    }
    while !dialling.is_empty() {
        keep(&mut dialling, &mut held).await?;
    }
    Ok(held)
}

/// Takes over one connection that has been made.
async fn keep(dialling: &mut JoinSet<anyhow::Result<Held>>, held: &mut JoinSet<String>) -> anyhow::Result<()> {
    if let Some(made) = dialling.join_next().await {
        held.spawn(made.context("a task failed")??.lost());
    }
    Ok(())
}
