//! Weights in the order the matrix product reads them.
//!
//! A weight `[rows, cols]` (`[n, k]`, as checkpoints store it) becomes panels of 32 rows:
//!
//! ```text
//! bf16  [n/32][k/2][32][2]     one 32-bit lane = two k of one output feature
//! f32   [n/32][k][32]
//! ```
//!
//! Rows beyond n and the second half of an odd last pair are zero, and so are pairs beyond k up to a multiple of 16.
#![allow(unsafe_code)]

use std::ops::Range;

use half::bf16;

use crate::numerics::{TILE_STEPS, flush_tiny_bf16, round_bf16, widen_bf16, widen_f16};
use crate::pages::Pages;

/// Output features of a panel.
pub const PANEL: usize = 32;

/// Steps packed at a time: two lines of the cache of each row, which the processor fetches together.
const STEPS: usize = 32;

/// Type that a packed matrix stores and the product computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightDtype {
    /// f32 weights and activations.
    F32,
    /// bf16 weights and activations, f32 accumulation.
    Bf16,
}

/// Row-major weights: in memory, or as they lie in a file, little-endian and aligned to nothing.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// f32 values.
    F32(&'a [f32]),
    /// bf16 values.
    Bf16(&'a [bf16]),
    /// f32 values of a file.
    F32Bytes(&'a [[u8; 4]]),
    /// IEEE half precision values of a file.
    F16Bytes(&'a [[u8; 2]]),
    /// bf16 values of a file.
    Bf16Bytes(&'a [[u8; 2]]),
}

impl Weights<'_> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Weights::F32(values) => values.len(),
            Weights::Bf16(values) => values.len(),
            Weights::F32Bytes(values) => values.len(),
            Weights::F16Bytes(values) | Weights::Bf16Bytes(values) => values.len(),
        }
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes steps `first_step..` of the row `row` to `lanes`, as many as there are.
    fn lanes(&self, dtype: WeightDtype, row: Range<usize>, first_step: usize, lanes: &mut [u32; STEPS]) {
        let half = u16::from_le_bytes;
        match (dtype, *self) {
            (WeightDtype::F32, Weights::F32(v)) => singles(&v[row], first_step, lanes, |x| x),
            (WeightDtype::F32, Weights::Bf16(v)) => singles(&v[row], first_step, lanes, |x| widen_bf16(x.to_bits())),
            (WeightDtype::F32, Weights::F32Bytes(v)) => singles(&v[row], first_step, lanes, f32::from_le_bytes),
            (WeightDtype::F32, Weights::F16Bytes(v)) => singles(&v[row], first_step, lanes, |x| widen_f16(half(x))),
            (WeightDtype::F32, Weights::Bf16Bytes(v)) => singles(&v[row], first_step, lanes, |x| widen_bf16(half(x))),
            (WeightDtype::Bf16, Weights::F32(v)) => pairs(&v[row], first_step, lanes, round_bf16),
            (WeightDtype::Bf16, Weights::Bf16(v)) => {
                pairs(&v[row], first_step, lanes, |x| flush_tiny_bf16(x.to_bits()));
            }
            (WeightDtype::Bf16, Weights::F32Bytes(v)) => {
                pairs(&v[row], first_step, lanes, |x| round_bf16(f32::from_le_bytes(x)));
            }
            (WeightDtype::Bf16, Weights::F16Bytes(v)) => {
                pairs(&v[row], first_step, lanes, |x| round_bf16(widen_f16(half(x))));
            }
            (WeightDtype::Bf16, Weights::Bf16Bytes(v)) => {
                pairs(&v[row], first_step, lanes, |x| flush_tiny_bf16(half(x)));
            }
        }
    }
}

/// One value of the row in each lane.
#[inline(always)]
fn singles<T: Copy>(row: &[T], first_step: usize, lanes: &mut [u32; STEPS], widen: impl Fn(T) -> f32) {
    let row = &row[first_step..];
    let count = row.len().min(STEPS);
    for (lane, value) in lanes[..count].iter_mut().zip(&row[..count]) {
        *lane = widen(*value).to_bits();
    }
}

/// Two values of the row in each lane; an odd one at the end stands beside zero.
#[inline(always)]
fn pairs<T: Copy>(row: &[T], first_step: usize, lanes: &mut [u32; STEPS], round: impl Fn(T) -> u16) {
    let (pairs, last) = row[2 * first_step..].as_chunks::<2>();
    let count = pairs.len().min(STEPS);
    for (lane, [even, odd]) in lanes[..count].iter_mut().zip(&pairs[..count]) {
        *lane = u32::from(round(*even)) | u32::from(round(*odd)) << 16;
    }
    if let (Some(lane), [even]) = (lanes.get_mut(pairs.len()), last) {
        *lane = u32::from(round(*even));
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
        let (depth, stored) = (depth_of(dtype, cols), stored_steps(dtype, cols));
        let lanes = rows.div_ceil(PANEL) * stored * PANEL;
        let pages = Pages::zeroed(lanes * 4);
        // SAFETY: the pages were just made for `lanes` 32-bit values, zeroed, aligned, and are ours alone.
        let packed = unsafe { std::slice::from_raw_parts_mut(pages.as_ptr().cast::<u32>(), lanes) };
        let sources =
            parts.iter().zip(&part_rows).flat_map(|(part, &num_rows)| (0..num_rows).map(move |row| (part, row)));
        let sources: Vec<(&Weights<'_>, usize)> = sources.collect();
        let mut tile = [[0u32; STEPS]; PANEL];
        for (panel, sources) in packed.chunks_exact_mut(stored * PANEL).zip(sources.chunks(PANEL)) {
            for (block, lanes) in panel[..depth * PANEL].chunks_mut(STEPS * PANEL).enumerate() {
                for (steps, (part, row)) in tile.iter_mut().zip(sources) {
                    part.lanes(dtype, row * cols..(row + 1) * cols, block * STEPS, steps);
                }
                for (step, lanes) in lanes.chunks_exact_mut(PANEL).enumerate() {
                    // Only rows that are there: behind the last one the panel stays zero.
                    for (lane, steps) in lanes.iter_mut().zip(&tile[..sources.len()]) {
                        *lane = steps[step];
                    }
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

    /// The lanes of one panel: `[depth][32]`, f32 bits or bf16 pairs, and zeros up to a whole block of a tile.
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

    /// The weights of one output feature as the product sees them: `out` `[cols]`.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {} into {} values", self.rows, out.len());
        let steps = self.panel(row / PANEL)[row % PANEL..].iter().step_by(PANEL).take(self.depth());
        match self.dtype {
            WeightDtype::F32 => out.iter_mut().zip(steps).for_each(|(out, lane)| *out = f32::from_bits(*lane)),
            WeightDtype::Bf16 => {
                for (out, lane) in out.chunks_mut(2).zip(steps) {
                    let pair = [f32::from_bits(lane << 16), f32::from_bits(lane & 0xffff_0000)];
                    out.copy_from_slice(&pair[..out.len()]);
                }
            }
        }
    }

    /// Bytes of a panel as it is stored.
    pub(crate) fn panel_bytes(&self) -> usize {
        self.panel_lanes() * 4
    }

    fn panel_lanes(&self) -> usize {
        stored_steps(self.dtype, self.cols) * PANEL
    }
}

fn depth_of(dtype: WeightDtype, cols: usize) -> usize {
    match dtype {
        WeightDtype::F32 => cols,
        WeightDtype::Bf16 => cols.div_ceil(2),
    }
}

/// Steps of a panel as they are stored.
fn stored_steps(dtype: WeightDtype, cols: usize) -> usize {
    match dtype {
        WeightDtype::F32 => cols,
        WeightDtype::Bf16 => depth_of(dtype, cols).next_multiple_of(TILE_STEPS),
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
    use half::f16;

    /// A value of every kind: large, small, negative, tiny enough to be flushed as bf16, not exact as bf16.
    fn value(index: usize) -> f32 {
        let sign = if index.is_multiple_of(3) { -1.0 } else { 1.0 };
        match index % 7 {
            0 => sign * 1e-18,
            1 => 0.0,
            _ => sign * (index as f32 + 0.25) / 512.0,
        }
    }

    #[test]
    fn every_weight_lies_in_its_panel_and_padding_is_zero() {
        let (cols, rows) = (141, 70);
        let values: Vec<f32> = (0..rows * cols).map(value).collect();
        let short: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
        let cut = 33 * cols;
        for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
            let w = PackedMatrix::pack(dtype, cols, &[Weights::F32(&values[..cut]), Weights::Bf16(&short[cut..])]);
            assert_eq!((w.rows(), w.cols(), w.part_rows()), (rows, cols, &[33, 37][..]));
            let steps = w.size_bytes() / (3 * PANEL * 4);
            assert!(steps == w.depth() || dtype == WeightDtype::Bf16 && steps == 80, "{dtype:?}: {steps}");
            for row in 0..96 {
                for step in 0..steps {
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

    #[test]
    fn values_of_a_file_are_packed_as_those_in_memory() {
        for (cols, rows) in [(141, 35), (64, 32), (1, 3), (66, 1)] {
            let values: Vec<f32> = (0..rows * cols).map(value).collect();
            let short: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
            let half: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
            let widened: Vec<f32> = half.iter().map(|x| x.to_f32()).collect();
            let bytes4: Vec<[u8; 4]> = values.iter().map(|x| x.to_le_bytes()).collect();
            let bytes2: Vec<[u8; 2]> = short.iter().map(|x| x.to_le_bytes()).collect();
            let half: Vec<[u8; 2]> = half.iter().map(|x| x.to_le_bytes()).collect();
            for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
                let lanes = |weights: Weights<'_>| -> Vec<u32> {
                    let packed = PackedMatrix::pack(dtype, cols, &[weights]);
                    (0..packed.num_panels()).flat_map(|panel| packed.panel(panel).to_vec()).collect()
                };
                assert_eq!(lanes(Weights::F32Bytes(&bytes4)), lanes(Weights::F32(&values)), "{dtype:?} {cols}");
                assert_eq!(lanes(Weights::Bf16Bytes(&bytes2)), lanes(Weights::Bf16(&short)), "{dtype:?} {cols}");
                assert_eq!(lanes(Weights::F16Bytes(&half)), lanes(Weights::F32(&widened)), "{dtype:?} {cols}");
            }
        }
    }
}
