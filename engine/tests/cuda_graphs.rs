//! Decode steps as graphs, on the host: what is replayed draws the tokens, and leaves the KV, of direct launches.
//!
//! The reference is the same runner with steps whose layers somebody wants to hear of: they are no graphs.
#![allow(clippy::unwrap_used)]

#[path = "on_fibres/mod.rs"]
mod on_fibres;
#[path = "steps/mod.rs"]
mod steps;

use std::path::Path;
use std::sync::Arc;

use common::config::Dtype;
use common::ids::BlockId;
use common::sampling::{SampledToken, SamplingParams};
use engine::cuda::graphs::GraphCounts;
use engine::cuda::{CudaBackend, CudaRunner};
use engine::model::Model;
use engine::plan::FromSlot;
use engine::runner::{NoSink, Runner};
use on_fibres::WideHeads;
use serde_json::Value;
use steps::{TestSequence, plan, prompt, root, step, step_with};

const BLOCKS_PER_SEQUENCE: u32 = 34;

/// A sequence with blocks of its own of which `len - 1` positions count as computed: their KV is zero.
fn sequence(id: u32, len: usize) -> TestSequence {
    let blocks = id * BLOCKS_PER_SEQUENCE..(id + 1) * BLOCKS_PER_SEQUENCE;
    let params =
        SamplingParams { temperature: 0.7, seed: u64::from(id), logprobs: Some(1), ..SamplingParams::greedy(99) };
    TestSequence {
        num_computed: len - 1,
        params: Arc::new(params),
        ..TestSequence::new(u64::from(id), &prompt(len, WideHeads::VOCAB as u32, u64::from(id)), blocks)
    }
}

/// What each step drew, with all bytes of the pool at the end.
type Drawn = (Vec<Vec<SampledToken>>, Vec<Vec<u8>>);

/// One decode step after the other, each of some of the sequences.
fn decode(runner: &mut CudaRunner, sequences: &mut [TestSequence], batches: &[&[usize]], is_direct: bool) -> Drawn {
    let mut drawn = Vec::new();
    for batch in batches {
        let members = sequences.iter_mut().enumerate().filter(|(index, _)| batch.contains(index));
        let mut members: Vec<_> = members.map(|(_, sequence)| (sequence, 1)).collect();
        let tokens = step_with(runner, &mut members, Arc::new(NoSink), is_direct);
        let tokens: Vec<SampledToken> = tokens.into_iter().flatten().collect();
        for ((sequence, _), token) in members.iter_mut().zip(&tokens) {
            sequence.tokens.push(token.id);
        }
        drawn.push(tokens);
    }
    let pool = runner.pool();
    let blocks = (0..pool.num_blocks() as u32).map(|block| {
        let mut bytes = Vec::new();
        pool.read_block(BlockId(block), &mut bytes);
        bytes
    });
    (drawn, blocks.collect())
}

fn runner(model: &Arc<Model<CudaBackend>>, num_sequences: usize) -> CudaRunner {
    on_fibres::runner(model, 16, num_sequences * BLOCKS_PER_SEQUENCE as usize * 16)
}

fn assert_replays_are_direct_launches(folder: &Path, dtype: Dtype, lens: &[usize], batches: &[&[usize]]) {
    let model = on_fibres::load(folder, dtype);
    let [replayed, direct] = [false, true].map(|is_direct| {
        let mut runner = runner(&model, lens.len());
        let mut sequences: Vec<_> = lens.iter().enumerate().map(|(id, len)| sequence(id as u32, *len)).collect();
        let drawn = decode(&mut runner, &mut sequences, batches, is_direct);
        let counts = runner.graph_counts().unwrap();
        println!("{counts:?}");
        assert_eq!(counts.num_recorded > 1 && counts.num_replayed > 3, !is_direct, "{counts:?}");
        drawn
    });
    assert_eq!(replayed.0, direct.0);
    assert!(replayed.1 == direct.1, "the same KV, and nothing beside it");
}

#[test]
fn batches_that_change_between_buckets_draw_the_tokens_of_direct_launches() {
    // One of the sequences comes to a second part of its keys on the way; the second layer has a window.
    let batches: &[&[usize]] = &[
        &[0],
        &[0, 1],
        &[0],
        &[0, 1, 2],
        &[0, 2, 4],
        &[0, 1, 2, 4],
        &[0, 1, 2, 3, 4],
        &[0, 1, 2, 3, 4],
        &[1, 4],
        &[0, 1, 2, 3, 4],
        &[0, 3],
        &[4],
        &[2, 3, 4],
        &[1, 2, 3],
        &[0],
        // All memory has its size by now.
        &[0, 1, 2, 3, 4],
        &[0, 3],
        &[2, 3, 4],
        &[1, 4],
        &[4],
        &[0, 1, 2, 3],
    ];
    let lens = [3, 17, 509, 40, 1];
    let checkpoint = WideHeads::new(64, 2, Some(40));
    assert_replays_are_direct_launches(checkpoint.folder(), Dtype::Auto, &lens, batches);
}

#[test]
fn batches_of_more_rows_than_the_kernel_for_few_takes_are_replayed_in_their_bucket() {
    // 18 and 17 rows are both a bucket of 32; on this device the library adds in one order whatever the number of rows.
    let all: Vec<usize> = (0..18).collect();
    let (eighteen, seventeen, one) = (&all[..], &all[1..], &all[3..4]);
    let batches = [eighteen, seventeen, eighteen, seventeen, one, one, one, eighteen];
    let lens: Vec<usize> = (0..18).map(|id| 1 + 7 * id).collect();
    let checkpoint = WideHeads::new(64, 2, Some(40));
    assert_replays_are_direct_launches(checkpoint.folder(), Dtype::Auto, &lens, &batches);
}

#[test]
fn heads_without_kernels_on_tensor_cores_are_replayed_too() {
    let batches: &[&[usize]] = &[&[0, 1, 2], &[0, 2], &[0, 1, 2], &[0, 1], &[0, 1, 2], &[1, 2], &[0, 1, 2], &[0, 1]];
    let checkpoint = WideHeads::new(24, 2, None);
    assert_replays_are_direct_launches(checkpoint.folder(), Dtype::Auto, &[3, 20, 7], batches);
}

#[test]
fn an_eager_runner_draws_the_tokens_of_replays_and_records_nothing() {
    let checkpoint = WideHeads::new(64, 2, Some(40));
    let model = on_fibres::load(checkpoint.folder(), Dtype::Auto);
    let batches: Vec<&[usize]> = vec![&[0, 1, 2], &[0, 1, 2], &[0, 2], &[0, 1, 2], &[0, 1], &[0, 1, 2]];
    let [replayed, eager] = [true, false].map(|has_graphs| {
        let bytes = model.info_for(16, 1).kv_spec.bytes_per_token() * u64::from(3 * BLOCKS_PER_SEQUENCE) * 16;
        let mut runner = CudaRunner::with_graphs(model.clone(), 16, bytes, None, has_graphs).unwrap();
        let mut sequences: Vec<_> = [3, 509, 40].iter().zip(0..).map(|(len, id)| sequence(id, *len)).collect();
        let drawn = decode(&mut runner, &mut sequences, &batches, false);
        (drawn, runner.graph_counts().unwrap())
    });
    assert_eq!(eager.1, GraphCounts { num_direct: batches.len() as u64, num_recorded: 0, num_replayed: 0 });
    assert!(replayed.1.num_replayed > 1, "{:?}", replayed.1);
    assert_eq!(replayed.0.0, eager.0.0);
    assert!(replayed.0.1 == eager.0.1, "the same KV, and nothing beside it");
}

#[test]
fn memory_that_grows_makes_graphs_anew() {
    let checkpoint = WideHeads::new(64, 2, None);
    let model = on_fibres::load(checkpoint.folder(), Dtype::Auto);
    let [replayed, direct] = [false, true].map(|is_direct| {
        let mut runner = runner(&model, 2);
        let mut sequences = vec![sequence(0, 5), sequence(1, 3)];
        let mut parts = vec![decode(&mut runner, &mut sequences, &[&[0usize][..]; 4], is_direct)];
        // A chunk that all activations grow for.
        let mut other = sequence(1, 70);
        other.num_computed = 0;
        step(&mut runner, &mut [(&mut other, 70)]);
        parts.push(decode(&mut runner, &mut sequences, &[&[0usize][..]; 4], is_direct));
        if !is_direct {
            let counts = runner.graph_counts().unwrap();
            assert_eq!(counts, GraphCounts { num_direct: 2, num_recorded: 2, num_replayed: 4 });
        }
        parts
    });
    assert!(replayed == direct, "tokens and KV before and after");
}

/// Prompt number `index` of a golden checkpoint, and how Transformers continues it.
fn golden(name: &str, index: usize) -> (Vec<u32>, Vec<u32>) {
    let path = root().join("tests/checkpoints").join(name).join("goldens.json");
    let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let ids = |value: &Value| value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    let prompt = &json["prompts"][index];
    (ids(&prompt["prompt"]), ids(&prompt["greedy"]))
}

#[test]
fn replays_behind_one_another_draw_the_golden_tokens() {
    // Two sequences, two steps in flight: tokens are taken on the device, the graph is launched again before it is done.
    let model = on_fibres::load(&root().join("tests/checkpoints/qwen3"), Dtype::Float32);
    let mut runner = on_fibres::runner(&model, 16, 128);
    let goldens = [golden("qwen3", 0), golden("qwen3", 1)];
    let mut sequences: Vec<TestSequence> = goldens
        .iter()
        .zip([0..4, 4..8])
        .map(|((prompt, _), blocks)| TestSequence::new(u64::from(blocks.start), prompt, blocks))
        .collect();
    sequences.iter().flat_map(|sequence| &sequence.blocks).for_each(|block| runner.pool().clear_block(*block));
    let mut drawn: [Vec<u32>; 2] = Default::default();
    let mut in_flight = Vec::new();
    const NUM_STEPS: usize = 8;
    for number in 0..NUM_STEPS {
        let batch: Vec<_> = sequences
            .iter_mut()
            .map(|sequence| {
                let rows = sequence.num_uncomputed();
                (sequence, rows)
            })
            .collect();
        let mut next = plan(&batch, 16, false);
        if number > 0 {
            next.from_slots = vec![FromSlot { row: 0, slot: 0 }, FromSlot { row: 1, slot: 1 }];
        }
        for sequence in &mut sequences {
            sequence.num_computed = sequence.tokens.len();
            sequence.tokens.push(0);
        }
        in_flight.push(runner.submit(next, Arc::new(NoSink)));
        if in_flight.len() == 2 || number + 1 == NUM_STEPS {
            for ticket in in_flight.drain(..if number + 1 == NUM_STEPS { 2 } else { 1 }) {
                let tokens = runner.wait(ticket).unwrap().tokens;
                drawn.iter_mut().zip(tokens).for_each(|(drawn, token)| drawn.push(token.token.id));
            }
        }
    }
    for (drawn, (_, greedy)) in drawn.iter().zip(&goldens) {
        assert_eq!(*drawn, greedy[..NUM_STEPS]);
    }
    assert_eq!(
        runner.graph_counts().unwrap(),
        GraphCounts { num_direct: 1, num_recorded: 1, num_replayed: NUM_STEPS as u64 - 3 }
    );
}

#[cfg(feature = "cuda")]
#[test]
fn all_of_it_passes_by_nvidias_interface() {
    on_fibres::run_again_by_a_driver("all_of_it_passes_by_nvidias_interface");
}
