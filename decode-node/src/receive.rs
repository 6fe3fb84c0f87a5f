//! The shell around [`DecodeHandover`]: it connects, asks, lands and delivers what the machine decides.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::time::{Duration, Instant};

use common::content::ContentChain;
use common::handover::{AskIndex, DecodeAction, DecodeHandover, DecodeRequest};
use common::ids::{ChoiceIndex, Generation, NodeId};
use common::sampling::{FinishReason, SampledToken};
use common::timeline::NodeTimeline;
use common::wire::{ExtentId, Generate, NodeError, Open, Prefill, PrefillControl, PrefillEvent};
use engine::conversion::conversion_from_peer;
use kv_connector::peers::PeerLink;
use kv_connector::transfer::{
    ExtentRequest, ExtentSource, Landing, LandingEvent, LandingEvents, LandingPlan, PrefixSends,
};
use kv_connector::{ControlReceiver, ControlSender};

use crate::generate::{Admitted, End, Ongoing, interrupted};

/// How a hand-over ended well.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// Token #1 ended every choice; nothing is left to generate.
    Finished,
    /// The sequence is the engine's again: joined, or prefilling here.
    Generating,
}

/// The stream to the candidate that is being asked, and where its extents land.
struct Ask {
    index: AskIndex,
    link: PeerLink,
    /// While the prefill node fetches what is held here.
    fetch: Option<PrefixSends>,
    control: ControlSender,
    events: ControlReceiver,
    landing: Landing,
    landed: LandingEvents,
}

type Linking = Pin<Box<dyn Future<Output = (NodeId, Option<PeerLink>)> + Send>>;

/// What is being waited for.
enum Event {
    Linked(NodeId, Option<PeerLink>),
    Prefill(AskIndex, Option<PrefillEvent>),
    Landed(AskIndex, LandingEvent),
    /// An extent of the fetched prefix has left, or could not.
    PrefixSent(AskIndex, bool),
    Tick,
    Interrupted(End),
}

struct Handover<'o, 'a> {
    ongoing: &'o mut Ongoing<'a>,
    admitted: Admitted,
    chain: ContentChain,
    started_at: Instant,
    machine: DecodeHandover,
    linking: Option<Linking>,
    link: Option<PeerLink>,
    ask: Option<Ask>,
    first_tokens: Option<Vec<SampledToken>>,
    first_extent_at: Option<Instant>,
    failure: Option<NodeError>,
}

/// Has the prompt of an admitted request computed elsewhere and takes its KV in.
pub(crate) async fn receive_kv(ongoing: &mut Ongoing<'_>, admitted: Admitted) -> Result<Received, End> {
    let generate = ongoing.generate;
    let node = ongoing.node;
    let request = DecodeRequest {
        candidates: generate.prefill_candidates.clone(),
        num_tokens: generate.tokens.0.len() as u32,
        prompt_len: generate.prompt_len,
        num_held_tokens: admitted.num_cached_tokens as u32,
        num_choices: generate.choices.len() as u32,
        params: generate.params.clone(),
        max_model_len: node.engine.model().max_model_len,
    };
    let time_left = ongoing.deadline.saturating_duration_since(tokio::time::Instant::now());
    let (machine, actions) = DecodeHandover::new(request, node.args.limits(time_left), Duration::ZERO);
    let chain = node.content_chain(generate);
    let started_at = Instant::now();
    let mut handover = Handover {
        ongoing,
        admitted,
        chain,
        started_at,
        machine,
        linking: None,
        link: None,
        ask: None,
        first_tokens: None,
        first_extent_at: None,
        failure: None,
    };
    let received = handover.run(actions).await;
    // Before the blocks can be anybody else's.
    handover.stop_fetch().await;
    received
}

impl Handover<'_, '_> {
    async fn run(&mut self, mut actions: Vec<DecodeAction>) -> Result<Received, End> {
        let mut told = None;
        loop {
            let state = self.machine.state();
            if told.replace(state) != Some(state) {
                tracing::debug!(?state, "hand-over");
            }
            for action in std::mem::take(&mut actions) {
                if let Some(end) = self.perform(action, &mut actions).await? {
                    return Ok(end);
                }
            }
            if !actions.is_empty() {
                continue;
            }
            let started_at = self.started_at;
            let now = || started_at.elapsed();
            actions = match self.next_event().await {
                Event::Linked(candidate, Some(link)) => {
                    self.link = Some(link);
                    self.machine.on_link_ready(&candidate)
                }
                Event::Linked(candidate, None) => self.machine.on_link_failed(&candidate, now()),
                Event::Prefill(ask, Some(event)) if self.is_sound(&event) => self.machine.on_event(ask, event, now()),
                Event::Prefill(ask, _) => self.machine.on_stream_lost(ask, now()),
                Event::Landed(ask, event) => self.on_landed(ask, event),
                Event::PrefixSent(_, true) => Vec::new(),
                Event::PrefixSent(ask, false) => self.machine.on_fetch_extent_lost(ask),
                Event::Tick => self.machine.on_tick(now()),
                Event::Interrupted(end) => return Err(end),
            };
        }
    }

    async fn next_event(&mut self) -> Event {
        let deadline = self.machine.next_deadline().map(|at| tokio::time::Instant::from_std(self.started_at + at));
        let tick = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let linking = async {
            match &mut self.linking {
                Some(linking) => linking.await,
                None => std::future::pending().await,
            }
        };
        let asked = async {
            let Some(ask) = &mut self.ask else { return std::future::pending().await };
            let prefix_sent = async {
                match &mut ask.fetch {
                    Some(fetch) => fetch.next_ended().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                // Extents first: what has landed counts even if the stream ends in the same moment.
                Some(event) = ask.landed.recv() => Event::Landed(ask.index, event),
                is_sent = prefix_sent => Event::PrefixSent(ask.index, is_sent),
                event = ask.events.recv::<PrefillEvent>() => Event::Prefill(ask.index, event.ok().flatten()),
            }
        };
        let fence = &self.ongoing.fence;
        let event = tokio::select! {
            biased;
            () = self.ongoing.sender.stopped() => Event::Interrupted(End::Gone),
            end = interrupted(fence, self.ongoing.deadline, self.ongoing.generate.deadline) => Event::Interrupted(end),
            (candidate, link) = linking => Event::Linked(candidate, link),
            event = asked => event,
            () = tick => Event::Tick,
        };
        if matches!(event, Event::Linked(..)) {
            self.linking = None;
        }
        event
    }

    /// A token that the model does not have would fail every sequence in the engine.
    fn is_sound(&self, event: &PrefillEvent) -> bool {
        let vocab_size = self.ongoing.node.engine.model().vocab_size;
        match event {
            PrefillEvent::FirstTokens { tokens, .. } => tokens.iter().all(|token| token.id < vocab_size),
            _ => true,
        }
    }

    fn on_landed(&mut self, ask: AskIndex, event: LandingEvent) -> Vec<DecodeAction> {
        let now = self.started_at.elapsed();
        match event {
            LandingEvent::ExtentVerified { extent, num_bytes, num_contiguous_tokens, is_complete } => {
                tracing::debug!(layer = extent.layer, first_token = extent.first_token, num_bytes, "extent verified");
                self.ongoing.timeline.transferred_bytes += num_bytes;
                let first_extent_at = *self.first_extent_at.get_or_insert_with(Instant::now);
                self.ongoing.timeline.transfer = first_extent_at.elapsed();
                self.machine.on_extent_verified(ask, num_bytes, num_contiguous_tokens as u32, is_complete, now)
            }
            LandingEvent::ExtentRefused { reason } => {
                tracing::warn!(?reason, "an extent was refused");
                self.machine.on_extent_refused(ask, now)
            }
        }
    }

    /// Carries one action out; what follows from it at once is added to `next`.
    async fn perform(&mut self, action: DecodeAction, next: &mut Vec<DecodeAction>) -> Result<Option<Received>, End> {
        match action {
            DecodeAction::Link { candidate } => {
                let peers = self.ongoing.node.peers.clone();
                self.linking = Some(Box::pin(async move {
                    let link = peers.link(&candidate).await;
                    (candidate, link)
                }));
            }
            DecodeAction::Ask { candidate, ask, num_held_tokens, is_local_offered, credit_bytes } => {
                if !self.ask(ask, num_held_tokens, is_local_offered, credit_bytes).await {
                    tracing::warn!(prefill_node = %candidate, "the prefill stream could not be opened");
                    next.extend(self.machine.on_stream_lost(ask, self.started_at.elapsed()));
                }
            }
            DecodeAction::Send(control) => self.send(control).await,
            DecodeAction::OpenFetch { ask, generation, first_token, end_token } => {
                let extents = self.open_fetch(generation, first_token as usize..end_token as usize);
                next.extend(self.machine.on_fetch_opened(ask, extents));
            }
            DecodeAction::SendExtent { extent, num_bytes } => {
                tracing::debug!(layer = extent.layer, first_token = extent.first_token, num_bytes, "sends held KV");
                if let Some(fetch) = self.ask.as_mut().and_then(|ask| ask.fetch.as_mut()) {
                    fetch.send(&self.ongoing.generate.tokens.0, extent);
                }
            }
            DecodeAction::StopFetch => self.stop_fetch().await,
            DecodeAction::DeliverFirstTokens { tokens, finish, timeline } => {
                self.deliver_first_tokens(tokens, finish, &timeline).await?;
            }
            DecodeAction::CloseLanding => {
                if let Some(ask) = &mut self.ask {
                    ask.landing.close();
                }
            }
            DecodeAction::ResetStream => self.ask = None,
            DecodeAction::CandidateLost { candidate, loss } => {
                tracing::warn!(prefill_node = %candidate, reason = %loss, "hand-over: the candidate is given up");
                self.ongoing.node.metrics.count_candidate_lost(loss.as_str());
            }
            DecodeAction::Join => {
                let first_tokens = self.first_tokens.take().expect("a hand-over joins with its first tokens");
                if let Some(first_token_at) = self.ongoing.first_token_at {
                    self.ongoing.timeline.handover = first_token_at.elapsed();
                }
                self.finish_stream();
                self.ongoing.sequence.on_kv_complete(first_tokens);
                return Ok(Some(Received::Generating));
            }
            DecodeAction::PrefillLocally { num_valid_tokens, .. } => {
                self.ask = None;
                self.ongoing.timeline.is_local_prefill = true;
                self.ongoing.node.metrics.count_local_prefill();
                self.ongoing.sequence.compute_locally(num_valid_tokens as usize, self.first_tokens.take());
                return Ok(Some(Received::Generating));
            }
            DecodeAction::Fail(error) => self.failure = Some(error),
            DecodeAction::Release { .. } => {
                self.ask = None;
                return match self.failure.take() {
                    Some(error) => Err(End::Failed(error)),
                    None => Ok(Some(Received::Finished)),
                };
            }
        }
        Ok(None)
    }

    /// Opens the landing, then asks. False if what would come could not be kept, or the stream not be opened.
    async fn ask(&mut self, index: AskIndex, num_held_tokens: u32, is_local_offered: bool, credit_bytes: u64) -> bool {
        let Some(link) = self.link.take() else { return false };
        let (node, generate) = (self.ongoing.node, self.ongoing.generate);
        let conversion = match conversion_from_peer(link.model(), node.engine.model()) {
            Ok(conversion) => conversion,
            Err(error) => {
                tracing::warn!(%error, "KV of the prefill node cannot be kept here");
                return false;
            }
        };
        let generation = node.next_generation();
        let plan = LandingPlan {
            request: generate.request,
            attempt: generate.attempt,
            generation,
            blocks: self.admitted.blocks.to_vec(),
            chain: self.chain.clone(),
            tokens: generate.tokens.0.clone(),
            first_token: num_held_tokens as usize,
            num_tokens: generate.tokens.0.len(),
            kv_spec: node.engine.model().kv_spec.clone(),
            memory: node.memory.clone(),
            conversion,
        };
        let (landing, landed) = node.landing_zone.open(plan);
        let num_missing_tokens = generate.tokens.0.len() as u64 - u64::from(self.machine.num_valid_tokens());
        let local_rest = is_local_offered.then(|| node.expected_prefill(num_missing_tokens));
        let prefill = Prefill {
            request: generate.request,
            attempt: generate.attempt,
            generation,
            tokens: generate.tokens.clone(),
            prompt_len: generate.prompt_len,
            choices: generate.choices.clone(),
            params: generate.params.clone(),
            salt: generate.salt.clone(),
            num_held_tokens,
            credit_bytes,
            deadline: self.ongoing.deadline.saturating_duration_since(tokio::time::Instant::now()),
            local_rest,
            prefix_peer: generate.prefix_peer.clone(),
        };
        // A long prompt is not sent before the other end reads, which it may never do.
        let open = Open::Prefill(Box::new(prefill));
        let asking = link.open(&open);
        match tokio::time::timeout(node.args.prefill_accept_timeout, asking).await {
            Ok(Ok((control, events))) => {
                self.ask = Some(Ask { index, link, fetch: None, control, events, landing, landed });
                true
            }
            Ok(Err(_)) | Err(_) => false,
        }
    }

    /// Makes ready to send what is held; `None` if there is no way to the prefill node.
    fn open_fetch(&mut self, generation: Generation, tokens: Range<usize>) -> Option<Vec<(ExtentId, u64)>> {
        let (node, generate) = (self.ongoing.node, self.ongoing.generate);
        let ask = self.ask.as_mut().filter(|ask| !ask.link.bulk_sender().is_closed())?;
        let Generate { request, attempt, .. } = *generate;
        let source = ExtentSource {
            memory: node.memory.clone(),
            kv_spec: node.engine.model().kv_spec.clone(),
            blocks: self.admitted.blocks.clone(),
            chain: self.chain.clone(),
            request: ExtentRequest { epoch: ask.link.epoch(), request, attempt, generation },
        };
        tracing::debug!(?tokens, "the prefill node fetches what is held here");
        let fetch = ask.fetch.insert(PrefixSends::new(source, ask.link.bulk_sender().clone()));
        Some(fetch.extents(tokens))
    }

    /// When this returns, nothing reads the blocks for the prefill node any more.
    async fn stop_fetch(&mut self) {
        if let Some(fetch) = self.ask.as_mut().and_then(|ask| ask.fetch.take()) {
            fetch.stop().await;
        }
    }

    async fn send(&mut self, control: PrefillControl) {
        if let Some(ask) = &mut self.ask {
            // A lost stream shows up as such when its events are read.
            let _ = ask.control.send(&control).await;
        }
    }

    async fn deliver_first_tokens(
        &mut self,
        tokens: Vec<SampledToken>,
        finish: Vec<Option<FinishReason>>,
        prefill: &NodeTimeline,
    ) -> Result<(), End> {
        let timeline = &mut self.ongoing.timeline;
        timeline.prefill = prefill.prefill;
        timeline.queue += prefill.queue;
        timeline.fetch = prefill.fetch;
        timeline.num_fetched_tokens = prefill.num_fetched_tokens;
        timeline.num_cached_tokens = timeline.num_cached_tokens.max(prefill.num_cached_tokens);
        self.first_tokens = Some(tokens.clone());
        let generate = self.ongoing.generate;
        let index = generate.tokens.0.len() as u32 - generate.prompt_len;
        let choices: Vec<ChoiceIndex> = generate.choices.clone();
        for ((choice, token), finish) in choices.into_iter().zip(tokens).zip(finish) {
            self.ongoing.tell_token(choice, index, token, finish).await?;
        }
        Ok(())
    }

    /// Ends the stream of a hand-over that is complete without resetting it: `Received` must arrive.
    fn finish_stream(&mut self) {
        if let Some(mut ask) = self.ask.take() {
            ask.control.finish();
        }
    }
}
