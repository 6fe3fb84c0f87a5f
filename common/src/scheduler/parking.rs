//! Preemption: the KV of a sequence that gives way goes to host memory block by block, and comes back the same way.
//!
//! ```text
//!            preempted            all saved           has its blocks             all restored
//! Computing ───────────> Saving ───────────> Parked ─────────────────> Restoring ───────────> Computing
//!              │         gives each block    ^    ^                       │
//!              │         back as it is       │    └── preempted again ────┘  what was saved is still there
//!              └── nothing can be saved ─────┘
//! ```
//!
//! A copy of a whole sequence takes longer than a step, and everybody else would wait for it. So a step copies
//! [`SchedulerLimits::max_num_copied_blocks`] blocks, and beyond them only what a running sequence cannot grow
//! without: one block for each, since waiting for the next step would be worse.
//!
//! Blocks are saved from the end: the beginning of a chain is what others share, and what the pool may still have
//! when the sequence comes back. A block that others hold too is saved, but not for the sake of growth: giving it
//! back would make no room.

use std::collections::BTreeSet;

use super::{ScheduledStep, Scheduler};
use crate::ids::{BlockId, SequenceId};
use crate::sequence::{Sequence, SequenceState};

/// A block's KV that goes from the pool to host memory, or back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    /// Whose.
    pub sequence: SequenceId,
    /// Its place in the sequence's block table.
    pub index: usize,
    /// The block of the pool. Once saved it is no longer the sequence's.
    pub block: BlockId,
}

/// What became of preempted sequences, since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PreemptionCounts {
    /// Sequences that gave way.
    pub preempted: u64,
    /// Of them, those whose KV went to host memory, at least its beginning.
    pub parked: u64,
    /// Those that came back from there.
    pub restored: u64,
    /// Those whose KV had no room there, at least its end: it is computed again.
    pub recomputed: u64,
}

impl Sequence {
    /// Blocks whose content is in host memory, or on its way there.
    pub(super) fn num_parked_blocks(&self, block_size: usize) -> usize {
        self.num_parked_tokens.div_ceil(block_size)
    }
}

impl Scheduler {
    /// Takes `id` out of the batch, or out of those that are about to be back in it. No step in flight may name it.
    pub(super) fn preempt(&mut self, id: SequenceId) {
        self.preemptions.preempted += 1;
        let block_size = self.limits.block_size;
        let sequence = self.sequences.get_mut(&id).expect("a preempted sequence is known");
        let key = (sequence.arrival, id);
        sequence.num_published_blocks = 0;
        if sequence.state == SequenceState::Restoring {
            let blocks = std::mem::take(&mut sequence.blocks);
            sequence.become_state(SequenceState::Parked);
            self.restoring.remove(&key);
            self.parked.insert(key);
            self.blocks.release(&blocks);
            return;
        }
        sequence.stop_arriving();
        let num_computed_tokens = std::mem::take(&mut sequence.num_computed_tokens);
        let num_content_blocks = num_computed_tokens.div_ceil(block_size);
        let room = self.limits.max_num_parked_blocks.saturating_sub(self.num_parked_blocks);
        let num_saved_blocks = num_content_blocks.min(room);
        sequence.num_parked_tokens = num_computed_tokens.min(num_saved_blocks * block_size);
        self.num_parked_blocks += num_saved_blocks;
        self.preemptions.parked += u64::from(num_saved_blocks > 0);
        self.preemptions.recomputed += u64::from(num_saved_blocks < num_content_blocks);
        self.blocks.note_use(&sequence.blocks);
        let unsaved = sequence.blocks.split_off(num_saved_blocks);
        let (state, set) = if num_saved_blocks > 0 {
            (SequenceState::Saving, &mut self.saving)
        } else {
            (SequenceState::Parked, &mut self.parked)
        };
        sequence.become_state(state);
        set.insert(key);
        self.running.remove(&key);
        self.blocks.give_back(&unsaved);
    }

    /// Saves a block that is free afterwards. False if there is none.
    pub(super) fn save_for_growth(&mut self, step: &mut ScheduledStep) -> bool {
        let makes_room = |(_, id): &&(u64, SequenceId)| {
            let last = self.sequences[id].blocks.last();
            self.blocks.is_held_once(*last.expect("a sequence that is being saved has a block left"))
        };
        let Some(key) = self.saving.iter().rev().find(makes_room).copied() else { return false };
        self.save_block(key, step);
        true
    }

    /// Saves as much as a step may copy, of the youngest first.
    pub(super) fn save_some(&mut self, step: &mut ScheduledStep) {
        while self.num_copies_left > 0
            && let Some(key) = self.saving.last().copied()
        {
            self.save_block(key, step);
        }
    }

    /// Saves the last block that a sequence still holds, and gives it back.
    fn save_block(&mut self, key: (u64, SequenceId), step: &mut ScheduledStep) {
        let sequence = self.sequences.get_mut(&key.1).expect("a sequence that is being saved is known");
        let block = sequence.blocks.pop().expect("a sequence that is being saved has a block left");
        step.saves.push(BlockCopy { sequence: key.1, index: sequence.blocks.len(), block });
        self.num_copies_left = self.num_copies_left.saturating_sub(1);
        if sequence.blocks.is_empty() {
            sequence.become_state(SequenceState::Parked);
            self.saving.remove(&key);
            self.parked.insert(key);
        }
        self.blocks.give_back(&[block]);
    }

    /// Restores as much as a step may copy, of the oldest first. Who is complete is back in the batch.
    pub(super) fn restore_some(&mut self, step: &mut ScheduledStep) {
        let block_size = self.limits.block_size;
        while let Some(key) = self.restoring.first().copied() {
            let sequence = self.sequences.get_mut(&key.1).expect("a sequence that is being restored is known");
            while sequence.num_restored_blocks < sequence.num_parked_blocks(block_size) {
                if self.num_copies_left == 0 {
                    return;
                }
                let index = sequence.num_restored_blocks;
                step.restores.push(BlockCopy { sequence: key.1, index, block: sequence.blocks[index] });
                sequence.num_restored_blocks += 1;
                self.num_copies_left -= 1;
            }
            sequence.num_computed_tokens = sequence.num_parked_tokens;
            sequence.become_state(SequenceState::Computing);
            self.restoring.remove(&key);
            self.running.insert(key);
            self.forget_parked(key.1, step);
        }
    }

    /// What was saved of a sequence is not needed any more.
    pub(super) fn forget_parked(&mut self, id: SequenceId, step: &mut ScheduledStep) {
        let sequence = self.sequences.get_mut(&id).expect("a restored sequence is known");
        let num_parked_blocks = sequence.num_parked_blocks(self.limits.block_size);
        sequence.num_parked_tokens = 0;
        if num_parked_blocks > 0 {
            self.num_parked_blocks -= num_parked_blocks;
            self.preemptions.restored += 1;
            step.restored.push(id);
        }
    }

    /// Whether the books about preempted sequences agree with the sequences.
    pub(super) fn check_parking(&self) -> Result<(), String> {
        let of_state = |state| {
            let found = self.sequences.values().filter(move |sequence| sequence.state == state);
            found.map(|sequence| (sequence.arrival, sequence.id)).collect::<BTreeSet<_>>()
        };
        for (state, listed) in [
            (SequenceState::Saving, &self.saving),
            (SequenceState::Parked, &self.parked),
            (SequenceState::Restoring, &self.restoring),
            (SequenceState::Computing, &self.running),
        ] {
            if *listed != of_state(state) {
                return Err(format!("{listed:?} are listed as {state:?}, {:?} are", of_state(state)));
            }
        }
        let parked = self.sequences.values().map(|sequence| sequence.num_parked_blocks(self.limits.block_size));
        let num_parked_blocks: usize = parked.sum();
        if num_parked_blocks != self.num_parked_blocks {
            return Err(format!("{num_parked_blocks} blocks are parked, {} are counted", self.num_parked_blocks));
        }
        Ok(())
    }
}
