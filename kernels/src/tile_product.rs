//! A unit of a product in tile registers, where sums go on over all of k: bf16, and bytes with a scale for a whole row.
//!
//! ```text
//! a      [tile][block][rows of the tile][16]   lanes of two bf16 or four bytes; a tile is up to 32 rows
//! panel  [block][16][32]                       lanes
//! ```
//!
//! As in `matmul` a panel is taken in parts that stay in the first-level cache while the tiles stream past.
#![allow(unsafe_code)]

use std::ops::Range;

use crate::amx::{ConfiguredByRows, PanelBlocks, multiply_panel, panel_shapes};
use crate::numerics::TILE_STEPS;
use crate::packed_matrix::PANEL;
use crate::product::Job;

/// Blocks of a panel that stay in the first-level cache: 16 KiB, beside as much of a tile of rows.
const PART_BLOCKS: usize = 8;

/// A matrix whose panels are such.
pub(crate) trait TilePanels: Sized {
    /// Quads of bytes, and not pairs of bf16.
    const BYTES: bool;

    /// Blocks of a panel, the last one whole.
    fn num_blocks(&self) -> usize;

    /// Where a panel begins.
    fn tile_panel(&self, panel: usize) -> *const u32;

    /// Makes outputs of the sums of some rows `[rows][32]` with a panel.
    ///
    /// # Safety
    /// The machine has tiles; rows and panel are of the job and of the caller's unit.
    unsafe fn finish(job: &Job<'_, Self>, panel: usize, rows: Range<usize>, sums: *const u32);
}

/// A unit of a product: `panels` for the rows of `tiles`.
///
/// # Safety
/// The machine has tiles; the operand is packed for them; `sums` is valid for 32 of each row of the unit.
#[inline(always)]
pub(crate) unsafe fn multiply_tiles<W: TilePanels>(
    job: &Job<'_, W>,
    panels: Range<usize>,
    tiles: Range<usize>,
    sums: *mut u32,
) {
    let num_blocks = job.w.num_blocks();
    let first_row = job.tiles.rows(tiles.start).start;
    let mut configured = ConfiguredByRows::new(panel_shapes);
    for panel in panels.clone() {
        for start in (0..num_blocks).step_by(PART_BLOCKS) {
            let blocks = start..(start + PART_BLOCKS).min(num_blocks);
            let is_last = panel + 1 == panels.end && blocks.end == num_blocks;
            for tile in tiles.clone() {
                let rows = job.tiles.rows(tile);
                // SAFETY: the packed tile holds blocks of 16 lanes for each of its rows, the panel 16 * 32 lanes for
                // each, and the sums 32 for each row of the unit.
                unsafe {
                    let b = job.w.tile_panel(panel);
                    let behind = b.add(blocks.end * TILE_STEPS * PANEL);
                    let (ahead, halves_ahead) = job.ahead(behind, is_last, tile - tiles.start, tiles.len());
                    let sums = sums.add((rows.start - first_row) * PANEL);
                    let a = job.a.add(rows.start * job.lanes_per_row);
                    let blocks_of_tile = PanelBlocks {
                        a: a.add(blocks.start * rows.len() * TILE_STEPS),
                        b: b.add(blocks.start * TILE_STEPS * PANEL),
                        sums,
                        num_rows: rows.len(),
                        num_blocks: blocks.len(),
                        is_first: blocks.start == 0,
                        ahead,
                        halves_ahead,
                    };
                    configured.set(rows.len());
                    if W::BYTES {
                        multiply_panel::<true>(&blocks_of_tile);
                    } else {
                        multiply_panel::<false>(&blocks_of_tile);
                    }
                    if blocks.end == num_blocks {
                        W::finish(job, panel, rows, sums);
                    }
                }
            }
        }
    }
}
