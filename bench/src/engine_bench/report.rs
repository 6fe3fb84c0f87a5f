//! The table of `tandem bench engine`, and its JSON.

use std::fmt;

use serde_json::{Value, json};

use super::Row;
use super::limit::Limit;
use super::peers::Peer;
use crate::ratio::Ratio;
use crate::serve::provenance::Provenance;

/// What a peer reached, round by round.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerSpeeds {
    /// Who.
    pub name: &'static str,
    /// Empty if it was not measured.
    pub tokens_per_second: Vec<f64>,
}

/// One line, round by round.
#[derive(Debug, Clone, PartialEq)]
pub struct RowResult {
    /// What was measured.
    pub row: Row,
    /// This engine.
    pub tokens_per_second: Vec<f64>,
    /// Measured beside it.
    pub limits: Vec<Limit>,
    /// The others.
    pub peers: Vec<PeerSpeeds>,
}

impl RowResult {
    /// Nothing measured yet.
    pub fn new(row: Row, peers: &[Peer]) -> Self {
        let peers = peers.iter().map(|peer| PeerSpeeds { name: peer.name(), tokens_per_second: Vec::new() });
        Self { row, tokens_per_second: Vec::new(), limits: Vec::new(), peers: peers.collect() }
    }

    /// One round of this engine.
    pub fn add(&mut self, limit: Limit, tokens_per_second: f64) {
        self.limits.push(limit);
        self.tokens_per_second.push(tokens_per_second);
    }

    /// Speeds over that of the limit of their round.
    fn shares(&self, speeds: &[f64]) -> Vec<f64> {
        speeds.iter().zip(&self.limits).map(|(speed, limit)| speed / limit.tokens_per_second).collect()
    }

    fn to_json(&self) -> Value {
        let column = |figure: fn(&Limit) -> Value| self.limits.iter().map(figure).collect::<Vec<_>>();
        let peers = self.peers.iter().map(|peer| {
            let ratio = Ratio::of_rounds(&self.tokens_per_second, &padded(peer, self.tokens_per_second.len()));
            json!({
                "name": peer.name,
                "tokens_per_second": peer.tokens_per_second,
                "share_of_limit": self.shares(&peer.tokens_per_second),
                "this_over_peer": ratio.map(Ratio::to_json),
            })
        });
        json!({
            "row": self.row.to_json(),
            "tokens_per_second": self.tokens_per_second,
            "share_of_limit": self.shares(&self.tokens_per_second),
            "limit_tokens_per_second": column(|limit| json!(limit.tokens_per_second)),
            "bound_by": column(|limit| json!(limit.bound.as_str())),
            "bytes_per_second": column(|limit| json!(limit.bytes_per_second)),
            "float_ops_per_second": column(|limit| json!(limit.float_ops_per_second)),
            "int_ops_per_second": column(|limit| json!(limit.int_ops_per_second)),
            "peers": peers.collect::<Vec<_>>(),
        })
    }
}

/// What a peer that was not measured has is no ratio to anything.
fn padded(peer: &PeerSpeeds, num_rounds: usize) -> Vec<f64> {
    let mut speeds = peer.tokens_per_second.clone();
    speeds.resize(num_rounds, f64::NAN);
    speeds
}

/// All of it.
#[derive(Debug)]
pub struct EngineReport {
    /// Model, what it ran on and how.
    setting: String,
    rows: Vec<RowResult>,
    provenance: Provenance,
}

impl EngineReport {
    /// Of these rows.
    pub fn new(setting: String, rows: Vec<RowResult>, provenance: Provenance) -> Self {
        Self { setting, rows, provenance }
    }

    /// The result.
    pub fn to_json(&self) -> Value {
        let rows: Vec<Value> = self.rows.iter().map(RowResult::to_json).collect();
        let mut result = json!({"setting": self.setting, "rows": rows});
        if let (Value::Object(fields), Value::Object(provenance)) = (&mut result, self.provenance.to_json()) {
            fields.extend(provenance);
        }
        result
    }
}

/// Of an even number the mean of the middle two.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.get(values.len().checked_sub(1)? / 2)?, values.get(values.len() / 2)?);
    Some(low.midpoint(*high))
}

impl fmt::Display for EngineReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.setting)?;
        writeln!(f, "{:<34}{:>10}{:>10}  of the limit of", "", "tok/s", "share")?;
        for row in &self.rows {
            let speed = median(row.tokens_per_second.clone()).unwrap_or(f64::NAN);
            let share = 100.0 * median(row.shares(&row.tokens_per_second)).unwrap_or(f64::NAN);
            write!(f, "{:<34}{speed:>10.1}{share:>8.0} %", row.row.name())?;
            let limit = median(row.limits.iter().map(|limit| limit.tokens_per_second).collect()).unwrap_or(f64::NAN);
            let bound = row.limits.first().map_or("", |limit| limit.bound.as_str());
            writeln!(f, "  {limit:.1} tok/s by {bound}")?;
            for peer in &row.peers {
                let Some(speed) = median(peer.tokens_per_second.clone()) else {
                    writeln!(f, "  {:<32}{:>10}", peer.name, "no figure")?;
                    continue;
                };
                let share = 100.0 * median(row.shares(&peer.tokens_per_second)).unwrap_or(f64::NAN);
                write!(f, "  {:<32}{speed:>10.1}{share:>8.0} %", peer.name)?;
                match Ratio::of_rounds(&row.tokens_per_second, &padded(peer, row.tokens_per_second.len())) {
                    Some(ratio) => writeln!(f, "  this is {ratio}")?,
                    None => writeln!(f)?,
                }
            }
        }
        let limits = || self.rows.iter().flat_map(|row| &row.limits);
        let bytes = median(limits().map(|limit| limit.bytes_per_second).collect()).unwrap_or(f64::NAN);
        write!(f, "\nlimits are of {:.1} GB/s", bytes / 1e9)?;
        let float = limits().map(|limit| limit.float_ops_per_second).filter(|ops| ops.is_finite());
        match median(float.collect()) {
            Some(float) => writeln!(f, " and {:.2} TFLOP/s (medians)", float / 1e12)?,
            None => writeln!(f, " (median); of the arithmetic no peak is known")?,
        }
        let commit = self.provenance.commit.as_deref().unwrap_or("unknown");
        let cpu_model = self.provenance.cpu_model.as_deref().unwrap_or("an unknown processor");
        write!(f, "\n{}\ncommit {commit}, {cpu_model}", self.provenance.command)
    }
}

#[cfg(test)]
mod tests {
    use engine::limits::Arithmetic;

    use super::*;
    use crate::engine_bench::limit::StepWork;

    fn report() -> EngineReport {
        let work = StepWork { num_tokens: 1.0, num_bytes: 1.0, float_ops: 0.0, int_ops: 0.0, float: Arithmetic::Bf16 };
        let row = Row::Decode { batch: 8, context: 512, num_tokens: 64 };
        let mut result = RowResult::new(row, &[]);
        for (limit, speed) in [(100.0, 80.0), (50.0, 45.0), (200.0, 100.0)] {
            result.add(Limit::of(&work, limit, f64::INFINITY, None), speed);
        }
        result.peers = vec![
            PeerSpeeds { name: "llama.cpp", tokens_per_second: vec![40.0, 22.5, 50.0] },
            PeerSpeeds { name: "vLLM", tokens_per_second: vec![] },
        ];
        let provenance = Provenance { command: "bench engine".into(), commit: None, cpu_model: None, num_cores: None };
        EngineReport { setting: "a model".into(), rows: vec![result], provenance }
    }

    #[test]
    fn shares_and_ratios_are_taken_within_a_round() {
        let text = report().to_string();
        assert!(text.contains("80.0      80 %  100.0 tok/s by memory"), "{text}");
        assert!(text.contains("40.0      40 %  this is 2.000x [2.000, 2.000]"), "{text}");
        assert!(text.contains("no figure"), "{text}");
        assert!(text.contains("limits are of 0.0 GB/s (median); of the arithmetic no peak is known"), "{text}");
    }

    #[test]
    fn of_two_rounds_the_middle_is_between_them() {
        let medians = [vec![], vec![3.0], vec![4.0, 1.0], vec![9.0, 2.0, 4.0], vec![8.0, 1.0, 2.0, 4.0]].map(median);
        assert_eq!(medians, [None, Some(3.0), Some(2.5), Some(4.0), Some(3.0)]);
    }

    #[test]
    fn the_json_has_every_round_beside_where_it_comes_from() {
        let json = report().to_json();
        let row = &json["rows"][0];
        assert_eq!(row["share_of_limit"], json!([0.8, 0.9, 0.5]));
        assert_eq!(row["row"], json!({"phase": "decode", "batch": 8, "context": 512, "num_tokens": 64}));
        assert_eq!(row["peers"][0]["this_over_peer"]["ratio"], json!(2.0));
        assert_eq!(row["peers"][1]["this_over_peer"], Value::Null);
        assert_eq!(json["command"], "bench engine");
    }
}
