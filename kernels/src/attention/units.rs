//! The fast version: units of work over the pool, and what a unit does tile after tile.
//!
//! ```text
//! unit      one span, one KV head, up to 48 rows (query token, query head of that KV head), some parts
//! subtile   up to 12 of its rows: their scores with 64 keys, softmax (super::tile), weighted sum of 64 values
//! ```
//!
//! Vectors multiply (super::vector_unit), or the processor's tiles (super::tile_unit): then units have up to 256 rows,
//! subtiles 32, and softmax is of 256 positions at a time.
//!
//! Long contexts of few queries are split by part as well, and merged afterwards in ascending order.

use std::cell::Cell;
use std::ops::Range;

use super::softmax::{Softmax, normalise};
#[cfg(target_arch = "x86_64")]
use super::tile_unit::compute_in_tiles;
use super::vector_unit::compute_in_vectors;
use super::{Job, first_visible};
use crate::ctx::Ctx;
use crate::kv_layout::{KvDtype, KvLayout};
use crate::numerics::{ATTENTION_PART, LANES, Order};
use crate::simd::{prefetch, vectorised, with_simd};

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
const IN_TILES: UnitSize = UnitSize { rows_max: 256, rows_step: 32, madds_max: 128 << 20, inline_madds: 1 << 20 };

/// Whether tiles of the processor multiply with such K and V.
fn multiplies_tiles(ctx: &Ctx<'_>, layout: &KvLayout) -> bool {
    ctx.isa.order() == Order::Tiles && layout.dtype == KvDtype::Bf16
}

/// Some rows of one span and KV head, and the parts of their positions to look at.
pub(super) struct Unit {
    pub(super) span: usize,
    pub(super) kv_head: usize,
    /// Rows are (token, query head of the KV head), tokens first.
    pub(super) rows: Range<usize>,
    pub(super) parts: Range<usize>,
    /// Where the states of its rows go if others compute other parts.
    partial: Option<usize>,
}

impl Unit {
    /// Whether others compute other parts.
    pub(super) fn is_partial(&self) -> bool {
        self.partial.is_some()
    }
}

/// The partial results of all units of a split call, `[row][head_dim_padded + 2]` each.
pub(super) struct Partials(*mut f32);

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
        // K and V of a head stay in a cache from unit to unit. Later rows see more keys: they go first, so that no
        // thread is left with a long one at the end.
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
        let softmax = Softmax::of(job.params, job.layout.dtype, isa.order());
        vectorised!(isa, merge_group(job: &Job<'_>, group: &Unit, softmax: Softmax, partials: &mut [f32]));
        from += len;
    }
}

/// How many units a thread takes at once where there is one query of each sequence. Heads of a granule lie side by
/// side, and what the machine fetches beyond the end of one is the next: another thread would fetch it again.
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
            unsafe { compute_in_tiles(job, unit, partials) }
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

impl Job<'_> {
    /// Values of a head in whole vectors.
    pub(super) fn padded_dim(&self) -> usize {
        self.layout.head_dim.next_multiple_of(LANES)
    }

    pub(super) fn position(&self, unit: &Unit, row: usize) -> usize {
        self.batch.spans[unit.span].first_position + (unit.rows.start + row) / self.group()
    }

    /// Row of q and out, and query head, of a unit's row.
    pub(super) fn place(&self, unit: &Unit, row: usize) -> (usize, usize) {
        let row = unit.rows.start + row;
        (self.batch.spans[unit.span].first_row + row / self.group(), unit.kv_head * self.group() + row % self.group())
    }

    /// All positions that some row of the unit sees.
    pub(super) fn positions(&self, unit: &Unit) -> Range<usize> {
        first_visible(self.position(unit, 0), self.params)..self.position(unit, unit.rows.len() - 1) + 1
    }

    /// The positions that one row sees.
    pub(super) fn visible(&self, unit: &Unit, row: usize) -> Range<usize> {
        let position = self.position(unit, row);
        first_visible(position, self.params)..position + 1
    }

    /// The query of a unit's row; that of a later row comes nearer meanwhile, since a head's are a few lines of a long
    /// row.
    #[inline(always)]
    pub(super) fn query_of(&self, unit: &Unit, row: usize) -> &[f32] {
        if row + ROWS_AHEAD < unit.rows.len() {
            let (q_row, head) = self.place(unit, row + ROWS_AHEAD);
            prefetch_row(self.query(q_row, head));
        }
        let (q_row, head) = self.place(unit, row);
        self.query(q_row, head)
    }

    /// Writes what a unit's row has come to: its output, or its state where others compute other parts.
    ///
    /// # Safety
    /// Nobody else is at this unit.
    #[inline(always)]
    pub(super) unsafe fn finish(&self, unit: &Unit, partials: &Partials, row: usize, max: f32, sum: f32, acc: &[f32]) {
        // SAFETY: this unit's rows of the output, or its own range of the partials.
        unsafe {
            let Some(at) = unit.partial else {
                if row + ROWS_AHEAD < unit.rows.len() {
                    let (out_row, head) = self.place(unit, row + ROWS_AHEAD);
                    prefetch_row(self.output(out_row, head));
                }
                let (out_row, head) = self.place(unit, row);
                return normalise(acc, sum, self.output(out_row, head));
            };
            let state_len = self.padded_dim() + 2;
            let into = std::slice::from_raw_parts_mut(partials.0.add(at + row * state_len), state_len);
            (into[0], into[1]) = (max, sum);
            into[2..].copy_from_slice(acc);
        }
    }
}

/// Queries and outputs come nearer so many rows before their turn.
const ROWS_AHEAD: usize = 8;

#[inline(always)]
fn prefetch_row(row: &[f32]) {
    row.chunks(LANES).for_each(|line| prefetch(line.as_ptr().cast()));
}

/// The part of `range` within `bounds`; empty if there is none.
#[inline(always)]
pub(super) fn clip(range: &Range<usize>, bounds: Range<usize>) -> Range<usize> {
    range.start.max(bounds.start)..range.end.min(bounds.end)
}

/// Merges the parts `[part][row][padded_dim + 2]` of a split group and writes its output.
#[inline(always)]
fn merge_group(job: &Job<'_>, group: &Unit, softmax: Softmax, partials: &mut [f32]) {
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
            let state = softmax.merge((total[0], total[1]), &mut total[2..], (part[0], part[1]), &part[2..]);
            (total[0], total[1]) = state;
        }
        let (out_row, head) = job.place(group, row);
        // SAFETY: all units are done; groups have distinct (row, head) pairs.
        normalise(&total[2..], total[1], unsafe { job.output(out_row, head) });
    }
}
