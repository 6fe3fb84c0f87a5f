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

use super::activations::{Group, lanes_per_row, pack_rows};
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
        let row_bytes = lanes_per_row * 4;
        let shape = UnitShape { m, rows: w.rows(), cols: k, panel_bytes: format.panel_bytes(k), row_bytes };
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
pub(super) struct Job<'a> {
    x: &'a [f32],
    /// Packed activations; the tile of first row r starts at `r * lanes_per_row`.
    pub(super) a: *const u32,
    pub(super) lanes_per_row: usize,
    pub(super) tiles: Tiles,
    pub(super) w: &'a QuantizedMatrix,
    pub(super) out: Output<'a>,
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
    use super::tiles::{avx2, avx512, vnni};
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
