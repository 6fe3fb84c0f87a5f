//! The prefix-block store between real processes: KV that was computed once is not computed again, wherever and
//! whenever it is wanted, and whatever becomes of the store, the tokens are those of a run without it.
#![allow(clippy::unwrap_used)]

#[path = "support/redis.rs"]
mod redis;
mod support;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::future::join_all;
use redis::Redis;
use serde_json::{Value, json};
use support::client::{Answer, Api};
use support::wait::{self, SOON};
use support::{Cluster, Seed, Shape, corpus};

const NUM_PROMPT: usize = 300;
/// Of them, in full granules and never with the last one.
const NUM_STORED: f64 = 288.0;

/// Ways to get at a prefix that have nothing to do with the store are shut, and loading is always worth it.
const STORE_ALONE: [&str; 2] = ["--store-bytes-per-second", "1000GB"];
const NO_FETCH: [&str; 2] = ["--fetch-bytes-per-second", "0"];
const NO_OFFER: [&str; 2] = ["--local-offer-max-tokens", "0"];

/// A cluster whose nodes have these flags beside those that leave the store alone at work.
fn shape(num_prefill: usize, num_decode: usize, flags: &[&str]) -> Shape {
    let mut shape = Shape { num_prefill, num_decode, ..Shape::default() };
    // Flags of a test live as long as the test's process.
    shape.nodes.extend(flags.iter().map(|flag| &*String::leak(flag.to_string())));
    shape.nodes.extend(STORE_ALONE);
    // The machine may be busy, which is not what these tests are about.
    shape.nodes.extend(["--store-remote-timeout", "5s"]);
    shape.prefill.extend(NO_FETCH);
    shape.decode.extend(NO_OFFER);
    shape
}

/// A folder of this test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("e2e-store-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn url(&self) -> String {
        format!("fs://{}", self.0.display())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed is left to `cargo clean`.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Asks and returns the answer with the prompt tokens whose KV was there.
async fn ask(api: &Api, body: &Value) -> (Answer, u64) {
    let reply = api.post("/v1/completions", body).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let cached = reply.body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    (Answer::of_body(&reply.body), cached.unwrap_or(0))
}

async fn sum(cluster: &Cluster, name: &str, labels: &[(&str, &str)]) -> f64 {
    cluster.metrics().await.sum(name, labels)
}

async fn loaded(cluster: &Cluster) -> f64 {
    sum(cluster, "tandem_store_loaded_tokens_total", &[]).await
}

/// Waits until everything that was computed is where it belongs: so many entries of a tier, at least.
async fn written(cluster: &Cluster, tier: &str, num_entries: usize) {
    cluster.settle().await;
    wait::until("the entries are written", SOON, async || {
        let scrape = cluster.metrics().await;
        let waiting = ["tandem_store_publications", "tandem_store_queue_bytes"].map(|name| scrape.sum(name, &[]));
        let found = scrape.sum("tandem_store_written_total", &[("tier", tier)]);
        let is_done = waiting == [0.0, 0.0] && found >= num_entries as f64;
        is_done.then_some(()).ok_or_else(|| format!("{found} of {num_entries} are, {waiting:?} wait"))
    })
    .await;
}

/// The answers of a cluster without a store.
async fn without_store(requests: &[Value]) -> Vec<Answer> {
    let cluster = Cluster::start(shape(1, 1, &[])).await;
    let mut answers = Vec::new();
    for request in requests {
        answers.push(cluster.api.complete(request).await);
    }
    assert_eq!(loaded(&cluster).await, 0.0);
    cluster.shut_down().await;
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_computed_on_one_node_is_used_by_another_without_recomputing() {
    let seed = Seed::draw();
    let mut rng = seed.stream(0);
    let requests = [(); 2].map(|()| corpus::greedy(&corpus::prompt(&mut rng, NUM_PROMPT), 20));
    let expected = without_store(&requests).await;
    let (folder, redis) = (Folder::new(), Redis::start());
    for url in [folder.url(), redis.url()] {
        let mut cluster = Cluster::start(shape(2, 2, &["--store-remote-url", &url])).await;
        let (answer, cached) = ask(&cluster.api, &requests[0]).await;
        assert_eq!((&answer, cached), (&expected[0], 0), "{url}");
        written(&cluster, "remote", 18).await;
        // Those that have it in their pools go.
        let computed = cluster.metrics().await.by_node("tandem_computed_tokens_total", &[]);
        for (node, _) in computed.iter().filter(|(_, num)| **num > 0.0) {
            cluster.node(node).process.kill();
        }
        cluster.all_known().await;
        let (answer, cached) = ask(&cluster.api, &requests[0]).await;
        assert_eq!(answer, expected[0], "{url}");
        assert_eq!(cached as f64, NUM_STORED, "{url}");
        assert_eq!(loaded(&cluster).await, NUM_STORED, "{url}");
        let computed = sum(&cluster, "tandem_computed_tokens_total", &[("role", "prefill-node")]).await;
        assert_eq!(computed, NUM_PROMPT as f64 - NUM_STORED, "{url}: only what no full granule covers");
        // Another prompt is another prefix.
        let (answer, cached) = ask(&cluster.api, &requests[1]).await;
        assert_eq!((&answer, cached), (&expected[1], 0), "{url}");
        assert_eq!(loaded(&cluster).await, NUM_STORED, "{url}");
        cluster.settle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_turn_of_a_conversation_prefills_only_its_new_text() {
    const SAID: u32 = 77;
    let mut rng = Seed::draw().stream(1);
    let first_prompt = corpus::prompt(&mut rng, 100);
    let said = corpus::with(corpus::greedy(&first_prompt, 60), json!({"logit_bias": {SAID.to_string(): 100}}));
    let new_text = corpus::prompt(&mut rng, 40);
    let conversation = [&first_prompt[..], &[SAID; 60], &new_text].concat();
    let second = corpus::greedy(&conversation, 20);
    let expected = without_store(&[said.clone(), second.clone()]).await;
    let folder = Folder::new();
    let cluster = Cluster::start(shape(1, 1, &["--store-remote-url", &folder.url()])).await;
    assert_eq!(cluster.api.complete(&said).await, expected[0]);
    // Prompt and answer have 9 full granules with KV: 160 tokens without the last.
    written(&cluster, "remote", 9).await;
    let before = sum(&cluster, "tandem_computed_tokens_total", &[("role", "prefill-node")]).await;
    assert_eq!(before, 100.0);
    let (answer, cached) = ask(&cluster.api, &second).await;
    assert_eq!(answer, expected[1]);
    assert_eq!(cached, 144);
    let after = sum(&cluster, "tandem_computed_tokens_total", &[("role", "prefill-node")]).await;
    assert_eq!(after - before, 200.0 - 144.0);
    assert_eq!(loaded(&cluster).await, 144.0 - 96.0, "what the prefill node has not computed itself");
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_survives_the_restart_of_a_node_on_its_disk_and_of_all_in_shared_storage() {
    let request = corpus::greedy(&corpus::prompt(&mut Seed::draw().stream(2), NUM_PROMPT), 20);
    let expected = without_store(std::slice::from_ref(&request)).await;
    let (folder, redis) = (Folder::new(), Redis::start());
    let disk = folder.0.display().to_string();
    let on_disk = ["--store-disk-path", &disk, "--store-disk-bytes", "16MiB"];
    for (tier, flags) in [("disk", on_disk.to_vec()), ("remote", vec!["--store-remote-url", &redis.url()])] {
        let mut cluster = Cluster::start(shape(1, 1, &flags)).await;
        assert_eq!(cluster.api.complete(&request).await, expected[0]);
        // Each node has a disk, and the decode node's answer fills no granule more; shared storage has each once.
        written(&cluster, tier, if tier == "disk" { 36 } else { 18 }).await;
        cluster.restart("prefill-0").await;
        cluster.restart("decode-0").await;
        if tier == "remote" {
            cluster.restart_proxy().await;
        }
        cluster.all_known().await;
        let (answer, cached) = ask(&cluster.api, &request).await;
        assert_eq!((&answer, cached as f64), (&expected[0], NUM_STORED), "{tier}");
        assert_eq!(loaded(&cluster).await, NUM_STORED, "{tier}");
        cluster.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_that_is_lost_or_hangs_in_the_middle_of_requests_costs_no_token() {
    let mut rng = Seed::draw().stream(3);
    let requests: Vec<Value> = (0..4).map(|_| corpus::greedy(&corpus::prompt(&mut rng, 600), 30)).collect();
    let expected = without_store(&requests).await;
    for hangs in [false, true] {
        let mut redis = Redis::start();
        let patient = ["--store-load-stall-timeout", "20s"];
        let url = redis.url();
        let flags = [&["--store-remote-url", &url][..], &patient].concat();
        let mut cluster = Cluster::start(shape(1, 1, &flags)).await;
        for (request, expected) in requests.iter().zip(&expected) {
            assert_eq!(&cluster.api.complete(request).await, expected);
        }
        written(&cluster, "remote", requests.len() * 37).await;
        cluster.restart("prefill-0").await;
        cluster.restart("decode-0").await;
        cluster.all_known().await;
        let asking = join_all(requests.iter().map(|request| cluster.api.complete(request)));
        let losing = async {
            // In the middle: something has been loaded.
            wait::until("something is loaded", SOON, async || {
                if sum(&cluster, "tandem_store_hits_total", &[]).await > 0.0 {
                    Ok(())
                } else {
                    Err("nothing".to_string())
                }
            })
            .await;
            if hangs { redis.freeze() } else { redis.kill() }
        };
        let (answers, ()) = tokio::join!(asking, losing);
        assert_eq!(answers, expected, "hangs: {hangs}");
        // And without it: the first to notice has waited, nobody waits again.
        let others: Vec<Value> = (0..3).map(|_| corpus::greedy(&corpus::prompt(&mut rng, 100), 5)).collect();
        for request in &others {
            cluster.api.complete(request).await;
        }
        let started_at = std::time::Instant::now();
        for request in &others {
            cluster.api.complete(request).await;
        }
        assert!(started_at.elapsed() < Duration::from_secs(10), "hangs: {hangs}, {:?}", started_at.elapsed());
        cluster.settle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_share_nothing_through_the_store() {
    let request = corpus::greedy(&corpus::prompt(&mut Seed::draw().stream(4), NUM_PROMPT), 5);
    let salted = |salt: &str| corpus::with(request.clone(), json!({"cache_salt": salt}));
    let folder = Folder::new();
    let mut shape = shape(1, 1, &["--store-remote-url", &folder.url(), "--store-host-bytes", "16MiB"]);
    shape.proxy = vec!["--api-key", "one", "--api-key", "two"];
    let cluster = Cluster::start(shape).await;
    let (one, two) = (cluster.api.with_key("one"), cluster.api.with_key("two"));
    let asked = [(&one, request.clone()), (&one, salted("a")), (&one, salted("b")), (&two, request.clone())];
    for (number, (api, request)) in asked.iter().enumerate() {
        let (_, cached) = ask(api, request).await;
        assert_eq!(cached, 0, "tenant {number} finds nothing of the others");
        written(&cluster, "remote", 18 * (number + 1)).await;
    }
    let scrape = cluster.metrics().await;
    assert_eq!(scrape.sum("tandem_store_hits_total", &[]), 0.0, "not even a hit that is not used");
    assert_eq!(scrape.sum("tandem_store_loaded_tokens_total", &[]), 0.0);
    // Each finds its own.
    for (api, request) in &asked {
        assert_eq!(ask(api, request).await.1 as f64, NUM_STORED);
    }
    cluster.shut_down().await;
}

/// Without prefill nodes, and with a pool that one prompt fills: what it forgets is in host memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_decode_node_that_prefills_loads_what_its_pool_has_forgotten() {
    let mut rng = Seed::draw().stream(5);
    let requests = [(); 3].map(|()| corpus::greedy(&corpus::prompt(&mut rng, NUM_PROMPT), 20));
    let expected = without_store(&requests).await;
    let flags = ["--num-prefill-nodes", "0", "--threads", "1", "--kv-cache-memory-bytes", "512KiB"];
    let store = ["--store-host-bytes", "16MiB"];
    let cluster = Cluster::up(&[&flags[..], &store, &STORE_ALONE].concat()).await;
    for round in 0..2 {
        for (number, request) in requests.iter().enumerate() {
            let (answer, cached) = ask(&cluster.api, request).await;
            assert_eq!(answer, expected[number]);
            assert_eq!(cached as f64, if round == 0 { 0.0 } else { NUM_STORED }, "round {round}, request {number}");
            written(&cluster, "host", 18 * if round == 0 { number + 1 } else { 3 }).await;
        }
    }
    assert_eq!(loaded(&cluster).await, 3.0 * NUM_STORED);
    cluster.shut_down().await;
}

#[test]
fn settings_that_cannot_work_are_a_sentence_at_the_start() {
    let refused = |flags: &[&str]| {
        let output = support::process::tandem().args(["up", "--port", "0"]).args(flags).output().unwrap();
        assert!(!output.status.success(), "{flags:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    for (flags, sentence) in [
        (vec!["--store-remote-url", "ftp://host"], "\"ftp\" is not known: expected fs, redis or s3"),
        (vec!["--store-remote-bytes", "1GiB"], "no --store-remote-url that it could be for"),
        (vec!["--store-host-bytes", "1KiB"], "expected 0 or at least"),
        (vec!["--store-host-bytes", "1GiB", "--store-queue-bytes", "1KiB"], "--store-queue-bytes is 1024, expected"),
        (vec!["--store-disk-path", "/proc/none"], "cannot use /proc/none"),
        (vec!["--store-host-bytes", "1GiB", "--no-enable-prefix-caching"], "the store needs --enable-prefix-caching"),
    ] {
        let told = refused(&flags);
        assert!(told.contains(sentence), "{flags:?}: {told}");
    }
}
