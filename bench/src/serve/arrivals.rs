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
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arrivals {
    /// All at the start.
    AtOnce,
    /// With independent gaps of a gamma distribution: its mean is `1 / request_rate`, its shape `burstiness`,
    /// so the variance of a gap is `1 / (request_rate² burstiness)`. A shape of 1 is a Poisson process,
    /// below 1 is burstier, above 1 more even.
    Gamma {
        /// Mean requests per second, within [`REQUEST_RATE_RANGE`].
        request_rate: f64,
        /// Within [`BURSTINESS_RANGE`].
        burstiness: f64,
    },
}

impl Arrivals {
    /// The send times of `num_requests`, counted from the start of the run, in ascending order. The first
    /// request, too, waits for a gap, as in vLLM.
    pub fn schedule(self, num_requests: usize, seed: u64) -> Vec<Duration> {
        let Self::Gamma { request_rate, burstiness } = self else { return vec![Duration::ZERO; num_requests] };
        let gaps = Gamma::new(burstiness, 1.0 / (request_rate * burstiness))
            .expect("shape and scale are positive and finite within the stated ranges");
        let mut rng = StdRng::seed_from_u64(seed);
        let mut seconds = 0.0;
        (0..num_requests)
            .map(|_| {
                seconds += gaps.sample(&mut rng);
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
        Arrivals::Gamma { request_rate: 8.0, burstiness }
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
                assert_eq!(Arrivals::Gamma { request_rate, burstiness }.schedule(1000, 0).len(), 1000);
            }
        }
    }
}
