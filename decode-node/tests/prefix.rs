//! The decode node holds a prefix that the prefill node lacks: it is fetched, computed again, or the rest is left
//! to the decode node, as the expected times say. Whichever way it is, and whatever happens on it, the tokens are
//! those of one engine alone, and afterwards nobody holds anything.
//!
//! Seeded tests print their seed; `TANDEM_TEST_SEED=17 cargo test -p decode-node --test prefix` runs it alone.
#![allow(clippy::unwrap_used)]

mod cluster;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cluster::{Cluster, Finished, Shape, always, generate, holding, prompt, sampled, soon};
use common::ids::{Attempt, ChoiceIndex, RequestId};
use common::wire::{Generate, NodeError};
use kv_connector::transfer::{FaultPlan, FaultyTransport};

const NUM_HELD: usize = 320;
const NUM_TOKENS: usize = 400;

fn counted(label: &str, num: u64) -> BTreeMap<String, u64> {
    [(label.to_string(), num)].into()
}

/// Expected times that make one way the cheapest by far.
fn shape(choice: &str) -> Shape {
    let mut shape = Shape::default();
    shape.prefill.prefill_tokens_per_second = Some(1000);
    shape.prefill.fetch_bytes_per_second = Some(if choice == "fetch" { u64::MAX } else { 0 });
    shape.decode.local_prefill_tokens_per_second = Some(1_000_000);
    shape.decode.local_offer_max_tokens = if choice == "local" { 100 } else { 0 };
    shape
}

/// Lets the decode node compute a prompt by itself, and makes a longer one that begins with it.
async fn hold_prefix(cluster: &Cluster, number: u128) -> Generate {
    hold_tokens(cluster, number, NUM_HELD, NUM_TOKENS).await
}

async fn hold_tokens(cluster: &Cluster, number: u128, num_held: usize, num_tokens: usize) -> Generate {
    let text = prompt(num_tokens, number as u32);
    let first = generate(number * 100, text[..num_held + 1].to_vec(), sampled(1, 1));
    assert!(cluster.ask(&first).await.finish().await.timeline.is_local_prefill);
    let mut request = generate(number * 100 + 1, text, sampled(20, number as u64));
    request.prefill_candidates = vec![cluster.candidates()[0].clone()];
    request
}

async fn ask(cluster: &Cluster, request: &Generate) -> Finished {
    let answer = cluster.ask(request).await.finish().await;
    assert_eq!(answer.texts, cluster.undisturbed(request).await, "request {}", request.request);
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn cheap_transfer_is_taken_and_the_prefix_is_then_cached_at_the_prefill_node() {
    let cluster = Cluster::start(shape("fetch")).await;
    let granule_bytes = cluster.granule_bytes();
    let request = hold_prefix(&cluster, 1).await;
    let answer = ask(&cluster, &request).await;
    assert_eq!(cluster.prefix_choices(), counted("fetch", 1));
    assert!(!answer.timeline.is_local_prefill);
    assert_eq!(answer.timeline.num_fetched_tokens as usize, NUM_HELD);
    assert_eq!(answer.timeline.transferred_bytes, (NUM_TOKENS - NUM_HELD) as u64 / 16 * granule_bytes);
    let prefill = &cluster.prefills[0];
    assert_eq!(prefill.counter("tandem_kv_fetched_bytes_total"), NUM_HELD as u64 / 16 * granule_bytes);
    assert_eq!(prefill.counter("tandem_computed_tokens_total") as usize, NUM_TOKENS - NUM_HELD);

    // The decode node forgets; the prefill node has all of it, and computes the last tokens alone.
    cluster.is_clean().await;
    cluster.decode.engine.clear_cache();
    let again = Generate { request: RequestId(2), ..request };
    let answer = ask(&cluster, &again).await;
    assert_eq!((answer.timeline.num_cached_tokens, answer.timeline.num_fetched_tokens), (384, 0));
    assert_eq!(prefill.counter("tandem_computed_tokens_total") as usize, NUM_TOKENS - NUM_HELD + 16);
    assert_eq!(cluster.prefix_choices(), counted("fetch", 1), "nothing was lacking");
    assert_eq!((cluster.failed_fetches(), cluster.lost_candidates()), Default::default());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dear_transfer_is_not_taken_and_all_is_computed() {
    let cluster = Cluster::start(shape("recompute")).await;
    let request = hold_prefix(&cluster, 1).await;
    let answer = ask(&cluster, &request).await;
    assert_eq!(cluster.prefix_choices(), counted("recompute", 1));
    assert!(!answer.timeline.is_local_prefill);
    assert_eq!(answer.timeline.num_fetched_tokens, 0);
    assert_eq!(cluster.prefills[0].counter("tandem_computed_tokens_total") as usize, NUM_TOKENS);
    assert_eq!(cluster.prefills[0].counter("tandem_kv_fetched_bytes_total"), 0);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rest_that_is_cheaper_at_the_decode_node_is_left_to_it_and_nobody_is_blamed() {
    let cluster = Cluster::start(shape("local")).await;
    let mut request = hold_prefix(&cluster, 1).await;
    request.prefill_candidates = cluster.candidates();
    let before = cluster.decode.counter("tandem_computed_tokens_total");
    let answer = ask(&cluster, &request).await;
    assert_eq!(cluster.prefix_choices(), counted("local", 1));
    assert!(answer.timeline.is_local_prefill);
    let num_computed = cluster.decode.counter("tandem_computed_tokens_total") - before;
    assert_eq!(num_computed as usize, NUM_TOKENS - NUM_HELD + 19, "the rest, and the tokens that follow");
    assert_eq!(cluster.prefills[0].counter("tandem_computed_tokens_total"), 0);
    assert_eq!(cluster.lost_candidates(), BTreeMap::new());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rest_beyond_the_budget_is_not_offered() {
    let mut shape = shape("local");
    shape.decode.local_offer_max_tokens = (NUM_TOKENS - NUM_HELD) as u32 - 1;
    let cluster = Cluster::start(shape).await;
    let request = hold_prefix(&cluster, 1).await;
    assert!(!ask(&cluster, &request).await.timeline.is_local_prefill);
    assert_eq!(cluster.prefix_choices(), counted("recompute", 1));
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn second_turn_fetches_the_answer_of_the_first() {
    let cluster = Cluster::start(shape("fetch")).await;
    let mut turn = generate(1, prompt(100, 1), sampled(60, 1));
    turn.prefill_candidates = vec![cluster.candidates()[0].clone()];
    let answer = ask(&cluster, &turn).await;
    assert_eq!(cluster.prefix_choices(), BTreeMap::new(), "nobody held anything");
    let said = &answer.texts[&ChoiceIndex(0)];
    let text = [&turn.tokens.0[..], said, &prompt(50, 2)].concat();
    let mut next = generate(2, text, sampled(20, 2));
    next.prefill_candidates = turn.prefill_candidates;
    let answer = ask(&cluster, &next).await;
    // 96 of the 100 prompt tokens are the prefill node's own; the last token of an answer has no KV.
    assert_eq!(answer.timeline.num_fetched_tokens, 144 - 96);
    assert_eq!(cluster.prefix_choices(), counted("fetch", 1));
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prefix_is_paced_by_credit_and_may_be_larger_than_the_window() {
    let mut shape = shape("fetch");
    shape.prefill.fetch_credit_bytes = 1;
    let cluster = Cluster::start(shape).await;
    let request = hold_tokens(&cluster, 1, 2400, 2500).await;
    assert_eq!(ask(&cluster, &request).await.timeline.num_fetched_tokens, 2400);
    assert_eq!(cluster.failed_fetches(), BTreeMap::new());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_and_lost_prefixes_are_computed_and_late_and_repeated_ones_are_taken() {
    for seed in 0..5 {
        let (plan, failures) = always(seed);
        println!("{plan:?}");
        let mut shape = shape("fetch");
        shape.decode_layer = Some(FaultyTransport::layer(plan));
        shape.prefill.fetch_stall_timeout = Duration::from_millis(if failures.is_empty() { 10_000 } else { 300 });
        let cluster = Cluster::start(shape).await;
        let request = hold_prefix(&cluster, 1).await;
        let answer = ask(&cluster, &request).await;
        assert!(!answer.timeline.is_local_prefill);
        assert_eq!(cluster.prefix_choices(), counted("fetch", 1));
        let num_computed = cluster.prefills[0].counter("tandem_computed_tokens_total") as usize;
        let failed = cluster.failed_fetches();
        if failures.is_empty() {
            assert_eq!((failed, num_computed), (BTreeMap::new(), NUM_TOKENS - NUM_HELD));
        } else {
            assert!(failures.iter().any(|failure| failed == counted(failure, 1)), "{failed:?}");
            assert_eq!(num_computed, NUM_TOKENS);
        }
        assert_eq!(cluster.lost_candidates(), BTreeMap::new(), "the prefill node is not to blame");
        cluster.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_at_seeded_extents_change_no_token_and_what_arrived_whole_is_kept() {
    let seeds: Vec<u64> = match std::env::var("TANDEM_TEST_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..6).collect(),
    };
    let mut num_partly_fetched = 0;
    for seed in seeds {
        println!("seed {seed}");
        let mut shape = shape("fetch");
        let plan = FaultPlan { seed, corruption: 0.05, reset: 0.05, loss: 0.03, ..FaultPlan::default() };
        shape.decode_layer =
            Some(FaultyTransport::layer(FaultPlan { duplication: 0.3, delay_max: Duration::from_millis(5), ..plan }));
        shape.prefill.fetch_stall_timeout = Duration::from_millis(300);
        // One extent at a time, so that the first part is complete before the next one begins.
        shape.prefill.fetch_credit_bytes = 1;
        let cluster = Cluster::start(shape).await;
        for number in 1..=3 {
            let request = hold_tokens(&cluster, number, 2200, 2250).await;
            let answer = ask(&cluster, &request).await;
            num_partly_fetched += usize::from((1..2192).contains(&answer.timeline.num_fetched_tokens));
        }
        assert_eq!(cluster.prefix_choices(), counted("fetch", 3));
        cluster.end().await;
    }
    println!("{num_partly_fetched} were fetched in part");
    assert!(num_partly_fetched > 0 || std::env::var("TANDEM_TEST_SEED").is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn prefix_that_stands_still_is_computed_after_the_stall_timeout() {
    let (layer, _) = holding(u64::MAX);
    let mut shape = Shape { decode_layer: Some(layer), ..shape("fetch") };
    shape.prefill.fetch_stall_timeout = Duration::from_millis(300);
    let cluster = Cluster::start(shape).await;
    let request = hold_prefix(&cluster, 1).await;
    let answer = ask(&cluster, &request).await;
    assert!(answer.timeline.fetch >= Duration::from_millis(300));
    assert_eq!(cluster.failed_fetches(), counted("stalled", 1));
    assert_eq!(cluster.lost_candidates(), BTreeMap::new());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn decode_node_gives_up_a_fetch_that_stands_still_before_the_prefill_node() {
    let (layer, _) = holding(u64::MAX);
    let mut shape = Shape { decode_layer: Some(layer), ..shape("fetch") };
    shape.prefill.fetch_stall_timeout = Duration::from_secs(60);
    shape.decode.prefill_progress_timeout = Duration::from_secs(1);
    let cluster = Cluster::start(shape).await;
    let request = hold_prefix(&cluster, 1).await;
    assert!(!ask(&cluster, &request).await.timeline.is_local_prefill);
    assert_eq!(cluster.failed_fetches(), counted("stopped", 1));
    assert_eq!(cluster.lost_candidates(), BTreeMap::new());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn decode_node_that_failed_to_send_is_not_asked_again_at_once() {
    let (layer, _) = holding(u64::MAX);
    let mut shape = Shape { decode_layer: Some(layer), ..shape("fetch") };
    shape.prefill.fetch_stall_timeout = Duration::from_millis(200);
    // Measured from now on.
    shape.prefill.fetch_bytes_per_second = None;
    let cluster = Cluster::start(shape).await;
    let requests = [hold_prefix(&cluster, 1).await, hold_prefix(&cluster, 2).await];
    ask(&cluster, &requests[0]).await;
    assert_eq!(cluster.prefix_choices(), counted("fetch", 1));
    ask(&cluster, &requests[1]).await;
    assert_eq!(cluster.prefix_choices()["recompute"], 1);
    cluster.end().await;
}

/// Long enough that nothing but what the test does ends the fetch.
fn standing() -> (Shape, Arc<tokio::sync::Notify>) {
    let (layer, has_begun) = holding(u64::MAX);
    let mut shape = Shape { decode_layer: Some(layer), ..shape("fetch") };
    shape.prefill.fetch_stall_timeout = Duration::from_secs(60);
    shape.decode.prefill_progress_timeout = Duration::from_secs(60);
    (shape, has_begun)
}

#[tokio::test(flavor = "multi_thread")]
async fn client_that_leaves_midway_leaves_both_nodes_clean() {
    let (shape, has_begun) = standing();
    let cluster = Cluster::start(shape).await;
    let request = hold_prefix(&cluster, 1).await;
    let answer = cluster.ask(&request).await;
    soon("the fetch begins", has_begun.notified()).await;
    drop(answer);
    cluster.is_clean().await;
    assert_eq!(cluster.failed_fetches(), BTreeMap::new(), "nobody failed");
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn newer_attempt_ends_the_fetch_of_the_older_one() {
    let (shape, has_begun) = standing();
    let cluster = Cluster::start(shape).await;
    let mut request = hold_prefix(&cluster, 1).await;
    let first = cluster.ask(&request).await;
    soon("the fetch begins", has_begun.notified()).await;
    request.attempt = Attempt(2);
    request.prefill_candidates.clear();
    assert!(ask(&cluster, &request).await.timeline.is_local_prefill);
    assert_eq!(first.failure().await, NodeError::Superseded);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn decode_node_that_dies_midway_leaves_the_prefill_node_clean() {
    let (shape, has_begun) = standing();
    let cluster = Cluster::start(shape).await;
    let request = hold_prefix(&cluster, 1).await;
    let answer = cluster.ask(&request).await;
    soon("the fetch begins", has_begun.notified()).await;
    cluster.decode.fabric.close().await;
    drop(answer);
    cluster.prefills_are_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prefill_node_that_dies_midway_is_replaced_by_one_that_fetches_too() {
    let (layer, has_begun) = holding(1);
    let mut shape = Shape { decode_layer: Some(layer), ..shape("fetch") };
    shape.prefill.fetch_stall_timeout = Duration::from_secs(60);
    let cluster = Cluster::start(shape).await;
    let mut request = hold_prefix(&cluster, 1).await;
    request.prefill_candidates = cluster.candidates();
    let answer = cluster.ask(&request).await;
    soon("the fetch begins", has_begun.notified()).await;
    cluster.prefills[0].fabric.close().await;
    let answer = answer.finish().await;
    assert_eq!(answer.texts, cluster.undisturbed(&request).await);
    assert_eq!(answer.timeline.num_fetched_tokens as usize, NUM_HELD);
    assert_eq!(cluster.prefix_choices(), counted("fetch", 2));
    cluster.end().await;
}
