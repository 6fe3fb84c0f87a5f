//! Cached KV that is read outside of any sequence: blocks that are found by content and kept from being given
//! away until the reader is done.

use super::Scheduler;
use crate::content::{ContentName, GRANULE_TOKENS};
use crate::ids::BlockId;

/// Names a pin; drawn by whoever asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PinId(pub u64);

impl Scheduler {
    /// Takes a reference on the leading full blocks of the granules `names` that are in the pool, until
    /// [`unpin`](Self::unpin). Allocates nothing and evicts nothing; empty if none is there.
    pub fn pin(&mut self, id: PinId, names: &[ContentName]) -> Vec<BlockId> {
        let granules_per_block = self.limits.block_size / GRANULE_TOKENS;
        let block_names = names.chunks_exact(granules_per_block).map(|block| block[granules_per_block - 1]);
        let blocks = self.blocks.longest_prefix(block_names);
        if !blocks.is_empty() {
            self.blocks.acquire(&blocks);
            let before = self.pins.insert(id, blocks.clone());
            debug_assert!(before.is_none(), "{id:?} is pinned twice");
        }
        blocks
    }

    /// Gives the blocks of a pin back. An unknown pin is nothing to do.
    pub fn unpin(&mut self, id: PinId) {
        if let Some(blocks) = self.pins.remove(&id) {
            self.blocks.release(&blocks);
        }
    }
}
