//! A prompt's beginning that arrives from elsewhere, from its end towards its front, while it is computed here from
//! its front towards its end. Where the two meet is decided by how fast they really are.
//!
//! ```text
//! granules   first     claimed      goal                      end
//!            |---------|------------|-------------|oooooo.oooo|
//!             computed, may be       may still     arrived (o)
//!             or in a   computed     arrive        or missing (.)
//!             step      next
//! ```
//!
//! - The scheduler claims what it is about to compute, whoever loads places what has come and was verified. Neither
//!   touches what the other has: a granule is placed only above all claims, and claims end where something has
//!   arrived.
//! - What has arrived is passed over once everything before it is computed ([`pass_arrived`]), never before: so
//!   nothing is attended to, named or sent that is not there. What is missing behind it is computed.
//! - Nothing is claimed beyond the goal, so that a step does not compute what is about to come. It only rises, and
//!   rises to the end when nothing more comes ([`finish`]) or the two have met.
//! - A granule is placed under the lock that claims and [`close`] take: once it is closed, nothing is written, and
//!   the blocks may be somebody else's.
//!
//! It does not know how fast anything is: where the goal lies is said from outside
//! ([`overlap`](crate::handover::overlap)).
//!
//! [`pass_arrived`]: ArrivingPrefix::pass_arrived
//! [`finish`]: ArrivingPrefix::finish
//! [`close`]: ArrivingPrefix::close

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::content::GRANULE_TOKENS;

/// See the module. Shared by the scheduler and whoever loads.
#[derive(Debug)]
pub struct ArrivingPrefix {
    first: usize,
    end: usize,
    fronts: Mutex<Fronts>,
}

/// All in granules of the sequence.
#[derive(Debug)]
struct Fronts {
    claimed: usize,
    goal: usize,
    /// Of the claims, those of steps and not of what was passed over.
    num_computed: usize,
    /// `[end - first]`
    has_arrived: Vec<bool>,
    is_open: bool,
}

impl ArrivingPrefix {
    /// Tokens `first_token..end_token` of a sequence, multiples of the granule, none of which has arrived. Nothing
    /// is computed before the goal is raised.
    pub fn new(first_token: usize, end_token: usize) -> Self {
        let (first, end) = (first_token / GRANULE_TOKENS, end_token / GRANULE_TOKENS);
        let has_arrived = vec![false; end.saturating_sub(first)];
        let fronts = Fronts { claimed: first, goal: first, num_computed: 0, has_arrived, is_open: true };
        Self { first, end: end.max(first), fronts: Mutex::new(fronts) }
    }

    /// Granules that may arrive, the last one first: the order in which they are to be placed.
    pub fn granules(&self) -> impl Iterator<Item = usize> + use<> {
        (self.first..self.end).rev()
    }

    /// Runs `write`, which puts a verified granule where it belongs, unless the granule is being computed or the
    /// blocks are no longer this sequence's. False: it was not run, and nothing before this granule is wanted any
    /// more either.
    pub fn place(&self, granule: usize, write: impl FnOnce()) -> bool {
        let mut fronts = self.fronts();
        let is_wanted = self.wants(&fronts, granule);
        if is_wanted {
            write();
            fronts.has_arrived[granule - self.first] = true;
        }
        is_wanted
    }

    /// Whether a granule can still be placed.
    pub fn is_wanted(&self, granule: usize) -> bool {
        self.wants(&self.fronts(), granule)
    }

    /// From now on everything before `token` may be computed. A goal that is lower than before changes nothing.
    pub fn raise_goal(&self, token: usize) {
        let mut fronts = self.fronts();
        fronts.goal = fronts.goal.max((token / GRANULE_TOKENS).min(self.end));
    }

    /// Nothing more will arrive: what has not is computed.
    pub fn finish(&self) {
        self.fronts().goal = self.end;
    }

    /// Tokens before this one are computed or being computed, or have arrived and were passed over.
    pub fn num_claimed_tokens(&self) -> usize {
        self.fronts().claimed * GRANULE_TOKENS
    }

    /// Tokens that were claimed for a step until now.
    pub fn num_computed_tokens(&self) -> usize {
        self.fronts().num_computed * GRANULE_TOKENS
    }

    /// Tokens that have arrived until now.
    pub fn num_arrived_tokens(&self) -> usize {
        self.fronts().has_arrived.iter().filter(|has_arrived| **has_arrived).count() * GRANULE_TOKENS
    }

    /// Nothing is placed from now on.
    pub fn close(&self) {
        self.fronts().is_open = false;
    }

    /// One behind the last token.
    pub(super) fn end_token(&self) -> usize {
        self.end * GRANULE_TOKENS
    }

    /// Claims for a step what may be computed before `end_token`. Returns where the claims end.
    pub(super) fn claim(&self, end_token: usize) -> usize {
        let mut fronts = self.fronts();
        let from = fronts.claimed;
        let arrived = (from..self.end).find(|granule| fronts.has_arrived[granule - self.first]);
        let end = (end_token / GRANULE_TOKENS).min(fronts.goal).min(arrived.unwrap_or(self.end));
        fronts.claimed = from.max(end);
        fronts.num_computed += fronts.claimed - from;
        fronts.claimed * GRANULE_TOKENS
    }

    /// All claims are computed: passes over what has arrived right behind them. Returns where the tokens end whose
    /// KV is there.
    pub(super) fn pass_arrived(&self) -> usize {
        let mut fronts = self.fronts();
        let from = fronts.claimed;
        let missing = (from..self.end).find(|granule| !fronts.has_arrived[granule - self.first]);
        fronts.claimed = missing.unwrap_or(self.end);
        if fronts.claimed > from {
            // The two have met. What is left was missing when its turn came.
            fronts.goal = self.end;
        }
        fronts.claimed * GRANULE_TOKENS
    }

    /// Tokens that are expected not to be computed here.
    pub fn num_expected_tokens(&self) -> usize {
        let fronts = self.fronts();
        (self.end - fronts.goal.max(fronts.claimed)) * GRANULE_TOKENS
    }

    fn wants(&self, fronts: &Fronts, granule: usize) -> bool {
        fronts.is_open && granule >= fronts.claimed && granule < self.end
    }

    fn fronts(&self) -> MutexGuard<'_, Fronts> {
        // A panic elsewhere spoils nothing: the fronts are valid after every statement.
        self.fronts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(prefix: &ArrivingPrefix, granule: usize) -> bool {
        let mut is_written = false;
        let is_placed = prefix.place(granule, || is_written = true);
        assert_eq!(is_placed, is_written);
        is_placed
    }

    #[test]
    fn fronts_meet_wherever_they_are() {
        let prefix = ArrivingPrefix::new(32, 160);
        assert_eq!(prefix.granules().collect::<Vec<_>>(), [9, 8, 7, 6, 5, 4, 3, 2]);
        assert_eq!(prefix.claim(1000), 32, "nothing is computed before there is a goal");
        prefix.raise_goal(80);
        prefix.raise_goal(48);
        assert_eq!(prefix.num_expected_tokens(), 80);
        assert!(placed(&prefix, 9) && placed(&prefix, 8));
        assert_eq!(prefix.claim(64), 64);
        assert_eq!(prefix.claim(1000), 80, "no further than the goal");
        assert_eq!(prefix.pass_arrived(), 80, "nothing has arrived right behind it");
        assert!(placed(&prefix, 7) && placed(&prefix, 6) && placed(&prefix, 5));
        assert!(!placed(&prefix, 4), "it is being computed");
        assert_eq!(prefix.pass_arrived(), 160);
        assert_eq!((prefix.num_claimed_tokens(), prefix.num_expected_tokens()), (160, 0));
    }

    #[test]
    fn loading_takes_what_computing_has_not_begun() {
        let prefix = ArrivingPrefix::new(0, 64);
        prefix.raise_goal(48);
        for granule in prefix.granules() {
            assert!(placed(&prefix, granule));
        }
        assert_eq!(prefix.claim(64), 0);
        assert_eq!(prefix.pass_arrived(), 64);
    }

    #[test]
    fn what_is_missing_is_computed_between_what_has_arrived() {
        let prefix = ArrivingPrefix::new(0, 96);
        assert!(placed(&prefix, 5) && placed(&prefix, 3) && placed(&prefix, 2));
        prefix.raise_goal(16);
        assert_eq!(prefix.claim(96), 16);
        assert_eq!(prefix.claim(96), 16, "the goal");
        prefix.finish();
        assert_eq!(prefix.claim(96), 32);
        assert_eq!(prefix.pass_arrived(), 64);
        assert!(!prefix.is_wanted(1) && prefix.is_wanted(4));
        assert_eq!(prefix.claim(96), 80);
        assert!(!placed(&prefix, 4), "it has come too late");
        assert_eq!(prefix.pass_arrived(), 96);
    }

    #[test]
    fn nothing_is_placed_once_closed_or_outside() {
        let prefix = ArrivingPrefix::new(32, 64);
        assert!(!placed(&prefix, 1) && !placed(&prefix, 4));
        prefix.close();
        assert!(!placed(&prefix, 3));
        let nothing = ArrivingPrefix::new(64, 32);
        assert_eq!((nothing.granules().count(), nothing.claim(1000), nothing.pass_arrived()), (0, 64, 64));
    }
}
