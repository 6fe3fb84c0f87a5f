//! A decode node that runs out of blocks parks sequences in host memory, within the budget of the host tier, and
//! says what it would have said with room for all.
#![allow(clippy::unwrap_used)]

mod support;

use futures::StreamExt;
use rand::Rng;
use serde_json::{Value, json};
use support::client::{Answer, Api};
use support::wait::{self, SOON};
use support::{Cluster, Seed, corpus};

/// Requests in progress at a time.
const NUM_CLIENTS: usize = 12;
/// Room for about three of them.
const TIGHT: [&str; 8] = [
    "--num-prefill-nodes",
    "0",
    "--kv-cache-memory-bytes",
    "1MiB",
    "--max-model-len",
    "600",
    "--growth-window-blocks",
    "1",
];
const HOST_BYTES: f64 = 512.0 * 1024.0;
/// 16 tokens of 1 KiB, and what an entry has beside them, at most.
const ENTRY_BYTES_MAX: f64 = 17.0 * 1024.0;

async fn ask_all(api: &Api, bodies: &[Value]) -> Vec<Answer> {
    let ask = |body: &Value| {
        let (api, body) = (api.clone(), body.clone());
        async move { api.complete(&body).await }
    };
    futures::stream::iter(bodies.iter().map(ask)).buffered(NUM_CLIENTS).collect().await
}

#[tokio::test(flavor = "multi_thread")]
async fn preempted_sequences_are_parked_within_the_host_tiers_budget_and_say_the_same() {
    let seed = Seed::draw();
    let mut rng = seed.stream(0);
    let bodies: Vec<Value> = (0..24)
        .map(|index| {
            let num_tokens = rng.random_range(1..200);
            let prompt = corpus::prompt(&mut rng, num_tokens);
            let num_new = rng.random_range(100..300);
            match index % 3 {
                0 => corpus::greedy(&prompt, num_new),
                1 => corpus::sampled(&mut rng, &prompt, num_new),
                _ => corpus::with(corpus::sampled(&mut rng, &prompt, num_new / 2), json!({"n": 2})),
            }
        })
        .collect();
    let roomy = Cluster::up(&["--num-prefill-nodes", "0"]).await;
    let expected = ask_all(&roomy.api, &bodies).await;
    roomy.shut_down().await;
    for is_parking in [true, false] {
        // Loading is not the question here, only what the tier keeps.
        let tier = ["--store-host-bytes", "512KiB", "--store-bytes-per-second", "0"];
        let none: &[&str] = if is_parking { &[] } else { &["--parked-kv-bytes", "0"] };
        let cluster = Cluster::up(&[&TIGHT[..], &tier, none].concat()).await;
        for (index, (found, expected)) in ask_all(&cluster.api, &bodies).await.iter().zip(&expected).enumerate() {
            assert_eq!(found, expected, "{}", bodies[index]);
        }
        // Among others: no bytes are parked any more.
        cluster.settle().await;
        let scrape = cluster.metrics().await;
        let sum = |name: &str| scrape.sum(name, &[]);
        assert!(sum("tandem_preemptions_total") > 0.0, "nothing was preempted");
        let (parked, restored) = (sum("tandem_preempted_parked_total"), sum("tandem_preempted_restored_total"));
        assert_eq!(parked, restored, "none was cancelled");
        assert_eq!(parked > 0.0, is_parking, "{parked} were parked");
        assert!(is_parking || sum("tandem_preempted_recomputed_total") > 0.0);
        // What was parked is the tier's again: it fills.
        for _ in 0..4 {
            cluster.api.complete(&corpus::greedy(&corpus::prompt(&mut rng, 200), 2)).await;
        }
        wait::until("the tier has all of its budget", SOON, async || {
            let used = cluster.metrics().await.sum("tandem_store_used_bytes", &[("tier", "host")]);
            let is_full = used > HOST_BYTES - ENTRY_BYTES_MAX && used <= HOST_BYTES;
            is_full.then_some(()).ok_or_else(|| format!("it uses {used} bytes of {HOST_BYTES}"))
        })
        .await;
        cluster.shut_down().await;
    }
}
