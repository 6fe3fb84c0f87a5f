//! Quantized weights on a CUDA device, on the host: the logits are those of the dequantized weights.
#![allow(clippy::unwrap_used)]

#[path = "on_fibres/mod.rs"]
mod on_fibres;
#[path = "steps/mod.rs"]
mod steps;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::config::Dtype;
use engine::checkpoint::Checkpoint;
use engine::cuda::graphs::GraphCounts;
use engine::gguf::write::{GgufType, convert};
use engine::oracle::Oracle;
use engine::runner::Runner;
use engine::w8a8;
use kernels::cuda::ops::{self, Multiply};
use kernels::cuda::{Buffer, Device, DeviceWeights, FibreDevice, Lane, MultiplyQuantized};
use kernels::{Ctx, Isa, Mins, Priority, QuantizedMatrix, QuantizedWeights, WorkerPool};
use safetensors::tensor::TensorView;
use steps::{TestSequence, prompt, root, step};

/// A folder of the test's own with a checkpoint as a GGUF file.
struct File {
    folder: PathBuf,
    path: PathBuf,
}

impl File {
    fn new(name: &str, ty: GgufType) -> Self {
        Self::of(&root().join("tests/checkpoints/qwen3"), name, ty)
    }

    fn of(source: &Path, name: &str, ty: GgufType) -> Self {
        let folder = std::env::temp_dir().join(format!("tandem-cuda-gguf-{name}-{}", std::process::id()));
        let copy = folder.join("copy");
        std::fs::create_dir_all(&copy).unwrap();
        for entry in std::fs::read_dir(source).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file())
        {
            std::fs::copy(&entry, copy.join(entry.file_name().unwrap())).unwrap();
        }
        if !copy.join("tokenizer.json").exists() {
            let tokenizer = serde_json::json!({
                "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
                "decoder": {"type": "ByteLevel"}, "added_tokens": [],
            });
            std::fs::write(copy.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        }
        let path = folder.join("model.gguf");
        convert(&copy, &path, ty).unwrap();
        Self { folder, path }
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// A folder of the test's own with a Llama whose rows are whole blocks of k-quants.
struct Wide(PathBuf);

impl Wide {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("tandem-cuda-wide-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (hidden, kv, ffn, vocab) = (256, 128, 768, 64);
        let mut shapes = vec![
            ("model.embed_tokens".to_string(), vec![vocab, hidden]),
            ("model.norm".to_string(), vec![hidden]),
            ("lm_head".to_string(), vec![vocab, hidden]),
        ];
        for layer in 0..2 {
            for (name, shape) in [
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("mlp.gate_proj", vec![ffn, hidden]),
                ("mlp.up_proj", vec![ffn, hidden]),
                ("mlp.down_proj", vec![hidden, ffn]),
            ] {
                shapes.push((format!("model.layers.{layer}.{name}"), shape));
            }
        }
        let bytes: Vec<Vec<u8>> =
            shapes.iter().enumerate().map(|(seed, (_, shape))| values(seed as u64, shape)).collect();
        let views = shapes.iter().zip(&bytes).map(|((name, shape), bytes)| {
            (format!("{name}.weight"), TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
        });
        std::fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": ffn,
            "vocab_size": vocab, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        });
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        Self(folder)
    }
}

impl Drop for Wide {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Norms of 1, matrices such that sums over a row are near 1.
fn values(seed: u64, shape: &[usize]) -> Vec<u8> {
    let value = |i: u32| match shape {
        [_, width] => ((2.0 * kernels::uniform(seed, 1, i) - 1.0) * 2.0 / (*width as f64).sqrt()) as f32,
        _ => 1.0,
    };
    (0..shape.iter().product::<usize>() as u32).flat_map(|i| value(i).to_le_bytes()).collect()
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
    logits.iter().map(|logit| logit - max - sum.ln()).collect()
}

/// Standard deviation.
fn spread(logits: &[f32]) -> f32 {
    let mean = logits.iter().sum::<f32>() / logits.len() as f32;
    (logits.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / logits.len() as f32).sqrt()
}

/// Log-probabilities of the likeliest tokens behind `tokens`, of which the last `num_single` are steps of their own.
fn top(runner: &mut dyn Runner, tokens: &[u32], num_single: usize) -> Vec<(u32, f32)> {
    let mut sequence = TestSequence::new(1, tokens, 0..4).with_logprobs(20);
    let mut drawn = step(runner, &mut [(&mut sequence, tokens.len() - num_single)]);
    for _ in 0..num_single {
        drawn = step(runner, &mut [(&mut sequence, 1)]);
    }
    drawn.remove(0).unwrap().top_logprobs
}

#[test]
fn logits_are_those_of_the_dequantized_weights() {
    let wide = Wide::new("k");
    for (file, name) in [
        (File::new("q8_0", GgufType::Q8_0), "q8_0"),
        (File::new("q4_0", GgufType::Q4_0), "q4_0"),
        // Values have 6 bits beside queries and keys of 4.
        (File::of(&wide.0, "q4_K_M", GgufType::Q4_K_M), "q4_k+q6_k"),
    ] {
        compare_with_oracle(&file.path, name, 0.08);
    }
}

#[test]
fn logits_of_w8a8_are_near_those_of_the_dequantized_weights() {
    let wide = Wide::new("w8a8");
    let folder = wide.0.join("w8a8");
    w8a8::convert(&wide.0, &folder).unwrap();
    compare_with_oracle(&folder, "w8a8", 0.12);
}

/// Log-probabilities at most so many deviations of the logits apart: the arithmetic is in bf16, and a scale in the
/// wrong place is off by all of it.
fn compare_with_oracle(path: &Path, name: &str, tolerance: f32) {
    let model = on_fibres::load(path, Dtype::Auto);
    let numerics = model.info_for(16, 4).numerics.0;
    assert!(numerics.starts_with("cuda-blas-1/tp1/bf16+") && numerics.contains(name), "{numerics}");
    let tokens = prompt(40, model.spec().vocab_size as u32, 5);
    let checkpoint = Checkpoint::open(path).unwrap();
    let oracle = Oracle::new(model.spec(), &checkpoint).logits(&tokens).unwrap();
    let (expected, spread) = (log_softmax(oracle.last().unwrap()), spread(oracle.last().unwrap()));
    let mut runner = on_fibres::runner(&model, 16, 64);
    // Many rows by the library; the last ones by the kernel for few, of which the very last is sampled: launched,
    // recorded, then twice as a graph.
    for num_single in [0, 1, 2, 4, 1] {
        let found = top(&mut runner, &tokens, num_single);
        let worst = found.iter().map(|(id, logprob)| (logprob - expected[*id as usize]).abs()).fold(0f32, f32::max);
        println!("{name}, {num_single} single rows: {worst}, logits spread by {spread}");
        assert!(worst < tolerance * spread, "{name}, {num_single} single rows: {worst}, logits spread by {spread}");
    }
    let counts = runner.graph_counts().unwrap();
    assert_eq!(counts, GraphCounts { num_direct: 1, num_recorded: 1, num_replayed: 2 });
}

fn random(seed: u64, count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| 2.0 * kernels::uniform(seed, 0, i) as f32 - 1.0).collect()
}

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
}

fn f32_of(buffer: &Buffer, len: usize) -> Vec<f32> {
    let mut bytes = vec![0; len * 4];
    buffer.read(Lane::Compute, 0, &mut bytes).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Weights with random codes, of 4 bits with minima or 6, in blocks of 256.
fn k_quants(bits: u32, rows: usize, cols: usize, seed: u64) -> QuantizedWeights {
    let (group, offset, has_mins) = if bits == 4 { (32, 0, true) } else { (16, 32, false) };
    let below = |seed, count: usize, end: f64| -> Vec<u8> {
        (0..count as u32).map(|i| (kernels::uniform(seed, 1, i) * end) as u8).collect()
    };
    let scales =
        |seed| random(seed, rows * cols / 256).iter().map(|x| half::f16::from_f32(x * 0.01).to_f32()).collect();
    let small = |seed| below(seed, rows * cols / group, if has_mins { 64.0 } else { 256.0 });
    QuantizedWeights {
        rows,
        cols,
        bits,
        offset,
        group,
        block: 256,
        codes: below(seed, rows * cols, f64::from(1u32 << bits)),
        scales: scales(seed + 1),
        group_scales: Some(small(seed + 2).iter().map(|scale| *scale as i8).collect()),
        mins: has_mins.then(|| Mins { scales: scales(seed + 3), group_mins: small(seed + 4) }),
    }
}

/// Of one matrix with three parts in two formats, of few rows and by the library, and of rows of a table.
#[test]
fn products_of_k_quants_have_the_bits_of_those_of_dense_weights() {
    let device = on_fibres::device();
    let (k, m) = (768, 5);
    let parts = [k_quants(4, 35, k, 1), k_quants(4, 8, k, 11), k_quants(6, 21, k, 21)];
    let n = parts.iter().map(|part| part.rows).sum();
    let dense: Vec<f32> = parts.iter().flat_map(QuantizedWeights::dequantize).collect();
    let w = Buffer::of(&device, &bf16_bytes(&dense)).unwrap();
    let x = Buffer::of(&device, &bf16_bytes(&random(7, m * k))).unwrap();
    let (bias, before) = (Buffer::of(&device, &random(8, n)).unwrap(), random(9, m * n));
    let weights = DeviceWeights::new(&device, &parts.each_ref()).unwrap().unwrap();
    let scratch = Buffer::new(&device, weights.scratch_bytes(m)).unwrap();
    for (add, is_library) in [(false, false), (true, false), (true, true)] {
        let [out, expected] = [(); 2].map(|()| Buffer::of(&device, &before).unwrap());
        let multiply = MultiplyQuantized { x: &x, m, bias: Some(&bias), out: &out, add };
        let of_dense = Multiply { x: &x, w: &w, bias: Some(&bias), out: &expected, m, n, k, add };
        if is_library {
            weights.multiply_with(&multiply, &scratch).unwrap();
            ops::library_matmul(&of_dense).unwrap();
        } else {
            weights.multiply(&multiply).unwrap();
            ops::skinny_matmul(&of_dense).unwrap();
        }
        assert_eq!(bits(&f32_of(&out, m * n)), bits(&f32_of(&expected, m * n)), "{add} {is_library}");
    }
    for part in &parts {
        let table = DeviceWeights::new(&device, &[part]).unwrap().unwrap();
        let ids = Buffer::of(&device, &[3u32, 7, 0]).unwrap();
        let out = Buffer::new(&device, 3 * k * 4).unwrap();
        table.embed((&ids).into(), None, &out, 3).unwrap();
        let dense = part.dequantize();
        let expected = [3, 7, 0].map(|row| &dense[row * k..][..k]).concat();
        let rounded: Vec<f32> = expected.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect();
        // As numbers: a weight of nothing has a sign in one, and none in the other.
        assert_eq!(f32_of(&out, 3 * k), rounded);
    }
}

/// Whose sums are integers, so that whoever adds them up has the same.
#[test]
fn products_of_w8a8_have_the_bits_of_the_cpus() {
    let device = on_fibres::device();
    let (n, k) = (37, 208);
    let weights = |rows, seed| QuantizedWeights {
        rows,
        cols: k,
        bits: 8,
        offset: 128,
        group: k,
        block: k,
        codes: (0..(rows * k) as u32).map(|i| (kernels::uniform(seed, 0, i) * 255.0) as u8 + 1).collect(),
        scales: random(seed + 1, rows).iter().map(|x| x * 0.01).collect(),
        group_scales: None,
        mins: None,
    };
    let parts = [weights(30, 1), weights(7, 3)];
    let on_device = DeviceWeights::new(&device, &parts.each_ref()).unwrap().unwrap();
    let isa = Isa::detect();
    let on_cpu = QuantizedMatrix::pack(isa.order(), &parts.each_ref()).unwrap();
    let bias = random(5, n);
    let bias_there = Buffer::of(&device, &bias).unwrap();
    let pool = WorkerPool::global();
    for (m, add) in [(3, true), (20, false), (130, true)] {
        let x: Vec<f32> = random(6, m * k).iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect();
        let mut expected = random(7, m * n);
        let out = Buffer::of(&device, &expected).unwrap();
        let ctx = Ctx { pool, isa, priority: Priority::Decode };
        kernels::matmul_quantized(&ctx, &x, m, &on_cpu, Some(&bias), add, &mut expected);
        let x = Buffer::of(&device, &bf16_bytes(&x)).unwrap();
        let scratch = Buffer::new(&device, on_device.scratch_bytes(m)).unwrap();
        let multiply = MultiplyQuantized { x: &x, m, bias: Some(&bias_there), out: &out, add };
        on_device.multiply_with(&multiply, &scratch).unwrap();
        assert_eq!(bits(&f32_of(&out, m * n)), bits(&expected), "{m} rows");
    }
}

/// Between what 118,784 weights of the model take in 4 bits and a half, in 8 and a half, and in bf16.
#[test]
fn a_model_fits_whose_codes_do() {
    let load = |ty, name: &str, memory_bytes| {
        let file = File::new(name, ty);
        let device: Arc<dyn Device> = Arc::new(FibreDevice::with_limits(memory_bytes, 227 << 10));
        let loaded = on_fibres::load_to(&device, &file.path, on_fibres::options(Dtype::Auto));
        loaded.map(|_| ()).map_err(|error| error.to_string())
    };
    const BETWEEN: usize = 180_000;
    assert_eq!(load(GgufType::Q4_0, "fits-4", BETWEEN), Ok(()));
    assert_eq!(load(GgufType::Q8_0, "fits-8", BETWEEN), Ok(()));
    let said = load(GgufType::Bf16, "fits-16", BETWEEN).unwrap_err();
    assert!(said.starts_with("the model needs 241280 bytes of memory") && said.contains("180000 free"), "{said}");
    let said = load(GgufType::Q4_0, "fits-not", 60_000).unwrap_err();
    assert!(said.starts_with("the model needs 67860 bytes of memory"), "{said}");
}

#[test]
fn codes_are_not_computed_with_in_f32() {
    let file = File::new("f32", GgufType::Q8_0);
    let said = on_fibres::try_load(&file.path, Dtype::Float32, false).err().unwrap().to_string();
    assert!(said.contains("(q8_0), which is computed with in bfloat16 alone"), "{said}");
}

#[cfg(feature = "cuda")]
#[test]
fn all_of_it_passes_by_nvidias_interface() {
    on_fibres::run_again_by_a_driver("all_of_it_passes_by_nvidias_interface");
}
