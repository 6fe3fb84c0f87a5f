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
//! a panel as much as the first-level cache holds beside a tile of rows. Quantized weights are opened there, once for all
//! tiles of the unit.
#![allow(unsafe_code)]

use std::ops::Range;

use crate::amx::{ConfiguredByRows, PanelBlocks, multiply_panel, panel_shapes};
use crate::numerics::{LANES, TILE_STEPS};
use crate::packed_matrix::PANEL;
use crate::product::{Job, Output};
use crate::simd::{Avx512, Simd};

/// Blocks of a panel at a time: 16 KiB, beside as much of a tile of rows.
const PART_BLOCKS: usize = 8;

/// The same of panels that are opened for one tile of rows: what tiles do waits for nothing else then, and memory waits
/// for neither.
const OPENED_PART_BLOCKS: usize = 4;

/// How many such parts lie between the one that is opened and the one that comes nearer meanwhile, itself included.
const OPENED_PARTS_AHEAD: usize = 3;

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

    /// Makes outputs of the 32 sums of a row, in a tile of these rows, with a panel.
    ///
    /// # Safety
    /// The machine has tiles; row and panel are of the job and of the caller's unit.
    unsafe fn finish(job: &Job<'_, Self::Matrix>, panel: usize, rows: &Range<usize>, row: usize, sums: *const u32);
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
    let (part_blocks, parts_ahead) =
        if P::OPENS && tiles.len() == 1 { (OPENED_PART_BLOCKS, OPENED_PARTS_AHEAD) } else { (PART_BLOCKS, 1) };
    let num_parts = num_blocks.div_ceil(part_blocks);
    // A part of all panels before the next part, or where rows are few and stay near anyway, panel after panel.
    let place = |step: usize| match tiles.len() {
        1 => (panels.start + step / num_parts, step % num_parts),
        _ => (panels.start + step % panels.len(), step / panels.len()),
    };
    let address =
        |(panel, part): (usize, usize)| P::panel(job.w, panel).wrapping_add(part * part_blocks * P::BLOCK_BYTES);
    let mut configured = ConfiguredByRows::new(panel_shapes);
    let num_steps = num_parts * panels.len();
    for step in 0..num_steps {
        let (panel, part) = place(step);
        let blocks = part * part_blocks..((part + 1) * part_blocks).min(num_blocks);
        let next = match (step + parts_ahead).checked_sub(num_steps) {
            None => address(place(step + parts_ahead)),
            Some(_) if job.next.is_null() => std::ptr::null(),
            Some(beyond) => job.next.cast::<u8>().wrapping_add(beyond * part_blocks * P::BLOCK_BYTES),
        };
        let mut b = address((panel, part)).cast::<u32>();
        let mut lines_ahead = if next.is_null() { 0 } else { (P::BLOCK_BYTES / LINE).div_ceil(tiles.len()) };
        if P::OPENS {
            // SAFETY: as required of the caller; blocks of this panel, and lanes of the scratch for all of a part.
            unsafe { P::open(b.cast(), blocks.len(), opened, next) };
            (b, lines_ahead) = (opened, 0);
        }
        for tile in tiles.clone() {
            let tile_rows = job.tiles.rows(tile);
            let num_rows = tile_rows.len();
            // SAFETY: the packed tile holds blocks of 16 lanes for each of its rows, the panel 16 * 32 lanes for
            // each.
            unsafe {
                let a = job.a.add(tile_rows.start * job.lanes_per_row);
                let sums = sums_of(panel, tile_rows.start);
                // Sums that are the outputs go there at once.
                let (into, into_row) = if blocks.end == num_blocks && job.is_plain::<P>(panel) {
                    (job.out.start.add(tile_rows.start * job.out.stride + panel * PANEL).cast(), job.out.stride * 4)
                } else {
                    (sums, PANEL * 4)
                };
                let blocks_of_tile = PanelBlocks {
                    a: a.add(blocks.start * num_rows * TILE_STEPS),
                    b,
                    sums,
                    into,
                    into_row,
                    num_rows,
                    num_blocks: blocks.len(),
                    is_first: blocks.start == 0,
                    // Each tile takes a part of it.
                    ahead: next.wrapping_add((tile - tiles.start) * blocks.len() * lines_ahead * LINE).cast(),
                    lines_ahead,
                };
                configured.set(num_rows);
                if P::BYTES {
                    multiply_panel::<true>(&blocks_of_tile);
                } else {
                    multiply_panel::<false>(&blocks_of_tile);
                }
            }
        }
    }
    // Row by row: those of the output lie pages apart.
    for tile in tiles {
        let rows = job.tiles.rows(tile);
        for row in rows.clone() {
            for panel in panels.clone().filter(|panel| !job.is_plain::<P>(*panel)) {
                // SAFETY: as required of the caller.
                unsafe { P::finish(job, panel, &rows, row, sums_of(panel, row)) };
            }
        }
    }
}

/// [`TilePanels::finish`] of sums of bf16.
///
/// # Safety
/// As of that.
#[inline(always)]
pub(crate) unsafe fn finish_floats<W>(job: &Job<'_, W>, panel: usize, row: usize, sums: *const u32) {
    for column in [0, LANES] {
        // SAFETY: as required of the caller.
        unsafe {
            let y = Avx512::load(sums.cast::<f32>().add(column));
            job.out.put_lanes::<Avx512>(row, panel * PANEL + column, y);
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
