//! Measuring: the engine alone, and any OpenAI-compatible endpoint under load.
//!
//! `tandem bench engine` drives the same engine loop, scheduler, pool and runner as a node, without a
//! network, and prints prompt tokens per second and decode tokens per second at several batch sizes.
//! `tandem bench serve` sends requests to an endpoint at times drawn in advance and prints TTFT, ITL, TPOT,
//! end-to-end latency, throughput and goodput. Trace replay, sweeps and the search for settings are not here
//! yet.
//!
//! 1. [`engine_bench`]: the workload of the engine and its figures.
//! 2. [`serve`]: the load generator.
#![forbid(unsafe_code)]

pub mod engine_bench;
pub mod serve;

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
    /// Latency, throughput and goodput of an OpenAI-compatible endpoint under load.
    Serve(serve::ServeArgs),
}

/// Runs `bench` with the given arguments (the first is the program's name).
pub fn run(args: Vec<OsString>) -> ExitCode {
    match Args::parse_from(&args) {
        Args::Engine(engine) => told(engine_bench::run(&engine)),
        Args::Serve(serve) => told(serve::run(serve, Provenance::of_process(&args))),
    }
}

fn told(report: anyhow::Result<impl fmt::Display>) -> ExitCode {
    match report {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
