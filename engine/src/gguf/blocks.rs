//! ggml's blocks of quantized values become the kernels' logical form.
//!
//! | type | values | bytes of a block |
//! |---|---|---|
//! | Q8_0 | 32 | f16 d, i8 q [32]: `d * q` |
//! | Q4_0 | 32 | f16 d, 16 bytes, value i in low nibble i, i + 16 in high nibble i: `d * (q - 8)` |
//! | Q4_K | 256 | f16 d, f16 dmin, 12 bytes of 6-bit scales and minima for 32 values each, 128 bytes: of each 64 values the first 32 in low nibbles, the others in high ones: `d * s * q - dmin * m` |
//! | Q6_K | 256 | 128 bytes of low nibbles, 64 of high bits, i8 scale [16], f16 d: `d * s * (q - 32)` |

use common::gguf::GgmlType;
use half::f16;
use kernels::{Mins, QuantizedWeights};

/// The rows of a quantized tensor `[rows, cols]`, `source_row(row)` of the file becoming row `row`. `None` for types
/// that are not quantized.
///
/// `bytes` are those of the whole tensor, in whole blocks: the header's reader has checked that.
pub(crate) fn quantized(
    ty: GgmlType,
    bytes: &[u8],
    rows: usize,
    cols: usize,
    source_row: impl Fn(usize) -> usize,
) -> Option<QuantizedWeights> {
    let (bits, offset, group) = match ty {
        GgmlType::Q8_0 => (8, 128, 32),
        GgmlType::Q4_0 => (4, 8, 32),
        GgmlType::Q4_K => (4, 0, 32),
        GgmlType::Q6_K => (6, 32, 16),
        GgmlType::F32 | GgmlType::F16 | GgmlType::Bf16 | GgmlType::Other(_) => return None,
    };
    let (block, block_bytes) = ty.block()?;
    let is_k = block == 256;
    let mut weights = QuantizedWeights {
        rows,
        cols,
        bits,
        offset,
        group,
        block,
        codes: vec![0; rows * cols],
        scales: Vec::with_capacity(rows * cols / block),
        group_scales: is_k.then(|| Vec::with_capacity(rows * cols / group)),
        mins: (ty == GgmlType::Q4_K).then(|| Mins {
            scales: Vec::with_capacity(rows * cols / block),
            group_mins: Vec::with_capacity(rows * cols / group),
        }),
    };
    let row_bytes = cols / block * block_bytes;
    for row in 0..rows {
        let source = &bytes[source_row(row) * row_bytes..][..row_bytes];
        for index in 0..cols / block {
            let source = &source[index * block_bytes..][..block_bytes];
            let start = row * cols + index * block;
            read_block(ty, source, start, &mut weights);
        }
    }
    Some(weights)
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

fn read_block(ty: GgmlType, source: &[u8], start: usize, weights: &mut QuantizedWeights) {
    let codes = &mut weights.codes[start..start + weights.block];
    match ty {
        GgmlType::Q8_0 => {
            weights.scales.push(half(source));
            for (code, q) in codes.iter_mut().zip(&source[2..]) {
                *code = q ^ 0x80; // i8 + 128
            }
        }
        GgmlType::Q4_0 => {
            weights.scales.push(half(source));
            for (i, byte) in source[2..].iter().enumerate() {
                (codes[i], codes[i + 16]) = (byte & 15, byte >> 4);
            }
        }
        GgmlType::Q4_K => {
            weights.scales.push(half(source));
            let (scales, quants) = source[4..].split_at(12);
            let group_scales = weights.group_scales.as_mut().expect("Q4_K has two levels");
            let mins = weights.mins.as_mut().expect("Q4_K has minima");
            mins.scales.push(half(&source[2..]));
            for group in 0..8 {
                let (scale, min) = scale_and_min(scales, group);
                group_scales.push(scale as i8);
                mins.group_mins.push(min);
            }
            for (i, byte) in quants.iter().enumerate() {
                let at = i / 32 * 64 + i % 32;
                (codes[at], codes[at + 32]) = (byte & 15, byte >> 4);
            }
        }
        _ => {
            let (low, rest) = source.split_at(128);
            let (high, rest) = rest.split_at(64);
            let (scales, d) = rest.split_at(16);
            weights.scales.push(half(d));
            let group_scales = weights.group_scales.as_mut().expect("Q6_K has two levels");
            group_scales.extend(scales.iter().map(|scale| *scale as i8));
            // Each half of the block in quarters of 32: low nibbles of bytes 0..32 and 32..64, then high ones.
            for (half, codes) in codes.chunks_exact_mut(128).enumerate() {
                for (i, code) in codes.iter_mut().enumerate() {
                    let (quarter, l) = (i / 32, i % 32);
                    let low = low[half * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
                    let high = high[half * 32 + l] >> (quarter * 2) & 3;
                    *code = low | high << 4;
                }
            }
        }
    }
}

/// The 6-bit scale and minimum of a group of Q4_K: those of the first four groups are in the low bits of bytes
/// 0 to 7, those of the others in the nibbles of bytes 8 to 11 with their high bits on top of the first ones.
fn scale_and_min(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        return (packed[group] & 63, packed[group + 4] & 63);
    }
    let scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4;
    let min = packed[group + 4] >> 4 | packed[group] >> 6 << 4;
    (scale, min)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    /// candle dequantizes the same bytes to the same values, but for the rounding of `d * s * q - dmin * m`.
    #[test]
    fn every_type_means_what_candle_reads_in_it() {
        let (rows, cols) = (5, 512);
        let values: Vec<f32> = (0..rows * cols).map(|i| kernels::uniform(3, 0, i as u32) as f32 - 0.4).collect();
        let tensor = Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap();
        for (ty, theirs) in [
            (GgmlType::Q8_0, GgmlDType::Q8_0),
            (GgmlType::Q4_0, GgmlDType::Q4_0),
            (GgmlType::Q4_K, GgmlDType::Q4K),
            (GgmlType::Q6_K, GgmlDType::Q6K),
        ] {
            let stored = QTensor::quantize(&tensor, theirs).unwrap();
            let expected: Vec<f32> = stored.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let ours = quantized(ty, &stored.data().unwrap(), rows, cols, |row| row).unwrap();
            for (i, (ours, expected)) in ours.dequantize().iter().zip(&expected).enumerate() {
                assert!((ours - expected).abs() <= 1e-6, "{ty:?} value {i}: {ours}, {expected}");
            }
            kernels::QuantizedMatrix::pack(kernels::Order::Pairs, &[&ours]).unwrap();
            let reversed = quantized(ty, &stored.data().unwrap(), rows, cols, |row| rows - 1 - row).unwrap();
            assert_eq!(reversed.dequantize()[..cols], ours.dequantize()[(rows - 1) * cols..]);
        }
        assert_eq!(quantized(GgmlType::F16, &[], 0, 1, |row| row), None);
    }
}
