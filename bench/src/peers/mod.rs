//! What a connection costs a node that does nothing with it: memory and CPU time at both ends.
//!
//! ```text
//! this process (looks at the two)
//!   ├── a node that is dialled     Fabric, simulated engine         memory and CPU time before and behind
//!   └── a node that dials          Fabric, N connections to it      the N connections, and for some seconds of nothing
//! ```
//!
//! Both are processes of their own, new for each row, so that what one row has freed is not counted for another. All
//! N connections lie between one pair of sockets, as those of a proxy or of a node with many peers do at its own end;
//! what N processes at the other end would take for being processes is not counted.
//!
//! 1. `holding`: what a row holds. 2. `process`: the two nodes. 3. `measure`: the looks. 4. `report`: the table.

mod holding;
mod measure;
mod process;
mod report;

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Args;

pub use holding::Holding;
pub use report::Report;

/// What is measured.
#[derive(Debug, Args)]
pub struct PeersBenchArgs {
    /// Connections between the two nodes.
    #[arg(long, value_name = "CONNECTIONS", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub count: u32,
    /// How long they are watched doing nothing.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub seconds: u32,
    /// What a connection is. A row each.
    #[arg(long, value_enum, value_name = "KINDS", value_delimiter = ',', default_values_t = [Holding::Link, Holding::Pair, Holding::Watch])]
    pub holding: Vec<Holding>,
}

/// One of the two nodes; started by `peers`, not by people.
#[derive(Debug, Args)]
pub struct PeersNodeArgs {
    /// Where certificate and key are.
    #[arg(long)]
    pub identity: PathBuf,
    /// What a connection is.
    #[arg(long, value_enum)]
    pub holding: Holding,
    /// Connections.
    #[arg(long)]
    pub count: u32,
    /// The node to dial; without it this is the one that is dialled.
    #[arg(long)]
    pub dial: Option<SocketAddr>,
}

/// Runs the measurement.
///
/// # Errors
/// If nothing could be measured. Otherwise the report says what could not.
pub fn run(args: &PeersBenchArgs) -> anyhow::Result<Report> {
    let report = measure::measure(args)?;
    ensure!(report.num_failures() < args.holding.len(), "nothing could be measured:\n{report}");
    Ok(report)
}

/// Runs one of the nodes until its standard input ends.
///
/// # Errors
/// If its fabric cannot be started, or a connection cannot be made or is lost.
pub fn run_node(args: &PeersNodeArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")?;
    runtime.block_on(process::serve(args))
}
