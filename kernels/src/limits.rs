//! What this machine can do at most, measured: speeds are held against it, in the same minute.
//!
//! Reading: all bytes of a buffer as large as what an operation reads, so that a limit is of the same cache or of
//! memory. Arithmetic: multiply-adds of an instruction set on values that never leave the registers. Both run on
//! the threads of a [`Ctx`], since two cores share memory and sometimes power. No figure here is a constant.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::time::Instant;

use crate::ctx::Ctx;
use crate::isa::Isa;
#[cfg(target_arch = "x86_64")]
use crate::isa::Kind;
use crate::packed_matrix::WeightDtype;
use crate::pages::Pages;
use crate::simd::{Simd, vectorised, with_simd};

/// What is multiplied and added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// f32.
    F32,
    /// bf16 pairs into f32: `tdpbf16ps`, `vdpbf16ps`, or two multiply-adds of f32 where there is no such instruction.
    Bf16,
    /// Bytes into 32-bit integers: `tdpbusd`, `vpdpbusd`, or what stands for it.
    Int8,
}

/// Operations (two for each multiply-add) per second that all threads of `ctx` do together in registers; `None` on
/// the portable instruction sets, of which nothing is known. Takes about 10 milliseconds.
pub fn peak_ops_per_second(ctx: &Ctx<'_>, arithmetic: Arithmetic) -> Option<f64> {
    if ctx.isa.is_reference() {
        return None;
    }
    let isa = ctx.isa;
    let tiles = 8 * ctx.pool.threads();
    let started_at = Instant::now();
    ctx.pool.run(ctx.priority, tiles, &|_| multiply(isa, arithmetic, ROUNDS));
    let seconds = started_at.elapsed().as_secs_f64();
    Some((tiles * ROUNDS * ops_per_round(isa, arithmetic)) as f64 / seconds)
}

/// Memory of which reading is timed.
pub struct ReadProbe {
    pages: Pages,
    len: usize,
}

impl ReadProbe {
    /// Reads `len` bytes, a whole piece at least.
    pub fn new(len: usize) -> Self {
        let len = len.next_multiple_of(PIECE);
        let pages = Pages::zeroed(len);
        // Written once: pages that nobody has touched are all the same one, in the first-level cache.
        // SAFETY: the pages were just made for `len` bytes and are ours alone.
        unsafe { std::ptr::write_bytes(pages.as_ptr(), 1, len) };
        ReadProbe { pages, len }
    }

    /// Bytes per second of one pass over all of it by the threads of `ctx`.
    pub fn bytes_per_second(&self, ctx: &Ctx<'_>) -> f64 {
        let isa = ctx.isa;
        let started_at = Instant::now();
        ctx.pool.run(ctx.priority, self.len / PIECE, &|piece| {
            // SAFETY: within the pages, initialised by `new`, and never written again.
            let words: &[u64] =
                unsafe { std::slice::from_raw_parts(self.pages.as_ptr().add(piece * PIECE).cast(), PIECE / 8) };
            black_box(vectorised!(isa, mix(words: &[u64]) -> u64));
        });
        self.len as f64 / started_at.elapsed().as_secs_f64()
    }
}

/// Bytes that a thread reads at a time.
const PIECE: usize = 256 << 10;

/// Rounds of a tile of arithmetic: about a millisecond.
const ROUNDS: usize = 100_000;

/// All words into one, in 64 independent lanes.
#[inline(always)]
fn mix(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 64];
    for chunk in words.as_chunks::<64>().0 {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane ^= word;
        }
    }
    lanes.iter().fold(0, |all, lane| all ^ lane)
}

/// Independent sums of a loop: as many as hide the latency and leave registers for the operands. `vdpbf16ps` of
/// Zen 5 needs 16; AVX2 has 16 registers and takes two for 16 lanes.
const fn num_sums(tile_rows: usize) -> usize {
    if tile_rows > 6 { SUMS_MAX } else { 6 }
}

const SUMS_MAX: usize = 16;

fn ops_per_round(isa: Isa, arithmetic: Arithmetic) -> usize {
    let lanes = 16 * num_sums(crate::matmul::tile_rows(isa, WeightDtype::F32));
    match arithmetic {
        // Four tiles of 16 x 16 x 16 lanes.
        #[cfg(target_arch = "x86_64")]
        Arithmetic::Bf16 if isa.0 == Kind::Amx => 4 * 4 * 16 * 16 * 16,
        #[cfg(target_arch = "x86_64")]
        Arithmetic::Int8 if isa.0 == Kind::Amx => 8 * 4 * 16 * 16 * 16,
        Arithmetic::F32 => 2 * lanes,
        Arithmetic::Bf16 => 4 * lanes,
        Arithmetic::Int8 => 8 * lanes,
    }
}

fn multiply(isa: Isa, arithmetic: Arithmetic, rounds: usize) {
    #[cfg(target_arch = "x86_64")]
    if isa.0 == Kind::Amx && arithmetic != Arithmetic::F32 {
        // SAFETY: an `Isa` exists only for instruction sets of this machine.
        return unsafe { crate::amx::multiply_in_registers(rounds, arithmetic == Arithmetic::Int8) };
    }
    match arithmetic {
        Arithmetic::F32 => with_simd!(isa, fold_f32(rounds: usize), else ()),
        Arithmetic::Bf16 => with_simd!(isa, fold_pairs(rounds: usize), else ()),
        #[cfg(target_arch = "x86_64")]
        Arithmetic::Int8 => crate::quantized::dot_in_registers(isa, rounds),
        #[cfg(not(target_arch = "x86_64"))]
        Arithmetic::Int8 => (),
    }
}

#[inline(always)]
unsafe fn fold_f32<S: Simd>(rounds: usize) {
    // SAFETY: the caller has the instruction set; the arrays hold 16 lanes.
    unsafe {
        let factors = black_box([0.5f32; 16]);
        let (a, mut sums) = (S::load(factors.as_ptr()), [S::splat(0.0); SUMS_MAX]);
        for _ in 0..rounds {
            for sum in &mut sums[..num_sums(S::TILE_ROWS)] {
                *sum = S::fma(*sum, a, a);
            }
        }
        keep::<S>(&sums);
    }
}

#[inline(always)]
unsafe fn fold_pairs<S: Simd>(rounds: usize) {
    // SAFETY: the caller has the instruction set; the arrays hold the lanes that are read.
    unsafe {
        // Pairs of 2^-20: sums stay small however long they grow.
        let factors = black_box([0x3580_3580u32; 16]);
        let (a, b) = (S::splat_pair(factors.as_ptr()), S::load_pairs(factors.as_ptr()));
        let mut sums = [S::splat(0.0); SUMS_MAX];
        for _ in 0..rounds {
            for sum in &mut sums[..num_sums(S::TILE_ROWS)] {
                *sum = S::fold_pairs(*sum, a, b);
            }
        }
        keep::<S>(&sums);
    }
}

/// So that nothing is left out for want of a reader.
#[inline(always)]
unsafe fn keep<S: Simd>(sums: &[S::V; SUMS_MAX]) {
    let mut lanes = [0.0f32; 16];
    // SAFETY: as required of the caller; 16 lanes.
    unsafe {
        let all = sums.iter().skip(1).fold(sums[0], |all, sum| S::add(all, *sum));
        S::store(lanes.as_mut_ptr(), all);
    }
    black_box(lanes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::{Priority, WorkerPool};

    #[test]
    fn every_fast_instruction_set_has_a_peak_and_the_portable_one_has_none() {
        let pool = WorkerPool::new(1);
        for &isa in Isa::available() {
            let ctx = Ctx { pool: &pool, isa, priority: Priority::Prefill };
            for arithmetic in [Arithmetic::F32, Arithmetic::Bf16, Arithmetic::Int8] {
                let peak = peak_ops_per_second(&ctx, arithmetic);
                assert_eq!(peak.is_some(), !isa.is_reference(), "{isa:?} {arithmetic:?}");
                assert!(peak.is_none_or(|peak| peak.is_finite() && peak > 0.0), "{isa:?} {arithmetic:?}: {peak:?}");
            }
        }
    }

    #[test]
    fn a_probe_reads_every_byte() {
        let mut words = vec![0u64; PIECE / 8];
        for at in [0, 63, 64, words.len() - 1] {
            words[at] ^= 1 << (at % 64);
        }
        assert_eq!(mix(&words), [0, 63, 64, words.len() - 1].iter().fold(0, |all, at| all ^ (1 << (at % 64))));
        let pool = WorkerPool::new(2);
        let ctx = Ctx { pool: &pool, isa: Isa::detect(), priority: Priority::Prefill };
        let probe = ReadProbe::new(PIECE + 1);
        assert_eq!(probe.len, 2 * PIECE);
        assert!(probe.bytes_per_second(&ctx) > 0.0);
    }
}
