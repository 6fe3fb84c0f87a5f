//! Root-mean-square normalisation, over whole rows or per head.

use crate::ctx::{Columns, Ctx, for_rows};
use crate::numerics::{LANES, tree_sum};
use crate::simd::vectorised;

/// `out = x / sqrt(mean(x^2) + eps) * weight` for each row of `x` `[m, dim]`, `dim = weight.len()`.
pub fn rms_norm(ctx: &Ctx<'_>, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let (dim, isa) = (weight.len(), ctx.isa);
    assert!(dim > 0 && x.len() == out.len() && x.len().is_multiple_of(dim), "rows of {dim} values");
    for_rows(ctx, out, dim, &|first, out| {
        let x = &x[first * dim..][..out.len()];
        vectorised!(isa, norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]));
    });
}

/// The same in place for each of `num_heads` heads of `weight.len()` values in the given columns of `m`
/// rows: the q and k norms of Qwen3.
pub fn rms_norm_heads(
    ctx: &Ctx<'_>,
    x: &mut [f32],
    m: usize,
    columns: Columns,
    num_heads: usize,
    weight: &[f32],
    eps: f32,
) {
    let (dim, isa) = (weight.len(), ctx.isa);
    columns.check("rms_norm_heads", x, m, num_heads * dim);
    for_rows(ctx, &mut x[..m * columns.stride], columns.stride, &|_, rows| {
        for row in rows.chunks_exact_mut(columns.stride) {
            let heads = &mut row[columns.first..][..num_heads * dim];
            vectorised!(isa, norm_heads(heads: &mut [f32], weight: &[f32], eps: f32));
        }
    });
}

#[inline(always)]
fn norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let scale = scale_of(x, eps);
        for i in 0..out.len() {
            out[i] = x[i] * scale * weight[i];
        }
    }
}

#[inline(always)]
pub(crate) fn norm_heads(x: &mut [f32], weight: &[f32], eps: f32) {
    for head in x.chunks_exact_mut(weight.len()) {
        let scale = scale_of(head, eps);
        for i in 0..head.len() {
            head[i] = head[i] * scale * weight[i];
        }
    }
}

/// Lane i of 16 folds `x[i + 16 j]^2`, so the order does not depend on the width of the machine.
#[inline(always)]
pub(crate) fn scale_of(x: &[f32], eps: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = chunk[i].mul_add(chunk[i], lanes[i]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = x.mul_add(x, *lane);
    }
    1.0 / (tree_sum(lanes) / x.len() as f32 + eps).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::workers::{Priority, WorkerPool};

    fn noise(len: usize, seed: u64) -> Vec<f32> {
        (0..len).map(|i| (crate::uniform(seed, 0, i as u32) * 4.0 - 2.0) as f32).collect()
    }

    /// The specification, one value after the other.
    fn reference(x: &[f32], weight: &[f32], eps: f32) -> Vec<u32> {
        let mut lanes = [0.0f32; LANES];
        for (i, &x) in x.iter().enumerate() {
            lanes[i % LANES] = x.mul_add(x, lanes[i % LANES]);
        }
        let scale = 1.0 / (tree_sum(lanes) / x.len() as f32 + eps).sqrt();
        x.iter().zip(weight).map(|(x, weight)| (x * scale * weight).to_bits()).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_reference() {
        let pool = WorkerPool::new(2);
        for dim in [1, 8, 20, 64, 80, 576, 2048] {
            let (x, weight) = (noise(20 * dim, 1), noise(dim, 2));
            for &isa in Isa::available() {
                let ctx = Ctx { pool: &pool, isa, priority: Priority::Decode };
                let mut out = vec![0.0; x.len()];
                rms_norm(&ctx, &x, &weight, 1e-5, &mut out);
                for (x, out) in x.chunks(dim).zip(out.chunks(dim)) {
                    assert_eq!(out.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), reference(x, &weight, 1e-5));
                }
            }
        }
    }

    #[test]
    fn heads_are_normalised_in_their_columns_only() {
        let pool = WorkerPool::new(2);
        let (m, dim, heads) = (300, 24, 3);
        let columns = Columns { first: 10, stride: 100 };
        let (x, weight) = (noise(m * 100, 1), noise(dim, 2));
        for &isa in Isa::available() {
            let ctx = Ctx { pool: &pool, isa, priority: Priority::Prefill };
            let mut out = x.clone();
            rms_norm_heads(&ctx, &mut out, m, columns, heads, &weight, 1e-6);
            for (x, out) in x.chunks(100).zip(out.chunks(100)) {
                assert_eq!((&x[..10], &x[82..]), (&out[..10], &out[82..]));
                for head in 0..heads {
                    let range = 10 + head * dim..10 + (head + 1) * dim;
                    let bits: Vec<u32> = out[range.clone()].iter().map(|x| x.to_bits()).collect();
                    assert_eq!(bits, reference(&x[range], &weight, 1e-6));
                }
            }
        }
    }
}
