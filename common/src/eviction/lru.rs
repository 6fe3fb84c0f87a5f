//! The least recently released block goes first.

use std::collections::BTreeMap;

use crate::ids::BlockId;

#[derive(Debug)]
pub(crate) struct Lru {
    /// By the time of release, oldest first.
    by_time: BTreeMap<u64, BlockId>,
    /// Of each block, meaningful while it is in `by_time`.
    released_at: Vec<u64>,
    clock: u64,
}

impl Lru {
    pub(crate) fn new(num_blocks: usize) -> Self {
        Self { by_time: BTreeMap::new(), released_at: vec![0; num_blocks], clock: 0 }
    }

    pub(crate) fn insert(&mut self, id: BlockId) {
        self.clock += 1;
        self.released_at[id.0 as usize] = self.clock;
        self.by_time.insert(self.clock, id);
    }

    pub(crate) fn remove(&mut self, id: BlockId) {
        self.by_time.remove(&self.released_at[id.0 as usize]).expect("only an inserted block is removed");
    }

    pub(crate) fn pop(&mut self) -> Option<BlockId> {
        self.by_time.pop_first().map(|(_, id)| id)
    }

    pub(crate) fn len(&self) -> usize {
        self.by_time.len()
    }

    pub(crate) fn blocks(&self) -> Vec<BlockId> {
        self.by_time.values().copied().collect()
    }

    pub(crate) fn check_integrity(&self) -> Result<(), String> {
        match self.by_time.iter().find(|(time, id)| self.released_at[id.0 as usize] != **time) {
            Some((_, id)) => Err(format!("block {} is listed under another time than that of its release", id.0)),
            None => Ok(()),
        }
    }
}
