//! `--device sim`: real processes that serve a model of any size without its weights. What they answer is the same however
//! the work was divided, KV has the model's size and is moved as any other, and nobody takes it for a model.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::{Value, json};
use support::cluster::Scratch;
use support::process::tandem;
use support::{Cluster, Seed, Shape, corpus};

const NUM_PROMPT_TOKENS: usize = 200;
const NUM_LAYERS: f64 = 32.0;
/// 8 heads of K and of V with 128 values of two bytes, in 32 layers.
const TOKEN_BYTES: f64 = 128.0 * 1024.0;

/// A folder with the shape of a model of 8 billion parameters.
fn shape_of_8b(scratch: &Scratch) -> &'static str {
    let folder = scratch.path().join("8b").display().to_string();
    let output = tandem().args(["model", "random", "8b", &folder, "--no-weights"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // A few bytes for as long as the test runs.
    folder.leak()
}

fn simulated(model: &'static str, num_prefill: usize) -> Shape {
    let nodes = vec!["--device", "sim", "--sim-step-time", "1ms", "--sim-tokens-per-second", "100000"];
    let memory = ["--kv-cache-memory-bytes", "128MiB", "--max-num-batched-tokens", "64", "--max-num-seqs", "8"];
    // The bytes of a hand-over are counted: none may be given up and begun again on a machine that is busy.
    let patience = ["--prefill-accept-timeout", "60s", "--prefill-progress-timeout", "60s"];
    let decode = [vec!["--local-prefill-tokens", "48"], patience.to_vec()].concat();
    Shape { model, num_prefill, nodes: [nodes, memory.to_vec()].concat(), decode, ..Shape::default() }
}

fn requests(model: &str, seed: Seed) -> Vec<Value> {
    let mut rng = seed.stream(1);
    let of = |body: Value| corpus::with(body, json!({"model": model}));
    let prompt = corpus::prompt(&mut rng, NUM_PROMPT_TOKENS);
    let other = corpus::prompt(&mut rng, NUM_PROMPT_TOKENS);
    vec![of(corpus::greedy(&prompt, 12)), of(corpus::sampled(&mut rng, &other, 12))]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_simulated_model_of_8b_answers_alike_split_or_not_and_moves_all_of_its_kv() {
    let scratch = Scratch::new();
    let model = shape_of_8b(&scratch);
    let requests = requests(model, Seed::draw());
    let mut texts = Vec::new();
    for shape in [simulated(model, 1).over_quic(), simulated(model, 1), simulated(model, 0)] {
        let (is_split, transport) = (shape.num_prefill > 0, shape.kv_transport());
        let cluster = Cluster::start(shape).await;
        let mut answers = Vec::new();
        for request in &requests {
            answers.push(cluster.api.complete(request).await);
        }
        cluster.settle().await;
        assert!(cluster.proxy.log().contains("the nodes simulate a model"), "{}", cluster.proxy.log());
        let metrics = cluster.node_metrics().await;
        let arrived = [("role", "decode-node"), ("direction", "verified"), ("transport", transport)];
        let num_prompts = if is_split { requests.len() as f64 } else { 0.0 };
        // 200 tokens are 13 granules, which are computed in chunks of 64 tokens: an extent of each layer for each of 4.
        let num_bytes = metrics.sum("tandem_fabric_extent_bytes_total", &arrived);
        assert_eq!(num_bytes, num_prompts * 208.0 * TOKEN_BYTES, "{transport}");
        assert_eq!(metrics.sum("tandem_fabric_extents_total", &arrived), num_prompts * 4.0 * NUM_LAYERS, "{transport}");
        texts.push(answers);
        cluster.shut_down().await;
    }
    assert_eq!(texts[0], texts[1], "quic and shm");
    assert_eq!(texts[0], texts[2], "split and colocated");
    assert_ne!(texts[0][0], texts[0][1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_simulated_model_says_that_it_is_none() {
    let cluster = Cluster::up(&["--device", "sim", "--sim-step-time", "0s"]).await;
    let models = cluster.api.try_get("/v1/models").await.unwrap();
    let owner = models.body["data"][0]["owned_by"].as_str().unwrap().to_string();
    assert!(owner.contains("simulator"), "{owner}");
    let log = cluster.proxy.log();
    assert!(log.contains("no weights are read, and what it answers means nothing"), "{log}");
    cluster.shut_down().await;
    let cluster = Cluster::up(&[]).await;
    let models = cluster.api.try_get("/v1/models").await.unwrap();
    assert_eq!(models.body["data"][0]["owned_by"], "tandem");
    cluster.shut_down().await;
}
