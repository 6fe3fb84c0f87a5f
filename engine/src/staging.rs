//! Memory on a pool's device that belongs to no block: what a network library reads into, before it is copied into blocks.

use std::ops::Range;
use std::sync::Arc;

use common::device_pool::{MemoryPlace, StagingMemory};
use common::ids::BlockId;
use kernels::cuda::{Buffer, Lane, Piece};

use crate::pool::KvPool;

/// For blocks of `pool`.
pub(crate) struct KvStaging {
    pool: Arc<KvPool>,
    buffer: Buffer,
}

pub(crate) fn place_of(buffer: &Buffer) -> MemoryPlace {
    let gpu = buffer.device().gpu().map(|number| u32::try_from(number).expect("a machine has few GPUs"));
    MemoryPlace { address: buffer.address(), num_bytes: buffer.num_bytes() as u64, gpu }
}

impl KvStaging {
    pub(crate) fn new(pool: Arc<KvPool>, num_bytes: usize) -> Result<Self, String> {
        let device = pool.arena().device().ok_or("the pool is in the host's memory")?.device();
        let buffer = Buffer::new(device, num_bytes).map_err(|error| error.to_string())?;
        Ok(Self { pool, buffer })
    }
}

impl StagingMemory for KvStaging {
    fn place(&self) -> MemoryPlace {
        place_of(&self.buffer)
    }

    fn copy_to_blocks(
        &self,
        from: Range<usize>,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        byte_offset: usize,
    ) -> Result<(), String> {
        let mut pieces = Vec::new();
        self.pool.for_runs(layer, blocks, first_granule, byte_offset, from.len(), |to, run| {
            pieces.push(Piece { from: from.start + run.start, to, num_bytes: run.len() });
        });
        let own = self.pool.arena().device().expect("only a pool on a device has a staging");
        own.copy_pieces_from(&self.buffer, &pieces).map_err(|error| error.to_string())
    }

    fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), String> {
        self.buffer.read(Lane::Transfer, offset, into).map_err(|error| error.to_string())
    }
}
