//! The product in tile registers of the processor.
//!
//! ```text
//! Int8Row   sums of integers over all of k in tiles, as bf16 has them, see `tile_product`; then the scales
//! Int8Pairs opened to bf16, and multiplied as that, see `opening`
//! 4 bits    512 k of a panel are taken apart into the first-level cache, codes as signed bytes; all tiles of the unit
//!           pass over them. Per group a product of up to 14 rows x 32 columns goes through memory into vectors, to be
//!           scaled and added up in 28 registers, while tiles have the next group.
//! ```
//!
//! Where groups have scales, every product of a group is stored (16 cycles, in which a core begins nothing else) and
//! scaled (one f32 vector a cycle instead of two while tiles are in use), which takes three times as long as the
//! product. So VNNI has the same bits as soon or sooner where it need not take codes apart, see [`rows_min`].
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // row r, column c: the shapes of the drawing

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::activations::{BLOCK_EXTRA_LANES, BLOCK_GROUPS, BLOCK_LANES, GROUP_LANES};
use super::blocks::{Block, BlockProduct, multiply_blocks};
use super::opening::open_int8;
use super::packed::{INT8_BYTES, PackedFormat, QUAD_BYTES, QuantizedMatrix};
use super::panels::{Int4, Int4Min, Opened, Panel};
use super::product::Job;
use super::simd::{IntSimd, Vnni};
use crate::amx::{ConfiguredByRows, TILE_ROWS, dot_group, group_shapes};
use crate::numerics::{LANES, TILE_STEPS};
use crate::packed_matrix::PANEL;
use crate::pages::{Kept, lend};
use crate::simd::{Avx512Bf16 as Floats, Simd};
use crate::tile_product::{RowSums, TilePanels, finish_floats, multiply_tiles, scratch_bytes};

/// Rows of a tile at most where groups have scales: 28 sums, two scales and what is on its way fill 32 registers.
const GROUP_ROWS: usize = 14;

/// From so many rows on tiles are faster than VNNI, if they are at all. The product of 512 rows with 2048 x 3072
/// weights takes 0.34 of the time in `Int8Row` and 0.75 to 0.9 of it in 4 bits. It took 1.1 times as long in `Int6`,
/// which has a scale for 16 k; `Int8Pairs` has no other way.
pub(super) fn rows_min(format: PackedFormat) -> Option<usize> {
    match format {
        // Up to 6 rows are one tile of VNNI, which waits for memory.
        PackedFormat::Int8Row => Some(7),
        PackedFormat::Int8Pairs => Some(1),
        PackedFormat::Int4 | PackedFormat::Int4Min => Some(GROUP_ROWS + 2),
        PackedFormat::Int6 | PackedFormat::Int8 => None,
    }
}

/// Rows of a tile at most.
pub(super) fn tile_rows(format: PackedFormat) -> usize {
    match format {
        PackedFormat::Int8Row | PackedFormat::Int8Pairs => 2 * TILE_ROWS,
        _ => GROUP_ROWS,
    }
}

thread_local! {
    /// Of a unit in blocks of lanes: a part that is opened, and sums.
    static SCRATCH: Kept = const { Cell::new(None) };
}

/// A unit of a product: `panels` for the rows of `tiles`.
///
/// # Safety
/// The machine has tiles, and the operand is packed for them.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn amx(job: &Job<'_>, panels: Range<usize>, tiles: Range<usize>) {
    let format = job.w.format();
    // SAFETY: as required of the caller; the panel type is that of the format.
    unsafe {
        match format {
            PackedFormat::Int8Row => multiply_panels::<RowPanels>(job, panels, tiles),
            PackedFormat::Int8Pairs => multiply_panels::<OpenedPanels>(job, panels, tiles),
            PackedFormat::Int4 => multiply_blocks::<Int4>(job, panels, tiles, GroupTiles::new::<Int4>(format)),
            PackedFormat::Int4Min => multiply_blocks::<Int4Min>(job, panels, tiles, GroupTiles::new::<Int4Min>(format)),
            PackedFormat::Int8 | PackedFormat::Int6 => {
                unreachable!("no operand is packed for tiles of {format:?}")
            }
        }
    }
}

#[inline(always)]
unsafe fn multiply_panels<P: TilePanels<Matrix = QuantizedMatrix>>(
    job: &Job<'_>,
    panels: Range<usize>,
    tiles: Range<usize>,
) {
    lend(&SCRATCH, scratch_bytes(job.tiles.rows_max() * tiles.len(), panels.len()), |scratch| {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        unsafe fn in_tiles<P: TilePanels<Matrix = QuantizedMatrix>>(
            job: &Job<'_>,
            panels: Range<usize>,
            tiles: Range<usize>,
            scratch: *mut u32,
        ) {
            // SAFETY: as required of the caller.
            unsafe { multiply_tiles::<P>(job, panels, tiles, scratch) }
        }
        // SAFETY: as required of the caller; the scratch is that of the unit.
        unsafe { in_tiles::<P>(job, panels, tiles, scratch.cast()) }
    });
}

/// Of [`PackedFormat::Int8Pairs`].
struct OpenedPanels;

impl TilePanels for OpenedPanels {
    type Matrix = QuantizedMatrix;
    const BYTES: bool = false;
    const BLOCK_BYTES: usize = INT8_BYTES;
    const OPENS: bool = true;

    fn num_blocks(w: &QuantizedMatrix) -> usize {
        w.cols() / (2 * TILE_STEPS)
    }

    fn panel(w: &QuantizedMatrix, panel: usize) -> *const u8 {
        w.panel(panel).as_ptr()
    }

    #[inline(always)]
    unsafe fn open(from: *const u8, num_blocks: usize, into: *mut u32, ahead: *const u8) {
        // SAFETY: as required of the caller.
        unsafe { open_int8(from, num_blocks, into, ahead) }
    }

    #[inline(always)]
    unsafe fn finish(job: &Job<'_>, panels: Range<usize>, _: &Range<usize>, row: usize, sums: RowSums) {
        // SAFETY: as required of the caller.
        unsafe { finish_floats(job, panels, row, sums) }
    }
}

/// Of [`PackedFormat::Int8Row`]. Where k is no multiple of 64 the last block has bytes of the scales and zeros in it,
/// which meet activations that are 0.
struct RowPanels;

impl TilePanels for RowPanels {
    type Matrix = QuantizedMatrix;
    const BYTES: bool = true;

    fn num_blocks(w: &QuantizedMatrix) -> usize {
        w.cols().div_ceil(64)
    }

    fn panel(w: &QuantizedMatrix, panel: usize) -> *const u8 {
        w.panel(panel).as_ptr()
    }

    #[inline(always)]
    unsafe fn finish(job: &Job<'_>, panels: Range<usize>, rows: &Range<usize>, row: usize, sums: RowSums) {
        // SAFETY: as required of the caller; scales lie behind the quads of a panel and the blocks of the tile.
        unsafe {
            let extras = job.a.add(rows.start * job.lanes_per_row + RowPanels::num_blocks(job.w) * 16 * rows.len());
            let extras = extras.add(row - rows.start);
            let (scale, start) = (Floats::splat(f32::from_bits(*extras)), Vnni::splat(*extras.add(rows.len())));
            let quads_bytes = job.w.cols().div_ceil(4) * QUAD_BYTES;
            for (index, panel) in panels.enumerate() {
                let scales = job.w.panel(panel).as_ptr().add(quads_bytes).cast::<f32>();
                for column in [0, LANES] {
                    let dots = <Vnni as IntSimd>::load(sums.of(index).add(column).cast());
                    let dots = Vnni::to_f32(Vnni::add(dots, start));
                    let y = Floats::fma(dots, Floats::mul(scale, Floats::load(scales.add(column))), Floats::splat(0.0));
                    job.out.put_lanes::<Floats>(row, panel * PANEL + column, y);
                }
            }
        }
    }
}

/// Blocks of groups with scales, codes less what stands for zero.
struct GroupTiles {
    configured: ConfiguredByRows,
    zero: u8,
}

impl GroupTiles {
    fn new<P: Panel>(format: PackedFormat) -> GroupTiles {
        let configured = ConfiguredByRows::new(|num_rows| group_shapes(num_rows, 4 * P::QUADS));
        GroupTiles { configured, zero: format.offset() as u8 }
    }
}

impl<P: Panel> BlockProduct<P> for GroupTiles {
    #[inline(always)]
    unsafe fn open(&self, panel: *const u8, groups: Range<usize>, into: *mut u8) {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        unsafe fn open<P: Panel>(panel: *const u8, groups: Range<usize>, zero: u8, into: *mut u8) {
            // SAFETY: as required of the caller.
            unsafe { Opened::<P>::fill::<Vnni>(panel, groups, zero, into) }
        }
        // SAFETY: as required of the caller.
        unsafe { open::<P>(panel, groups, self.zero, into) }
    }

    #[inline(always)]
    unsafe fn multiply(&mut self, job: &Job<'_>, block: &Block, tiles: Range<usize>) {
        for tile in tiles {
            let rows = job.tiles.rows(tile);
            let first = rows.start;
            // SAFETY: as required of the caller; no other configuration is alive.
            unsafe {
                self.configured.set(rows.len());
                match rows.len() {
                    8 => multiply_group_rows::<P, 8>(job, block, first),
                    9 => multiply_group_rows::<P, 9>(job, block, first),
                    10 => multiply_group_rows::<P, 10>(job, block, first),
                    11 => multiply_group_rows::<P, 11>(job, block, first),
                    12 => multiply_group_rows::<P, 12>(job, block, first),
                    13 => multiply_group_rows::<P, 13>(job, block, first),
                    14 => multiply_group_rows::<P, 14>(job, block, first),
                    rows => unreachable!("16 rows or more make tiles of 8 to 14, and not {rows}"),
                }
            }
        }
    }
}

/// Products of the rows of a tile with a panel, of one group.
#[repr(align(64))]
struct Dots<const MR: usize>([[i32; PANEL]; MR]);

/// `MR` rows from `first_row` on times the groups of a block.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn multiply_group_rows<P: Panel, const MR: usize>(job: &Job<'_>, block: &Block, first_row: usize) {
    const VECTORS: usize = PANEL / LANES;
    let num_groups = job.w.cols() / (4 * P::QUADS);
    // Of the group that is added up and of the one that is multiplied.
    let mut dots = [const { MaybeUninit::<Dots<MR>>::uninit() }; 2];
    // SAFETY: the packed tile holds blocks of 8 groups, the block its groups, and where it is a part, its sums a row of
    // 32 for each row of the unit, written by the block before; the row is one of the job's.
    unsafe {
        let a = job.a.add(first_row * job.lanes_per_row);
        // Where the block of a group is, and which of its groups it is in.
        let place = |group: usize| {
            let index = group / P::GROUPS;
            (a.add(index / BLOCK_GROUPS * BLOCK_LANES * MR), index % BLOCK_GROUPS)
        };
        let mut sums = [[Floats::splat(0.0); VECTORS]; MR];
        let at = {
            let start = block.sums.add((first_row - block.first_row) * PANEL);
            move |r: usize, c: usize| start.add(r * PANEL + c * LANES)
        };
        if block.groups.start > 0 {
            for r in 0..MR {
                for c in 0..VECTORS {
                    sums[r][c] = Floats::load(at(r, c));
                }
            }
        }
        let start = block.groups.start;
        macro_rules! multiply {
            ($group:expr, $place:expr) => {{
                let group = $group;
                let (a, index) = place(group);
                let a = a.add(index * GROUP_LANES * MR + group % P::GROUPS * P::QUADS);
                let b = block.codes.add((group - start) * Opened::<P>::GROUP_BYTES);
                dot_group(a.cast(), b, dots[$place % 2].as_mut_ptr().cast());
            }};
        }
        multiply!(start, start);
        for group in block.groups.clone() {
            // The last one once more: a branch here would have the compiler keep sums in memory.
            multiply!((group + 1).min(block.groups.end - 1), group + 1);
            let (a, index) = place(group);
            let extras = a.add((BLOCK_GROUPS * GROUP_LANES + index * BLOCK_EXTRA_LANES) * MR).cast::<f32>();
            let dots = dots[group % 2].as_ptr().cast::<u8>();
            let mut scales = [Floats::splat(0.0); VECTORS];
            for c in 0..VECTORS {
                scales[c] = Opened::<P>::scale::<Vnni>(block.codes, group - start, P::QUADS, c * LANES);
            }
            for r in 0..MR {
                let scale = Floats::splat(*extras.add(r));
                for c in 0..VECTORS {
                    let dots = Vnni::to_f32(<Vnni as IntSimd>::load(dots.add((r * PANEL + c * LANES) * 4)));
                    sums[r][c] = Floats::fma(dots, Floats::mul(scale, scales[c]), sums[r][c]);
                }
            }
            if P::HAS_MINS {
                let mut mins = [Floats::splat(0.0); VECTORS];
                for c in 0..VECTORS {
                    mins[c] = Opened::<P>::min::<Vnni>(block.codes, group - start, c * LANES);
                }
                for r in 0..MR {
                    let sum = Floats::splat(*extras.add(MR + r));
                    for c in 0..VECTORS {
                        sums[r][c] = Floats::fma(sum, mins[c], sums[r][c]);
                    }
                }
            }
        }
        // To memory first in any case: what is done with outputs would keep the compiler from having sums in registers.
        for r in 0..MR {
            for c in 0..VECTORS {
                Floats::store(at(r, c), sums[r][c]);
            }
        }
        if block.groups.end == num_groups {
            for r in 0..MR {
                for c in 0..VECTORS {
                    let y = Floats::load(at(r, c));
                    job.out.put_lanes::<Floats>(first_row + r, block.panel_index * PANEL + c * LANES, y);
                }
            }
        }
    }
}
