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

use super::library::{Agent, Request};
use super::staging::Staging;
use super::{Inner, Peer};
use crate::transfer::pull::NUM_PULLS_MAX;

/// Stagings there can be in a process's life: with all of them lost, nothing is fetched any more.
pub(super) const NUM_STAGINGS_MAX: usize = NUM_PULLS_MAX + 16;

#[derive(Default)]
pub(super) struct Stock {
    free: Vec<Staging>,
    lost: Vec<Lost>,
    num_made: usize,
}

/// What may still be read into stays, and with it whom it is read from and, through that, the agent that reads.
struct Lost {
    staging: Staging,
    /// Until it has ended badly.
    request: Option<Request>,
    _peer: Arc<Peer>,
}

impl Stock {
    fn take(&mut self, agent: &Agent) -> Option<Staging> {
        if self.free.is_empty() {
            self.take_back(agent);
        }
        self.free.pop()
    }

    /// Those whose reads have ended well after all.
    fn take_back(&mut self, agent: &Agent) {
        for mut lost in std::mem::take(&mut self.lost) {
            match lost.request.take().map(|request| (agent.has_ended(&request), request)) {
                Some((Ok(true), request)) => {
                    agent.release(request);
                    self.free.push(lost.staging);
                }
                Some((Ok(false), request)) => self.lost.push(Lost { request: Some(request), ..lost }),
                Some((Err(_), _)) | None => self.lost.push(lost),
            }
        }
    }
}

impl Inner {
    /// A staging for one fetch.
    ///
    /// # Errors
    /// None is left, or no other can be made.
    pub(super) fn take_staging(&self) -> Result<Staging, String> {
        let mut stock = self.stock();
        if let Some(staging) = stock.take(&self.agent) {
            return Ok(staging);
        }
        if stock.num_made == NUM_STAGINGS_MAX {
            return Err(format!("{NUM_STAGINGS_MAX} buffers are in use or lost to reads that did not end well"));
        }
        let staging = self.new_staging()?;
        stock.num_made += 1;
        Ok(staging)
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
        match unsafe { self.agent.register(staging.place()) } {
            Ok(()) => Ok(staging),
            Err(reason) => Err(reason),
        }
    }

    pub(super) fn give_back(&self, staging: Staging) {
        self.stock().free.push(staging);
    }

    /// `request` may still read into `staging`.
    pub(super) fn on_lost(&self, staging: Staging, request: Option<Request>, peer: Arc<Peer>) {
        self.stock().lost.push(Lost { staging, request, _peer: peer });
    }
}
