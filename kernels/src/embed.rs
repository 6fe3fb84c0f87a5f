//! Token ids to rows of the embedding table.
//!
//! The table is packed like every other weight, so that one copy of it serves as the output projection, too, where a
//! model ties the two. A row lies in it a lane in 32, which costs some memory traffic and is little beside a step.

use crate::ctx::{Ctx, for_rows};
use crate::packed_matrix::PackedMatrix;
use crate::quantized::QuantizedMatrix;

/// Gathers rows of `table` `[vocab, dim]` into `out` `[ids.len(), dim]`.
///
/// Panics on an id beyond the table: ids are checked where they enter.
pub fn embed(ctx: &Ctx<'_>, table: &PackedMatrix, ids: &[u32], out: &mut [f32]) {
    gather(ctx, table.cols(), ids, out, &|id, out| table.row(id, out));
}

/// As [`embed`], from a quantized table.
pub fn embed_quantized(ctx: &Ctx<'_>, table: &QuantizedMatrix, ids: &[u32], out: &mut [f32]) {
    gather(ctx, table.cols(), ids, out, &|id, out| table.row(id, out));
}

fn gather(ctx: &Ctx<'_>, dim: usize, ids: &[u32], out: &mut [f32], row: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    assert_eq!(out.len(), ids.len() * dim, "output of [{}, {dim}]", ids.len());
    for_rows(ctx, out, dim, &|first, out| {
        for (out, &id) in out.chunks_exact_mut(dim).zip(&ids[first..]) {
            row(id as usize, out);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::packed_matrix::{WeightDtype, Weights};
    use crate::workers::{Priority, WorkerPool};
    use half::bf16;

    #[test]
    fn rows_of_the_table_come_out_in_the_order_of_the_ids() {
        let pool = WorkerPool::new(2);
        let ctx = Ctx { pool: &pool, isa: Isa::detect(), priority: Priority::Prefill };
        let (dim, vocab) = (71, 41);
        // Not exact as bf16, and some so small that they are zero there.
        let table: Vec<f32> = (0..vocab * dim).map(|i| if i % 5 == 0 { 1e-18 } else { i as f32 / 128.0 }).collect();
        let short: Vec<bf16> = table.iter().map(|&x| bf16::from_f32(x)).collect();
        let ids: Vec<u32> = (0..700).map(|i| (i * 5) % vocab as u32).collect();
        let mut out = vec![0.0; ids.len() * dim];
        embed(&ctx, &PackedMatrix::pack(WeightDtype::F32, dim, &[Weights::F32(&table)]), &ids, &mut out);
        for (out, &id) in out.chunks(dim).zip(&ids) {
            assert_eq!(out, &table[id as usize * dim..][..dim]);
        }
        embed(&ctx, &PackedMatrix::pack(WeightDtype::Bf16, dim, &[Weights::Bf16(&short)]), &ids, &mut out);
        for (out, &id) in out.chunks(dim).zip(&ids) {
            let row = &short[id as usize * dim..][..dim];
            let expected = |value: &bf16| if *value < bf16::from_f32(1e-17) { 0.0 } else { value.to_f32() };
            assert!(out.iter().zip(row).all(|(a, b)| a.to_bits() == expected(b).to_bits()));
        }
    }
}
