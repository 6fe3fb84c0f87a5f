//! The two ends of a hand-over, and of a prefix that is fetched, have pools of different block sizes, orders and types
//! of KV. Where they may exchange KV the tokens are those that one engine alone generates; the simulated KV is whole
//! numbers, which every type holds.
//!
//! `TANDEM_TEST_SEED=17 cargo test -p decode-node --test ends` runs one seed of the seeded test.
#![allow(clippy::unwrap_used)]

mod cluster;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cluster::{Cluster, FakePrefillNode, Finished, PoolShape, Shape, generate, prompt, sampled, soon};
use common::content::{ChainRoot, ContentChain, GRANULE_TOKENS};
use common::ids::{Attempt, BlockId, ChoiceIndex, Generation, RequestId, Role};
use common::kv_memory::GranuleConversion;
use common::kv_spec::{GranuleOrder, KvDtype, KvSpec};
use common::model::{KvExchange, ModelIdentity, ModelInfo, NumericsId, Representation};
use common::wire::Generate;
use engine::conversion::conversion;
use engine::pool::KvPool;
use kv_connector::transfer::{ExtentRequest, ExtentSource, FaultPlan, LandingEvent, LandingPlan};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};

use GranuleOrder::{Lanes, Rows};
use KvDtype::{Bf16, F32};

/// No multiple of the larger block sizes: prefixes end, and what is computed begins, inside blocks.
const NUM_HELD: usize = 304;
const NUM_TOKENS: usize = 400;

fn pool(block_size: usize, kv_dtype: KvDtype, granule_order: GranuleOrder) -> PoolShape {
    PoolShape { block_size, kv_dtype, granule_order }
}

/// Pools of the two prefill nodes and of the decode node.
fn ends() -> Vec<([PoolShape; 2], PoolShape)> {
    vec![
        ([pool(16, F32, Lanes), pool(64, F32, Lanes)], pool(64, F32, Lanes)),
        ([pool(64, F32, Lanes), pool(48, F32, Lanes)], pool(16, F32, Lanes)),
        ([pool(16, F32, Rows), pool(32, F32, Lanes)], pool(64, F32, Lanes)),
        ([pool(64, F32, Lanes), pool(16, F32, Rows)], pool(16, F32, Rows)),
        ([pool(64, F32, Lanes), pool(16, Bf16, Lanes)], pool(16, Bf16, Lanes)),
        ([pool(16, Bf16, Rows), pool(64, F32, Rows)], pool(48, F32, Lanes)),
    ]
}

fn shape(prefill_pools: [PoolShape; 2], decode_pool: PoolShape) -> Shape {
    let mut shape = Shape { prefill_pools, decode_pool, exchange: KvExchange::Dtypes, ..Shape::default() };
    // Fetching is the cheapest way by far.
    shape.prefill.prefill_tokens_per_second = Some(1000);
    shape.prefill.fetch_bytes_per_second = Some(u64::MAX);
    shape.decode.credit_bytes = 16 << 10;
    shape
}

async fn ask(cluster: &Cluster, request: &Generate) -> Finished {
    let answer = cluster.ask(request).await.finish().await;
    assert_eq!(answer.texts, cluster.undisturbed(request).await, "request {}", request.request);
    answer
}

fn form(pool: PoolShape) -> (KvDtype, GranuleOrder) {
    (pool.kv_dtype, pool.granule_order)
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_of_any_length_are_handed_over_between_unequal_pools() {
    for (prefills, decode) in ends() {
        println!("{prefills:?} to {decode:?}");
        let cluster = Cluster::start(shape(prefills, decode)).await;
        let mut num_converted = 0;
        for (number, len) in [1, 15, 16, 17, 63, 64, 65, 333].into_iter().enumerate() {
            let mut request = generate(number as u128 + 1, prompt(len, number as u32), sampled(24, 3));
            request.choices = (0..1 + number as u32 % 2).map(ChoiceIndex).collect();
            request.prefill_candidates = vec![cluster.candidates()[number % 2].clone()];
            let answer = ask(&cluster, &request).await;
            assert!(!answer.timeline.is_local_prefill);
            if form(prefills[number % 2]) != form(decode) {
                num_converted += answer.timeline.transferred_bytes;
            }
        }
        assert_eq!(cluster.decode.counter("tandem_fabric_converted_bytes_total"), num_converted);
        assert_eq!((cluster.refused_extents(), cluster.lost_candidates()), Default::default());
        cluster.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prefix_of_the_decode_node_is_fetched_into_an_unequal_pool() {
    for (prefills, decode) in ends() {
        println!("{prefills:?} to {decode:?}");
        let cluster = Cluster::start(shape(prefills, decode)).await;
        for (index, prefill_pool) in prefills.into_iter().enumerate() {
            let text = prompt(NUM_TOKENS, index as u32);
            let first = generate(index as u128 + 10, text[..NUM_HELD + 1].to_vec(), sampled(1, 1));
            assert!(cluster.ask(&first).await.finish().await.timeline.is_local_prefill);
            let num_held = NUM_HELD / decode.block_size * decode.block_size;
            let mut request = generate(index as u128 + 20, text, sampled(20, 2));
            request.prefill_candidates = vec![cluster.candidates()[index].clone()];
            let answer = ask(&cluster, &request).await;
            assert_eq!(answer.timeline.num_fetched_tokens as usize, num_held);
            let prefill = &cluster.prefills[index];
            assert_eq!(prefill.counter("tandem_computed_tokens_total") as usize, NUM_TOKENS - num_held);
            let converted = prefill.counter("tandem_fabric_converted_bytes_total");
            assert_eq!(converted > 0, form(prefill_pool) != form(decode));
        }
        assert_eq!((cluster.failed_fetches(), cluster.lost_candidates()), Default::default());
        cluster.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prefix_of_a_peer_is_fetched_into_an_unequal_pool() {
    for (prefills, decode) in ends() {
        println!("{prefills:?} to {decode:?}");
        let cluster = Cluster::start(shape(prefills, decode)).await;
        let text = prompt(NUM_TOKENS, 1);
        cluster.hold_at(0, &text[..NUM_HELD + 1], &[]).await;
        let num_held = NUM_HELD / prefills[0].block_size * prefills[0].block_size;
        let mut request = generate(1, text, sampled(20, 1));
        request.prefill_candidates = vec![cluster.candidates()[1].clone()];
        request.prefix_peer = Some(cluster.peer(0, num_held));
        let answer = ask(&cluster, &request).await;
        assert_eq!(answer.timeline.num_fetched_tokens as usize, num_held);
        let converted = cluster.prefills[1].counter("tandem_fabric_converted_bytes_total");
        assert_eq!(converted > 0, form(prefills[0]) != form(prefills[1]));
        assert_eq!((cluster.failed_fetches(), cluster.lost_candidates()), Default::default());
        cluster.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_and_repeated_extents_of_another_form_change_no_token() {
    for (seed, (prefills, decode)) in ends().into_iter().enumerate() {
        let plan = FaultPlan {
            seed: seed as u64,
            corruption: 0.1,
            truncation: 0.05,
            reset: 0.05,
            duplication: 0.3,
            delay_max: Duration::from_millis(5),
            ..FaultPlan::default()
        };
        let cluster = Cluster::start(Shape { faults: Some(plan), ..shape(prefills, decode) }).await;
        for number in 1..=6 {
            let mut request = generate(number, prompt(100 + number as usize * 13, number as u32), sampled(12, 1));
            request.prefill_candidates = cluster.candidates();
            ask(&cluster, &request).await;
        }
        assert!(cluster.injected().num_corrupted > 0, "seed {seed}");
        cluster.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_types_are_refused_in_words_and_prefilled_locally_unless_both_ends_are_set() {
    let pools = [pool(16, Bf16, Lanes), pool(16, Bf16, Lanes)];
    let refusing = Shape { exchange: KvExchange::Same, ..shape(pools, pool(64, F32, Lanes)) };
    let cluster = Cluster::start(refusing).await;
    let address = cluster.prefills[0].fabric.local_addr();
    let dialled = soon("an answer", cluster.decode.fabric.dial(address, Role::PrefillNode, None)).await;
    let sentence = dialled.unwrap_err().to_string();
    for part in ["f32/sim-3/kv-f32", "bf16/sim-3/kv-bf16", "--kv-cache-dtype", "--kv-exchange dtypes"] {
        assert!(sentence.contains(part), "{part}: {sentence}");
    }
    let mut request = generate(1, prompt(100, 1), sampled(10, 1));
    request.prefill_candidates = cluster.candidates();
    assert!(ask(&cluster, &request).await.timeline.is_local_prefill);
    assert_eq!(cluster.decode.counter("tandem_fabric_converted_bytes_total"), 0);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn node_whose_kv_cannot_be_made_into_ones_own_is_asked_for_nothing() {
    let pools = [pool(16, F32, Lanes), pool(16, F32, Lanes)];
    let mut cluster = Cluster::start(shape(pools, pool(64, F32, Lanes))).await;
    let mut mixed = cluster.decode.engine.model().as_ref().clone();
    mixed.kv_spec.groups[0].planes[0].dtype = Bf16;
    for (number, (name, model)) in [("silent", None), ("mixed", Some(mixed))].into_iter().enumerate() {
        let fake = FakePrefillNode::announcing(&cluster, name, model);
        cluster.learn(&fake).await;
        let mut request = generate(number as u128 + 1, prompt(100, number as u32), sampled(10, 1));
        request.prefill_candidates = vec![fake.node()];
        assert!(ask(&cluster, &request).await.timeline.is_local_prefill);
        assert!(!fake.is_asked(), "{name}");
        fake.end().await;
    }
    cluster.end().await;
}

/// A node of this shape, as it says in its hello.
fn model(rng: &mut StdRng, kv_spec: KvSpec) -> ModelInfo {
    let numerics = NumericsId("any".to_string());
    ModelInfo {
        identity: ModelIdentity([9; 32]),
        representation: Representation("any".to_string()),
        numerics,
        kv_spec,
        vocab_size: 100,
        max_model_len: 4096,
        exchange: KvExchange::Dtypes,
        granule_order: *[Lanes, Rows].choose(rng).unwrap(),
        block_size: *[16, 32, 48, 64, 128].choose(rng).unwrap(),
        num_blocks: 64,
    }
}

/// Enough blocks for so many tokens, anywhere in the pool.
fn blocks(rng: &mut StdRng, model: &ModelInfo, num_tokens: usize) -> Vec<BlockId> {
    let mut blocks: Vec<BlockId> = (0..model.num_blocks).map(BlockId).collect();
    blocks.shuffle(rng);
    blocks.truncate(num_tokens.div_ceil(model.block_size as usize));
    blocks
}

fn new_pool(model: &ModelInfo) -> Arc<KvPool> {
    Arc::new(KvPool::new(&model.kv_spec, model.block_size as usize, model.num_blocks as usize).unwrap())
}

fn converted(conversion: &Option<Arc<dyn GranuleConversion>>, bytes: &[u8], out_bytes: usize) -> Vec<u8> {
    match conversion {
        None => bytes.to_vec(),
        Some(conversion) => {
            let mut out = vec![0; out_bytes];
            conversion.convert(bytes, &mut out);
            out
        }
    }
}

/// One prompt of a random length from one random pool to another, cut and ordered at random.
async fn lands_as_the_other_pool_would_hold_it(seed: u64, zone: &kv_connector::transfer::LandingZone) {
    let rng = &mut StdRng::seed_from_u64(seed);
    let (num_layers, num_heads) = (rng.random_range(1..4), rng.random_range(1..5));
    let head_dim = *[8, 10, 32, 64].choose(rng).unwrap();
    let spec = |dtype| KvSpec::uniform(num_layers, num_heads, head_dim, dtype, None);
    let theirs = spec(*[F32, Bf16].choose(rng).unwrap());
    let ours = spec(*[F32, Bf16].choose(rng).unwrap());
    let (theirs, ours) = (model(rng, theirs), model(rng, ours));
    let num_tokens = rng.random_range(1..500);
    let first_token = rng.random_range(0..num_tokens).min(num_tokens - 1) / GRANULE_TOKENS * GRANULE_TOKENS;
    println!("seed {seed}: {first_token}..{num_tokens} {theirs:?} to {ours:?}");

    // What both stand for, as values of the narrower type in the source.
    let plain = ModelInfo { kv_spec: spec(F32), granule_order: Lanes, ..theirs.clone() };
    let (source, target) = (new_pool(&theirs), new_pool(&ours));
    let (source_blocks, target_blocks) = (blocks(rng, &theirs, num_tokens), blocks(rng, &ours, num_tokens));
    let num_granules = num_tokens.div_ceil(GRANULE_TOKENS);
    let plain_bytes = GRANULE_TOKENS * num_heads as usize * head_dim as usize * 2 * 4 * num_granules;
    let mut expected = Vec::new();
    for layer in 0..num_layers {
        let plain_kv: Vec<u8> =
            (0..plain_bytes / 4).flat_map(|_| rng.random_range(-8.0f32..8.0).to_le_bytes()).collect();
        let kv = converted(&conversion(&plain, &theirs).unwrap(), &plain_kv, source.extent_bytes(num_granules));
        source.write_at(layer, &source_blocks, 0, 0, &kv);
        expected.push(converted(&conversion(&theirs, &ours).unwrap(), &kv, target.extent_bytes(num_granules)));
    }

    let tokens = prompt(num_tokens, seed as u32);
    let mut chain = ContentChain::new(&ChainRoot::of_model(theirs.identity));
    chain.extend(&tokens);
    let (request, attempt, generation) = (RequestId(u128::from(seed)), Attempt(1), Generation(1));
    let (landing, mut events) = zone.open(LandingPlan {
        request,
        attempt,
        generation,
        blocks: target_blocks.clone(),
        chain: chain.clone(),
        tokens: tokens.clone(),
        first_token,
        num_tokens,
        kv_spec: ours.kv_spec.clone(),
        memory: target.clone(),
        conversion: conversion(&theirs, &ours).unwrap(),
    });
    let extents = ExtentSource {
        memory: source.clone(),
        kv_spec: theirs.kv_spec.clone(),
        blocks: source_blocks.into(),
        chain,
        request: ExtentRequest { epoch: cluster::EPOCH, request, attempt, generation },
    };
    // Chunks end where the source's scheduler ends them: at any granule.
    let mut cuts: Vec<usize> = (first_token..num_tokens).step_by(GRANULE_TOKENS).skip(1).collect();
    cuts.shuffle(rng);
    cuts.truncate(rng.random_range(0..4));
    cuts.extend([first_token, num_tokens]);
    cuts.sort();
    let mut all: Vec<_> = (0..num_layers)
        .flat_map(|layer| cuts.windows(2).flat_map(|cut| extents.extents(layer, cut[0], cut[1])).collect::<Vec<_>>())
        .collect();
    all.shuffle(rng);
    let num_extents = all.len();
    for (extent, num_bytes) in all {
        let (header, payload) = extents.seal(&tokens, extent);
        let payload = payload.into_bytes();
        assert_eq!(payload.len() as u64, num_bytes);
        let mut arriving = zone.admit(&header).unwrap();
        let mut rest = &payload[..];
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(rng.random_range(1..=rest.len()));
            arriving.write(piece).unwrap();
            rest = behind;
        }
        arriving.finish().unwrap();
    }
    for number in 1..=num_extents {
        match soon("an extent is told", events.recv()).await.unwrap() {
            LandingEvent::ExtentVerified { is_complete, .. } => assert_eq!(is_complete, number == num_extents),
            refused => panic!("seed {seed}: {refused:?}"),
        }
    }
    landing.close();
    for (layer, expected) in expected.iter().enumerate() {
        let first_granule = first_token / GRANULE_TOKENS;
        let mut found = vec![0; target.extent_bytes(num_granules)];
        target.read_granules(layer as u32, &target_blocks, 0, num_granules, &mut found);
        let (before, behind) = found.split_at(target.extent_bytes(first_granule));
        assert!(before.iter().all(|byte| *byte == 0), "seed {seed}: what is held is not written");
        assert!(behind == &expected[target.extent_bytes(first_granule)..], "seed {seed}, layer {layer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_of_any_pool_lands_as_the_other_pool_would_hold_it() {
    let cluster = Cluster::start(Shape::default()).await;
    let seeds: Vec<u64> = match std::env::var("TANDEM_TEST_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..120).collect(),
    };
    for seed in seeds {
        lands_as_the_other_pool_would_hold_it(seed, &cluster.decode.fabric.landing_zone()).await;
    }
    assert_eq!(cluster.refused_extents(), BTreeMap::new());
    cluster.end().await;
}
