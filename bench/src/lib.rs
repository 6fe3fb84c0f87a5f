//! Measuring: the engine alone, KV between two processes, and any OpenAI-compatible endpoint under load.
//!
//! `tandem bench engine` drives the engine loop, scheduler, pool and runner of a node, without a network, and
//! prints prompt tokens per second and decode tokens per second at several batch sizes. `tandem bench transfer`
//! moves KV between two processes over each transport and holds it against TCP and a plain copy. `tandem bench
//! serve` sends requests to an endpoint at times drawn in advance and prints TTFT, ITL, TPOT, end-to-end latency,
//! throughput and goodput. `tandem bench replay` counts the blocks of a trace that a pool finds under each eviction
//! policy, `tandem bench index` how fast blocks are found and what that takes. Sweeps and the search for settings
//! are not here yet.
//!
//! 1. [`engine_bench`]: the engine.
//! 2. [`transfer`]: the fabric.
//! 3. [`serve`]: the load generator.
//! 4. [`replay`]: eviction policies against the optimum.
//! 5. [`index_bench`]: the index of blocks.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod engine_bench;
pub mod index_bench;
pub mod replay;
pub mod serve;
pub mod transfer;

use std::ffi::OsString;
use std::fmt;
use std::process::ExitCode;

use clap::Parser;

use serve::provenance::Provenance;

/// Measures Tandem.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
enum Args {
    /// Prefill and decode speed of the engine on this machine.
    Engine(engine_bench::EngineBenchArgs),
    /// Speed of KV between two processes, by transport and size of extents.
    Transfer(transfer::TransferBenchArgs),
    /// The other process of `transfer`, which starts it itself.
    #[command(hide = true)]
    TransferSender(transfer::TransferSenderArgs),
    /// Latency, throughput and goodput of an OpenAI-compatible endpoint under load.
    Serve(serve::ServeArgs),
    /// Blocks of a trace that a pool finds, by eviction policy and size, against the optimum.
    Replay(replay::ReplayArgs),
    /// Lookups in the index of a large pool, and its memory.
    Index(index_bench::IndexBenchArgs),
}

/// Runs `bench` with the given arguments (the first is the program's name).
pub fn run(args: Vec<OsString>) -> ExitCode {
    match Args::parse_from(&args) {
        Args::Engine(engine) => told(engine_bench::run(&engine)),
        Args::Transfer(transfer) => told(transfer::run(&transfer)),
        Args::TransferSender(sender) => told(transfer::run_sender(&sender).map(|()| "")),
        Args::Replay(replay) => told(replay::run(&replay, Provenance::of_process(&args))),
        Args::Index(index) => told(index_bench::run(&index, Provenance::of_process(&args))),
        Args::Serve(serve) => told(serve::run(serve, Provenance::of_process(&args))),
    }
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
