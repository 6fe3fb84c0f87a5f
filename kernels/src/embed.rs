//! Token ids to rows of the embedding table.

use crate::ctx::{Ctx, for_rows};
use crate::numerics::widen_bf16;
use crate::packed_matrix::Weights;
use crate::quantized::QuantizedWeights;

/// Gathers rows of `table` `[vocab, dim]` (row-major) into `out` `[ids.len(), dim]`.
///
/// Panics on an id beyond the table: ids are checked where they enter.
pub fn embed(ctx: &Ctx<'_>, table: Weights<'_>, dim: usize, ids: &[u32], out: &mut [f32]) {
    assert_eq!(out.len(), ids.len() * dim, "output of [{}, {dim}]", ids.len());
    for_rows(ctx, out, dim, &|first, out| {
        for (out, &id) in out.chunks_exact_mut(dim).zip(&ids[first..]) {
            let start = id as usize * dim;
            match table {
                Weights::F32(values) => out.copy_from_slice(&values[start..start + dim]),
                Weights::Bf16(values) => {
                    for (out, value) in out.iter_mut().zip(&values[start..start + dim]) {
                        *out = widen_bf16(value.to_bits());
                    }
                }
            }
        }
    });
}

/// As [`embed`], from a quantized table.
pub fn embed_quantized(ctx: &Ctx<'_>, table: &QuantizedWeights, ids: &[u32], out: &mut [f32]) {
    let dim = table.cols;
    assert_eq!(out.len(), ids.len() * dim, "output of [{}, {dim}]", ids.len());
    for_rows(ctx, out, dim, &|first, out| {
        for (out, &id) in out.chunks_exact_mut(dim).zip(&ids[first..]) {
            table.dequantize_row(id as usize, out);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::workers::{Priority, WorkerPool};
    use half::bf16;

    #[test]
    fn rows_of_the_table_come_out_in_the_order_of_the_ids() {
        let pool = WorkerPool::new(2);
        let ctx = Ctx { pool: &pool, isa: Isa::detect(), priority: Priority::Prefill };
        let dim = 70;
        let table: Vec<f32> = (0..9 * dim).map(|i| (i / dim) as f32 + (i % dim) as f32 / 128.0).collect();
        let short: Vec<bf16> = table.iter().map(|&x| bf16::from_f32(x)).collect();
        let ids: Vec<u32> = (0..700).map(|i| (i * 5) % 9).collect();
        let mut out = vec![0.0; ids.len() * dim];
        embed(&ctx, Weights::F32(&table), dim, &ids, &mut out);
        for (out, &id) in out.chunks(dim).zip(&ids) {
            assert_eq!(out, &table[id as usize * dim..][..dim]);
        }
        embed(&ctx, Weights::Bf16(&short), dim, &ids, &mut out);
        for (out, &id) in out.chunks(dim).zip(&ids) {
            let row = &short[id as usize * dim..][..dim];
            assert!(out.iter().zip(row).all(|(a, b)| *a == b.to_f32()));
        }
    }
}
