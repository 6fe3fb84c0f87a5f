//! Sixteen lanes of 32-bit integers on each instruction set: dot products of four bytes at a time.
//!
//! `vpdpbusd` multiplies unsigned by signed bytes and adds four products to a lane without saturation. Without
//! it, bytes are widened to 16 bits and `vpmaddwd` adds pairs: `vpmaddubsw` would be shorter, but saturates.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use crate::isa::{Isa, Kind};
use crate::simd::{Avx2, Avx512, Simd};

/// Vectors of 16 integers (`I`), unsigned bytes prepared for a dot product (`W`), and one quad of signed bytes
/// in every lane (`X`).
///
/// # Safety
/// Every function requires that the machine has the instruction set; pointers must be valid for what is read
/// (unaligned is fine).
pub(super) trait IntSimd {
    /// Rows of a tile.
    const TILE_ROWS: usize;
    /// Vectors side by side in a tile: 1 or 2.
    const TILE_COLS: usize;
    type F: Simd;
    type I: Copy;
    type W: Copy;
    type X: Copy;
    unsafe fn splat(x: u32) -> Self::I;
    /// 64 bytes.
    unsafe fn load(from: *const u8) -> Self::I;
    /// 64 bytes.
    unsafe fn store(into: *mut u8, x: Self::I);
    /// 16 bytes, each widened without sign to a lane.
    unsafe fn load_u8(from: *const u8) -> Self::I;
    /// 16 bytes, each widened with its sign to a lane.
    unsafe fn load_i8(from: *const u8) -> Self::I;
    /// 32 bytes: f16 numbers.
    unsafe fn load_f16(from: *const u8) -> <Self::F as Simd>::V;
    unsafe fn to_f32(x: Self::I) -> <Self::F as Simd>::V;
    unsafe fn add(x: Self::I, y: Self::I) -> Self::I;
    /// Of each byte, without carry to the next one.
    unsafe fn sub_bytes(x: Self::I, y: u8) -> Self::I;
    unsafe fn and(x: Self::I, mask: u32) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn shift_right(x: Self::I, bits: u32) -> Self::I;
    unsafe fn shift_left(x: Self::I, bits: u32) -> Self::I;
    unsafe fn prepare(bytes: Self::I) -> Self::W;
    unsafe fn splat_quad(quad: u32) -> Self::X;
    /// Per lane `acc` plus four products.
    unsafe fn dot(acc: Self::I, w: Self::W, x: Self::X) -> Self::I;
}

impl IntSimd for Avx2 {
    // 16 registers: four for each row's sums, four for the weights, two for the activations.
    const TILE_ROWS: usize = 2;
    const TILE_COLS: usize = 1;
    type F = Avx2;
    type I = [__m256i; 2];
    /// Bytes 0 and 2 of each lane, widened to 16 bits, and bytes 1 and 3.
    type W = [[__m256i; 2]; 2];
    type X = [__m256i; 2];

    #[inline(always)]
    unsafe fn splat(x: u32) -> Self::I {
        // SAFETY: AVX2 is there (the trait's contract).
        unsafe { [_mm256_set1_epi32(x as i32); 2] }
    }
    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self::I {
        // SAFETY: 64 bytes are valid (the trait's contract).
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn store(into: *mut u8, x: Self::I) {
        // SAFETY: 64 bytes are valid (the trait's contract).
        unsafe {
            _mm256_storeu_si256(into.cast(), x[0]);
            _mm256_storeu_si256(into.add(32).cast(), x[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::I {
        // SAFETY: 16 bytes are valid (the trait's contract).
        unsafe {
            [
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast())),
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8).cast())),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::I {
        // SAFETY: 16 bytes are valid (the trait's contract).
        unsafe {
            [
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())),
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.add(8).cast())),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> [__m256; 2] {
        // SAFETY: 32 bytes are valid, F16C is there (the trait's contract).
        unsafe {
            [_mm256_cvtph_ps(_mm_loadu_si128(from.cast())), _mm256_cvtph_ps(_mm_loadu_si128(from.add(16).cast()))]
        }
    }
    #[inline(always)]
    unsafe fn to_f32(x: Self::I) -> [__m256; 2] {
        // SAFETY: AVX is there.
        unsafe { [_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])] }
    }
    #[inline(always)]
    unsafe fn add(x: Self::I, y: Self::I) -> Self::I {
        // SAFETY: AVX2 is there.
        unsafe { [_mm256_add_epi32(x[0], y[0]), _mm256_add_epi32(x[1], y[1])] }
    }
    #[inline(always)]
    unsafe fn sub_bytes(x: Self::I, y: u8) -> Self::I {
        // SAFETY: AVX2 is there.
        unsafe {
            let y = _mm256_set1_epi8(y as i8);
            [_mm256_sub_epi8(x[0], y), _mm256_sub_epi8(x[1], y)]
        }
    }
    #[inline(always)]
    unsafe fn and(x: Self::I, mask: u32) -> Self::I {
        // SAFETY: AVX2 is there.
        unsafe {
            let mask = _mm256_set1_epi32(mask as i32);
            [_mm256_and_si256(x[0], mask), _mm256_and_si256(x[1], mask)]
        }
    }
    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: AVX2 is there.
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn shift_right(x: Self::I, bits: u32) -> Self::I {
        // SAFETY: AVX2 is there.
        unsafe {
            let bits = _mm_cvtsi32_si128(bits as i32);
            [_mm256_srl_epi32(x[0], bits), _mm256_srl_epi32(x[1], bits)]
        }
    }
    #[inline(always)]
    unsafe fn shift_left(x: Self::I, bits: u32) -> Self::I {
        // SAFETY: AVX2 is there.
        unsafe {
            let bits = _mm_cvtsi32_si128(bits as i32);
            [_mm256_sll_epi32(x[0], bits), _mm256_sll_epi32(x[1], bits)]
        }
    }
    #[inline(always)]
    unsafe fn prepare(bytes: Self::I) -> Self::W {
        // SAFETY: AVX2 is there.
        unsafe {
            let low = _mm256_set1_epi16(0xff);
            [
                [_mm256_and_si256(bytes[0], low), _mm256_and_si256(bytes[1], low)],
                [_mm256_srli_epi16::<8>(bytes[0]), _mm256_srli_epi16::<8>(bytes[1])],
            ]
        }
    }
    #[inline(always)]
    unsafe fn splat_quad(quad: u32) -> Self::X {
        // SAFETY: AVX2 is there.
        unsafe {
            let quads = _mm256_set1_epi32(quad as i32);
            [_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(quads)), _mm256_srai_epi16::<8>(quads)]
        }
    }
    #[inline(always)]
    unsafe fn dot(acc: Self::I, w: Self::W, x: Self::X) -> Self::I {
        // SAFETY: AVX2 is there.
        unsafe {
            let even = [_mm256_madd_epi16(w[0][0], x[0]), _mm256_madd_epi16(w[0][1], x[0])];
            let odd = [_mm256_madd_epi16(w[1][0], x[1]), _mm256_madd_epi16(w[1][1], x[1])];
            [
                _mm256_add_epi32(_mm256_add_epi32(acc[0], even[0]), odd[0]),
                _mm256_add_epi32(_mm256_add_epi32(acc[1], even[1]), odd[1]),
            ]
        }
    }
}

macro_rules! int512 {
    ($name:ident, $w:ty, $x:ty, $prepare:item, $splat_quad:item, $dot:item) => {
        impl IntSimd for $name {
            const TILE_ROWS: usize = 6;
            const TILE_COLS: usize = 2;
            type F = Avx512;
            type I = __m512i;
            type W = $w;
            type X = $x;

            #[inline(always)]
            unsafe fn splat(x: u32) -> __m512i {
                // SAFETY: AVX-512F is there (the trait's contract).
                unsafe { _mm512_set1_epi32(x as i32) }
            }
            #[inline(always)]
            unsafe fn load(from: *const u8) -> __m512i {
                // SAFETY: 64 bytes are valid (the trait's contract).
                unsafe { _mm512_loadu_si512(from.cast()) }
            }
            #[inline(always)]
            unsafe fn store(into: *mut u8, x: __m512i) {
                // SAFETY: 64 bytes are valid (the trait's contract).
                unsafe { _mm512_storeu_si512(into.cast(), x) }
            }
            #[inline(always)]
            unsafe fn load_u8(from: *const u8) -> __m512i {
                // SAFETY: 16 bytes are valid (the trait's contract).
                unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast())) }
            }
            #[inline(always)]
            unsafe fn load_i8(from: *const u8) -> __m512i {
                // SAFETY: 16 bytes are valid (the trait's contract).
                unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())) }
            }
            #[inline(always)]
            unsafe fn load_f16(from: *const u8) -> __m512 {
                // SAFETY: 32 bytes are valid (the trait's contract).
                unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
            }
            #[inline(always)]
            unsafe fn to_f32(x: __m512i) -> __m512 {
                // SAFETY: AVX-512F is there.
                unsafe { _mm512_cvtepi32_ps(x) }
            }
            #[inline(always)]
            unsafe fn add(x: __m512i, y: __m512i) -> __m512i {
                // SAFETY: AVX-512F is there.
                unsafe { _mm512_add_epi32(x, y) }
            }
            #[inline(always)]
            unsafe fn sub_bytes(x: __m512i, y: u8) -> __m512i {
                // SAFETY: AVX-512BW is there.
                unsafe { _mm512_sub_epi8(x, _mm512_set1_epi8(y as i8)) }
            }
            #[inline(always)]
            unsafe fn and(x: __m512i, mask: u32) -> __m512i {
                // SAFETY: AVX-512F is there.
                unsafe { _mm512_and_si512(x, _mm512_set1_epi32(mask as i32)) }
            }
            #[inline(always)]
            unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
                // SAFETY: AVX-512F is there.
                unsafe { _mm512_or_si512(a, b) }
            }
            #[inline(always)]
            unsafe fn shift_right(x: __m512i, bits: u32) -> __m512i {
                // SAFETY: AVX-512F is there.
                unsafe { _mm512_srl_epi32(x, _mm_cvtsi32_si128(bits as i32)) }
            }
            #[inline(always)]
            unsafe fn shift_left(x: __m512i, bits: u32) -> __m512i {
                // SAFETY: AVX-512F is there.
                unsafe { _mm512_sll_epi32(x, _mm_cvtsi32_si128(bits as i32)) }
            }
            #[inline(always)]
            $prepare
            #[inline(always)]
            $splat_quad
            #[inline(always)]
            $dot
        }
    };
}

int512!(
    Avx512,
    [__m512i; 2],
    [__m512i; 2],
    unsafe fn prepare(bytes: __m512i) -> [__m512i; 2] {
        // SAFETY: AVX-512BW is there (the trait's contract).
        unsafe { [_mm512_and_si512(bytes, _mm512_set1_epi16(0xff)), _mm512_srli_epi16::<8>(bytes)] }
    },
    unsafe fn splat_quad(quad: u32) -> [__m512i; 2] {
        // SAFETY: AVX-512BW is there.
        unsafe {
            let quads = _mm512_set1_epi32(quad as i32);
            [_mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(quads)), _mm512_srai_epi16::<8>(quads)]
        }
    },
    unsafe fn dot(acc: __m512i, w: [__m512i; 2], x: [__m512i; 2]) -> __m512i {
        // SAFETY: AVX-512BW is there.
        unsafe {
            let even = _mm512_madd_epi16(w[0], x[0]);
            _mm512_add_epi32(_mm512_add_epi32(acc, even), _mm512_madd_epi16(w[1], x[1]))
        }
    }
);

/// AVX-512 with `vpdpbusd`.
pub(super) struct Vnni;

int512!(
    Vnni,
    __m512i,
    __m512i,
    unsafe fn prepare(bytes: __m512i) -> __m512i {
        bytes
    },
    unsafe fn splat_quad(quad: u32) -> __m512i {
        // SAFETY: AVX-512F is there (the trait's contract).
        unsafe { _mm512_set1_epi32(quad as i32) }
    },
    unsafe fn dot(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        // SAFETY: AVX-512-VNNI is there (the trait's contract).
        unsafe { _mm512_dpbusd_epi32(acc, w, x) }
    }
);

/// Dot products whose operands and sums stay in registers, `rounds` times 16 of them (6 on AVX2): what an
/// instruction set can do at most.
pub(crate) fn dot_in_registers(isa: Isa, rounds: usize) {
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2(rounds: usize) {
        // SAFETY: as required of the caller.
        unsafe { dots::<Avx2, 6>(rounds) }
    }
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn avx512(rounds: usize) {
        // SAFETY: as required of the caller.
        unsafe { dots::<Avx512, 16>(rounds) }
    }
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn vnni(rounds: usize) {
        // SAFETY: as required of the caller.
        unsafe { dots::<Vnni, 16>(rounds) }
    }
    // SAFETY: an `Isa` exists only for instruction sets of this machine.
    unsafe {
        match isa.0 {
            Kind::Portable | Kind::PortableTiles => (),
            Kind::Avx2 => avx2(rounds),
            Kind::Avx512 => avx512(rounds),
            Kind::Avx512Vnni | Kind::Avx512Bf16 | Kind::Amx => vnni(rounds),
        }
    }
}

#[inline(always)]
unsafe fn dots<S: IntSimd, const SUMS: usize>(rounds: usize) {
    // SAFETY: the caller has the instruction set; the arrays hold the bytes that are read and written.
    unsafe {
        let bytes = std::hint::black_box([1u8; 64]);
        let (w, x) = (S::prepare(S::load(bytes.as_ptr())), S::splat_quad(std::hint::black_box(0x0101_0101)));
        let mut sums = [S::splat(0); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = S::dot(*sum, w, x);
            }
        }
        let all = sums.iter().skip(1).fold(sums[0], |all, sum| S::or(all, *sum));
        let mut lanes = [0.0f32; 16];
        S::F::store(lanes.as_mut_ptr(), S::to_f32(all));
        std::hint::black_box(lanes);
    }
}
