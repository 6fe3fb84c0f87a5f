//! The bytes of an extent on the sending side: of their own, or where they lie in a pool.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use common::ids::BlockId;
use common::kv_memory::KvMemory;
use common::wire::PoolRun;
use tokio::sync::mpsc;

/// Smaller pieces cost more to keep track of than to copy.
const SHARED_PIECE_BYTES_MIN: usize = 8 << 10;

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

    /// Its bytes in pieces: where they lie in a pool that can show them there in large pieces, else as
    /// [`into_bytes`](Self::into_bytes).
    pub(super) fn into_pieces(self) -> Pieces {
        if let Payload::Pool(extent) = &self
            && let Some(shared) = extent.share()
        {
            return shared;
        }
        Pieces { bytes: vec![self.into_bytes()], in_use: None }
    }

    /// Its bytes, copied out of the pool if that is where they are.
    pub fn into_bytes(self) -> Bytes {
        match self {
            Payload::Bytes(bytes) => bytes,
            Payload::Pool(extent) => {
                let PoolExtent { memory, layer, blocks, first_granule, num_granules, num_bytes } = extent;
                let mut bytes = vec![0; num_granules * memory.granule_bytes()];
                memory.read_granules(layer, &blocks, first_granule, num_granules, &mut bytes);
                bytes.truncate(num_bytes);
                bytes.into()
            }
        }
    }
}

/// The bytes of a payload, piece by piece.
pub(super) struct Pieces {
    pub(super) bytes: Vec<Bytes>,
    /// Of bytes that lie in a pool: says when the last reference to them is gone.
    pub(super) in_use: Option<InUse>,
}

/// Whether anybody still refers to bytes in a pool.
pub(super) struct InUse(mpsc::Receiver<Infallible>);

impl InUse {
    /// Resolves when nobody does.
    pub(super) async fn ended(mut self) {
        // Nothing is ever sent: it ends with the last sender, which the bytes hold.
        let _ = self.0.recv().await;
    }
}

/// A piece of a pool, which lives as long as this.
struct PoolBytes {
    memory: Arc<dyn KvMemory>,
    offset: u64,
    num_bytes: usize,
    _in_use: mpsc::Sender<Infallible>,
}

impl AsRef<[u8]> for PoolBytes {
    fn as_ref(&self) -> &[u8] {
        self.memory.bytes_at(self.offset, self.num_bytes).expect("a memory that shows bytes in place always does")
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

    /// The bytes where they lie; `None` if the memory cannot show them or they lie in small pieces.
    fn share(&self) -> Option<Pieces> {
        self.memory.bytes_at(0, 0)?; // before a memory that only copies is asked for all of it
        let runs = self.runs((self.num_bytes / SHARED_PIECE_BYTES_MIN).max(1))?;
        let (sender, receiver) = mpsc::channel(1);
        let pieces = runs.iter().map(|run| {
            self.memory.bytes_at(run.offset, run.num_bytes as usize)?;
            Some(Bytes::from_owner(PoolBytes {
                memory: self.memory.clone(),
                offset: run.offset,
                num_bytes: run.num_bytes as usize,
                _in_use: sender.clone(),
            }))
        });
        Some(Pieces { bytes: pieces.collect::<Option<_>>()?, in_use: Some(InUse(receiver)) })
    }

    /// Where the bytes lie, neighbours joined; `None` beyond `num_runs_max`.
    pub(super) fn runs(&self, num_runs_max: usize) -> Option<Vec<PoolRun>> {
        let mut runs: Vec<PoolRun> = Vec::new();
        let mut left = self.num_bytes;
        let mut place = |offset: u64, num_bytes: usize| {
            let num_bytes = num_bytes.min(left);
            left -= num_bytes;
            match runs.last_mut().filter(|last| last.end() == offset) {
                Some(last) => last.num_bytes += num_bytes as u32,
                None if num_bytes > 0 => runs.push(PoolRun { offset, num_bytes: num_bytes as u32 }),
                None => {}
            }
        };
        self.memory.visit_places(self.layer, &self.blocks, self.first_granule, self.num_granules, &mut place);
        (runs.len() <= num_runs_max).then_some(runs)
    }
}
