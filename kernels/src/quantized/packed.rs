//! Quantized weights in the order the product reads them.
//!
//! A panel holds 32 output features; its codes lie in quads, 4 consecutive k of one feature in a 32-bit lane.
//!
//! ```text
//! Int8     per 32 k:   [8 quads][32] lanes of 4 bytes | f16 scale [32]                               8.5 bits
//! Int8Pairs            [16 pairs][32] of 2 bytes | f16 scale [32]
//! Int4     per 32 k:   [4][32] lanes: quad q in the low nibbles, q + 4 in the high | f16 scale [32]  4.5 bits
//! Int4Min  per 256 k:  f16 d [32] | f16 dmin [32] | 8 times: as Int4 with u8 scale [32], u8 min [32] 4.63 bits
//! Int6     per 256 k:  f16 d [32] | 8 times: [4][32] low nibbles as Int4 |
//!                      [2][32] lanes: bits 2i, 2i + 1 of each byte are the high bits of quad 2i + lane row |
//!                      i8 scale of the first 16 k [32] | of the second [32]                          6.56 bits
//! Int8Row  per row:    [k / 4 quads][32] lanes | f32 scale [32] | up to 16 quads where k is no multiple of 64
//! ```
//!
//! Codes are unsigned; what stands for zero (128, 8, 0, 32, 128) is subtracted through the sum of the
//! activations, which costs nothing here and no bytes. Where codes are opened instead (`Int8Pairs`), they are signed.
//! Rows beyond n have scale 0; k beyond the row's end (`Int8Row` alone) meet activations that are 0.
#![allow(unsafe_code)]

use half::f16;

use super::weights::{PackError, QuantizedWeights};
use crate::numerics::Order;
use crate::packed_matrix::PANEL;
use crate::pages::Pages;

/// Bytes of one quad of all features of a panel.
pub(super) const QUAD_BYTES: usize = PANEL * 4;

/// The panel formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PackedFormat {
    /// 8 bits, an f16 scale for 32 (GGUF's q8_0).
    Int8,
    /// The same for [`Order::Tiles`], multiplied as bf16.
    Int8Pairs,
    /// 4 bits, an f16 scale for 32 (q4_0).
    Int4,
    /// 4 bits, scales and minima for 32 in two levels (q4_K).
    Int4Min,
    /// 6 bits, scales for 16 in two levels (q6_K).
    Int6,
    /// 8 bits, an f32 scale for a whole row (W8A8).
    Int8Row,
}

impl PackedFormat {
    /// The format that holds such weights exactly, for instruction sets of this order.
    fn of(weights: &QuantizedWeights, order: Order) -> Option<Self> {
        let QuantizedWeights { bits, offset, group, block, cols, .. } = *weights;
        let levels = (weights.group_scales.is_some(), weights.mins.is_some());
        match (bits, offset, group, block, levels) {
            // Of a row of 32 the one scale may be of a whole row, which is an f32.
            (8, 128, 32, 32, (false, false)) if cols > 32 => Some(match order {
                Order::Pairs => Self::Int8,
                Order::Tiles => Self::Int8Pairs,
            }),
            (4, 8, 32, 32, (false, false)) => Some(Self::Int4),
            (4, 0, 32, 256, (true, true)) => Some(Self::Int4Min),
            (6, 32, 16, 256, (true, false)) => Some(Self::Int6),
            // Longer sums would leave 32 bits.
            (8, 128, _, _, (false, false)) if group == cols && block == cols && cols < 1 << 17 => Some(Self::Int8Row),
            _ => None,
        }
    }

    /// Whether instruction sets of this order multiply it.
    pub(crate) fn is_of(self, order: Order) -> bool {
        match self {
            Self::Int8 => order == Order::Pairs,
            Self::Int8Pairs => order == Order::Tiles,
            Self::Int4 | Self::Int4Min | Self::Int6 | Self::Int8Row => true,
        }
    }

    /// Whether its weights are opened to bf16 and multiplied as such, and not as integers.
    pub(crate) fn is_opened(self) -> bool {
        self == Self::Int8Pairs
    }

    /// The code that stands for zero.
    pub(super) fn offset(self) -> i32 {
        match self {
            Self::Int8 | Self::Int8Row => 128,
            // Signed bytes.
            Self::Int8Pairs => 0,
            Self::Int4 => 8,
            Self::Int4Min => 0,
            Self::Int6 => 32,
        }
    }

    /// Weights that share a scale, of a row of `cols`.
    pub(super) fn group(self, cols: usize) -> usize {
        match self {
            Self::Int8 | Self::Int8Pairs | Self::Int4 | Self::Int4Min => 32,
            Self::Int6 => 16,
            Self::Int8Row => cols.next_multiple_of(4),
        }
    }

    /// Activations that share a scale, of a row of `cols`.
    pub(super) fn activation_group(self, cols: usize) -> usize {
        match self {
            Self::Int8Row => cols.next_multiple_of(4),
            _ => 32,
        }
    }

    /// Bytes of a panel of `cols` input features.
    pub(crate) fn panel_bytes(self, cols: usize) -> usize {
        match self {
            Self::Int8 | Self::Int8Pairs => cols / 32 * INT8_BYTES,
            Self::Int4 => cols / 32 * INT4_BYTES,
            Self::Int4Min => cols / 256 * INT4_MIN_BYTES,
            Self::Int6 => cols / 256 * INT6_BYTES,
            // Tiles of the processor read blocks of 16 quads to the end.
            Self::Int8Row => (cols.div_ceil(4) * QUAD_BYTES + PANEL * 4).max(cols.div_ceil(64) * 16 * QUAD_BYTES),
        }
    }
}

pub(super) const INT8_BYTES: usize = 8 * QUAD_BYTES + PANEL * 2;
pub(super) const INT4_BYTES: usize = 4 * QUAD_BYTES + PANEL * 2;
pub(super) const INT4_MIN_BYTES: usize = PANEL * 4 + 8 * INT4_BYTES;
pub(super) const INT6_PART_BYTES: usize = 6 * QUAD_BYTES + PANEL * 2;
pub(super) const INT6_BYTES: usize = PANEL * 2 + 8 * INT6_PART_BYTES;

/// A quantized weight matrix `[rows, cols]` in panels, ready for [`matmul_quantized`](super::matmul_quantized).
pub struct QuantizedMatrix {
    pages: Pages,
    format: PackedFormat,
    rows: usize,
    cols: usize,
}

impl QuantizedMatrix {
    /// Packs `parts` of equal `cols` and format, stacked in order into one matrix for instruction sets of this order.
    ///
    /// # Errors
    /// [`PackError`] if no panel format holds the weights exactly, or the parts are of different formats.
    pub fn pack(order: Order, parts: &[&QuantizedWeights]) -> Result<Self, PackError> {
        let first = parts.first().ok_or_else(|| PackError { found: "no weights".to_string() })?;
        let unknown = |part: &QuantizedWeights| PackError { found: part.description() };
        let format = PackedFormat::of(first, order).ok_or_else(|| unknown(first))?;
        let cols = first.cols;
        let is_other = |part: &&&QuantizedWeights| part.cols != cols || PackedFormat::of(part, order) != Some(format);
        if let Some(other) = parts.iter().find(is_other) {
            return Err(PackError { found: format!("{} stacked on {}", other.description(), first.description()) });
        }
        let rows = parts.iter().map(|part| part.rows).sum::<usize>();
        let panel_bytes = format.panel_bytes(cols);
        let len = rows.div_ceil(PANEL) * panel_bytes;
        let pages = Pages::zeroed(len);
        // SAFETY: the pages were just made for `len` bytes, zeroed, and are ours alone.
        let packed = unsafe { std::slice::from_raw_parts_mut(pages.as_ptr(), len) };
        let sources = parts.iter().flat_map(|part| (0..part.rows).map(move |row| (part, row)));
        for (index, (part, row)) in sources.enumerate() {
            let panel = &mut packed[index / PANEL * panel_bytes..][..panel_bytes];
            pack_row(format, part, row, panel, index % PANEL).ok_or_else(|| unknown(part))?;
        }
        Ok(Self { pages, format, rows, cols })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the weights lie.
    pub fn format(&self) -> PackedFormat {
        self.format
    }

    /// Whether weights are rounded to bf16 and multiplied as such, and not as integers.
    pub fn computes_bf16(&self) -> bool {
        self.format.is_opened()
    }

    /// Bytes held, padding included.
    pub fn size_bytes(&self) -> usize {
        self.rows.div_ceil(PANEL) * self.format.panel_bytes(self.cols)
    }

    /// The weights of one output feature: `out` `[cols]`.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {} into {} values", self.rows, out.len());
        let len = self.format.group(self.cols);
        for (group, out) in out.chunks_mut(len).enumerate() {
            let (scale, min) = (self.scale(row, group), self.min(row, group).unwrap_or(0.0));
            for (k, out) in (group * len..).zip(out) {
                *out = scale.mul_add(self.weight(row, k) as f32, -min);
            }
        }
    }

    pub(crate) fn panel(&self, panel: usize) -> &[u8] {
        assert!(panel < self.rows.div_ceil(PANEL));
        let len = self.format.panel_bytes(self.cols);
        // SAFETY: within the pages (`pack` made them for all panels), initialised, never written again.
        unsafe { std::slice::from_raw_parts(self.pages.as_ptr().add(panel * len), len) }
    }

    /// Input feature `k` of output feature `row`: the code less what stands for zero.
    pub(super) fn weight(&self, row: usize, k: usize) -> i32 {
        let (panel, lane) = (self.panel(row / PANEL), row % PANEL);
        let byte = |start: usize, quad: usize| i32::from(panel[start + quad * QUAD_BYTES + lane * 4 + k % 4]);
        let (quad, shift) = (k % 32 / 4, k % 32 / 16 * 4);
        let nibble = |start: usize| byte(start, quad % 4) >> shift & 15;
        let code = match self.format {
            PackedFormat::Int8 => byte(k / 32 * INT8_BYTES, quad),
            PackedFormat::Int8Pairs => i32::from(panel[int8_pairs_byte(k, lane)] as i8),
            PackedFormat::Int4 => nibble(k / 32 * INT4_BYTES),
            PackedFormat::Int4Min => nibble(int4_min_group(k / 32)),
            PackedFormat::Int6 => {
                let start = int6_part(k / 32);
                let high = byte(start + 4 * QUAD_BYTES, quad % 2) >> (quad / 2 * 2) & 3;
                nibble(start) | high << 4
            }
            PackedFormat::Int8Row => byte(0, k / 4),
        };
        code - self.format.offset()
    }

    /// The scale of a group of output feature `row`.
    pub(super) fn scale(&self, row: usize, group: usize) -> f32 {
        let (panel, lane) = (self.panel(row / PANEL), row % PANEL);
        let half = |start: usize| f16::from_le_bytes([panel[start + lane * 2], panel[start + lane * 2 + 1]]).to_f32();
        match self.format {
            PackedFormat::Int8 | PackedFormat::Int8Pairs => half(group * INT8_BYTES + 8 * QUAD_BYTES),
            PackedFormat::Int4 => half(group * INT4_BYTES + 4 * QUAD_BYTES),
            PackedFormat::Int4Min => {
                let small = panel[int4_min_group(group) + 4 * QUAD_BYTES + lane];
                half(group / 8 * INT4_MIN_BYTES) * f32::from(small)
            }
            PackedFormat::Int6 => {
                let small = panel[int6_part(group / 2) + 6 * QUAD_BYTES + group % 2 * PANEL + lane] as i8;
                half(group / 16 * INT6_BYTES) * f32::from(small)
            }
            PackedFormat::Int8Row => {
                let start = self.cols.div_ceil(4) * QUAD_BYTES + lane * 4;
                f32::from_le_bytes([panel[start], panel[start + 1], panel[start + 2], panel[start + 3]])
            }
        }
    }

    /// The minimum of a group of output feature `row`, if the format has minima.
    pub(super) fn min(&self, row: usize, group: usize) -> Option<f32> {
        if self.format != PackedFormat::Int4Min {
            return None;
        }
        let (panel, lane) = (self.panel(row / PANEL), row % PANEL);
        let start = group / 8 * INT4_MIN_BYTES + PANEL * 2 + lane * 2;
        let scale = f16::from_le_bytes([panel[start], panel[start + 1]]).to_f32();
        Some(scale * f32::from(panel[int4_min_group(group) + 4 * QUAD_BYTES + PANEL + lane]))
    }
}

impl std::fmt::Debug for QuantizedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QuantizedMatrix({:?}, {} x {})", self.format, self.rows, self.cols)
    }
}

/// Where a code of `Int8Pairs` is.
#[inline(always)]
fn int8_pairs_byte(k: usize, lane: usize) -> usize {
    k / 32 * INT8_BYTES + (k % 32 / 2 * PANEL + lane) * 2 + k % 2
}

/// Where the 32 k of an `Int4Min` group begin.
#[inline(always)]
pub(super) fn int4_min_group(group: usize) -> usize {
    group / 8 * INT4_MIN_BYTES + PANEL * 4 + group % 8 * INT4_BYTES
}

/// Where a part of 32 k of `Int6` begins.
#[inline(always)]
pub(super) fn int6_part(part: usize) -> usize {
    part / 8 * INT6_BYTES + PANEL * 2 + part % 8 * INT6_PART_BYTES
}

/// Writes one row into its lane of a panel; `None` if a scale is not an f16 number.
fn pack_row(format: PackedFormat, weights: &QuantizedWeights, row: usize, panel: &mut [u8], lane: usize) -> Option<()> {
    let cols = weights.cols;
    let codes = &weights.codes[row * cols..][..cols];
    let half = |value: f32| {
        let rounded = f16::from_f32(value);
        (rounded.to_f32().to_bits() == value.to_bits() || value.is_nan()).then(|| rounded.to_le_bytes())
    };
    let block_scale = |scales: &[f32], block: usize| half(scales[row * (cols / weights.block) + block]);
    let mut put = |start: usize, bytes: [u8; 2]| panel[start + lane * 2..][..2].copy_from_slice(&bytes);
    match format {
        PackedFormat::Int8 | PackedFormat::Int8Pairs | PackedFormat::Int4 => {
            let (bytes, quads) = if format == PackedFormat::Int4 { (INT4_BYTES, 4) } else { (INT8_BYTES, 8) };
            for group in 0..cols / 32 {
                put(group * bytes + quads * QUAD_BYTES, block_scale(&weights.scales, group)?);
            }
        }
        PackedFormat::Int4Min => {
            let mins = weights.mins.as_ref()?;
            for block in 0..cols / 256 {
                put(block * INT4_MIN_BYTES, block_scale(&weights.scales, block)?);
                put(block * INT4_MIN_BYTES + PANEL * 2, block_scale(&mins.scales, block)?);
            }
        }
        PackedFormat::Int6 => {
            for block in 0..cols / 256 {
                put(block * INT6_BYTES, block_scale(&weights.scales, block)?);
            }
        }
        PackedFormat::Int8Row => {
            let start = cols.div_ceil(4) * QUAD_BYTES + lane * 4;
            panel[start..start + 4].copy_from_slice(&weights.scales[row].to_le_bytes());
            for (k, code) in codes.iter().enumerate() {
                panel[k / 4 * QUAD_BYTES + lane * 4 + k % 4] = *code;
            }
            return Some(());
        }
    }
    if format == PackedFormat::Int8Pairs {
        for (k, code) in codes.iter().enumerate() {
            panel[int8_pairs_byte(k, lane)] = code.wrapping_sub(128);
        }
        return Some(());
    }
    for (part, codes) in codes.chunks_exact(32).enumerate() {
        let start = match format {
            PackedFormat::Int8 => part * INT8_BYTES,
            PackedFormat::Int4 => part * INT4_BYTES,
            PackedFormat::Int4Min => int4_min_group(part),
            PackedFormat::Int6 => int6_part(part),
            PackedFormat::Int8Pairs | PackedFormat::Int8Row => unreachable!("written above"),
        };
        let (first, second) = codes.split_at(16);
        let at = |quad: usize, k: usize| start + quad * QUAD_BYTES + lane * 4 + k % 4;
        if format == PackedFormat::Int8 {
            codes.iter().enumerate().for_each(|(k, code)| panel[at(k / 4, k)] = *code);
            continue;
        }
        for (k, (low, high)) in first.iter().zip(second).enumerate() {
            panel[at(k / 4, k)] = low & 15 | high << 4;
        }
        let small = |panel: &mut [u8], index: usize, value: u8| {
            panel[start + if format == PackedFormat::Int6 { 6 } else { 4 } * QUAD_BYTES + index * PANEL + lane] = value;
        };
        match (format, &weights.group_scales, &weights.mins) {
            (PackedFormat::Int4Min, Some(scales), Some(mins)) => {
                let group = row * (cols / 32) + part;
                small(panel, 0, scales[group] as u8);
                small(panel, 1, mins.group_mins[group]);
            }
            (PackedFormat::Int6, Some(scales), _) => {
                for (k, code) in codes.iter().enumerate() {
                    panel[at(4 + k / 4 % 2, k)] |= (code >> 4) << (k / 8 * 2);
                }
                let group = row * (cols / 16) + 2 * part;
                small(panel, 0, scales[group] as u8);
                small(panel, 1, scales[group + 1] as u8);
            }
            _ => {}
        }
    }
    Some(())
}
