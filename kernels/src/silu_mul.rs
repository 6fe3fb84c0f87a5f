//! The gate of a feed-forward layer.

use crate::ctx::{Ctx, for_rows};
use crate::numerics::exp;
use crate::simd::vectorised;

/// `out[m, ffn] = silu(gate) * up` from fused rows `gate_up[m, 2 * ffn]`: gate in the first half, up in the
/// second. `silu(g) = g / (1 + exp(-g))`.
pub fn silu_mul(ctx: &Ctx<'_>, gate_up: &[f32], ffn: usize, out: &mut [f32]) {
    assert!(ffn > 0 && out.len().is_multiple_of(ffn) && gate_up.len() == 2 * out.len(), "rows of 2 x {ffn} values");
    let isa = ctx.isa;
    for_rows(ctx, out, ffn, &|first, out| {
        for (row, out) in out.chunks_exact_mut(ffn).enumerate() {
            let (gate, up) = gate_up[(first + row) * 2 * ffn..][..2 * ffn].split_at(ffn);
            vectorised!(isa, gate_row(gate: &[f32], up: &[f32], out: &mut [f32]));
        }
    });
}

/// The specification, compiled for each instruction set.
#[inline(always)]
pub(crate) fn gate_row(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let (gate, up) = (&gate[..out.len()], &up[..out.len()]);
    for i in 0..out.len() {
        out[i] = gate[i] / (1.0 + exp(-gate[i])) * up[i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::workers::{Priority, WorkerPool};

    #[test]
    fn every_instruction_set_gives_the_same_bits_close_to_the_definition() {
        let pool = WorkerPool::new(2);
        let (m, ffn) = (50, 1001);
        let mut gate_up: Vec<f32> =
            (0..m * 2 * ffn).map(|i| (crate::uniform(1, 0, i as u32) * 40.0 - 20.0) as f32).collect();
        gate_up[..6].copy_from_slice(&[0.0, -0.0, 1e-40, -1000.0, 1000.0, -88.0]);
        let mut want = vec![0.0; m * ffn];
        for (both, out) in gate_up.chunks(2 * ffn).zip(want.chunks_mut(ffn)) {
            gate_row(&both[..ffn], &both[ffn..], out);
        }
        for &isa in Isa::available() {
            let ctx = Ctx { pool: &pool, isa, priority: Priority::Prefill };
            let mut got = vec![0.0; m * ffn];
            silu_mul(&ctx, &gate_up, ffn, &mut got);
            assert!(got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa:?}");
        }
        for (row, got) in want.chunks(ffn).enumerate() {
            for i in 0..ffn {
                let (g, u) = (f64::from(gate_up[row * 2 * ffn + i]), f64::from(gate_up[row * 2 * ffn + ffn + i]));
                let exact = g / (1.0 + (-g).exp()) * u;
                assert!((f64::from(got[i]) - exact).abs() <= 1e-6 * exact.abs() + 1e-30, "{g} {u}");
            }
        }
    }
}
