//! KV fetched through NIXL: where it is used, what is refused, and what is left when the other process is gone, or
//! stands still.
//!
//! NIXL is not part of the workspace; `./test` installs its wheel. Its UCX finds out what connects two processes of one
//! host by itself. A device's pool is one that the host sees by copies only; its memory is the host's and registered
//! so.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use common::content::GRANULE_TOKENS;
use common::ids::{BlockId, Epoch, Role};
use kv_connector::transfer::{
    BulkReceiver, BulkSender, ExtentSource, LandingEvent, LandingPlan, LandingZone, Nixl, NixlError, NixlPool,
    RefusedExtent,
};
use kv_connector::{Fabric, Link};
use support::device::OnDevice;
use support::file_pool::FilePool;
use support::nixl::{library, of_receiver, of_sender};
use support::process::{self, OtherProcess, run_alone};
use support::{Cluster, Job, SOON, TestMemory, assert_nothing_left, eventually, eventually_within, node, soon};
use tokio::task::JoinSet;

const NUM_BLOCKS: usize = 1200;

/// What a pool's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Host,
    Device,
}
use Kind::{Device, Host};

const ALL_PAIRS: [(Kind, Kind); 4] = [(Host, Host), (Device, Device), (Device, Host), (Host, Device)];

/// Where a job's KV lies at its sender: in an order of its own, in fewer pieces than an extent may have.
fn blocks(job: &Job) -> Vec<BlockId> {
    let all: Vec<BlockId> = (0..job.blocks.len() as u32).map(BlockId).collect();
    all.chunks(5).rev().flatten().copied().collect()
}

/// A node whose pool is fetched from.
struct Sending {
    fabric: Fabric,
    pool: Arc<FilePool>,
    exported: Arc<OnDevice>,
    /// Of its pool, if it has NIXL.
    kind: Option<Kind>,
}

impl Sending {
    fn new(cluster: &Cluster, name: &str, library: &Path, kind: Option<Kind>) -> Self {
        let pool = FilePool::new(NUM_BLOCKS);
        let exported = OnDevice::exported(&pool);
        let mut config = cluster.config(name, Role::PrefillNode);
        config.nixl = kind.map(|kind| of_sender(library, &pool, (kind == Device).then_some(&exported)));
        config.limits.attach_deadline = SOON;
        config.hello.epoch = std::env::var(EPOCH).map_or(config.hello.epoch, |epoch| Epoch(epoch.parse().unwrap()));
        Self { fabric: Fabric::bind(config).unwrap(), pool, exported, kind }
    }

    /// A job's KV, where it is sent from.
    fn source(&self, job: &Job) -> ExtentSource {
        let source = self.pool.source(job, blocks(job));
        match self.kind {
            Some(Device) => ExtentSource { memory: self.exported.clone(), ..source },
            _ => source,
        }
    }
}

/// A node that fetches.
struct Fetching {
    fabric: Fabric,
    zone: LandingZone,
    memory: Arc<TestMemory>,
    own: Arc<OnDevice>,
    kind: Option<Kind>,
}

impl Fetching {
    fn new(cluster: &Cluster, library: &Path, kind: Option<Kind>) -> Self {
        Self::named("d0", cluster, library, kind)
    }

    fn named(name: &str, cluster: &Cluster, library: &Path, kind: Option<Kind>) -> Self {
        let memory = TestMemory::new(NUM_BLOCKS);
        let own = OnDevice::new(&memory);
        let mut config = cluster.config(name, Role::DecodeNode);
        config.nixl = kind.map(|kind| of_receiver(library, &memory, (kind == Device).then_some(&own)));
        config.limits.attach_deadline = SOON;
        let fabric = Fabric::bind(config).unwrap();
        Self { zone: fabric.landing_zone(), fabric, memory, own, kind }
    }

    async fn connect(&self, link: &Link) -> BulkReceiver {
        soon("bulk", self.fabric.connect_bulk(link, &self.zone)).await.unwrap()
    }

    fn plan(&self, job: &Job) -> LandingPlan {
        match self.kind {
            Some(Device) => LandingPlan { memory: self.own.clone(), ..job.plan(&self.memory) },
            _ => job.plan(&self.memory),
        }
    }
}

/// Both in one process.
struct Pair {
    prefill: Sending,
    decode: Fetching,
    bulk: BulkReceiver,
    sender: BulkSender,
    link: Link,
}

impl Pair {
    /// With NIXL where a kind is said.
    async fn new(library: &Path, from: Option<Kind>, to: Option<Kind>) -> Self {
        let cluster = Cluster::new();
        Self::of(Sending::new(&cluster, "p0", library, from), Fetching::new(&cluster, library, to)).await
    }

    async fn of(prefill: Sending, decode: Fetching) -> Self {
        let address = prefill.fabric.local_addr();
        let link = soon("dial", decode.fabric.dial(address, Role::PrefillNode, None)).await.unwrap();
        let bulk = decode.connect(&link).await;
        let sender = prefill.fabric.bulk_to(&node("d0"), Epoch(11)).unwrap();
        Self { prefill, decode, bulk, sender, link }
    }

    /// Dials the bulk connection again, and lets the one before go.
    async fn connect_again(&mut self) {
        drop(std::mem::replace(&mut self.bulk, self.decode.connect(&self.link).await));
        self.sender = self.prefill.fabric.bulk_to(&node("d0"), Epoch(11)).unwrap();
    }

    fn transports(&self) -> [&'static str; 2] {
        [self.bulk.transport_name(), self.sender.transport().name()]
    }

    async fn hand_over(&self, job: &Job, num_tokens: usize) {
        self.hand_over_to(self.decode.plan(job), job, num_tokens).await;
    }

    /// Sends all KV of a job in extents of `num_tokens` and finds it where it belongs.
    async fn hand_over_to(&self, plan: LandingPlan, job: &Job, num_tokens: usize) {
        let source = self.prefill.source(job);
        let (landing, _events) = self.decode.zone.open(plan);
        for extent in job.extents(num_tokens) {
            let (header, payload) = source.seal(&job.tokens, extent);
            soon("send", self.sender.send_extent(&header, payload)).await.unwrap();
        }
        eventually("all has landed", || landing.is_complete()).await;
        assert!(job.extents(num_tokens).iter().all(|extent| job.holds(&self.decode.memory, extent)));
    }

    async fn end(self) {
        let Self { prefill, decode, bulk, sender, link } = self;
        drop((bulk, sender, link, decode.zone));
        assert_nothing_left([prefill.fabric, decode.fabric]).await;
    }
}

#[test]
fn a_library_that_is_not_there_is_a_sentence() {
    let pool = NixlPool::Device(OnDevice::new(&TestMemory::new(1)));
    let opened = Nixl::new(&PathBuf::from("/nowhere/libnixl_capi.so"), pool, false);
    let Err(error) = opened else { panic!("it was opened") };
    let said = error.to_string();
    assert!(said.contains("/nowhere/libnixl_capi.so") && said.contains("--kv-transports"), "{said}");
}

#[test]
fn a_library_that_is_another_is_a_sentence() {
    let pool = NixlPool::Device(OnDevice::new(&TestMemory::new(1)));
    let opened = Nixl::new(&PathBuf::from("libc.so.6"), pool, false);
    assert!(matches!(opened, Err(NixlError::Library(reason, _)) if reason.contains("nixl_capi_")));
}

/// NIXL's UCX finds that it is the host's; a GPU's looks the same to one that cannot speak to GPUs.
#[test]
fn memory_that_is_said_to_be_a_gpu_s_and_cannot_be_registered_as_such_is_a_sentence() {
    let Some(library) = library() else { return };
    for is_fetched_from in [true, false] {
        let pool = OnDevice::exported(&FilePool::new(1));
        pool.claim_to_be_gpu();
        let Err(error) = Nixl::new(&library, NixlPool::Device(pool), is_fetched_from) else { panic!("registered") };
        assert!(matches!(&error, NixlError::NoDevice(reason) if reason.contains("register_mem")), "{error}");
        assert!(error.to_string().contains("CUDA"), "{error}");
    }
}

#[tokio::test]
async fn kv_goes_over_nixl_where_both_ends_have_it_and_over_quic_elsewhere() {
    let Some(library) = library() else { return };
    let both = ALL_PAIRS.map(|(from, to)| (Some(from), Some(to), "nixl"));
    let one = [(None, Some(Host), "quic"), (Some(Host), None, "quic"), (Some(Device), None, "quic")];
    for (from, to, name) in both.into_iter().chain(one) {
        println!("{from:?} to {to:?}");
        let pair = Pair::new(&library, from, to).await;
        assert_eq!(pair.transports(), [name; 2]);
        pair.hand_over(&Job::new(1, 100, 0, 0), 48).await;
        pair.end().await;
    }
}

#[tokio::test]
async fn a_pool_that_nobody_is_to_fetch_from_is_not_to_be_got_at() {
    let Some(library) = library() else { return };
    let cluster = Cluster::new();
    let mut config = cluster.config("p0", Role::PrefillNode);
    config.nixl = Some(of_receiver(&library, &TestMemory::new(1), None));
    config.limits.attach_deadline = SOON;
    let (pool, fabric) = (FilePool::new(NUM_BLOCKS), Fabric::bind(config).unwrap());
    let prefill = Sending { exported: OnDevice::exported(&pool), pool, fabric, kind: None };
    let pair = Pair::of(prefill, Fetching::new(&cluster, &library, Some(Host))).await;
    assert_eq!(pair.transports(), ["quic"; 2]);
    pair.hand_over(&Job::new(1, 100, 0, 0), 48).await;
    pair.end().await;
}

#[tokio::test]
async fn an_extent_of_several_lots_arrives_whole() {
    let Some(library) = library() else { return };
    for (from, to) in ALL_PAIRS {
        println!("{from:?} to {to:?}");
        let (num_tokens, lot_bytes) = if to == Host { (20_000, 512 << 10) } else { (36_000, 1 << 20) };
        let pair = Pair::new(&library, Some(from), Some(to)).await;
        let job = Job::new(1, num_tokens, 0, 0);
        let extent = job.extent(1, 0, num_tokens);
        assert!(job.payload(&extent).len() > 2 * lot_bytes, "else it is two lots at most");
        let source = pair.prefill.source(&job);
        let (landing, _events) = pair.decode.zone.open(pair.decode.plan(&job));
        let (header, payload) = source.seal(&job.tokens, extent);
        soon("send", pair.sender.send_extent(&header, payload)).await.unwrap();
        assert!(job.holds(&pair.decode.memory, &extent));
        drop((landing, source));
        pair.end().await;
    }
}

#[tokio::test]
async fn what_lands_elsewhere_than_in_the_device_s_pool_comes_through_the_host() {
    let Some(library) = library() else { return };
    for from in [Host, Device] {
        let pair = Pair::new(&library, Some(from), Some(Device)).await;
        pair.decode.own.before_copies(|| panic!("the device has nothing to copy to"));
        let job = Job::new(1, 5000, 0, 0);
        pair.hand_over_to(job.plan(&pair.decode.memory), &job, 3200).await;
        pair.end().await;
    }
}

#[tokio::test]
async fn blocks_that_change_before_they_are_fetched_are_refused() {
    let Some(library) = library() else { return };
    for (from, to) in ALL_PAIRS {
        let pair = Pair::new(&library, Some(from), Some(to)).await;
        let job = Job::new(1, 40, 0, 0);
        let source = pair.prefill.source(&job);
        let (landing, mut events) = pair.decode.zone.open(pair.decode.plan(&job));
        let (header, payload) = source.seal(&job.tokens, job.extent(1, 0, 32));
        pair.prefill.pool.damage(1, &blocks(&job), 1);
        assert!(soon("send", pair.sender.send_extent(&header, payload)).await.is_err());
        let told = soon("an event", events.recv()).await.unwrap();
        assert_eq!(told, LandingEvent::ExtentRefused { reason: RefusedExtent::Corrupted }, "{from:?} to {to:?}");
        assert_eq!(landing.num_contiguous_tokens(), 0);
        drop((landing, source));
        pair.end().await;
    }
}

/// Between two lots of an extent, so that closing waits for one copy and no other begins.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_behind_the_end_of_a_landing() {
    let Some(library) = library() else { return };
    let pair = Pair::new(&library, Some(Device), Some(Device)).await;
    let job = Job::new(1, 36_000, 0, 0);
    let source = pair.prefill.source(&job);
    let (landing, _events) = pair.decode.zone.open(pair.decode.plan(&job));
    let ((copying, landed), (go_on, may_go_on)) = (channel(), channel::<()>());
    pair.decode.own.before_copies(move || {
        copying.send(()).unwrap();
        may_go_on.recv().unwrap();
    });
    let (header, payload) = source.seal(&job.tokens, job.extent(0, 0, 36_000));
    let sender = pair.sender.clone();
    let sending = tokio::spawn(async move { sender.send_extent(&header, payload).await });
    tokio::task::spawn_blocking(move || landed.recv().unwrap()).await.unwrap();
    let closing = tokio::task::spawn_blocking(move || {
        drop(landing);
        "closed"
    });
    eventually("the landing is unknown", || pair.decode.zone.num_landings() == 0).await;
    assert!(!closing.is_finished());
    go_on.send(()).unwrap();
    assert_eq!(closing.await.unwrap(), "closed");
    let bytes = pair.decode.memory.bytes();
    assert!(soon("the send ends", sending).await.unwrap().is_err());
    assert!(pair.decode.memory.bytes() == bytes && bytes[0].contains(&0xee));
    drop(source);
    pair.end().await;
}

#[tokio::test]
async fn a_device_that_cannot_copy_is_not_asked_again_and_kv_comes_over_quic() {
    let Some(library) = library() else { return };
    let mut pair = Pair::new(&library, Some(Device), Some(Device)).await;
    pair.decode.own.fail_copies();
    let job = Job::new(1, 60, 0, 0);
    let source = pair.prefill.source(&job);
    let (landing, mut events) = pair.decode.zone.open(pair.decode.plan(&job));
    let (header, payload) = source.seal(&job.tokens, job.extent(0, 0, 32));
    assert!(soon("send", pair.sender.send_extent(&header, payload)).await.is_err());
    let told = soon("an event", events.recv()).await.unwrap();
    assert_eq!(told, LandingEvent::ExtentRefused { reason: RefusedExtent::Unreadable });
    soon("the connection ends", pair.bulk.closed()).await;
    drop((landing, source));
    pair.connect_again().await;
    assert_eq!(pair.transports(), ["quic"; 2]);
    pair.hand_over(&job, 32).await;
    pair.end().await;
}

/// The next connection finds the pool open, for the one before it, and keeps it when that ends.
#[tokio::test]
async fn a_connection_that_is_made_again_goes_on_over_nixl() {
    let Some(library) = library() else { return };
    for (from, to) in [(Host, Host), (Device, Device)] {
        let mut pair = Pair::new(&library, Some(from), Some(to)).await;
        for request in 1..4 {
            pair.hand_over(&Job::new(request, 100, 0, 8 * request as u32), 48).await;
            pair.connect_again().await;
            assert_eq!(pair.transports(), ["nixl"; 2]);
        }
        pair.end().await;
    }
}

const NUM_TOKENS: usize = 20_000;
/// What the pools of [`OtherProcess`]es and of who fetches from them are in.
const KIND: &str = "TANDEM_TEST_POOL_KIND";
/// Which life of its node an [`OtherProcess`] is.
const EPOCH: &str = "TANDEM_TEST_EPOCH";

fn kind() -> Kind {
    if std::env::var_os(KIND).is_some_and(|kind| kind == "device") { Device } else { Host }
}

/// Waits for `d0`, in another process, to attach.
async fn attached(fabric: &Fabric) -> BulkSender {
    let mut sender = None;
    eventually("the other process attaches", || {
        sender = fabric.bulk_to(&node("d0"), Epoch(11)).filter(|sender| sender.transport().name() == "nixl");
        sender.is_some()
    })
    .await;
    sender.unwrap()
}

/// The other process of a test below: a prefill node that sends without end.
#[test]
#[ignore = "a part of another test, which runs it in a process of its own"]
fn sending_process() {
    let library = library().expect("the other test has it");
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let prefill = Sending::new(&process::cluster(), "p0", &library, Some(kind()));
        process::tell_address(&prefill.fabric);
        let (sender, job) = (attached(&prefill.fabric).await, Job::new(1, NUM_TOKENS, 0, 0));
        let source = prefill.source(&job);
        for extent in job.extents(GRANULE_TOKENS).into_iter().cycle() {
            let (header, payload) = source.seal(&job.tokens, extent);
            // What has landed before is refused.
            let _ = sender.send_extent(&header, payload).await;
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a part of another test, which runs it in a process of its own"]
async fn whose_sender_is_killed() {
    let (library, cluster) = (library().expect("the other test has it"), Cluster::new());
    let mut other = OtherProcess::start("sending_process", &cluster);
    let decode = Fetching::new(&cluster, &library, Some(kind()));
    let job = Job::new(1, NUM_TOKENS, 0, 0);
    let (landing, mut events) = decode.zone.open(decode.plan(&job));
    let link = soon("dial", decode.fabric.dial(other.address, Role::PrefillNode, None)).await.unwrap();
    let bulk = decode.connect(&link).await;
    assert_eq!(bulk.transport_name(), "nixl");
    let arrived = soon("an extent", events.recv()).await.unwrap();
    let LandingEvent::ExtentVerified { extent, .. } = arrived else { panic!("{arrived:?}") };
    assert!(job.holds(&decode.memory, &extent));
    other.kill();
    soon("the connection ends", bulk.closed()).await;
    let gone = || decode.fabric.accounting().open_bulk_streams == 0;
    eventually_within(Duration::from_secs(30), "what was being fetched is given up", gone).await;
    let Fetching { fabric, zone, .. } = decode;
    drop((landing, zone, bulk, link));
    assert_nothing_left([fabric]).await;
}

#[test]
fn a_sender_that_is_killed_takes_nothing_with_it() {
    if library().is_some() {
        for kind in ["host", "device"] {
            run_alone("whose_sender_is_killed", &[(KIND, kind)]);
        }
    }
}

/// Lives of one node, each killed while it sends.
const NUM_LIVES: u64 = 4;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a part of another test, which runs it in a process of its own"]
async fn whose_senders_come_and_go() {
    let (library, cluster) = (library().expect("the other test has it"), Cluster::new());
    let lasting = Sending::new(&cluster, "p1", &library, Some(kind()));
    let mut pair = Pair::of(lasting, Fetching::new(&cluster, &library, Some(kind()))).await;
    assert_eq!(pair.transports(), ["nixl"; 2]);
    for life in 0..NUM_LIVES {
        let epoch = (100 + life).to_string();
        let mut other = OtherProcess::start_with("sending_process", &cluster, &[(EPOCH, &epoch)]);
        let job = Job::new(1, NUM_TOKENS, 0, 0);
        let (landing, mut events) = pair.decode.zone.open(pair.decode.plan(&job));
        let link = soon("dial", pair.decode.fabric.dial(other.address, Role::PrefillNode, None)).await.unwrap();
        let bulk = pair.decode.connect(&link).await;
        assert_eq!(bulk.transport_name(), "nixl", "life {life}");
        let arrived = soon("an extent", events.recv()).await.unwrap();
        let LandingEvent::ExtentVerified { extent, .. } = arrived else { panic!("{arrived:?}") };
        assert!(job.holds(&pair.decode.memory, &extent), "life {life}");
        // Whoever lasts has its KV fetched while the other sends, while that is being given up, and afterwards.
        let elsewhere = |request: u64| Job::new(request.into(), 3000, 0, 1000);
        pair.hand_over(&elsewhere(2 + 3 * life), 1600).await;
        other.kill();
        pair.hand_over(&elsewhere(3 + 3 * life), 1600).await;
        soon("the connection ends", bulk.closed()).await;
        let gone = || pair.decode.fabric.accounting().open_bulk_streams == 0;
        eventually_within(Duration::from_secs(30), "what was being fetched is given up", gone).await;
        drop((landing, bulk, link));
        if life % 2 == 1 {
            pair.connect_again().await;
            assert_eq!(pair.transports(), ["nixl"; 2], "life {life}");
        }
        pair.hand_over(&elsewhere(4 + 3 * life), 1600).await;
    }
    pair.end().await;
}

#[test]
fn senders_that_come_and_go_leave_nothing_and_hold_up_nobody() {
    if library().is_some() {
        for kind in ["host", "device"] {
            run_alone("whose_senders_come_and_go", &[(KIND, kind)]);
        }
        run_alone("whose_senders_come_and_go", &[(KIND, "host"), ("UCX_TLS", "tcp")]);
    }
}

/// Extents that are on their way when their sender freezes: more than are fetched at a time.
const NUM_POSTED: usize = 12;

/// The other process of the test below: a prefill node that has told where some extents lie, and says no more.
#[test]
#[ignore = "a part of another test, which runs it in a process of its own"]
fn posting_process() {
    let library = library().expect("the other test has it");
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let prefill = Sending::new(&process::cluster(), "p0", &library, Some(kind()));
        process::tell_address(&prefill.fabric);
        let (sender, job) = (attached(&prefill.fabric).await, Job::new(1, NUM_TOKENS, 0, 0));
        let source = prefill.source(&job);
        let mut sending = JoinSet::new();
        for extent in job.extents(1600).into_iter().take(NUM_POSTED) {
            let (sender, (header, payload)) = (sender.clone(), source.seal(&job.tokens, extent));
            sending.spawn(async move { sender.send_extent(&header, payload).await });
        }
        while sending.join_next().await.is_some() {}
        std::future::pending::<()>().await;
    });
}

/// Over TCP UCX answers for a peer by that peer's own thread, so that reads do not end while it stands still. Two
/// processes of one host that share memory, or read each other's, need no answer.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a part of another test, which runs it in a process of its own"]
async fn whose_sender_freezes() {
    let (library, cluster) = (library().expect("the other test has it"), Cluster::new());
    let is_tcp = std::env::var_os("UCX_TLS").is_some_and(|tls| tls == "tcp");
    let other = Sending::new(&cluster, "p1", &library, Some(kind()));
    let mut pair = Pair::of(other, Fetching::new(&cluster, &library, Some(kind()))).await;
    assert_eq!(pair.transports(), ["nixl"; 2]);
    let frozen = OtherProcess::start("posting_process", &cluster);
    let job = Job::new(1, NUM_TOKENS, 0, 0);
    let gated = LandingPlan { memory: pair.decode.own.clone(), ..job.plan(&pair.decode.memory) };
    let (landing, mut events) = pair.decode.zone.open(gated);
    let (go_on, waiting) = channel::<()>();
    pair.decode.own.before_copies(move || waiting.recv().unwrap_or(()));
    let link = soon("dial", pair.decode.fabric.dial(frozen.address, Role::PrefillNode, None)).await.unwrap();
    let bulk = pair.decode.connect(&link).await;
    assert_eq!(bulk.transport_name(), "nixl");
    let num_posted = || pair.decode.fabric.accounting().open_bulk_streams;
    eventually("all are posted", || num_posted() == NUM_POSTED).await;
    frozen.freeze();
    drop(go_on);
    // While its reads stand still, and when they are given up.
    for request in 2..4 {
        let job = Job::new(request, 3000, 0, 1000);
        pair.hand_over_to(job.plan(&pair.decode.memory), &job, 1600).await;
    }
    soon("the connection ends", bulk.closed()).await;
    eventually_within(Duration::from_secs(30), "what was being fetched is given up", || num_posted() == 0).await;
    let mut num_refused = 0;
    while let Some(event) = events.try_recv() {
        match event {
            LandingEvent::ExtentVerified { extent, .. } => assert!(job.holds(&pair.decode.memory, &extent)),
            LandingEvent::ExtentRefused { reason } => {
                assert_eq!(reason, RefusedExtent::Unreadable);
                num_refused += 1;
            }
        }
    }
    assert!(!is_tcp || num_refused > 0, "reads ended that nobody could answer");
    pair.connect_again().await;
    assert_eq!(pair.transports(), ["nixl"; 2]);
    pair.hand_over(&Job::new(4, 3000, 0, 1000), 1600).await;
    // It goes on, in a life in which reads from it have failed.
    frozen.thaw();
    drop((bulk, link));
    let link = soon("dial", pair.decode.fabric.dial(frozen.address, Role::PrefillNode, None)).await.unwrap();
    let bulk = pair.decode.connect(&link).await;
    if is_tcp {
        assert_eq!(bulk.transport_name(), "quic");
    }
    drop((landing, bulk, link, frozen));
    pair.end().await;
}

#[test]
fn a_sender_that_freezes_holds_up_neither_the_node_nor_nixl_for_others() {
    if library().is_some() {
        run_alone("whose_sender_freezes", &[(KIND, "host")]);
        for kind in ["host", "device"] {
            run_alone("whose_sender_freezes", &[(KIND, kind), ("UCX_TLS", "tcp")]);
        }
    }
}

/// Where the other process of the test below finds what it fetches from.
const SENDER: &str = "TANDEM_TEST_SENDER";

/// The other process of the test below: a decode node that fetches what it is sent.
#[test]
#[ignore = "a part of another test, which runs it in a process of its own"]
fn fetching_process() {
    let library = library().expect("the other test has it");
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let decode = Fetching::new(&process::cluster(), &library, Some(kind()));
        let job = Job::new(1, NUM_TOKENS, 0, 0);
        let (_landing, _events) = decode.zone.open(decode.plan(&job));
        let address = std::env::var(SENDER).unwrap().parse().unwrap();
        let link = soon("dial", decode.fabric.dial(address, Role::PrefillNode, None)).await.unwrap();
        let _bulk = decode.connect(&link).await;
        process::tell_address(&decode.fabric);
        std::future::pending::<()>().await;
    });
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a part of another test, which runs it in a process of its own"]
async fn whose_receiver_freezes() {
    let (library, cluster) = (library().expect("the other test has it"), Cluster::new());
    let prefill = Sending::new(&cluster, "p0", &library, Some(kind()));
    let address = prefill.fabric.local_addr().to_string();
    let frozen = OtherProcess::start_with("fetching_process", &cluster, &[(SENDER, &address)]);
    let to_frozen = attached(&prefill.fabric).await;
    let job = Job::new(1, NUM_TOKENS, 0, 0);
    let source = prefill.source(&job);
    let mut sending = JoinSet::new();
    for extent in job.extents(1600) {
        let (sender, (header, payload)) = (to_frozen.clone(), source.seal(&job.tokens, extent));
        sending.spawn(async move { sender.send_extent(&header, payload).await });
    }
    // In the middle of the others.
    soon("a send", sending.join_next()).await.unwrap().unwrap().unwrap();
    frozen.freeze();
    let decode = Fetching::named("d1", &cluster, &library, Some(kind()));
    let link = soon("dial", decode.fabric.dial(prefill.fabric.local_addr(), Role::PrefillNode, None)).await.unwrap();
    let bulk = decode.connect(&link).await;
    let sender = prefill.fabric.bulk_to(&node("d1"), Epoch(11)).unwrap();
    let pair = Pair { prefill, decode, bulk, sender, link };
    for request in 2..4 {
        assert_eq!(pair.transports(), ["nixl"; 2]);
        pair.hand_over(&Job::new(request, 3000, 0, 1000), 1600).await;
    }
    while let Some(sent) = soon("a send ends", sending.join_next()).await {
        // Well, if it had been read; else with the connection.
        let _ = sent.unwrap();
    }
    // All may have been read before it stood still; then only its silence tells.
    eventually("the connection of who stands still ends", || to_frozen.is_closed()).await;
    pair.hand_over(&Job::new(4, 3000, 0, 1000), 1600).await;
    drop((frozen, to_frozen, source));
    pair.end().await;
}

#[test]
fn a_receiver_that_freezes_holds_up_neither_the_node_nor_nixl_for_others() {
    if library().is_some() {
        run_alone("whose_receiver_freezes", &[(KIND, "host")]);
        for kind in ["host", "device"] {
            run_alone("whose_receiver_freezes", &[(KIND, kind), ("UCX_TLS", "tcp")]);
        }
    }
}
