//! A request goes through proxy, decode node and prefill node, and the answer is the one that a single
//! node gives: the same text and the same log probabilities, bit for bit, whatever the block size, the chunk
//! size, the batch, the transport, what is cached, and who was preempted.
#![allow(clippy::unwrap_used)]

mod support;

use std::process::Command;

use futures::StreamExt;
use rand::Rng;
use serde_json::{Value, json};
use support::client::{Answer, Api};
use support::corpus::{self, Case};
use support::metrics::Scrape;
use support::process::ROOT;
use support::{Cluster, Seed, Shape};

/// Requests that a test has in progress at a time.
const NUM_CLIENTS: usize = 12;

/// The answers to all cases, asked for by several clients at a time, in the order of the cases. Every other
/// one is streamed: the even ones in odd turns.
async fn ask_all(api: &Api, cases: &[Case], turn: usize) -> Vec<Answer> {
    let ask = |(index, case): (usize, &Case)| {
        let (api, body) = (api.clone(), case.body.clone());
        async move {
            if (index + turn).is_multiple_of(2) {
                api.complete(&body).await
            } else {
                api.stream(&body).await.rest().await.unwrap_or_else(|reason| panic!("{reason}: {body}"))
            }
        }
    };
    futures::stream::iter(cases.iter().enumerate().map(ask)).buffered(NUM_CLIENTS).collect().await
}

fn assert_equal(cases: &[Case], expected: &[Answer], found: &[Answer]) {
    for ((case, expected), found) in cases.iter().zip(expected).zip(found) {
        assert_eq!(found, expected, "{}: {}", case.name, case.body);
    }
}

/// Decode nodes compute nothing of a prompt, however little it is.
const ALWAYS_SPLIT: [&str; 2] = ["--local-offer-max-tokens", "0"];

/// Every prompt was computed by a prefill node and arrived as it was sent.
fn assert_split(scrape: &Scrape) {
    assert_eq!(scrape.sum("tandem_local_prefills_total", &[]), 0.0, "a decode node prefilled");
    assert!(scrape.sum("tandem_kv_transferred_bytes_total", &[]) > 0.0, "no KV was transferred");
    // When the first token ends a request, what is still on its way finds its landing closed, or is given up by its
    // sender before its header is read.
    let reasons = scrape.by_label("tandem_refused_extents_total", "reason");
    let wrong: Vec<_> =
        reasons.iter().filter(|(reason, _)| !["closed", "unknown", "reset"].contains(&reason.as_str())).collect();
    assert!(wrong.is_empty(), "extents were refused: {wrong:?}");
    assert_eq!(scrape.sum("tandem_prefill_candidates_lost_total", &[]), 0.0, "a prefill node was given up");
}

#[tokio::test(flavor = "multi_thread")]
async fn printed_curl_line_is_answered_from_its_prompt_and_ctrl_c_leaves() {
    let mut cluster = Cluster::up(&["--model", "models/demo"]).await;
    let stdout = cluster.proxy.stdout();
    let from = stdout.iter().position(|line| line.trim_start().starts_with("curl ")).expect("a curl line is printed");
    let end = stdout[from..].iter().position(|line| !line.trim_end().ends_with('\\')).expect("it has an end");
    let script = stdout[from..=from + end].join("\n");
    let output = tokio::task::spawn_blocking({
        let script = script.clone();
        move || Command::new("sh").args(["-c", &script]).current_dir("/").output().unwrap()
    });
    let output = output.await.unwrap();
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    let body: Value = serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer}"));
    assert_eq!(Answer::of_body(&body).choices[0].text, "The code of Nora is 7391.", "{script}");
    let scrape = cluster.metrics().await;
    assert_split(&scrape);
    // What is tried first is what runs between machines.
    assert_eq!(scrape.kv_transports(), ["quic"]);
    cluster.settle().await;
    cluster.proxy.interrupt();
    let status = cluster.proxy.exited(support::wait::SOON).await;
    assert!(status.success(), "{status}");
}

/// `completions` of tests/checkpoints/tiny.json.
fn goldens() -> Vec<Value> {
    let text = std::fs::read_to_string(format!("{ROOT}/tests/checkpoints/tiny.json")).unwrap();
    let goldens: Value = serde_json::from_str(&text).unwrap();
    goldens["completions"].as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn served_text_is_that_of_transformers() {
    let goldens = goldens();
    for num_prefill_nodes in ["1", "0"] {
        let cluster = Cluster::up(&["--dtype", "float32", "--num-prefill-nodes", num_prefill_nodes]).await;
        for golden in &goldens {
            let body = json!({
                "model": "models/tiny", "prompt": golden["prompt"], "temperature": 0, "ignore_eos": true,
                "max_tokens": golden["greedy"].as_array().unwrap().len(),
            });
            let expected = golden["text"].as_str().unwrap();
            assert_eq!(cluster.api.complete(&body).await.choices[0].text, expected, "{body}");
            let streamed = cluster.api.stream(&body).await.rest().await.unwrap();
            assert_eq!(streamed.choices[0].text, expected, "streamed: {body}");
        }
        if num_prefill_nodes == "1" {
            assert_split(&cluster.metrics().await);
        }
        cluster.settle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn split_equals_colocated_whatever_blocks_chunks_batches_and_hits() {
    let seed = Seed::draw();
    let cases = corpus::corpus(&mut seed.stream(0));
    let colocated = Cluster::up(&["--num-prefill-nodes", "0"]).await;
    let expected = ask_all(&colocated.api, &cases, 0).await;
    // Alone in the batch, and with everything cached, it says the same.
    for (case, expected) in cases.iter().zip(&expected).step_by(3) {
        assert_eq!(&colocated.api.complete(&case.body).await, expected, "alone: {}", case.name);
    }
    let transferred = colocated.metrics().await.sum("tandem_kv_transferred_bytes_total", &[]);
    assert_eq!(transferred, 0.0, "one node alone transfers nothing");
    colocated.shut_down().await;

    let shapes = [
        Shape::default(),
        Shape::default().over_quic(),
        Shape {
            prefill: vec!["--block-size", "16", "--max-num-batched-tokens", "48", "--max-num-seqs", "5"],
            decode: vec!["--block-size", "64"],
            ..Shape::default()
        },
        Shape {
            num_prefill: 2,
            num_decode: 2,
            prefill: vec!["--block-size", "128", "--max-num-batched-tokens", "1111"],
            decode: vec!["--block-size", "32", "--max-num-seqs", "3", "--credit-bytes", "40KiB"],
            ..Shape::default()
        },
        Shape {
            nodes: vec!["--kv-cache-memory-bytes", "32MiB", "--no-enable-prefix-caching"],
            prefill: vec!["--block-size", "48"],
            ..Shape::default()
        }
        .over_quic(),
        Shape {
            prefill: vec!["--block-size", "64", "--max-num-batched-tokens", "208"],
            decode: vec!["--block-size", "16"],
            ..Shape::default()
        }
        .over_quic(),
    ];
    let nixl = Shape::default().over_nixl();
    for mut shape in shapes.into_iter().chain(nixl) {
        shape.decode.extend(ALWAYS_SPLIT);
        println!("{shape:?}");
        let transport = shape.kv_transport();
        let cluster = Cluster::start(shape).await;
        // The second time, whatever is cached by then is used.
        for turn in [1, 2] {
            assert_equal(&cases, &expected, &ask_all(&cluster.api, &cases, turn).await);
        }
        let scrape = cluster.metrics().await;
        assert_split(&scrape);
        assert_eq!(scrape.kv_transports(), [transport]);
        for node in cluster.nodes.iter().filter(|node| node.role == "decode-node") {
            let is_told = |line: &str| line.contains("KV of this node can arrive") && line.contains(transport);
            assert!(node.process.log().lines().any(is_told), "{}", node.process.tail());
        }
        cluster.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prefix_that_the_decode_node_holds_is_fetched_computed_again_or_left_to_it() {
    let seed = Seed::draw();
    let text = corpus::prompt(&mut seed.stream(3), 400);
    // The decode node computes the short one by itself; the prefill node then lacks all of it.
    let (short, long) = (corpus::greedy(&text[..330], 4), corpus::greedy(&text, 30));
    let colocated = Cluster::up(&["--num-prefill-nodes", "0"]).await;
    let expected = colocated.api.complete(&long).await;
    colocated.shut_down().await;

    let ways = [
        ("fetch", vec!["--fetch-bytes-per-second", "1TB"], vec!["--local-offer-max-tokens", "0"]),
        ("recompute", vec!["--fetch-bytes-per-second", "0"], vec!["--local-offer-max-tokens", "0"]),
        ("local", vec!["--fetch-bytes-per-second", "0"], vec!["--local-prefill-tokens-per-second", "1000000"]),
    ];
    for (way, mut prefill, decode) in ways {
        prefill.extend(["--prefill-tokens-per-second", "1000"]);
        let proxy = vec!["--local-prefill-max-tokens", "350"];
        let cluster = Cluster::start(Shape { prefill, decode, proxy, ..Shape::default() }).await;
        cluster.api.complete(&short).await;
        assert_eq!(cluster.api.complete(&long).await, expected, "{way}");
        let scrape = cluster.metrics().await;
        assert_eq!(scrape.by_label("tandem_prefix_choices_total", "choice"), [(way.to_string(), 1.0)].into());
        let computed = |role| scrape.sum("tandem_computed_tokens_total", &[("role", role)]);
        // Ten blocks of 32 tokens were held; token #1 of the long one comes with its prompt.
        let expected_of_prefill = [("fetch", 80.0), ("recompute", 400.0), ("local", 0.0)];
        assert!(expected_of_prefill.contains(&(way, computed("prefill-node"))), "{way}: {}", computed("prefill-node"));
        let bytes = scrape.sum("tandem_kv_fetched_bytes_total", &[]);
        assert_eq!(bytes > 0.0, way == "fetch", "{way}: {bytes} bytes were fetched");
        assert_eq!(scrape.sum("tandem_prefill_candidates_lost_total", &[]), 0.0, "{way}: nobody is to blame");
        cluster.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn preempted_sequences_say_the_same() {
    let seed = Seed::draw();
    let mut rng = seed.stream(1);
    let cases: Vec<Case> = (0..24)
        .map(|index| {
            let num_tokens = rng.random_range(1..200);
            let prompt = corpus::prompt(&mut rng, num_tokens);
            let num_new = rng.random_range(100..300);
            let body = match index % 3 {
                0 => corpus::greedy(&prompt, num_new),
                1 => corpus::sampled(&mut rng, &prompt, num_new),
                _ => corpus::with(corpus::sampled(&mut rng, &prompt, num_new / 2), json!({"n": 2})),
            };
            Case { name: format!("{index}: {num_tokens} + {num_new}"), body }
        })
        .collect();
    let roomy = Cluster::up(&["--num-prefill-nodes", "0"]).await;
    let expected = ask_all(&roomy.api, &cases, 0).await;
    roomy.shut_down().await;
    // Room for about three of twelve sequences.
    let tight = ["--kv-cache-memory-bytes", "1MiB", "--max-model-len", "600", "--growth-window-blocks", "1"];
    for num_prefill_nodes in ["1", "0"] {
        let cluster = Cluster::up(&[&tight[..], &["--num-prefill-nodes", num_prefill_nodes]].concat()).await;
        assert_equal(&cases, &expected, &ask_all(&cluster.api, &cases, 1).await);
        let scrape = cluster.metrics().await;
        assert!(scrape.sum("tandem_preemptions_total", &[]) > 0.0, "nothing was preempted");
        if num_prefill_nodes == "1" {
            assert_split(&scrape);
        }
        cluster.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_prefill_and_two_decode_nodes_with_room_for_one_and_a_half_prompts_each_finish_everything() {
    let seed = Seed::draw();
    let mut rng = seed.stream(4);
    let cases: Vec<Case> = (0..24)
        .map(|index| {
            let num_tokens = rng.random_range(520..640);
            let body = corpus::greedy(&corpus::prompt(&mut rng, num_tokens), 40);
            Case { name: format!("{index}: {num_tokens}"), body }
        })
        .collect();
    let roomy = Cluster::up(&["--num-prefill-nodes", "0"]).await;
    let expected = ask_all(&roomy.api, &cases, 0).await;
    roomy.shut_down().await;
    // 1024 tokens. Every request needs a good half of a pool at both ends, at any of two nodes each, all at once.
    let cluster = Cluster::start(Shape {
        num_prefill: 2,
        num_decode: 2,
        nodes: vec!["--threads", "1", "--kv-cache-memory-bytes", "1MiB", "--max-model-len", "700"],
        prefill: vec!["--block-size", "64", "--max-num-batched-tokens", "128"],
        decode: [&["--block-size", "16", "--growth-window-blocks", "1"][..], &ALWAYS_SPLIT].concat(),
        ..Shape::default()
    })
    .await;
    for turn in [1, 2] {
        assert_equal(&cases, &expected, &ask_all(&cluster.api, &cases, turn).await);
    }
    assert_split(&cluster.metrics().await);
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_arrives_before_the_last_one_is_computed() {
    // One chunk, long enough that a layer takes a while.
    let flags = ["--max-num-batched-tokens", "4096", "--log-level", "info,prefill_node=debug,decode_node=debug"];
    let cluster = Cluster::up(&flags).await;
    let seed = Seed::draw();
    let prompt = corpus::prompt(&mut seed.stream(2), 3500);
    cluster.api.complete(&corpus::greedy(&prompt, 2)).await;
    // The events of both nodes in one log, in the order in which they happened.
    let log = cluster.proxy.log();
    let first = |what: &str, layer: &str| {
        let is_it = |line: &str| line.contains(what) && line.split([' ', '}']).any(|field| field == layer);
        log.lines().position(is_it).unwrap_or_else(|| panic!("no \"{what}\" with {layer}\n{log}"))
    };
    let (arrived, computed) = (first("extent verified", "layer=0"), first("layer written", "layer=3"));
    assert!(arrived < computed, "layer 0 arrived in line {arrived}, layer 3 was computed in line {computed}\n{log}");
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chats_texts_and_tokens_streamed_or_not_agree() {
    let cluster = Cluster::up(&[]).await;
    let api = &cluster.api;
    let chat = json!({
        "model": "models/tiny", "max_tokens": 30, "seed": 7, "logprobs": true, "top_logprobs": 3,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a café? 你好"}],
    });
    let reply = api.post("/v1/chat/completions", &chat).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let whole = Answer::of_body(&reply.body);
    let mut streaming = chat.clone();
    streaming["stream_options"] = json!({"include_usage": true});
    let stream = api.try_stream_at("/v1/chat/completions", &streaming).await.unwrap();
    let (streamed, usage) = stream.rest_with_usage().await.unwrap();
    assert_eq!(streamed, whole);
    let usage = usage.expect("include_usage was set");
    for field in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(usage[field], reply.body["usage"][field], "{field}");
    }
    // The second request found the first one's KV, all but the last token.
    let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let prompt = usage["prompt_tokens"].as_u64().unwrap();
    assert!(cached < prompt && cached + 16 >= prompt, "{cached} of {prompt} prompt tokens were cached");

    let text = "Once upon a time in a café, 你好";
    let tokens = api.post("/tokenize", &json!({"model": "models/tiny", "prompt": text})).await;
    let tokens = tokens.body["tokens"].as_array().unwrap_or_else(|| panic!("{tokens:?}")).clone();
    let of_text = corpus::with(corpus::greedy(&[], 20), json!({"prompt": text}));
    let of_tokens = corpus::with(corpus::greedy(&[], 20), json!({"prompt": tokens}));
    let expected = api.complete(&of_text).await;
    assert_eq!(api.complete(&of_tokens).await, expected);
    assert_eq!(api.stream(&of_text).await.rest().await.unwrap(), expected);
    cluster.shut_down().await;
}
