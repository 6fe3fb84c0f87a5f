//! One request as a story: fence, admit, receive the prompt's KV or compute it around what the store has of it,
//! stream tokens, publish.

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::content::ChainRoot;
use common::ids::{BlockId, ChoiceIndex};
use common::sampling::SampledToken;
use common::scheduler::AddError;
use common::sequence::{NewSequence, Work};
use common::timeline::NodeTimeline;
use common::wire::{Generate, GenerateEvent, NodeError};
use engine::core::{EngineEvent, RequestHandle};
use kv_connector::fencing::Fence;
use kv_connector::store::{FoundPrefix, PrefixLoad};
use kv_connector::{ControlReceiver, ControlSender};
use tokio::time::Instant as Deadline;

use crate::node::Node;
use crate::receive;
use crate::stored::{self, Generated};

/// Asked again after this long; the engine's steps are of that order.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// Longer than any request takes, and still a moment that the clock can tell.
const DEADLINE_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Why a request ended here without `Done`.
pub(crate) enum End {
    /// Nothing is held; ask again.
    Busy,
    /// Told to the proxy.
    Failed(NodeError),
    /// The proxy has reset the stream: nobody listens.
    Gone,
}

/// What a request carries through its phases.
pub(crate) struct Ongoing<'a> {
    pub(crate) node: &'a Arc<Node>,
    pub(crate) generate: &'a Generate,
    pub(crate) sender: &'a mut ControlSender,
    /// What is loaded from the store while the engine computes. Before `sequence`: whatever drops this, nothing is
    /// written any more when the blocks go.
    load: Option<PrefixLoad>,
    pub(crate) sequence: RequestHandle,
    pub(crate) fence: Fence,
    pub(crate) deadline: Deadline,
    pub(crate) timeline: NodeTimeline,
    pub(crate) first_token_at: Option<Instant>,
    has_second_token: bool,
    generated: &'a mut Generated,
}

/// The blocks a request was admitted with.
pub(crate) struct Admitted {
    pub(crate) num_cached_tokens: usize,
    pub(crate) blocks: Arc<[BlockId]>,
}

/// Serves one `Generate` stream to its end.
pub(crate) async fn serve(node: Arc<Node>, generate: Generate, mut sender: ControlSender, receiver: ControlReceiver) {
    let counted = node.metrics.count_request();
    let deadline = Deadline::now() + generate.deadline.min(DEADLINE_MAX);
    let mut generated = Generated::default();
    let outcome = run(&node, &generate, &mut sender, deadline, &mut generated).await;
    if !matches!(outcome, Err(End::Busy)) {
        generated.publish(&node, &generate);
    }
    let last = match outcome {
        Ok(timeline) => {
            node.metrics.observe(&timeline);
            tracing::info!(
                queue_ms = timeline.queue.as_secs_f64() * 1e3,
                prefill_ms = timeline.prefill.as_secs_f64() * 1e3,
                transfer_ms = timeline.transfer.as_secs_f64() * 1e3,
                handover_ms = timeline.handover.as_secs_f64() * 1e3,
                bytes = timeline.transferred_bytes,
                fetched = timeline.num_fetched_tokens,
                fetch_ms = timeline.fetch.as_secs_f64() * 1e3,
                cached = timeline.num_cached_tokens,
                local = timeline.is_local_prefill,
                "request done"
            );
            GenerateEvent::Done { timeline }
        }
        Err(End::Busy) => GenerateEvent::Busy { retry_after: RETRY_AFTER },
        Err(End::Failed(error)) => {
            if error.is_of_the_client() {
                tracing::info!(%error, "request refused");
            } else {
                tracing::warn!(%error, "request failed");
            }
            GenerateEvent::Failed(error)
        }
        Err(End::Gone) => {
            tracing::info!("the proxy reset the request");
            return;
        }
    };
    // Everything the request held is given back by now; a proxy that is gone needs no answer.
    let telling = async {
        if sender.send(&last).await.is_ok() {
            sender.finish();
            // A node that drains closes its connections when its requests have ended, and what the proxy does
            // not have by then is lost. It resolves when the proxy has all, stops the stream, or is gone.
            sender.stopped().await;
        }
    };
    // A proxy that lives and does not read is waited for no longer than the request had.
    let _ = tokio::time::timeout_at(deadline, telling).await;
    drop((receiver, counted));
}

async fn run(
    node: &Arc<Node>,
    generate: &Generate,
    sender: &mut ControlSender,
    deadline: Deadline,
    generated: &mut Generated,
) -> Result<NodeTimeline, End> {
    check(generate, node.engine.model().vocab_size).map_err(End::Failed)?;
    if node.is_draining() {
        return Err(End::Failed(NodeError::Draining));
    }
    let fence = node
        .fences
        .begin(generate.request, generate.attempt, &generate.choices)
        .ok_or(End::Failed(NodeError::Superseded))?;
    let is_split = !generate.prefill_candidates.is_empty();
    // A prefill node looks for itself; what it finds comes with the rest.
    let stored = if is_split { FoundPrefix::default() } else { stored::find(node, generate).await };
    let is_awaiting = is_split || stored.num_tokens() > 0;
    let sequence = NewSequence {
        tokens: generate.tokens.0.clone(),
        prompt_len: generate.prompt_len as usize,
        choices: generate.choices.clone(),
        params: Arc::new(generate.params.clone()),
        root: ChainRoot { salt: generate.salt.clone(), ..ChainRoot::of_model(node.engine.model().identity) },
        work: if is_awaiting { Work::AwaitKv } else { Work::Generate },
    };
    let sequence = node.engine.submit(sequence, usize::MAX).ok_or_else(engine_stopped)?;
    let timeline = NodeTimeline { is_local_prefill: !is_split, ..NodeTimeline::default() };
    let mut ongoing = Ongoing {
        node,
        generate,
        sender,
        load: None,
        sequence,
        fence,
        deadline,
        timeline,
        first_token_at: None,
        has_second_token: false,
        generated,
    };
    let admitted = ongoing.await_admission().await?;
    if !is_split {
        node.metrics.count_local_prefill();
    }
    ongoing.tell(&GenerateEvent::Accepted).await?;
    if is_split {
        if receive::receive_kv(&mut ongoing, admitted).await? == receive::Received::Finished {
            return Ok(ongoing.timeline);
        }
    } else if is_awaiting {
        ongoing.load = stored::load(&ongoing, &admitted, stored);
        match &ongoing.load {
            Some(load) => ongoing.sequence.compute_around(load.prefix().clone()),
            None => ongoing.sequence.compute_locally(admitted.num_cached_tokens, None),
        }
    }
    ongoing.stream_tokens().await?;
    Ok(ongoing.timeline)
}

/// What a well-behaved proxy never sends.
fn check(generate: &Generate, vocab_size: u32) -> Result<(), NodeError> {
    let invalid = |reason: String| Err(NodeError::Invalid { reason });
    let num_tokens = generate.tokens.0.len();
    if num_tokens == 0 || generate.prompt_len == 0 || generate.prompt_len as usize > num_tokens {
        return invalid(format!(
            "{num_tokens} tokens with a prompt of {}: expected 1 to {num_tokens}",
            generate.prompt_len
        ));
    }
    if let Some(token) = generate.tokens.0.iter().find(|token| **token >= vocab_size) {
        return invalid(format!("token {token} is not in the vocabulary of {vocab_size}"));
    }
    let distinct: std::collections::HashSet<ChoiceIndex> = generate.choices.iter().copied().collect();
    if distinct.is_empty() || distinct.len() != generate.choices.len() {
        return invalid("the choices must be distinct and at least one".to_string());
    }
    generate.params.check(vocab_size).map_err(|reason| NodeError::Invalid { reason })
}

fn engine_stopped() -> End {
    End::Failed(NodeError::Engine { reason: "it has stopped".to_string() })
}

impl Ongoing<'_> {
    /// Sends to the proxy. Its not reading holds this request back, and no other.
    pub(crate) async fn tell(&mut self, event: &GenerateEvent) -> Result<(), End> {
        tokio::select! {
            sent = self.sender.send(event) => sent.map_err(|_| End::Gone),
            end = interrupted(&self.fence, self.deadline, self.generate.deadline) => Err(end),
        }
    }

    /// Sends one token of a choice and keeps the books of the gap between #1 and #2.
    pub(crate) async fn tell_token(
        &mut self,
        choice: ChoiceIndex,
        index: u32,
        token: SampledToken,
        finish: Option<common::sampling::FinishReason>,
    ) -> Result<(), End> {
        let is_first_choice = choice == self.generate.choices[0];
        self.generated.push(choice, token.id);
        match self.first_token_at {
            None => {
                self.first_token_at = Some(Instant::now());
                let started = NodeTimeline { transferred_bytes: 0, transfer: Duration::ZERO, ..self.timeline };
                self.tell(&GenerateEvent::Started { timeline: started }).await?;
            }
            Some(first) if is_first_choice && !self.has_second_token => {
                self.timeline.first_gap = first.elapsed();
                self.has_second_token = true;
            }
            Some(_) => {}
        }
        self.tell(&GenerateEvent::Token { choice, index, token, finish }).await
    }

    /// Something that ends the request from outside.
    pub(crate) async fn next_engine_event(&mut self) -> Result<EngineEvent, End> {
        loop {
            let loaded = async {
                match &mut self.load {
                    Some(load) => load.ended().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.sender.stopped() => return Err(End::Gone),
                end = interrupted(&self.fence, self.deadline, self.generate.deadline) => return Err(end),
                // The engine hears of it from the prefix.
                _ = loaded => self.load = None,
                event = self.sequence.next() => return event.ok_or_else(engine_stopped),
            }
        }
    }

    async fn await_admission(&mut self) -> Result<Admitted, End> {
        match self.next_engine_event().await? {
            EngineEvent::Admitted { num_cached_tokens, blocks, queue } => {
                self.timeline.queue = queue;
                self.timeline.num_cached_tokens = num_cached_tokens as u32;
                Ok(Admitted { num_cached_tokens, blocks })
            }
            EngineEvent::Rejected(AddError::Full { .. }) => Err(End::Busy),
            EngineEvent::Rejected(AddError::TooManyChoices { num_choices, max_num_choices }) => {
                let [num_choices, max_num_choices] = [num_choices, max_num_choices].map(|num| num as u32);
                Err(End::Failed(NodeError::TooManyChoices { num_choices, max_num_choices }))
            }
            EngineEvent::Rejected(error) => Err(End::Failed(NodeError::Invalid { reason: error.to_string() })),
            EngineEvent::Failed { reason } => Err(End::Failed(NodeError::Engine { reason })),
            event => Err(End::Failed(unexpected(&event))),
        }
    }

    async fn stream_tokens(&mut self) -> Result<(), End> {
        let started_at = Instant::now();
        loop {
            match self.next_engine_event().await? {
                EngineEvent::Token { choice, index, token, finish } => {
                    if self.first_token_at.is_none() {
                        self.timeline.prefill = started_at.elapsed();
                    }
                    self.tell_token(choice, index, token, finish).await?;
                }
                EngineEvent::PrefixArrived { first_token, end_token } => {
                    if let Some(load) = &self.load {
                        load.on_met();
                    }
                    self.timeline.num_cached_tokens += (end_token - first_token) as u32;
                }
                EngineEvent::Finished => return Ok(()),
                EngineEvent::Failed { reason } => return Err(End::Failed(NodeError::Engine { reason })),
                event => return Err(End::Failed(unexpected(&event))),
            }
        }
    }
}

fn unexpected(event: &EngineEvent) -> NodeError {
    NodeError::Engine { reason: format!("it said {event:?} where that cannot come") }
}

/// Resolves when the request must end although nothing is wrong with it here: a newer attempt took over,
/// or the `allowed` time has passed.
pub(crate) async fn interrupted(fence: &Fence, deadline: Deadline, allowed: Duration) -> End {
    tokio::select! {
        () = fence.superseded() => End::Failed(NodeError::Superseded),
        () = tokio::time::sleep_until(deadline) => {
            End::Failed(NodeError::Stalled { phase: "the whole request".to_string(), waited: allowed })
        }
    }
}
