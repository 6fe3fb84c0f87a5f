//! The product of activations with a packed weight matrix.
//!
//! ```text
//! x [m, k]  --pack-->  a, tiles of up to 12 rows: [tile][depth][rows of the tile]   (depth = k or k/2; a bf16
//!                      pair is one lane, or two where the instruction set multiplies f32 alone)
//! w panels [n/32][depth][32]
//! unit of work = some tiles x some panels; tile x panel = 12 x 2 vectors of 16 accumulators in registers
//! ```
//!
//! A unit takes its panels one after another, and each in blocks of steps that stay in the first-level cache while
//! the tiles stream past from the second-level cache; the sums wait in memory for the next block, which comes nearer
//! meanwhile. So weights come from memory once. Units share outputs, never k.
//!
//! Where the processor has tile registers, bf16 is multiplied in these (`tile_product`): a tile is up to 32 rows then,
//! of which `a` has 16 pairs at a time, `[tile][depth/16][rows of the tile][16]`.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // row r, column c: the shapes of the drawing

use std::cell::Cell;
use std::ops::Range;

use crate::ctx::Ctx;
use crate::isa::{Isa, Kind};
use crate::numerics::{LANES, Order, TILE_STEPS, bf16_pair, round_bf16};
use crate::operand::Operand;
use crate::packed_matrix::{PANEL, PackedMatrix, WeightDtype};
use crate::pages::{Kept, lend};
use crate::product::{MatrixRef, Product, multiply};
#[cfg(target_arch = "x86_64")]
use crate::simd::Avx512Bf16;
use crate::simd::{Simd, fold_tile, with_simd};
#[cfg(target_arch = "x86_64")]
use crate::tile_product::{RowSums, TilePanels, finish_floats, multiply_tiles, scratch_bytes};

/// Steps of a block: 16 KiB of a panel.
const BLOCK_STEPS: usize = 128;

/// `out[m, n] = x[m, k] * w^T`, plus `bias[n]` where given, plus `out` itself where `add` (the residual).
///
/// `x` is `[m, w.cols()]` and `out` `[m, w.rows()]`, row-major f32. With bf16 weights `x` is rounded to
/// bf16. Each row's bits depend on that row alone. Order: see [`numerics`](crate::numerics).
pub fn matmul(ctx: &Ctx<'_>, x: &[f32], m: usize, w: &PackedMatrix, bias: Option<&[f32]>, add: bool, out: &mut [f32]) {
    assert_eq!(x.len(), m * w.cols(), "activations of [{m}, {}]", w.cols());
    let sections = [Some(MatrixRef::Float(w)), None, None];
    multiply(ctx, &Product { operand: Operand::Rows(x), sections, bias, add }, out);
}

type Job<'a> = crate::product::Job<'a, PackedMatrix>;

/// A unit of a product: `panels` for the rows of `tiles`.
pub(crate) fn compute(isa: Isa, job: &Job<'_>, panels: Range<usize>, tiles: Range<usize>) {
    let num_rows = job.tiles.rows_max() * tiles.len();
    #[cfg(target_arch = "x86_64")]
    if multiplies_tiles(isa, job.w.dtype()) {
        #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
        unsafe fn amx(job: &Job<'_>, panels: Range<usize>, tiles: Range<usize>, scratch: *mut u32) {
            // SAFETY: as required of the caller.
            unsafe { multiply_tiles::<FloatPanels>(job, panels, tiles, scratch) }
        }
        return lend(&SUMS, scratch_bytes(num_rows, panels.len()).max(2 << 20), |scratch| {
            // SAFETY: an `Isa` exists only for instruction sets of this machine; the scratch is that of the unit.
            unsafe { amx(job, panels, tiles, scratch.cast()) }
        });
    }
    lend(&SUMS, (num_rows * PANEL * 4).max(2 << 20), |sums| {
        let sums = sums.cast::<f32>();
        with_simd!(
            isa,
            compute_unit(job: &Job<'_>, panels: Range<usize>, tiles: Range<usize>, sums: *mut f32),
            else reference_unit(isa.order(), job, panels, tiles)
        );
    });
}

/// The specification: one output before bias and residual.
fn reference(order: Order, x: &[f32], w: &PackedMatrix, column: usize) -> f32 {
    let weights = w.panel(column / PANEL)[column % PANEL..].iter().step_by(PANEL).copied();
    match w.dtype() {
        WeightDtype::F32 => x.iter().zip(weights).fold(0.0, |y, (x, weight)| x.mul_add(f32::from_bits(weight), y)),
        WeightDtype::Bf16 => {
            let pairs = x.chunks(2).map(|pair| bf16_pair(pair[0], pair.get(1).copied().unwrap_or(0.0)));
            order.fold(0.0, TILE_STEPS, pairs.zip(weights))
        }
    }
}

/// Whether tiles of the processor multiply matrices of this type.
pub(crate) fn multiplies_tiles(isa: Isa, dtype: WeightDtype) -> bool {
    isa.order() == Order::Tiles && !isa.is_reference() && dtype == WeightDtype::Bf16
}

/// Rows of a tile at most.
pub(crate) fn tile_rows(isa: Isa, dtype: WeightDtype) -> usize {
    match isa.0 {
        Kind::Portable | Kind::PortableTiles => 12,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => crate::simd::Avx2::TILE_ROWS,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 | Kind::Avx512Vnni => crate::simd::Avx512::TILE_ROWS,
        #[cfg(target_arch = "x86_64")]
        Kind::Amx if multiplies_tiles(isa, dtype) => 2 * crate::amx::TILE_ROWS,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512Bf16 | Kind::Amx => Avx512Bf16::TILE_ROWS,
    }
}

/// Lanes of a bf16 pair of a packed row.
pub(crate) fn pair_lanes(isa: Isa) -> usize {
    match isa.0 {
        Kind::Portable | Kind::PortableTiles => 1,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => crate::simd::Avx2::PAIR_LANES,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 | Kind::Avx512Vnni => crate::simd::Avx512::PAIR_LANES,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512Bf16 | Kind::Amx => Avx512Bf16::PAIR_LANES,
    }
}

fn reference_unit(order: Order, job: &Job<'_>, panels: Range<usize>, tiles: Range<usize>) {
    let (n, k) = (job.w.rows(), job.w.cols());
    for row in job.tiles.rows(tiles.start).start..job.tiles.rows(tiles.end - 1).end {
        for column in panels.start * PANEL..(panels.end * PANEL).min(n) {
            // SAFETY: the operand of references is rows; inside the output, in this unit's rectangle.
            unsafe { job.out.put(row, column, reference(order, job.row(row, k), job.w, column)) };
        }
    }
}

/// Calls `f::<S, MR, PAIRS>` for a number of rows known at run time.
macro_rules! by_rows {
    ($rows:expr, $f:ident::<$s:ident, $pairs:literal>($($arg:expr),*)) => {
        match $rows {
            1 => $f::<$s, 1, $pairs>($($arg),*),
            2 => $f::<$s, 2, $pairs>($($arg),*),
            3 => $f::<$s, 3, $pairs>($($arg),*),
            4 => $f::<$s, 4, $pairs>($($arg),*),
            5 => $f::<$s, 5, $pairs>($($arg),*),
            6 => $f::<$s, 6, $pairs>($($arg),*),
            7 => $f::<$s, 7, $pairs>($($arg),*),
            8 => $f::<$s, 8, $pairs>($($arg),*),
            9 => $f::<$s, 9, $pairs>($($arg),*),
            10 => $f::<$s, 10, $pairs>($($arg),*),
            11 => $f::<$s, 11, $pairs>($($arg),*),
            12 => $f::<$s, 12, $pairs>($($arg),*),
            _ => unreachable!("tiles have 1 to 12 rows"),
        }
    };
}

thread_local! {
    /// Sums of a unit's rows with one panel `[rows][32]`; what tile registers need.
    static SUMS: Kept = const { Cell::new(None) };
}

/// Some steps of one panel, and where the sums of the steps before and after them are.
struct Block {
    panel: usize,
    steps: Range<usize>,
    /// Sums of the unit's rows `[rows][32]`, row 0 being `first_row`: zeros before the first block.
    sums: *mut f32,
    first_row: usize,
    /// Where the next block begins, and which vectors of it to move nearer.
    next: *const u32,
    ahead: Range<usize>,
}

#[inline(always)]
unsafe fn compute_unit<S: Simd>(job: &Job<'_>, panels: Range<usize>, tiles: Range<usize>, sums: *mut f32) {
    let depth = job.w.depth();
    let first_row = job.tiles.rows(tiles.start).start;
    let num_rows = job.tiles.rows(tiles.end - 1).end - first_row;
    for panel in panels.clone() {
        // SAFETY: the caller lends memory for 32 sums of each row.
        unsafe { sums.write_bytes(0, num_rows * PANEL) };
        for start in (0..depth).step_by(BLOCK_STEPS) {
            let steps = start..(start + BLOCK_STEPS).min(depth);
            let is_last = panel + 1 == panels.end && steps.end == depth;
            for tile in tiles.clone() {
                let is_alone = tiles.len() == 1;
                let next = match (is_last, is_alone) {
                    // What lies behind is the next block of the panel, or the first of the next panel.
                    (false, _) => job.w.panel(panel).as_ptr().wrapping_add(steps.end * PANEL),
                    (true, true) => job.next,
                    (true, false) => std::ptr::null(),
                };
                // A tile that is alone takes all of the next block, which it will read as fast as it comes. Of several
                // the first two take half of it each, so that it need not come all at once.
                let vector = tile - tiles.start;
                let ahead = match (next.is_null(), is_alone) {
                    (true, _) => 0..0,
                    (false, true) => 0..2,
                    (false, false) => vector..vector + 1,
                };
                let block = Block { panel, steps: steps.clone(), sums, first_row, next, ahead };
                let rows = job.tiles.rows(tile);
                let first = rows.start;
                // SAFETY: the caller has the instruction set; panel and tile are of this job.
                unsafe {
                    match job.w.dtype() {
                        WeightDtype::Bf16 => by_rows!(rows.len(), compute_tile::<S, true>(job, &block, first)),
                        WeightDtype::F32 => by_rows!(rows.len(), compute_tile::<S, false>(job, &block, first)),
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn compute_tile<S: Simd, const MR: usize, const PAIRS: bool>(job: &Job<'_>, block: &Block, first_row: usize) {
    if MR > S::TILE_ROWS {
        unreachable!("tiles were cut for this instruction set");
    }
    // SAFETY: as required of the caller.
    unsafe {
        if S::TILE_COLS == 2 {
            compute_columns::<S, MR, 2, PAIRS>(job, block, first_row, 0);
        } else {
            compute_columns::<S, MR, 1, PAIRS>(job, block, first_row, 0);
            compute_columns::<S, MR, 1, PAIRS>(job, block, first_row, 1);
        }
    }
}

/// `MR` rows from `first_row` on times `NR` vectors of a block from vector `vector` on.
#[inline(always)]
unsafe fn compute_columns<S: Simd, const MR: usize, const NR: usize, const PAIRS: bool>(
    job: &Job<'_>,
    block: &Block,
    first_row: usize,
    vector: usize,
) {
    let depth = job.w.depth();
    let steps = block.steps.clone();
    let first_column = block.panel * PANEL + vector * LANES;
    // SAFETY: the packed tile holds `depth * MR` steps, the panel `depth * 32` lanes, and the sums a row of 32 for each
    // row of the unit; the row is one of the job's.
    unsafe {
        let panel = job.w.panel(block.panel).as_ptr().add(steps.start * PANEL);
        let sums = block.sums.add((first_row - block.first_row) * PANEL + vector * LANES);
        let mut acc = [[S::splat(0.0); NR]; MR];
        let mut b = [panel; NR];
        let mut ahead = [panel; NR];
        for c in 0..NR {
            b[c] = panel.add((vector + c) * LANES);
            let is_ours = block.ahead.contains(&(vector + c));
            ahead[c] = if is_ours { block.next.wrapping_add((vector + c) * LANES) } else { b[c] };
        }
        // Always from memory: whether or not is a question that costs more than the answer.
        for r in 0..MR {
            for c in 0..NR {
                acc[r][c] = S::load(sums.add(r * PANEL + c * LANES));
            }
        }
        let step_lanes = if PAIRS { S::PAIR_LANES } else { 1 };
        let a = job.a.add((first_row * depth + steps.start * MR) * step_lanes);
        fold_tile::<S, MR, NR, PAIRS, 0>(&mut acc, steps.len(), a, &b, PANEL, &ahead);
        for r in 0..MR {
            for c in 0..NR {
                if steps.end == depth {
                    job.out.put_lanes::<S>(first_row + r, first_column + c * LANES, acc[r][c]);
                } else {
                    S::store(sums.add(r * PANEL + c * LANES), acc[r][c]);
                }
            }
        }
    }
}

/// Of bf16.
#[cfg(target_arch = "x86_64")]
struct FloatPanels;

#[cfg(target_arch = "x86_64")]
impl TilePanels for FloatPanels {
    type Matrix = PackedMatrix;
    const BYTES: bool = false;

    fn num_blocks(w: &PackedMatrix) -> usize {
        w.depth().div_ceil(TILE_STEPS)
    }

    fn panel(w: &PackedMatrix, panel: usize) -> *const u8 {
        w.panel(panel).as_ptr().cast()
    }

    #[inline(always)]
    unsafe fn finish(job: &Job<'_>, panels: Range<usize>, _: &Range<usize>, row: usize, sums: RowSums) {
        // SAFETY: as required of the caller.
        unsafe { finish_floats(job, panels, row, sums) }
    }
}

/// Packs columns of row `r` of a tile of `num_rows` into blocks of 16 pairs `[block][num_rows][16]`, the last one
/// filled up with zeros.
///
/// # Safety
/// The machine has AVX-512 and its bf16.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn pack_row_in_blocks(row: &[f32], (r, num_rows): (usize, usize), into: &mut [u32]) {
    let (blocks, rest) = row.as_chunks::<{ 2 * TILE_STEPS }>();
    let into = into.as_chunks_mut::<TILE_STEPS>().0;
    for (block, values) in blocks.iter().enumerate() {
        let into = into[block * num_rows + r].as_mut_ptr();
        // SAFETY: 16 pairs of 32 values; the instruction set is the caller's promise.
        unsafe { Avx512Bf16::store_pairs(into, values.as_ptr()) };
    }
    if !rest.is_empty() {
        let mut last = [0.0; 2 * TILE_STEPS];
        last[..rest.len()].copy_from_slice(rest);
        // SAFETY: as above.
        unsafe { Avx512Bf16::store_pairs(into[blocks.len() * num_rows + r].as_mut_ptr(), last.as_ptr()) };
    }
}

/// Packs columns of row `r` of a tile of `num_rows`: into `[steps][num_rows]`, a pair in `pair_lanes` lanes.
#[inline(always)]
pub(crate) fn pack_row(
    row: &[f32],
    dtype: WeightDtype,
    pair_lanes: usize,
    (r, num_rows): (usize, usize),
    into: &mut [u32],
) {
    let pairs = row.chunks_exact(2);
    match dtype {
        WeightDtype::F32 => {
            for (step, &x) in row.iter().enumerate() {
                into[step * num_rows + r] = x.to_bits();
            }
        }
        WeightDtype::Bf16 if pair_lanes == 2 => {
            let widened = |x: f32| u32::from(round_bf16(x)) << 16;
            let into = into.as_chunks_mut::<2>().0[r..].iter_mut().step_by(num_rows);
            let last = pairs.remainder().first().map(|last| [widened(*last), 0]);
            let pairs = pairs.map(|pair| [widened(pair[0]), widened(pair[1])]).chain(last);
            into.zip(pairs).for_each(|(into, pair)| *into = pair);
        }
        WeightDtype::Bf16 => {
            if let [last] = pairs.remainder() {
                into[row.len() / 2 * num_rows + r] = bf16_pair(*last, 0.0);
            }
            if num_rows == 1 {
                into.iter_mut().zip(pairs).for_each(|(into, pair)| *into = bf16_pair(pair[0], pair[1]));
            } else {
                pairs.zip(into[r..].iter_mut().step_by(num_rows)).for_each(|(pair, into)| {
                    *into = bf16_pair(pair[0], pair[1]);
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed_matrix::Weights;
    use crate::workers::{Priority, WorkerPool};
    use half::bf16;

    /// Numbers in (-1, 1) that differ in many bits.
    fn noise(len: usize, seed: u32) -> Vec<f32> {
        (0..len).map(|i| (crate::uniform(u64::from(seed), 0, i as u32) * 2.0 - 1.0) as f32).collect()
    }

    fn product(
        isa: Isa,
        threads: usize,
        x: &[f32],
        m: usize,
        w: &PackedMatrix,
        bias: Option<&[f32]>,
        add: bool,
    ) -> Vec<u32> {
        let pool = WorkerPool::new(threads);
        let ctx = Ctx { pool: &pool, isa, priority: Priority::Decode };
        let mut out = noise(m * w.rows(), 9);
        matmul(&ctx, x, m, w, bias, add, &mut out);
        out.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_reference() {
        let shapes = [(1, 1, 1), (1, 64, 96), (2, 7, 33), (5, 33, 70), (13, 96, 31), (29, 130, 64), (40, 512, 100)];
        // Several blocks of steps, the last one of them not full; then two tiles of rows that share a stream of
        // weights.
        let long = [(70, 600, 1030), (25, 601, 40), (300, 1200, 40), (3, 4097, 40), (13, 2049, 33)];
        let shared = [(33, 1030, 70), (64, 1201, 100)];
        for (m, k, n) in shapes.into_iter().chain(long).chain(shared) {
            for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
                let w = PackedMatrix::pack(dtype, k, &[Weights::F32(&noise(n * k, 1))]);
                let (x, bias) = (noise(m * k, 2), noise(n, 3));
                for (bias, add) in [(None, false), (Some(&bias[..]), true)] {
                    let want = |isa| product(isa, 1, &x, m, &w, bias, add);
                    let (pairs, tiles) = (want(Isa::PORTABLE), want(Isa::PORTABLE_TILES));
                    for &isa in Isa::available() {
                        let want = if isa.order() == Order::Pairs { &pairs } else { &tiles };
                        assert_eq!(&product(isa, 2, &x, m, &w, bias, add), want, "{isa:?} {dtype:?} [{m}, {k}] x {n}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_in_any_batch() {
        let (k, n) = (160, 80);
        let x = noise(30 * k, 4);
        for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
            let w = PackedMatrix::pack(dtype, k, &[Weights::F32(&noise(n * k, 5))]);
            for &isa in Isa::available() {
                let whole = product(isa, 2, &x, 30, &w, None, false);
                for m in [1, 2, 11, 12, 13, 25] {
                    let some = product(isa, 1, &x[3 * k..(3 + m) * k], m, &w, None, false);
                    assert_eq!(some, whole[3 * n..(3 + m) * n], "{isa:?} {dtype:?} {m} rows");
                }
            }
        }
    }

    #[test]
    fn tiny_and_cancelling_operands_give_the_same_bits_too() {
        // Products down to the smallest normal number, sums that cancel to it, operands that round to zero.
        let k = 64;
        let scale: Vec<f32> =
            (0..k).map(|i| [2f32.powi(-56), -(2f32.powi(-56)), 1e-17, 3e-38, 1e-39, 1.0, 0.0, -1e-45][i % 8]).collect();
        let x: Vec<f32> = noise(3 * k, 6).iter().enumerate().map(|(i, x)| (1.0 + x.abs()) * scale[i % k]).collect();
        let weights: Vec<f32> = noise(40 * k, 7).iter().enumerate().map(|(i, w)| w * scale[(i * 5 + 3) % k]).collect();
        for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
            let w = PackedMatrix::pack(dtype, k, &[Weights::F32(&weights)]);
            let want = product(Isa::PORTABLE, 1, &x, 3, &w, None, false);
            for &isa in Isa::available() {
                assert_eq!(product(isa, 1, &x, 3, &w, None, false), want, "{isa:?} {dtype:?}");
            }
        }
    }

    #[test]
    fn stacked_parts_equal_their_own_products() {
        let (k, m) = (48, 3);
        let (q, v) = (noise(20 * k, 1), noise(50 * k, 2));
        let v16: Vec<bf16> = v.iter().map(|&v| bf16::from_f32(v)).collect();
        let x = noise(m * k, 3);
        let fused = PackedMatrix::pack(WeightDtype::Bf16, k, &[Weights::F32(&q), Weights::Bf16(&v16)]);
        assert_eq!(fused.part_rows(), [20, 50]);
        let both = product(Isa::detect(), 2, &x, m, &fused, None, false);
        let q = product(
            Isa::detect(),
            1,
            &x,
            m,
            &PackedMatrix::pack(WeightDtype::Bf16, k, &[Weights::F32(&q)]),
            None,
            false,
        );
        let v = product(
            Isa::detect(),
            1,
            &x,
            m,
            &PackedMatrix::pack(WeightDtype::Bf16, k, &[Weights::F32(&v)]),
            None,
            false,
        );
        for row in 0..m {
            assert_eq!(both[row * 70..][..20], q[row * 20..][..20]);
            assert_eq!(both[row * 70 + 20..][..50], v[row * 50..][..50]);
        }
    }

    #[test]
    fn product_is_close_to_one_in_double_precision() {
        let (m, k, n) = (4, 300, 37);
        let (x, weights) = (noise(m * k, 1), noise(n * k, 2));
        let w = PackedMatrix::pack(WeightDtype::F32, k, &[Weights::F32(&weights)]);
        let got = product(Isa::detect(), 2, &x, m, &w, None, false);
        for row in 0..m {
            for column in 0..n {
                let want: f64 = (0..k).map(|i| f64::from(x[row * k + i]) * f64::from(weights[column * k + i])).sum();
                assert!((f64::from(f32::from_bits(got[row * n + column])) - want).abs() < 1e-4);
            }
        }
    }
}
