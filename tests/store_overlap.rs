//! A stored prefix of which one part is computed while the other is loaded, between real processes: both parts are
//! what they should be, whatever becomes of the storage meanwhile, and the tokens are those of a run without it.
//!
//! The answers of the storage pass a relay that holds them back, so that a test sees the front computed before the
//! rest can have come.
#![allow(clippy::unwrap_used)]

#[path = "support/redis.rs"]
mod redis;
#[path = "support/relay.rs"]
mod relay;
mod support;

use redis::Redis;
use relay::Relay;
use serde_json::Value;
use support::client::Answer;
use support::wait::{self, SOON};
use support::{Cluster, Seed, Shape, corpus};

const NUM_PROMPT: usize = 300;
const NUM_GRANULES: usize = 18;
/// Of the prompt, in full granules and never with the last token.
const NUM_STORED: f64 = 288.0;
/// Of them, where both sides are expected to meet with these speeds: 288 x 1000 / (1000 + 969), in blocks.
const NUM_COMPUTED: f64 = 144.0;
const SPEEDS: [&str; 2] = ["--store-bytes-per-second", "1000000"];
const COMPUTE_SPEED: &str = "1000";
/// Looking up a prompt takes less, one entry takes more.
const LOOKUP_BYTES: usize = 12 * 1024;
/// Eight entries of 16,512 bytes may be on their way at a time: with these one at least is complete, and fewer than
/// the nine that are wanted.
const SOME_BYTES: usize = 144 * 1024;

/// Nodes that load over `relay`, and have no other way to a prefix. Nothing ends by time.
fn shape(num_prefill: usize, relay: &Relay) -> Shape {
    let mut shape = Shape { num_prefill, ..Shape::default() };
    // Flags of a test live as long as the test's process.
    let url: &str = String::leak(format!("redis://127.0.0.1:{}/0?root=tandem", relay.port()));
    shape.nodes.extend(["--store-remote-url", url, "--store-remote-timeout", "120s"]);
    shape.nodes.extend(["--store-load-stall-timeout", "120s"]);
    shape.nodes.extend(SPEEDS);
    shape.prefill.extend(["--fetch-bytes-per-second", "0", "--prefill-tokens-per-second", COMPUTE_SPEED]);
    shape.decode.extend(["--local-offer-max-tokens", "0", "--local-prefill-tokens-per-second", COMPUTE_SPEED]);
    shape.decode.extend(["--prefill-progress-timeout", "120s"]);
    shape
}

/// A cluster whose storage holds the prompt and whose pools do not, and the node that will compute it.
async fn forgetful(num_prefill: usize, relay: &Relay, request: &Value, expected: &Answer) -> Cluster {
    let mut cluster = Cluster::start(shape(num_prefill, relay)).await;
    assert_eq!(&cluster.api.complete(request).await, expected);
    cluster.settle().await;
    wait::until("the entries are written", SOON, async || {
        let scrape = cluster.metrics().await;
        let found = scrape.sum("tandem_store_written_total", &[]);
        let is_done = scrape.sum("tandem_store_publications", &[]) == 0.0 && found >= NUM_GRANULES as f64;
        is_done.then_some(()).ok_or_else(|| format!("{found} of {NUM_GRANULES}"))
    })
    .await;
    for index in 0..num_prefill {
        cluster.restart(&format!("prefill-{index}")).await;
    }
    cluster.restart("decode-0").await;
    cluster.all_known().await;
    cluster
}

fn role_of(num_prefill: usize) -> &'static str {
    if num_prefill == 0 { "decode-node" } else { "prefill-node" }
}

async fn sum(cluster: &Cluster, name: &str, labels: &[(&str, &str)]) -> f64 {
    cluster.metrics().await.sum(name, labels)
}

async fn is_reached(cluster: &Cluster, name: &str, labels: &[(&str, &str)], expected: f64) {
    wait::until(name, SOON, async || {
        let found = sum(cluster, name, labels).await;
        (found >= expected).then_some(()).ok_or_else(|| format!("{found} of {expected}"))
    })
    .await;
}

/// The answer, and the prompt tokens whose KV was there.
async fn ask(cluster: &Cluster, request: &Value) -> (Answer, f64) {
    let reply = cluster.api.post("/v1/completions", request).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let cached = reply.body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    (Answer::of_body(&reply.body), cached.unwrap_or(0) as f64)
}

async fn request_and_answer(stream: u64) -> (Value, Answer) {
    let request = corpus::greedy(&corpus::prompt(&mut Seed::draw().stream(stream), NUM_PROMPT), 1);
    let cluster = Cluster::start(Shape::default()).await;
    let answer = cluster.api.complete(&request).await;
    cluster.shut_down().await;
    (request, answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_front_is_computed_while_the_rest_is_loaded() {
    let (request, expected) = request_and_answer(0).await;
    for num_prefill in [1, 0] {
        let redis = Redis::start();
        let relay = Relay::to(redis.port()).await;
        let cluster = forgetful(num_prefill, &relay, &request, &expected).await;
        let role = [("role", role_of(num_prefill))];
        relay.hold_after(LOOKUP_BYTES);
        let asking = ask(&cluster, &request);
        let opening = async {
            is_reached(&cluster, "tandem_computed_tokens_total", &role, NUM_COMPUTED).await;
            assert_eq!(sum(&cluster, "tandem_store_loaded_tokens_total", &[]).await, 0.0);
            relay.open();
        };
        let ((answer, cached), ()) = tokio::join!(asking, opening);
        assert_eq!(answer, expected, "{role:?}");
        assert_eq!(cached, NUM_STORED - NUM_COMPUTED, "{role:?}");
        let scrape = cluster.metrics().await;
        assert_eq!(scrape.sum("tandem_store_loaded_tokens_total", &[]), NUM_STORED - NUM_COMPUTED, "{role:?}");
        assert_eq!(scrape.sum("tandem_store_overlapped_tokens_total", &[]), NUM_COMPUTED, "{role:?}");
        assert_eq!(scrape.sum("tandem_store_loads_total", &[("end", "met")]), 1.0, "{role:?}");
        let computed = scrape.sum("tandem_computed_tokens_total", &role);
        assert_eq!(computed, NUM_PROMPT as f64 - (NUM_STORED - NUM_COMPUTED), "{role:?}");
        cluster.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_that_is_lost_meanwhile_leaves_what_has_come_and_the_rest_is_computed() {
    let (request, expected) = request_and_answer(1).await;
    for num_prefill in [1, 0] {
        let mut redis = Redis::start();
        let relay = Relay::to(redis.port()).await;
        let cluster = forgetful(num_prefill, &relay, &request, &expected).await;
        let role = [("role", role_of(num_prefill))];
        relay.hold_after(SOME_BYTES);
        let asking = ask(&cluster, &request);
        let losing = async {
            is_reached(&cluster, "tandem_computed_tokens_total", &role, NUM_COMPUTED).await;
            is_reached(&cluster, "tandem_store_hits_total", &[], 1.0).await;
            redis.kill();
            relay.cut();
        };
        let ((answer, cached), ()) = tokio::join!(asking, losing);
        assert_eq!(answer, expected, "{role:?}");
        let scrape = cluster.metrics().await;
        assert_eq!(scrape.sum("tandem_store_loads_total", &[("end", "missing")]), 1.0, "{role:?}");
        let loaded = scrape.sum("tandem_store_loaded_tokens_total", &[]);
        assert!((1.0..NUM_STORED - NUM_COMPUTED).contains(&loaded), "{role:?}: {loaded}");
        assert_eq!(cached, loaded, "{role:?}");
        assert_eq!(scrape.sum("tandem_computed_tokens_total", &role), NUM_PROMPT as f64 - loaded, "{role:?}");
        cluster.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_meanwhile_ends_both() {
    let (request, expected) = request_and_answer(2).await;
    for num_prefill in [1, 0] {
        let redis = Redis::start();
        let relay = Relay::to(redis.port()).await;
        let cluster = forgetful(num_prefill, &relay, &request, &expected).await;
        let role = [("role", role_of(num_prefill))];
        relay.hold_after(LOOKUP_BYTES);
        tokio::select! {
            answer = ask(&cluster, &request) => panic!("{role:?}: {answer:?} before the rest was there"),
            () = is_reached(&cluster, "tandem_computed_tokens_total", &role, NUM_COMPUTED) => {}
        }
        // It waits for what is loaded; no block is held once the client is gone.
        cluster.settle().await;
        relay.open();
        let (answer, _) = ask(&cluster, &request).await;
        assert_eq!(answer, expected, "{role:?}");
        cluster.shut_down().await;
    }
}
