//! One engine step as flat arrays: what to compute, where its KV goes, which rows to sample.
//!
//! Blocks are cleared, copied and saved by the engine thread between two steps, not by the plan.
//! Prefill chunks and decode tokens are the same: a [`Span`] of consecutive tokens of one sequence.
//!
//! ```text
//! spans      |  A: 5 tokens   | B: 1 | C: 1 |      tokens, positions, slots: one entry per row
//! rows         0 1 2 3 4        5      6
//! logit rows           4        5      6           rows whose logits are sampled
//! ```
//!
//! A plan may be submitted while the step before it is still being computed. A row whose token that step
//! draws is then a [`FromSlot`], which the runner fills in ([`StepPlan::resolve`]; on a device, a gather).

use std::sync::Arc;

use common::ids::{ChoiceIndex, SequenceId};
use common::sampling::SamplingParams;
use common::tokens::Token;

use crate::runner::StepToken;

/// Consecutive tokens of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Whose.
    pub sequence: SequenceId,
    /// Row of its first token in the step.
    pub first_row: usize,
    /// Number of rows.
    pub num_rows: usize,
    /// Position of its first token in the sequence.
    pub first_position: usize,
    /// Range of the sequence's block table in [`StepPlan::block_tables`].
    pub block_table: std::ops::Range<usize>,
    /// Whether the [`KvSink`](crate::runner::KvSink) wants to know when a layer of this span is written.
    pub is_reported: bool,
}

/// A row whose token was not known when the plan was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FromSlot {
    /// The row; its entry in [`StepPlan::tokens`] is to be replaced.
    pub row: usize,
    /// Index of its token among those that the step before this one draws.
    pub slot: usize,
}

/// A row whose logits are sampled, once per entry (n choices of one prompt are n entries on one row).
#[derive(Debug, Clone, PartialEq)]
pub struct SampleRow {
    /// Row in the step.
    pub row: usize,
    /// Sequence the token is for.
    pub sequence: SequenceId,
    /// Which choice; enters the random number.
    pub choice: ChoiceIndex,
    /// Position in the sequence of the token to be drawn (number of tokens before it); enters the
    /// random number.
    pub position: u32,
    /// How to choose.
    pub params: Arc<SamplingParams>,
    /// Whether stop tokens are forbidden here (`min_tokens` not reached).
    pub is_stop_banned: bool,
    /// All tokens so far and how many of them are the prompt; only filled if penalties need them. Where
    /// `row` is a [`FromSlot`], its token is missing at the end until it is resolved.
    pub history: Option<(Arc<Vec<Token>>, usize)>,
}

/// Everything a runner needs for one step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepPlan {
    /// Token of each row, `[num_rows]`.
    pub tokens: Vec<Token>,
    /// Rows whose token the step before this one draws.
    pub from_slots: Vec<FromSlot>,
    /// Position of each row in its sequence, `[num_rows]`.
    pub positions: Vec<u32>,
    /// Where each row's K and V go: `block * block_size + offset`, `[num_rows]`.
    pub slots: Vec<u32>,
    /// Who the rows belong to.
    pub spans: Vec<Span>,
    /// Block tables of all spans, one after the other.
    pub block_tables: Vec<u32>,
    /// Which rows are sampled.
    pub samples: Vec<SampleRow>,
    /// Whether this step has decode rows, which go before prefill rows of other runners in the process.
    pub has_decode: bool,
    /// Memory for what the step draws, kept between steps; its content means nothing.
    pub spare_tokens: Vec<StepToken>,
}

impl StepPlan {
    /// Empties all arrays, keeping their memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.from_slots.clear();
        self.positions.clear();
        self.slots.clear();
        self.spans.clear();
        self.block_tables.clear();
        self.samples.clear();
        self.has_decode = false;
        self.spare_tokens.clear();
    }

    /// Becomes `plan` in the memory it has. The memory for what is drawn stays each plan's own.
    pub fn copy_from(&mut self, plan: &StepPlan) {
        let Self { tokens, from_slots, positions, slots, spans, block_tables, samples, has_decode, spare_tokens: _ } =
            self;
        tokens.clone_from(&plan.tokens);
        from_slots.clone_from(&plan.from_slots);
        positions.clone_from(&plan.positions);
        slots.clone_from(&plan.slots);
        spans.clone_from(&plan.spans);
        block_tables.clone_from(&plan.block_tables);
        samples.clone_from(&plan.samples);
        *has_decode = plan.has_decode;
    }

    /// Becomes the given rows of `plan` without its samples: a span of one row for each, over the same KV.
    ///
    /// # Panics
    /// If a row is in no span: a bug of whoever made the plan.
    pub fn take_rows(&mut self, plan: &StepPlan, rows: &[usize]) {
        self.clear();
        self.block_tables.extend_from_slice(&plan.block_tables);
        self.has_decode = plan.has_decode;
        for &row in rows {
            let span = &plan.spans[plan.spans.partition_point(|span| span.first_row + span.num_rows <= row)];
            self.spans.push(Span {
                first_row: self.tokens.len(),
                num_rows: 1,
                first_position: span.first_position + (row - span.first_row),
                ..span.clone()
            });
            self.tokens.push(plan.tokens[row]);
            self.positions.push(plan.positions[row]);
            self.slots.push(plan.slots[row]);
        }
    }

    /// Puts in the tokens that the step before this one drew, in the order of its samples.
    ///
    /// # Panics
    /// If a slot was not drawn: a bug of whoever made the plan.
    pub fn resolve(&mut self, drawn: &[Token]) {
        for FromSlot { row, slot } in self.from_slots.drain(..) {
            let token = drawn[slot];
            self.tokens[row] = token;
            for sample in self.samples.iter_mut().filter(|sample| sample.row == row && sample.history.is_some()) {
                if let Some((history, _)) = &mut sample.history {
                    Arc::make_mut(history).push(token);
                }
            }
        }
    }

    /// Rows in the step.
    pub fn num_rows(&self) -> usize {
        self.tokens.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_takes_the_memory_that_is_there() {
        let span = Span {
            sequence: SequenceId(1),
            first_row: 0,
            num_rows: 2,
            first_position: 3,
            block_table: 0..2,
            is_reported: false,
        };
        let sample = SampleRow {
            row: 1,
            sequence: SequenceId(1),
            choice: ChoiceIndex(0),
            position: 5,
            params: Arc::new(SamplingParams::greedy(1)),
            is_stop_banned: false,
            history: None,
        };
        let plan = StepPlan {
            tokens: vec![7, 8],
            from_slots: vec![FromSlot { row: 1, slot: 0 }],
            positions: vec![3, 4],
            slots: vec![40, 41],
            spans: vec![span],
            block_tables: vec![2, 5],
            samples: vec![sample],
            has_decode: true,
            spare_tokens: Vec::new(),
        };
        let mut copy = StepPlan::default();
        copy.copy_from(&plan);
        assert_eq!(copy, plan);
        let memory = |plan: &StepPlan| {
            let StepPlan { tokens, from_slots, positions, slots, spans, block_tables, samples, .. } = plan;
            let words = [tokens, positions, slots, block_tables].map(|array| array.as_ptr());
            (words, from_slots.as_ptr(), spans.as_ptr(), samples.as_ptr())
        };
        let before = memory(&copy);
        copy.tokens.clear();
        copy.copy_from(&plan);
        assert_eq!((memory(&copy), copy), (before, plan));
    }

    #[test]
    fn taken_rows_are_spans_of_one_row_at_their_own_positions() {
        let span = |sequence, first_row, num_rows, first_position, block_table| Span {
            sequence: SequenceId(sequence),
            first_row,
            num_rows,
            first_position,
            block_table,
            is_reported: true,
        };
        let plan = StepPlan {
            tokens: vec![10, 11, 12, 13, 14],
            positions: vec![4, 5, 6, 30, 7],
            slots: vec![40, 41, 42, 43, 44],
            spans: vec![span(1, 0, 3, 4, 0..1), span(2, 3, 1, 30, 1..3), span(3, 4, 1, 7, 3..4)],
            block_tables: vec![2, 5, 6, 9],
            has_decode: true,
            ..StepPlan::default()
        };
        let mut taken = StepPlan { tokens: vec![1], ..StepPlan::default() };
        taken.take_rows(&plan, &[2, 4]);
        let expected = StepPlan {
            tokens: vec![12, 14],
            positions: vec![6, 7],
            slots: vec![42, 44],
            spans: vec![span(1, 0, 1, 6, 0..1), span(3, 1, 1, 7, 3..4)],
            block_tables: plan.block_tables.clone(),
            has_decode: true,
            ..StepPlan::default()
        };
        assert_eq!(taken, expected);
    }
}
