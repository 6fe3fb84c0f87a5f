//! The product of activations with a quantized weight matrix.
//!
//! ```text
//! x [m, k]  --quantize, pack-->  a, tiles of up to 6 rows: [tile][group][quads + 3][rows of the tile]
//! w panels, see `packed`
//! unit of work = some tiles x some panels, as in `matmul`; tile x panel = 6 x 2 vectors of 16 sums
//! ```
//!
//! Each of the 6 x 2 vectors needs two registers, the integer sum of a group and the f32 sum of all before:
//! 12 x 1 would need as many and read every weight twice as often from the first-level cache.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // row r, column c: the shapes of the drawing

use std::ops::Range;

use super::activations::{EXTRA_LANES, Group, lanes_per_row, pack_rows};
use super::packed::{PackedFormat, QuantizedMatrix};
use crate::ctx::{Columns, Ctx};
use crate::isa::{Isa, Kind};
use crate::matmul::{Output, Tiles, UnitShape, run_units, with_packed_buffer};
use crate::packed_matrix::PANEL;
use crate::simd::vectorised;

/// Columns `columns` of `out[m, columns.stride]` become `x[m, k] * w^T`, plus `bias[n]` where given, plus what
/// they were where `add` (the residual).
///
/// `x` is `[m, w.cols()]`, row-major f32, and is rounded to 8 bits in groups of 32 (of a whole row if the
/// weights have one scale per row). Each row's bits depend on that row alone. Order: see
/// [`numerics`](crate::numerics).
#[allow(clippy::too_many_arguments)]
pub fn matmul_quantized(
    ctx: &Ctx<'_>,
    x: &[f32],
    m: usize,
    w: &QuantizedMatrix,
    bias: Option<&[f32]>,
    add: bool,
    out: &mut [f32],
    columns: Columns,
) {
    let (k, format) = (w.cols(), w.format());
    assert_eq!(x.len(), m * k, "activations of [{m}, {k}]");
    columns.check("output", out, m, w.rows());
    assert!(bias.is_none_or(|bias| bias.len() == w.rows()), "a bias of {} values", w.rows());
    if m == 0 || w.rows() == 0 {
        return;
    }
    let tiles = Tiles::of(m, tile_rows(ctx.isa));
    let lanes_per_row = lanes_per_row(k, format);
    with_packed_buffer(m * lanes_per_row, |packed| {
        pack_activations(ctx, x, &tiles, w, packed);
        let out =
            Output { bias, add, start: out[columns.first..].as_mut_ptr(), stride: columns.stride, width: w.rows() };
        let job = Job { x, a: packed.as_ptr(), lanes_per_row, tiles, w, out };
        let shape = UnitShape { m, rows: w.rows(), cols: k, panel_bytes: format.panel_bytes(k) };
        let (job, isa) = (&job, ctx.isa);
        run_units(ctx, &shape, &job.tiles, &|panels, tiles| compute(isa, job, panels, tiles));
    });
}

/// The specification: one output before bias and residual, from one row of f32.
fn reference(x: &[f32], w: &QuantizedMatrix, column: usize) -> f32 {
    let format = w.format();
    let (group, activation_group) = (format.group(x.len()), format.activation_group(x.len()));
    let mut y = 0.0f32;
    for (index, values) in x.chunks(activation_group).enumerate() {
        let scale = Group::of(values);
        for (part, values) in values.chunks(group).enumerate() {
            let (mut dot, mut sum) = (0i32, 0i32);
            for (offset, x) in values.iter().enumerate() {
                let q = scale.quantize(*x);
                dot += q * w.weight(column, index * activation_group + part * group + offset);
                sum += q;
            }
            let index = index * (activation_group / group) + part;
            y = (dot as f32).mul_add(scale.scale * w.scale(column, index), y);
            if let Some(min) = w.min(column, index) {
                y = (-(scale.scale * sum as f32)).mul_add(min, y);
            }
        }
    }
    y
}

/// What all units of one product share. Units write disjoint parts of the output.
struct Job<'a> {
    x: &'a [f32],
    /// Packed activations; the tile of first row r starts at `r * lanes_per_row`.
    a: *const u32,
    lanes_per_row: usize,
    tiles: Tiles,
    w: &'a QuantizedMatrix,
    out: Output<'a>,
}

// SAFETY: `a` is only read while the job lives; units write disjoint (tile, panel) rectangles of the output,
// which `matmul_quantized` borrows exclusively.
unsafe impl Sync for Job<'_> {}

fn tile_rows(isa: Isa) -> usize {
    match isa.0 {
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => 2,
        _ => 6,
    }
}

/// Fills `packed` with the tiles of `x`; over the pool when it is worth it.
fn pack_activations(ctx: &Ctx<'_>, x: &[f32], tiles: &Tiles, w: &QuantizedMatrix, packed: &mut [u32]) {
    struct Shared(*mut u32);
    // SAFETY: tiles write disjoint ranges of the buffer.
    unsafe impl Sync for Shared {}
    if ctx.isa == Isa::PORTABLE {
        return; // the reference reads x itself
    }
    let (k, format) = (w.cols(), w.format());
    let lanes_per_row = lanes_per_row(k, format);
    assert_eq!(packed.len(), x.len() / k * lanes_per_row);
    let shared = Shared(packed.as_mut_ptr());
    let (shared, isa) = (&shared, ctx.isa);
    let pack_tile = |tile: usize| {
        let rows = tiles.rows(tile);
        let x = &x[rows.start * k..rows.end * k];
        // SAFETY: the range of this tile, inside the buffer.
        let into = unsafe {
            std::slice::from_raw_parts_mut(shared.0.add(rows.start * lanes_per_row), rows.len() * lanes_per_row)
        };
        vectorised!(isa, pack_rows(x: &[f32], k: usize, format: PackedFormat, into: &mut [u32]));
    };
    if x.len() < 1 << 14 {
        (0..tiles.count).for_each(pack_tile);
    } else {
        ctx.pool.run(ctx.priority, tiles.count, &pack_tile);
    }
}

fn reference_unit(job: &Job<'_>, panels: Range<usize>, tiles: Range<usize>) {
    let (n, k) = (job.w.rows(), job.w.cols());
    for row in job.tiles.rows(tiles.start).start..job.tiles.rows(tiles.end - 1).end {
        for column in panels.start * PANEL..(panels.end * PANEL).min(n) {
            let y = reference(&job.x[row * k..][..k], job.w, column);
            // SAFETY: inside the output, in this unit's rectangle.
            unsafe { job.out.put(row, column, y) };
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn compute(_isa: Isa, job: &Job<'_>, panels: Range<usize>, tiles: Range<usize>) {
    reference_unit(job, panels, tiles);
}

#[cfg(target_arch = "x86_64")]
fn compute(isa: Isa, job: &Job<'_>, panels: Range<usize>, tiles: Range<usize>) {
    use fast::{avx2, avx512, vnni};
    // SAFETY: an `Isa` exists only for instruction sets of this machine.
    unsafe {
        match isa.0 {
            Kind::Portable => reference_unit(job, panels, tiles),
            Kind::Avx2 => avx2(job, panels, tiles),
            Kind::Avx512 => avx512(job, panels, tiles),
            Kind::Avx512Vnni | Kind::Avx512Bf16 => vnni(job, panels, tiles),
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod fast {
    use super::super::packed::{
        INT4_BYTES, INT4_MIN_BYTES, INT6_BYTES, INT8_BYTES, QUAD_BYTES, int4_min_group, int6_part,
    };
    use super::super::simd::{IntSimd, Vnni};
    use super::{EXTRA_LANES, Job, PANEL, PackedFormat, Range};
    use crate::numerics::LANES;
    use crate::simd::{Avx2, Avx512, Simd};

    /// Instruction sets, each with a function of its own for every panel format and number of rows: one function for
    /// all of them takes a compiler minutes.
    trait Tile: IntSimd + Sized {
        unsafe fn tile<P: Panel, const MR: usize>(job: &Job<'_>, panel: usize, first_row: usize);
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
                unsafe fn tile<P: Panel, const MR: usize>(job: &Job<'_>, panel: usize, first_row: usize) {
                    #[inline(never)]
                    #[target_feature(enable = $features)]
                    unsafe fn tile<P: Panel, const MR: usize>(job: &Job<'_>, panel: usize, first_row: usize) {
                        // SAFETY: as required of the caller.
                        unsafe { compute_tile::<$simd, P, MR>(job, panel, first_row) }
                    }
                    // SAFETY: as required of the caller.
                    unsafe { tile::<P, MR>(job, panel, first_row) }
                }
            }
        };
    }

    instruction_set!(avx2, Avx2, "avx2,fma,f16c");
    instruction_set!(avx512, Avx512, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl");
    instruction_set!(vnni, Vnni, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni");

    /// How a panel format is read: 16 lanes from feature `lane` of the panel on.
    ///
    /// # Safety
    /// As for [`IntSimd`]; `panel` is a whole panel of the format, the group one of its groups.
    trait Panel {
        /// Quads of a group of weights; 0 if the group is the whole row.
        const QUADS: usize;
        /// Groups of weights to a group of activations.
        const GROUPS: usize;
        const HAS_MINS: bool;
        unsafe fn quad<S: IntSimd>(panel: *const u8, group: usize, quad: usize, lane: usize) -> S::I;
        unsafe fn scale<S: IntSimd>(panel: *const u8, group: usize, num_quads: usize, lane: usize)
        -> <S::F as Simd>::V;
        unsafe fn min<S: IntSimd>(_panel: *const u8, _group: usize, _lane: usize) -> <S::F as Simd>::V {
            // SAFETY: as required of the caller.
            unsafe { S::F::splat(0.0) }
        }
    }

    /// 16 lanes of quad `quad` of 32, from nibbles.
    #[inline(always)]
    unsafe fn nibbles<S: IntSimd>(start: *const u8, quad: usize, lane: usize) -> S::I {
        // SAFETY: as required of the caller.
        unsafe {
            let lanes = S::load(start.add(quad % 4 * QUAD_BYTES + lane * 4));
            S::and(S::shift_right(lanes, (quad / 4 * 4) as u32), 0x0f0f_0f0f)
        }
    }

    struct Int8;

    impl Panel for Int8 {
        const QUADS: usize = 8;
        const GROUPS: usize = 1;
        const HAS_MINS: bool = false;

        #[inline(always)]
        unsafe fn quad<S: IntSimd>(panel: *const u8, group: usize, quad: usize, lane: usize) -> S::I {
            // SAFETY: as required of the caller.
            unsafe { S::load(panel.add(group * INT8_BYTES + quad * QUAD_BYTES + lane * 4)) }
        }
        #[inline(always)]
        unsafe fn scale<S: IntSimd>(panel: *const u8, group: usize, _: usize, lane: usize) -> <S::F as Simd>::V {
            // SAFETY: as required of the caller.
            unsafe { S::load_f16(panel.add(group * INT8_BYTES + 8 * QUAD_BYTES + lane * 2)) }
        }
    }

    struct Int4;

    impl Panel for Int4 {
        const QUADS: usize = 8;
        const GROUPS: usize = 1;
        const HAS_MINS: bool = false;

        #[inline(always)]
        unsafe fn quad<S: IntSimd>(panel: *const u8, group: usize, quad: usize, lane: usize) -> S::I {
            // SAFETY: as required of the caller.
            unsafe { nibbles::<S>(panel.add(group * INT4_BYTES), quad, lane) }
        }
        #[inline(always)]
        unsafe fn scale<S: IntSimd>(panel: *const u8, group: usize, _: usize, lane: usize) -> <S::F as Simd>::V {
            // SAFETY: as required of the caller.
            unsafe { S::load_f16(panel.add(group * INT4_BYTES + 4 * QUAD_BYTES + lane * 2)) }
        }
    }

    struct Int4Min;

    impl Panel for Int4Min {
        const QUADS: usize = 8;
        const GROUPS: usize = 1;
        const HAS_MINS: bool = true;

        #[inline(always)]
        unsafe fn quad<S: IntSimd>(panel: *const u8, group: usize, quad: usize, lane: usize) -> S::I {
            // SAFETY: as required of the caller.
            unsafe { nibbles::<S>(panel.add(int4_min_group(group)), quad, lane) }
        }
        #[inline(always)]
        unsafe fn scale<S: IntSimd>(panel: *const u8, group: usize, _: usize, lane: usize) -> <S::F as Simd>::V {
            // SAFETY: as required of the caller.
            unsafe {
                let block = S::load_f16(panel.add(group / 8 * INT4_MIN_BYTES + lane * 2));
                let small = S::load_u8(panel.add(int4_min_group(group) + 4 * QUAD_BYTES + lane));
                S::F::mul(block, S::to_f32(small))
            }
        }
        #[inline(always)]
        unsafe fn min<S: IntSimd>(panel: *const u8, group: usize, lane: usize) -> <S::F as Simd>::V {
            // SAFETY: as required of the caller.
            unsafe {
                let block = S::load_f16(panel.add(group / 8 * INT4_MIN_BYTES + PANEL * 2 + lane * 2));
                let small = S::load_u8(panel.add(int4_min_group(group) + 4 * QUAD_BYTES + PANEL + lane));
                S::F::mul(block, S::to_f32(small))
            }
        }
    }

    struct Int6;

    impl Panel for Int6 {
        const QUADS: usize = 4;
        const GROUPS: usize = 2;
        const HAS_MINS: bool = false;

        #[inline(always)]
        unsafe fn quad<S: IntSimd>(panel: *const u8, group: usize, quad: usize, lane: usize) -> S::I {
            // SAFETY: as required of the caller.
            unsafe {
                let (start, quad) = (panel.add(int6_part(group / 2)), group % 2 * 4 + quad);
                let high = S::load(start.add((4 + quad % 2) * QUAD_BYTES + lane * 4));
                let high = S::and(S::shift_right(high, (quad / 2 * 2) as u32), 0x0303_0303);
                S::or(nibbles::<S>(start, quad, lane), S::shift_left(high, 4))
            }
        }
        #[inline(always)]
        unsafe fn scale<S: IntSimd>(panel: *const u8, group: usize, _: usize, lane: usize) -> <S::F as Simd>::V {
            // SAFETY: as required of the caller.
            unsafe {
                let block = S::load_f16(panel.add(group / 16 * INT6_BYTES + lane * 2));
                let start = int6_part(group / 2) + 6 * QUAD_BYTES + group % 2 * PANEL;
                S::F::mul(block, S::to_f32(S::load_i8(panel.add(start + lane))))
            }
        }
    }

    struct Int8Row;

    impl Panel for Int8Row {
        const QUADS: usize = 0;
        const GROUPS: usize = 1;
        const HAS_MINS: bool = false;

        #[inline(always)]
        unsafe fn quad<S: IntSimd>(panel: *const u8, _: usize, quad: usize, lane: usize) -> S::I {
            // SAFETY: as required of the caller.
            unsafe { S::load(panel.add(quad * QUAD_BYTES + lane * 4)) }
        }
        #[inline(always)]
        unsafe fn scale<S: IntSimd>(panel: *const u8, _: usize, num_quads: usize, lane: usize) -> <S::F as Simd>::V {
            // SAFETY: as required of the caller.
            unsafe { S::F::load(panel.add(num_quads * QUAD_BYTES + lane * 4).cast()) }
        }
    }

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
            }
        }
    }

    #[inline(always)]
    unsafe fn compute_panels<S: Tile, P: Panel>(job: &Job<'_>, panels: Range<usize>, tiles: Range<usize>) {
        for panel in panels {
            for tile in tiles.clone() {
                let rows = job.tiles.rows(tile);
                let first = rows.start;
                // SAFETY: the caller has the instruction set; panel and tile are of this job.
                unsafe {
                    match rows.len() {
                        1 => S::tile::<P, 1>(job, panel, first),
                        2 => S::tile::<P, 2>(job, panel, first),
                        3 => S::tile::<P, 3>(job, panel, first),
                        4 => S::tile::<P, 4>(job, panel, first),
                        5 => S::tile::<P, 5>(job, panel, first),
                        6 => S::tile::<P, 6>(job, panel, first),
                        _ => unreachable!("tiles have 1 to 6 rows"),
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn compute_tile<S: IntSimd, P: Panel, const MR: usize>(job: &Job<'_>, panel: usize, first_row: usize) {
        if MR > S::TILE_ROWS {
            unreachable!("tiles were cut for this instruction set");
        }
        // SAFETY: as required of the caller.
        unsafe {
            if S::TILE_COLS == 2 {
                compute_columns::<S, P, MR, 2>(job, panel, first_row, 0);
            } else {
                compute_columns::<S, P, MR, 1>(job, panel, first_row, 0);
                compute_columns::<S, P, MR, 1>(job, panel, first_row, LANES);
            }
        }
    }

    /// `MR` rows from `first_row` on times `NR` vectors of a panel from feature `first_lane` on.
    #[inline(always)]
    unsafe fn compute_columns<S: IntSimd, P: Panel, const MR: usize, const NR: usize>(
        job: &Job<'_>,
        panel_index: usize,
        first_row: usize,
        first_lane: usize,
    ) {
        let cols = job.w.cols();
        let panel = job.w.panel(panel_index).as_ptr();
        let num_quads = if P::QUADS == 0 { cols.div_ceil(4) } else { P::QUADS };
        let num_groups = if P::QUADS == 0 { 1 } else { cols / (4 * P::QUADS) };
        // Activations of one group: its quads, its scale, two more.
        let scale_lane = num_quads * P::GROUPS;
        // SAFETY: the packed tile holds `lanes_per_row * MR` lanes, the panel all its groups; the row is one of
        // the job's.
        unsafe {
            let a = job.a.add(first_row * job.lanes_per_row);
            let mut sums = [[S::F::splat(0.0); NR]; MR];
            for group in 0..num_groups {
                let a = a.add(group / P::GROUPS * (scale_lane + EXTRA_LANES) * MR);
                let part = group % P::GROUPS;
                let mut dots = [[S::splat(0); NR]; MR];
                for r in 0..MR {
                    dots[r] = [S::splat(*a.add((scale_lane + 1 + part) * MR + r)); NR];
                }
                for quad in 0..num_quads {
                    let mut w = [S::prepare(S::splat(0)); NR];
                    for c in 0..NR {
                        w[c] = S::prepare(P::quad::<S>(panel, group, quad, first_lane + c * LANES));
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
                    scales[c] = P::scale::<S>(panel, group, num_quads, first_lane + c * LANES);
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
                        mins[c] = P::min::<S>(panel, group, first_lane + c * LANES);
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
                    let column = panel_index * PANEL + first_lane + c * LANES;
                    job.out.put_lanes::<S::F>(first_row + r, column, sums[r][c]);
                }
            }
        }
    }
}
