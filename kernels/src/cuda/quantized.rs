//! Quantized weights on a device, and products with them: `kernels/cuda/quantized.cuh`.
//!
//! Of the [logical form](QuantizedWeights) a device takes codes of 8 or 4 bits with one scale for every 32, which is
//! what q8_0 and q4_0 are. They stay codes there; few rows are multiplied with what is made of them in registers, many
//! with a matrix in bf16 that is made before and forgotten afterwards. The values are the same.

use std::sync::Arc;

use super::device::{Args, Buffer, Device, DeviceError, Lane};
use super::ops::{Multiply, Part, launch};
use crate::quantized::QuantizedWeights;

/// Values that share a scale.
const GROUP: usize = 32;

/// A matrix `[n, k]` of codes and scales on a device.
pub struct DeviceWeights {
    codes: Buffer,
    scales: Buffer,
    bits: u32,
    n: usize,
    k: usize,
}

/// A scale as it is kept: most formats have it so.
fn scale_bits(scale: f32) -> Option<u16> {
    let short = half::f16::from_f32(scale);
    (short.is_finite() && short.to_f32().to_bits() == scale.to_bits()).then(|| short.to_bits())
}

/// Whether a device multiplies with these.
fn is_taken(weights: &QuantizedWeights) -> bool {
    let QuantizedWeights { bits, offset, group, block, group_scales, mins, .. } = weights;
    matches!(bits, 4 | 8)
        && *offset == 1 << (bits - 1)
        && (*group, *block) == (GROUP, GROUP)
        && group_scales.is_none()
        && mins.is_none()
}

impl DeviceWeights {
    /// Parts of one matrix, one below the other; `None` if the device does not multiply with such: they are in several
    /// formats, in one with minima or two levels of scales, or have scales that are no f16.
    ///
    /// # Errors
    /// What the device says.
    pub fn new(device: &Arc<dyn Device>, parts: &[&QuantizedWeights]) -> Result<Option<Self>, DeviceError> {
        let Some(first) = parts.first() else { return Ok(None) };
        let is_alike = |part: &&QuantizedWeights| is_taken(part) && (part.bits, part.cols) == (first.bits, first.cols);
        let scales: Option<Vec<u8>> = parts
            .iter()
            .flat_map(|part| &part.scales)
            .map(|scale| scale_bits(*scale).map(u16::to_le_bytes))
            .collect::<Option<Vec<_>>>()
            .map(|scales| scales.into_flattened());
        let Some(scales) = scales.filter(|_| parts.iter().all(is_alike)) else { return Ok(None) };
        let codes: Vec<u8> = match first.bits {
            8 => parts.iter().flat_map(|part| &part.codes).copied().collect(),
            _ => {
                let pairs = parts.iter().flat_map(|part| part.codes.as_chunks::<2>().0);
                pairs.map(|[even, odd]| even | odd << 4).collect()
            }
        };
        let n = parts.iter().map(|part| part.rows).sum();
        let (codes, scales) = (Buffer::of(device, &codes)?, Buffer::of(device, &scales)?);
        Ok(Some(Self { codes, scales, bits: first.bits, n, k: first.cols }))
    }

    /// Bytes of codes and scales.
    pub fn num_bytes(&self) -> usize {
        self.codes.num_bytes() + self.scales.num_bytes()
    }

    /// Values.
    pub fn num_values(&self) -> usize {
        self.n * self.k
    }

    fn named(&self, eight: &'static str, four: &'static str) -> &'static str {
        if self.bits == 8 { eight } else { four }
    }

    fn args(&self, args: Args) -> Args {
        let codes = self.codes.at(0, self.num_values() * self.bits as usize / 8);
        args.address(codes).address(self.scales.at(0, self.num_values() / GROUP * 2))
    }

    /// Its rows `ids` as `out` f32 `[rows, k]`; as [`ops::embed`](super::ops::embed) otherwise.
    ///
    /// # Errors
    /// What the device says.
    pub fn embed(&self, ids: Part<'_>, drawn: Option<&Buffer>, out: &Buffer, rows: usize) -> Result<(), DeviceError> {
        let args = self
            .args(Args::default())
            .address(ids.at(rows * 4))
            .address(drawn.map_or(0, |drawn| drawn.at(0, 4)))
            .address(out.at(0, rows * self.k * 4))
            .u32(self.k);
        launch(out, Lane::Compute, self.named("embed_8", "embed_4"), [rows, 1, 1], 256, 0, &args)
    }

    /// The product of bf16 rows with it, made for [`SKINNY_ROWS_MAX`](super::ops::SKINNY_ROWS_MAX) of them: `out`
    /// `[m, n] = x[m, k] w^T`, with bias, and added to what is there, if said.
    ///
    /// # Errors
    /// What the device says.
    pub fn multiply(
        &self,
        x: &Buffer,
        m: usize,
        bias: Option<&Buffer>,
        out: &Buffer,
        add: bool,
    ) -> Result<(), DeviceError> {
        let (n, k) = (self.n, self.k);
        let args = self
            .args(Args::default().address(x.at(0, m * k * 2)))
            .address(bias.map_or(0, |bias| bias.at(0, n * 4)))
            .address(out.at(0, m * n * 4))
            .u32(m)
            .u32(n)
            .u32(k)
            .u32(usize::from(add));
        let kernel = self.named("quantized_matmul_8", "quantized_matmul_4");
        launch(out, Lane::Compute, kernel, [n.div_ceil(16), m.div_ceil(16), 1], 256, 0, &args)
    }

    /// The same for many rows, by the device's library, with `dense` as memory for the matrix in bf16.
    ///
    /// # Errors
    /// What the device or its library says.
    pub fn multiply_dense(
        &self,
        dense: &Buffer,
        x: &Buffer,
        m: usize,
        bias: Option<&Buffer>,
        out: &Buffer,
        add: bool,
    ) -> Result<(), DeviceError> {
        let (n, k) = (self.n, self.k);
        let args = self.args(Args::default()).address(dense.at(0, n * k * 2)).u32(k);
        let kernel = self.named("dequantize_8", "dequantize_4");
        launch(dense, Lane::Compute, kernel, [n, k.div_ceil(2048), 1], 256, 0, &args)?;
        super::ops::library_matmul(&Multiply { x, w: dense, bias, out, m, n, k, add })
    }
}
