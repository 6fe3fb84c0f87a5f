//! The fast version: units of work over the pool, and what a unit does tile after tile.
//!
//! ```text
//! unit      one span, one KV head, up to 48 rows (query token, query head of that KV head), some parts
//! subtile   up to 12 of its rows: their scores with 64 keys, softmax (super::tile), weighted sum of 64 values
//! ```
//!
//! Vectors multiply (super::vectors), or the processor's tiles (super::tiles): then units have up to 256 rows, subtiles 16.
//!
//! Long contexts of few queries are split by part as well, and merged afterwards in ascending order.

use std::cell::Cell;
use std::ops::Range;

use super::tile::{
    Aligned, Lines, OfRows, QUERY_ROWS_MAX, Scores, Seen, Tile, Weights, granules, locate, mask_values, pad_keys,
    softmax_rows,
};
use super::vectors::Vectors;
use super::{Job, first_visible};
use crate::ctx::Ctx;
use crate::kv_layout::{KvDtype, KvLayout};
use crate::numerics::{ATTENTION_PART, ATTENTION_TILE, LANES, Order, exp};
use crate::simd::{Simd, prefetch, vectorised, with_simd};

/// How large units are.
struct UnitSize {
    /// Rows of a unit at most.
    rows_max: usize,
    /// Of which there are always so many at a time, if they are there.
    rows_step: usize,
    /// Multiply-adds of a unit at most, unless one subtile has more: a fraction of a millisecond, after which prefill
    /// may give way to decode.
    madds_max: usize,
    /// Below this many multiply-adds a call is not worth waking anyone.
    inline_madds: usize,
}

/// K and V of a tile stay in the first-level cache while so many rows pass over them.
const IN_VECTORS: UnitSize = UnitSize { rows_max: 48, rows_step: 12, madds_max: 16 << 20, inline_madds: 1 << 18 };

/// More rows share what K and V cost to fetch, since multiplying them costs so much less.
const IN_TILES: UnitSize = UnitSize { rows_max: 256, rows_step: 16, madds_max: 64 << 20, inline_madds: 1 << 20 };

/// Whether tiles of the processor multiply with such K and V.
fn multiplies_tiles(ctx: &Ctx<'_>, layout: &KvLayout) -> bool {
    ctx.isa.order() == Order::Tiles && layout.dtype == KvDtype::Bf16
}

/// What comes nearer while a subtile is at a tile: K and V lie in pieces of some lines, of which the machine foresees
/// nothing.
pub(super) struct Ahead<'a> {
    pub(super) next: &'a Tile,
    /// Subtiles that were at the tile before.
    pub(super) turn: usize,
    /// Subtiles that will have been, at most.
    pub(super) num_turns: usize,
}

/// Who multiplies with K and V, in a unit.
pub(super) trait Products: Sized {
    /// What everything else is computed with.
    type Simd: Simd;
    /// Whether K must have whole vectors of features.
    const PADS_KEYS: bool;
    /// For a unit of so many rows.
    ///
    /// # Safety
    /// The machine has the instruction set; there is one of these on a thread.
    unsafe fn new(layout: &KvLayout, num_rows: usize) -> Self;
    /// The rows of subtile `index` of so many, if there is one.
    fn subtile(&self, index: usize, num_rows: usize) -> Option<Range<usize>>;
    /// Lanes of a packed query.
    fn lanes_per_row(&self) -> usize;
    /// Queries packed for so many rows.
    fn packed_rows(&self, num_rows: usize) -> usize;
    /// Packs the query of row `r` of a subtile of `num_rows`.
    fn pack(&self, q: &[f32], place: (usize, usize), into: &mut [u32]);
    /// Products of a subtile's packed queries with the keys of these granules of a tile, at least.
    ///
    /// # Safety
    /// The tile points to valid granules, the queries are packed ones of so many rows.
    unsafe fn score(
        &self,
        tile: (&Tile, Range<usize>),
        ahead: &Ahead<'_>,
        queries: (*const u32, usize),
        scores: &mut Scores,
    );
    /// Adds the weighted values of these granules of a tile to those of so many rows of `acc` that see something of it.
    ///
    /// # Safety
    /// The tile points to valid granules.
    unsafe fn add_values(
        &self,
        tile: (&Tile, Range<usize>),
        ahead: &Ahead<'_>,
        weights: &Weights,
        of_rows: (&Seen, &OfRows),
        acc: (&mut [f32], usize),
        scratch: &mut Scores,
    );
}

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
    let size = if multiplies_tiles(ctx, job.layout) { IN_TILES } else { IN_VECTORS };
    let num_rows: usize = job.batch.spans.iter().map(|span| span.num_rows).sum();
    let (threads, num_heads) = (ctx.pool.threads(), job.params.num_heads);
    // Some units for every thread.
    let rows_max = (num_rows * num_heads / (4 * threads)).next_multiple_of(size.rows_step).min(size.rows_max);
    let mut madds = 0;
    for (span, s) in job.batch.spans.iter().enumerate() {
        let rows = s.num_rows * job.group();
        let madds_per_row = (s.first_position + s.num_rows) * 2 * job.layout.head_dim;
        madds += rows * madds_per_row * job.layout.num_kv_heads;
        let unit_rows = size.madds_max / madds_per_row.max(1) / size.rows_step * size.rows_step;
        let unit_rows = unit_rows.clamp(size.rows_step, rows_max.max(size.rows_step));
        // K and V of a head stay in a cache from unit to unit. Later rows see more keys: they go first, so that no thread
        // is left with a long one at the end.
        for kv_head in 0..job.layout.num_kv_heads {
            for group in (0..rows.div_ceil(unit_rows)).rev() {
                let rows = group * unit_rows..rows.min((group + 1) * unit_rows);
                let mut unit = Unit { span, kv_head, rows, parts: 0..0, partial: None };
                let positions = job.positions(&unit);
                unit.parts = positions.start / ATTENTION_PART..(positions.end - 1) / ATTENTION_PART + 1;
                groups.push(unit);
            }
        }
    }
    if madds < size.inline_madds {
        groups.iter().for_each(|unit| compute(ctx, job, unit, &Partials(std::ptr::null_mut())));
        return;
    }
    if threads == 1 || groups.len() >= 3 * threads || groups.iter().all(|unit| unit.parts.len() == 1) {
        let num_neighbours = neighbours(job, groups.len(), threads);
        ctx.pool.run(ctx.priority, groups.len().div_ceil(num_neighbours), &|index| {
            let first = index * num_neighbours;
            for group in &groups[first..groups.len().min(first + num_neighbours)] {
                compute(ctx, job, group, &Partials(std::ptr::null_mut()));
            }
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

/// How many units a thread takes at once where there is one query of each sequence. Heads of a granule lie side by side,
/// and what the machine fetches beyond the end of one is the next: another thread would fetch it again.
fn neighbours(job: &Job<'_>, num_units: usize, threads: usize) -> usize {
    const NEIGHBOURS_MAX: usize = 4;
    // So many turns for each thread, lest one is left with a long one at the end.
    const TURNS: usize = 8;
    let is_decode = job.batch.spans.iter().all(|span| span.num_rows == 1);
    if is_decode { (num_units / (TURNS * threads)).clamp(1, NEIGHBOURS_MAX) } else { 1 }
}

fn compute(ctx: &Ctx<'_>, job: &Job<'_>, unit: &Unit, partials: &Partials) {
    let isa = ctx.isa;
    #[cfg(target_arch = "x86_64")]
    if multiplies_tiles(ctx, job.layout) {
        #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
        unsafe fn amx(job: &Job<'_>, unit: &Unit, partials: &Partials) {
            // SAFETY: as required of the caller.
            unsafe { compute_unit::<super::tiles::Tiles>(job, unit, partials) }
        }
        // SAFETY: an `Isa` exists only for instruction sets of this machine.
        return unsafe { amx(job, unit, partials) };
    }
    with_simd!(
        isa,
        compute_in_vectors(job: &Job<'_>, unit: &Unit, partials: &Partials),
        else unreachable!("the portable instruction set runs the reference")
    );
}

#[inline(always)]
unsafe fn compute_in_vectors<S: Simd>(job: &Job<'_>, unit: &Unit, partials: &Partials) {
    // SAFETY: as required of the caller.
    unsafe { compute_unit::<Vectors<S>>(job, unit, partials) }
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
    /// Copies of K with padding: `[4][padded_dim / 2][16]`.
    keys: Lines<u32>,
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
            keys: Lines::default(),
            visible: Vec::new(),
            scores: Aligned([[0.0; ATTENTION_TILE]; QUERY_ROWS_MAX]),
            weights: Aligned([[0; ATTENTION_TILE]; QUERY_ROWS_MAX]),
        })
    }
}

thread_local! {
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// Queries and outputs come nearer so many rows before their turn: a head's are a few lines of a long row.
const ROWS_AHEAD: usize = 8;

#[inline(always)]
fn prefetch_row(row: &[f32]) {
    row.chunks(LANES).for_each(|line| prefetch(line.as_ptr().cast()));
}

/// The part of `range` within `bounds`; empty if there is none.
#[inline(always)]
fn clip(range: &Range<usize>, bounds: Range<usize>) -> Range<usize> {
    range.start.max(bounds.start)..range.end.min(bounds.end)
}

#[inline(always)]
unsafe fn compute_unit<P: Products>(job: &Job<'_>, unit: &Unit, partials: &Partials) {
    let mut scratch = SCRATCH.take().unwrap_or_else(Scratch::new);
    let (num_rows, padded_dim) = (unit.rows.len(), job.padded_dim());
    // SAFETY: the caller has the instruction set, and computes one unit at a time.
    let products = unsafe { P::new(job.layout, num_rows) };
    let subtiles = || (0..).map_while(|i| products.subtile(i, num_rows));
    let pairs = job.layout.dtype == KvDtype::Bf16;
    let lanes_per_row = products.lanes_per_row();
    scratch.q.resize(products.packed_rows(num_rows) * lanes_per_row);
    for rows in subtiles() {
        let packed_rows = products.packed_rows(rows.len());
        let into = &mut scratch.q[rows.start * lanes_per_row..][..packed_rows * lanes_per_row];
        for (r, row) in rows.enumerate() {
            if row + ROWS_AHEAD < num_rows {
                let (q_row, head) = job.place(unit, row + ROWS_AHEAD);
                prefetch_row(job.query(q_row, head));
            }
            let (q_row, head) = job.place(unit, row);
            products.pack(job.query(q_row, head), (r, packed_rows), into);
        }
    }
    let positions = job.positions(unit);
    scratch.visible.clear();
    scratch.visible.extend((0..num_rows).map(|row| job.visible(unit, row)));
    let unit_end = positions.end.min(unit.parts.end * ATTENTION_PART);
    let num_subtiles = subtiles().count();
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
            if P::PADS_KEYS && padded_dim != job.layout.head_dim {
                pad_keys(job, &mut tile, &mut scratch.keys);
            }
            let mut ahead = Ahead { next: &next, turn: 0, num_turns: num_subtiles };
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
                // SAFETY: the caller has the instruction set; q holds this subtile's packed queries, the tile's pointers
                // lead to heads of its layout.
                unsafe {
                    products.score((&tile, granules.clone()), &ahead, (q, num), scores);
                    let corrections =
                        softmax_rows::<P::Simd>(scores, job.params, num, &seen_of_rows, pairs, states, weights);
                    let of_rows = (&seen_of_rows, &corrections);
                    products.add_values((&tile, granules), &ahead, weights, of_rows, (acc, num), scores);
                }
                ahead.turn += 1;
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
                    if row + ROWS_AHEAD < num_rows {
                        let (out_row, head) = job.place(unit, row + ROWS_AHEAD);
                        prefetch_row(job.output(out_row, head));
                    }
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
