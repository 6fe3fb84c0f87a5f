//! Sixteen f32 lanes on each instruction set, and the two ways from a generic kernel to machine code.
//!
//! Kernels with register tiles (`matmul`, `attention`) are generic over [`Simd`]; row-wise ones are plain
//! loops over lanes that the compiler vectorises. Both are `#[inline(always)]` and compiled once per
//! instruction set inside a `#[target_feature]` function, by [`with_simd!`] and [`vectorised!`].
//! No closures around intrinsics: a closure does not inherit target features.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // row r, column c: the shapes of the drawing

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use crate::numerics::{BF16_TINY, EXP_LEAST, EXP_MAGIC, EXP_POLYNOMIAL, EXP2_LEAST, EXP2_POLYNOMIAL, LN_2};
use crate::numerics::{LANES, exp, round_bf16, widen_bf16};

/// Vectors of 16 f32 (`V`) and of 16 bf16 pairs prepared for folding (`P`).
///
/// # Safety
/// Every function requires that the machine has the instruction set; pointers must be valid for 16 lanes
/// (unaligned is fine).
pub(crate) trait Simd {
    /// Rows of a matmul tile.
    const TILE_ROWS: usize;
    /// Vectors side by side in a matmul tile: 1 or 2.
    const TILE_COLS: usize;
    /// Lanes of a bf16 pair on the left of [`fold_tile`]: 1, or 2 with its elements widened to f32, the even one
    /// first. Without an instruction that multiplies pairs, every panel would have to take them apart anew.
    const PAIR_LANES: usize;
    /// Most rows of an attention tile.
    const QUERY_ROWS: usize;
    /// Vectors side by side in it: 1 or 2.
    const QUERY_COLS: usize;
    /// Up to so many rows of an attention tile leave registers for 4 vectors side by side.
    const WIDE_QUERY_ROWS: usize;
    type V: Copy;
    type P: Copy;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(into: *mut f32, x: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Per lane `if a > b { a } else { b }`.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The sum of all lanes in the order of [`tree_sum`](crate::numerics::tree_sum).
    unsafe fn tree_sum(x: Self::V) -> f32;
    /// The highest of all lanes.
    unsafe fn tree_max(x: Self::V) -> f32;
    /// The lanes whose bits are set, `other` in place of the rest.
    #[inline(always)]
    unsafe fn keep(x: Self::V, lanes: u16, other: f32) -> Self::V {
        let mut values = [0.0f32; LANES];
        // SAFETY: the array holds 16 lanes.
        unsafe {
            Self::store(values.as_mut_ptr(), x);
            for (i, value) in values.iter_mut().enumerate() {
                *value = if lanes >> i & 1 == 1 { *value } else { other };
            }
            Self::load(values.as_ptr())
        }
    }
    /// [`exp`](crate::numerics::exp) of lanes that are not positive.
    #[inline(always)]
    unsafe fn exp_not_positive(x: Self::V) -> Self::V {
        let mut values = [0.0f32; LANES];
        // SAFETY: the array holds 16 lanes.
        unsafe {
            Self::store(values.as_mut_ptr(), x);
            values.iter_mut().for_each(|value| *value = exp(*value));
            Self::load(values.as_ptr())
        }
    }
    /// Lanes that are not negative through [`round_bf16`](crate::numerics::round_bf16), as f32. A NaN has no bits
    /// beyond those of bf16 set, as what comes from bf16 operands has not.
    #[inline(always)]
    unsafe fn round_not_negative(x: Self::V) -> Self::V {
        let mut values = [0.0f32; LANES];
        // SAFETY: the array holds 16 lanes.
        unsafe {
            Self::store(values.as_mut_ptr(), x);
            values.iter_mut().for_each(|value| *value = widen_bf16(round_bf16(*value)));
            Self::load(values.as_ptr())
        }
    }
    /// The bits of the same, 8 lanes of them.
    #[inline(always)]
    unsafe fn store_rounded_not_negative(into: *mut u32, x: Self::V) {
        let mut values = [0.0f32; LANES];
        // SAFETY: the array holds 16 lanes, and 8 are valid (the trait's contract).
        unsafe {
            Self::store(values.as_mut_ptr(), x);
            into.cast::<[u16; LANES]>().write_unaligned(values.map(round_bf16));
        }
    }
    /// The pair that lies in [`PAIR_LANES`](Self::PAIR_LANES) lanes.
    unsafe fn splat_pair(from: *const u32) -> Self::P;
    unsafe fn load_pairs(from: *const u32) -> Self::P;
    /// Per lane `fma(a.low, b.low, fma(a.high, b.high, acc))`: [`fold_pair`](crate::numerics::fold_pair).
    unsafe fn fold_pairs(acc: Self::V, a: Self::P, b: Self::P) -> Self::V;
}

/// The common core of `matmul` and `attention`: `acc[r][c] = fold over steps of a[r, step] * b[c][step]`,
/// on top of what `acc` holds. `a` is `[depth][MR]` if `A_ROW` is 0, else `[MR][A_ROW lanes]`; `b[c]` is the first
/// step's 16 lanes of column vector c, further steps `stride` lanes apart. With `PAIRS` a lane of `b` is a bf16
/// pair, and `PAIR_LANES` of `a` are; else a lane is an f32.
///
/// Meanwhile the lines at `ahead` move to the second-level cache, at the same strides: what the caller will read
/// next, which the machine cannot guess; `b` itself if there is nothing.
///
/// # Safety
/// `a` is valid for these lanes, each `b[c]` for 16 lanes at every step. `ahead` may be anything.
#[inline(always)]
pub(crate) unsafe fn fold_tile<S: Simd, const MR: usize, const NR: usize, const PAIRS: bool, const A_ROW: usize>(
    acc: &mut [[S::V; NR]; MR],
    depth: usize,
    a: *const u32,
    b: &[*const u32; NR],
    stride: usize,
    ahead: &[*const u32; NR],
) {
    // SAFETY: pointers stay inside the ranges the caller vouches for.
    unsafe {
        for step in 0..depth {
            let lanes = if PAIRS { S::PAIR_LANES } else { 1 };
            let a = a.add(lanes * if A_ROW == 0 { step * MR } else { step });
            let row_stride = if A_ROW == 0 { lanes } else { A_ROW };
            for c in 0..NR {
                prefetch(ahead[c].wrapping_add(step * stride));
            }
            if PAIRS {
                let mut columns = [S::load_pairs(b[0].add(step * stride)); NR];
                for c in 1..NR {
                    columns[c] = S::load_pairs(b[c].add(step * stride));
                }
                for r in 0..MR {
                    let row = S::splat_pair(a.add(r * row_stride));
                    for c in 0..NR {
                        acc[r][c] = S::fold_pairs(acc[r][c], row, columns[c]);
                    }
                }
            } else {
                let mut columns = [S::splat(0.0); NR];
                for c in 0..NR {
                    columns[c] = S::load(b[c].add(step * stride).cast());
                }
                for r in 0..MR {
                    let row = S::splat(f32::from_bits(*a.add(r * row_stride)));
                    for c in 0..NR {
                        acc[r][c] = S::fma(row, columns[c], acc[r][c]);
                    }
                }
            }
        }
    }
}

/// Has the line at this address moved to the second-level cache; an address of nothing is ignored.
#[inline(always)]
pub(crate) fn prefetch(_address: *const u32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 machine has the instruction, which reads nothing that a program could see.
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(_address.cast());
    }
}

/// Folds 8 lanes to one: lane i with i + 4, then i + 2, i + 1.
#[cfg(target_arch = "x86_64")]
macro_rules! tree {
    ($x:expr, $op:ident) => {{
        let x = $op(_mm256_castps256_ps128($x), _mm256_extractf128_ps::<1>($x));
        let x = $op(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32($op(x, _mm_movehdup_ps(x)))
    }};
}

#[cfg(target_arch = "x86_64")]
pub(crate) struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Simd for Avx2 {
    // 16 registers: two for each row's sums, two (bf16: four) for the weights, one (two) for the activation.
    const TILE_ROWS: usize = 6;
    const TILE_COLS: usize = 1;
    const PAIR_LANES: usize = 2;
    const QUERY_ROWS: usize = 6;
    const QUERY_COLS: usize = 1;
    const WIDE_QUERY_ROWS: usize = 0;
    type V = [__m256; 2];
    /// Low elements and high elements, widened.
    type P = [[__m256; 2]; 2];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        // SAFETY: AVX2 is there (the trait's contract).
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: 16 lanes are valid (the trait's contract).
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(into: *mut f32, x: Self::V) {
        // SAFETY: 16 lanes are valid (the trait's contract).
        unsafe {
            _mm256_storeu_ps(into, x[0]);
            _mm256_storeu_ps(into.add(8), x[1]);
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: AVX2 is there.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: AVX is there.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: AVX is there.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: FMA is there.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: AVX is there.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn tree_sum(x: Self::V) -> f32 {
        // SAFETY: AVX is there.
        unsafe { tree!(_mm256_add_ps(x[0], x[1]), _mm_add_ps) }
    }
    #[inline(always)]
    unsafe fn tree_max(x: Self::V) -> f32 {
        // SAFETY: AVX is there.
        unsafe { tree!(_mm256_max_ps(x[0], x[1]), _mm_max_ps) }
    }
    #[inline(always)]
    unsafe fn splat_pair(from: *const u32) -> Self::P {
        // SAFETY: AVX2 is there, and two lanes are valid (the trait's contract).
        unsafe { [Self::splat(*from.cast()), Self::splat(*from.add(1).cast())] }
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const u32) -> Self::P {
        // SAFETY: 16 lanes are valid (the trait's contract).
        unsafe {
            let high_half = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let first = _mm256_loadu_si256(from.cast());
            let second = _mm256_loadu_si256(from.add(8).cast());
            [
                [
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(first)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(second)),
                ],
                [
                    _mm256_castsi256_ps(_mm256_and_si256(first, high_half)),
                    _mm256_castsi256_ps(_mm256_and_si256(second, high_half)),
                ],
            ]
        }
    }
    #[inline(always)]
    unsafe fn fold_pairs(acc: Self::V, a: Self::P, b: Self::P) -> Self::V {
        // SAFETY: FMA is there.
        unsafe { Self::fma(a[0], b[0], Self::fma(a[1], b[1], acc)) }
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! avx512 {
    ($name:ident, wide query rows $rows:literal, pair lanes $pair_lanes:literal, $pairs:ty, $splat_pair:item $load_pairs:item $fold_pairs:item $($store_rounded:item)?) => {
        #[cfg(target_arch = "x86_64")]
        pub(crate) struct $name;

        #[cfg(target_arch = "x86_64")]
        impl Simd for $name {
            const TILE_ROWS: usize = 12;
            const TILE_COLS: usize = 2;
            const PAIR_LANES: usize = $pair_lanes;
            const QUERY_ROWS: usize = 12;
            const QUERY_COLS: usize = 2;
            const WIDE_QUERY_ROWS: usize = $rows;
            type V = __m512;
            type P = $pairs;

            #[inline(always)]
            unsafe fn splat(x: f32) -> __m512 {
                // SAFETY: AVX-512F is there (the trait's contract).
                unsafe { _mm512_set1_ps(x) }
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> __m512 {
                // SAFETY: 16 lanes are valid (the trait's contract).
                unsafe { _mm512_loadu_ps(from) }
            }
            #[inline(always)]
            unsafe fn store(into: *mut f32, x: __m512) {
                // SAFETY: 16 lanes are valid (the trait's contract).
                unsafe { _mm512_storeu_ps(into, x) }
            }
            #[inline(always)]
            unsafe fn add(a: __m512, b: __m512) -> __m512 {
                // SAFETY: AVX-512F is there.
                unsafe { _mm512_add_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn sub(a: __m512, b: __m512) -> __m512 {
                // SAFETY: AVX-512F is there.
                unsafe { _mm512_sub_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn mul(a: __m512, b: __m512) -> __m512 {
                // SAFETY: AVX-512F is there.
                unsafe { _mm512_mul_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
                // SAFETY: AVX-512F is there.
                unsafe { _mm512_fmadd_ps(a, b, c) }
            }
            #[inline(always)]
            unsafe fn max(a: __m512, b: __m512) -> __m512 {
                // SAFETY: AVX-512F is there.
                unsafe { _mm512_max_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn tree_sum(x: __m512) -> f32 {
                // SAFETY: AVX-512DQ is there.
                unsafe { tree!(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x)), _mm_add_ps) }
            }
            #[inline(always)]
            unsafe fn tree_max(x: __m512) -> f32 {
                // SAFETY: AVX-512DQ is there.
                unsafe { tree!(_mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x)), _mm_max_ps) }
            }
            #[inline(always)]
            unsafe fn keep(x: __m512, lanes: u16, other: f32) -> __m512 {
                // SAFETY: AVX-512F is there.
                unsafe { _mm512_mask_blend_ps(lanes, _mm512_set1_ps(other), x) }
            }
            #[inline(always)]
            unsafe fn exp_not_positive(x: __m512) -> __m512 {
                // SAFETY: AVX-512F is there.
                unsafe {
                    let magic = _mm512_set1_ps(EXP_MAGIC);
                    let n = _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E), magic), magic);
                    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-LN_2[0]), x);
                    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-LN_2[1]), r);
                    let mut p = _mm512_set1_ps(EXP_POLYNOMIAL[0]);
                    for factor in &EXP_POLYNOMIAL[1..] {
                        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*factor));
                    }
                    // What is below becomes zero whatever was computed for it; a NaN is not below. All other powers of
                    // two are exact, as there are no subnormal results.
                    let counts = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(EXP_LEAST));
                    _mm512_maskz_scalef_ps(counts, p, n)
                }
            }
            #[inline(always)]
            unsafe fn round_not_negative(x: __m512) -> __m512 {
                // SAFETY: AVX-512F is there.
                unsafe {
                    let bits = _mm512_castps_si512(x);
                    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
                    // A number that rounds up to the least that counts does count.
                    let least = _mm512_set1_epi32(BF16_TINY.to_bits() as i32);
                    let counts = _mm512_cmp_epu32_mask::<_MM_CMPINT_NLT>(rounded, least);
                    let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                    _mm512_castsi512_ps(_mm512_maskz_and_epi32(counts, rounded, high))
                }
            }
            #[inline(always)]
            $splat_pair
            #[inline(always)]
            $load_pairs
            #[inline(always)]
            $fold_pairs
            $(
                #[inline(always)]
                $store_rounded
            )?
        }
    };
}

#[cfg(target_arch = "x86_64")]
avx512!(
    Avx512,
    // 32 registers: with 4 vectors of keys taken apart into 8, 6 rows of sums would leave none.
    wide query rows 5,
    pair lanes 2,
    [__m512; 2],
    unsafe fn splat_pair(from: *const u32) -> [__m512; 2] {
        // SAFETY: AVX-512F is there, and two lanes are valid (the trait's contract).
        unsafe { [_mm512_set1_ps(*from.cast()), _mm512_set1_ps(*from.add(1).cast())] }
    }
    unsafe fn load_pairs(from: *const u32) -> [__m512; 2] {
        // SAFETY: 16 lanes are valid (the trait's contract).
        unsafe {
            let pairs = _mm512_loadu_si512(from.cast());
            let high = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(high)]
        }
    }
    unsafe fn fold_pairs(acc: __m512, a: [__m512; 2], b: [__m512; 2]) -> __m512 {
        // SAFETY: AVX-512F is there.
        unsafe { _mm512_fmadd_ps(a[0], b[0], _mm512_fmadd_ps(a[1], b[1], acc)) }
    }
);

#[cfg(target_arch = "x86_64")]
avx512!(
    Avx512Bf16,
    wide query rows 6,
    pair lanes 1,
    __m512bh,
    unsafe fn splat_pair(from: *const u32) -> __m512bh {
        // SAFETY: AVX-512F is there, and the lane is valid (the trait's contract); both types are 64 bytes.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*from as i32)) }
    }
    unsafe fn load_pairs(from: *const u32) -> __m512bh {
        // SAFETY: 16 lanes are valid (the trait's contract); both types are 64 bytes.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.cast())) }
    }
    unsafe fn fold_pairs(acc: __m512, a: __m512bh, b: __m512bh) -> __m512 {
        // SAFETY: AVX-512-BF16 is there (the trait's contract).
        unsafe { _mm512_dpbf16_ps(acc, a, b) }
    }
    unsafe fn store_rounded_not_negative(into: *mut u32, x: __m512) {
        // SAFETY: AVX-512F and AVX-512-BF16 are there, and 8 lanes are valid (the trait's contract).
        unsafe {
            // A number that rounds up to the least that counts does count, as does a NaN.
            let least = _mm512_set1_ps(f32::from_bits(BF16_TINY.to_bits() - 0x8000));
            let counts = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, least);
            let rounded = _mm512_maskz_cvtneps_pbh(counts, x);
            _mm256_storeu_si256(into.cast(), std::mem::transmute::<__m256bh, __m256i>(rounded));
        }
    }
);

#[cfg(target_arch = "x86_64")]
impl Avx512Bf16 {
    /// [`exp2_weight`](crate::numerics::exp2_weight).
    ///
    /// # Safety
    /// As of [`Simd`].
    #[inline(always)]
    pub(crate) unsafe fn exp2_weight(x: __m512) -> __m512 {
        const MINUS_FLOOR: i32 = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
        // SAFETY: AVX-512DQ is there.
        unsafe {
            // The second operand if it is a NaN.
            let x = _mm512_max_ps(_mm512_set1_ps(EXP2_LEAST), x);
            let r = _mm512_reduce_ps::<MINUS_FLOOR>(x);
            let mut p = _mm512_set1_ps(EXP2_POLYNOMIAL[0]);
            for factor in &EXP2_POLYNOMIAL[1..] {
                p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*factor));
            }
            // By 2^floor(x).
            _mm512_scalef_ps(p, x)
        }
    }

    /// Two vectors through [`round_bf16`](crate::numerics::round_bf16), one behind the other.
    ///
    /// # Safety
    /// As of [`Simd`].
    #[inline(always)]
    pub(crate) unsafe fn round(first: __m512, second: __m512) -> __m512i {
        const LEAST: i16 = (BF16_TINY.to_bits() >> 16) as i16;
        // SAFETY: AVX-512BW and AVX-512-BF16 are there; both types are 64 bytes.
        unsafe {
            let rounded = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
            let magnitudes = _mm512_and_si512(rounded, _mm512_set1_epi16(0x7fff));
            let counts = _mm512_cmp_epi16_mask::<_MM_CMPINT_NLT>(magnitudes, _mm512_set1_epi16(LEAST));
            _mm512_maskz_mov_epi16(counts, rounded)
        }
    }

    /// 32 values through [`round_bf16`](crate::numerics::round_bf16): 16 pairs of neighbours.
    ///
    /// # Safety
    /// As of [`Simd`], for two vectors of values and one of pairs.
    #[inline(always)]
    pub(crate) unsafe fn store_pairs(into: *mut u32, from: *const f32) {
        // SAFETY: as required of the caller.
        unsafe { _mm512_storeu_si512(into.cast(), Self::round(Self::load(from), Self::load(from.add(LANES)))) }
    }

    /// Two vectors of weights that are zero or not tiny, rounded to bf16: 16 pairs of neighbours.
    ///
    /// # Safety
    /// As of [`Simd`].
    #[inline(always)]
    pub(crate) unsafe fn store_weights(into: *mut u32, [first, second]: [__m512; 2]) {
        // SAFETY: AVX-512-BF16 is there, and 16 lanes are valid (the trait's contract); both types are 64 bytes.
        unsafe {
            let rounded = _mm512_cvtne2ps_pbh(second, first);
            _mm512_storeu_si512(into.cast(), std::mem::transmute::<__m512bh, __m512i>(rounded));
        }
    }
}

/// Values that instructions are tried with: the state of their generator.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Values(pub(crate) u64);

#[cfg(target_arch = "x86_64")]
impl Values {
    /// A value of bf16 between 2^-exponents and 2^(exponents + 1), or its negative.
    pub(crate) fn next(&mut self, exponents: i64) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bits = self.0 >> 33;
        let sign = if bits & 1 == 0 { 1.0 } else { -1.0 };
        let mantissa = 1.0 + (bits >> 1 & 0x7f) as f64 / 128.0;
        let exponent = (bits >> 8) as i64 % (2 * exponents + 1) - exponents;
        (sign * mantissa * 2f64.powi(exponent as i32)) as f32
    }
}

/// Whether `vdpbf16ps` of this machine is [`fold_pair`](crate::numerics::fold_pair), tried on enough values to
/// tell it from every other order.
///
/// # Safety
/// The machine has AVX-512F and AVX-512-BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) unsafe fn bf16_dot_product_is_the_fold(rounds: u64) -> bool {
    use crate::numerics::{bf16_pair, fold_pair};
    let mut values = Values(1);
    let mut value = |exponents: i64| values.next(exponents);
    for round in 0..rounds {
        // Near 1, where the order shows in the rounding, and over the whole range of operands.
        let range = if round % 2 == 0 { 6 } else { 50 };
        let (mut acc, mut a, mut b) = ([0.0f32; 16], [0u32; 16], [0u32; 16]);
        for i in 0..16 {
            a[i] = bf16_pair(value(range), value(range));
            b[i] = bf16_pair(value(range), value(range));
            // What a fold has reached: a sum of products.
            acc[i] = value(range) * value(range) + value(range) * value(range);
        }
        let mut got = [0.0f32; 16];
        // SAFETY: the arrays hold 16 lanes; the features are this function's contract.
        unsafe {
            let folded = Avx512Bf16::fold_pairs(
                Avx512Bf16::load(acc.as_ptr()),
                Avx512Bf16::load_pairs(a.as_ptr()),
                Avx512Bf16::load_pairs(b.as_ptr()),
            );
            Avx512Bf16::store(got.as_mut_ptr(), folded);
        }
        if (0..16).any(|i| got[i].to_bits() != fold_pair(acc[i], a[i], b[i]).to_bits()) {
            return false;
        }
    }
    true
}

/// Calls a kernel `unsafe fn f<S>(args)`, generic over [`Simd`] or [`Lanes`](crate::lanes::Lanes), compiled for an
/// [`Isa`](crate::Isa), or `reference` where that is the portable one.
macro_rules! with_simd {
    ($isa:expr, $kernel:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?, else $reference:expr) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: as required of the caller.
                unsafe { $kernel::<$crate::simd::Avx2>($($arg),*) }
            }
            #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
            unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: as required of the caller.
                unsafe { $kernel::<$crate::simd::Avx512>($($arg),*) }
            }
            #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
            unsafe fn avx512bf16($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: as required of the caller.
                unsafe { $kernel::<$crate::simd::Avx512Bf16>($($arg),*) }
            }
            // SAFETY: an `Isa` exists only for instruction sets of this machine.
            unsafe {
                match $isa.0 {
                    $crate::isa::Kind::Portable | $crate::isa::Kind::PortableTiles => $reference,
                    $crate::isa::Kind::Avx2 => avx2($($arg),*),
                    $crate::isa::Kind::Avx512 | $crate::isa::Kind::Avx512Vnni => avx512($($arg),*),
                    $crate::isa::Kind::Avx512Bf16 | $crate::isa::Kind::Amx => avx512bf16($($arg),*),
                }
            }
        }
        // SAFETY: there is nothing that a machine could lack.
        #[cfg(not(target_arch = "x86_64"))]
        #[allow(unused_unsafe)]
        unsafe {
            $reference
        }
    }};
}
pub(crate) use with_simd;

/// Calls a plain `#[inline(always)] fn f(args)` compiled for an [`Isa`](crate::Isa): the same source on every
/// instruction set, so the same bits.
macro_rules! vectorised {
    ($isa:expr, $kernel:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                $kernel($($arg),*)
            }
            #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                $kernel($($arg),*)
            }
            match $isa.0 {
                $crate::isa::Kind::Portable | $crate::isa::Kind::PortableTiles => $kernel($($arg),*),
                // SAFETY: an `Isa` exists only for instruction sets of this machine.
                #[allow(unsafe_code)]
                $crate::isa::Kind::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[allow(unsafe_code)]
                _ => unsafe { avx512($($arg),*) },
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        $kernel($($arg),*)
    }};
}
pub(crate) use vectorised;

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::Isa;

    #[inline(always)]
    unsafe fn exp_and_round<S: Simd>(
        x: &[f32; LANES],
        magnitudes: &[f32; LANES],
        powers: &mut [f32; LANES],
        rounded: &mut [f32; LANES],
        halves: &mut [u16; LANES],
    ) {
        // SAFETY: the caller has the instruction set; the arrays hold 16 lanes.
        unsafe {
            S::store(powers.as_mut_ptr(), S::exp_not_positive(S::load(x.as_ptr())));
            let round = S::round_not_negative(S::load(magnitudes.as_ptr()));
            S::store(rounded.as_mut_ptr(), round);
            S::store_rounded_not_negative(halves.as_mut_ptr().cast(), S::load(magnitudes.as_ptr()));
        }
    }

    #[test]
    fn exp_and_rounding_of_vectors_have_the_bits_of_the_scalar_ones() {
        // From -0 to -infinity, and every number around the ends.
        let ends = [0.0f32, EXP_LEAST, 1.17e-38, BF16_TINY, f32::from_bits(BF16_TINY.to_bits() - 0x8000), 1.0]
            .map(|x| (-x.abs()).to_bits());
        let ends = ends.into_iter().flat_map(|bits| bits.saturating_sub(200).max(0x8000_0000)..bits + 200);
        let all = ends.chain([0xff80_0000]).chain((0x8000_0000..=0xff80_0000u32).step_by(3001));
        let all: Vec<f32> = all.map(f32::from_bits).collect();
        for &isa in Isa::available().iter().filter(|isa| !isa.is_reference()) {
            for x in all.as_chunks::<LANES>().0 {
                let magnitudes = &x.map(f32::abs);
                let (powers, rounded, halves) = (&mut [0.0; LANES], &mut [0.0; LANES], &mut [0; LANES]);
                with_simd!(
                    isa,
                    exp_and_round(
                        x: &[f32; LANES],
                        magnitudes: &[f32; LANES],
                        powers: &mut [f32; LANES],
                        rounded: &mut [f32; LANES],
                        halves: &mut [u16; LANES]
                    ),
                    else unreachable!("the portable one has no vectors")
                );
                assert_eq!(powers.map(f32::to_bits), x.map(|x| exp(x).to_bits()), "{isa:?} {x:?}");
                assert_eq!(*halves, magnitudes.map(round_bf16), "{isa:?} {x:?}");
                assert_eq!(rounded.map(f32::to_bits), halves.map(|half| u32::from(half) << 16), "{isa:?} {x:?}");
            }
        }
    }

    #[test]
    fn pairs_of_vectors_have_the_bits_of_scalar_rounding() {
        #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
        unsafe fn pairs_of(x: &[f32; 2 * LANES], halves: &mut [u16; 2 * LANES]) {
            // SAFETY: the caller has the instruction set; the arrays hold as many lanes.
            unsafe { Avx512Bf16::store_pairs(halves.as_mut_ptr().cast(), x.as_ptr()) }
        }
        if !Isa::available().iter().any(|isa| matches!(isa.0, crate::isa::Kind::Avx512Bf16 | crate::isa::Kind::Amx)) {
            return;
        }
        let tiny = BF16_TINY.to_bits();
        let ends = [0, tiny - 0x8000, tiny, 0x0080_0000, 0x7f7f_8000, 0x7f80_0000, 0x3f80_8000, 0x3f81_8000];
        let ends = ends.into_iter().flat_map(|bits: u32| bits.saturating_sub(100)..bits + 100);
        let all = ends.flat_map(|bits| [bits, bits | 0x8000_0000]).chain((0..=u32::MAX).step_by(50_021));
        let all: Vec<f32> = all.map(f32::from_bits).collect();
        for x in all.as_chunks::<{ 2 * LANES }>().0 {
            let halves = &mut [0; 2 * LANES];
            // SAFETY: the machine has the instruction set.
            unsafe { pairs_of(x, halves) };
            assert_eq!(*halves, x.map(round_bf16), "{x:?}");
        }
    }

    #[test]
    fn weights_to_base_2_of_vectors_have_the_bits_of_the_scalar_ones() {
        #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
        unsafe fn weights_of(x: &[[f32; LANES]; 2], weights: &mut [[f32; LANES]; 2], halves: &mut [u16; 2 * LANES]) {
            // SAFETY: the caller has the instruction set; the arrays hold 16 lanes.
            unsafe {
                let first = Avx512Bf16::exp2_weight(Avx512Bf16::load(x[0].as_ptr()));
                let second = Avx512Bf16::exp2_weight(Avx512Bf16::load(x[1].as_ptr()));
                Avx512Bf16::store(weights[0].as_mut_ptr(), first);
                Avx512Bf16::store(weights[1].as_mut_ptr(), second);
                Avx512Bf16::store_weights(halves.as_mut_ptr().cast(), [first, second]);
            }
        }
        if !Isa::available().iter().any(|isa| matches!(isa.0, crate::isa::Kind::Avx512Bf16 | crate::isa::Kind::Amx)) {
            return;
        }
        // From 1e-6, which rounding may leave, and -0 to -infinity; every number around whole ones.
        let whole = (1..60).map(|n| (-n as f32).to_bits()).flat_map(|bits| bits - 40..bits + 40);
        let all = (0x8000_0000..=0xff80_0000u32).step_by(3001).chain((0..0x3586_37bd).step_by(100_003)).chain(whole);
        let all: Vec<f32> = all.map(f32::from_bits).collect();
        for x in all.as_chunks::<LANES>().0.as_chunks::<2>().0 {
            let (weights, halves) = (&mut [[0.0; LANES]; 2], &mut [0; 2 * LANES]);
            // SAFETY: the machine has the instruction set.
            unsafe { weights_of(x, weights, halves) };
            for (i, (&x, weight)) in x.as_flattened().iter().zip(weights.as_flattened()).enumerate() {
                let want = crate::numerics::exp2_weight(x);
                assert_eq!((weight.to_bits(), halves[i]), (want.to_bits(), round_bf16(want)), "{x}");
            }
        }
    }
}
