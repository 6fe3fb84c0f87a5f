//! Quantized weights on a CUDA device, on the host: the logits are those of the dequantized weights.
#![allow(clippy::unwrap_used)]

#[path = "on_fibres/mod.rs"]
mod on_fibres;
#[path = "steps/mod.rs"]
mod steps;

use std::path::PathBuf;
use std::sync::Arc;

use common::config::Dtype;
use engine::checkpoint::Checkpoint;
use engine::cuda::graphs::GraphCounts;
use engine::gguf::write::{GgufType, convert};
use engine::oracle::Oracle;
use engine::runner::Runner;
use kernels::cuda::{Device, FibreDevice};
use steps::{TestSequence, prompt, root, step};

/// A folder of the test's own with a checkpoint as a GGUF file.
struct File {
    folder: PathBuf,
    path: PathBuf,
}

impl File {
    fn new(name: &str, ty: GgufType) -> Self {
        let folder = std::env::temp_dir().join(format!("tandem-cuda-gguf-{name}-{}", std::process::id()));
        let (source, copy) = (root().join("tests/checkpoints/qwen3"), folder.join("copy"));
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
    for (ty, name) in [(GgufType::Q8_0, "q8_0"), (GgufType::Q4_0, "q4_0")] {
        let file = File::new(name, ty);
        let model = on_fibres::load(&file.path, Dtype::Auto);
        let numerics = model.info_for(16, 4).numerics.0;
        assert!(numerics.starts_with("cuda-blas-1/tp1/bf16+") && numerics.contains(name), "{numerics}");
        let tokens = prompt(40, model.spec().vocab_size as u32, 5);
        let checkpoint = Checkpoint::open(&file.path).unwrap();
        let oracle = Oracle::new(model.spec(), &checkpoint).logits(&tokens).unwrap();
        let (expected, spread) = (log_softmax(oracle.last().unwrap()), spread(oracle.last().unwrap()));
        let mut runner = on_fibres::runner(&model, 16, 64);
        // Many rows by the library; the last ones by the kernel for few, of which the very last is sampled: launched,
        // recorded, then twice as a graph.
        for num_single in [0, 1, 2, 4, 1] {
            let found = top(&mut runner, &tokens, num_single);
            let worst = found.iter().map(|(id, logprob)| (logprob - expected[*id as usize]).abs()).fold(0f32, f32::max);
            println!("{name}, {num_single} single rows: {worst}, logits spread by {spread}");
            // Arithmetic in bf16; a scale in the wrong place is off by all of it.
            assert!(worst < 0.08 * spread, "{name}, {num_single} single rows: {worst}, logits spread by {spread}");
        }
        let counts = runner.graph_counts().unwrap();
        assert_eq!(counts, GraphCounts { num_direct: 1, num_recorded: 1, num_replayed: 2 });
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
