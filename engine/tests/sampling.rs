//! Sampling inside a step: what the plan says about a row reaches the logits.
#![allow(clippy::unwrap_used)]

#[path = "steps/mod.rs"]
mod steps;

use std::collections::HashSet;
use std::sync::Arc;

use common::config::Dtype;
use common::ids::ChoiceIndex;
use common::sampling::{SampledToken, SamplingParams};
use engine::cpu_runner::CpuRunner;
use engine::model::LoadError;
use engine::plan::SampleRow;
use engine::runner::{NoSink, Runner};
use steps::{TestSequence, load, plan, prompt, runner};

/// One step over a fresh sequence whose last row is sampled as `change` says.
fn sample(runner: &mut dyn Runner, change: impl Fn(SampleRow) -> Vec<SampleRow>) -> Vec<SampledToken> {
    let mut sequence = TestSequence::new(1, &prompt(20, 250, 5), 0..2);
    sequence.blocks.iter().for_each(|block| runner.pool().clear_block(*block));
    let mut plan = plan(&[(&mut sequence, 20)], 16, false);
    plan.samples = change(plan.samples.remove(0));
    let ticket = runner.submit(plan, Arc::new(NoSink));
    runner.wait(ticket).unwrap().tokens.into_iter().map(|token| token.token).collect()
}

fn with(row: SampleRow, params: SamplingParams) -> Vec<SampleRow> {
    vec![SampleRow { params: Arc::new(params), ..row }]
}

fn tiny() -> CpuRunner {
    runner(&load("tests/checkpoints/llama3-gqa", Dtype::Bfloat16), 16, 128)
}

#[test]
fn choices_of_one_row_differ_by_their_index_alone() {
    let mut runner = tiny();
    let params = SamplingParams { temperature: 5.0, seed: 7, ..SamplingParams::greedy(1) };
    let row = |row: &SampleRow, choice| SampleRow {
        choice: ChoiceIndex(choice),
        params: Arc::new(params.clone()),
        ..row.clone()
    };
    let together = sample(&mut runner, |first| (0..16).map(|choice| row(&first, choice)).collect());
    let apart: Vec<_> = (0..16).flat_map(|choice| sample(&mut runner, |first| vec![row(&first, choice)])).collect();
    assert_eq!(together, apart);
    assert!(together.iter().map(|token| token.id).collect::<HashSet<_>>().len() > 4);
}

#[test]
fn a_stop_token_is_not_drawn_while_it_is_banned() {
    let mut runner = tiny();
    let best = sample(&mut runner, |row| vec![row])[0].id;
    let params = SamplingParams { stop_token_ids: vec![best, 9999], ..SamplingParams::greedy(1) };
    assert_eq!(sample(&mut runner, |row| with(row, params.clone()))[0].id, best);
    let banned = |row: SampleRow| vec![SampleRow { is_stop_banned: true, ..with(row, params.clone()).remove(0) }];
    assert_ne!(sample(&mut runner, banned)[0].id, best);
}

#[test]
fn bias_penalties_and_log_probabilities_reach_the_row() {
    let mut runner = tiny();
    let best = sample(&mut runner, |row| vec![row])[0].id;
    // Ids that the vocabulary does not have stand for nothing.
    let biased = SamplingParams { logit_bias: vec![(77, 1000.0), (5000, 1.0)], ..SamplingParams::greedy(1) };
    assert_eq!(sample(&mut runner, |row| with(row, biased.clone()))[0].id, 77);
    let penalised = SamplingParams { presence_penalty: 1000.0, ..SamplingParams::greedy(1) };
    let with_history = |row: SampleRow| {
        let history = Some((Arc::new(vec![1, 2, best]), 2));
        vec![SampleRow { history, ..with(row, penalised.clone()).remove(0) }]
    };
    assert_ne!(sample(&mut runner, with_history)[0].id, best);
    let params = SamplingParams { logprobs: Some(3), ..SamplingParams::greedy(1) };
    let token = sample(&mut runner, |row| with(row, params.clone())).remove(0);
    assert_eq!((token.top_logprobs.len(), token.top_logprobs[0]), (3, (best, token.logprob)));
}

#[test]
fn a_pool_too_small_or_a_length_too_long_is_refused_with_the_numbers() {
    let model = load("tests/checkpoints/llama3-gqa", Dtype::Bfloat16);
    let bytes_per_token = 2 * 2 * 2 * 16 * 2;
    let error = CpuRunner::new(model.clone(), 16, 1 << 20, Some(513)).err().unwrap();
    assert!(matches!(error, LoadError::TooLong { asked: 513, supported: 512 }));
    let error = CpuRunner::new(model.clone(), 16, 100 * bytes_per_token, Some(200)).err().unwrap().to_string();
    assert!(error.contains("hold 96 tokens") && error.contains("fewer than the 200 needed"), "{error}");
    assert!(CpuRunner::new(model.clone(), 16, 10, None).is_err());
    assert!(CpuRunner::new(model.clone(), 0, 1 << 20, None).is_err());
    assert!(CpuRunner::new(model.clone(), 24, 1 << 20, None).is_err());
    let runner = CpuRunner::new(model, 16, 100 * bytes_per_token, None).unwrap();
    assert_eq!((runner.model().max_model_len, runner.model().num_blocks), (96, 6));
}
