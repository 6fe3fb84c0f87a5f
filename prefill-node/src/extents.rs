//! From layers written in the pool to extents on the wire.

use std::sync::Arc;

use bytes::Bytes;
use common::content::{ContentChain, GRANULE_TOKENS};
use common::ids::{BlockId, Epoch};
use common::kv_spec::KvSpec;
use common::wire::bulk::extent_digest;
use common::wire::{ExtentHeader, ExtentId, Prefill};
use engine::pool::KvPool;

/// Most tokens in one extent, so that neither a buffer nor a retry is ever large.
const EXTENT_TOKENS_MAX: usize = 1024;

/// Reads and seals the extents of one request. The blocks must be pinned while it is used.
pub(crate) struct ExtentSource {
    pub(crate) pool: Arc<KvPool>,
    pub(crate) kv_spec: KvSpec,
    pub(crate) blocks: Arc<[BlockId]>,
    pub(crate) chain: ContentChain,
    /// The receiver's life.
    pub(crate) epoch: Epoch,
}

impl ExtentSource {
    /// Extents for tokens `first_token..end` of `layer`, which are complete in the pool, and their sizes
    /// in bytes. `first_token` is a multiple of the granule.
    pub(crate) fn extents(&self, layer: u32, first_token: usize, end: usize) -> Vec<(ExtentId, u64)> {
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
                (extent, self.pool.extent_bytes(num_tokens.div_ceil(GRANULE_TOKENS)) as u64)
            })
            .collect()
    }

    fn group_of(&self, layer: u32) -> (usize, &[common::kv_spec::KvPlane]) {
        let group = self.kv_spec.groups.iter().position(|group| group.layers.contains(&layer));
        let group = group.expect("the runner reports layers of its own specification");
        (group, &self.kv_spec.groups[group].planes)
    }

    /// Reads an extent's bytes and makes its header.
    pub(crate) fn seal(&self, prefill: &Prefill, extent: ExtentId) -> (ExtentHeader, Bytes) {
        let first_granule = extent.first_token as usize / GRANULE_TOKENS;
        let num_granules = (extent.num_tokens as usize).div_ceil(GRANULE_TOKENS);
        let mut payload = vec![0; self.pool.extent_bytes(num_granules)];
        self.pool.read_granules(u32::from(extent.layer), &self.blocks, first_granule, num_granules, &mut payload);
        let end = (extent.first_token + extent.num_tokens) as usize;
        let content = self.chain.digest_of_prefix(&prefill.tokens.0, end);
        let (request, attempt, generation) = (prefill.request, prefill.attempt, prefill.generation);
        let header = ExtentHeader {
            epoch: self.epoch,
            request,
            attempt,
            generation,
            extent,
            num_payload_bytes: payload.len() as u32,
            digest: extent_digest(request, attempt, generation, &extent, content, &payload),
        };
        (header, Bytes::from(payload))
    }
}
