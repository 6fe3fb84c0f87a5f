//! A prefix is fetched before the engine computes: the part of [`PrefillHandover`] that waits for it.

use std::time::Duration;

use super::super::fetch::{FetchEnd, FetchFailure, FetchFrom, FetchPlan, FetchReceiver};
use super::{PrefillAction, PrefillHandover, PrefillLimits, PrefillState};
use crate::wire::{FetchPrefixControl, PrefillEvent};

impl PrefillHandover {
    /// Starts a hand-over that was admitted and first fetches a prefix that another node holds; the engine
    /// waits for [`PrefillAction::Compute`].
    pub fn new_fetching(
        num_cached_tokens: u32,
        plan: FetchPlan,
        credit_bytes: u64,
        limits: PrefillLimits,
        now: Duration,
    ) -> (Self, Vec<PrefillAction>) {
        let (mut handover, mut actions) = Self::new(num_cached_tokens, credit_bytes, limits, now);
        handover.state = PrefillState::Fetching;
        handover.fetch = Some(FetchReceiver::new(plan, now));
        actions.push(PrefillAction::OpenFetch(plan));
        (handover, actions)
    }

    /// An extent of the fetched prefix landed and its digest is right. `num_contiguous_tokens` counts from
    /// token 0 those whose KV is now here in every layer.
    pub fn on_fetched(
        &mut self,
        num_bytes: u64,
        num_contiguous_tokens: u32,
        is_complete: bool,
        now: Duration,
    ) -> Vec<PrefillAction> {
        let Some(fetch) = &mut self.fetch else { return Vec::new() };
        fetch.on_extent(num_bytes, num_contiguous_tokens, now);
        if is_complete {
            return self.go_on_behind_fetch(FetchEnd::Complete, now);
        }
        send_credit(fetch.from(), fetch.due_credit())
    }

    /// An extent of the prefix was refused, or the other node sends none, or no more.
    pub fn on_fetch_failed(&mut self, failure: FetchFailure, now: Duration) -> Vec<PrefillAction> {
        self.go_on_behind_fetch(FetchEnd::Failed(failure), now)
    }

    fn go_on_behind_fetch(&mut self, end: FetchEnd, now: Duration) -> Vec<PrefillAction> {
        let mut actions = Vec::new();
        let from = self.fetch.as_ref().map(FetchReceiver::from);
        if let Some(num_valid_tokens) = self.close_fetch(end, &mut actions) {
            self.state = PrefillState::Queued;
            self.progress_at = now;
            if from == Some(FetchFrom::DecodeNode) {
                actions.push(PrefillAction::Send(PrefillEvent::FetchEnded));
            }
            actions.push(PrefillAction::Compute { num_valid_tokens });
        }
        actions
    }

    pub(super) fn close_fetch(&mut self, end: FetchEnd, actions: &mut Vec<PrefillAction>) -> Option<u32> {
        let num_valid_tokens = self.fetch.take()?.num_valid_tokens();
        actions.push(PrefillAction::CloseFetch { num_valid_tokens, end });
        Some(num_valid_tokens)
    }

    pub(super) fn send_owed_fetch_credit(&mut self) -> Vec<PrefillAction> {
        let Some(fetch) = &mut self.fetch else { return Vec::new() };
        send_credit(fetch.from(), fetch.owed_credit())
    }
}

fn send_credit(to: FetchFrom, bytes: Option<u64>) -> Vec<PrefillAction> {
    let send = |bytes| match to {
        FetchFrom::DecodeNode => PrefillAction::Send(PrefillEvent::FetchCredit { bytes }),
        FetchFrom::Peer => PrefillAction::SendToPeer(FetchPrefixControl::Credit { bytes }),
    };
    bytes.map(send).into_iter().collect()
}
