//! The candidate fetches what is held here: the part of [`DecodeHandover`] that sends it.

use std::time::Duration;

use super::super::AskIndex;
use super::super::fetch::FetchSender;
use super::{DecodeAction, DecodeHandover};
use crate::content::GRANULE_TOKENS;
use crate::wire::{ExtentId, PrefillControl};

impl DecodeHandover {
    /// The extents of the prefix that the candidate of `ask` fetches, in the order in which they are to leave;
    /// `None` if they cannot be sent.
    pub fn on_fetch_opened(&mut self, ask: AskIndex, extents: Option<Vec<(ExtentId, u64)>>) -> Vec<DecodeAction> {
        if self.ask() != Some(ask) {
            return Vec::new();
        }
        match (extents, &mut self.fetch) {
            (Some(extents), Some(fetch)) => {
                fetch.on_extents(extents);
                self.send_what_fetch_credit_allows()
            }
            _ => self.on_fetch_extent_lost(ask),
        }
    }

    /// An extent of that prefix could not be sent, or nothing moves: the candidate is told not to wait for it.
    pub fn on_fetch_extent_lost(&mut self, ask: AskIndex) -> Vec<DecodeAction> {
        let mut actions = Vec::new();
        if self.ask() == Some(ask) && self.fetch.is_some() {
            self.stop_fetch(&mut actions);
            actions.push(DecodeAction::Send(PrefillControl::FetchStopped));
        }
        actions
    }

    pub(super) fn may_fetch(&self, first_token: u32, end_token: u32) -> bool {
        let granule = GRANULE_TOKENS as u32;
        let is_whole = first_token.is_multiple_of(granule) && end_token.is_multiple_of(granule);
        !self.has_fetched && is_whole && first_token < end_token && end_token <= self.num_announced_tokens
    }

    pub(super) fn open_fetch(&mut self, credit_bytes: u64, now: Duration) {
        self.has_fetched = true;
        self.fetch = Some(FetchSender::new(credit_bytes));
        self.progress_at = now;
    }

    /// For a fetch that may have been given up here meanwhile.
    pub(super) fn on_fetch_credit(&mut self, bytes: u64, now: Duration) -> Vec<DecodeAction> {
        self.progress_at = now;
        if let Some(fetch) = &mut self.fetch {
            fetch.on_credit(bytes);
        }
        self.send_what_fetch_credit_allows()
    }

    fn send_what_fetch_credit_allows(&mut self) -> Vec<DecodeAction> {
        let Some(fetch) = &mut self.fetch else { return Vec::new() };
        let allowed = std::iter::from_fn(|| fetch.next());
        allowed.map(|(extent, num_bytes)| DecodeAction::SendExtent { extent, num_bytes }).collect()
    }

    pub(super) fn stop_fetch(&mut self, actions: &mut Vec<DecodeAction>) {
        actions.extend(self.fetch.take().map(|_| DecodeAction::StopFetch));
    }
}
