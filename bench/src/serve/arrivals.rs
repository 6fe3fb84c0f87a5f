//! When each request is to be sent: drawn in advance from the seed, so that a slow answer can never delay
//! the next request. No clock, no I/O.

use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Gamma};

/// Shapes of the gamma distribution outside of which its samples say nothing any more.
pub const BURSTINESS_RANGE: std::ops::RangeInclusive<f64> = 0.01..=10_000.0;
/// Requests per second that a schedule can be drawn for.
pub const REQUEST_RATE_RANGE: std::ops::RangeInclusive<f64> = 1e-3..=1e6;

/// How requests arrive.
#[derive(Debug, Clone, PartialEq)]
pub enum Arrivals {
    /// All at the start.
    AtOnce,
    /// With independent gaps of a gamma distribution: its mean is `1 / request_rate`, its shape `burstiness`,
    /// so the variance of a gap is `1 / (request_rate² burstiness)`. A shape of 1 is a Poisson process,
    /// below 1 is burstier, above 1 more even.
    ///
    /// A burstiness of infinity has no randomness left: the gaps are constant.
    Gamma {
        /// Mean requests per second.
        rate: Rate,
        /// Within [`BURSTINESS_RANGE`], or infinite.
        burstiness: f64,
    },
    /// When a trace says.
    Trace(Vec<Duration>),
}

/// Requests per second over the course of a run, each within [`REQUEST_RATE_RANGE`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rate {
    /// The same all the time.
    Constant(f64),
    /// From one to another, in even steps from request to request.
    Linear {
        /// At the first request.
        start: f64,
        /// At the last.
        end: f64,
    },
    /// From one to another, in even factors from request to request.
    Exponential {
        /// At the first request.
        start: f64,
        /// At the last.
        end: f64,
    },
}

impl Rate {
    /// When `progress` (0 to 1) of the requests were sent.
    fn at(self, progress: f64) -> f64 {
        match self {
            Self::Constant(rate) => rate,
            Self::Linear { start, end } => start + (end - start) * progress,
            Self::Exponential { start, end } => start * (end / start).powf(progress),
        }
    }
}

impl Arrivals {
    /// The send times of `num_requests`, counted from the start of the run, in ascending order. The first
    /// request, too, waits for a gap, as in vLLM. A trace has no more requests than it has times.
    pub fn schedule(&self, num_requests: usize, seed: u64) -> Vec<Duration> {
        let (rate, burstiness) = match self {
            Self::AtOnce => return vec![Duration::ZERO; num_requests],
            Self::Trace(times) => return times.iter().copied().take(num_requests).collect(),
            Self::Gamma { rate, burstiness } => (rate, burstiness),
        };
        // Gaps of mean 1, stretched to the rate of the moment.
        let gaps = burstiness.is_finite().then(|| {
            Gamma::new(*burstiness, 1.0 / burstiness)
                .expect("shape and scale are positive and finite within the stated range")
        });
        let mut rng = StdRng::seed_from_u64(seed);
        let mut seconds = 0.0;
        (0..num_requests)
            .map(|index| {
                let gap = gaps.as_ref().map_or(1.0, |gaps| gaps.sample(&mut rng));
                seconds += gap / rate.at(index as f64 / (num_requests - 1).max(1) as f64);
                Duration::from_secs_f64(seconds)
            })
            .collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const NUM: usize = 20_000;

    fn gamma(burstiness: f64) -> Arrivals {
        Arrivals::Gamma { rate: Rate::Constant(8.0), burstiness }
    }

    /// Mean and variance of the gaps.
    fn moments(schedule: &[Duration]) -> (f64, f64) {
        let mut last = Duration::ZERO;
        let gaps: Vec<f64> =
            schedule.iter().map(|at| (*at - std::mem::replace(&mut last, *at)).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        (mean, gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64)
    }

    #[test]
    fn a_seed_is_a_schedule() {
        assert_eq!(gamma(0.5).schedule(100, 7), gamma(0.5).schedule(100, 7));
        assert_ne!(gamma(0.5).schedule(100, 7), gamma(0.5).schedule(100, 8));
        assert!(gamma(1.0).schedule(1000, 1).is_sorted());
        assert_eq!(Arrivals::AtOnce.schedule(3, 0), [Duration::ZERO; 3]);
    }

    #[test]
    fn gaps_have_the_mean_of_the_rate_and_the_variance_of_the_burstiness() {
        // Fixed seeds: the tolerance is about four standard errors of the burstiest, and cannot flake.
        for burstiness in [0.25, 1.0, 4.0, 100.0] {
            let (mean, variance) = moments(&gamma(burstiness).schedule(NUM, 3));
            assert!((mean * 8.0 - 1.0).abs() < 0.05, "burstiness {burstiness}: mean {mean}");
            let expected = 1.0 / (64.0 * burstiness);
            assert!((variance / expected - 1.0).abs() < 0.2, "burstiness {burstiness}: {variance}, not {expected}");
        }
    }

    #[test]
    fn burstiness_one_is_a_poisson_process() {
        let schedule = gamma(1.0).schedule(NUM, 5);
        // Of an exponential distribution, exp(-1) of the gaps exceed the mean.
        let mut last = Duration::ZERO;
        let num_long = schedule.iter().filter(|at| (**at - std::mem::replace(&mut last, **at)).as_secs_f64() > 0.125);
        let share = num_long.count() as f64 / NUM as f64;
        assert!((share - (-1.0f64).exp()).abs() < 0.015, "{share}");
    }

    #[test]
    fn the_ends_of_the_ranges_can_be_drawn() {
        for request_rate in [*REQUEST_RATE_RANGE.start(), *REQUEST_RATE_RANGE.end()] {
            for burstiness in [*BURSTINESS_RANGE.start(), *BURSTINESS_RANGE.end()] {
                let arrivals = Arrivals::Gamma { rate: Rate::Constant(request_rate), burstiness };
                assert_eq!(arrivals.schedule(1000, 0).len(), 1000);
            }
        }
    }

    #[test]
    fn constant_gaps_and_ramps_are_exact() {
        let seconds = |rate| -> Vec<f64> {
            let arrivals = Arrivals::Gamma { rate, burstiness: f64::INFINITY };
            arrivals.schedule(3, 9).iter().map(Duration::as_secs_f64).collect()
        };
        assert_eq!(seconds(Rate::Constant(4.0)), [0.25, 0.5, 0.75]);
        // Rates of 1, 2.5, 4 and of 1, 2, 4.
        assert_eq!(seconds(Rate::Linear { start: 1.0, end: 4.0 }), [1.0, 1.4, 1.65]);
        assert_eq!(seconds(Rate::Exponential { start: 1.0, end: 4.0 }), [1.0, 1.5, 1.75]);
        let trace = Arrivals::Trace(vec![at(5), at(7), at(9)]);
        assert_eq!(trace.schedule(2, 0), [at(5), at(7)]);
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }
}
