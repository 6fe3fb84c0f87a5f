//! The nodes of a hand-over in one process, a proxy's end of the fabric, and what each of them holds.
// Each test file uses its part.
#![allow(dead_code, unreachable_pub)]

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use common::config::{DecodeArgs, PrefillArgs};
use common::content::ChainRoot;
use common::ids::{Attempt, ChoiceIndex, Epoch, NodeId, RequestId, Role};
use common::kv_spec::{GranuleOrder, KvDtype};
use common::model::{KvExchange, ModelInfo};
use common::sampling::SamplingParams;
use common::scheduler::SchedulerLimits;
use common::sequence::{NewSequence, Work};
use common::timeline::NodeTimeline;
use common::wire::{
    Directory, ExtentHeader, FetchPrefixEvent, Generate, GenerateEvent, Hello, NodeError, NodeStatus, Open, Peer,
    PrefillEvent, PrefixPeer, Watch,
};
use decode_node::DecodeNode;
use engine::core::{EngineEvent, EngineHandle, EngineOptions};
use engine::runner::Runner;
use engine::sim::{SimOptions, SimRunner};
use futures::FutureExt;
use kv_connector::membership::NodePresence;
use kv_connector::peers::Peers;
use kv_connector::transfer::{
    ExtentEnd, FaultPlan, FaultyTransport, InjectedFaults, Payload, SendFuture, Transport, TransportLayer,
};
use kv_connector::{ClusterCa, ControlReceiver, ControlSender, Fabric, FabricAccounting, FabricConfig, Link};
use prefill_node::PrefillNode;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

const DEADLINE: Duration = Duration::from_secs(30);
const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const NUM_LAYERS: u32 = 4;
/// The only life of every node.
pub const EPOCH: Epoch = Epoch(1);

pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what}: nothing within {DEADLINE:?}"))
}

/// Looks again and again at what no event announces; `Err` says what is still wrong.
async fn eventually(mut look: impl FnMut() -> Result<(), String>) {
    let mut ticks = tokio::time::interval(Duration::from_millis(3));
    for _ in 0..5000 {
        ticks.tick().await;
        if look().is_ok() {
            return;
        }
    }
    look().unwrap();
}

pub fn node_id(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

pub fn prompt(len: usize, seed: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i * 31 + i * 7 + seed * 101) % 512).collect()
}

pub fn sampled(max_tokens: u32, seed: u64) -> SamplingParams {
    SamplingParams { temperature: 1.0, seed, ..SamplingParams::greedy(max_tokens) }
}

/// A first attempt with one choice, to be prefilled by the decode node itself.
pub fn generate(request: u128, tokens: Vec<u32>, params: SamplingParams) -> Generate {
    Generate {
        request: RequestId(request),
        attempt: Attempt(1),
        prompt_len: tokens.len() as u32,
        tokens: tokens.into(),
        choices: vec![ChoiceIndex(0)],
        params,
        salt: Vec::new(),
        prefill_candidates: Vec::new(),
        deadline: Duration::from_secs(60),
        prefix_peer: None,
    }
}

/// All counters of this process, by name and labels.
#[derive(Clone, Default)]
struct Counters(Arc<Mutex<HashMap<metrics::Key, Arc<AtomicU64>>>>);

impl Counters {
    fn of_process() -> &'static Counters {
        static COUNTERS: OnceLock<Counters> = OnceLock::new();
        COUNTERS.get_or_init(|| {
            let counters = Counters::default();
            metrics::set_global_recorder(counters.clone()).expect("no other recorder");
            counters
        })
    }

    /// Values above zero of one node's counter, by the label that tells them apart.
    fn by_label(&self, name: &str, node: &str, told_by: &str) -> BTreeMap<String, u64> {
        let mut found = BTreeMap::new();
        for (key, value) in self.0.lock().unwrap().iter().filter(|(key, _)| key.name() == name) {
            let label = |name: &str| key.labels().find(|label| label.key() == name).map(|label| label.value());
            let value = value.load(Ordering::SeqCst);
            if label("node") == Some(node) && value > 0 {
                found.insert(label(told_by).unwrap_or_default().to_string(), value);
            }
        }
        found
    }
}

impl metrics::Recorder for Counters {
    fn describe_counter(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_gauge(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_histogram(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn register_counter(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
        metrics::Counter::from_arc(self.0.lock().unwrap().entry(key.clone()).or_default().clone())
    }
    fn register_gauge(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
        metrics::Gauge::noop()
    }
    fn register_histogram(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Histogram {
        metrics::Histogram::noop()
    }
}

/// What a node's pool is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolShape {
    pub block_size: usize,
    pub kv_dtype: KvDtype,
    pub granule_order: GranuleOrder,
}

impl Default for PoolShape {
    fn default() -> Self {
        Self { block_size: 16, kv_dtype: KvDtype::F32, granule_order: GranuleOrder::Lanes }
    }
}

/// What the nodes of a test are like.
#[derive(Clone)]
pub struct Shape {
    pub prefill_pools: [PoolShape; 2],
    pub decode_pool: PoolShape,
    pub exchange: KvExchange,
    /// On the way from both prefill nodes, each with a seed of its own.
    pub faults: Option<FaultPlan>,
    /// Extents from this token on never arrive.
    pub drops_from: Option<u32>,
    /// Put around the way from the first prefill node, whose prefixes the other one fetches.
    pub first_prefill_layer: Option<TransportLayer>,
    /// Put around the way from the decode node, on which prefill nodes fetch.
    pub decode_layer: Option<TransportLayer>,
    pub prefill_step_time: Duration,
    pub decode_step_time: Duration,
    pub decode_blocks: usize,
    pub first_prefill_waiting_max: usize,
    pub prefill: PrefillArgs,
    pub decode: DecodeArgs,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            prefill_pools: Default::default(),
            decode_pool: PoolShape::default(),
            exchange: KvExchange::Same,
            faults: None,
            drops_from: None,
            first_prefill_layer: None,
            decode_layer: None,
            prefill_step_time: Duration::ZERO,
            decode_step_time: Duration::ZERO,
            decode_blocks: 512,
            first_prefill_waiting_max: 64,
            prefill: PrefillArgs {
                transfer_stall_timeout: Duration::from_secs(10),
                fetch_stall_timeout: Duration::from_secs(2),
                fetch_credit_bytes: 32 << 20,
                fetch_bytes_per_second: None,
                prefill_tokens_per_second: None,
            },
            decode: DecodeArgs {
                prefill_timeout: Duration::from_secs(60),
                prefill_accept_timeout: Duration::from_secs(5),
                prefill_progress_timeout: Duration::from_secs(5),
                credit_bytes: 32 << 20,
                growth_window_blocks: 2,
                parked_kv_bytes: None,
                local_prefill_tokens: 64,
                local_rest_max_tokens: 0,
                local_offer_max_tokens: 0,
                local_prefill_tokens_per_second: None,
            },
        }
    }
}

/// Drops what lies behind a token without a word.
struct Dropping {
    inner: Arc<dyn Transport>,
    from: u32,
}

impl Transport for Dropping {
    fn name(&self) -> &'static str {
        "dropping"
    }

    fn send<'a>(&'a self, header: &'a ExtentHeader, payload: Payload, end: ExtentEnd) -> SendFuture<'a> {
        if header.extent.first_token >= self.from {
            return Box::pin(async { Ok(()) });
        }
        self.inner.send(header, payload, end)
    }

    fn is_closed(&self) -> bool {
        self.inner.is_closed()
    }
}

/// Lets extents begin and not end, and tells when the first one has begun.
struct Holding {
    inner: Arc<dyn Transport>,
    has_begun: Arc<Notify>,
}

impl Transport for Holding {
    fn name(&self) -> &'static str {
        "holding"
    }

    fn send<'a>(&'a self, _: &'a ExtentHeader, _: Payload, _: ExtentEnd) -> SendFuture<'a> {
        self.has_begun.notify_one();
        Box::pin(std::future::pending())
    }

    fn is_closed(&self) -> bool {
        self.inner.is_closed()
    }
}

/// Ways on the first `num_connections` of which nothing ever arrives, and what tells that something was to leave.
pub fn holding(num_connections: u64) -> (TransportLayer, Arc<Notify>) {
    let (has_begun, num_made) = (Arc::new(Notify::new()), AtomicU64::new(0));
    let told = has_begun.clone();
    let layer = move |inner| -> Arc<dyn Transport> {
        if num_made.fetch_add(1, Ordering::SeqCst) >= num_connections {
            return inner;
        }
        Arc::new(Holding { inner, has_begun: has_begun.clone() })
    };
    (Arc::new(layer), told)
}

type Injected = Arc<Mutex<Vec<Arc<FaultyTransport>>>>;

/// A [`FaultyTransport`] that the test can still ask what it has done.
fn faulty(plan: FaultPlan, made: Injected) -> TransportLayer {
    Arc::new(move |inner| {
        let transport = Arc::new(FaultyTransport::new(inner, plan));
        made.lock().unwrap().push(transport.clone());
        transport
    })
}

/// A node that serves; `N` is its role.
pub struct Running<N> {
    pub fabric: Fabric,
    pub engine: EngineHandle,
    pub presence: NodePresence,
    name: String,
    node: Arc<N>,
    serving: JoinHandle<()>,
}

impl<N> Running<N> {
    /// Sum of one of its counters.
    pub fn counter(&self, name: &str) -> u64 {
        self.counters(name, "").values().sum()
    }

    /// Values above zero of one of its counters, by this label.
    pub fn counters(&self, name: &str, label: &str) -> BTreeMap<String, u64> {
        Counters::of_process().by_label(name, &self.name, label)
    }
}

pub struct Cluster {
    pub prefills: Vec<Running<PrefillNode>>,
    pub decode: Running<DecodeNode>,
    proxy: Fabric,
    link: Link,
    /// To the prefill nodes.
    prefill_links: Vec<Link>,
    watches: Vec<(ControlSender, ControlReceiver)>,
    prefill_watches: Vec<(ControlSender, ControlReceiver)>,
    directory: Directory,
    reference: EngineHandle,
    injected: Injected,
    ca: ClusterCa,
    number: u64,
}

fn sim(pool: PoolShape, exchange: KvExchange, num_blocks: usize, step_time: Duration) -> SimRunner {
    let PoolShape { block_size, kv_dtype, granule_order } = pool;
    let shape = SimOptions { block_size, kv_dtype, granule_order, exchange, ..Default::default() };
    SimRunner::new(SimOptions { num_layers: NUM_LAYERS, num_blocks, step_time, ..shape }).unwrap()
}

fn engine(name: &str, role: Role, runner: SimRunner, max_num_waiting: usize) -> EngineHandle {
    let (block_size, num_blocks) = (runner.pool().block_size(), runner.pool().num_blocks());
    let limits = SchedulerLimits {
        block_size,
        num_blocks,
        max_num_seqs: 64,
        max_num_batched_tokens: 64,
        max_num_prefill_tokens: 64,
        max_num_waiting,
        max_model_len: 4096,
        growth_blocks: 2,
        max_num_parked_blocks: num_blocks,
        max_num_copied_blocks: 2,
        is_prefix_caching: true,
        eviction_policy: common::eviction::EvictionPolicy::default(),
    };
    let options = EngineOptions { limits, host_budget: Arc::default(), role: role.as_str(), node: name.to_string() };
    engine::core::start(Box::new(runner), options).unwrap()
}

fn config(ca: &ClusterCa, name: &str, role: Role, engine: Option<&EngineHandle>) -> FabricConfig {
    let model = engine.map(|engine| engine.model().as_ref().clone());
    let hello = Hello { node: node_id(name), role, epoch: EPOCH, model, bulk_port: None };
    let mut config = FabricConfig::new(LOOPBACK, ca.issue(role, &node_id(name)).unwrap(), hello);
    config.bulk_listen = (role == Role::PrefillNode).then_some(LOOPBACK);
    config
}

fn presence(engine: &EngineHandle) -> NodePresence {
    let status = engine.status();
    NodePresence::new(move || status.borrow().load)
}

impl Cluster {
    pub async fn start(shape: Shape) -> Self {
        Counters::of_process();
        // Several tests of this process may be first.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let ca = ClusterCa::generate().unwrap();
        let injected = Injected::default();
        let mut prefills = Vec::new();
        for index in 0..2 {
            let name = format!("prefill-{index}-of-{number}");
            let num_waiting_max = if index == 0 { shape.first_prefill_waiting_max } else { 64 };
            let runner = sim(shape.prefill_pools[index as usize], shape.exchange, 512, shape.prefill_step_time);
            let engine = engine(&name, Role::PrefillNode, runner, num_waiting_max);
            let mut config = self::config(&ca, &name, Role::PrefillNode, Some(&engine));
            if let Some(plan) = shape.faults {
                let plan = FaultPlan { seed: plan.seed * 2 + index, ..plan };
                config.transport_layer = Some(faulty(plan, injected.clone()));
            }
            if index == 0 && shape.first_prefill_layer.is_some() {
                config.transport_layer = shape.first_prefill_layer.clone();
            }
            if let Some(from) = shape.drops_from {
                config.transport_layer = Some(Arc::new(move |inner| Arc::new(Dropping { inner, from })));
            }
            let fabric = Fabric::bind(config).unwrap();
            let presence = presence(&engine);
            let node = PrefillNode::new(engine.clone(), fabric.clone(), presence.clone(), shape.prefill.clone());
            let node = Arc::new(node);
            let serving = node.clone();
            let serving = tokio::spawn(async move { serving.serve().await });
            prefills.push(Running { fabric, engine, presence, name, node, serving });
        }
        let name = format!("decode-of-{number}");
        let runner = sim(shape.decode_pool, shape.exchange, shape.decode_blocks, shape.decode_step_time);
        let engine = engine(&name, Role::DecodeNode, runner, 64);
        let mut config = self::config(&ca, &name, Role::DecodeNode, Some(&engine));
        config.transport_layer = shape.decode_layer;
        let fabric = Fabric::bind(config).unwrap();
        let presence = presence(&engine);
        let node = Arc::new(DecodeNode::new(engine.clone(), fabric.clone(), presence.clone(), shape.decode));
        let serving = node.clone();
        let serving = tokio::spawn(async move { serving.serve().await });
        let decode = Running { fabric, engine, presence, name, node, serving };

        let proxy = Fabric::bind(self::config(&ca, &format!("proxy-of-{number}"), Role::Proxy, None)).unwrap();
        let link = soon("the decode node is linked", proxy.dial(decode.fabric.local_addr(), Role::DecodeNode, None));
        let link = link.await.unwrap();
        let peer = |node: &Running<PrefillNode>| Peer { node: node_id(&node.name), control: node.fabric.local_addr() };
        let directory = Directory { prefill_nodes: prefills.iter().map(peer).collect() };
        let runner = sim(PoolShape::default(), KvExchange::Same, 2048, Duration::ZERO);
        let reference = self::engine("reference", Role::DecodeNode, runner, 1024);
        let mut prefill_links = Vec::new();
        for node in &prefills {
            let dialled = proxy.dial(node.fabric.local_addr(), Role::PrefillNode, None);
            prefill_links.push(soon("a prefill node is linked", dialled).await.unwrap());
        }
        let mut cluster = Self {
            prefills,
            decode,
            proxy,
            link,
            prefill_links,
            watches: Vec::new(),
            prefill_watches: Vec::new(),
            directory,
            reference,
            injected,
            ca,
            number,
        };
        cluster.tell_directory().await;
        cluster
    }

    /// Tells the nodes of one more prefill node.
    pub async fn learn(&mut self, fake: &FakePrefillNode) {
        self.directory.prefill_nodes.push(Peer { node: fake.node(), control: fake.fabric.local_addr() });
        self.tell_directory().await;
    }

    async fn tell_directory(&mut self) {
        let watch = self.watch(&self.link.clone()).await;
        self.watches.push(watch);
        for link in self.prefill_links.clone() {
            let watch = self.watch(&link).await;
            self.prefill_watches.push(watch);
        }
    }

    /// Watches a node and tells it of the prefill nodes.
    async fn watch(&self, link: &Link) -> (ControlSender, ControlReceiver) {
        let mut watch = link.open(&Open::Watch(Watch {})).await.unwrap();
        watch.0.send(&self.directory).await.unwrap();
        // It is taken in long before the second status, a quarter of a second after the first.
        for _ in 0..2 {
            let status = soon("the node says how it is", watch.1.recv::<NodeStatus>()).await.unwrap();
            assert!(status.is_some());
        }
        watch
    }

    /// Has a prefill node compute `tokens` by itself: their KV is in its pool, and nowhere else.
    pub async fn hold_at(&self, index: usize, tokens: &[u32], salt: &[u8]) {
        let engine = &self.prefills[index].engine;
        let sequence = NewSequence {
            tokens: tokens.to_vec(),
            prompt_len: tokens.len(),
            choices: vec![ChoiceIndex(0)],
            params: Arc::new(SamplingParams::greedy(1)),
            root: ChainRoot { salt: salt.to_vec(), ..ChainRoot::of_model(engine.model().identity) },
            work: Work::Generate,
        };
        let mut request = engine.submit(sequence, usize::MAX).unwrap();
        while let Some(event) = soon("the prefill node computes", request.next()).await {
            if event == EngineEvent::Finished {
                return;
            }
        }
        panic!("it ended without being finished");
    }

    /// The node of an index as a hint.
    pub fn peer(&self, index: usize, num_tokens: usize) -> PrefixPeer {
        PrefixPeer { node: node_id(&self.prefills[index].name), num_tokens: num_tokens as u32 }
    }

    pub fn candidates(&self) -> Vec<NodeId> {
        self.prefills.iter().map(|node| node_id(&node.name)).collect()
    }

    /// Payload of sixteen tokens in all layers.
    pub fn granule_bytes(&self) -> u64 {
        self.decode.engine.pool().extent_bytes(1) as u64 * u64::from(NUM_LAYERS)
    }

    pub fn injected(&self) -> InjectedFaults {
        let mut sum = InjectedFaults::default();
        for transport in self.injected.lock().unwrap().iter() {
            let one = transport.injected();
            sum.num_extents += one.num_extents;
            sum.num_lost += one.num_lost;
            sum.num_corrupted += one.num_corrupted;
            sum.num_truncated += one.num_truncated;
            sum.num_reset += one.num_reset;
            sum.num_duplicated += one.num_duplicated;
        }
        sum
    }

    /// How often the prefill nodes took each way to a prefix that the decode node holds.
    pub fn prefix_choices(&self) -> BTreeMap<String, u64> {
        sum(self.prefills.iter().map(|node| node.counters("tandem_prefix_choices_total", "choice")))
    }

    /// Fetches that were given up, by the reason.
    pub fn failed_fetches(&self) -> BTreeMap<String, u64> {
        sum(self.prefills.iter().map(|node| node.counters("tandem_prefix_fetches_failed_total", "reason")))
    }

    pub fn refused_extents(&self) -> BTreeMap<String, u64> {
        self.decode.counters("tandem_refused_extents_total", "reason")
    }

    pub fn lost_candidates(&self) -> BTreeMap<String, u64> {
        self.decode.counters("tandem_prefill_candidates_lost_total", "reason")
    }

    pub async fn ask(&self, generate: &Generate) -> Answer {
        let open = Open::Generate(Box::new(generate.clone()));
        let (sender, events) = soon("the request is sent", self.link.open(&open)).await.unwrap();
        let first_index = generate.tokens.0.len() - generate.prompt_len as usize;
        Answer { _sender: sender, events, is_accepted: false, first_index, texts: Texts::new() }
    }

    /// What one engine alone generates behind the same tokens.
    pub async fn undisturbed(&self, generate: &Generate) -> Texts {
        let sequence = NewSequence {
            tokens: generate.tokens.0.clone(),
            prompt_len: generate.prompt_len as usize,
            choices: generate.choices.clone(),
            params: Arc::new(generate.params.clone()),
            root: ChainRoot::of_model(self.reference.model().identity),
            work: Work::Generate,
        };
        let mut request = self.reference.submit(sequence, usize::MAX).unwrap();
        let mut texts = Texts::new();
        loop {
            match soon("the reference goes on", request.next()).await {
                Some(EngineEvent::Admitted { .. }) => {}
                Some(EngineEvent::Token { choice, token, .. }) => texts.entry(choice).or_default().push(token.id),
                Some(EngineEvent::Finished) => return texts,
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    /// Waits until no node holds anything for any request.
    pub async fn is_clean(&self) {
        self.prefills_are_clean().await;
        eventually(|| {
            let decode = &self.decode;
            let num_watches = self.watches.len();
            holds_nothing(&decode.name, &decode.fabric, &decode.engine, decode.node.num_requests(), num_watches)
        })
        .await;
    }

    /// Waits until no prefill node holds anything for any request.
    pub async fn prefills_are_clean(&self) {
        eventually(|| {
            let num_watches = self.prefill_watches.len() / self.prefills.len();
            self.prefills.iter().zip(&self.prefill_links).try_for_each(|(node, link)| {
                // A node that has left is watched no more.
                let num_watches = if link.is_closed() { 0 } else { num_watches };
                holds_nothing(&node.name, &node.fabric, &node.engine, node.node.num_requests(), num_watches)
            })
        })
        .await;
    }

    /// Asserts that nobody holds anything, closes everything, and asserts that nothing is left at all.
    pub async fn end(self) {
        self.is_clean().await;
        drop((self.watches, self.prefill_watches, self.link, self.prefill_links));
        let mut fabrics = vec![self.proxy, self.decode.fabric];
        let mut serving = vec![self.decode.serving];
        drop(self.decode.node);
        for node in self.prefills {
            fabrics.push(node.fabric);
            serving.push(node.serving);
        }
        for fabric in &fabrics {
            soon("a fabric closes", fabric.close()).await;
        }
        for task in serving {
            soon("a node stops serving", task).await.unwrap();
        }
        eventually(|| {
            let open = fabrics.iter().find(|fabric| fabric.accounting() != FabricAccounting::default());
            open.map_or(Ok(()), |fabric| Err(format!("{}: {:?}", fabric.hello().node, fabric.accounting())))
        })
        .await;
        let status = self.decode.engine.status();
        assert_eq!(status.borrow().load.num_queued_tokens, 0);
    }
}

fn sum(counters: impl Iterator<Item = BTreeMap<String, u64>>) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for (label, value) in counters.flatten() {
        *sums.entry(label).or_default() += value;
    }
    sums
}

fn holds_nothing(
    name: &str,
    fabric: &Fabric,
    engine: &EngineHandle,
    num_requests: usize,
    num_watches: usize,
) -> Result<(), String> {
    let FabricAccounting { open_control_streams, open_bulk_streams, landings, pinned_receive_bytes, .. } =
        fabric.accounting();
    let status = engine.status().borrow().clone();
    let streams = (open_control_streams, open_bulk_streams, landings, pinned_receive_bytes);
    let is_clean = streams == (num_watches, 0, 0, 0)
        && num_requests == 0
        && status.is_idle
        && status.blocks.referenced == 0
        && status.blocks.free + status.blocks.cached == status.blocks.total;
    if is_clean { Ok(()) } else { Err(format!("{name}: {streams:?}, {num_requests} requests, {status:?}")) }
}

pub type Texts = BTreeMap<ChoiceIndex, Vec<u32>>;

/// The proxy's end of one `Generate` stream. Dropping it resets the stream.
pub struct Answer {
    _sender: ControlSender,
    events: ControlReceiver,
    is_accepted: bool,
    first_index: usize,
    texts: Texts,
}

/// What became of a request that ended well.
pub struct Finished {
    pub texts: Texts,
    pub timeline: NodeTimeline,
}

impl Answer {
    async fn next(&mut self) -> GenerateEvent {
        let event = soon("an event of the request", self.events.recv::<GenerateEvent>()).await;
        let event = event.unwrap().expect("a request ends with its last event");
        match &event {
            GenerateEvent::Accepted => {
                assert!(!self.is_accepted && self.texts.is_empty(), "accepted once, before anything else");
                self.is_accepted = true;
            }
            GenerateEvent::Token { choice, index, token, .. } => {
                assert!(self.is_accepted);
                let text = self.texts.entry(*choice).or_default();
                assert_eq!(*index as usize, self.first_index + text.len(), "every token once, in order");
                text.push(token.id);
            }
            GenerateEvent::Started { .. } => {
                assert!(self.is_accepted && self.texts.is_empty(), "told once, before the first token");
            }
            _ => {}
        }
        event
    }

    pub async fn until_accepted(&mut self) {
        while !self.is_accepted {
            let event = self.next().await;
            assert!(self.is_accepted, "unexpected {event:?}");
        }
    }

    pub async fn until_tokens(&mut self, num_tokens: usize) {
        while self.texts.values().map(Vec::len).sum::<usize>() < num_tokens {
            let event = self.next().await;
            assert!(
                matches!(event, GenerateEvent::Accepted | GenerateEvent::Started { .. } | GenerateEvent::Token { .. }),
                "unexpected {event:?}"
            );
        }
    }

    /// To the end, which is `Done`.
    pub async fn finish(mut self) -> Finished {
        loop {
            match self.next().await {
                GenerateEvent::Done { timeline } => {
                    let end = soon("the stream ends", self.events.recv::<GenerateEvent>()).await;
                    assert_eq!(end.unwrap(), None, "nothing comes behind Done");
                    return Finished { texts: self.texts, timeline };
                }
                GenerateEvent::Accepted | GenerateEvent::Started { .. } | GenerateEvent::Token { .. } => {}
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    /// To the end, which is `Failed`.
    pub async fn failure(mut self) -> NodeError {
        loop {
            match self.next().await {
                GenerateEvent::Failed(error) => return error,
                GenerateEvent::Accepted | GenerateEvent::Started { .. } | GenerateEvent::Token { .. } => {}
                other => panic!("unexpected {other:?}"),
            }
        }
    }
}

/// How a prefill node that only pretends leaves a stream.
#[derive(Debug, Clone, Copy)]
pub enum FakeEnd {
    /// Not before the other end does.
    Stays,
    Finishes,
    Resets,
    /// Something that no prefill node says.
    SaysAnotherMessage,
}

/// A fabric in the place of a prefill node.
pub struct FakePrefillNode {
    fabric: Fabric,
}

impl FakePrefillNode {
    pub fn start(cluster: &Cluster) -> Self {
        let name = format!("fake-of-{}", cluster.number);
        Self {
            fabric: Fabric::bind(config(&cluster.ca, &name, Role::PrefillNode, Some(&cluster.decode.engine))).unwrap(),
        }
    }

    /// One that says this of its model, and takes everybody.
    pub fn announcing(cluster: &Cluster, name: &str, model: Option<ModelInfo>) -> Self {
        let name = format!("{name}-of-{}", cluster.number);
        let mut config = config(&cluster.ca, &name, Role::PrefillNode, None);
        config.hello.model = model;
        Self { fabric: Fabric::bind(config).unwrap() }
    }

    /// Whether a stream was opened that nobody has served.
    pub fn is_asked(&self) -> bool {
        self.fabric.accept().now_or_never().is_some()
    }

    pub fn node(&self) -> NodeId {
        self.fabric.hello().node.clone()
    }

    /// Its connections to the prefill nodes of a cluster.
    pub fn peers(&self, cluster: &Cluster) -> Peers {
        let peers = Peers::new(self.fabric.clone(), 8);
        peers.update(&cluster.directory);
        peers
    }

    /// Takes one `FetchPrefix` stream, says `events` and waits until the other end leaves.
    pub async fn serve_prefix(&self, events: &[FetchPrefixEvent]) {
        let mut stream = soon("a prefill node asks", self.fabric.accept()).await.unwrap();
        assert!(matches!(stream.open, Open::FetchPrefix(_)));
        for event in events {
            // The other end may have left after an earlier one.
            let _ = stream.sender.send(event).await;
        }
        soon("the prefill node leaves", stream.sender.stopped()).await;
    }

    /// Takes one `Prefill` stream, says `events` and ends it like that.
    pub async fn serve(&self, events: &[PrefillEvent], end: FakeEnd) {
        let mut stream = soon("the decode node asks", self.fabric.accept()).await.unwrap();
        assert!(matches!(stream.open, Open::Prefill(_)));
        for event in events {
            // The other end may have left after an earlier one.
            let _ = stream.sender.send(event).await;
        }
        match end {
            FakeEnd::Stays => {}
            FakeEnd::Finishes => stream.sender.finish(),
            FakeEnd::Resets => return,
            FakeEnd::SaysAnotherMessage => {
                let _ = stream.sender.send(&Directory { prefill_nodes: Vec::new() }).await;
            }
        }
        soon("the decode node leaves", stream.sender.stopped()).await;
    }

    pub async fn end(self) {
        soon("the fabric closes", self.fabric.close()).await;
        eventually(|| match self.fabric.accounting() {
            left if left == FabricAccounting::default() => Ok(()),
            left => Err(format!("the fake: {left:?}")),
        })
        .await;
    }
}

/// One kind of fault that hits every extent, and why a fetch may fail with it.
pub fn always(seed: u64) -> (FaultPlan, &'static [&'static str]) {
    let none = FaultPlan { seed, ..FaultPlan::default() };
    match seed % 5 {
        0 => (FaultPlan { corruption: 1.0, ..none }, &["extent_refused"]),
        1 => (FaultPlan { truncation: 1.0, ..none }, &["extent_refused"]),
        // A reset may overtake the header, and then nobody knows whose extent it was.
        2 => (FaultPlan { reset: 1.0, ..none }, &["extent_refused", "stalled"]),
        3 => (FaultPlan { loss: 1.0, ..none }, &["stalled"]),
        _ => (FaultPlan { delay_max: Duration::from_millis(100), duplication: 1.0, ..none }, &[]),
    }
}
