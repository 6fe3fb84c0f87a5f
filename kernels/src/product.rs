//! A product of rows with matrices side by side, as one job of the pool.
//!
//! ```text
//! operand   [m, k]  ──packed by who needs it, see `operand`──>  tiles of rows
//! sections  stacked matrices, each of one format: columns side by side in the output
//! unit      some tiles x some panels of one section, see `matmul` and `quantized`
//! group     columns that belong together, as a head: who ends the last of their panels goes on with them
//! ```
//!
//! So what comes before a product and what comes behind it wait for rows and columns of their own and not for all
//! threads: a layer has five barriers whatever the batch.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use crate::ctx::Ctx;
use crate::isa::Isa;
use crate::matmul;
use crate::numerics::LANES;
use crate::operand::{Operand, PackedOperand, Packing, UNTOUCHED};
use crate::packed_matrix::{PANEL, PackedMatrix};
use crate::pages::{Kept, lend};
use crate::quantized::{self, PackedFormat, QuantizedMatrix};
use crate::simd::Simd;
use crate::workers::Priority;

/// Multiply-adds of one unit at most: about 100 microseconds, after which prefill may give way to decode.
const UNIT_MADDS: usize = 32 << 20;

/// Weight bytes of one unit at least.
const UNIT_BYTES: usize = 64 << 10;

/// Units that each thread has at least, where a product is large enough: at the end one waits for another's last.
const UNITS_PER_THREAD: usize = 32;

/// Tiles of 32 rows and panels that a unit has where tile registers multiply: 256 rows, 256 columns; and how many bytes
/// of rows fit the second-level cache beside the weights that pass by.
const TILES_PER_UNIT: usize = 8;
const PANELS_PER_UNIT: usize = 8;
const FAST_ROWS_BYTES: usize = 1 << 20;

/// Multiply-adds of such a unit of prefill at most, if one panel has no more: about half a millisecond.
const FAST_UNIT_MADDS: usize = 512 << 20;

/// Units that each thread has at least there.
const FAST_UNITS_PER_THREAD: usize = 8;

/// Below this many multiply-adds a product is not worth waking anyone.
const INLINE_MADDS: usize = 128 << 10;

/// Values of an operand that prefill makes before it may give way to decode, if one piece has no more.
const VALUES_AHEAD: usize = 48 << 10;

/// Matrices side by side at most: q, k and v.
pub const SECTIONS_MAX: usize = 3;

/// A packed matrix of either kind.
#[derive(Clone, Copy, Debug)]
pub enum MatrixRef<'a> {
    /// Of numbers.
    Float(&'a PackedMatrix),
    /// Of integers with scales.
    Quantized(&'a QuantizedMatrix),
}

impl MatrixRef<'_> {
    fn rows(self) -> usize {
        match self {
            MatrixRef::Float(w) => w.rows(),
            MatrixRef::Quantized(w) => w.rows(),
        }
    }

    fn cols(self) -> usize {
        match self {
            MatrixRef::Float(w) => w.cols(),
            MatrixRef::Quantized(w) => w.cols(),
        }
    }

    fn panel_bytes(self) -> usize {
        match self {
            MatrixRef::Float(w) => w.depth() * PANEL * 4,
            MatrixRef::Quantized(w) => w.format().panel_bytes(w.cols()),
        }
    }

    /// Rows of a tile at most, of so many rows.
    fn tile_rows(self, isa: Isa, num_rows: usize) -> usize {
        match self {
            MatrixRef::Float(w) => matmul::tile_rows(isa, w.dtype()),
            MatrixRef::Quantized(w) => quantized::tile_rows(isa, w.format(), num_rows),
        }
    }

    fn packing(self, isa: Isa, num_rows: usize) -> Packing {
        match self {
            _ if isa.is_reference() => Packing::Rows,
            MatrixRef::Float(w) if matmul::multiplies_tiles(isa, w.dtype()) => Packing::Blocks,
            MatrixRef::Quantized(w) if w.format().is_opened() => Packing::Blocks,
            MatrixRef::Float(w) => Packing::Float(w.dtype(), matmul::pair_lanes(isa)),
            MatrixRef::Quantized(w) if quantized::multiplies_tiles(isa, w.format(), num_rows) => {
                Packing::QuantizedBlocks(w.format())
            }
            MatrixRef::Quantized(w) => Packing::Quantized(w.format()),
        }
    }
}

/// What is multiplied with what, and what is added.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// `[m, k]`; rounded to what each section computes in.
    pub operand: Operand<'a>,
    /// `[rows, k]` each, side by side in the output without a gap.
    pub sections: [Option<MatrixRef<'a>>; SECTIONS_MAX],
    /// Of all columns, added first.
    pub bias: Option<&'a [f32]>,
    /// Whether to add to what the output is (the residual).
    pub add: bool,
}

impl Product<'_> {
    /// Columns of the output.
    fn width(&self) -> usize {
        self.sections.iter().flatten().map(|section| section.rows()).sum()
    }
}

/// `out` `[m, rows of all sections]` becomes the product. Each row's bits depend on that row alone. Order: see
/// [`numerics`](crate::numerics).
pub fn multiply(ctx: &Ctx<'_>, product: &Product<'_>, out: &mut [f32]) {
    multiply_then(ctx, product, out, None);
}

/// Columns that something is to be done with as soon as they are there.
pub(crate) struct Groups<'a> {
    /// Of each group; sections are whole groups.
    pub(crate) width: usize,
    /// Called once for each group of each unit's rows, on the thread that ended it.
    pub(crate) finish: &'a (dyn Fn(Finished<'_>) + Sync),
}

/// Some rows of one group, which nobody else touches while the job lasts.
pub(crate) struct Finished<'a> {
    start: *mut f32,
    stride: usize,
    width: usize,
    rows: Range<usize>,
    group: usize,
    out: PhantomData<&'a mut [f32]>,
}

impl Finished<'_> {
    /// Which rows of the output.
    pub(crate) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Which group.
    pub(crate) fn group(&self) -> usize {
        self.group
    }

    /// The group's columns of a row, to read.
    pub(crate) fn read(&self, row: usize) -> &[f32] {
        assert!(self.rows.contains(&row), "row {row} of {:?}", self.rows);
        // SAFETY: as in `row`; whoever holds that cannot call this.
        unsafe { std::slice::from_raw_parts(self.start.add(row * self.stride + self.group * self.width), self.width) }
    }

    /// The group's columns of a row.
    pub(crate) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(self.rows.contains(&row), "row {row} of {:?}", self.rows);
        // SAFETY: inside the output, and this group of these rows is nobody else's until the job is over.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(row * self.stride + self.group * self.width), self.width)
        }
    }
}

/// [`multiply`], and then something for each group.
pub(crate) fn multiply_then(ctx: &Ctx<'_>, product: &Product<'_>, out: &mut [f32], groups: Option<&Groups<'_>>) {
    let Some(cols) = product.sections.iter().flatten().map(|section| section.cols()).next() else { return };
    let (num_rows, width) = (product.operand.num_rows(cols), product.width());
    assert_eq!(out.len(), num_rows * width, "output of [{num_rows}, {width}]");
    assert!(product.bias.is_none_or(|bias| bias.len() == width), "a bias of {width} values");
    if out.is_empty() {
        return;
    }
    // Taken, not borrowed: while this thread waits for its units it may compute units of other jobs.
    let mut scratch = SCRATCH.take();
    run(ctx, product, (num_rows, width, cols), &mut scratch, out, groups);
    SCRATCH.set(scratch);
}

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

fn run(
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
    // Prefill has pieces of its operand as units of their own, in front of all others: a unit that finds none would make as
    // many as it needs, a million values at a time, before it gave way. Who computes decode needs them at once.
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
            // Whoever panicked over a piece of it was computing this job, which raises that panic when all units are over.
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

/// How a product is cut into units.
#[derive(Clone, Copy)]
struct Cut {
    num_panels: usize,
    panels_per_unit: usize,
    tiles_per_unit: usize,
    /// Units that have the same panels.
    row_units: usize,
    /// Whether all panels pass by the first rows before the next rows begin, or all rows by the first panels.
    is_by_rows: bool,
}

impl Cut {
    fn of(ctx: &Ctx<'_>, matrix: MatrixRef<'_>, num_rows: usize, tiles: &Tiles) -> Cut {
        let (rows, cols, panel_bytes) = (matrix.rows(), matrix.cols(), matrix.panel_bytes());
        let num_panels = rows.div_ceil(PANEL);
        let madds_per_tile = tiles.rows_max() * PANEL * cols;
        let packing = matrix.packing(ctx.isa, num_rows);
        if tiles.count > 1 && matches!(packing, Packing::Blocks | Packing::QuantizedBlocks(PackedFormat::Int8Row)) {
            let tiles_max = match ctx.priority {
                Priority::Prefill => FAST_UNIT_MADDS / madds_per_tile,
                Priority::Decode => usize::MAX,
            };
            // Opening a panel takes as long as three tiles with it.
            let is_opened = matches!(matrix, MatrixRef::Quantized(w) if w.computes_bf16());
            let row_bytes = packing.lanes_per_row(cols) * 4;
            return Cut::of_tiles(num_panels, tiles, row_bytes, is_opened, tiles_max, ctx.pool.threads());
        }
        let tiles_per_unit = (UNIT_MADDS / madds_per_tile).clamp(1, tiles.count);
        // As equal as possible: a unit of a single tile would take weights apart for that alone.
        let tiles_per_unit = tiles.count.div_ceil(tiles.count.div_ceil(tiles_per_unit));
        let row_units = tiles.count.div_ceil(tiles_per_unit);
        let panels_per_unit = if num_rows * rows * cols < INLINE_MADDS {
            num_panels
        } else if row_units > 1 {
            UNIT_BYTES / panel_bytes
        } else {
            // The first block of a unit comes unannounced: the longer the unit, the less that is.
            let most = UNIT_MADDS / (tiles_per_unit * madds_per_tile);
            most.min(num_panels / (UNITS_PER_THREAD * ctx.pool.threads())).max(UNIT_BYTES / panel_bytes)
        };
        Cut {
            num_panels,
            panels_per_unit: panels_per_unit.clamp(1, num_panels),
            tiles_per_unit,
            row_units,
            is_by_rows: false,
        }
    }

    /// Where tile registers multiply so fast that operands hardly come in time: units large enough that each line of
    /// either side serves many of the other, and of `tiles_max` products of a tile with a panel at most.
    fn of_tiles(
        num_panels: usize,
        tiles: &Tiles,
        row_bytes: usize,
        is_opened: bool,
        tiles_max: usize,
        threads: usize,
    ) -> Cut {
        let num_tiles = tiles.count;
        // Rows that fit the second-level cache. If they do not, twice as many, for each of which weights then move half as
        // often; or half as often are opened.
        let fits = FAST_ROWS_BYTES / (row_bytes * tiles.rows_max());
        let is_doubled = is_opened || fits < TILES_PER_UNIT;
        let row_units = num_tiles.div_ceil(if is_doubled { 2 * TILES_PER_UNIT } else { TILES_PER_UNIT });
        let tiles_per_unit = num_tiles.div_ceil(row_units);
        let panels_per_unit =
            (num_panels * row_units / (FAST_UNITS_PER_THREAD * threads)).min(tiles_max / tiles_per_unit);
        Cut {
            num_panels,
            panels_per_unit: panels_per_unit.clamp(1, PANELS_PER_UNIT),
            tiles_per_unit,
            row_units,
            is_by_rows: true,
        }
    }

    fn num_units(&self) -> usize {
        self.row_units * self.num_panels.div_ceil(self.panels_per_unit)
    }

    fn panel_unit(&self, index: usize) -> usize {
        if self.is_by_rows { index % (self.num_units() / self.row_units) } else { index / self.row_units }
    }

    fn row_unit(&self, index: usize) -> usize {
        if self.is_by_rows { index / (self.num_units() / self.row_units) } else { index % self.row_units }
    }

    /// Panels and tiles of a unit.
    fn unit(&self, index: usize, num_tiles: usize) -> (Range<usize>, Range<usize>) {
        let panel = self.panel_unit(index) * self.panels_per_unit;
        let tile = self.row_unit(index) * self.tiles_per_unit;
        let panels = panel..(panel + self.panels_per_unit).min(self.num_panels);
        (panels, tile..(tile + self.tiles_per_unit).min(num_tiles))
    }
}

/// What a unit computes with.
pub(crate) struct Job<'a, W> {
    /// The packed operand; tile t starts at `first_row(t) * lanes_per_row`.
    pub(crate) a: *const u32,
    pub(crate) lanes_per_row: usize,
    pub(crate) tiles: Tiles,
    pub(crate) w: &'a W,
    pub(crate) out: Output<'a>,
    /// Weights that this thread will most likely read next; null where nobody knows.
    pub(crate) next: *const u32,
}

impl<W> Job<'_, W> {
    /// A row of `cols` values of an operand of [`Packing::Rows`].
    ///
    /// # Safety
    /// It is one, and the row's tile is made.
    pub(crate) unsafe fn row(&self, row: usize, cols: usize) -> &[f32] {
        // SAFETY: as required of the caller.
        unsafe { std::slice::from_raw_parts(self.a.cast::<f32>().add(row * cols), cols) }
    }
}

/// The specification of the end: bias, then residual.
#[inline(always)]
fn finish(mut y: f32, bias: Option<f32>, residual: Option<f32>) -> f32 {
    if let Some(bias) = bias {
        y += bias;
    }
    residual.map_or(y, |residual| residual + y)
}

/// Where a product goes: `width` columns of rows `stride` values apart, and what is added at the end.
pub(crate) struct Output<'a> {
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) add: bool,
    pub(crate) start: *mut f32,
    pub(crate) stride: usize,
    pub(crate) width: usize,
}

impl Output<'_> {
    /// Ends one output in the specified order.
    ///
    /// # Safety
    /// `start` is valid for this row and column, which nobody else touches.
    pub(crate) unsafe fn put(&self, row: usize, column: usize, y: f32) {
        // SAFETY: as required of the caller.
        unsafe {
            let out = self.start.add(row * self.stride + column);
            *out = finish(y, self.bias.map(|bias| bias[column]), self.add.then(|| *out));
        }
    }

    /// Ends 16 outputs from `column` on; those beyond the width are dropped.
    ///
    /// # Safety
    /// As for [`put`](Self::put), and the machine has the instruction set.
    #[inline(always)]
    pub(crate) unsafe fn put_lanes<S: Simd>(&self, row: usize, column: usize, mut y: S::V) {
        // SAFETY: as required of the caller; stores stay in columns below the width.
        unsafe {
            if column + LANES <= self.width {
                let out = self.start.add(row * self.stride + column);
                if let Some(bias) = self.bias {
                    y = S::add(y, S::load(bias.as_ptr().add(column)));
                }
                if self.add {
                    y = S::add(S::load(out), y);
                }
                S::store(out, y);
            } else if column < self.width {
                let mut values = [0.0f32; LANES];
                S::store(values.as_mut_ptr(), y);
                for (i, &y) in values.iter().enumerate().take(self.width - column) {
                    self.put(row, column + i, y);
                }
            }
        }
    }
}

/// m rows in tiles as equal as possible: 13 rows are 7 + 6, not 12 + 1.
#[derive(Clone, Copy)]
pub(crate) struct Tiles {
    pub(crate) count: usize,
    base: usize,
    num_larger: usize,
}

impl Tiles {
    pub(crate) fn of(m: usize, rows_max: usize) -> Tiles {
        let count = m.div_ceil(rows_max);
        Tiles { count, base: m / count, num_larger: m % count }
    }

    pub(crate) fn rows(&self, tile: usize) -> Range<usize> {
        let first = tile * self.base + tile.min(self.num_larger);
        first..first + self.base + usize::from(tile < self.num_larger)
    }

    pub(crate) fn rows_max(&self) -> usize {
        self.base + usize::from(self.num_larger > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numerics::Order;
    use crate::packed_matrix::{WeightDtype, Weights};
    use crate::quantized::QuantizedWeights;
    use crate::workers::WorkerPool;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn noise(len: usize, seed: u64) -> Vec<f32> {
        (0..len).map(|i| (crate::uniform(seed, 0, i as u32) * 2.0 - 1.0) as f32).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|x| x.to_bits()).collect()
    }

    /// 8 bits, a scale for 32, or for a whole row.
    fn eight_bits(order: Order, rows: usize, cols: usize, group: usize) -> QuantizedMatrix {
        let codes = (0..rows * cols).map(|i| (crate::uniform(7, 0, i as u32) * 256.0) as u8).collect();
        let scales =
            (0..rows * cols / group).map(|i| half::f16::from_f32(0.001 * (i % 9 + 1) as f32).to_f32()).collect();
        let weights = QuantizedWeights {
            rows,
            cols,
            bits: 8,
            offset: 128,
            group,
            block: group,
            codes,
            scales,
            group_scales: None,
            mins: None,
        };
        QuantizedMatrix::pack(order, &[&weights]).unwrap()
    }

    /// Numbers, 8 bits in groups, 8 bits in rows, with this many rows each.
    fn matrices(order: Order, rows: [usize; 3], cols: usize) -> (PackedMatrix, QuantizedMatrix, QuantizedMatrix) {
        let float = PackedMatrix::pack(WeightDtype::Bf16, cols, &[Weights::F32(&noise(rows[0] * cols, 4))]);
        (float, eight_bits(order, rows[1], cols, 32), eight_bits(order, rows[2], cols, cols))
    }

    #[test]
    fn rows_normed_or_gated_on_the_way_and_sections_in_one_job_change_no_bit() {
        // Of one piece and of several; with one tile and with several.
        for (m, k) in [(1, 64), (13, 96), (8, 4192), (40, 2080)] {
            let rows = [70, 40, 33];
            let of_order = [Order::Pairs, Order::Tiles].map(|order| matrices(order, rows, k));
            let (x, norm, gate_up, bias) = (noise(m * k, 1), noise(k, 2), noise(m * 2 * k, 3), noise(143, 5));
            for &isa in Isa::available() {
                let (float, int8, int8_row) = &of_order[usize::from(isa.order() == Order::Tiles)];
                for threads in [1, 3] {
                    let pool = WorkerPool::new(threads);
                    let ctx = &Ctx { pool: &pool, isa, priority: Priority::Prefill };
                    let portable = &Ctx { isa: isa.reference(), ..*ctx };
                    let (mut normed, mut gated) = (vec![0.0; m * k], vec![0.0; m * k]);
                    crate::rms_norm(ctx, &x, &norm, 1e-5, &mut normed);
                    crate::silu_mul(ctx, &gate_up, k, &mut gated);
                    let fused = [
                        (Operand::Rows(&x), &x),
                        (Operand::Normed { x: &x, weight: &norm, eps: 1e-5 }, &normed),
                        (Operand::Gated(&gate_up), &gated),
                    ];
                    for (index, (operand, plain)) in fused.into_iter().enumerate() {
                        let residual = noise(m * 143, 6);
                        let mut out = residual.clone();
                        let sections = [
                            Some(MatrixRef::Float(float)),
                            Some(MatrixRef::Quantized(int8)),
                            Some(MatrixRef::Quantized(int8_row)),
                        ];
                        multiply(ctx, &Product { operand, sections, bias: Some(&bias), add: true }, &mut out);
                        let mut first = 0;
                        for section in sections.into_iter().flatten() {
                            let columns = first..first + section.rows();
                            let of_section = |values: &[f32]| -> Vec<f32> {
                                values.chunks(143).flat_map(|row| row[columns.clone()].to_vec()).collect()
                            };
                            let (mut want, bias) = (of_section(&residual), Some(&bias[columns.clone()]));
                            match section {
                                MatrixRef::Float(w) => crate::matmul(portable, plain, m, w, bias, true, &mut want),
                                MatrixRef::Quantized(w) => {
                                    crate::matmul_quantized(portable, plain, m, w, bias, true, &mut want);
                                }
                            }
                            assert!(bits(&of_section(&out)) == bits(&want), "{isa:?} [{m}, {k}] {index} {columns:?}");
                            first = columns.end;
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_group_is_finished_once_for_every_row_when_all_its_columns_are_there() {
        for (m, k, width) in [(1, 64, 48), (40, 96, 20), (700, 2048, 96), (25, 512, 480)] {
            let w = PackedMatrix::pack(WeightDtype::F32, k, &[Weights::F32(&noise(480 * k, 1))]);
            let x = noise(m * k, 2);
            for threads in [1, 4] {
                let pool = WorkerPool::new(threads);
                let ctx = Ctx { pool: &pool, isa: Isa::detect(), priority: Priority::Decode };
                let mut want = vec![0.0; m * 480];
                crate::matmul(&ctx, &x, m, &w, None, false, &mut want);
                // NaN where nothing has been written.
                let mut out = vec![f32::NAN; m * 480];
                let finish = |mut group: Finished<'_>| {
                    for row in group.rows() {
                        group.row(row).iter_mut().for_each(|x| *x += 1.0);
                    }
                };
                let product = Product {
                    operand: Operand::Rows(&x),
                    sections: [Some(MatrixRef::Float(&w)), None, None],
                    bias: None,
                    add: false,
                };
                multiply_then(&ctx, &product, &mut out, Some(&Groups { width, finish: &finish }));
                want.iter_mut().for_each(|x| *x += 1.0);
                assert!(bits(&out) == bits(&want), "{m} rows, groups of {width}, {threads} threads");
            }
        }
    }

    #[test]
    fn panic_of_whoever_finishes_reaches_the_caller_and_the_next_product_is_whole() {
        let pool = WorkerPool::new(3);
        let ctx = Ctx { pool: &pool, isa: Isa::detect(), priority: Priority::Decode };
        let (m, k) = (40, 256);
        let w = PackedMatrix::pack(WeightDtype::Bf16, k, &[Weights::F32(&noise(512 * k, 1))]);
        let x = noise(m * k, 2);
        let product = Product {
            operand: Operand::Rows(&x),
            sections: [Some(MatrixRef::Float(&w)), None, None],
            bias: None,
            add: false,
        };
        let mut want = vec![0.0; m * 512];
        multiply(&ctx, &product, &mut want);
        let mut out = vec![0.0; m * 512];
        let finish = |group: Finished<'_>| assert!(group.group() != 3, "group three");
        let caught = catch_unwind(AssertUnwindSafe(|| {
            multiply_then(&ctx, &product, &mut out, Some(&Groups { width: 64, finish: &finish }));
        }));
        assert_eq!(caught.unwrap_err().downcast_ref::<&str>(), Some(&"group three"));
        multiply(&ctx, &product, &mut out);
        assert!(bits(&out) == bits(&want));
    }
}
