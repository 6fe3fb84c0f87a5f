//! The sending end: one admitted hand-over at the prefill node, from its queue to the unpinned blocks.
//!
//! ```text
//!   new_fetching: Accepted, OpenFetch
//!      |
//!      v
//!   Fetching ---- complete, refused, stopped, stalled, too slow: CloseFetch, FetchEnded, Compute
//!      |   |
//!      |   |  new: Accepted
//!      |   v      |
//!      |   + <----+
//!      |   |
//!      |   v      scheduled             first tokens             last extent ended: Sent
//!      | Queued ------------> Computing -----------> Sending ---------------------------> AwaitingReceived
//!      |   |                      |                     |                                     | Received
//!      |   |                      |                     |   (Received may come in any state)  v
//!      +---+----------------------+---------------------+--- stream lost, reset, ---> [in flight?] -- none --> Done
//!                                                            failed, no credit,           |                     ^
//!                                                            whole deadline               | StopExtents         |
//!                                                                                         v                     |
//!                                                                                     Stopping -- last ended ---+
//! ```
//!
//! While a prefix is fetched ([`super::fetch`]) nothing is computed and nothing sent. However the fetch ends,
//! `CloseFetch` comes once and before anything else may use its blocks. From a peer, the decode node is not told of
//! it: what is drawn as `FetchEnded` is then the end of the peer's stream.
//!
//! `Unpin` is the last action of every hand-over and comes exactly once, when no transfer reads the
//! blocks any more. A peer that is dead or asleep cannot strand them: without credit, a finished
//! transfer or `Received` for `stall_timeout` the hand-over is given up.
//!
//! Extents leave in the order in which they were written. One may be sent while the credit left is above
//! zero, so at most the window and one extent are on the way, and an extent larger than the window is
//! not stuck.

mod fetching;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

use super::fetch::{FetchEnd, FetchPlan, FetchReceiver};
use crate::sampling::SampledToken;
use crate::timeline::NodeTimeline;
use crate::wire::{ExtentId, FetchPrefixControl, NodeError, PrefillEvent};

/// How long the other end is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PrefillLimits {
    /// Without credit while extents wait for it, without the end of a transfer, without `Received`
    /// after the last one.
    pub stall_timeout: Duration,
    /// For the whole hand-over: [`Prefill::deadline`](crate::wire::Prefill::deadline).
    pub total_timeout: Duration,
}

/// Where a hand-over stands; the drawing is at the top of this file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PrefillState {
    /// Admitted: blocks are held, a prefix is landing in them.
    Fetching,
    /// Blocks are held, no token was scheduled yet.
    Queued,
    /// The engine works on it; extents are written.
    Computing,
    /// All is computed; extents wait for credit or are on their way.
    Sending,
    /// The transport has everything.
    AwaitingReceived,
    /// Given up; transfers in flight still read the blocks.
    Stopping,
    /// Ended: unpinned.
    Done,
}

/// What the shell must do, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum PrefillAction {
    /// Send this on the control stream.
    Send(PrefillEvent),
    /// Send this on the stream to the peer that is fetched from.
    SendToPeer(FetchPrefixControl),
    /// Draw a [`Generation`](crate::ids::Generation). From the decode node: open the landing of these tokens under
    /// it, and send [`PrefillEvent::Fetch`]. From a peer: send [`FetchPrefix`](crate::wire::FetchPrefix), open the
    /// landing of what it holds of them, and give it the whole window as credit.
    OpenFetch(FetchPlan),
    /// Close that landing, and end the stream to the peer: when this is done nothing is written into the blocks any
    /// more.
    CloseFetch {
        /// Leading tokens whose KV is here in every layer.
        num_valid_tokens: u32,
        /// How it ended, for logs, counters and the estimate of the bandwidth.
        end: FetchEnd,
    },
    /// Let the engine compute from here on: it has waited with the blocks.
    Compute {
        /// Leading tokens whose KV is here in every layer, a multiple of the granule.
        num_valid_tokens: u32,
    },
    /// Read the extent's bytes from the pool and send them on a bulk stream; then call
    /// [`PrefillHandover::on_extent_ended`], once, whatever became of it.
    SendExtent {
        /// Which.
        extent: ExtentId,
        /// Its size.
        num_bytes: u64,
    },
    /// Reset the bulk streams in flight: each still ends with [`PrefillHandover::on_extent_ended`].
    StopExtents,
    /// Drop the sequence if the engine still has it, and unpin its blocks: what is computed stays as
    /// evictable cache. The last action; end the control stream.
    Unpin,
}

/// The machine. See the top of this file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PrefillHandover {
    limits: PrefillLimits,
    state: PrefillState,
    /// While `Fetching`.
    fetch: Option<FetchReceiver>,
    waiting: VecDeque<(ExtentId, u64)>,
    num_in_flight: u32,
    /// Bytes that may still be sent; below zero by at most one extent.
    credit_bytes: i64,
    num_sent_extents: u32,
    num_sent_bytes: u64,
    is_received: bool,
    started_at: Duration,
    /// Last time the other end or the transport moved.
    progress_at: Duration,
}

impl PrefillHandover {
    /// Starts a hand-over that was admitted: its blocks are held. `credit_bytes` is
    /// [`Prefill::credit_bytes`](crate::wire::Prefill::credit_bytes).
    pub fn new(
        num_cached_tokens: u32,
        credit_bytes: u64,
        limits: PrefillLimits,
        now: Duration,
    ) -> (Self, Vec<PrefillAction>) {
        let handover = Self {
            limits,
            state: PrefillState::Queued,
            fetch: None,
            waiting: VecDeque::new(),
            num_in_flight: 0,
            credit_bytes: i64::try_from(credit_bytes).unwrap_or(i64::MAX),
            num_sent_extents: 0,
            num_sent_bytes: 0,
            is_received: false,
            started_at: now,
            progress_at: now,
        };
        (handover, vec![PrefillAction::Send(PrefillEvent::Accepted { num_cached_tokens })])
    }

    /// Where it stands.
    pub fn state(&self) -> PrefillState {
        self.state
    }

    /// Extents that are written and wait for credit.
    pub fn num_waiting_extents(&self) -> usize {
        self.waiting.len()
    }

    /// The engine scheduled the first tokens of the prompt.
    pub fn on_scheduled(&mut self) {
        if self.state == PrefillState::Queued {
            self.state = PrefillState::Computing;
        }
    }

    /// The engine made steps while the prompt waits or computes. Call it a few times per second, so that
    /// the decode node can tell a long prompt from a hang; never from a timer alone.
    pub fn on_progress(&mut self, num_steps: u64, num_computed_tokens: u32) -> Vec<PrefillAction> {
        let progress = PrefillAction::Send(PrefillEvent::Progress { num_steps, num_computed_tokens });
        match self.state {
            PrefillState::Fetching => {
                // An engine that waits makes no steps; what has landed since is what moves.
                let mut actions = self.send_owed_fetch_credit();
                actions.push(progress);
                actions
            }
            PrefillState::Queued | PrefillState::Computing => vec![progress],
            _ => Vec::new(),
        }
    }

    /// A layer of a chunk (or a cached block that the decode node lacks) is in the pool, final, and
    /// `extent` is ready to be read. `num_bytes` is its payload.
    pub fn on_layer_written(&mut self, extent: ExtentId, num_bytes: u64, now: Duration) -> Vec<PrefillAction> {
        let mut actions = Vec::new();
        self.on_scheduled();
        // Whoever says that it has received everything needs nothing more.
        if self.state == PrefillState::Computing && !self.is_received {
            if !self.is_waiting_for_peer() {
                self.progress_at = now;
            }
            self.waiting.push_back((extent, num_bytes));
            self.send_what_credit_allows(&mut actions);
        }
        actions
    }

    /// The last chunk is computed (all its layers were reported before) and token #1 of each choice is
    /// sampled.
    pub fn on_first_tokens(
        &mut self,
        tokens: Vec<SampledToken>,
        timeline: NodeTimeline,
        now: Duration,
    ) -> Vec<PrefillAction> {
        let mut actions = Vec::new();
        self.on_scheduled();
        if self.state == PrefillState::Computing {
            self.state = PrefillState::Sending;
            actions.push(PrefillAction::Send(PrefillEvent::FirstTokens { tokens, timeline }));
            self.finish_what_is_finished(now, &mut actions);
        }
        actions
    }

    /// [`PrefillControl::Credit`](crate::wire::PrefillControl::Credit) arrived.
    pub fn on_credit(&mut self, num_bytes: u64, now: Duration) -> Vec<PrefillAction> {
        let mut actions = Vec::new();
        if !matches!(self.state, PrefillState::Stopping | PrefillState::Done) && num_bytes > 0 {
            self.credit_bytes = self.credit_bytes.saturating_add(i64::try_from(num_bytes).unwrap_or(i64::MAX));
            self.progress_at = now;
            self.send_what_credit_allows(&mut actions);
        }
        actions
    }

    /// The transport is done with the bytes of one [`PrefillAction::SendExtent`]: handed over in full
    /// (`is_sent`), or given up.
    pub fn on_extent_ended(&mut self, is_sent: bool, now: Duration) -> Vec<PrefillAction> {
        let mut actions = Vec::new();
        self.num_in_flight = self.num_in_flight.saturating_sub(1);
        self.progress_at = now;
        match self.state {
            PrefillState::Done => {}
            PrefillState::Stopping => {
                if self.num_in_flight == 0 {
                    self.unpin(&mut actions);
                }
            }
            // Once all is verified, what becomes of a transfer no longer matters.
            _ if is_sent || self.is_received => self.finish_what_is_finished(now, &mut actions),
            _ => {
                let reason = "an extent could not be sent on the bulk connection".into();
                self.give_up(Some(NodeError::Engine { reason }), &mut actions);
            }
        }
        actions
    }

    /// [`PrefillControl::Received`](crate::wire::PrefillControl::Received) arrived. It may overtake token
    /// #1, which is still sent.
    pub fn on_received(&mut self, now: Duration) -> Vec<PrefillAction> {
        let mut actions = Vec::new();
        if !matches!(self.state, PrefillState::Stopping | PrefillState::Done) {
            self.is_received = true;
            self.waiting.clear();
            self.finish_what_is_finished(now, &mut actions);
        }
        actions
    }

    /// The decode node reset the stream, or its connection was lost.
    pub fn on_stream_lost(&mut self) -> Vec<PrefillAction> {
        let mut actions = Vec::new();
        self.give_up(None, &mut actions);
        actions
    }

    /// The engine failed, a newer attempt took over, or the node gives the request up: the decode node is
    /// told why.
    pub fn on_failed(&mut self, error: NodeError) -> Vec<PrefillAction> {
        let mut actions = Vec::new();
        self.give_up(Some(error), &mut actions);
        actions
    }

    /// Time has passed.
    pub fn on_tick(&mut self, now: Duration) -> Vec<PrefillAction> {
        let mut actions = Vec::new();
        let is_whole = now >= self.started_at.saturating_add(self.limits.total_timeout);
        if let Some(failure) = self.fetch.as_ref().and_then(|fetch| fetch.is_overdue(now)).filter(|_| !is_whole) {
            return self.on_fetch_failed(failure, now);
        }
        if self.next_deadline().is_some_and(|deadline| now >= deadline) {
            let PrefillLimits { stall_timeout, total_timeout } = self.limits;
            let (phase, waited) = match self.state {
                _ if is_whole => ("the prefill", total_timeout),
                PrefillState::AwaitingReceived => ("waiting for the KV to be confirmed", stall_timeout),
                _ => ("sending the KV", stall_timeout),
            };
            self.give_up(Some(NodeError::Stalled { phase: phase.into(), waited }), &mut actions);
        }
        actions
    }

    /// When [`Self::on_tick`] is due if nothing happens before. `None`: nothing is waited for.
    pub fn next_deadline(&self) -> Option<Duration> {
        if matches!(self.state, PrefillState::Stopping | PrefillState::Done) {
            return None;
        }
        let whole = self.started_at.saturating_add(self.limits.total_timeout);
        let stall = self.progress_at.saturating_add(self.limits.stall_timeout);
        if let Some(fetch) = &self.fetch {
            return Some(whole.min(fetch.deadline()));
        }
        Some(if self.is_waiting_for_peer() { whole.min(stall) } else { whole })
    }

    fn is_waiting_for_peer(&self) -> bool {
        self.state == PrefillState::AwaitingReceived || self.num_in_flight > 0 || !self.waiting.is_empty()
    }

    fn send_what_credit_allows(&mut self, actions: &mut Vec<PrefillAction>) {
        while self.credit_bytes > 0
            && let Some((extent, num_bytes)) = self.waiting.pop_front()
        {
            self.credit_bytes = self.credit_bytes.saturating_sub(i64::try_from(num_bytes).unwrap_or(i64::MAX));
            self.num_in_flight += 1;
            self.num_sent_extents += 1;
            self.num_sent_bytes += num_bytes;
            actions.push(PrefillAction::SendExtent { extent, num_bytes });
        }
    }

    fn finish_what_is_finished(&mut self, now: Duration, actions: &mut Vec<PrefillAction>) {
        let is_sent = self.waiting.is_empty() && self.num_in_flight == 0;
        if self.state == PrefillState::Sending && is_sent {
            self.state = PrefillState::AwaitingReceived;
            self.progress_at = now;
            let (num_extents, num_bytes) = (self.num_sent_extents, self.num_sent_bytes);
            actions.push(PrefillAction::Send(PrefillEvent::Sent { num_extents, num_bytes }));
        }
        if self.state == PrefillState::AwaitingReceived && self.is_received {
            self.unpin(actions);
        }
    }

    fn give_up(&mut self, error: Option<NodeError>, actions: &mut Vec<PrefillAction>) {
        if matches!(self.state, PrefillState::Stopping | PrefillState::Done) {
            return;
        }
        self.close_fetch(FetchEnd::Abandoned, actions);
        actions.extend(error.map(|error| PrefillAction::Send(PrefillEvent::Failed(error))));
        self.waiting.clear();
        if self.num_in_flight > 0 {
            self.state = PrefillState::Stopping;
            actions.push(PrefillAction::StopExtents);
        } else {
            self.unpin(actions);
        }
    }

    fn unpin(&mut self, actions: &mut Vec<PrefillAction>) {
        self.state = PrefillState::Done;
        actions.push(PrefillAction::Unpin);
    }
}
