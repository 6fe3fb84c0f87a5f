//! Continuous batching under one token budget: which sequence computes how many tokens in the next step,
//! and which blocks it may write.
//!
//! A prompt chunk and a decode token are the same thing, tokens that have no KV yet. A step is filled in
//! this order, which is also the order of rights to a block (DESIGN 2.7):
//!
//! 1. growth of running sequences, oldest first; where no block is left, the youngest is preempted (`parking`),
//! 2. prompt chunks of running sequences,
//! 3. parked sequences, 4. new ones.
//!
//! The oldest running sequence is never preempted, so something always finishes. A sequence that is
//! admitted gets every block of its tokens at once, and a growth window; one without them holds nothing.
//!
//! Pure: [`Scheduler::schedule`] says what to do, the engine's loop does it and reports back with
//! [`Scheduler::on_step_done`]. What the loop must do with the blocks of a step, in this order: make
//! [`ScheduledStep::saves`], clear [`ScheduledStep::fresh_blocks`], make [`ScheduledStep::restores`], then compute;
//! the first three also where nothing is computed. Between two steps [`Scheduler::admit_awaiting`] lets in who
//! computes nothing yet. Copies of a fork ([`Scheduler::take_copies`]) are made at once.
//!
//! **Steps in flight.** The next step may be scheduled before the last one's outcome is known. What makes
//! that safe: a block is given back only when no step in flight writes it or holds the last reference, nothing is
//! preempted while a step is in flight ([`ScheduledStep::is_starved`]), content is named only once it is
//! computed, and a sequence runs ahead of its own draw only where that draw cannot change the step
//! ([`Sequence::can_run_ahead`]).

mod admission;
mod arriving;
mod fork;
mod parking;
mod pins;
mod step;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use crate::block_events::{BlockEvent, Medium, StoredBlock};
use crate::block_manager::{BlockCounts, BlockManager};
use crate::content::GRANULE_TOKENS;
use crate::eviction::EvictionPolicy;
use crate::ids::{BlockId, ChoiceIndex, SequenceId};
use crate::sampling::{FinishReason, SampledToken};
use crate::sequence::{NewSequence, Sequence, SequenceState};
use crate::wire::NodeLoad;

pub use admission::AddError;
pub use arriving::ArrivingPrefix;
pub use parking::{BlockCopy, PreemptionCounts};
pub use pins::PinId;
pub use step::{ScheduledSpan, ScheduledStep};

/// What a scheduler may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerLimits {
    /// Tokens per block, a multiple of the granule.
    pub block_size: usize,
    /// Blocks in the pool.
    pub num_blocks: usize,
    /// Choices that run or await their KV at once.
    pub max_num_seqs: usize,
    /// Tokens per step, prompt chunks and decode tokens together.
    pub max_num_batched_tokens: usize,
    /// Of these, prompt tokens at most while something decodes.
    pub max_num_prefill_tokens: usize,
    /// Sequences in the queue.
    pub max_num_waiting: usize,
    /// Longest sequence in tokens.
    pub max_model_len: usize,
    /// Blocks reserved per choice beyond those of the tokens known at admission.
    pub growth_blocks: usize,
    /// Blocks whose content may be kept in host memory for parked sequences.
    pub max_num_parked_blocks: usize,
    /// Blocks that a step copies to and from host memory, at least one, beside those that growth cannot do without.
    pub max_num_copied_blocks: usize,
    /// Whether blocks are named and found again.
    pub is_prefix_caching: bool,
    /// Which cached block is given away first.
    pub eviction_policy: EvictionPolicy,
}

/// Something that happened to a sequence and that its request must hear.
#[derive(Debug, Clone, PartialEq)]
pub enum SequenceEvent {
    /// It has its blocks.
    Admitted {
        /// Tokens whose KV was found in the pool.
        num_cached_tokens: usize,
        /// Block table, reservation included.
        blocks: Vec<BlockId>,
    },
    /// KV that has arrived for it ([`Scheduler::on_compute_around`]) is used from now on. Nothing more is awaited.
    PrefixArrived {
        /// Where it begins.
        first_token: usize,
        /// One behind its end; `first_token` if all was computed.
        end_token: usize,
    },
    /// Prefill node: token #1 of each choice.
    FirstTokens(Vec<SampledToken>),
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
    /// All choices finished. What a step in flight still computes with is given back when it is done.
    Finished,
}

/// An event and the group (the id returned by [`Scheduler::add`]) it is for.
pub type GroupEvent = (SequenceId, SequenceEvent);

/// A token drawn by the runner.
#[derive(Debug, Clone, PartialEq)]
pub struct DrawnToken {
    /// For which sequence.
    pub sequence: SequenceId,
    /// For which of its choices.
    pub choice: ChoiceIndex,
    /// The token.
    pub token: SampledToken,
}

/// What is left of a sequence that ended ahead of its steps.
#[derive(Debug)]
struct Ending {
    blocks: Vec<BlockId>,
    num_steps_in_flight: usize,
}

/// See the module.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    blocks: BlockManager,
    sequences: HashMap<SequenceId, Sequence>,
    /// New sequences, in order of arrival.
    waiting: VecDeque<SequenceId>,
    /// Preempted sequences, (arrival, id) ascending, as are all such sets.
    parked: BTreeSet<(u64, SequenceId)>,
    /// Preempted sequences whose blocks are being saved.
    saving: BTreeSet<(u64, SequenceId)>,
    /// Those that come back.
    restoring: BTreeSet<(u64, SequenceId)>,
    /// Computing sequences.
    running: BTreeSet<(u64, SequenceId)>,
    /// Live choices of each group.
    groups: HashMap<SequenceId, Vec<SequenceId>>,
    /// Blocks of sequences that ended while steps in flight still compute with them.
    ending: HashMap<SequenceId, Ending>,
    /// Blocks that are read outside of any sequence.
    pins: HashMap<PinId, Vec<BlockId>>,
    num_steps_in_flight: usize,
    num_scheduled_steps: u64,
    copies: Vec<(BlockId, BlockId)>,
    num_parked_blocks: usize,
    /// Of the step that is being scheduled.
    num_copies_left: usize,
    next_id: u64,
    preemptions: PreemptionCounts,
}

impl Scheduler {
    /// A scheduler over an empty pool.
    pub fn new(limits: SchedulerLimits) -> Self {
        Self {
            limits,
            blocks: BlockManager::with_policy(limits.num_blocks, limits.eviction_policy),
            sequences: HashMap::new(),
            waiting: VecDeque::new(),
            parked: BTreeSet::new(),
            saving: BTreeSet::new(),
            restoring: BTreeSet::new(),
            running: BTreeSet::new(),
            groups: HashMap::new(),
            ending: HashMap::new(),
            pins: HashMap::new(),
            num_steps_in_flight: 0,
            num_scheduled_steps: 0,
            copies: Vec::new(),
            num_parked_blocks: 0,
            num_copies_left: 0,
            next_id: 0,
            preemptions: PreemptionCounts::default(),
        }
    }

    /// Its limits.
    pub fn limits(&self) -> &SchedulerLimits {
        &self.limits
    }

    /// Changes the limits that may change while running: seats, token budgets, queue length.
    pub fn set_limits(&mut self, change: impl FnOnce(&mut SchedulerLimits)) {
        let fixed = self.limits;
        change(&mut self.limits);
        self.limits.block_size = fixed.block_size;
        self.limits.num_blocks = fixed.num_blocks;
        self.limits.max_model_len = fixed.max_model_len;
        self.limits.eviction_policy = fixed.eviction_policy;
    }

    /// Puts a sequence into the queue.
    ///
    /// # Errors
    /// [`AddError::Full`] if the queue is; the others if it can never run here.
    pub fn add(&mut self, new: NewSequence) -> Result<SequenceId, AddError> {
        self.check_admissible(&new)?;
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, Sequence::new(id, id.0, new));
        self.waiting.push_back(id);
        self.groups.insert(id, vec![id]);
        Ok(id)
    }

    /// Drops all sequences of a group and gives their blocks back; also how a prefill node releases what
    /// it held. What a step in flight still computes with is given back when that step is done. Returns
    /// the sequences of which something is saved, or was about to be: it can be dropped. An unknown group is
    /// nothing to do.
    pub fn cancel(&mut self, group: SequenceId) -> Vec<SequenceId> {
        let mut parked = Vec::new();
        for id in self.groups.remove(&group).unwrap_or_default() {
            if self.sequences.get(&id).is_some_and(|sequence| sequence.num_parked_tokens > 0) {
                parked.push(id);
            }
            self.remove(id);
        }
        parked
    }

    /// All KV of an awaiting group has landed and was verified; `first_tokens` (one per choice) are
    /// already delivered. It joins the running batch. An unknown group (cancelled) is nothing to do.
    pub fn on_kv_complete(&mut self, group: SequenceId, first_tokens: Vec<SampledToken>) -> Vec<GroupEvent> {
        let mut events = Vec::new();
        let Some(sequence) = self.sequences.get_mut(&group).filter(|s| s.state == SequenceState::AwaitingKv) else {
            return events;
        };
        sequence.num_computed_tokens = sequence.tokens.len();
        sequence.become_state(SequenceState::Computing);
        self.running.insert((sequence.arrival, group));
        self.publish(group);
        self.continue_with(group, first_tokens, false, &mut events);
        events
    }

    /// An awaiting group's KV will not come: compute here what is missing behind the first
    /// `num_valid_tokens`, a multiple of the granule. `first_tokens`, if already delivered, are kept. An
    /// unknown group is nothing to do.
    pub fn on_compute_locally(
        &mut self,
        group: SequenceId,
        num_valid_tokens: usize,
        first_tokens: Option<Vec<SampledToken>>,
    ) {
        let Some(sequence) = self.sequences.get_mut(&group).filter(|s| s.state == SequenceState::AwaitingKv) else {
            return;
        };
        // The last token is computed in any case: its logits are what the next token is drawn from.
        let last_granule = (sequence.tokens.len() - 1) / GRANULE_TOKENS;
        sequence.num_computed_tokens = num_valid_tokens.min(last_granule * GRANULE_TOKENS);
        sequence.delivered_first_tokens = first_tokens;
        sequence.become_state(SequenceState::Computing);
        self.running.insert((sequence.arrival, group));
        self.publish(group);
    }

    /// As [`on_compute_locally`](Self::on_compute_locally) with as many valid tokens as `prefix` begins behind;
    /// what it stands for may arrive while it is computed ([`ArrivingPrefix`]). A group that does not wait for KV
    /// (cancelled) closes it.
    pub fn on_compute_around(&mut self, group: SequenceId, prefix: Arc<ArrivingPrefix>) {
        let is_awaiting = |sequence: &&Sequence| sequence.state == SequenceState::AwaitingKv;
        if self.sequences.get(&group).filter(is_awaiting).is_none() {
            prefix.close();
            return;
        }
        self.on_compute_locally(group, prefix.num_claimed_tokens(), None);
        let sequence = self.sequences.get_mut(&group).expect("looked up above");
        assert!(prefix.end_token() < sequence.tokens.len(), "the last token is computed in any case");
        sequence.arriving = Some(prefix);
    }

    /// A sequence by id.
    pub fn sequence(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// Copies (source, destination) that a fork asks for; to be made before anything else is computed.
    pub fn take_copies(&mut self) -> Vec<(BlockId, BlockId)> {
        std::mem::take(&mut self.copies)
    }

    /// Whether nothing is queued, running, parked or held.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty() && self.ending.is_empty()
    }

    /// Blocks by state.
    pub fn block_counts(&self) -> BlockCounts {
        self.blocks.counts()
    }

    /// What became of preempted sequences since the start.
    pub fn preemptions(&self) -> PreemptionCounts {
        self.preemptions
    }

    /// Prompt tokens that running sequences have yet to compute: what a sequence that joins them waits for.
    pub fn num_running_prompt_tokens(&self) -> usize {
        let running = self.running.iter().map(|(_, id)| &self.sequences[id]);
        let computing = running.filter(|sequence| !sequence.is_decoding());
        computing.map(Sequence::num_tokens_to_compute).sum()
    }

    /// For routing.
    pub fn load(&self, num_steps: u64) -> NodeLoad {
        let queued = self.sequences.values().map(|s| s.num_tokens_to_compute() as u64).sum();
        NodeLoad {
            num_running: self.running.len() as u32,
            num_waiting: (self.waiting.len() + self.saving.len() + self.parked.len() + self.restoring.len()) as u32,
            num_queued_tokens: queued,
            num_available_blocks: self.blocks.num_available() as u32,
            num_blocks: self.limits.num_blocks as u32,
            num_steps,
        }
    }

    /// Forgets all cached blocks that nobody holds.
    pub fn clear_cache(&mut self) {
        self.blocks.clear_cached();
    }

    /// From now on what happens to named blocks is noted for [`take_block_events`](Self::take_block_events).
    pub fn note_block_events(&mut self) {
        self.blocks.journal.turn_on();
    }

    /// What happened to named blocks since the last call, in order.
    pub fn take_block_events(&mut self) -> Vec<BlockEvent> {
        self.blocks.journal.take()
    }

    /// Proves that the books balance.
    ///
    /// # Errors
    /// A sentence about the first contradiction.
    pub fn check_integrity(&self) -> Result<(), String> {
        self.blocks.check_integrity()?;
        self.check_parking()?;
        let mut held: HashMap<BlockId, usize> = HashMap::new();
        for sequence in self.sequences.values() {
            if !sequence.state.holds_blocks() && !sequence.blocks.is_empty() {
                return Err(format!("{} holds blocks while {:?}", sequence.id, sequence.state));
            }
            for id in &sequence.blocks {
                *held.entry(*id).or_default() += 1;
            }
        }
        let ending = self.ending.values().flat_map(|ending| &ending.blocks);
        for id in ending.chain(self.pins.values().flatten()) {
            *held.entry(*id).or_default() += 1;
        }
        if self.num_steps_in_flight == 0 && !self.ending.is_empty() {
            return Err(format!("{} sequences wait for steps, but none is in flight", self.ending.len()));
        }
        let counts = self.blocks.counts();
        if held.len() != counts.referenced {
            return Err(format!("sequences and pins hold {} blocks, {} are referenced", held.len(), counts.referenced));
        }
        let in_groups: usize = self.groups.values().map(Vec::len).sum();
        if in_groups != self.sequences.len() {
            return Err(format!("{} sequences, {in_groups} in groups", self.sequences.len()));
        }
        Ok(())
    }

    /// Names the blocks that have become full.
    fn publish(&mut self, id: SequenceId) {
        if !self.limits.is_prefix_caching {
            return;
        }
        let sequence = self.sequences.get_mut(&id).expect("published sequences are known");
        sequence.chain.extend(&sequence.tokens);
        let block_size = self.limits.block_size;
        let num_full = sequence.num_computed_tokens / block_size;
        let unnamed = sequence.num_published_blocks;
        for (index, name) in sequence.chain.blocks(block_size).enumerate().take(num_full).skip(unnamed) {
            if self.blocks.publish(sequence.blocks[index], name) {
                let positions = index * block_size..(index + 1) * block_size;
                let parent = (positions.start / GRANULE_TOKENS).checked_sub(1);
                self.blocks.journal.on_stored(|| StoredBlock {
                    medium: Medium::Pool,
                    key: name.key,
                    parent: parent.map(|granule| sequence.chain.granules()[granule].key),
                    tokens: sequence.tokens[positions].into(),
                });
            }
        }
        sequence.num_published_blocks = num_full.max(unnamed);
    }

    /// Forgets a sequence and gives its blocks back, at once or when the last step that names them is done.
    fn remove(&mut self, id: SequenceId) {
        let Some(mut sequence) = self.sequences.remove(&id) else { return };
        // Before its blocks can be anybody else's.
        sequence.stop_arriving();
        let num_steps_in_flight = sequence.in_flight.num_steps;
        if num_steps_in_flight == 0 {
            self.blocks.release(&sequence.blocks);
        } else {
            let blocks = std::mem::take(&mut sequence.blocks);
            self.ending.insert(id, Ending { blocks, num_steps_in_flight });
        }
        match sequence.state {
            SequenceState::Waiting => self.waiting.retain(|other| *other != id),
            SequenceState::Saving | SequenceState::Parked | SequenceState::Restoring | SequenceState::Computing => {
                for set in [&mut self.saving, &mut self.parked, &mut self.restoring, &mut self.running] {
                    set.remove(&(sequence.arrival, id));
                }
                self.num_parked_blocks -= sequence.num_parked_blocks(self.limits.block_size);
            }
            SequenceState::AwaitingKv | SequenceState::Held => {}
        }
        if let Some(members) = self.groups.get_mut(&sequence.group) {
            members.retain(|other| *other != id);
        }
    }
}
