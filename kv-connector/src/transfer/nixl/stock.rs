//! The stagings of a node: those that are free, and those that a read may still write to.
//!
//! ```text
//! free ──take──> a fetch ──its read ended──> free
//!                   └──it did not, or badly──> lost ──it has ended well since──> free
//! ```
//!
//! A peer that stands still, and goes on later, gives back what it was lent. What ended badly is lost for good: an error of
//! one piece of a read says nothing of the others. A new staging is made for one that is lost, up to a bound.

use std::sync::Arc;

use super::library::{Ended, Request};
use super::staging::Staging;
use super::{Inner, Peer};
use crate::transfer::pull::{NUM_PULLS_MAX, PullError};

/// Stagings there can be in a process's life: with all of them lost, nothing is fetched.
pub(super) const NUM_STAGINGS_MAX: usize = NUM_PULLS_MAX + 16;

/// Whom they are read from is a [`Peer`], but in its own tests.
pub(super) struct Stock<P = Arc<Peer>> {
    free: Vec<Staging>,
    lost: Vec<Lost<P>>,
    num_made: usize,
}

/// What may still be read into stays, and with it whom it is read from and, through that, the agent that reads.
struct Lost<P> {
    staging: Staging,
    /// Until it has ended badly.
    request: Option<Request>,
    _peer: P,
}

impl<P> Default for Stock<P> {
    fn default() -> Self {
        Self { free: Vec::new(), lost: Vec::new(), num_made: 0 }
    }
}

impl<P> Stock<P> {
    /// A free one; without one, all are free again whose reads `end` says to have ended well after all.
    fn take(&mut self, mut end: impl FnMut(Request) -> Ended) -> Option<Staging> {
        if self.free.is_empty() {
            for mut lost in std::mem::take(&mut self.lost) {
                match lost.request.take().map(&mut end) {
                    Some(Ended::Well) => self.free.push(lost.staging),
                    Some(Ended::NotYet(request)) => self.lost.push(Lost { request: Some(request), ..lost }),
                    Some(Ended::Badly) | None => self.lost.push(lost),
                }
            }
        }
        self.free.pop()
    }
}

impl Inner {
    /// A staging for one fetch.
    ///
    /// # Errors
    /// [`PullError::Busy`]: none is left, or no other can be made, which is no peer's fault; [`PullError::Failed`].
    pub(super) fn take_staging(&self) -> Result<Staging, PullError> {
        self.enter().map_err(PullError::Failed)?;
        {
            let mut stock = self.stock();
            if let Some(staging) = stock.take(|request| self.agent.end(request)) {
                return Ok(staging);
            }
            if stock.num_made == NUM_STAGINGS_MAX {
                return Err(PullError::Busy(
                    "all buffers are in use or lost to reads that did not end well".to_string(),
                ));
            }
            stock.num_made += 1;
        }
        // Registering it takes its time, for which others may take and give back.
        self.new_staging().map_err(|reason| {
            self.stock().num_made -= 1;
            PullError::Busy(format!("no other buffer can be made: {reason}"))
        })
    }

    /// As many as there can be fetches.
    pub(super) fn fill_stock(&self) -> Result<(), String> {
        let mut stock = self.stock();
        for _ in 0..NUM_PULLS_MAX {
            let staging = self.new_staging()?;
            stock.free.push(staging);
            stock.num_made += 1;
        }
        Ok(())
    }

    #[allow(unsafe_code)] // what is registered stays as long as the agent
    fn new_staging(&self) -> Result<Staging, String> {
        let staging = Staging::new(&self.pool)?;
        // SAFETY: it is free, used for a fetch or lost, all of which is dropped behind the agent.
        unsafe { self.agent.register(staging.place()) }.map(|()| staging)
    }

    pub(super) fn give_back(&self, staging: Staging) {
        self.stock().free.push(staging);
    }

    /// `request` may still read into `staging`.
    pub(super) fn on_lost(&self, staging: Staging, request: Option<Request>, peer: Arc<Peer>) {
        self.stock().lost.push(Lost { staging, request, _peer: peer });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_read_keeps_comes_back_when_the_read_has_ended_well_and_never_else() {
        let mut stock = Stock::<()> { free: vec![Staging::on_host()], lost: Vec::new(), num_made: 3 };
        let unasked = |_| unreachable!("one is free");
        assert!(stock.take(unasked).is_some());
        let lost = |_| Lost { staging: Staging::on_host(), request: Some(Request::nobody_s()), _peer: () };
        stock.lost.extend((0..3).map(lost));
        assert!(stock.take(Ended::NotYet).is_none());
        let mut ends = vec![Ended::Well, Ended::Badly].into_iter();
        let mut num_asked = 0;
        let taken = stock.take(|request| {
            num_asked += 1;
            ends.next().unwrap_or(Ended::NotYet(request))
        });
        assert!(taken.is_some() && num_asked == 3 && stock.lost.len() == 2);
        // Of those two one has ended badly, and is not asked for again.
        let mut num_asked = 0;
        let taken = stock.take(|_| {
            num_asked += 1;
            Ended::Well
        });
        assert!(taken.is_some() && num_asked == 1 && stock.take(|_| Ended::Well).is_none() && stock.lost.len() == 1);
    }
}
