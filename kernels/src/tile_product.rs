//! A unit of a product in tile registers, where sums go on over all of k: bf16, what is opened to it, and bytes with a
//! scale for a whole row.
//!
//! ```text
//! a      [tile][block][rows of the tile][16]   lanes of two bf16 or four bytes; a tile is up to 32 rows
//! panel  [block][16][32]                       lanes
//! sums   [panel][rows of the unit][32]
//! ```
//!
//! Some blocks of all panels at a time: what they are multiplied with stays in the second-level cache meanwhile, and of
//! a panel as much as the first-level cache holds beside a tile of rows. Quantized weights are opened there, once for
//! all tiles of the unit. One tile alone, as in decode, takes panel after panel: weights are one stream from memory. So
//! do two tiles of long panels, part by part of a panel.
#![allow(unsafe_code)]

use std::ops::Range;

use crate::amx::{ConfiguredByRows, PanelBlocks, multiply_panel, panel_shapes};
use crate::numerics::{LANES, TILE_STEPS};
use crate::packed_matrix::PANEL;
use crate::product::{Job, Output};
use crate::simd::{Avx512, Simd};

/// Blocks of a panel at a time where several tiles are multiplied with them: 16 KiB, beside as much of a tile of rows.
const PART_BLOCKS: usize = 8;

/// The same of panels that are opened for one tile of rows: what tiles do waits for nothing else then, and memory waits
/// for neither.
const OPENED_PART_BLOCKS: usize = 4;

/// How far ahead weights come nearer that one tile alone is multiplied with: 3.5 KiB. On Granite Rapids a decode step
/// took as long with 2 to 4.5 KiB, a twelfth longer with 8 KiB.
const AHEAD_BYTES: usize = 3584;

/// The same of weights that are opened.
const OPENED_AHEAD_BYTES: usize = 13_056;

/// Blocks of a panel at a time where two tiles of rows share a stream of weights: the second finds them in the
/// first-level cache.
const SHARED_PART_BLOCKS: usize = 4;

/// Lanes of a block of a panel.
pub(crate) const BLOCK_LANES: usize = TILE_STEPS * PANEL;

/// Bytes of a line of the cache.
const LINE: usize = LANES * 4;

/// How matrices of some kind lie in blocks.
pub(crate) trait TilePanels {
    type Matrix;

    /// Quads of bytes, and not pairs of bf16.
    const BYTES: bool;

    /// Bytes of a block as it lies in memory.
    const BLOCK_BYTES: usize = BLOCK_LANES * 4;

    /// Whether blocks lie in memory in another form, and are opened into lanes.
    const OPENS: bool = false;

    /// Blocks of a panel, the last one whole.
    fn num_blocks(w: &Self::Matrix) -> usize;

    /// Where a panel begins.
    fn panel(w: &Self::Matrix, panel: usize) -> *const u8;

    /// Opens so many blocks `from` a panel, while as many bytes at `ahead` come nearer.
    ///
    /// # Safety
    /// The machine has tiles; the blocks are of a panel, `into` is valid for their lanes. `ahead` may be anything.
    unsafe fn open(_from: *const u8, _num_blocks: usize, _into: *mut u32, _ahead: *const u8) {
        unreachable!("blocks are lanes as they lie")
    }

    /// Makes outputs of the sums of a row, in a tile of these rows, with panels.
    ///
    /// # Safety
    /// The machine has tiles; row and panels are of the job and of the caller's unit.
    unsafe fn finish(job: &Job<'_, Self::Matrix>, panels: Range<usize>, rows: &Range<usize>, row: usize, sums: RowSums);
}

/// Sums of a row with panels, 32 with each, so many lanes apart.
#[derive(Clone, Copy)]
pub(crate) struct RowSums {
    first: *const u32,
    lanes_per_panel: usize,
}

impl RowSums {
    /// Those with the panel number `index` of them.
    #[inline(always)]
    pub(crate) fn of(&self, index: usize) -> *const u32 {
        self.first.wrapping_add(index * self.lanes_per_panel)
    }
}

/// Bytes that [`multiply_tiles`] needs for a unit of so many rows and panels.
pub(crate) fn scratch_bytes(num_rows: usize, num_panels: usize) -> usize {
    (PART_BLOCKS * BLOCK_LANES + num_rows * num_panels * PANEL) * 4
}

/// A unit of a product: `panels` for the rows of `tiles`.
///
/// # Safety
/// The machine has tiles; the operand is packed for them; `scratch` is valid for the [`scratch_bytes`] of the unit.
#[inline(always)]
pub(crate) unsafe fn multiply_tiles<P: TilePanels>(
    job: &Job<'_, P::Matrix>,
    panels: Range<usize>,
    tiles: Range<usize>,
    scratch: *mut u32,
) {
    let num_blocks = P::num_blocks(job.w);
    let rows = job.tiles.rows(tiles.start).start..job.tiles.rows(tiles.end - 1).end;
    let (opened, sums) = (scratch, scratch.wrapping_add(PART_BLOCKS * BLOCK_LANES));
    let sums_of = |panel: usize, row: usize| {
        // SAFETY: as required of the caller, for rows and panels of the unit.
        unsafe { sums.add(((panel - panels.start) * rows.len() + row - rows.start) * PANEL) }
    };
    let mut configured = ConfiguredByRows::new(panel_shapes);
    let mut multiply =
        |panel: usize, b: *const u8, blocks: Range<usize>, tile: usize, ahead: *const u8, lines_ahead: usize| {
            let rows = job.tiles.rows(tile);
            // SAFETY: the packed tile holds blocks of 16 lanes for each of its rows, the panel 16 * 32 lanes for each.
            unsafe {
                let a = job.a.add(rows.start * job.lanes_per_row);
                let sums = sums_of(panel, rows.start);
                // Sums that are the outputs go there at once.
                let (into, into_row) = if blocks.end == num_blocks && job.is_plain::<P>(panel) {
                    (job.out.place(rows.start, panel * PANEL).cast(), job.out.stride * 4)
                } else {
                    (sums, PANEL * 4)
                };
                let blocks_of_tile = PanelBlocks {
                    a: a.add(blocks.start * rows.len() * TILE_STEPS),
                    b: b.cast(),
                    sums,
                    into,
                    into_row,
                    num_rows: rows.len(),
                    num_blocks: blocks.len(),
                    is_first: blocks.start == 0,
                    ahead: ahead.cast(),
                    lines_ahead: if ahead.is_null() { 0 } else { lines_ahead },
                };
                configured.set(rows.len());
                if P::BYTES {
                    multiply_panel::<true>(&blocks_of_tile);
                } else {
                    multiply_panel::<false>(&blocks_of_tile);
                }
            }
        };
    let address = |panel: usize, block: usize| P::panel(job.w, panel).wrapping_add(block * P::BLOCK_BYTES);
    let next_unit = job.next.cast::<u8>();
    if tiles.len() == 1 && P::OPENS {
        // What lies so far ahead, in the next unit behind the end of this one.
        let end = address(panels.end - 1, num_blocks).addr();
        let ahead_of = |from: *const u8| match (from.addr() + OPENED_AHEAD_BYTES).checked_sub(end) {
            Some(beyond) if !next_unit.is_null() => next_unit.wrapping_add(beyond),
            _ => from.wrapping_add(OPENED_AHEAD_BYTES),
        };
        for panel in panels.clone() {
            for start in (0..num_blocks).step_by(OPENED_PART_BLOCKS) {
                let blocks = start..(start + OPENED_PART_BLOCKS).min(num_blocks);
                let from = address(panel, start);
                // SAFETY: as required of the caller; blocks of this panel, and lanes of the scratch for all of them.
                unsafe { P::open(from, blocks.len(), opened, ahead_of(from)) };
                multiply(panel, opened.cast(), blocks, tiles.start, std::ptr::null(), 0);
            }
        }
    } else if tiles.len() == 1 {
        // Nobody else reads these weights: panels pass by as they lie in memory.
        for panel in panels.clone() {
            let ahead = address(panel, 0).wrapping_add(AHEAD_BYTES);
            let num_last =
                if panel + 1 == panels.end { num_blocks.min(AHEAD_BYTES.div_ceil(P::BLOCK_BYTES)) } else { 0 };
            let cut = num_blocks - num_last;
            if cut > 0 {
                multiply(panel, address(panel, 0), 0..cut, tiles.start, ahead, P::BLOCK_BYTES / LINE);
            }
            if num_last > 0 {
                multiply(panel, address(panel, cut), cut..num_blocks, tiles.start, next_unit, P::BLOCK_BYTES / LINE);
            }
        }
    } else if tiles.len() == 2 && job.tiles.share_stream(num_blocks * P::BLOCK_BYTES) && !P::OPENS && !P::BYTES {
        // Panels pass by as they lie, too, some blocks at a time, and each tile asks for a half of the next ones.
        let end = address(panels.end - 1, num_blocks).addr();
        for panel in panels.clone() {
            for start in (0..num_blocks).step_by(SHARED_PART_BLOCKS) {
                let blocks = start..(start + SHARED_PART_BLOCKS).min(num_blocks);
                let from = address(panel, start);
                let next = from.wrapping_add(SHARED_PART_BLOCKS * P::BLOCK_BYTES);
                let next = if next.addr() < end { next } else { next_unit };
                let lines_ahead = P::BLOCK_BYTES / LINE / tiles.len();
                for tile in tiles.clone() {
                    let ahead = next.wrapping_add((tile - tiles.start) * blocks.len() * lines_ahead * LINE);
                    let ahead = if next.is_null() { next } else { ahead };
                    multiply(panel, from, blocks.clone(), tile, ahead, lines_ahead);
                }
            }
        }
    } else {
        for start in (0..num_blocks).step_by(PART_BLOCKS) {
            let blocks = start..(start + PART_BLOCKS).min(num_blocks);
            for panel in panels.clone() {
                // The same blocks of the next panel, or the next ones of the first.
                let next = if panel + 1 < panels.end {
                    address(panel + 1, blocks.start)
                } else if blocks.end < num_blocks {
                    address(panels.start, blocks.end)
                } else {
                    next_unit
                };
                let (mut b, mut lines_ahead) = (address(panel, start), (P::BLOCK_BYTES / LINE).div_ceil(tiles.len()));
                if P::OPENS {
                    // SAFETY: as required of the caller; blocks of this panel, and lanes of the scratch for all of
                    // them.
                    unsafe { P::open(b, blocks.len(), opened, next) };
                    (b, lines_ahead) = (opened.cast_const().cast(), 0);
                }
                for tile in tiles.clone() {
                    // Each tile takes a part of it.
                    let ahead = next.wrapping_add((tile - tiles.start) * blocks.len() * lines_ahead * LINE);
                    let ahead = if next.is_null() { next } else { ahead };
                    multiply(panel, b, blocks.clone(), tile, ahead, lines_ahead);
                }
            }
        }
    }
    let num_plain = panels.clone().take_while(|panel| job.is_plain::<P>(*panel)).count();
    let unfinished = panels.start + num_plain..panels.end;
    if unfinished.is_empty() {
        return;
    }
    let lanes_per_panel = rows.len() * PANEL;
    // Row by row: those of the output lie pages apart.
    for tile in tiles {
        let rows = job.tiles.rows(tile);
        for row in rows.clone() {
            let sums = RowSums { first: sums_of(unfinished.start, row), lanes_per_panel };
            // SAFETY: as required of the caller.
            unsafe { P::finish(job, unfinished.clone(), &rows, row, sums) };
        }
    }
}

/// [`TilePanels::finish`] of sums of bf16.
///
/// # Safety
/// As of that.
#[inline(always)]
pub(crate) unsafe fn finish_floats<W>(job: &Job<'_, W>, panels: Range<usize>, row: usize, sums: RowSums) {
    for (index, panel) in panels.enumerate() {
        for column in [0, LANES] {
            // SAFETY: as required of the caller.
            unsafe {
                let y = Avx512::load(sums.of(index).cast::<f32>().add(column));
                job.out.put_lanes::<Avx512>(row, panel * PANEL + column, y);
            }
        }
    }
}

impl<W> crate::product::Job<'_, W> {
    /// Whether sums with a whole panel are the outputs as they are.
    #[inline(always)]
    fn is_plain<P: TilePanels>(&self, panel: usize) -> bool {
        let Output { bias, add, width, .. } = self.out;
        !P::BYTES && bias.is_none() && !add && (panel + 1) * PANEL <= width
    }
}
