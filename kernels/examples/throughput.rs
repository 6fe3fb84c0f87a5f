//! Speed of the kernels on this machine:
//! `cargo run --release -p kernels --example throughput [isa] [threads] [substring of a line]`.
//!
//! Each line gives the fastest of many runs by the clock, and the throughput per second of CPU time, which
//! says what a core does while it has it, also when other processes want the same cores. For arithmetic it also
//! gives the share of what the same core could do at that moment: one loop of independent multiply-adds
//! (`vdpbf16ps`, `vpdpbusd`, FMA) before and after each line, per second of CPU time.
#![allow(missing_docs, unsafe_code)]

use std::time::{Duration, Instant};

use kernels::{
    AttentionParams, Columns, Ctx, Isa, KvArena, KvDtype, KvLayout, Mins, PackedMatrix, Priority, QuantizedMatrix,
    QuantizedWeights, QuerySpan, SampleParams, WeightDtype, Weights, WorkerPool, attention, kv_write, matmul,
    matmul_quantized, rms_norm, sample_rows, silu_mul,
};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let isa = Isa::parse(&arguments.next().unwrap_or("auto".to_owned())).expect("the name of an instruction set");
    let threads = arguments.next().map_or(2, |n| n.parse().expect("a number of threads"));
    let filter = arguments.next().unwrap_or_default();
    let pool = WorkerPool::new(threads);
    let bench = Bench { ctx: Ctx { pool: &pool, isa, priority: Priority::Prefill }, filter };
    println!("{isa:?}, {threads} threads");
    bench.limits();
    bench.matmuls();
    bench.quantized();
    bench.attention();
    bench.row_wise();
}

struct Bench<'a> {
    ctx: Ctx<'a>,
    filter: String,
}

fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 7919 % 10_007) as f32 / 10_007.0 - 0.5).collect()
}

impl Bench<'_> {
    fn limits(&self) {
        let bytes = vec![1u64; 32 << 20];
        self.line("limit: memory read", 0.256 * 1.048_576, "GB", || {
            let chunk = bytes.len() / 64;
            self.ctx.pool.run(Priority::Prefill, 64, &|i| {
                let sum = bytes[i * chunk..(i + 1) * chunk].iter().fold(0u64, |sum, x| sum ^ x);
                std::hint::black_box(sum);
            });
        });
    }

    fn matmuls(&self) {
        self.line("job of 2 empty tiles", 1e-6, "million", || self.ctx.pool.run(Priority::Decode, 2, &|_| {}));
        let tiny = noise(64 * 64);
        let w = PackedMatrix::pack(WeightDtype::F32, 64, &[Weights::F32(&tiny)]);
        let mut out = vec![0.0; 64];
        self.line("matmul F32 1 x 64 x 64", 1e-6, "million", || {
            matmul(&self.ctx, &tiny[..64], 1, &w, None, false, &mut out);
        });
        let large = noise(2048 * 8192);
        self.line("pack 8192 x 2048", 4.0 * large.len() as f64 * 1e-9, "GB", || {
            PackedMatrix::pack(WeightDtype::Bf16, 2048, &[Weights::F32(&large)]);
        });
        for dtype in [WeightDtype::Bf16, WeightDtype::F32] {
            for (k, n) in [(2048, 2048), (8192, 2048), (2048, 16384), (512, 1408)] {
                let w = PackedMatrix::pack(dtype, k, &[Weights::F32(&noise(n * k))]);
                for m in [1, 8, 32, 512] {
                    let (x, mut out) = (noise(m * k), vec![0.0; m * n]);
                    let (amount, unit) = if m < 32 {
                        (w.size_bytes() as f64 * 1e-9, "GB")
                    } else {
                        (2e-9 * (m * n * k) as f64, "GFLOP")
                    };
                    self.line(&format!("matmul {dtype:?} {m} x {k} x {n}"), amount, unit, || {
                        matmul(&self.ctx, &x, m, &w, None, false, &mut out);
                    });
                }
            }
        }
    }

    fn quantized(&self) {
        for (name, bits, offset, group, is_k) in [
            ("Q8_0", 8, 128, 32, false),
            ("Q4_0", 4, 8, 32, false),
            ("Q4_K", 4, 0, 32, true),
            ("Q6_K", 6, 32, 16, true),
            ("W8A8", 8, 128, 0, false),
        ] {
            for (k, n) in [(2048, 2048), (8192, 2048), (2048, 16384)] {
                let group = if group == 0 { k } else { group };
                let block = if is_k { 256 } else { group };
                let weights = QuantizedWeights {
                    rows: n,
                    cols: k,
                    bits,
                    offset,
                    group,
                    block,
                    codes: (0..n * k).map(|i| (i * 7919 % (1 << bits)) as u8).collect(),
                    scales: vec![0.0625; n * k / block],
                    group_scales: is_k.then(|| vec![3; n * k / group]),
                    mins: (name == "Q4_K")
                        .then(|| Mins { scales: vec![0.25; n * k / block], group_mins: vec![5; n * k / group] }),
                };
                let w = QuantizedMatrix::pack(&[&weights]).expect("a format with a kernel");
                for m in [1, 8, 32, 512] {
                    let (x, mut out) = (noise(m * k), vec![0.0; m * n]);
                    let (amount, unit) =
                        if m < 32 { (w.size_bytes() as f64 * 1e-9, "GB") } else { (2e-9 * (m * n * k) as f64, "GOP") };
                    self.line(&format!("matmul {name} {m} x {k} x {n}"), amount, unit, || {
                        matmul_quantized(&self.ctx, &x, m, &w, None, false, &mut out, Columns::all(n));
                    });
                }
            }
        }
    }

    fn attention(&self) {
        for dtype in [KvDtype::Bf16, KvDtype::F32] {
            let (heads, num_kv_heads, head_dim, tokens) = (32, 8, 64, 4096);
            let layout =
                KvLayout { num_layers: 1, num_blocks: tokens / 64, block_size: 64, num_kv_heads, head_dim, dtype };
            let arena = KvArena::new(layout.total_bytes());
            let kv = noise(tokens * num_kv_heads * head_dim);
            let columns = Columns::all(num_kv_heads * head_dim);
            let slots: Vec<u32> = (0..tokens as u32).collect();
            self.line(&format!("kv_write {dtype:?} {tokens} tokens"), layout.total_bytes() as f64 * 1e-9, "GB", || {
                kv_write(&self.ctx, &arena, &layout, 0, &slots, &kv, columns, &kv, columns);
            });
            let block_table: Vec<u32> = (0..tokens as u32 / 64).collect();
            let params = AttentionParams { num_heads: heads, scale: 0.125, window: None, softcap: None };
            for (queries, context) in [(1, 512), (1, 4096), (512, 512), (256, 4096)] {
                let q = noise(queries * heads * head_dim);
                let mut out = vec![0.0; q.len()];
                let first_position = context - queries;
                let span = QuerySpan { first_row: 0, num_rows: queries, first_position, block_table: &block_table };
                let keys_seen = queries * first_position + queries * (queries + 1) / 2;
                let (amount, unit) = if queries == 1 {
                    (layout.total_bytes() as f64 * context as f64 / tokens as f64 * 1e-9, "GB")
                } else {
                    (4e-9 * (keys_seen * heads * head_dim) as f64, "GFLOP")
                };
                let columns = Columns::all(heads * head_dim);
                self.line(&format!("attention {dtype:?} {queries} queries of {context}"), amount, unit, || {
                    attention(&self.ctx, &arena, &layout, 0, &q, columns, &[span], &params, &mut out);
                });
            }
        }
    }

    fn row_wise(&self) {
        let (x, mut out) = (noise(512 * 2048), vec![0.0; 512 * 2048]);
        let weight = noise(2048);
        let bytes = 8.0 * 512.0 * 2048.0 * 1e-9;
        self.line("rms_norm 512 x 2048", bytes, "GB", || rms_norm(&self.ctx, &x, &weight, 1e-5, &mut out));
        self.line("silu_mul 512 x 1024", 0.75 * bytes, "GB", || {
            silu_mul(&self.ctx, &x, 1024, &mut out[..512 * 1024]);
        });
        let logits = noise(8 * 128_256);
        let draw = SampleParams { temperature: 0.05, uniform: 0.7, ..SampleParams::GREEDY };
        for (name, params) in [
            ("greedy", SampleParams::GREEDY),
            ("temperature", draw),
            ("top_p 0.9", SampleParams { top_p: 0.9, ..draw }),
            ("top_k 50", SampleParams { top_k: 50, ..draw }),
        ] {
            self.line(&format!("sample {name}, 8 x 128256"), 8.0, "rows", || {
                sample_rows(&self.ctx, &logits, 128_256, &[params; 8]);
            });
        }
    }

    /// Runs for a third of a second after one run to warm up.
    fn line(&self, name: &str, amount: f64, unit: &str, mut f: impl FnMut()) {
        if !name.starts_with("limit") && !name.contains(&self.filter) {
            return;
        }
        f();
        let kind = match unit {
            "GOP" => Peak::Int8,
            _ if name.contains("Bf16") => Peak::Bf16,
            _ => Peak::F32,
        };
        let peak_before = peak(kind);
        let (begin, cpu_begin, mut runs, mut best) = (Instant::now(), cpu_time(), 0, f64::INFINITY);
        while begin.elapsed() < Duration::from_millis(300) {
            let start = Instant::now();
            f();
            best = best.min(start.elapsed().as_secs_f64());
            runs += 1;
        }
        let cpu = (cpu_time() - cpu_begin) / f64::from(runs);
        let share = match peak_before.zip(peak(kind)) {
            Some((before, after)) if ["GFLOP", "GOP"].contains(&unit) => {
                format!(", {:.0} % of {:.0}", 200.0 * amount / cpu / (before + after), (before + after) / 2.0)
            }
            _ => String::new(),
        };
        let (wall, core) = (amount / best, amount / cpu);
        println!("{name:40} {:9.1} us {wall:7.1} {unit}/s {core:7.1} {unit} per CPU s{share}", best * 1e6);
    }
}

/// What multiplies.
#[derive(Clone, Copy, PartialEq)]
enum Peak {
    F32,
    Bf16,
    Int8,
}

/// Multiply-adds that one thread does in registers, in 10^9 operations per second of CPU time; `None` where the
/// machine lacks the instruction.
#[cfg(target_arch = "x86_64")]
fn peak(kind: Peak) -> Option<f64> {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    fn f32s(rounds: usize) -> f32 {
        let ones = _mm512_set1_ps(1.0);
        let mut acc = [_mm512_setzero_ps(); 12];
        for _ in 0..rounds {
            for acc in &mut acc {
                *acc = _mm512_fmadd_ps(*acc, ones, ones);
            }
        }
        acc.into_iter().fold(0.0, |sum, acc| sum + _mm512_reduce_add_ps(acc))
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bf16s(rounds: usize) -> f32 {
        // SAFETY: both types are 64 bytes.
        let pairs = unsafe { std::mem::transmute::<__m512, __m512bh>(_mm512_set1_ps(1.0)) };
        let mut acc = [_mm512_setzero_ps(); 12];
        for _ in 0..rounds {
            for acc in &mut acc {
                *acc = _mm512_dpbf16_ps(*acc, pairs, pairs);
            }
        }
        acc.into_iter().fold(0.0, |sum, acc| sum + _mm512_reduce_add_ps(acc))
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn int8s(rounds: usize) -> f32 {
        let ones = _mm512_set1_epi32(std::hint::black_box(0x0101_0101));
        let mut acc = [_mm512_setzero_si512(); 12];
        for _ in 0..rounds {
            for acc in &mut acc {
                *acc = _mm512_dpbusd_epi32(*acc, ones, ones);
            }
        }
        acc.into_iter().fold(0, |sum: i32, acc| sum.wrapping_add(_mm512_reduce_add_epi32(acc))) as f32
    }

    let is_there = is_x86_feature_detected!("avx512f")
        && match kind {
            Peak::F32 => true,
            Peak::Bf16 => is_x86_feature_detected!("avx512bf16"),
            Peak::Int8 => is_x86_feature_detected!("avx512vnni"),
        };
    if !is_there {
        return None;
    }
    let (rounds, start) = (1 << 20, cpu_time());
    // SAFETY: the features were found.
    let (sum, ops) = unsafe {
        match kind {
            Peak::F32 => (f32s(rounds), 32e-9),
            Peak::Bf16 => (bf16s(rounds), 64e-9),
            Peak::Int8 => (int8s(rounds), 128e-9),
        }
    };
    std::hint::black_box(sum);
    Some(rounds as f64 * 12.0 * ops / (cpu_time() - start))
}

/// No peak is known here.
#[cfg(not(target_arch = "x86_64"))]
fn peak(_kind: Peak) -> Option<f64> {
    None
}

/// CPU seconds of all threads of this process.
fn cpu_time() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of our own.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
