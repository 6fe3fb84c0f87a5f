//! How far the loading of weights is, for whoever waits for it: a bar on a terminal, else a line every few seconds.
//!
//! Told by the threads that load, matrix by matrix: a line is late by as long as one takes, and nobody has to wake up
//! for it. Norms and biases, which are next to nothing, are counted neither in the total nor on the way.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

const BAR: &str = "loading weights [{bar:40}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";

/// Two lines are at least this far apart, and the first from the start: a model that is there sooner needs none.
const LINE_INTERVAL: Duration = Duration::from_secs(3);

/// Shown until dropped.
pub struct LoadProgress {
    bar: ProgressBar,
    lines: Mutex<Lines>,
}

impl LoadProgress {
    /// Of `num_bytes` of matrices in a checkpoint, from now on.
    pub fn start(num_bytes: u64) -> Self {
        // Draws nothing where standard error is no terminal.
        let bar = ProgressBar::new(num_bytes);
        bar.set_style(ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self { bar, lines: Mutex::new(Lines::start(num_bytes, Instant::now())) }
    }

    /// So many bytes more are loaded.
    pub fn add(&self, num_bytes: u64) {
        self.bar.inc(num_bytes);
        // A poisoned lock means that another thread panicked, which whoever started it raises again.
        let line = self.lines.lock().unwrap_or_else(PoisonError::into_inner).on_loaded(num_bytes, Instant::now());
        if let Some(line) = line.filter(|_| self.bar.is_hidden()) {
            tracing::info!("{line}");
        }
    }
}

impl Drop for LoadProgress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// When which line is due.
struct Lines {
    num_bytes: u64,
    num_loaded: u64,
    started_at: Instant,
    last_at: Instant,
}

impl Lines {
    fn start(num_bytes: u64, now: Instant) -> Self {
        Self { num_bytes, num_loaded: 0, started_at: now, last_at: now }
    }

    fn on_loaded(&mut self, num_bytes: u64, now: Instant) -> Option<String> {
        self.num_loaded += num_bytes;
        if now.duration_since(self.last_at) < LINE_INTERVAL {
            return None;
        }
        self.last_at = now;
        let gigabytes = |num_bytes: u64| num_bytes as f64 / 1e9;
        Some(format!(
            "loading weights: {:.1} of {:.1} GB ({} %), {:.2} GB/s",
            gigabytes(self.num_loaded),
            gigabytes(self.num_bytes),
            (self.num_loaded * 100).checked_div(self.num_bytes).unwrap_or(100),
            gigabytes(self.num_loaded) / now.duration_since(self.started_at).as_secs_f64(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_every_few_seconds_says_bytes_total_and_speed() {
        let start = Instant::now();
        let mut lines = Lines::start(2_200_000_000, start);
        let mut at =
            |milliseconds: u64, num_bytes: u64| lines.on_loaded(num_bytes, start + Duration::from_millis(milliseconds));
        assert_eq!(at(1_000, 400_000_000), None);
        assert_eq!(at(4_000, 400_000_000).as_deref(), Some("loading weights: 0.8 of 2.2 GB (36 %), 0.20 GB/s"));
        assert_eq!(at(6_900, 400_000_000), None, "the line before it is 2.9 s old");
        assert_eq!(at(8_000, 1_000_000_000).as_deref(), Some("loading weights: 2.2 of 2.2 GB (100 %), 0.28 GB/s"));
    }

    #[test]
    fn a_checkpoint_without_bytes_is_loaded() {
        let start = Instant::now();
        let line = Lines::start(0, start).on_loaded(0, start + LINE_INTERVAL);
        assert_eq!(line.as_deref(), Some("loading weights: 0.0 of 0.0 GB (100 %), 0.00 GB/s"));
    }
}
