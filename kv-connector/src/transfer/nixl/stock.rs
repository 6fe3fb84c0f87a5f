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
    /// Whether the last one that was asked for was not there, which the log has said.
    is_short: bool,
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
        Self { free: Vec::new(), lost: Vec::new(), num_made: 0, is_short: false }
    }
}

impl<P> Stock<P> {
    /// Sees which of them `end` says to have ended well after all.
    fn sort(lost: Vec<Lost<P>>, mut end: impl FnMut(Request) -> Ended) -> (Vec<Staging>, Vec<Lost<P>>) {
        let (mut free, mut still_lost) = (Vec::new(), Vec::new());
        for mut lost in lost {
            match lost.request.take().map(&mut end) {
                Some(Ended::Well) => free.push(lost.staging),
                Some(Ended::NotYet(request)) => still_lost.push(Lost { request: Some(request), ..lost }),
                Some(Ended::Badly) | None => still_lost.push(lost),
            }
        }
        (free, still_lost)
    }

    /// There is none for now.
    fn run_short(&mut self, reason: String) -> PullError {
        if !std::mem::replace(&mut self.is_short, true) {
            tracing::warn!(%reason, "KV comes over quic instead of nixl until a buffer is free again");
        }
        PullError::Busy(reason)
    }

    /// Whether no staging will ever be free again.
    fn is_gone(&self) -> bool {
        self.lost.iter().filter(|lost| lost.request.is_none()).count() == NUM_STAGINGS_MAX
    }
}

impl Inner {
    /// A staging for one fetch: a free one; without one, all are free again whose reads have ended well after all;
    /// without one still, another is made.
    ///
    /// # Errors
    /// [`PullError::Busy`]: none is left for now, or no other can be made, which is no peer's fault;
    /// [`PullError::Failed`]: none will be free again, or the agent is not there any more.
    pub(super) fn take_staging(&self) -> Result<Staging, PullError> {
        self.enter().map_err(PullError::Failed)?;
        let lost = {
            let mut stock = self.stock();
            if let Some(staging) = stock.free.pop() {
                return Ok(staging);
            }
            std::mem::take(&mut stock.lost)
        };
        // Asking the library, and forgetting a peer, take their time, for which others may take and give back.
        let (free, still_lost) = Stock::sort(lost, |request| self.agent.end(request));
        {
            let mut stock = self.stock();
            stock.free.extend(free);
            stock.lost.extend(still_lost);
            if let Some(staging) = stock.free.pop() {
                return Ok(staging);
            }
            if stock.is_gone() {
                return Err(PullError::Failed("all buffers are lost to reads that ended badly".to_string()));
            }
            if stock.num_made == NUM_STAGINGS_MAX {
                return Err(stock.run_short("all buffers are in use, or lost to reads that have not ended".to_string()));
            }
            stock.num_made += 1;
        }
        // So does registering it.
        let made = self.new_staging();
        let mut stock = self.stock();
        match made {
            Ok(staging) => {
                stock.is_short = false;
                Ok(staging)
            }
            Err(reason) => {
                stock.num_made -= 1;
                Err(stock.run_short(format!("no other buffer can be made: {reason}")))
            }
        }
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
        let mut stock = self.stock();
        stock.free.push(staging);
        stock.is_short = false;
    }

    /// `request` may still read into `staging`.
    pub(super) fn on_lost(&self, staging: Staging, request: Option<Request>, peer: Arc<Peer>) {
        self.stock().lost.push(Lost { staging, request, _peer: peer });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(count: usize, request: impl Fn() -> Option<Request>) -> Vec<Lost<()>> {
        (0..count).map(|_| Lost { staging: Staging::on_host(), request: request(), _peer: () }).collect()
    }

    #[test]
    fn what_a_read_keeps_comes_back_when_the_read_has_ended_well_and_never_else() {
        let (free, still_lost) = Stock::sort(lost(3, || Some(Request::nobody_s())), Ended::NotYet);
        assert_eq!((free.len(), still_lost.len()), (0, 3));
        let mut ends = vec![Ended::Well, Ended::Badly].into_iter();
        let (free, still_lost) = Stock::sort(still_lost, |request| ends.next().unwrap_or(Ended::NotYet(request)));
        assert_eq!((free.len(), still_lost.len()), (1, 2));
        // Of those two one has ended badly, and is not asked for again.
        let mut num_asked = 0;
        let (free, still_lost) = Stock::sort(still_lost, |_| {
            num_asked += 1;
            Ended::Well
        });
        assert_eq!((free.len(), still_lost.len(), num_asked), (1, 1, 1));
    }

    #[test]
    fn stagings_are_gone_when_no_read_that_holds_one_can_end_any_more() {
        let mut stock =
            Stock { num_made: NUM_STAGINGS_MAX, lost: lost(NUM_STAGINGS_MAX - 1, || None), ..Stock::default() };
        assert!(!stock.is_gone());
        stock.lost.extend(lost(1, || Some(Request::nobody_s())));
        assert!(!stock.is_gone());
        stock.lost.extend(lost(1, || None));
        assert!(stock.is_gone());
    }
}
