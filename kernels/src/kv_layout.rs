//! Where a key or value of the paged KV pool lies, in bytes.
//!
//! A granule is 16 tokens, the unit that content keys count in and that travels between nodes. Per layer
//! and block the granules lie in order, so a block of any size is a concatenation of granules, and nodes
//! of different block sizes exchange the same granule bytes unconverted.
//!
//! ```text
//! arena    [layer][block]
//! block    [granule]                              block_size / 16 of them
//! granule  [K plane][V plane]
//! plane    [kv_head]
//! K head   bf16 [head_dim/2][16 tokens][2]        f32 [head_dim][16 tokens]      lanes are tokens
//! V head   bf16 [16 tokens/2][head_dim][2]        f32 [16 tokens][head_dim]      lanes are features
//! ```
//!
//! Attention thus reads K and V in the order of its arithmetic, without a horizontal sum.

use crate::granule::{GranuleFormat, GranuleOrder};
use crate::numerics::{round_bf16, widen_bf16};

/// Tokens of a granule.
pub const GRANULE_TOKENS: usize = 16;

/// Type of the values in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 4 bytes, values as computed.
    F32,
    /// 2 bytes, values through [`round_bf16`].
    Bf16,
}

impl KvDtype {
    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::Bf16 => 2,
        }
    }
}

/// Shape of a KV pool whose layers are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers that store KV.
    pub num_layers: usize,
    /// Blocks per layer.
    pub num_blocks: usize,
    /// Tokens per block: a multiple of 16.
    pub block_size: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Features per head: even, 8 to 256.
    pub head_dim: usize,
    /// Type of the values.
    pub dtype: KvDtype,
}

impl KvLayout {
    /// Panics unless block size and head_dim are in range: a layout is made from a checked configuration.
    pub fn check(&self) {
        assert!(
            self.block_size > 0 && self.block_size.is_multiple_of(GRANULE_TOKENS),
            "block size {} is not a multiple of {GRANULE_TOKENS}",
            self.block_size
        );
        assert!(
            (8..=256).contains(&self.head_dim) && self.head_dim.is_multiple_of(2),
            "head_dim {} is not an even number from 8 to 256",
            self.head_dim
        );
    }

    /// What the bytes of a granule are.
    #[inline(always)]
    pub fn granule_format(&self) -> GranuleFormat {
        let &KvLayout { num_kv_heads, head_dim, dtype, .. } = self;
        GranuleFormat { order: GranuleOrder::Lanes, dtype, num_kv_heads, head_dim }
    }

    /// Bytes of one head of one plane of a granule.
    #[inline(always)]
    pub fn head_bytes(&self) -> usize {
        self.granule_format().head_bytes()
    }

    /// Bytes of the K plane, or the V plane, of one granule.
    #[inline(always)]
    pub fn plane_bytes(&self) -> usize {
        self.granule_format().plane_bytes()
    }

    /// Bytes of one granule of one layer: both planes.
    #[inline(always)]
    pub fn granule_bytes(&self) -> usize {
        self.granule_format().granule_bytes()
    }

    /// Bytes of one block of one layer.
    pub fn block_bytes(&self) -> usize {
        self.block_size / GRANULE_TOKENS * self.granule_bytes()
    }

    /// Bytes of the whole pool.
    pub fn total_bytes(&self) -> usize {
        self.num_layers * self.num_blocks * self.block_bytes()
    }

    /// Byte offset of a block of a layer in the arena.
    pub fn offset(&self, layer: usize, block: u32) -> usize {
        assert!(layer < self.num_layers, "layer {layer} of {}", self.num_layers);
        assert!((block as usize) < self.num_blocks, "block {block} of {}", self.num_blocks);
        (layer * self.num_blocks + block as usize) * self.block_bytes()
    }

    /// Byte offset of granule `granule` (counted within the block) of a block of a layer.
    pub fn granule_offset(&self, layer: usize, block: u32, granule: usize) -> usize {
        debug_assert!(granule < self.block_size / GRANULE_TOKENS);
        self.offset(layer, block) + granule * self.granule_bytes()
    }

    /// Byte offset, within its granule's head of the K plane, of feature `dim` of token `token`.
    pub fn k_offset(&self, token: usize, dim: usize) -> usize {
        match self.dtype {
            KvDtype::F32 => (dim * GRANULE_TOKENS + token) * 4,
            KvDtype::Bf16 => (dim / 2 * GRANULE_TOKENS + token) * 4 + dim % 2 * 2,
        }
    }

    /// Byte offset, within its granule's head of the V plane, of feature `dim` of token `token`.
    pub fn v_offset(&self, token: usize, dim: usize) -> usize {
        match self.dtype {
            KvDtype::F32 => (token * self.head_dim + dim) * 4,
            KvDtype::Bf16 => (token / 2 * self.head_dim + dim) * 4 + token % 2 * 2,
        }
    }

    /// Packs 16 tokens of K and of V, `[16, num_kv_heads, head_dim]` each, into one granule's bytes: the
    /// specification of the layout.
    pub fn pack_granule(&self, k: &[f32], v: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0u8; self.granule_bytes()];
        self.for_each(|index, k_at, v_at| {
            self.store(&mut bytes, k_at, k[index]);
            self.store(&mut bytes, v_at, v[index]);
        });
        bytes
    }

    /// The inverse of [`KvLayout::pack_granule`]: K and V of one granule as f32 `[16, num_kv_heads, head_dim]`.
    pub fn unpack_granule(&self, bytes: &[u8]) -> (Vec<f32>, Vec<f32>) {
        assert_eq!(bytes.len(), self.granule_bytes(), "bytes of one granule");
        let num_values = GRANULE_TOKENS * self.num_kv_heads * self.head_dim;
        let (mut k, mut v) = (vec![0.0; num_values], vec![0.0; num_values]);
        self.for_each(|index, k_at, v_at| {
            k[index] = self.load(bytes, k_at);
            v[index] = self.load(bytes, v_at);
        });
        (k, v)
    }

    /// Visits every value of a granule: (index in `[16, heads, dim]`, byte of K, byte of V).
    fn for_each(&self, mut visit: impl FnMut(usize, usize, usize)) {
        for token in 0..GRANULE_TOKENS {
            for head in 0..self.num_kv_heads {
                for dim in 0..self.head_dim {
                    let index = (token * self.num_kv_heads + head) * self.head_dim + dim;
                    let base = head * self.head_bytes();
                    visit(
                        index,
                        base + self.k_offset(token, dim),
                        self.plane_bytes() + base + self.v_offset(token, dim),
                    );
                }
            }
        }
    }

    fn store(&self, bytes: &mut [u8], at: usize, value: f32) {
        match self.dtype {
            KvDtype::F32 => bytes[at..at + 4].copy_from_slice(&value.to_le_bytes()),
            KvDtype::Bf16 => bytes[at..at + 2].copy_from_slice(&round_bf16(value).to_le_bytes()),
        }
    }

    fn load(&self, bytes: &[u8], at: usize) -> f32 {
        match self.dtype {
            KvDtype::F32 => f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]),
            KvDtype::Bf16 => widen_bf16(u16::from_le_bytes([bytes[at], bytes[at + 1]])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(dtype: KvDtype, head_dim: usize) -> KvLayout {
        KvLayout { num_layers: 2, num_blocks: 3, block_size: 32, num_kv_heads: 2, head_dim, dtype }
    }

    #[test]
    fn unpacking_gives_back_what_was_packed() {
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            for head_dim in [8, 20, 64] {
                let layout = layout(dtype, head_dim);
                let n = 16 * 2 * head_dim;
                let k: Vec<f32> = (0..n).map(|i| (i % 251) as f32).collect();
                let v: Vec<f32> = (0..n).map(|i| -((i % 241) as f32)).collect();
                let (k2, v2) = layout.unpack_granule(&layout.pack_granule(&k, &v));
                assert_eq!((k, v), (k2, v2));
            }
        }
    }

    #[test]
    fn every_byte_of_a_granule_belongs_to_exactly_one_value() {
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            let layout = layout(dtype, 10);
            let mut seen = vec![0u8; layout.granule_bytes()];
            layout.for_each(|_, k, v| {
                for at in [k, v] {
                    seen[at..at + dtype.size()].iter_mut().for_each(|s| *s += 1);
                }
            });
            assert!(seen.iter().all(|&s| s == 1));
        }
    }

    #[test]
    fn offsets_tile_the_arena() {
        let layout = layout(KvDtype::Bf16, 16);
        assert_eq!(layout.granule_bytes(), 2 * 2 * 16 * 16 * 2);
        assert_eq!(layout.block_bytes(), 2 * layout.granule_bytes());
        assert_eq!(layout.offset(0, 1), layout.block_bytes());
        assert_eq!(layout.offset(1, 0), 3 * layout.block_bytes());
        assert_eq!(layout.total_bytes(), 6 * layout.block_bytes());
        assert_eq!(layout.granule_offset(1, 2, 1) + layout.granule_bytes(), layout.total_bytes());
    }
}
