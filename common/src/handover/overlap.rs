//! How a prefix that is loaded from its end and computed from its front is divided, so that both sides are expected
//! to end together.
//!
//! ```text
//! tokens    |---- split ----|----------- rest -----------|
//! compute   ahead, then split at its speed        }
//! load      rest at its speed, from its end       } the same time
//! ```
//!
//! Figures are measured or set by an operator; a wrong one costs time, never a token.

use std::time::Duration;

use super::prefix_choice::time_for;

/// A division.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overlap {
    /// Leading tokens that are computed.
    pub num_computed_tokens: usize,
    /// Until the two meet.
    pub meet: Duration,
}

/// How fast the two sides are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OverlapPace {
    /// Prompt tokens computed here.
    pub compute_tokens_per_second: f64,
    /// Tokens whose KV arrives.
    pub load_tokens_per_second: f64,
}

impl OverlapPace {
    /// Divides `num_tokens`, whose computing begins when `ahead` has passed, and whose loading begins now. What is
    /// computed is a whole number of blocks; less than one is none: a step has a price of its own.
    pub fn divide(&self, num_tokens: usize, ahead: Duration, block_size: usize) -> Overlap {
        let [compute, load] = [self.compute_tokens_per_second, self.load_tokens_per_second]
            .map(|speed| if speed.is_finite() { speed.max(0.0) } else { 0.0 });
        let num = num_tokens as f64;
        let num_ahead = load * ahead.as_secs_f64();
        if num_ahead >= num && load > 0.0 {
            return Overlap { num_computed_tokens: 0, meet: time_for(num, load) };
        }
        if load == 0.0 {
            let meet = time_for(num, compute).saturating_add(ahead);
            return Overlap { num_computed_tokens: num_tokens, meet };
        }
        // Behind `ahead` both work on what is left.
        let left = num - num_ahead;
        // Absurd speeds have no share.
        let num_computed = (left * compute / (compute + load)).min(left) as usize;
        let num_computed_tokens = num_computed / block_size.max(1) * block_size.max(1);
        let meet = time_for(num - num_computed_tokens as f64, load);
        Overlap { num_computed_tokens, meet }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn divide(compute: f64, load: f64, ahead: Duration) -> (usize, Duration) {
        let pace = OverlapPace { compute_tokens_per_second: compute, load_tokens_per_second: load };
        let Overlap { num_computed_tokens, meet } = pace.divide(1600, ahead, 16);
        (num_computed_tokens, meet)
    }

    #[test]
    fn both_sides_end_together() {
        assert_eq!(divide(1000.0, 1000.0, Duration::ZERO), (800, 800 * MS));
        assert_eq!(divide(1000.0, 3000.0, Duration::ZERO), (400, 400 * MS));
        assert_eq!(divide(1000.0, 1000.0, 800 * MS), (400, 1200 * MS), "half of it comes while others are computed");
        assert_eq!(divide(1000.0, 1000.0, 1600 * MS), (0, 1600 * MS));
        assert_eq!(divide(1000.0, 99_999.0, Duration::ZERO).0, 0, "15 tokens are less than a block");
        assert_eq!(divide(1000.0, 0.0, Duration::ZERO), (1600, 1600 * MS));
        assert_eq!(divide(0.0, 1000.0, Duration::ZERO), (0, 1600 * MS));
    }

    #[test]
    fn absurd_figures_do_not_panic() {
        for absurd in [0.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN_POSITIVE] {
            for other in [absurd, 1000.0] {
                for ahead in [Duration::ZERO, Duration::MAX] {
                    for (compute, load) in [(absurd, other), (other, absurd)] {
                        assert!(divide(compute, load, ahead).0 <= 1600);
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn neither_side_waits_for_more_than_a_block(
            num_tokens in 0usize..100_000,
            compute in 1.0f64..1e6,
            load in 1.0f64..1e6,
            ahead_ms in 0u64..10_000,
        ) {
            let ahead = Duration::from_millis(ahead_ms);
            let pace = OverlapPace { compute_tokens_per_second: compute, load_tokens_per_second: load };
            let overlap = pace.divide(num_tokens, ahead, 32);
            prop_assert!(overlap.num_computed_tokens <= num_tokens);
            if overlap.num_computed_tokens > 0 {
                let computed = ahead.as_secs_f64() + overlap.num_computed_tokens as f64 / compute;
                let gap = overlap.meet.as_secs_f64() - computed;
                prop_assert!(gap > -1e-6 && gap <= 32.0 / compute + 32.0 / load + 1e-6, "{gap}");
            }
        }
    }
}
