//! One job of the pool: the sections of a product with their operands, and what a unit of it does.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use super::cut::{Cut, INLINE_MADDS, Tiles, Together};
use super::gated::GatedColumns;
use super::unit::{Job, Output};
use super::{Finished, Groups, MatrixRef, Product, SECTIONS_MAX, Then};
use crate::ctx::Ctx;
use crate::isa::Isa;
use crate::matmul;
use crate::numerics::{LANES, TILE_STEPS};
use crate::operand::{Operand, PackedOperand, Packing, UNTOUCHED};
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

/// Units that each thread has at least where one has whole groups.
const GROUP_UNITS_PER_THREAD: usize = 4;

thread_local! {
    static SCRATCH: Cell<JobScratch> = const { Cell::new(JobScratch::new()) };
    /// Packed operands, in huge pages since tiles stream through them.
    static PACKED: Kept = const { Cell::new(None) };
    /// What a unit's products are until something is done with them.
    static COLUMNS: Kept = const { Cell::new(None) };
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
pub(super) fn run(ctx: &Ctx<'_>, product: &Product<'_>, shape: (usize, usize, usize), out: &mut [f32], then: Then<'_>) {
    // Taken, not borrowed: while this thread waits for its units it may compute units of other jobs.
    let mut scratch = SCRATCH.take();
    run_with(ctx, product, shape, &mut scratch, out, then);
    SCRATCH.set(scratch);
}

fn run_with(
    ctx: &Ctx<'_>,
    product: &Product<'_>,
    (num_rows, width, cols): (usize, usize, usize),
    scratch: &mut JobScratch,
    out: &mut [f32],
    then: Then<'_>,
) {
    let is_packed = matches!(product.operand, Operand::Packed(_));
    let (mut column, mut unit, mut piece, mut lane) = (0usize, 0, 0, 0);
    let parts = product.sections.map(|matrix| {
        let matrix = matrix.filter(|matrix| matrix.rows() > 0)?;
        assert_eq!(matrix.cols(), cols, "sections of equal columns");
        let tiles = Tiles::of(num_rows, matrix.tile_rows(ctx.isa, num_rows));
        let packing = matrix.packing(ctx.isa, num_rows);
        assert!(!is_packed || packing == Packing::Blocks, "an operand packed in another way");
        if let Then::Groups(Groups { width, .. }) = then {
            assert!(column.is_multiple_of(*width) && matrix.rows().is_multiple_of(*width), "groups of {width} columns");
        }
        // Far from the caches, stores of tiles take as long as the products: what can be done with them at once does
        // not go there.
        let in_tiles =
            tiles.count > 1 && packing == Packing::Blocks && !product.add && !matrix.shares_stream(ctx.isa, num_rows);
        let mut together = match then {
            Then::Groups(Groups { width, .. }) if in_tiles && (*width).is_multiple_of(PANEL) => {
                Together::Panels(width / PANEL)
            }
            Then::Gate => Together::Gated,
            _ => Together::Nothing,
        };
        let mut cut = Cut::of(ctx, matrix, num_rows, &tiles, together);
        // Whole groups may be too few units for many threads.
        if matches!(together, Together::Panels(_)) && cut.num_units() < GROUP_UNITS_PER_THREAD * ctx.pool.threads() {
            together = Together::Nothing;
            cut = Cut::of(ctx, matrix, num_rows, &tiles, together);
        }
        let (first_unit, first_piece, first_lane) = (unit, piece, lane);
        let part =
            Part { matrix, column, tiles, cut, together, packing, is_packed, first_unit, first_piece, first_lane };
        column += matrix.rows();
        unit += cut.num_units();
        piece += part.num_pieces();
        // Each on lines of its own.
        if !is_packed {
            lane += (num_rows * packing.lanes_per_row(cols)).next_multiple_of(LANES);
        }
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
    if let Then::Groups(groups) = then {
        scratch.counts.resize_with(width / groups.width * row_units_max, || AtomicUsize::new(0));
    }
    lend(&PACKED, lane * 4, |packed| {
        let job = Running {
            isa: ctx.isa,
            threads: ctx.pool.threads(),
            product,
            cols,
            parts,
            packed: match product.operand {
                // Only read: there is no piece to make.
                Operand::Packed(pairs) => pairs.as_ptr().cast_mut().cast(),
                _ => packed.cast(),
            },
            out: out.as_mut_ptr(),
            width,
            then,
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

/// Values from one row of a unit's products to the next in memory of the thread: lines of one column would be equal
/// sets of the first-level cache.
fn column_stride(panels: &Range<usize>) -> usize {
    panels.len() * PANEL + LANES
}

/// Where products go, `first` being the row and column that goes to the start.
struct Place {
    start: *mut f32,
    first: (usize, usize),
    stride: usize,
}

/// One section in a job.
struct Part<'a> {
    matrix: MatrixRef<'a>,
    /// Its first column of the output.
    column: usize,
    tiles: Tiles,
    cut: Cut,
    /// Columns that one unit has.
    together: Together,
    packing: Packing,
    is_packed: bool,
    /// Where its units, the pieces of its operand, and the operand begin among those of all sections.
    first_unit: usize,
    first_piece: usize,
    first_lane: usize,
}

impl Part<'_> {
    /// Where a panel of weights begins.
    fn panel(&self, panel: usize) -> *const u32 {
        match self.matrix {
            MatrixRef::Float(w) => w.panel(panel).as_ptr(),
            MatrixRef::Quantized(w) => w.panel(panel).as_ptr().cast(),
        }
    }

    fn num_pieces(&self) -> usize {
        if self.is_packed { 0 } else { self.tiles.count * self.packing.pieces_per_tile(self.matrix.cols()) }
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
    then: Then<'a>,
    row_units_max: usize,
    states: &'a [AtomicU8],
    counts: &'a [AtomicUsize],
}

// SAFETY: pieces of operands are written by whoever claims them and read when they are made; units write disjoint
// (tile, panel) rectangles of the output, and a group is touched again only by who ends its last panel. Gated units
// write packed blocks instead: those of their tiles and panels, which are disjoint alike.
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
        let next = self.next(part, index - part.first_unit);
        let multiply = |panels: Range<usize>, place: Place| self.multiply(part, panels, tiles.clone(), place, next);
        // SAFETY: a column of the output.
        let output = || Place { start: unsafe { self.out.add(part.column) }, first: (0, 0), stride: self.width };
        let stride = column_stride(&panels);
        let num_bytes = rows.len() * stride * 4;
        match (self.then, part.together) {
            (Then::Nothing, _) => multiply(panels, output()),
            (Then::Groups(groups), Together::Panels(num_panels)) => lend(&COLUMNS, num_bytes, |columns| {
                let first = (rows.start, panels.start * PANEL);
                multiply(panels.clone(), Place { start: columns.cast(), first, stride });
                for group in panels.clone().step_by(num_panels).map(|panel| panel / num_panels) {
                    // SAFETY: the lent memory has these columns.
                    let start = unsafe { columns.cast::<f32>().add(group * groups.width - first.1) };
                    (groups.finish)(Finished {
                        start,
                        stride,
                        output: self.out,
                        output_stride: self.width,
                        width: groups.width,
                        rows: rows.clone(),
                        group: part.column / groups.width + group,
                        out: PhantomData,
                    });
                }
            }),
            (Then::Groups(groups), _) => {
                multiply(panels.clone(), output());
                self.finish(groups, part, panels, part.cut.row_unit(index - part.first_unit), rows);
            }
            (Then::Gate, _) => lend(&COLUMNS, 2 * num_bytes, |columns| {
                self.gate(part, panels, tiles, columns.cast(), next);
            }),
        }
    }

    /// Products of a unit's rows with these panels of the gate and their counterparts of up, in `gate`, which has room
    /// for both; then they are packed for the product behind.
    fn gate(&self, part: &Part<'_>, panels: Range<usize>, tiles: Range<usize>, gate: *mut f32, next: *const u32) {
        let rows = part.tiles.rows(tiles.start).start..part.tiles.rows(tiles.end - 1).end;
        let stride = column_stride(&panels);
        let num_panels = part.matrix.rows() / (2 * PANEL);
        // SAFETY: as much as was lent for either.
        let up = unsafe { gate.add(rows.len() * stride) };
        let up_panels = num_panels + panels.start..num_panels + panels.end;
        let place = |start: *mut f32, panels: &Range<usize>| {
            let first = (rows.start, panels.start * PANEL);
            Place { start, first, stride }
        };
        self.multiply(part, panels.clone(), tiles.clone(), place(gate, &panels), part.panel(up_panels.start));
        self.multiply(part, up_panels.clone(), tiles.clone(), place(up, &up_panels), next);
        for tile in tiles {
            let of_tile = part.tiles.rows(tile);
            let first = (of_tile.start - rows.start) * stride;
            // Blocks of a tile, of 16 pairs of each of its rows: as many columns as a panel has.
            let block = of_tile.start * num_panels + panels.start * of_tile.len();
            let columns = GatedColumns {
                // SAFETY: the tile's rows of both.
                gate: unsafe { gate.add(first) },
                // SAFETY: as above.
                up: unsafe { up.add(first) },
                stride,
                num_rows: of_tile.len(),
                num_columns: panels.len() * PANEL,
                // SAFETY: pairs of all rows fit the output, a quarter of it.
                into: unsafe { self.out.cast::<u32>().add(block * TILE_STEPS) },
            };
            // SAFETY: products of so many rows and columns are there; nobody else has these blocks.
            unsafe { columns.pack() };
        }
    }

    /// Products of a unit's rows with these panels.
    fn multiply(&self, part: &Part<'_>, panels: Range<usize>, num_tiles: Range<usize>, place: Place, next: *const u32) {
        let Place { start, first, stride } = place;
        let out = Output {
            bias: self.product.bias.map(|bias| &bias[part.column..][..part.matrix.rows()]),
            add: self.product.add,
            start,
            first,
            stride,
            width: part.matrix.rows(),
        };
        let a = self.operand(part).packed.cast_const();
        let (lanes_per_row, tiles) = (part.packing.lanes_per_row(self.cols), part.tiles);
        match part.matrix {
            MatrixRef::Float(w) => {
                matmul::compute(self.isa, &Job { a, lanes_per_row, tiles, w, out, next }, panels, num_tiles);
            }
            MatrixRef::Quantized(w) => {
                let job = Job { a, lanes_per_row, tiles, w, out, next };
                let in_tiles = matches!(part.packing, Packing::Blocks | Packing::QuantizedBlocks(_));
                quantized::compute(self.isa, &job, in_tiles, panels, num_tiles);
            }
        }
    }

    /// The weights of the unit that this thread will most likely take behind this one: all threads take turns.
    fn next(&self, part: &Part<'_>, unit: usize) -> *const u32 {
        let next = unit + self.threads;
        if next >= part.cut.num_units() {
            return std::ptr::null();
        }
        part.panel(part.cut.unit(next, part.tiles.count).0.start)
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
                // SAFETY: a row and column of the output.
                let start = unsafe { self.out.add(rows.start * self.width + group * groups.width) };
                (groups.finish)(Finished {
                    start,
                    stride: self.width,
                    output: self.out,
                    output_stride: self.width,
                    width: groups.width,
                    rows: rows.clone(),
                    group,
                    out: PhantomData,
                });
            }
        }
    }
}
