//! Parity of the fast version with the specification, and what must not change a row's bits.

use super::*;
use crate::isa::Isa;
use crate::kv_layout::{GRANULE_TOKENS, KvDtype};
use crate::kv_write::kv_write;
use crate::numerics::Order;
use crate::workers::{Priority, WorkerPool};

fn noise(len: usize, seed: u64, scale: f64) -> Vec<f32> {
    (0..len).map(|i| ((crate::uniform(seed, 0, i as u32) * 2.0 - 1.0) * scale) as f32).collect()
}

/// Sequences in a pool whose unwritten bytes are NaN.
struct Pool {
    layout: KvLayout,
    arena: KvArena,
    k: Vec<f32>,
    v: Vec<f32>,
    block_table: Vec<u32>,
}

impl Pool {
    /// One sequence of `len` tokens over shuffled blocks.
    fn new(dtype: KvDtype, block_size: usize, num_kv_heads: usize, head_dim: usize, len: usize) -> Pool {
        let used = len.div_ceil(block_size);
        let num_blocks = used + 3;
        let layout = KvLayout { num_layers: 2, num_blocks, block_size, num_kv_heads, head_dim, dtype };
        let arena = KvArena::new(layout.total_bytes());
        arena.write(0, &vec![0xff; layout.total_bytes()]);
        let block_table: Vec<u32> = (0..used).map(|i| ((i * 7 + 2) % num_blocks) as u32).collect();
        let block_table = if num_blocks.is_multiple_of(7) { (0..used as u32).rev().collect() } else { block_table };
        let width = num_kv_heads * head_dim;
        let (k, v) = (noise(len * width, 11, 2.0), noise(len * width, 12, 1.0));
        let slots: Vec<u32> =
            (0..len).map(|i| block_table[i / block_size] * block_size as u32 + (i % block_size) as u32).collect();
        let pool = WorkerPool::new(1);
        let ctx = Ctx { pool: &pool, isa: Isa::detect(), priority: Priority::Prefill };
        kv_write(&ctx, &arena, &layout, 1, &slots, &k, Columns::all(width), &v, Columns::all(width));
        Pool { layout, arena, k, v, block_table }
    }

    /// Output bits of the queries at `first_position..`, as one span.
    fn attend(&self, isa: Isa, threads: usize, q: &[f32], first_position: usize, params: &AttentionParams) -> Vec<u32> {
        let width = params.num_heads * self.layout.head_dim;
        let block_table = 0..self.block_table.len();
        let spans = [QuerySpan { first_row: 0, num_rows: q.len() / width, first_position, block_table }];
        let batch = QueryBatch { spans: &spans, block_tables: &self.block_table };
        let pool = WorkerPool::new(threads);
        let ctx = Ctx { pool: &pool, isa, priority: Priority::Decode };
        let mut out = vec![f32::NAN; q.len()];
        attention(&ctx, &self.arena, &self.layout, 1, q, Columns::all(width), batch, params, &mut out);
        assert!(out.iter().all(|x| x.is_finite()), "unwritten KV reached the output");
        out.iter().map(|x| x.to_bits()).collect()
    }
}

fn params(num_heads: usize, head_dim: usize) -> AttentionParams {
    AttentionParams { num_heads, scale: 1.0 / (head_dim as f32).sqrt(), window: None, softcap: None }
}

#[test]
fn every_instruction_set_gives_the_bits_of_the_reference() {
    // (kv heads, query heads per KV head, head_dim, block size, context, last queries)
    let shapes = [
        (1, 1, 8, 16, 1, 1),
        (2, 2, 16, 32, 70, 70),
        (1, 3, 20, 16, 131, 30),
        (2, 4, 64, 64, 200, 9),
        (1, 7, 80, 48, 77, 20),
        (1, 2, 128, 16, 600, 5),
        (1, 1, 256, 32, 1100, 2),
        (2, 1, 96, 64, 150, 33),
        (1, 17, 112, 16, 90, 1),
        (1, 16, 48, 16, 40, 3),
        // More rows than a unit has, over tiles and parts.
        (1, 2, 32, 32, 800, 290),
        // Single queries, and prompts behind others, of heads that are and are not whole blocks of tiles.
        (2, 3, 80, 16, 300, 1),
        (2, 4, 96, 32, 700, 1),
        (3, 2, 128, 16, 530, 1),
        (1, 3, 96, 16, 560, 40),
        (1, 2, 128, 16, 300, 50),
    ];
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        for (kv_heads, group, head_dim, block_size, len, queries) in shapes {
            let pool = Pool::new(dtype, block_size, kv_heads, head_dim, len);
            let q = noise(queries * kv_heads * group * head_dim, 13, 3.0);
            for (window, softcap) in [(None, None), (Some(1), None), (Some(37), Some(5.0)), (Some(520), None)] {
                let params = AttentionParams { window, softcap, ..params(kv_heads * group, head_dim) };
                let references = [Isa::PORTABLE, Isa::PORTABLE_TILES];
                let references = references.map(|isa| pool.attend(isa, 2, &q, len - queries, &params));
                for &isa in Isa::available() {
                    let want = &references[usize::from(isa.order() == Order::Tiles)];
                    for threads in [1, 2] {
                        let got = pool.attend(isa, threads, &q, len - queries, &params);
                        assert!(got == *want, "{isa:?} {dtype:?} head_dim {head_dim} len {len} {window:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_span_and_batch() {
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        let pool = Pool::new(dtype, 32, 2, 24, 1200);
        let (width, queries) = (4 * 24, 600);
        let q = noise(queries * width, 5, 3.0);
        for &isa in Isa::available().iter().filter(|isa| !isa.is_reference()) {
            for window in [None, Some(100)] {
                let params = AttentionParams { window, ..params(4, 24) };
                let whole = pool.attend(isa, 2, &q, 600, &params);
                for (first, count) in [(0, 1), (1, 7), (300, 50), (599, 1), (424, 1), (423, 3)] {
                    let some = pool.attend(isa, 3, &q[first * width..][..count * width], 600 + first, &params);
                    assert!(some == whole[first * width..][..count * width], "{isa:?} {first} {count}");
                }
            }
        }
    }
}

#[test]
fn block_size_and_place_in_the_pool_do_not_matter() {
    let q = noise(3 * 2 * 32, 5, 3.0);
    let outputs: Vec<_> = [16, 32, 48, 128]
        .map(|block_size| {
            Pool::new(KvDtype::Bf16, block_size, 1, 32, 300).attend(Isa::detect(), 2, &q, 297, &params(2, 32))
        })
        .into();
    assert!(outputs.iter().all(|output| *output == outputs[0]));
}

#[test]
fn spans_of_several_sequences_are_computed_side_by_side() {
    let pool = Pool::new(KvDtype::Bf16, 16, 1, 16, 90);
    let width = 2 * 16;
    let params = params(2, 16);
    let q = noise(20 * width, 6, 3.0);
    // Three sequences that share the pool's blocks, in a fused product's columns.
    let stride = width + 5;
    let mut fused = vec![f32::NAN; 20 * stride];
    for row in 0..20 {
        fused[row * stride + 2..][..width].copy_from_slice(&q[row * width..][..width]);
    }
    let spans = [(0, 10, 40), (10, 1, 89), (13, 7, 0)];
    let spans = spans.map(|(first_row, num_rows, first_position)| QuerySpan {
        first_row,
        num_rows,
        first_position,
        block_table: 0..pool.block_table.len(),
    });
    let workers = WorkerPool::new(2);
    let ctx = Ctx { pool: &workers, isa: Isa::detect(), priority: Priority::Prefill };
    let mut out = vec![-7.0; 20 * width];
    let columns = Columns { first: 2, stride };
    let batch = QueryBatch { spans: &spans, block_tables: &pool.block_table };
    attention(&ctx, &pool.arena, &pool.layout, 1, &fused, columns, batch, &params, &mut out);
    for span in spans {
        let rows = span.first_row * width..(span.first_row + span.num_rows) * width;
        let alone = pool.attend(Isa::detect(), 1, &q[rows.clone()], span.first_position, &params);
        assert!(out[rows].iter().zip(&alone).all(|(a, &b)| a.to_bits() == b));
    }
    assert!(out[11 * width..13 * width].iter().all(|&x| x == -7.0), "rows of no span stay");
}

#[test]
fn output_is_close_to_softmax_in_double_precision() {
    let (len, head_dim) = (700, 32);
    for (dtype, tolerance) in [(KvDtype::F32, 2e-6), (KvDtype::Bf16, 2e-2)] {
        let pool = Pool::new(dtype, 16, 1, head_dim, len);
        let q = noise(head_dim, 1, 2.0);
        let params = AttentionParams { softcap: Some(20.0), window: Some(650), ..params(1, head_dim) };
        let got = pool.attend(Isa::detect(), 2, &q, len - 1, &params);
        let weights: Vec<f64> = (0..len)
            .map(|i| {
                let k = &pool.k[i * head_dim..][..head_dim];
                let dot: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                if i < 50 { 0.0 } else { (20.0 * (dot * f64::from(params.scale) / 20.0).tanh()).exp() }
            })
            .collect();
        let total: f64 = weights.iter().sum();
        for (dim, &got) in got.iter().enumerate() {
            let want: f64 = (0..len).map(|i| weights[i] * f64::from(pool.v[i * head_dim + dim])).sum::<f64>() / total;
            assert!((f64::from(f32::from_bits(got)) - want).abs() < tolerance, "{dtype:?} {want}");
        }
    }
}

#[test]
fn blocks_outside_the_window_are_not_read() {
    let pool = Pool::new(KvDtype::Bf16, 16, 1, 16, 400);
    let params = AttentionParams { window: Some(40), ..params(2, 16) };
    let q = noise(5 * 2 * 16, 3, 2.0);
    let attend = |pool: &Pool| Isa::available().iter().map(|&isa| pool.attend(isa, 1, &q, 395, &params)).collect();
    let want: Vec<_> = attend(&pool);
    let mut gone = Pool { block_table: pool.block_table.clone(), ..pool };
    gone.block_table[..(395 - 39) / GRANULE_TOKENS].fill(u32::MAX);
    let got: Vec<_> = attend(&gone);
    assert!(got == want);
}
