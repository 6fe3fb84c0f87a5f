//! The story of one prompt: pick, open, commit, and resume on another node.
//!
//! ```text
//!              Busy: another node, and 429 when all have said so
//!   pick -> open -> Accepted -> Token ... -> Done
//!    ^       |          |          |
//!    |       +----------+----------+---- lost, or failed in a way that another node may not
//!    +--- paced; prompt and committed tokens; the failed node excluded until it has been reached anew
//! ```

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::content::{ChainRoot, ContentKey, granule_keys};
use common::ids::{Attempt, ChoiceIndex, NodeId};
use common::sampling::{FinishReason, SampledToken};
use common::timeline::NodeTimeline;
use common::tokens::Token;
use common::wire::{Generate, GenerateEvent, NodeError};
use rand::Rng;
use tokio::time::Instant;

use super::choice::Choice;
use super::dispatcher::{DispatchEvent, DispatchRequest, Dispatcher, lock};
use super::leg::{Leg, OpenStream, SentTokens, WaitingLeg, next_event};
use super::nodes::NodeLost;
use super::quarantine::Fingerprint;
use crate::openai::{ApiError, ErrorKind};
use crate::route::{ClusterView, NodeLife, PromptDemand, Stay, pick_decode_node, pick_prefill_nodes, pick_prefix_peer};

/// Shortest pause before a resume; it doubles with every loss of the request.
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// How often a resume that has no node to go to looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// So many nodes that cannot be reached, or are leaving, are passed by without a pause.
const PASSED_BY_AT_ONCE_MAX: usize = 8;
/// Losses of nodes that are reached again each time, behind which a request is given up: it is the way to them that fails,
/// or this proxy that stands still.
const LOSSES_MAX: usize = 8;
/// `Retry-After` when no node can serve.
const RETRY_AFTER_UNAVAILABLE: Duration = Duration::from_secs(2);

/// A request under way. Dropping it cancels it on the nodes.
pub struct Dispatch {
    dispatcher: Arc<Dispatcher>,
    request: DispatchRequest,
    fingerprint: Fingerprint,
    choices: Vec<Choice>,
    legs: Vec<Leg>,
    waiting: Vec<WaitingLeg>,
    attempt: u32,
    /// Nodes that failed under this request or are leaving.
    excluded: HashSet<Stay>,
    /// Lives of nodes that were lost with it.
    lost: HashSet<NodeLife>,
    /// Losses in all: a node that was lost may be reached again, and lost again.
    num_losses: usize,
    /// Nodes that could not be reached, or were leaving.
    num_passed_by: usize,
    /// Nodes that said `Busy`, and the shortest time they named.
    busy: HashSet<Stay>,
    busy_for: Option<Duration>,
    /// Since when there has been no node to go on with.
    stranded_since: Option<Instant>,
    timeline: Option<NodeTimeline>,
    /// Leg whose turn it is to be asked first.
    turn: usize,
    is_accepted: bool,
    is_done: bool,
}

impl Dispatch {
    pub(super) fn new(dispatcher: Arc<Dispatcher>, fingerprint: Fingerprint, request: DispatchRequest) -> Self {
        let n = request.n as usize;
        Self {
            dispatcher,
            fingerprint,
            choices: vec![Choice::default(); n],
            legs: Vec::new(),
            waiting: vec![WaitingLeg { choices: (0..n).collect(), not_before: Instant::now() }],
            attempt: 0,
            excluded: HashSet::new(),
            lost: HashSet::new(),
            num_losses: 0,
            num_passed_by: 0,
            busy: HashSet::new(),
            busy_for: None,
            stranded_since: None,
            timeline: None,
            turn: 0,
            is_accepted: false,
            is_done: false,
            request,
        }
    }

    /// The next event; `None` behind `Done`. Safe to drop and call again.
    ///
    /// # Errors
    /// What the client sees. The request is over then.
    pub async fn next(&mut self) -> Result<Option<DispatchEvent>, ApiError> {
        let result = self.advance().await;
        if result.is_err() {
            self.is_done = true;
            self.legs.clear();
            self.waiting.clear();
        }
        result
    }

    /// Ends an answer where it is, if its node has not: a stop string was found in its text.
    pub fn finish_choice(&mut self, choice: usize) {
        if self.choices[choice].is_finished() {
            return; // the node's closing word is still to come
        }
        self.choices[choice].finish();
        let choices = &self.choices;
        let is_needed = |of: &[usize]| of.iter().any(|c| !choices[*c].is_finished());
        // Dropping the stream resets it: the node stops at its next step.
        let (needed, ended): (Vec<Leg>, Vec<Leg>) =
            std::mem::take(&mut self.legs).into_iter().partition(|leg| is_needed(&leg.choices));
        self.legs = needed;
        self.waiting.retain(|leg| is_needed(&leg.choices));
        // It will not come to `Done`: what it has said of itself is all there is.
        ended.into_iter().filter_map(|leg| leg.started).for_each(|timeline| self.add_timeline(timeline));
    }

    async fn advance(&mut self) -> Result<Option<DispatchEvent>, ApiError> {
        loop {
            if self.is_done {
                return Ok(None);
            }
            if self.legs.is_empty() && self.waiting.is_empty() {
                self.is_done = true;
                return Ok(Some(DispatchEvent::Done { timeline: self.timeline.unwrap_or_default() }));
            }
            // Also for a node that is never silent.
            if Instant::now() >= self.request.deadline {
                return Err(self.on_deadline());
            }
            self.open_waiting_legs()?;
            self.turn = self.turn.wrapping_add(1);
            let wake_at = self.waiting.iter().map(|leg| leg.not_before).min();
            let deadline = self.request.deadline;
            let wake_at = wake_at.unwrap_or(deadline).min(deadline);
            tokio::select! {
                biased;
                (leg, event) = next_event(&mut self.legs, self.turn) => {
                    if let Some(event) = self.on_event(leg, event)? {
                        return Ok(Some(event));
                    }
                }
                () = tokio::time::sleep_until(wake_at) => {}
            }
        }
    }

    fn open_waiting_legs(&mut self) -> Result<(), ApiError> {
        let now = Instant::now();
        let (due, waiting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|leg| leg.not_before <= now);
        self.waiting = waiting;
        for leg in due {
            self.open_leg(leg.choices)?;
        }
        Ok(())
    }

    fn open_leg(&mut self, choices: Vec<usize>) -> Result<(), ApiError> {
        let dispatcher = self.dispatcher.clone();
        let settings = &dispatcher.settings;
        let view = dispatcher.nodes.view();
        let turn = dispatcher.turn.fetch_add(1, Ordering::Relaxed);
        let avoided: HashSet<Stay> = self.excluded.union(&self.busy).copied().collect();
        let mut tokens = self.request.prompt.clone();
        if let [only] = choices.as_slice() {
            tokens.extend_from_slice(self.choices[*only].committed());
        }
        let held = dispatcher.nodes.held_prefixes(&|| self.granule_keys(&view, &tokens));
        let demand = PromptDemand { num_tokens: tokens.len(), held };
        let prefill_candidates = pick_prefill_nodes(
            &view,
            &demand,
            settings.local_prefill_max_tokens,
            settings.num_prefill_candidates,
            turn,
        );
        // A decode node looks into its tiers only for what it prefills itself.
        let at_decode = if prefill_candidates.is_empty() { demand.clone() } else { demand.only_in_pools() };
        let picked = pick_decode_node(&view, &avoided, &at_decode, settings.request_weight_tokens, turn);
        let Some(node) = picked else { return self.on_no_node(choices) };
        self.stranded_since = None;
        self.attempt += 1;
        let prefill = prefill_candidates.first().copied();
        let held_at_decode = at_decode.num_held_tokens(node);
        let held_at_prefill = prefill.map(|node| demand.num_held_tokens(node));
        let num_believed_tokens = held_at_decode.max(held_at_prefill.unwrap_or(0));
        let believed = |demand: &PromptDemand, node| (demand.num_pool_tokens(node), demand.num_tier_tokens(node));
        dispatcher.metrics.on_routed("decode-node", believed(&at_decode, node));
        if let Some(node) = prefill {
            dispatcher.metrics.on_routed("prefill-node", believed(&demand, node));
        }
        let prefix_peer = pick_prefix_peer(&view, &demand, prefill, node);
        if prefix_peer.is_some() {
            dispatcher.metrics.on_prefix_peer_named();
        }
        let sent = prefill.map(|node| SentTokens::new(node.own.clone(), demand.num_missing_tokens(node) as u64));
        let prefill_candidates: Vec<NodeId> = prefill_candidates.into_iter().map(|node| node.node.clone()).collect();
        tracing::debug!(
            node = %node.node,
            attempt = self.attempt,
            num_tokens = tokens.len(),
            ?prefill_candidates,
            held_at_decode,
            held_at_prefill,
            ?prefix_peer,
            "generate"
        );
        let has_prefix_peer = prefix_peer.is_some();
        let generate = Generate {
            request: self.request.id,
            attempt: Attempt(self.attempt),
            tokens: tokens.into(),
            prompt_len: self.request.prompt.len() as u32,
            choices: choices.iter().map(|choice| ChoiceIndex(*choice as u32)).collect(),
            params: self.request.params.clone(),
            salt: self.request.salt.clone(),
            prefill_candidates,
            deadline: self.request.deadline.saturating_duration_since(Instant::now()),
            prefix_peer,
        };
        let open = OpenStream::new(node.own.clone(), dispatcher.num_streams.clone());
        let events = dispatcher.nodes.generate(node, generate);
        self.legs.push(Leg {
            life: node.life(),
            stay: node.stay,
            choices,
            events,
            started: None,
            num_believed_tokens,
            has_prefix_peer,
            sent,
            _open: open,
        });
        Ok(())
    }

    /// What the content of `tokens` is called. The last token is left out: a hit never covers it.
    fn granule_keys(&self, view: &ClusterView, tokens: &[Token]) -> Vec<ContentKey> {
        let Some(model) = &view.model else { return Vec::new() };
        let root = ChainRoot { salt: self.request.salt.clone(), ..ChainRoot::of_model(model.identity) };
        granule_keys(&root, &tokens[..tokens.len().saturating_sub(1)])
    }

    /// Nobody is left to ask: the client is told, unless it has tokens already and a node may come back.
    fn on_no_node(&mut self, choices: Vec<usize>) -> Result<(), ApiError> {
        let now = Instant::now();
        let is_resumed = self.is_accepted || !self.lost.is_empty();
        if let Some(busy_for) = self.busy_for {
            if !is_resumed {
                let message = "every decode node is full: repeat the request after the time in Retry-After";
                return Err(ApiError::new(ErrorKind::Overloaded, message).with_retry_after(busy_for));
            }
            self.busy.clear();
            self.busy_for = None;
            self.waiting.push(WaitingLeg { choices, not_before: now + jittered(busy_for.max(PAUSE_MIN)) });
            return Ok(());
        }
        let stranded_since = *self.stranded_since.get_or_insert(now);
        if is_resumed && now < stranded_since + self.dispatcher.settings.patience {
            self.waiting.push(WaitingLeg { choices, not_before: now + jittered(LOOK_AGAIN) });
            return Ok(());
        }
        let message = if self.excluded.is_empty() {
            "no decode node is ready: repeat the request after the time in Retry-After"
        } else {
            "no other decode node is ready to take over this request: repeat it after the time in Retry-After"
        };
        Err(ApiError::new(ErrorKind::Unavailable, message).with_retry_after(RETRY_AFTER_UNAVAILABLE))
    }

    fn on_deadline(&self) -> ApiError {
        ApiError::new(ErrorKind::Timeout, "the request's time limit passed before its answer was complete")
    }

    fn on_event(
        &mut self,
        leg: usize,
        event: Option<Result<GenerateEvent, NodeLost>>,
    ) -> Result<Option<DispatchEvent>, ApiError> {
        match event {
            Some(Ok(GenerateEvent::Accepted)) => {
                let is_first = !std::mem::replace(&mut self.is_accepted, true);
                return Ok(is_first.then_some(DispatchEvent::Accepted));
            }
            Some(Ok(GenerateEvent::Started { timeline })) => {
                let leg = &mut self.legs[leg];
                leg.sent = None;
                let num_told = timeline.num_cached_tokens as usize;
                // What a third node sent says nothing about the beliefs in these two.
                let is_theirs = !leg.has_prefix_peer || timeline.num_fetched_tokens == 0;
                if leg.started.replace(timeline).is_none() && is_theirs {
                    self.dispatcher.metrics.on_cached_told(leg.num_believed_tokens, num_told);
                }
            }
            Some(Ok(GenerateEvent::Token { choice, index, token, finish })) => {
                return Ok(self.on_token(leg, choice, index, token, finish));
            }
            Some(Ok(GenerateEvent::Done { timeline })) => {
                let leg = self.legs.swap_remove(leg);
                self.add_timeline(timeline);
                if leg.choices.iter().any(|choice| !self.choices[*choice].is_finished()) {
                    self.on_loss(leg, "it said Done before the answer was complete")?;
                }
            }
            Some(Ok(GenerateEvent::Busy { retry_after })) => {
                let leg = self.legs.swap_remove(leg);
                tracing::debug!(node = %leg.life.0, ?retry_after, "node is full");
                self.dispatcher.metrics.on_busy(&leg.life.0);
                self.busy_for = Some(self.busy_for.map_or(retry_after, |shortest| shortest.min(retry_after)));
                self.busy.insert(leg.stay);
                self.waiting.push(WaitingLeg { choices: leg.choices, not_before: Instant::now() });
            }
            Some(Ok(GenerateEvent::Failed(error))) => {
                let leg = self.legs.swap_remove(leg);
                self.on_failed(leg, error)?;
            }
            Some(Err(NodeLost::Unreachable(reason))) => {
                let leg = self.legs.swap_remove(leg);
                tracing::warn!(node = %leg.life.0, reason, "node cannot be reached");
                self.go_elsewhere(leg);
            }
            Some(Err(NodeLost::Lost(reason))) => {
                let leg = self.legs.swap_remove(leg);
                self.on_loss(leg, &reason)?;
            }
            None => {
                let leg = self.legs.swap_remove(leg);
                self.on_loss(leg, "its stream ended before the answer was complete")?;
            }
        }
        Ok(None)
    }

    fn on_token(
        &mut self,
        leg: usize,
        choice: ChoiceIndex,
        index: u32,
        token: SampledToken,
        finish: Option<FinishReason>,
    ) -> Option<DispatchEvent> {
        self.is_accepted = true;
        let choice = choice.0 as usize;
        let is_committed =
            self.legs[leg].choices.contains(&choice) && self.choices[choice].commit(index, token.id, finish.is_some());
        if !is_committed {
            tracing::debug!(choice, index, "dropped a token that is not the next one");
            return None;
        }
        Some(DispatchEvent::Token { choice, token, finish })
    }

    fn on_failed(&mut self, leg: Leg, error: NodeError) -> Result<(), ApiError> {
        let has_tokens = leg.choices.iter().any(|choice| !self.choices[*choice].committed().is_empty());
        match error {
            NodeError::Draining => {
                tracing::info!(node = %leg.life.0, "node is draining");
                self.go_elsewhere(leg);
                Ok(())
            }
            NodeError::TooManyChoices { .. } if !has_tokens => Err(ApiError::invalid("n", error.to_string())),
            NodeError::Invalid { reason } if !has_tokens => Err(ApiError::new(ErrorKind::InvalidRequest, reason)),
            error if error.is_worth_a_retry() => self.on_loss(leg, &error.to_string()),
            error => {
                tracing::error!(node = %leg.life.0, %error, "node refused a request it should not have");
                Err(ApiError::new(ErrorKind::Internal, format!("a node refused to go on: {error}")))
            }
        }
    }

    /// The node is not to blame for this request: another one, and at once unless it goes on like this.
    fn go_elsewhere(&mut self, leg: Leg) {
        self.excluded.insert(leg.stay);
        self.num_passed_by += 1;
        let pause = if self.num_passed_by > PASSED_BY_AT_ONCE_MAX { jittered(LOOK_AGAIN) } else { Duration::ZERO };
        self.waiting.extend(self.unfinished_legs(&leg.choices, Instant::now() + pause));
    }

    /// The node failed under this request: another one, paced, or none any more.
    fn on_loss(&mut self, leg: Leg, reason: &str) -> Result<(), ApiError> {
        let resumed = self.unfinished_legs(&leg.choices, Instant::now());
        if resumed.is_empty() {
            return Ok(()); // only the closing word is missing
        }
        let node = leg.life.0.clone();
        self.num_losses += usize::from(self.excluded.insert(leg.stay));
        if self.lost.insert(leg.life) {
            self.dispatcher.metrics.on_node_loss(&node);
        }
        tracing::warn!(%node, reason, num_losses = self.num_losses, "a node was lost under this request");
        if self.lost.len() > self.dispatcher.settings.max_losses {
            lock(&self.dispatcher.quarantine).insert(self.fingerprint, Instant::now().into_std());
            tracing::error!(num_losses = self.num_losses, "gave the request up and quarantined its prompt");
            let message =
                format!("{} nodes were lost under this request, the last one because {reason}", self.lost.len());
            return Err(ApiError::new(ErrorKind::Internal, message));
        }
        if self.num_losses > LOSSES_MAX {
            let message = format!(
                "nodes were lost under this request {} times, the last one because {reason}: repeat it after the time in \
                 Retry-After",
                self.num_losses
            );
            return Err(ApiError::new(ErrorKind::Unavailable, message).with_retry_after(RETRY_AFTER_UNAVAILABLE));
        }
        let pause = jittered(PAUSE_MIN * (1 << self.num_losses.min(6)));
        for leg in resumed {
            let turn = lock(&self.dispatcher.budget).draw(Instant::now().into_std());
            let Some(turn) = turn else {
                let message = "too many requests are being resumed after a loss of nodes: repeat this one later";
                let error = ApiError::new(ErrorKind::Unavailable, message);
                return Err(error.with_retry_after(RETRY_AFTER_UNAVAILABLE));
            };
            self.dispatcher.metrics.on_resume();
            self.waiting.push(WaitingLeg { not_before: leg.not_before + turn.max(pause), ..leg });
        }
        Ok(())
    }

    /// What is left of some answers: those without tokens together, as at first, each other on its own.
    fn unfinished_legs(&self, choices: &[usize], not_before: Instant) -> Vec<WaitingLeg> {
        let unfinished = choices.iter().copied().filter(|choice| !self.choices[*choice].is_finished());
        let (fresh, begun): (Vec<usize>, Vec<usize>) =
            unfinished.partition(|choice| self.choices[*choice].committed().is_empty());
        let groups = begun.into_iter().map(|choice| vec![choice]).chain((!fresh.is_empty()).then_some(fresh));
        groups.map(|choices| WaitingLeg { choices, not_before }).collect()
    }

    /// The first node's spans are the request's; bytes add up.
    fn add_timeline(&mut self, timeline: NodeTimeline) {
        match &mut self.timeline {
            None => self.timeline = Some(timeline),
            Some(sum) => sum.transferred_bytes = sum.transferred_bytes.saturating_add(timeline.transferred_bytes),
        }
    }
}

/// Between half of it and all of it, so that requests that failed together do not come back together.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.5..=1.0))
}
