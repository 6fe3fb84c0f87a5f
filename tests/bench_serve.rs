//! `tandem bench serve` against `tandem up`: two processes, the real protocol.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::Value;
use support::Cluster;
use support::process::tandem;

#[tokio::test(flavor = "multi_thread")]
async fn a_load_is_answered_and_its_result_is_written() {
    let cluster = Cluster::up(&[]).await;
    let path = cluster.dir().join("result.json");
    let mut command = tandem();
    command.args(["bench", "serve", "--model", "models/tiny", "--base-url", cluster.api.base()]);
    command.args("--num-prompts 20 --random-input-len 48 --random-output-len 12 --random-range-ratio 0.25".split(' '));
    command.args("--request-rate 100 --seed 3 --max-concurrency 8 --num-warmups 2 --ignore-eos".split(' '));
    command.args("--goodput e2el:600000 --metric-percentiles 50,99 --save-result".split(' ')).arg(&path);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("TTFT"), "{}", text(&output.stdout));

    let result: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!((&result["completed"], &result["failed"]), (&20.into(), &0.into()), "{result}");
    // Lengths are within a quarter of 48 and 12, and with --ignore-eos nothing ends early.
    let total = |key: &str| result[key].as_u64().unwrap_or_else(|| panic!("{key} of {result}"));
    assert!((20 * 36..=20 * 60).contains(&total("total_input_tokens")), "{result}");
    assert!((20 * 9..=20 * 15).contains(&total("total_output_tokens")), "{result}");
    for key in ["p50_ttft_ms", "p99_tpot_ms", "mean_itl_ms", "std_e2el_ms", "request_goodput", "output_throughput"] {
        assert!(result[key].as_f64().is_some_and(|value| value > 0.0), "{key} of {result}");
    }
    assert_eq!(result["request_goodput"], result["request_throughput"]);
    assert!(result["command"].as_str().unwrap().starts_with("tandem bench serve --model models/tiny"), "{result}");
    assert!(result["machine"]["num_cores"].as_u64() > Some(0), "{result}");

    cluster.settle().await;
    // What the generator counted is what the endpoint counted, the two warm-ups apart.
    let served = cluster.metrics().await.sum("tandem_generation_tokens_total", &[]) as u64;
    assert!((2 * 9..=2 * 15).contains(&(served - total("total_output_tokens"))), "{served} tokens were served");
    cluster.shut_down().await;
}
