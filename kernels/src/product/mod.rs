//! A product of rows with matrices side by side, as one job of the pool.
//!
//! ```text
//! operand   [m, k]  ──packed by who needs it, see `operand`──>  tiles of rows
//! sections  stacked matrices, each of one format: columns side by side in the output
//! unit      some tiles x some panels of one section, see `matmul` and `quantized`
//! group     columns that belong together, as a head: who ends the last of their panels goes on with them
//! gate      of gate and up in tiles of the processor: a unit has columns of both, and makes the next operand of them
//! ```
//!
//! So what comes before a product and what comes behind it wait for rows and columns of their own and not for all
//! threads: a layer has five barriers whatever the batch.
//!
//! `cut`: how a product is cut into units; `running`: the job and its parts; `unit`: what a unit computes with;
//! `gated`: from gate and up to the operand behind them.
#![allow(unsafe_code)]

mod cut;
mod gated;
mod running;
mod unit;

use std::marker::PhantomData;
use std::ops::Range;

use crate::ctx::Ctx;
use crate::isa::Isa;
use crate::matmul;
use crate::numerics::Order;
use crate::operand::{Operand, Packing};
use crate::packed_matrix::{PANEL, PackedMatrix};
use crate::quantized::{self, QuantizedMatrix};

pub(crate) use cut::Tiles;
pub(crate) use unit::{Job, Output};

/// Matrices side by side at most: q, k and v.
pub const SECTIONS_MAX: usize = 3;

/// A packed matrix of either kind.
#[derive(Clone, Copy, Debug)]
pub enum MatrixRef<'a> {
    /// Of numbers.
    Float(&'a PackedMatrix),
    /// Of integers with scales.
    Quantized(&'a QuantizedMatrix),
}

impl MatrixRef<'_> {
    fn rows(self) -> usize {
        match self {
            MatrixRef::Float(w) => w.rows(),
            MatrixRef::Quantized(w) => w.rows(),
        }
    }

    fn cols(self) -> usize {
        match self {
            MatrixRef::Float(w) => w.cols(),
            MatrixRef::Quantized(w) => w.cols(),
        }
    }

    fn panel_bytes(self) -> usize {
        match self {
            MatrixRef::Float(w) => w.panel_bytes(),
            MatrixRef::Quantized(w) => w.format().panel_bytes(w.cols()),
        }
    }

    /// Rows of a tile at most, of so many rows.
    fn tile_rows(self, isa: Isa, num_rows: usize) -> usize {
        match self {
            MatrixRef::Float(w) => matmul::tile_rows(isa, w.dtype()),
            MatrixRef::Quantized(w) => quantized::tile_rows(isa, w.format(), num_rows),
        }
    }

    /// Whether so many rows are two tiles that weights pass by as [one stream](Tiles::share_stream).
    fn shares_stream(self, isa: Isa, num_rows: usize) -> bool {
        matches!(self, MatrixRef::Float(_))
            && self.packing(isa, num_rows) == Packing::Blocks
            && Tiles::of(num_rows, self.tile_rows(isa, num_rows)).share_stream(self.panel_bytes())
    }

    fn packing(self, isa: Isa, num_rows: usize) -> Packing {
        match self {
            _ if isa.is_reference() => Packing::Rows,
            MatrixRef::Float(w) if matmul::multiplies_tiles(isa, w.dtype()) => Packing::Blocks,
            MatrixRef::Quantized(w) if w.format().is_opened() => Packing::Blocks,
            MatrixRef::Float(w) => Packing::Float(w.dtype(), matmul::pair_lanes(isa)),
            MatrixRef::Quantized(w) if quantized::multiplies_tiles(isa, w.format(), num_rows) => {
                Packing::QuantizedBlocks(w.format())
            }
            MatrixRef::Quantized(w) => Packing::Quantized(w.format()),
        }
    }
}

/// What is multiplied with what, and what is added.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// `[m, k]`; rounded to what each section computes in.
    pub operand: Operand<'a>,
    /// `[rows, k]` each, side by side in the output without a gap.
    pub sections: [Option<MatrixRef<'a>>; SECTIONS_MAX],
    /// Of all columns, added first.
    pub bias: Option<&'a [f32]>,
    /// Whether to add to what the output is (the residual).
    pub add: bool,
}

impl Product<'_> {
    /// Columns of the output.
    fn width(&self) -> usize {
        self.sections.iter().flatten().map(|section| section.rows()).sum()
    }
}

/// `out` `[m, rows of all sections]` becomes the product. Each row's bits depend on that row alone. Order: see
/// [`numerics`](crate::numerics).
pub fn multiply(ctx: &Ctx<'_>, product: &Product<'_>, out: &mut [f32]) {
    multiply_then(ctx, product, out, Then::Nothing);
}

/// Gate and up `[m, 2 ffn]` in `out`, gated on the way where several tiles of the processor multiply both these
/// matrices and the sections of `down`, and do not share a stream of weights: `out` is no more than memory then.
/// Returns what `down` is to be multiplied with.
pub fn multiply_gated<'o>(
    ctx: &Ctx<'_>,
    product: &Product<'_>,
    down: &[Option<MatrixRef<'_>>; SECTIONS_MAX],
    out: &'o mut [f32],
) -> Operand<'o> {
    let [Some(gate_up), None, None] = product.sections else {
        multiply(ctx, product, out);
        return Operand::Gated(out);
    };
    let (num_rows, ffn) = (product.operand.num_rows(gate_up.cols()), gate_up.rows() / 2);
    let tile_rows = gate_up.tile_rows(ctx.isa, num_rows);
    let is_alike = |matrix: MatrixRef<'_>| {
        matrix.packing(ctx.isa, num_rows) == Packing::Blocks && matrix.tile_rows(ctx.isa, num_rows) == tile_rows
    };
    let is_gated_on_the_way = ctx.isa.order() == Order::Tiles
        && num_rows > tile_rows
        && ffn.is_multiple_of(PANEL)
        && !product.add
        && !gate_up.shares_stream(ctx.isa, num_rows)
        && is_alike(gate_up)
        && down.iter().flatten().all(|matrix| matrix.cols() == ffn && is_alike(*matrix));
    if !is_gated_on_the_way {
        multiply(ctx, product, out);
        return Operand::Gated(out);
    }
    multiply_then(ctx, product, out, Then::Gate);
    Operand::Packed(&out[..num_rows * ffn / 2])
}

/// What is done with products before they are out of the caches.
#[derive(Clone, Copy)]
pub(crate) enum Then<'a> {
    Nothing,
    /// Something for each group.
    Groups(&'a Groups<'a>),
    /// The first half of the columns gates the second; the output is memory for as many rows packed for tiles.
    Gate,
}

/// Columns that something is to be done with as soon as they are there.
pub(crate) struct Groups<'a> {
    /// Of each group; sections are whole groups.
    pub(crate) width: usize,
    /// Called once for each group of each unit's rows, on the thread that ended it.
    pub(crate) finish: &'a (dyn Fn(Finished<'_>) + Sync),
}

/// Some rows of one group, which nobody else touches while the job lasts.
pub(crate) struct Finished<'a> {
    /// Of the group's columns of the first row: in the output, or in memory of the thread.
    start: *mut f32,
    stride: usize,
    output: *mut f32,
    output_stride: usize,
    width: usize,
    rows: Range<usize>,
    group: usize,
    out: PhantomData<&'a mut [f32]>,
}

impl Finished<'_> {
    /// Which rows of the output.
    pub(crate) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Which group.
    pub(crate) fn group(&self) -> usize {
        self.group
    }

    /// The group's columns of a row, to read.
    pub(crate) fn read(&self, row: usize) -> &[f32] {
        assert!(self.rows.contains(&row), "row {row} of {:?}", self.rows);
        // SAFETY: as in `row`; whoever holds that cannot call this.
        unsafe { std::slice::from_raw_parts(self.start.add((row - self.rows.start) * self.stride), self.width) }
    }

    /// The group's columns of a row.
    pub(crate) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(self.rows.contains(&row), "row {row} of {:?}", self.rows);
        // SAFETY: valid for the group's columns of these rows, which are nobody else's until the job is over.
        unsafe { std::slice::from_raw_parts_mut(self.start.add((row - self.rows.start) * self.stride), self.width) }
    }

    /// Puts the group's columns of a row into the output, where they are not there already: otherwise they are gone
    /// with the group.
    #[inline(always)]
    pub(crate) fn put(&self, row: usize) {
        let values = self.read(row);
        // SAFETY: inside the output, and this group of this row is nobody else's until the job is over.
        let into = unsafe { self.output.add(row * self.output_stride + self.group * self.width) };
        if into.cast_const() != values.as_ptr() {
            // SAFETY: as above; the thread's memory is elsewhere.
            unsafe { into.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        }
    }
}

/// [`multiply`], and then something with what comes out.
pub(crate) fn multiply_then(ctx: &Ctx<'_>, product: &Product<'_>, out: &mut [f32], then: Then<'_>) {
    let Some(cols) = product.sections.iter().flatten().map(|section| section.cols()).next() else { return };
    let (num_rows, width) = (product.operand.num_rows(cols), product.width());
    assert_eq!(out.len(), num_rows * width, "output of [{num_rows}, {width}]");
    assert!(product.bias.is_none_or(|bias| bias.len() == width), "a bias of {width} values");
    if out.is_empty() {
        return;
    }
    running::run(ctx, product, (num_rows, width, cols), out, then);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed_matrix::{WeightDtype, Weights};
    use crate::quantized::QuantizedWeights;
    use crate::workers::{Priority, WorkerPool};
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn noise(len: usize, seed: u64) -> Vec<f32> {
        (0..len).map(|i| (crate::uniform(seed, 0, i as u32) * 2.0 - 1.0) as f32).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|x| x.to_bits()).collect()
    }

    /// 8 bits, a scale for 32, or for a whole row.
    fn eight_bits(order: Order, rows: usize, cols: usize, group: usize) -> QuantizedMatrix {
        let codes = (0..rows * cols).map(|i| (crate::uniform(7, 0, i as u32) * 256.0) as u8).collect();
        let scales =
            (0..rows * cols / group).map(|i| half::f16::from_f32(0.001 * (i % 9 + 1) as f32).to_f32()).collect();
        let weights = QuantizedWeights {
            rows,
            cols,
            bits: 8,
            offset: 128,
            group,
            block: group,
            codes,
            scales,
            group_scales: None,
            mins: None,
        };
        QuantizedMatrix::pack(order, &[&weights]).unwrap()
    }

    /// Numbers, 8 bits in groups, 8 bits in rows, with this many rows each.
    fn matrices(order: Order, rows: [usize; 3], cols: usize) -> (PackedMatrix, QuantizedMatrix, QuantizedMatrix) {
        let float = PackedMatrix::pack(WeightDtype::Bf16, cols, &[Weights::F32(&noise(rows[0] * cols, 4))]);
        (float, eight_bits(order, rows[1], cols, 32), eight_bits(order, rows[2], cols, cols))
    }

    #[test]
    fn rows_normed_or_gated_on_the_way_and_sections_in_one_job_change_no_bit() {
        // Of one piece and of several; with one tile and with several.
        for (m, k) in [(1, 64), (13, 96), (8, 4192), (40, 2080)] {
            let rows = [70, 40, 33];
            let of_order = [Order::Pairs, Order::Tiles].map(|order| matrices(order, rows, k));
            let (x, norm, gate_up, bias) = (noise(m * k, 1), noise(k, 2), noise(m * 2 * k, 3), noise(143, 5));
            for &isa in Isa::available() {
                let (float, int8, int8_row) = &of_order[usize::from(isa.order() == Order::Tiles)];
                for threads in [1, 3] {
                    let pool = WorkerPool::new(threads);
                    let ctx = &Ctx { pool: &pool, isa, priority: Priority::Prefill };
                    let portable = &Ctx { isa: isa.reference(), ..*ctx };
                    let (mut normed, mut gated) = (vec![0.0; m * k], vec![0.0; m * k]);
                    crate::rms_norm(ctx, &x, &norm, 1e-5, &mut normed);
                    crate::silu_mul(ctx, &gate_up, k, &mut gated);
                    let fused = [
                        (Operand::Rows(&x), &x),
                        (Operand::Normed { x: &x, weight: &norm, eps: 1e-5 }, &normed),
                        (Operand::Gated(&gate_up), &gated),
                    ];
                    for (index, (operand, plain)) in fused.into_iter().enumerate() {
                        let residual = noise(m * 143, 6);
                        let mut out = residual.clone();
                        let sections = [
                            Some(MatrixRef::Float(float)),
                            Some(MatrixRef::Quantized(int8)),
                            Some(MatrixRef::Quantized(int8_row)),
                        ];
                        multiply(ctx, &Product { operand, sections, bias: Some(&bias), add: true }, &mut out);
                        let mut first = 0;
                        for section in sections.into_iter().flatten() {
                            let columns = first..first + section.rows();
                            let of_section = |values: &[f32]| -> Vec<f32> {
                                values.chunks(143).flat_map(|row| row[columns.clone()].to_vec()).collect()
                            };
                            let (mut want, bias) = (of_section(&residual), Some(&bias[columns.clone()]));
                            match section {
                                MatrixRef::Float(w) => crate::matmul(portable, plain, m, w, bias, true, &mut want),
                                MatrixRef::Quantized(w) => {
                                    crate::matmul_quantized(portable, plain, m, w, bias, true, &mut want);
                                }
                            }
                            assert!(bits(&of_section(&out)) == bits(&want), "{isa:?} [{m}, {k}] {index} {columns:?}");
                            first = columns.end;
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_group_is_finished_once_for_every_row_when_all_its_columns_are_there() {
        use WeightDtype::{Bf16, F32};
        let shapes = [(1, 64, 48, F32), (40, 96, 20, F32), (700, 2048, 96, F32), (25, 512, 480, F32)];
        // In tiles of the processor: groups of some panels, of more than a unit has else, and across their borders.
        let in_tiles = [(33, 40, 32, Bf16), (300, 512, 96, Bf16), (70, 2048, 480, Bf16), (70, 96, 48, Bf16)];
        for (m, k, width, dtype) in shapes.into_iter().chain(in_tiles) {
            let w = PackedMatrix::pack(dtype, k, &[Weights::F32(&noise(480 * k, 1))]);
            let x = noise(m * k, 2);
            for threads in [1, 4] {
                let pool = WorkerPool::new(threads);
                let ctx = Ctx { pool: &pool, isa: Isa::detect(), priority: Priority::Decode };
                let mut want = vec![0.0; m * 480];
                crate::matmul(&ctx, &x, m, &w, None, false, &mut want);
                // NaN where nothing has been written.
                let mut out = vec![f32::NAN; m * 480];
                let finish = |mut group: Finished<'_>| {
                    for row in group.rows() {
                        group.row(row).iter_mut().for_each(|x| *x += 1.0);
                        group.put(row);
                    }
                };
                let product = Product {
                    operand: Operand::Rows(&x),
                    sections: [Some(MatrixRef::Float(&w)), None, None],
                    bias: None,
                    add: false,
                };
                multiply_then(&ctx, &product, &mut out, Then::Groups(&Groups { width, finish: &finish }));
                want.iter_mut().for_each(|x| *x += 1.0);
                assert!(bits(&out) == bits(&want), "{m} rows, groups of {width}, {threads} threads");
            }
        }
    }

    #[test]
    fn rows_gated_behind_their_product_have_the_bits_of_one_operation_after_the_other() {
        // One tile and several of unequal rows; units of several panels and of one; what is not whole panels; two tiles
        // that share a stream of bf16, before the gate or behind it.
        let shapes =
            [(8, 64, 96), (33, 96, 64), (70, 544, 64), (40, 64, 48), (300, 64, 320), (40, 1056, 96), (40, 64, 1056)];
        for (m, hidden, ffn) in shapes {
            let of_order = [Order::Pairs, Order::Tiles].map(|order| {
                let float = |n: usize, k: usize, seed: u64| {
                    PackedMatrix::pack(WeightDtype::Bf16, k, &[Weights::F32(&noise(n * k, seed))])
                };
                let int8 = [eight_bits(order, 2 * ffn, hidden, 32), eight_bits(order, 5, ffn / 32 * 32, 32)];
                (float(2 * ffn, hidden, 1), float(5, ffn, 2), int8)
            });
            let (x, norm, bias) = (noise(m * hidden, 3), noise(hidden, 4), noise(2 * ffn, 5));
            let operand = Operand::Normed { x: &x, weight: &norm, eps: 1e-5 };
            for &isa in Isa::available().iter().filter(|isa| !isa.is_reference()) {
                let (gate_up, down, [gate_up_int8, down_int8]) = &of_order[usize::from(isa.order() == Order::Tiles)];
                let float = (MatrixRef::Float(gate_up), MatrixRef::Float(down));
                let mut pairs = vec![float];
                let in_tiles = isa.order() == Order::Tiles;
                if in_tiles && ffn.is_multiple_of(32) {
                    let int8 = (MatrixRef::Quantized(gate_up_int8), MatrixRef::Quantized(down_int8));
                    pairs.extend([int8, (float.0, int8.1), (int8.0, float.1)]);
                }
                for (index, (gate_up, down)) in pairs.into_iter().enumerate() {
                    for (bias, threads) in [(None, 1), (Some(&bias[..]), 3)] {
                        let pool = WorkerPool::new(threads);
                        let ctx = &Ctx { pool: &pool, isa, priority: Priority::Prefill };
                        let portable = &Ctx { isa: isa.reference(), ..*ctx };
                        let product = Product { operand, sections: [Some(gate_up), None, None], bias, add: false };
                        let sections = [Some(down), None, None];
                        let mut columns = vec![f32::NAN; m * 2 * ffn];
                        let mut out = noise(m * 5, 6);
                        let gated = multiply_gated(ctx, &product, &sections, &mut columns);
                        let is_packed = matches!(gated, Operand::Packed(_));
                        let is_several = in_tiles && m > 32 && !gate_up.shares_stream(isa, m);
                        assert_eq!(is_packed, is_several && ffn.is_multiple_of(32), "{isa:?} {m} {ffn}");
                        multiply(ctx, &Product { operand: gated, sections, bias: None, add: true }, &mut out);

                        let mut want = noise(m * 5, 6);
                        multiply(portable, &product, &mut columns);
                        let operand = Operand::Gated(&columns);
                        multiply(portable, &Product { operand, sections, bias: None, add: true }, &mut want);
                        assert!(
                            bits(&out) == bits(&want),
                            "{isa:?} [{m}, {hidden}] x {ffn}, {index}, {threads} threads"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn panic_of_whoever_finishes_reaches_the_caller_and_the_next_product_is_whole() {
        let pool = WorkerPool::new(3);
        let ctx = Ctx { pool: &pool, isa: Isa::detect(), priority: Priority::Decode };
        let (m, k) = (40, 256);
        let w = PackedMatrix::pack(WeightDtype::Bf16, k, &[Weights::F32(&noise(512 * k, 1))]);
        let x = noise(m * k, 2);
        let product = Product {
            operand: Operand::Rows(&x),
            sections: [Some(MatrixRef::Float(&w)), None, None],
            bias: None,
            add: false,
        };
        let mut want = vec![0.0; m * 512];
        multiply(&ctx, &product, &mut want);
        let mut out = vec![0.0; m * 512];
        let finish = |group: Finished<'_>| assert!(group.group() != 3, "group three");
        let caught = catch_unwind(AssertUnwindSafe(|| {
            multiply_then(&ctx, &product, &mut out, Then::Groups(&Groups { width: 64, finish: &finish }));
        }));
        assert_eq!(caught.unwrap_err().downcast_ref::<&str>(), Some(&"group three"));
        multiply(&ctx, &product, &mut out);
        assert!(bits(&out) == bits(&want));
    }
}
