//! How long a message takes to a node and back while KV comes from there as fast as it can.
//!
//! ```text
//! this process (decode node's part)                        another process (prefill node's part)
//!   control connection   one question, one answer    ───>   answers at once
//!                        <───
//!   bulk connection      KV, request after request   <═══   sends without a pause
//! ```
//!
//! Measured in turn, round after round: with nothing beside it, and with KV at full speed over each transport. Neither
//! process computes. Each has one core, where there are two, which the thread that serves messages and the one that
//! moves KV share as in a node of one core.
//!
//! 1. `kv_workload`: what both agree on. 2. `node`: the other process. 3. `measure`: this one.
//! 4. `report`: the table.

mod measure;
mod node;
mod report;

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use common::ids::{NodeId, Role};

use crate::cores::pin;

pub use report::Report;

/// The number of the request whose stream carries the questions.
const QUESTIONS: u64 = 0;

fn node_of(role: Role) -> NodeId {
    NodeId::new(role.as_str()).expect("a role's name is a node name")
}

/// What is measured.
#[derive(Debug, Args)]
pub struct ControlBenchArgs {
    /// Questions of each row in each round.
    #[arg(long, value_name = "QUESTIONS", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub questions: u32,
    /// Rounds over all rows.
    #[arg(long, value_name = "ROUNDS", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// KV of one request, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub request_mib: u32,
    /// Cores to pin the two processes to; nothing is pinned if they are not two different ones that exist.
    #[arg(long, value_delimiter = ',', value_name = "CORES", default_value = "0,1")]
    pub cores: Vec<usize>,
}

/// The other process; started by `control`, not by people.
#[derive(Debug, Args)]
pub struct ControlNodeArgs {
    /// Where certificate and key are.
    #[arg(long)]
    pub identity: PathBuf,
    /// KV of one request, in MiB.
    #[arg(long)]
    pub request_mib: u32,
    /// Whether the pool may be read by the other end.
    #[arg(long)]
    pub is_shared: bool,
}

/// Runs the measurement.
///
/// # Errors
/// If a process cannot be started, or a message or a transfer fails.
pub fn run(args: &ControlBenchArgs) -> anyhow::Result<Report> {
    let node_core = pin(&args.cores);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")?;
    runtime.block_on(measure::measure(args, node_core))
}

/// Runs the other process until its standard input ends.
///
/// # Errors
/// If its fabric cannot be started.
pub fn run_node(args: &ControlNodeArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")?;
    runtime.block_on(node::serve(args))
}
