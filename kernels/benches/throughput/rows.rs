//! Operations on rows: norms, rotation, gate, sampling.

use std::sync::Mutex;

use kernels::limits::{Arithmetic, ReadProbe, peak_ops_per_second};
use kernels::{Columns, RopeTable, SampleParams, TokenCount, rms_norm, rope, sample_row, silu_mul};

use crate::harness::{Bench, Work, noise};

pub(crate) fn run(bench: &Bench<'_>) {
    for m in [1, 32, 512] {
        let (x, weight, mut out) = (noise(m * 2048), noise(2048), vec![0.0; m * 2048]);
        bench.line(&format!("rms_norm M x {m}"), &Work::reading(4 * x.len()), || {
            rms_norm(&bench.ctx, &x, &weight, 1e-5, &mut out);
        });
        let gate_up = noise(m * 2 * 8192);
        let mut out = vec![0.0; m * 8192];
        bench.line(&format!("silu_mul M x {m}"), &Work::reading(4 * gate_up.len()), || {
            silu_mul(&bench.ctx, &gate_up, 8192, &mut out);
        });
        let (cos, sin) = (noise(m * 32), noise(m * 32));
        let table = RopeTable { cos: &cos, sin: &sin, rot_dim: 64 };
        let positions: Vec<u32> = (0..m as u32).collect();
        let mut qk = noise(m * 40 * 64);
        bench.line(&format!("rope M x {m}"), &Work::reading(4 * qk.len()), || {
            rope(&bench.ctx, &mut qk, Columns::all(40 * 64), 40, 64, &table, &positions);
        });
    }
    sampling(bench);
}

const VOCAB: usize = 150_000;
const BATCH: usize = 32;

/// Weights of M if its vocabulary were so large: the sampler is held against a decode step, which reads them and
/// multiplies them with each row.
const STEP_WEIGHTS: f64 = 16.0 * 60.8e6 + 2048.0 * VOCAB as f64;

fn sampling(bench: &Bench<'_>) {
    let draw = SampleParams { temperature: 0.8, uniform: 0.7, ..SampleParams::GREEDY };
    let counts: Vec<TokenCount> =
        (0..1000).map(|i| TokenCount { token: i * 131, in_prompt: true, num_output: 1 }).collect();
    let lines = [
        ("greedy", SampleParams::GREEDY),
        ("temperature", draw),
        ("top_k 50", SampleParams { top_k: 50, ..draw }),
        ("top_p 0.9", SampleParams { top_p: 0.9, ..draw }),
        ("min_p 0.05", SampleParams { min_p: 0.05, ..draw }),
        ("top_p 0.9, min_p 0.05", SampleParams { top_p: 0.9, min_p: 0.05, ..draw }),
        ("penalties", SampleParams { frequency_penalty: 0.5, token_counts: &counts, ..draw }),
        ("greedy, logprobs 5", SampleParams { num_logprobs: Some(5), ..SampleParams::GREEDY }),
    ];
    let lines = lines.map(|(name, params)| (format!("sample 32 x 150000 {name}"), params));
    if !lines.iter().any(|(name, _)| bench.wants(name)) {
        return;
    }
    // About as a model's logits lie: a bell, four wide.
    let uniform = |i: usize, stream| kernels::uniform(1, stream, i as u32) as f32 - 0.5;
    let logits: Vec<f32> =
        (0..BATCH * VOCAB).map(|i| (0..4).map(|stream| uniform(i, stream)).sum::<f32>() * 7.0).collect();
    let bandwidth = ReadProbe::new(1 << 30).bytes_per_second(&bench.ctx);
    for (name, params) in lines {
        let time = bench.line(&name, &Work::reading(4 * logits.len()), || {
            let drawn = Mutex::new([0; BATCH]);
            bench.ctx.pool.run(bench.ctx.priority, BATCH, &|row| {
                let sampled = sample_row(bench.ctx.isa, &logits[row * VOCAB..][..VOCAB], &params);
                drawn.lock().expect("no tile panics")[row] = sampled.token;
            });
        });
        if let Some((time, peak)) = time.zip(peak_ops_per_second(&bench.ctx, Arithmetic::Bf16)) {
            let step = (2.0 * BATCH as f64 * STEP_WEIGHTS / peak).max(2.0 * STEP_WEIGHTS / bandwidth);
            println!("{:<44}{:>11.2} % of the shortest decode step of M", "", 100.0 * time / step);
        }
    }
}
