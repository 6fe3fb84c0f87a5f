//! The KV that crossed, byte for byte: what lies in the decode node's pool is what the prefill node
//! computed and what the decode node would have computed itself; and tokens are wrong as soon as one byte
//! of it is, which is what makes the equality tests worth something.
#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use common::config::{PrefillAttention, UpArgs};
use common::content::ChainRoot;
use common::ids::{Attempt, BlockId, ChoiceIndex, Epoch, NodeId, RequestId, Role};
use common::sampling::SamplingParams;
use common::sequence::{NewSequence, Work};
use common::wire::{Directory, Generate, GenerateEvent, Hello, Open, Peer, Watch};
use engine::conversion::conversion;
use engine::core::{EngineEvent, EngineHandle};
use engine::cuda::model::DeviceLoadOptions;
use engine::model::Model;
use kernels::cuda::{Device, FibreDevice};
use kv_connector::certs::ClusterCa;
use kv_connector::{Fabric, FabricConfig, Link};
use tandem::device::LoadedModel;
use tandem::nodes::{self, NodeSetup, RoleArgs, RunningNode};

const DEADLINE: Duration = Duration::from_secs(60);

/// A prefill node, a decode node and the test in the place of the proxy.
struct Pair {
    prefill: RunningNode,
    decode: RunningNode,
    link: Link,
    /// Held open: the decode node follows the directory it carries.
    _watch: (kv_connector::ControlSender, kv_connector::ControlReceiver),
    _fabric: Fabric,
}

fn node_id(name: &str) -> NodeId {
    NodeId::new(name).expect("a node name")
}

/// A model on the host, which counts as a GPU.
fn on_fibres(args: &UpArgs) -> LoadedModel {
    let device: Arc<dyn Device> = Arc::new(FibreDevice::new());
    let dtype = args.weights.dtype;
    let options = DeviceLoadOptions {
        dtype,
        kv_dtype: None,
        is_batch_invariant: false,
        prefill_attention: PrefillAttention::Portable,
        cache_folder: None,
    };
    let model = Model::load_on_device(Path::new(&args.model.model), &device, options).unwrap();
    let model = Arc::new(model.with_kv(None, args.engine.kv_exchange));
    LoadedModel::Cuda { model, kv_cache_bytes: 8 << 20 }
}

/// A prefill and a decode node with flags of both and of each.
async fn start_pair(flags: &[&str], prefill: &[&str], decode: &[&str]) -> Pair {
    start_pair_on([false; 2], flags, prefill, decode).await
}

/// As [`start_pair`], each on a device, if so.
async fn start_pair_on(is_on_device: [bool; 2], flags: &[&str], prefill: &[&str], decode: &[&str]) -> Pair {
    // Several tests of this process may be first.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let ca = ClusterCa::generate().unwrap();
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut running = Vec::new();
    for ((name, own), is_on_device) in [("p0", prefill), ("d0", decode)].into_iter().zip(is_on_device) {
        let args = UpArgs::parse_from([&["up", "--model", "models/tiny"], flags, own].concat());
        let folder = args.model.model.clone().into();
        let model = match is_on_device {
            true => on_fibres(&args),
            false => tandem::device::load_model(folder, &args.weights, &args.engine, 2).await.unwrap(),
        };
        let role = if name == "p0" { RoleArgs::Prefill(args.prefill) } else { RoleArgs::Decode(args.decode) };
        let identity = ca.issue(role.role(), &node_id(name)).unwrap();
        let setup = NodeSetup {
            node: node_id(name),
            identity,
            listen,
            bulk_port: 0,
            kv_transports: args.kv_transports,
            nixl: args.nixl,
            kv_quic: args.kv_quic,
            busy_poll: Duration::ZERO,
            engine: args.engine,
            max_model_len: None,
            store: args.store,
            role,
        };
        running.push(nodes::start(model, setup).await.unwrap());
    }
    let (decode, prefill) = (running.pop().unwrap(), running.pop().unwrap());
    let hello = Hello { node: node_id("proxy"), role: Role::Proxy, epoch: Epoch(1), model: None, bulk_port: None };
    let identity = ca.issue(Role::Proxy, &node_id("proxy")).unwrap();
    let fabric = Fabric::bind(FabricConfig::new(listen, identity, hello)).unwrap();
    let link = fabric.dial(decode.address(), Role::DecodeNode, None).await.unwrap();
    let mut watch = link.open(&Open::Watch(Watch {})).await.unwrap();
    let peer = Peer { node: node_id("p0"), control: prefill.address() };
    watch.0.send(&Directory { prefill_nodes: vec![peer] }).await.unwrap();
    // The directory is taken in before the first status after it is told.
    for _ in 0..2 {
        let _: Option<common::wire::NodeStatus> = watch.1.recv().await.unwrap();
    }
    Pair { prefill, decode, link, _watch: watch, _fabric: fabric }
}

impl Pair {
    async fn generate(&self, request: u128, tokens: &[u32], is_split: bool) -> (Vec<u32>, u64) {
        let generate = Generate {
            request: RequestId(request),
            attempt: Attempt(1),
            tokens: tokens.to_vec().into(),
            prompt_len: tokens.len() as u32,
            choices: vec![ChoiceIndex(0)],
            params: SamplingParams::greedy(24),
            salt: Vec::new(),
            prefill_candidates: if is_split { vec![node_id("p0")] } else { Vec::new() },
            deadline: DEADLINE,
            prefix_peer: None,
        };
        let (_sender, mut events) = self.link.open(&Open::Generate(Box::new(generate))).await.unwrap();
        let mut generated = Vec::new();
        while let Some(event) = tokio::time::timeout(DEADLINE, events.recv()).await.unwrap().unwrap() {
            match event {
                GenerateEvent::Token { token, .. } => generated.push(token.id),
                GenerateEvent::Done { timeline } => {
                    assert_eq!(timeline.is_local_prefill, !is_split);
                    return (generated, timeline.transferred_bytes);
                }
                GenerateEvent::Accepted | GenerateEvent::Started { .. } => {}
                other => panic!("unexpected {other:?}"),
            }
        }
        panic!("the stream ended without Done");
    }
}

fn prompt(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| 5 + (i * i * 31 + i * 7) % 500).collect()
}

/// Blocks in which an engine holds a prompt's full blocks now, found by asking for it once more.
async fn cached_blocks(engine: &EngineHandle, tokens: &[u32]) -> Vec<BlockId> {
    let sequence = NewSequence {
        tokens: tokens.to_vec(),
        prompt_len: tokens.len(),
        choices: vec![ChoiceIndex(0)],
        params: Arc::new(SamplingParams::greedy(1)),
        root: ChainRoot::of_model(engine.model().identity),
        work: Work::Generate,
    };
    let mut request = engine.submit(sequence, usize::MAX).unwrap();
    match request.next().await {
        Some(EngineEvent::Admitted { num_cached_tokens, blocks, .. }) => {
            blocks[..num_cached_tokens / engine.pool().block_size()].to_vec()
        }
        other => panic!("unexpected {other:?}"),
    }
}

fn granules(engine: &EngineHandle, blocks: &[BlockId], num_granules: usize) -> Vec<Vec<u8>> {
    let pool = engine.pool();
    (0..pool.num_layers())
        .map(|layer| {
            let mut bytes = vec![0; pool.extent_bytes(num_granules)];
            pool.read_granules(layer, blocks, 0, num_granules, &mut bytes);
            bytes
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_that_crossed_is_what_the_prefill_node_computed_and_what_a_local_prefill_computes() {
    for (dtype, decode_block_size) in [("bfloat16", 16), ("bfloat16", 48), ("float32", 32)] {
        let flags = ["--dtype", dtype, "--max-num-batched-tokens", "80"];
        let decode = ["--block-size", &decode_block_size.to_string()];
        let pair = start_pair(&flags, &["--block-size", "16"], &decode).await;
        let tokens = prompt(293);
        let (split, num_bytes) = pair.generate(1, &tokens, true).await;
        let expected_bytes = pair.decode.engine().pool().extent_bytes(293usize.div_ceil(16)) as u64;
        assert_eq!(num_bytes, expected_bytes * u64::from(pair.decode.engine().pool().num_layers()));

        let landed_blocks = cached_blocks(pair.decode.engine(), &tokens).await;
        let computed_blocks = cached_blocks(pair.prefill.engine(), &tokens).await;
        let num_granules = landed_blocks.len() * decode_block_size as usize / 16;
        assert!(num_granules >= 15, "the prompt's blocks are cached");
        let landed = granules(pair.decode.engine(), &landed_blocks, num_granules);
        assert_eq!(landed, granules(pair.prefill.engine(), &computed_blocks, num_granules), "crossed unchanged");

        pair.decode.engine().clear_cache();
        let (colocated, _) = pair.generate(2, &tokens, false).await;
        assert_eq!(split, colocated, "split or not, the tokens are the same");
        let local_blocks = cached_blocks(pair.decode.engine(), &tokens).await;
        assert_eq!(
            landed,
            granules(pair.decode.engine(), &local_blocks, num_granules),
            "computed here, the same bytes"
        );
    }
}

/// What the prefill node computed is in the decode node's pool as that pool keeps it: rounded where it is narrower,
/// exactly where it is wider.
#[tokio::test(flavor = "multi_thread")]
async fn kv_of_another_type_is_what_the_prefill_node_computed_as_this_pool_keeps_it() {
    for (transports, prefill, decode) in
        [("quic,shm", "float32", "bfloat16"), ("quic", "bfloat16", "float32"), ("quic", "float32", "bfloat16")]
    {
        let flags = ["--dtype", "float32", "--kv-exchange", "dtypes", "--kv-transports", transports];
        let of = |dtype, block_size| ["--kv-cache-dtype", dtype, "--block-size", block_size];
        let pair = start_pair(&flags, &of(prefill, "64"), &of(decode, "16")).await;
        let (source, target) = (pair.prefill.engine(), pair.decode.engine());
        let tokens = prompt(293);
        let (split, num_bytes) = pair.generate(1, &tokens, true).await;
        let per_layer = source.pool().extent_bytes(293usize.div_ceil(16)) as u64;
        assert_eq!(num_bytes, per_layer * u64::from(source.pool().num_layers()), "it travels as it was computed");

        // Whole blocks of both: 4 of 64 tokens, 16 of 16.
        let landed = granules(target, &cached_blocks(target, &tokens).await, 16);
        let computed = granules(source, &cached_blocks(source, &tokens).await, 16);
        let conversion = conversion(source.model(), target.model()).unwrap().expect("the types differ");
        for (landed, computed) in landed.iter().zip(&computed) {
            let mut expected = vec![0; landed.len()];
            conversion.convert(computed, &mut expected);
            assert!(*landed == expected, "{prefill} to {decode} over {transports}");
            assert!(landed.iter().any(|byte| *byte != 0));
        }

        // The prompt is computed by the prefill node alone, so its last logits are its own.
        let alone = start_pair(&flags, &of(prefill, "64"), &of(prefill, "64")).await;
        let (colocated, _) = alone.generate(2, &tokens, false).await;
        assert_eq!(split[0], colocated[0], "token #1 is drawn where the prompt was computed");
    }
}

/// NIXL reads out of a device's memory, or into it, or both; the devices are the host, and their hashes their own.
#[tokio::test(flavor = "multi_thread")]
async fn kv_between_devices_through_nixl_is_what_was_computed_and_gives_the_same_tokens() {
    let Ok(library) = std::env::var("TANDEM_TEST_NIXL") else {
        println!("SKIPPED: TANDEM_TEST_NIXL does not name NIXL's libnixl_capi.so; ./test installs it and sets it");
        return;
    };
    let metrics = proxy::metrics::install().unwrap();
    let mut fetched_bytes = 0;
    for is_on_device in [[true, true], [true, false], [false, true]] {
        println!("on devices: {is_on_device:?}");
        let flags = ["--kv-transports", "quic,nixl", "--nixl-library", &library, "--kv-exchange", "numerics"];
        // Kernels take their time on the host.
        let decode = ["--block-size", "32", "--prefill-progress-timeout", "60s", "--prefill-accept-timeout", "60s"];
        let pair = start_pair_on(is_on_device, &flags, &["--block-size", "16"], &decode).await;
        let (source, target) = (pair.prefill.engine(), pair.decode.engine());
        let tokens = prompt(72);
        let (split, num_bytes) = pair.generate(1, &tokens, true).await;
        fetched_bytes += num_bytes;
        let page = metrics.render();
        let arrived = |line: &&str| {
            ["tandem_fabric_extent_bytes_total", "\"d0\"", "\"verified\"", "\"nixl\""]
                .iter()
                .all(|part| line.contains(part))
        };
        let line = page.lines().find(arrived).unwrap();
        assert_eq!(line.rsplit(' ').next(), Some(&fetched_bytes.to_string()[..]), "{line}");

        // Whole blocks of both: 2 of 32 tokens, 4 of 16.
        let landed = granules(target, &cached_blocks(target, &tokens).await, 4);
        let computed = granules(source, &cached_blocks(source, &tokens).await, 4);
        let conversion = conversion(source.model(), target.model()).unwrap();
        assert_eq!(conversion.is_none(), is_on_device == [true, true]);
        for (landed, computed) in landed.iter().zip(computed) {
            let mut expected = computed.clone();
            if let Some(conversion) = &conversion {
                conversion.convert(&computed, &mut expected);
            }
            assert!(*landed == expected && landed.iter().any(|byte| *byte != 0));
        }
        if conversion.is_none() {
            target.clear_cache();
            assert_eq!(pair.generate(2, &tokens, false).await.0, split, "split or not, the tokens are the same");
        }
    }
}

/// Each damage is done to the KV a hand-over has left in the decode node's cache, which the next request
/// with the same prompt uses: the comparison of tokens must notice.
#[tokio::test(flavor = "multi_thread")]
async fn one_flipped_byte_one_swapped_block_one_skipped_layer_each_change_the_tokens() {
    type Damage = fn(&EngineHandle, &[BlockId]);
    let flip: Damage = |engine, blocks| {
        // The high byte of a value, in every layer's first head: sign and exponent change.
        for layer in 0..engine.pool().num_layers() {
            let mut bytes = vec![0; engine.pool().extent_bytes(1)];
            engine.pool().read_granules(layer, blocks, 0, 1, &mut bytes);
            if layer == 0 {
                bytes[1] ^= 0xff;
            }
            engine.pool().write_at(layer, blocks, 0, 0, &bytes);
        }
    };
    // Blocks of one sequence may change places among themselves without harm (a key carries its
    // position), so this one changes places with a block of another prompt, the last one cached.
    let swap: Damage = |engine, blocks| {
        let (mut own, mut other) = (Vec::new(), Vec::new());
        let foreign = blocks[blocks.len() - 1];
        engine.pool().read_block(blocks[0], &mut own);
        engine.pool().read_block(foreign, &mut other);
        engine.pool().write_block(blocks[0], &other);
        engine.pool().write_block(foreign, &own);
    };
    let skip: Damage = |engine, blocks| {
        let zeros = vec![0; engine.pool().extent_bytes(blocks.len() - 1)];
        engine.pool().write_at(1, blocks, 0, 0, &zeros);
    };
    let pair = start_pair(&["--block-size", "16"], &[], &[]).await;
    let tokens = prompt(100);
    let (expected, _) = pair.generate(1, &tokens, true).await;
    let (repeated, _) = pair.generate(2, &tokens, true).await;
    assert_eq!(repeated, expected, "undamaged, the cached KV gives the same tokens");
    for (number, (name, damage)) in [("flip", flip), ("swap", swap), ("skip", skip)].into_iter().enumerate() {
        let other: Vec<u32> = tokens.iter().map(|token| 5 + (token * 3) % 500).collect();
        pair.generate(30 + number as u128, &other, true).await;
        let mut blocks = cached_blocks(pair.decode.engine(), &tokens).await;
        assert_eq!(blocks.len(), 6);
        blocks.push(cached_blocks(pair.decode.engine(), &other).await[0]);
        damage(pair.decode.engine(), &blocks);
        let (damaged, _) = pair.generate(10 + number as u128, &tokens, false).await;
        assert_ne!(damaged, expected, "{name}: the damage went unnoticed");
        pair.decode.engine().clear_cache();
        let (restored, _) = pair.generate(20 + number as u128, &tokens, true).await;
        assert_eq!(restored, expected, "{name}: after clearing the cache it is as before");
    }
}
