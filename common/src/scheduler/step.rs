//! One step: who computes what, and what came of it.

use crate::content::GRANULE_TOKENS;
use crate::ids::{BlockId, SequenceId};
use crate::scheduler::{BlockCopy, DrawnToken, GroupEvent, Scheduler, SequenceEvent};
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
    /// Whether it is one generated token, and not a chunk of a prompt.
    pub is_decode: bool,
}

/// What to do next. The order of the fields is the order of execution.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScheduledStep {
    /// KV to save in host memory. Steps in flight read these blocks at most.
    pub saves: Vec<BlockCopy>,
    /// Blocks that must read as zero before anyone uses them: those that may be read before they are full.
    pub fresh_blocks: Vec<BlockId>,
    /// KV to write back. What was saved of the sequence is kept until it is named in `restored`.
    pub restores: Vec<BlockCopy>,
    /// Sequences that are back in the batch, whose saved content can be dropped.
    pub restored: Vec<SequenceId>,
    /// What to tell.
    pub events: Vec<GroupEvent>,
    /// What to compute. A token behind those that the sequence is known to have is the one that the step
    /// before this one draws for it.
    pub spans: Vec<ScheduledSpan>,
    /// A sequence needs a block that only preemption can give it, which must not happen to blocks that a
    /// step in flight uses: await all steps before the next one is scheduled.
    pub is_starved: bool,
}

impl ScheduledStep {
    /// Whether there is work besides computing, so that the next step may find what this one lacked.
    pub fn has_copies(&self) -> bool {
        !self.saves.is_empty() || !self.restores.is_empty()
    }
}

impl Scheduler {
    /// Plans the next step; steps before it may still be in flight. `spans` is empty if nothing can be
    /// computed now; otherwise the step is in flight until [`Scheduler::on_step_done`].
    pub fn schedule(&mut self) -> ScheduledStep {
        self.num_scheduled_steps += 1;
        self.num_copies_left = self.limits.max_num_copied_blocks.max(1);
        let mut step = ScheduledStep::default();
        self.pass_arrived(&mut step);
        let num_decode_tokens = self.schedule_decodes(&mut step);
        let mut budget = self.limits.max_num_batched_tokens.saturating_sub(num_decode_tokens);
        if num_decode_tokens > 0 {
            budget = budget.min(self.limits.max_num_prefill_tokens);
        }
        self.save_some(&mut step);
        self.admit(&mut step);
        self.restore_some(&mut step);
        self.schedule_chunks(budget, &mut step);
        self.num_steps_in_flight += usize::from(!step.spans.is_empty());
        step
    }

    /// Goes on behind what has arrived, where everything before it is computed.
    fn pass_arrived(&mut self, step: &mut ScheduledStep) {
        let running: Vec<_> = self.running.iter().map(|(_, id)| *id).collect();
        for id in running {
            let sequence = self.sequences.get_mut(&id).expect("a running sequence is known");
            let Some(prefix) = sequence.arriving.clone() else { continue };
            let first_token = sequence.num_computed_tokens_ahead();
            // What a step in flight computes is not there yet, so nothing behind it is used.
            if sequence.in_flight.num_steps == 0 {
                sequence.num_computed_tokens = prefix.pass_arrived();
            }
            let end_token = sequence.num_computed_tokens_ahead();
            let is_over = end_token == prefix.end_token();
            if is_over {
                sequence.arriving = None;
            }
            if is_over || end_token > first_token {
                step.events.push((sequence.group, SequenceEvent::PrefixArrived { first_token, end_token }));
                self.publish(id);
            }
        }
    }

    fn schedule_decodes(&mut self, step: &mut ScheduledStep) -> usize {
        let mut num_tokens = 0;
        let running: Vec<_> = self.running.iter().map(|(_, id)| *id).collect();
        for id in running {
            // May have been preempted for an older one.
            let is_decoding = self.sequences.get(&id).is_some_and(|sequence| {
                sequence.state == SequenceState::Computing
                    && sequence.is_decoding_ahead()
                    && sequence.can_run_ahead(self.limits.max_model_len)
            });
            if is_decoding && num_tokens < self.limits.max_num_batched_tokens && self.grow(id, step) {
                self.push_span(id, 1, step);
                num_tokens += 1;
            }
        }
        num_tokens
    }

    /// Gives `id` a block for its newest token, preempting younger sequences if need be. False: it has to
    /// wait, or was preempted itself.
    fn grow(&mut self, id: SequenceId, step: &mut ScheduledStep) -> bool {
        loop {
            let sequence = &self.sequences[&id];
            if (sequence.num_tokens_ahead() - 1) / self.limits.block_size < sequence.blocks.len() {
                return true;
            }
            if let Some(fresh) = self.blocks.allocate(1) {
                step.fresh_blocks.extend_from_slice(&fresh);
                let sequence = self.sequences.get_mut(&id).expect("looked up above");
                sequence.blocks.extend(fresh);
                return true;
            }
            if self.save_for_growth(step) {
                continue;
            }
            if self.num_steps_in_flight > 0 {
                step.is_starved = true;
                return false;
            }
            // Whoever came first stays, always.
            let seated = || self.running.iter().chain(&self.restoring);
            let victim = *seated().max().expect("the growing sequence is running");
            if seated().min() == Some(&victim) {
                return false;
            }
            self.preempt(victim.1);
            if victim.1 == id {
                return false;
            }
        }
    }

    /// Prompt chunks, oldest first. A chunk that does not reach the end ends at a granule, so that what
    /// it wrote can be sent; the first one gets a granule even where the budget has less left, or a prompt
    /// would stand still for as long as enough sequences decode.
    fn schedule_chunks(&mut self, budget: usize, step: &mut ScheduledStep) {
        let mut budget = budget.max(GRANULE_TOKENS);
        let running: Vec<_> = self.running.iter().map(|(_, id)| *id).collect();
        for id in running {
            let sequence = &self.sequences[&id];
            let is_scheduled = sequence.last_step == self.num_scheduled_steps;
            if is_scheduled || budget == 0 || !sequence.can_run_ahead(self.limits.max_model_len) {
                continue;
            }
            // An unparked sequence may be decoding; its growth block was reserved when it came back.
            let num_tokens = sequence.num_tokens_ahead();
            if sequence.is_decoding_ahead() && (num_tokens - 1) / self.limits.block_size >= sequence.blocks.len() {
                continue;
            }
            let first = sequence.num_computed_tokens_ahead();
            let end = num_tokens.min(first + budget);
            let end = if end < num_tokens { end / GRANULE_TOKENS * GRANULE_TOKENS } else { end };
            let end = sequence.arriving.as_ref().map_or(end, |prefix| prefix.claim(end));
            if end > first {
                budget -= end - first;
                self.push_span(id, end - first, step);
            }
        }
    }

    fn push_span(&mut self, id: SequenceId, num_tokens: usize, step: &mut ScheduledStep) {
        let sequence = self.sequences.get_mut(&id).expect("scheduled sequences are known");
        let first_token = sequence.num_computed_tokens_ahead();
        let is_sampled = first_token + num_tokens == sequence.num_tokens_ahead();
        let is_decode = sequence.is_decoding_ahead();
        sequence.last_step = self.num_scheduled_steps;
        sequence.in_flight.num_steps += 1;
        sequence.in_flight.num_tokens += num_tokens;
        sequence.in_flight.num_draws += usize::from(is_sampled);
        step.spans.push(ScheduledSpan { sequence: id, first_token, num_tokens, is_sampled, is_decode });
    }

    /// Takes in what the oldest step in flight computed: `tokens` holds one entry per choice of each sampled
    /// span, in order. What was drawn for sequences that ended meanwhile is dropped.
    pub fn on_step_done(&mut self, step: &ScheduledStep, tokens: Vec<DrawnToken>) -> Vec<GroupEvent> {
        self.num_steps_in_flight -= usize::from(!step.spans.is_empty());
        let mut events = Vec::new();
        let mut tokens = tokens.into_iter().peekable();
        for span in &step.spans {
            let id = span.sequence;
            let mut drawn = Vec::new();
            while let Some(token) = tokens.next_if(|token| token.sequence == id) {
                drawn.push(token.token);
            }
            let Some(sequence) = self.sequences.get_mut(&id) else {
                self.on_step_of_ended(id);
                continue;
            };
            sequence.in_flight.num_steps -= 1;
            sequence.in_flight.num_tokens -= span.num_tokens;
            sequence.in_flight.num_draws -= usize::from(span.is_sampled);
            sequence.num_computed_tokens += span.num_tokens;
            self.publish(id);
            if span.is_sampled {
                self.on_drawn(id, drawn, &mut events);
            }
        }
        events
    }

    /// One step fewer computes with the blocks of a sequence that has ended.
    fn on_step_of_ended(&mut self, id: SequenceId) {
        let ending = self.ending.get_mut(&id).expect("a sequence of a step in flight is known or ending");
        ending.num_steps_in_flight -= 1;
        if ending.num_steps_in_flight == 0
            && let Some(ending) = self.ending.remove(&id)
        {
            self.blocks.release(&ending.blocks);
        }
    }
}
