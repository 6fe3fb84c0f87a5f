//! The smallest of the latest round trips.

use std::time::{Duration, Instant};

/// Smallest of the latest round trips. A window of two halves: the older is forgotten when the younger is full.
#[derive(Debug, Clone, Default)]
pub(super) struct MinRtt {
    /// Of this half and the one before.
    least: [Option<Duration>; 2],
    began: Option<Instant>,
}

impl MinRtt {
    /// Takes one more, and begins with it if this half has lasted for `half`.
    pub(super) fn update(&mut self, now: Instant, rtt: Duration, half: Duration) {
        if self.began.is_none_or(|began| now.saturating_duration_since(began) >= half) {
            // What was before a pause stays for one half more: what comes first behind it may have waited for its
            // acknowledgement.
            self.least = [None, self.least[0]];
            self.began = Some(now);
        }
        self.least[0] = Some(self.least[0].map_or(rtt, |least| least.min(rtt)));
    }

    /// Zero before the first.
    pub(super) fn get(&self) -> Duration {
        self.least.iter().flatten().min().copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smallest_round_trip_is_kept_for_one_half_and_forgotten_after_two() {
        let began = Instant::now();
        let mut min = MinRtt::default();
        let mut update = |millis, rtt| {
            let now = began + Duration::from_millis(millis);
            min.update(now, Duration::from_millis(rtt), Duration::from_secs(5));
            min.get().as_millis()
        };
        assert_eq!([update(0, 9), update(1, 7), update(4_900, 8), update(5_100, 9)], [9, 7, 7, 7]);
        assert_eq!([update(10_000, 20), update(10_200, 20)], [7, 9]);
        // A pause does not count.
        assert_eq!([update(900_000, 40), update(905_000, 30)], [20, 30]);
    }
}
