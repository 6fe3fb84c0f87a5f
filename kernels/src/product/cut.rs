//! How a product is cut: rows into tiles, and tiles and panels into units.

use std::ops::Range;

use super::MatrixRef;
use crate::ctx::Ctx;
use crate::operand::Packing;
use crate::packed_matrix::PANEL;
use crate::quantized::PackedFormat;
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

/// See [`Tiles::share_stream`].
const SHARED_PANEL_BYTES: usize = 64 << 10;

/// Below this many multiply-adds a product is not worth waking anyone.
pub(super) const INLINE_MADDS: usize = 128 << 10;

/// Columns that one unit has where tile registers multiply.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Together {
    Nothing,
    /// So many panels side by side.
    Panels(usize),
    /// Each of the first half of the panels and its counterpart in the second half; units are counted in the first.
    Gated,
}

/// How a product is cut into units.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    num_panels: usize,
    panels_per_unit: usize,
    tiles_per_unit: usize,
    /// Units that have the same panels.
    pub(super) row_units: usize,
    /// Whether all panels pass by the first rows before the next rows begin, or all rows by the first panels.
    is_by_rows: bool,
}

impl Cut {
    pub(super) fn of(ctx: &Ctx<'_>, matrix: MatrixRef<'_>, num_rows: usize, tiles: &Tiles, together: Together) -> Cut {
        let (rows, cols, panel_bytes) = (matrix.rows(), matrix.cols(), matrix.panel_bytes());
        let num_panels = rows.div_ceil(PANEL);
        let madds_per_tile = tiles.rows_max() * PANEL * cols;
        let packing = matrix.packing(ctx.isa, num_rows);
        // In units as a single tile has them.
        let is_shared = matrix.shares_stream(ctx.isa, num_rows);
        if tiles.count > 1
            && !is_shared
            && matches!(packing, Packing::Blocks | Packing::QuantizedBlocks(PackedFormat::Int8Row))
        {
            let tiles_max = match ctx.priority {
                Priority::Prefill => FAST_UNIT_MADDS / madds_per_tile,
                Priority::Decode => usize::MAX,
            };
            // Opening a panel takes as long as three tiles with it.
            let is_opened = matches!(matrix, MatrixRef::Quantized(w) if w.computes_bf16());
            let row_bytes = packing.lanes_per_row(cols) * 4;
            let (threads, at_once) = (ctx.pool.threads(), if together == Together::Gated { 2 } else { 1 });
            let cut = Cut::of_tiles(num_panels / at_once, tiles, row_bytes, is_opened, tiles_max / at_once, threads);
            let panels_per_unit = match together {
                Together::Nothing => cut.panels_per_unit,
                Together::Panels(count) => (cut.panels_per_unit / count * count).max(count),
                Together::Gated => cut.panels_per_unit.min(PANELS_PER_UNIT / 2),
            };
            return Cut { panels_per_unit, ..cut };
        }
        let tiles_per_unit = if is_shared { 2 } else { (UNIT_MADDS / madds_per_tile).clamp(1, tiles.count) };
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
        // Rows that fit the second-level cache. If they do not, twice as many, for each of which weights then move half
        // as often; or half as often are opened.
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

    pub(super) fn num_units(&self) -> usize {
        self.row_units * self.num_panels.div_ceil(self.panels_per_unit)
    }

    fn panel_unit(&self, index: usize) -> usize {
        if self.is_by_rows { index % (self.num_units() / self.row_units) } else { index / self.row_units }
    }

    pub(super) fn row_unit(&self, index: usize) -> usize {
        if self.is_by_rows { index / (self.num_units() / self.row_units) } else { index % self.row_units }
    }

    /// Panels and tiles of a unit.
    pub(super) fn unit(&self, index: usize, num_tiles: usize) -> (Range<usize>, Range<usize>) {
        let panel = self.panel_unit(index) * self.panels_per_unit;
        let tile = self.row_unit(index) * self.tiles_per_unit;
        let panels = panel..(panel + self.panels_per_unit).min(self.num_panels);
        (panels, tile..(tile + self.tiles_per_unit).min(num_tiles))
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

    /// Whether they are two tiles that weights pass by as one stream, as they pass by a single one: where panels have
    /// so many bytes, since the sums of shorter ones come and go too often.
    pub(crate) fn share_stream(&self, panel_bytes: usize) -> bool {
        self.count == 2 && panel_bytes >= SHARED_PANEL_BYTES
    }

    pub(crate) fn rows_max(&self) -> usize {
        self.base + usize::from(self.num_larger > 0)
    }
}
