//! Prompts that ended several nodes, kept away from the rest of the fleet for a while.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use common::tokens::Token;

/// Prompts remembered at most; one more displaces the one that would be forgotten first.
pub const QUARANTINED_MAX: usize = 1024;
/// How long a prompt is refused.
pub const QUARANTINE_TIME: Duration = Duration::from_secs(600);

/// What a prompt is recognised by: a keyed hash, drawn anew by every process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(u64);

/// The prompts that are refused.
#[derive(Debug, Default)]
pub struct Quarantine {
    key: RandomState,
    until: HashMap<Fingerprint, Instant>,
}

impl Quarantine {
    /// A prompt's fingerprint.
    pub fn fingerprint(&self, prompt: &[Token]) -> Fingerprint {
        Fingerprint(self.key.hash_one(prompt))
    }

    /// Refuses this prompt from now on.
    pub fn insert(&mut self, fingerprint: Fingerprint, now: Instant) {
        if self.until.len() >= QUARANTINED_MAX {
            self.until.retain(|_, until| *until > now);
        }
        if self.until.len() >= QUARANTINED_MAX
            && let Some(first) = self.until.iter().min_by_key(|(_, until)| **until).map(|(key, _)| *key)
        {
            self.until.remove(&first);
        }
        self.until.insert(fingerprint, now + QUARANTINE_TIME);
    }

    /// How much longer the prompt is refused, if it is.
    pub fn remaining(&self, fingerprint: Fingerprint, now: Instant) -> Option<Duration> {
        let until = self.until.get(&fingerprint)?;
        until.checked_duration_since(now).filter(|left| !left.is_zero())
    }

    /// Prompts remembered.
    pub fn len(&self) -> usize {
        self.until.len()
    }

    /// Whether no prompt is remembered.
    pub fn is_empty(&self) -> bool {
        self.until.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_is_refused_for_a_time() {
        let (mut quarantine, now) = (Quarantine::default(), Instant::now());
        let fingerprint = quarantine.fingerprint(&[1, 2, 3]);
        assert_eq!(quarantine.remaining(fingerprint, now), None);
        quarantine.insert(fingerprint, now);
        assert_eq!(quarantine.remaining(fingerprint, now), Some(QUARANTINE_TIME));
        assert_eq!(quarantine.remaining(quarantine.fingerprint(&[1, 2]), now), None);
        assert_eq!(quarantine.remaining(fingerprint, now + QUARANTINE_TIME), None);
    }

    #[test]
    fn table_is_bounded_and_forgets_the_oldest() {
        let (mut quarantine, now) = (Quarantine::default(), Instant::now());
        for i in 0..QUARANTINED_MAX as u32 + 10 {
            quarantine.insert(quarantine.fingerprint(&[i]), now + Duration::from_millis(u64::from(i)));
        }
        assert_eq!(quarantine.len(), QUARANTINED_MAX);
        assert_eq!(quarantine.remaining(quarantine.fingerprint(&[0]), now), None);
        assert!(quarantine.remaining(quarantine.fingerprint(&[1030]), now).is_some());
    }
}
