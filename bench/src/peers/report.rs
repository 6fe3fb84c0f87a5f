//! The table of idle connections.

use std::fmt;
use std::time::Duration;

use super::holding::Holding;

/// What all connections of a row took at one end.
#[derive(Debug, Clone, Copy)]
pub(super) struct End {
    /// Memory that was not resident before.
    pub(super) resident_bytes: u64,
    /// CPU time to make them.
    pub(super) cpu_seconds_to_dial: f64,
    /// CPU seconds per second while nothing happens.
    pub(super) idle_cpu_share: f64,
}

/// One kind of connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    pub(super) holding: Holding,
    /// Until the last one was there.
    pub(super) dialling: Duration,
    pub(super) dialler: End,
    pub(super) dialled: End,
}

/// What was measured.
#[derive(Debug)]
pub struct Report {
    pub(super) count: u32,
    pub(super) seconds: u32,
    pub(super) rows: Vec<Row>,
    /// What could not be measured, and why.
    pub(super) failures: Vec<(Holding, String)>,
}

impl Report {
    /// Of all that were to be measured.
    pub(super) fn num_failures(&self) -> usize {
        self.failures.len()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, seconds, rows, failures } = self;
        writeln!(f, "{count} connections, idle for {seconds} s; each end is a process; per connection")?;
        writeln!(f)?;
        let columns = ["KiB", "CPU ms to make", "idle CPU us/s", "% of a core, 1000 idle"];
        writeln!(
            f,
            "{:<8}{:<9}{:>9}{:>17}{:>16}{:>25}",
            "kind", "end", columns[0], columns[1], columns[2], columns[3]
        )?;
        for row in rows {
            for (name, end) in [("dials", row.dialler), ("dialled", row.dialled)] {
                let per_connection = |all: f64| all / f64::from(*count);
                writeln!(
                    f,
                    "{:<8}{name:<9}{:>9.1}{:>17.2}{:>16.1}{:>25.2}",
                    row.holding.as_str(),
                    per_connection(end.resident_bytes as f64) / 1024.0,
                    per_connection(end.cpu_seconds_to_dial) * 1e3,
                    per_connection(end.idle_cpu_share) * 1e6,
                    per_connection(end.idle_cpu_share) * 1000.0 * 100.0,
                )?;
            }
            writeln!(f, "{:<8}all were there behind {:.2} s", row.holding.as_str(), row.dialling.as_secs_f64())?;
        }
        for (holding, reason) in failures {
            writeln!(f, "{:<8}NOT MEASURED: {reason}", holding.as_str())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_one_connection() {
        let end = End { resident_bytes: 200 * 2048, cpu_seconds_to_dial: 0.4, idle_cpu_share: 0.01 };
        let row = Row { holding: Holding::Pair, dialling: Duration::from_millis(1500), dialler: end, dialled: end };
        let failures = vec![(Holding::Watch, "the node is gone".to_string())];
        let table = Report { count: 200, seconds: 7, rows: vec![row], failures }.to_string();
        assert!(table.contains("watch   NOT MEASURED: the node is gone"), "{table}");
        assert!(table.starts_with("200 connections, idle for 7 s"), "{table}");
        let cells = |end: &str| {
            let line = table.lines().find(|line| line.contains(end)).unwrap();
            line.split_whitespace().skip(2).map(str::to_string).collect::<Vec<_>>()
        };
        assert_eq!(cells("dialled"), ["2.0", "2.00", "50.0", "5.00"]);
        assert_eq!(cells("dials"), cells("dialled"));
        assert!(table.contains("pair    all were there behind 1.50 s"), "{table}");
    }
}
