//! New keys and values into the pool.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::arena::KvArena;
use crate::ctx::{Columns, Ctx};
use crate::kv_layout::{GRANULE_TOKENS, KvDtype, KvLayout};
#[cfg(target_arch = "x86_64")]
use crate::numerics::LANES;
use crate::numerics::round_bf16;
use crate::simd::vectorised;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx512Bf16, Simd};

/// Rows of one tile of work.
const TILE_ROWS: usize = 64;

/// Stores row r's key and value (`[num_kv_heads, head_dim]` in the given columns) at `slots[r]`, which is
/// `block * block_size + offset in the block`, in the pool of layer `layer`.
///
/// `k` and `v` may be the same buffer, a fused product. Slots of one call are distinct.
///
/// Panics on a slot beyond the pool.
#[allow(clippy::too_many_arguments)]
pub fn kv_write(
    ctx: &Ctx<'_>,
    arena: &KvArena,
    layout: &KvLayout,
    layer: usize,
    slots: &[u32],
    k: &[f32],
    k_columns: Columns,
    v: &[f32],
    v_columns: Columns,
) {
    let width = layout.num_kv_heads * layout.head_dim;
    layout.check();
    k_columns.check("kv_write k", k, slots.len(), width);
    v_columns.check("kv_write v", v, slots.len(), width);
    let isa = ctx.isa;
    let write = |tile: usize| {
        let first = tile * TILE_ROWS;
        for (row, &slot) in slots.iter().enumerate().skip(first).take(TILE_ROWS) {
            let target = Target::of(arena, layout, layer, slot);
            let (k, v) = (k_columns.row(k, row, width), v_columns.row(v, row, width));
            vectorised!(isa, write_token(target: Target<'_>, k: &[f32], v: &[f32]));
        }
    };
    if slots.len() <= TILE_ROWS {
        write(0);
    } else {
        ctx.pool.run(ctx.priority, slots.len().div_ceil(TILE_ROWS), &write);
    }
}

/// One token's place: `granule` points to all bytes of its granule.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    layout: &'a KvLayout,
    granule: *mut u8,
    token: usize,
}

impl<'a> Target<'a> {
    /// Of a slot of a layer.
    ///
    /// Panics beyond the pool.
    pub(crate) fn of(arena: &KvArena, layout: &'a KvLayout, layer: usize, slot: u32) -> Self {
        let (block, offset) = (slot / layout.block_size as u32, slot as usize % layout.block_size);
        let granule = layout.granule_offset(layer, block, offset / GRANULE_TOKENS);
        let granule = arena.bytes(granule, layout.granule_bytes());
        Target { layout, granule, token: offset % GRANULE_TOKENS }
    }

    /// Stores the key of one head.
    #[inline(always)]
    pub(crate) fn write_key(self, head: usize, k: &[f32]) {
        let Target { layout, granule, token } = self;
        assert!(head < layout.num_kv_heads && k.len() == layout.head_dim, "{} values of head {head}", k.len());
        // SAFETY: `k_offset` of tokens below 16 and features below head_dim lies within a head of the plane, and the
        // plane within the granule; writes are aligned to their size, since planes and heads are multiples of 64 bytes
        // from a page. This token's bytes have no other user while the engine writes it (the arena's invariant), and
        // rows of one call have distinct tokens.
        unsafe {
            let into = granule.add(head * layout.head_bytes() + layout.k_offset(token, 0));
            match layout.dtype {
                KvDtype::F32 => {
                    let into = into.cast::<f32>();
                    for (dim, &k) in k.iter().enumerate() {
                        *into.add(dim * GRANULE_TOKENS) = k;
                    }
                }
                KvDtype::Bf16 => {
                    let into = into.cast::<[u16; 2]>();
                    let mut k16 = [0u16; 256];
                    for dim in 0..k.len() {
                        k16[dim] = round_bf16(k[dim]);
                    }
                    for pair in 0..k.len() / 2 {
                        *into.add(pair * GRANULE_TOKENS) = [k16[2 * pair], k16[2 * pair + 1]];
                    }
                }
            }
        }
    }

    /// Stores the keys of one head of all tokens of a granule, of which this is the first: bf16, heads of whole blocks
    /// of 32.
    ///
    /// # Safety
    /// The machine has AVX-512 and its bf16.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(crate) unsafe fn write_keys(self, head: usize, k: &[&[f32]; GRANULE_TOKENS]) {
        let head_dim = self.check_whole(head, k);
        // SAFETY: as in `write_key`, for all tokens; rows have `head_dim` values.
        unsafe {
            let into = self.granule.add(head * self.layout.head_bytes()).cast::<u32>();
            for feature in (0..head_dim).step_by(2 * LANES) {
                let mut pairs = [_mm512_setzero_si512(); GRANULE_TOKENS];
                for token in 0..GRANULE_TOKENS {
                    let from = k[token].as_ptr().add(feature);
                    pairs[token] = Avx512Bf16::round(Avx512Bf16::load(from), Avx512Bf16::load(from.add(LANES)));
                }
                let into = into.add(feature / 2 * GRANULE_TOKENS);
                for (pair, tokens) in transposed(pairs).into_iter().enumerate() {
                    _mm512_storeu_si512(into.add(pair * GRANULE_TOKENS).cast(), tokens);
                }
            }
        }
    }

    /// Stores the values of one head likewise.
    ///
    /// # Safety
    /// As of [`write_keys`](Self::write_keys).
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(crate) unsafe fn write_values(self, head: usize, v: &[&[f32]; GRANULE_TOKENS]) {
        let head_dim = self.check_whole(head, v);
        // Lane i takes halves i and 16 + i.
        const INTERLEAVED: [u16; 2 * LANES] = {
            let mut halves = [0; 2 * LANES];
            let mut i = 0;
            while i < 2 * LANES {
                halves[i] = (i / 2 + i % 2 * LANES) as u16;
                i += 1;
            }
            halves
        };
        // SAFETY: as in `write_keys`, in the plane behind that of the keys.
        unsafe {
            let into = self.granule.add(self.layout.plane_bytes() + head * self.layout.head_bytes()).cast::<u32>();
            let interleaved = _mm512_loadu_si512(INTERLEAVED.as_ptr().cast());
            for step in 0..GRANULE_TOKENS / 2 {
                for feature in (0..head_dim).step_by(LANES) {
                    let even = Avx512Bf16::load(v[2 * step].as_ptr().add(feature));
                    let odd = Avx512Bf16::load(v[2 * step + 1].as_ptr().add(feature));
                    let pairs = _mm512_permutexvar_epi16(interleaved, Avx512Bf16::round(even, odd));
                    _mm512_storeu_si512(into.add(step * head_dim + feature).cast(), pairs);
                }
            }
        }
    }

    /// The head's features, after a look at whether a granule can be written whole.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn check_whole(&self, head: usize, rows: &[&[f32]; GRANULE_TOKENS]) -> usize {
        let head_dim = self.layout.head_dim;
        assert!(self.token == 0 && self.layout.dtype == KvDtype::Bf16 && head_dim.is_multiple_of(2 * LANES));
        assert!(head < self.layout.num_kv_heads && rows.iter().all(|row| row.len() == head_dim), "rows of head {head}");
        head_dim
    }

    /// Stores the value of one head.
    #[inline(always)]
    pub(crate) fn write_value(self, head: usize, v: &[f32]) {
        let Target { layout, granule, token } = self;
        assert!(head < layout.num_kv_heads && v.len() == layout.head_dim, "{} values of head {head}", v.len());
        // SAFETY: as in `write_key`, in the plane behind that of the keys.
        unsafe {
            let into = granule.add(layout.plane_bytes() + head * layout.head_bytes() + layout.v_offset(token, 0));
            match layout.dtype {
                KvDtype::F32 => {
                    let into = into.cast::<f32>();
                    for (dim, &v) in v.iter().enumerate() {
                        *into.add(dim) = v;
                    }
                }
                KvDtype::Bf16 => {
                    let into = into.cast::<u16>();
                    let mut v16 = [0u16; 256];
                    for dim in 0..v.len() {
                        v16[dim] = round_bf16(v[dim]);
                    }
                    for (dim, &v) in v16[..v.len()].iter().enumerate() {
                        *into.add(2 * dim) = v;
                    }
                }
            }
        }
    }
}

/// Rows as columns.
///
/// # Safety
/// The machine has AVX-512.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn transposed(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    // SAFETY: the instruction set is the caller's promise.
    unsafe {
        let (mut twos, mut fours, mut eights, mut columns) = (rows, rows, rows, rows);
        for i in (0..LANES).step_by(2) {
            twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        // Piece p of vector 4 g + c: column 4 p + c of rows 4 g to 4 g + 3.
        for i in (0..LANES).step_by(4) {
            fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
            fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
            fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
            fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
        }
        // Pieces of rows 0 to 7, then 8 to 15: columns c and 8 + c, then 4 + c and 12 + c.
        for c in 0..4 {
            for half in 0..2 {
                let (a, b) = (fours[8 * half + c], fours[8 * half + 4 + c]);
                eights[4 * half + c] = _mm512_shuffle_i32x4::<0x88>(a, b);
                eights[8 + 4 * half + c] = _mm512_shuffle_i32x4::<0xdd>(a, b);
            }
        }
        for c in 0..4 {
            columns[c] = _mm512_shuffle_i32x4::<0x88>(eights[c], eights[4 + c]);
            columns[8 + c] = _mm512_shuffle_i32x4::<0xdd>(eights[c], eights[4 + c]);
            columns[4 + c] = _mm512_shuffle_i32x4::<0x88>(eights[8 + c], eights[12 + c]);
            columns[12 + c] = _mm512_shuffle_i32x4::<0xdd>(eights[8 + c], eights[12 + c]);
        }
        columns
    }
}

#[inline(always)]
fn write_token(target: Target<'_>, k: &[f32], v: &[f32]) {
    let head_dim = target.layout.head_dim;
    for (head, (k, v)) in k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim)).enumerate() {
        target.write_key(head, k);
        target.write_value(head, v);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::workers::{Priority, WorkerPool};

    #[test]
    fn written_tokens_lie_where_the_layout_says_and_nothing_else_changes() {
        let pool = WorkerPool::new(2);
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            for head_dim in [8, 20, 64, 80, 96, 128, 256] {
                let layout =
                    KvLayout { num_layers: 2, num_blocks: 4, block_size: 32, num_kv_heads: 2, head_dim, dtype };
                let (width, stride) = (2 * head_dim, 4 * head_dim + 3);
                let rows = 75;
                let kv: Vec<f32> = (0..rows * stride).map(|i| crate::uniform(1, 0, i as u32) as f32 - 0.5).collect();
                // Tokens 20.. of blocks 3, 0, 2.
                let slots: Vec<u32> =
                    (20..20 + rows as u32).map(|i| [3, 0, 2][i as usize / 32] * 32 + i % 32).collect();
                let (mut k, mut v) = (vec![0.0; 96 * width], vec![0.0; 96 * width]);
                for row in 0..rows {
                    k[(20 + row) * width..][..width].copy_from_slice(&kv[row * stride + 1..][..width]);
                    v[(20 + row) * width..][..width].copy_from_slice(&kv[row * stride + 1 + width..][..width]);
                }
                for &isa in Isa::available() {
                    let arena = KvArena::new(layout.total_bytes());
                    let ctx = Ctx { pool: &pool, isa, priority: Priority::Prefill };
                    let columns = |first| Columns { first, stride };
                    kv_write(&ctx, &arena, &layout, 1, &slots, &kv, columns(1), &kv, columns(1 + width));
                    let mut untouched = vec![1; layout.offset(1, 0)];
                    arena.read(0, &mut untouched);
                    assert!(untouched.iter().all(|&byte| byte == 0));
                    for granule in 0..6 {
                        let tokens = granule * 16 * width..(granule + 1) * 16 * width;
                        let mut bytes = vec![0; layout.granule_bytes()];
                        arena.read(layout.granule_offset(1, [3, 0, 2][granule / 2], granule % 2), &mut bytes);
                        assert_eq!(
                            bytes,
                            layout.pack_granule(&k[tokens.clone()], &v[tokens]),
                            "{isa:?} {dtype:?} {head_dim}"
                        );
                    }
                }
            }
        }
    }
}
