//! Other engines under the same rows: llama.cpp, started anew for each; vLLM and Transformers, which stay and are asked.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use common::config::DeviceChoice;
use engine::weights::ComputeDtype;
use serde_json::Value;

use super::Row;

/// No load and no row takes so long.
const TIMEOUT: Duration = Duration::from_secs(900);

/// A line that a peer writes has fewer bytes; more is no answer.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// Lines that may wait to be read; a peer that writes more waits.
const LINES_MAX: usize = 64;

const VLLM_SCRIPT: &str = include_str!("../../peers/vllm_engine.py");
const TRANSFORMERS_SCRIPT: &str = include_str!("../../peers/transformers_engine.py");

/// Another engine.
pub enum Peer {
    /// llama.cpp's own benchmarks.
    Llama {
        /// llama-bench.
        program: PathBuf,
        /// A GGUF file.
        model: PathBuf,
        /// Threads.
        threads: usize,
    },
    /// One that has loaded and answers in lines: vLLM's CPU build, or Transformers.
    Asked(&'static str, Talker),
}

impl Peer {
    /// llama.cpp with a GGUF file.
    ///
    /// # Errors
    /// If it is no GGUF file.
    pub fn llama(program: &Path, model: &Path, threads: usize) -> anyhow::Result<Self> {
        ensure!(
            model.extension().is_some_and(|extension| extension == "gguf"),
            "llama.cpp reads GGUF files, {} is none: name one with --llama-model (tandem model gguf writes it)",
            model.display()
        );
        Ok(Self::Llama { program: program.to_path_buf(), model: model.to_path_buf(), threads })
    }

    /// vLLM with a checkpoint folder's shape; returns when it has loaded.
    ///
    /// # Errors
    /// If it does not start.
    pub fn vllm(
        python: &Path,
        model: &Path,
        threads: usize,
        dtype: ComputeDtype,
        max_model_len: usize,
        max_num_seqs: usize,
    ) -> anyhow::Result<Self> {
        ensure!(
            model.is_dir(),
            "vLLM is given a checkpoint folder, {} is none: name one with --vllm-model",
            model.display()
        );
        let mut command = Command::new(python);
        command.args(["-c", VLLM_SCRIPT]).arg(model).args(["--threads", &threads.to_string()]);
        command.args(["--dtype", dtype.as_str()]);
        command.args(["--max-model-len", &(max_model_len + 1).to_string()]);
        command.args(["--max-num-seqs", &max_num_seqs.to_string()]);
        // As it advises: its own OpenMP before any other.
        let openmp = python.parent().and_then(Path::parent).map(|home| home.join("lib/libiomp5.so"));
        if let Some(openmp) = openmp.filter(|path| path.exists()) {
            command.env("LD_PRELOAD", openmp);
        }
        let mut talker = Talker::start(command, "vllm")?;
        let ready = talker.answer().context("start vLLM")?;
        ensure!(ready.get("ready") == Some(&Value::Bool(true)), "vLLM said {ready} and not that it is ready");
        Ok(Self::Asked("vLLM", talker))
    }

    /// PyTorch and Transformers with a checkpoint folder's weights, on the same device; returns when it has loaded.
    ///
    /// # Errors
    /// If it does not start.
    pub fn transformers(
        python: &Path,
        model: &Path,
        device: DeviceChoice,
        threads: usize,
        dtype: ComputeDtype,
        is_compiled: bool,
    ) -> anyhow::Result<Self> {
        ensure!(model.is_dir(), "Transformers is given a checkpoint folder, {} is none", model.display());
        let mut command = Command::new(python);
        command.args(["-c", TRANSFORMERS_SCRIPT]).arg(model).args(["--device", &device.to_string()]);
        command.args(["--threads", &threads.to_string(), "--dtype", dtype.as_str()]);
        command.args(is_compiled.then_some("--compile"));
        let mut talker = Talker::start(command, "transformers")?;
        let ready = talker.answer().context("start Transformers")?;
        ensure!(ready.get("ready") == Some(&Value::Bool(true)), "Transformers said {ready} and not that it is ready");
        eprintln!("beside {}", ready["versions"]);
        Ok(Self::Asked("Transformers", talker))
    }

    /// As the table names it.
    pub fn name(&self) -> &'static str {
        match self {
            Peer::Llama { .. } => "llama.cpp",
            Peer::Asked(name, _) => name,
        }
    }

    /// Tokens per second of the row; `None` if there is no program for it, or it says that it cannot.
    ///
    /// # Errors
    /// If the peer fails, says something else or takes too long.
    pub fn measure(&mut self, row: &Row) -> anyhow::Result<Option<f64>> {
        match self {
            Peer::Llama { program, model, threads } => llama(program, model, *threads, row),
            Peer::Asked(name, talker) => {
                talker.ask(&row.to_json())?;
                let answer = talker.answer()?;
                if let Some(reason) = answer.get("skipped").and_then(Value::as_str) {
                    eprintln!("{name} leaves out {}: {reason}", row.name());
                    return Ok(None);
                }
                speed(&answer, "tokens_per_second").map(Some)
            }
        }
    }
}

fn speed(answer: &Value, key: &str) -> anyhow::Result<f64> {
    let speed = answer.get(key).and_then(Value::as_f64).filter(|speed| speed.is_finite() && *speed > 0.0);
    speed.with_context(|| format!("there is no {key} above zero in {answer}"))
}

fn llama(program: &Path, model: &Path, threads: usize, row: &Row) -> anyhow::Result<Option<f64>> {
    let text = |number: usize| number.to_string();
    let (program, args, key) = match *row {
        Row::Prefill { num_tokens } => {
            (program.to_path_buf(), vec!["-p".to_string(), text(num_tokens), "-n".into(), "0".into()], "avg_ts")
        }
        Row::Decode { batch: 1, context, num_tokens } => {
            let args = ["-p", "0", "-n", &num_tokens.to_string(), "-d", &text(context)];
            (program.to_path_buf(), args.map(String::from).to_vec(), "avg_ts")
        }
        Row::Decode { batch, context, num_tokens } => {
            let program = program.with_file_name("llama-batched-bench");
            if !program.exists() {
                return Ok(None);
            }
            let all = batch * (context + num_tokens as usize);
            let args =
                ["-npp", &text(context), "-ntg", &num_tokens.to_string(), "-npl", &text(batch), "-c", &text(all)];
            (program, args.map(String::from).to_vec(), "speed_tg")
        }
    };
    let mut command = Command::new(&program);
    command.arg("-m").arg(model).args(["-t", &text(threads), "-fa", "on"]).args(args);
    match key {
        "avg_ts" => command.args(["-r", "1", "-o", "jsonl"]),
        _ => command.args(["--output-format", "jsonl"]),
    };
    let mut talker = Talker::start(command, "llama")?;
    loop {
        // Other lines tell of the machine.
        let line = talker.line()?;
        if let Ok(answer) = serde_json::from_str::<Value>(&line)
            && answer.get(key).is_some()
        {
            return speed(&answer, key).map(Some);
        }
    }
}

/// A process that answers in lines. It is ended when this is dropped.
pub struct Talker {
    child: Child,
    questions: Option<ChildStdin>,
    lines: Receiver<std::io::Result<String>>,
    log: PathBuf,
}

impl Talker {
    pub(super) fn start(mut command: Command, name: &str) -> anyhow::Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let log = std::env::temp_dir().join(format!("tandem-bench-{name}-{}.log", std::process::id()));
        let errors = File::create(&log).with_context(|| format!("make {}", log.display()))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let mut child = command.spawn().with_context(|| format!("start {program}"))?;
        let questions = child.stdin.take();
        let answers = child.stdout.take().context("the process has no output")?;
        let (sender, lines) = sync_channel(LINES_MAX);
        std::thread::spawn(move || {
            let mut answers = BufReader::new(answers);
            loop {
                let mut line = String::new();
                let outcome = answers.by_ref().take(LINE_BYTES_MAX).read_line(&mut line);
                let is_end = !matches!(outcome, Ok(num_bytes) if num_bytes > 0);
                if sender.send(outcome.map(|_| line)).is_err() || is_end {
                    return;
                }
            }
        });
        Ok(Self { child, questions, lines, log })
    }

    pub(super) fn ask(&mut self, question: &Value) -> anyhow::Result<()> {
        let questions = self.questions.as_mut().context("the process has no input")?;
        writeln!(questions, "{question}").with_context(|| format!("ask; see {}", self.log.display()))
    }

    pub(super) fn answer(&mut self) -> anyhow::Result<Value> {
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("{line:?} is no answer; see {}", self.log.display()))
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let deadline = Instant::now() + TIMEOUT;
        let log = self.log.display();
        match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Ok(line)) if !line.is_empty() => Ok(line),
            Ok(Ok(_)) | Err(RecvTimeoutError::Disconnected) => bail!("it ended without an answer; see {log}"),
            Ok(Err(error)) => bail!("its answer cannot be read: {error}; see {log}"),
            Err(RecvTimeoutError::Timeout) => bail!("no answer within {} s; see {log}", TIMEOUT.as_secs()),
        }
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        // One that has ended by itself cannot be killed, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("tandem-peers-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn program(&self, name: &str, script: &str) -> PathBuf {
            let path = self.0.join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    const PREFILL: Row = Row::Prefill { num_tokens: 512 };

    fn decode(batch: usize) -> Row {
        Row::Decode { batch, context: 512, num_tokens: 64 }
    }

    #[test]
    fn llama_bench_is_given_the_row_and_its_speed_is_read() {
        let folder = Folder::new("llama");
        // Speeds that say which arguments came.
        let bench = r#"echo "a line that is no JSON"
case "$*" in
"-m m.gguf -t 2 -fa on -p 512 -n 0 -r 1 -o jsonl") echo '{"avg_ts": 512.5}';;
"-m m.gguf -t 2 -fa on -p 0 -n 64 -d 512 -r 1 -o jsonl") echo '{"avg_ts": 64.5}';;
esac"#;
        let program = folder.program("llama-bench", bench);
        let mut peer = Peer::llama(&program, Path::new("m.gguf"), 2).unwrap();
        assert_eq!(peer.measure(&PREFILL).unwrap(), Some(512.5));
        assert_eq!(peer.measure(&decode(1)).unwrap(), Some(64.5));
        assert_eq!(peer.measure(&decode(8)).unwrap(), None, "without llama-batched-bench");
        let batched = r#"[ "$*" = "-m m.gguf -t 2 -fa on -npp 512 -ntg 64 -npl 8 -c 4608 --output-format jsonl" ] &&
            echo '{"speed_pp": 1.0, "speed_tg": 8.5}'"#;
        folder.program("llama-batched-bench", batched);
        assert_eq!(peer.measure(&decode(8)).unwrap(), Some(8.5));
        let error = peer.measure(&decode(9)).unwrap_err().to_string();
        assert!(error.starts_with("it ended without an answer"), "{error}");
    }

    #[test]
    fn what_peers_cannot_read_is_refused() {
        let folder = Folder::new("refused");
        let error = Peer::llama(Path::new("llama-bench"), &folder.0, 2).err().unwrap().to_string();
        assert!(error.contains("--llama-model"), "{error}");
        let error = Peer::vllm(Path::new("python"), Path::new("m.gguf"), 2, ComputeDtype::Bf16, 10, 1)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("--vllm-model"), "{error}");
    }

    #[test]
    fn transformers_computes_where_this_engine_does_and_may_leave_out_what_does_not_fit() {
        let folder = Folder::new("transformers");
        let answers = r#"case "$*" in *"--device cuda:1 --threads 2 --dtype bfloat16 --compile")
    echo '{"ready": true, "versions": "PyTorch 2"}';; *) exit 1;; esac
while read -r question; do
    case "$question" in
    '{"phase":"prefill","num_tokens":512}') echo '{"tokens_per_second": 430.5}';;
    *) echo '{"skipped": "out of memory"}';;
    esac
done"#;
        let (program, device) = (folder.program("python", answers), DeviceChoice::Cuda(1));
        let start =
            |model: &Path, is_compiled| Peer::transformers(&program, model, device, 2, ComputeDtype::Bf16, is_compiled);
        let mut peer = start(&folder.0, true).unwrap();
        assert_eq!(peer.measure(&PREFILL).unwrap(), Some(430.5));
        assert_eq!(peer.measure(&decode(8)).unwrap(), None);
        assert!(start(Path::new("m.gguf"), true).err().unwrap().to_string().contains("checkpoint folder"));
        // Not ready: it was asked for something else.
        assert!(start(&folder.0, false).is_err());
    }

    #[test]
    fn vllm_is_asked_line_by_line_and_what_is_no_speed_is_an_error() {
        let folder = Folder::new("vllm");
        let answers = r#"case "$*" in *"--threads 2 --dtype float32 --max-model-len 601"*) echo '{"ready": true}';; esac
while read -r question; do
    case "$question" in
    '{"phase":"prefill","num_tokens":512}') echo '{"tokens_per_second": 430.5}';;
    '{"phase":"decode","batch":8,"context":512,"num_tokens":64}') echo '{"tokens_per_second": 91.5}';;
    *) echo '{"tokens_per_second": 0}';;
    esac
done"#;
        let mut peer = Peer::vllm(&folder.program("python", answers), &folder.0, 2, ComputeDtype::F32, 600, 8).unwrap();
        assert_eq!(peer.measure(&PREFILL).unwrap(), Some(430.5));
        assert_eq!(peer.measure(&decode(8)).unwrap(), Some(91.5));
        let error = peer.measure(&decode(9)).unwrap_err().to_string();
        assert!(error.contains("no tokens_per_second above zero"), "{error}");

        let error =
            Peer::vllm(&folder.program("python2", "exit 3"), &folder.0, 2, ComputeDtype::F32, 600, 8).err().unwrap();
        assert!(error.root_cause().to_string().starts_with("it ended without an answer"), "{error:#}");
    }
}
