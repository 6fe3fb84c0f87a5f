//! Attention over the paged pool: one query of long contexts, and chunks of prompts.

use kernels::limits::Arithmetic;
use kernels::{AttentionParams, Columns, KvArena, KvDtype, KvLayout, QueryBatch, QuerySpan, attention, kv_write};

use crate::harness::{Bench, Work, noise};

const HEADS: usize = 32;
const KV_HEADS: usize = 8;

/// (queries, positions they see at the end of their context)
const SPANS: [(usize, usize); 6] = [(1, 512), (1, 8192), (1, 32768), (512, 512), (2048, 2048), (512, 8192)];

pub(crate) fn run(bench: &Bench<'_>) {
    for dtype in [KvDtype::Bf16, KvDtype::F32] {
        for head_dim in [64, 128] {
            one_shape(bench, dtype, head_dim);
        }
    }
}

fn one_shape(bench: &Bench<'_>, dtype: KvDtype, head_dim: usize) {
    let line = |(queries, context)| {
        let kind = if queries == 1 { "decode" } else { "prompt" };
        format!("attention {dtype:?} d{head_dim} {kind} {queries} of {context}").to_lowercase()
    };
    let longest = if bench.is_measuring() { 32768 } else { 1024 };
    let spans = SPANS.into_iter().filter(|span| span.1 <= longest && bench.wants(&line(*span)));
    let spans: Vec<(usize, usize)> = spans.collect();
    let write = format!("kv_write {dtype:?} d{head_dim} 512 tokens").to_lowercase();
    let Some(tokens) = spans.iter().map(|span| span.1).chain(bench.wants(&write).then_some(512)).max() else { return };

    let layout =
        KvLayout { num_layers: 1, num_blocks: tokens / 64, block_size: 64, num_kv_heads: KV_HEADS, head_dim, dtype };
    let arena = KvArena::new(layout.total_bytes());
    let width = KV_HEADS * head_dim;
    let (kv, columns) = (noise(512 * width), Columns::all(width));
    let slots_from = |first: usize| (first as u32..first as u32 + 512).collect::<Vec<u32>>();
    for first in (0..tokens).step_by(512) {
        kv_write(&bench.ctx, &arena, &layout, 0, &slots_from(first), &kv, columns, &kv, columns);
    }
    let slots = slots_from(0);
    bench.line(&write, &Work::reading(2 * 4 * kv.len()), || {
        kv_write(&bench.ctx, &arena, &layout, 0, &slots, &kv, columns, &kv, columns);
    });
    let block_tables: Vec<u32> = (0..layout.num_blocks as u32).collect();
    let params = AttentionParams { num_heads: HEADS, scale: 0.125, window: None, softcap: None };
    for (queries, context) in spans {
        let q = noise(queries * HEADS * head_dim);
        let mut out = vec![0.0; q.len()];
        let first_position = context - queries;
        let span = QuerySpan { first_row: 0, num_rows: queries, first_position, block_table: 0..block_tables.len() };
        let batch = QueryBatch { spans: &[span], block_tables: &block_tables };
        let keys_seen = queries * first_position + queries * (queries + 1) / 2;
        let work = Work {
            bytes: layout.total_bytes() / tokens * context,
            ops: 4.0 * (keys_seen * HEADS * head_dim) as f64,
            arithmetic: if dtype == KvDtype::F32 { Arithmetic::F32 } else { Arithmetic::Bf16 },
        };
        let columns = Columns::all(HEADS * head_dim);
        bench.line(&line((queries, context)), &work, || {
            attention(&bench.ctx, &arena, &layout, 0, &q, columns, batch, &params, &mut out);
        });
    }
}
