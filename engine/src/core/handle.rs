//! What the rest of a node sees of the engine: a handle to submit sequences, and one per request.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc as std_mpsc;
use std::time::Duration;

use common::block_manager::BlockCounts;
use common::content::ContentName;
use common::ids::{BlockId, ChoiceIndex};
use common::model::ModelInfo;
use common::sampling::{FinishReason, SampledToken};
use common::scheduler::{AddError, ArrivingPrefix, PinId, SchedulerLimits};
use common::sequence::NewSequence;
use common::wire::NodeLoad;
use tokio::sync::{mpsc, oneshot, watch};

use crate::pool::KvPool;

/// Names a request between its handle and the engine; drawn by the handle, so that it can cancel from its
/// first moment on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct RequestTicket(u64);

/// What the engine's inbox takes. A closed list: everything that can change its state is here.
pub(super) enum Command {
    /// Queue a sequence, or refuse it through the event channel.
    Submit {
        ticket: RequestTicket,
        sequence: Box<NewSequence>,
        first_reported_token: usize,
        events: mpsc::Sender<EngineEvent>,
    },
    /// The KV of an awaiting group is complete and verified.
    KvComplete { ticket: RequestTicket, first_tokens: Vec<SampledToken> },
    /// The KV of an awaiting group will not come.
    ComputeLocally { ticket: RequestTicket, num_valid_tokens: usize, first_tokens: Option<Vec<SampledToken>> },
    /// The KV of an awaiting group's beginning arrives while it is computed.
    ComputeAround { ticket: RequestTicket, prefix: Arc<ArrivingPrefix> },
    /// Schedule again: what an [`ArrivingPrefix`] allows may have changed.
    Wake,
    /// Drop a group.
    Cancel { ticket: RequestTicket },
    /// Change limits while running.
    SetLimits(Box<dyn FnOnce(&mut SchedulerLimits) + Send>),
    /// Keep cached blocks from being given away while somebody reads them.
    Pin { pin: PinId, names: Vec<ContentName>, pinned: oneshot::Sender<Vec<BlockId>> },
    /// They have been read.
    Unpin { pin: PinId },
    /// Forget unreferenced cached blocks.
    ClearCache,
    /// The runner is done with a step.
    StepDone,
    /// Stop the thread.
    Shutdown,
}

/// The way into the engine. When the last handle that has it is gone, the engine is told to stop.
#[derive(Debug)]
pub(super) struct Inbox(pub(super) std_mpsc::Sender<Command>);

impl Inbox {
    fn send(&self, command: Command) -> Result<(), std_mpsc::SendError<Command>> {
        self.0.send(command)
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        // It may have stopped already.
        let _ = self.0.send(Command::Shutdown);
    }
}

/// What happens to a request's sequence.
#[derive(Debug, Clone, PartialEq)]
pub enum EngineEvent {
    /// Not taken; nothing is held.
    Rejected(AddError),
    /// It has its blocks.
    Admitted {
        /// Tokens whose KV was in the pool.
        num_cached_tokens: usize,
        /// Block table, reservation included.
        blocks: Arc<[BlockId]>,
        /// Time in the queue.
        queue: Duration,
    },
    /// KV that has arrived is used from now on ([`RequestHandle::compute_around`]); nothing more is awaited.
    PrefixArrived {
        /// Where it begins.
        first_token: usize,
        /// One behind its end; `first_token` if nothing that arrived was used.
        end_token: usize,
    },
    /// K and V of these tokens are in the pool for one layer. Only for sequences that asked for it.
    LayerWritten {
        /// Layer number.
        layer: u32,
        /// Position of the first token.
        first_token: usize,
        /// How many.
        num_tokens: usize,
    },
    /// Prefill node: token #1 of each choice, and the time from admission to them.
    FirstTokens {
        /// One per choice.
        tokens: Vec<SampledToken>,
        /// From admission.
        prefill: Duration,
    },
    /// One more token of a choice.
    Token {
        /// Which choice.
        choice: ChoiceIndex,
        /// Index among its generated tokens.
        index: u32,
        /// The token.
        token: SampledToken,
        /// Set with the last one.
        finish: Option<FinishReason>,
    },
    /// All choices finished; at the end of the step in flight nothing is held.
    Finished,
    /// The engine is not able to go on.
    Failed {
        /// What it said.
        reason: String,
    },
}

/// A snapshot of the engine, renewed with every step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct EngineStatus {
    /// For routing.
    pub load: NodeLoad,
    /// Blocks by state.
    pub blocks: BlockCounts,
    /// Prompt tokens that the running sequences have yet to compute.
    pub num_running_prompt_tokens: u64,
    /// How fast prompts were computed lately, beside whatever else was in their steps; `None` before the first.
    pub prefill_tokens_per_second: Option<f64>,
    /// Sequences known, in any state.
    pub is_idle: bool,
    /// Set once the engine failed; it takes nothing any more.
    pub failure: Option<String>,
}

/// Submits sequences to an engine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    pub(super) inbox: Arc<Inbox>,
    pub(super) status: watch::Receiver<EngineStatus>,
    pub(super) model: Arc<ModelInfo>,
    pub(super) pool: Arc<KvPool>,
    pub(super) next_ticket: Arc<AtomicU64>,
}

impl EngineHandle {
    /// Queues a sequence. Layers written for tokens from `first_reported_token` on are reported
    /// (`usize::MAX`: none).
    ///
    /// The handle's first event is [`EngineEvent::Rejected`] or [`EngineEvent::Admitted`]. `None` if the
    /// engine has stopped.
    pub fn submit(&self, sequence: NewSequence, first_reported_token: usize) -> Option<RequestHandle> {
        let (events, receiver) = mpsc::channel(self.num_events_max(&sequence, first_reported_token));
        let ticket = RequestTicket(self.next_ticket.fetch_add(1, Ordering::Relaxed));
        let sequence = Box::new(sequence);
        self.inbox.send(Command::Submit { ticket, sequence, first_reported_token, events }).ok()?;
        Some(RequestHandle { ticket, events: receiver, inbox: self.inbox.clone() })
    }

    /// Every event the sequence can cause.
    fn num_events_max(&self, sequence: &NewSequence, first_reported_token: usize) -> usize {
        let num_tokens_max = (sequence.params.max_tokens as usize).min(self.model.max_model_len as usize) + 1;
        let num_reported = sequence.tokens.len().saturating_sub(first_reported_token);
        let num_chunks_max = num_reported.div_ceil(common::content::GRANULE_TOKENS) + 1;
        let num_layer_events =
            if num_reported > 0 { num_chunks_max * self.model.kv_spec.num_layers() as usize } else { 0 };
        // What arrives is passed over once for every hole in it, behind a granule that is computed.
        let num_arrivals_max = sequence.tokens.len() / common::content::GRANULE_TOKENS / 2;
        sequence.choices.len() * num_tokens_max + num_layer_events + num_arrivals_max + 8
    }

    /// The model it runs.
    pub fn model(&self) -> &Arc<ModelInfo> {
        &self.model
    }

    /// The memory its KV is in.
    pub fn pool(&self) -> &Arc<KvPool> {
        &self.pool
    }

    /// Renewed with every step.
    pub fn status(&self) -> watch::Receiver<EngineStatus> {
        self.status.clone()
    }

    /// Engine steps since the start: what progress deadlines are fed from.
    pub fn num_steps(&self) -> u64 {
        self.status.borrow().load.num_steps
    }

    /// Changes seats, budgets or queue length while running.
    pub fn set_limits(&self, change: impl FnOnce(&mut SchedulerLimits) + Send + 'static) {
        // An engine that has stopped has no limits to change.
        let _ = self.inbox.send(Command::SetLimits(Box::new(change)));
    }

    /// Keeps the leading blocks of the granules `names` that are in the pool where they are, until what is returned
    /// is dropped. `None`: there are none, or the engine has stopped.
    pub async fn pin_prefix(&self, names: Vec<ContentName>) -> Option<PinnedPrefix> {
        let pin = PinId(self.next_ticket.fetch_add(1, Ordering::Relaxed));
        let (sender, pinned) = oneshot::channel();
        self.inbox.send(Command::Pin { pin, names, pinned: sender }).ok()?;
        // From here on a drop undoes it, also while the answer is awaited.
        let mut prefix = PinnedPrefix { blocks: Vec::new(), pin, inbox: self.inbox.clone() };
        prefix.blocks = pinned.await.ok()?;
        (!prefix.blocks.is_empty()).then_some(prefix)
    }

    /// Forgets cached blocks that nobody holds.
    pub fn clear_cache(&self) {
        let _ = self.inbox.send(Command::ClearCache);
    }

    /// Has the engine schedule again, if it waits: an [`ArrivingPrefix`] may allow more than before.
    pub fn wake(&self) {
        // A stopped engine schedules nothing.
        let _ = self.inbox.send(Command::Wake);
    }

    /// Stops the engine's thread; running requests fail.
    pub fn shutdown(&self) {
        let _ = self.inbox.send(Command::Shutdown);
    }
}

/// One request in the engine. Dropping it cancels the request and gives its blocks back.
#[derive(Debug)]
pub struct RequestHandle {
    ticket: RequestTicket,
    events: mpsc::Receiver<EngineEvent>,
    inbox: Arc<Inbox>,
}

impl RequestHandle {
    /// The next event; `None` once the engine has let go of the request. Cancel-safe.
    pub async fn next(&mut self) -> Option<EngineEvent> {
        self.events.recv().await
    }

    /// An event that is already there.
    pub fn try_next(&mut self) -> Option<EngineEvent> {
        self.events.try_recv().ok()
    }

    /// All KV has landed and was verified; these tokens #1 were already delivered.
    pub fn on_kv_complete(&self, first_tokens: Vec<SampledToken>) {
        self.send(Command::KvComplete { ticket: self.ticket, first_tokens });
    }

    /// The KV will not come: compute behind the first `num_valid_tokens` here.
    pub fn compute_locally(&self, num_valid_tokens: usize, first_tokens: Option<Vec<SampledToken>>) {
        self.send(Command::ComputeLocally { ticket: self.ticket, num_valid_tokens, first_tokens });
    }

    /// Compute here, while the KV of `prefix` arrives in the request's blocks. Whoever places it there wakes the
    /// engine ([`EngineHandle::wake`]) when the goal rises and when nothing more comes.
    pub fn compute_around(&self, prefix: Arc<ArrivingPrefix>) {
        self.send(Command::ComputeAround { ticket: self.ticket, prefix });
    }

    fn send(&self, command: Command) {
        // A stopped engine has failed this request through its event channel.
        let _ = self.inbox.send(command);
    }
}

impl Drop for RequestHandle {
    fn drop(&mut self) {
        self.send(Command::Cancel { ticket: self.ticket });
    }
}

/// Blocks of the pool that keep their content until this is dropped.
#[derive(Debug)]
pub struct PinnedPrefix {
    blocks: Vec<BlockId>,
    pin: PinId,
    inbox: Arc<Inbox>,
}

impl PinnedPrefix {
    /// Their block table, from the first token on.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }
}

impl Drop for PinnedPrefix {
    fn drop(&mut self) {
        // A stopped engine has no books any more.
        let _ = self.inbox.send(Command::Unpin { pin: self.pin });
    }
}
