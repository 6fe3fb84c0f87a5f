//! A log line that strangers can cause, told once in a while: whoever may send packets must not be able to
//! fill a disk.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Time between two tellings.
const INTERVAL: Duration = Duration::from_secs(1);

/// Counts what is not told. The counters of [`accounting`](crate::accounting) have all of it.
#[derive(Debug, Default)]
pub(crate) struct Quiet {
    /// When it was told last, and how often it was not since.
    state: Mutex<(Option<Instant>, u64)>,
}

impl Quiet {
    /// `Some(n)`: tell it, and that it happened `n` times untold.
    pub(crate) fn is_due(&self, now: Instant) -> Option<u64> {
        // A panic elsewhere leaves both numbers whole.
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (told_last, num_untold) = *state;
        let is_due = told_last.is_none_or(|told_last| now.saturating_duration_since(told_last) >= INTERVAL);
        *state = if is_due { (Some(now), 0) } else { (told_last, num_untold + 1) };
        is_due.then_some(num_untold)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_told_once_with_its_size() {
        let (quiet, start) = (Quiet::default(), Instant::now());
        assert_eq!(quiet.is_due(start), Some(0));
        for _ in 0..1000 {
            assert_eq!(quiet.is_due(start + INTERVAL / 2), None);
        }
        assert_eq!(quiet.is_due(start + INTERVAL), Some(1000));
        assert_eq!(quiet.is_due(start + INTERVAL * 3), Some(0));
    }
}
