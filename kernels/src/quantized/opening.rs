//! Opens weights of a panel to bf16: scale times code, rounded once.
//!
//! ```text
//! in    [16 pairs][32] of 2 codes | f16 scale [32]
//! out   [16 pairs][32] of 2 bf16, a block of a tile
//! ```
//!
//! Codes lie in the order that lanes of bf16 have, so none has to be moved: 16 are widened, turned to f32 and scaled, 32 at
//! a time rounded, which is 5 cycles and has 34 bytes behind it.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::packed::INT8_BYTES;
use crate::numerics::LANES;
use crate::packed_matrix::PANEL;
use crate::tile_product::BLOCK_LANES;

/// Opens so many blocks of 32 k of a panel of `Int8Pairs`, while as many bytes at `ahead` come to the second-level cache.
///
/// # Safety
/// The machine has these instruction sets; `from` is valid for the blocks, `into` for their lanes. `ahead` may be anything.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn open_int8(from: *const u8, num_blocks: usize, into: *mut u32, ahead: *const u8) {
    const HALF_BYTES: usize = LANES * 2;
    const SCALES: usize = 2 * PANEL * LANES;
    let first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for block in 0..num_blocks {
        // SAFETY: as required of the caller; prefetches of anything are allowed.
        unsafe {
            let (from, into) = (from.add(block * INT8_BYTES), into.add(block * BLOCK_LANES));
            let ahead = ahead.wrapping_add(block * INT8_BYTES);
            for half in 0..2 {
                let scales = _mm512_cvtph_ps(_mm256_loadu_si256(from.add(SCALES + half * HALF_BYTES).cast()));
                // Of 8 columns, each for both of its k.
                let scales = [_mm512_permutexvar_ps(first, scales), _mm512_permutexvar_ps(second, scales)];
                for pair in 0..LANES {
                    if pair % 2 == 0 {
                        _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add((half * LANES + pair) * HALF_BYTES).cast());
                    }
                    let codes = from.add((pair * 2 + half) * HALF_BYTES);
                    let mut scaled = scales;
                    for (index, scaled) in scaled.iter_mut().enumerate() {
                        let codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(codes.add(index * LANES).cast()));
                        *scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(codes), *scaled);
                    }
                    let rounded = _mm512_cvtne2ps_pbh(scaled[1], scaled[0]);
                    into.add(pair * PANEL + half * LANES).cast::<__m512bh>().write_unaligned(rounded);
                }
            }
            _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(SCALES).cast());
        }
    }
}
