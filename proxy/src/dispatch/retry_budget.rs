//! How many resumes the proxy allows itself, all requests together.
//!
//! After a large loss every running request wants to resume at once, on the nodes that are left. The
//! budget paces that: a bucket that ten resumes a second and a share of the served requests flow into.
//! A resume that finds it empty waits for its turn; one that would wait too long is refused.

use std::time::{Duration, Instant};

/// Resumes per second that are always allowed, and how many of them may be saved up.
const ALWAYS_PER_SECOND: f64 = 10.0;
/// Most resumes that may be saved up from served requests.
const SAVED_MAX: f64 = 1000.0;
/// Longest time a resume waits for its turn.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// The bucket. Negative content is the line of those who wait.
#[derive(Debug)]
pub struct RetryBudget {
    share: f64,
    content: f64,
    updated: Instant,
}

impl RetryBudget {
    /// A full bucket to which every served request adds `share` of a resume.
    pub fn new(share: f64, now: Instant) -> Self {
        Self { share, content: ALWAYS_PER_SECOND, updated: now }
    }

    /// A request was taken on.
    pub fn on_request(&mut self) {
        self.content = (self.content + self.share).min(SAVED_MAX);
    }

    /// How long a resume must wait; `None` if the budget is spent for longer than anyone should wait.
    pub fn draw(&mut self, now: Instant) -> Option<Duration> {
        let flowed = now.saturating_duration_since(self.updated).as_secs_f64() * ALWAYS_PER_SECOND;
        self.updated = now;
        if self.content < ALWAYS_PER_SECOND {
            self.content = (self.content + flowed).min(ALWAYS_PER_SECOND);
        }
        let missing = (1.0 - self.content).max(0.0);
        let wait = Duration::from_secs_f64(missing / ALWAYS_PER_SECOND);
        if wait > WAIT_MAX {
            return None;
        }
        self.content -= 1.0;
        Some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_at_once_then_ten_a_second_then_none() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(0.0, now);
        for _ in 0..10 {
            assert_eq!(budget.draw(now), Some(Duration::ZERO));
        }
        assert_eq!(budget.draw(now), Some(Duration::from_millis(100)));
        assert_eq!(budget.draw(now), Some(Duration::from_millis(200)));
        let num_waiting = (0..1000).take_while(|_| budget.draw(now).is_some()).count();
        assert_eq!(num_waiting, 98);
        // Everyone in line has been served by then, and the bucket is full again.
        assert_eq!(budget.draw(now + Duration::from_secs(11)), Some(Duration::ZERO));
    }

    #[test]
    fn served_requests_add_their_share() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(0.5, now);
        (0..100).for_each(|_| budget.on_request());
        assert!((0..60).all(|_| budget.draw(now) == Some(Duration::ZERO)));
        assert_ne!(budget.draw(now), Some(Duration::ZERO));
    }
}
