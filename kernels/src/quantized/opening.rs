//! Opens weights of a panel to bf16: scale times code, rounded once.
//!
//! ```text
//! in    [16 pairs][32] of 2 codes | f16 scale [32]
//! out   [16 pairs][32] of 2 bf16, a block of a tile
//! ```
//!
//! Codes lie in the order that lanes of bf16 have, so none has to be moved: 16 are widened, turned to f32 and scaled,
//! 32 at a time rounded, in some 6 cycles for 34 bytes.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::packed::INT8_BYTES;
use crate::numerics::LANES;
use crate::packed_matrix::PANEL;
use crate::tile_product::BLOCK_LANES;

/// Opens so many blocks of 32 k of a panel of `Int8Pairs`, while as many bytes at `ahead` come to the second-level
/// cache.
///
/// # Safety
/// The machine has these instruction sets; `from` is valid for the blocks, `into` for their lanes. `ahead` may be
/// anything.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn open_int8(from: *const u8, num_blocks: usize, into: *mut u32, ahead: *const u8) {
    /// Of a pair of all columns, one line; scales lie behind those.
    const PAIR_BYTES: usize = 2 * PANEL;
    const SCALES: usize = PAIR_BYTES * LANES;
    let first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for block in 0..num_blocks {
        // SAFETY: as required of the caller; prefetches of anything are allowed.
        unsafe {
            let (from, into) = (from.add(block * INT8_BYTES), into.add(block * BLOCK_LANES));
            let ahead = ahead.wrapping_add(block * INT8_BYTES);
            let halves = from.add(SCALES).cast::<[__m256i; 2]>().read_unaligned();
            // Of 8 columns, each for both of its k.
            let mut scales = [_mm512_setzero_ps(); 4];
            for (index, scales) in scales.iter_mut().enumerate() {
                let columns = if index % 2 == 0 { first } else { second };
                *scales = _mm512_permutexvar_ps(columns, _mm512_cvtph_ps(halves[index / 2]));
            }
            _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(SCALES).cast());
            for pair in 0..LANES {
                _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(pair * PAIR_BYTES).cast());
                let mut scaled = scales;
                for (index, scaled) in scaled.iter_mut().enumerate() {
                    let codes = _mm_loadu_si128(from.add(pair * PAIR_BYTES + index * LANES).cast());
                    *scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), *scaled);
                }
                for half in 0..2 {
                    let rounded = _mm512_cvtne2ps_pbh(scaled[2 * half + 1], scaled[2 * half]);
                    into.add(pair * PANEL + half * LANES).cast::<__m512bh>().write_unaligned(rounded);
                }
            }
        }
    }
}
