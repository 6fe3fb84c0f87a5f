//! The receiving end: one request attempt at the decode node, from the reserved blocks to the batch.
//!
//! ```text
//!                new
//!                 | Link
//!                 v
//!   +--------> Linking ------- link failed, not accepted in time ---------+
//!   |             | link ready: Ask                                       |
//!   |             v                                                       |
//!   |           Asked -------- Busy, Failed, stream lost, not accepted ---+       (Declined, if offered: Local)
//!   |             | Accepted, or an extent that overtook it               |
//!   |             v                                                       v
//!   |          Landing ------- extent refused, Failed, stream lost, --> (lost)
//!   |             |            no progress                                |
//!   |             | last extent verified: CloseLanding, Received          |
//!   |             v                                                       |
//!   |        AwaitingToken --- Failed, stream lost, no progress ----------+
//!   |             | #1 (or delivered before)                              |
//!   |             v                                                       |
//!   |          Joined                     Local <--- none left, few left -+
//!   |                                                                     |
//!   +------------------------------------------------- next candidate ----+
//!
//!   any but Joined, Local: cancel, whole deadline, superseded, #1 ends every choice --> Released
//! ```
//!
//! In `Landing` the prefill node may ask for the prefix that is held here ([`super::fetch`]): `OpenFetch`, then
//! extents as its credit allows, until `FetchEnded`, the end of the ask, an extent that cannot be sent, or no
//! progress: `StopFetch` comes once for each `OpenFetch`, before the blocks can become anybody else's.
//!
//! The reservation has one owner. This machine holds it until exactly one of [`DecodeAction::Join`] (it
//! passes to the running batch), [`DecodeAction::PrefillLocally`] (to the local prefill) or
//! [`DecodeAction::Release`] (back to the block manager); after that it returns no action.

mod action;
mod held_prefix;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::time::Duration;

pub use action::{CandidateLoss, DecodeAction};

use super::AskIndex;
use super::fetch::FetchSender;
use crate::content::GRANULE_TOKENS;
use crate::ids::NodeId;
use crate::sampling::{SampledToken, SamplingParams};
use crate::timeline::NodeTimeline;
use crate::wire::{NodeError, PrefillControl, PrefillEvent};

/// What is to be handed over.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodeRequest {
    /// Prefill nodes to ask, best first. Empty: everything is prefilled locally.
    pub candidates: Vec<NodeId>,
    /// Prompt and committed tokens; blocks for all of them are reserved. At least 1.
    pub num_tokens: u32,
    /// How many of them are the prompt.
    pub prompt_len: u32,
    /// Leading tokens whose KV is here already. A hit never covers the last token.
    pub num_held_tokens: u32,
    /// Choices, each of which gets its token #1.
    pub num_choices: u32,
    /// Decides whether a token #1 ends its choice.
    pub params: SamplingParams,
    /// Longest sequence of the model, in tokens.
    pub max_model_len: u32,
}

/// How long is waited, and how much may be on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLimits {
    /// From turning to a candidate (link included) to its `Accepted`, without a rising step counter.
    pub accept_timeout: Duration,
    /// Without a rising step counter, and behind token #1 without a verified extent.
    pub progress_timeout: Duration,
    /// For the whole hand-over, all candidates together.
    pub total_timeout: Duration,
    /// KV bytes that a prefill node may have on the way, at least 1. One extent may exceed it.
    pub credit_window_bytes: u64,
    /// If no more tokens than this are missing, they are computed here and nobody is asked. With 0 that
    /// happens only when all KV is here and token #1 alone is missing.
    pub num_local_tokens_max: u32,
    /// If no more tokens than this are missing, the prefill node is told what computing them here would cost,
    /// and may leave them to this node.
    pub num_offered_tokens_max: u32,
}

/// Where a hand-over stands; the drawing is at the top of this file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DecodeState {
    /// Waits for a connection to the candidate.
    Linking,
    /// `Prefill` was sent.
    Asked,
    /// The candidate works on it; extents arrive.
    Landing,
    /// All KV is verified, token #1 is not there yet.
    AwaitingToken,
    /// Ended: the sequence is in the running batch.
    Joined,
    /// Ended: the rest is prefilled here.
    Local,
    /// Ended: cancelled, failed, or finished with token #1.
    Released,
}

impl DecodeState {
    /// Whether the machine has given the reservation away.
    pub fn is_terminal(self) -> bool {
        matches!(self, DecodeState::Joined | DecodeState::Local | DecodeState::Released)
    }
}

/// The machine. See the top of this file.
#[derive(Debug, Clone)]
pub struct DecodeHandover {
    request: DecodeRequest,
    limits: DecodeLimits,
    state: DecodeState,
    /// Index into the candidates of the one we are turned to.
    candidate: usize,
    num_asks: u32,
    /// Held tokens that this ask's candidate was told of.
    num_announced_tokens: u32,
    /// This ask's candidate may decline.
    is_local_offered: bool,
    /// This ask's candidate has asked for the held prefix, which it may do once.
    has_fetched: bool,
    /// While the held prefix is sent to the candidate.
    fetch: Option<FetchSender>,
    /// Leading tokens whose KV is here in every layer.
    num_valid_tokens: u32,
    has_first_tokens: bool,
    /// This ask's candidate has sent token #1: its engine is done.
    is_computed: bool,
    /// Verified bytes of this ask that were not yet given back as credit.
    num_owed_bytes: u64,
    /// Highest counters this ask has reported.
    num_steps: u64,
    num_computed_tokens: u32,
    started_at: Duration,
    progress_at: Duration,
}

impl DecodeHandover {
    /// Starts a hand-over whose blocks are reserved.
    pub fn new(mut request: DecodeRequest, limits: DecodeLimits, now: Duration) -> (Self, Vec<DecodeAction>) {
        assert!(request.num_tokens >= 1, "a prompt has at least one token");
        // Each is asked once; nodes are told apart by name in what comes back.
        let mut seen = HashSet::new();
        request.candidates.retain(|node| seen.insert(node.clone()));
        let num_valid_tokens = request.num_held_tokens.min(request.num_tokens - 1);
        let mut handover = Self {
            request,
            limits,
            state: DecodeState::Linking,
            candidate: 0,
            num_asks: 0,
            num_announced_tokens: 0,
            is_local_offered: false,
            has_fetched: false,
            fetch: None,
            num_valid_tokens,
            has_first_tokens: false,
            is_computed: false,
            num_owed_bytes: 0,
            num_steps: 0,
            num_computed_tokens: 0,
            started_at: now,
            progress_at: now,
        };
        let mut actions = Vec::new();
        handover.turn_to_candidate(now, &mut actions);
        (handover, actions)
    }

    /// Where it stands.
    pub fn state(&self) -> DecodeState {
        self.state
    }

    /// The node it is turned to, while it is turned to one.
    pub fn candidate(&self) -> Option<&NodeId> {
        if self.state.is_terminal() { None } else { self.request.candidates.get(self.candidate) }
    }

    /// The ask whose stream is open, if one is.
    pub fn ask(&self) -> Option<AskIndex> {
        use DecodeState::*;
        matches!(self.state, Asked | Landing | AwaitingToken).then(|| AskIndex(self.num_asks - 1))
    }

    /// Leading tokens whose KV is verified in every layer.
    pub fn num_valid_tokens(&self) -> u32 {
        self.num_valid_tokens
    }

    /// Whether token #1 was delivered.
    pub fn has_first_tokens(&self) -> bool {
        self.has_first_tokens
    }

    /// A connection to the candidate is there.
    pub fn on_link_ready(&mut self, candidate: &NodeId) -> Vec<DecodeAction> {
        if self.state != DecodeState::Linking || self.candidate() != Some(candidate) {
            return Vec::new();
        }
        let ask = AskIndex(self.num_asks);
        self.num_asks += 1;
        self.num_announced_tokens = self.num_held_tokens_to_announce();
        self.state = DecodeState::Asked;
        self.is_computed = false;
        self.num_owed_bytes = 0;
        self.num_steps = 0;
        self.num_computed_tokens = 0;
        self.has_fetched = false;
        self.is_local_offered = self.num_missing_tokens() <= self.limits.num_offered_tokens_max;
        vec![DecodeAction::Ask {
            candidate: candidate.clone(),
            ask,
            num_held_tokens: self.num_announced_tokens,
            is_local_offered: self.is_local_offered,
            credit_bytes: self.limits.credit_window_bytes.max(1),
        }]
    }

    /// The candidate cannot be reached, or its hello was refused.
    pub fn on_link_failed(&mut self, candidate: &NodeId, now: Duration) -> Vec<DecodeAction> {
        if self.state != DecodeState::Linking || self.candidate() != Some(candidate) {
            return Vec::new();
        }
        self.lose_candidate(CandidateLoss::LinkFailed, now)
    }

    /// A message on the stream of `ask`.
    pub fn on_event(&mut self, ask: AskIndex, event: PrefillEvent, now: Duration) -> Vec<DecodeAction> {
        use DecodeState::*;
        if self.ask() != Some(ask) {
            return Vec::new();
        }
        match (self.state, event) {
            (_, PrefillEvent::Failed(NodeError::Superseded)) => self.fail(NodeError::Superseded),
            (_, PrefillEvent::Failed(error)) => self.lose_candidate(CandidateLoss::Failed(error), now),
            (Asked, PrefillEvent::Busy { retry_after }) => {
                self.lose_candidate(CandidateLoss::Busy { retry_after }, now)
            }
            (Asked, PrefillEvent::Accepted { .. }) => {
                self.state = Landing;
                self.progress_at = now;
                Vec::new()
            }
            // An extent overtook it on the bulk connection.
            (Landing | AwaitingToken, PrefillEvent::Accepted { .. }) => Vec::new(),
            (_, PrefillEvent::Progress { num_steps, num_computed_tokens }) => {
                let is_rising = num_steps > self.num_steps || num_computed_tokens > self.num_computed_tokens;
                self.num_steps = self.num_steps.max(num_steps);
                self.num_computed_tokens = self.num_computed_tokens.max(num_computed_tokens);
                // It waits behind an engine that moves, or is computed by it. Behind #1 the engine is done with
                // this prompt: only extents are progress.
                if is_rising && self.state != AwaitingToken && !self.is_computed {
                    self.progress_at = now;
                }
                Vec::new()
            }
            (Landing | AwaitingToken, PrefillEvent::FirstTokens { tokens, timeline }) => {
                self.on_first_tokens(tokens, timeline, now)
            }
            (Landing | AwaitingToken, PrefillEvent::Sent { .. }) => Vec::new(),
            (Asked, PrefillEvent::Declined) if self.is_local_offered => {
                let mut actions = Vec::new();
                self.end_ask(&mut actions);
                self.prefill_locally(&mut actions);
                actions
            }
            (Landing, PrefillEvent::Fetch { generation, first_token, end_token, credit_bytes })
                if self.may_fetch(first_token, end_token) =>
            {
                self.open_fetch(credit_bytes, now);
                vec![DecodeAction::OpenFetch { ask, generation, first_token, end_token }]
            }
            (Landing | AwaitingToken, PrefillEvent::FetchCredit { bytes }) if self.has_fetched => {
                self.on_fetch_credit(bytes, now)
            }
            (Landing | AwaitingToken, PrefillEvent::FetchEnded) if self.has_fetched => {
                self.progress_at = now;
                let mut actions = Vec::new();
                self.stop_fetch(&mut actions);
                actions
            }
            (_, event) => self.lose_candidate(CandidateLoss::Protocol { what: name_of(&event) }, now),
        }
    }

    fn on_first_tokens(
        &mut self,
        tokens: Vec<SampledToken>,
        timeline: NodeTimeline,
        now: Duration,
    ) -> Vec<DecodeAction> {
        let DecodeRequest { num_tokens, prompt_len, num_choices, max_model_len, .. } = self.request;
        if tokens.len() != num_choices as usize {
            let what = "a number of first tokens that is not the number of choices";
            return self.lose_candidate(CandidateLoss::Protocol { what }, now);
        }
        if !self.is_computed {
            self.is_computed = true;
            self.progress_at = now;
        }
        if self.has_first_tokens {
            return Vec::new();
        }
        self.has_first_tokens = true;
        let num_generated = num_tokens.saturating_sub(prompt_len) + 1;
        let finish_of = |token: &SampledToken| {
            self.request.params.finish_reason(token.id, num_generated, num_tokens + 1, max_model_len)
        };
        let finish: Vec<_> = tokens.iter().map(finish_of).collect();
        let is_finished = finish.iter().all(Option::is_some);
        let mut actions = vec![DecodeAction::DeliverFirstTokens { tokens, finish, timeline }];
        if is_finished {
            self.release(&mut actions);
        } else if self.state == DecodeState::AwaitingToken {
            self.join(&mut actions);
        }
        actions
    }

    /// An extent of `ask` landed and its digest is right. `num_contiguous_tokens` counts from token 0
    /// those whose KV is now here in every layer; `is_complete` says that this is all of them.
    pub fn on_extent_verified(
        &mut self,
        ask: AskIndex,
        num_bytes: u64,
        num_contiguous_tokens: u32,
        is_complete: bool,
        now: Duration,
    ) -> Vec<DecodeAction> {
        if self.ask() != Some(ask) || self.state == DecodeState::AwaitingToken {
            return Vec::new();
        }
        self.state = DecodeState::Landing;
        self.progress_at = now;
        self.num_owed_bytes += num_bytes;
        let num_valid_tokens = if is_complete { self.request.num_tokens } else { num_contiguous_tokens };
        self.num_valid_tokens = self.num_valid_tokens.max(num_valid_tokens.min(self.request.num_tokens));
        if is_complete {
            let mut actions = vec![DecodeAction::CloseLanding, DecodeAction::Send(PrefillControl::Received)];
            self.state = DecodeState::AwaitingToken;
            if self.has_first_tokens {
                self.join(&mut actions);
            }
            actions
        } else if self.num_owed_bytes >= (self.limits.credit_window_bytes / 4).max(1) {
            // A quarter at a time: the sender never stands still for it, and messages stay few.
            let bytes = std::mem::take(&mut self.num_owed_bytes);
            vec![DecodeAction::Send(PrefillControl::Credit { bytes })]
        } else {
            Vec::new()
        }
    }

    /// An extent of `ask` was not what its header said: nothing more is taken from this candidate.
    pub fn on_extent_refused(&mut self, ask: AskIndex, now: Duration) -> Vec<DecodeAction> {
        if self.ask() != Some(ask) || self.state == DecodeState::AwaitingToken {
            return Vec::new();
        }
        self.lose_candidate(CandidateLoss::ExtentRefused, now)
    }

    /// The stream of `ask` ended or its connection was lost.
    pub fn on_stream_lost(&mut self, ask: AskIndex, now: Duration) -> Vec<DecodeAction> {
        if self.ask() != Some(ask) {
            return Vec::new();
        }
        self.lose_candidate(CandidateLoss::StreamLost, now)
    }

    /// The proxy reset the request, or the node gives it up.
    pub fn on_cancel(&mut self) -> Vec<DecodeAction> {
        let mut actions = Vec::new();
        if !self.state.is_terminal() {
            self.release(&mut actions);
        }
        actions
    }

    /// Time has passed.
    pub fn on_tick(&mut self, now: Duration) -> Vec<DecodeAction> {
        if !self.is_due(now) {
            return Vec::new();
        }
        let DecodeLimits { accept_timeout, progress_timeout, total_timeout, .. } = self.limits;
        if now >= self.started_at.saturating_add(total_timeout) {
            return self.fail(NodeError::Stalled { phase: "the hand-over".into(), waited: total_timeout });
        }
        if let Some(ask) = self.ask().filter(|_| self.fetch.is_some()) {
            // It waits for what is sent from here: first that is given up, then the candidate.
            self.progress_at = now;
            return self.on_fetch_extent_lost(ask);
        }
        let loss = match self.state {
            DecodeState::Linking | DecodeState::Asked => CandidateLoss::NotAccepted { waited: accept_timeout },
            _ => CandidateLoss::NoProgress { waited: progress_timeout },
        };
        self.lose_candidate(loss, now)
    }

    /// When [`Self::on_tick`] is due if nothing happens before. `None`: never again.
    pub fn next_deadline(&self) -> Option<Duration> {
        let timeout = match self.state {
            DecodeState::Linking | DecodeState::Asked => self.limits.accept_timeout,
            DecodeState::Landing | DecodeState::AwaitingToken => self.limits.progress_timeout,
            _ => return None,
        };
        let whole = self.started_at.saturating_add(self.limits.total_timeout);
        Some(self.progress_at.saturating_add(timeout).min(whole))
    }

    /// All that changes: two hand-overs of one request with equal courses behave the same.
    #[cfg(test)]
    pub(super) fn course(&self) -> impl std::hash::Hash + use<> {
        let times = (self.started_at, self.progress_at);
        let counts = (self.num_asks, self.num_valid_tokens, self.num_owed_bytes, self.num_steps);
        let tokens = (self.has_first_tokens, self.is_computed);
        let fetch = (self.fetch.clone(), self.has_fetched, self.num_announced_tokens, self.is_local_offered);
        (self.state, self.candidate, tokens, self.num_computed_tokens, counts, times, fetch)
    }

    fn is_due(&self, now: Duration) -> bool {
        self.next_deadline().is_some_and(|deadline| now >= deadline)
    }

    /// What is held for sure, in whole granules and without the last token.
    fn num_held_tokens_to_announce(&self) -> u32 {
        let granule = GRANULE_TOKENS as u32;
        self.num_valid_tokens.min(self.request.num_tokens - 1) / granule * granule
    }

    fn lose_candidate(&mut self, loss: CandidateLoss, now: Duration) -> Vec<DecodeAction> {
        let mut actions = Vec::new();
        self.end_ask(&mut actions);
        let candidate = self.request.candidates[self.candidate].clone();
        actions.push(DecodeAction::CandidateLost { candidate, loss });
        self.candidate += 1;
        self.turn_to_candidate(now, &mut actions);
        actions
    }

    fn turn_to_candidate(&mut self, now: Duration, actions: &mut Vec<DecodeAction>) {
        let num_missing_tokens = self.num_missing_tokens();
        match self.request.candidates.get(self.candidate) {
            Some(candidate) if num_missing_tokens > self.limits.num_local_tokens_max => {
                self.state = DecodeState::Linking;
                self.progress_at = now;
                actions.push(DecodeAction::Link { candidate: candidate.clone() });
            }
            _ => self.prefill_locally(actions),
        }
    }

    fn num_missing_tokens(&self) -> u32 {
        self.request.num_tokens - self.num_valid_tokens
    }

    fn prefill_locally(&mut self, actions: &mut Vec<DecodeAction>) {
        self.state = DecodeState::Local;
        actions.push(DecodeAction::PrefillLocally {
            num_valid_tokens: self.num_valid_tokens.min(self.request.num_tokens - 1),
            has_first_tokens: self.has_first_tokens,
        });
    }

    fn join(&mut self, actions: &mut Vec<DecodeAction>) {
        self.stop_fetch(actions);
        self.state = DecodeState::Joined;
        actions.push(DecodeAction::Join);
    }

    fn end_ask(&mut self, actions: &mut Vec<DecodeAction>) {
        self.stop_fetch(actions);
        match self.state {
            DecodeState::Asked | DecodeState::Landing => {
                actions.extend([DecodeAction::ResetStream, DecodeAction::CloseLanding])
            }
            DecodeState::AwaitingToken => actions.push(DecodeAction::ResetStream),
            _ => {}
        }
    }

    fn fail(&mut self, error: NodeError) -> Vec<DecodeAction> {
        let mut actions = Vec::new();
        self.end_ask(&mut actions);
        self.state = DecodeState::Released;
        actions.push(DecodeAction::Fail(error));
        self.release(&mut actions);
        actions
    }

    fn release(&mut self, actions: &mut Vec<DecodeAction>) {
        self.end_ask(actions);
        self.state = DecodeState::Released;
        actions.push(DecodeAction::Release { num_valid_tokens: self.num_valid_tokens });
    }
}

fn name_of(event: &PrefillEvent) -> &'static str {
    match event {
        PrefillEvent::Busy { .. } => "Busy",
        PrefillEvent::Accepted { .. } => "Accepted",
        PrefillEvent::Progress { .. } => "Progress",
        PrefillEvent::FirstTokens { .. } => "FirstTokens",
        PrefillEvent::Sent { .. } => "Sent",
        PrefillEvent::Failed(_) => "Failed",
        PrefillEvent::Declined => "Declined",
        PrefillEvent::Fetch { .. } => "Fetch",
        PrefillEvent::FetchCredit { .. } => "FetchCredit",
        PrefillEvent::FetchEnded => "FetchEnded",
    }
}
