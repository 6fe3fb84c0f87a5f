//! One tile: some query rows against 64 positions. Where these lie, and the softmax of their scores.
#![allow(clippy::needless_range_loop)] // row r, column c: the shapes of the drawing

use std::ops::{Deref, DerefMut, Range};

use super::{AttentionParams, Job};
use crate::kv_layout::{GRANULE_TOKENS, KvDtype};
use crate::numerics::{ATTENTION_TILE, LANES, tanh};
use crate::simd::Simd;

/// Granules of a tile.
pub(super) const TILE_GRANULES: usize = ATTENTION_TILE / GRANULE_TOKENS;

/// Rows of a subtile at most, on any instruction set.
pub(super) const QUERY_ROWS_MAX: usize = 12;

/// What begins with a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Aligned<T>(pub(super) T);

/// Whole cache lines of values of 4 bytes: vectors of others cross lines, and tile registers take three times as long
/// to load.
#[derive(Default)]
pub(super) struct Lines<T>(Vec<Aligned<[T; LANES]>>);

impl<T: Copy + Default> Lines<T> {
    /// For so many values, new ones zero.
    pub(super) fn resize(&mut self, len: usize) {
        self.0.resize(len.div_ceil(LANES), Aligned([T::default(); LANES]));
    }
}

impl<T> Deref for Lines<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        const { assert!(size_of::<T>() * LANES == align_of::<Aligned<[T; LANES]>>(), "lines without gaps") };
        // SAFETY: each line is as many values, one after the other.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * LANES) }
    }
}

impl<T> DerefMut for Lines<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        const { assert!(size_of::<T>() * LANES == align_of::<Aligned<[T; LANES]>>(), "lines without gaps") };
        // SAFETY: each line is as many values, one after the other.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * LANES) }
    }
}

/// Scores of a subtile with the positions of a tile, then their weights.
pub(super) type Scores = Aligned<[[f32; ATTENTION_TILE]; QUERY_ROWS_MAX]>;

/// The weights as products read them: bf16 pairs (half of each row, or all of it widened) or f32.
pub(super) type Weights = Aligned<[[u32; ATTENTION_TILE]; QUERY_ROWS_MAX]>;

/// Where the keys and values of 64 positions lie. Those of granules that nobody sees are others' instead.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) k: [*const u32; TILE_GRANULES],
    pub(super) v: [*const u32; TILE_GRANULES],
    /// Lanes from one step of V to the next: the head, padded where V was copied.
    pub(super) v_stride: usize,
}

/// Finds the granules of a tile some of which is in `positions`, without looking at what is in them.
#[inline(always)]
pub(super) fn locate(job: &Job<'_>, span: usize, kv_head: usize, start: usize, positions: &Range<usize>) -> Tile {
    let layout = job.layout;
    let block_table = &job.batch.block_tables[job.batch.spans[span].block_table.clone()];
    let mut tile =
        Tile { k: [std::ptr::null(); TILE_GRANULES], v: [std::ptr::null(); TILE_GRANULES], v_stride: layout.head_dim };
    for g in 0..TILE_GRANULES {
        let position = (start + g * GRANULE_TOKENS).clamp(positions.start, positions.end - 1);
        let block = block_table[position / layout.block_size];
        let offset = layout.granule_offset(job.layer, block, position % layout.block_size / GRANULE_TOKENS);
        let k = job.arena.bytes(offset, layout.granule_bytes()).cast_const();
        // SAFETY: heads and planes lie within the granule.
        unsafe {
            let k = k.add(kv_head * layout.head_bytes());
            tile.k[g] = k.cast();
            tile.v[g] = k.add(layout.plane_bytes()).cast::<u32>();
        }
    }
    tile
}

/// The granules of the tile at `start` that hold some of these positions.
#[inline(always)]
pub(super) fn granules(start: usize, positions: &Range<usize>) -> Range<usize> {
    let seen = positions.start.max(start) - start..positions.end.min(start + ATTENTION_TILE) - start;
    seen.start / GRANULE_TOKENS..seen.end.div_ceil(GRANULE_TOKENS)
}

/// Copies those granules of V that hold positions no row sees, or heads that are no whole vectors, with zeros in
/// these places, so that the loops over them need no mask.
#[inline(always)]
pub(super) fn mask_values(
    job: &Job<'_>,
    tile: &mut Tile,
    start: usize,
    positions: &Range<usize>,
    copies: &mut Lines<u32>,
) {
    let layout = job.layout;
    let (pairs, padded_dim) = (layout.dtype == KvDtype::Bf16, job.padded_dim());
    let is_whole = positions.start <= start && start + ATTENTION_TILE <= positions.end;
    if is_whole && padded_dim == layout.head_dim {
        return;
    }
    let steps = if pairs { GRANULE_TOKENS / 2 } else { GRANULE_TOKENS };
    copies.resize(TILE_GRANULES * steps * padded_dim);
    tile.v_stride = padded_dim;
    for g in granules(start, positions) {
        let first = start + g * GRANULE_TOKENS;
        let is_whole = positions.start <= first && first + GRANULE_TOKENS <= positions.end;
        if is_whole && padded_dim == layout.head_dim {
            continue;
        }
        let copy = &mut copies[g * steps * padded_dim..][..steps * padded_dim];
        for step in 0..steps {
            let mask = if pairs {
                let token = first + 2 * step;
                (u32::from(positions.contains(&token)) * 0xffff)
                    | (u32::from(positions.contains(&(token + 1))) * 0xffff_0000)
            } else {
                u32::from(positions.contains(&(first + step))) * u32::MAX
            };
            // SAFETY: a head of V has `steps` of these; it is 4-byte aligned and initialised; nobody writes positions
            // that a query sees, and others are only read as bits (the arena's invariant).
            let from = unsafe { std::slice::from_raw_parts(tile.v[g].add(step * layout.head_dim), layout.head_dim) };
            let into = &mut copy[step * padded_dim..][..padded_dim];
            into.iter_mut().zip(from).for_each(|(into, from)| *into = from & mask);
            into[layout.head_dim..].fill(0);
        }
        tile.v[g] = copy.as_ptr();
    }
}

/// Vectors of a row of scores.
const ROW_VECTORS: usize = ATTENTION_TILE / LANES;

/// One number for each row of a subtile, and for as many more as make a vector.
pub(super) type OfRows = Aligned<[f32; LANES]>;

/// What the rows of a subtile see of a tile: the positions of each within it, none where the range is empty.
pub(super) type Seen = [Range<usize>; QUERY_ROWS_MAX];

/// Scale and softcap; then turns the scores of `num_rows` rows into weights, rounded where values are bf16, updates
/// maximum and sum of each row that sees something, and returns the factors on what was summed before.
///
/// In three steps over all rows, of which the middle one has a row in each lane: what a row waits for (its highest
/// score, its factor, its sum) others use the time of.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
pub(super) unsafe fn softmax_rows<S: Simd>(
    scores: &mut Scores,
    params: &AttentionParams,
    num_rows: usize,
    seen: &Seen,
    pairs: bool,
    (max, sum): (&mut [f32], &mut [f32]),
    weights: &mut Weights,
) -> OfRows {
    // Bit i of vector v: whether position 16 v + i is seen.
    let sees = |row: usize, v: usize| {
        let seen = &seen[row];
        ((u64::MAX >> (ATTENTION_TILE - seen.len())) << seen.start >> (v * LANES)) as u16
    };
    let is_partial = |row: usize| seen[row].len() < ATTENTION_TILE;
    let (mut highest, mut totals) = (Aligned([f32::MIN; LANES]), Aligned([0.0; LANES]));
    let (mut old, mut new, mut corrections) = (Aligned([f32::MIN; LANES]), highest, highest);
    // SAFETY: the instruction set is the caller's promise; scores and weights are 4 vectors for each row.
    unsafe {
        for row in 0..num_rows {
            if seen[row].is_empty() {
                continue;
            }
            let scores = scores.0[row].as_mut_ptr();
            let mut s = [S::splat(0.0); ROW_VECTORS];
            for v in 0..ROW_VECTORS {
                s[v] = S::mul(S::load(scores.add(v * LANES)), S::splat(params.scale));
            }
            if let Some(cap) = params.softcap {
                for v in 0..ROW_VECTORS {
                    S::store(scores.add(v * LANES), s[v]);
                }
                for i in 0..ATTENTION_TILE {
                    *scores.add(i) = cap * tanh(*scores.add(i) / cap);
                }
                for v in 0..ROW_VECTORS {
                    s[v] = S::load(scores.add(v * LANES));
                }
            }
            if is_partial(row) {
                for v in 0..ROW_VECTORS {
                    s[v] = S::keep(s[v], sees(row, v), f32::MIN);
                }
            }
            for v in 0..ROW_VECTORS {
                S::store(scores.add(v * LANES), s[v]);
            }
            highest.0[row] = S::tree_max(S::max(S::max(s[0], s[1]), S::max(s[2], s[3])));
        }
        old.0[..num_rows].copy_from_slice(max);
        let (before, highest) = (S::load(old.0.as_ptr()), S::load(highest.0.as_ptr()));
        let after = S::max(highest, before);
        S::store(new.0.as_mut_ptr(), after);
        // exp(0) = 1 where the maximum stays.
        S::store(corrections.0.as_mut_ptr(), S::exp_not_positive(S::sub(before, after)));
        for row in 0..num_rows {
            if seen[row].is_empty() {
                continue;
            }
            let mut s = [S::splat(0.0); ROW_VECTORS];
            for v in 0..ROW_VECTORS {
                let score = S::load(scores.0[row].as_ptr().add(v * LANES));
                s[v] = S::exp_not_positive(S::sub(score, S::splat(new.0[row])));
            }
            if is_partial(row) {
                for v in 0..ROW_VECTORS {
                    s[v] = S::keep(s[v], sees(row, v), 0.0);
                }
            }
            // The first lane sums start from zero, which changes no bit of a weight.
            totals.0[row] = S::tree_sum(S::add(S::add(S::add(s[0], s[1]), s[2]), s[3]));
            let into = weights.0[row].as_mut_ptr();
            for v in 0..ROW_VECTORS {
                if pairs && S::PAIR_LANES == 1 {
                    // Neighbours are the halves of a pair, so the rounded weights in order are the pairs in order.
                    S::store_rounded_not_negative(into.add(v * LANES / 2), s[v]);
                } else {
                    S::store(into.add(v * LANES).cast(), if pairs { S::round_not_negative(s[v]) } else { s[v] });
                }
            }
        }
    }
    for row in 0..num_rows {
        if !seen[row].is_empty() {
            max[row] = new.0[row];
            sum[row] = sum[row].mul_add(corrections.0[row], totals.0[row]);
        }
    }
    corrections
}
