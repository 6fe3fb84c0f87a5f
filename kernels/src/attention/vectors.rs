//! Products with keys and values in vectors.
//!
//! ```text
//! scores    q [depth][12]  x  2 granules of K [depth][16 tokens], twice      lanes are tokens
//! values    p [12][steps]  x  4 granules of V [steps][head_dim]              lanes are features
//! ```
//!
//! The fewer vectors side by side, the more rows share the work of taking a pair of K or V apart; up to 5 rows have
//! four.
#![allow(clippy::needless_range_loop)] // row r, column c: the shapes of the drawing

use std::marker::PhantomData;
use std::ops::Range;

use super::tile::{OfRows, Scores, Seen, Tile, Weights};
use crate::kv_layout::{GRANULE_TOKENS, KvDtype, KvLayout};
use crate::numerics::{ATTENTION_TILE, LANES, bf16_pair, round_bf16};
use crate::simd::{Simd, fold_tile};

/// Calls `f::<S, MR, PAIRS>` for a number of rows and a layout known at run time.
macro_rules! by_rows {
    ($rows:expr, $f:ident::<$s:ident, $pairs:ident>($($arg:expr),*)) => {
        match ($pairs, $rows) {
            (true, 1) => $f::<$s, 1, true>($($arg),*),
            (true, 2) => $f::<$s, 2, true>($($arg),*),
            (true, 3) => $f::<$s, 3, true>($($arg),*),
            (true, 4) => $f::<$s, 4, true>($($arg),*),
            (true, 5) => $f::<$s, 5, true>($($arg),*),
            (true, 6) => $f::<$s, 6, true>($($arg),*),
            (true, 12) => $f::<$s, 12, true>($($arg),*),
            (false, 1) => $f::<$s, 1, false>($($arg),*),
            (false, 2) => $f::<$s, 2, false>($($arg),*),
            (false, 3) => $f::<$s, 3, false>($($arg),*),
            (false, 4) => $f::<$s, 4, false>($($arg),*),
            (false, 5) => $f::<$s, 5, false>($($arg),*),
            (false, 6) => $f::<$s, 6, false>($($arg),*),
            (false, 12) => $f::<$s, 12, false>($($arg),*),
            _ => unreachable!("subtiles have 1 to 6 rows or 12"),
        }
    };
}

/// Products in the vectors of an instruction set.
pub(super) struct Vectors<S> {
    /// Whether K and V are bf16, of which a step multiplies two.
    pairs: bool,
    /// Steps of a score.
    depth: usize,
    /// Lanes of a step of a packed query.
    step_lanes: usize,
    instruction_set: PhantomData<S>,
}

impl<S: Simd> Vectors<S> {
    #[inline(always)]
    pub(super) fn new(layout: &KvLayout) -> Self {
        let pairs = layout.dtype == KvDtype::Bf16;
        let depth = if pairs { layout.head_dim / 2 } else { layout.head_dim };
        Vectors { pairs, depth, step_lanes: if pairs { S::PAIR_LANES } else { 1 }, instruction_set: PhantomData }
    }

    /// The rows of subtile `index` of so many, if there is one: as many as fit while there are so many, then one or two
    /// of nearly equal size with up to 6.
    #[inline(always)]
    pub(super) fn subtile(&self, index: usize, num_rows: usize) -> Option<Range<usize>> {
        let num_full = num_rows / S::QUERY_ROWS;
        if index < num_full {
            return Some(index * S::QUERY_ROWS..(index + 1) * S::QUERY_ROWS);
        }
        let (first, left, index) = (num_full * S::QUERY_ROWS, num_rows % S::QUERY_ROWS, index - num_full);
        let count = left.div_ceil(6);
        (index < count).then(|| first + index * left / count..first + (index + 1) * left / count)
    }

    /// Lanes of a packed query.
    #[inline(always)]
    pub(super) fn lanes_per_row(&self) -> usize {
        self.depth * self.step_lanes
    }

    /// Packs the query of row `r` of a subtile of `num_rows`: `[depth][rows of the subtile]`, each step in the lanes it
    /// takes.
    #[inline(always)]
    pub(super) fn pack(&self, q: &[f32], (r, num_rows): (usize, usize), into: &mut [u32]) {
        for step in 0..self.depth {
            let at = (step * num_rows + r) * self.step_lanes;
            match (self.pairs, self.step_lanes) {
                (false, _) => into[at] = q[step].to_bits(),
                (true, 1) => into[at] = bf16_pair(q[2 * step], q[2 * step + 1]),
                (true, _) => {
                    into[at] = u32::from(round_bf16(q[2 * step])) << 16;
                    into[at + 1] = u32::from(round_bf16(q[2 * step + 1])) << 16;
                }
            }
        }
    }

    /// Products of a subtile's packed queries with the keys of these granules of a tile, at least; `next` comes nearer
    /// meanwhile.
    ///
    /// # Safety
    /// The machine has the instruction set, the tile points to valid granules, the queries are packed ones of so many
    /// rows.
    #[inline(always)]
    pub(super) unsafe fn score(
        &self,
        (tile, granules): (&Tile, Range<usize>),
        next: &Tile,
        (q, num_rows): (*const u32, usize),
        scores: &mut Scores,
    ) {
        let (pairs, depth) = (self.pairs, self.depth);
        // SAFETY: as required of the caller.
        unsafe { by_rows!(num_rows, score_tile::<S, pairs>(tile, next, granules, depth, q, scores)) }
    }

    /// Adds the weighted values of these granules of a tile to those of so many rows of `acc` that see something of it.
    ///
    /// # Safety
    /// The machine has the instruction set, the tile points to valid granules.
    #[inline(always)]
    pub(super) unsafe fn add_values(
        &self,
        (tile, granules): (&Tile, Range<usize>),
        next: &Tile,
        weights: &Weights,
        rows: (&Seen, &OfRows),
        (acc, num_rows): (&mut [f32], usize),
    ) {
        let pairs = self.pairs;
        // SAFETY: as required of the caller.
        unsafe { by_rows!(num_rows, value_tile::<S, pairs>(tile, next, granules, weights, rows, acc)) }
    }
}

/// Products of `MR` packed queries with the keys of these granules of a tile, at least.
///
/// # Safety
/// The machine has the instruction set, `q` holds `[depth][MR]` steps, `tile` points to valid granules.
#[inline(always)]
unsafe fn score_tile<S: Simd, const MR: usize, const PAIRS: bool>(
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
                S::store(scores.0[r].as_mut_ptr().add((first + c) * GRANULE_TOKENS), acc[r][c]);
            }
        }
    }
}

/// Adds the weighted values of these granules of a tile to the `MR` rows of `acc` that see something of it.
///
/// # Safety
/// The machine has the instruction set, `tile` points to valid granules.
#[inline(always)]
unsafe fn value_tile<S: Simd, const MR: usize, const PAIRS: bool>(
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
            let p = values.weights.0.as_flattened().as_ptr().add(g * steps * lanes);
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
