//! When the tokens of each request leave, from a seed. No clock, no I/O.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Times of one answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Times {
    /// From the request to its first token.
    pub first: Duration,
    /// Before each token behind the first.
    pub gaps: Vec<Duration>,
}

/// Draws the times of one request after the other.
#[derive(Debug)]
pub struct Script {
    ttft_ms: f64,
    itl_ms: f64,
    spread: f64,
    seed: u64,
    num_drawn: AtomicU64,
}

impl Script {
    /// Means, and the share of them on both sides within which times are drawn evenly.
    ///
    /// # Errors
    /// If a time is not 0.001 ms to a day, or the spread not 0 to 1.
    pub fn new(ttft_ms: f64, itl_ms: f64, spread: f64, seed: u64) -> anyhow::Result<Self> {
        for (flag, ms) in [("--ttft-ms", ttft_ms), ("--itl-ms", itl_ms)] {
            anyhow::ensure!((0.001..=86.4e6).contains(&ms), "{flag} is {ms}, expected 0.001 to 86400000");
        }
        anyhow::ensure!((0.0..=1.0).contains(&spread), "--spread is {spread}, expected 0 to 1");
        Ok(Self { ttft_ms, itl_ms, spread, seed, num_drawn: AtomicU64::new(0) })
    }

    /// The times of the next request, for an answer of `num_tokens`.
    pub fn next(&self, num_tokens: usize) -> Times {
        let number = self.num_drawn.fetch_add(1, Ordering::Relaxed);
        let mut rng = StdRng::seed_from_u64(self.seed.rotate_left(32) ^ number);
        let mut draw = |mean_ms: f64| {
            let ms = mean_ms * (1.0 + self.spread * rng.random_range(-1.0..=1.0));
            Duration::from_secs_f64(ms / 1e3)
        };
        Times { first: draw(self.ttft_ms), gaps: (1..num_tokens).map(|_| draw(self.itl_ms)).collect() }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn times_are_of_the_seed_and_within_the_spread() {
        let draw = |seed| {
            let script = Script::new(100.0, 20.0, 0.5, seed).unwrap();
            (script.next(50), script.next(1))
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        let (long, short) = draw(3);
        let ms = |span: Duration| span.as_secs_f64() * 1e3;
        assert!((50.0..=150.0).contains(&ms(long.first)) && (50.0..=150.0).contains(&ms(short.first)));
        assert_eq!((long.gaps.len(), short.gaps.len()), (49, 0));
        assert!(long.gaps.iter().all(|gap| (10.0..=30.0).contains(&ms(*gap))));
        let exact = Script::new(7.0, 2.0, 0.0, 0).unwrap().next(2);
        assert_eq!(exact, Times { first: Duration::from_millis(7), gaps: vec![Duration::from_millis(2)] });
    }

    #[test]
    fn what_is_no_time_is_named() {
        for (ttft, itl, spread, expected) in
            [(0.0, 1.0, 0.0, "--ttft-ms"), (1.0, f64::NAN, 0.0, "--itl-ms"), (1.0, 1.0, 1.1, "--spread")]
        {
            let reason = Script::new(ttft, itl, spread, 0).unwrap_err().to_string();
            assert!(reason.contains(expected), "{reason}");
        }
    }
}
