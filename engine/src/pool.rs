//! The memory of a node's KV cache: blocks of all layers, addressed by sequence-relative granules.
//!
//! What travels between nodes is an *extent*: granules `first..first + n` of one layer of one sequence, K and
//! V, in the pool's own order. A granule's bytes are the same whatever the block size, so an extent is read
//! from one pool and landed in another without conversion:
//!
//! ```text
//! sequence      granule 0   1   2   3   4   5            (16 tokens each)
//! block table   [ block 7 ] [ block 2 ] [ block 9 ]      (block size 32)
//! extent 1..4           |-----------|                    = half of block 7, block 2, half... as one byte string
//! ```
//!
//! **Who may touch what.** The pool checks bounds, never ownership: any number of threads may call it at once,
//! and the block manager guarantees that bytes being written are accessed by nobody else at that time. A block
//! belongs to one writer from allocation until its bytes are final: the engine thread while it is computed,
//! the receiving task while its extents land. Readers (attention, senders, parking) only see final bytes of
//! blocks they hold a reference on. What would notice a breach are the digests over extents.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::device_pool::{DevicePool, ExportedPool, MemoryPlace, PeerPool, StagingMemory};
use common::ids::BlockId;
use common::kv_memory::KvMemory;
use common::kv_spec::{KvDtype, KvExtentKind, KvPlane, KvSpec};
use common::wire::PoolRun;
use kernels::cuda::ops;
use kernels::cuda::{Buffer, Device, DeviceError, PeerMemory, Piece};
use kernels::kv_layout::GRANULE_TOKENS;
use kernels::{KvArena, KvLayout};

use crate::staging::{KvStaging, place_of};

/// Whose eyes a pool's memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolMemory {
    /// This process alone; in huge pages.
    Private,
    /// Other processes of this host may be let read it ([`KvPool::shared_file`]). In huge pages only where
    /// `/sys/kernel/mm/transparent_hugepage/shmem_enabled` allows it. Private if the kernel refuses.
    Shareable,
}

/// Why a pool cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// The CPU kernels keep K and V of equal shape in every layer.
    #[error("the KV cache of this model is not supported: {reason}")]
    Unsupported {
        /// What is not.
        reason: String,
    },
    /// Blocks are whole granules.
    #[error("--block-size {block_size} is not supported: use a multiple of {GRANULE_TOKENS}, for example 32")]
    BlockSize {
        /// What was asked for.
        block_size: usize,
    },
    /// More bytes or slots than can be addressed.
    #[error(
        "a KV pool of {num_blocks} blocks of {block_size} tokens is too large to be addressed: lower --kv-cache-memory-bytes"
    )]
    TooLarge {
        /// Blocks asked for.
        num_blocks: usize,
        /// Tokens per block.
        block_size: usize,
    },
    /// The system has less memory than the pool takes.
    #[error(
        "the system has no memory for a KV pool of {bytes} bytes ({reason}): lower --kv-cache-memory-bytes or free memory"
    )]
    NoMemory {
        /// Bytes of the pool.
        bytes: usize,
        /// What the kernel says.
        reason: String,
    },
    /// A device has not as much memory, or fails.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A range of granules that a block table does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "layer {layer}, granules {first_granule} to {end_granule} were named, but there are {num_layers} layers and {num_granules} granules here"
)]
pub struct OutOfRange {
    /// Layer named.
    pub layer: u32,
    /// First granule named.
    pub first_granule: usize,
    /// One behind the last granule named.
    pub end_granule: usize,
    /// Layers of the pool.
    pub num_layers: u32,
    /// Granules of the block table.
    pub num_granules: usize,
}

/// Paged KV of all layers. Shared between the engine thread and the tasks that move blocks; see the
/// [module](self) for who may access what.
#[derive(Debug)]
pub struct KvPool {
    arena: KvArena,
    layout: KvLayout,
    /// On a device, memory for the numbers of blocks that are changed; allocating would wait for what computes.
    block_ids: Option<Mutex<Buffer>>,
    /// On a device, memory for places that are hashed.
    hashing: Option<Mutex<Buffer>>,
}

/// What is worth a copy to a device: so much takes 20 us at 50 GB/s, and beginning and awaiting a copy about as long.
const GATHERED_BYTES: usize = 1 << 20;

/// Blocks that a device changes in one go.
const CHANGED_BLOCKS_MAX: usize = 1024;

impl KvPool {
    /// A zeroed pool of `num_blocks` blocks of `block_size` tokens. All of its memory is taken from the system
    /// now: a page that is touched for the first time in a step would hold up every sequence in it.
    ///
    /// # Errors
    /// [`PoolError`] if the shape is not one the CPU kernels have, the block size is not a multiple of 16, the
    /// pool cannot be addressed, or there is no memory for it.
    pub fn new(spec: &KvSpec, block_size: usize, num_blocks: usize) -> Result<Self, PoolError> {
        Self::with_memory(spec, block_size, num_blocks, PoolMemory::Private)
    }

    /// As [`new`](Self::new), in memory of either kind.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_memory(
        spec: &KvSpec,
        block_size: usize,
        num_blocks: usize,
        memory: PoolMemory,
    ) -> Result<Self, PoolError> {
        let layout = layout_of(spec, block_size, num_blocks)?;
        let num_bytes = layout.total_bytes();
        let shareable = (memory == PoolMemory::Shareable).then(|| KvArena::shareable(num_bytes));
        let arena = match shareable {
            Some(Ok(arena)) => arena,
            Some(Err(error)) => {
                tracing::warn!(%error, "the kernel gives no shared memory for the KV pool: KV goes over quic only");
                KvArena::new(num_bytes)
            }
            None => KvArena::new(num_bytes),
        };
        arena.populate().map_err(|error| PoolError::NoMemory { bytes: num_bytes, reason: error.to_string() })?;
        Ok(Self { arena, layout, block_ids: None, hashing: None })
    }

    /// A zeroed pool in the memory of a device, which keeps a head of a granule in an order of its own
    /// (`kernels/cuda/kv_layout.cuh`). The host reads and writes it by copies, each done when its call returns.
    ///
    /// # Errors
    /// As [`new`](Self::new), or what the device says.
    pub fn on_device(
        spec: &KvSpec,
        block_size: usize,
        num_blocks: usize,
        device: &Arc<dyn Device>,
    ) -> Result<Self, PoolError> {
        let layout = layout_of(spec, block_size, num_blocks)?;
        let arena = KvArena::on_device(Buffer::shared(device, layout.total_bytes())?)?;
        let block_ids = Some(Mutex::new(Buffer::new(device, CHANGED_BLOCKS_MAX * size_of::<u32>())?));
        let hashing = Some(Mutex::new(Buffer::new(device, ops::DIGEST_BYTES)?));
        Ok(Self { arena, layout, block_ids, hashing })
    }

    /// The file that other processes can be let read the pool in, and its size in bytes; `None` if the memory
    /// is private. Sealed: it keeps its size, and nobody but this process can write to it.
    pub fn shared_file(&self) -> Option<(BorrowedFd<'_>, usize)> {
        self.arena.file()
    }

    /// Bytes of all blocks.
    pub fn num_bytes(&self) -> usize {
        self.arena.len()
    }

    /// Whether the kernel is set to give huge pages for it.
    pub fn gets_huge_pages(&self) -> bool {
        self.arena.gets_huge_pages()
    }

    /// Tokens per block.
    pub fn block_size(&self) -> usize {
        self.layout.block_size
    }

    /// Blocks.
    pub fn num_blocks(&self) -> usize {
        self.layout.num_blocks
    }

    /// Layers that keep KV.
    pub fn num_layers(&self) -> u32 {
        self.layout.num_layers as u32
    }

    /// Granules per block.
    pub fn granules_per_block(&self) -> usize {
        self.layout.block_size / GRANULE_TOKENS
    }

    /// Bytes of an extent: `num_granules` granules of one layer, all planes.
    pub fn extent_bytes(&self, num_granules: usize) -> usize {
        num_granules * self.layout.granule_bytes()
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(&self) -> usize {
        self.layout.num_layers * self.layout.block_bytes()
    }

    /// The bytes themselves, for the kernels.
    pub fn arena(&self) -> &KvArena {
        &self.arena
    }

    /// Where in them everything lies.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Whether an extent named by somebody else lies within a block table of `num_blocks` blocks. What passes
    /// here makes [`read_granules`](Self::read_granules) and [`write_at`](Self::write_at) succeed.
    ///
    /// # Errors
    /// [`OutOfRange`], with what was named and what is there.
    pub fn check_extent(
        &self,
        layer: u32,
        num_blocks: usize,
        first_granule: usize,
        num_granules: usize,
    ) -> Result<(), OutOfRange> {
        let num_held = num_blocks.saturating_mul(self.granules_per_block());
        let end_granule = first_granule.saturating_add(num_granules);
        if layer < self.num_layers() && end_granule <= num_held {
            return Ok(());
        }
        let num_layers = self.num_layers();
        Err(OutOfRange { layer, first_granule, end_granule, num_layers, num_granules: num_held })
    }

    /// Copies an extent of the sequence with block table `blocks` into `out`, which holds exactly
    /// [`extent_bytes(num_granules)`](Self::extent_bytes).
    ///
    /// # Panics
    /// If the extent is out of range or `out` has another size: check with
    /// [`check_extent`](Self::check_extent) what comes from outside.
    pub fn read_granules(
        &self,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        num_granules: usize,
        out: &mut [u8],
    ) {
        assert_eq!(out.len(), self.extent_bytes(num_granules), "the buffer of an extent of {num_granules} granules");
        self.arena.read_places(&self.places(layer, blocks, first_granule, 0, out.len()), out);
    }

    /// Lands `bytes` at `byte_offset` of the extent that begins with `first_granule`. Extents may land in any
    /// pieces and any order; what a piece does not cover stays as it is.
    ///
    /// # Panics
    /// If the piece reaches beyond the block table: check with [`check_extent`](Self::check_extent) that the
    /// whole extent fits, and that `byte_offset + bytes.len()` is within
    /// [`extent_bytes`](Self::extent_bytes).
    pub fn write_at(&self, layer: u32, blocks: &[BlockId], first_granule: usize, byte_offset: usize, bytes: &[u8]) {
        self.arena.write_places(&self.places(layer, blocks, first_granule, byte_offset, bytes.len()), bytes);
    }

    /// Appends one block's bytes over all layers, [`block_bytes`](Self::block_bytes) of them, to `out`.
    pub fn read_block(&self, block: BlockId, out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + self.block_bytes(), 0);
        self.arena.read_places(&self.in_all_layers(block, 0..self.layout.block_bytes()), &mut out[start..]);
    }

    /// Puts back what [`read_block`](Self::read_block) gave, into any block.
    ///
    /// # Panics
    /// If `bytes` is not one block's.
    pub fn write_block(&self, block: BlockId, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.block_bytes(), "the bytes of one block over all layers");
        self.arena.write_places(&self.in_all_layers(block, 0..self.layout.block_bytes()), bytes);
    }

    /// Where a part of a block lies, layer by layer: (offset, bytes).
    fn in_all_layers(&self, block: BlockId, part: Range<usize>) -> Vec<(usize, usize)> {
        let layers = 0..self.layout.num_layers;
        layers.map(|layer| (self.layout.offset(layer, block.0) + part.start, part.len())).collect()
    }

    /// Likewise of a granule of the sequence with block table `blocks`.
    fn granule_in_all_layers(&self, blocks: &[BlockId], granule: usize) -> Vec<(usize, usize)> {
        let (index, within) = (granule / self.granules_per_block(), granule % self.granules_per_block());
        let bytes = self.layout.granule_bytes();
        self.in_all_layers(blocks[index], within * bytes..(within + 1) * bytes)
    }

    /// Zeroes a block in all layers. A block that is read before it is full is cleared when it is allocated:
    /// attention reads whole granules, and 0 x NaN is NaN.
    pub fn clear_block(&self, block: BlockId) {
        self.clear_blocks(&[block]);
    }

    /// [`clear_block`](Self::clear_block) for several, on a device in one go.
    pub fn clear_blocks(&self, blocks: &[BlockId]) {
        if let Some((pool, ids)) = self.device_pool().zip(self.block_ids()) {
            for blocks in blocks.chunks(CHANGED_BLOCKS_MAX) {
                let blocks: Vec<u32> = blocks.iter().map(|block| block.0).collect();
                ops::clear_blocks(pool, &blocks, &ids).unwrap_or_else(|error| lost(&error));
            }
            return;
        }
        blocks.iter().for_each(|block| self.clear_on_host(*block));
    }

    fn clear_on_host(&self, block: BlockId) {
        for layer in 0..self.layout.num_layers {
            let offset = self.layout.offset(layer, block.0);
            self.arena.zero(offset..offset + self.layout.block_bytes());
        }
    }

    /// Copies a block in all layers.
    pub fn copy_block(&self, source: BlockId, destination: BlockId) {
        if let Some((pool, ids)) = self.device_pool().zip(self.block_ids()) {
            let copied = ops::copy_blocks(pool, &[source.0, destination.0], &ids);
            return copied.unwrap_or_else(|error| lost(&error));
        }
        for layer in 0..self.layout.num_layers {
            let (from, to) = (self.layout.offset(layer, source.0), self.layout.offset(layer, destination.0));
            self.arena.copy_within(from, to, self.layout.block_bytes());
        }
    }

    /// The pool as a device's kernels want it, if it is there.
    pub fn device_pool(&self) -> Option<ops::Pool<'_>> {
        self.arena.device().map(|buffer| ops::Pool { buffer, layout: &self.layout })
    }

    /// Who holds it changes blocks.
    fn block_ids(&self) -> Option<MutexGuard<'_, Buffer>> {
        self.block_ids.as_ref().map(|ids| ids.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Where `num_bytes` lie, from `byte_offset` of the extent on: (offset, bytes) of each piece.
    fn places(
        &self,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        byte_offset: usize,
        num_bytes: usize,
    ) -> Vec<(usize, usize)> {
        let mut places = Vec::new();
        self.for_runs(layer, blocks, first_granule, byte_offset, num_bytes, |offset, run| {
            places.push((offset, run.len()));
        });
        places
    }

    /// Cuts `len` bytes, from `byte_offset` of the extent on, where neighbouring blocks end: calls
    /// `visit(offset in the arena, range of the bytes)`.
    pub(crate) fn for_runs(
        &self,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        byte_offset: usize,
        len: usize,
        mut visit: impl FnMut(usize, std::ops::Range<usize>),
    ) {
        let block_bytes = self.layout.block_bytes();
        let start = first_granule * self.layout.granule_bytes() + byte_offset;
        assert!(start + len <= blocks.len() * block_bytes, "bytes {start}..+{len} of {} blocks", blocks.len());
        let mut done = 0;
        while done < len {
            let (index, within) = ((start + done) / block_bytes, (start + done) % block_bytes);
            let offset = self.layout.offset(layer as usize, blocks[index].0) + within;
            let (mut count, mut next) = (block_bytes - within, index + 1);
            // Blocks that lie one behind the other are one piece: longer copies, longer input to a digest.
            while count < len - done && self.layout.offset(layer as usize, blocks[next].0) == offset + count {
                (count, next) = (count + block_bytes, next + 1);
            }
            let count = count.min(len - done);
            visit(offset, done..done + count);
            done += count;
        }
    }
}

impl KvMemory for KvPool {
    fn num_layers(&self) -> usize {
        self.layout.num_layers
    }

    fn granule_bytes(&self) -> usize {
        self.layout.granule_bytes()
    }

    fn write_at(&self, layer: u32, blocks: &[BlockId], first_granule: usize, byte_offset: usize, bytes: &[u8]) {
        self.write_at(layer, blocks, first_granule, byte_offset, bytes);
    }

    fn fill_at(
        &self,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        byte_offset: usize,
        num_bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) {
        if self.arena.device().is_some() {
            let mut bytes = vec![0; num_bytes];
            fill(&mut bytes);
            return self.write_at(layer, blocks, first_granule, byte_offset, &bytes);
        }
        self.for_runs(layer, blocks, first_granule, byte_offset, num_bytes, |offset, run| {
            self.arena.fill(offset, run.len(), &mut *fill);
        });
    }

    fn gathered_bytes(&self) -> Option<usize> {
        self.arena.device().map(|_| GATHERED_BYTES)
    }

    fn read_granules(&self, layer: u32, blocks: &[BlockId], first_granule: usize, num_granules: usize, out: &mut [u8]) {
        self.read_granules(layer, blocks, first_granule, num_granules, out);
    }

    fn visit_granules(
        &self,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        num_granules: usize,
        visit: &mut dyn FnMut(u64, &[u8]),
    ) {
        let num_bytes = self.extent_bytes(num_granules);
        if self.arena.device().is_some() {
            let mut bytes = vec![0; num_bytes];
            self.read_granules(layer, blocks, first_granule, num_granules, &mut bytes);
            return self.for_runs(layer, blocks, first_granule, 0, num_bytes, |offset, run| {
                visit(offset as u64, &bytes[run]);
            });
        }
        self.for_runs(layer, blocks, first_granule, 0, num_bytes, |offset, run| {
            self.arena.visit(offset, run.len(), |bytes| visit(offset as u64, bytes));
        });
    }

    fn read_all_layers(&self, blocks: &[BlockId], granule: usize, out: &mut [u8]) {
        self.arena.read_places(&self.granule_in_all_layers(blocks, granule), out);
    }

    fn write_all_layers(&self, blocks: &[BlockId], granule: usize, bytes: &[u8]) {
        self.arena.write_places(&self.granule_in_all_layers(blocks, granule), bytes);
    }

    fn visit_places(
        &self,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        num_granules: usize,
        visit: &mut dyn FnMut(u64, usize),
    ) {
        let places = self.places(layer, blocks, first_granule, 0, self.extent_bytes(num_granules));
        places.into_iter().for_each(|(offset, num_bytes)| visit(offset as u64, num_bytes));
    }

    fn hash_granules(&self, layer: u32, blocks: &[BlockId], first_granule: usize, num_granules: usize) -> Option<u128> {
        let (buffer, scratch) = (self.arena.device()?, self.hashing.as_ref()?);
        let places = self.places(layer, blocks, first_granule, 0, self.extent_bytes(num_granules));
        if places.is_empty() || places.len() > ops::DIGEST_PIECES_MAX {
            return None;
        }
        let scratch = scratch.lock().unwrap_or_else(PoisonError::into_inner);
        Some(ops::digest(buffer, &places, &scratch).unwrap_or_else(|error| lost(&error)))
    }

    fn bytes_at(&self, offset: u64, num_bytes: usize) -> Option<&[u8]> {
        self.arena.bytes_at(offset as usize, num_bytes)
    }
}

impl DevicePool for KvPool {
    fn export(&self) -> Result<ExportedPool, String> {
        let buffer = self.arena.device().ok_or("the pool is in the host's memory")?;
        let handle = buffer.export().map_err(|error| error.to_string())?;
        Ok(ExportedPool { handle, num_bytes: buffer.num_bytes() as u64 })
    }

    fn open_peer(self: Arc<Self>, exported: &ExportedPool) -> Result<Arc<dyn PeerPool>, String> {
        let device = self.arena.device().ok_or("the pool is in the host's memory")?.device().clone();
        let num_bytes = usize::try_from(exported.num_bytes).map_err(|_| "a pool that cannot be addressed")?;
        let memory = PeerMemory::open(&device, &exported.handle, num_bytes).map_err(|error| error.to_string())?;
        Ok(Arc::new(PeerKvPool { pool: self, memory }))
    }

    fn place(&self) -> Result<MemoryPlace, String> {
        Ok(place_of(self.arena.device().ok_or("the pool is in the host's memory")?))
    }

    fn staging(self: Arc<Self>, num_bytes: usize) -> Result<Box<dyn StagingMemory>, String> {
        Ok(Box::new(KvStaging::new(self, num_bytes)?))
    }

    fn enter(&self) -> Result<(), String> {
        let device = self.arena.device().ok_or("the pool is in the host's memory")?.device();
        device.enter().map_err(|error| error.to_string())
    }
}

/// Another process's pool, opened for copies into `pool`.
struct PeerKvPool {
    pool: Arc<KvPool>,
    memory: PeerMemory,
}

impl PeerPool for PeerKvPool {
    fn num_bytes(&self) -> u64 {
        self.memory.num_bytes() as u64
    }

    fn copy_granules(
        &self,
        runs: &[PoolRun],
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
    ) -> Result<(), String> {
        let num_bytes: usize = runs.iter().map(|run| run.num_bytes as usize).sum();
        let mut from = runs.iter().map(|run| (run.offset as usize, run.num_bytes as usize));
        let (mut offset, mut left) = (0, 0);
        let mut pieces = Vec::new();
        // Neighbours there need not be neighbours here.
        self.pool.for_runs(layer, blocks, first_granule, 0, num_bytes, |mut to, here| {
            let mut missing = here.len();
            while missing > 0 {
                if left == 0 {
                    (offset, left) = from.next().expect("the runs are as long as their sum");
                }
                let num_bytes = missing.min(left);
                pieces.push(Piece { from: offset, to, num_bytes });
                (offset, to, left, missing) =
                    (offset + num_bytes, to + num_bytes, left - num_bytes, missing - num_bytes);
            }
        });
        let own = self.pool.arena.device().expect("only a pool on a device opens another's");
        self.memory.copy_to(own, &pieces).map_err(|error| error.to_string())
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), String> {
        self.memory.read(offset as usize, into).map_err(|error| error.to_string())
    }
}

/// Nothing is known of KV whose device does not answer.
fn lost(error: &DeviceError) -> ! {
    panic!("the KV pool's device is lost: {error}")
}

fn layout_of(spec: &KvSpec, block_size: usize, num_blocks: usize) -> Result<KvLayout, PoolError> {
    let plane = uniform_plane(spec)?;
    if block_size == 0 || !block_size.is_multiple_of(GRANULE_TOKENS) {
        return Err(PoolError::BlockSize { block_size });
    }
    let bytes = spec.bytes_per_token() as u128 * block_size as u128 * num_blocks as u128;
    // Slots are u32 in a plan.
    let num_slots = num_blocks as u128 * block_size as u128;
    if bytes > isize::MAX as u128 || num_slots > u128::from(u32::MAX) {
        return Err(PoolError::TooLarge { num_blocks, block_size });
    }
    Ok(KvLayout {
        num_layers: spec.num_layers() as usize,
        num_blocks,
        block_size,
        num_kv_heads: plane.num_heads as usize,
        head_dim: plane.head_dim as usize,
        dtype: match plane.dtype {
            KvDtype::F32 => kernels::KvDtype::F32,
            KvDtype::Bf16 => kernels::KvDtype::Bf16,
        },
    })
}

/// The one shape of K and V that all layers have.
pub(crate) fn uniform_plane(spec: &KvSpec) -> Result<&KvPlane, PoolError> {
    let unsupported = |reason: String| PoolError::Unsupported { reason };
    let mut planes = spec.groups.iter().flat_map(|group| &group.planes);
    let first = planes.next().ok_or_else(|| unsupported("it has no layers".to_string()))?;
    for plane in planes {
        let shape = |plane: &KvPlane| (plane.num_heads, plane.head_dim, plane.dtype, plane.scale_bytes);
        if shape(plane) != shape(first) {
            return Err(unsupported(format!(
                "plane {} has {} heads of {}, another {} of {}; all layers must have K and V of one shape",
                plane.name, plane.num_heads, plane.head_dim, first.num_heads, first.head_dim
            )));
        }
    }
    for group in &spec.groups {
        if group.kind != KvExtentKind::PerToken || group.planes.len() != 2 {
            return Err(unsupported(format!(
                "a group of layers keeps {} planes {:?}, expected K and V per token",
                group.planes.len(),
                group.kind
            )));
        }
    }
    if first.scale_bytes != 0 {
        return Err(unsupported("quantized KV".to_string()));
    }
    if !(8..=256).contains(&first.head_dim) || first.head_dim % 2 != 0 {
        return Err(unsupported(format!("head_dim {}, expected an even number from 8 to 256", first.head_dim)));
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> KvSpec {
        KvSpec::uniform(2, 2, 8, KvDtype::Bf16, None)
    }

    fn pool(block_size: usize, num_blocks: usize) -> KvPool {
        KvPool::new(&spec(), block_size, num_blocks).unwrap()
    }

    fn noise(len: usize, seed: u8) -> Vec<u8> {
        (0..len).map(|i| (i as u8).wrapping_mul(37).wrapping_add((i >> 8) as u8).wrapping_add(seed)).collect()
    }

    #[test]
    fn extents_move_between_pools_of_different_block_sizes_unconverted() {
        let (from, to) = (pool(32, 4), pool(48, 4));
        let (from_blocks, to_blocks) = ([BlockId(3), BlockId(0), BlockId(2)], [BlockId(1), BlockId(3)]);
        let bytes = noise(from.extent_bytes(6), 1);
        from.write_at(1, &from_blocks, 0, 0, &bytes);
        let mut extent = vec![0; from.extent_bytes(4)];
        from.read_granules(1, &from_blocks, 1, 4, &mut extent);
        assert_eq!(extent, bytes[from.extent_bytes(1)..from.extent_bytes(5)]);
        to.write_at(1, &to_blocks, 1, 0, &extent);
        let mut back = vec![0; to.extent_bytes(6)];
        to.read_granules(1, &to_blocks, 0, 6, &mut back);
        assert_eq!(back[to.extent_bytes(1)..to.extent_bytes(5)], extent);
        assert!(back[..to.extent_bytes(1)].iter().chain(&back[to.extent_bytes(5)..]).all(|&b| b == 0));
        let mut other_layer = vec![1; to.extent_bytes(6)];
        to.read_granules(0, &to_blocks, 0, 6, &mut other_layer);
        assert!(other_layer.iter().all(|&b| b == 0));
    }

    #[test]
    fn extent_is_seen_in_place_as_it_is_read() {
        let pool = KvPool::with_memory(&spec(), 32, 4, PoolMemory::Shareable).unwrap();
        let blocks = [BlockId(3), BlockId(0), BlockId(2)];
        pool.write_at(1, &blocks, 0, 0, &noise(pool.extent_bytes(6), 1));
        let mut expected = vec![0; pool.extent_bytes(4)];
        pool.read_granules(1, &blocks, 1, 4, &mut expected);
        let file = std::fs::File::from(pool.shared_file().unwrap().0.try_clone_to_owned().unwrap());
        let (mut seen, mut in_file) = (Vec::new(), Vec::new());
        pool.visit_granules(1, &blocks, 1, 4, &mut |offset, bytes| {
            seen.extend_from_slice(bytes);
            let mut same = vec![0; bytes.len()];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut same, offset).unwrap();
            in_file.extend(same);
        });
        assert_eq!(seen, expected);
        assert_eq!(in_file, expected);
    }

    #[test]
    fn neighbouring_blocks_are_one_piece_to_see_and_to_fill() {
        let pool = pool(16, 8);
        let blocks: Vec<BlockId> = [5, 6, 7, 0, 3, 4].map(BlockId).to_vec();
        let bytes = noise(pool.extent_bytes(5), 9);
        let (mut sizes, mut rest) = (Vec::new(), &bytes[..]);
        pool.fill_at(1, &blocks, 0, pool.extent_bytes(1), pool.extent_bytes(5), &mut |piece| {
            let (now, later) = rest.split_at(piece.len());
            piece.copy_from_slice(now);
            (rest, sizes) = (later, [&sizes[..], &[piece.len() / pool.extent_bytes(1)]].concat());
        });
        assert_eq!((sizes, rest.len()), (vec![2, 1, 2], 0));
        let mut seen = Vec::new();
        pool.visit_granules(1, &blocks, 1, 5, &mut |_, piece| seen.push(piece.to_vec()));
        assert_eq!((seen.len(), seen.concat()), (3, bytes));
    }

    #[test]
    fn an_extent_may_land_in_pieces_of_any_size() {
        let pool = pool(16, 8);
        let blocks: Vec<BlockId> = [5, 1, 7, 0].map(BlockId).to_vec();
        let bytes = noise(pool.extent_bytes(3), 9);
        let mut at = bytes.len();
        for piece in [1, 700, 64, 3, 1000].into_iter().cycle() {
            let size = piece.min(at);
            at -= size;
            pool.write_at(0, &blocks, 1, at, &bytes[at..at + size]);
            if at == 0 {
                break;
            }
        }
        let mut back = vec![0; bytes.len()];
        pool.read_granules(0, &blocks, 1, 3, &mut back);
        assert_eq!(back, bytes);
    }

    #[test]
    fn blocks_are_saved_restored_copied_and_cleared_in_all_layers() {
        let pool = pool(32, 4);
        let bytes = noise(pool.block_bytes(), 4);
        pool.write_block(BlockId(1), &bytes);
        pool.copy_block(BlockId(1), BlockId(3));
        pool.clear_block(BlockId(1));
        let saved = |block| {
            let mut bytes = Vec::new();
            pool.read_block(BlockId(block), &mut bytes);
            bytes
        };
        assert_eq!(saved(3), bytes);
        assert!([0, 1, 2].into_iter().all(|block| saved(block).iter().all(|&b| b == 0)));
    }

    #[test]
    fn ranges_from_outside_are_refused_with_what_is_there() {
        let pool = pool(32, 4);
        assert_eq!(pool.check_extent(1, 3, 0, 6), Ok(()));
        assert!(pool.check_extent(2, 3, 0, 6).is_err());
        assert!(pool.check_extent(1, 3, 1, 6).is_err());
        assert!(pool.check_extent(u32::MAX, usize::MAX, usize::MAX, usize::MAX).is_err());
        let error = pool.check_extent(0, 1, 2, 3).unwrap_err();
        assert_eq!(
            error.to_string(),
            "layer 0, granules 2 to 5 were named, but there are 2 layers and 2 granules here"
        );
    }

    #[test]
    fn impossible_pools_are_refused() {
        let spec = KvSpec::uniform(2, 2, 8, KvDtype::Bf16, None);
        assert_eq!(KvPool::new(&spec, 24, 1).unwrap_err(), PoolError::BlockSize { block_size: 24 });
        assert!(matches!(KvPool::new(&spec, 16, usize::MAX / 2), Err(PoolError::TooLarge { .. })));
        let odd = KvSpec::uniform(2, 2, 9, KvDtype::Bf16, None);
        assert!(matches!(KvPool::new(&odd, 16, 1), Err(PoolError::Unsupported { .. })));
        assert!(matches!(KvPool::new(&KvSpec { groups: vec![] }, 16, 1), Err(PoolError::Unsupported { .. })));
    }
}
