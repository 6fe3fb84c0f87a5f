//! A node whose connection lives but whose engine stands still.

use std::time::{Duration, Instant};

use common::wire::NodeLoad;

/// How long an engine with a running batch may make no step: far above the longest step.
pub const STUCK_AFTER: Duration = Duration::from_secs(30);

/// Follows a node's step counter.
#[derive(Debug, Default)]
pub struct StepWatch {
    last: Option<(u64, Instant)>,
}

impl StepWatch {
    /// Takes what the node said; true if it has work and has made no step for [`STUCK_AFTER`].
    pub fn is_stuck(&mut self, load: &NodeLoad, now: Instant) -> bool {
        match self.last {
            Some((num_steps, since)) if num_steps == load.num_steps && load.num_running > 0 => {
                now.saturating_duration_since(since) >= STUCK_AFTER
            }
            _ => {
                self.last = Some((load.num_steps, now));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_stands_still_with_work_is_stuck_and_an_idle_one_is_not() {
        let (mut watch, start) = (StepWatch::default(), Instant::now());
        let load = |num_steps, num_running| NodeLoad { num_steps, num_running, ..NodeLoad::default() };
        assert!(!watch.is_stuck(&load(5, 1), start));
        assert!(!watch.is_stuck(&load(5, 1), start + STUCK_AFTER / 2));
        assert!(watch.is_stuck(&load(5, 1), start + STUCK_AFTER));
        assert!(!watch.is_stuck(&load(6, 1), start + STUCK_AFTER));
        assert!(!watch.is_stuck(&load(6, 0), start + STUCK_AFTER * 3));
        assert!(!watch.is_stuck(&load(6, 1), start + STUCK_AFTER * 3), "the clock starts with the work");
    }
}
