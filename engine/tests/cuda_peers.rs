//! A device's pool is copied into another one, block sizes apart, and hashed where it lies: what `cuda-ipc` does.
#![allow(clippy::unwrap_used)]

#[path = "on_fibres/mod.rs"]
mod on_fibres;
#[path = "steps/mod.rs"]
mod steps;

use common::config::Dtype;
use common::content::PrefixDigest;
use common::device_pool::{DevicePool, ExportedPool};
use common::ids::{Attempt, BlockId, Generation, RequestId};
use common::kv_memory::KvMemory;
use common::wire::{ExtentBinding, ExtentHasher, ExtentId, PoolRun};
use engine::pool::KvPool;
use engine::runner::Runner;
use steps::{TestSequence, generate, kv_bytes, prompt, root, step};

/// XXH3 as the host makes it for every digest of an extent.
fn hash_on_host(bytes: &[u8]) -> u128 {
    let (request, attempt, generation, content) = (RequestId(0), Attempt(0), Generation(0), PrefixDigest([0; 32]));
    let extent =
        ExtentId { group: 0, layer: 0, plane_mask: 3, first_head: 0, num_heads: 1, first_token: 0, num_tokens: 16 };
    let mut hasher = ExtentHasher::new(&ExtentBinding { request, attempt, generation, extent, content });
    hasher.update(bytes);
    hasher.digest().0 ^ hasher.digest_of_hashed(0).0
}

fn runs(pool: &KvPool, layer: u32, blocks: &[BlockId], num_granules: usize) -> Vec<PoolRun> {
    let mut runs = Vec::new();
    pool.visit_places(layer, blocks, 0, num_granules, &mut |offset, num_bytes| {
        runs.push(PoolRun { offset, num_bytes: num_bytes as u32 });
    });
    runs
}

#[test]
fn kv_copied_device_to_device_is_hashed_as_on_the_host_and_goes_on() {
    let model = on_fibres::load(&root().join("tests/checkpoints/qwen3"), Dtype::Bfloat16);
    let (mut from, mut to) = (on_fibres::runner(&model, 16, 64), on_fibres::runner(&model, 32, 128));
    let mut sequence = TestSequence::new(1, &prompt(40, 250, 3), [2, 0, 3, 1]);
    step(&mut from, &mut [(&mut sequence, 39)]);
    let mut moved = TestSequence { blocks: vec![BlockId(3), BlockId(0)], ..sequence.clone() };
    moved.blocks.iter().for_each(|block| to.pool().clear_block(*block));

    let (source, target) = (from.pool().clone(), to.pool().clone());
    let exported = source.export().unwrap();
    let peer = target.clone().open_peer(&exported).unwrap();
    assert_eq!(peer.num_bytes(), exported.num_bytes);
    let extents = kv_bytes(&from, &sequence);
    for (layer, bytes) in extents.iter().enumerate() {
        let layer = layer as u32;
        // Blocks 2 and 3 of the sequence are neighbours neither here nor there.
        let runs = runs(&source, layer, &sequence.blocks, 3);
        peer.copy_granules(&runs, layer, &moved.blocks, 0).unwrap();
        let hashes = [
            source.hash_granules(layer, &sequence.blocks, 0, 3),
            target.hash_granules(layer, &moved.blocks, 0, 3),
            Some(hash_on_host(bytes)),
        ];
        assert!(hashes[0].is_some() && hashes[0] == hashes[1] && hashes[1] == hashes[2], "layer {layer}: {hashes:x?}");
        let mut first = vec![0; runs[0].num_bytes as usize];
        peer.read(runs[0].offset, &mut first).unwrap();
        assert!(first == bytes[..first.len()]);
    }
    assert_eq!(kv_bytes(&to, &moved), extents);
    let next = generate(&mut from, &mut sequence, 3);
    assert_eq!(generate(&mut to, &mut moved, 3), next);
}

#[test]
fn what_is_no_pool_of_that_size_is_not_opened() {
    let model = on_fibres::load(&root().join("tests/checkpoints/qwen3"), Dtype::Bfloat16);
    let runner = on_fibres::runner(&model, 16, 64);
    let exported = runner.pool().export().unwrap();
    let larger = ExportedPool { num_bytes: exported.num_bytes + 1, ..exported };
    let said = runner.pool().clone().open_peer(&larger).err().unwrap();
    assert!(said.contains("were announced"), "{said}");
    let spec = model.spec().kv_spec(model.kv_dtype());
    let on_host = KvPool::new(&spec, 16, 4).unwrap();
    assert_eq!(on_host.export().unwrap_err(), "the pool is in the host's memory");
    assert_eq!(on_host.hash_granules(0, &[BlockId(0)], 0, 1), None);
}
