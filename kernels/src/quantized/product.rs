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

use std::ops::Range;

use super::activations::Group;
use super::packed::{PackedFormat, QuantizedMatrix};
use crate::ctx::Ctx;
use crate::isa::{Isa, Kind};
use crate::numerics::{Order, TILE_STEPS, bf16_pair};
use crate::operand::Operand;
use crate::packed_matrix::PANEL;
use crate::product::{MatrixRef, Product, multiply};

/// `out[m, n] = x[m, k] * w^T`, plus `bias[n]` where given, plus `out` itself where `add` (the residual).
///
/// `x` is `[m, w.cols()]` and `out` `[m, w.rows()]`, row-major f32; `x` is rounded to 8 bits in groups of 32 (of a
/// whole row if the weights have one scale per row; to bf16 if the weights are opened to that). Each row's bits depend
/// on that row alone. Order: see [`numerics`](crate::numerics).
///
/// Panics if the weights are packed for instruction sets of another order.
pub fn matmul_quantized(
    ctx: &Ctx<'_>,
    x: &[f32],
    m: usize,
    w: &QuantizedMatrix,
    bias: Option<&[f32]>,
    add: bool,
    out: &mut [f32],
) {
    assert_eq!(x.len(), m * w.cols(), "activations of [{m}, {}]", w.cols());
    let sections = [Some(MatrixRef::Quantized(w)), None, None];
    multiply(ctx, &Product { operand: Operand::Rows(x), sections, bias, add }, out);
}

pub(super) type Job<'a> = crate::product::Job<'a, QuantizedMatrix>;

/// The specification: one output before bias and residual, from one row of f32.
fn reference(x: &[f32], w: &QuantizedMatrix, column: usize) -> f32 {
    let format = w.format();
    if format.is_opened() {
        let opened = |k: usize| w.scale(column, k / format.group(x.len())) * w.weight(column, k) as f32;
        let weights = (0..x.len()).step_by(2).map(|k| bf16_pair(opened(k), opened(k + 1)));
        let pairs = x.as_chunks::<2>().0.iter().map(|pair| bf16_pair(pair[0], pair[1]));
        return Order::Tiles.fold(0.0, TILE_STEPS, pairs.zip(weights));
    }
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

/// Whether tiles of the processor multiply so many rows with matrices of this format.
pub(crate) fn multiplies_tiles(isa: Isa, format: PackedFormat, num_rows: usize) -> bool {
    match isa.0 {
        #[cfg(target_arch = "x86_64")]
        Kind::Amx => super::amx::rows_min(format).is_some_and(|rows| num_rows >= rows),
        _ => false,
    }
}

/// Rows of a tile at most, of so many rows.
pub(crate) fn tile_rows(isa: Isa, format: PackedFormat, num_rows: usize) -> usize {
    match isa.0 {
        #[cfg(target_arch = "x86_64")]
        Kind::Amx if multiplies_tiles(isa, format, num_rows) => super::amx::tile_rows(format),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => 2,
        _ => 6,
    }
}

fn reference_unit(job: &Job<'_>, panels: Range<usize>, tiles: Range<usize>) {
    let (n, k) = (job.w.rows(), job.w.cols());
    for row in job.tiles.rows(tiles.start).start..job.tiles.rows(tiles.end - 1).end {
        for column in panels.start * PANEL..(panels.end * PANEL).min(n) {
            // SAFETY: the operand of references is rows; inside the output, in this unit's rectangle.
            unsafe { job.out.put(row, column, reference(job.row(row, k), job.w, column)) };
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn compute(isa: Isa, job: &Job<'_>, _in_tiles: bool, panels: Range<usize>, tiles: Range<usize>) {
    assert!(job.w.format().is_of(isa.order()), "{:?} on {isa:?}: packed for another order", job.w);
    reference_unit(job, panels, tiles);
}

/// A unit of a product: `panels` for the rows of `tiles`; in tiles of the processor if the operand is packed for these.
#[cfg(target_arch = "x86_64")]
pub(crate) fn compute(isa: Isa, job: &Job<'_>, in_tiles: bool, panels: Range<usize>, tiles: Range<usize>) {
    assert!(job.w.format().is_of(isa.order()), "{:?} on {isa:?}: packed for another order", job.w);
    use super::tiles::{avx2, avx512, vnni};
    // SAFETY: an `Isa` exists only for instruction sets of this machine.
    unsafe {
        match isa.0 {
            Kind::Portable | Kind::PortableTiles => reference_unit(job, panels, tiles),
            Kind::Avx2 => avx2(job, panels, tiles),
            Kind::Avx512 => avx512(job, panels, tiles),
            Kind::Amx if in_tiles => super::amx::amx(job, panels, tiles),
            Kind::Avx512Vnni | Kind::Avx512Bf16 | Kind::Amx => vnni(job, panels, tiles),
        }
    }
}
