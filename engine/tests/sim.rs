//! The simulated runner keeps the promises that faults and routing are tested with.
#![allow(clippy::unwrap_used)]

#[path = "steps/mod.rs"]
mod steps;

use common::kv_spec::{GranuleOrder, KvDtype};
use engine::runner::Runner;
use engine::sim::{SimOptions, SimRunner};
use steps::{TestSequence, generate, kv_bytes, prompt, step};

fn runner(block_size: usize) -> SimRunner {
    SimRunner::new(SimOptions { block_size, ..SimOptions::default() }).unwrap()
}

fn tokens(runner: &mut SimRunner, sequence: &mut TestSequence, count: usize) -> Vec<u32> {
    generate(runner, sequence, count).iter().map(|token| token.id).collect()
}

#[test]
fn tokens_do_not_depend_on_chunks_blocks_or_company() {
    let prompt = prompt(100, 512, 1);
    let mut one = runner(16);
    let mut ours = TestSequence::new(1, &prompt, 0..10);
    let reference = tokens(&mut one, &mut ours, 8);
    let mut two = runner(32);
    let (mut ours, mut other) = (TestSequence::new(1, &prompt, [7, 3, 5, 9]), TestSequence::new(2, &[1, 2, 3], [0]));
    step(&mut two, &mut [(&mut ours, 33), (&mut other, 2)]);
    step(&mut two, &mut [(&mut other, 1), (&mut ours, 60)]);
    assert_eq!(tokens(&mut two, &mut ours, 8), reference);
}

#[test]
fn every_byte_of_kv_counts() {
    let prompt = prompt(40, 512, 1);
    let mut sim = runner(16);
    let mut ours = TestSequence::new(1, &prompt, 0..4);
    step(&mut sim, &mut [(&mut ours, 39)]);
    let kv = kv_bytes(&sim, &ours);
    let reference = tokens(&mut sim, &mut ours.clone(), 1);
    for (layer, at) in [(0, 0), (1, 5), (0, 1023), (1, 1024 + 77)] {
        let flipped = kv[layer][at] ^ 1;
        sim.pool().write_at(layer as u32, &ours.blocks, 0, at, &[flipped]);
        let mut again = TestSequence { num_computed: 39, ..ours.clone() };
        assert_ne!(tokens(&mut sim, &mut again, 1), reference, "layer {layer}, byte {at}");
        sim.pool().write_at(layer as u32, &ours.blocks, 0, at, &[kv[layer][at]]);
    }
    assert_eq!(tokens(&mut sim, &mut ours, 1), reference);
}

#[test]
fn kv_moved_to_another_node_continues_the_same() {
    let prompt = prompt(50, 512, 3);
    let (mut prefill, mut decode) = (runner(16), runner(64));
    let mut whole = TestSequence::new(1, &prompt, 0..8);
    let reference = tokens(&mut prefill, &mut whole, 5);
    let mut ours = TestSequence::new(2, &prompt, 10..18);
    let first = step(&mut prefill, &mut [(&mut ours, 50)]).remove(0).unwrap().id;
    let mut moved = TestSequence { blocks: vec![common::ids::BlockId(6)], ..ours.clone() };
    for (layer, bytes) in kv_bytes(&prefill, &ours).iter().enumerate() {
        decode.pool().write_at(layer as u32, &moved.blocks, 0, 0, bytes);
    }
    moved.tokens.push(first);
    assert_eq!([vec![first], tokens(&mut decode, &mut moved, 4)].concat(), reference);
}

/// Several heads of an odd number of values, of which a token reads a part.
fn wide(kv_dtype: KvDtype, granule_order: GranuleOrder) -> SimRunner {
    let options = SimOptions {
        num_kv_heads: 3,
        head_dim: 18,
        read_bytes_max: 30_000,
        kv_dtype,
        granule_order,
        ..SimOptions::default()
    };
    SimRunner::new(options).unwrap()
}

#[test]
fn tokens_do_not_depend_on_the_type_and_order_of_the_pool() {
    let prompt = prompt(300, 512, 4);
    let texts = [KvDtype::F32, KvDtype::Bf16].map(|dtype| {
        [GranuleOrder::Lanes, GranuleOrder::Rows].map(|order| {
            let mut ours = TestSequence::new(1, &prompt, 0..24);
            tokens(&mut wide(dtype, order), &mut ours, 20)
        })
    });
    assert_eq!(texts[0], texts[1]);
    assert_eq!(texts[0][0], texts[0][1]);
}

#[test]
fn where_a_token_reads_a_part_every_byte_counts_within_a_few_tokens() {
    let prompt = prompt(300, 512, 5);
    let mut sim = wide(KvDtype::Bf16, GranuleOrder::Rows);
    let mut ours = TestSequence::new(1, &prompt, 0..24);
    step(&mut sim, &mut [(&mut ours, 299)]);
    let kv = kv_bytes(&sim, &ours);
    // 18 granules lie before the newest one, 4 of each layer are read for a token.
    let reference = tokens(&mut sim, &mut ours.clone(), 5);
    for (layer, at) in [(0, 0), (1, 5), (0, 9 * 3456 + 1000), (1, 17 * 3456 + 3455)] {
        let flipped = kv[layer][at] ^ 1;
        sim.pool().write_at(layer as u32, &ours.blocks, 0, at, &[flipped]);
        let mut again = TestSequence { num_computed: 299, ..ours.clone() };
        assert_ne!(tokens(&mut sim, &mut again, 5), reference, "layer {layer}, byte {at}");
        sim.pool().write_at(layer as u32, &ours.blocks, 0, at, &[kv[layer][at]]);
    }
}
