//! The fast version: units of work over the pool, and what a unit does tile after tile.
//!
//! ```text
//! unit      one span, one KV head, up to 48 rows (query token, query head of that KV head), some parts
//! subtile   up to 12 of its rows: their scores with 64 keys, softmax, weighted sum of 64 values (super::tile)
//! ```
//!
//! Long contexts of few queries are split by part as well, and merged afterwards in ascending order.

use std::cell::Cell;
use std::ops::Range;

use super::tile::{
    QUERY_ROWS_MAX, Scores, Seen, Weights, granules, locate, mask_values, score_tile, softmax_rows, value_tile,
};
use super::{Job, first_visible};
use crate::ctx::Ctx;
use crate::kv_layout::KvDtype;
use crate::numerics::{ATTENTION_PART, ATTENTION_TILE, LANES, bf16_pair, exp, round_bf16};
use crate::simd::{Simd, vectorised, with_simd};

/// Rows of a unit at most: K and V of a tile stay in the first-level cache while they pass over them.
const UNIT_ROWS: usize = 48;

/// Multiply-adds of a unit at most, unless one subtile has more: a fraction of a millisecond, after which
/// prefill may give way to decode.
const UNIT_MADDS: usize = 16 << 20;

/// Below this many multiply-adds a call is not worth waking anyone.
const INLINE_MADDS: usize = 1 << 18;

/// Some rows of one span and KV head, and the parts of their positions to look at.
struct Unit {
    span: usize,
    kv_head: usize,
    /// Rows are (token, query head of the KV head), tokens first.
    rows: Range<usize>,
    parts: Range<usize>,
    /// Where the states of its rows go if others compute other parts.
    partial: Option<usize>,
}

/// The partial results of all units of a split call, `[row][head_dim_padded + 2]` each.
struct Partials(*mut f32);

// SAFETY: units write disjoint ranges; they are read after all units are done.
unsafe impl Sync for Partials {}

/// What the thread that calls keeps between calls.
#[derive(Default)]
struct CallScratch {
    groups: Vec<Unit>,
    units: Vec<Unit>,
    partials: Vec<f32>,
}

thread_local! {
    static CALL_SCRATCH: Cell<CallScratch> = const {
        Cell::new(CallScratch { groups: Vec::new(), units: Vec::new(), partials: Vec::new() })
    };
}

pub(super) fn run(ctx: &Ctx<'_>, job: &Job<'_>) {
    // Taken, not borrowed: while this thread waits for its units it may compute units of other calls.
    let mut scratch = CALL_SCRATCH.take();
    run_with(ctx, job, &mut scratch);
    CALL_SCRATCH.set(scratch);
}

fn run_with(ctx: &Ctx<'_>, job: &Job<'_>, scratch: &mut CallScratch) {
    let CallScratch { groups, units, partials } = scratch;
    groups.clear();
    let mut madds = 0;
    for (span, s) in job.batch.spans.iter().enumerate() {
        let rows = s.num_rows * job.group();
        let madds_per_row = (s.first_position + s.num_rows) * 2 * job.layout.head_dim;
        madds += rows * madds_per_row * job.layout.num_kv_heads;
        let unit_rows = UNIT_MADDS / madds_per_row.max(1) / QUERY_ROWS_MAX * QUERY_ROWS_MAX;
        let unit_rows = unit_rows.clamp(QUERY_ROWS_MAX, UNIT_ROWS);
        // Later rows see more keys: they go first, so that no thread is left with a long one at the end.
        for group in (0..rows.div_ceil(unit_rows)).rev() {
            for kv_head in 0..job.layout.num_kv_heads {
                let rows = group * unit_rows..rows.min((group + 1) * unit_rows);
                let mut unit = Unit { span, kv_head, rows, parts: 0..0, partial: None };
                let positions = job.positions(&unit);
                unit.parts = positions.start / ATTENTION_PART..(positions.end - 1) / ATTENTION_PART + 1;
                groups.push(unit);
            }
        }
    }
    if madds < INLINE_MADDS {
        groups.iter().for_each(|unit| compute(ctx, job, unit, &Partials(std::ptr::null_mut())));
        return;
    }
    let threads = ctx.pool.threads();
    if threads == 1 || groups.len() >= 3 * threads || groups.iter().all(|unit| unit.parts.len() == 1) {
        ctx.pool.run(ctx.priority, groups.len(), &|unit| {
            compute(ctx, job, &groups[unit], &Partials(std::ptr::null_mut()));
        });
        return;
    }
    let state_len = job.padded_dim() + 2;
    let mut partial_len = 0;
    units.clear();
    for group in groups.iter() {
        for part in group.parts.clone() {
            let rows = group.rows.clone();
            units.push(Unit { rows: rows.clone(), parts: part..part + 1, partial: Some(partial_len), ..*group });
            partial_len += rows.len() * state_len;
        }
    }
    // What was in it does not matter: units write all of theirs.
    if partials.len() < partial_len {
        partials.resize(partial_len, 0.0);
    }
    let shared = &Partials(partials.as_mut_ptr());
    ctx.pool.run(ctx.priority, units.len(), &|unit| compute(ctx, job, &units[unit], shared));
    let mut from = 0;
    for group in groups.iter() {
        let len = group.parts.len() * group.rows.len() * state_len;
        let partials = &mut partials[from..from + len];
        let isa = ctx.isa;
        vectorised!(isa, merge_group(job: &Job<'_>, group: &Unit, partials: &mut [f32]));
        from += len;
    }
}

fn compute(ctx: &Ctx<'_>, job: &Job<'_>, unit: &Unit, partials: &Partials) {
    let isa = ctx.isa;
    with_simd!(
        isa,
        compute_unit(job: &Job<'_>, unit: &Unit, partials: &Partials),
        else unreachable!("the portable instruction set runs the reference")
    );
}

impl Job<'_> {
    /// Values of a head in whole vectors.
    pub(super) fn padded_dim(&self) -> usize {
        self.layout.head_dim.next_multiple_of(LANES)
    }

    fn position(&self, unit: &Unit, row: usize) -> usize {
        self.batch.spans[unit.span].first_position + (unit.rows.start + row) / self.group()
    }

    /// Row of q and out, and query head, of a unit's row.
    fn place(&self, unit: &Unit, row: usize) -> (usize, usize) {
        let row = unit.rows.start + row;
        (self.batch.spans[unit.span].first_row + row / self.group(), unit.kv_head * self.group() + row % self.group())
    }

    /// All positions that some row of the unit sees.
    fn positions(&self, unit: &Unit) -> Range<usize> {
        first_visible(self.position(unit, 0), self.params)..self.position(unit, unit.rows.len() - 1) + 1
    }

    /// The positions that one row sees.
    fn visible(&self, unit: &Unit, row: usize) -> Range<usize> {
        let position = self.position(unit, row);
        first_visible(position, self.params)..position + 1
    }
}

/// Softmax states of a unit's rows: maximum, sum, and `padded_dim` weighted values each.
#[derive(Default)]
struct States {
    max: Vec<f32>,
    sum: Vec<f32>,
    acc: Vec<f32>,
}

impl States {
    fn reset(&mut self, rows: usize, padded_dim: usize) {
        self.max.clear();
        self.max.resize(rows, f32::MIN);
        self.sum.clear();
        self.sum.resize(rows, 0.0);
        self.acc.clear();
        self.acc.resize(rows * padded_dim, 0.0);
    }
}

/// What a thread keeps between units.
struct Scratch {
    /// Packed queries, subtile after subtile: `[depth][rows of the subtile]`, each step in the lanes it takes.
    q: Vec<u32>,
    part: States,
    total: States,
    /// Copies of granules of V that need a mask or padding: `[4][steps][padded_dim]`.
    values: Vec<u32>,
    /// The positions each row of the unit sees.
    visible: Vec<Range<usize>>,
    scores: Scores,
    weights: Weights,
}

impl Scratch {
    fn new() -> Box<Scratch> {
        Box::new(Scratch {
            q: Vec::new(),
            part: States::default(),
            total: States::default(),
            values: Vec::new(),
            visible: Vec::new(),
            scores: [[0.0; ATTENTION_TILE]; QUERY_ROWS_MAX],
            weights: [[0; ATTENTION_TILE]; QUERY_ROWS_MAX],
        })
    }
}

thread_local! {
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// The part of `range` within `bounds`; empty if there is none.
#[inline(always)]
fn clip(range: &Range<usize>, bounds: Range<usize>) -> Range<usize> {
    range.start.max(bounds.start)..range.end.min(bounds.end)
}

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

/// The rows of subtile `index`, if there is one: as many as fit while there are so many, then one or two of nearly
/// equal size with up to 6.
#[inline(always)]
fn subtile(index: usize, num_rows: usize, rows_max: usize) -> Option<Range<usize>> {
    let num_full = num_rows / rows_max;
    if index < num_full {
        return Some(index * rows_max..(index + 1) * rows_max);
    }
    let (first, left, index) = (num_full * rows_max, num_rows % rows_max, index - num_full);
    let count = left.div_ceil(6);
    (index < count).then(|| first + index * left / count..first + (index + 1) * left / count)
}

#[inline(always)]
unsafe fn compute_unit<S: Simd>(job: &Job<'_>, unit: &Unit, partials: &Partials) {
    let mut scratch = SCRATCH.take().unwrap_or_else(Scratch::new);
    let (num_rows, padded_dim) = (unit.rows.len(), job.padded_dim());
    let subtiles = || (0..).map_while(|i| subtile(i, num_rows, S::QUERY_ROWS));
    let pairs = job.layout.dtype == KvDtype::Bf16;
    let depth = if pairs { job.layout.head_dim / 2 } else { job.layout.head_dim };
    let step_lanes = if pairs { S::PAIR_LANES } else { 1 };
    let row_lanes = depth * step_lanes;
    scratch.q.resize(num_rows * row_lanes, 0);
    for rows in subtiles() {
        let into = &mut scratch.q[rows.start * row_lanes..rows.end * row_lanes];
        for (r, row) in rows.clone().enumerate() {
            let (q_row, head) = job.place(unit, row);
            let q = job.query(q_row, head);
            for step in 0..depth {
                let at = (step * rows.len() + r) * step_lanes;
                match (pairs, step_lanes) {
                    (false, _) => into[at] = q[step].to_bits(),
                    (true, 1) => into[at] = bf16_pair(q[2 * step], q[2 * step + 1]),
                    (true, _) => {
                        into[at] = u32::from(round_bf16(q[2 * step])) << 16;
                        into[at + 1] = u32::from(round_bf16(q[2 * step + 1])) << 16;
                    }
                }
            }
        }
    }
    let positions = job.positions(unit);
    scratch.visible.clear();
    scratch.visible.extend((0..num_rows).map(|row| job.visible(unit, row)));
    let unit_end = positions.end.min(unit.parts.end * ATTENTION_PART);
    let mut seen_of_rows: Seen = std::array::from_fn(|_| 0..0);
    scratch.total.reset(num_rows, padded_dim);
    for part in unit.parts.clone() {
        scratch.part.reset(num_rows, padded_dim);
        let end = positions.end.min((part + 1) * ATTENTION_PART);
        let mut start = positions.start.max(part * ATTENTION_PART) / ATTENTION_TILE * ATTENTION_TILE;
        while start < end {
            let mut tile = locate(job, unit.span, unit.kv_head, start, &positions);
            let ahead = if start + ATTENTION_TILE < unit_end { start + ATTENTION_TILE } else { start };
            let mut next = locate(job, unit.span, unit.kv_head, ahead, &positions);
            mask_values(job, &mut tile, start, &positions, &mut scratch.values);
            for rows in subtiles() {
                let seen = scratch.visible[rows.start].start..scratch.visible[rows.end - 1].end;
                if clip(&seen, start..start + ATTENTION_TILE).is_empty() {
                    continue;
                }
                let granules = granules(start, &seen);
                let q = scratch.q[rows.start * row_lanes..].as_ptr();
                let (num, padded) = (rows.len(), padded_dim);
                // SAFETY: the caller has the instruction set; q holds this subtile's `depth * rows` steps, the
                // tile's pointers lead to heads of its layout.
                unsafe {
                    let scores = &mut scratch.scores;
                    by_rows!(num, score_tile::<S, pairs>(&tile, &next, granules.clone(), depth, q, scores));
                    for (r, row) in rows.clone().enumerate() {
                        let clipped = clip(&scratch.visible[row], start..start + ATTENTION_TILE);
                        seen_of_rows[r] =
                            if clipped.is_empty() { 0..0 } else { clipped.start - start..clipped.end - start };
                    }
                    let states = (&mut scratch.part.max[rows.clone()], &mut scratch.part.sum[rows.clone()]);
                    let (scores, weights) = (&mut scratch.scores, &mut scratch.weights);
                    let corrections = softmax_rows::<S>(scores, job.params, num, &seen_of_rows, pairs, states, weights);
                    let acc = &mut scratch.part.acc[rows.start * padded..rows.end * padded];
                    let weights = &scratch.weights;
                    let rows = (&seen_of_rows, &corrections);
                    by_rows!(num, value_tile::<S, pairs>(&tile, &next, granules.clone(), weights, rows, acc));
                }
                // The first subtile has brought it.
                next = tile;
            }
            start += ATTENTION_TILE;
        }
        for row in 0..num_rows {
            let visible = &scratch.visible[row];
            if clip(visible, part * ATTENTION_PART..(part + 1) * ATTENTION_PART).is_empty() {
                continue;
            }
            let is_first = visible.start / ATTENTION_PART == part || unit.partial.is_some();
            let (max, sum) = (scratch.part.max[row], scratch.part.sum[row]);
            let acc = &scratch.part.acc[row * padded_dim..][..padded_dim];
            let (total_max, total_sum) = (&mut scratch.total.max[row], &mut scratch.total.sum[row]);
            let total_acc = &mut scratch.total.acc[row * padded_dim..][..padded_dim];
            if is_first {
                (*total_max, *total_sum) = (max, sum);
                total_acc.copy_from_slice(acc);
            } else {
                (*total_max, *total_sum) = merge((*total_max, *total_sum), total_acc, (max, sum), acc);
            }
        }
    }
    for row in 0..num_rows {
        let acc = &scratch.total.acc[row * padded_dim..][..padded_dim];
        // SAFETY: this unit's rows of the output, or its own range of the partials.
        unsafe {
            match unit.partial {
                None => {
                    let (out_row, head) = job.place(unit, row);
                    normalise(acc, scratch.total.sum[row], job.output(out_row, head));
                }
                Some(at) => {
                    let state_len = padded_dim + 2;
                    let into = std::slice::from_raw_parts_mut(partials.0.add(at + row * state_len), state_len);
                    into[0] = scratch.total.max[row];
                    into[1] = scratch.total.sum[row];
                    into[2..].copy_from_slice(acc);
                }
            }
        }
    }
    SCRATCH.set(Some(scratch));
}

/// Takes a later part's state into the running one; returns the new maximum and sum.
#[inline(always)]
fn merge(total: (f32, f32), total_acc: &mut [f32], part: (f32, f32), acc: &[f32]) -> (f32, f32) {
    let max = if part.0 > total.0 { part.0 } else { total.0 };
    let (a, b) = (exp(total.0 - max), exp(part.0 - max));
    for (t, &p) in total_acc.iter_mut().zip(acc) {
        *t = p.mul_add(b, *t * a);
    }
    (max, part.1.mul_add(b, total.1 * a))
}

#[inline(always)]
fn normalise(acc: &[f32], sum: f32, out: &mut [f32]) {
    let inverse = 1.0 / sum;
    out.iter_mut().zip(acc).for_each(|(out, acc)| *out = acc * inverse);
}

/// Merges the parts `[part][row][padded_dim + 2]` of a split group and writes its output.
#[inline(always)]
fn merge_group(job: &Job<'_>, group: &Unit, partials: &mut [f32]) {
    let (num_rows, state_len) = (group.rows.len(), job.padded_dim() + 2);
    for row in 0..num_rows {
        let visible = job.visible(group, row);
        let parts = visible.start / ATTENTION_PART..(visible.end - 1) / ATTENTION_PART + 1;
        let at = |part: usize| ((part - group.parts.start) * num_rows + row) * state_len;
        let (head, tail) = partials.split_at_mut(at(parts.start) + state_len);
        let base = head.len();
        let total = &mut head[at(parts.start)..];
        for part in parts.start + 1..parts.end {
            let part = &tail[at(part) - base..][..state_len];
            let state = merge((total[0], total[1]), &mut total[2..], (part[0], part[1]), &part[2..]);
            (total[0], total[1]) = state;
        }
        let (out_row, head) = job.place(group, row);
        // SAFETY: all units are done; groups have distinct (row, head) pairs.
        normalise(&total[2..], total[1], unsafe { job.output(out_row, head) });
    }
}
