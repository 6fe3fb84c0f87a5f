//! Measuring: today the engine alone, on the path that nodes run.
//!
//! `tandem bench engine` drives the same engine loop, scheduler, pool and runner as a node, without a
//! network, and prints prompt tokens per second and decode tokens per second at several batch sizes. Load
//! generation over HTTP, sweeps and reports are not here yet.
//!
//! 1. [`engine_bench`]: the workload and its figures.
#![forbid(unsafe_code)]

pub mod engine_bench;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

/// Measures Tandem.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
enum Args {
    /// Prefill and decode speed of the engine on this machine.
    Engine(engine_bench::EngineBenchArgs),
}

/// Runs `bench` with the given arguments (the first is the program's name).
pub fn run(args: Vec<OsString>) -> ExitCode {
    let Args::Engine(args) = Args::parse_from(args);
    match engine_bench::run(&args) {
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
