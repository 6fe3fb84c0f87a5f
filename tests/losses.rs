//! Nodes are killed and frozen at seeded moments while twenty requests stream: every text is that of a run
//! that nothing disturbed, and afterwards nobody holds anything.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};
use support::client::{Answer, Api};
use support::corpus;
use support::wait::{self, SOON};
use support::{Blow, Cluster, Seed, Shape};
use tokio::sync::watch;

/// Requests in progress when a node is lost.
const NUM_REQUESTS: usize = 20;
/// Moments per cluster; two clusters run at a time.
const NUM_MOMENTS: usize = 25;

/// A killed or frozen node is noticed within 3 seconds; this allows for a machine that is busy with other tests.
const NOTICED_WITHIN: Duration = Duration::from_secs(8);

fn shape() -> Shape {
    Shape {
        num_prefill: 2,
        num_decode: 2,
        // Every loss hits about ten requests, and the losses of this test follow each other quickly.
        proxy: vec!["--retry-budget", "10"],
        ..Shape::default()
    }
}

/// Requests with prompts and answers of very different length, some with several choices.
fn requests(rng: &mut StdRng) -> Vec<Value> {
    let request = |index| {
        let num_tokens = [1_usize, 20, 90, 300, 1200][index % 5] + rng.random_range(0..20_usize);
        let prompt = corpus::prompt(rng, num_tokens);
        let num_new = rng.random_range(20..100);
        match index % 4 {
            0 => corpus::greedy(&prompt, num_new),
            3 => corpus::with(corpus::sampled(rng, &prompt, num_new / 2), json!({"n": 2})),
            _ => corpus::sampled(rng, &prompt, num_new),
        }
    };
    (0..NUM_REQUESTS).map(request).collect()
}

/// Chunks that all streams of a round have received, for whoever waits for a moment in it.
#[derive(Clone)]
struct Progress(Arc<watch::Sender<usize>>);

impl Progress {
    fn new() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }

    async fn reaches(&self, num_chunks: usize) {
        self.0.subscribe().wait_for(|num| *num >= num_chunks).await.unwrap();
    }
}

/// One streamed request that begins when the round has come so far.
async fn streamed(api: Api, body: Value, begins_at: usize, progress: Progress) -> Result<Answer, String> {
    progress.reaches(begins_at).await;
    let mut stream = match api.try_stream(&body).await {
        Ok(stream) => stream,
        Err(reply) => return Err(format!("{} {}", reply.status, reply.body)),
    };
    while stream.next().await? {
        progress.0.send_modify(|num| *num += 1);
    }
    Ok(stream.so_far().clone())
}

/// Twenty requests, and a blow at each of some nodes when so many chunks have been received.
struct Round {
    blows: Vec<(usize, String, Blow)>,
    begins: Vec<usize>,
}

impl Round {
    fn draw(rng: &mut StdRng, num_chunks: usize) -> Self {
        let mut victims = vec![["prefill-0", "prefill-1"], ["decode-0", "decode-1"]];
        // One node in most rounds; one of each role in some.
        if rng.random_range(0..4) > 0 {
            victims.remove(rng.random_range(0..2));
        }
        let mut blow = |nodes: [&str; 2]| {
            let moment = match rng.random_range(0..4) {
                0 => rng.random_range(0..4), // prompts are being computed and handed over
                _ => rng.random_range(0..num_chunks * 9 / 10),
            };
            let kind = *[Blow::Kill, Blow::Kill, Blow::Freeze].choose(rng).unwrap();
            (moment, nodes.choose(rng).unwrap().to_string(), kind)
        };
        let mut blows: Vec<_> = victims.into_iter().map(&mut blow).collect();
        blows.sort();
        // Half of the requests begin at once, the others while these run, some at the very moment of a blow.
        let first = blows[0].0.min(num_chunks / 3);
        let begin = |index| match index {
            0..10 => 0,
            10..13 => first,
            _ => rng.random_range(0..num_chunks / 3),
        };
        let begins = (0..NUM_REQUESTS).map(begin).collect();
        Self { blows, begins }
    }

    /// The answers, and how many chunks they came in.
    async fn run(&self, cluster: &mut Cluster, requests: &[Value], salt: &str) -> (Vec<Result<Answer, String>>, usize) {
        let progress = Progress::new();
        let running: Vec<_> = requests
            .iter()
            .zip(&self.begins)
            .map(|(body, begins_at)| {
                // With a salt of its own no round finds the prompts of the one before.
                let body = corpus::with(body.clone(), json!({"cache_salt": salt}));
                tokio::spawn(streamed(cluster.api.clone(), body, *begins_at, progress.clone()))
            })
            .collect();
        for (moment, victim, blow) in &self.blows {
            wait::within("the moment of the blow", SOON, progress.reaches(*moment)).await;
            blow.strike(cluster, victim);
        }
        let answers = wait::within("every request ends", Duration::from_secs(90), join_all(running)).await;
        let num_chunks = *progress.0.borrow();
        (answers.into_iter().map(|answer| answer.unwrap()).collect(), num_chunks)
    }

    /// Everyone is back, as after a restart by a supervisor or a network that heals.
    async fn repair(&self, cluster: &mut Cluster) {
        for (_, victim, blow) in &self.blows {
            blow.repair(cluster, victim).await;
        }
        cluster.all_known().await;
    }
}

async fn texts_survive(seed: Seed, purpose: u64, shape: Shape) {
    let mut rng = seed.stream(purpose);
    let requests = requests(&mut rng);
    let transport = shape.kv_transport();
    let mut cluster = Cluster::start(shape).await;
    let undisturbed = Round { blows: vec![], begins: vec![0; NUM_REQUESTS] };
    let (expected, num_chunks) = undisturbed.run(&mut cluster, &requests, "undisturbed").await;
    let expected: Vec<Answer> = expected.into_iter().map(|answer| answer.unwrap()).collect();
    for index in 0..NUM_MOMENTS {
        let started_at = Instant::now();
        let round = Round::draw(&mut rng, num_chunks);
        println!("round {index} of {num_chunks} chunks: {:?}", round.blows);
        let (answers, _) = round.run(&mut cluster, &requests, &format!("round {index}")).await;
        for (number, (answer, expected)) in answers.iter().zip(&expected).enumerate() {
            let what = format!("round {index}, request {number}: {}", requests[number]);
            match answer {
                Ok(answer) => assert_eq!(answer, expected, "{what}"),
                Err(reason) => panic!("{what}: {reason}"),
            }
        }
        let answered_at = started_at.elapsed();
        round.repair(&mut cluster).await;
        let used = cluster.node_metrics().await.kv_transports();
        assert!(used.iter().all(|used| used == transport), "KV over {used:?}, expected {transport}");
        println!("    answered after {answered_at:.1?}, repaired after {:.1?}", started_at.elapsed());
    }
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_survive_losses_at_any_moment_over_shm() {
    texts_survive(Seed::draw(), 10, shape()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_survive_losses_at_any_moment_over_quic() {
    texts_survive(Seed::draw(), 11, shape().over_quic()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_decode_node_the_answer_is_503_and_a_restarted_one_serves_again() {
    let mut cluster = Cluster::start(Shape { num_prefill: 1, num_decode: 2, ..Shape::default() }).await;
    let seed = Seed::draw();
    let body = corpus::greedy(&corpus::prompt(&mut seed.stream(12), 40), 10);
    let expected = cluster.api.complete(&body).await;

    // Without a prefill node the decode nodes compute prompts themselves.
    cluster.node("prefill-0").process.kill();
    cluster.all_known().await;
    let salted = |salt: &str| corpus::with(body.clone(), json!({"cache_salt": salt}));
    assert_eq!(cluster.api.complete(&salted("no prefill node")).await, expected);
    assert!(cluster.metrics().await.sum("tandem_local_prefills_total", &[("role", "decode-node")]) >= 1.0);

    cluster.node("decode-0").process.kill();
    cluster.node("decode-1").freeze();
    let lost_at = Instant::now();
    cluster.all_known().await;
    assert!(lost_at.elapsed() < NOTICED_WITHIN, "noticed after {:?}", lost_at.elapsed());
    let asked_at = Instant::now();
    let reply = cluster.api.post("/v1/completions", &body).await;
    assert_eq!(reply.status, 503, "{}", reply.body);
    assert!(reply.retry_after().is_some_and(|seconds| seconds >= 1), "{reply:?}");
    assert_eq!(reply.body["error"]["code"], "unavailable", "{}", reply.body);
    assert!(asked_at.elapsed() < Duration::from_secs(2), "answered after {:?}", asked_at.elapsed());

    cluster.restart("decode-0").await;
    cluster.restart("prefill-0").await;
    cluster.node("decode-1").thaw();
    cluster.all_known().await;
    let before = cluster.metrics().await;
    for turn in 0..4 {
        assert_eq!(cluster.api.complete(&salted(&format!("turn {turn}"))).await, expected);
    }
    let after = cluster.metrics().await;
    for node in ["prefill-0", "decode-0", "decode-1"] {
        let steps = |scrape: &support::metrics::Scrape| scrape.sum("tandem_engine_steps_total", &[("node", node)]);
        assert!(steps(&after) > steps(&before), "{node} is not used again");
    }
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_leaves_by_sigterm_is_noticed_at_once_and_finishes_what_it_has() {
    let mut cluster = Cluster::start(shape()).await;
    let seed = Seed::draw();
    let mut rng = seed.stream(13);
    let bodies: Vec<Value> = (0..8)
        .map(|_| corpus::sampled(&mut rng, &[7; 50], 300))
        .map(|body| corpus::with(body, json!({"n": 1})))
        .collect();
    let expected = join_all(bodies.iter().map(|body| cluster.api.complete(body))).await;
    let mut streams = Vec::new();
    for body in &bodies {
        let mut stream = cluster.api.stream(body).await;
        stream.read_chunks(3).await;
        streams.push(stream);
    }
    for leaving in ["decode-0", "prefill-1"] {
        cluster.node(leaving).process.terminate();
    }
    let told_at = Instant::now();
    let api = cluster.api.clone();
    wait::until("the proxy knows that two nodes leave", SOON, async || {
        let scrape = api.try_metrics().await?;
        let ready = |role| scrape.sum("tandem_ready_nodes", &[("node_role", role)]);
        let is_known = ready("decode-node") == 1.0 && ready("prefill-node") == 1.0;
        is_known.then_some(()).ok_or_else(|| format!("after {:?}", told_at.elapsed()))
    })
    .await;
    assert!(told_at.elapsed() < Duration::from_secs(1), "noticed after {:?}", told_at.elapsed());
    // New requests go to whoever stays, while the streams of the leaving node run on.
    let num_refused = AtomicUsize::new(0);
    join_all(bodies.iter().zip(&expected).map(|(body, expected)| {
        let (api, num_refused) = (cluster.api.clone(), &num_refused);
        async move {
            let reply = api.post("/v1/completions", body).await;
            if reply.status != 200 {
                num_refused.fetch_add(1, Ordering::Relaxed);
            } else {
                assert_eq!(&Answer::of_body(&reply.body), expected);
            }
        }
    }))
    .await;
    assert_eq!(num_refused.into_inner(), 0, "requests were refused although a node of each role stays");
    for (stream, expected) in streams.into_iter().zip(&expected) {
        assert_eq!(&stream.rest().await.unwrap(), expected);
    }
    for leaving in ["decode-0", "prefill-1"] {
        let status = cluster.node(leaving).process.exited(SOON).await;
        assert!(status.success(), "{leaving} left with {status}");
    }
    // Nobody was lost: they left in order.
    let scrape = cluster.metrics().await;
    assert_eq!(scrape.sum("tandem_node_losses_total", &[]), 0.0);
    for back in ["decode-0", "prefill-1"] {
        cluster.restart(back).await;
    }
    cluster.all_known().await;
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_outlive_their_proxy_and_hold_nothing_for_it() {
    let mut cluster = Cluster::start(shape()).await;
    let seed = Seed::draw();
    let mut rng = seed.stream(14);
    let bodies: Vec<Value> = (0..6).map(|_| corpus::sampled(&mut rng, &[9; 700], 1500)).collect();
    let expected_streams = join_all(bodies.iter().map(|body| cluster.api.complete(body))).await;
    let body = corpus::greedy(&[11; 100], 20);
    let expected = cluster.api.complete(&body).await;
    let mut streams = join_all(bodies.iter().map(|body| cluster.api.stream(body))).await;
    streams[0].read_chunks(5).await;
    cluster.proxy.freeze();
    cluster.nodes_settle().await;
    cluster.proxy.thaw();
    // The proxy goes on where the clients were: they saw a pause.
    for (stream, expected) in streams.into_iter().zip(&expected_streams) {
        assert_eq!(&stream.rest().await.unwrap(), expected);
    }
    cluster.all_known().await;
    assert_eq!(cluster.api.complete(&body).await, expected);

    let mut streams = join_all(bodies.iter().map(|body| cluster.api.stream(body))).await;
    streams[0].read_chunks(5).await;
    cluster.proxy.kill();
    for stream in streams {
        assert!(stream.rest().await.is_err(), "the stream of a killed proxy does not end as if it were complete");
    }
    cluster.nodes_settle().await;
    cluster.restart_proxy().await;
    assert_eq!(cluster.api.complete(&body).await, expected);
    cluster.shut_down().await;
}

/// Kills the decode node that has the only request.
async fn kill_whoever_decodes(cluster: &mut Cluster) -> String {
    let name = wait::until("a decode node has the request", SOON, async || {
        let requests = cluster.node_metrics().await.by_node("tandem_open_requests", &[("role", "decode-node")]);
        let busy = requests.into_iter().find(|(_, num)| *num > 0.0);
        busy.map(|(node, _)| node).ok_or_else(|| "nobody has it".to_string())
    })
    .await;
    cluster.node(&name).process.kill();
    name
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_survives_two_losses_and_a_prompt_that_outlasts_three_nodes_is_quarantined() {
    let mut cluster = Cluster::start(Shape { num_prefill: 1, num_decode: 3, ..Shape::default() }).await;
    let seed = Seed::draw();
    let mut rng = seed.stream(15);
    let prompt = corpus::prompt(&mut rng, 200);
    let body = corpus::sampled(&mut rng, &prompt, 3000);
    let expected = cluster.api.complete(&body).await;
    for num_losses in [2, 3] {
        let mut stream = cluster.api.stream(&body).await;
        let mut lost = Vec::new();
        for _ in 0..num_losses {
            // Each node adds some tokens of its own before it is lost.
            stream.read_chunks(stream.num_chunks() + 20).await;
            lost.push(kill_whoever_decodes(&mut cluster).await);
        }
        match stream.rest().await {
            Ok(answer) => {
                assert_eq!(num_losses, 2, "a request survived three losses");
                assert_eq!(answer, expected);
            }
            Err(reason) => {
                assert_eq!(num_losses, 3, "{reason}");
                assert!(reason.contains("node_failure"), "{reason}");
            }
        }
        for name in lost {
            cluster.restart(&name).await;
        }
        cluster.all_known().await;
    }
    let reply = cluster.api.post("/v1/completions", &body).await;
    assert_eq!((reply.status.as_u16(), &reply.body["error"]["code"]), (400, &"prompt_quarantined".into()));
    assert_eq!(cluster.api.complete(&corpus::greedy(&prompt[1..], 4)).await.choices.len(), 1);
    cluster.shut_down().await;
}
