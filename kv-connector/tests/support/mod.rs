//! What the connector's tests share: a cluster on loopback, a pool in plain memory, extents of it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod device;
pub mod file_pool;
pub mod nixl;
pub mod one_core;
pub mod other_user;
pub mod process;
pub mod raw;
pub mod relay;
pub mod values;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use common::content::{ChainRoot, ContentChain, GRANULE_TOKENS};
use common::ids::{Attempt, BlockId, ChoiceIndex, Epoch, Generation, NodeId, RequestId, Role};
use common::kv_memory::KvMemory;
use common::kv_spec::{KvDtype, KvSpec};
use common::model::{ModelIdentity, ModelInfo, NumericsId, Representation};
use common::sampling::SamplingParams;
use common::wire::{ExtentDigest, ExtentHeader, ExtentId, Generate, Hello, Open, Prefill};
use kv_connector::transfer::LandingPlan;
use kv_connector::{ClusterCa, Fabric, FabricAccounting, FabricConfig};

/// Longer than anything on loopback takes, even on a busy machine.
pub const SOON: Duration = Duration::from_secs(10);
pub const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

pub const NUM_LAYERS: usize = 3;
/// 2 heads of 4 features, K and V, f32.
pub const GRANULE_BYTES: usize = GRANULE_TOKENS * 2 * 4 * 2 * 4;

pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.unwrap_or_else(|_| panic!("{what}: nothing within {SOON:?}"))
}

/// Polls a condition that no event announces.
pub async fn eventually(what: &str, is_true: impl FnMut() -> bool) {
    eventually_within(SOON, what, is_true).await;
}

/// As [`eventually`], for what takes longer by its nature.
pub async fn eventually_within(deadline: Duration, what: &str, mut is_true: impl FnMut() -> bool) {
    let polling = async {
        while !is_true() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let polled = tokio::time::timeout(deadline, polling).await;
    polled.unwrap_or_else(|_| panic!("{what}: not within {deadline:?}"));
}

pub fn kv_spec() -> KvSpec {
    KvSpec::uniform(NUM_LAYERS as u32, 2, 4, KvDtype::F32, None)
}

pub fn model(seed: u8) -> ModelInfo {
    ModelInfo {
        identity: ModelIdentity([seed; 32]),
        numerics: NumericsId("test".into()),
        representation: Representation("f32".into()),
        kv_spec: kv_spec(),
        vocab_size: 100,
        max_model_len: 1 << 20,
        exchange: Default::default(),
        granule_order: Default::default(),
        block_size: 32,
        num_blocks: 1000,
    }
}

pub fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

pub fn hello(name: &str, role: Role) -> Hello {
    let model = (role != Role::Proxy).then(|| model(7));
    Hello { node: node(name), role, epoch: Epoch(11), model, bulk_port: None }
}

pub struct Cluster {
    pub ca: ClusterCa,
}

impl Cluster {
    pub fn new() -> Self {
        Self { ca: ClusterCa::generate().unwrap() }
    }

    pub fn config(&self, name: &str, role: Role) -> FabricConfig {
        let identity = self.ca.issue(role, &node(name)).unwrap();
        let mut config = FabricConfig::new(LOOPBACK, identity, hello(name, role));
        config.bulk_listen = (role == Role::PrefillNode).then_some(LOOPBACK);
        config
    }

    pub fn start(&self, name: &str, role: Role) -> Fabric {
        Fabric::bind(self.config(name, role)).unwrap()
    }
}

/// Closes fabrics and asserts that nothing is left of anything.
pub async fn assert_nothing_left<const N: usize>(fabrics: [Fabric; N]) {
    for fabric in &fabrics {
        let streams = || {
            let now = fabric.accounting();
            (now.open_control_streams, now.open_bulk_streams, now.landings, now.pinned_receive_bytes)
        };
        eventually("streams end with their halves", || streams() == (0, 0, 0, 0)).await;
    }
    for fabric in fabrics {
        soon("the fabric closes", fabric.close()).await;
        assert_eq!(fabric.accounting(), FabricAccounting::default(), "{}", fabric.hello().node);
    }
}

pub fn generate(request: u128) -> Open {
    Open::Generate(Box::new(Generate {
        request: RequestId(request),
        attempt: Attempt(1),
        tokens: vec![1, 2, 3].into(),
        prompt_len: 3,
        choices: vec![ChoiceIndex(0)],
        params: SamplingParams::greedy(4),
        salt: vec![],
        prefill_candidates: vec![],
        deadline: SOON,
        prefix_peer: None,
    }))
}

pub fn prefill(request: u128) -> Open {
    Open::Prefill(Box::new(Prefill {
        request: RequestId(request),
        attempt: Attempt(1),
        generation: Generation(1),
        tokens: vec![1, 2, 3].into(),
        prompt_len: 3,
        choices: vec![ChoiceIndex(0)],
        params: SamplingParams::greedy(4),
        salt: vec![],
        num_held_tokens: 0,
        credit_bytes: 1 << 20,
        deadline: SOON,
        local_rest: None,
        prefix_peer: None,
    }))
}

/// A pool whose blocks hold two granules; what was never written is 0xEE.
pub struct TestMemory {
    layers: Vec<Mutex<Vec<u8>>>,
    pub num_writes: std::sync::atomic::AtomicUsize,
}

pub const GRANULES_PER_BLOCK: usize = 2;

impl TestMemory {
    pub fn new(num_blocks: usize) -> Arc<Self> {
        let layer = vec![0xee; num_blocks * GRANULES_PER_BLOCK * GRANULE_BYTES];
        let layers = (0..NUM_LAYERS).map(|_| Mutex::new(layer.clone())).collect();
        Arc::new(Self { layers, num_writes: Default::default() })
    }

    pub fn bytes(&self) -> Vec<Vec<u8>> {
        self.layers.iter().map(|layer| layer.lock().unwrap().clone()).collect()
    }
}

fn offset(blocks: &[BlockId], granule: usize) -> usize {
    (blocks[granule / GRANULES_PER_BLOCK].0 as usize * GRANULES_PER_BLOCK + granule % GRANULES_PER_BLOCK)
        * GRANULE_BYTES
}

impl KvMemory for TestMemory {
    fn write_at(&self, layer: u32, blocks: &[BlockId], first_granule: usize, byte_offset: usize, bytes: &[u8]) {
        self.num_writes.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let mut memory = self.layers[layer as usize].lock().unwrap();
        let mut rest = bytes;
        while !rest.is_empty() {
            let at = byte_offset + bytes.len() - rest.len();
            let (granule, within) = (first_granule + at / GRANULE_BYTES, at % GRANULE_BYTES);
            let (now, later) = rest.split_at(rest.len().min(GRANULE_BYTES - within));
            memory[offset(blocks, granule) + within..][..now.len()].copy_from_slice(now);
            rest = later;
        }
    }

    fn read_granules(&self, layer: u32, blocks: &[BlockId], first_granule: usize, num_granules: usize, out: &mut [u8]) {
        let memory = self.layers[layer as usize].lock().unwrap();
        for granule in 0..num_granules {
            let from = offset(blocks, first_granule + granule);
            out[granule * GRANULE_BYTES..][..GRANULE_BYTES].copy_from_slice(&memory[from..from + GRANULE_BYTES]);
        }
    }

    fn visit_granules(
        &self,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        num_granules: usize,
        visit: &mut dyn FnMut(u64, &[u8]),
    ) {
        let memory = self.layers[layer as usize].lock().unwrap();
        for granule in first_granule..first_granule + num_granules {
            let from = offset(blocks, granule);
            visit((layer as usize * memory.len() + from) as u64, &memory[from..from + GRANULE_BYTES]);
        }
    }

    fn granule_bytes(&self) -> usize {
        GRANULE_BYTES
    }

    fn num_layers(&self) -> usize {
        NUM_LAYERS
    }
}

/// One hand-over: the tokens, where they land, and the extents a prefill node would send.
#[derive(Clone)]
pub struct Job {
    pub request: RequestId,
    pub attempt: Attempt,
    pub generation: Generation,
    pub epoch: Epoch,
    pub blocks: Vec<BlockId>,
    pub tokens: Vec<u32>,
    pub num_held: usize,
}

impl Job {
    pub fn new(request: u128, num_tokens: usize, num_held: usize, first_block: u32) -> Self {
        let num_blocks = num_tokens.div_ceil(GRANULE_TOKENS * GRANULES_PER_BLOCK) as u32;
        Self {
            request: RequestId(request),
            attempt: Attempt(1),
            generation: Generation(request as u64),
            epoch: Epoch(11),
            // Not in order, so that a swapped block shows.
            blocks: (0..num_blocks).rev().map(|block| BlockId(first_block + block)).collect(),
            tokens: (0..num_tokens as u32).map(|token| (token * 7 + request as u32) % 97).collect(),
            num_held,
        }
    }

    pub fn chain(&self) -> ContentChain {
        let mut chain = ContentChain::new(&ChainRoot::of_model(ModelIdentity([7; 32])));
        chain.extend(&self.tokens);
        chain
    }

    pub fn plan(&self, memory: &Arc<TestMemory>) -> LandingPlan {
        LandingPlan {
            request: self.request,
            attempt: self.attempt,
            generation: self.generation,
            blocks: self.blocks.clone(),
            chain: self.chain(),
            tokens: self.tokens.clone(),
            first_token: self.num_held,
            num_tokens: self.tokens.len(),
            kv_spec: kv_spec(),
            memory: memory.clone(),
            conversion: None,
        }
    }

    pub fn extent(&self, layer: u16, first_token: usize, num_tokens: usize) -> ExtentId {
        ExtentId {
            group: 0,
            layer,
            plane_mask: 0b11,
            first_head: 0,
            num_heads: 2,
            first_token: first_token as u32,
            num_tokens: num_tokens as u32,
        }
    }

    /// KV that is different at every place of every request.
    pub fn payload(&self, extent: &ExtentId) -> Vec<u8> {
        let num_bytes = (extent.num_tokens as usize).div_ceil(GRANULE_TOKENS) * GRANULE_BYTES;
        let from = extent.first_token as usize / GRANULE_TOKENS * GRANULE_BYTES;
        (from..from + num_bytes)
            .map(|at| {
                (at as u64 * 31 + at as u64 / 251 + u64::from(extent.layer) * 77 + self.request.0 as u64 * 13) as u8
            })
            .collect()
    }

    pub fn sealed(&self, extent: ExtentId) -> (ExtentHeader, Bytes) {
        let payload = self.payload(&extent);
        let end = (extent.first_token + extent.num_tokens) as usize;
        let content = self.chain().digest_of_prefix(&self.tokens, end);
        let mut header = ExtentHeader {
            epoch: self.epoch,
            request: self.request,
            attempt: self.attempt,
            generation: self.generation,
            extent,
            num_payload_bytes: payload.len() as u32,
            digest: ExtentDigest(0),
        };
        header.digest = header.binding(content).digest(&payload);
        (header, payload.into())
    }

    /// All extents, chunk by chunk, layer by layer.
    pub fn extents(&self, chunk_tokens: usize) -> Vec<ExtentId> {
        let layers = 0..NUM_LAYERS as u16;
        let chunks = (self.num_held..self.tokens.len()).step_by(chunk_tokens);
        chunks
            .flat_map(|first| {
                let num_tokens = chunk_tokens.min(self.tokens.len() - first);
                layers.clone().map(move |layer| self.extent(layer, first, num_tokens))
            })
            .collect()
    }

    /// Whether the granules of an extent hold exactly its KV.
    pub fn holds(&self, memory: &TestMemory, extent: &ExtentId) -> bool {
        let mut found = vec![0; self.payload(extent).len()];
        let first = extent.first_token as usize / GRANULE_TOKENS;
        memory.read_granules(u32::from(extent.layer), &self.blocks, first, found.len() / GRANULE_BYTES, &mut found);
        found == self.payload(extent)
    }
}
