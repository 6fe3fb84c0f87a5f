//! How fast something goes, from what it took lately.

use std::time::Duration;

/// Weight of the newest observation.
const WEIGHT: f64 = 0.25;

/// An exponentially weighted amount per second. Whoever observes owns it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rate {
    per_second: Option<f64>,
}

impl Rate {
    /// Takes in that `amount` took this long. What took no time says nothing.
    pub fn observe(&mut self, amount: f64, took: Duration) {
        if took.is_zero() {
            return;
        }
        let newest = amount / took.as_secs_f64();
        self.per_second = Some(match self.per_second {
            None => newest,
            Some(before) => before + (newest - before) * WEIGHT,
        });
    }

    /// The present figure; `None` before the first observation.
    pub fn per_second(&self) -> Option<f64> {
        self.per_second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_begins_with_the_first_observation_and_follows_the_newer_ones() {
        let mut rate = Rate::default();
        assert_eq!(rate.per_second(), None);
        rate.observe(100.0, Duration::ZERO);
        assert_eq!(rate.per_second(), None);
        rate.observe(100.0, Duration::from_secs(2));
        assert_eq!(rate.per_second(), Some(50.0));
        rate.observe(90.0, Duration::from_secs(1));
        assert_eq!(rate.per_second(), Some(60.0));
        (0..50).for_each(|_| rate.observe(10.0, Duration::from_secs(1)));
        assert!((rate.per_second().unwrap() - 10.0).abs() < 0.1);
    }
}
