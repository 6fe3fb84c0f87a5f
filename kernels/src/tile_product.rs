//! A unit of a product in tile registers, where sums go on over all of k: bf16, and bytes with a scale for a whole row.
//!
//! ```text
//! a      [tile][block][rows of the tile][16]   lanes of two bf16 or four bytes; a tile is up to 32 rows
//! panel  [block][16][32]                       lanes
//! sums   [panel][rows of the unit][32]
//! ```
//!
//! Some blocks of all panels at a time: what they are multiplied with stays in the second-level cache meanwhile, and of
//! a panel as much as the first-level cache holds beside a tile of rows. One tile alone, as in decode, takes panel after
//! panel: weights are one stream from memory.
#![allow(unsafe_code)]

use std::ops::Range;

use crate::amx::{ConfiguredByRows, PanelBlocks, multiply_panel, panel_shapes};
use crate::numerics::{LANES, TILE_STEPS};
use crate::packed_matrix::PANEL;
use crate::product::{Job, Output};

/// Blocks of a panel at a time where several tiles are multiplied with them: 16 KiB, beside as much of a tile of rows.
const PART_BLOCKS: usize = 8;

/// Lanes of a block of a panel.
const BLOCK_LANES: usize = TILE_STEPS * PANEL;

/// How far ahead weights come nearer that one tile alone is multiplied with: 3.5 KiB. On Granite Rapids a decode step took as
/// long with 2 to 4.5 KiB, a twelfth longer with 8 KiB.
const AHEAD_LANES: usize = 896;

/// A matrix whose panels are such.
pub(crate) trait TilePanels: Sized {
    /// Quads of bytes, and not pairs of bf16.
    const BYTES: bool;

    /// Blocks of a panel, the last one whole.
    fn num_blocks(&self) -> usize;

    /// Where a panel begins.
    fn tile_panel(&self, panel: usize) -> *const u32;

    /// Makes outputs of the 32 sums of a row, in a tile of these rows, with a panel.
    ///
    /// # Safety
    /// The machine has tiles; row and panel are of the job and of the caller's unit.
    unsafe fn finish(job: &Job<'_, Self>, panel: usize, rows: &Range<usize>, row: usize, sums: *const u32);
}

/// A unit of a product: `panels` for the rows of `tiles`.
///
/// # Safety
/// The machine has tiles; the operand is packed for them; `sums` is valid for 32 of each row and panel of the unit.
#[inline(always)]
pub(crate) unsafe fn multiply_tiles<W: TilePanels>(
    job: &Job<'_, W>,
    panels: Range<usize>,
    tiles: Range<usize>,
    sums: *mut u32,
) {
    let num_blocks = job.w.num_blocks();
    let rows = job.tiles.rows(tiles.start).start..job.tiles.rows(tiles.end - 1).end;
    let sums_of = |panel: usize, row: usize| {
        // SAFETY: as required of the caller, for rows and panels of the unit.
        unsafe { sums.add(((panel - panels.start) * rows.len() + row - rows.start) * PANEL) }
    };
    let mut configured = ConfiguredByRows::new(panel_shapes);
    let mut multiply = |panel: usize, blocks: Range<usize>, tile: usize, ahead: *const u32, lines_ahead: usize| {
        let rows = job.tiles.rows(tile);
        // SAFETY: the packed tile holds blocks of 16 lanes for each of its rows, the panel 16 * 32 lanes for each.
        unsafe {
            let a = job.a.add(rows.start * job.lanes_per_row);
            let sums = sums_of(panel, rows.start);
            // Sums that are the outputs go there at once.
            let (into, into_row) = if blocks.end == num_blocks && job.is_plain::<W>(panel) {
                (job.out.start.add(rows.start * job.out.stride + panel * PANEL).cast(), job.out.stride * 4)
            } else {
                (sums, PANEL * 4)
            };
            let blocks_of_tile = PanelBlocks {
                a: a.add(blocks.start * rows.len() * TILE_STEPS),
                b: job.w.tile_panel(panel).add(blocks.start * BLOCK_LANES),
                sums,
                into,
                into_row,
                num_rows: rows.len(),
                num_blocks: blocks.len(),
                is_first: blocks.start == 0,
                ahead,
                lines_ahead: if ahead.is_null() { 0 } else { lines_ahead },
            };
            configured.set(rows.len());
            if W::BYTES {
                multiply_panel::<true>(&blocks_of_tile);
            } else {
                multiply_panel::<false>(&blocks_of_tile);
            }
        }
    };
    if tiles.len() == 1 {
        // Nobody else reads these weights: panels pass by as they lie in memory.
        for panel in panels.clone() {
            let ahead = job.w.tile_panel(panel).wrapping_add(AHEAD_LANES);
            let num_last = if panel + 1 == panels.end { num_blocks.min(AHEAD_LANES.div_ceil(BLOCK_LANES)) } else { 0 };
            let cut = num_blocks - num_last;
            if cut > 0 {
                multiply(panel, 0..cut, tiles.start, ahead, BLOCK_LANES / LANES);
            }
            if num_last > 0 {
                multiply(panel, cut..num_blocks, tiles.start, job.next, BLOCK_LANES / LANES);
            }
        }
    } else {
        for start in (0..num_blocks).step_by(PART_BLOCKS) {
            let blocks = start..(start + PART_BLOCKS).min(num_blocks);
            for panel in panels.clone() {
                // The same blocks of the next panel, or the next ones of the first.
                let next = if panel + 1 < panels.end {
                    job.w.tile_panel(panel + 1).wrapping_add(blocks.start * BLOCK_LANES)
                } else if blocks.end < num_blocks {
                    job.w.tile_panel(panels.start).wrapping_add(blocks.end * BLOCK_LANES)
                } else {
                    job.next
                };
                let lines_ahead = (BLOCK_LANES / LANES).div_ceil(tiles.len());
                for tile in tiles.clone() {
                    // Each tile takes a part of it.
                    let ahead = next.wrapping_add((tile - tiles.start) * blocks.len() * lines_ahead * LANES);
                    let ahead = if next.is_null() { next } else { ahead };
                    multiply(panel, blocks.clone(), tile, ahead, lines_ahead);
                }
            }
        }
    }
    // Row by row: those of the output lie pages apart.
    for tile in tiles {
        let rows = job.tiles.rows(tile);
        for row in rows.clone() {
            for panel in panels.clone().filter(|panel| !job.is_plain::<W>(*panel)) {
                // SAFETY: as required of the caller.
                unsafe { W::finish(job, panel, &rows, row, sums_of(panel, row)) };
            }
        }
    }
}

impl<W> crate::product::Job<'_, W> {
    /// Whether sums with a whole panel are the outputs as they are.
    #[inline(always)]
    fn is_plain<M: TilePanels>(&self, panel: usize) -> bool {
        let Output { bias, add, width, .. } = self.out;
        !M::BYTES && bias.is_none() && !add && (panel + 1) * PANEL <= width
    }
}
