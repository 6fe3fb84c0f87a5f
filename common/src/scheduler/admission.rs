//! Who may come in: checked once when added, and again when there is room.

use crate::content::GRANULE_TOKENS;
use crate::ids::{BlockId, SequenceId};
use crate::scheduler::step::ScheduledStep;
use crate::scheduler::{Scheduler, SequenceEvent};
use crate::sequence::{NewSequence, SequenceState, Work};

/// A sequence that was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// Later, or elsewhere.
    #[error("the queue is full ({max_num_waiting} requests are waiting): try again later or raise --max-num-waiting")]
    Full {
        /// The queue's bound.
        max_num_waiting: usize,
    },
    /// Longer than the model or the pool allows.
    #[error("the request has {num_tokens} tokens, but at most {max_num_tokens} fit ({reason}): shorten it")]
    TooLong {
        /// Its tokens.
        num_tokens: usize,
        /// Most that fit.
        max_num_tokens: usize,
        /// What limits it.
        reason: &'static str,
    },
    /// More choices than seats or blocks.
    #[error("the request asks for {num_choices} choices, but at most {max_num_choices} can run at once here: lower n")]
    TooManyChoices {
        /// Its choices.
        num_choices: usize,
        /// Most that can run.
        max_num_choices: usize,
    },
    /// No token or no choice.
    #[error("a request needs at least one token and one choice")]
    Empty,
}

impl Scheduler {
    pub(super) fn check_admissible(&self, new: &NewSequence) -> Result<(), AddError> {
        let limits = &self.limits;
        if new.tokens.is_empty() || new.choices.is_empty() {
            return Err(AddError::Empty);
        }
        let num_tokens = new.tokens.len();
        if num_tokens >= limits.max_model_len {
            let (max_num_tokens, reason) = (limits.max_model_len - 1, "--max-model-len, with one token to generate");
            return Err(AddError::TooLong { num_tokens, max_num_tokens, reason });
        }
        let num_pool_tokens = limits.num_blocks * limits.block_size;
        let num_tokens_max = match new.work {
            Work::PrefillOnly | Work::PrefillBehind { .. } => num_tokens,
            Work::Generate | Work::AwaitKv => {
                (new.prompt_len + new.params.max_tokens as usize).min(limits.max_model_len).max(num_tokens + 1)
            }
        };
        if num_tokens_max.div_ceil(limits.block_size) > limits.num_blocks {
            let reason = "the KV cache is that small: raise --kv-cache-memory-bytes or lower max_tokens";
            return Err(AddError::TooLong { num_tokens: num_tokens_max, max_num_tokens: num_pool_tokens, reason });
        }
        if !new.work.is_prefill_only() {
            let num_left = limits.num_blocks.saturating_sub(num_tokens.div_ceil(limits.block_size));
            let max_num_choices = limits.max_num_seqs.min(num_left / limits.growth_blocks.max(1)).max(1);
            if new.choices.len() > max_num_choices {
                return Err(AddError::TooManyChoices { num_choices: new.choices.len(), max_num_choices });
            }
        }
        if self.waiting.len() >= limits.max_num_waiting {
            return Err(AddError::Full { max_num_waiting: limits.max_num_waiting });
        }
        Ok(())
    }

    /// Lets parked, then new sequences in while there are seats and blocks. A sequence that is still being saved
    /// is one of the first.
    pub(super) fn admit(&mut self, step: &mut ScheduledStep) {
        while let Some((arrival, id)) = self.parked.first().copied() {
            // Who comes back takes the place of nobody: a block for each that runs, or it would be preempted again.
            if !self.admit_one(id, self.running.len(), step) {
                return;
            }
            self.parked.remove(&(arrival, id));
        }
        if !self.saving.is_empty() {
            return;
        }
        while let Some(id) = self.waiting.front().copied() {
            if !self.admit_one(id, 0, step) {
                return;
            }
            self.waiting.pop_front();
        }
    }

    /// Lets new sequences in that await their KV from elsewhere, also while steps are in flight: what they wait for
    /// takes longer than a step, and can be asked for before it ends. Nobody loses a right by it: whoever has an
    /// older one to a block goes first, and a block is left for each sequence that runs.
    ///
    /// What comes back has nothing to compute; its fresh blocks and events are those of a step.
    pub fn admit_awaiting(&mut self) -> ScheduledStep {
        let mut step = ScheduledStep::default();
        if !(self.saving.is_empty() && self.parked.is_empty() && self.restoring.is_empty()) {
            return step;
        }
        while let Some(id) = self.waiting.front().copied()
            && self.sequences[&id].work == Work::AwaitKv
            && self.admit_one(id, self.running.len(), &mut step)
        {
            self.waiting.pop_front();
        }
        step
    }

    fn num_seats_taken(&self) -> usize {
        let seated =
            |state| matches!(state, SequenceState::Computing | SequenceState::AwaitingKv | SequenceState::Restoring);
        self.sequences.values().filter(|s| seated(s.state)).map(|s| s.choices.len()).sum()
    }

    /// Whether there was a seat for `id`, and blocks with `num_spare` left over.
    fn admit_one(&mut self, id: SequenceId, num_spare: usize, step: &mut ScheduledStep) -> bool {
        let limits = self.limits;
        let num_seats_taken = self.num_seats_taken();
        let sequence = &self.sequences[&id];
        if num_seats_taken > 0 && num_seats_taken + sequence.choices.len() > limits.max_num_seqs {
            return false;
        }
        let hits = self.find_hits(id);
        let num_blocks = self.num_blocks_to_reserve(id);
        let num_new = num_blocks.saturating_sub(hits.len());
        if num_new + num_spare + self.blocks.num_unreferenced(&hits) > self.blocks.num_available() {
            return false;
        }
        self.blocks.acquire(&hits);
        let fresh = self.blocks.allocate(num_new).expect("availability was checked with the hits counted out");
        self.seat(id, hits, fresh, step);
        true
    }

    /// Leading blocks that are in the pool. Never the one with the last token: its logits are needed.
    fn find_hits(&self, id: SequenceId) -> Vec<BlockId> {
        if !self.limits.is_prefix_caching {
            return Vec::new();
        }
        let sequence = &self.sequences[&id];
        let num_blocks_max = (sequence.tokens.len() - 1) / self.limits.block_size;
        self.blocks.longest_prefix(sequence.chain.blocks(self.limits.block_size).take(num_blocks_max))
    }

    fn num_blocks_to_reserve(&self, id: SequenceId) -> usize {
        let sequence = &self.sequences[&id];
        let num_blocks = sequence.tokens.len().div_ceil(self.limits.block_size);
        match sequence.work {
            Work::PrefillOnly | Work::PrefillBehind { .. } => num_blocks,
            Work::Generate | Work::AwaitKv => {
                let wanted = num_blocks + self.limits.growth_blocks.max(1) * sequence.choices.len();
                wanted.min(self.limits.num_blocks)
            }
        }
    }

    fn seat(&mut self, id: SequenceId, hits: Vec<BlockId>, fresh: Vec<BlockId>, step: &mut ScheduledStep) {
        let block_size = self.limits.block_size;
        let num_hit_tokens = hits.len() * block_size;
        let sequence = self.sequences.get_mut(&id).expect("admitted sequences are known");
        sequence.num_published_blocks = hits.len();
        let num_restored_blocks = sequence.num_parked_blocks(block_size).saturating_sub(hits.len());
        // What its tokens fill is written as a whole before it is read, whether it is restored, computed or arrives.
        // A long prompt would otherwise stop everybody else for as long as its KV takes to clear.
        let num_filled_blocks = (sequence.tokens.len() / block_size).saturating_sub(hits.len());
        step.fresh_blocks.extend_from_slice(&fresh[num_filled_blocks.max(num_restored_blocks)..]);
        sequence.num_restored_blocks = hits.len();
        sequence.blocks = hits;
        sequence.blocks.extend(fresh);
        let was_parked = sequence.state == SequenceState::Parked;
        if was_parked && num_restored_blocks > 0 {
            sequence.become_state(SequenceState::Restoring);
            self.restoring.insert((sequence.arrival, id));
            return;
        }
        if was_parked {
            sequence.num_computed_tokens = num_hit_tokens;
            sequence.become_state(SequenceState::Computing);
        } else {
            sequence.num_computed_tokens = num_hit_tokens;
            sequence.num_cached_tokens = num_hit_tokens;
            let is_awaiting = sequence.work.awaits_kv(num_hit_tokens);
            sequence.become_state(if is_awaiting { SequenceState::AwaitingKv } else { SequenceState::Computing });
            let event = SequenceEvent::Admitted { num_cached_tokens: num_hit_tokens, blocks: sequence.blocks.clone() };
            step.events.push((id, event));
        }
        debug_assert!(sequence.num_computed_tokens < sequence.tokens.len());
        debug_assert!(was_parked || sequence.num_computed_tokens.is_multiple_of(GRANULE_TOKENS));
        if sequence.state == SequenceState::Computing {
            self.running.insert((sequence.arrival, id));
        }
        if was_parked {
            self.forget_parked(id, step);
        }
    }
}
