//! One job of the pool: the sections of a product with their operands, and what a unit of it does.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use super::cut::{Cut, INLINE_MADDS, Tiles};
use super::unit::{Job, Output};
use super::{Finished, Groups, MatrixRef, Product, SECTIONS_MAX};
use crate::ctx::Ctx;
use crate::isa::Isa;
use crate::matmul;
use crate::numerics::LANES;
use crate::operand::{PackedOperand, Packing, UNTOUCHED};
use crate::packed_matrix::PANEL;
use crate::pages::{Kept, lend};
use crate::quantized;
use crate::workers::Priority;

/// Values of an operand that prefill makes before it may give way to decode, if one piece has no more.
const VALUES_AHEAD: usize = 48 << 10;

/// What the thread that calls keeps between calls.
struct JobScratch {
    /// Of pieces of operands, section after section.
    states: Vec<AtomicU8>,
    /// Panels of each group that are done, for each range of rows that units share.
    counts: Vec<AtomicUsize>,
}

thread_local! {
    static SCRATCH: Cell<JobScratch> = const { Cell::new(JobScratch::new()) };
    /// Packed operands, in huge pages since tiles stream through them.
    static PACKED: Kept = const { Cell::new(None) };
}

impl JobScratch {
    const fn new() -> Self {
        JobScratch { states: Vec::new(), counts: Vec::new() }
    }
}

impl Default for JobScratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Computes `out` `[num_rows, width]`, from an operand of so many columns.
pub(super) fn run(
    ctx: &Ctx<'_>,
    product: &Product<'_>,
    shape: (usize, usize, usize),
    out: &mut [f32],
    groups: Option<&Groups<'_>>,
) {
    // Taken, not borrowed: while this thread waits for its units it may compute units of other jobs.
    let mut scratch = SCRATCH.take();
    run_with(ctx, product, shape, &mut scratch, out, groups);
    SCRATCH.set(scratch);
}

fn run_with(
    ctx: &Ctx<'_>,
    product: &Product<'_>,
    (num_rows, width, cols): (usize, usize, usize),
    scratch: &mut JobScratch,
    out: &mut [f32],
    groups: Option<&Groups<'_>>,
) {
    let (mut column, mut unit, mut piece, mut lane) = (0, 0, 0, 0);
    let parts = product.sections.map(|matrix| {
        let matrix = matrix.filter(|matrix| matrix.rows() > 0)?;
        assert_eq!(matrix.cols(), cols, "sections of equal columns");
        let tiles = Tiles::of(num_rows, matrix.tile_rows(ctx.isa, num_rows));
        let (cut, packing) = (Cut::of(ctx, matrix, num_rows, &tiles), matrix.packing(ctx.isa, num_rows));
        let part = Part { matrix, column, tiles, cut, packing, first_unit: unit, first_piece: piece, first_lane: lane };
        if let Some(Groups { width, .. }) = groups {
            assert!(column.is_multiple_of(*width) && matrix.rows().is_multiple_of(*width), "groups of {width} columns");
        }
        column += matrix.rows();
        unit += cut.num_units();
        piece += part.num_pieces();
        // Each on lines of its own.
        lane += (num_rows * packing.lanes_per_row(cols)).next_multiple_of(LANES);
        Some(part)
    });
    scratch.states.clear();
    scratch.states.resize_with(piece, || AtomicU8::new(UNTOUCHED));
    // Prefill has pieces of its operand as units of their own, in front of all others: a unit that finds none would
    // make as many as it needs, a million values at a time, before it gave way. Who computes decode needs them at once.
    let piece_values = |part: &Part<'_>| part.tiles.rows_max() * part.packing.piece_columns(cols);
    let longest = parts.iter().flatten().map(piece_values).max().unwrap_or(1);
    let pieces_ahead = (VALUES_AHEAD / longest).max(1);
    let num_ahead = match ctx.priority {
        Priority::Prefill if piece > pieces_ahead => piece.div_ceil(pieces_ahead),
        _ => 0,
    };
    let row_units_max = parts.iter().flatten().map(|part| part.cut.row_units).max().unwrap_or(0);
    scratch.counts.clear();
    if let Some(groups) = groups {
        scratch.counts.resize_with(width / groups.width * row_units_max, || AtomicUsize::new(0));
    }
    lend(&PACKED, lane * 4, |packed| {
        let job = Running {
            isa: ctx.isa,
            threads: ctx.pool.threads(),
            product,
            cols,
            parts,
            packed: packed.cast(),
            out: out.as_mut_ptr(),
            width,
            groups,
            row_units_max,
            states: &scratch.states,
            counts: &scratch.counts,
        };
        let compute = |index: usize| match index.checked_sub(num_ahead) {
            Some(unit) => job.unit(unit),
            None => job.begin(index * pieces_ahead..piece.min((index + 1) * pieces_ahead)),
        };
        if num_rows * width * cols < INLINE_MADDS {
            (0..num_ahead + unit).for_each(compute);
        } else {
            ctx.pool.run(ctx.priority, num_ahead + unit, &compute);
        }
    });
}

/// One section in a job.
struct Part<'a> {
    matrix: MatrixRef<'a>,
    /// Its first column of the output.
    column: usize,
    tiles: Tiles,
    cut: Cut,
    packing: Packing,
    /// Where its units, the pieces of its operand, and the operand begin among those of all sections.
    first_unit: usize,
    first_piece: usize,
    first_lane: usize,
}

impl Part<'_> {
    fn num_pieces(&self) -> usize {
        self.tiles.count * self.packing.pieces_per_tile(self.matrix.cols())
    }
}

/// What the units of a job share.
struct Running<'a> {
    isa: Isa,
    threads: usize,
    product: &'a Product<'a>,
    cols: usize,
    parts: [Option<Part<'a>>; SECTIONS_MAX],
    packed: *mut u32,
    out: *mut f32,
    width: usize,
    groups: Option<&'a Groups<'a>>,
    row_units_max: usize,
    states: &'a [AtomicU8],
    counts: &'a [AtomicUsize],
}

// SAFETY: pieces of operands are written by whoever claims them and read when they are made; units write disjoint
// (tile, panel) rectangles of the output, and a group is touched again only by who ends its last panel.
unsafe impl Sync for Running<'_> {}

impl Running<'_> {
    /// The operand as a section wants it.
    fn operand(&self, part: &Part<'_>) -> PackedOperand<'_> {
        PackedOperand {
            operand: &self.product.operand,
            isa: self.isa,
            cols: self.cols,
            tiles: part.tiles,
            packing: part.packing,
            // SAFETY: sections lie one after the other in the memory that was lent for all.
            packed: unsafe { self.packed.add(part.first_lane) },
            states: &self.states[part.first_piece..][..part.num_pieces()],
        }
    }

    /// Makes pieces, counted over all sections.
    fn begin(&self, pieces: Range<usize>) {
        for part in self.parts.iter().flatten() {
            let own = part.first_piece..part.first_piece + part.num_pieces();
            let (start, end) = (pieces.start.max(own.start), pieces.end.min(own.end));
            if start < end {
                // SAFETY: the operand is this section's own.
                unsafe { self.operand(part).begin(start - own.start..end - own.start) };
            }
        }
    }

    fn unit(&self, index: usize) {
        let mut parts = self.parts.iter().flatten().rev();
        let part = parts.find(|part| part.first_unit <= index).expect("the first section begins with the first unit");
        let (panels, tiles) = part.cut.unit(index - part.first_unit, part.tiles.count);
        let operand = self.operand(part);
        // SAFETY: the operand is this section's own.
        if !unsafe { operand.make(tiles.clone()) } {
            // Whoever panicked over a piece of it was computing this job, which raises that panic when all units are
            // over.
            return;
        }
        let rows = part.tiles.rows(tiles.start).start..part.tiles.rows(tiles.end - 1).end;
        let out = Output {
            bias: self.product.bias.map(|bias| &bias[part.column..][..part.matrix.rows()]),
            add: self.product.add,
            // SAFETY: a column of the output.
            start: unsafe { self.out.add(part.column) },
            stride: self.width,
            width: part.matrix.rows(),
        };
        let (a, lanes_per_row, num_tiles) = (operand.packed.cast_const(), part.packing.lanes_per_row(self.cols), tiles);
        let tiles = part.tiles;
        let next = self.next(part, index - part.first_unit);
        match part.matrix {
            MatrixRef::Float(w) => {
                matmul::compute(self.isa, &Job { a, lanes_per_row, tiles, w, out, next }, panels.clone(), num_tiles);
            }
            MatrixRef::Quantized(w) => {
                let job = Job { a, lanes_per_row, tiles, w, out, next };
                let in_tiles = matches!(part.packing, Packing::Blocks | Packing::QuantizedBlocks(_));
                quantized::compute(self.isa, &job, in_tiles, panels.clone(), num_tiles);
            }
        }
        if let Some(groups) = self.groups {
            self.finish(groups, part, panels, part.cut.row_unit(index - part.first_unit), rows);
        }
    }

    /// The weights of the unit that this thread will most likely take behind this one: all threads take turns.
    fn next(&self, part: &Part<'_>, unit: usize) -> *const u32 {
        let next = unit + self.threads;
        if next >= part.cut.num_units() {
            return std::ptr::null();
        }
        let panel = part.cut.unit(next, part.tiles.count).0.start;
        match part.matrix {
            MatrixRef::Float(w) => w.panel(panel).as_ptr(),
            MatrixRef::Quantized(w) => w.panel(panel).as_ptr().cast(),
        }
    }

    /// Counts panels that a unit has ended, and goes on with the groups that are complete.
    fn finish(&self, groups: &Groups<'_>, part: &Part<'_>, panels: Range<usize>, row_unit: usize, rows: Range<usize>) {
        let num_panels = |columns: Range<usize>| columns.end.div_ceil(PANEL) - columns.start / PANEL;
        // Columns of the section.
        let ended = panels.start * PANEL..(panels.end * PANEL).min(part.matrix.rows());
        for index in ended.start / groups.width..ended.end.div_ceil(groups.width) {
            let columns = index * groups.width..(index + 1) * groups.width;
            let num_ended = num_panels(columns.start.max(ended.start)..columns.end.min(ended.end));
            let group = part.column / groups.width + index;
            let count = &self.counts[group * self.row_units_max + row_unit];
            // Release: what this unit wrote is seen by who goes on. Acquire: who goes on sees what all wrote.
            if count.fetch_add(num_ended, Ordering::AcqRel) + num_ended == num_panels(columns) {
                let (start, stride, width, rows) = (self.out, self.width, groups.width, rows.clone());
                (groups.finish)(Finished { start, stride, width, rows, group, out: PhantomData });
            }
        }
    }
}
