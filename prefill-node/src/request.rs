//! One hand-over as a story: queue, fetch what another node holds or load what the store has if that is best,
//! compute meanwhile or then, send each layer as it is written, wait until it is taken, publish.

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::content::{ChainRoot, ContentChain, GRANULE_TOKENS};
use common::handover::{FetchFailure, FetchPlan, PrefillAction, PrefillHandover, PrefillState, PrefixChoice};
use common::scheduler::AddError;
use common::sequence::{NewSequence, Work};
use common::timeline::NodeTimeline;
use common::wire::{Hello, NodeError, Prefill, PrefillControl, PrefillEvent};
use engine::core::{EngineEvent, RequestHandle};
use kv_connector::fencing::Fence;
use kv_connector::store::{Loaded, PrefixLoad};
use kv_connector::transfer::{BulkSender, ExtentRequest, ExtentSends, ExtentSource, LandingEvent};
use kv_connector::{ControlReceiver, ControlSender};
use tokio::time::{Interval, MissedTickBehavior};

use crate::node::Node;
use crate::peer;
use crate::prefix::{self, Fetching};
use crate::stored;

/// The decode node hears of the engine's steps this often while it waits.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// Asked again after this long.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// Why a request ends before its hand-over began.
enum Refusal {
    Busy,
    /// The decode node's own way is cheaper.
    Declined,
    Failed(NodeError),
    Gone,
}

/// Serves one `Prefill` stream to its end.
pub(crate) async fn serve(
    node: Arc<Node>,
    peer: Arc<Hello>,
    prefill: Prefill,
    round_trip: Duration,
    mut sender: ControlSender,
    mut receiver: ControlReceiver,
) {
    let refusal = match admit(&node, &peer, &prefill, round_trip, &mut sender).await {
        Ok(admitted) => return hand_over(&node, &peer, &prefill, admitted, &mut sender, &mut receiver).await,
        Err(refusal) => refusal,
    };
    let answer = match refusal {
        Refusal::Busy => PrefillEvent::Busy { retry_after: RETRY_AFTER },
        Refusal::Declined => PrefillEvent::Declined,
        Refusal::Failed(error) => {
            tracing::warn!(%error, "prefill refused");
            PrefillEvent::Failed(error)
        }
        Refusal::Gone => return,
    };
    if sender.send(&answer).await.is_ok() {
        sender.finish();
    }
}

struct Admitted {
    /// What is loaded from the store while the engine computes. Before `sequence`: whatever drops this, nothing is
    /// written any more when the blocks go.
    load: Option<PrefixLoad>,
    sequence: RequestHandle,
    fence: Fence,
    bulk: BulkSender,
    source: Arc<ExtentSource>,
    num_cached_tokens: usize,
    /// What is fetched before the engine computes.
    fetch: Option<FetchPlan>,
    queue: Duration,
}

async fn admit(
    node: &Arc<Node>,
    peer: &Hello,
    prefill: &Prefill,
    round_trip: Duration,
    sender: &mut ControlSender,
) -> Result<Admitted, Refusal> {
    check(prefill, node.engine.model().vocab_size).map_err(Refusal::Failed)?;
    if node.is_draining() {
        return Err(Refusal::Failed(NodeError::Draining));
    }
    let superseded = Refusal::Failed(NodeError::Superseded);
    let fence = node.fences.begin(prefill.request, prefill.attempt, &prefill.choices).ok_or(superseded)?;
    let no_bulk = || NodeError::Engine { reason: "there is no bulk connection from the decode node".to_string() };
    let bulk = node.fabric.bulk_to(&peer.node, peer.epoch).ok_or_else(|| Refusal::Failed(no_bulk()))?;
    let root = ChainRoot { salt: prefill.salt.clone(), ..ChainRoot::of_model(node.engine.model().identity) };
    let mut chain = ContentChain::new(&root);
    chain.extend(&prefill.tokens.0);
    let stored = tokio::select! {
        () = sender.stopped() => return Err(Refusal::Gone),
        stored = stored::find(node, &chain, &prefill.tokens.0) => stored,
    };
    let peer_prefix = peer::usable(node, prefill);
    let num_peer_tokens = peer_prefix.as_ref().map_or(0, |peer| peer.num_tokens);
    let num_held_tokens = stored.num_tokens().max(prefill.num_held_tokens.max(num_peer_tokens) as usize);
    let sequence = NewSequence {
        tokens: prefill.tokens.0.clone(),
        prompt_len: prefill.prompt_len as usize,
        choices: prefill.choices.clone(),
        params: Arc::new(prefill.params.clone()),
        root,
        work: Work::PrefillBehind { num_held_tokens },
    };
    let stopped = || Refusal::Failed(NodeError::Engine { reason: "it has stopped".to_string() });
    let mut sequence = node.engine.submit(sequence, prefill.num_held_tokens as usize).ok_or_else(stopped)?;
    let mut progress = progress_interval();
    let deadline = tokio::time::sleep(prefill.deadline);
    tokio::pin!(deadline);
    let event = loop {
        tokio::select! {
            biased;
            () = sender.stopped() => return Err(Refusal::Gone),
            () = fence.superseded() => return Err(Refusal::Failed(NodeError::Superseded)),
            () = &mut deadline => return Err(Refusal::Gone),
            event = sequence.next() => break event.ok_or_else(stopped)?,
            _ = progress.tick() => {
                let event = PrefillEvent::Progress { num_steps: node.engine.num_steps(), num_computed_tokens: 0 };
                sender.send(&event).await.map_err(|_| Refusal::Gone)?;
            }
        }
    };
    match event {
        EngineEvent::Admitted { num_cached_tokens, blocks, queue } => {
            let (mut fetch, mut load) = (None, None);
            let num_cached = num_cached_tokens as u32;
            let chosen = prefix::choose(node, peer, prefill, &stored, peer_prefix.as_ref(), num_cached, round_trip);
            if let Some(chosen) = chosen {
                match chosen.choice {
                    PrefixChoice::Local => return Err(Refusal::Declined),
                    PrefixChoice::Recompute => sequence.compute_locally(num_cached_tokens, None),
                    PrefixChoice::Fetch | PrefixChoice::Peer => fetch = Some(chosen.fetch),
                    PrefixChoice::Store => {
                        let loading = stored::load(node, stored, &chosen.costs, blocks.clone());
                        sequence.compute_around(loading.prefix().clone());
                        load = Some(loading);
                    }
                }
            }
            let kv_spec = node.engine.model().kv_spec.clone();
            let Prefill { request, attempt, generation, .. } = *prefill;
            let request = ExtentRequest { epoch: peer.epoch, request, attempt, generation };
            let source = ExtentSource { memory: node.engine.pool().clone(), kv_spec, blocks, chain, request };
            Ok(Admitted { load, sequence, fence, bulk, source: Arc::new(source), num_cached_tokens, fetch, queue })
        }
        EngineEvent::Rejected(AddError::Full { .. }) => Err(Refusal::Busy),
        EngineEvent::Rejected(error) => Err(Refusal::Failed(NodeError::Invalid { reason: error.to_string() })),
        EngineEvent::Failed { reason } => Err(Refusal::Failed(NodeError::Engine { reason })),
        event => Err(Refusal::Failed(NodeError::Engine { reason: format!("it began with {event:?}") })),
    }
}

/// The first tick comes after one interval.
fn progress_interval() -> Interval {
    let mut interval = tokio::time::interval(PROGRESS_INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval.reset();
    interval
}

/// What a well-behaved decode node never sends.
fn check(prefill: &Prefill, vocab_size: u32) -> Result<(), NodeError> {
    let invalid = |reason: String| Err(NodeError::Invalid { reason });
    let num_tokens = prefill.tokens.0.len();
    if num_tokens == 0 || prefill.prompt_len as usize > num_tokens || prefill.prompt_len == 0 {
        return invalid(format!("{num_tokens} tokens with a prompt of {}", prefill.prompt_len));
    }
    if prefill.num_held_tokens as usize >= num_tokens
        || !(prefill.num_held_tokens as usize).is_multiple_of(GRANULE_TOKENS)
    {
        return invalid(format!(
            "{} tokens are held of {num_tokens}: expected a smaller multiple of {GRANULE_TOKENS}",
            prefill.num_held_tokens
        ));
    }
    if let Some(token) = prefill.tokens.0.iter().find(|token| **token >= vocab_size) {
        return invalid(format!("token {token} is not in the vocabulary of {vocab_size}"));
    }
    if prefill.choices.is_empty() {
        return invalid("a prefill needs at least one choice".to_string());
    }
    prefill.params.check(vocab_size).map_err(|reason| NodeError::Invalid { reason })
}

/// The shell around [`PrefillHandover`].
struct HandOver<'a> {
    node: &'a Node,
    peer: &'a Hello,
    prefill: &'a Prefill,
    /// Before `admitted`: whatever drops this, nothing is written any more when the blocks go.
    fetching: Option<Fetching>,
    admitted: Admitted,
    sender: &'a mut ControlSender,
    sends: ExtentSends,
    /// What came of the fetch: tokens, and the time it took.
    fetched: (u32, Duration),
    /// How long the store was loaded from, and the tokens that were used of it.
    loaded: (u32, Duration),
    /// Ticks through whatever else happens: layers written that wait for credit are no news to the other end.
    progress: Interval,
    started_at: Instant,
    first_scheduled_at: Option<Instant>,
    num_computed_tokens: u32,
}

async fn hand_over(
    node: &Node,
    peer: &Hello,
    prefill: &Prefill,
    admitted: Admitted,
    sender: &mut ControlSender,
    receiver: &mut ControlReceiver,
) {
    let limits = node.args.limits(prefill.deadline);
    let num_cached = admitted.num_cached_tokens;
    let (credit, now) = (prefill.credit_bytes, Duration::ZERO);
    let (mut machine, mut actions) = match admitted.fetch {
        None => PrefillHandover::new(num_cached as u32, credit, limits, now),
        Some(plan) => PrefillHandover::new_fetching(num_cached as u32, plan, credit, limits, now),
    };
    let mut shell = HandOver {
        node,
        peer,
        prefill,
        admitted,
        sender,
        sends: ExtentSends::default(),
        fetching: None,
        fetched: (0, Duration::ZERO),
        loaded: (0, Duration::ZERO),
        progress: progress_interval(),
        started_at: Instant::now(),
        first_scheduled_at: None,
        num_computed_tokens: num_cached as u32,
    };
    if machine.state() != PrefillState::Fetching {
        actions.extend(shell.found(&mut machine, num_cached));
    }
    let mut told = None;
    loop {
        let state = machine.state();
        if told.replace(state) != Some(state) {
            tracing::debug!(?state, "hand-over");
        }
        for action in std::mem::take(&mut actions) {
            if let PrefillAction::Compute { num_valid_tokens } = action {
                actions.extend(shell.found(&mut machine, num_valid_tokens as usize));
            }
            if shell.perform(action).await {
                return;
            }
        }
        if !actions.is_empty() {
            continue;
        }
        actions = shell.next(&mut machine, receiver).await;
    }
}

impl HandOver<'_> {
    fn now(&self) -> Duration {
        self.started_at.elapsed()
    }

    fn written(&self, machine: &mut PrefillHandover, layer: u32, first: usize, end: usize) -> Vec<PrefillAction> {
        let extents = self.admitted.source.extents(layer, first, end);
        extents.into_iter().flat_map(|(extent, bytes)| machine.on_layer_written(extent, bytes, self.now())).collect()
    }

    /// What is in the pool before anything is computed, and not at the decode node, goes out first.
    fn found(&self, machine: &mut PrefillHandover, num_valid_tokens: usize) -> Vec<PrefillAction> {
        let layers = 0..self.admitted.source.kv_spec.num_layers();
        let num_held_tokens = self.prefill.num_held_tokens as usize;
        layers.flat_map(|layer| self.written(machine, layer, num_held_tokens, num_valid_tokens)).collect()
    }

    async fn next(&mut self, machine: &mut PrefillHandover, receiver: &mut ControlReceiver) -> Vec<PrefillAction> {
        // Given up: only what is on its way is still waited for. A lost stream stays lost, so asking it again
        // would keep the ends of the transfers from ever being heard.
        if machine.state() == PrefillState::Stopping {
            let ended = self.sends.next_ended().await;
            let is_sent = ended.expect("a hand-over stops only until its last transfer has ended");
            return machine.on_extent_ended(is_sent, self.now());
        }
        // A deadline beyond what the clock can tell is none.
        let deadline = machine.next_deadline().and_then(|at| self.started_at.checked_add(at));
        let tick = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                None => std::future::pending().await,
            }
        };
        let landed = async {
            match &mut self.fetching {
                Some(fetching) => fetching.next().await,
                None => std::future::pending().await,
            }
        };
        let loaded = async {
            match &mut self.admitted.load {
                Some(load) => load.ended().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.sender.stopped() => machine.on_stream_lost(),
            () = self.admitted.fence.superseded() => machine.on_failed(NodeError::Superseded),
            control = receiver.recv::<PrefillControl>() => match control {
                Ok(Some(PrefillControl::Credit { bytes })) => machine.on_credit(bytes, self.now()),
                Ok(Some(PrefillControl::Received)) => machine.on_received(self.now()),
                Ok(Some(PrefillControl::FetchStopped)) => machine.on_fetch_failed(FetchFailure::Stopped, self.now()),
                Ok(None) | Err(_) => machine.on_stream_lost(),
            },
            landed = landed => match landed {
                Ok(event) => self.on_landed(machine, event),
                Err(failure) => machine.on_fetch_failed(failure, self.now()),
            },
            loaded = loaded => self.on_loaded(loaded),
            Some(is_sent) = self.sends.next_ended() => machine.on_extent_ended(is_sent, self.now()),
            event = self.admitted.sequence.next() => match event {
                Some(event) => self.on_engine_event(machine, event),
                None => machine.on_failed(NodeError::Engine { reason: "it has stopped".to_string() }),
            },
            _ = self.progress.tick() => machine.on_progress(self.node.engine.num_steps(), self.num_done_tokens()),
            () = tick => machine.on_tick(self.now()),
        }
    }

    fn on_landed(&mut self, machine: &mut PrefillHandover, event: LandingEvent) -> Vec<PrefillAction> {
        match event {
            LandingEvent::ExtentVerified { num_bytes, num_contiguous_tokens, is_complete, .. } => {
                machine.on_fetched(num_bytes, num_contiguous_tokens as u32, is_complete, self.now())
            }
            LandingEvent::ExtentRefused { reason } => {
                tracing::warn!(?reason, "an extent of a fetched prefix was refused");
                machine.on_fetch_failed(FetchFailure::ExtentRefused, self.now())
            }
        }
    }

    /// What the decode node sees rise: an engine that waits for KV makes no steps.
    fn num_done_tokens(&self) -> u32 {
        let num_layers = self.admitted.source.kv_spec.num_layers();
        let num_fetched = self.fetching.as_ref().map_or(0, |fetching| fetching.num_tokens(num_layers));
        let num_loaded = self.admitted.load.as_ref().map_or(0, |load| load.prefix().num_arrived_tokens() as u32);
        self.num_computed_tokens.saturating_add(num_fetched).saturating_add(num_loaded)
    }

    /// The engine hears of it from the prefix.
    fn on_loaded(&mut self, loaded: Loaded) -> Vec<PrefillAction> {
        self.admitted.load = None;
        // What overlapped is time of the prefill.
        let alone = self.first_scheduled_at.map_or(loaded.took, |at| loaded.took.min(at - self.started_at));
        self.loaded.1 = alone;
        Vec::new()
    }

    /// What has arrived goes out as it is; what was computed before it has gone out already.
    fn on_prefix_arrived(&mut self, machine: &mut PrefillHandover, first: usize, end: usize) -> Vec<PrefillAction> {
        if let Some(load) = &self.admitted.load {
            load.on_met();
        }
        self.loaded.0 += (end - first) as u32;
        self.num_computed_tokens = self.num_computed_tokens.max(end as u32);
        let first = first.max(self.prefill.num_held_tokens as usize);
        let num_layers = self.admitted.source.kv_spec.num_layers();
        (0..num_layers).flat_map(|layer| self.written(machine, layer, first, end)).collect()
    }

    /// Opens the landing, then asks for the KV.
    async fn open_fetch(&mut self, plan: FetchPlan) {
        let source = &self.admitted.source;
        let (fetching, event) = Fetching::open(self.node, self.peer, self.prefill, source, plan);
        self.fetching = Some(fetching);
        if let Some(event) = event {
            // A peer that is gone shows up when its stream is read.
            let _ = self.sender.send(&event).await;
        }
    }

    fn on_engine_event(&mut self, machine: &mut PrefillHandover, event: EngineEvent) -> Vec<PrefillAction> {
        match event {
            EngineEvent::LayerWritten { layer, first_token, num_tokens } => {
                if self.first_scheduled_at.is_none() {
                    self.first_scheduled_at = Some(Instant::now());
                    machine.on_scheduled();
                }
                tracing::debug!(layer, first_token, num_tokens, "layer written");
                self.num_computed_tokens = self.num_computed_tokens.max((first_token + num_tokens) as u32);
                self.written(machine, layer, first_token, first_token + num_tokens)
            }
            EngineEvent::PrefixArrived { first_token, end_token } => {
                self.on_prefix_arrived(machine, first_token, end_token)
            }
            EngineEvent::FirstTokens { tokens, prefill } => {
                let ((num_fetched_tokens, fetched), (num_loaded_tokens, loaded)) = (self.fetched, self.loaded);
                let fetch = fetched + loaded;
                let timeline = NodeTimeline {
                    queue: self.admitted.queue,
                    prefill: prefill.saturating_sub(fetch),
                    fetch,
                    num_fetched_tokens,
                    num_cached_tokens: self.admitted.num_cached_tokens as u32 + num_fetched_tokens + num_loaded_tokens,
                    ..NodeTimeline::default()
                };
                self.node.metrics.observe(&timeline);
                tracing::info!(
                    queue_ms = timeline.queue.as_secs_f64() * 1e3,
                    prefill_ms = timeline.prefill.as_secs_f64() * 1e3,
                    fetch_ms = timeline.fetch.as_secs_f64() * 1e3,
                    cached = timeline.num_cached_tokens,
                    "prompt computed"
                );
                machine.on_first_tokens(tokens, timeline, self.now())
            }
            EngineEvent::Failed { reason } => machine.on_failed(NodeError::Engine { reason }),
            event => machine.on_failed(NodeError::Engine { reason: format!("it said {event:?} during a prefill") }),
        }
    }

    /// True once the hand-over is over.
    async fn perform(&mut self, action: PrefillAction) -> bool {
        match action {
            PrefillAction::Send(event) => {
                // A peer that is gone shows up when its stream is read.
                let _ = self.sender.send(&event).await;
            }
            PrefillAction::SendToPeer(control) => {
                if let Some(fetching) = &mut self.fetching {
                    fetching.send(control).await;
                }
            }
            PrefillAction::OpenFetch(plan) => self.open_fetch(plan).await,
            PrefillAction::CloseFetch { num_valid_tokens, end } => {
                if let Some(fetching) = self.fetching.take() {
                    let num_tokens = num_valid_tokens - self.admitted.num_cached_tokens as u32;
                    let took = fetching.close(self.node, num_tokens, end);
                    self.fetched = (num_tokens, took);
                }
            }
            PrefillAction::Compute { num_valid_tokens } => {
                self.num_computed_tokens = num_valid_tokens;
                self.admitted.sequence.compute_locally(num_valid_tokens as usize, None);
            }
            PrefillAction::SendExtent { extent, num_bytes } => {
                let extent = self.admitted.source.unsealed(&self.prefill.tokens.0, extent);
                self.node.metrics.count_sent(num_bytes);
                self.admitted.bulk.begin(&mut self.sends, extent);
            }
            PrefillAction::StopExtents => self.sends.give_up(),
            PrefillAction::Unpin => {
                // While its blocks are still held: what is published is found in the pool by its content.
                stored::publish(self.node, &self.admitted.source.chain, &self.prefill.tokens.0);
                self.sender.finish();
                return true;
            }
        }
        false
    }
}
