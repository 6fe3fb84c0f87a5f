//! The bytes of an extent on the sending side: of their own, or where they lie in a pool.

use std::sync::Arc;

use bytes::Bytes;
use common::ids::BlockId;
use common::kv_memory::KvMemory;
use common::wire::PoolRun;

/// What an extent carries.
#[derive(Clone)]
pub enum Payload {
    /// A copy.
    Bytes(Bytes),
    /// A pool's blocks, which are pinned and final until the extent has been sent.
    Pool(PoolExtent),
}

/// Granules of one layer of a sequence, where they lie.
#[derive(Clone)]
pub struct PoolExtent {
    pub(super) memory: Arc<dyn KvMemory>,
    pub(super) layer: u32,
    /// The sequence's block table.
    pub(super) blocks: Arc<[BlockId]>,
    pub(super) first_granule: usize,
    pub(super) num_granules: usize,
    /// All of the granules, unless it was [cut](Payload::cut).
    pub(super) num_bytes: usize,
}

impl Payload {
    /// Bytes.
    pub fn len(&self) -> usize {
        match self {
            Payload::Bytes(bytes) => bytes.len(),
            Payload::Pool(extent) => extent.num_bytes,
        }
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its first `num_bytes` bytes.
    pub fn cut(self, num_bytes: usize) -> Self {
        match self {
            Payload::Bytes(bytes) => Payload::Bytes(bytes.slice(..num_bytes)),
            Payload::Pool(extent) => Payload::Pool(PoolExtent { num_bytes, ..extent }),
        }
    }

    /// Its bytes, copied out of the pool if that is where they are.
    pub fn into_bytes(self) -> Bytes {
        match self {
            Payload::Bytes(bytes) => bytes,
            Payload::Pool(extent) => {
                let mut bytes = Vec::with_capacity(extent.num_bytes);
                extent.visit(|_, piece| bytes.extend_from_slice(piece));
                bytes.into()
            }
        }
    }
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Self {
        Payload::Bytes(bytes)
    }
}

impl PoolExtent {
    /// Shows the bytes where they lie, in order, with the place of each piece in the pool.
    pub(super) fn visit(&self, mut visit: impl FnMut(u64, &[u8])) {
        let mut left = self.num_bytes;
        let mut piece = |offset: u64, bytes: &[u8]| {
            let bytes = &bytes[..bytes.len().min(left)];
            left -= bytes.len();
            if !bytes.is_empty() {
                visit(offset, bytes);
            }
        };
        self.memory.visit_granules(self.layer, &self.blocks, self.first_granule, self.num_granules, &mut piece);
    }

    /// Where the bytes lie, neighbours joined; `None` beyond `num_runs_max`.
    pub(super) fn runs(&self, num_runs_max: usize) -> Option<Vec<PoolRun>> {
        let mut runs: Vec<PoolRun> = Vec::new();
        self.visit(|offset, bytes| {
            let num_bytes = bytes.len() as u32;
            match runs.last_mut().filter(|last| last.end() == offset) {
                Some(last) => last.num_bytes += num_bytes,
                None => runs.push(PoolRun { offset, num_bytes }),
            }
        });
        (runs.len() <= num_runs_max).then_some(runs)
    }
}
