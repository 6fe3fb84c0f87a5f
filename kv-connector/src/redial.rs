//! When to try again where nobody could be reached: soon, then less and less often, and not all at once.
//!
//! ```text
//! tries   x..x....x........x................x        pause 50 ms, 100 ms, ... to the longest, each times 0.75 to 1.25
//! reached                                    ^       the next pause is the first one again
//! ```
//!
//! The spread keeps nodes apart that lost the same peer in the same moment.

use std::time::{Duration, Instant};

/// First pause between two tries.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Pause after a refusal: somebody must change something.
const PAUSE_REFUSED: Duration = Duration::from_secs(5);
/// Each pause is its length times 1 less or more this.
const SPREAD: f64 = 0.25;

/// The tries to reach one peer.
#[derive(Debug, Clone)]
pub(crate) struct Redial {
    pause_max: Duration,
    next_pause: Duration,
    not_before: Option<Instant>,
}

impl Redial {
    /// Never tried. Pauses between tries that are worth repeating grow up to `pause_max`.
    pub(crate) fn new(pause_max: Duration) -> Self {
        Self { pause_max, next_pause: PAUSE_MIN, not_before: None }
    }

    /// Whether it may be tried now.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|not_before| now >= not_before)
    }

    /// Whether the last try failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.not_before.is_some()
    }

    /// It was reached, from here or by somebody who says so.
    pub(crate) fn on_reached(&mut self) {
        *self = Self::new(self.pause_max);
    }

    /// It was not. `draw` is a random number from 0 to 1. Answers how long to wait.
    pub(crate) fn on_failed(&mut self, now: Instant, is_worth_a_retry: bool, draw: f64) -> Duration {
        let pause = if is_worth_a_retry { self.next_pause } else { PAUSE_REFUSED };
        let pause = pause.mul_f64(1.0 - SPREAD + 2.0 * SPREAD * draw.clamp(0.0, 1.0));
        self.next_pause = (self.next_pause * 2).min(self.pause_max);
        self.not_before = Some(now + pause);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIDDLE: f64 = 0.5;

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew_once_it_was_reached() {
        let (mut redial, now) = (Redial::new(Duration::from_millis(350)), Instant::now());
        assert!(redial.is_due(now));
        let pauses: Vec<u128> = (0..5).map(|_| redial.on_failed(now, true, MIDDLE).as_millis()).collect();
        assert_eq!(pauses, [50, 100, 200, 350, 350]);
        assert!(redial.has_failed());
        redial.on_reached();
        assert!(redial.is_due(now) && !redial.has_failed());
        assert_eq!(redial.on_failed(now, true, MIDDLE), PAUSE_MIN);
    }

    #[test]
    fn nothing_is_tried_before_the_pause_is_over() {
        let (mut redial, now) = (Redial::new(Duration::from_secs(1)), Instant::now());
        let pause = redial.on_failed(now, true, MIDDLE);
        assert!(!redial.is_due(now) && !redial.is_due(now + pause - Duration::from_nanos(1)));
        assert!(redial.is_due(now + pause));
    }

    #[test]
    fn refusal_waits_for_somebody_to_change_something() {
        let (mut redial, now) = (Redial::new(Duration::from_secs(1)), Instant::now());
        assert_eq!(redial.on_failed(now, false, MIDDLE), PAUSE_REFUSED);
    }

    #[test]
    fn nodes_that_fail_together_come_back_apart() {
        let now = Instant::now();
        let pause = |draw| Redial::new(Duration::from_secs(1)).on_failed(now, true, draw);
        assert_eq!((pause(0.0), pause(1.0)), (PAUSE_MIN.mul_f64(0.75), PAUSE_MIN.mul_f64(1.25)));
        assert!(pause(0.3) < pause(0.7));
    }
}
