//! The engine's pool as the memory that extents land in.

use std::sync::Arc;

use common::ids::BlockId;
use engine::pool::KvPool;
use kv_connector::transfer::KvMemory;

/// Lends the pool to the connector.
pub(crate) struct PoolMemory(pub(crate) Arc<KvPool>);

impl KvMemory for PoolMemory {
    fn num_layers(&self) -> usize {
        self.0.num_layers() as usize
    }

    fn granule_bytes(&self) -> usize {
        self.0.extent_bytes(1)
    }

    fn write_at(&self, layer: u32, blocks: &[BlockId], first_granule: usize, byte_offset: usize, bytes: &[u8]) {
        self.0.write_at(layer, blocks, first_granule, byte_offset, bytes);
    }

    fn read_granules(&self, layer: u32, blocks: &[BlockId], first_granule: usize, num_granules: usize, out: &mut [u8]) {
        self.0.read_granules(layer, blocks, first_granule, num_granules, out);
    }
}
