//! Measuring, always on the paths that nodes run.
//!
//! `tandem bench engine` drives the engine loop, scheduler, pool and runner of a node, without a network, and
//! prints prompt tokens per second and decode tokens per second at several batch sizes. `tandem bench transfer`
//! moves KV between two processes over each transport and holds it against TCP and a plain copy. Load
//! generation over HTTP, sweeps and reports are not here yet.
//!
//! 1. [`engine_bench`]: the engine.
//! 2. [`transfer`]: the fabric.
#![forbid(unsafe_code)]

pub mod engine_bench;
pub mod transfer;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

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
}

/// Runs `bench` with the given arguments (the first is the program's name).
pub fn run(args: Vec<OsString>) -> ExitCode {
    let report = match Args::parse_from(args) {
        Args::Engine(args) => engine_bench::run(&args).map(|report| report.to_string()),
        Args::Transfer(args) => transfer::run(&args).map(|report| report.to_string()),
        Args::TransferSender(args) => transfer::run_sender(&args).map(|()| String::new()),
    };
    match report {
        Ok(report) => {
            print!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
