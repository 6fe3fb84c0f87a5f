//! The same sequence gives the same bits however it is computed: chunked, batched, paged, on whatever
//! instruction set.

#![allow(clippy::unwrap_used)]

#[path = "steps/mod.rs"]
mod steps;

use std::sync::{Arc, Mutex};

use common::config::Dtype;
use common::sampling::SampledToken;
use engine::model::Model;
use engine::plan::Span;
use engine::runner::{KvSink, Runner};
use kernels::{Isa, Order};
use steps::{TestSequence, generate, kv_bytes, load, load_on, plan, prompt, runner, step, step_with};

/// Families whose paths differ: windows, norms on heads, biases, odd head sizes, several kinds of rope.
const MODELS: [&str; 5] = ["llama3-gqa", "mistral-window", "qwen2-mixed-window", "qwen3", "llama-linear"];

const PROMPT_LEN: usize = 150;

/// What a computation leaves: the next three tokens with all log-probabilities, and the KV of the prompt.
#[derive(Clone, PartialEq)]
struct Trace {
    tokens: Vec<SampledToken>,
    kv: Vec<Vec<u8>>,
}

fn sequence(model: &Model, id: u64, blocks: impl IntoIterator<Item = u32>) -> TestSequence {
    let vocab = model.spec().vocab_size;
    TestSequence::new(id, &prompt(PROMPT_LEN, vocab as u32, id), blocks).with_logprobs(vocab)
}

/// Prefills `sequence` in chunks of `chunk` and decodes two more tokens.
fn trace(runner: &mut dyn Runner, sequence: &mut TestSequence, chunk: usize) -> Trace {
    let mut tokens = Vec::new();
    while tokens.is_empty() {
        let rows = chunk.min(sequence.num_uncomputed());
        tokens.extend(step(runner, &mut [(&mut *sequence, rows)]).remove(0));
    }
    let kv = kv_bytes(runner, sequence);
    sequence.tokens.push(tokens[0].id);
    tokens.extend(generate(runner, sequence, 2));
    Trace { tokens, kv }
}

fn for_models(check: impl Fn(&str, &Arc<Model>, Trace)) {
    for name in MODELS {
        for dtype in [Dtype::Float32, Dtype::Bfloat16] {
            let model = load(&format!("tests/checkpoints/{name}"), dtype);
            let mut runner = runner(&model, 16, 512);
            let reference = trace(&mut runner, &mut sequence(&model, 1, 0..12), PROMPT_LEN);
            check(&format!("{name} {dtype:?}"), &model, reference);
        }
    }
}

#[test]
fn chunks_of_any_size_and_token_by_token_equal_one_chunk() {
    for_models(|name, model, reference| {
        for chunk in [1, 7, 16, 32, 48, 149] {
            let mut runner = runner(model, 16, 512);
            let found = trace(&mut runner, &mut sequence(model, 1, 0..12), chunk);
            assert!(found == reference, "{name}, chunks of {chunk}");
        }
    });
}

#[test]
fn block_sizes_and_block_tables_do_not_show() {
    for_models(|name, model, reference| {
        for block_size in [16, 32, 48, 64] {
            let mut runner = runner(model, block_size, 1024);
            let blocks = (0..160u32.div_ceil(block_size as u32)).map(|i| (i * 7 + 3) % 10 + i / 10 * 10);
            let found = trace(&mut runner, &mut sequence(model, 1, blocks), 40);
            assert!(found == reference, "{name}, blocks of {block_size}");
        }
    });
}

#[test]
fn company_in_the_batch_does_not_show() {
    for_models(|name, model, reference| {
        let mut runner = runner(model, 16, 1024);
        let (mut ours, mut other, mut third) =
            (sequence(model, 1, 20..32), sequence(model, 2, 0..12), sequence(model, 3, 40..52));
        step(&mut runner, &mut [(&mut other, 149)]);
        // Two chunks of the sequence, each beside a decode token and another prompt.
        let mut tokens = Vec::new();
        for rows in [90, 60] {
            let token = step(&mut runner, &mut [(&mut other, 1), (&mut ours, rows), (&mut third, 33)]);
            other.tokens.push(token[0].as_ref().unwrap().id);
            tokens.extend(token[1].clone());
        }
        let kv = kv_bytes(&runner, &ours);
        for _ in 0..2 {
            ours.tokens.push(tokens.last().unwrap().id);
            let token = step(&mut runner, &mut [(&mut third, 20), (&mut ours, 1), (&mut other, 1)]);
            other.tokens.push(token[2].as_ref().unwrap().id);
            tokens.extend(token[1].clone());
        }
        assert!(Trace { tokens, kv } == reference, "{name}");
    });
}

#[test]
fn kv_moved_to_another_pool_continues_with_the_same_bits() {
    for_models(|name, model, reference| {
        let (mut prefill, mut decode) = (runner(model, 16, 512), runner(model, 64, 512));
        let mut ours = sequence(model, 1, 5..17);
        step(&mut prefill, &mut [(&mut ours, 150)]);
        let mut moved = TestSequence { blocks: sequence(model, 1, [2, 0, 3]).blocks, ..ours.clone() };
        for (layer, bytes) in reference.kv.iter().enumerate() {
            decode.pool().write_at(layer as u32, &moved.blocks, 0, 0, bytes);
        }
        moved.tokens.push(reference.tokens[0].id);
        let tokens = generate(&mut decode, &mut moved, 2);
        assert!(tokens == reference.tokens[1..], "{name}");
    });
}

#[test]
fn one_changed_byte_of_kv_changes_what_follows() {
    let model = load("tests/checkpoints/llama3-gqa", Dtype::Bfloat16);
    let mut runner = runner(&model, 16, 512);
    let mut ours = sequence(&model, 1, 0..12);
    let reference = trace(&mut runner, &mut ours.clone(), PROMPT_LEN);
    step(&mut runner, &mut [(&mut ours, 150)]);
    ours.tokens.push(reference.tokens[0].id);
    // The high byte of a key of the first token: its sign and exponent.
    let granule = &reference.kv[0][..16];
    runner.pool().write_at(0, &ours.blocks, 0, 1, &[granule[1] ^ 0x81]);
    let token = generate(&mut runner, &mut ours, 1).remove(0);
    assert!(token.top_logprobs != reference.tokens[1].top_logprobs);
}

#[test]
fn instruction_sets_of_one_order_give_the_same_bits() {
    for_models(|name, model, reference| {
        let dtype = match model.dtype().as_str() {
            "float32" => Dtype::Float32,
            _ => Dtype::Bfloat16,
        };
        let order = |isa: Isa| if dtype == Dtype::Float32 { Order::Pairs } else { isa.order() };
        let mut of_other_order: Option<Trace> = None;
        for &isa in Isa::available() {
            let folder = format!("tests/checkpoints/{}", name.split(' ').next().unwrap());
            let model = load_on(&folder, dtype, isa);
            let mut runner = runner(&model, 16, 512);
            let found = trace(&mut runner, &mut sequence(&model, 1, 0..12), 64);
            if order(isa) == order(Isa::detect()) {
                assert!(found == reference, "{name} on {}", isa.name());
            } else if let Some(other) = &of_other_order {
                assert!(found == *other, "{name} on {}", isa.name());
            } else {
                assert!(found != reference, "{name}: two orders, and no bit differs");
                of_other_order = Some(found);
            }
        }
    });
}

#[derive(Default)]
struct Recorder(Mutex<Vec<(u32, usize, usize)>>);

impl KvSink for Recorder {
    fn on_layer_written(&self, layer: u32, span: &Span) {
        self.0.lock().unwrap().push((layer, span.first_position, span.num_rows));
    }
}

#[test]
fn layers_are_reported_in_order_also_of_chunks_that_are_not_sampled() {
    let model = load("tests/checkpoints/mistral-window", Dtype::Bfloat16);
    let mut runner = runner(&model, 16, 512);
    let mut ours = sequence(&model, 1, 0..12);
    let recorder = Arc::new(Recorder::default());
    step_with(&mut runner, &mut [(&mut ours, 64)], recorder.clone(), true);
    step_with(&mut runner, &mut [(&mut ours, 86)], recorder.clone(), true);
    let expected: Vec<_> = (0..3).map(|layer| (layer, 0, 64)).chain((0..3).map(|layer| (layer, 64, 86))).collect();
    assert_eq!(*recorder.0.lock().unwrap(), expected);
}

#[test]
fn two_steps_in_flight_complete_in_order() {
    let model = load("tests/checkpoints/qwen3", Dtype::Bfloat16);
    let mut runner = runner(&model, 16, 512);
    let (mut one, mut two) = (sequence(&model, 1, 0..12), sequence(&model, 2, 12..24));
    let sink = || Arc::new(engine::runner::NoSink);
    let first = runner.submit(plan(&[(&mut one, 150)], 16, false), sink());
    let second = runner.submit(plan(&[(&mut two, 150)], 16, false), sink());
    assert_eq!(runner.wait(first).unwrap().tokens[0].sequence.0, 1);
    assert_eq!(runner.wait(second).unwrap().tokens[0].sequence.0, 2);
}

#[test]
fn a_step_that_cannot_be_is_an_error_for_it_and_all_later_ones() {
    let model = load("tests/checkpoints/qwen3", Dtype::Bfloat16);
    let mut runner = runner(&model, 16, 512);
    let sink = || Arc::new(engine::runner::NoSink);
    let mut bad = TestSequence::new(1, &[1_000_000], 0..1);
    let mut good = TestSequence::new(2, &[1], 1..2);
    let first = runner.submit(plan(&[(&mut bad, 1)], 16, false), sink());
    let second = runner.submit(plan(&[(&mut good, 1)], 16, false), sink());
    assert!(runner.wait(first).unwrap_err().to_string().starts_with("the model runner failed: "));
    assert!(runner.wait(second).is_err());
    let third = runner.submit(plan(&[(&mut good, 1)], 16, false), sink());
    assert!(runner.wait(third).is_err());
}

#[test]
fn long_prompts_have_the_same_bits_in_every_chunking() {
    let model = load("models/tiny", Dtype::Auto);
    let long = |blocks| TestSequence::new(1, &prompt(1500, 512, 9), blocks).with_logprobs(512);
    let mut reference = None;
    for (block_size, chunk) in [(16, 1500), (16, 512), (32, 160), (64, 1000), (16, 33)] {
        let mut runner = runner(&model, block_size, 2048);
        let found = trace(&mut runner, &mut long(0..1536 / block_size as u32), chunk);
        assert!(*reference.get_or_insert_with(|| found.clone()) == found, "chunks of {chunk}");
    }
}

/// Numbers from a seed, one after the other.
struct Dice {
    seed: u64,
    count: u32,
}

impl Dice {
    /// A number in `range`.
    fn roll(&mut self, range: std::ops::RangeInclusive<usize>) -> usize {
        self.count += 1;
        let size = range.end() - range.start() + 1;
        range.start() + (kernels::uniform(self.seed, 1, self.count) * size as f64) as usize
    }
}

#[test]
fn random_schedules_of_several_sequences_leave_no_trace() {
    for seed in 0..12 {
        let mut dice = Dice { seed, count: 0 };
        let name =
            ["tests/checkpoints/qwen2-mixed-window", "models/tiny", "tests/checkpoints/qwen3"][seed as usize % 3];
        let model = load(name, [Dtype::Bfloat16, Dtype::Float32][dice.roll(0..=1)]);
        let vocab = model.spec().vocab_size;
        let block_size = [16, 32, 64][dice.roll(0..=2)];
        let blocks_each = 512 / block_size;
        let mut runner = runner(&model, block_size, 4 * 512);
        let mut sequences: Vec<TestSequence> = (0..4)
            .map(|i| {
                // Blocks of the four are interleaved.
                let blocks = (0..blocks_each as u32).map(|block| block * 4 + i as u32);
                TestSequence::new(i, &prompt(dice.roll(1..=400), vocab as u32, seed * 10 + i), blocks).with_logprobs(9)
            })
            .collect();
        let prompts: Vec<TestSequence> = sequences.clone();
        let mut drawn: Vec<Vec<SampledToken>> = vec![Vec::new(); 4];
        while drawn.iter().any(|tokens| tokens.len() < 4) {
            let mut batch: Vec<(&mut TestSequence, usize)> = Vec::new();
            for (sequence, tokens) in sequences.iter_mut().zip(&drawn) {
                let num_left = sequence.num_uncomputed();
                if tokens.len() < 4 && dice.roll(0..=2) > 0 {
                    batch.push((sequence, dice.roll(1..=num_left)));
                }
            }
            if batch.is_empty() {
                continue;
            }
            for (index, token) in step(&mut runner, &mut batch).into_iter().enumerate() {
                if let Some(token) = token {
                    batch[index].0.tokens.push(token.id);
                    drawn[batch[index].0.id as usize].push(token);
                }
            }
        }
        for (sequence, tokens) in prompts.into_iter().zip(drawn) {
            let mut alone = sequence;
            let expected = generate(&mut runner, &mut alone, 4);
            assert!(tokens == expected, "seed {seed}, {name}, sequence {} of {}", alone.id, alone.tokens.len());
        }
    }
}
