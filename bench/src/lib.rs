//! Measuring: the engine alone, KV between two processes, and any OpenAI-compatible endpoint under load.
//!
//! `tandem bench engine` drives the engine loop, scheduler, pool and runner of a node, without a network, and
//! prints prompt tokens per second and decode tokens per second at several batch sizes, beside the limits of the
//! machine and other engines. `tandem bench transfer` moves KV between two processes over each transport and holds it
//! against TCP and a plain copy. `tandem bench peers` holds idle connections between two nodes and says what they take,
//! `tandem bench control` how long a message takes beside KV at full speed. `tandem bench
//! serve` sends requests to an endpoint at times drawn in advance and prints TTFT, ITL, TPOT, end-to-end latency,
//! throughput and goodput; `compare` does so to several set-ups in turn and prints ratios, `interference` says what
//! long prompts do to the streams beside them, `sweep` tries every combination of flags, `report` draws what they
//! wrote, and `mock` is an endpoint whose times are known.
//! `tandem bench replay` counts the blocks of a trace that a pool finds under each eviction policy, `tandem bench
//! index` how fast blocks are found and what that takes, `tandem bench store` how fast KV goes into a tier and out.
//!
//! 1. [`engine_bench`]: the engine.
//!    [`random_checkpoint`]: models to measure with.
//! 2. [`transfer`]: the fabric under load. [`control`]: what a message sees of that. `kv_workload`: the KV of both.
//!    [`peers`]: idle.
//! 3. [`serve`]: the load generator. [`mock`]: what it is validated against.
//! 4. [`setup`], [`compare`], [`interference`], [`ratio`], [`sweep`]: several runs. [`report`]: a page of them.
//!    [`usage`]: what processes took.
//! 5. [`mooncake`]: traces. [`replay`]: eviction policies against the optimum. [`index_bench`]: the index of blocks. [`store_bench`]: the
//!    tiers beyond the pool.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod compare;
pub mod control;
mod cores;
pub mod engine_bench;
pub mod index_bench;
pub mod interference;
mod kv_workload;
pub mod mock;
pub mod mooncake;
mod own_program;
pub mod peers;
pub mod random_checkpoint;
pub mod ratio;
pub mod replay;
pub mod report;
pub mod serve;
pub mod setup;
pub mod store_bench;
pub mod sweep;
pub mod transfer;
pub mod usage;

use std::ffi::OsString;
use std::fmt;
use std::process::ExitCode;

use clap::Parser;

use serve::provenance::Provenance;

/// Measures Tandem.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
enum Args {
    /// Prefill and decode speed of the engine, beside the limits of this machine and other engines.
    Engine(Box<engine_bench::EngineBenchArgs>),
    /// Speed of KV between two processes, by transport and size of extents.
    Transfer(transfer::TransferBenchArgs),
    /// The other process of `transfer`, which starts it itself.
    #[command(hide = true)]
    TransferSender(transfer::TransferSenderArgs),
    /// The link between the processes of `transfer`, which starts it itself.
    #[command(hide = true)]
    TransferLink(transfer::TransferLinkArgs),
    /// Round trip of a message while KV moves as fast as it can.
    Control(control::ControlBenchArgs),
    /// The other process of `control`, which starts it itself.
    #[command(hide = true)]
    ControlNode(control::ControlNodeArgs),
    /// Memory and CPU time of idle connections between nodes, at both ends.
    Peers(peers::PeersBenchArgs),
    /// The nodes of `peers`, which starts them itself.
    #[command(hide = true)]
    PeersNode(peers::PeersNodeArgs),
    /// Bandwidth of each tier of the prefix-block store, beside what it stands on.
    Store(store_bench::StoreBenchArgs),
    /// Latency, throughput and goodput of an OpenAI-compatible endpoint under load.
    Serve(Box<serve::ServeArgs>),
    /// Several set-ups under the same loads in turn, as ratios with confidence intervals.
    Compare(compare::CompareArgs),
    /// What long prompts that keep arriving do to the inter-token latency of running streams.
    Interference(interference::InterferenceArgs),
    /// Every combination of flags of client and server; goes on where it was cut off.
    Sweep(sweep::SweepArgs),
    /// One self-contained HTML page of results that serve, compare or sweep have written.
    Report(report::ReportArgs),
    /// An endpoint that answers at exact, scripted times, to validate load generators.
    Mock(mock::MockArgs),
    /// Blocks of a trace that a pool finds, by eviction policy and size, against the optimum.
    Replay(replay::ReplayArgs),
    /// Lookups in the index of a large pool, and its memory.
    Index(index_bench::IndexBenchArgs),
}

/// Runs `bench` with the given arguments (the first is the program's name).
pub fn run(args: Vec<OsString>) -> ExitCode {
    match Args::parse_from(&args) {
        Args::Engine(engine) => told(engine_bench::run(&engine, Provenance::of_process(&args))),
        Args::Transfer(transfer) => told(transfer::run(&transfer)),
        Args::TransferSender(sender) => told(transfer::run_sender(&sender).map(|()| "")),
        Args::TransferLink(link) => told(transfer::run_link(&link).map(|()| "")),
        Args::Control(control) => told(control::run(&control)),
        Args::ControlNode(node) => told(control::run_node(&node).map(|()| "")),
        Args::Peers(peers) => told(peers::run(&peers)),
        Args::PeersNode(node) => told(peers::run_node(&node).map(|()| "")),
        Args::Store(store) => told(store_bench::run(&store)),
        Args::Serve(serve) => told(serve::run(*serve, Provenance::of_process(&args))),
        Args::Compare(compare) => told(compare::run(&compare, Provenance::of_process(&args))),
        Args::Interference(interference) => told(interference::run(&interference, Provenance::of_process(&args))),
        Args::Sweep(sweep) => told(sweep::run(&sweep, Provenance::of_process(&args))),
        Args::Report(report) => told(report::run(&report)),
        Args::Mock(mock) => told(mock::run(&mock)),
        Args::Replay(replay) => told(replay::run(&replay, Provenance::of_process(&args))),
        Args::Index(index) => told(index_bench::run(&index, Provenance::of_process(&args))),
    }
}

/// Runs `model` with the given arguments (the first is the program's name).
pub fn run_model(args: Vec<OsString>) -> ExitCode {
    told(random_checkpoint::run(&random_checkpoint::ModelArgs::parse_from(args)))
}

fn told(report: anyhow::Result<impl fmt::Display>) -> ExitCode {
    match report {
        Ok(report) => {
            println!("{}", report.to_string().trim_end());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
