//! KV over paths that carry less than loopback: what size of datagrams is found, and what stays pinned while they are
//! lost.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use common::config::CongestionControl;
use common::ids::{BlockId, Epoch, Role};
use kv_connector::transfer::{BulkReceiver, BulkSender, LandingEvent};
use kv_connector::{Fabric, Link};
use support::file_pool::FilePool;
use support::relay::Relay;
use support::{Cluster, Job, TestMemory, assert_nothing_left, eventually, eventually_within, node, soon};

/// Discovery waits for three losses of each size that does not get through.
const DISCOVERED: Duration = Duration::from_secs(60);

/// A decode node that reaches a prefill node over a relay.
struct Path {
    prefill: Fabric,
    decode: Fabric,
    relay: Relay,
    link: Link,
    bulk: BulkReceiver,
    sender: BulkSender,
}

impl Path {
    async fn new(size_max: usize) -> Self {
        Self::with(size_max, CongestionControl::Cubic).await
    }

    async fn with(size_max: usize, congestion_control: CongestionControl) -> Self {
        let cluster = Cluster::new();
        let [prefill, decode] = [("p0", Role::PrefillNode), ("d0", Role::DecodeNode)].map(|(name, role)| {
            let mut config = cluster.config(name, role);
            // A path that carries nothing for a moment is no dead peer, however busy the machine is.
            config.limits.idle_timeout = Duration::from_secs(30);
            config.bulk_path.congestion_control = congestion_control;
            Fabric::bind(config).unwrap()
        });
        let relay = Relay::before(&prefill, size_max).await;
        let link = soon("dial", decode.dial(relay.control(), Role::PrefillNode, None)).await.unwrap();
        let bulk = soon("bulk", decode.connect_bulk(&link, &decode.landing_zone())).await.unwrap();
        let sender = prefill.bulk_to(&node("d0"), Epoch(11)).unwrap();
        Self { prefill, decode, relay, link, bulk, sender }
    }

    /// Hands a job over in extents of 512 tokens, and checks every byte of it.
    async fn hand_over(&self, request: u128) {
        let job = Job::new(request, 4096, 0, 0);
        let (pool, memory) = (FilePool::new(job.blocks.len()), TestMemory::new(job.blocks.len()));
        let (landing, mut events) = self.decode.landing_zone().open(job.plan(&memory));
        let source = pool.source(&job, in_order(&job));
        let mut sends = tokio::task::JoinSet::new();
        for extent in job.extents(512) {
            let ((header, payload), sender) = (source.seal(&job.tokens, extent), self.sender.clone());
            sends.spawn(async move { sender.send_extent(&header, payload).await });
        }
        while let Some(sent) = soon("a send ends", sends.join_next()).await {
            sent.unwrap().unwrap();
        }
        while !landing.is_complete() {
            let event = soon("an extent", events.recv()).await;
            assert!(matches!(event, Some(LandingEvent::ExtentVerified { .. })), "{event:?}");
        }
        assert!(job.extents(512).iter().all(|extent| job.holds(&memory, extent)));
    }

    /// Waits until KV travels in datagrams of a size that `is_right`.
    async fn datagrams_become(&self, what: &str, is_right: impl Fn(u16) -> bool) {
        let datagram_bytes = || self.sender.datagram_bytes().unwrap();
        eventually_within(DISCOVERED, what, || is_right(datagram_bytes())).await;
    }

    async fn close(self) {
        let Self { prefill, decode, relay, link, bulk, sender } = self;
        drop((link, bulk, sender));
        assert_nothing_left([prefill, decode]).await;
        drop(relay);
    }
}

/// Neighbours: large pieces, which are sent from where they lie.
fn in_order(job: &Job) -> Vec<BlockId> {
    (0..job.blocks.len() as u32).map(BlockId).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kv_arrives_over_a_path_of_ordinary_datagrams_in_datagrams_that_fit() {
    let path = Path::new(1472).await;
    path.hand_over(1).await;
    // The search ends within some 40 bytes.
    path.datagrams_become("nearly as large as the path", |bytes| (1420..=1472).contains(&bytes)).await;
    path.hand_over(2).await;
    assert!(path.sender.datagram_bytes().unwrap() <= 1472);
    assert!(path.relay.num_dropped() > 0, "nothing larger was tried");
    path.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kv_arrives_over_the_smallest_path_there_is() {
    let path = Path::new(1200).await;
    path.hand_over(1).await;
    assert_eq!(path.sender.datagram_bytes(), Some(1200));
    path.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn path_that_comes_to_carry_less_is_noticed() {
    let path = Path::new(65_507).await;
    path.datagrams_become("as large as loopback", |bytes| bytes == 65_507).await;
    path.hand_over(1).await;
    path.relay.carry(1400);
    path.hand_over(2).await;
    assert!(path.sender.datagram_bytes().unwrap() <= 1400);
    path.close().await;
}

/// What is lost is read in the pool once more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kv_arrives_intact_though_datagrams_are_lost_whoever_decides_how_much_is_sent() {
    for congestion_control in [CongestionControl::Cubic, CongestionControl::Bbr, CongestionControl::Fixed] {
        let path = Path::with(1472, congestion_control).await;
        path.relay.lose_every(20);
        let num_dropped = path.relay.num_dropped();
        path.hand_over(1).await;
        assert!(path.relay.num_dropped() > num_dropped, "{congestion_control}: nothing was lost");
        path.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pool_is_referred_to_until_kv_has_arrived_and_not_longer() {
    let path = Path::new(65_507).await;
    let job = Job::new(1, 4096, 0, 0);
    let (pool, memory) = (FilePool::new(job.blocks.len()), TestMemory::new(job.blocks.len()));
    let (landing, mut events) = path.decode.landing_zone().open(job.plan(&memory));
    let source = pool.source(&job, in_order(&job));
    let [first, second, ..] = job.extents(1024)[..] else { panic!("several extents") };
    let send = |extent| {
        let ((header, payload), sender) = (source.seal(&job.tokens, extent), path.sender.clone());
        tokio::spawn(async move { sender.send_extent(&header, payload).await })
    };
    let num_unused = Arc::strong_count(&pool);

    path.relay.carry(0);
    let (arrives, is_given_up) = (send(first), send(second));
    // One reference of each payload until it is taken, then one of each of its pieces.
    eventually("both are on the way", || path.prefill.accounting().open_bulk_streams == 2).await;
    assert!(Arc::strong_count(&pool) >= num_unused + 2);
    is_given_up.abort();
    assert!(soon("the end of the second", is_given_up).await.unwrap_err().is_cancelled());
    assert_eq!(Arc::strong_count(&pool), num_unused + 1, "what was given up is referred to");
    assert!(!arrives.is_finished(), "sent before it has arrived");

    path.relay.carry(65_507);
    soon("the first arrives", arrives).await.unwrap().unwrap();
    assert_eq!(Arc::strong_count(&pool), num_unused, "what has arrived is referred to");
    // The other's end may be told before.
    while !matches!(soon("it is verified", events.recv()).await.unwrap(), LandingEvent::ExtentVerified { .. }) {}
    eventually("nothing is pinned", || path.decode.accounting().pinned_receive_bytes == 0).await;
    assert!(job.holds(&memory, &first));
    assert!(!job.holds(&memory, &second));
    drop((landing, source));
    path.close().await;
}
