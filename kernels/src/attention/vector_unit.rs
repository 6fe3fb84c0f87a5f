//! What a unit does tile after tile where vectors multiply.
#![allow(clippy::needless_range_loop)]

use std::cell::Cell;
use std::ops::Range;

use super::Job;
use super::softmax::Softmax;
use super::tile::{Aligned, Lines, QUERY_ROWS_MAX, Scores, Seen, Weights, granules, locate, mask_values, softmax_rows};
use super::units::{Partials, Unit, clip};
use super::vectors::Vectors;
use crate::kv_layout::KvDtype;
use crate::numerics::{ATTENTION_PART, ATTENTION_TILE, Order};
use crate::simd::Simd;

/// Softmax states of a unit's rows: maximum, sum, and `padded_dim` weighted values each.
#[derive(Default)]
struct States {
    max: Vec<f32>,
    sum: Vec<f32>,
    acc: Lines<f32>,
}

impl States {
    fn reset(&mut self, rows: usize, padded_dim: usize) {
        self.max.clear();
        self.max.resize(rows, f32::MIN);
        self.sum.clear();
        self.sum.resize(rows, 0.0);
        self.acc.resize(rows * padded_dim);
        self.acc.fill(0.0);
    }
}

/// What a thread keeps between units.
struct Scratch {
    /// Packed queries, subtile after subtile.
    q: Lines<u32>,
    part: States,
    total: States,
    /// Copies of granules of V that need a mask or padding: `[4][steps][padded_dim]`.
    values: Lines<u32>,
    /// The positions each row of the unit sees.
    visible: Vec<Range<usize>>,
    scores: Scores,
    weights: Weights,
}

impl Scratch {
    fn new() -> Box<Scratch> {
        Box::new(Scratch {
            q: Lines::default(),
            part: States::default(),
            total: States::default(),
            values: Lines::default(),
            visible: Vec::new(),
            scores: Aligned([[0.0; ATTENTION_TILE]; QUERY_ROWS_MAX]),
            weights: Aligned([[0; ATTENTION_TILE]; QUERY_ROWS_MAX]),
        })
    }
}

thread_local! {
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// # Safety
/// The machine has the instruction set; a thread computes one unit at a time, which nobody else does.
#[inline(always)]
pub(super) unsafe fn compute_in_vectors<S: Simd>(job: &Job<'_>, unit: &Unit, partials: &Partials) {
    let mut scratch = SCRATCH.take().unwrap_or_else(Scratch::new);
    let (num_rows, padded_dim) = (unit.rows.len(), job.padded_dim());
    let products = Vectors::<S>::new(job.layout);
    let subtiles = || (0..).map_while(|i| products.subtile(i, num_rows));
    let pairs = job.layout.dtype == KvDtype::Bf16;
    let lanes_per_row = products.lanes_per_row();
    scratch.q.resize(num_rows * lanes_per_row);
    for rows in subtiles() {
        let into = &mut scratch.q[rows.start * lanes_per_row..rows.end * lanes_per_row];
        for (r, row) in rows.clone().enumerate() {
            products.pack(job.query_of(unit, row), (r, rows.len()), into);
        }
    }
    let positions = job.positions(unit);
    scratch.visible.clear();
    scratch.visible.extend((0..num_rows).map(|row| job.visible(unit, row)));
    let unit_end = positions.end.min(unit.parts.end * ATTENTION_PART);
    let softmax = Softmax::of(job.params, job.layout.dtype, Order::Pairs);
    let mut seen_of_rows: Seen = Default::default();
    scratch.total.reset(num_rows, padded_dim);
    for part in unit.parts.clone() {
        scratch.part.reset(num_rows, padded_dim);
        let end = positions.end.min((part + 1) * ATTENTION_PART);
        let mut start = positions.start.max(part * ATTENTION_PART) / ATTENTION_TILE * ATTENTION_TILE;
        while start < end {
            let mut tile = locate(job, unit.span, unit.kv_head, start, &positions);
            let next = if start + ATTENTION_TILE < unit_end { start + ATTENTION_TILE } else { start };
            let next = locate(job, unit.span, unit.kv_head, next, &positions);
            mask_values(job, &mut tile, start, &positions, &mut scratch.values);
            let mut ahead = &next;
            for rows in subtiles() {
                let seen = scratch.visible[rows.start].start..scratch.visible[rows.end - 1].end;
                if clip(&seen, start..start + ATTENTION_TILE).is_empty() {
                    continue;
                }
                for (r, row) in rows.clone().enumerate() {
                    let clipped = clip(&scratch.visible[row], start..start + ATTENTION_TILE);
                    seen_of_rows[r] =
                        if clipped.is_empty() { 0..0 } else { clipped.start - start..clipped.end - start };
                }
                let (num, granules) = (rows.len(), granules(start, &seen));
                let q = scratch.q[rows.start * lanes_per_row..].as_ptr();
                let (scores, weights) = (&mut scratch.scores, &mut scratch.weights);
                let states = (&mut scratch.part.max[rows.clone()], &mut scratch.part.sum[rows.clone()]);
                let acc = &mut scratch.part.acc[rows.start * padded_dim..rows.end * padded_dim];
                // SAFETY: the caller has the instruction set; q holds this subtile's packed queries, the tile's
                // pointers lead to heads of its layout.
                unsafe {
                    products.score((&tile, granules.clone()), ahead, (q, num), scores);
                    let corrections = softmax_rows::<S>(scores, job.params, num, &seen_of_rows, pairs, states, weights);
                    let of_rows = (&seen_of_rows, &corrections);
                    products.add_values((&tile, granules), ahead, weights, of_rows, (acc, num));
                }
                // What the first has asked for is on its way.
                ahead = &tile;
            }
            start += ATTENTION_TILE;
        }
        for row in 0..num_rows {
            let visible = &scratch.visible[row];
            if clip(visible, part * ATTENTION_PART..(part + 1) * ATTENTION_PART).is_empty() {
                continue;
            }
            let is_first = visible.start / ATTENTION_PART == part || unit.is_partial();
            let (max, sum) = (scratch.part.max[row], scratch.part.sum[row]);
            let acc = &scratch.part.acc[row * padded_dim..][..padded_dim];
            let (total_max, total_sum) = (&mut scratch.total.max[row], &mut scratch.total.sum[row]);
            let total_acc = &mut scratch.total.acc[row * padded_dim..][..padded_dim];
            if is_first {
                (*total_max, *total_sum) = (max, sum);
                total_acc.copy_from_slice(acc);
            } else {
                (*total_max, *total_sum) = softmax.merge((*total_max, *total_sum), total_acc, (max, sum), acc);
            }
        }
    }
    for row in 0..num_rows {
        let acc = &scratch.total.acc[row * padded_dim..][..padded_dim];
        // SAFETY: as required of the caller.
        unsafe { job.finish(unit, partials, row, scratch.total.max[row], scratch.total.sum[row], acc) };
    }
    SCRATCH.set(Some(scratch));
}
