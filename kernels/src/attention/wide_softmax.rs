//! Softmax of up to 16 rows with 256 positions, in vectors: [`Softmax::Base2`](super::softmax::Softmax).
//!
//! In three steps over all rows, of which the middle one has a row in each lane: what a row waits for (its highest
//! score, its factor, its sum) others use the time of.

#![allow(clippy::needless_range_loop)] // row r, vector v

use std::arch::x86_64::*;
use std::ops::Range;

use super::tile::Aligned;
use super::units::clip;
use crate::numerics::{ATTENTION_WIDE_TILE, LANES, tanh};
use crate::simd::{Avx512Bf16, Simd};

/// Lanes from one row of scores to the next: lines of one column of rows would be equal sets of the first-level cache.
pub(super) const SCORES_ROW: usize = ATTENTION_WIDE_TILE + LANES;

/// One number for each row.
pub(super) type Factors = Aligned<[f32; LANES]>;

impl Default for Factors {
    fn default() -> Self {
        Aligned([1.0; LANES])
    }
}

/// Rows of scores with a tile, and their states.
pub(super) struct Rows<'a> {
    /// `[rows][SCORES_ROW]`.
    pub(super) scores: *mut f32,
    /// The positions each row sees.
    pub(super) visible: &'a [Range<usize>],
    /// Those of the tile.
    pub(super) tile: Range<usize>,
    /// Pairs of vectors that some row sees something of.
    pub(super) blocks: Range<usize>,
    /// Of 16 rows.
    pub(super) max: &'a mut [f32],
    pub(super) sum: &'a mut [f32],
}

/// The lanes of vector `v` that are in `seen`.
#[inline(always)]
fn lanes_seen(seen: &Range<usize>, v: usize) -> u16 {
    let first = seen.start.saturating_sub(v * LANES).min(LANES);
    let end = seen.end.saturating_sub(v * LANES).min(LANES);
    (((1u32 << end) - 1) & !((1u32 << first) - 1)) as u16
}

/// Turns scores into weights: bf16, the 128 pairs of a row in its first half, zero for what it does not see, for all of
/// `blocks`. Updates the states, and returns the factors on what was summed before.
///
/// # Safety
/// The machine has the instruction set; there are up to 16 rows of scores.
#[inline(always)]
pub(super) unsafe fn weigh_rows(rows: &mut Rows<'_>, factor: f32, cap: Option<(f32, f32)>) -> Factors {
    let num_rows = rows.visible.len();
    let mut seen: [Range<usize>; LANES] = Default::default();
    for row in 0..num_rows {
        let clipped = clip(&rows.visible[row], rows.tile.clone());
        if !clipped.is_empty() {
            seen[row] = clipped.start - rows.tile.start..clipped.end - rows.tile.start;
        }
    }
    let mut lanes = [Aligned([f32::MIN; LANES]); LANES];
    // SAFETY: the instruction set is the caller's promise; scores are 16 vectors for each row.
    unsafe {
        for row in 0..num_rows {
            let seen = &seen[row];
            if seen.is_empty() {
                continue;
            }
            let scores = rows.scores.add(row * SCORES_ROW);
            if let Some((scale, cap)) = cap {
                for i in seen.clone() {
                    *scores.add(i) = cap * tanh(*scores.add(i) * scale / cap);
                }
            }
            let (first, last) = (seen.start / LANES, (seen.end - 1) / LANES);
            let max = _mm512_set1_ps(f32::MIN);
            let max = _mm512_mask_max_ps(max, lanes_seen(seen, first), max, _mm512_load_ps(scores.add(first * LANES)));
            let mut max =
                _mm512_mask_max_ps(max, lanes_seen(seen, last), max, _mm512_load_ps(scores.add(last * LANES)));
            for v in first + 1..last {
                max = _mm512_max_ps(max, _mm512_load_ps(scores.add(v * LANES)));
            }
            _mm512_store_ps(lanes[row].0.as_mut_ptr(), max);
        }
        let before = Avx512Bf16::load(rows.max.as_ptr());
        let after = _mm512_max_ps(before, fold_lanes::<true>(&lanes));
        Avx512Bf16::store(rows.max.as_mut_ptr(), after);
        let factors = _mm512_set1_ps(factor);
        let mut corrections = Factors::default();
        let correction = Avx512Bf16::exp2_weight(_mm512_mul_ps(_mm512_sub_ps(before, after), factors));
        _mm512_store_ps(corrections.0.as_mut_ptr(), correction);
        let mut offsets = Factors::default();
        let offset = _mm512_sub_ps(_mm512_set1_ps(-0.0), _mm512_mul_ps(after, factors));
        _mm512_store_ps(offsets.0.as_mut_ptr(), offset);

        for row in 0..num_rows {
            let seen = &seen[row];
            let scores = rows.scores.add(row * SCORES_ROW);
            let weights = scores.cast::<u32>();
            let offset = _mm512_set1_ps(offsets.0[row]);
            let mut sum = _mm512_setzero_ps();
            let Range { start, end } = rows.blocks.clone();
            let whole = seen.start.div_ceil(2 * LANES).clamp(start, end);
            let whole = whole..(seen.end / (2 * LANES)).clamp(whole, end);
            macro_rules! weights {
                ($v:expr) => {
                    Avx512Bf16::exp2_weight(_mm512_fmadd_ps(_mm512_load_ps(scores.add($v * LANES)), factors, offset))
                };
            }
            macro_rules! some {
                ($blocks:expr) => {
                    for block in $blocks {
                        let [even, odd] = [2 * block, 2 * block + 1];
                        let even = _mm512_maskz_mov_ps(lanes_seen(seen, even), weights!(even));
                        let odd = _mm512_maskz_mov_ps(lanes_seen(seen, odd), weights!(odd));
                        sum = _mm512_add_ps(_mm512_add_ps(sum, even), odd);
                        Avx512Bf16::store_weights(weights.add(block * LANES), [even, odd]);
                    }
                };
            }
            some!(start..whole.start);
            for block in whole.clone() {
                let [even, odd] = [weights!(2 * block), weights!(2 * block + 1)];
                sum = _mm512_add_ps(_mm512_add_ps(sum, even), odd);
                Avx512Bf16::store_weights(weights.add(block * LANES), [even, odd]);
            }
            some!(whole.end..end);
            _mm512_store_ps(lanes[row].0.as_mut_ptr(), sum);
        }
        let sum = Avx512Bf16::load(rows.sum.as_ptr());
        Avx512Bf16::store(rows.sum.as_mut_ptr(), _mm512_fmadd_ps(sum, correction, fold_lanes::<false>(&lanes)));
        corrections
    }
}

/// Takes the states of 16 rows of a later part into the running ones; returns the factors on what each has summed.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
pub(super) unsafe fn join_rows(
    (total_max, total_sum): (&mut [f32], &mut [f32]),
    (max, sum): (&[f32], &[f32]),
    factor: f32,
) -> [Factors; 2] {
    assert!(total_max.len() == LANES && total_sum.len() == LANES && max.len() == LANES && sum.len() == LANES);
    // SAFETY: the instruction set is the caller's promise; all have 16 lanes.
    unsafe {
        let factor = _mm512_set1_ps(factor);
        let (before, part) = (_mm512_loadu_ps(total_max.as_ptr()), _mm512_loadu_ps(max.as_ptr()));
        let after = _mm512_max_ps(part, before);
        let a = Avx512Bf16::exp2_weight(_mm512_mul_ps(_mm512_sub_ps(before, after), factor));
        let b = Avx512Bf16::exp2_weight(_mm512_mul_ps(_mm512_sub_ps(part, after), factor));
        let total = _mm512_mul_ps(_mm512_loadu_ps(total_sum.as_ptr()), a);
        let total = _mm512_fmadd_ps(_mm512_loadu_ps(sum.as_ptr()), b, total);
        _mm512_storeu_ps(total_max.as_mut_ptr(), after);
        _mm512_storeu_ps(total_sum.as_mut_ptr(), total);
        let mut factors = [Factors::default(); 2];
        _mm512_store_ps(factors[0].0.as_mut_ptr(), a);
        _mm512_store_ps(factors[1].0.as_mut_ptr(), b);
        factors
    }
}

/// Lane r: the highest lane of row r, or the sum of its lanes in the order of
/// [`tree_sum`](crate::numerics::tree_sum). Each step does two rows of the step before at once, a half in place of what
/// its other half has taken.
#[inline(always)]
unsafe fn fold_lanes<const MAX: bool>(rows: &[Aligned<[f32; LANES]>; LANES]) -> __m512 {
    macro_rules! fold {
        ($a:expr, $b:expr) => {
            if MAX { _mm512_max_ps($a, $b) } else { _mm512_add_ps($a, $b) }
        };
    }
    // SAFETY: the instruction set is the caller's promise; rows are 16 lanes.
    unsafe {
        let zero = _mm512_setzero_ps();
        // Rows j and 4 + j, then 8 + j and 12 + j: 8 lanes of each.
        let mut eights = [zero; 8];
        for i in 0..8 {
            let (j, upper) = (i / 2, i % 2 * 8);
            let a = _mm512_load_ps(rows[upper + j].0.as_ptr());
            let b = _mm512_load_ps(rows[upper + j + 4].0.as_ptr());
            eights[i] = fold!(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
        }
        let mut fours = [zero; 4];
        for j in 0..4 {
            let (a, b) = (eights[2 * j], eights[2 * j + 1]);
            fours[j] = fold!(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        }
        let mut twos = [zero; 2];
        for j in 0..2 {
            let (a, b) = (fours[2 * j], fours[2 * j + 1]);
            twos[j] = fold!(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xee>(a, b));
        }
        fold!(_mm512_shuffle_ps::<0x88>(twos[0], twos[1]), _mm512_shuffle_ps::<0xdd>(twos[0], twos[1]))
    }
}
