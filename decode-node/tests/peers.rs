//! Prefixes that another prefill node holds: fetched from its pool where that is cheap, and whatever becomes of such
//! a fetch, the tokens are those that one engine alone generates, and nobody holds anything afterwards.
#![allow(clippy::unwrap_used)]

mod cluster;

use std::collections::BTreeMap;
use std::time::Duration;

use cluster::*;
use common::ids::{Attempt, Generation, NodeId, RequestId};
use common::wire::{FetchPrefix, FetchPrefixEvent, Generate, Open, PrefixPeer};
use futures::future::join_all;
use kv_connector::transfer::FaultyTransport;

const NUM_HELD: usize = 320;
const NUM_TOKENS: usize = 400;

fn counted(label: &str, num: u64) -> BTreeMap<String, u64> {
    [(label.to_string(), num)].into()
}

/// Expected times that make fetching the cheapest way by far.
fn shape() -> Shape {
    let mut shape = Shape::default();
    shape.prefill.prefill_tokens_per_second = Some(1000);
    shape.prefill.fetch_bytes_per_second = Some(u64::MAX);
    shape
}

/// Has the first prefill node hold the beginning of a prompt that the other one is to prefill.
async fn held_by_peer(cluster: &Cluster, number: u128, num_held: usize, num_tokens: usize) -> Generate {
    let text = prompt(num_tokens, number as u32);
    cluster.hold_at(0, &text[..num_held + 1], &[]).await;
    let mut request = generate(number, text, sampled(20, number as u64));
    request.prefill_candidates = vec![cluster.candidates()[1].clone()];
    request.prefix_peer = Some(cluster.peer(0, num_held));
    request
}

async fn ask(cluster: &Cluster, request: &Generate) -> Finished {
    let answer = cluster.ask(request).await.finish().await;
    assert_eq!(answer.texts, cluster.undisturbed(request).await, "request {}", request.request);
    answer
}

fn served(cluster: &Cluster) -> BTreeMap<String, u64> {
    cluster.prefills[0].counters("tandem_prefixes_served_total", "end")
}

fn computed(cluster: &Cluster) -> usize {
    cluster.prefills[1].counter("tandem_computed_tokens_total") as usize
}

#[tokio::test(flavor = "multi_thread")]
async fn prefix_comes_from_the_peer_and_the_rest_alone_is_computed() {
    let cluster = Cluster::start(shape()).await;
    let granule_bytes = cluster.granule_bytes();
    let request = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
    let answer = ask(&cluster, &request).await;
    assert_eq!(cluster.prefix_choices(), counted("peer", 1));
    assert!(!answer.timeline.is_local_prefill);
    assert_eq!(answer.timeline.num_fetched_tokens as usize, NUM_HELD);
    assert_eq!(answer.timeline.transferred_bytes, NUM_TOKENS as u64 / 16 * granule_bytes, "the decode node has none");
    assert_eq!(computed(&cluster), NUM_TOKENS - NUM_HELD);
    let num_bytes = NUM_HELD as u64 / 16 * granule_bytes;
    assert_eq!(cluster.prefills[1].counter("tandem_kv_fetched_bytes_total"), num_bytes);
    assert_eq!(cluster.prefills[0].counter("tandem_peer_sent_bytes_total"), num_bytes);
    assert_eq!(served(&cluster), counted("sent", 1));

    // Now it is there, and nobody is asked.
    cluster.is_clean().await;
    cluster.decode.engine.clear_cache();
    let again = Generate { request: RequestId(2), ..request };
    let answer = ask(&cluster, &again).await;
    assert_eq!((answer.timeline.num_cached_tokens, answer.timeline.num_fetched_tokens), (384, 0));
    assert_eq!(cluster.prefix_choices(), counted("peer", 1), "nothing was lacking");
    assert_eq!((cluster.failed_fetches(), cluster.lost_candidates()), Default::default());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn part_is_cached_at_each_of_three_nodes_and_none_of_it_is_computed_again() {
    let cluster = Cluster::start(shape()).await;
    let request = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
    cluster.hold_at(1, &request.tokens.0[..161], &[]).await;
    let before = computed(&cluster);
    // The decode node has computed a shorter beginning by itself.
    let first = generate(100, request.tokens.0[..81].to_vec(), sampled(1, 1));
    assert!(cluster.ask(&first).await.finish().await.timeline.is_local_prefill);
    let answer = ask(&cluster, &request).await;
    assert_eq!(cluster.prefix_choices(), counted("peer", 1));
    assert_eq!(answer.timeline.num_fetched_tokens as usize, NUM_HELD - 160);
    assert_eq!(answer.timeline.transferred_bytes, (NUM_TOKENS - 80) as u64 / 16 * cluster.granule_bytes());
    assert_eq!(computed(&cluster) - before, NUM_TOKENS - NUM_HELD);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dear_transfer_is_not_taken() {
    let mut shape = shape();
    shape.prefill.fetch_bytes_per_second = Some(0);
    let cluster = Cluster::start(shape).await;
    let request = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
    ask(&cluster, &request).await;
    assert_eq!(cluster.prefix_choices(), counted("recompute", 1));
    assert_eq!((computed(&cluster), served(&cluster)), (NUM_TOKENS, BTreeMap::new()));
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_peer_has_forgotten_is_computed_and_what_is_left_is_taken() {
    let mut shape = shape();
    // Measured: an answer is no failure that would speak against asking again.
    shape.prefill.fetch_bytes_per_second = None;
    shape.prefill.prefill_tokens_per_second = Some(1);
    let cluster = Cluster::start(shape).await;
    let stale = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
    cluster.prefills[0].engine.clear_cache();
    assert_eq!(ask(&cluster, &stale).await.timeline.num_fetched_tokens, 0);
    assert_eq!((cluster.failed_fetches(), computed(&cluster)), (counted("not_held", 1), NUM_TOKENS));
    let partly = held_by_peer(&cluster, 2, 160, NUM_TOKENS).await;
    let partly = Generate { prefix_peer: Some(cluster.peer(0, NUM_HELD)), ..partly };
    assert_eq!(ask(&cluster, &partly).await.timeline.num_fetched_tokens, 160);
    assert_eq!(cluster.failed_fetches(), counted("not_held", 1), "all that is there has come");
    assert_eq!(served(&cluster), [("not_held".to_string(), 1), ("sent".to_string(), 1)].into());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prefix_of_another_tenant_is_not_found() {
    let cluster = Cluster::start(shape()).await;
    let text = prompt(NUM_TOKENS, 1);
    cluster.hold_at(0, &text[..NUM_HELD + 1], b"alice").await;
    let mut request = generate(1, text, sampled(20, 1));
    request.prefill_candidates = vec![cluster.candidates()[1].clone()];
    request.prefix_peer = Some(cluster.peer(0, NUM_HELD));
    for (number, salt, num_fetched) in [(1, &b""[..], 0), (2, b"bob", 0), (3, b"alice", NUM_HELD)] {
        let request = Generate { request: RequestId(number), salt: salt.to_vec(), ..request.clone() };
        let answer = ask(&cluster, &request).await;
        assert_eq!(answer.timeline.num_fetched_tokens as usize, num_fetched, "request {number}");
    }
    assert_eq!(cluster.failed_fetches(), counted("not_held", 2));
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hints_that_lead_nowhere_are_ignored() {
    let cluster = Cluster::start(shape()).await;
    let request = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
    let own_name = cluster.candidates()[1].clone();
    let hint = |node, num_tokens| Some(PrefixPeer { node, num_tokens });
    let stranger = NodeId::new("nobody-named-it").unwrap();
    let holder = cluster.candidates()[0].clone();
    for (number, hint) in [hint(own_name, 320), hint(stranger, 320), hint(holder, 15)].into_iter().enumerate() {
        cluster.prefills[1].engine.clear_cache();
        cluster.decode.engine.clear_cache();
        let request = Generate { request: RequestId(10 + number as u128), prefix_peer: hint, ..request.clone() };
        assert_eq!(ask(&cluster, &request).await.timeline.num_fetched_tokens, 0);
        cluster.is_clean().await;
    }
    assert_eq!((cluster.prefix_choices(), served(&cluster)), Default::default());
    // One that claims too much is worth what is there.
    let huge =
        Generate { request: RequestId(20), prefix_peer: hint(cluster.candidates()[0].clone(), u32::MAX), ..request };
    cluster.prefills[1].engine.clear_cache();
    cluster.decode.engine.clear_cache();
    assert_eq!(ask(&cluster, &huge).await.timeline.num_fetched_tokens as usize, NUM_HELD);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prefix_is_paced_by_credit_and_may_be_larger_than_the_window() {
    let mut shape = shape();
    shape.prefill.fetch_credit_bytes = 1;
    let cluster = Cluster::start(shape).await;
    let request = held_by_peer(&cluster, 1, 2400, 2500).await;
    assert_eq!(ask(&cluster, &request).await.timeline.num_fetched_tokens, 2400);
    assert_eq!(cluster.failed_fetches(), BTreeMap::new());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_and_lost_prefixes_are_computed_and_late_and_repeated_ones_are_taken() {
    for seed in 0..5 {
        let (plan, failures) = always(seed);
        println!("{plan:?}");
        let mut shape = shape();
        shape.first_prefill_layer = Some(FaultyTransport::layer(plan));
        shape.prefill.fetch_stall_timeout = Duration::from_millis(if failures.is_empty() { 10_000 } else { 300 });
        let cluster = Cluster::start(shape).await;
        let request = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
        ask(&cluster, &request).await;
        assert_eq!(cluster.prefix_choices(), counted("peer", 1));
        let failed = cluster.failed_fetches();
        if failures.is_empty() {
            assert_eq!((failed, computed(&cluster)), (BTreeMap::new(), NUM_TOKENS - NUM_HELD));
        } else {
            assert!(failures.iter().any(|failure| failed == counted(failure, 1)), "{failed:?}");
            assert_eq!(computed(&cluster), NUM_TOKENS);
        }
        assert_eq!(cluster.lost_candidates(), BTreeMap::new(), "the prefill node is not to blame");
        cluster.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_that_stands_still_costs_one_wait_and_is_then_left_alone() {
    let (layer, _) = holding(u64::MAX);
    let mut shape = Shape { first_prefill_layer: Some(layer), ..shape() };
    shape.prefill.fetch_stall_timeout = Duration::from_millis(300);
    shape.prefill.fetch_bytes_per_second = None;
    shape.prefill.prefill_tokens_per_second = Some(100);
    let cluster = Cluster::start(shape).await;
    let first = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
    let second = held_by_peer(&cluster, 2, NUM_HELD, NUM_TOKENS).await;
    assert!(ask(&cluster, &first).await.timeline.fetch >= Duration::from_millis(300));
    assert_eq!(cluster.failed_fetches(), counted("stalled", 1));
    ask(&cluster, &second).await;
    assert_eq!(cluster.prefix_choices(), [("peer".to_string(), 1), ("recompute".to_string(), 1)].into());
    assert_eq!(cluster.lost_candidates(), BTreeMap::new());
    cluster.end().await;
}

/// Long enough that nothing but what the test does ends the fetch.
fn standing() -> (Shape, std::sync::Arc<tokio::sync::Notify>) {
    let (layer, has_begun) = holding(u64::MAX);
    let mut shape = Shape { first_prefill_layer: Some(layer), ..shape() };
    shape.prefill.fetch_stall_timeout = Duration::from_secs(60);
    shape.prefill.transfer_stall_timeout = Duration::from_secs(60);
    shape.decode.prefill_progress_timeout = Duration::from_secs(60);
    (shape, has_begun)
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_that_dies_midway_is_done_without() {
    let (shape, has_begun) = standing();
    let cluster = Cluster::start(shape).await;
    let request = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
    let answer = cluster.ask(&request).await;
    soon("the fetch begins", has_begun.notified()).await;
    cluster.prefills[0].fabric.close().await;
    let answer = answer.finish().await;
    assert_eq!(answer.texts, cluster.undisturbed(&request).await);
    assert_eq!((cluster.failed_fetches(), computed(&cluster)), (counted("stopped", 1), NUM_TOKENS));
    assert_eq!(cluster.lost_candidates(), BTreeMap::new());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_that_is_gone_is_done_without() {
    let cluster = Cluster::start(shape()).await;
    let request = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
    cluster.prefills[0].fabric.close().await;
    ask(&cluster, &request).await;
    let failed = cluster.failed_fetches();
    // Nobody answers at its address, or not before the wait is over.
    assert!(failed == counted("unreachable", 1) || failed == counted("stalled", 1), "{failed:?}");
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn client_that_leaves_midway_leaves_all_nodes_clean() {
    let (shape, has_begun) = standing();
    let cluster = Cluster::start(shape).await;
    let request = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
    let answer = cluster.ask(&request).await;
    soon("the fetch begins", has_begun.notified()).await;
    drop(answer);
    cluster.is_clean().await;
    assert_eq!((cluster.failed_fetches(), served(&cluster)), (BTreeMap::new(), counted("gone", 1)));
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn node_that_fetches_and_dies_leaves_the_peer_clean_and_the_next_candidate_fetches_nothing_from_itself() {
    let (layer, has_begun) = holding(1);
    let mut shape = Shape { first_prefill_layer: Some(layer), ..shape() };
    shape.prefill.fetch_stall_timeout = Duration::from_secs(60);
    let cluster = Cluster::start(shape).await;
    let mut request = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
    request.prefill_candidates.push(cluster.candidates()[0].clone());
    let answer = cluster.ask(&request).await;
    soon("the fetch begins", has_begun.notified()).await;
    cluster.prefills[1].fabric.close().await;
    let answer = answer.finish().await;
    assert_eq!(answer.texts, cluster.undisturbed(&request).await);
    assert_eq!((answer.timeline.num_cached_tokens as usize, answer.timeline.num_fetched_tokens), (NUM_HELD, 0));
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn node_that_drains_takes_no_prompt_and_still_sends_what_it_holds() {
    let cluster = Cluster::start(shape()).await;
    let mut request = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
    cluster.prefills[0].presence.drain();
    request.prefill_candidates.insert(0, cluster.candidates()[0].clone());
    assert_eq!(ask(&cluster, &request).await.timeline.num_fetched_tokens as usize, NUM_HELD);
    assert_eq!((cluster.lost_candidates(), served(&cluster)), (counted("failed", 1), counted("sent", 1)));
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_that_fetch_from_each_other_under_full_pools_wait_for_nobody() {
    let mut shape = shape();
    shape.prefill.fetch_credit_bytes = 1;
    shape.decode_blocks = 2048;
    let cluster = Cluster::start(shape).await;
    // Six prefixes of 50 blocks and six prompts of 65 at each node are more than a pool's 512 blocks.
    let mut requests = Vec::new();
    for number in 1..=12 {
        let (holder, other) = if number % 2 == 0 { (0, 1) } else { (1, 0) };
        let text = prompt(1040, number);
        cluster.hold_at(holder, &text[..801], &[]).await;
        let mut request = generate(number.into(), text, sampled(5, number.into()));
        request.prefill_candidates = vec![cluster.candidates()[other].clone()];
        request.prefix_peer = Some(cluster.peer(holder, 800));
        requests.push(request);
    }
    let answers = join_all(requests.iter().map(|request| ask(&cluster, request))).await;
    assert!(answers.iter().any(|answer| answer.timeline.num_fetched_tokens > 0));
    assert_eq!((cluster.lost_candidates(), cluster.prefix_choices()["peer"]), (BTreeMap::new(), 12));
    cluster.end().await;
}

fn fetch_prefix(number: u128, tokens: Vec<u32>, first_token: u32) -> Open {
    Open::FetchPrefix(Box::new(FetchPrefix {
        request: RequestId(number),
        attempt: Attempt(1),
        generation: Generation(1),
        tokens: tokens.into(),
        first_token,
        salt: Vec::new(),
        deadline: Duration::from_secs(60),
    }))
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_that_sends_to_many_says_so_at_once() {
    let mut shape = shape();
    shape.prefill.transfer_stall_timeout = Duration::from_secs(60);
    let cluster = Cluster::start(shape).await;
    let request = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
    let other = FakePrefillNode::start(&cluster);
    let link = other.peers(&cluster).link(&cluster.candidates()[0]).await.unwrap();
    let mut streams = Vec::new();
    for number in 0..16 {
        let open = fetch_prefix(100 + number, request.tokens.0[..NUM_HELD].to_vec(), 0);
        let (control, mut events) = link.open(&open).await.unwrap();
        let held = soon("it answers", events.recv::<FetchPrefixEvent>()).await.unwrap();
        assert_eq!(held, Some(FetchPrefixEvent::Held { num_tokens: NUM_HELD as u32 }));
        streams.push((control, events));
    }
    ask(&cluster, &request).await;
    assert_eq!((cluster.failed_fetches(), computed(&cluster)), (counted("busy", 1), NUM_TOKENS));
    drop(streams);
    let again = held_by_peer(&cluster, 2, NUM_HELD, NUM_TOKENS).await;
    cluster.is_clean().await;
    assert_eq!(ask(&cluster, &again).await.timeline.num_fetched_tokens as usize, NUM_HELD);
    drop(link);
    other.end().await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn asks_that_no_node_makes_are_refused() {
    let cluster = Cluster::start(shape()).await;
    let request = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
    let other = FakePrefillNode::start(&cluster);
    let link = other.peers(&cluster).link(&cluster.candidates()[0]).await.unwrap();
    let text = &request.tokens.0;
    let asks = [
        (vec![], 0),
        (text[..20].to_vec(), 0),
        (text[..32].to_vec(), 32),
        (text[..32].to_vec(), 5),
        (vec![1; 8192], 0),
    ];
    let num_asks = asks.len() as u64;
    for (number, (tokens, first_token)) in asks.into_iter().enumerate() {
        let (_control, mut events) = link.open(&fetch_prefix(number as u128, tokens, first_token)).await.unwrap();
        let answer = soon("it answers", events.recv::<FetchPrefixEvent>()).await;
        assert!(answer.is_err(), "ask {number}: {answer:?}");
    }
    assert_eq!(served(&cluster), counted("invalid", num_asks));
    drop(link);
    other.end().await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_that_claims_more_than_it_was_asked_for_and_stops_costs_the_rest() {
    let mut cluster = Cluster::start(shape()).await;
    let mut request = held_by_peer(&cluster, 1, NUM_HELD, NUM_TOKENS).await;
    let fake = FakePrefillNode::start(&cluster);
    cluster.learn(&fake).await;
    request.prefix_peer = Some(PrefixPeer { node: fake.node(), num_tokens: NUM_HELD as u32 });
    let events = [FetchPrefixEvent::Held { num_tokens: u32::MAX }, FetchPrefixEvent::Stopped];
    let (answer, ()) = tokio::join!(ask(&cluster, &request), fake.serve_prefix(&events));
    assert_eq!(answer.timeline.num_fetched_tokens, 0);
    assert_eq!((cluster.failed_fetches(), computed(&cluster)), (counted("stopped", 1), NUM_TOKENS));
    fake.end().await;
    cluster.end().await;
}
