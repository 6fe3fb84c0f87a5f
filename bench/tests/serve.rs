//! The load generator against an endpoint that does exactly what a script says. Times are held to lower
//! bounds alone: the endpoint cannot answer before its script does, and a busy machine may always be later.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bench::serve::provenance::Provenance;
use bench::serve::report::Report;
use bench::serve::slo::Metric;
use bench::serve::statistics::Samples;
use bench::serve::{ServeArgs, measure};
use clap::Parser;
use support::{ScriptedEndpoint, Step, end, head, token};
use tokio::sync::Barrier;

/// For runs of at most seconds.
const DEADLINE: Duration = Duration::from_secs(60);

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    args: ServeArgs,
}

async fn try_bench(endpoint: &ScriptedEndpoint, flags: &str) -> anyhow::Result<Report> {
    let line = format!("serve --model m --base-url {} --random-input-len 16 {flags}", endpoint.base_url);
    let args = Command::try_parse_from(line.split_whitespace())?.args;
    let provenance = Provenance { command: line, commit: None, cpu_model: None, num_cores: None };
    let run = measure(args, provenance, None);
    tokio::time::timeout(DEADLINE, run).await.expect("the generator waits for what cannot come")
}

async fn bench(endpoint: &ScriptedEndpoint, flags: &str) -> Report {
    try_bench(endpoint, flags).await.unwrap()
}

/// A whole answer of two tokens at once.
fn two_tokens() -> Vec<Step> {
    vec![head(), token(), token(), end(2)]
}

#[tokio::test]
async fn scripted_delays_come_back_in_the_figures() {
    let (before_first, between) = (Duration::from_millis(60), Duration::from_millis(20));
    let endpoint = ScriptedEndpoint::start(move |_| {
        let gap = || [Step::Delay(between), token()];
        let first = [head(), Step::Delay(before_first), token()];
        first.into_iter().chain(gap()).chain(gap()).chain(gap()).chain([end(4)]).collect()
    })
    .await;
    let report = bench(&endpoint, "--num-prompts 6 --random-output-len 4 --goodput ttft:59.9 e2el:100000").await;
    let summary = &report.summary;
    assert_eq!((summary.completed, summary.failed), (6, 0));
    assert_eq!((summary.total_input_tokens, summary.total_output_tokens), (96, 24));
    assert_eq!(summary.num_itl_spread, 0);
    let least = |metric: Metric| summary.latencies[&metric].as_ref().unwrap().percentile(0.0);
    assert!(least(Metric::Ttft) >= 60.0, "{}", least(Metric::Ttft));
    assert!(least(Metric::E2el) >= 120.0, "{}", least(Metric::E2el));
    assert!(summary.duration >= before_first + 3 * between);
    // No first token can have come within 59.9 ms.
    assert_eq!(summary.request_goodput, Some(0.0));
    let mean = |metric: Metric| summary.latencies[&metric].as_ref().unwrap().mean();
    assert!((mean(Metric::Ttft) + 3.0 * mean(Metric::Tpot) - mean(Metric::E2el)).abs() < 1e-6);
    assert!((mean(Metric::Itl) - mean(Metric::Tpot)).abs() < 1e-6);
}

#[tokio::test]
async fn an_open_loop_waits_for_no_answer() {
    // Nobody is answered before all have asked: a generator that waited for one answer would wait forever.
    let all_there = Arc::new(Barrier::new(40));
    let endpoint =
        ScriptedEndpoint::start(move |_| [Step::Meet(all_there.clone())].into_iter().chain(two_tokens()).collect())
            .await;
    let flags = "--num-prompts 40 --random-output-len 2 --request-rate 400 --burstiness 0.5 --seed 4";
    let report = bench(&endpoint, flags).await;
    assert_eq!(report.summary.completed, 40);
    let workload = report.args.workload().unwrap().0;
    let last = report.args.arrivals(&workload).schedule(40, 4)[39];
    assert!(report.summary.duration >= last, "the last was sent before its time");
    let mean = |samples: &Option<Samples>| samples.as_ref().unwrap().mean();
    assert!(mean(&report.summary.scheduled_ttft) >= mean(&report.summary.latencies[&Metric::Ttft]));
}

#[tokio::test]
async fn max_concurrency_is_reached_and_not_exceeded() {
    // Three are answered as soon as three are there. Were there a place less, nobody would be.
    let three = Arc::new(Barrier::new(3));
    let (in_progress, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let seen_most = most.clone();
    let endpoint = ScriptedEndpoint::start(move |_| {
        seen_most.fetch_max(in_progress.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        let begin =
            [Step::Meet(three.clone()), Step::Delay(Duration::from_millis(20)), Step::Leave(in_progress.clone())];
        begin.into_iter().chain(two_tokens()).collect()
    })
    .await;
    let report = bench(&endpoint, "--num-prompts 12 --random-output-len 2 --max-concurrency 3").await;
    assert_eq!(report.summary.completed, 12);
    assert_eq!(most.load(Ordering::SeqCst), 3);
    let wait = report.summary.concurrency_wait.unwrap();
    assert_eq!(wait.percentile(0.0), 0.0, "the first had places");
    // The other threes waited for one, two and three answers of 20 ms, each of the three in turn.
    assert!(wait.max() >= 60.0 && wait.mean() >= (20.0 + 40.0 + 60.0) / 4.0, "{wait:?}");
}

#[tokio::test]
async fn errors_are_counted_by_kind() {
    let endpoint = ScriptedEndpoint::start(|request| match request.request_id.as_str() {
        "bench-0" => vec![Step::Write("HTTP/1.1 429 Busy\r\ncontent-length: 4\r\n\r\nbusy".into())],
        "bench-1" => vec![head(), token()],
        "bench-2" => vec![head(), token(), Step::Hang],
        "bench-3" => vec![],
        "bench-4" => vec![head(), token(), Step::Write("data: {\"error\":{\"message\":\"lost\"}}\n\n".into())],
        _ => two_tokens(),
    })
    .await;
    let flags = "--num-prompts 8 --random-output-len 2 --request-timeout 5 --goodput e2el:1000000";
    let report = bench(&endpoint, flags).await;
    let result = report.to_json();
    let expected = serde_json::json!({"broken_stream": 2, "connection": 1, "status_429": 1, "timeout": 1});
    assert_eq!(result["errors_by_kind"], expected);
    assert_eq!((&result["completed"], &result["failed"]), (&3.into(), &5.into()));
    assert_eq!(report.summary.errors["status_429"].1, "the endpoint answered 429: busy");
    // What failed has missed its objective: three good ones in the whole time.
    let good = result["request_goodput"].as_f64().unwrap() * result["duration"].as_f64().unwrap();
    assert!((good - 3.0).abs() < 1e-9, "{good}");
    assert!(report.to_string().contains("status_429"), "{report}");
}

#[tokio::test]
async fn nothing_answered_and_a_failed_warm_up_are_errors() {
    let endpoint = ScriptedEndpoint::start(|request| match request.request_id.contains("warmup") {
        true => vec![],
        false => vec![Step::Write("HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n".into())],
    })
    .await;
    let reason = try_bench(&endpoint, "--num-prompts 3").await.unwrap_err().to_string();
    assert!(reason.contains("none of 3") && reason.contains("3 status_503"), "{reason}");
    let reason = try_bench(&endpoint, "--num-prompts 3 --num-warmups 2").await.unwrap_err().to_string();
    assert!(reason.contains("warm-up"), "{reason}");
    assert_eq!(endpoint.seen().len(), 5, "nothing is measured behind a failed warm-up");
}

#[tokio::test]
async fn a_seed_is_a_load_and_warm_ups_are_not_measured() {
    let endpoint = ScriptedEndpoint::start(|_| two_tokens()).await;
    let flags = "--num-prompts 4 --random-output-len 40 --random-range-ratio 0.5 --num-warmups 3 --ignore-eos \
                 --request-id-prefix run- --seed";
    let mut loads = Vec::new();
    for seed in [7, 7, 8] {
        let before = endpoint.seen();
        let report = bench(&endpoint, &format!("{flags} {seed}")).await;
        assert_eq!((report.summary.completed, report.summary.failed), (4, 0));
        let mut new = endpoint.seen();
        for seen in before {
            new.remove(new.iter().position(|one| *one == seen).unwrap());
        }
        loads.push(new);
    }
    assert_eq!(loads[0], loads[1]);
    assert_ne!(loads[0], loads[2]);
    let ids: Vec<&str> = loads[0].iter().map(|seen| seen.request_id.as_str()).collect();
    assert_eq!(ids, ["run-0", "run-1", "run-2", "run-3", "run-warmup-0", "run-warmup-1", "run-warmup-2"]);
    let body = &loads[0][0].body;
    assert_eq!((&body["stream"], &body["ignore_eos"], &body["model"]), (&true.into(), &true.into(), &"m".into()));
    assert_eq!(body["stream_options"]["include_usage"], true);
    assert!((8..=24).contains(&body["prompt"].as_array().unwrap().len()));
    assert!((20..=60).contains(&body["max_tokens"].as_u64().unwrap()));
}

#[tokio::test]
async fn a_result_has_vllms_keys() {
    let endpoint = ScriptedEndpoint::start(|_| two_tokens()).await;
    let result = bench(&endpoint, "--num-prompts 3 --random-output-len 2 --metric-percentiles 50,99").await.to_json();
    let mut keys: Vec<String> = [
        "completed",
        "failed",
        "duration",
        "total_input_tokens",
        "total_output_tokens",
        "request_throughput",
        "output_throughput",
        "total_token_throughput",
        "num_prompts",
    ]
    .map(str::to_string)
    .to_vec();
    for metric in ["ttft", "tpot", "itl", "e2el"] {
        keys.extend(["mean", "median", "std", "p50", "p99"].map(|figure| format!("{figure}_{metric}_ms")));
    }
    for key in keys {
        assert!(result[&key].is_number(), "{key} is {}", result[&key]);
    }
    assert_eq!((&result["model_id"], &result["request_rate"]), (&"m".into(), &"inf".into()));
    // There was no objective.
    assert!(result.as_object().unwrap().contains_key("request_goodput") && result["request_goodput"].is_null());
    assert!(result["command"].as_str().unwrap().starts_with("serve"));
    assert!(result["machine"].is_object());
    let few = bench(&endpoint, "--num-prompts 1 --random-output-len 2 --percentile-metrics ttft").await.to_json();
    assert!(few["p99_ttft_ms"].is_number() && few.get("p99_itl_ms").is_none());
}

/// A file beside the test that is gone with it.
struct File(std::path::PathBuf);

impl File {
    fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tandem-{}-{name}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Self(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A chat answer of one token, as two events: the role, then the text with the count of tokens.
fn chat_answer(text: &str) -> Vec<Step> {
    let role = r#"{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}],"usage":{"completion_tokens":0}}"#;
    let usage = r#""usage":{"prompt_tokens":9,"completion_tokens":1}"#;
    let text = format!(r#"{{"choices":[{{"delta":{{"content":"{text}"}},"finish_reason":"stop"}}],{usage}}}"#);
    vec![head(), Step::Write(format!("data: {role}\n\ndata: {text}\n\ndata: [DONE]\n\n"))]
}

#[tokio::test]
async fn a_conversation_goes_on_with_the_answers_that_were_given() {
    let endpoint = ScriptedEndpoint::start(|request| chat_answer(&format!("answer to {}", request.request_id))).await;
    let turn = |text: &str| format!(r#"{{"from":"human","value":"{text}"}},{{"from":"gpt","value":"recorded"}}"#);
    let text = format!(r#"[{{"conversations":[{},{},{}]}}]"#, turn("one"), turn("two"), turn("three"));
    let file = File::new("sharegpt.json", &text);
    let path = file.0.display();
    let flags = "--backend openai-chat --dataset-name sharegpt --multi-turn --think-time 0.02 --sharegpt-output-len 5";
    let report = bench(&endpoint, &format!("{flags} --dataset-path {path}")).await;
    assert_eq!((report.summary.completed, report.summary.num_itl_spread), (3, 0));
    let seen = endpoint.seen();
    let ids: Vec<&str> = seen.iter().map(|seen| seen.request_id.as_str()).collect();
    assert_eq!(ids, ["bench-0", "bench-0.1", "bench-0.2"]);
    let said: Vec<&str> =
        seen[2].body["messages"].as_array().unwrap().iter().map(|one| one["content"].as_str().unwrap()).collect();
    assert_eq!(said, ["one", "answer to bench-0", "two", "answer to bench-0.1", "three"]);
    assert_eq!(seen[2].body["max_completion_tokens"], 5);
    assert_eq!(seen[2].body["stream_options"]["continuous_usage_stats"], true);
    // Two times to think, which are nobody's latency.
    assert!(report.summary.duration >= Duration::from_millis(40));
    assert_eq!(report.summary.concurrency_wait.unwrap().max(), 0.0);
}

#[tokio::test]
async fn answers_are_checked_against_the_tasks() {
    let endpoint = ScriptedEndpoint::start(|_| chat_answer(" four ")).await;
    let task = |answer: &str| {
        format!("{{\"messages\":[{{\"role\":\"user\",\"content\":\"2+2?\"}}],\"answer\":\"{answer}\"}}\n")
    };
    let file = File::new("tasks.jsonl", &[task("four"), task("five"), task("four")].concat());
    let flags =
        format!("--backend openai-chat --dataset-name tasks --dataset-path {} --openai-strict", file.0.display());
    let report = bench(&endpoint, &flags).await;
    assert_eq!(report.summary.checked, Some((3, 2)));
    let result = report.to_json();
    assert_eq!((&result["num_checked"], &result["num_right"]), (&3.into(), &2.into()));
    // OpenAI's own endpoint refuses what it does not know.
    assert_eq!(endpoint.seen()[0].body["stream_options"], serde_json::json!({"include_usage": true}));
    let reason = try_bench(&endpoint, &format!("{flags} --num-prompts 4")).await.unwrap_err().to_string();
    assert!(reason.contains("--num-prompts is 4, but the file has 3"), "{reason}");
}

#[tokio::test]
async fn a_trace_is_sent_when_it_says_with_its_shared_prefixes() {
    let endpoint = ScriptedEndpoint::start(|_| two_tokens()).await;
    let row = |ms: u32, hashes: &str| {
        format!("{{\"timestamp\":{ms},\"input_length\":1024,\"output_length\":32,\"hash_ids\":[{hashes}]}}\n")
    };
    let file = File::new("trace.jsonl", &[row(0, "0,1"), row(60, "0,2"), row(60, "0,1")].concat());
    let flags = "--dataset-name mooncake --trace-timestamps --trace-jitter 0 --trace-length-divisor 16";
    let report = bench(&endpoint, &format!("{flags} --dataset-path {} --save-detailed", file.0.display())).await;
    assert_eq!(report.summary.completed, 3);
    assert!(report.summary.duration >= Duration::from_millis(60));
    let seen = endpoint.seen();
    let tokens = |index: usize| seen[index].body["prompt"].as_array().unwrap().clone();
    assert_eq!(tokens(0).len(), 64);
    assert_eq!(tokens(0), tokens(2));
    assert_eq!(tokens(0)[..32], tokens(1)[..32]);
    assert_ne!(tokens(0)[32..], tokens(1)[32..]);
    assert_eq!(seen[0].body["max_tokens"], 2);
    let result = report.to_json();
    let requests = result["requests"].as_array().unwrap();
    assert_eq!(requests.iter().map(|one| one["scheduled_ms"].as_f64().unwrap()).collect::<Vec<_>>(), [0.0, 60.0, 60.0]);
    assert!(requests.iter().all(|one| one["first_ms"].as_f64() >= one["sent_ms"].as_f64()));
    assert_eq!(result["output_lens"], serde_json::json!([2, 2, 2]));
    assert_eq!(result["ttfts"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn a_client_that_leaves_closes_its_connection_and_is_nobodys_error() {
    // Nothing comes behind the second token: whoever does not leave waits for the time limit.
    let endpoint = ScriptedEndpoint::start(|request| match request.request_id.as_str() {
        "bench-warmup-0" => two_tokens(),
        _ => vec![head(), token(), token(), Step::Hang],
    })
    .await;
    let flags = "--num-prompts 40 --random-output-len 2 --num-warmups 1 --request-timeout 3 --seed 1 --cancel-fraction";
    let reason = try_bench(&endpoint, &format!("{flags} 1")).await.unwrap_err().to_string();
    assert_eq!(reason, "none of 40 requests was answered: all were left by the generator");
    let reason = try_bench(&endpoint, &format!("{flags} 0.5")).await.unwrap_err().to_string();
    let num_stayed = reason.strip_prefix("none of 40 requests was answered: ").and_then(|rest| rest.split_once(' '));
    let (num_stayed, kind) = num_stayed.unwrap_or_else(|| panic!("{reason}"));
    assert!(kind.starts_with("timeout") && !kind.contains("cancelled"), "{reason}");
    assert!((8..=32).contains(&num_stayed.parse::<usize>().unwrap()), "{reason}");
}
