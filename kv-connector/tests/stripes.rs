//! Several bulk connections between two nodes, which carry KV as one: what each of them carries, and what is lost with
//! one.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use common::ids::{BlockId, Epoch, Role};
use common::wire::{BulkGroup, HelloBulk, HelloReply, Open};
use kv_connector::transfer::{BulkReceiver, BulkSender, LandingEvent, LandingZone};
use kv_connector::{BindError, DialError, Fabric, FabricConfig, Link};
use quinn::Connection;
use support::file_pool::FilePool;
use support::raw::{Raw, frame, next_frame};
use support::relay::{Relay, WayFault};
use support::values::Values;
use support::{Cluster, Job, TestMemory, assert_nothing_left, eventually, hello, node, soon};

const NUM_CONNECTIONS: usize = 3;
/// Soon noticed, and longer than a busy machine keeps a thread from its core.
const IDLE: Duration = Duration::from_millis(1500);

/// A decode node that reaches a prefill node over a relay, by several connections.
struct Pair {
    prefill: Fabric,
    decode: Fabric,
    relay: Relay,
    link: Link,
    bulk: BulkReceiver,
    sender: BulkSender,
}

fn striped(mut config: FabricConfig) -> FabricConfig {
    config.num_bulk_connections = NUM_CONNECTIONS as u16;
    config
}

async fn all_are_there(bulk: &BulkReceiver) {
    eventually("all connections are there", || bulk.num_connections() == NUM_CONNECTIONS).await;
}

impl Pair {
    /// All connections are there.
    async fn new(idle_timeout: Duration) -> Self {
        let pair = Self::with_ways(idle_timeout, NUM_CONNECTIONS).await;
        all_are_there(&pair.bulk).await;
        pair
    }

    /// The first `num_ways` are there, or will be in a moment; nobody reaches the other end by the others.
    async fn with_ways(idle_timeout: Duration, num_ways: usize) -> Self {
        let cluster = Cluster::new();
        let [prefill, decode] = [("p0", Role::PrefillNode), ("d0", Role::DecodeNode)].map(|(name, role)| {
            let mut config = striped(cluster.config(name, role));
            config.limits.idle_timeout = idle_timeout;
            config.limits.keep_alive = Duration::from_millis(100);
            Fabric::bind(config).unwrap()
        });
        let relay = Relay::before(&prefill, 65_507).await;
        relay.hold_ways_from(num_ways);
        let link = soon("dial", decode.dial(relay.control(), Role::PrefillNode, None)).await.unwrap();
        let bulk = soon("bulk", decode.connect_bulk(&link, &decode.landing_zone())).await.unwrap();
        let sender = prefill.bulk_to(&node("d0"), Epoch(11)).unwrap();
        Self { prefill, decode, relay, link, bulk, sender }
    }

    async fn close(self) {
        let Self { prefill, decode, relay, link, bulk, sender } = self;
        drop((link, bulk, sender));
        assert_nothing_left([prefill, decode]).await;
        drop(relay);
    }
}

/// Hands a job over in extents of 128 tokens, all begun at once, and checks every byte of it: nothing is refused,
/// nothing is missing. `is_in_place`: sent from where it lies in a pool, not copied first.
async fn hand_over(sender: &BulkSender, zone: &LandingZone, request: u128, is_in_place: bool) {
    hand_over_while(sender, zone, request, is_in_place, async |_| {}).await;
}

/// As [`hand_over`], with something that happens when all sends, of which it hears the number, have begun.
async fn hand_over_while(
    sender: &BulkSender,
    zone: &LandingZone,
    request: u128,
    is_in_place: bool,
    meanwhile: impl AsyncFnOnce(usize),
) {
    let job = Job::new(request, 4096, 0, 0);
    let (pool, memory) = (FilePool::new(job.blocks.len()), TestMemory::new(job.blocks.len()));
    let (landing, mut events) = zone.open(job.plan(&memory));
    let source = pool.source(&job, (0..job.blocks.len() as u32).map(BlockId).collect());
    let mut sends = tokio::task::JoinSet::new();
    for extent in job.extents(128) {
        let ((header, payload), sender) = (source.seal(&job.tokens, extent), sender.clone());
        let payload = if is_in_place { payload } else { payload.into_bytes().into() };
        sends.spawn(async move { sender.send_extent(&header, payload).await });
    }
    meanwhile(sends.len()).await;
    while let Some(sent) = soon("a send ends", sends.join_next()).await {
        sent.unwrap().unwrap();
    }
    while !landing.is_complete() {
        let event = soon("an extent", events.recv()).await;
        assert!(matches!(event, Some(LandingEvent::ExtentVerified { .. })), "{event:?}");
    }
    assert!(job.extents(128).iter().all(|extent| job.holds(&memory, extent)));
    drop(source);
    assert_eq!(Arc::strong_count(&pool), 1, "what has arrived is referred to");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_connection_carries_kv_in_both_directions() {
    let pair = Pair::new(Duration::from_secs(30)).await;
    assert_eq!((pair.prefill.num_bulk_listeners(), pair.relay.bulk_bytes().len()), (NUM_CONNECTIONS, NUM_CONNECTIONS));
    for fabric in [&pair.prefill, &pair.decode] {
        assert_eq!(fabric.accounting().connections, 1 + NUM_CONNECTIONS);
    }
    let before = pair.relay.bulk_bytes();
    hand_over(&pair.sender, &pair.decode.landing_zone(), 1, true).await;
    let after = pair.relay.bulk_bytes();
    // Of 768 KiB.
    let carried: Vec<usize> = after.iter().zip(before).map(|(after, before)| after - before).collect();
    assert!(carried.iter().all(|num_bytes| *num_bytes > 64 << 10), "{carried:?}");
    assert!(pair.prefill.receives_from(&node("d0"), Epoch(11)));
    hand_over(pair.bulk.sender(), &pair.prefill.landing_zone(), 2, true).await;
    pair.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn extent_goes_to_the_connection_with_the_least_on_the_way() {
    let pair = Pair::new(Duration::from_secs(30)).await;
    for number in 0..NUM_CONNECTIONS {
        pair.relay.set_fault(number, Some(WayFault { after_bytes: 0, size_max_to: 0, size_max_from: 0 }));
    }
    let job = Job::new(1, 4096, 0, 0);
    let (pool, memory) = (FilePool::new(job.blocks.len()), TestMemory::new(job.blocks.len()));
    let (landing, _events) = pair.decode.landing_zone().open(job.plan(&memory));
    let source = pool.source(&job, (0..job.blocks.len() as u32).map(BlockId).collect());
    let send = |extent| {
        let ((header, payload), sender) = (source.seal(&job.tokens, extent), pair.sender.clone());
        tokio::spawn(async move { sender.send_extent(&header, payload).await })
    };
    let [stuck, rest @ ..] = &job.extents(128)[..] else { panic!("several extents") };
    let waits = send(*stuck);
    eventually("it is on the way", || pair.prefill.accounting().open_bulk_streams == 1).await;
    // The first of three empty ones took it.
    for number in 1..NUM_CONNECTIONS {
        pair.relay.set_fault(number, None);
    }
    for extent in rest {
        soon("another connection has nothing on the way", send(*extent)).await.unwrap().unwrap();
    }
    assert!(!waits.is_finished());
    pair.relay.set_fault(0, None);
    soon("the first", waits).await.unwrap().unwrap();
    eventually("all land", || landing.is_complete()).await;
    drop((landing, source));
    pair.close().await;
}

/// The way of one connection breaks under a transfer: silently, as a link does. `fault` says how.
async fn lose_one(fault: WayFault, is_in_place: bool) {
    println!("{fault:?}, in place: {is_in_place}");
    let values = Values::install();
    let resent = || values.count("tandem_fabric_resent_extents_total p0");
    let num_resent = resent();
    let pair = Pair::new(IDLE).await;
    pair.relay.set_fault(1, Some(fault));
    hand_over(&pair.sender, &pair.decode.landing_zone(), 1, is_in_place).await;
    assert!(resent() > num_resent, "nothing was on the way there");
    assert!(!pair.bulk.is_closed() && !pair.sender.is_closed());
    // Nothing more is lost with it, while it is away and when another has taken its place.
    hand_over(&pair.sender, &pair.decode.landing_zone(), 2, is_in_place).await;
    eventually("the loss is noticed", || pair.bulk.num_connections() < NUM_CONNECTIONS).await;
    pair.relay.set_fault(1, None);
    all_are_there(&pair.bulk).await;
    hand_over(&pair.sender, &pair.decode.landing_zone(), 3, is_in_place).await;
    pair.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn extents_of_a_lost_connection_go_over_the_others() {
    for is_in_place in [true, false] {
        lose_one(WayFault { after_bytes: 20_000, size_max_to: 0, size_max_from: 0 }, is_in_place).await;
    }
}

/// What comes again finds its range claimed by what the receiver still waits for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sender_that_notices_first_waits_for_the_receiver() {
    lose_one(WayFault { after_bytes: 20_000, size_max_to: 200, size_max_from: 0 }, true).await;
}

/// What comes again is there, all of it: only that was not heard of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_arrived_and_comes_again_is_no_error() {
    lose_one(WayFault { after_bytes: 0, size_max_to: 65_507, size_max_from: 0 }, true).await;
}

/// What was begun when there was one connection goes over those that have joined it since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn extents_that_were_begun_before_others_joined_outlive_the_first_connection() {
    for is_in_place in [true, false] {
        let pair = Pair::with_ways(IDLE, 1).await;
        // Enough to be known as alive, and to acknowledge; no KV.
        pair.relay.set_fault(0, Some(WayFault { after_bytes: 0, size_max_to: 200, size_max_from: 65_507 }));
        let (num_open, zone) = (|| pair.prefill.accounting().open_bulk_streams, pair.decode.landing_zone());
        hand_over_while(&pair.sender, &zone, 1, is_in_place, async |num_sends| {
            eventually("all are on the way", || num_open() == num_sends).await;
            assert_eq!(pair.bulk.num_connections(), 1);
            eventually("others are dialled", || pair.relay.bulk_bytes().len() == NUM_CONNECTIONS).await;
            for number in 1..NUM_CONNECTIONS {
                pair.relay.set_fault(number, None);
            }
            all_are_there(&pair.bulk).await;
            assert_eq!(num_open(), num_sends, "what has not arrived is still being sent");
            pair.relay.set_fault(0, Some(WayFault { after_bytes: 0, size_max_to: 0, size_max_from: 0 }));
        })
        .await;
        assert!(!pair.bulk.is_closed() && !pair.sender.is_closed());
        pair.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_last_connection_the_pair_is_lost_as_ever() {
    let pair = Pair::new(IDLE).await;
    let job = Job::new(1, 64, 0, 0);
    let memory = TestMemory::new(8);
    let (landing, _events) = pair.decode.landing_zone().open(job.plan(&memory));
    for number in 0..NUM_CONNECTIONS {
        pair.relay.set_fault(number, Some(WayFault { after_bytes: 0, size_max_to: 0, size_max_from: 0 }));
    }
    let pool = FilePool::new(job.blocks.len());
    let source = pool.source(&job, (0..job.blocks.len() as u32).map(BlockId).collect());
    let (header, payload) = source.seal(&job.tokens, job.extent(0, 0, 64));
    // Once for each of the connections, and in place until the last is lost.
    assert!(soon("a send ends", pair.sender.send_extent(&header, payload)).await.is_err());
    soon("the receiver hears of it", pair.bulk.closed()).await;
    assert!(pair.sender.is_closed() && pair.bulk.is_closed());
    assert!(pair.prefill.bulk_to(&node("d0"), Epoch(11)).is_none());
    assert!(!pair.link.is_closed(), "messages go another way");
    drop((landing, source));
    pair.close().await;
}

/// A node that says what it likes of its bulk connections.
struct RawPeer {
    name: &'static str,
    raw: Raw,
}

impl RawPeer {
    fn new(cluster: &Cluster, name: &'static str) -> Self {
        Self { name, raw: Raw::new(cluster, name, Role::DecodeNode) }
    }

    /// A bulk connection, and what is said to it.
    async fn dial(&self, prefill: &Fabric, group: BulkGroup) -> (Connection, Result<(), String>) {
        let addr = prefill.bulk_addr().unwrap();
        let connection = self.raw.dial(addr, Role::PrefillNode, b"tandem-bulk/2").await.unwrap();
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        let hello = HelloBulk { hello: hello(self.name, Role::DecodeNode), group };
        send.write_all(&frame(&Open::HelloBulk(Box::new(hello)))).await.unwrap();
        let reply = match next_frame(&mut recv).await {
            Some(HelloReply::Welcome { .. }) => Ok(()),
            Some(HelloReply::Refused { reason }) => Err(reason),
            None => Err(connection.closed().await.to_string()),
        };
        (connection, reply)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_join_belong_to_the_place_of_their_peer() {
    const NUM_PEERS: usize = 4;
    let cluster = Cluster::new();
    let mut config = striped(cluster.config("p0", Role::PrefillNode));
    config.limits.num_connections_max = NUM_PEERS;
    let prefill = Fabric::bind(config).unwrap();
    let num_connections = || prefill.accounting().connections;
    let group = |id: u64, joins: bool| BulkGroup { id, num_connections: 3, joins };
    let mut peers = Vec::new();
    for (id, name) in ["d0", "d1", "d2", "d3"].into_iter().enumerate() {
        let peer = RawPeer::new(&cluster, name);
        // Before there are as many peers as there may be, as behind it, a join takes nobody's place.
        let mut held = Vec::new();
        for joins in [false, true] {
            let (connection, reply) = peer.dial(&prefill, group(id as u64, joins)).await;
            assert_eq!(reply, Ok(()), "{name}");
            held.push(connection);
        }
        peers.push((peer, held));
    }
    let one_too_many = RawPeer::new(&cluster, "d4");
    let is_refused = async || match one_too_many.dial(&prefill, group(9, false)).await.1 {
        Err(reason) => {
            assert!(reason.contains("too many connections: it takes 4 such at a time"), "{reason}");
            true
        }
        Ok(()) => false,
    };
    assert!(is_refused().await);
    // There may be room in a moment, without anybody changing anything.
    let decode = cluster.start("d5", Role::DecodeNode);
    let link = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap();
    let error = soon("bulk", decode.connect_bulk(&link, &decode.landing_zone())).await.err().unwrap();
    assert!(error.is_worth_a_retry() && error.to_string().contains("too many connections"), "{error}");
    drop(link);
    for (id, (peer, held)) in peers.iter_mut().enumerate() {
        let (connection, reply) = peer.dial(&prefill, group(id as u64, true)).await;
        assert_eq!(reply, Ok(()), "the node is full of peers, not of their connections");
        held.push(connection);
    }
    let (_, reply) = peers[0].0.dial(&prefill, group(0, true)).await;
    assert_eq!(reply.unwrap_err(), "there are 3 bulk connections already, and no more may join them");
    eventually("refused ones are gone", || num_connections() == 3 * NUM_PEERS).await;

    // The place is the peer's until its last connection has ended, whichever came first.
    for num_left in [2, 1] {
        peers[0].1.remove(0).close(0u32.into(), b"");
        eventually("it is gone", || num_connections() == 3 * (NUM_PEERS - 1) + num_left).await;
        assert!(is_refused().await);
    }
    peers[0].1.remove(0).close(0u32.into(), b"");
    eventually("it is gone", || num_connections() == 3 * (NUM_PEERS - 1)).await;
    assert!(!is_refused().await, "the place is free");
    drop(peers);
    assert_nothing_left([prefill, decode]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_beyond_those_announced_and_of_no_group_are_refused_in_words() {
    let cluster = Cluster::new();
    let prefill = Fabric::bind(striped(cluster.config("p0", Role::PrefillNode))).unwrap();
    let peer = RawPeer::new(&cluster, "d0");
    let dial = async |id: u64, num_connections: u16, joins: bool| {
        peer.dial(&prefill, BulkGroup { id, num_connections, joins }).await
    };
    let (_first, reply) = dial(7, 2, false).await;
    assert_eq!(reply, Ok(()));
    let (second, reply) = dial(7, 2, true).await;
    assert_eq!(reply, Ok(()));
    let (_, reply) = dial(7, 2, true).await;
    assert_eq!(reply.unwrap_err(), "there are 2 bulk connections already, and no more may join them");
    let (_, reply) = dial(8, 2, true).await;
    assert_eq!(reply.unwrap_err(), "the bulk connections it belongs to have ended, or others took their place");
    eventually("refused ones are gone", || prefill.accounting().connections == 2).await;
    // One that is lost leaves room for another.
    second.close(0u32.into(), b"");
    eventually("it is gone", || prefill.accounting().connections == 1).await;
    let (_third, reply) = dial(7, 2, true).await;
    assert_eq!(reply, Ok(()));
    assert!(prefill.bulk_to(&node("d0"), Epoch(11)).is_some());
    // Whatever a peer announces, no more than the bound.
    let mut held = vec![dial(9, u16::MAX, false).await];
    for _ in 1..16 {
        held.push(dial(9, u16::MAX, true).await);
    }
    assert!(held.iter().all(|(_, reply)| reply.is_ok()));
    let (_, reply) = dial(9, u16::MAX, true).await;
    assert_eq!(reply.unwrap_err(), "there are 16 bulk connections already, and no more may join them");
    drop(held);
    drop((_first, _third));
    assert_nothing_left([prefill]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_of_the_version_before_have_one_connection() {
    for (of_decode, of_prefill) in [(&[2, 1][..], &[1][..]), (&[1], &[2, 1])] {
        let cluster = Cluster::new();
        let [prefill, decode] = [("p0", Role::PrefillNode, of_prefill), ("d0", Role::DecodeNode, of_decode)].map(
            |(name, role, versions)| {
                let mut config = striped(cluster.config(name, role));
                config.versions = versions.to_vec();
                Fabric::bind(config).unwrap()
            },
        );
        let link = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap();
        let bulk = soon("bulk", decode.connect_bulk(&link, &decode.landing_zone())).await.unwrap();
        let sender = prefill.bulk_to(&node("d0"), Epoch(11)).unwrap();
        for request in 1..4 {
            hand_over(&sender, &decode.landing_zone(), request, true).await;
            hand_over(bulk.sender(), &prefill.landing_zone(), request, true).await;
        }
        assert_eq!((decode.accounting().connections, prefill.accounting().connections), (2, 2));
        drop((link, bulk, sender));
        assert_nothing_left([prefill, decode]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pool_that_is_read_where_it_lies_needs_one_connection() {
    let cluster = Cluster::new();
    let pool = FilePool::new(4);
    let mut config = striped(cluster.config("p0", Role::PrefillNode));
    config.shared_pool = Some(pool.shared());
    let prefill = Fabric::bind(config).unwrap();
    let mut config = striped(cluster.config("d0", Role::DecodeNode));
    config.is_reading_shared_pools = true;
    let decode = Fabric::bind(config).unwrap();
    let link = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap();
    let bulk = soon("bulk", decode.connect_bulk(&link, &decode.landing_zone())).await.unwrap();
    assert_eq!((bulk.transport_name(), bulk.num_connections()), ("shm", 1));
    hand_over(bulk.sender(), &prefill.landing_zone(), 1, true).await;
    assert_eq!((decode.accounting().connections, prefill.accounting().connections), (2, 2));
    drop((link, bulk));
    assert_nothing_left([prefill, decode]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_a_pair_share_one_share_of_the_receive_memory() {
    let cluster = Cluster::new();
    let prefills =
        ["p0", "p1", "p2"].map(|name| Fabric::bind(striped(cluster.config(name, Role::PrefillNode))).unwrap());
    let mut config = striped(cluster.config("d0", Role::DecodeNode));
    config.limits.receive_bytes_max = 2 * config.limits.bulk_window_bytes as usize;
    let decode = Fabric::bind(config).unwrap();
    let mut held = Vec::new();
    for prefill in &prefills[..2] {
        let link = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap();
        let bulk = soon("bulk", decode.connect_bulk(&link, &decode.landing_zone())).await.unwrap();
        all_are_there(&bulk).await;
        held.push((link, bulk));
    }
    let link = soon("dial", decode.dial(prefills[2].local_addr(), Role::PrefillNode, None)).await.unwrap();
    let error = soon("bulk", decode.connect_bulk(&link, &decode.landing_zone())).await.err().unwrap();
    assert_eq!(error, DialError::NoReceiveMemory { num_connections: 2 });
    held.pop();
    let bulk = soon("its share comes back", async {
        loop {
            match decode.connect_bulk(&link, &decode.landing_zone()).await {
                Ok(bulk) => return bulk,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    })
    .await;
    all_are_there(&bulk).await;
    drop((held, bulk, link));
    let [p0, p1, p2] = prefills;
    assert_nothing_left([p0, p1, p2, decode]).await;
}

#[tokio::test]
async fn port_of_several_sockets_is_nobody_elses() {
    let cluster = Cluster::new();
    let first = Fabric::bind(striped(cluster.config("p0", Role::PrefillNode))).unwrap();
    for num_connections in [1, NUM_CONNECTIONS as u16] {
        let mut config = cluster.config("p1", Role::PrefillNode);
        config.num_bulk_connections = num_connections;
        config.bulk_listen = first.bulk_addr();
        assert!(matches!(Fabric::bind(config), Err(BindError::Socket { .. })), "{num_connections}");
    }
    assert_nothing_left([first]).await;
}
