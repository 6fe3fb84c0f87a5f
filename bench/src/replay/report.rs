//! Hit ratios as a table for people and as JSON.

use std::fmt;

use common::eviction::EvictionPolicy;
use serde_json::{Value, json};

use super::ReplayArgs;
use crate::serve::provenance::Provenance;

/// Blocks found, of all blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratios {
    /// Of the whole trace.
    pub whole: f64,
    /// Of the requests behind `--train-fraction`.
    pub scored: f64,
}

/// What a policy found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PolicyRatios {
    /// Which.
    pub policy: EvictionPolicy,
    /// What it found.
    pub ratios: Ratios,
}

/// One size of the pool.
#[derive(Debug, Clone, PartialEq)]
pub struct SizeReport {
    /// Blocks of the pool.
    pub num_blocks: usize,
    /// LRU first.
    pub policies: Vec<PolicyRatios>,
    /// What could be found at most.
    pub optimum: Ratios,
}

impl SizeReport {
    /// The share of the way from LRU to the optimum that `ratios` makes; `None` if there is no way to go.
    pub fn gap_closed(&self, ratios: Ratios) -> [Option<f64>; 2] {
        let lru = self.policies.first().map_or(self.optimum, |lru| lru.ratios);
        let share = |lru: f64, own: f64, best: f64| (best > lru).then(|| (own - lru) / (best - lru));
        [share(lru.whole, ratios.whole, self.optimum.whole), share(lru.scored, ratios.scored, self.optimum.scored)]
    }
}

/// Figures with what was asked for and where they come from.
#[derive(Debug)]
pub struct Report {
    /// What was asked for.
    pub args: ReplayArgs,
    /// Where it was run.
    pub provenance: Provenance,
    /// Requests of the trace.
    pub num_requests: usize,
    /// Their blocks.
    pub num_blocks: usize,
    /// Different ones among them.
    pub num_distinct_blocks: usize,
    /// What a pool with room for all would find.
    pub unbounded: Ratios,
    /// By size of the pool.
    pub sizes: Vec<SizeReport>,
}

impl Report {
    /// The result.
    pub fn to_json(&self) -> Value {
        let ratios = |ratios: Ratios| json!({"hit_ratio": ratios.whole, "scored_hit_ratio": ratios.scored});
        let sizes = self.sizes.iter().map(|size| {
            let policies = size.policies.iter().map(|measured| {
                let [whole, scored] = size.gap_closed(measured.ratios);
                json!({
                    "policy": measured.policy.as_str(),
                    "hit_ratio": measured.ratios.whole,
                    "scored_hit_ratio": measured.ratios.scored,
                    "gap_closed": whole,
                    "scored_gap_closed": scored,
                })
            });
            json!({
                "num_blocks": size.num_blocks,
                "policies": policies.collect::<Vec<_>>(),
                "optimum": ratios(size.optimum),
            })
        });
        let mut result = json!({
            "trace": self.args.trace,
            "through": if self.args.engine { "engine" } else { "block_manager" },
            "train_fraction": self.args.train_fraction,
            "num_requests": self.num_requests,
            "num_blocks": self.num_blocks,
            "num_distinct_blocks": self.num_distinct_blocks,
            "unbounded": ratios(self.unbounded),
            "sizes": sizes.collect::<Vec<_>>(),
        });
        if let (Value::Object(fields), Value::Object(provenance)) = (&mut result, self.provenance.to_json()) {
            fields.extend(provenance);
        }
        result
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |ratio: f64| format!("{:.2}", 100.0 * ratio);
        let closed =
            |share: Option<f64>| share.map_or_else(|| "-".to_string(), |share| format!("{:.0}%", 100.0 * share));
        writeln!(
            f,
            "{} requests, {} blocks, {} different; a pool for all would find {} % ({} % of the scored part)",
            self.num_requests,
            self.num_blocks,
            self.num_distinct_blocks,
            percent(self.unbounded.whole),
            percent(self.unbounded.scored),
        )?;
        writeln!(
            f,
            "\n{:>10}  {:<12}{:>14}{:>14}{:>14}{:>14}",
            "blocks", "policy", "% found", "of the gap", "% scored", "of the gap"
        )?;
        for size in &self.sizes {
            let optimum = ("optimum", size.optimum);
            let policies = size.policies.iter().map(|measured| (measured.policy.as_str(), measured.ratios));
            for (name, ratios) in policies.chain([optimum]) {
                let [whole, scored] = size.gap_closed(ratios);
                writeln!(
                    f,
                    "{:>10}  {name:<12}{:>14}{:>14}{:>14}{:>14}",
                    size.num_blocks,
                    percent(ratios.whole),
                    closed(whole),
                    percent(ratios.scored),
                    closed(scored),
                )?;
            }
        }
        let commit = self.provenance.commit.as_deref().unwrap_or("unknown");
        let cpu_model = self.provenance.cpu_model.as_deref().unwrap_or("an unknown processor");
        write!(f, "\n{}\ncommit {commit}, {cpu_model}", self.provenance.command)
    }
}
