//! The logical form of quantized weights: what a loader makes of any checkpoint format.

/// Quantized weights `[rows, cols]`, row-major: weight = `scale * (code - offset) - min`.
///
/// Consecutive `group` values of a row share a scale (and a min). A scale may have two levels, as in the
/// k-quants of GGUF: an f16 number for `block` values times a small integer for each group.
///
/// Not in it yet: a permutation of the columns (GPTQ's activation order) and codebooks (NF4, FP8), which
/// would be fields here and a gather or a table in [`pack`](super::QuantizedMatrix::pack).
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedWeights {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Bits of a code: 4, 6 or 8.
    pub bits: u32,
    /// The code that stands for zero.
    pub offset: i32,
    /// Values that share a scale; divides `block`.
    pub group: usize,
    /// Values that share an entry of `scales`; divides `cols`.
    pub block: usize,
    /// `[rows, cols]`
    pub codes: Vec<u8>,
    /// `[rows, cols / block]`
    pub scales: Vec<f32>,
    /// The second level `[rows, cols / group]`, if there is one; then `group` is smaller than `block`.
    pub group_scales: Option<Vec<i8>>,
    /// What is subtracted, if the format has it.
    pub mins: Option<Mins>,
}

/// Minima in two levels, like the scales they come with.
#[derive(Clone, Debug, PartialEq)]
pub struct Mins {
    /// `[rows, cols / block]`
    pub scales: Vec<f32>,
    /// `[rows, cols / group]`
    pub group_mins: Vec<u8>,
}

/// Weights that no kernel computes with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackError {
    /// What they are.
    pub found: String,
}

impl std::fmt::Display for PackError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no kernel computes with {}", self.found)
    }
}

impl std::error::Error for PackError {}

impl QuantizedWeights {
    /// The scale of a group of a row.
    pub fn scale(&self, row: usize, group: usize) -> f32 {
        let scale = self.scales[row * (self.cols / self.block) + group * self.group / self.block];
        match &self.group_scales {
            Some(scales) => scale * f32::from(scales[row * (self.cols / self.group) + group]),
            None => scale,
        }
    }

    /// The minimum of a group of a row; 0 without minima.
    pub fn min(&self, row: usize, group: usize) -> f32 {
        self.mins.as_ref().map_or(0.0, |mins| {
            let scale = mins.scales[row * (self.cols / self.block) + group * self.group / self.block];
            scale * f32::from(mins.group_mins[row * (self.cols / self.group) + group])
        })
    }

    /// Row `row` as f32, one rounding for each value that has a minimum and none otherwise: `out` `[cols]`.
    fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let codes = &self.codes[row * self.cols..][..self.cols];
        for (group, (out, codes)) in out.chunks_mut(self.group).zip(codes.chunks(self.group)).enumerate() {
            let (scale, min) = (self.scale(row, group), self.min(row, group));
            for (out, code) in out.iter_mut().zip(codes) {
                *out = scale.mul_add((i32::from(*code) - self.offset) as f32, -min);
            }
        }
    }

    /// All values as f32 `[rows, cols]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        for (row, out) in values.chunks_exact_mut(self.cols).enumerate() {
            self.dequantize_row(row, out);
        }
        values
    }

    /// What this is, for messages.
    pub(super) fn description(&self) -> String {
        let Self { rows, cols, bits, group, block, .. } = self;
        let mins = if self.mins.is_some() { ", with minima" } else { "" };
        format!("[{rows}, {cols}] of {bits} bits in groups of {group}, blocks of {block}{mins}")
    }
}
