//! From KV that is complete in a pool to extents on the wire.

use std::sync::Arc;

use common::content::{ContentChain, GRANULE_TOKENS};
use common::ids::{Attempt, BlockId, Epoch, Generation, RequestId};
use common::kv_memory::KvMemory;
use common::kv_spec::{KvPlane, KvSpec};
use common::tokens::Token;
use common::wire::{ExtentBinding, ExtentHasher, ExtentHeader, ExtentId};

use crate::transfer::ahead;
use crate::transfer::payload::{Payload, PoolExtent};
use crate::turns;

/// Most tokens in one extent, so that neither a buffer nor a retry is ever large.
const EXTENT_TOKENS_MAX: usize = 1024;

/// Whose extents they are: what every header of a hand-over carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentRequest {
    /// The receiver's life.
    pub epoch: Epoch,
    /// The request.
    pub request: RequestId,
    /// Which try.
    pub attempt: Attempt,
    /// The reservation at the receiver.
    pub generation: Generation,
}

/// KV that is hashed between two looks at whether its thread has had the core for long enough.
const BYTES_BETWEEN_TURNS: usize = 64 << 10;

/// An extent that is complete in a pool, to be hashed and sent. What is said of an [`ExtentSource`] and its blocks
/// holds for this.
pub struct UnsealedExtent {
    epoch: Epoch,
    binding: ExtentBinding,
    payload: PoolExtent,
}

/// Makes the extents of one request. The blocks must be pinned, and final where extents are made of them, while
/// it or any payload of it is used.
pub struct ExtentSource {
    /// Where the KV is.
    pub memory: Arc<dyn KvMemory>,
    /// Its shape.
    pub kv_spec: KvSpec,
    /// Block table of the sequence.
    pub blocks: Arc<[BlockId]>,
    /// Names of its content.
    pub chain: ContentChain,
    /// Whom it is for.
    pub request: ExtentRequest,
}

impl ExtentSource {
    /// Extents for tokens `first_token..end` of `layer`, which are complete in the pool, and their sizes
    /// in bytes. `first_token` is a multiple of the granule.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn extents(&self, layer: u32, first_token: usize, end: usize) -> Vec<(ExtentId, u64)> {
        let (group, planes) = self.group_of(layer);
        (first_token..end)
            .step_by(EXTENT_TOKENS_MAX)
            .map(|first| {
                let num_tokens = (end - first).min(EXTENT_TOKENS_MAX);
                let extent = ExtentId {
                    group: group as u16,
                    layer: layer as u16,
                    plane_mask: ((1u32 << planes.len()) - 1) as u16,
                    first_head: 0,
                    num_heads: planes[0].num_heads as u16,
                    first_token: first as u32,
                    num_tokens: num_tokens as u32,
                };
                (extent, (num_tokens.div_ceil(GRANULE_TOKENS) * self.memory.granule_bytes()) as u64)
            })
            .collect()
    }

    fn group_of(&self, layer: u32) -> (usize, &[KvPlane]) {
        let group = self.kv_spec.groups.iter().position(|group| group.layers.contains(&layer));
        let group = group.expect("the layers asked for are those of the specification");
        (group, &self.kv_spec.groups[group].planes)
    }

    /// An extent whose header is not made yet. `tokens` are the sequence's, at least up to the extent's end.
    pub fn unsealed(&self, tokens: &[Token], extent: ExtentId) -> UnsealedExtent {
        let num_granules = (extent.num_tokens as usize).div_ceil(GRANULE_TOKENS);
        let payload = PoolExtent {
            memory: self.memory.clone(),
            layer: u32::from(extent.layer),
            blocks: self.blocks.clone(),
            first_granule: extent.first_token as usize / GRANULE_TOKENS,
            num_granules,
            num_bytes: num_granules * self.memory.granule_bytes(),
        };
        let end = (extent.first_token + extent.num_tokens) as usize;
        let content = self.chain.digest_of_prefix(tokens, end);
        let ExtentRequest { epoch, request, attempt, generation } = self.request;
        UnsealedExtent { epoch, binding: ExtentBinding { request, attempt, generation, extent, content }, payload }
    }

    /// [`Self::unsealed`], and sealed.
    pub fn seal(&self, tokens: &[Token], extent: ExtentId) -> (ExtentHeader, Payload) {
        self.unsealed(tokens, extent).seal()
    }
}

impl UnsealedExtent {
    /// Makes the extent's header; its bytes are hashed where they lie (by a device, if that is where) and stay there.
    pub fn seal(self) -> (ExtentHeader, Payload) {
        let Self { epoch, binding, payload } = self;
        let ExtentBinding { request, attempt, generation, extent, .. } = binding;
        let mut hasher = ExtentHasher::new(&binding);
        let PoolExtent { memory, layer, blocks, first_granule, num_granules, .. } = &payload;
        let hashed = memory.hash_granules(*layer, blocks, *first_granule, *num_granules);
        if hashed.is_none() {
            payload.visit(|_, bytes| {
                for bytes in bytes.chunks(BYTES_BETWEEN_TURNS) {
                    for piece in bytes.chunks(ahead::PIECE_BYTES) {
                        ahead::to_read(piece.as_ptr_range().end);
                        hasher.update(piece);
                    }
                    turns::give_way();
                }
            });
        }
        let header = ExtentHeader {
            epoch,
            request,
            attempt,
            generation,
            extent,
            num_payload_bytes: payload.num_bytes as u32,
            digest: hashed.map_or_else(|| hasher.digest(), |hashed| hasher.digest_of_hashed(hashed)),
        };
        (header, Payload::Pool(payload))
    }
}
