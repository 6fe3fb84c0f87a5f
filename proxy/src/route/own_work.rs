//! What this proxy itself has at a node: known at once, where what the node tells of all its work is a moment old.
//!
//! A node's word counts this proxy's work, too, as it was then. So only what is beyond that is others' work, and what
//! this proxy has there by now is added: neither a burst that no node has told of yet nor a request that is over is
//! judged by an old word. What this proxy had at most since the last word but one is taken off, because nobody knows at
//! which moment the node spoke: a busy machine delays its words, and then two of them come at once. Others' work may
//! be taken for less than it is for as long.

use std::sync::atomic::{AtomicU64, Ordering};

/// At one node.
#[derive(Debug, Default)]
pub struct OwnWork {
    /// Requests that are open there.
    pub requests: OwnCount,
    /// Prompt tokens that were sent there to be computed and are not known to be.
    pub tokens: OwnCount,
}

/// One of its numbers.
#[derive(Debug, Default)]
pub struct OwnCount {
    now: AtomicU64,
    /// The most it was since the node's last word.
    most: AtomicU64,
    /// The same between the two words before.
    most_before: AtomicU64,
}

impl OwnCount {
    /// So much more from now on.
    pub fn add(&self, count: u64) {
        let now = self.now.fetch_add(count, Ordering::Relaxed) + count;
        self.most.fetch_max(now, Ordering::Relaxed);
    }

    /// So much less.
    pub fn subtract(&self, count: u64) {
        self.now.fetch_sub(count, Ordering::Relaxed);
    }

    /// At this moment.
    pub fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    /// What is others' of the `told` of a node that speaks now.
    pub fn others_of(&self, told: u64) -> u64 {
        let most = self.most.swap(self.now(), Ordering::Relaxed);
        // What was added between the two is not forgotten.
        self.most.fetch_max(self.now(), Ordering::Relaxed);
        let most_before = self.most_before.swap(most, Ordering::Relaxed);
        told.saturating_sub(most.max(most_before))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_is_over_is_not_taken_for_that_of_others() {
        let own = OwnCount::default();
        own.add(300);
        assert_eq!(own.others_of(300), 0);
        own.subtract(300);
        // Told before it ended, heard afterwards: two words at once.
        assert_eq!([own.others_of(300), own.others_of(300)], [0, 0]);
        assert_eq!(own.now(), 0);
        assert_eq!(own.others_of(300), 300, "it ended before the word before the last");
    }

    #[test]
    fn others_work_is_what_is_beyond_ones_own() {
        let own = OwnCount::default();
        assert_eq!(own.others_of(500), 500);
        own.add(200);
        assert_eq!(own.others_of(700), 500);
        own.add(100);
        assert_eq!(own.others_of(100), 0, "told before the node heard of it");
        assert_eq!(own.now(), 300);
    }
}
