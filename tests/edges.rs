//! Where things end early, do not fit, or do not belong together: clients that leave, queues that are full,
//! wrong certificates and wrong models.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::json;
use support::client::Api;
use support::cluster::{NOISE_MODEL, Scratch, endpoint_url, make_certs, node_args, strings, with_port};
use support::corpus;
use support::process::Process;
use support::wait::{self, SOON};
use support::{Cluster, Seed, Shape};

/// "At once", on a machine that is busy with other tests.
const AT_ONCE: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_frees_everything() {
    let seed = Seed::draw();
    let mut rng = seed.stream(20);
    let cluster = Cluster::start(Shape::default()).await;
    // In the middle of an answer.
    let bodies: Vec<_> = (0..6).map(|_| corpus::greedy(&corpus::prompt(&mut rng, 50), 3000)).collect();
    let mut streams = join_all(bodies.iter().map(|body| cluster.api.stream(body))).await;
    for stream in &mut streams {
        stream.read_chunks(3).await;
    }
    drop(streams);
    cluster.settle().await;
    // While the prompt is being computed: the answer's first chunk is not there yet.
    let long = corpus::with(corpus::greedy(&corpus::prompt(&mut rng, 3500), 3), json!({"n": 2}));
    let asking: Vec<_> = (0..3)
        .map(|index| {
            let (api, body) =
                (cluster.api.clone(), corpus::with(long.clone(), json!({"cache_salt": index.to_string()})));
            tokio::spawn(async move { drop(api.try_post("/v1/completions", &body).await) })
        })
        .collect();
    wait::until("the prefill node computes", SOON, async || {
        let computing = cluster.metrics().await.sum("tandem_kv_blocks_referenced", &[("node", "prefill-0")]);
        (computing > 0.0).then_some(()).ok_or_else(|| "it does not".to_string())
    })
    .await;
    asking.iter().for_each(|task| task.abort());
    cluster.settle().await;
    let generated = cluster.metrics().await.sum("tandem_generated_tokens_total", &[("role", "decode-node")]);
    assert!(generated < 6.0 * 3000.0 / 2.0, "{generated} tokens were generated, most of them for nobody");
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_queues_answer_429_at_once_and_recover() {
    // One seat and one place to wait at the decode node.
    let shape = Shape { decode: vec!["--max-num-seqs", "1", "--max-num-waiting", "1"], ..Shape::default() };
    let cluster = Cluster::start(shape).await;
    let running = corpus::greedy(&[7; 20], 3000);
    let mut stream = cluster.api.stream(&running).await;
    stream.read_chunks(2).await;
    let short = corpus::greedy(&[8; 20], 2);
    let ask = |index: usize| {
        let (api, body) = (cluster.api.clone(), corpus::with(short.clone(), json!({"cache_salt": index.to_string()})));
        tokio::spawn(async move {
            let asked_at = Instant::now();
            let reply = api.post("/v1/completions", &body).await;
            (reply, asked_at.elapsed())
        })
    };
    let (waiting, refused) = wait::within("all but one are refused", SOON, async {
        let mut asked: Vec<_> = (0..5).map(ask).collect();
        let mut refused = Vec::new();
        while asked.len() > 1 {
            let (answer, _, rest) = futures::future::select_all(asked).await;
            refused.push(answer.unwrap());
            asked = rest;
        }
        (asked.remove(0), refused)
    })
    .await;
    for (reply, after) in refused {
        assert_eq!(reply.status, 429, "{}", reply.body);
        assert!(reply.retry_after().is_some_and(|seconds| seconds >= 1), "{reply:?}");
        assert_eq!(reply.body["error"]["code"], "overloaded", "{}", reply.body);
        assert!(after < AT_ONCE, "refused after {after:?}");
    }
    drop(stream);
    assert_eq!(waiting.await.unwrap().0.status, 200);
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_takes_no_more_requests_than_it_may() {
    let cluster =
        Cluster::up(&["--max-concurrent-requests", "2", "--max-body-bytes", "64KiB", "--api-key", "secret"]).await;
    let body = corpus::greedy(&[7; 20], 3000);
    let reply = cluster.api.post("/v1/completions", &body).await;
    assert_eq!(reply.status, 401, "{}", reply.body);
    let api = cluster.api.with_key("secret");
    let mut streams = join_all((0..2).map(|_| api.stream(&body))).await;
    streams[0].read_chunks(1).await;
    let asked_at = Instant::now();
    let reply = api.post("/v1/completions", &body).await;
    assert_eq!(reply.status, 429, "{}", reply.body);
    assert!(reply.retry_after().is_some() && asked_at.elapsed() < AT_ONCE, "{reply:?} after {:?}", asked_at.elapsed());
    drop(streams);
    cluster.settle().await;
    assert_eq!(api.post("/v1/completions", &corpus::greedy(&[7; 20], 2)).await.status, 200);
    let reply = api.post("/v1/completions", &json!({"prompt": "x".repeat(100_000)})).await;
    assert_eq!(reply.status, 413, "{}", reply.body);
    let reply = api.post("/v1/completions", &corpus::greedy(&[7; 4090], 100)).await;
    assert_eq!((reply.status.as_u16(), &reply.body["error"]["code"]), (400, &"context_length_exceeded".into()));
    cluster.shut_down().await;
}

/// A proxy at which nodes announce themselves at `registry`.
async fn start_registry(dir: &Path, registry: &str) -> (Process, Api) {
    let port = registry.rsplit_once(':').unwrap().1;
    let dir_name = dir.display().to_string();
    let args = strings(&["proxy", "--model", NOISE_MODEL, "--tls-dir", &dir_name, "--fabric-port", port]);
    let mut proxy = Process::start("proxy", &with_port(&args, 0), dir);
    let api = Api::new(&endpoint_url(&mut proxy).await);
    (proxy, api)
}

/// A port that nobody has at this moment.
fn free_udp_port() -> u16 {
    std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn start_node(role: &str, name: &str, dir: &Path, registry: &str, more: &[&str]) -> Process {
    let mut args = node_args(role, name, dir);
    args.extend(strings(&["--model", NOISE_MODEL, "--register", registry]));
    args.extend(strings(&["--threads", "1", "--kv-cache-memory-bytes", "32MiB"]));
    args.extend(strings(more));
    Process::start(name, &with_port(&args, 0), dir)
}

async fn knows(api: &Api, num_prefill: f64, num_decode: f64) {
    wait::until("the proxy knows its nodes", SOON, async || {
        let scrape = api.try_metrics().await?;
        let found =
            ["prefill-node", "decode-node"].map(|role| scrape.sum("tandem_ready_nodes", &[("node_role", role)]));
        (found == [num_prefill, num_decode]).then_some(()).ok_or_else(|| format!("it knows {found:?}"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_announce_themselves_and_strangers_are_refused() {
    let scratch = Scratch::new();
    let dir = scratch.path();
    make_certs(dir, &strings(&["prefill-0", "prefill-9"]), &strings(&["decode-0"]));
    let registry = format!("127.0.0.1:{}", free_udp_port());
    let (mut proxy, api) = start_registry(dir, &registry).await;
    let body = corpus::greedy(&[7; 300], 5);
    let reply = api.post("/v1/completions", &body).await;
    assert_eq!(reply.status, 503, "{}", reply.body);
    assert!(reply.retry_after().is_some(), "{reply:?}");

    let mut prefill = start_node("prefill-node", "prefill-0", dir, &registry, &[]);
    let mut decode = start_node("decode-node", "decode-0", dir, &registry, &[]);
    knows(&api, 1.0, 1.0).await;
    let expected = api.complete(&body).await;

    // A node with certificates of another CA, of the same name and role.
    let other = Scratch::new();
    make_certs(other.path(), &[], &strings(&["decode-0"]));
    let mut stranger = start_node("decode-node", "decode-0", other.path(), &registry, &[]);
    stranger.log_line("that it is not let in", |line| line.contains("cannot reach the proxy").then_some(())).await;
    // A node with a certificate of the cluster for another role, and one under another's name.
    let mut spy_args = strings(&["decode-node", "--node-id", "prefill-9", "--tls-dir", &dir.display().to_string()]);
    spy_args.extend(strings(&["--register", &registry, "--threads", "1", "--kv-cache-memory-bytes", "8MiB"]));
    let mut spy = Process::start("spy", &with_port(&spy_args, 0), dir);
    wait::until("the spy leaves or is refused", SOON, async || {
        let is_refused = spy.log().contains("cannot") || spy.exit_status().is_some_and(|status| !status.success());
        is_refused.then_some(()).ok_or_else(|| spy.tail())
    })
    .await;
    knows(&api, 1.0, 1.0).await;
    assert_eq!(api.complete(&body).await, expected);
    drop((stranger, spy));

    // A prefill node of another model: the same weights in another representation.
    let mut misfit = start_node("prefill-node", "prefill-9", dir, &registry, &["--dtype", "float32"]);
    let identity = |line: &str| Some(line.split_once("identity=")?.1.split_whitespace().next()?.to_string());
    let (ours, theirs) = (prefill.log_line("its model", identity).await, misfit.log_line("its model", identity).await);
    assert_ne!(ours, theirs);
    let names_both = |line: &str| (line.contains(&ours) && line.contains(&theirs)).then(|| line.to_string());
    let reason = proxy.log_line("why the misfit is refused, with both models", names_both).await;
    assert!(reason.contains("prefill-9"), "{reason}");
    assert_eq!(api.complete(&body).await, expected);
    knows(&api, 1.0, 1.0).await;
    drop(misfit);

    // Nodes announce themselves again to the proxy that follows a killed one at the same address.
    proxy.kill();
    let (mut proxy, api) = start_registry(dir, &registry).await;
    knows(&api, 1.0, 1.0).await;
    assert_eq!(api.complete(&body).await, expected);

    for process in [&mut decode, &mut prefill, &mut proxy] {
        process.terminate();
        assert!(process.exited(SOON).await.success(), "{}", process.tail());
    }
}
