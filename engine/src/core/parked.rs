//! KV of parked sequences in host memory, bounded by the scheduler's books.

use std::collections::HashMap;

use common::ids::SequenceId;
use common::scheduler::{Park, Unpark};

use crate::pool::KvPool;

/// Saved blocks by sequence, each the bytes of all layers.
#[derive(Debug, Default)]
pub(super) struct ParkedKv {
    saved: HashMap<SequenceId, Vec<Vec<u8>>>,
}

impl ParkedKv {
    pub(super) fn save(&mut self, park: &Park, pool: &KvPool) {
        let blocks = park.blocks.iter().map(|block| {
            let mut bytes = Vec::new();
            pool.read_block(*block, &mut bytes);
            bytes
        });
        self.saved.insert(park.sequence, blocks.collect());
    }

    pub(super) fn restore(&mut self, unpark: &Unpark, pool: &KvPool) {
        let saved = self.saved.remove(&unpark.sequence).expect("the scheduler restores only what it had saved");
        for (index, block) in unpark.blocks.iter().enumerate() {
            pool.write_block(*block, &saved[unpark.first_block + index]);
        }
    }

    pub(super) fn forget(&mut self, sequence: SequenceId) {
        self.saved.remove(&sequence);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.saved.is_empty()
    }
}
