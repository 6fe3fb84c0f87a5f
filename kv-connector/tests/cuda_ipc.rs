//! KV that a device copies out of another process's pool: who may, what is refused, and what is left when the other
//! process is gone. A file in memory stands for what a driver lets other processes open.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use common::device_pool::DevicePool;
use common::ids::{Epoch, Role};
use common::kv_memory::KvMemory;
use common::wire::PoolRun;
use common::wire::runs::encode_runs;
use kv_connector::transfer::{
    BulkReceiver, BulkSender, ExtentSource, LandingEvent, LandingPlan, LandingZone, RefusedExtent,
};
use kv_connector::{Fabric, Link};
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use support::device::OnDevice;
use support::file_pool::{FilePool, scattered};
use support::process::{self, OtherProcess};
use support::raw::{ALPN_BULK, ALPN_CONTROL, Raw, welcome};
use support::{Cluster, Job, TestMemory, assert_nothing_left, eventually, hello, node, soon};
use tokio::task::JoinSet;

const NUM_BLOCKS: usize = 64;

/// A prefill node and a decode node whose pools are on devices, if so.
struct Pair {
    prefill: Fabric,
    decode: Fabric,
    zone: LandingZone,
    bulk: BulkReceiver,
    sender: BulkSender,
    link: Link,
    pool: Arc<FilePool>,
    exported: Arc<OnDevice>,
    memory: Arc<TestMemory>,
    own: Arc<OnDevice>,
}

impl Pair {
    async fn new(is_sender_on_device: bool, is_receiver_on_device: bool) -> Self {
        let (cluster, pool, memory) = (Cluster::new(), FilePool::new(NUM_BLOCKS), TestMemory::new(NUM_BLOCKS));
        let (exported, own) = (OnDevice::exported(&pool), OnDevice::new(&memory));
        let mut config = cluster.config("p0", Role::PrefillNode);
        config.device_pool = is_sender_on_device.then(|| exported.clone() as _);
        let prefill = Fabric::bind(config).unwrap();
        let mut config = cluster.config("d0", Role::DecodeNode);
        config.device_pool = is_receiver_on_device.then(|| own.clone() as _);
        let decode = Fabric::bind(config).unwrap();
        let link = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap();
        let zone = decode.landing_zone();
        let bulk = soon("bulk", decode.connect_bulk(&link, &zone)).await.unwrap();
        let sender = prefill.bulk_to(&node("d0"), Epoch(11)).unwrap();
        Self { prefill, decode, zone, bulk, sender, link, pool, exported, memory, own }
    }

    /// A job, its KV in the sender's pool, and where it is to land.
    fn job(&self, num_tokens: usize) -> (Job, ExtentSource, LandingPlan) {
        let job = Job::new(1, num_tokens, 0, 0);
        let mut source = self.pool.source(&job, scattered(0, job.blocks.len()));
        source.memory = self.exported.clone();
        let plan = LandingPlan { memory: self.own.clone(), ..job.plan(&self.memory) };
        (job, source, plan)
    }

    async fn end(self) {
        let Self { prefill, decode, zone, bulk, sender, link, .. } = self;
        drop((zone, bulk, sender, link));
        assert_nothing_left([prefill, decode]).await;
    }
}

#[tokio::test]
async fn kv_goes_over_cuda_ipc_where_both_pools_are_on_devices_and_over_quic_elsewhere() {
    for (sender, receiver, name) in
        [(true, true, "cuda-ipc"), (false, true, "quic"), (true, false, "quic"), (false, false, "quic")]
    {
        let pair = Pair::new(sender, receiver).await;
        assert_eq!((pair.bulk.transport_name(), pair.sender.transport().name()), (name, name));
        let (job, source, plan) = pair.job(100);
        let (landing, _events) = pair.zone.open(plan);
        for extent in job.extents(48) {
            let (header, payload) = source.seal(&job.tokens, extent);
            soon("send", pair.sender.send_extent(&header, payload)).await.unwrap();
        }
        eventually("all has landed", || landing.is_complete()).await;
        assert!(job.extents(48).iter().all(|extent| job.holds(&pair.memory, extent)));
        drop((landing, source));
        pair.end().await;
    }
}

#[tokio::test]
async fn what_lands_elsewhere_than_in_the_pool_comes_through_the_host() {
    let pair = Pair::new(true, true).await;
    let (job, source, plan) = pair.job(60);
    pair.own.before_copies(|| panic!("the device has nothing to copy to"));
    let (landing, _events) = pair.zone.open(LandingPlan { memory: pair.memory.clone(), ..plan });
    for extent in job.extents(32) {
        let (header, payload) = source.seal(&job.tokens, extent);
        soon("send", pair.sender.send_extent(&header, payload)).await.unwrap();
    }
    assert!(landing.is_complete() && job.extents(32).iter().all(|extent| job.holds(&pair.memory, extent)));
    drop((landing, source));
    pair.end().await;
}

#[tokio::test]
async fn blocks_that_change_before_they_are_copied_are_refused() {
    let pair = Pair::new(true, true).await;
    let (job, source, plan) = pair.job(40);
    let (landing, mut events) = pair.zone.open(plan);
    let extent = job.extent(1, 0, 32);
    let (header, payload) = source.seal(&job.tokens, extent);
    pair.pool.damage(1, &scattered(0, job.blocks.len()), 1);
    assert!(soon("send", pair.sender.send_extent(&header, payload)).await.is_err());
    let told = soon("an event", events.recv()).await.unwrap();
    assert_eq!(told, LandingEvent::ExtentRefused { reason: RefusedExtent::Corrupted });
    assert_eq!(landing.num_contiguous_tokens(), 0);
    drop((landing, source));
    pair.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_behind_the_end_of_a_landing() {
    let pair = Pair::new(true, true).await;
    let (job, source, plan) = pair.job(40);
    let (landing, _events) = pair.zone.open(plan);
    let (landed, closed) = (channel(), channel::<()>());
    let (copying, go_on) = (landed.0, closed.1);
    pair.own.before_copies(move || {
        copying.send(()).unwrap();
        go_on.recv().unwrap();
    });
    let extent = job.extent(0, 0, 32);
    let (header, payload) = source.seal(&job.tokens, extent);
    let sender = pair.sender.clone();
    let sending = tokio::spawn(async move { sender.send_extent(&header, payload).await });
    tokio::task::spawn_blocking(move || landed.1.recv().unwrap()).await.unwrap();
    // Closing waits for the copy that has begun, and no other begins.
    let closing = tokio::task::spawn_blocking(move || {
        drop(landing);
        "closed"
    });
    eventually("the landing is unknown", || pair.zone.num_landings() == 0).await;
    assert!(!closing.is_finished());
    closed.0.send(()).unwrap();
    assert_eq!(closing.await.unwrap(), "closed");
    let bytes = pair.memory.bytes();
    let _ = soon("the send ends", sending).await.unwrap();
    let (header, payload) = source.seal(&job.tokens, job.extent(1, 0, 32));
    assert!(soon("send", pair.sender.send_extent(&header, payload)).await.is_err());
    assert!(pair.memory.bytes() == bytes);
    drop(source);
    pair.end().await;
}

#[tokio::test]
async fn a_device_that_cannot_copy_is_not_asked_again_and_kv_comes_over_quic() {
    let mut pair = Pair::new(true, true).await;
    pair.own.fail_copies();
    let (job, source, plan) = pair.job(60);
    let (landing, mut events) = pair.zone.open(plan);
    let (header, payload) = source.seal(&job.tokens, job.extent(0, 0, 32));
    assert!(soon("send", pair.sender.send_extent(&header, payload)).await.is_err());
    let told = soon("an event", events.recv()).await.unwrap();
    assert_eq!(told, LandingEvent::ExtentRefused { reason: RefusedExtent::Unreadable });
    soon("the connection ends", pair.bulk.closed()).await;
    pair.bulk = soon("bulk", pair.decode.connect_bulk(&pair.link, &pair.zone)).await.unwrap();
    pair.sender = pair.prefill.bulk_to(&node("d0"), Epoch(11)).unwrap();
    assert_eq!((pair.bulk.transport_name(), pair.sender.transport().name()), ("quic", "quic"));
    for extent in job.extents(32) {
        let (header, payload) = source.seal(&job.tokens, extent);
        soon("send", pair.sender.send_extent(&header, payload)).await.unwrap();
    }
    eventually("all has landed", || landing.is_complete()).await;
    assert!(job.extents(32).iter().all(|extent| job.holds(&pair.memory, extent)));
    drop((landing, source));
    pair.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn few_threads_wait_for_a_device_however_many_extents_there_are() {
    const NUM_COPIES_MAX: usize = 4;
    let pair = Pair::new(true, true).await;
    let (job, source, plan) = pair.job(400);
    let (landing, _events) = pair.zone.open(plan);
    let (go_on, waiting) = channel::<()>();
    // The first copy waits until it is told, the others for the first.
    pair.own.before_copies(move || waiting.recv().unwrap_or(()));
    let extents = job.extents(16);
    let mut sending = JoinSet::new();
    for extent in &extents {
        let (sender, (header, payload)) = (pair.sender.clone(), source.seal(&job.tokens, *extent));
        sending.spawn(async move { sender.send_extent(&header, payload).await });
    }
    let num_arrived = || pair.decode.accounting().open_bulk_streams;
    eventually("all are posted", || num_arrived() == extents.len()).await;
    eventually("copies begin", || pair.own.num_copying() == NUM_COPIES_MAX).await;
    drop(go_on);
    while let Some(sent) = soon("a send", sending.join_next()).await {
        sent.unwrap().unwrap();
    }
    assert_eq!(pair.own.num_copying_most(), NUM_COPIES_MAX);
    assert!(landing.is_complete() && extents.iter().all(|extent| job.holds(&pair.memory, extent)));
    drop((landing, source));
    pair.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_the_device_is_refused_when_its_landing_closes() {
    let pair = Pair::new(true, true).await;
    let (first, source, plan) = pair.job(200);
    let (landing, _events) = pair.zone.open(plan);
    let (go_on, waiting) = channel::<()>();
    pair.own.before_copies(move || waiting.recv().unwrap_or(()));
    let mut sending = JoinSet::new();
    for extent in first.extents(48).into_iter().take(4) {
        let (sender, (header, payload)) = (pair.sender.clone(), source.seal(&first.tokens, extent));
        sending.spawn(async move { sender.send_extent(&header, payload).await });
    }
    eventually("the device is busy", || pair.own.num_copying() == 4).await;
    let second = Job::new(2, 16, 0, 40);
    let mut behind = pair.pool.source(&second, scattered(40, 1));
    behind.memory = pair.exported.clone();
    let (unwanted, _unwanted_events) =
        pair.zone.open(LandingPlan { memory: pair.own.clone(), ..second.plan(&pair.memory) });
    let (sender, (header, payload)) = (pair.sender.clone(), behind.seal(&second.tokens, second.extent(0, 0, 16)));
    let refused = tokio::spawn(async move { sender.send_extent(&header, payload).await });
    let num_posted = || pair.decode.accounting().open_bulk_streams;
    eventually("it is posted", || num_posted() == 5).await;
    unwanted.close();
    assert!(soon("the send ends", refused).await.unwrap().is_err());
    assert_eq!(pair.own.num_copying(), 4);
    drop(go_on);
    while let Some(sent) = soon("a send", sending.join_next()).await {
        sent.unwrap().unwrap();
    }
    drop((landing, unwanted, source, behind));
    pair.end().await;
}

/// A prefill node in the words of the wire, which lets a decode node ask for its pool and leaves the rest to the test.
struct RawSender {
    decode: Fabric,
    bulk: BulkReceiver,
    connection: Connection,
    /// The stream on which it was asked.
    answer: SendStream,
    asked: RecvStream,
    pool: Arc<FilePool>,
    memory: Arc<TestMemory>,
    own: Arc<OnDevice>,
    _kept: (Link, (Arc<OnDevice>, Connection, [Endpoint; 2])),
}

impl RawSender {
    /// `is_listening`: whether it waits to hear that its pool is open.
    async fn new(is_listening: bool) -> Self {
        let (cluster, pool, memory) = (Cluster::new(), FilePool::new(NUM_BLOCKS), TestMemory::new(NUM_BLOCKS));
        let (exported, own) = (OnDevice::exported(&pool), OnDevice::new(&memory));
        let raw = Raw::new(&cluster, "p9", Role::PrefillNode);
        let (control, bulk) = (raw.listen(ALPN_CONTROL), raw.listen(ALPN_BULK));
        let mut hello = hello("p9", Role::PrefillNode);
        hello.bulk_port = Some(bulk.local_addr().unwrap().port());
        let addr = control.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let link = control.accept().await.unwrap().await.unwrap();
            welcome(&link, hello.clone()).await;
            let connection = bulk.accept().await.unwrap().await.unwrap();
            welcome(&connection, hello).await;
            let (mut answer, mut asked) = connection.accept_bi().await.unwrap();
            asked.read_exact(&mut [0; 20]).await.unwrap();
            if !is_listening {
                // On its way before the handle is.
                asked.stop(0u32.into()).unwrap();
            }
            let offer = exported.export().unwrap();
            let num_handle_bytes = (offer.handle.len() as u16).to_le_bytes();
            let said = [&[1], &offer.num_bytes.to_le_bytes()[..], &num_handle_bytes, &offer.handle].concat();
            answer.write_all(&said).await.unwrap();
            (connection, answer, asked, (exported, link, [control, bulk]))
        });
        let mut config = cluster.config("d0", Role::DecodeNode);
        config.device_pool = Some(own.clone());
        config.limits.attach_deadline = Duration::from_secs(2);
        let decode = Fabric::bind(config).unwrap();
        let link = soon("dial", decode.dial(addr, Role::PrefillNode, None)).await.unwrap();
        let bulk = soon("bulk", decode.connect_bulk(&link, &decode.landing_zone())).await.unwrap();
        let (connection, answer, asked, raw) = soon("server", serving).await.unwrap();
        let _kept = (link, raw);
        Self { decode, bulk, connection, answer, asked, pool, memory, own, _kept }
    }
}

#[tokio::test]
async fn kv_that_a_sender_posts_without_confirming_the_open_pool_is_taken() {
    let mut peer = RawSender::new(true).await;
    assert_eq!(peer.bulk.transport_name(), "cuda-ipc");
    let mut attached = [0];
    soon("word of the open pool", peer.asked.read_exact(&mut attached)).await.unwrap();
    assert_eq!(attached, [1]);
    let job = Job::new(1, 40, 0, 0);
    let blocks = scattered(0, job.blocks.len());
    let _source = peer.pool.source(&job, blocks.clone());
    let zone = peer.decode.landing_zone();
    let (landing, _events) = zone.open(LandingPlan { memory: peer.own.clone(), ..job.plan(&peer.memory) });
    let extent = job.extent(0, 0, 32);
    let mut runs = Vec::new();
    peer.pool.visit_granules(0, &blocks, 0, 2, &mut |offset, bytes| {
        runs.push(PoolRun { offset, num_bytes: bytes.len() as u32 });
    });
    let (mut post, mut taken) = soon("a stream", peer.connection.open_bi()).await.unwrap();
    let header = job.sealed(extent).0;
    post.write_all(&[&header.encode()[..], &encode_runs(&runs)].concat()).await.unwrap();
    post.finish().unwrap();
    let mut answer = [0];
    soon("an answer", taken.read_exact(&mut answer)).await.unwrap();
    assert!(answer == [1] && job.holds(&peer.memory, &extent));
    // Not before: until now it has neither confirmed anything nor ended the stream.
    peer.answer.finish().unwrap();
    let RawSender { decode, bulk, .. } = peer;
    drop((landing, zone, bulk));
    decode.close().await;
}

#[tokio::test]
async fn kv_comes_over_quic_if_the_sender_does_not_hear_that_its_pool_is_open() {
    let peer = RawSender::new(false).await;
    assert_eq!(peer.bulk.transport_name(), "quic");
    assert_eq!(peer.decode.accounting().registrations, 0);
    let RawSender { decode, bulk, .. } = peer;
    drop(bulk);
    decode.close().await;
}

const NUM_TOKENS: usize = 100;

/// The other process of the test below: a prefill node that sends one extent after the other.
#[test]
#[ignore = "a part of another test, which runs it in a process of its own"]
fn sending_process() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let cluster = process::cluster();
        let pool = FilePool::new(NUM_BLOCKS);
        let exported = OnDevice::exported(&pool);
        let mut config = cluster.config("p0", Role::PrefillNode);
        config.device_pool = Some(exported.clone());
        let prefill = Fabric::bind(config).unwrap();
        process::tell_address(&prefill);
        let mut sender = None;
        eventually("the other process attaches", || {
            sender = prefill.bulk_to(&node("d0"), Epoch(11)).filter(|sender| sender.transport().name() == "cuda-ipc");
            sender.is_some()
        })
        .await;
        let job = Job::new(1, NUM_TOKENS, 0, 0);
        let mut source = pool.source(&job, scattered(0, job.blocks.len()));
        source.memory = exported;
        for extent in job.extents(32) {
            let (header, payload) = source.seal(&job.tokens, extent);
            sender.as_ref().unwrap().send_extent(&header, payload).await.unwrap();
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_dies_while_its_pool_is_read_costs_what_it_had_not_sent() {
    let cluster = Cluster::new();
    let mut other = OtherProcess::start("sending_process", &cluster);

    let memory = TestMemory::new(NUM_BLOCKS);
    let own = OnDevice::new(&memory);
    let mut config = cluster.config("d0", Role::DecodeNode);
    config.device_pool = Some(own.clone());
    let decode = Fabric::bind(config).unwrap();
    let job = Job::new(1, NUM_TOKENS, 0, 0);
    let zone = decode.landing_zone();
    let (landing, mut events) = zone.open(LandingPlan { memory: own.clone(), ..job.plan(&memory) });
    let (copying, begun) = channel();
    let (go_on, waiting) = channel::<()>();
    let mut num_copies = 0;
    own.before_copies(move || {
        num_copies += 1;
        if num_copies == 3 {
            copying.send(()).unwrap();
            waiting.recv().unwrap();
        }
    });
    let link = soon("dial", decode.dial(other.address, Role::PrefillNode, None)).await.unwrap();
    let bulk = soon("bulk", decode.connect_bulk(&link, &zone)).await.unwrap();
    assert_eq!(bulk.transport_name(), "cuda-ipc");
    // It dies while its third extent is about to be copied.
    tokio::task::spawn_blocking(move || begun.recv().unwrap()).await.unwrap();
    other.kill();
    go_on.send(()).unwrap();
    let mut num_verified = 0;
    while num_verified < 3 {
        match soon("an event", events.recv()).await.unwrap() {
            // What it had posted lies in memory that outlives it here, and is what its digest says.
            LandingEvent::ExtentVerified { extent, .. } => {
                assert!(job.holds(&memory, &extent));
                num_verified += 1;
            }
            refused => panic!("{refused:?}"),
        }
    }
    soon("the connection ends", bulk.closed()).await;
    assert!(!landing.is_complete());
    drop((landing, bulk, link, zone));
    assert_nothing_left([decode]).await;
}
