//! Prefill nodes that are processes of their own take prefixes from each other: a popular one is computed once and
//! spreads over the fabric, and whatever becomes of the node it comes from, every text is that of a run that
//! nothing disturbed.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use futures::future::join_all;
use serde_json::{Value, json};
use support::client::Answer;
use support::wait::{self, SOON};
use support::{Blow, Cluster, Seed, Shape, corpus};

/// Tokens that all prompts of a burst begin with: whole granules.
const NUM_SHARED: usize = 608;
const NUM_OWN: usize = 200;
const NUM_REQUESTS: usize = 8;
/// A burst follows its prefix until what waits there outweighs it, which a fast machine may not let happen.
const NUM_ROUNDS_MAX: usize = 10;

/// Two prefill nodes whose queues grow, for which fetching is always worth it, and decode nodes that never hold a
/// prefix themselves.
fn shape() -> Shape {
    Shape {
        num_prefill: 2,
        num_decode: 2,
        nodes: vec!["--threads", "1", "--kv-cache-memory-bytes", "32MiB", "--log-level", "info,prefill_node=debug"],
        prefill: vec![
            "--max-num-batched-tokens",
            "16",
            "--max-num-seqs",
            "16",
            "--prefill-tokens-per-second",
            "1",
            "--fetch-bytes-per-second",
            "1TB",
        ],
        decode: vec!["--no-enable-prefix-caching", "--local-offer-max-tokens", "0"],
        proxy: vec!["--retry-budget", "10"],
        ..Shape::default()
    }
}

/// Requests whose prompts begin alike.
fn burst(seed: Seed, purpose: u64) -> Vec<Value> {
    let mut rng = seed.stream(purpose);
    let shared = corpus::prompt(&mut rng, NUM_SHARED);
    let mut request = |index: usize| {
        let prompt = [&shared[..], &corpus::prompt(&mut rng, NUM_OWN)].concat();
        if index.is_multiple_of(2) { corpus::greedy(&prompt, 20) } else { corpus::sampled(&mut rng, &prompt, 20) }
    };
    (0..NUM_REQUESTS).map(&mut request).collect()
}

/// Has one prefill node compute what the prompts begin with, and waits until the proxy knows it.
async fn prime(cluster: &Cluster, requests: &[Value], salt: &str) {
    let indexed = async || cluster.metrics().await.sum("tandem_block_index_blocks", &[]);
    let cached = async || cluster.node_metrics().await.sum("tandem_kv_blocks_cached", &[]);
    cluster.settle().await;
    let before = cached().await;
    let shared = &requests[0]["prompt"].as_array().unwrap()[..NUM_SHARED + 1];
    let body = json!({"model": requests[0]["model"], "prompt": shared, "max_tokens": 1, "cache_salt": salt});
    cluster.api.complete(&body).await;
    cluster.settle().await;
    wait::until("the proxy knows where the prefix is", SOON, async || {
        let (indexed, cached) = (indexed().await, cached().await);
        // What two nodes hold counts once.
        let is_known = cached > before && indexed >= NUM_SHARED as f64 / 32.0;
        is_known.then_some(()).ok_or_else(|| format!("{indexed} blocks are indexed, {cached} are cached"))
    })
    .await;
}

fn salted(requests: &[Value], salt: &str) -> Vec<Value> {
    requests.iter().map(|body| corpus::with(body.clone(), json!({"cache_salt": salt}))).collect()
}

/// All of them at once.
async fn ask(cluster: &Cluster, requests: &[Value], salt: &str) -> Vec<Answer> {
    join_all(salted(requests, salt).iter().map(|body| cluster.api.complete(body))).await
}

/// The texts of requests that come one after the other, each with a prefix of its own: nothing is fetched for them.
async fn undisturbed(cluster: &Cluster, requests: &[Value]) -> Vec<Answer> {
    let mut answers = Vec::new();
    for (index, body) in requests.iter().enumerate() {
        let body = corpus::with(body.clone(), json!({"cache_salt": format!("alone {index}")}));
        answers.push(cluster.api.complete(&body).await);
    }
    let choices = cluster.metrics().await.by_label("tandem_prefix_choices_total", "choice");
    assert!(choices.is_empty(), "{choices:?}");
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn popular_prefix_is_computed_once_and_spreads_to_the_other_node() {
    let requests = burst(Seed::draw(), 1);
    let cluster = Cluster::start(shape()).await;
    let expected = undisturbed(&cluster, &requests).await;
    for round in 0..NUM_ROUNDS_MAX {
        let salt = format!("round {round}");
        prime(&cluster, &requests, &salt).await;
        let before = cluster.metrics().await;
        assert_eq!(ask(&cluster, &requests, &salt).await, expected, "{salt}");
        cluster.settle().await;
        let after = cluster.metrics().await;
        let rise = |name: &str, labels: &[(&str, &str)]| after.sum(name, labels) - before.sum(name, labels);
        let num_computed = rise("tandem_computed_tokens_total", &[("role", "prefill-node")]);
        assert_eq!(num_computed as usize, NUM_REQUESTS * NUM_OWN, "{salt}: what they share was computed before");
        assert_eq!(rise("tandem_prefix_fetches_failed_total", &[]), 0.0);
        let num_fetches = rise("tandem_prefix_choices_total", &[("choice", "peer")]);
        if num_fetches == 0.0 {
            continue;
        }
        assert_eq!(rise("tandem_prefixes_served_total", &[("end", "sent")]), num_fetches);
        assert!(rise("tandem_prefix_peers_named_total", &[]) >= num_fetches);
        let fetched = rise("tandem_kv_fetched_bytes_total", &[]);
        assert_eq!(rise("tandem_peer_sent_bytes_total", &[]), fetched);
        return cluster.shut_down().await;
    }
    panic!("{NUM_ROUNDS_MAX} bursts all stayed at the node that held their prefix");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_tenants_do_not_get_it_from_a_peer_either() {
    let requests = burst(Seed::draw(), 2);
    let cluster = Cluster::start(shape()).await;
    prime(&cluster, &requests, "alice").await;
    let before = cluster.metrics().await;
    cluster.api.complete(&salted(&requests, "bob")[0]).await;
    cluster.settle().await;
    let after = cluster.metrics().await;
    let rise = |name: &str| after.sum(name, &[]) - before.sum(name, &[]);
    for name in [
        "tandem_believed_cached_tokens_total",
        "tandem_prefix_peers_named_total",
        "tandem_prefixes_served_total",
        "tandem_prefix_choices_total",
    ] {
        assert_eq!(rise(name), 0.0, "{name}");
    }
    cluster.shut_down().await;
}

/// A burst, and a blow at a prefill node once it sends a prefix to the other. Says whether that was seen.
async fn round(cluster: &mut Cluster, requests: &[Value], salt: &str, kind: Blow) -> (Vec<Answer>, bool) {
    let prefills = || cluster.nodes.iter().filter(|node| node.role == "prefill-node");
    let read: BTreeMap<_, _> =
        prefills().map(|node| (node.process.name().to_string(), node.process.log().len())).collect();
    let api = cluster.api.clone();
    let bodies = salted(requests, salt);
    let running = tokio::spawn(async move { join_all(bodies.iter().map(|body| api.complete(body))).await });
    let mut victim = None;
    wait::until("a prefix is sent, or all is answered", SOON, async || {
        let serves = |name: &str, log: &str| log[read[name].min(log.len())..].contains("serves a prefix");
        victim = prefills()
            .map(|node| (node.process.name().to_string(), node.process.log()))
            .find(|(name, log)| serves(name, log))
            .map(|(name, _)| name);
        (victim.is_some() || running.is_finished()).then_some(()).ok_or_else(|| "neither".to_string())
    })
    .await;
    if let Some(name) = &victim {
        kind.strike(cluster, name);
    }
    let answers = wait::within("every request ends", Duration::from_secs(90), running).await.unwrap();
    if let Some(name) = &victim {
        kind.repair(cluster, name).await;
    }
    cluster.all_known().await;
    (answers, victim.is_some())
}

async fn texts_survive(kind: Blow, purpose: u64) {
    let requests = burst(Seed::draw(), purpose);
    let mut shape = shape();
    // In small pieces, so that the blow falls in the middle.
    shape.prefill.extend(["--fetch-credit-bytes", "4KiB"]);
    let mut cluster = Cluster::start(shape).await;
    let expected = undisturbed(&cluster, &requests).await;
    let mut num_seen = 0;
    for index in 0..NUM_ROUNDS_MAX {
        let salt = format!("round {index}");
        prime(&cluster, &requests, &salt).await;
        let (answers, is_seen) = round(&mut cluster, &requests, &salt, kind).await;
        assert_eq!(answers, expected, "{kind:?}, {salt}");
        num_seen += usize::from(is_seen);
        if num_seen == 2 {
            break;
        }
    }
    assert!(num_seen > 0, "no prefix was ever sent");
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_survive_a_kill_of_the_node_that_sends_a_prefix() {
    texts_survive(Blow::Kill, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_survive_a_freeze_of_the_node_that_sends_a_prefix() {
    texts_survive(Blow::Freeze, 4).await;
}
