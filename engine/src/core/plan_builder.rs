//! From what the scheduler decided to the flat arrays the runner wants.

use std::collections::HashMap;
use std::sync::Arc;

use common::ids::SequenceId;
use common::scheduler::{ScheduledSpan, Scheduler};
use common::sequence::Sequence;

use crate::plan::{FromSlot, SampleRow, Span, StepPlan};

/// Fills `plan` (cleared first) with `spans`. `slots` says where the step in flight before it, if there is
/// one, puts what it draws for a sequence; `is_reported` tells of which sequences layers are reported.
pub(super) fn build(
    plan: &mut StepPlan,
    scheduler: &Scheduler,
    spans: &[ScheduledSpan],
    slots: &HashMap<SequenceId, usize>,
    is_reported: impl Fn(&ScheduledSpan) -> bool,
) {
    plan.clear();
    let block_size = scheduler.limits().block_size;
    for span in spans {
        let sequence = scheduler.sequence(span.sequence).expect("scheduled sequences are known");
        let first_row = plan.num_rows();
        let positions = span.first_token..span.first_token + span.num_tokens;
        for position in positions.clone() {
            let block = sequence.blocks[position / block_size];
            let known = sequence.tokens.get(position).copied();
            if known.is_none() {
                plan.from_slots.push(FromSlot { row: plan.tokens.len(), slot: slots[&span.sequence] });
            }
            plan.tokens.push(known.unwrap_or_default());
            plan.positions.push(position as u32);
            plan.slots.push(block.0 * block_size as u32 + (position % block_size) as u32);
        }
        let table_start = plan.block_tables.len();
        let num_blocks = positions.end.div_ceil(block_size);
        plan.block_tables.extend(sequence.blocks[..num_blocks].iter().map(|block| block.0));
        plan.spans.push(Span {
            sequence: span.sequence,
            first_row,
            num_rows: span.num_tokens,
            first_position: span.first_token,
            block_table: table_start..plan.block_tables.len(),
            is_reported: is_reported(span),
        });
        plan.has_decode |= span.is_decode;
        if span.is_sampled {
            push_samples(plan, sequence, first_row + span.num_tokens - 1, positions.end);
        }
    }
}

/// Says in `slots` where each sequence's next token will be among those that `plan` draws. A sequence that
/// draws for several choices forks afterwards and is not looked up.
pub(super) fn list_slots(plan: &StepPlan, slots: &mut HashMap<SequenceId, usize>) {
    slots.clear();
    slots.extend(plan.samples.iter().enumerate().map(|(slot, sample)| (sample.sequence, slot)));
}

/// `position` is that of the token to be drawn.
fn push_samples(plan: &mut StepPlan, sequence: &Sequence, row: usize, position: usize) {
    let params = &sequence.params;
    let history = params.has_penalties().then(|| (Arc::new(sequence.tokens.clone()), sequence.prompt_len));
    // The token to be drawn is number `num_generated + 1`; a stop token may end it from `min_tokens` on.
    let is_stop_banned = ((position - sequence.prompt_len + 1) as u32) < params.min_tokens;
    for choice in &sequence.choices {
        plan.samples.push(SampleRow {
            row,
            sequence: sequence.id,
            choice: *choice,
            position: position as u32,
            params: params.clone(),
            is_stop_banned,
            history: history.clone(),
        });
    }
}
