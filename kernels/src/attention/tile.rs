//! One tile: up to 6 query rows against 64 positions.
//!
//! ```text
//! scores    q [depth][6]  x  4 granules of K [depth][16 tokens]        lanes are tokens
//! values    p [6][steps]  x  4 granules of V [steps][head_dim]         lanes are features
//! ```
#![allow(clippy::needless_range_loop)] // row r, column c: the shapes of the drawing

use std::ops::Range;

use super::{AttentionParams, Job};
use crate::kv_layout::{GRANULE_TOKENS, KvDtype};
use crate::numerics::{ATTENTION_TILE, LANES, exp, round_bf16, tanh};
use crate::simd::{Simd, fold_tile};

/// Granules of a tile.
const TILE_GRANULES: usize = ATTENTION_TILE / GRANULE_TOKENS;

/// Rows of a subtile at most, on any instruction set.
pub(super) const QUERY_ROWS_MAX: usize = 6;

/// Scores of a subtile with the positions of a tile, then their weights.
pub(super) type Scores = [[f32; ATTENTION_TILE]; QUERY_ROWS_MAX];

/// The weights as `fold_tile` reads them: bf16 pairs (half of each row, or all of it widened) or f32.
pub(super) type Weights = [[u32; ATTENTION_TILE]; QUERY_ROWS_MAX];

/// Where the keys and values of 64 positions lie. Granules outside `granules` are not to be read.
pub(super) struct Tile {
    granules: Range<usize>,
    k: [*const u32; TILE_GRANULES],
    v: [*const u32; TILE_GRANULES],
    /// Lanes from one step of V to the next: the head, padded where V was copied.
    v_stride: usize,
}

/// Finds the granules of a tile. Those of V that hold positions no row sees, or heads that are no whole
/// vectors, are copied with zeros in these places, so that the loops over them need no mask.
#[inline(always)]
pub(super) fn locate(
    job: &Job<'_>,
    span: usize,
    kv_head: usize,
    start: usize,
    positions: &Range<usize>,
    copies: &mut Vec<u32>,
) -> Tile {
    let layout = job.layout;
    let seen = positions.start.max(start) - start..positions.end.min(start + ATTENTION_TILE) - start;
    let granules = seen.start / GRANULE_TOKENS..seen.end.div_ceil(GRANULE_TOKENS);
    let (pairs, padded_dim) = (layout.dtype == KvDtype::Bf16, job.padded_dim());
    let steps = if pairs { GRANULE_TOKENS / 2 } else { GRANULE_TOKENS };
    let pads = padded_dim != layout.head_dim;
    copies.resize(TILE_GRANULES * steps * padded_dim, 0);
    let mut tile = Tile {
        granules: granules.clone(),
        k: [std::ptr::null(); TILE_GRANULES],
        v: [std::ptr::null(); TILE_GRANULES],
        v_stride: padded_dim,
    };
    let block_table = &job.batch.block_tables[job.batch.spans[span].block_table.clone()];
    for g in granules.clone() {
        let position = start + g * GRANULE_TOKENS;
        let block = block_table[position / layout.block_size];
        let offset = layout.granule_offset(job.layer, block, position % layout.block_size / GRANULE_TOKENS);
        let k = job.arena.bytes(offset, layout.granule_bytes()).cast_const();
        let tokens = g * GRANULE_TOKENS..(g + 1) * GRANULE_TOKENS;
        let whole = seen.start <= tokens.start && tokens.end <= seen.end;
        // SAFETY: heads and planes lie within the granule; all of it is 4-byte aligned and initialised; nobody
        // writes positions that a query sees, and others are only read as bits (the arena's invariant).
        unsafe {
            let k = k.add(kv_head * layout.head_bytes());
            let v = k.add(layout.plane_bytes()).cast::<u32>();
            tile.k[g] = k.cast();
            tile.v[g] = v;
            if pads || !whole {
                let copy = &mut copies[g * steps * padded_dim..][..steps * padded_dim];
                for step in 0..steps {
                    let mask = if pairs {
                        let token = tokens.start + 2 * step;
                        (u32::from(seen.contains(&token)) * 0xffff)
                            | (u32::from(seen.contains(&(token + 1))) * 0xffff_0000)
                    } else {
                        u32::from(seen.contains(&(tokens.start + step))) * u32::MAX
                    };
                    let from = std::slice::from_raw_parts(v.add(step * layout.head_dim), layout.head_dim);
                    let into = &mut copy[step * padded_dim..][..padded_dim];
                    into.iter_mut().zip(from).for_each(|(into, from)| *into = from & mask);
                    into[layout.head_dim..].fill(0);
                }
                tile.v[g] = copy.as_ptr();
            }
        }
    }
    for g in 0..TILE_GRANULES {
        if !granules.contains(&g) {
            // Scores of these are masked; any keys will do.
            tile.k[g] = tile.k[granules.start];
        }
    }
    tile
}

/// Products of `MR` packed queries with the 64 keys of a tile.
///
/// # Safety
/// The machine has the instruction set, `q` holds `[depth][MR]` lanes, `tile` points to valid granules.
#[inline(always)]
pub(super) unsafe fn score_tile<S: Simd, const MR: usize, const PAIRS: bool>(
    tile: &Tile,
    depth: usize,
    q: *const u32,
    scores: &mut Scores,
) {
    if MR > S::QUERY_ROWS {
        unreachable!("subtiles were cut for this instruction set");
    }
    // SAFETY: K heads hold `depth * 16` lanes.
    unsafe {
        if S::QUERY_COLS == 4 {
            score_columns::<S, MR, 4, PAIRS>(scores, 0, depth, q, &tile.k);
        } else {
            for granule in 0..TILE_GRANULES {
                score_columns::<S, MR, 1, PAIRS>(scores, granule, depth, q, &[tile.k[granule]]);
            }
        }
    }
}

/// Scores with the keys of `NR` granules from granule `granule` of the tile on.
#[inline(always)]
unsafe fn score_columns<S: Simd, const MR: usize, const NR: usize, const PAIRS: bool>(
    scores: &mut Scores,
    granule: usize,
    depth: usize,
    q: *const u32,
    k: &[*const u32; NR],
) {
    // SAFETY: as required of the caller.
    unsafe {
        let mut acc = [[S::splat(0.0); NR]; MR];
        fold_tile::<S, MR, NR, PAIRS, 0>(&mut acc, depth, q, k, GRANULE_TOKENS);
        for r in 0..MR {
            for c in 0..NR {
                S::store(scores[r].as_mut_ptr().add((granule + c) * GRANULE_TOKENS), acc[r][c]);
            }
        }
    }
}

/// Scale and softcap; then turns scores into weights, updates maximum and sum, and returns the factor on what
/// was summed before. `seen` are the positions of the tile that the row sees.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
pub(super) unsafe fn softmax_step<S: Simd>(
    scores: &mut [f32; ATTENTION_TILE],
    params: &AttentionParams,
    seen: Range<usize>,
    max: &mut f32,
    sum: &mut f32,
) -> f32 {
    let (first, num_seen) = (seen.start as u32, seen.len() as u32);
    let is_partial = seen.len() < ATTENTION_TILE;
    let sees = |i: usize| (i as u32).wrapping_sub(first) < num_seen;
    scores.iter_mut().for_each(|score| *score *= params.scale);
    if let Some(cap) = params.softcap {
        scores.iter_mut().for_each(|score| *score = cap * tanh(*score / cap));
    }
    if is_partial {
        for (i, score) in scores.iter_mut().enumerate() {
            *score = if sees(i) { *score } else { f32::MIN };
        }
    }
    // SAFETY: the instruction set is the caller's promise; scores are 4 vectors.
    let highest = unsafe {
        let at = |i: usize| scores.as_ptr().add(i * LANES);
        let low = S::max(S::load(at(0)), S::load(at(1)));
        S::tree_max(S::max(low, S::max(S::load(at(2)), S::load(at(3)))))
    };
    let new = if highest > *max { highest } else { *max };
    let correction = exp(*max - new);
    scores.iter_mut().for_each(|score| *score = exp(*score - new));
    if is_partial {
        for (i, score) in scores.iter_mut().enumerate() {
            *score = if sees(i) { *score } else { 0.0 };
        }
    }
    // SAFETY: as above. The first lane sums start from zero, which changes no bit of a weight.
    let total = unsafe {
        let at = |i: usize| scores.as_ptr().add(i * LANES);
        let lanes = S::add(S::add(S::add(S::load(at(0)), S::load(at(1))), S::load(at(2))), S::load(at(3)));
        S::tree_sum(lanes)
    };
    *max = new;
    *sum = sum.mul_add(correction, total);
    correction
}

/// Makes one row's weights what `value_tile` reads.
#[inline(always)]
pub(super) fn pack_weights<S: Simd>(pairs: bool, weights: &[f32; ATTENTION_TILE], into: &mut [u32; ATTENTION_TILE]) {
    if pairs && S::PAIR_LANES == 2 {
        for i in 0..ATTENTION_TILE {
            into[i] = u32::from(round_bf16(weights[i])) << 16;
        }
    } else if pairs {
        // Neighbours are the halves of a pair, so the rounded weights in order are the pairs in order: taking
        // them apart and together again would cost as much as the rounding.
        let mut halves = [0u16; ATTENTION_TILE];
        for i in 0..ATTENTION_TILE {
            halves[i] = round_bf16(weights[i]);
        }
        for (into, pair) in into.iter_mut().zip(halves.as_chunks::<2>().0) {
            *into = u32::from(pair[0]) | (u32::from(pair[1]) << 16);
        }
    } else {
        *into = weights.map(f32::to_bits);
    }
}

/// Adds the weighted values of a tile to the `MR` rows of `acc`, of which those without a correction see
/// nothing of it.
///
/// # Safety
/// The machine has the instruction set, `tile` points to valid granules.
#[inline(always)]
pub(super) unsafe fn value_tile<S: Simd, const MR: usize, const PAIRS: bool>(
    tile: &Tile,
    weights: &Weights,
    corrections: &[Option<f32>],
    acc: &mut [f32],
) {
    if MR > S::QUERY_ROWS {
        unreachable!("subtiles were cut for this instruction set");
    }
    let (mut column, num_columns) = (0, acc.len() / MR / LANES);
    // SAFETY: columns stay below the padded head, which V (or its padded copy) has.
    unsafe {
        while column < num_columns {
            let left = num_columns - column;
            if S::QUERY_COLS == 4 && left >= 4 {
                value_columns::<S, MR, 4, PAIRS>(tile, weights, corrections, acc, column);
                column += 4;
            } else if S::QUERY_COLS == 4 && left >= 2 {
                value_columns::<S, MR, 2, PAIRS>(tile, weights, corrections, acc, column);
                column += 2;
            } else {
                value_columns::<S, MR, 1, PAIRS>(tile, weights, corrections, acc, column);
                column += 1;
            }
        }
    }
}

/// Adds the weighted values of a tile to `NR` vectors of features of each row that sees any of it.
#[inline(always)]
unsafe fn value_columns<S: Simd, const MR: usize, const NR: usize, const PAIRS: bool>(
    tile: &Tile,
    weights: &Weights,
    corrections: &[Option<f32>],
    acc: &mut [f32],
    column: usize,
) {
    let steps = if PAIRS { GRANULE_TOKENS / 2 } else { GRANULE_TOKENS };
    let padded_dim = acc.len() / MR;
    // SAFETY: as required of the caller.
    unsafe {
        let mut fold = [[S::splat(0.0); NR]; MR];
        for g in tile.granules.clone() {
            let mut v = [tile.v[g]; NR];
            for c in 0..NR {
                v[c] = tile.v[g].add((column + c) * LANES);
            }
            let lanes = if PAIRS { S::PAIR_LANES } else { 1 };
            let p = weights.as_ptr().cast::<u32>().add(g * steps * lanes);
            fold_tile::<S, MR, NR, PAIRS, ATTENTION_TILE>(&mut fold, steps, p, &v, tile.v_stride);
        }
        for r in 0..MR {
            if let Some(correction) = corrections[r] {
                let correction = S::splat(correction);
                for c in 0..NR {
                    let acc = acc[r * padded_dim + (column + c) * LANES..][..LANES].as_mut_ptr();
                    S::store(acc, S::fma(S::load(acc), correction, fold[r][c]));
                }
            }
        }
    }
}
