//! How many blocks of a trace are found in a pool: the eviction policies against the optimum.
//!
//! No model and no time: the requests of a trace go one after another through the block manager that the nodes
//! have (or, with `--engine`, through a whole engine with the `sim` runner), and the blocks that were found are
//! counted. Policies that learn begin with nothing; the part of the trace behind `--train-fraction` is scored
//! apart, with the state that the part before it left.
//!
//! 1. [`trace`]: the file.
//! 2. [`pool`], [`node`]: the two ways through.
//! 3. [`optimum`]: what could be had at most.
//! 4. [`report`]: table and JSON.

pub mod node;
pub mod optimum;
pub mod pool;
pub mod report;
pub mod trace;

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use common::eviction::EvictionPolicy;

use crate::serve::provenance::Provenance;
use report::{PolicyRatios, Ratios, Report, SizeReport};
use trace::Trace;

/// What is replayed.
#[derive(Debug, Clone, Args)]
pub struct ReplayArgs {
    /// Trace in Mooncake's format, one JSON object with hash_ids per line.
    #[arg(long, value_name = "PATH")]
    pub trace: PathBuf,
    /// Sizes of the pool, in blocks of the trace.
    #[arg(
        long,
        value_name = "BLOCKS",
        value_delimiter = ',',
        default_value = "1000,5000,10000,30000,50000",
        value_parser = parse_num_blocks
    )]
    pub num_blocks: Vec<usize>,
    /// Eviction policies to compare. LRU is always measured, since the gap is counted from it.
    #[arg(long, value_enum, value_name = "POLICIES", value_delimiter = ',', default_value = "lru,reuse-rate")]
    pub policy: Vec<EvictionPolicy>,
    /// Share of the requests that are not in the second score.
    #[arg(long, value_name = "SHARE", default_value_t = 0.5, value_parser = parse_share)]
    pub train_fraction: f64,
    /// Replay through an engine with a simulated model instead of the block manager alone.
    #[arg(long)]
    pub engine: bool,
    /// Write the result here as JSON.
    #[arg(long, value_name = "PATH")]
    pub save_result: Option<PathBuf>,
}

fn parse_num_blocks(text: &str) -> Result<usize, String> {
    // The engine's simulated pool takes 1 KiB per block.
    match text.parse() {
        Ok(number @ 1..=10_000_000) => Ok(number),
        _ => Err(format!("\"{text}\" is no size of a pool, expected 1 to 10000000 blocks")),
    }
}

fn parse_share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..1.0).contains(&share) => Ok(share),
        _ => Err(format!("\"{text}\" is no share, expected at least 0 and less than 1")),
    }
}

/// Replays the trace.
///
/// # Errors
/// If the trace cannot be read, a prompt does not fit a pool, or the result cannot be written.
pub fn run(args: &ReplayArgs, provenance: Provenance) -> anyhow::Result<Report> {
    let trace = Trace::read(&args.trace)?;
    let report = measure(args, &trace, provenance)?;
    if let Some(path) = &args.save_result {
        let text = serde_json::to_string_pretty(&report.to_json()).context("write the result as JSON")?;
        std::fs::write(path, text + "\n").with_context(|| format!("write the result to {}", path.display()))?;
    }
    Ok(report)
}

/// Replays a trace that was read.
///
/// # Errors
/// If a prompt does not fit a pool.
pub fn measure(args: &ReplayArgs, trace: &Trace, provenance: Provenance) -> anyhow::Result<Report> {
    let names = trace.names();
    let first_scored = (trace.requests.len() as f64 * args.train_fraction) as usize;
    let ratios = |hits: &pool::Hits| Ratios { whole: hits.ratio_from(0), scored: hits.ratio_from(first_scored) };
    let through = |num_blocks: usize, policy: EvictionPolicy| match args.engine {
        true => node::replay(trace, num_blocks, policy),
        false => pool::replay(trace, &names, num_blocks, policy),
    };
    let mut policies = vec![EvictionPolicy::Lru];
    policies.extend(args.policy.iter().copied().filter(|policy| *policy != EvictionPolicy::Lru));
    policies.dedup();
    let mut sizes = Vec::new();
    for num_blocks in &args.num_blocks {
        let measured = policies.iter().map(|policy| {
            let hits = through(*num_blocks, *policy)?;
            Ok(PolicyRatios { policy: *policy, ratios: ratios(&hits) })
        });
        let optimum = ratios(&optimum::optimum(trace, *num_blocks));
        let policies = measured.collect::<anyhow::Result<_>>()?;
        sizes.push(SizeReport { num_blocks: *num_blocks, policies, optimum });
    }
    let unbounded = ratios(&optimum::optimum(trace, trace.num_distinct));
    Ok(Report {
        args: args.clone(),
        provenance,
        num_requests: trace.requests.len(),
        num_blocks: trace.requests.iter().map(Vec::len).sum(),
        num_distinct_blocks: trace.num_distinct,
        unbounded,
        sizes,
    })
}
