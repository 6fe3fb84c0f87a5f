//! The proxy knows what its nodes hold, in their pools and in their host tiers, and sends requests there: through
//! restarts of nodes and proxy, within its bound, and never across tenants.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::{Value, json};
use support::client::Api;
use support::metrics::Scrape;
use support::{Cluster, Seed, Shape, corpus, wait};

/// Nodes whose blocks have 32 tokens.
fn shape(num_prefill: usize, num_decode: usize) -> Shape {
    let mut shape = Shape { num_prefill, num_decode, ..Shape::default() };
    shape.nodes.extend(["--block-size", "32"]);
    shape
}

/// Tokens of a prompt that fills a pool of [`small_pools`].
const NUM_FILLING: usize = 490;
/// Of them, in full granules and in full blocks.
const NUM_KEPT: u64 = 480;
const NUM_KEPT_GRANULES: usize = 30;
/// What an entry of the host tier counts for: 1 KiB for each of 16 tokens, its header, what the cache needs.
const ENTRY_BYTES: f64 = 16.0 * 1024.0 + 128.0 + 256.0;

/// Who prefills: two prefill nodes, or two decode nodes for themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prefilled {
    Apart,
    Locally,
}

/// Two nodes that prefill, and load whatever their host tier has. One prompt fills a pool: what was there before is
/// in the host tier alone, as long as that has room.
fn small_pools(prefilled: Prefilled, host_bytes: &'static str) -> Shape {
    let nodes = vec!["--threads", "1", "--block-size", "32", "--kv-cache-memory-bytes", "512KiB"];
    let mut store = vec!["--store-host-bytes", host_bytes, "--store-bytes-per-second", "1000GB"];
    // The machine may be busy, which is not what these tests are about.
    store.extend(["--store-load-stall-timeout", "1m"]);
    // A decode node that does not prefill shall not hold prefixes either.
    let bare = vec!["--no-enable-prefix-caching", "--local-offer-max-tokens", "0"];
    match prefilled {
        Prefilled::Apart => {
            Shape { num_prefill: 2, num_decode: 1, nodes, prefill: store, decode: bare, ..Shape::default() }
        }
        Prefilled::Locally => Shape { num_prefill: 0, num_decode: 2, nodes, decode: store, ..Shape::default() },
    }
}

/// Asks for the first time, and waits until the host tier of the node that answers has it.
async fn fill_and_publish(cluster: &Cluster, texts: &[Vec<u32>]) {
    for (number, text) in texts.iter().enumerate() {
        assert_eq!(cached_tokens(&cluster.api, &body(text)).await, 0);
        cluster.settle().await;
        wait::until("it is in the host tier", wait::SOON, async || {
            let scrape = cluster.node_metrics().await;
            let written = scrape.sum("tandem_store_written_total", &[("tier", "host")]);
            let is_done = written == ((number + 1) * NUM_KEPT_GRANULES) as f64
                && scrape.sum("tandem_store_publications", &[]) == 0.0;
            is_done.then_some(()).ok_or_else(|| format!("{written} entries are"))
        })
        .await;
    }
}

/// Granules that the host tiers hold.
async fn num_on_hosts(cluster: &Cluster) -> f64 {
    cluster.node_metrics().await.sum("tandem_store_used_bytes", &[("tier", "host")]) / ENTRY_BYTES
}

fn body(prompt: &[u32]) -> Value {
    corpus::greedy(prompt, 4)
}

/// Prompt tokens that were cached, as the answer tells.
async fn cached_tokens(api: &Api, body: &Value) -> u64 {
    let reply = api.post("/v1/completions", body).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    reply.body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

fn index_blocks(scrape: &Scrape) -> f64 {
    scrape.sum("tandem_block_index_blocks", &[])
}

/// Waits until the index has `num_blocks`.
async fn index_has(cluster: &Cluster, num_blocks: f64) {
    wait::until("the index is complete", wait::SOON, async || {
        let found = index_blocks(&cluster.api.try_metrics().await?);
        if found == num_blocks { Ok(()) } else { Err(format!("it has {found} blocks, expected {num_blocks}")) }
    })
    .await;
}

/// Waits until the index has what all nodes have cached; no two nodes hold the same here.
async fn index_is_what_nodes_hold(cluster: &Cluster) -> f64 {
    cluster.settle().await;
    let held = cluster.node_metrics().await.sum("tandem_kv_blocks_cached", &[]);
    index_has(cluster, held).await;
    held
}

fn believed(scrape: &Scrape) -> f64 {
    scrape.sum("tandem_believed_cached_tokens_total", &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn second_turn_goes_where_the_first_one_was_computed() {
    let seed = Seed::draw();
    let mut rng = seed.stream(1);
    let cluster = Cluster::start(shape(2, 2)).await;
    let texts: Vec<Vec<u32>> = (0..5).map(|_| corpus::prompt(&mut rng, 450)).collect();
    // 400 tokens are twelve full blocks, at a prefill and at a decode node.
    for text in &texts {
        assert_eq!(cached_tokens(&cluster.api, &body(&text[..400])).await, 0);
    }
    cluster.settle().await;
    index_has(&cluster, 5.0 * 12.0).await;
    let before = cluster.metrics().await;
    // One by one, an odd number of them: taking turns would send each to the other nodes.
    for text in &texts {
        assert_eq!(cached_tokens(&cluster.api, &body(text)).await, 384);
    }
    let after = cluster.metrics().await;
    let rise = |name: &str, labels: &[(&str, &str)]| after.sum(name, labels) - before.sum(name, labels);
    assert_eq!(rise("tandem_computed_tokens_total", &[("role", "prefill-node")]), 5.0 * (450.0 - 384.0));
    for role in ["prefill-node", "decode-node"] {
        assert_eq!(rise("tandem_believed_cached_tokens_total", &[("node_role", role)]), 5.0 * 384.0, "{role}");
    }
    assert_eq!(after.sum("tandem_believed_cached_error_tokens_total", &[]), 0.0, "what was believed was so");
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prefix_that_only_a_host_tier_holds_is_routed_to_that_node() {
    let seed = Seed::draw();
    let mut rng = seed.stream(5);
    for prefilled in [Prefilled::Locally, Prefilled::Apart] {
        let cluster = Cluster::start(small_pools(prefilled, "16MiB")).await;
        let texts: Vec<Vec<u32>> = (0..5).map(|_| corpus::prompt(&mut rng, NUM_FILLING)).collect();
        fill_and_publish(&cluster, &texts).await;
        let num_granules = num_on_hosts(&cluster).await;
        assert_eq!(num_granules, 5.0 * NUM_KEPT_GRANULES as f64, "{prefilled:?}");
        // What the pools still have is among them.
        index_has(&cluster, num_granules).await;
        let before = cluster.metrics().await;
        // An odd number of them again: by turns, each would go to the node that never saw it.
        for text in &texts {
            assert_eq!(cached_tokens(&cluster.api, &body(text)).await, NUM_KEPT, "{prefilled:?}");
        }
        let after = cluster.metrics().await;
        let rise = |name: &str, labels: &[(&str, &str)]| after.sum(name, labels) - before.sum(name, labels);
        assert_eq!(rise("tandem_believed_cached_tokens_total", &[]), 5.0 * NUM_KEPT as f64, "{prefilled:?}");
        let num_in_tier = rise("tandem_believed_cached_tokens_total", &[("held_in", "tier")]);
        assert!(num_in_tier >= 3.0 * NUM_KEPT as f64, "{prefilled:?}: {num_in_tier} tokens in a tier");
        assert!(rise("tandem_store_loaded_tokens_total", &[]) >= 3.0 * NUM_KEPT as f64, "{prefilled:?}");
        cluster.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prefix_that_left_the_host_tier_too_is_routed_to_no_longer() {
    let seed = Seed::draw();
    let mut rng = seed.stream(6);
    // Room for one such prompt and one granule more.
    let mut cluster = Cluster::start(small_pools(Prefilled::Locally, "512KiB")).await;
    let texts: Vec<Vec<u32>> = (0..5).map(|_| corpus::prompt(&mut rng, NUM_FILLING)).collect();
    fill_and_publish(&cluster, &texts).await;
    let num_granules = num_on_hosts(&cluster).await;
    assert!(num_granules < 3.0 * NUM_KEPT_GRANULES as f64, "{num_granules} granules are kept");
    // Another proxy knows nothing but what is there now.
    cluster.restart_proxy().await;
    index_has(&cluster, num_granules).await;
    assert_eq!(cached_tokens(&cluster.api, &body(&texts[4])).await, NUM_KEPT);
    let before = believed(&cluster.metrics().await);
    assert_eq!(before, NUM_KEPT as f64);
    assert_eq!(cached_tokens(&cluster.api, &body(&texts[0])).await, 0);
    assert_eq!(believed(&cluster.metrics().await), before, "nobody is believed to hold what nobody holds");
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn index_follows_nodes_and_proxy_through_their_lives() {
    let seed = Seed::draw();
    let mut rng = seed.stream(2);
    // Decode nodes alone, that take turns: each prompt is at one of them.
    let mut cluster = Cluster::start(shape(0, 2)).await;
    let texts: Vec<Vec<u32>> = (0..5).map(|_| corpus::prompt(&mut rng, 300)).collect();
    for text in &texts {
        cached_tokens(&cluster.api, &body(text)).await;
    }
    let num_all = index_is_what_nodes_hold(&cluster).await;
    assert_eq!(num_all, 5.0 * 9.0);

    // The network was away: the same life goes on where it was.
    let restarts = |scrape: &Scrape| scrape.sum("tandem_block_index_restarts_total", &[]);
    let before = restarts(&cluster.metrics().await);
    cluster.node("decode-1").freeze();
    cluster.all_known().await;
    cluster.node("decode-1").thaw();
    cluster.all_known().await;
    assert_eq!(index_is_what_nodes_hold(&cluster).await, num_all);
    assert_eq!(restarts(&cluster.metrics().await), before, "a life that was known is learnt from nothing");

    // Another life holds nothing.
    cluster.restart("decode-0").await;
    cluster.all_known().await;
    let num_left = index_is_what_nodes_hold(&cluster).await;
    assert!(num_left > 0.0 && num_left < num_all, "{num_left} of {num_all} blocks are left");

    // A proxy has nothing that the nodes cannot tell it.
    cluster.restart_proxy().await;
    assert_eq!(index_is_what_nodes_hold(&cluster).await, num_left);
    let mut num_cached = 0;
    for text in &texts {
        num_cached += cached_tokens(&cluster.api, &body(text)).await;
    }
    assert_eq!(num_cached as f64, num_left * 32.0, "each prompt that is held goes where it is");
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_index_says_what_it_leaves_out() {
    let seed = Seed::draw();
    let mut rng = seed.stream(3);
    let mut cluster = Cluster::start(Shape { proxy: vec!["--block-index-max-blocks", "10"], ..shape(0, 1) }).await;
    let texts: Vec<Vec<u32>> = (0..4).map(|_| corpus::prompt(&mut rng, 300)).collect();
    for text in &texts {
        cached_tokens(&cluster.api, &body(text)).await;
    }
    cluster.settle().await;
    wait::until("all is left out that does not fit", wait::SOON, async || {
        let scrape = cluster.api.try_metrics().await?;
        let dropped = scrape.sum("tandem_block_index_dropped_total", &[]);
        let found = (index_blocks(&scrape), dropped);
        if found == (10.0, 26.0) { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    cluster.proxy.log_line("that it is full", |line| line.contains("the block index is full").then_some(())).await;
    // It is a hint and nothing else: the node finds its blocks all the same.
    for text in &texts {
        assert_eq!(cached_tokens(&cluster.api, &body(text)).await, 288);
    }
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_tenant_finds_or_follows_the_prefix_of_another() {
    let seed = Seed::draw();
    let text = corpus::prompt(&mut seed.stream(4), 300);
    let proxy = vec!["--api-key", "alice,bob", "--block-index-max-blocks", "1000"];
    let cluster = Cluster::start(Shape { proxy, ..shape(1, 2) }).await;
    let (alice, bob) = (cluster.api.with_key("alice"), cluster.api.with_key("bob"));
    let salted = |salt: &str| corpus::with(body(&text), json!({"cache_salt": salt}));
    assert_eq!(cached_tokens(&alice, &body(&text)).await, 0);
    cluster.settle().await;
    index_has(&cluster, 9.0).await;
    // Whoever asks with another key or another salt is a stranger, to the nodes and to the router.
    let before = believed(&cluster.metrics().await);
    for (number, (api, body)) in
        [(&bob, body(&text)), (&alice, salted("one")), (&alice, salted("two")), (&bob, salted("one"))]
            .iter()
            .enumerate()
    {
        assert_eq!(cached_tokens(api, body).await, 0, "stranger {number}");
    }
    cluster.settle().await;
    assert_eq!(believed(&cluster.metrics().await), before, "a stranger was routed by another's prefix");
    // Each finds its own.
    index_has(&cluster, 5.0 * 9.0).await;
    for (api, body) in [(&alice, body(&text)), (&bob, body(&text)), (&alice, salted("two"))] {
        assert_eq!(cached_tokens(api, &body).await, 288);
    }
    assert!(believed(&cluster.metrics().await) > before);
    cluster.shut_down().await;
}
