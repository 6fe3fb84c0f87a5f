//! Which of 32 numbers are above another, and where they are: what compilers make slow loops of.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512, Avx512Bf16};

/// # Safety
/// Every function requires that the machine has the instruction set.
pub(crate) trait Lanes {
    /// Bit i for number i; none for a NaN.
    unsafe fn above(numbers: &[f32; 32], than: f32) -> u32;

    /// Writes the indices of the bits that are set side by side, counted from `first`. The pointer is valid for 32, of
    /// which those behind the last may be overwritten.
    #[inline(always)]
    unsafe fn list(first: u32, mut bits: u32, indices: *mut u32) {
        let mut at = 0;
        while bits != 0 {
            // SAFETY: there are no more than 32 bits.
            unsafe { *indices.add(at) = first + bits.trailing_zeros() };
            at += 1;
            bits &= bits - 1;
        }
    }
}

/// On any machine.
pub(crate) struct Portable;

impl Lanes for Portable {
    #[inline(always)]
    unsafe fn above(numbers: &[f32; 32], than: f32) -> u32 {
        numbers.iter().rev().fold(0, |bits, number| bits << 1 | u32::from(*number > than))
    }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx2 {
    #[inline(always)]
    unsafe fn above(numbers: &[f32; 32], than: f32) -> u32 {
        // SAFETY: AVX is there (the trait's contract), and 8 numbers from each eighth one on.
        unsafe {
            let than = _mm256_set1_ps(than);
            let mut bits = 0;
            for i in (0..32).step_by(8) {
                let above = _mm256_cmp_ps::<_CMP_GT_OQ>(_mm256_loadu_ps(numbers.as_ptr().add(i)), than);
                bits |= (_mm256_movemask_ps(above) as u32) << i;
            }
            bits
        }
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! avx512 {
    ($name:ident) => {
        #[cfg(target_arch = "x86_64")]
        impl Lanes for $name {
            #[inline(always)]
            unsafe fn above(numbers: &[f32; 32], than: f32) -> u32 {
                // SAFETY: AVX-512F is there (the trait's contract), and 16 numbers from the first and the middle one
                // on.
                unsafe {
                    let (low, high) = (_mm512_loadu_ps(numbers.as_ptr()), _mm512_loadu_ps(numbers.as_ptr().add(16)));
                    let than = _mm512_set1_ps(than);
                    let low = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(low, than);
                    u32::from(low) | u32::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(high, than)) << 16
                }
            }

            #[inline(always)]
            unsafe fn list(first: u32, bits: u32, indices: *mut u32) {
                // SAFETY: AVX-512F is there (the trait's contract); a half begins behind at most 16 indices, and 32 may
                // be written.
                unsafe {
                    let mut indices = indices;
                    let ascending = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
                    for half in [0, 16] {
                        let chosen = (bits >> half) as u16;
                        let index = _mm512_add_epi32(ascending, _mm512_set1_epi32((first + half) as i32));
                        // Not straight to memory, which some processors do number by number.
                        _mm512_storeu_si512(indices.cast(), _mm512_maskz_compress_epi32(chosen, index));
                        indices = indices.add(chosen.count_ones() as usize);
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
avx512!(Avx512);

#[cfg(target_arch = "x86_64")]
avx512!(Avx512Bf16);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::simd::with_simd;

    unsafe fn chosen<S: Lanes>(numbers: &[f32; 32], than: f32) -> (u32, Vec<u32>) {
        let mut indices = [u32::MAX; 32];
        // SAFETY: as required of the caller; 32 of them.
        let bits = unsafe {
            let bits = S::above(numbers, than);
            S::list(100, bits, indices.as_mut_ptr());
            bits
        };
        (bits, indices.into_iter().take(bits.count_ones() as usize).collect())
    }

    #[test]
    fn numbers_above_another_are_told_and_listed_in_order() {
        for round in 0..200 {
            let mut numbers = [0.0; 32];
            for (i, number) in (0..).zip(&mut numbers) {
                *number = (crate::uniform(4, round, i) * 8.0 - 4.0) as f32;
            }
            (numbers[3], numbers[17], numbers[31]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
            for than in [-5.0, -1.0, 0.0, numbers[5], 3.9, f32::INFINITY, f32::NAN] {
                let above = numbers.into_iter().zip(100..).filter(|(x, _)| *x > than);
                let expected: Vec<u32> = above.map(|(_, index)| index).collect();
                let bits = expected.iter().fold(0, |bits, index| bits | 1u32 << (index - 100));
                for &isa in Isa::available() {
                    let numbers = &numbers;
                    let got = with_simd!(
                        isa,
                        chosen(numbers: &[f32; 32], than: f32) -> (u32, Vec<u32>),
                        else chosen::<Portable>(numbers, than)
                    );
                    assert_eq!(got, (bits, expected.clone()), "{isa:?} {than}");
                }
            }
        }
    }
}
