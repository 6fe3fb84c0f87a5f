//! The table of control round trips.

use std::fmt;
use std::time::Duration;

/// What was seen of one row, over all rounds.
#[derive(Debug, Clone)]
pub(super) struct Row {
    name: String,
    took: Vec<Duration>,
    num_kv_bytes: u64,
    kv_time: Duration,
}

impl Row {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_string(), took: Vec::new(), num_kv_bytes: 0, kv_time: Duration::ZERO }
    }

    pub(super) fn observe(&mut self, took: Duration) {
        self.took.push(took);
    }

    pub(super) fn observe_kv(&mut self, num_bytes: u64, took: Duration) {
        self.num_kv_bytes += num_bytes;
        self.kv_time += took;
    }

    /// The value that this share of all lie below, in microseconds.
    fn micros_at(&self, share: f64) -> f64 {
        let mut took = self.took.clone();
        took.sort();
        let last = took.len().saturating_sub(1);
        took.get((last as f64 * share).round() as usize).map_or(0.0, |took| took.as_secs_f64() * 1e6)
    }
}

/// What was measured.
#[derive(Debug)]
pub struct Report {
    pub(super) rows: Vec<Row>,
    /// Whether each process has a core for itself.
    pub(super) is_pinned: bool,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cores = if self.is_pinned { "one core at each end" } else { "nothing pinned to a core" };
        writeln!(f, "a message to a node and back, {cores}, in microseconds")?;
        writeln!(f)?;
        writeln!(f, "{:<20}{:>10}{:>10}{:>10}{:>10}{:>12}", "beside", "p50", "p90", "p99", "max", "KV GB/s")?;
        for row in &self.rows {
            let [p50, p90, p99, max] = [0.5, 0.9, 0.99, 1.0].map(|share| row.micros_at(share));
            write!(f, "{:<20}{p50:>10.0}{p90:>10.0}{p99:>10.0}{max:>10.0}", row.name)?;
            match row.kv_time {
                Duration::ZERO => writeln!(f, "{:>12}", "-")?,
                time => writeln!(f, "{:>12.2}", row.num_kv_bytes as f64 / time.as_secs_f64() / 1e9)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_and_rate_are_those_of_all_rounds() {
        let mut row = Row::new("KV over quic");
        (1..=101).rev().for_each(|micros| row.observe(Duration::from_micros(micros)));
        row.observe_kv(1_000_000_000, Duration::from_secs(1));
        row.observe_kv(2_000_000_000, Duration::from_secs(1));
        let table = Report { rows: vec![row, Row::new("nothing")], is_pinned: true }.to_string();
        let cells: Vec<&str> = table.lines().nth(3).unwrap().split_whitespace().skip(3).collect();
        assert_eq!(cells, ["51", "91", "100", "101", "1.50"]);
        assert!(table.lines().nth(4).unwrap().ends_with('-'), "{table}");
    }
}
