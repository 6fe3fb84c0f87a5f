//! Paged attention: queries of ragged spans against keys and values of the pool.
//!
//! `reference` is the specification, `units` the fast version, with `vector_unit` or `tile_unit`. Both walk a row's
//! visible positions in parts of 512, each in tiles of 64 (256 where the tiles of the processor multiply), counted from
//! position 0 of the sequence whatever the span:
//!
//! ```text
//! positions  0        64       128  ...  512              1024         p
//! tiles      |--------|--------|--...----|--------|--...--|------------|
//! parts      |---------- part 0 ---------|---- part 1 ----|-- part 2 --|
//! row        softmax state of each part on its own, merged in ascending order
//! ```
//!
//! So parts may be computed by different threads, and a row has the same bits in a prefill chunk, alone, and
//! after a resume elsewhere.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod granules;
mod reference;
mod softmax;
mod tile;
#[cfg(target_arch = "x86_64")]
mod tile_unit;
mod units;
mod vector_unit;
mod vectors;
#[cfg(target_arch = "x86_64")]
mod wide_softmax;

use std::cell::Cell;
use std::ops::Range;

use crate::arena::KvArena;
use crate::ctx::{Columns, Ctx};
use crate::kv_layout::KvLayout;

/// The queries of a call, and where their sequences lie.
#[derive(Clone, Copy, Debug)]
pub struct QueryBatch<'a> {
    /// Who the rows belong to.
    pub spans: &'a [QuerySpan],
    /// Block tables, which the spans take their parts of.
    pub block_tables: &'a [u32],
}

/// Consecutive query tokens of one sequence: a prefill chunk, or one token of decode. Their own keys and
/// values are in the pool already.
#[derive(Clone, Debug)]
pub struct QuerySpan {
    /// First row of `q` and `out` that belongs to the span.
    pub first_row: usize,
    /// Query tokens.
    pub num_rows: usize,
    /// Absolute position of the first of them.
    pub first_position: usize,
    /// Which of [`QueryBatch::block_tables`] are the blocks of the sequence in order, up to that of the span's last
    /// position at least; entries of blocks wholly outside the window may be anything.
    pub block_table: Range<usize>,
}

/// What an attention layer fixes.
#[derive(Clone, Copy, Debug)]
pub struct AttentionParams {
    /// Query heads: a multiple of the layout's KV heads.
    pub num_heads: usize,
    /// Factor on the scores, positive, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// A query at p sees the keys of positions `p - window + 1 ..= p`, all up to p without a window.
    pub window: Option<usize>,
    /// Scores become `softcap * tanh(score / softcap)`.
    pub softcap: Option<f32>,
}

/// Causal attention of every span's rows of `q` into the same rows of `out` `[rows, num_heads, head_dim]`.
///
/// `q` is `[rows, num_heads, head_dim]` in the given columns. Spans have distinct rows. K and V are read from
/// the pool alone, also those of the span itself. A row's bits depend on its q, its position and the keys
/// and values it sees: stored bytes at positions that it does not see never reach it, stale or NaN, except
/// that later positions of the same span must hold finite values (they do: this step wrote them), and so must earlier
/// ones that rows beside it see and its own window does not.
///
/// Panics when a shape or block table does not fit.
#[allow(clippy::too_many_arguments)]
pub fn attention(
    ctx: &Ctx<'_>,
    arena: &KvArena,
    layout: &KvLayout,
    layer: usize,
    q: &[f32],
    q_columns: Columns,
    batch: QueryBatch<'_>,
    params: &AttentionParams,
    out: &mut [f32],
) {
    layout.check();
    let width = params.num_heads * layout.head_dim;
    assert!(
        layout.num_kv_heads > 0 && params.num_heads.is_multiple_of(layout.num_kv_heads),
        "{} query heads are not a multiple of {} KV heads",
        params.num_heads,
        layout.num_kv_heads
    );
    assert!(params.scale > 0.0, "a scale of {}", params.scale);
    assert!(params.window != Some(0), "a window shows at least the query's own position");
    assert!(arena.len() >= layout.total_bytes(), "an arena of {} bytes", layout.total_bytes());
    TAKEN.set(check_spans(TAKEN.take(), layout, q, q_columns, batch, width, out.len() / width.max(1)));
    let job = Job { arena, layout, layer, q, q_columns, batch, params, out: out.as_mut_ptr() };
    if ctx.isa.is_reference() { job.run_reference(ctx) } else { units::run(ctx, &job) }
}

thread_local! {
    /// Which output rows a span has.
    static TAKEN: Cell<Vec<bool>> = const { Cell::new(Vec::new()) };
}

/// Panics unless every span fits and no two have a row in common. Gives `taken` back for its memory.
fn check_spans(
    mut taken: Vec<bool>,
    layout: &KvLayout,
    q: &[f32],
    q_columns: Columns,
    batch: QueryBatch<'_>,
    width: usize,
    num_rows: usize,
) -> Vec<bool> {
    taken.clear();
    taken.resize(num_rows, false);
    for span in batch.spans {
        q_columns.check("attention q", q, span.first_row + span.num_rows, width);
        let rows = span.first_row..span.first_row + span.num_rows;
        assert!(rows.end <= taken.len(), "output rows up to {}", rows.end);
        assert!(!taken[rows.clone()].contains(&true), "rows {rows:?} in two spans");
        taken[rows].fill(true);
        let end = span.first_position + span.num_rows;
        let block_table = &batch.block_tables[span.block_table.clone()];
        assert!(block_table.len() * layout.block_size >= end, "a block table that covers {end} positions");
    }
    taken
}

/// One call; its units write disjoint parts of `out`.
struct Job<'a> {
    arena: &'a KvArena,
    layout: &'a KvLayout,
    layer: usize,
    q: &'a [f32],
    q_columns: Columns,
    batch: QueryBatch<'a>,
    params: &'a AttentionParams,
    out: *mut f32,
}

// SAFETY: units write disjoint (row, head) parts of `out`, since spans have distinct rows; everything else
// is shared reading.
unsafe impl Sync for Job<'_> {}

/// The first position that a query at `position` sees.
fn first_visible(position: usize, params: &AttentionParams) -> usize {
    params.window.map_or(0, |window| (position + 1).saturating_sub(window))
}

impl Job<'_> {
    /// Query heads per KV head.
    fn group(&self) -> usize {
        self.params.num_heads / self.layout.num_kv_heads
    }

    /// The query of one head of one row.
    fn query(&self, row: usize, head: usize) -> &[f32] {
        let width = self.params.num_heads * self.layout.head_dim;
        &self.q_columns.row(self.q, row, width)[head * self.layout.head_dim..][..self.layout.head_dim]
    }

    /// The output of one head of one row.
    ///
    /// # Safety
    /// The row belongs to a span, and no other reference to this part exists.
    #[allow(clippy::mut_from_ref)]
    unsafe fn output(&self, row: usize, head: usize) -> &mut [f32] {
        let start = (row * self.params.num_heads + head) * self.layout.head_dim;
        // SAFETY: rows of spans were checked to lie in `out`; exclusive by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.out.add(start), self.layout.head_dim) }
    }

    /// Every row by the specification.
    fn run_reference(&self, ctx: &Ctx<'_>) {
        let rows: Vec<(&QuerySpan, usize)> =
            self.batch.spans.iter().flat_map(|span| (0..span.num_rows).map(move |row| (span, row))).collect();
        ctx.pool.run(ctx.priority, rows.len(), &|unit| {
            let (span, row) = rows[unit];
            for head in 0..self.params.num_heads {
                let keys = reference::Keys {
                    arena: self.arena,
                    layout: self.layout,
                    layer: self.layer,
                    kv_head: head / self.group(),
                    block_table: &self.batch.block_tables[span.block_table.clone()],
                    order: ctx.isa.order(),
                };
                // SAFETY: each (row, head) is visited by one unit, once.
                let out = unsafe { self.output(span.first_row + row, head) };
                let q = self.query(span.first_row + row, head);
                reference::attend(q, span.first_position + row, &keys, self.params, out);
            }
        });
    }
}

#[cfg(test)]
mod tests;
