//! How processes start and end: what is wrong is told before a model is loaded, and who is told to leave leaves in order;
//! flags, environment and file.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use futures::future::join_all;
use support::client::Api;
use support::cluster::{NOISE_MODEL, Scratch, endpoint_url, make_certs, node_args, strings, with_port};
use support::corpus;
use support::process::{Process, ROOT, tandem};
use support::wait::{self, SOON};
use support::{Cluster, Shape};

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_of_the_proxy_finishes_running_streams() {
    let mut cluster = Cluster::start(Shape::default()).await;
    let body = corpus::greedy(&[7; 60], 400);
    let expected = cluster.api.complete(&body).await;
    let mut stream = cluster.api.stream(&body).await;
    stream.read_chunks(2).await;
    cluster.proxy.terminate();
    assert_eq!(stream.rest().await.unwrap(), expected);
    let status = cluster.proxy.exited(SOON).await;
    assert!(status.success(), "{status}");
    cluster.restart_proxy().await;
    assert_eq!(cluster.api.complete(&body).await, expected);
    cluster.shut_down().await;
}

/// As where the output goes to `head`, or to a shipper of logs that dies.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_whose_output_nobody_reads_any_more_serves_and_leaves_in_order() {
    let scratch = Scratch::new();
    let flags = ["up", "--port", "0", "--model", NOISE_MODEL, "--kv-cache-memory-bytes", "64MiB"];
    let mut process = Process::start_unread("up", &strings(&flags), scratch.path());
    let api = Api::new(&endpoint_url(&mut process).await);
    for _ in 0..3 {
        let answer = wait::within("an answer", SOON, api.complete(&corpus::greedy(&[7; 60], 20))).await;
        assert_eq!(answer.choices[0].finish.as_deref(), Some("length"));
    }
    process.terminate();
    let status = process.exited(SOON).await;
    assert!(status.success(), "{status}");
}

/// `timeout` signals its child and then the whole group: one request to leave arrives twice.
#[tokio::test(flavor = "multi_thread")]
async fn two_signals_at_once_are_one_and_a_later_one_ends_the_process() {
    let mut cluster = Cluster::start(Shape::default()).await;
    let body = corpus::greedy(&[7; 60], 400);
    let expected = cluster.api.complete(&body).await;
    let signals: [fn(&mut Process); 2] = [Process::terminate, Process::interrupt];
    for (num_lives, signal) in signals.into_iter().enumerate() {
        let mut stream = cluster.api.stream(&body).await;
        stream.read_chunks(2).await;
        signal(&mut cluster.proxy);
        wait::until("the proxy drains", SOON, async || {
            let num_told = cluster.proxy.log().matches("draining; once more").count();
            (num_told > num_lives).then_some(()).ok_or_else(|| cluster.proxy.tail())
        })
        .await;
        signal(&mut cluster.proxy);
        assert_eq!(stream.rest().await.unwrap(), expected);
        let status = cluster.proxy.exited(SOON).await;
        assert!(status.success(), "{status}");
        cluster.restart_proxy().await;
    }
    let mut stream = cluster.api.stream(&corpus::greedy(&[7; 60], 4000)).await;
    stream.read_chunks(2).await;
    let told_at = Instant::now();
    let status = wait::until("the proxy ends at once", SOON, async || {
        cluster.proxy.exit_status().ok_or_else(|| {
            cluster.proxy.terminate();
            "it drains".to_string()
        })
    })
    .await;
    assert_eq!(status.code(), Some(130));
    assert!(told_at.elapsed() >= Duration::from_secs(1), "after {:?}", told_at.elapsed());
    drop(stream);
    cluster.restart_proxy().await;
    cluster.shut_down().await;
}

/// A checkpoint of which one file is a pipe that nobody writes: reading it takes forever.
fn endless_model(dir: &Path, endless: &str) -> PathBuf {
    let folder = dir.join(format!("without-{endless}"));
    std::fs::create_dir_all(&folder).unwrap();
    for entry in std::fs::read_dir(Path::new(ROOT).join(NOISE_MODEL)).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != endless {
            std::os::unix::fs::symlink(entry.path(), folder.join(entry.file_name())).unwrap();
        }
    }
    let made = std::process::Command::new("mkfifo").arg(folder.join(endless)).status().unwrap();
    assert!(made.success());
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_says_before_it_loads_what_is_wrong_with_its_ports_folders_and_proxies() {
    let scratch = Scratch::new();
    let dir = scratch.path();
    make_certs(dir, &strings(&["prefill-0"]), &strings(&["decode-0"]));
    let tls = dir.display().to_string();
    let model = endless_model(dir, "config.json").display().to_string();
    let taken_tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = taken_tcp.local_addr().unwrap().port().to_string();
    let taken_udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let udp = taken_udp.local_addr().unwrap().port().to_string();
    let file = dir.join("file");
    std::fs::write(&file, "no folder").unwrap();
    let disk = ["--store-disk-path", &file.display().to_string(), "--store-disk-bytes", "1GiB"].map(str::to_string);
    let decode = || strings(&["decode-node", "--node-id", "decode-0", "--tls-dir", &tls]);
    let prefill = || strings(&["prefill-node", "--node-id", "prefill-0", "--tls-dir", &tls]);
    let cases = [
        (decode(), vec!["--metrics-port", &tcp], format!("listen on 127.0.0.1:{tcp} for metrics (--metrics-port)")),
        (decode(), vec!["--register", "nowhere.invalid:1"], "look up nowhere.invalid:1".to_string()),
        (decode(), vec!["--port", &udp], format!("cannot listen on UDP 127.0.0.1:{udp}")),
        (decode(), vec!["--host", "192.0.2.1", "--port", "0"], "cannot listen on UDP 192.0.2.1:0".to_string()),
        (prefill(), vec!["--port", "0", "--bulk-port", &udp], format!("cannot listen on UDP 127.0.0.1:{udp}")),
        (prefill(), vec!["--store-remote-url", "ftp://host/x"], "\"ftp\" is not known: expected fs, redis".to_string()),
        (decode(), disk.iter().map(String::as_str).collect(), "as --store-disk-path".to_string()),
        (strings(&["up"]), vec!["--port", &tcp], format!("cannot listen on TCP 127.0.0.1:{tcp}")),
        (strings(&["up"]), vec!["--store-remote-url", "nothing"], "--store-remote-url: this is no URL".to_string()),
        (strings(&["up"]), disk.iter().map(String::as_str).collect(), "as --store-disk-path".to_string()),
    ];
    for (mut args, flags, expected) in cases {
        args.extend(strings(&["--model", &model]));
        args.extend(strings(&flags));
        let args = if flags.contains(&"--port") { args } else { with_port(&args, 0) };
        let mut process = Process::start("it", &args, dir);
        assert!(!process.exited(SOON).await.success(), "{}", process.tail());
        assert!(process.log().contains(&expected), "{expected}: {}", process.tail());
        assert!(process.log().lines().last().unwrap().starts_with("tandem: "), "{}", process.tail());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_loads_leaves_when_it_is_told_to() {
    let scratch = Scratch::new();
    let dir = scratch.path();
    make_certs(dir, &[], &strings(&["decode-0"]));
    let mut loading = Vec::new();
    for (role, endless) in [("up", "tokenizer.json"), ("proxy", "tokenizer.json"), ("decode-node", "config.json")] {
        let folder = endless_model(&dir.join(role), endless);
        let mut args = match role {
            "up" => strings(&[role]),
            "proxy" => strings(&[role, "--tls-dir", &dir.display().to_string(), "--decode-node", "127.0.0.1:1"]),
            _ => node_args(role, "decode-0", dir),
        };
        args.extend(strings(&["--model", &folder.display().to_string()]));
        loading.push((Process::start(role, &with_port(&args, 0), dir), folder.join(endless)));
    }
    let mut pipes = Vec::new();
    for (process, pipe) in &mut loading {
        // There is a reader only once it loads.
        let opened = wait::until("it reads the model", SOON, async || {
            let write = std::fs::File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&*pipe);
            write.map_err(|error| format!("{error}: {}", process.tail()))
        });
        pipes.push(opened.await);
        process.terminate();
    }
    for (process, _) in &mut loading {
        assert!(process.exited(SOON).await.success(), "{}", process.tail());
        assert!(process.log().contains("it leaves before it is ready"), "{}", process.tail());
    }
    drop(pipes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_is_cut_at_its_time_limit_and_the_request_goes_on_elsewhere() {
    let shape = Shape { num_decode: 2, decode: vec!["--drain-timeout", "0s"], ..Shape::default() };
    let mut cluster = Cluster::start(shape).await;
    let body = corpus::greedy(&[7; 60], 600);
    let expected = cluster.api.complete(&body).await;
    let mut streams = join_all((0..2).map(|_| cluster.api.stream(&body))).await;
    for stream in &mut streams {
        stream.read_chunks(2).await;
    }
    let leaving = cluster.node("decode-1");
    leaving.process.terminate();
    let told_at = Instant::now();
    assert!(leaving.process.exited(SOON).await.success());
    assert!(told_at.elapsed() < Duration::from_secs(3), "it left after {:?}", told_at.elapsed());
    for stream in streams {
        assert_eq!(stream.rest().await.unwrap(), expected);
    }
    cluster.settle().await;
    cluster.shut_down().await;
}

/// Runs a command to its end: a server that does start by mistake is ended by the deadline of `timeout`.
fn run(args: &[&str]) -> Output {
    let mut command = std::process::Command::new("timeout");
    command.args(["60", support::process::TANDEM]).args(args).current_dir(ROOT);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TANDEM_") {
            command.env_remove(name);
        }
    }
    command.output().unwrap()
}

#[test]
fn mistakes_on_the_command_line_are_said_in_one_sentence() {
    let scratch = Scratch::new();
    let nowhere = scratch.path().join("nowhere").display().to_string();
    let qwen = format!("{ROOT}/tests/checkpoints/tiny.json");
    let cases: [(&[&str], &str); 25] = [
        (&["--retry-budget", "-1"], "\"-1\" is not a share from 0 to 10"),
        (&["--block-size", "17"], "multiple of 16"),
        (&["--kv-cache-memory-bytes", "a lot"], "512MiB"),
        (&["--max-num-seqs", "0"], "at least 1"),
        (&["--max-num-batched-tokens", "8", "--max-num-seqs", "9"], "--max-num-batched-tokens is 8"),
        (&["--blok-size", "16"], "--block-size"),
        (&["--model", &nowhere], "nowhere"),
        (&["--model", &qwen], "tiny.json"),
        (&["--kv-cache-memory-bytes", "1KiB"], "--kv-cache-memory-bytes"),
        (&["--dtype", "float7"], "float32"),
        (&["--device", "gpu"], "auto, cpu, a GPU such as cuda:0, or sim"),
        // No such GPU, no driver, or a program without CUDA.
        (&["--device", "cuda:4096"], if cfg!(feature = "cuda") { "driver" } else { "built without CUDA" }),
        (&["--kv-transports", "shm"], "add quic"),
        (&["decode-node", "--kv-transports", "rdma"], "quic, shm"),
        (&["--kv-transports", "quic,nixl", "--nixl-library", "/nowhere/libnixl_capi.so"], "/nowhere/libnixl_capi.so"),
        (&["--kv-congestion-control", "reno"], "cubic, bbr, fixed"),
        (&["--kv-max-udp-payload-size", "576"], "use 1200, which QUIC needs, to 65507"),
        (&["--kv-window-bytes", "2GiB"], "use 256KiB"),
        (&["--kv-congestion-control", "fixed"], "fixed needs --kv-window-bytes"),
        (&["decode-node", "--busy-poll", "2ms"], "use at most 1ms"),
        (&["--config", &nowhere], "nowhere"),
        (&["proxy", "--port", "0"], "--decode-node"),
        (&["decode-node", "--tls-dir", &nowhere], "nowhere"),
        (&["prefill-node"], "tandem certs"),
        (&["prefil-node"], "not a command"),
    ];
    for (args, expected) in cases {
        let output = run(args);
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let code = output.status.code();
        assert!(matches!(code, Some(1 | 2)), "{args:?} left with {code:?}\n{stdout}\n{stderr}");
        assert!(stderr.contains(expected), "{args:?}: expected \"{expected}\" in\n{stderr}");
        assert!(!stderr.contains("panicked") && !stdout.contains("ready"), "{args:?}\n{stdout}\n{stderr}");
    }
}

#[test]
fn settings_come_from_flags_then_environment_then_file() {
    let scratch = Scratch::new();
    let file = scratch.path().join("tandem.toml");
    let said = |args: &[&str], block_size: Option<&str>| {
        let mut command = tandem();
        command.arg("up").args(args).arg("--config").arg(&file);
        command.envs(block_size.map(|size| ("TANDEM_BLOCK_SIZE", size)));
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    // Each source is told by the mistake in it; the model that is not there ends the process in any case.
    std::fs::write(&file, "[common]\nblock-size = 18\nmodel = \"nowhere\"\n[up]\nblock_size = 19\n").unwrap();
    assert!(said(&[], None).contains("19 tokens"), "the command's own section wins over [common]");
    assert!(said(&[], Some("17")).contains("TANDEM_BLOCK_SIZE"), "the environment wins over the file");
    let of_flag = said(&["--block-size", "33"], Some("17"));
    assert!(of_flag.contains("33 tokens"), "a flag wins over the environment: {of_flag}");
    let of_model = said(&["--block-size", "32"], Some("17"));
    assert!(of_model.contains("nowhere"), "the file's model is taken: {of_model}");
    std::fs::write(&file, "[up]\nblok-size = 16\n").unwrap();
    assert!(said(&[], None).contains("did you mean \"block-size\""));
}

#[test]
fn variables_that_set_nothing_are_told_and_an_empty_key_is_refused() {
    let said = |name: &str, value: &str| {
        let output = tandem().args(["up", "--model", "nowhere"]).env(name, value).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let typo = said("TANDEM_BLOK_SIZE", "32");
    assert_eq!(typo.matches("TANDEM_BLOK_SIZE").count(), 1, "{typo}");
    assert!(typo.contains("did you mean TANDEM_BLOCK_SIZE?") && typo.contains("nowhere"), "{typo}");
    assert!(!said("TANDEM_BLOCK_SIZE", "32").contains("sets nothing"));
    let empty = said("TANDEM_API_KEY", "");
    assert!(empty.contains("TANDEM_API_KEY is empty: an empty key is no key") && !empty.contains("nowhere"), "{empty}");
}

/// A checkpoint without weights tells what is looked at before them.
#[test]
fn certificates_and_the_text_side_are_checked_before_the_weights() {
    let scratch = Scratch::new();
    let dir = scratch.path();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        // Not every checkpoint has every file.
        let _ = std::fs::copy(format!("{ROOT}/models/tiny/{file}"), dir.join(file));
    }
    make_certs(dir, &strings(&["prefill-0"]), &strings(&["decode-0"]));
    let (folder, certs) = (dir.display().to_string(), dir.display().to_string());
    let said = |args: &[&str]| {
        let args: Vec<&str> = args.iter().copied().chain(["--model", &folder]).collect();
        String::from_utf8(run(&args).stderr).unwrap()
    };
    let of_weights = said(&["up"]);
    assert!(of_weights.contains("safetensors"), "{of_weights}");
    let of_node = said(&["decode-node", "--tls-dir", &certs, "--node-id", "prefill-0"]);
    let expected = "this node is decode-node \"prefill-0\", its certificate was issued to prefill-node \"prefill-0\"";
    assert!(of_node.contains(expected), "{of_node}");
    std::fs::write(dir.join("chat_template.jinja"), "{% for %}").unwrap();
    let of_template = said(&["up"]);
    assert!(of_template.contains("template") && !of_template.contains("safetensors"), "{of_template}");
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    let of_tokenizer = said(&["up"]);
    assert!(of_tokenizer.contains("tokenizer.json") && !of_tokenizer.contains("safetensors"), "{of_tokenizer}");
}

#[test]
fn each_role_has_a_binary_of_its_own() {
    for role in ["proxy", "prefill-node", "decode-node"] {
        let binary = std::path::Path::new(support::process::TANDEM).with_file_name(role);
        let output = std::process::Command::new(&binary).arg("--help").output();
        let output = output.unwrap_or_else(|error| panic!("{}: {error}", binary.display()));
        let help = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && help.contains(&format!("Usage: {role}")), "{help}");
    }
}

#[test]
fn help_names_every_flag_with_its_default() {
    for command in ["up", "proxy", "prefill-node", "decode-node", "certs"] {
        let output = run(&[command, "--help"]);
        let help = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{command} --help");
        let expected: &[&str] = match command {
            "certs" => &["--dir", "--days"],
            "proxy" => &["--model", "--served-model-name", "--host", "--port", "--seed", "[default: 8000]"],
            _ => &[
                "--model",
                "--dtype",
                "--max-model-len",
                "--max-num-seqs",
                "--max-num-batched-tokens",
                "--block-size",
                "--kv-cache-memory-bytes",
                "--host",
                "--port",
                "[default: 16]",
            ],
        };
        for flag in expected {
            assert!(help.contains(flag), "{command} --help lacks {flag}\n{help}");
        }
        let is_node = command.ends_with("-node");
        assert_eq!(help.contains("--served-model-name") || help.contains("--seed"), !is_node && command != "certs");
    }
    assert!(run(&["--version"]).status.success());
}

#[test]
fn certs_are_made_once_and_keys_are_private() {
    let scratch = Scratch::new();
    let dir = scratch.path();
    make_certs(dir, &strings(&["prefill-0"]), &strings(&["decode-0"]));
    let ca = std::fs::read(dir.join("ca.pem")).unwrap();
    for key in ["ca.key", "prefill-0.key", "decode-0.key", "proxy.key"] {
        let mode = std::fs::metadata(dir.join(key)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "others may read {key}: {mode:o}");
    }
    // Another node later: the same CA.
    let output = tandem().args(["certs", "--decode-node", "decode-1", "--dir"]).arg(dir).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read(dir.join("ca.pem")).unwrap(), ca);
    assert!(dir.join("decode-1.pem").exists());
    let output = tandem().args(["certs", "--decode-node", "a", "--proxy", "a", "--dir"]).arg(dir).output().unwrap();
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("given twice"));
}
