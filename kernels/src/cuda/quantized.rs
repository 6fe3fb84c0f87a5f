//! Quantized weights on a device, and products with them: `kernels/cuda/quantized.cuh`, `k_quants.cuh`,
//! `w8a8_matmul.cu`.
//!
//! Of the [logical form](QuantizedWeights) a device takes the [formats](DeviceFormat) below. They stay codes there. Few
//! rows are multiplied with what is made of them in registers, many with a matrix in bf16 that is made before and
//! forgotten afterwards; the values are the same. With a scale for each row, activations become integers instead, of
//! many rows too.
//!
//! Parts of one matrix may be in several formats: neighbours of one format are a section, and sections are multiplied
//! one after the other into their columns.

use std::sync::Arc;

use super::device::{Args, Buffer, Device, DeviceError, Lane};
use super::ops::{Multiply, Part, SKINNY_ROWS_MAX, launch};
use crate::quantized::QuantizedWeights;

/// Values that share a scale where there is one level of scales.
const GROUP: usize = 32;
/// Values that share a scale of the second level in k-quants.
const K_BLOCK: usize = 256;
/// Of a record of k_quants.cuh.
const RECORD_ROWS: usize = 16;
/// `W8A8_SHARED` of w8a8_matmul.cu.
const W8A8_SHARED: usize = 3 * 2 * 128 * 64;

/// What weights can lie on a device as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceFormat {
    /// Codes of 8 bits, an f16 scale for 32: q8_0.
    Int8,
    /// Codes of 4 bits, an f16 scale for 32: q4_0.
    Int4,
    /// Codes of 4 bits, scales and minima in two levels: q4_K.
    K4,
    /// Codes of 6 bits, scales in two levels: q6_K.
    K6,
    /// Codes of 8 bits, an f32 scale for a row, for activations that are quantized too: W8A8.
    RowInt8,
}

impl DeviceFormat {
    /// Of these weights, if a device multiplies with such.
    pub fn of(weights: &QuantizedWeights) -> Option<Self> {
        let QuantizedWeights { bits, offset, group, block, cols, group_scales, mins, .. } = weights;
        match (bits, offset, *group, *block, group_scales.is_some(), mins.is_some()) {
            (8, 128, GROUP, GROUP, false, false) => Some(Self::Int8),
            (4, 8, GROUP, GROUP, false, false) => Some(Self::Int4),
            (4, 0, 32, K_BLOCK, true, true) => Some(Self::K4),
            (6, 32, 16, K_BLOCK, true, false) => Some(Self::K6),
            (8, 128, group, block, false, false) if (group, block) == (*cols, *cols) => Some(Self::RowInt8),
            _ => None,
        }
        .filter(|format| format.has_products_over(*cols))
    }

    /// Whether there are products that sum over so many values.
    pub fn has_products_over(self, cols: usize) -> bool {
        self != Self::RowInt8 || (cols.is_multiple_of(16) && cols < 1 << 17)
    }

    /// What so many rows of `cols` take.
    pub fn num_bytes(self, rows: usize, cols: usize) -> usize {
        let values = rows * cols;
        match self {
            Self::Int8 => values + values / GROUP * 2,
            Self::Int4 => values / 2 + values / GROUP * 2,
            Self::K4 | Self::K6 => rows.div_ceil(RECORD_ROWS) * num_pairs(cols) * self.record().num_bytes,
            Self::RowInt8 => values + rows * 4,
        }
    }

    fn record(self) -> Record {
        let (low, high) = (8 * 512, 8 * 256);
        match self {
            Self::K6 => Record { scales: 64, low: 64 + 512, high: 64 + 512 + low, num_bytes: 64 + 512 + low + high },
            _ => Record { scales: 128, low: 128 + 512, high: 128 + 512 + low, num_bytes: 128 + 512 + low },
        }
    }
}

/// Where things begin in a record of k_quants.cuh, and where it ends.
struct Record {
    scales: usize,
    low: usize,
    high: usize,
    num_bytes: usize,
}

/// Of blocks, in a row of `k`.
fn num_pairs(k: usize) -> usize {
    (k / K_BLOCK).div_ceil(2)
}

/// A matrix `[n, k]` of codes and scales on a device.
pub struct DeviceWeights {
    sections: Vec<Section>,
    n: usize,
    k: usize,
}

/// Rows of it in one format.
struct Section {
    format: DeviceFormat,
    /// Codes, or records of k-quants.
    codes: Buffer,
    /// All scales; none beside records.
    scales: Option<Buffer>,
    first_row: usize,
    rows: usize,
}

/// A scale as it is kept: most formats have it so.
fn scale_bits(scale: f32) -> Option<u16> {
    let short = half::f16::from_f32(scale);
    (short.is_finite() && short.to_f32().to_bits() == scale.to_bits()).then(|| short.to_bits())
}

fn f16_bytes<'a>(scales: impl Iterator<Item = &'a f32>) -> Option<Vec<u8>> {
    let bytes: Option<Vec<[u8; 2]>> = scales.map(|scale| scale_bits(*scale).map(u16::to_le_bytes)).collect();
    bytes.map(|bytes| bytes.into_flattened())
}

/// Records of k_quants.cuh, `None` if scales are no f16.
fn records(format: DeviceFormat, parts: &[&QuantizedWeights]) -> Option<Vec<u8>> {
    let (rows, k) = (parts.iter().map(|part| part.rows).sum::<usize>(), parts[0].cols);
    let (Record { scales, low, high, num_bytes }, pairs) = (format.record(), num_pairs(k));
    let mut bytes = vec![0; format.num_bytes(rows, k)];
    let all_rows = parts.iter().flat_map(|part| (0..part.rows).map(move |row| (*part, row)));
    for (row, (weights, part_row)) in all_rows.enumerate() {
        let g = row % 8;
        for block in 0..k / K_BLOCK {
            let record = &mut bytes[(row / RECORD_ROWS * pairs + block / 2) * num_bytes..][..num_bytes];
            let part = row % RECORD_ROWS / 8 * 2 + block % 2;
            let (of_block, of_group) =
                (part_row * (k / K_BLOCK) + block, (part_row * k + block * K_BLOCK) / weights.group);
            let group_scales = &weights.group_scales.as_ref()?[of_group..];
            let d = scale_bits(weights.scales[of_block])?.to_le_bytes();
            match &weights.mins {
                Some(mins) => {
                    let at = (g * 4 + part) * 4;
                    record[at..at + 2].copy_from_slice(&d);
                    record[at + 2..at + 4].copy_from_slice(&scale_bits(mins.scales[of_block])?.to_le_bytes());
                    let groups = group_scales.iter().zip(&mins.group_mins[of_group..]).take(8);
                    for (warp, (scale, min)) in groups.enumerate() {
                        let at = scales + warp * 64 + g * 8 + part * 2;
                        (record[at], record[at + 1]) = (*scale as u8, *min);
                    }
                }
                None => {
                    record[(g * 4 + part) * 2..][..2].copy_from_slice(&d);
                    for (half, scale) in group_scales[..16].iter().enumerate() {
                        record[scales + half / 2 * 64 + g * 8 + half % 2 * 4 + part] = *scale as u8 ^ 0x80;
                    }
                }
            }
            let codes = &weights.codes[part_row * k + block * K_BLOCK..][..K_BLOCK];
            for (eighth, codes) in codes.as_chunks::<8>().0.iter().enumerate() {
                let at = (eighth / 4 * 32 + 4 * g + eighth % 4) * 4 + part;
                let lower = codes.iter().rev().fold(0u32, |lower, code| lower << 4 | u32::from(code & 15));
                record[low + at * 4..][..4].copy_from_slice(&lower.to_le_bytes());
                if format == DeviceFormat::K6 {
                    let both_parts = &mut record[high + at / 2 * 4..][..4];
                    for (e, code) in codes.iter().enumerate() {
                        both_parts[e / 2] |= code >> 4 << (part % 2 * 4 + e % 2 * 2);
                    }
                }
            }
        }
    }
    Some(bytes)
}

impl Section {
    /// Parts of one format, one below the other, from `first_row` on; `None` if scales are none that it can have.
    fn new(
        device: &Arc<dyn Device>,
        format: DeviceFormat,
        parts: &[&QuantizedWeights],
        first_row: usize,
    ) -> Result<Option<Self>, DeviceError> {
        let all_codes = || parts.iter().flat_map(|part| &part.codes).copied();
        let all_scales = || parts.iter().flat_map(|part| &part.scales);
        let laid_out = match format {
            DeviceFormat::Int8 => f16_bytes(all_scales()).map(|scales| (all_codes().collect(), scales)),
            DeviceFormat::Int4 => f16_bytes(all_scales()).map(|scales| {
                let pairs = parts.iter().flat_map(|part| part.codes.as_chunks::<2>().0);
                (pairs.map(|[even, odd]| even | odd << 4).collect(), scales)
            }),
            DeviceFormat::K4 | DeviceFormat::K6 => records(format, parts).map(|records| (records, Vec::new())),
            // As signed numbers.
            DeviceFormat::RowInt8 => Some((
                all_codes().map(|code| code ^ 0x80).collect(),
                all_scales().flat_map(|scale| scale.to_le_bytes()).collect(),
            )),
        };
        let Some((codes, scales)): Option<(Vec<u8>, Vec<u8>)> = laid_out else { return Ok(None) };
        let rows = parts.iter().map(|part| part.rows).sum();
        let scales = if scales.is_empty() { None } else { Some(Buffer::of(device, &scales)?) };
        Ok(Some(Self { format, codes: Buffer::of(device, &codes)?, scales, first_row, rows }))
    }

    /// Codes, and scales where they are not in the codes' records.
    fn args(&self, args: Args) -> Args {
        let args = args.address(self.codes.at(0, self.codes.num_bytes()));
        match &self.scales {
            Some(scales) => args.address(scales.at(0, scales.num_bytes())),
            None => args,
        }
    }

    /// The kernel of this format among these of q8_0, q4_0, q4_K and q6_K.
    fn kernel(&self, [eight, four, k4, k6]: [&'static str; 4]) -> &'static str {
        match self.format {
            DeviceFormat::Int8 => eight,
            DeviceFormat::Int4 => four,
            DeviceFormat::K4 => k4,
            DeviceFormat::K6 => k6,
            DeviceFormat::RowInt8 => unreachable!("matrices with a scale for a row have kernels of their own"),
        }
    }
}

/// A product with these weights: `out` `[m, n] = x[m, k] w^T`, with bias, and added to what is there, if said.
#[derive(Clone, Copy)]
pub struct MultiplyQuantized<'a> {
    /// bf16 `[m, k]`
    pub x: &'a Buffer,
    /// Rows.
    pub m: usize,
    /// f32 `[n]`
    pub bias: Option<&'a Buffer>,
    /// f32 `[m, n]`
    pub out: &'a Buffer,
    /// Whether `out` is added to.
    pub add: bool,
}

impl DeviceWeights {
    /// Parts of one matrix, one below the other; `None` if the device does not multiply with one of them: it is in [no
    /// format](DeviceFormat) that it has, or has scales that are no f16. A scale for each row is for matrices that have
    /// nothing else.
    ///
    /// # Errors
    /// What the device says.
    pub fn new(device: &Arc<dyn Device>, parts: &[&QuantizedWeights]) -> Result<Option<Self>, DeviceError> {
        let formats: Option<Vec<_>> = parts.iter().map(|part| DeviceFormat::of(part)).collect();
        let Some((formats, first)) = formats.zip(parts.first()) else { return Ok(None) };
        let is_in_rows = |format: &DeviceFormat| *format == DeviceFormat::RowInt8;
        if parts.iter().any(|part| part.cols != first.cols)
            || formats.iter().any(is_in_rows) && !formats.iter().all(is_in_rows)
        {
            return Ok(None);
        }
        let (mut sections, mut n) = (Vec::new(), 0);
        let both: Vec<_> = formats.into_iter().zip(parts.iter().copied()).collect();
        for alike in both.chunk_by(|a, b| a.0 == b.0) {
            let parts: Vec<_> = alike.iter().map(|(_, part)| *part).collect();
            let Some(section) = Section::new(device, alike[0].0, &parts, n)? else { return Ok(None) };
            n += section.rows;
            sections.push(section);
        }
        Ok(Some(Self { sections, n, k: first.cols }))
    }

    /// Bytes of codes and scales.
    pub fn num_bytes(&self) -> usize {
        let scales = |section: &Section| section.scales.as_ref().map_or(0, Buffer::num_bytes);
        self.sections.iter().map(|section| section.codes.num_bytes() + scales(section)).sum()
    }

    /// Values.
    pub fn num_values(&self) -> usize {
        self.n * self.k
    }

    /// Whether activations are quantized too, for products of any number of rows.
    pub fn quantizes_activations(&self) -> bool {
        self.sections.iter().any(|section| section.format == DeviceFormat::RowInt8)
    }

    /// Memory that [`multiply_with`](Self::multiply_with) needs for `m` rows.
    pub fn scratch_bytes(&self, m: usize) -> usize {
        if self.quantizes_activations() { codes_bytes(m, self.k) + m * 4 } else { 2 * self.num_values() }
    }

    /// Its rows `ids` as `out` f32 `[rows, k]`; as [`ops::embed`](super::ops::embed) otherwise.
    ///
    /// # Errors
    /// What the device says.
    ///
    /// # Panics
    /// If the matrix is no table: it has several formats, or a scale for each row.
    pub fn embed(&self, ids: Part<'_>, drawn: Option<&Buffer>, out: &Buffer, rows: usize) -> Result<(), DeviceError> {
        let [table] = &self.sections[..] else { panic!("a table of {} formats", self.sections.len()) };
        let args = table
            .args(Args::default())
            .address(ids.at(rows * 4))
            .address(drawn.map_or(0, |drawn| drawn.at(0, 4)))
            .address(out.at(0, rows * self.k * 4))
            .u32(self.k);
        let kernel = table.kernel(["embed_8", "embed_4", "embed_k_quant_4", "embed_k_quant_6"]);
        launch(out, Lane::Compute, kernel, [rows, 1, 1], 256, 0, &args)
    }

    /// The product, made for [`SKINNY_ROWS_MAX`] rows.
    ///
    /// # Errors
    /// What the device says.
    ///
    /// # Panics
    /// If [activations are quantized](Self::quantizes_activations).
    pub fn multiply(&self, multiply: &MultiplyQuantized<'_>) -> Result<(), DeviceError> {
        let MultiplyQuantized { x, m, .. } = *multiply;
        for section in &self.sections {
            let args = section.args(Args::default().address(x.at(0, m * self.k * 2)));
            let args = self.ended(multiply, section, args);
            let kernel =
                section.kernel(["quantized_matmul_8", "quantized_matmul_4", "k_quant_matmul_4", "k_quant_matmul_6"]);
            let grid = [section.rows.div_ceil(16), m.div_ceil(16), 1];
            launch(multiply.out, Lane::Compute, kernel, grid, 256, 0, &args)?;
        }
        Ok(())
    }

    /// The same with [memory](Self::scratch_bytes) beside it: of many rows by the device's library, from the matrix in
    /// bf16; with [quantized activations](Self::quantizes_activations) of any number of rows, by kernels.
    ///
    /// # Errors
    /// What the device or its library says.
    pub fn multiply_with(&self, multiply: &MultiplyQuantized<'_>, scratch: &Buffer) -> Result<(), DeviceError> {
        if self.quantizes_activations() {
            return self.multiply_integers(multiply, scratch);
        }
        let (n, k) = (self.n, self.k);
        for section in &self.sections {
            let dense = scratch.at(section.first_row * k * 2, section.rows * k * 2);
            let args = section.args(Args::default()).address(dense);
            let (args, grid) = match section.format {
                DeviceFormat::K4 | DeviceFormat::K6 => {
                    (args.u32(section.rows).u32(k), [section.rows.div_ceil(RECORD_ROWS), num_pairs(k), 1])
                }
                _ => (args.u32(k), [section.rows, k.div_ceil(2048), 1]),
            };
            let kernel =
                section.kernel(["dequantize_8", "dequantize_4", "k_quant_dequantize_4", "k_quant_dequantize_6"]);
            launch(scratch, Lane::Compute, kernel, grid, 256, 0, &args)?;
        }
        let MultiplyQuantized { x, m, bias, out, add } = *multiply;
        super::ops::library_matmul(&Multiply { x, w: scratch, bias, out, m, n, k, add })
    }

    /// With activations that become integers in `scratch`. Both kernels give a row the same bits.
    fn multiply_integers(&self, multiply: &MultiplyQuantized<'_>, scratch: &Buffer) -> Result<(), DeviceError> {
        let (MultiplyQuantized { x, m, out, .. }, k) = (*multiply, self.k);
        let (codes, scales) = (scratch.at(0, m * k), scratch.at(codes_bytes(m, k), m * 4));
        let args = Args::default().address(x.at(0, m * k * 2)).address(codes).address(scales).u32(k);
        launch(out, Lane::Compute, "w8a8_quantize", [m, 1, 1], 256, 0, &args)?;
        for section in &self.sections {
            let args = section.args(Args::default().address(codes).address(scales));
            let args = self.ended(multiply, section, args);
            let (kernel, tile, shared_bytes) = match m {
                ..=SKINNY_ROWS_MAX => ("w8a8_matmul", 16, 0),
                _ => ("w8a8_matmul_tiled", 128, W8A8_SHARED),
            };
            let grid = [section.rows.div_ceil(tile), m.div_ceil(tile), 1];
            launch(out, Lane::Compute, kernel, grid, 256, shared_bytes, &args)?;
        }
        Ok(())
    }

    /// Bias, columns of the result, and shapes.
    fn ended(&self, multiply: &MultiplyQuantized<'_>, section: &Section, args: Args) -> Args {
        let (MultiplyQuantized { m, bias, out, add, .. }, first) = (*multiply, section.first_row * 4);
        args.address(bias.map_or(0, |bias| bias.at(first, section.rows * 4)))
            .address(if m == 0 { 0 } else { out.at(first, (m * self.n - section.first_row) * 4) })
            .u32(m)
            .u32(section.rows)
            .u32(self.k)
            .u32(self.n)
            .u32(usize::from(add))
    }
}

/// Of activations as integers, with scales behind them.
fn codes_bytes(m: usize, k: usize) -> usize {
    (m * k).next_multiple_of(16)
}
