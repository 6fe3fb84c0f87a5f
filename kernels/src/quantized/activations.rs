//! Rows of f32 to 8-bit integers with a scale for each group.
//!
//! 32 values share a scale, as in the weights, and not a whole token: a single large feature, which trained
//! models have, then costs the precision of its 31 neighbours and not of the whole row.
#![allow(clippy::needless_range_loop)] // loops over all lanes, which are vectorised as such

use super::packed::PackedFormat;

/// Lanes of a group beside its quads: the scale, and two that depend on the format, see [`Group::extras`].
pub(super) const EXTRA_LANES: usize = 3;

/// A group smaller than this is zero: its reciprocal would not be finite.
const TINY: f32 = 1e-30;

/// One group of one token.
pub(super) struct Group {
    /// What an integer stands for.
    pub(super) scale: f32,
    /// 127 divided by the largest magnitude.
    reciprocal: f32,
}

impl Group {
    /// Of these values. A NaN or an infinity among them makes the scale, and with it every output, that.
    #[inline(always)]
    pub(super) fn of(x: &[f32]) -> Group {
        // As integers, the bits of magnitudes are ordered like the magnitudes, with NaN the largest.
        let bits = x.iter().fold(0u32, |max, x| max.max(x.to_bits() & 0x7fff_ffff));
        let max = f32::from_bits(bits);
        if max < TINY {
            return Group { scale: 0.0, reciprocal: 0.0 };
        }
        Group { scale: max / 127.0, reciprocal: 127.0 / max }
    }

    /// The integer of one value, from -127 to 127, half to even; 0 if the group has a NaN or an infinity.
    ///
    /// The last bit of numbers around `SHIFT` stands for 1, so adding it rounds, and leaves the integer in the low
    /// bits. `as i32` says more, what to do with numbers too large, and would be done one by one.
    #[inline(always)]
    pub(super) fn quantize(&self, x: f32) -> i32 {
        const SHIFT: f32 = 1.5 * (1 << 23) as f32;
        let x = x * self.reciprocal;
        let x = if x.abs() < 128.0 { x } else { 0.0 };
        (x + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32
    }

    /// The integers of up to 32 values, 0 behind the last.
    #[inline(always)]
    fn integers(&self, x: &[f32]) -> Integers {
        // Always 32: loops of a known length are vectorised (`map` of an array would be a call, into code without these
        // instructions).
        let (mut padded, mut integers) = ([0.0f32; 32], [0; 32]);
        let values: &[f32; 32] = x.try_into().unwrap_or_else(|_| {
            padded[..x.len()].copy_from_slice(x);
            &padded
        });
        for i in 0..32 {
            integers[i] = self.quantize(values[i]);
        }
        Integers(integers)
    }

    /// The two lanes behind the scale, for the sums of the integers of the group's halves: what an integer
    /// accumulator starts with, and in formats with minima the factor of the minimum; in formats with two
    /// scales to the group, the starts of both.
    #[inline(always)]
    pub(super) fn extras(&self, format: PackedFormat, sums: [i32; 2]) -> [u32; 2] {
        let whole = sums[0].wrapping_add(sums[1]);
        let start = |sum: i32| format.offset().wrapping_mul(sum).wrapping_neg() as u32;
        match format {
            PackedFormat::Int6 => sums.map(start),
            PackedFormat::Int4Min => [start(whole), (-(self.scale * whole as f32)).to_bits()],
            _ => [start(whole), 0],
        }
    }
}

/// 32 integers of a row, or sums of such.
struct Integers([i32; 32]);

impl Integers {
    const ZERO: Self = Self([0; 32]);

    #[inline(always)]
    fn add(&mut self, other: &Self) {
        for i in 0..32 {
            self.0[i] += other.0[i];
        }
    }

    /// Sums of the halves.
    #[inline(always)]
    fn sums(&self) -> [i32; 2] {
        let mut sums = [0; 2];
        for i in 0..16 {
            sums[0] += self.0[i];
            sums[1] += self.0[16 + i];
        }
        sums
    }

    #[inline(always)]
    fn bytes(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for i in 0..32 {
            bytes[i] = self.0[i] as u8;
        }
        bytes
    }
}

/// Packs columns of row `r` of a tile of `num_rows`, whole groups of rows of `cols`: per group
/// `[quads + 3][num_rows]` lanes, a quad holding the integers of 4 consecutive k.
#[inline(always)]
pub(crate) fn pack_row(
    row: &[f32],
    cols: usize,
    format: PackedFormat,
    (r, num_rows): (usize, usize),
    into: &mut [u32],
) {
    let group = format.activation_group(cols);
    let lanes_per_group = (group / 4 + EXTRA_LANES) * num_rows;
    for (x, into) in row.chunks(group).zip(into.chunks_exact_mut(lanes_per_group)) {
        let scale = Group::of(x);
        let mut sums = Integers::ZERO;
        let mut lanes = into[r..].iter_mut().step_by(num_rows);
        for x in x.chunks(32) {
            let integers = scale.integers(x);
            sums.add(&integers);
            for (lane, quad) in lanes.by_ref().zip(integers.bytes().as_chunks::<4>().0).take(x.len().div_ceil(4)) {
                *lane = u32::from_le_bytes(*quad);
            }
        }
        let [first, second] = scale.extras(format, sums.sums());
        for (lane, value) in lanes.zip([scale.scale.to_bits(), first, second]) {
            *lane = value;
        }
    }
}

/// Lanes that [`pack_row`] needs for each row of `k`.
pub(crate) fn lanes_per_row(k: usize, format: PackedFormat) -> usize {
    let group = format.activation_group(k);
    k.div_ceil(group) * (group / 4 + EXTRA_LANES)
}

/// Groups of activations that lie in one block, each 32 k.
pub(super) const BLOCK_GROUPS: usize = 8;

/// Lanes of 32 k of a row in a block, and of a line: 64 k.
pub(super) const GROUP_LANES: usize = 8;
const LINE_LANES: usize = 16;

/// Lanes of a group beside its bytes: the scale, and the factor of the minimum.
pub(super) const BLOCK_EXTRA_LANES: usize = 2;

/// Lanes of 256 k of a row with what belongs to them: whole lines, as tiles of the processor want to be loaded.
pub(super) const BLOCK_LANES: usize = BLOCK_GROUPS * (GROUP_LANES + BLOCK_EXTRA_LANES);

/// Packs columns of row `r` of a tile of `num_rows`, whole blocks but for the last one of rows of `cols`, for tiles of
/// the processor: per 256 k `[8][num_rows][32 bytes] | [8][2][num_rows]` lanes, a scale and the factor of the minimum;
/// of whole rows that share a scale `[block][num_rows][64 bytes] | [2][num_rows]`, the scale and what sums begin with.
#[inline(always)]
pub(crate) fn pack_row_in_blocks(
    row: &[f32],
    cols: usize,
    format: PackedFormat,
    (r, num_rows): (usize, usize),
    into: &mut [u32],
) {
    let put = |into: &mut [u32], start: usize, integers: &Integers| {
        for (lane, quad) in into[start..][..GROUP_LANES].iter_mut().zip(integers.bytes().as_chunks::<4>().0) {
            *lane = u32::from_le_bytes(*quad);
        }
    };
    if format == PackedFormat::Int8Row {
        let (scale, mut sums) = (Group::of(row), Integers::ZERO);
        let (lines, extras) = into.split_at_mut(cols.div_ceil(64) * LINE_LANES * num_rows);
        for (index, line) in lines.chunks_exact_mut(LINE_LANES * num_rows).enumerate() {
            for half in 0..2 {
                // Nothing behind the last column: zeros.
                let x = &row[(index * 64 + half * 32).min(cols)..(index * 64 + half * 32 + 32).min(cols)];
                let integers = scale.integers(x);
                sums.add(&integers);
                put(line, r * LINE_LANES + half * GROUP_LANES, &integers);
            }
        }
        extras[r] = scale.scale.to_bits();
        extras[num_rows + r] = scale.extras(format, sums.sums())[0];
        return;
    }
    for (block, into) in row.chunks(32 * BLOCK_GROUPS).zip(into.chunks_exact_mut(BLOCK_LANES * num_rows)) {
        let (lines, extras) = into.split_at_mut(BLOCK_GROUPS * GROUP_LANES * num_rows);
        for (index, x) in block.chunks(32).enumerate() {
            let scale = Group::of(x);
            let integers = scale.integers(x);
            put(lines, (index * num_rows + r) * GROUP_LANES, &integers);
            let extras = &mut extras[index * BLOCK_EXTRA_LANES * num_rows..];
            extras[r] = scale.scale.to_bits();
            extras[num_rows + r] = scale.extras(format, integers.sums())[1];
        }
    }
}

/// Lanes that [`pack_row_in_blocks`] needs for each row of `k`.
pub(crate) fn lanes_per_row_in_blocks(k: usize, format: PackedFormat) -> usize {
    match format {
        // A line for the scale, so that tiles begin with lines.
        PackedFormat::Int8Row => (k.div_ceil(64) + 1) * LINE_LANES,
        _ => k.div_ceil(32 * BLOCK_GROUPS) * BLOCK_LANES,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_rounded_half_to_even_and_zero_beside_what_is_not_finite() {
        // A largest magnitude of 127 makes the reciprocal 1.
        let unit = Group::of(&[127.0]);
        for x in (-127 * 64..=127 * 64).map(|x| x as f32 / 64.0) {
            for x in [x.next_down(), x, x.next_up()] {
                assert_eq!(unit.quantize(x), x.round_ties_even() as i32, "{x}");
            }
        }
        // The largest of a group is 127 whatever its reciprocal was rounded to.
        for bits in (TINY.to_bits()..f32::MAX.to_bits()).step_by(9973) {
            let x = f32::from_bits(bits);
            assert_eq!((Group::of(&[x]).quantize(x), Group::of(&[x]).quantize(-x)), (127, -127), "{x}");
        }
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let group = Group::of(&[1.0, odd]);
            assert_eq!((group.quantize(1.0), group.quantize(odd)), (0, 0), "{odd}");
        }
    }
}
