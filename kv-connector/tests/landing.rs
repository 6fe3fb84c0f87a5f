//! KV from a prefill node's fabric into a decode node's reservation: what counts, and what is refused.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use common::ids::{Attempt, Epoch, Generation, RequestId, Role};
use common::wire::ExtentHeader;
use kv_connector::transfer::{
    BulkReceiver, BulkSender, Landing, LandingEvent, LandingEvents, LandingZone, RefusedExtent,
};
use kv_connector::{DialError, Fabric, Link};
use support::{Cluster, GRANULE_BYTES, Job, TestMemory, assert_nothing_left, eventually, node, soon};

/// A decode node linked to a prefill node, both ways.
struct Pair {
    prefill: Fabric,
    decode: Fabric,
    zone: LandingZone,
    bulk: BulkReceiver,
    sender: BulkSender,
    link: Link,
}

impl Pair {
    async fn new() -> Self {
        let cluster = Cluster::new();
        let (prefill, decode) = (cluster.start("p0", Role::PrefillNode), cluster.start("d0", Role::DecodeNode));
        let link = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap();
        let zone = decode.landing_zone();
        let bulk = soon("bulk", decode.connect_bulk(&link, &zone)).await.unwrap();
        let sender = prefill.bulk_to(&node("d0"), Epoch(11)).unwrap();
        Self { prefill, decode, zone, bulk, sender, link }
    }

    async fn end(self) {
        let Self { prefill, decode, zone, bulk, sender, link } = self;
        assert_eq!(zone.num_landings(), 0);
        drop((zone, bulk, sender, link));
        assert_nothing_left([prefill, decode]).await;
    }

    async fn send(&self, (header, payload): (ExtentHeader, Bytes)) {
        let _ = soon("send", self.sender.send_extent(&header, payload)).await;
    }
}

async fn next(events: &mut LandingEvents) -> LandingEvent {
    soon("a landing event", events.recv()).await.unwrap()
}

/// Sends an extent until it is verified; with it, how many before it were refused, for `reason`. While another for the same
/// place is still on its way, it is a late copy, which is refused without a word.
async fn send_until_taken(
    pair: &Pair,
    (header, payload): (ExtentHeader, Bytes),
    events: &mut LandingEvents,
    reason: RefusedExtent,
) -> usize {
    let mut num_refused = 0;
    let taken = async {
        loop {
            pair.send((header, payload.clone())).await;
            while let Ok(event) = tokio::time::timeout(Duration::from_millis(50), events.recv()).await {
                match event.unwrap() {
                    LandingEvent::ExtentVerified { .. } => return,
                    event => assert_eq!(event, refused(reason)),
                }
                num_refused += 1;
            }
        }
    };
    soon("it is taken", taken).await;
    num_refused
}

fn refused(reason: RefusedExtent) -> LandingEvent {
    LandingEvent::ExtentRefused { reason }
}

fn open(pair: &Pair, job: &Job) -> (Arc<TestMemory>, Landing, LandingEvents) {
    let memory = TestMemory::new(64);
    let (landing, events) = pair.zone.open(job.plan(&memory));
    (memory, landing, events)
}

#[tokio::test]
async fn kv_lands_byte_for_byte_and_counts_when_every_layer_is_there() {
    let pair = Pair::new().await;
    let job = Job::new(1, 100, 32, 3);
    let (memory, landing, mut events) = open(&pair, &job);
    assert_eq!(landing.num_contiguous_tokens(), 32);
    let extents = job.extents(32);
    let mut counts = Vec::new();
    for extent in &extents {
        pair.send(job.sealed(*extent)).await;
        match next(&mut events).await {
            LandingEvent::ExtentVerified { extent: landed, num_bytes, num_contiguous_tokens, is_complete } => {
                assert_eq!(landed, *extent);
                assert_eq!(num_bytes as usize, job.payload(extent).len());
                counts.push((num_contiguous_tokens, is_complete));
            }
            event => panic!("{event:?}"),
        }
    }
    let not_yet = |tokens| [(tokens, false), (tokens, false)];
    let expected = [&not_yet(32)[..], &[(64, false)], &not_yet(64), &[(96, false)], &not_yet(96), &[(100, true)]];
    assert_eq!(counts, expected.concat());
    assert!(landing.is_complete());
    assert!(extents.iter().all(|extent| job.holds(&memory, extent)));
    drop(landing);
    pair.end().await;
}

#[tokio::test]
async fn nothing_outside_the_reserved_granules_is_touched() {
    let pair = Pair::new().await;
    let job = Job::new(1, 80, 16, 3);
    let (memory, landing, mut events) = open(&pair, &job);
    for extent in job.extents(1024) {
        pair.send(job.sealed(extent)).await;
        next(&mut events).await;
    }
    let num_untouched = |layer: &Vec<u8>| layer.chunks(GRANULE_BYTES).filter(|g| g.iter().all(|b| *b == 0xee)).count();
    // 128 granules, of which 4 were awaited.
    assert_eq!(memory.bytes().iter().map(num_untouched).collect::<Vec<_>>(), [124, 124, 124]);
    drop(landing);
    pair.end().await;
}

#[tokio::test]
async fn flipped_byte_is_refused_and_the_right_bytes_may_follow() {
    let pair = Pair::new().await;
    let job = Job::new(1, 64, 0, 0);
    let (memory, landing, mut events) = open(&pair, &job);
    let extent = job.extent(1, 0, 64);
    let (header, payload) = job.sealed(extent);
    for at in [0, payload.len() / 2, payload.len() - 1] {
        let mut bad = payload.to_vec();
        bad[at] ^= 0x10;
        pair.send((header, bad.into())).await;
        assert_eq!(next(&mut events).await, refused(RefusedExtent::Corrupted));
    }
    pair.send((header, payload)).await;
    assert!(matches!(next(&mut events).await, LandingEvent::ExtentVerified { .. }));
    assert!(job.holds(&memory, &extent));
    drop(landing);
    pair.end().await;
}

#[tokio::test]
async fn granules_in_another_order_or_of_two_extents_are_refused() {
    let pair = Pair::new().await;
    let job = Job::new(1, 64, 0, 0);
    let (_, landing, mut events) = open(&pair, &job);
    let (header, payload) = job.sealed(job.extent(1, 0, 64));
    let other = job.payload(&job.extent(2, 0, 64));
    let exchanged = [&payload[GRANULE_BYTES..], &payload[..GRANULE_BYTES]].concat();
    let torn = [&payload[..2 * GRANULE_BYTES], &other[2 * GRANULE_BYTES..]].concat();
    for bad in [exchanged, torn, other] {
        pair.send((header, bad.into())).await;
        assert_eq!(next(&mut events).await, refused(RefusedExtent::Corrupted));
    }
    assert_eq!(landing.num_contiguous_tokens(), 0);
    drop(landing);
    pair.end().await;
}

#[tokio::test]
async fn bytes_of_another_layer_range_or_content_are_refused() {
    let pair = Pair::new().await;
    let job = Job::new(1, 64, 0, 0);
    let (_, landing, mut events) = open(&pair, &job);
    // The header of one extent before the digest of another.
    let (genuine, payload) = job.sealed(job.extent(0, 0, 32));
    let swapped_layer = ExtentHeader { extent: job.extent(1, 0, 32), ..genuine };
    let swapped_range = ExtentHeader { extent: job.extent(0, 32, 32), ..genuine };
    let mut other = job.clone();
    other.tokens[5] += 1;
    let other_content = other.sealed(job.extent(0, 0, 32)).0;
    for header in [swapped_layer, swapped_range, other_content] {
        pair.send((header, payload.clone())).await;
        assert_eq!(next(&mut events).await, refused(RefusedExtent::Corrupted));
    }
    assert_eq!(landing.num_contiguous_tokens(), 0);
    drop(landing);
    pair.end().await;
}

#[tokio::test]
async fn header_that_does_not_fit_the_reservation_is_refused_before_a_byte_is_written() {
    let pair = Pair::new().await;
    let job = Job::new(1, 100, 32, 0);
    let (memory, landing, mut events) = open(&pair, &job);
    let (good, payload) = job.sealed(job.extent(0, 32, 32));
    type Change = fn(&mut ExtentHeader);
    let cases: [(Change, RefusedExtent); 14] = [
        (|h| h.extent.layer = 3, RefusedExtent::WrongShape),
        (|h| h.extent.layer = u16::MAX, RefusedExtent::WrongShape),
        (|h| h.extent.group = 1, RefusedExtent::WrongShape),
        (|h| h.extent.plane_mask = 1, RefusedExtent::WrongShape),
        (|h| h.extent.first_head = 1, RefusedExtent::WrongShape),
        (|h| h.extent.num_heads = 1, RefusedExtent::WrongShape),
        (|h| h.extent.first_token = 16, RefusedExtent::OutOfRange),
        (|h| h.extent.first_token = 33, RefusedExtent::OutOfRange),
        (|h| h.extent.first_token = u32::MAX, RefusedExtent::OutOfRange),
        (|h| h.extent.num_tokens = 31, RefusedExtent::OutOfRange),
        (|h| h.extent.num_tokens = 0, RefusedExtent::OutOfRange),
        (|h| h.extent.num_tokens = u32::MAX, RefusedExtent::OutOfRange),
        (|h| h.extent.num_tokens = 48, RefusedExtent::WrongSize),
        (|h| h.num_payload_bytes -= 1, RefusedExtent::WrongSize),
    ];
    for (change, reason) in cases {
        let mut header = good;
        change(&mut header);
        pair.send((header, payload.clone())).await;
        assert_eq!(next(&mut events).await, refused(reason), "{header:?}");
    }
    assert_eq!(memory.num_writes.load(Ordering::SeqCst), 0);
    drop(landing);
    pair.end().await;
}

#[tokio::test]
async fn more_or_fewer_bytes_than_announced_are_refused() {
    let pair = Pair::new().await;
    let job = Job::new(1, 64, 0, 0);
    let (_, landing, mut events) = open(&pair, &job);
    let (header, payload) = job.sealed(job.extent(0, 0, 64));
    pair.send((header, payload.slice(..payload.len() - 1))).await;
    assert_eq!(next(&mut events).await, refused(RefusedExtent::Truncated));
    pair.send((header, Bytes::new())).await;
    assert_eq!(next(&mut events).await, refused(RefusedExtent::Truncated));
    pair.send((header, [&payload[..], b"!"].concat().into())).await;
    assert_eq!(next(&mut events).await, refused(RefusedExtent::WrongSize));
    pair.send((header, payload)).await;
    assert!(matches!(next(&mut events).await, LandingEvent::ExtentVerified { .. }));
    drop(landing);
    pair.end().await;
}

#[tokio::test]
async fn stale_and_unknown_extents_are_refused_without_a_write() {
    let pair = Pair::new().await;
    let job = Job::new(1, 64, 0, 0);
    let (memory, landing, mut events) = open(&pair, &job);
    let extent = job.extent(0, 0, 64);
    let stale = [
        Job { epoch: Epoch(10), ..job.clone() },
        Job { attempt: Attempt(0), ..job.clone() },
        Job { generation: Generation(0), ..job.clone() },
        Job { generation: Generation(2), ..job.clone() },
        Job { request: RequestId(2), ..job.clone() },
    ];
    for other in &stale {
        pair.send(other.sealed(extent)).await;
        let (header, _) = other.sealed(extent);
        let reason = pair.zone.admit(&header).err().unwrap();
        assert!(
            matches!(reason, RefusedExtent::StaleEpoch | RefusedExtent::Stale | RefusedExtent::Unknown),
            "{reason:?}"
        );
    }
    // The genuine one comes through behind them, and is the only event.
    pair.send(job.sealed(extent)).await;
    assert!(matches!(next(&mut events).await, LandingEvent::ExtentVerified { .. }));
    assert!(job.holds(&memory, &extent));
    assert!(events.try_recv().is_none());
    drop(landing);
    pair.end().await;
}

#[tokio::test]
async fn late_duplicate_and_overlap_do_not_touch_what_is_verified() {
    let pair = Pair::new().await;
    let job = Job::new(1, 96, 0, 0);
    let (memory, landing, mut events) = open(&pair, &job);
    let extent = job.extent(0, 0, 64);
    pair.send(job.sealed(extent)).await;
    assert!(matches!(next(&mut events).await, LandingEvent::ExtentVerified { .. }));
    let before = (memory.bytes(), memory.num_writes.load(Ordering::SeqCst));
    for (header, payload) in [job.sealed(extent), job.sealed(job.extent(0, 48, 48)), job.sealed(job.extent(0, 0, 16))] {
        // The bytes are wrong on purpose: they must not be looked at.
        pair.send((header, vec![0x55; payload.len()].into())).await;
        assert_eq!(pair.zone.admit(&header).err(), Some(RefusedExtent::Duplicate));
    }
    // What is behind them on the connection shows that they were handled.
    pair.send(job.sealed(job.extent(1, 0, 96))).await;
    assert!(matches!(next(&mut events).await, LandingEvent::ExtentVerified { .. }));
    assert_eq!(memory.bytes()[0], before.0[0]);
    drop(landing);
    pair.end().await;
}

#[tokio::test]
async fn closing_stops_an_extent_midway_and_nothing_is_written_afterwards() {
    let pair = Pair::new().await;
    let job = Job::new(1, 64, 0, 0);
    let (memory, landing, mut events) = open(&pair, &job);
    let (header, payload) = job.sealed(job.extent(0, 0, 64));
    let mut arriving = pair.zone.admit(&header).unwrap();
    arriving.write(&payload[..100]).unwrap();
    assert_eq!(pair.decode.accounting().pinned_receive_bytes, payload.len());
    landing.close();
    let before = memory.bytes();
    assert_eq!(arriving.write(&payload[100..]), Err(RefusedExtent::Closed));
    assert_eq!(arriving.finish(), Err(RefusedExtent::Closed));
    assert_eq!(pair.zone.admit(&header).err(), Some(RefusedExtent::Unknown));
    assert_eq!(memory.bytes(), before);
    assert!(events.try_recv().is_none(), "who closed a landing hears no more of it");
    drop((landing, events));
    pair.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn close_waits_for_the_writer_and_then_the_blocks_are_still() {
    let pair = Pair::new().await;
    for round in 0..20 {
        let job = Job::new(round + 1, 2000, 0, 0);
        let memory = TestMemory::new(64);
        let (landing, mut events) = pair.zone.open(job.plan(&memory));
        let sender = pair.sender.clone();
        let sending = tokio::spawn({
            let job = job.clone();
            async move {
                for extent in job.extents(256) {
                    let (header, payload) = job.sealed(extent);
                    if sender.send_extent(&header, payload).await.is_err() {
                        return;
                    }
                }
            }
        });
        for _ in 0..round % 7 {
            next(&mut events).await;
        }
        landing.close();
        let (at_close, num_writes) = (memory.bytes(), memory.num_writes.load(Ordering::SeqCst));
        let num_tokens = landing.num_contiguous_tokens();
        soon("the sender ends", sending).await.unwrap();
        eventually("all extents are settled", || pair.decode.accounting().open_bulk_streams == 0).await;
        assert_eq!(memory.num_writes.load(Ordering::SeqCst), num_writes);
        assert!(memory.bytes() == at_close, "round {round}: a byte was written after the close");
        assert_eq!(landing.num_contiguous_tokens(), num_tokens);
    }
    pair.end().await;
}

#[tokio::test]
async fn two_attempts_of_one_request_land_side_by_side() {
    let pair = Pair::new().await;
    let first = Job::new(1, 64, 0, 0);
    let mut second = Job { attempt: Attempt(2), generation: Generation(9), ..first.clone() };
    second.blocks.iter_mut().for_each(|block| block.0 += 10);
    let memory = TestMemory::new(64);
    let (landing_1, mut events_1) = pair.zone.open(first.plan(&memory));
    let (landing_2, mut events_2) = pair.zone.open(second.plan(&memory));
    assert_eq!(pair.decode.accounting().landings, 2);
    let extent = first.extent(0, 0, 64);
    pair.send(second.sealed(extent)).await;
    assert!(matches!(next(&mut events_2).await, LandingEvent::ExtentVerified { .. }));
    drop(landing_2);
    pair.send(first.sealed(extent)).await;
    assert!(matches!(next(&mut events_1).await, LandingEvent::ExtentVerified { .. }));
    drop(landing_1);
    pair.end().await;
}

#[tokio::test]
async fn sender_that_gives_an_extent_up_is_noticed() {
    let pair = Pair::new().await;
    let job = Job::new(1, 64, 0, 0);
    let (_, landing, mut events) = open(&pair, &job);
    let (header, payload) = job.sealed(job.extent(0, 0, 64));
    let half = payload.slice(..payload.len() / 2);
    let end = kv_connector::transfer::ExtentEnd::Reset;
    soon("send", pair.sender.transport().send(&header, half.into(), end)).await.unwrap();
    // A reset may overtake the header; whatever follows is taken in any case.
    let event = tokio::select! {
        event = next(&mut events) => Some(event),
        () = eventually("the stream ends", || pair.decode.accounting().open_bulk_streams == 0) => events.try_recv(),
    };
    assert!(event.is_none() || event == Some(refused(RefusedExtent::Reset)), "{event:?}");
    send_until_taken(&pair, (header, payload), &mut events, RefusedExtent::Reset).await;
    drop(landing);
    pair.end().await;
}

#[tokio::test]
async fn lost_bulk_connection_is_told_to_the_landing_it_interrupts_and_to_both_ends() {
    let pair = Pair::new().await;
    assert!(pair.prefill.bulk_to(&node("d0"), Epoch(10)).is_none(), "another life of the node");
    let Pair { prefill, decode, zone, bulk, sender, link } = pair;
    drop(bulk);
    eventually("the sender sees it", || sender.is_closed()).await;
    eventually("it is not found any more", || prefill.bulk_to(&node("d0"), Epoch(11)).is_none()).await;
    let job = Job::new(1, 64, 0, 0);
    let (header, payload) = job.sealed(job.extent(0, 0, 64));
    assert!(soon("send", sender.send_extent(&header, payload)).await.is_err());
    // A new one takes its place.
    let bulk = soon("bulk", decode.connect_bulk(&link, &zone)).await.unwrap();
    assert!(prefill.bulk_to(&node("d0"), Epoch(11)).is_some());
    drop((bulk, zone, sender, link));
    assert_nothing_left([prefill, decode]).await;
}

#[tokio::test]
async fn proxies_and_nodes_without_a_bulk_port_exchange_no_kv() {
    let cluster = Cluster::new();
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let prefill = cluster.start("p0", Role::PrefillNode);
    let link = proxy.dial(decode.local_addr(), Role::DecodeNode, None).await.unwrap();
    let error = proxy.connect_bulk(&link, &proxy.landing_zone()).await.err().unwrap();
    assert_eq!(error, DialError::NoBulkListener { node: node("d0") });
    drop(link);
    let link = proxy.dial(prefill.local_addr(), Role::PrefillNode, None).await.unwrap();
    let error = soon("refused", proxy.connect_bulk(&link, &proxy.landing_zone())).await.err().unwrap();
    assert!(error.to_string().contains("KV is exchanged between nodes"), "{error}");
    drop(link);
    assert_nothing_left([proxy, decode, prefill]).await;
}

#[tokio::test]
async fn owner_that_does_not_listen_holds_nobody_back() {
    let pair = Pair::new().await;
    // One granule per extent: more extents than a connection receives at a time.
    let job = Job::new(1, 1600, 0, 0);
    let (memory, landing, mut events) = open(&pair, &job);
    let extents = job.extents(16);
    for extent in &extents {
        pair.send(job.sealed(*extent)).await;
    }
    // Without a single event taken, everything lands, and so does the KV of another request.
    eventually("all land", || landing.is_complete()).await;
    let other = Job::new(2, 64, 0, 60);
    let (other_landing, mut other_events) = pair.zone.open(other.plan(&memory));
    pair.send(other.sealed(other.extent(0, 0, 64))).await;
    assert!(matches!(next(&mut other_events).await, LandingEvent::ExtentVerified { .. }));
    let mut num_verified = 0;
    while let Some(LandingEvent::ExtentVerified { .. }) = events.try_recv() {
        num_verified += 1;
    }
    assert_eq!(num_verified, extents.len());
    drop((landing, other_landing));
    pair.end().await;
}

#[tokio::test]
async fn only_the_first_refusals_are_told_and_verified_extents_always() {
    let pair = Pair::new().await;
    let job = Job::new(1, 64, 0, 0);
    let (_, landing, mut events) = open(&pair, &job);
    let (header, payload) = job.sealed(job.extent(0, 0, 64));
    for _ in 0..200 {
        pair.send((header, vec![0; payload.len()].into())).await;
    }
    let num_refused = send_until_taken(&pair, (header, payload), &mut events, RefusedExtent::Corrupted).await;
    assert!((1..=64).contains(&num_refused), "{num_refused}");
    drop(landing);
    pair.end().await;
}

#[tokio::test]
async fn bulk_connections_share_the_receive_memory() {
    let cluster = Cluster::new();
    let prefills = [cluster.start("p0", Role::PrefillNode), cluster.start("p1", Role::PrefillNode)];
    let mut config = cluster.config("d0", Role::DecodeNode);
    config.limits.receive_bytes_max = config.limits.bulk_window_bytes as usize;
    let decode = Fabric::bind(config).unwrap();
    let zone = decode.landing_zone();
    let mut links = Vec::new();
    for prefill in &prefills {
        links.push(soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap());
    }
    let first = soon("bulk", decode.connect_bulk(&links[0], &zone)).await.unwrap();
    let error = soon("bulk", decode.connect_bulk(&links[1], &zone)).await.err().unwrap();
    assert_eq!(error, DialError::NoReceiveMemory { num_connections: 1 });
    drop(first);
    let second = soon("its share comes back", async {
        loop {
            match decode.connect_bulk(&links[1], &zone).await {
                Ok(bulk) => return bulk,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    })
    .await;
    drop((second, links, zone));
    let [p0, p1] = prefills;
    assert_nothing_left([p0, p1, decode]).await;
}

#[tokio::test]
async fn kv_lands_at_the_node_that_was_dialled_too() {
    let pair = Pair::new().await;
    assert!(pair.prefill.receives_from(&node("d0"), Epoch(11)));
    assert!(!pair.prefill.receives_from(&node("d0"), Epoch(10)), "another life of the node");
    let job = Job::new(1, 100, 32, 3);
    let memory = TestMemory::new(64);
    let (landing, mut events) = pair.prefill.landing_zone().open(job.plan(&memory));
    for extent in job.extents(32) {
        let (header, payload) = job.sealed(extent);
        soon("send", pair.bulk.sender().send_extent(&header, payload)).await.unwrap();
        assert!(matches!(next(&mut events).await, LandingEvent::ExtentVerified { .. }));
        assert!(job.holds(&memory, &extent));
    }
    assert!(landing.is_complete());
    // And what is damaged is refused there as everywhere.
    let other = Job::new(2, 64, 0, 10);
    let (other_landing, mut events) = pair.prefill.landing_zone().open(other.plan(&memory));
    let (header, payload) = other.sealed(other.extent(0, 0, 64));
    let _ = soon("send", pair.bulk.sender().send_extent(&header, bytes::Bytes::from(vec![0; payload.len()]))).await;
    assert_eq!(next(&mut events).await, refused(RefusedExtent::Corrupted));
    drop((landing, other_landing));
    pair.end().await;
}

#[tokio::test]
async fn node_without_receive_memory_still_sends_and_says_that_it_takes_nothing_in() {
    let cluster = Cluster::new();
    let mut config = cluster.config("p0", Role::PrefillNode);
    config.limits.receive_bytes_max = config.limits.bulk_window_bytes as usize;
    let prefill = Fabric::bind(config).unwrap();
    let decodes = [cluster.start("d0", Role::DecodeNode), cluster.start("d1", Role::DecodeNode)];
    let mut held = Vec::new();
    for decode in &decodes {
        let link = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap();
        let bulk = soon("bulk", decode.connect_bulk(&link, &decode.landing_zone())).await.unwrap();
        held.push((link, bulk));
    }
    let takes_in = ["d0", "d1"].map(|name| prefill.receives_from(&node(name), Epoch(11)));
    assert_eq!(takes_in, [true, false]);
    let job = Job::new(1, 64, 0, 0);
    let memory = TestMemory::new(8);
    let (landing, mut events) = decodes[1].landing_zone().open(job.plan(&memory));
    let (header, payload) = job.sealed(job.extent(0, 0, 64));
    let sender = prefill.bulk_to(&node("d1"), Epoch(11)).unwrap();
    soon("send", sender.send_extent(&header, payload)).await.unwrap();
    assert!(matches!(next(&mut events).await, LandingEvent::ExtentVerified { .. }));
    drop((landing, sender, held));
    let [d0, d1] = decodes;
    assert_nothing_left([prefill, d0, d1]).await;
}
