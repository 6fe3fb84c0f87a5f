//! Products with keys and values in tile registers.
//!
//! ```text
//! scores    q [head_dim/32][16][16 pairs]   x  4 granules of K [head_dim/2][16 tokens]      a tile for each
//! values    p [16][64]                      x  4 granules of V [8][head_dim]                4 tiles of 16 features each
//! ```
//!
//! Of a prompt's time the products take a third, softmax more. They take turns on the processor: to compute the scores of
//! one subtile beside the softmax of another was measured (on Granite Rapids) and gains nothing.

use std::ops::Range;

use super::tile::{OfRows, Scores, Seen, TILE_GRANULES, Tile, Weights};
use super::units::{Ahead, Products};
use crate::amx::{Configured, KeyBlocks, TILE_ROWS, ValueBlocks, attention_shapes, fold_keys, fold_values};
use crate::kv_layout::{GRANULE_TOKENS, KvLayout};
use crate::numerics::{ATTENTION_TILE, LANES, TILE_STEPS, bf16_pair};
use crate::simd::{Avx512Bf16, Simd};

/// Products in tile registers, which are configured as long as this exists.
pub(super) struct Tiles {
    /// Rows of all subtiles, the last one's filled up with any.
    num_rows: usize,
    /// Features of a head in whole vectors.
    padded_dim: usize,
    _configured: Configured,
}

impl Products for Tiles {
    type Simd = Avx512Bf16;
    const PADS_KEYS: bool = true;

    #[inline(always)]
    unsafe fn new(layout: &KvLayout, num_rows: usize) -> Self {
        let num_rows = num_rows.min(TILE_ROWS);
        // SAFETY: as required of the caller.
        let configured = unsafe { Configured::new(attention_shapes(num_rows)) };
        Tiles { num_rows, padded_dim: layout.head_dim.next_multiple_of(LANES), _configured: configured }
    }

    #[inline(always)]
    fn subtile(&self, index: usize, num_rows: usize) -> Option<Range<usize>> {
        let first = index * TILE_ROWS;
        (first < num_rows).then(|| first..num_rows.min(first + TILE_ROWS))
    }

    #[inline(always)]
    fn lanes_per_row(&self) -> usize {
        (self.padded_dim / 2).next_multiple_of(TILE_STEPS)
    }

    #[inline(always)]
    fn packed_rows(&self, num_rows: usize) -> usize {
        num_rows.next_multiple_of(self.num_rows)
    }

    /// `[block][rows of the subtile][16 pairs]`, zeros after the last pair.
    #[inline(always)]
    fn pack(&self, q: &[f32], (r, num_rows): (usize, usize), into: &mut [u32]) {
        for (block, q) in q.chunks(2 * TILE_STEPS).enumerate() {
            let into = &mut into[(block * num_rows + r) * TILE_STEPS..][..TILE_STEPS];
            into.fill(0);
            into.iter_mut().zip(q.as_chunks::<2>().0).for_each(|(into, pair)| *into = bf16_pair(pair[0], pair[1]));
        }
    }

    #[inline(always)]
    unsafe fn score(
        &self,
        (tile, _): (&Tile, Range<usize>),
        ahead: &Ahead<'_>,
        (q, _): (*const u32, usize),
        scores: &mut Scores,
    ) {
        let blocks = KeyBlocks {
            q,
            num_rows: self.num_rows,
            keys: &tile.k,
            dim: self.padded_dim,
            scores: scores.0.as_flattened_mut().as_mut_ptr(),
            ahead: &share(&ahead.next.k, ahead),
        };
        // SAFETY: tiles were configured for so many rows, which were packed; heads of K were padded to `padded_dim`.
        unsafe { fold_keys(&blocks) }
    }

    #[inline(always)]
    unsafe fn add_values(
        &self,
        (tile, granules): (&Tile, Range<usize>),
        ahead: &Ahead<'_>,
        weights: &Weights,
        (seen, corrections): (&Seen, &OfRows),
        (acc, num_rows): (&mut [f32], usize),
        scratch: &mut Scores,
    ) {
        const VECTORS: usize = ATTENTION_TILE / LANES;
        let num_vectors = self.padded_dim / LANES;
        let next = share(&ahead.next.v, ahead);
        for first in (0..num_vectors).step_by(VECTORS) {
            let vectors = first..num_vectors.min(first + VECTORS);
            let features = first * LANES..vectors.end * LANES;
            let blocks = ValueBlocks {
                weights: weights.0.as_flattened()[granules.start * GRANULE_TOKENS / 2..].as_ptr(),
                values: &tile.v[granules.clone()],
                stride: tile.v_stride,
                vectors,
                // The scores have become weights.
                sums: scratch.0.as_flattened_mut().as_mut_ptr(),
                ahead: &next[granules.clone()],
            };
            // SAFETY: tiles were configured; V has been padded to whole vectors; the caller has the instruction set, of
            // whose vectors sums and acc have as many.
            unsafe {
                fold_values(&blocks);
                for r in (0..num_rows).filter(|&r| !seen[r].is_empty()) {
                    let correction = Avx512Bf16::splat(corrections.0[r]);
                    let acc = &mut acc[r * self.padded_dim..][features.clone()];
                    let folds = scratch.0[r].as_chunks::<LANES>().0;
                    for (acc, fold) in acc.as_chunks_mut::<LANES>().0.iter_mut().zip(folds) {
                        let fold = Avx512Bf16::load(fold.as_ptr());
                        let sum = Avx512Bf16::fma(Avx512Bf16::load(acc.as_ptr()), correction, fold);
                        Avx512Bf16::store(acc.as_mut_ptr(), sum);
                    }
                }
            }
        }
    }
}

/// Those granules of the next tile whose turn it is to come nearer, null in place of the rest: memory beyond the caches
/// is slower than all that a subtile waits for, so they should not come all at once.
#[inline(always)]
fn share(granules: &[*const u32; TILE_GRANULES], ahead: &Ahead<'_>) -> [*const u32; TILE_GRANULES] {
    let turns = ahead.num_turns.min(TILE_GRANULES);
    std::array::from_fn(|g| if g % turns == ahead.turn { granules[g] } else { std::ptr::null() })
}
