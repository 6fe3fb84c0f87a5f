//! The arithmetic all operations share, and the order of every reduction on one page.
//!
//! Two families, which differ in how bf16 operands are added up: `cpu-fold-2` pair by pair, `cpu-tiles-2` in blocks of
//! pairs, as processors with tile registers do, in the softmax over bf16 KV, which those have less time for, and in
//! what is bf16: there weights of 8 bits with a scale for 32 are, too. Two machines whose nodes announce the same
//! family compute the same bits; what has no bf16 operands is `cpu-fold-2` everywhere. All values are f32 under IEEE
//! 754 rounding to nearest even, `fma` is one rounding, nothing is contracted or
//! reassociated. "Fold" means: `acc = 0; for i ascending: acc = fma(a[i], b[i], acc)`.
//!
//! | operation | order |
//! |---|---|
//! | `embed` | the row as `matmul` has it: bf16 weights through [`round_bf16`], f32 ones as they are, quantized ones `fma(scale, code, -min)` |
//! | `matmul` f32 | fold over k |
//! | `matmul` bf16 | operands through [`round_bf16`]; fold over k pairs (2i, 2i+1), inside a pair the odd element first: `acc = fma(x[2i], w[2i], fma(x[2i+1], w[2i+1], acc))`; an odd k ends with a zero element |
//! | the same, `cpu-tiles-2` | blocks of 16 pairs in ascending order, the last one filled up with zeros: `e` = fold over the even elements of the block, `o` = fold over the odd ones; `acc = acc + (e + o)` |
//! | `matmul_quantized` activations | per token and 32 consecutive k (per token where a weight scale covers a whole row): `m` = largest magnitude, below 1e-30 zero; `s = m / 127`; `q = round_even(x * (127 / m))` |
//! | `matmul_quantized` | groups of weights that share a scale in ascending order: `dot` of integers, exact; `acc = fma(f32(dot), s * scale, acc)`; with minima then `acc = fma(-(s * f32(sum of q)), min, acc)` |
//! | the same of 8 bits and a scale for 32, `cpu-tiles-2` | as `matmul` bf16 of the weights `scale * code` |
//! | `matmul` end | `y = acc`; with bias `y = y + bias`; with add `out = out + y` |
//! | `rms_norm` | 16 lanes, lane i folds `x[i + 16 j]^2` over j; [`tree_sum`]; `s = 1 / sqrt(sum / dim + eps)`; `out = (x * s) * weight` |
//! | `rope` | `(a, b) -> (fma(a, cos, -(b * sin)), fma(b, cos, a * sin))` |
//! | `silu_mul` | `(g / (1 + exp(-g))) * u` |
//! | attention scores | fold over head_dim (bf16: pairs as in `matmul`, q through `round_bf16`), then `* scale`, then softcap `c * tanh(s / c)` |
//! | attention softmax | per part of 512 positions, tiles of 64 counted from position 0, only those with a visible key: `m' = max(m, scores)`, `a = exp(m - m')`, `p = exp(s - m')`, masked p = 0; 16 lanes, lane i adds `p[i], p[i+16], p[i+32], p[i+48]`, tree_sum; `l = fma(l, a, sum)` |
//! | attention values | per tile a fold from zero over its positions (bf16: pairs as in `matmul`, p through `round_bf16`), then `acc = fma(acc, a, fold)` |
//! | attention softmax and values, bf16 KV in `cpu-tiles-2` | tiles of 256 positions, without `* scale` before; `c = scale * log2(e)` (`log2(e)` behind a softcap, which is of `s * scale`); `m'` as above, `a = 2^((m - m') * c)`, `p = 2^fma(s, c, -(m' * c))` by `exp2_weight`, masked p = 0; sums and values as above, 16 vectors of lanes instead of 4, blocks of 16 pairs counted from the tile's first position |
//! | attention parts | ascending: `m' = max(m, mp)`, `a = exp(m - m')`, `b = exp(mp - m')`, `l = fma(lp, b, l * a)`, `acc = fma(accp, b, acc * a)`; at the end `out = acc * (1 / l)`; `a` and `b` as in the softmax |
//! | `sample` | see there: weights by [`exp`] in f32, sums in f64 in ascending id |
//!
//! Why bf16 operands below 2^-56 become zero ([`round_bf16`]): every product of two others is a multiple of
//! 2^-126, so is every rounded sum of such products, and no subnormal number can appear in a fold. The
//! instruction `vdpbf16ps` flushes subnormals and FMA does not; this way nobody can tell, at no cost.
//!
//! A NaN is a NaN: which of its bit patterns appears is not specified.

/// How products of bf16 operands are added up, and what goes with it (the softmax over bf16 KV, whether weights of 8
/// bits are opened): what an instruction set computes with. Part of the numerics id that nodes announce.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Order {
    /// Pair after pair, as `vdpbf16ps` does.
    Pairs,
    /// In blocks, as `tdpbf16ps` does.
    Tiles,
}

impl Order {
    /// Name of the set of orders with this one in it. It changes whenever a bit may.
    pub fn family(self) -> &'static str {
        match self {
            Order::Pairs => "cpu-fold-2",
            Order::Tiles => "cpu-tiles-2",
        }
    }

    /// `acc` plus the products of these pairs, in blocks of `block` pairs where it goes by blocks.
    #[inline(always)]
    pub(crate) fn fold(self, acc: f32, block: usize, pairs: impl Iterator<Item = (u32, u32)>) -> f32 {
        match self {
            Order::Pairs => pairs.fold(acc, |acc, (a, b)| fold_pair(acc, a, b)),
            Order::Tiles => {
                let (mut acc, mut pairs) = (acc, pairs.peekable());
                while pairs.peek().is_some() {
                    acc = fold_block(acc, pairs.by_ref().take(block));
                }
                acc
            }
        }
    }
}

/// Pairs of a block of [`Order::Tiles`].
pub(crate) const TILE_STEPS: usize = 16;

/// Values of one SIMD lane group, whatever the width of the machine's registers.
pub const LANES: usize = 16;

/// Positions after which attention restarts its softmax.
pub const ATTENTION_PART: usize = 512;

/// Positions of one softmax tile.
pub const ATTENTION_TILE: usize = 64;

/// Positions of one softmax tile where bf16 KV is multiplied in tile registers.
pub const ATTENTION_WIDE_TILE: usize = 256;

/// Magnitudes below this (2^-56) are zero as bf16 operands.
pub const BF16_TINY: f32 = f32::from_bits((127 - 56) << 23);

/// Rounds to bf16 (nearest even, NaN stays NaN), magnitudes below 2^-56 to zero. Returns the 16 bits.
#[inline(always)]
pub fn round_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    flush_tiny_bf16(if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded })
}

/// What [`round_bf16`] makes of a value that is bf16 already.
#[inline(always)]
pub(crate) fn flush_tiny_bf16(bits: u16) -> u16 {
    if (bits & 0x7fff) < ((127 - 56) << 7) { 0 } else { bits }
}

/// The f32 value of bf16 bits.
#[inline(always)]
pub fn widen_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The f32 value of IEEE half precision bits. Without branches or calls, so that loops over it are vectorised.
#[inline(always)]
pub(crate) fn widen_f16(bits: u16) -> f32 {
    let (sign, magnitude) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff));
    // The exponent is 112 too small there, which a product mends for subnormal numbers, too.
    let finite = (f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23)).to_bits();
    let rest = if magnitude >= 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(sign | finite | rest)
}

/// Two bf16 values as one 32-bit lane, the even one in the low half.
#[inline(always)]
pub(crate) fn bf16_pair(even: f32, odd: f32) -> u32 {
    u32::from(round_bf16(even)) | u32::from(round_bf16(odd)) << 16
}

/// One step of a bf16 fold: the odd (high) elements first, then the even (low) ones.
#[inline(always)]
pub(crate) fn fold_pair(acc: f32, a: u32, b: u32) -> f32 {
    let high = f32::from_bits(a & 0xffff_0000).mul_add(f32::from_bits(b & 0xffff_0000), acc);
    f32::from_bits(a << 16).mul_add(f32::from_bits(b << 16), high)
}

/// One block of a bf16 fold: even and odd elements each on their own. Pairs of zeros at the end change nothing, since
/// no sum that began with zero is a negative zero.
#[inline(always)]
pub(crate) fn fold_block(acc: f32, pairs: impl Iterator<Item = (u32, u32)>) -> f32 {
    let (even, odd) = pairs.fold((0.0f32, 0.0f32), |(even, odd), (a, b)| {
        let [a_odd, b_odd] = [a, b].map(|pair| f32::from_bits(pair & 0xffff_0000));
        let [a_even, b_even] = [a, b].map(|pair| f32::from_bits(pair << 16));
        (a_even.mul_add(b_even, even), a_odd.mul_add(b_odd, odd))
    });
    acc + (even + odd)
}

/// Sums 16 lanes: lane i takes lane i + 8, then i + 4, i + 2, i + 1.
#[inline(always)]
pub fn tree_sum(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Below this [`exp`] is 0.
pub(crate) const EXP_LEAST: f32 = -87.3;

/// 1.5 * 2^23: adding it rounds to an integer, held in the low bits.
pub(crate) const EXP_MAGIC: f32 = 12_582_912.0;

/// The natural logarithm of 2 in two parts, the first with so few bits that its multiples are exact.
pub(crate) const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];

/// Factors of the polynomial of [`exp`], the highest power first.
pub(crate) const EXP_POLYNOMIAL: [f32; 8] =
    [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

/// `e^x` by range reduction and a polynomial of degree 7: within 2 ulp, 0 below -87.3 (no subnormals),
/// infinity above 88.7, exactly 1 at 0.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let clamped = x.clamp(EXP_LEAST, 88.8);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, EXP_MAGIC);
    let n = shifted - EXP_MAGIC;
    let r = n.mul_add(-LN_2[0], clamped);
    let r = n.mul_add(-LN_2[1], r);
    let mut p = EXP_POLYNOMIAL[0];
    for factor in &EXP_POLYNOMIAL[1..] {
        p = p.mul_add(r, *factor);
    }
    // 2^n in two factors, since n reaches 128.
    let n = (shifted.to_bits() as i32).wrapping_sub(EXP_MAGIC.to_bits() as i32);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    let scaled = p * power(half) * power(n.wrapping_sub(half));
    if x < EXP_LEAST { 0.0 } else { scaled }
}

/// [`exp`] of numbers that are not positive, in fewer steps: there is one power of two, of which no product with the
/// polynomial is subnormal.
#[inline(always)]
pub(crate) fn exp_not_positive(x: f32) -> f32 {
    let shifted = x.mul_add(std::f32::consts::LOG2_E, EXP_MAGIC);
    let n = shifted - EXP_MAGIC;
    let r = n.mul_add(-LN_2[0], x);
    let r = n.mul_add(-LN_2[1], r);
    let mut p = EXP_POLYNOMIAL[0];
    for factor in &EXP_POLYNOMIAL[1..] {
        p = p.mul_add(r, *factor);
    }
    let n = shifted.to_bits().wrapping_sub(EXP_MAGIC.to_bits());
    let scaled = p * f32::from_bits(n.wrapping_add(127) << 23);
    if x < EXP_LEAST { 0.0 } else { scaled }
}

/// Factors of the polynomial of [`exp2_estimate`], the highest power first.
const EXP2_ESTIMATE_POLYNOMIAL: [f32; 5] = [0.009_570_101, 0.055_917_863, 0.240_247_44, 0.693_121_8, 0.999_999_3];

/// `2^x` for `x` from -126 to 0, within 3e-6 of it: for sums that are compared with more to spare.
#[inline(always)]
pub(crate) fn exp2_estimate(x: f32) -> f32 {
    let shifted = x + EXP_MAGIC;
    let r = x - (shifted - EXP_MAGIC);
    let mut p = EXP2_ESTIMATE_POLYNOMIAL[0];
    for factor in &EXP2_ESTIMATE_POLYNOMIAL[1..] {
        p = p.mul_add(r, *factor);
    }
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// What [`exp2_weight`] takes lower exponents for: no weight is below [`BF16_TINY`], so none is flushed in rounding.
pub(crate) const EXP2_LEAST: f32 = -56.0;

/// Factors of the polynomial of [`exp2_weight`], the highest power first.
pub(crate) const EXP2_POLYNOMIAL: [f32; 5] = [0.013_426_851, 0.052_242_205, 0.241_280_33, 0.693_044_84, 1.0];

/// `2^max(x, -56)` within 3e-6 of it, for what is rounded to bf16; exactly 1 at 0. Above 0, where
/// rounding leaves `x` only if scores are beyond all sense, it is some number.
#[inline(always)]
pub(crate) fn exp2_weight(x: f32) -> f32 {
    let x = if x < EXP2_LEAST { EXP2_LEAST } else { x };
    let n = x.floor().min(127.0);
    let mut r = x - n;
    // Rounded down where it is not exact, just below a whole number, as the instruction does that takes the floor away.
    if r + n > x {
        r = r.next_down();
    }
    let mut p = EXP2_POLYNOMIAL[0];
    for factor in &EXP2_POLYNOMIAL[1..] {
        p = p.mul_add(r, *factor);
    }
    p * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// `tanh(x)` through [`exp`]: `1 - 2 / (exp(2x) + 1)`.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// Natural logarithm of a positive normal f64: exponent and mantissa apart, then `2 atanh((m-1)/(m+1))` as
/// a series. Our own, so that log-probabilities do not depend on the C library.
pub fn ln(x: f64) -> f64 {
    if x.is_nan() || x < 0.0 {
        return f64::NAN;
    }
    if x == 0.0 {
        return f64::NEG_INFINITY;
    }
    if x == f64::INFINITY {
        return x;
    }
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mut mantissa = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | (1023 << 52));
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let square = t * t;
    let mut sum = 0.0;
    for i in (0..12).rev() {
        sum = sum * square + 1.0 / f64::from(2 * i + 1);
    }
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * t * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0f64;
        let mut x = -87.2f32;
        while x < 88.7 {
            let got = f64::from(exp(x));
            let want = f64::from(x).exp();
            worst = worst.max(((got - want) / want).abs());
            x += 0.001_37;
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "worst relative error {worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(100.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn weights_to_base_2_are_close_and_never_tiny() {
        let mut worst = 0.0f64;
        let mut x = EXP2_LEAST;
        while x <= 0.0 {
            let want = f64::from(x).exp2();
            worst = worst.max(((f64::from(exp2_weight(x)) - want) / want).abs());
            x += 0.000_37;
        }
        assert!(worst < 3.1e-6, "worst relative error {worst:e}");
        assert_eq!(exp2_weight(0.0), 1.0);
        assert_eq!(exp2_weight(-0.0), 1.0);
        for x in [EXP2_LEAST, -57.0, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp2_weight(x), BF16_TINY);
        }
        assert!(exp2_weight(f32::NAN).is_nan());
    }

    #[test]
    fn exp_of_what_is_not_positive_has_the_bits_of_exp() {
        let near_the_end = EXP_LEAST.to_bits() - 300..EXP_LEAST.to_bits() + 300;
        for bits in (0x8000_0000..=0xff80_0000u32).step_by(1009).chain(near_the_end).chain([0, 0xff80_0000]) {
            let x = f32::from_bits(bits);
            assert_eq!(exp_not_positive(x).to_bits(), exp(x).to_bits(), "{x}");
        }
        assert!(exp_not_positive(f32::NAN).is_nan());
    }

    #[test]
    fn estimates_of_powers_are_as_near_as_they_say() {
        for bits in (0x8000_0000..=(-126.0f32).to_bits()).step_by(997).chain([0, (-126.0f32).to_bits()]) {
            let x = f32::from_bits(bits);
            let (got, want) = (f64::from(exp2_estimate(x)), f64::from(x).exp2());
            assert!((got / want - 1.0).abs() < 3e-6, "{x}: {got} for {want}");
        }
    }

    #[test]
    fn ln_agrees_with_the_library() {
        for x in [1.0f64, 1e-300, 0.3, 1.5, 2.0, std::f64::consts::E, 12345.678, 1e300] {
            assert!((ln(x) - x.ln()).abs() <= 1e-14 * x.ln().abs().max(1.0), "{x}");
        }
        assert_eq!(ln(0.0), f64::NEG_INFINITY);
    }

    #[test]
    fn every_half_precision_value_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let (got, want) = (widen_f16(bits), half::f16::from_bits(bits).to_f32());
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#06x}: {got} for {want}");
        }
    }

    #[test]
    fn rounding_to_bf16_is_to_nearest_even_and_drops_the_tiny() {
        assert_eq!(widen_bf16(round_bf16(1.0)), 1.0);
        assert_eq!(round_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(round_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(round_bf16(1e-17), 0);
        assert_eq!(round_bf16(-1e-17), 0);
        assert_ne!(round_bf16(1.5e-17), 0);
        assert!(widen_bf16(round_bf16(f32::NAN)).is_nan());
        assert_eq!(widen_bf16(round_bf16(f32::INFINITY)), f32::INFINITY);
    }
}
