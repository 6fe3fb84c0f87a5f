//! The CUDA engine without a GPU: backend, runner and pool over kernels that run as fibres on the host. The reference is
//! the CPU's engine.
#![allow(clippy::unwrap_used)]

#[path = "on_fibres/mod.rs"]
mod on_fibres;
#[path = "steps/mod.rs"]
mod steps;

use std::sync::{Arc, Mutex};

use common::config::{Dtype, PrefillAttention};
use common::ids::BlockId;
use common::kv_spec::KvDtype;
use common::sampling::{SampledToken, SamplingParams};
use engine::backend::Backend;
use engine::cuda::model::{DeviceLoadOptions, StepLimits};
use engine::cuda::sampling::Drawn;
use engine::cuda::{CudaBackend, CudaRunner};
use engine::decoder::{Decoder, Workspace};
use engine::model::{LoadError, Model};
use engine::plan::{FromSlot, SampleRow, Span, StepPlan};
use engine::pool::{KvPool, PoolError};
use engine::runner::{KvSink, NoSink, Runner};
use kernels::Isa;
use kernels::cuda::{Device, FibreDevice};
use on_fibres::WideHeads;
use serde_json::Value;
use steps::{TestSequence, generate, kv_bytes, plan, prompt, root, step, step_with};

/// Prompt number `index` of a golden checkpoint, and how Transformers continues it.
fn golden(name: &str, index: usize) -> (Vec<u32>, Vec<u32>) {
    let path = root().join("tests/checkpoints").join(name).join("goldens.json");
    let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let ids = |value: &Value| value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    let prompt = &json["prompts"][index];
    (ids(&prompt["prompt"]), ids(&prompt["greedy"]))
}

fn ids(tokens: &[SampledToken]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

#[test]
fn greedy_tokens_in_f32_are_those_of_transformers_and_of_the_cpu() {
    // Each with something of its own: all its heads alike, angles stretched, a window, biases, two windows, norms of
    // heads; and two prompts of which one is longer than a block.
    for name in ["llama2-mha", "llama-linear", "mistral-window", "qwen2-tied", "qwen2-mixed-window", "qwen3"] {
        let model = on_fibres::load(&root().join("tests/checkpoints").join(name), Dtype::Float32);
        let mut runner = on_fibres::runner(&model, 16, 256);
        for (index, count) in [(0, 4), (2, 6)] {
            let (prompt, greedy) = golden(name, index);
            let mut sequence = TestSequence::new(1, &prompt, 0..16);
            if prompt.len() > 1 {
                assert_eq!(step(&mut runner, &mut [(&mut sequence, 21)]), [None]);
            }
            assert_eq!(ids(&generate(&mut runner, &mut sequence, count)), greedy[..count], "{name}, prompt {index}");
        }
    }
}

/// Logits after every row of one step over `tokens` in a fresh pool, on the device.
fn logits_on_device(model: &Model<CudaBackend>, tokens: &[u32], split: usize) -> Vec<f32> {
    let (backend, block_size) = (model.backend(), 32);
    let num_blocks = tokens.len().div_ceil(block_size);
    let kv_spec = model.spec().kv_spec(model.kv_dtype());
    let pool = KvPool::on_device(&kv_spec, block_size, num_blocks, backend.device()).unwrap();
    let rope = backend.rope_table(model.spec().rope.angles(tokens.len())).unwrap();
    let mut sequence = TestSequence::new(1, tokens, (0..num_blocks as u32).rev());
    let mut workspace = Workspace::default();
    let mut logits = Vec::new();
    for count in [split, tokens.len() - split].into_iter().filter(|count| *count > 0) {
        let plan = with_all_sampled(plan(&[(&mut sequence, count)], block_size, false), &sequence);
        let at_step = backend.at_step(&plan, pool.layout(), model.spec(), &Drawn::default());
        let decoder =
            Decoder { backend: at_step, spec: model.spec(), weights: model.weights(), rope: &rope, pool: &pool };
        let _ = decoder.forward(&plan, &NoSink, &mut workspace);
        logits.extend(backend.read_back(workspace.logits()));
        sequence.num_computed += count;
    }
    logits
}

fn logits_on_cpu(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let num_blocks = tokens.len().div_ceil(32);
    let pool = KvPool::new(&model.spec().kv_spec(model.kv_dtype()), 32, num_blocks).unwrap();
    let (backend, mut workspace) = (model.backend(), Workspace::default());
    let rope = backend.rope_table(model.spec().rope.angles(tokens.len())).unwrap();
    let mut sequence = TestSequence::new(1, tokens, 0..num_blocks as u32);
    let plan = with_all_sampled(plan(&[(&mut sequence, tokens.len())], 32, false), &sequence);
    let decoder = Decoder { backend, spec: model.spec(), weights: model.weights(), rope: &rope, pool: &pool };
    decoder.forward(&plan, &NoSink, &mut workspace);
    backend.read_back(workspace.logits())
}

fn with_all_sampled(mut plan: StepPlan, sequence: &TestSequence) -> StepPlan {
    let row = |row: usize| SampleRow {
        row,
        sequence: common::ids::SequenceId(sequence.id),
        choice: common::ids::ChoiceIndex(0),
        position: plan.positions[row] + 1,
        params: sequence.params.clone(),
        is_stop_banned: false,
        history: None,
    };
    plan.samples = (0..plan.num_rows()).map(row).collect();
    plan
}

#[test]
fn bf16_logits_are_those_of_the_cpu_within_what_rounding_does() {
    // Heads for which tensor cores have kernels: both, both and a window, decode alone, groups of more than 16.
    for (head_dim, num_heads, window, len) in
        [(64, 2, None, 70), (128, 1, Some(40), 70), (256, 1, None, 20), (64, 18, None, 20)]
    {
        assert_logits_are_the_cpu_s(&on_fibres::device(), head_dim, num_heads, window, len);
    }
}

#[test]
fn heads_whose_kernels_ask_for_more_shared_memory_than_there_is_go_another_way() {
    // As on compute capability 8.9: decode's kernel for chunks too, and none.
    for (head_dim, family) in [(128, "cuda-blas-1"), (256, "cuda-blas-plain-1")] {
        let device: Arc<dyn Device> = Arc::new(FibreDevice::with_limits(1 << 30, 99 << 10));
        let model = assert_logits_are_the_cpu_s(&device, head_dim, 1, None, 20);
        assert_eq!(model.info_for(16, 4).numerics.0, format!("{family}/tp1/bf16/kv-bf16"));
    }
}

#[test]
fn attention_of_prompts_by_warpgroups_is_taken_where_it_can_be_and_named_in_the_numerics() {
    let load = |checkpoint: &WideHeads, prefill_attention, is_batch_invariant| {
        let device: Arc<dyn Device> = Arc::new(FibreDevice::new());
        let options =
            DeviceLoadOptions { prefill_attention, is_batch_invariant, ..on_fibres::options(Dtype::Bfloat16) };
        on_fibres::load_to(&device, checkpoint.folder(), options).unwrap()
    };
    let (auto, portable) = (PrefillAttention::Auto, PrefillAttention::Portable);
    let numerics = |model: &Model<CudaBackend>| model.info_for(16, 4).numerics.0;
    for (head_dim, num_heads, window, len) in [(64, 2, None, 140), (128, 3, Some(40), 90)] {
        let checkpoint = WideHeads::new(head_dim, num_heads, window);
        let (by_warpgroups, by_warps) = (load(&checkpoint, auto, false), load(&checkpoint, portable, false));
        assert_eq!(numerics(&by_warpgroups), "cuda-blas-wgmma-1/tp1/bf16/kv-bf16");
        assert_eq!(numerics(&by_warps), "cuda-blas-1/tp1/bf16/kv-bf16");
        let tokens = prompt(len, WideHeads::VOCAB as u32, 11);
        // On the host both add in the same order. The last rows singly, the others as a chunk.
        let logits = |model| logits_on_device(model, &tokens, len - 3);
        assert!(logits(&by_warpgroups) == logits(&by_warps), "heads of {head_dim}");
    }
    assert_eq!(numerics(&load(&WideHeads::new(64, 2, None), auto, true)), "cuda-mma-1/tp1/bf16/kv-bf16");
    for without in [WideHeads::new(64, 1, None), WideHeads::new(256, 2, None)] {
        assert_eq!(numerics(&load(&without, auto, false)), "cuda-blas-1/tp1/bf16/kv-bf16");
    }
}

fn assert_logits_are_the_cpu_s(
    device: &Arc<dyn Device>,
    head_dim: usize,
    num_heads: usize,
    window: Option<u32>,
    len: usize,
) -> Model<CudaBackend> {
    let checkpoint = WideHeads::new(head_dim, num_heads, window);
    let on_device = on_fibres::load_to(device, checkpoint.folder(), on_fibres::options(Dtype::Auto)).unwrap();
    let on_cpu = steps::load_on(checkpoint.folder().to_str().unwrap(), Dtype::Auto, Isa::detect());
    let tokens = prompt(len, WideHeads::VOCAB as u32, 11);
    let wanted = logits_on_cpu(&on_cpu, &tokens);
    // The last rows singly, the others as a chunk.
    let found = logits_on_device(&on_device, &tokens, len - 3);
    assert_eq!(found.len(), wanted.len());
    let worst = found.iter().zip(&wanted).map(|(found, wanted)| (found - wanted).abs()).fold(0f32, f32::max);
    let largest = wanted.iter().map(|logit| logit.abs()).fold(0f32, f32::max);
    println!("heads of {head_dim}: {worst} of logits up to {largest}");
    assert!(worst < 0.03 * largest, "heads of {head_dim}: {worst} of logits up to {largest}");
    on_device
}

#[test]
fn the_largest_step_takes_no_more_memory_than_is_set_aside_for_it() {
    // A chunk without a kernel for chunks, all of whose parts are there at once; and four ends of prompts.
    for (head_dim, num_rows, num_seqs) in [(256, 8, 1), (64, 16, 4)] {
        let checkpoint = WideHeads::new(head_dim, 4, None);
        let device: Arc<dyn Device> = Arc::new(FibreDevice::new());
        let model = on_fibres::load_to(&device, checkpoint.folder(), on_fibres::options(Dtype::Auto)).unwrap();
        let free = || device.memory().unwrap().free_bytes as u64;
        let limits = StepLimits { max_num_batched_tokens: num_rows, max_num_seqs: num_seqs, max_model_len: None };
        let (len, loaded, overhead) = (2048, free(), 256 << 20);
        let set_aside = loaded - model.kv_cache_bytes(1.0, &limits, 1).unwrap() - overhead;

        let mut runner = on_fibres::runner(&Arc::new(model), 16, num_seqs * len);
        let pool_bytes = (runner.pool().block_bytes() * num_seqs * len / 16) as u64;
        let params = SamplingParams { logprobs: Some(3), logit_bias: vec![(7, 1.0)], ..SamplingParams::greedy(9) };
        let mut sequences: Vec<TestSequence> = (0..num_seqs as u32)
            .map(|index| TestSequence {
                num_computed: len - num_rows / num_seqs,
                params: Arc::new(params.clone()),
                ..TestSequence::new(u64::from(index), &prompt(len, 90, 1), index * 128..(index + 1) * 128)
            })
            .collect();
        let batch: Vec<_> = sequences.iter_mut().map(|sequence| (sequence, num_rows / num_seqs)).collect();
        let largest = plan(&batch, 16, false);
        let tickets = [0; 2].map(|_| runner.submit(largest.clone(), Arc::new(NoSink)));
        for ticket in tickets {
            assert_eq!(runner.wait(ticket).unwrap().tokens.len(), num_seqs);
        }
        let taken = loaded - free() - pool_bytes;
        println!("heads of {head_dim}: {taken} of {set_aside}");
        // Beside a few small buffers.
        assert!(taken < set_aside + 8192, "heads of {head_dim}: {taken} of {set_aside}");
    }
}

#[test]
fn memory_that_a_device_refuses_is_an_error_of_loading() {
    let checkpoint = WideHeads::new(256, 1, None);
    let load = |memory_bytes| {
        let device: Arc<dyn Device> = Arc::new(FibreDevice::with_limits(memory_bytes, 227 << 10));
        on_fibres::load_to(&device, checkpoint.folder(), on_fibres::options(Dtype::Auto))
    };
    let model = load(1 << 30).unwrap();
    let memory = model.backend().device().memory().unwrap();
    let needed = memory.total_bytes - memory.free_bytes;
    // More than its matrices, which are what is looked at first.
    let error = load(needed - 1).unwrap_err();
    assert!(matches!(error, LoadError::Device(_)) && error.is_of_device(), "{error}");
    // Neither angles nor, behind them, the pool.
    let refused = |left: usize| {
        let model = Arc::new(load(needed + left).unwrap());
        let bytes = 16 * model.info_for(16, 1).kv_spec.bytes_per_token();
        CudaRunner::new(model, 16, bytes, Some(16)).err().unwrap()
    };
    assert!(matches!(refused(100), LoadError::Device(_)));
    assert!(matches!(refused(20_000), LoadError::Pool(PoolError::Device(_))));
}

/// The tokens of `count` steps, with their log-probabilities, the prompt in chunks of `chunk`.
fn trace(runner: &mut dyn Runner, mut sequence: TestSequence, chunk: usize, count: usize) -> Vec<SampledToken> {
    while sequence.num_uncomputed() > chunk {
        step(runner, &mut [(&mut sequence, chunk)]);
    }
    generate(runner, &mut sequence, count)
}

#[test]
fn two_runners_of_one_model_that_step_at_once_draw_what_each_draws_alone() {
    let model = on_fibres::load(&root().join("tests/checkpoints/qwen3"), Dtype::Float32);
    let traced = |seed: u64| {
        let mut runner = on_fibres::runner(&model, 16, 64);
        let sequence = TestSequence::new(seed, &prompt(20 + seed as usize, 250, seed), 0..4).with_logprobs(2);
        trace(&mut runner, sequence, 5, 8)
    };
    let alone = [1, 2].map(traced);
    let at_once = std::thread::scope(|scope| {
        let threads = [1, 2].map(|seed| scope.spawn(move || traced(seed)));
        threads.map(|thread| thread.join().unwrap())
    });
    assert_eq!(at_once, alone);
}

#[test]
fn a_batch_invariant_engine_gives_a_row_the_same_bits_in_any_company_and_chunk() {
    let checkpoint = WideHeads::new(64, 2, None);
    let model = Arc::new(on_fibres::try_load(checkpoint.folder(), Dtype::Auto, true).unwrap());
    assert_eq!(model.info_for(16, 4).numerics.0, "cuda-mma-1/tp1/bf16/kv-bf16");
    let tokens = |seed| prompt(40, WideHeads::VOCAB as u32, seed);
    let sequence = |id, blocks| TestSequence::new(id, &tokens(id), blocks).with_logprobs(0);
    let mut runner = on_fibres::runner(&model, 16, 256);
    let whole = trace(&mut runner, sequence(1, 0..4), 40, 3);
    assert_eq!(whole, trace(&mut runner, sequence(1, 4..8), 17, 3));
    // Decoded beside a prompt and two others.
    let (mut one, mut two, mut three) = (sequence(1, 0..4), sequence(2, 4..8), sequence(3, 8..12));
    let mut together = Vec::new();
    step(&mut runner, &mut [(&mut two, 39)]);
    for rows in [(40, 1, 20), (1, 0, 19), (1, 0, 1)] {
        let mut batch = vec![(&mut one, rows.0)];
        if rows.1 > 0 {
            batch.push((&mut two, rows.1));
        }
        batch.push((&mut three, rows.2));
        let drawn = step(&mut runner, &mut batch);
        let token = drawn[0].clone().unwrap();
        one.tokens.push(token.id);
        if let Some(Some(token)) = drawn.last() {
            three.tokens.push(token.id);
        }
        together.push(token);
    }
    assert_eq!(whole, together);
}

#[test]
fn kv_leaves_the_device_as_granules_and_goes_on_in_a_pool_of_other_blocks() {
    let model = on_fibres::load(&root().join("tests/checkpoints/qwen3"), Dtype::Bfloat16);
    let tokens = prompt(40, 250, 3);
    let (mut from, mut to) = (on_fibres::runner(&model, 16, 64), on_fibres::runner(&model, 32, 128));
    let mut sequence = TestSequence::new(1, &tokens, [2, 0, 3, 1]);
    step(&mut from, &mut [(&mut sequence, 39)]);
    let extents = kv_bytes(&from, &sequence);
    let mut moved = TestSequence { blocks: vec![BlockId(3), BlockId(0)], ..sequence.clone() };
    moved.blocks.iter().for_each(|block| to.pool().clear_block(*block));
    for (layer, bytes) in extents.iter().enumerate() {
        // In two pieces, the second within a granule.
        let (first, second) = bytes.split_at(bytes.len() / 2 + 100);
        to.pool().write_at(layer as u32, &moved.blocks, 0, 0, first);
        to.pool().write_at(layer as u32, &moved.blocks, 0, first.len(), second);
    }
    assert_eq!(kv_bytes(&to, &moved), extents);
    let next = generate(&mut from, &mut sequence, 3);
    assert_eq!(generate(&mut to, &mut moved, 3), next);
}

#[test]
fn blocks_of_a_device_s_pool_are_copied_cleared_and_parked() {
    let model = on_fibres::load(&root().join("tests/checkpoints/qwen3"), Dtype::Bfloat16);
    let mut runner = on_fibres::runner(&model, 16, 64);
    let mut sequence = TestSequence::new(1, &prompt(16, 250, 3), [2]);
    step(&mut runner, &mut [(&mut sequence, 16)]);
    let pool = runner.pool();
    let bytes_of = |block| {
        let mut bytes = Vec::new();
        pool.read_block(BlockId(block), &mut bytes);
        bytes
    };
    let computed = bytes_of(2);
    assert!(computed.iter().any(|byte| *byte != 0) && bytes_of(1).iter().all(|byte| *byte == 0));
    pool.copy_block(BlockId(2), BlockId(1));
    pool.write_block(BlockId(3), &computed);
    pool.clear_block(BlockId(2));
    assert!(bytes_of(1) == computed && bytes_of(3) == computed);
    assert!(bytes_of(2).iter().chain(&bytes_of(0)).all(|byte| *byte == 0));
}

/// Parameters, tokens so far with the length of the prompt, whether stop tokens are banned.
type Asked = (SamplingParams, Option<(Arc<Vec<u32>>, usize)>, bool);

#[test]
fn draws_penalties_and_log_probabilities_are_those_of_the_cpu() {
    let name = "tests/checkpoints/llama3-gqa";
    let model = on_fibres::load(&root().join(name), Dtype::Float32);
    let mut on_device = on_fibres::runner(&model, 16, 64);
    let mut on_cpu = steps::runner(&steps::load(name, Dtype::Float32), 16, 64);
    let greedy = SamplingParams::greedy(9);
    let drawn = SamplingParams { temperature: 0.9, seed: 1 << 40 | 5, ..greedy.clone() };
    let history = || Some((Arc::new((0..200).chain([3, 3, 900]).collect::<Vec<u32>>()), 150));
    let rows: Vec<Asked> = vec![
        (SamplingParams { logprobs: Some(20), ..greedy.clone() }, None, false),
        (SamplingParams { top_k: 5, ..drawn.clone() }, None, false),
        (SamplingParams { top_p: 0.7, min_p: 0.01, logprobs: Some(0), ..drawn.clone() }, None, false),
        (SamplingParams { logit_bias: vec![(7, 40.0), (5000, 1.0)], ..greedy.clone() }, None, false),
        (SamplingParams { stop_token_ids: (0..249).collect(), ..greedy.clone() }, None, true),
        (SamplingParams { repetition_penalty: 1.7, presence_penalty: 3.0, ..greedy.clone() }, history(), false),
        (SamplingParams { frequency_penalty: 1.5, logprobs: Some(2), ..drawn }, history(), false),
    ];
    let sample = |runner: &mut dyn Runner| {
        let mut sequence = TestSequence::new(1, &prompt(20, 250, 5), 0..2);
        sequence.blocks.iter().for_each(|block| runner.pool().clear_block(*block));
        let mut plan = plan(&[(&mut sequence, 20)], 16, false);
        let first = plan.samples.remove(0);
        let row = |(params, history, is_stop_banned): &Asked| {
            let (params, history) = (Arc::new(params.clone()), history.clone());
            SampleRow { params, history, is_stop_banned: *is_stop_banned, ..first.clone() }
        };
        plan.samples = rows.iter().map(row).collect();
        let ticket = runner.submit(plan, Arc::new(NoSink));
        runner.wait(ticket).unwrap().tokens.into_iter().map(|token| token.token).collect::<Vec<_>>()
    };
    let (found, wanted) = (sample(&mut on_device), sample(&mut on_cpu));
    for (index, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
        assert_eq!(found.id, wanted.id, "row {index}");
        assert!((found.logprob - wanted.logprob).abs() < 1e-4, "row {index}: {found:?} {wanted:?}");
        let ids = |token: &SampledToken| token.top_logprobs.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        assert_eq!(ids(found), ids(wanted), "row {index}");
        for ((_, found), (_, wanted)) in found.top_logprobs.iter().zip(&wanted.top_logprobs) {
            assert!((found - wanted).abs() < 1e-4, "row {index}: {found} {wanted}");
        }
    }
    assert_eq!((found[3].id, found[4].id), (7, 249));
    assert_eq!(found[0].top_logprobs[0], (found[0].id, found[0].logprob));
    assert_eq!(found.iter().map(|token| token.top_logprobs.len()).collect::<Vec<_>>(), [20, 0, 0, 0, 0, 0, 2]);
}

/// The plan of the next row of `sequence`, whose token the step before draws.
fn unknown_next(sequence: &mut TestSequence) -> StepPlan {
    sequence.tokens.push(0);
    let mut plan = plan(&[(sequence, 1)], 16, false);
    plan.from_slots.push(FromSlot { row: 0, slot: 0 });
    plan
}

#[test]
fn a_step_behind_another_takes_its_tokens_on_the_device() {
    let (prompt, greedy) = golden("qwen3", 1);
    let model = on_fibres::load(&root().join("tests/checkpoints/qwen3"), Dtype::Float32);
    let mut runner = on_fibres::runner(&model, 16, 64);
    // Penalties want the token on the host too: 1.0001 changes no choice here.
    for penalty in [1.0, 1.0001] {
        let mut sequence = TestSequence::new(1, &prompt, 0..4);
        sequence.params = Arc::new(SamplingParams { repetition_penalty: penalty, ..SamplingParams::greedy(9) });
        sequence.blocks.iter().for_each(|block| runner.pool().clear_block(*block));
        let rows = sequence.tokens.len();
        let first = runner.submit(plan(&[(&mut sequence, rows)], 16, false), Arc::new(NoSink));
        sequence.num_computed = rows;
        let mut in_flight = vec![first];
        let mut drawn = Vec::new();
        for _ in 0..3 {
            let mut next = unknown_next(&mut sequence);
            let history = [&sequence.tokens[..prompt.len()], &drawn[..]].concat();
            next.samples[0].history = (penalty != 1.0).then(|| (Arc::new(history), prompt.len()));
            sequence.num_computed += 1;
            in_flight.push(runner.submit(next, Arc::new(NoSink)));
            drawn.push(runner.wait(in_flight.remove(0)).unwrap().tokens[0].token.id);
        }
        drawn.push(runner.wait(in_flight.remove(0)).unwrap().tokens[0].token.id);
        assert_eq!(drawn, greedy[..4], "penalty {penalty}");
    }
}

#[derive(Default)]
struct Layers {
    heard: Mutex<Vec<(u32, u64, usize)>>,
}

impl KvSink for Layers {
    fn on_layer_written(&self, layer: u32, span: &Span) {
        self.heard.lock().unwrap().push((layer, span.sequence.0, span.num_rows));
    }
}

#[test]
fn layers_are_reported_in_order_and_the_sink_is_dropped_behind_them() {
    let model = on_fibres::load(&root().join("tests/checkpoints/qwen3"), Dtype::Bfloat16);
    let mut runner = on_fibres::runner(&model, 16, 64);
    let (mut one, mut two) =
        (TestSequence::new(1, &prompt(9, 250, 1), [0]), TestSequence::new(2, &prompt(9, 250, 2), [1]));
    let sink = Arc::new(Layers::default());
    // The first ends its prompt, the second does not.
    step_with(&mut runner, &mut [(&mut one, 9), (&mut two, 5)], sink.clone(), true);
    assert_eq!(*sink.heard.lock().unwrap(), [(0, 1, 9), (0, 2, 5), (1, 1, 9), (1, 2, 5)]);
    // A step that samples nothing ends with the last layer's KV.
    let sink = Arc::new(Layers::default());
    step_with(&mut runner, &mut [(&mut two, 3)], sink.clone(), true);
    assert_eq!(*sink.heard.lock().unwrap(), [(0, 2, 3), (1, 2, 3)]);
    // The next wait is behind the drop of the last sink.
    step(&mut runner, &mut [(&mut two, 1)]);
    assert_eq!(Arc::strong_count(&sink), 1);
}

#[test]
fn a_step_that_cannot_be_is_an_error_for_it_and_all_later_ones() {
    let model = on_fibres::load(&root().join("tests/checkpoints/qwen3"), Dtype::Bfloat16);
    let mut runner = on_fibres::runner(&model, 16, 64);
    let mut sequence = TestSequence::new(1, &[1], [0]);
    let plan = unknown_next(&mut sequence);
    let (first, second) = (runner.submit(plan.clone(), Arc::new(NoSink)), runner.submit(plan, Arc::new(NoSink)));
    assert!(runner.wait(first).unwrap_err().reason.contains("drawn by no other"));
    assert!(runner.wait(second).unwrap_err().reason.contains("an earlier step failed"));
}

#[test]
fn what_a_device_cannot_run_is_a_sentence() {
    let refused = |name: &str| {
        let error = on_fibres::try_load(&root().join("tests/checkpoints").join(name), Dtype::Bfloat16, false);
        error.err().unwrap().to_string()
    };
    assert_eq!(
        refused("llama-linear"),
        "this model cannot run on a CUDA device: bfloat16 products over 90 values have no kernel, only over multiples \
         of 8; use --device cpu, or another checkpoint"
    );
    let model = on_fibres::load(&root().join("tests/checkpoints/qwen3"), Dtype::Bfloat16);
    let total = model.backend().device().memory().unwrap().total_bytes as u64;
    let limits = StepLimits { max_num_batched_tokens: 64, max_num_seqs: 8, max_model_len: None };
    let left = model.kv_cache_bytes(0.9, &limits, 1).unwrap();
    assert!(left < total / 10 * 9 - (256 << 20) && left > total / 10 * 5, "{left} of {total}");
    assert!(model.kv_cache_bytes(0.9, &limits, 2).unwrap() < left / 2);
    let error = model.kv_cache_bytes(0.0001, &limits, 1).unwrap_err();
    assert!(error.is_of_device());
    let error = error.to_string();
    assert!(error.contains("--gpu-memory-utilization 0.0001") && error.contains("leaves nothing for KV"), "{error}");
    assert_eq!(model.check_kv_cache_bytes(left, &limits, 1).unwrap(), left);
    let error = model.check_kv_cache_bytes(left, &limits, 2).unwrap_err();
    assert!(error.is_of_device());
    let error = error.to_string();
    assert!(error.starts_with(&format!("--kv-cache-memory-bytes {left} for each of 2 nodes does not fit")), "{error}");

    let kv_dtype = |kv_dtype| {
        let options = DeviceLoadOptions { kv_dtype: Some(kv_dtype), ..on_fibres::options(Dtype::Bfloat16) };
        on_fibres::load_to(&on_fibres::device(), &root().join("tests/checkpoints/qwen3"), options)
    };
    assert!(kv_dtype(KvDtype::Bf16).is_ok());
    let error = kv_dtype(KvDtype::F32).unwrap_err();
    assert!(error.is_of_device());
    assert_eq!(
        error.to_string(),
        "--kv-cache-dtype float32 is not supported on a CUDA device, where this model's KV is bfloat16, the type that \
         is computed in: leave it at auto, or use --device cpu"
    );
}

#[cfg(feature = "cuda")]
#[test]
fn all_of_it_passes_by_nvidias_interface() {
    on_fibres::run_again_by_a_driver("all_of_it_passes_by_nvidias_interface");
}
