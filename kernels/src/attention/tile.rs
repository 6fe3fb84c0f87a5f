//! One tile: up to 12 query rows against 64 positions.
//!
//! ```text
//! scores    q [depth][12]  x  2 granules of K [depth][16 tokens], twice      lanes are tokens
//! values    p [12][steps]  x  4 granules of V [steps][head_dim]              lanes are features
//! ```
//!
//! The fewer vectors side by side, the more rows share the work of taking a pair of K or V apart; up to 5 rows have
//! four. Meanwhile K and V of the next tile come nearer: they lie in pieces of some lines, of which the machine
//! foresees nothing.
#![allow(clippy::needless_range_loop)] // row r, column c: the shapes of the drawing

use std::ops::Range;

use super::{AttentionParams, Job};
use crate::kv_layout::{GRANULE_TOKENS, KvDtype};
use crate::numerics::{ATTENTION_TILE, LANES, tanh};
use crate::simd::{Simd, fold_tile};

/// Granules of a tile.
const TILE_GRANULES: usize = ATTENTION_TILE / GRANULE_TOKENS;

/// Rows of a subtile at most, on any instruction set.
pub(super) const QUERY_ROWS_MAX: usize = 12;

/// Scores of a subtile with the positions of a tile, then their weights.
pub(super) type Scores = [[f32; ATTENTION_TILE]; QUERY_ROWS_MAX];

/// The weights as `fold_tile` reads them: bf16 pairs (half of each row, or all of it widened) or f32.
pub(super) type Weights = [[u32; ATTENTION_TILE]; QUERY_ROWS_MAX];

/// Where the keys and values of 64 positions lie. Those of granules that nobody sees are others' instead.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    k: [*const u32; TILE_GRANULES],
    v: [*const u32; TILE_GRANULES],
    /// Lanes from one step of V to the next: the head, padded where V was copied.
    v_stride: usize,
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
    copies: &mut Vec<u32>,
) {
    let layout = job.layout;
    let (pairs, padded_dim) = (layout.dtype == KvDtype::Bf16, job.padded_dim());
    let is_whole = positions.start <= start && start + ATTENTION_TILE <= positions.end;
    if is_whole && padded_dim == layout.head_dim {
        return;
    }
    let steps = if pairs { GRANULE_TOKENS / 2 } else { GRANULE_TOKENS };
    copies.resize(TILE_GRANULES * steps * padded_dim, 0);
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

/// Products of `MR` packed queries with the keys of these granules of a tile, at least.
///
/// # Safety
/// The machine has the instruction set, `q` holds `[depth][MR]` steps, `tile` points to valid granules.
#[inline(always)]
pub(super) unsafe fn score_tile<S: Simd, const MR: usize, const PAIRS: bool>(
    tile: &Tile,
    next: &Tile,
    granules: Range<usize>,
    depth: usize,
    q: *const u32,
    scores: &mut Scores,
) {
    if MR > S::QUERY_ROWS {
        unreachable!("subtiles were cut for this instruction set");
    }
    // SAFETY: K heads hold `depth * 16` lanes.
    unsafe {
        if MR <= S::WIDE_QUERY_ROWS {
            score_columns::<S, MR, 4, PAIRS>(scores, 0, depth, q, tile, next);
        } else if S::QUERY_COLS == 2 {
            for half in granules.start / 2..granules.end.div_ceil(2) {
                score_columns::<S, MR, 2, PAIRS>(scores, 2 * half, depth, q, tile, next);
            }
        } else {
            for granule in granules {
                score_columns::<S, MR, 1, PAIRS>(scores, granule, depth, q, tile, next);
            }
        }
    }
}

/// Scores with the keys of `NR` granules from granule `first` of the tile on.
#[inline(always)]
unsafe fn score_columns<S: Simd, const MR: usize, const NR: usize, const PAIRS: bool>(
    scores: &mut Scores,
    first: usize,
    depth: usize,
    q: *const u32,
    tile: &Tile,
    next: &Tile,
) {
    // SAFETY: as required of the caller.
    unsafe {
        let mut acc = [[S::splat(0.0); NR]; MR];
        let (mut k, mut ahead) = ([tile.k[first]; NR], [next.k[first]; NR]);
        for c in 1..NR {
            (k[c], ahead[c]) = (tile.k[first + c], next.k[first + c]);
        }
        fold_tile::<S, MR, NR, PAIRS, 0>(&mut acc, depth, q, &k, GRANULE_TOKENS, &ahead);
        for r in 0..MR {
            for c in 0..NR {
                S::store(scores[r].as_mut_ptr().add((first + c) * GRANULE_TOKENS), acc[r][c]);
            }
        }
    }
}

/// Vectors of a row of scores.
const ROW_VECTORS: usize = ATTENTION_TILE / LANES;

/// One number for each row of a subtile, and for as many more as make a vector.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct OfRows(pub(super) [f32; LANES]);

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
    let (mut highest, mut totals) = (OfRows([f32::MIN; LANES]), OfRows([0.0; LANES]));
    let (mut old, mut new, mut corrections) = (OfRows([f32::MIN; LANES]), highest, highest);
    // SAFETY: the instruction set is the caller's promise; scores and weights are 4 vectors for each row.
    unsafe {
        for row in 0..num_rows {
            if seen[row].is_empty() {
                continue;
            }
            let scores = scores[row].as_mut_ptr();
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
                let score = S::load(scores[row].as_ptr().add(v * LANES));
                s[v] = S::exp_not_positive(S::sub(score, S::splat(new.0[row])));
            }
            if is_partial(row) {
                for v in 0..ROW_VECTORS {
                    s[v] = S::keep(s[v], sees(row, v), 0.0);
                }
            }
            // The first lane sums start from zero, which changes no bit of a weight.
            totals.0[row] = S::tree_sum(S::add(S::add(S::add(s[0], s[1]), s[2]), s[3]));
            let into = weights[row].as_mut_ptr();
            for v in 0..ROW_VECTORS {
                let rounded = if pairs { S::round_not_negative(s[v]) } else { s[v] };
                if pairs && S::PAIR_LANES == 1 {
                    // Neighbours are the halves of a pair, so the rounded weights in order are the pairs in order.
                    S::store_high_halves(into.add(v * LANES / 2), rounded);
                } else {
                    S::store(into.add(v * LANES).cast(), rounded);
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

/// Adds the weighted values of these granules of a tile to the `MR` rows of `acc` that see something of it.
///
/// # Safety
/// The machine has the instruction set, `tile` points to valid granules.
#[inline(always)]
pub(super) unsafe fn value_tile<S: Simd, const MR: usize, const PAIRS: bool>(
    tile: &Tile,
    next: &Tile,
    granules: Range<usize>,
    weights: &Weights,
    (seen, corrections): (&Seen, &OfRows),
    acc: &mut [f32],
) {
    if MR > S::QUERY_ROWS {
        unreachable!("subtiles were cut for this instruction set");
    }
    let (mut column, num_columns) = (0, acc.len() / MR / LANES);
    let values = Values { tile, next, granules, weights, seen, corrections };
    // SAFETY: columns stay below the padded head, which V (or its padded copy) has.
    unsafe {
        while column < num_columns {
            let left = num_columns - column;
            if MR <= S::WIDE_QUERY_ROWS && left >= 4 {
                value_columns::<S, MR, 4, PAIRS>(&values, acc, column);
                column += 4;
            } else if S::QUERY_COLS == 2 && left >= 2 {
                value_columns::<S, MR, 2, PAIRS>(&values, acc, column);
                column += 2;
            } else {
                value_columns::<S, MR, 1, PAIRS>(&values, acc, column);
                column += 1;
            }
        }
    }
}

/// What all columns of a value tile have in common.
struct Values<'a> {
    tile: &'a Tile,
    next: &'a Tile,
    granules: Range<usize>,
    weights: &'a Weights,
    seen: &'a Seen,
    corrections: &'a OfRows,
}

/// Adds the weighted values of a tile to `NR` vectors of features of each row that sees any of it.
#[inline(always)]
unsafe fn value_columns<S: Simd, const MR: usize, const NR: usize, const PAIRS: bool>(
    values: &Values<'_>,
    acc: &mut [f32],
    column: usize,
) {
    let steps = if PAIRS { GRANULE_TOKENS / 2 } else { GRANULE_TOKENS };
    let padded_dim = acc.len() / MR;
    // SAFETY: as required of the caller.
    unsafe {
        let mut fold = [[S::splat(0.0); NR]; MR];
        for g in values.granules.clone() {
            let (mut v, mut ahead) = ([values.tile.v[g]; NR], [values.next.v[g]; NR]);
            for c in 0..NR {
                v[c] = v[c].add((column + c) * LANES);
                ahead[c] = ahead[c].wrapping_add((column + c) * LANES);
            }
            let lanes = if PAIRS { S::PAIR_LANES } else { 1 };
            let p = values.weights.as_ptr().cast::<u32>().add(g * steps * lanes);
            fold_tile::<S, MR, NR, PAIRS, ATTENTION_TILE>(&mut fold, steps, p, &v, values.tile.v_stride, &ahead);
        }
        for r in 0..MR {
            if !values.seen[r].is_empty() {
                let correction = S::splat(values.corrections.0[r]);
                for c in 0..NR {
                    let acc = acc[r * padded_dim + (column + c) * LANES..][..LANES].as_mut_ptr();
                    S::store(acc, S::fma(S::load(acc), correction, fold[r][c]));
                }
            }
        }
    }
}
