//! One step: who computes what, and what came of it.

use crate::content::GRANULE_TOKENS;
use crate::ids::{BlockId, SequenceId};
use crate::scheduler::{DrawnToken, GroupEvent, Scheduler};
use crate::sequence::SequenceState;

/// Tokens of one sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScheduledSpan {
    /// Whose.
    pub sequence: SequenceId,
    /// Position of the first.
    pub first_token: usize,
    /// How many (`num_scheduled_tokens`).
    pub num_tokens: usize,
    /// Whether the span reaches the sequence's end, so that the next token is drawn.
    pub is_sampled: bool,
}

/// A preempted sequence whose KV is to be saved in host memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Park {
    /// Whose.
    pub sequence: SequenceId,
    /// Its blocks with content, in order; no longer its own after this step.
    pub blocks: Vec<BlockId>,
}

/// A parked sequence that comes back: saved block `first_block + i` goes into `blocks[i]`. The saved
/// content can be dropped afterwards (`blocks` is empty if the pool still had all of it).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpark {
    /// Whose.
    pub sequence: SequenceId,
    /// Index of the first block to restore in the saved content.
    pub first_block: usize,
    /// Where to.
    pub blocks: Vec<BlockId>,
}

/// What to do next. The order of the fields is the order of execution.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScheduledStep {
    /// KV to save.
    pub parks: Vec<Park>,
    /// Blocks that must read as zero before anyone uses them.
    pub fresh_blocks: Vec<BlockId>,
    /// KV to restore.
    pub unparks: Vec<Unpark>,
    /// What to tell.
    pub events: Vec<GroupEvent>,
    /// What to compute.
    pub spans: Vec<ScheduledSpan>,
}

impl Scheduler {
    /// Plans the next step. `spans` is empty if nothing can be computed now.
    pub fn schedule(&mut self) -> ScheduledStep {
        let mut step = ScheduledStep::default();
        let num_decode_tokens = self.schedule_decodes(&mut step);
        let mut budget = self.limits.max_num_batched_tokens.saturating_sub(num_decode_tokens);
        if num_decode_tokens > 0 {
            budget = budget.min(self.limits.max_num_prefill_tokens);
        }
        self.admit(&mut step);
        self.schedule_chunks(budget, &mut step);
        step
    }

    fn schedule_decodes(&mut self, step: &mut ScheduledStep) -> usize {
        let mut num_tokens = 0;
        let running: Vec<_> = self.running.iter().map(|(_, id)| *id).collect();
        for id in running {
            // May have been parked for an older one.
            let is_decoding =
                self.sequences.get(&id).is_some_and(|s| s.state == SequenceState::Computing && s.is_decoding());
            if is_decoding && num_tokens < self.limits.max_num_batched_tokens && self.grow(id, step) {
                self.push_span(id, 1, step);
                num_tokens += 1;
            }
        }
        num_tokens
    }

    /// Gives `id` a block for its newest token, parking younger sequences if need be. False: it has to
    /// wait, or was parked itself.
    fn grow(&mut self, id: SequenceId, step: &mut ScheduledStep) -> bool {
        loop {
            let sequence = &self.sequences[&id];
            if (sequence.tokens.len() - 1) / self.limits.block_size < sequence.blocks.len() {
                return true;
            }
            if let Some(fresh) = self.blocks.allocate(1) {
                step.fresh_blocks.extend_from_slice(&fresh);
                let sequence = self.sequences.get_mut(&id).expect("looked up above");
                sequence.blocks.extend(fresh);
                return true;
            }
            // Whoever came first stays, always.
            let victim = *self.running.last().expect("the growing sequence is running");
            if self.running.first() == Some(&victim) {
                return false;
            }
            self.park(victim.1, step);
            if victim.1 == id {
                return false;
            }
        }
    }

    fn park(&mut self, id: SequenceId, step: &mut ScheduledStep) {
        self.num_preemptions += 1;
        let block_size = self.limits.block_size;
        let sequence = self.sequences.get_mut(&id).expect("a running sequence is known");
        let blocks = std::mem::take(&mut sequence.blocks);
        let num_content_blocks = sequence.num_computed_tokens.div_ceil(block_size);
        // Blocks allocated in this very step have no content yet and are cleared for whoever gets them next.
        if self.num_parked_blocks + num_content_blocks <= self.limits.max_num_parked_blocks && num_content_blocks > 0 {
            self.num_parked_blocks += num_content_blocks;
            sequence.num_parked_tokens = sequence.num_computed_tokens;
            step.parks.push(Park { sequence: id, blocks: blocks[..num_content_blocks].to_vec() });
        }
        sequence.num_computed_tokens = 0;
        sequence.num_published_blocks = 0;
        sequence.become_state(SequenceState::Parked);
        let key = (sequence.arrival, id);
        self.running.remove(&key);
        self.parked.insert(key);
        self.blocks.release(&blocks);
    }

    /// Prompt chunks, oldest first. A chunk that does not reach the end ends at a granule, so that what
    /// it wrote can be sent; the first one gets a granule even where the budget has less left, or a prompt
    /// would stand still for as long as enough sequences decode.
    fn schedule_chunks(&mut self, budget: usize, step: &mut ScheduledStep) {
        let mut budget = budget.max(GRANULE_TOKENS);
        let running: Vec<_> = self.running.iter().map(|(_, id)| *id).collect();
        for id in running {
            let sequence = &self.sequences[&id];
            // An unparked sequence may be decoding; its growth block was reserved when it came back.
            let is_scheduled = sequence.is_decoding() && step.spans.iter().any(|span| span.sequence == id);
            if is_scheduled || budget == 0 {
                continue;
            }
            if sequence.is_decoding() && (sequence.tokens.len() - 1) / self.limits.block_size >= sequence.blocks.len() {
                continue;
            }
            let first = sequence.num_computed_tokens;
            let end = sequence.tokens.len().min(first + budget);
            let end = if end < sequence.tokens.len() { end / GRANULE_TOKENS * GRANULE_TOKENS } else { end };
            if end > first {
                budget -= end - first;
                self.push_span(id, end - first, step);
            }
        }
    }

    fn push_span(&self, id: SequenceId, num_tokens: usize, step: &mut ScheduledStep) {
        let sequence = &self.sequences[&id];
        let first_token = sequence.num_computed_tokens;
        let is_sampled = first_token + num_tokens == sequence.tokens.len();
        step.spans.push(ScheduledSpan { sequence: id, first_token, num_tokens, is_sampled });
    }

    /// Takes in what a step computed: `tokens` holds one entry per choice of each sampled span, in order.
    pub fn on_step_done(&mut self, step: &ScheduledStep, tokens: Vec<DrawnToken>) -> Vec<GroupEvent> {
        let mut events = Vec::new();
        let mut tokens = tokens.into_iter().peekable();
        for span in &step.spans {
            let id = span.sequence;
            let sequence = self.sequences.get_mut(&id).expect("sequences are only removed between steps");
            sequence.num_computed_tokens += span.num_tokens;
            self.publish(id);
            let mut drawn = Vec::new();
            while let Some(token) = tokens.next_if(|token| token.sequence == id) {
                drawn.push(token.token);
            }
            if span.is_sampled {
                self.on_drawn(id, drawn, &mut events);
            }
        }
        events
    }
}
