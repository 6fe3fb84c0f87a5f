//! What a process says of its memory at start is what it takes, and it holds weights once, however many engines it has.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::PathBuf;

use support::process::{Process, tandem};
use support::{Cluster, Shape};

/// What a process takes beside weights and pools: runtime, tokenizer, connections, and what the allocator keeps. Less
/// than the weights of the model here, so that a second copy of them would not pass for it.
const REST_BYTES_MAX: u64 = 72 << 20;

/// A checkpoint of 28 million random weights, 106 MiB as f32, removed in the end.
struct RandomModel(PathBuf);

impl RandomModel {
    fn make(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tandem-memory-{test}-{}", std::process::id()));
        let status = tandem().args(["model", "random", "s"]).arg(&path).status().unwrap();
        assert!(status.success(), "{status}");
        Self(path)
    }

    fn path(&self) -> String {
        self.0.display().to_string()
    }
}

impl Drop for RandomModel {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// MiB of weights, and of the pools of all engines, as a process logs them.
fn reported(process: &Process) -> (u64, Vec<u64>) {
    let log = process.log();
    let reports = log.lines().filter_map(|line| line.split_once("memory: ")).map(|(_, report)| report);
    let mib_before = |report: &str, what: &str| -> u64 {
        let (before, _) = report.split_once(what).unwrap_or_else(|| panic!("no {what:?} in {report:?}"));
        before.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let all = reports.map(|report| (mib_before(report, " MiB of weights"), mib_before(report, " MiB of KV pool")));
    let (weights, pools): (Vec<u64>, Vec<u64>) = all.unzip();
    assert!(!weights.is_empty() && weights.iter().all(|num| *num == weights[0]), "{weights:?}");
    (weights[0], pools)
}

/// Bytes of memory that are no file's.
fn resident_bytes(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let kib = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    (kib("RssAnon:") + kib("RssShmem:")) << 10
}

/// Weights are counted once, pools all of them.
fn check(process: &Process, num_engines: usize) {
    let (weights, pools) = reported(process);
    assert_eq!(pools.len(), num_engines, "{pools:?}");
    assert!(weights << 20 > REST_BYTES_MAX, "{weights} MiB of weights could hide");
    let counted = (weights + pools.iter().sum::<u64>()) << 20;
    let resident = resident_bytes(process);
    let name = process.name();
    assert!(resident >= counted - counted / 20, "{name}: {resident} bytes resident, {counted} counted");
    assert!(resident <= counted + REST_BYTES_MAX, "{name}: {resident} bytes resident, {counted} counted");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_holds_the_weights_of_its_engines_once() {
    let model = RandomModel::make("one");
    let path = model.path();
    let engines = ["--num-prefill-nodes", "2", "--num-decode-nodes", "1"];
    let memory = ["--model", &path, "--dtype", "float32", "--kv-cache-memory-bytes", "32MiB"];
    let cluster = Cluster::up(&[engines.as_slice(), &memory].concat()).await;
    check(&cluster.proxy, 3);
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_are_processes_of_their_own_report_what_they_take() {
    let model = RandomModel::make("apart");
    // The shape of a cluster is written in place elsewhere.
    let path: &'static str = model.path().leak();
    let nodes = vec!["--threads", "1", "--kv-cache-memory-bytes", "32MiB", "--dtype", "float32"];
    let cluster = Cluster::start(Shape { model: path, nodes, ..Shape::default() }).await;
    for node in &cluster.nodes {
        check(&node.process, 1);
    }
    cluster.shut_down().await;
}
