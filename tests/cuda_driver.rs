//! `--device cuda:N` as operators run it: real processes that speak to a CUDA driver, which is one that runs on the host
//! (`kernels/cuda/host/driver`): answers, KV from one process's memory of the device to the other's, and what is said and
//! done when the device is too small, absent or lost. Whatever NVIDIA's documents forbid ends the process or is a line.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use support::client::{Answer, AnswerStream};
use support::cluster::{NOISE_MODEL, Scratch};
use support::process::{Process, tandem};
use support::{Cluster, Seed, Shape, corpus, wait};

/// Kernels run as fibres on two cores.
const PATIENCE: Duration = Duration::from_secs(120);
const STEPS: [&str; 4] = ["--max-num-batched-tokens", "64", "--max-num-seqs", "4"];

/// What finds the driver of the host, with what it is asked for. The process takes a while to end, in which no thread may
/// call the driver any more.
fn driver(wishes: &str) -> Vec<(&'static str, String)> {
    let folder = kernels::cuda::host_driver_folder().display().to_string();
    vec![("LD_LIBRARY_PATH", folder), ("HOST_CUDA_DRIVER", format!("{wishes},linger=300"))]
}

fn on_gpus(transports: &'static str) -> Shape {
    let nodes = ["--device", "cuda:0", "--kv-cache-memory-bytes", "16MiB", "--kv-transports", transports];
    let patience = ["--prefill-accept-timeout", "60s", "--prefill-progress-timeout", "60s"];
    Shape {
        nodes: [&nodes[..], &STEPS].concat(),
        decode: [&["--local-offer-max-tokens", "0"], &patience[..]].concat(),
        environments: BTreeMap::from([("", driver("seed=1"))]),
        ..Shape::default()
    }
}

fn requests(seed: Seed) -> Vec<Value> {
    let mut rng = seed.stream(1);
    let (prompt, other) = (corpus::prompt(&mut rng, 150), corpus::prompt(&mut rng, 90));
    vec![corpus::greedy(&prompt, 8), corpus::sampled(&mut rng, &other, 8)]
}

async fn ask_all(cluster: &Cluster, requests: &[Value]) -> Vec<Answer> {
    let mut answers = Vec::new();
    for request in requests {
        answers.push(cluster.api.complete(request).await);
    }
    answers
}

/// The driver has nothing to say about a program that keeps to its rules.
fn assert_no_rule_broken(process: &Process) {
    assert!(!process.log().contains("host driver:"), "{}", process.tail());
}

fn texts(answers: &[Answer]) -> Vec<&str> {
    answers.iter().map(|answer| answer.choices[0].text.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gpu_answers_as_the_cpu_does_in_f32() {
    let requests = &requests(Seed::draw())[..1];
    let mut answers = Vec::new();
    for (device, environment) in
        [("cpu", vec![]), ("cuda:0", driver("seed=1")), ("cuda:0", driver("capability=8.0,seed=2"))]
    {
        let flags =
            [&["--device", device, "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB"], &STEPS[..]].concat();
        let cluster = Cluster::up_in(&flags, &environment).await;
        answers.push(ask_all(&cluster, requests).await);
        cluster.settle().await;
        assert_no_rule_broken(&cluster.shut_down_in_order().await.proxy);
    }
    assert_eq!(texts(&answers[1]), texts(&answers[0]), "compute capability 9.0");
    assert_eq!(texts(&answers[2]), texts(&answers[0]), "compute capability 8.0");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_is_right_on_a_gpu_whose_memory_is_shared_out() {
    let flags = [&["up", "--port", "0", "--device", "cuda:0", "--gpu-memory-utilization", "0.4"], &STEPS[..]].concat();
    let flags: Vec<String> = flags.into_iter().map(str::to_string).collect();
    let scratch = Scratch::new();
    let mut process = Process::start_in("up", &flags, scratch.path(), &driver("memory=1073741824"));
    let url = support::cluster::endpoint_url(&mut process).await;
    let question = "The code of Nora is 7391. Hugo lives in Oslo. What is the code of Nora?";
    let body = json!({"messages": [{"role": "user", "content": question}], "max_tokens": 32, "temperature": 0});
    let reply = support::client::Api::new(&url).post("/v1/chat/completions", &body).await;
    assert_eq!(reply.body["choices"][0]["message"]["content"], "The code of Nora is 7391.", "{}", reply.body);
    process.terminate();
    assert!(process.exited(PATIENCE).await.success(), "{}", process.tail());
    assert_no_rule_broken(&process);
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_between_processes_with_gpus_goes_over_cuda_ipc_with_the_answers_of_quic() {
    let requests = requests(Seed::draw());
    let mut answers = Vec::new();
    for (transports, carrier) in [("quic", "quic"), ("quic,cuda-ipc", "cuda-ipc")] {
        let cluster = Cluster::start(on_gpus(transports)).await;
        answers.push(ask_all(&cluster, &requests).await);
        cluster.settle().await;
        let metrics = cluster.node_metrics().await;
        let arrived = [("role", "decode-node"), ("direction", "verified"), ("transport", carrier)];
        assert!(metrics.sum("tandem_fabric_extent_bytes_total", &arrived) > 0.0, "{carrier}");
        let log: String = cluster.nodes.iter().map(|node| node.process.log()).collect();
        assert_eq!(log.contains("transport=\"cuda-ipc\""), carrier == "cuda-ipc", "{log}");
        cluster.shut_down_in_order().await.nodes.iter().for_each(|node| assert_no_rule_broken(&node.process));
    }
    assert_eq!(answers[0], answers[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_node_that_is_killed_or_leaves_does_not_take_the_decode_nodes_device_along() {
    let mut cluster = Cluster::start(on_gpus("quic,cuda-ipc")).await;
    let mut rng = Seed::draw().stream(2);
    for is_killed in [true, false] {
        let before = cluster.node("decode-0").api.try_metrics().await.unwrap();
        let arrived = [("direction", "verified"), ("transport", "cuda-ipc")];
        let name = "tandem_fabric_extents_total";
        let request = corpus::greedy(&corpus::prompt(&mut rng, 400), 8);
        let (api, asked) = (cluster.api.clone(), request.clone());
        let answer = tokio::spawn(async move { api.complete(&asked).await });
        let decode = cluster.node("decode-0").api.clone();
        wait::until("some KV has arrived", PATIENCE, async || {
            let num = decode.try_metrics().await?.sum(name, &arrived) - before.sum(name, &arrived);
            if num > 0.0 { Ok(()) } else { Err("none has".to_string()) }
        })
        .await;
        let prefill = &mut cluster.node("prefill-0").process;
        if is_killed {
            prefill.kill();
        } else {
            prefill.terminate();
            assert!(prefill.exited(PATIENCE).await.success(), "{}", prefill.tail());
        }
        let answer = wait::within("the answer", PATIENCE, answer).await.unwrap();
        assert!(cluster.node("decode-0").process.is_alive(), "{}", cluster.node("decode-0").process.tail());
        cluster.restart("prefill-0").await;
        cluster.all_known().await;
        // Its prefix is in the pool by now, which changes nothing.
        assert_eq!(texts(&[cluster.api.complete(&request).await]), texts(&[answer]), "killed: {is_killed}");
        cluster.settle().await;
    }
    assert_no_rule_broken(&cluster.shut_down_in_order().await.node("decode-0").process);
}

/// Runs a command that has to end by itself, and gives its status and what it says.
fn said_by(args: &[&str], wishes: Option<&str>) -> (bool, String) {
    let mut command = tandem();
    command.args(args).envs(wishes.map(driver).unwrap_or_default());
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_gpu_cannot_do_is_a_sentence() {
    let on = |device| [&["up", "--port", "0", "--device", device], &STEPS[..]].concat();
    for (device, wishes, expected) in [
        ("cuda:0", Some("memory=20000000"), "the NVIDIA driver says CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
        ("cuda:0", Some("memory=60000000"), "leaves nothing for KV"),
        ("cuda:1", Some("devices=1"), "cuda:1 was asked for"),
        ("cuda:0", Some("devices=0"), "cuda:0 was asked for"),
        ("cuda:0", Some("capability=7.5"), "the kernels need 8.0 or later"),
        ("cuda:0", Some("copy=5"), "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"),
        ("cuda:0", None, "has no NVIDIA driver"),
    ] {
        let args = on(device);
        let wishes = wishes.map(str::to_string);
        let said = tokio::task::spawn_blocking(move || said_by(&args, wishes.as_deref()));
        let (is_success, said) = wait::within("its end", PATIENCE, said).await.unwrap();
        let last = said.lines().last().unwrap_or_default();
        assert!(!is_success && last.starts_with("tandem: ") && last.contains(expected), "{expected}: {said}");
    }
}

/// `tandem bench engine` measures and leaves in order, and so it does where the device is lost meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn an_engine_is_measured_and_gone_before_its_benchmark_ends() {
    let args =
        ["bench", "engine", "--device", "cuda:0", "--dtype", "bfloat16", "--rounds", "1", "--model", NOISE_MODEL];
    let small = ["--limit-copy-bytes", "1MiB", "--limit-product", "32", "--prompt-len", "16", "--batch", "1"];
    let args = [&args[..], &small, &["--context", "16", "--num-tokens", "4"]].concat();
    for (wishes, expected) in [("seed=1", "decode"), ("seed=1,launch=120", "CUDA_ERROR_ILLEGAL_ADDRESS")] {
        let args = args.clone();
        let said = tokio::task::spawn_blocking(move || said_by(&args, Some(wishes)));
        let (is_success, said) = wait::within("its end", PATIENCE, said).await.unwrap();
        assert_eq!(is_success, wishes == "seed=1", "{said}");
        assert!(said.contains(expected) && !said.contains("after main has returned"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn auto_takes_a_gpu_that_is_there_and_the_cpu_without_one() {
    let memory = ["--device", "auto", "--kv-cache-memory-bytes", "16MiB"];
    for (wishes, expected) in [
        (Some("seed=1"), "the model is on the device device=\"cuda:0"),
        (Some("devices=0"), "--device auto: the CPU computes"),
        (Some("memory=20000000"), "--device auto: there is a GPU, and the CPU computes"),
        (None, "--device auto: the CPU computes"),
    ] {
        let environment = wishes.map(driver).unwrap_or_default();
        let cluster = Cluster::up_in(&[&memory[..], &STEPS].concat(), &environment).await;
        assert!(cluster.proxy.log().contains(expected), "{wishes:?}: {}", cluster.proxy.log());
        cluster.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_device_is_lost_ends_with_a_sentence_and_another_finishes_its_requests() {
    for lost in ["decode-0", "prefill-0"] {
        let environments = BTreeMap::from([("", driver("seed=1")), (lost, driver("launch=400"))]);
        let shape = Shape { num_decode: 2, num_prefill: 2, environments, ..on_gpus("quic,cuda-ipc") };
        let mut cluster = Cluster::start(shape).await;
        let mut rng = Seed::draw().stream(3);
        for turn in 0..40 {
            let request = corpus::greedy(&corpus::prompt(&mut rng, 100), 12);
            let answer = wait::within("an answer", PATIENCE, cluster.api.complete(&request)).await;
            assert_eq!(answer.choices[0].finish.as_deref(), Some("length"), "turn {turn}");
            if !cluster.node(lost).process.is_alive() {
                break;
            }
        }
        let process = &mut cluster.node(lost).process;
        let status = process.exited(PATIENCE).await;
        let log = process.log();
        assert!(!status.success(), "{log}");
        // Another thread may still write a line behind it.
        let says = format!("tandem: the engine of {lost} failed: ");
        let line = log.lines().find(|line| line.starts_with(&says)).unwrap_or_else(|| panic!("{log}"));
        assert!(line.contains("the NVIDIA driver says CUDA_ERROR_ILLEGAL_ADDRESS: "), "{line}");
        let proxy = cluster.proxy.log();
        // Who dials it later, when it is gone, hears nothing.
        let mut losses = proxy.lines().filter(|line| line.contains("lost a node"));
        assert!(losses.all(|line| !line.contains("silent for longer")), "the node has told that it ends: {proxy}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_notices_that_its_device_is_lost_while_it_has_nothing_to_do() {
    // A few questions are asked while it loads, the others while it is idle.
    let environments = BTreeMap::from([("", driver("seed=1")), ("decode-0", driver("query=8"))]);
    let mut cluster = Cluster::start(Shape { num_decode: 2, environments, ..on_gpus("quic") }).await;
    let process = &mut cluster.node("decode-0").process;
    assert!(!process.exited(PATIENCE).await.success(), "{}", process.tail());
    let line = "tandem: the engine of decode-0 failed: the model runner failed: the device cannot tell its memory: ";
    assert!(process.log().contains(line), "{}", process.tail());
    cluster.all_known().await;
    let answer = cluster.api.complete(&corpus::greedy(&[7; 60], 5)).await;
    assert_eq!(answer.choices[0].finish.as_deref(), Some("length"), "the other node answers");
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_the_only_process_hears_that_its_device_is_lost() {
    let flags = [&["--device", "cuda:0", "--kv-cache-memory-bytes", "16MiB"], &STEPS[..]].concat();
    let mut cluster = Cluster::up_in(&flags, &driver("launch=300")).await;
    let mut rng = Seed::draw().stream(4);
    let request = corpus::greedy(&corpus::prompt(&mut rng, 100), 200);
    let reply = wait::within("a reply", PATIENCE, cluster.api.post("/v1/completions", &request)).await;
    assert!(
        reply.status.is_server_error() && reply.error_message().contains("node"),
        "{} {}",
        reply.status,
        reply.body
    );
    let status = cluster.proxy.exited(PATIENCE).await;
    assert!(
        !status.success() && cluster.proxy.log().contains("tandem: an engine failed: "),
        "{}",
        cluster.proxy.tail()
    );
}

/// `tandem up` on the driver of the host, with a request whose answer has begun and takes long.
async fn up_while_it_answers(flags: &[&str], wishes: &str) -> (Cluster, AnswerStream) {
    let flags = [&["--device", "cuda:0", "--kv-cache-memory-bytes", "16MiB"], flags, &STEPS].concat();
    let cluster = Cluster::up_in(&flags, &driver(wishes)).await;
    let mut stream = cluster.api.stream(&corpus::greedy(&[7; 60], 1500)).await;
    stream.read_chunks(2).await;
    (cluster, stream)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_asked_of_the_driver_after_main_however_the_process_leaves() {
    let (mut cut, _cut_stream) = up_while_it_answers(&["--drain-timeout", "0s"], "seed=1").await;
    cut.proxy.terminate();
    assert!(cut.proxy.exited(PATIENCE).await.success(), "{}", cut.proxy.tail());
    assert_no_rule_broken(&cut.proxy);

    let (mut pressed, _stream) = up_while_it_answers(&[], "seed=2").await;
    let status = wait::until("it ends at once", PATIENCE, async || {
        pressed.proxy.exit_status().ok_or_else(|| {
            pressed.proxy.interrupt();
            "it drains".to_string()
        })
    })
    .await;
    assert_eq!(status.code(), Some(130), "{}", pressed.proxy.tail());
    assert_no_rule_broken(&pressed.proxy);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_lost_in_the_drain_is_an_error() {
    let assert_told = |process: &Process, sentence: &str| {
        let log = process.log();
        let found = |part: &str| log.find(part).unwrap_or_else(|| panic!("no \"{part}\": {log}"));
        assert!(found("draining; once more") < found("the engine stops"), "{log}");
        assert!(found("the engine stops") < found(sentence), "{log}");
        assert!(!log.contains("after main has returned"), "{log}");
    };
    let (mut cluster, _stream) = up_while_it_answers(&["--drain-timeout", "100s"], "launch=700").await;
    cluster.proxy.terminate();
    assert!(!cluster.proxy.exited(PATIENCE).await.success(), "{}", cluster.proxy.tail());
    assert_told(&cluster.proxy, "tandem: an engine failed: ");

    let environments = BTreeMap::from([("", driver("seed=1")), ("decode-0", driver("launch=700"))]);
    let mut shape = Shape { environments, ..on_gpus("quic") };
    shape.decode.extend(["--drain-timeout", "100s"]);
    let mut cluster = Cluster::start(shape).await;
    let mut stream = cluster.api.stream(&corpus::greedy(&[7; 60], 1500)).await;
    stream.read_chunks(2).await;
    let node = &mut cluster.node("decode-0").process;
    node.terminate();
    assert!(!node.exited(PATIENCE).await.success(), "{}", node.tail());
    assert_told(node, "tandem: the engine of decode-0 failed: ");
}
