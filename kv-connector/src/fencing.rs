//! A newer attempt of a request fences the older ones.
//!
//! A node learns of attempts only by what it is asked, in any order: the connection that carried the
//! older attempt may be half dead while the newer one arrives over another. Attempts are compared per
//! choice, because a resumed request continues each of its choices in an attempt of its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::ids::{Attempt, ChoiceIndex, RequestId};
use tokio_util::sync::CancellationToken;

/// The attempts a node is working on. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Fences {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    attempts: HashMap<RequestId, Vec<Entry>>,
    next_entry: u64,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    attempt: Attempt,
    choices: Vec<ChoiceIndex>,
    superseded: CancellationToken,
}

/// An attempt's place; given up when dropped.
#[derive(Debug)]
pub struct Fence {
    fences: Fences,
    request: RequestId,
    id: u64,
    superseded: CancellationToken,
}

impl Fences {
    /// Takes a place for an attempt and supersedes older attempts at the same choices. `None` if this
    /// attempt is itself not newer than one that is being worked on.
    pub fn begin(&self, request: RequestId, attempt: Attempt, choices: &[ChoiceIndex]) -> Option<Fence> {
        let mut inner = self.lock();
        let id = inner.next_entry;
        inner.next_entry += 1;
        let entries = inner.attempts.entry(request).or_default();
        let overlaps = |entry: &&Entry| entry.choices.iter().any(|choice| choices.contains(choice));
        let is_outdated = entries.iter().filter(overlaps).any(|entry| entry.attempt >= attempt);
        if is_outdated {
            return None;
        }
        entries.iter().filter(overlaps).for_each(|entry| entry.superseded.cancel());
        let superseded = CancellationToken::new();
        entries.push(Entry { id, attempt, choices: choices.to_vec(), superseded: superseded.clone() });
        Some(Fence { fences: self.clone(), request, id, superseded })
    }

    /// Requests being worked on.
    pub fn num_requests(&self) -> usize {
        self.lock().attempts.len()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // The map is valid after every statement, so a panic elsewhere does not spoil it.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fence {
    /// Resolves when a newer attempt has taken over.
    pub async fn superseded(&self) {
        self.superseded.cancelled().await;
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        let mut inner = self.fences.lock();
        if let Some(entries) = inner.attempts.get_mut(&self.request) {
            entries.retain(|entry| entry.id != self.id);
            if entries.is_empty() {
                inner.attempts.remove(&self.request);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: RequestId = RequestId(1);
    const BOTH: &[ChoiceIndex] = &[ChoiceIndex(0), ChoiceIndex(1)];

    #[tokio::test]
    async fn newer_attempt_supersedes_the_older_at_the_same_choice() {
        let fences = Fences::default();
        let old = fences.begin(REQUEST, Attempt(1), BOTH).unwrap();
        let new = fences.begin(REQUEST, Attempt(2), &[ChoiceIndex(1)]).unwrap();
        old.superseded().await;
        assert!(!new.superseded.is_cancelled());
        drop((old, new));
        assert_eq!(fences.num_requests(), 0);
    }

    #[test]
    fn late_older_attempt_is_refused() {
        let fences = Fences::default();
        let new = fences.begin(REQUEST, Attempt(2), &[ChoiceIndex(0)]).unwrap();
        assert!(fences.begin(REQUEST, Attempt(1), BOTH).is_none());
        assert!(fences.begin(REQUEST, Attempt(2), BOTH).is_none());
        assert!(!new.superseded.is_cancelled());
    }

    #[test]
    fn choices_of_one_attempt_do_not_fence_each_other() {
        let fences = Fences::default();
        let first = fences.begin(REQUEST, Attempt(2), &[ChoiceIndex(0)]).unwrap();
        let second = fences.begin(REQUEST, Attempt(2), &[ChoiceIndex(1)]).unwrap();
        assert!(!first.superseded.is_cancelled() && !second.superseded.is_cancelled());
    }
}
