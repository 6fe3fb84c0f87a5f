//! The table of a transfer benchmark.

use std::fmt;
use std::time::Duration;

/// CPU time of the two processes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct CpuTime {
    pub(super) sender: Duration,
    pub(super) receiver: Duration,
}

/// What was seen of one row, over all rounds.
#[derive(Debug, Clone)]
pub(super) struct Row {
    name: String,
    /// The row of what this one is made of.
    parts: Option<String>,
    /// Bytes per second of each round.
    rates: Vec<f64>,
    num_bytes: f64,
    cpu: CpuTime,
    singles: Vec<Duration>,
    ways: Vec<Duration>,
}

impl Row {
    pub(super) fn new(name: String) -> Self {
        let (rates, singles, ways) = Default::default();
        Self { name, parts: None, rates, num_bytes: 0.0, cpu: CpuTime::default(), singles, ways }
    }

    /// Held against the row of this name.
    pub(super) fn made_of(self, parts: String) -> Self {
        Self { parts: Some(parts), ..self }
    }

    pub(super) fn observe(&mut self, num_bytes: usize, took: Duration, cpu: CpuTime) {
        self.rates.push(num_bytes as f64 / took.as_secs_f64());
        self.num_bytes += num_bytes as f64;
        self.cpu.sender += cpu.sender;
        self.cpu.receiver += cpu.receiver;
    }

    /// One extent: from asking for it to its verdict, and from being complete at the sender.
    pub(super) fn observe_single(&mut self, took: Duration, way: Duration) {
        self.singles.push(took);
        self.ways.push(way);
    }

    /// As [`observe_single`](Self::observe_single), where being complete has no time of its own.
    pub(super) fn observe_single_asked(&mut self, took: Duration) {
        self.singles.push(took);
    }

    /// Median of the rounds, bytes per second.
    fn rate(&self) -> f64 {
        let mut rates = self.rates.clone();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied().unwrap_or_default()
    }

    /// CPU seconds of sender and receiver per GB.
    fn cpu_per_gb(&self) -> (f64, f64) {
        let per_gb = |time: Duration| time.as_secs_f64() / (self.num_bytes / 1e9);
        (per_gb(self.cpu.sender), per_gb(self.cpu.receiver))
    }
}

/// Median and 99th percentile in microseconds; nothing of nothing.
fn percentiles(times: &[Duration]) -> String {
    let mut times = times.to_vec();
    times.sort();
    let at = |share: f64| {
        let last = times.len().checked_sub(1)?;
        Some(times[(last as f64 * share).round() as usize].as_micros())
    };
    at(0.5).zip(at(0.99)).map(|(p50, p99)| format!("{p50} / {p99}")).unwrap_or_default()
}

/// GB/s of each row, held against TCP, plain and under TLS, memcpy, and what it is made of, in the same rounds.
#[derive(Debug)]
pub struct Report {
    rows: Vec<Row>,
    is_pinned: bool,
    /// In words, and the bytes per second that it carries.
    link: Option<(String, Option<f64>)>,
}

impl Report {
    /// The last three rows are TLS over TCP, TCP and memcpy.
    pub(super) fn new(rows: Vec<Row>, is_pinned: bool) -> Self {
        Self { rows, is_pinned, link: None }
    }

    /// Over an emulated link, in words, that carries so many bytes per second: of them the share is printed, and not
    /// of memcpy.
    pub(super) fn over_link(self, words: String, bytes_per_second: Option<f64>) -> Self {
        Self { link: Some((words, bytes_per_second)), ..self }
    }

    fn share_of_parts(&self, row: &Row) -> String {
        let parts = row.parts.as_ref().and_then(|name| self.rows.iter().find(|row| row.name == *name));
        parts.map(|parts| format!("{:.2}", row.rate() / parts.rate())).unwrap_or_default()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pinned = if self.is_pinned { "one core each" } else { "not pinned to cores" };
        writeln!(
            f,
            "two processes, {pinned}; GB = 10^9 bytes; digests made and checked, but not by TCP, TLS and memcpy"
        )?;
        let rate = self.link.as_ref().and_then(|(_, bytes_per_second)| *bytes_per_second);
        if let Some((words, _)) = &self.link {
            writeln!(f, "{words}")?;
        }
        let of_limit = if rate.is_some() { "of rate" } else { "of copy" };
        writeln!(
            f,
            "{:<20} {:>8} {:>8} {:>8} {:>8} {:>10} {:>13} {:>22} {:>18} {:>9}",
            "",
            "GB/s",
            "of TCP",
            "of TLS",
            of_limit,
            "CPU s/GB",
            "send / recv",
            "1 extent p50/p99, us",
            "once complete, us",
            "of parts"
        )?;
        let [.., tls, tcp, memcpy] = &self.rows[..] else { return Ok(()) };
        for row in &self.rows {
            let of = |other: &Row| row.rate() / other.rate();
            let (sender, receiver) = row.cpu_per_gb();
            let line = format!(
                "{:<20} {:>8.3} {:>8.2} {:>8.2} {:>8.2} {:>10.2} {:>13} {:>22} {:>18} {:>9}",
                row.name,
                row.rate() / 1e9,
                of(tcp),
                of(tls),
                row.rate() / rate.unwrap_or(memcpy.rate()),
                sender + receiver,
                format!("{sender:.2} / {receiver:.2}"),
                percentiles(&row.singles),
                percentiles(&row.ways),
                self.share_of_parts(row)
            );
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_medians_and_sums_of_what_was_observed() {
        let mut row = Row::new("quic".to_string());
        for (millis, cpu) in [(100, 10), (50, 20), (200, 30)] {
            let (sender, receiver) = (Duration::from_millis(cpu), Duration::from_millis(2 * cpu));
            row.observe(100_000_000, Duration::from_millis(millis), CpuTime { sender, receiver });
        }
        assert!((row.rate() - 1e9).abs() < 1.0);
        let (sender, receiver) = row.cpu_per_gb();
        assert!((sender - 0.2).abs() < 1e-9 && (receiver - 0.4).abs() < 1e-9);
        (1..=101).for_each(|micros| {
            row.observe_single(Duration::from_micros(micros), Duration::from_micros(micros) / 2);
        });
        let mut tcp = Row::new("TCP, blocking".to_string());
        tcp.observe(100_000_000, Duration::from_millis(50), CpuTime::default());
        let mut tls = Row::new("TLS over TCP".to_string());
        tls.observe(100_000_000, Duration::from_millis(80), CpuTime::default());
        row = row.made_of("its parts".to_string());
        let mut parts = Row::new("its parts".to_string());
        parts.observe(100_000_000, Duration::from_millis(25), CpuTime::default());
        let rows = vec![row, parts, tls, tcp.clone(), tcp];
        let linked = Report::new(rows.clone(), true).over_link("a link".to_string(), Some(1.25e9)).to_string();
        assert!(linked.lines().nth(1) == Some("a link") && linked.contains("of rate"), "{linked}");
        let share = linked.lines().find_map(|line| line.strip_prefix("quic")?.split_whitespace().nth(3));
        assert_eq!(share, Some("0.80"), "{linked}");
        let text = Report::new(rows, true).to_string();
        let line = text.lines().find(|line| line.starts_with("quic")).unwrap_or_default();
        assert_eq!(
            line.split_whitespace().collect::<Vec<_>>(),
            [
                "quic", "1.000", "0.50", "0.80", "0.50", "0.60", "0.20", "/", "0.40", "51", "/", "100", "25", "/",
                "50", "0.25"
            ]
        );
    }
}
