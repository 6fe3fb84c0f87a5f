//! Blocks of a panel that are taken apart once, into the first-level cache, for all tiles of a unit; their sums wait in
//! the second-level cache for the next block. Neither changes the order in which anything is added.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ops::Range;

use super::panels::{Opened, Panel};
use super::product::Job;
use crate::packed_matrix::PANEL;
use crate::pages::{Kept, lend};

/// Input features of a block: taken apart it has 20 KiB, less than half of a first-level cache.
const BLOCK_K: usize = 512;

/// Some groups of one panel, and where sums wait between them.
pub(super) struct Block {
    pub(super) panel_index: usize,
    /// The panel, or these groups of it taken apart.
    pub(super) codes: *const u8,
    pub(super) groups: Range<usize>,
    /// Only of groups taken apart: sums of the unit's rows `[rows][32]`, row 0 being `first_row`.
    pub(super) sums: *mut f32,
    /// The unit's.
    pub(super) first_row: usize,
    /// What is to come nearer while the first rows pass by; nothing where the block is taken apart.
    pub(super) ahead: Option<Ahead>,
}

/// How far ahead codes come nearer. The machine itself looks less far, since taking codes apart and multiplying them
/// lies between two lines: without this one row of 4 bits took 1.3 times as long, with 1.5 KiB 1.2, with 6 to 16 KiB
/// 1.0 to 1.1, and several rows longer from 6 KiB on.
const AHEAD_BYTES: usize = 3584;

/// What comes nearer while the first rows pass by a panel: its own bytes ahead and those of the next panels, behind the
/// end of the unit those of the next unit.
pub(super) struct Ahead {
    pub(super) panel: *const u8,
    /// Where this unit ends.
    pub(super) end: usize,
    /// Where the next one begins; null where nobody knows.
    pub(super) next: *const u8,
}

impl Ahead {
    /// What is to be asked for at an offset into the panel.
    #[inline(always)]
    pub(super) fn at(&self, offset: usize) -> *const u32 {
        let address = self.panel.wrapping_add(offset + AHEAD_BYTES);
        match address.addr().checked_sub(self.end) {
            Some(beyond) if !self.next.is_null() => self.next.wrapping_add(beyond).cast(),
            _ => address.cast(),
        }
    }
}

/// What takes blocks of a format apart and multiplies them.
pub(super) trait BlockProduct<P: Panel> {
    /// Takes these groups of a panel apart.
    ///
    /// # Safety
    /// The machine has the instruction set; as for [`Opened::fill`].
    unsafe fn open(&self, panel: *const u8, groups: Range<usize>, into: *mut u8);

    /// Multiplies a block that is taken apart with the rows of some tiles.
    ///
    /// # Safety
    /// The machine has the instruction set; block and tiles are of the job and the caller's unit.
    unsafe fn multiply(&mut self, job: &Job<'_>, block: &Block, tiles: Range<usize>);
}

thread_local! {
    /// A block taken apart, and the sums of a unit.
    static SCRATCH: Kept = const { Cell::new(None) };
}

/// A unit of a product: `panels` for the rows of `tiles`.
///
/// # Safety
/// The machine has the instruction set, and the operand is packed for it.
pub(super) unsafe fn multiply_blocks<P: Panel>(
    job: &Job<'_>,
    panels: Range<usize>,
    tiles: Range<usize>,
    mut product: impl BlockProduct<P>,
) {
    let num_groups = job.w.cols() / (4 * P::QUADS);
    let groups_per_block = BLOCK_K / (4 * P::QUADS);
    let opened_len = groups_per_block * Opened::<P>::GROUP_BYTES;
    let first_row = job.tiles.rows(tiles.start).start;
    let num_rows = job.tiles.rows(tiles.end - 1).end - first_row;
    lend(&SCRATCH, opened_len + num_rows * PANEL * 4, |opened| {
        for panel_index in panels {
            let panel = job.w.panel(panel_index).as_ptr();
            for start in (0..num_groups).step_by(groups_per_block) {
                let groups = start..(start + groups_per_block).min(num_groups);
                // SAFETY: the scratch has room for both; panels and tiles are of this job; as required of the caller.
                unsafe {
                    product.open(panel, groups.clone(), opened);
                    let sums = opened.add(opened_len).cast::<f32>();
                    let block = Block { panel_index, codes: opened, groups, sums, first_row, ahead: None };
                    product.multiply(job, &block, tiles.clone());
                }
            }
        }
    });
}
