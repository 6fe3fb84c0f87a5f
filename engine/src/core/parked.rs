//! KV of preempted sequences in host memory: private to its sequence, gone with it, found by nobody else.
//!
//! How much there is, and how much of it is copied in a step, the scheduler decides. A buffer that is not needed
//! any more is used for the next block, or freed a few per step: the operating system takes its time for a whole
//! sequence's memory.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use common::host_budget::HostBudget;
use common::ids::SequenceId;
use common::scheduler::BlockCopy;

use crate::pool::KvPool;

/// Saved blocks, each the bytes of all layers.
#[derive(Debug)]
pub(super) struct ParkedKv {
    budget: Arc<HostBudget>,
    /// By sequence and place in its block table.
    saved: HashMap<SequenceId, BTreeMap<usize, Vec<u8>>>,
    num_saved: usize,
    spare: Vec<Vec<u8>>,
    block_bytes: usize,
}

impl ParkedKv {
    /// Nothing, of a pool with blocks of `block_bytes`. What it holds counts in `budget`.
    pub(super) fn new(budget: Arc<HostBudget>, block_bytes: usize) -> Self {
        Self { budget, saved: HashMap::new(), num_saved: 0, spare: Vec::new(), block_bytes }
    }

    /// Bytes that it holds.
    pub(super) fn num_bytes(&self) -> u64 {
        ((self.num_saved + self.spare.len()) * self.block_bytes) as u64
    }

    pub(super) fn save(&mut self, copies: &[BlockCopy], pool: &KvPool) {
        // Whoever shares the budget makes room before the memory is taken.
        let num_new = copies.len().saturating_sub(self.spare.len());
        if num_new > 0 {
            self.budget.park(self.num_bytes() + (num_new * self.block_bytes) as u64);
        }
        for copy in copies {
            let mut bytes = self.spare.pop().unwrap_or_default();
            bytes.clear();
            pool.read_block(copy.block, &mut bytes);
            self.saved.entry(copy.sequence).or_default().insert(copy.index, bytes);
        }
        self.num_saved += copies.len();
    }

    pub(super) fn restore(&mut self, copies: &[BlockCopy], pool: &KvPool) {
        for copy in copies {
            let saved = &self.saved.get(&copy.sequence).expect("the scheduler restores only what it had saved");
            pool.write_block(copy.block, &saved[&copy.index]);
        }
    }

    /// What was saved of `sequence` is not needed any more.
    pub(super) fn forget(&mut self, sequence: SequenceId) {
        let saved = self.saved.remove(&sequence).unwrap_or_default();
        self.num_saved -= saved.len();
        self.spare.extend(saved.into_values());
    }

    /// Frees up to `num_blocks_max` buffers that nobody needs.
    pub(super) fn free_spare(&mut self, num_blocks_max: usize) {
        if self.spare.is_empty() {
            return;
        }
        self.spare.truncate(self.spare.len().saturating_sub(num_blocks_max));
        // Telling the tier takes longer than freeing a block, and that it has less room than it could is no harm.
        if self.spare.is_empty() {
            self.budget.park(self.num_bytes());
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.saved.is_empty()
    }
}

impl Drop for ParkedKv {
    fn drop(&mut self) {
        self.budget.park(0);
    }
}

#[cfg(test)]
mod tests {
    use common::ids::BlockId;
    use common::kv_spec::{KvDtype, KvSpec};

    use super::*;

    #[test]
    fn memory_is_counted_before_it_is_taken_and_until_it_is_freed() {
        let pool = KvPool::new(&KvSpec::uniform(2, 2, 8, KvDtype::Bf16, None), 16, 8).unwrap();
        let (budget, block_bytes) = (Arc::new(HostBudget::new(1 << 20)), pool.block_bytes());
        let mut parked = ParkedKv::new(budget.clone(), block_bytes);
        let num_counted = || budget.parked_bytes() as usize / block_bytes;
        let copy = |sequence, index, block| BlockCopy { sequence: SequenceId(sequence), index, block: BlockId(block) };
        parked.save(&[copy(1, 1, 4), copy(1, 0, 3), copy(2, 0, 5)], &pool);
        assert_eq!(num_counted(), 3);
        parked.forget(SequenceId(1));
        assert_eq!((num_counted(), parked.num_bytes() as usize), (3, 3 * block_bytes), "the buffers are still there");
        parked.save(&[copy(3, 0, 4)], &pool);
        assert_eq!(num_counted(), 3, "one was used again");
        parked.free_spare(8);
        assert_eq!((num_counted(), parked.num_bytes() as usize), (2, 2 * block_bytes));
        parked.save(&[copy(3, 1, 6), copy(3, 2, 7)], &pool);
        for sequence in [2, 3] {
            parked.forget(SequenceId(sequence));
        }
        parked.forget(SequenceId(9));
        parked.free_spare(3);
        assert_eq!((num_counted(), parked.num_bytes() as usize), (4, block_bytes), "the tier is told once");
        parked.free_spare(3);
        assert_eq!((num_counted(), parked.num_bytes()), (0, 0));
        assert!(parked.is_empty());
    }
}
