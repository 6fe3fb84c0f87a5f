//! The KV of a simulated model: how links and the numbers made from them lie in the pool.

use std::sync::Arc;

use common::kv_spec::KvDtype;
use half::bf16;
use kernels::GranuleFormat;
use kernels::GranuleOrder::Rows;
use kernels::kv_layout::GRANULE_TOKENS;
use xxhash_rust::xxh3::Xxh3;

use crate::pool::KvPool;

/// Numbers of a link, half of them in K and half in V.
pub(super) const LINK: usize = 16;
/// Numbers that are made at a time.
const WORD: usize = 8;

/// What a token's KV in one layer is made from, and what the next token's depends on.
pub(super) type Link = [u8; LINK];

/// A pool with KV of a simulated model.
pub(super) struct SimKv {
    pub(super) pool: Arc<KvPool>,
    pub(super) format: GranuleFormat,
    pub(super) dtype: KvDtype,
}

impl SimKv {
    /// Writes a token's KV in one layer.
    pub(super) fn write_token(&self, layer: u32, slot: u32, link: &Link) {
        let layout = self.pool.layout();
        let (block, within) = (slot / layout.block_size as u32, slot as usize % layout.block_size);
        let granule = layout.granule_offset(layer as usize, block, within / GRANULE_TOKENS);
        let token = within % GRANULE_TOKENS;
        let (size, head_dim) = (self.format.dtype.size(), self.format.head_dim);
        let mut numbers = [0; 256];
        let mut bytes = [0; 4 * 256];
        for head in self.heads() {
            let numbers = &mut numbers[..head_dim];
            numbers_of(link, head, numbers);
            let bytes = &mut bytes[..head_dim * size];
            match self.dtype {
                KvDtype::F32 => {
                    for (number, out) in numbers.iter().zip(bytes.as_chunks_mut::<4>().0) {
                        *out = f32::from(*number).to_le_bytes();
                    }
                }
                KvDtype::Bf16 => {
                    for (number, out) in numbers.iter().zip(bytes.as_chunks_mut::<2>().0) {
                        // The numbers fit the upper half of an f32.
                        *out = ((f32::from(*number).to_bits() >> 16) as u16).to_le_bytes();
                    }
                }
            }
            let head_offset = granule + head.place * self.format.head_bytes();
            if self.format.order == Rows {
                self.pool.arena().write(head_offset + token * bytes.len(), bytes);
                continue;
            }
            for (dim, value) in bytes.chunks_exact(size).enumerate() {
                self.pool.arena().write(head_offset + self.index(head, token, dim) * size, value);
            }
        }
    }

    /// The link of a token, read from the pool.
    pub(super) fn read_link(&self, layer: u32, blocks: &[u32], position: usize) -> Link {
        let layout = self.pool.layout();
        let (block, within) = (blocks[position / layout.block_size], position % layout.block_size);
        let granule = layout.granule_offset(layer as usize, block, within / GRANULE_TOKENS);
        let mut link = [0; LINK];
        let fronts = self.heads().filter(|head| head.index == 0);
        for (head, half) in fronts.zip(link.chunks_exact_mut(WORD)) {
            for (dim, number) in half.iter_mut().enumerate() {
                let place = self.index(head, within % GRANULE_TOKENS, dim) * self.format.dtype.size();
                let mut bytes = [0; 4];
                let bytes = &mut bytes[..self.format.dtype.size()];
                self.pool.arena().read(granule + head.place * self.format.head_bytes() + place, bytes);
                *number = self.load(bytes) as i8 as u8;
            }
        }
        link
    }

    /// The first `num_tokens` tokens of a granule, in an order that every pool has in common.
    pub(super) fn read_granule(&self, layer: u32, blocks: &[u32], granule: usize, num_tokens: usize, out: &mut Xxh3) {
        let layout = self.pool.layout();
        let per_block = layout.block_size / GRANULE_TOKENS;
        let offset = layout.granule_offset(layer as usize, blocks[granule / per_block], granule % per_block);
        let (size, head_dim, head_bytes) = (self.format.dtype.size(), self.format.head_dim, self.format.head_bytes());
        let is_common = self.format.order == Rows && self.dtype == KvDtype::Bf16;
        self.pool.arena().visit(offset, layout.granule_bytes(), |bytes| {
            for (head, bytes) in self.heads().zip(bytes.chunks_exact(head_bytes)) {
                if is_common {
                    out.update(&bytes[..num_tokens * head_dim * size]);
                    continue;
                }
                for token in 0..num_tokens {
                    for dim in 0..head_dim {
                        let value = self.load(&bytes[self.index(head, token, dim) * size..]);
                        let [low, high, rest @ ..] = value.to_bits().to_be_bytes();
                        out.update(&[high, low]);
                        // No number that is written here has anything there: so it was damaged.
                        if rest != [0, 0] {
                            out.update(&rest);
                        }
                    }
                }
            }
        });
    }

    /// All heads of K, then all of V, as they lie in a granule.
    fn heads(&self) -> impl Iterator<Item = Head> + use<> {
        let num_heads = self.format.num_kv_heads;
        (0..2 * num_heads).map(move |place| Head { place, index: place % num_heads, is_v: place >= num_heads })
    }

    /// Where a value lies in its head, in values.
    fn index(&self, head: Head, token: usize, dim: usize) -> usize {
        if head.is_v { self.format.v_index(token, dim) } else { self.format.k_index(token, dim) }
    }

    /// The value that `bytes` begin with.
    fn load(&self, bytes: &[u8]) -> f32 {
        match (self.dtype, bytes) {
            (KvDtype::F32, [a, b, c, d, ..]) => f32::from_le_bytes([*a, *b, *c, *d]),
            (KvDtype::Bf16, [a, b, ..]) => bf16::from_le_bytes([*a, *b]).to_f32(),
            _ => unreachable!("a place in a granule has room for a value"),
        }
    }
}

/// One head of K or V.
#[derive(Clone, Copy)]
struct Head {
    /// Among all heads of a granule.
    place: usize,
    /// Among those of its plane.
    index: usize,
    is_v: bool,
}

/// The numbers of a head of the token with this link.
fn numbers_of(link: &Link, head: Head, out: &mut [i8]) {
    let (halves, _) = link.as_chunks::<WORD>();
    let key = u64::from_le_bytes(halves[0]) ^ u64::from_le_bytes(halves[1]).rotate_left(32);
    let mut counter = key ^ ((head.place * out.len()) as u64).wrapping_mul(0xD1B5_4A32_D192_ED03);
    for word in out.chunks_mut(WORD) {
        // SplitMix64.
        counter = counter.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (counter ^ (counter >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        for (number, byte) in word.iter_mut().zip((mixed ^ (mixed >> 31)).to_le_bytes()) {
            *number = byte as i8;
        }
    }
    if head.index == 0 {
        for (number, byte) in out.iter_mut().zip(halves[usize::from(head.is_v)]) {
            *number = byte as i8;
        }
    }
}
