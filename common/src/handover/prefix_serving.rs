//! A prefix that a peer fetches from this node's pool: the books of the end that holds it.
//!
//! ```text
//!             credit: SendExtent                    last extent ended
//!   Sending --------------------------+  ---------------------------------->  Over: End, complete
//!      ^                              |
//!      +------------------------------+
//!      |   an extent is lost, no credit or end of a transfer for too long, whole deadline
//!      +--------------------------------------------------------------------->  Over: End, not complete
//! ```
//!
//! What is sent is pinned before and allocates nothing, so serving a peer waits for nobody's memory: two nodes may
//! fetch from each other. The other end, which has its blocks before it asks, is
//! [`PrefillHandover`](super::PrefillHandover) with a [`FetchPlan`](super::FetchPlan) from a peer.

use std::time::Duration;

use super::fetch::FetchSender;
use crate::wire::ExtentId;

/// How long the peer is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ServingLimits {
    /// Without credit, and without the end of a transfer.
    pub stall_timeout: Duration,
    /// For all of it.
    pub total_timeout: Duration,
}

/// What the shell must do, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServingAction {
    /// Send this extent; then call [`PrefixServing::on_extent_ended`], once, whatever became of it.
    SendExtent {
        /// Which.
        extent: ExtentId,
        /// Its size.
        num_bytes: u64,
    },
    /// Give up what is on the way, unpin, and end the stream. Comes once, and last.
    End {
        /// Whether all has left.
        is_complete: bool,
    },
}

/// The machine. See the top of this file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PrefixServing {
    limits: ServingLimits,
    sender: FetchSender,
    num_in_flight: u32,
    is_over: bool,
    started_at: Duration,
    progress_at: Duration,
}

impl PrefixServing {
    /// Sends these, in this order, as the peer gives credit. At least one.
    pub fn new(extents: Vec<(ExtentId, u64)>, limits: ServingLimits, now: Duration) -> Self {
        let mut sender = FetchSender::new(0);
        sender.on_extents(extents);
        Self { limits, sender, num_in_flight: 0, is_over: false, started_at: now, progress_at: now }
    }

    /// [`FetchPrefixControl::Credit`](crate::wire::FetchPrefixControl::Credit) arrived.
    pub fn on_credit(&mut self, bytes: u64, now: Duration) -> Vec<ServingAction> {
        if self.is_over {
            return Vec::new();
        }
        self.progress_at = now;
        self.sender.on_credit(bytes);
        let allowed: Vec<_> = std::iter::from_fn(|| self.sender.next()).collect();
        self.num_in_flight += allowed.len() as u32;
        allowed.into_iter().map(|(extent, num_bytes)| ServingAction::SendExtent { extent, num_bytes }).collect()
    }

    /// The transport is done with one extent: handed over in full (`is_sent`), or given up.
    pub fn on_extent_ended(&mut self, is_sent: bool, now: Duration) -> Vec<ServingAction> {
        if self.is_over {
            return Vec::new();
        }
        self.progress_at = now;
        self.num_in_flight = self.num_in_flight.saturating_sub(1);
        match is_sent {
            false => self.end(false),
            true if self.num_in_flight == 0 && self.sender.is_empty() => self.end(true),
            true => Vec::new(),
        }
    }

    /// Time has passed.
    pub fn on_tick(&mut self, now: Duration) -> Vec<ServingAction> {
        if self.next_deadline().is_some_and(|deadline| now >= deadline) { self.end(false) } else { Vec::new() }
    }

    /// When [`Self::on_tick`] is due if nothing happens before. `None`: never again.
    pub fn next_deadline(&self) -> Option<Duration> {
        let ServingLimits { stall_timeout, total_timeout } = self.limits;
        let whole = self.started_at.saturating_add(total_timeout);
        (!self.is_over).then(|| self.progress_at.saturating_add(stall_timeout).min(whole))
    }

    fn end(&mut self, is_complete: bool) -> Vec<ServingAction> {
        self.is_over = true;
        vec![ServingAction::End { is_complete }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Extents of 100 bytes.
    fn serving(num_extents: u16) -> PrefixServing {
        let extent = |layer| ExtentId {
            group: 0,
            layer,
            plane_mask: 3,
            first_head: 0,
            num_heads: 2,
            first_token: 0,
            num_tokens: 16,
        };
        let extents = (0..num_extents).map(|layer| (extent(layer), 100)).collect();
        let limits = ServingLimits { stall_timeout: SECOND, total_timeout: 10 * SECOND };
        PrefixServing::new(extents, limits, Duration::ZERO)
    }

    fn words(actions: &[ServingAction]) -> String {
        let word = |action: &ServingAction| match action {
            ServingAction::SendExtent { extent, num_bytes } => format!("Send({}, {num_bytes})", extent.layer),
            ServingAction::End { is_complete } => format!("End({is_complete})"),
        };
        actions.iter().map(word).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn extents_leave_as_credit_allows_and_the_last_one_ends_it() {
        let mut serving = serving(3);
        assert_eq!(words(&serving.on_credit(150, SECOND / 2)), "Send(0, 100) Send(1, 100)");
        assert_eq!(words(&serving.on_credit(50, SECOND / 2)), "", "the overdraft is paid back first");
        assert_eq!(words(&serving.on_extent_ended(true, SECOND)), "");
        assert_eq!(words(&serving.on_extent_ended(true, SECOND)), "", "one still waits for credit");
        assert_eq!(words(&serving.on_credit(1, SECOND)), "Send(2, 100)");
        assert_eq!(words(&serving.on_extent_ended(true, SECOND)), "End(true)");
        assert_eq!(serving.next_deadline(), None);
        assert_eq!(words(&serving.on_credit(1, SECOND)), "");
    }

    #[test]
    fn extent_that_cannot_be_sent_ends_it() {
        let mut serving = serving(2);
        serving.on_credit(1000, Duration::ZERO);
        assert_eq!(words(&serving.on_extent_ended(false, SECOND)), "End(false)");
        assert_eq!(words(&serving.on_extent_ended(true, SECOND)), "");
    }

    #[test]
    fn peer_that_stands_still_or_takes_too_long_does_not_keep_the_blocks() {
        let mut stalled = serving(2);
        assert_eq!(stalled.next_deadline(), Some(SECOND));
        assert_eq!(words(&stalled.on_tick(SECOND / 2)), "");
        assert_eq!(words(&stalled.on_tick(SECOND)), "End(false)");
        let mut slow = serving(2);
        for tenths in 1..100 {
            slow.on_credit(0, SECOND / 10 * tenths);
        }
        assert_eq!(slow.next_deadline(), Some(10 * SECOND), "it moved all the time");
        assert_eq!(words(&slow.on_tick(10 * SECOND)), "End(false)");
    }

    proptest! {
        #[test]
        fn whatever_the_peer_does_each_extent_leaves_once_and_it_ends_once(
            num_extents in 1u16..6,
            inputs in prop::collection::vec((0u8..3, any::<u64>()), 0..40),
        ) {
            let mut serving = serving(num_extents);
            let (mut num_sent, mut num_ends) = (0, 0);
            let ending = [(2, u64::MAX)];
            for (tick, (input, amount)) in inputs.into_iter().chain(ending).enumerate() {
                let now = SECOND / 100 * tick as u32;
                let actions = match input {
                    0 => serving.on_credit(amount, now),
                    1 => serving.on_extent_ended(amount % 4 != 0, now),
                    _ if amount == u64::MAX => serving.on_tick(20 * SECOND),
                    _ => serving.on_tick(now),
                };
                for action in actions {
                    prop_assert_eq!(num_ends, 0, "nothing behind the end");
                    match action {
                        ServingAction::SendExtent { extent, .. } => {
                            prop_assert_eq!(extent.layer, num_sent);
                            num_sent += 1;
                        }
                        ServingAction::End { is_complete } => {
                            num_ends += 1;
                            prop_assert!(!is_complete || num_sent == num_extents);
                        }
                    }
                }
            }
            prop_assert_eq!(num_ends, 1);
        }
    }
}
