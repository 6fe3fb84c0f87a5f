//! Weights in the order the matrix product reads them.
//!
//! A weight `[rows, cols]` (`[n, k]`, as checkpoints store it) becomes panels of 32 rows:
//!
//! ```text
//! bf16  [n/32][k/2][32][2]     one 32-bit lane = two k of one output feature
//! f32   [n/32][k][32]
//! ```
//!
//! Rows beyond n and the second half of an odd last pair are zero.
#![allow(unsafe_code)]

use std::ops::Range;

use half::bf16;

use crate::numerics::{bf16_pair, widen_bf16};
use crate::pages::Pages;

/// Output features of a panel.
pub const PANEL: usize = 32;

/// Steps packed at a time.
const STEPS: usize = 64;

/// Type that a packed matrix stores and the product computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightDtype {
    /// f32 weights and activations.
    F32,
    /// bf16 weights and activations, f32 accumulation.
    Bf16,
}

/// A row-major table of weights as a checkpoint holds it.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// f32 values.
    F32(&'a [f32]),
    /// bf16 values.
    Bf16(&'a [bf16]),
}

impl Weights<'_> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Weights::F32(values) => values.len(),
            Weights::Bf16(values) => values.len(),
        }
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn at(&self, index: usize) -> f32 {
        match self {
            Weights::F32(values) => values[index],
            Weights::Bf16(values) => widen_bf16(values[index].to_bits()),
        }
    }
}

/// A weight matrix `[rows, cols]` in panels, ready for [`matmul`](crate::matmul()). It remembers the parts
/// it was stacked from.
pub struct PackedMatrix {
    pages: Pages,
    dtype: WeightDtype,
    rows: usize,
    cols: usize,
    part_rows: Vec<usize>,
}

impl PackedMatrix {
    /// Packs `parts`, each `[its rows, cols]` row-major, stacked in order into one matrix (q, k, v; gate, up).
    ///
    /// Panics when a part is not whole rows: shapes are checked where the checkpoint is read.
    pub fn pack(dtype: WeightDtype, cols: usize, parts: &[Weights<'_>]) -> Self {
        assert!(cols > 0, "a matrix has columns");
        let part_rows: Vec<usize> = parts
            .iter()
            .map(|part| {
                assert!(part.len().is_multiple_of(cols), "a part of {} values is not whole rows of {cols}", part.len());
                part.len() / cols
            })
            .collect();
        let rows: usize = part_rows.iter().sum();
        let depth = depth_of(dtype, cols);
        let lanes = rows.div_ceil(PANEL) * depth * PANEL;
        let pages = Pages::zeroed(lanes * 4);
        // SAFETY: the pages were just made for `lanes` 32-bit values, zeroed, aligned, and are ours alone.
        let packed = unsafe { std::slice::from_raw_parts_mut(pages.as_ptr().cast::<u32>(), lanes) };
        let sources =
            parts.iter().zip(&part_rows).flat_map(|(part, &num_rows)| (0..num_rows).map(move |row| (part, row)));
        let sources: Vec<(&Weights<'_>, usize)> = sources.collect();
        for (panel, sources) in packed.chunks_exact_mut(depth * PANEL).zip(sources.chunks(PANEL)) {
            // Some steps of all rows at a time: the lanes being written stay in the first-level cache.
            for (block, lanes) in panel.chunks_mut(STEPS * PANEL).enumerate() {
                for (column, (part, row)) in sources.iter().enumerate() {
                    pack_steps(dtype, part, row * cols..(row + 1) * cols, block * STEPS, &mut lanes[column..]);
                }
            }
        }
        PackedMatrix { pages, dtype, rows, cols, part_rows }
    }

    /// Output features, all parts together.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rows of each part, in order.
    pub fn part_rows(&self) -> &[usize] {
        &self.part_rows
    }

    /// Type of the stored weights.
    pub fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    /// Bytes held, padding included.
    pub fn size_bytes(&self) -> usize {
        self.num_panels() * self.panel_lanes() * 4
    }

    /// Steps of the fold: k, or pairs of k.
    pub(crate) fn depth(&self) -> usize {
        depth_of(self.dtype, self.cols)
    }

    pub(crate) fn num_panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// The lanes of one panel: `[depth][32]`, f32 bits or bf16 pairs.
    pub(crate) fn panel(&self, panel: usize) -> &[u32] {
        assert!(panel < self.num_panels());
        // SAFETY: within the pages (`pack` made them for all panels), initialised, never written again.
        unsafe {
            std::slice::from_raw_parts(
                self.pages.as_ptr().cast::<u32>().add(panel * self.panel_lanes()),
                self.panel_lanes(),
            )
        }
    }

    fn panel_lanes(&self) -> usize {
        self.depth() * PANEL
    }
}

fn depth_of(dtype: WeightDtype, cols: usize) -> usize {
    match dtype {
        WeightDtype::F32 => cols,
        WeightDtype::Bf16 => cols.div_ceil(2),
    }
}

/// Writes steps `first_step..` of one row (`values` of `part`) to every 32nd lane, as many as there are.
fn pack_steps(dtype: WeightDtype, part: &Weights<'_>, values: Range<usize>, first_step: usize, lanes: &mut [u32]) {
    for (step, lane) in (first_step..).zip(lanes.iter_mut().step_by(PANEL)) {
        *lane = match dtype {
            WeightDtype::F32 => part.at(values.start + step).to_bits(),
            WeightDtype::Bf16 => {
                let even = values.start + 2 * step;
                let odd = if even + 1 < values.end { part.at(even + 1) } else { 0.0 };
                bf16_pair(part.at(even), odd)
            }
        };
    }
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix({:?}, {} x {})", self.dtype, self.rows, self.cols)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numerics::round_bf16;

    #[test]
    fn every_weight_lies_in_its_panel_and_padding_is_zero() {
        let (cols, rows) = (141, 70);
        let values: Vec<f32> = (0..rows * cols).map(|i| i as f32 + 0.25).collect();
        let short: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
        let cut = 33 * cols;
        for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
            let w = PackedMatrix::pack(dtype, cols, &[Weights::F32(&values[..cut]), Weights::Bf16(&short[cut..])]);
            assert_eq!((w.rows(), w.cols(), w.part_rows()), (rows, cols, &[33, 37][..]));
            assert_eq!(w.size_bytes(), 3 * w.depth() * PANEL * 4);
            for row in 0..96 {
                for step in 0..w.depth() {
                    let lane = w.panel(row / PANEL)[step * PANEL + row % PANEL];
                    let value = |k: usize| match (row, k) {
                        _ if row >= rows || k >= cols => 0.0,
                        _ if row < 33 => values[row * cols + k],
                        _ => short[row * cols + k].to_f32(),
                    };
                    let expected = match dtype {
                        WeightDtype::F32 => value(step).to_bits(),
                        WeightDtype::Bf16 => {
                            u32::from(round_bf16(value(2 * step))) | u32::from(round_bf16(value(2 * step + 1))) << 16
                        }
                    };
                    assert_eq!(lane, expected, "{dtype:?} row {row} step {step}");
                }
            }
        }
    }
}
