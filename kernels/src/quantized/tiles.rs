//! The fast version: tiles of rows times panels.
//!
//! ```text
//! most     each tile reads the whole panel as it lies in memory, its sums in registers all the while
//! 6 bits   from three tiles on, 512 k of a panel are taken apart once, and all tiles of the unit pass over them, see
//!          `blocks`
//! ```
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // row r, column c: the shapes of the drawing

use std::marker::PhantomData;
use std::ops::Range;

use super::activations::EXTRA_LANES;
use super::blocks::{Ahead, Block, BlockProduct, multiply_blocks};
use super::packed::{PackedFormat, QUAD_BYTES};
use super::panels::{Int4, Int4Min, Int6, Int8, Int8Row, Opened, Panel};
use super::product::Job;
use super::simd::{IntSimd, Vnni};
use crate::numerics::LANES;
use crate::packed_matrix::PANEL;
use crate::simd::{Avx2, Avx512, Simd, prefetch};

/// From so many tiles on a block is taken apart once instead of by each of them.
const OPEN_TILES: usize = 3;

/// Instruction sets, each with a function of its own for every panel format and number of rows: one function for
/// all of them takes a compiler minutes.
trait Tile: IntSimd + Sized {
    unsafe fn tile<P: Panel, const MR: usize>(job: &Job<'_>, block: &Block, first_row: usize);
    unsafe fn open<P: Panel>(panel: *const u8, groups: Range<usize>, into: *mut u8);
}

macro_rules! instruction_set {
    ($unit:ident, $simd:ty, $features:literal) => {
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $unit(job: &Job<'_>, panels: Range<usize>, tiles: Range<usize>) {
            // SAFETY: as required of the caller.
            unsafe { compute_unit::<$simd>(job, panels, tiles) }
        }

        impl Tile for $simd {
            #[inline(always)]
            unsafe fn tile<P: Panel, const MR: usize>(job: &Job<'_>, block: &Block, first_row: usize) {
                #[inline(never)]
                #[target_feature(enable = $features)]
                unsafe fn tile<P: Panel, const MR: usize>(job: &Job<'_>, block: &Block, first_row: usize) {
                    // SAFETY: as required of the caller.
                    unsafe { compute_tile::<$simd, P, MR>(job, block, first_row) }
                }
                // SAFETY: as required of the caller.
                unsafe { tile::<P, MR>(job, block, first_row) }
            }

            #[inline(always)]
            unsafe fn open<P: Panel>(panel: *const u8, groups: Range<usize>, into: *mut u8) {
                #[inline(never)]
                #[target_feature(enable = $features)]
                unsafe fn open<P: Panel>(panel: *const u8, groups: Range<usize>, into: *mut u8) {
                    // SAFETY: as required of the caller.
                    unsafe { Opened::<P>::fill::<$simd>(panel, groups, 0, into) }
                }
                // SAFETY: as required of the caller.
                unsafe { open::<P>(panel, groups, into) }
            }
        }
    };
}

instruction_set!(avx2, Avx2, "avx2,fma,f16c");
instruction_set!(avx512, Avx512, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl");
instruction_set!(vnni, Vnni, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni");

#[inline(always)]
unsafe fn compute_unit<S: Tile>(job: &Job<'_>, panels: Range<usize>, tiles: Range<usize>) {
    // SAFETY: as required of the caller; the panel type is that of the format.
    unsafe {
        match job.w.format() {
            PackedFormat::Int8 => compute_panels::<S, Int8>(job, panels, tiles),
            PackedFormat::Int4 => compute_panels::<S, Int4>(job, panels, tiles),
            PackedFormat::Int4Min => compute_panels::<S, Int4Min>(job, panels, tiles),
            PackedFormat::Int6 => compute_panels::<S, Int6>(job, panels, tiles),
            PackedFormat::Int8Row => compute_panels::<S, Int8Row>(job, panels, tiles),
            PackedFormat::Int8Pairs => unreachable!("opened weights are multiplied in tiles of the processor"),
        }
    }
}

#[inline(always)]
unsafe fn compute_panels<S: Tile, P: Panel>(job: &Job<'_>, panels: Range<usize>, tiles: Range<usize>) {
    let num_groups = if P::QUADS == 0 { 1 } else { job.w.cols() / (4 * P::QUADS) };
    // A constant first: functions for what it rules out are not even compiled.
    if P::OPENS && tiles.len() >= OPEN_TILES {
        // SAFETY: as required of the caller.
        return unsafe { multiply_blocks::<P>(job, panels, tiles, OpenedTiles::<S>(PhantomData)) };
    }
    let first_row = job.tiles.rows(tiles.start).start;
    let end = job.w.panel(panels.end - 1).as_ptr_range().end;
    for panel_index in panels {
        let codes = job.w.panel(panel_index).as_ptr();
        let groups = 0..num_groups;
        let ahead = Ahead { panel: codes, end: end.addr(), next: job.next.cast() };
        let block = Block { panel_index, codes, groups, sums: std::ptr::null_mut(), first_row, ahead: Some(ahead) };
        // SAFETY: the caller has the instruction set; panels and tiles are of this job.
        unsafe { compute_tiles::<S, P>(job, &block, tiles.clone()) };
    }
}

/// Blocks taken apart with the tiles of an instruction set.
struct OpenedTiles<S>(PhantomData<S>);

impl<S: Tile, P: Panel> BlockProduct<P> for OpenedTiles<S> {
    #[inline(always)]
    unsafe fn open(&self, panel: *const u8, groups: Range<usize>, into: *mut u8) {
        // SAFETY: as required of the caller.
        unsafe { S::open::<P>(panel, groups, into) }
    }

    #[inline(always)]
    unsafe fn multiply(&mut self, job: &Job<'_>, block: &Block, tiles: Range<usize>) {
        // SAFETY: as required of the caller.
        unsafe { compute_tiles::<S, Opened<P>>(job, block, tiles) }
    }
}

#[inline(always)]
unsafe fn compute_tiles<S: Tile, P: Panel>(job: &Job<'_>, block: &Block, tiles: Range<usize>) {
    for tile in tiles {
        let rows = job.tiles.rows(tile);
        let first = rows.start;
        // SAFETY: as required of the caller.
        unsafe {
            match rows.len() {
                1 => S::tile::<P, 1>(job, block, first),
                2 => S::tile::<P, 2>(job, block, first),
                3 => S::tile::<P, 3>(job, block, first),
                4 => S::tile::<P, 4>(job, block, first),
                5 => S::tile::<P, 5>(job, block, first),
                6 => S::tile::<P, 6>(job, block, first),
                rows => unreachable!("tiles of {rows} rows"),
            }
        }
    }
}

#[inline(always)]
unsafe fn compute_tile<S: IntSimd, P: Panel, const MR: usize>(job: &Job<'_>, block: &Block, first_row: usize) {
    if MR > S::TILE_ROWS {
        unreachable!("tiles were cut for this instruction set");
    }
    // SAFETY: as required of the caller.
    unsafe {
        if S::TILE_COLS == 2 {
            compute_columns::<S, P, MR, 2>(job, block, first_row, 0);
        } else {
            compute_columns::<S, P, MR, 1>(job, block, first_row, 0);
            compute_columns::<S, P, MR, 1>(job, block, first_row, LANES);
        }
    }
}

/// `MR` rows from `first_row` on times `NR` vectors of a block from feature `first_lane` on.
#[inline(always)]
unsafe fn compute_columns<S: IntSimd, P: Panel, const MR: usize, const NR: usize>(
    job: &Job<'_>,
    block: &Block,
    first_row: usize,
    first_lane: usize,
) {
    let cols = job.w.cols();
    let num_quads = if P::QUADS == 0 { cols.div_ceil(4) } else { P::QUADS };
    let num_groups = if P::QUADS == 0 { 1 } else { cols / (4 * P::QUADS) };
    let ahead = block.ahead.as_ref().filter(|_| first_row == block.first_row && first_lane == 0);
    // Activations of one group: its quads, its scale, two more.
    let scale_lane = num_quads * P::GROUPS;
    // SAFETY: the packed tile holds `lanes_per_row * MR` lanes, the block its groups, and where it is a part, its
    // sums a row of 32 for each row of the unit, written by the block before; the row is one of the job's.
    unsafe {
        let a = job.a.add(first_row * job.lanes_per_row);
        let mut sums = [[S::F::splat(0.0); NR]; MR];
        let at =
            |r: usize, c: usize| block.sums.add((first_row - block.first_row + r) * PANEL + first_lane + c * LANES);
        if P::IS_PART && block.groups.start > 0 {
            for r in 0..MR {
                for c in 0..NR {
                    sums[r][c] = S::F::load(at(r, c));
                }
            }
        }
        for group in block.groups.clone() {
            let a = a.add(group / P::GROUPS * (scale_lane + EXTRA_LANES) * MR);
            let part = group % P::GROUPS;
            let index = if P::IS_PART { group - block.groups.start } else { group };
            let mut dots = [[S::splat(0); NR]; MR];
            if let Some(ahead) = ahead.filter(|_| P::QUADS > 0) {
                for line in group * P::EIGHT_GROUPS_BYTES / 512..(group + 1) * P::EIGHT_GROUPS_BYTES / 512 {
                    prefetch(ahead.at(line * 64));
                }
            }
            for r in 0..MR {
                dots[r] = [S::splat(*a.add((scale_lane + 1 + part) * MR + r)); NR];
            }
            for quad in 0..num_quads {
                if let Some(ahead) = ahead.filter(|_| P::QUADS == 0) {
                    prefetch(ahead.at(quad * QUAD_BYTES));
                    prefetch(ahead.at(quad * QUAD_BYTES + 64));
                }
                let mut w = [S::prepare(S::splat(0)); NR];
                for c in 0..NR {
                    w[c] = S::prepare(P::quad::<S>(block.codes, index, quad, first_lane + c * LANES));
                }
                for r in 0..MR {
                    let x = S::splat_quad(*a.add((part * num_quads + quad) * MR + r));
                    for c in 0..NR {
                        dots[r][c] = S::dot(dots[r][c], w[c], x);
                    }
                }
            }
            let mut scales = [S::F::splat(0.0); NR];
            for c in 0..NR {
                scales[c] = P::scale::<S>(block.codes, index, num_quads, first_lane + c * LANES);
            }
            for r in 0..MR {
                let scale = S::F::splat(f32::from_bits(*a.add(scale_lane * MR + r)));
                for c in 0..NR {
                    sums[r][c] = S::F::fma(S::to_f32(dots[r][c]), S::F::mul(scale, scales[c]), sums[r][c]);
                }
            }
            if P::HAS_MINS {
                let mut mins = [S::F::splat(0.0); NR];
                for c in 0..NR {
                    mins[c] = P::min::<S>(block.codes, index, first_lane + c * LANES);
                }
                for r in 0..MR {
                    let sum = S::F::splat(f32::from_bits(*a.add((scale_lane + 2) * MR + r)));
                    for c in 0..NR {
                        sums[r][c] = S::F::fma(sum, mins[c], sums[r][c]);
                    }
                }
            }
        }
        for r in 0..MR {
            for c in 0..NR {
                if P::IS_PART && block.groups.end < num_groups {
                    S::F::store(at(r, c), sums[r][c]);
                } else {
                    let column = block.panel_index * PANEL + first_lane + c * LANES;
                    job.out.put_lanes::<S::F>(first_row + r, column, sums[r][c]);
                }
            }
        }
    }
}
