//! Parity with Hugging Face Transformers on the committed goldens; see `tests/checkpoints/README.md`.

#![allow(clippy::unwrap_used)]

#[path = "steps/mod.rs"]
mod steps;

use std::sync::Arc;

use common::config::Dtype;
use common::kv_spec::KvDtype;
use common::model::KvExchange;
use engine::backend::Backend;
use engine::checkpoint::Checkpoint;
use engine::decoder::{Decoder, Workspace};
use engine::model::Model;
use engine::oracle::Oracle;
use engine::plan::SampleRow;
use engine::pool::KvPool;
use engine::runner::NoSink;
use kernels::Isa;
use safetensors::SafeTensors;
use serde_json::Value;
use steps::{TestSequence, generate, load, load_on, plan, root, runner, step};

const NAMES: [&str; 10] = [
    "llama2-mha",
    "llama3-gqa",
    "llama-linear",
    "llama-dynamic",
    "llama-yarn",
    "mistral-window",
    "qwen2-tied",
    "qwen2-mixed-window",
    "qwen3",
    "qwen3-tied",
];

struct Golden {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    gaps: Vec<f64>,
    positions: Vec<usize>,
    first_row: usize,
}

struct Goldens {
    prompts: Vec<Golden>,
    error_max: f64,
    error_rms: f64,
    /// `[rows, vocab]`
    logits_f32: Vec<f32>,
    vocab: usize,
}

fn goldens(name: &str) -> Goldens {
    let folder = root().join("tests/checkpoints").join(name);
    let json: Value = serde_json::from_slice(&std::fs::read(folder.join("goldens.json")).unwrap()).unwrap();
    let ids = |value: &Value| value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    let prompts = json["prompts"].as_array().unwrap().iter().map(|prompt| Golden {
        prompt: ids(&prompt["prompt"]),
        greedy: ids(&prompt["greedy"]),
        gaps: prompt["gaps"].as_array().unwrap().iter().map(|gap| gap.as_f64().unwrap()).collect(),
        positions: ids(&prompt["positions"]).iter().map(|&position: &u32| position as usize).collect(),
        first_row: prompt["first_row"].as_u64().unwrap() as usize,
    });
    let bytes = std::fs::read(folder.join("goldens.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let logits = tensors.tensor("logits_f32").unwrap();
    Goldens {
        prompts: prompts.collect(),
        error_max: json["bf16_error"]["max_abs"].as_f64().unwrap(),
        error_rms: json["bf16_error"]["rms"].as_f64().unwrap(),
        logits_f32: logits.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        vocab: logits.shape()[1],
    }
}

#[test]
fn greedy_tokens_in_f32_are_those_of_transformers() {
    for name in NAMES {
        let model = load(&format!("tests/checkpoints/{name}"), Dtype::Float32);
        let mut runner = runner(&model, 16, 512);
        for golden in goldens(name).prompts {
            let mut sequence = TestSequence::new(1, &golden.prompt, 0..16);
            let tokens = generate(&mut runner, &mut sequence, golden.greedy.len());
            let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
            assert_eq!(ids, golden.greedy, "{name}, prompt of {}", golden.prompt.len());
        }
    }
}

/// Logits after the positions of `golden`, teacher-forced in one step: as many rows as positions.
fn logits(model: &Model, golden: &Golden) -> Vec<f32> {
    let tokens = [&golden.prompt[..], &golden.greedy[..31]].concat();
    let block_size = 32;
    let num_blocks = tokens.len().div_ceil(block_size);
    let pool = KvPool::new(&model.spec().kv_spec(model.kv_dtype()), block_size, num_blocks).unwrap();
    let mut sequence = TestSequence::new(1, &tokens, 0..num_blocks as u32);
    let len = tokens.len();
    let mut plan = plan(&[(&mut sequence, len)], block_size, false);
    let sample = plan.samples.remove(0);
    plan.samples = golden.positions.iter().map(|&row| SampleRow { row, ..sample.clone() }).collect();
    let (backend, mut workspace) = (model.backend(), Workspace::default());
    let rope = backend.rope_table(model.spec().rope.angles(len)).unwrap();
    let decoder = Decoder { backend, spec: model.spec(), weights: model.weights(), rope: &rope, pool: &pool };
    decoder.forward(&plan, &NoSink, &mut workspace);
    backend.read_back(workspace.logits())
}

/// Transformers' f32 logits of the same rows.
fn expected<'a>(goldens: &'a Goldens, golden: &Golden) -> &'a [f32] {
    &goldens.logits_f32[golden.first_row * goldens.vocab..][..golden.positions.len() * goldens.vocab]
}

#[test]
fn f32_logits_are_those_of_transformers() {
    for name in NAMES {
        let goldens = goldens(name);
        let model = load(&format!("tests/checkpoints/{name}"), Dtype::Float32);
        for golden in &goldens.prompts {
            let found = logits(&model, golden);
            let errors = found.iter().zip(expected(&goldens, golden)).map(|(found, expected)| (found - expected).abs());
            let worst = errors.fold(0f32, f32::max);
            assert!(worst < 1e-3, "{name}, prompt of {}: {worst}", golden.prompt.len());
        }
    }
}

#[test]
fn bf16_errs_no_more_than_transformers_and_keeps_every_clear_token() {
    for name in NAMES {
        let goldens = goldens(name);
        let model = load(&format!("tests/checkpoints/{name}"), Dtype::Bfloat16);
        let mut runner = runner(&model, 32, 512);
        let (mut worst, mut squares, mut count) = (0f64, 0f64, 0usize);
        for golden in &goldens.prompts {
            for (found, expected) in logits(&model, golden).iter().zip(expected(&goldens, golden)) {
                let error = f64::from((found - expected).abs());
                (worst, squares, count) = (worst.max(error), squares + error * error, count + 1);
            }
            let tokens = [&golden.prompt[..], &golden.greedy[..31]].concat();
            for (index, gap) in golden.gaps.iter().enumerate() {
                if *gap > 3.0 * goldens.error_max {
                    let given = &tokens[..golden.prompt.len() + index];
                    let mut sequence = TestSequence::new(1, given, 0..16);
                    let token = step(&mut runner, &mut [(&mut sequence, given.len())]).remove(0).unwrap();
                    assert_eq!(token.id, golden.greedy[index], "{name}, new token {index}");
                }
            }
        }
        let rms = (squares / count as f64).sqrt();
        println!("{name}: max {worst:.3} of {:.3}, rms {rms:.4} of {:.4}", goldens.error_max, goldens.error_rms);
        assert!(worst <= 1.5 * goldens.error_max, "{name}: {worst} against {}", goldens.error_max);
        assert!(rms <= 1.5 * goldens.error_rms, "{name}: {rms} against {}", goldens.error_rms);
    }
}

#[test]
fn the_eager_reference_agrees_with_transformers_and_with_the_kernels() {
    for name in NAMES {
        let goldens = goldens(name);
        let model = load(&format!("tests/checkpoints/{name}"), Dtype::Float32);
        let checkpoint = Checkpoint::open(model.folder()).unwrap();
        let oracle = Oracle::new(model.spec(), &checkpoint);
        let golden = &goldens.prompts[2];
        let rows = oracle.logits(&[&golden.prompt[..], &golden.greedy[..31]].concat()).unwrap();
        let rows: Vec<f32> = golden.positions.iter().flat_map(|&position| &rows[position]).copied().collect();
        let ours = logits(&model, golden);
        for (row, other) in rows.iter().zip(expected(&goldens, golden)).chain(rows.iter().zip(&ours)) {
            assert!((row - other).abs() < 1e-3, "{name}: {row} against {other}");
        }
    }
}

#[test]
fn the_tiny_model_continues_as_transformers_does() {
    let json = std::fs::read(root().join("tests/checkpoints/tiny.json")).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    let model = load("models/tiny", Dtype::Float32);
    assert_eq!(model.spec().eos_token_ids, [3, 1]);
    let mut runner = runner(&model, 16, 512);
    for completion in json["completions"].as_array().unwrap() {
        let ids = |field: &str| -> Vec<u32> {
            completion[field].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let gaps = completion["gaps"].as_array().unwrap();
        let greedy = ids("greedy");
        // As long as the decision is not closer than the arithmetic.
        let num_clear = gaps.iter().take_while(|gap| gap.as_f64().unwrap() > 0.001).count();
        let mut sequence = TestSequence::new(1, &ids("prompt"), 0..16);
        let tokens: Vec<u32> = generate(&mut runner, &mut sequence, num_clear).iter().map(|token| token.id).collect();
        assert_eq!(tokens, greedy[..num_clear]);
    }
}

#[test]
fn an_auto_dtype_is_the_checkpoint_s_own_and_f16_runs_as_f32() {
    let dtype = |name: &str| load(&format!("tests/checkpoints/{name}"), Dtype::Auto).dtype().as_str();
    assert_eq!(dtype("qwen3"), "bfloat16");
    assert_eq!(dtype("qwen3-tied"), "float32");
    assert_eq!(dtype("llama-linear"), "float32");
}

#[test]
fn the_order_of_tiles_is_announced_where_something_is_bf16() {
    let numerics = |isa, dtype, kv_dtype| {
        let model = Arc::into_inner(load_on("tests/checkpoints/qwen3", dtype, isa)).unwrap();
        model.with_kv(kv_dtype, KvExchange::Same).info_for(16, 4).numerics.0
    };
    let (pairs, tiles) = (Isa::PORTABLE, Isa::PORTABLE_TILES);
    assert_eq!(numerics(pairs, Dtype::Auto, None), "cpu-fold-2/tp1/bf16/kv-bf16");
    assert_eq!(numerics(tiles, Dtype::Auto, None), "cpu-tiles-2/tp1/bf16/kv-bf16");
    assert_eq!(numerics(tiles, Dtype::Float32, None), "cpu-fold-2/tp1/f32/kv-f32");
    assert_eq!(numerics(tiles, Dtype::Float32, Some(KvDtype::Bf16)), "cpu-fold-2/tp1/f32/kv-bf16-by-cpu-tiles-2");
    assert_eq!(numerics(pairs, Dtype::Float32, Some(KvDtype::Bf16)), "cpu-fold-2/tp1/f32/kv-bf16");
    assert_eq!(numerics(tiles, Dtype::Bfloat16, Some(KvDtype::F32)), "cpu-tiles-2/tp1/bf16/kv-f32");
}
