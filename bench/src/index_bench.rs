//! How fast a block is found by its content in a large pool, and what memory the books take.
//!
//! The block manager is the nodes' own, filled with named blocks that nobody holds. Rows are measured in turn,
//! round after round; figures are medians over the rounds. A map from keys to block ids as the standard library
//! makes it stands beside it: it compares no digest, which the block manager does.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use common::block_manager::BlockManager;
use common::content::{ContentKey, ContentName, PrefixDigest};
use common::ids::BlockId;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::serve::provenance::Provenance;

/// Blocks of one request while the pool is filled.
const REQUEST_BLOCKS: usize = 256;

/// What is measured.
#[derive(Debug, Args)]
pub struct IndexBenchArgs {
    /// Blocks of the pool, all of them named.
    #[arg(long, value_name = "BLOCKS", default_value_t = 10_000_000, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    pub num_blocks: u32,
    /// Lookups of each kind in each round.
    #[arg(long, value_name = "LOOKUPS", default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    pub num_lookups: u32,
    /// Rounds over all rows.
    #[arg(long, value_name = "ROUNDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// Write the result here as JSON.
    #[arg(long, value_name = "PATH")]
    pub save_result: Option<PathBuf>,
}

/// Lookups of one kind.
#[derive(Debug, Clone, Copy)]
struct Row {
    name: &'static str,
    lookups_per_second: f64,
    /// Of single lookups, the reading of the clock included.
    p50_ns: f64,
    p99_ns: f64,
}

/// Figures with where they come from.
#[derive(Debug)]
pub struct Report {
    num_blocks: u32,
    rows: Vec<Row>,
    /// Two readings of the clock with nothing between them.
    clock_p50_ns: f64,
    manager_bytes_per_block: f64,
    map_bytes_per_block: f64,
    provenance: Provenance,
}

/// Fills the pool and looks blocks up.
///
/// # Errors
/// If memory cannot be read or the result cannot be written.
pub fn run(args: &IndexBenchArgs, provenance: Provenance) -> anyhow::Result<Report> {
    let num_blocks = u64::from(args.num_blocks);
    let empty_bytes = resident_bytes()?;
    let manager = filled_manager(args.num_blocks);
    let manager_bytes = resident_bytes()?.saturating_sub(empty_bytes);
    let before_map = resident_bytes()?;
    let map: HashMap<ContentKey, BlockId> = (0..args.num_blocks).map(|n| (name(n.into()).key, BlockId(n))).collect();
    let map_bytes = resident_bytes()?.saturating_sub(before_map);

    let mut random = StdRng::seed_from_u64(0);
    let mut draw = |first: u64| -> Vec<ContentName> {
        (0..args.num_lookups).map(|_| name(first + random.random_range(0..num_blocks))).collect()
    };
    let (present, absent) = (draw(0), draw(num_blocks));
    let find = |name: &ContentName| manager.longest_prefix(std::iter::once(*name)).len();
    let find_in_map = |name: &ContentName| usize::from(map.contains_key(&name.key));
    let mut rounds: Vec<[Row; 4]> = Vec::new();
    for _ in 0..args.rounds {
        rounds.push([
            measured("block manager, present", &present, find),
            measured("block manager, absent", &absent, find),
            measured("std map of keys, present", &present, find_in_map),
            measured("std map of keys, absent", &absent, find_in_map),
        ]);
    }
    let rows = (0..4).map(|row| median_row(&rounds.iter().map(|round| round[row]).collect::<Vec<_>>())).collect();
    let clock = (0..args.num_lookups).map(|_| Instant::now().elapsed().as_nanos() as u32).collect();
    let report = Report {
        num_blocks: args.num_blocks,
        rows,
        clock_p50_ns: percentile(clock, 0.5),
        manager_bytes_per_block: manager_bytes as f64 / num_blocks as f64,
        map_bytes_per_block: map_bytes as f64 / num_blocks as f64,
        provenance,
    };
    if let Some(path) = &args.save_result {
        let text = serde_json::to_string_pretty(&report.to_json()).context("write the result as JSON")?;
        std::fs::write(path, text + "\n").with_context(|| format!("write the result to {}", path.display()))?;
    }
    Ok(report)
}

fn filled_manager(num_blocks: u32) -> BlockManager {
    let mut manager = BlockManager::new(num_blocks as usize);
    let mut next = 0;
    while next < u64::from(num_blocks) {
        let count = REQUEST_BLOCKS.min((u64::from(num_blocks) - next) as usize);
        let ids = manager.allocate(count).expect("the pool has blocks that were never used");
        for id in &ids {
            manager.publish(*id, name(next));
            next += 1;
        }
        manager.release(&ids);
    }
    manager
}

/// Spread over all bits, as the names of real content are.
fn name(n: u64) -> ContentName {
    let mix = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    let (high, low) = (mix(2 * n + 1), mix(2 * n + 2));
    let mut digest = [0; 32];
    digest[..8].copy_from_slice(&high.to_le_bytes());
    digest[8..16].copy_from_slice(&low.to_le_bytes());
    ContentName { key: ContentKey(u128::from(high) << 64 | u128::from(low)), digest: PrefixDigest(digest) }
}

fn measured(row: &'static str, names: &[ContentName], find: impl Fn(&ContentName) -> usize) -> Row {
    let started_at = Instant::now();
    let num_found: usize = names.iter().map(&find).sum();
    let seconds = started_at.elapsed().as_secs_f64();
    std::hint::black_box(num_found);
    let single = |name: &ContentName| {
        let started_at = Instant::now();
        std::hint::black_box(find(name));
        started_at.elapsed().as_nanos().min(u128::from(u32::MAX)) as u32
    };
    let times: Vec<u32> = names.iter().map(single).collect();
    Row {
        name: row,
        lookups_per_second: names.len() as f64 / seconds,
        p50_ns: percentile(times.clone(), 0.5),
        p99_ns: percentile(times, 0.99),
    }
}

fn percentile(mut times: Vec<u32>, share: f64) -> f64 {
    let place = ((times.len() - 1) as f64 * share) as usize;
    f64::from(*times.select_nth_unstable(place).1)
}

fn median_row(rounds: &[Row]) -> Row {
    let median = |figure: fn(&Row) -> f64| {
        let mut figures: Vec<f64> = rounds.iter().map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures[figures.len() / 2]
    };
    Row {
        lookups_per_second: median(|row| row.lookups_per_second),
        p50_ns: median(|row| row.p50_ns),
        p99_ns: median(|row| row.p99_ns),
        ..rounds[0]
    }
}

/// Memory of this process.
fn resident_bytes() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("read the memory of this process")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")).and_then(|kib| kib.trim().parse::<u64>().ok());
    Ok(kib.context("/proc/self/status has no VmRSS in kB")? * 1024)
}

impl Report {
    /// The result.
    pub fn to_json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            json!({
                "name": row.name,
                "lookups_per_second": row.lookups_per_second,
                "p50_ns": row.p50_ns,
                "p99_ns": row.p99_ns,
            })
        });
        let mut result = json!({
            "num_blocks": self.num_blocks,
            "rows": rows.collect::<Vec<_>>(),
            "clock_p50_ns": self.clock_p50_ns,
            "manager_bytes_per_block": self.manager_bytes_per_block,
            "map_bytes_per_block": self.map_bytes_per_block,
        });
        if let (Value::Object(fields), Value::Object(provenance)) = (&mut result, self.provenance.to_json()) {
            fields.extend(provenance);
        }
        result
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<28}{:>16}{:>10}{:>10}",
            format!("{} blocks", self.num_blocks),
            "lookups/s",
            "p50 ns",
            "p99 ns"
        )?;
        for row in &self.rows {
            let Row { name, lookups_per_second, p50_ns, p99_ns } = row;
            writeln!(f, "{name:<28}{lookups_per_second:>16.0}{p50_ns:>10.0}{p99_ns:>10.0}")?;
        }
        writeln!(f, "reading the clock takes {:.0} ns of each single lookup", self.clock_p50_ns)?;
        writeln!(f, "block manager: {:.1} bytes per block, all books", self.manager_bytes_per_block)?;
        writeln!(f, "std map of keys: {:.1} bytes per block, keys and ids alone", self.map_bytes_per_block)?;
        let commit = self.provenance.commit.as_deref().unwrap_or("unknown");
        let cpu_model = self.provenance.cpu_model.as_deref().unwrap_or("an unknown processor");
        write!(f, "\n{}\ncommit {commit}, {cpu_model}", self.provenance.command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_the_pool_is_found_and_nothing_else() {
        let manager = filled_manager(1000);
        let find = |n: u64| manager.longest_prefix(std::iter::once(name(n))).len();
        assert_eq!((0..1000).map(find).sum::<usize>(), 1000);
        assert_eq!((1000..2000).map(find).sum::<usize>(), 0);
    }

    #[test]
    fn percentiles_are_of_the_sorted_times() {
        assert_eq!(percentile(vec![5, 1, 3, 2, 4], 0.5), 3.0);
        assert_eq!(percentile(vec![5, 1, 3, 2, 4], 1.0), 5.0);
    }
}
