//! KV fetched through NIXL: where it is used, what is refused, and what is left when the other process is gone.
//!
//! NIXL is not part of the workspace; `./test` installs its wheel. Its UCX finds out what connects two processes of one
//! host by itself.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::content::GRANULE_TOKENS;
use common::ids::{Epoch, Role};
use kv_connector::transfer::{BulkReceiver, BulkSender, LandingEvent, LandingZone, Nixl, NixlError, RefusedExtent};
use kv_connector::{Fabric, Link};
use support::file_pool::{FilePool, scattered};
use support::nixl::{library, of};
use support::process::{self, OtherProcess};
use support::{Cluster, Job, SOON, TestMemory, assert_nothing_left, eventually, eventually_within, node, soon};

const NUM_BLOCKS: usize = 700;
const NUM_TOKENS: usize = 20_000;

/// A prefill node and a decode node in one process, which have NIXL, if so.
struct Pair {
    prefill: Fabric,
    decode: Fabric,
    zone: LandingZone,
    bulk: BulkReceiver,
    sender: BulkSender,
    link: Link,
    pool: Arc<FilePool>,
    memory: Arc<TestMemory>,
}

impl Pair {
    async fn new(library: &Path, sender_has_nixl: bool, receiver_has_nixl: bool) -> Self {
        let (cluster, pool, memory) = (Cluster::new(), FilePool::new(NUM_BLOCKS), TestMemory::new(NUM_BLOCKS));
        let mut config = cluster.config("p0", Role::PrefillNode);
        config.nixl = sender_has_nixl.then(|| of(&pool, library));
        config.limits.attach_deadline = SOON;
        let prefill = Fabric::bind(config).unwrap();
        let mut config = cluster.config("d0", Role::DecodeNode);
        config.nixl = receiver_has_nixl.then(|| of(&FilePool::new(1), library));
        config.limits.attach_deadline = SOON;
        let decode = Fabric::bind(config).unwrap();
        let link = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap();
        let zone = decode.landing_zone();
        let bulk = soon("bulk", decode.connect_bulk(&link, &zone)).await.unwrap();
        let sender = prefill.bulk_to(&node("d0"), Epoch(11)).unwrap();
        Self { prefill, decode, zone, bulk, sender, link, pool, memory }
    }

    /// Sends all KV of a job in extents of `num_tokens` and finds it where it belongs.
    async fn hand_over(&self, job: &Job, num_tokens: usize) {
        let source = self.pool.source(job, scattered(0, job.blocks.len()));
        let (landing, _events) = self.zone.open(job.plan(&self.memory));
        for extent in job.extents(num_tokens) {
            let (header, payload) = source.seal(&job.tokens, extent);
            soon("send", self.sender.send_extent(&header, payload)).await.unwrap();
        }
        eventually("all has landed", || landing.is_complete()).await;
        assert!(job.extents(num_tokens).iter().all(|extent| job.holds(&self.memory, extent)));
    }

    async fn end(self) {
        let Self { prefill, decode, zone, bulk, sender, link, .. } = self;
        drop((zone, bulk, sender, link));
        assert_nothing_left([prefill, decode]).await;
    }
}

#[test]
fn a_library_that_is_not_there_is_a_sentence() {
    let pool = FilePool::new(1);
    let opened = Nixl::new(&PathBuf::from("/nowhere/libnixl_capi.so"), pool.clone(), pool.num_bytes() as usize);
    let Err(error) = opened else { panic!("it was opened") };
    let said = error.to_string();
    assert!(said.contains("/nowhere/libnixl_capi.so") && said.contains("--kv-transports"), "{said}");
}

#[test]
fn a_library_that_is_another_is_a_sentence() {
    let pool = FilePool::new(1);
    let opened = Nixl::new(&PathBuf::from("libc.so.6"), pool.clone(), pool.num_bytes() as usize);
    assert!(matches!(opened, Err(NixlError::Library(reason, _)) if reason.contains("nixl_capi_")));
}

#[tokio::test]
async fn kv_goes_over_nixl_where_both_ends_have_it_and_over_quic_elsewhere() {
    let Some(library) = library() else { return };
    for (sender, receiver, name) in [(true, true, "nixl"), (false, true, "quic"), (true, false, "quic")] {
        let pair = Pair::new(&library, sender, receiver).await;
        assert_eq!((pair.bulk.transport_name(), pair.sender.transport().name()), (name, name));
        pair.hand_over(&Job::new(1, 100, 0, 0), 48).await;
        pair.end().await;
    }
}

#[tokio::test]
async fn an_extent_of_several_lots_arrives_whole() {
    let Some(library) = library() else { return };
    let pair = Pair::new(&library, true, true).await;
    let job = Job::new(1, NUM_TOKENS, 0, 0);
    assert!(job.payload(&job.extent(0, 0, NUM_TOKENS)).len() > 2 * (512 << 10), "else it is one lot");
    pair.hand_over(&job, NUM_TOKENS).await;
    pair.end().await;
}

#[tokio::test]
async fn blocks_that_change_before_they_are_fetched_are_refused() {
    let Some(library) = library() else { return };
    let pair = Pair::new(&library, true, true).await;
    let job = Job::new(1, 40, 0, 0);
    let source = pair.pool.source(&job, scattered(0, job.blocks.len()));
    let (landing, mut events) = pair.zone.open(job.plan(&pair.memory));
    let (header, payload) = source.seal(&job.tokens, job.extent(1, 0, 32));
    pair.pool.damage(1, &scattered(0, job.blocks.len()), 1);
    assert!(soon("send", pair.sender.send_extent(&header, payload)).await.is_err());
    let told = soon("an event", events.recv()).await.unwrap();
    assert_eq!(told, LandingEvent::ExtentRefused { reason: RefusedExtent::Corrupted });
    assert_eq!(landing.num_contiguous_tokens(), 0);
    drop((landing, source));
    pair.end().await;
}

/// The next connection finds the pool open, for the one before it, and keeps it when that ends.
#[tokio::test]
async fn a_connection_that_is_made_again_goes_on_over_nixl() {
    let Some(library) = library() else { return };
    let mut pair = Pair::new(&library, true, true).await;
    pair.hand_over(&Job::new(1, 100, 0, 0), 48).await;
    let before = std::mem::replace(
        &mut pair.bulk,
        soon("bulk", pair.decode.connect_bulk(&pair.link, &pair.zone)).await.unwrap(),
    );
    drop(before);
    pair.sender = pair.prefill.bulk_to(&node("d0"), Epoch(11)).unwrap();
    assert_eq!(pair.bulk.transport_name(), "nixl");
    pair.hand_over(&Job::new(2, 100, 0, 8), 48).await;
    drop(std::mem::replace(
        &mut pair.bulk,
        soon("bulk", pair.decode.connect_bulk(&pair.link, &pair.zone)).await.unwrap(),
    ));
    pair.sender = pair.prefill.bulk_to(&node("d0"), Epoch(11)).unwrap();
    pair.hand_over(&Job::new(3, 100, 0, 16), 48).await;
    pair.end().await;
}

/// The other process of the test below: a prefill node that sends without end.
#[test]
#[ignore = "a part of another test, which runs it in a process of its own"]
fn sending_process() {
    let library = library().expect("the other test has it");
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let pool = FilePool::new(NUM_BLOCKS);
        let mut config = process::cluster().config("p0", Role::PrefillNode);
        config.nixl = Some(of(&pool, &library));
        config.limits.attach_deadline = SOON;
        let prefill = Fabric::bind(config).unwrap();
        process::tell_address(&prefill);
        let mut sender = None;
        eventually("the other process attaches", || {
            sender = prefill.bulk_to(&node("d0"), Epoch(11)).filter(|sender| sender.transport().name() == "nixl");
            sender.is_some()
        })
        .await;
        let (sender, job) = (sender.unwrap(), Job::new(1, NUM_TOKENS, 0, 0));
        let source = pool.source(&job, scattered(0, job.blocks.len()));
        for extent in job.extents(GRANULE_TOKENS).into_iter().cycle() {
            let (header, payload) = source.seal(&job.tokens, extent);
            // What has landed before is refused.
            let _ = sender.send_extent(&header, payload).await;
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_is_killed_takes_nothing_with_it() {
    let Some(library) = library() else { return };
    let cluster = Cluster::new();
    let mut other = OtherProcess::start("sending_process", &cluster);
    let mut config = cluster.config("d0", Role::DecodeNode);
    config.nixl = Some(of(&FilePool::new(1), &library));
    config.limits.attach_deadline = SOON;
    let decode = Fabric::bind(config).unwrap();
    let (zone, memory, job) = (decode.landing_zone(), TestMemory::new(NUM_BLOCKS), Job::new(1, NUM_TOKENS, 0, 0));
    let (landing, mut events) = zone.open(job.plan(&memory));
    let link = soon("dial", decode.dial(other.address, Role::PrefillNode, None)).await.unwrap();
    let bulk = soon("bulk", decode.connect_bulk(&link, &zone)).await.unwrap();
    assert_eq!(bulk.transport_name(), "nixl");
    let arrived = soon("an extent", events.recv()).await.unwrap();
    let LandingEvent::ExtentVerified { extent, .. } = arrived else { panic!("{arrived:?}") };
    assert!(job.holds(&memory, &extent));
    other.kill();
    soon("the connection ends", bulk.closed()).await;
    // A read that the library does not end is given up after 10 seconds.
    let gone = || decode.accounting().open_bulk_streams == 0;
    eventually_within(Duration::from_secs(30), "what was being fetched is given up", gone).await;
    drop((landing, zone, bulk, link));
    assert_nothing_left([decode]).await;
}
