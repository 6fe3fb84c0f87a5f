//! Prefill and decode speed of the engine, without a network, beside the limits of the machine and beside peers:
//! `tandem bench engine`.
//!
//! A row is one prompt length, or one batch size of decode. In each round every row is measured in turn: first what
//! the machine can do at that moment ([`limit`]), then this engine, then each peer ([`peers`]), so that a drift of the
//! machine meets all of them. A share is an engine's speed over that of the limit, a ratio this engine's speed over
//! a peer's, both within the round. With `--sharing` two engines run at once instead ([`sharing`]).

pub mod limit;
pub mod load;
pub mod peers;
pub mod report;
pub mod sharing;
pub mod target;

use std::fmt;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use common::config::values::parse_bytes_above_zero;
use common::config::{DeviceChoice, Dtype, PrefillAttention};
use engine::weights::ComputeDtype;
use serde_json::{Value, json};

use crate::serve::provenance::Provenance;
use peers::Peer;
use report::{EngineReport, RowResult};
use sharing::SharingReport;
use target::Target;

/// What is measured.
#[derive(Debug, Args)]
pub struct EngineBenchArgs {
    /// Checkpoint folder or GGUF file.
    #[arg(long, value_name = "PATH", default_value = "models/tiny")]
    pub model: PathBuf,
    /// What computes: `cpu`, or a GPU such as `cuda:0`.
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceChoice::Cpu)]
    pub device: DeviceChoice,
    /// Element type of weights and KV.
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Prompt lengths in tokens.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "512,2048")]
    pub prompt_len: Vec<usize>,
    /// Batch sizes of decode.
    #[arg(long, value_name = "SEQUENCES", value_delimiter = ',', default_value = "1,8,32")]
    pub batch: Vec<usize>,
    /// Context of each sequence in decode, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    pub context: usize,
    /// Tokens that each sequence generates in decode.
    #[arg(long, value_name = "TOKENS", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..))]
    pub num_tokens: u32,
    /// Each row is measured so often, in turn with all others; medians are printed.
    #[arg(long, alias = "runs", value_name = "ROUNDS", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// Threads that compute. Default: all cores.
    #[arg(long, value_name = "THREADS")]
    pub threads: Option<usize>,
    /// Instruction set: auto, portable, portable-tiles, avx2, avx512, avx512vnni, avx512bf16 or amx.
    #[arg(long, value_name = "ISA", default_value = "auto")]
    pub isa: String,
    /// Tokens of a step at most, those of prompts among them.
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    pub max_num_batched_tokens: usize,
    /// On a GPU: as the nodes' flag.
    #[arg(long)]
    pub batch_invariant: bool,
    /// On a GPU: as the nodes' flag.
    #[arg(long)]
    pub enforce_eager: bool,
    /// On a GPU: as the nodes' flag.
    #[arg(long)]
    pub enable_pdl: bool,
    /// On a GPU: as the nodes' flag.
    #[arg(long, value_enum, value_name = "KERNEL", default_value_t = PrefillAttention::Portable)]
    pub prefill_attention: PrefillAttention,
    /// On a GPU: bytes of the copy that reading is held against.
    #[arg(long, value_name = "BYTES", default_value = "1GiB", value_parser = parse_bytes_above_zero)]
    pub limit_copy_bytes: u64,
    /// On a GPU: rows, columns and what is summed over of the bf16 product that arithmetic is held against.
    #[arg(long, value_name = "SIZE", default_value_t = 8192)]
    pub limit_product: usize,
    /// llama.cpp's llama-bench, to run beside; batches need its llama-batched-bench in the same folder.
    #[arg(long, value_name = "PROGRAM")]
    pub llama_bench: Option<PathBuf>,
    /// The GGUF file for it. Default: --model.
    #[arg(long, value_name = "FILE", requires = "llama_bench")]
    pub llama_model: Option<PathBuf>,
    /// Python that has vLLM's CPU build, to run beside.
    #[arg(long, value_name = "PROGRAM")]
    pub vllm_python: Option<PathBuf>,
    /// The checkpoint folder for it; its weights are not read. Default: --model.
    #[arg(long, value_name = "FOLDER", requires = "vllm_python")]
    pub vllm_model: Option<PathBuf>,
    /// Python that has PyTorch and Transformers, to run beside on the same device with the same weights.
    #[arg(long, value_name = "PROGRAM")]
    pub transformers_python: Option<PathBuf>,
    /// Its decode steps by torch.compile, which takes a while for each batch.
    #[arg(long, requires = "transformers_python")]
    pub transformers_compile: bool,
    /// Instead: an engine that computes prompts of the first length beside one that decodes the first batch, on the same
    /// cores, in one process and in two; each against itself alone.
    #[arg(long, conflicts_with_all = ["llama_bench", "vllm_python", "transformers_python"])]
    pub sharing: bool,
    /// The process of `--sharing` that prefills, which it starts itself.
    #[arg(long, hide = true)]
    pub sharing_prefill: bool,
    /// Also writes the result as JSON, with command, commit and machine.
    #[arg(long, value_name = "FILE")]
    pub save_result: Option<PathBuf>,
}

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Row {
    /// One prompt.
    Prefill {
        /// Its length.
        num_tokens: usize,
    },
    /// Sequences that generate together.
    Decode {
        /// How many.
        batch: usize,
        /// Tokens of each before the first that counts.
        context: usize,
        /// Tokens that each generates.
        num_tokens: u32,
    },
}

impl Row {
    /// As the table names it.
    pub fn name(&self) -> String {
        match self {
            Row::Prefill { num_tokens } => format!("prefill {num_tokens}"),
            Row::Decode { batch, context, .. } => format!("decode batch {batch}, context {context}"),
        }
    }

    /// As part of a result, and what peers are asked.
    pub fn to_json(&self) -> Value {
        match *self {
            Row::Prefill { num_tokens } => json!({"phase": "prefill", "num_tokens": num_tokens}),
            Row::Decode { batch, context, num_tokens } => {
                json!({"phase": "decode", "batch": batch, "context": context, "num_tokens": num_tokens})
            }
        }
    }
}

impl EngineBenchArgs {
    fn rows(&self) -> Vec<Row> {
        let prefill = self.prompt_len.iter().map(|len| Row::Prefill { num_tokens: *len });
        let (context, num_tokens) = (self.context, self.num_tokens);
        let decode = self.batch.iter().map(|batch| Row::Decode { batch: *batch, context, num_tokens });
        prefill.chain(decode).collect()
    }

    fn peers(&self, threads: usize, dtype: ComputeDtype) -> anyhow::Result<Vec<Peer>> {
        let mut peers = Vec::new();
        if let Some(program) = &self.llama_bench {
            peers.push(Peer::llama(program, self.llama_model.as_ref().unwrap_or(&self.model), threads)?);
        }
        if let Some(python) = &self.vllm_python {
            let model = self.vllm_model.as_ref().unwrap_or(&self.model);
            let longest = self.rows().iter().map(Row::tokens_of_a_sequence).max().unwrap_or(0);
            let batch = self.batch.iter().copied().max().unwrap_or(1);
            peers.push(Peer::vllm(python, model, threads, dtype, longest, batch)?);
        }
        if let Some(python) = &self.transformers_python {
            peers.push(Peer::transformers(
                python,
                &self.model,
                self.device,
                threads,
                dtype,
                self.transformers_compile,
            )?);
        }
        Ok(peers)
    }
}

impl Row {
    fn tokens_of_a_sequence(&self) -> usize {
        match *self {
            Row::Prefill { num_tokens } => num_tokens + 1,
            Row::Decode { context, num_tokens, .. } => context + num_tokens as usize,
        }
    }

    fn num_sequences(&self) -> usize {
        match *self {
            Row::Prefill { .. } => 1,
            Row::Decode { batch, .. } => batch,
        }
    }
}

/// What came out.
#[derive(Debug)]
pub enum EngineOutcome {
    /// Rows, one at a time.
    Rows(EngineReport),
    /// Two engines at once.
    Sharing(SharingReport),
    /// Nothing: the answers were given while it ran.
    Answered,
}

impl EngineOutcome {
    /// The result.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Rows(report) => report.to_json(),
            Self::Sharing(report) => report.to_json(),
            Self::Answered => Value::Null,
        }
    }
}

impl fmt::Display for EngineOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rows(report) => report.fmt(f),
            Self::Sharing(report) => report.fmt(f),
            Self::Answered => Ok(()),
        }
    }
}

/// Runs the workload.
///
/// # Errors
/// If the model cannot be loaded, or the engine or a peer fails.
pub fn run(args: &EngineBenchArgs, provenance: Provenance) -> anyhow::Result<EngineOutcome> {
    let rows = args.rows();
    anyhow::ensure!(!rows.is_empty(), "nothing to measure: give --prompt-len or --batch");
    let has_tokens = |row: &Row| match *row {
        Row::Prefill { num_tokens } => num_tokens > 0,
        Row::Decode { batch, context, .. } => batch > 0 && context > 0,
    };
    anyhow::ensure!(rows.iter().all(has_tokens), "--prompt-len, --batch and --context are at least 1");
    anyhow::ensure!(
        args.max_num_batched_tokens >= args.batch.iter().copied().max().unwrap_or(0).max(1),
        "--max-num-batched-tokens is fewer than the sequences of the largest --batch, each of which takes one"
    );
    run_on(args, &Target::load(args)?, rows, provenance)
}

fn run_on(
    args: &EngineBenchArgs,
    target: &Target,
    rows: Vec<Row>,
    provenance: Provenance,
) -> anyhow::Result<EngineOutcome> {
    let outcome = if args.sharing || args.sharing_prefill {
        let Target::Cpu(model) = target else { anyhow::bail!("--sharing is about cores: it needs --device cpu") };
        if args.sharing_prefill {
            sharing::run_other(args, model.clone())?;
            return Ok(EngineOutcome::Answered);
        }
        EngineOutcome::Sharing(sharing::run(args, model, provenance)?)
    } else {
        EngineOutcome::Rows(run_rows(args, target, rows, provenance)?)
    };
    if let Some(path) = &args.save_result {
        let json = serde_json::to_string_pretty(&outcome.to_json()).context("write the result")?;
        std::fs::write(path, json).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(outcome)
}

fn run_rows(
    args: &EngineBenchArgs,
    target: &Target,
    rows: Vec<Row>,
    provenance: Provenance,
) -> anyhow::Result<EngineReport> {
    // Before the pool, which may leave little.
    let machine = target.machine(args, &rows)?;
    let mut load = target.start(args, &rows).context("start the engine")?;
    let mut peers = args.peers(target.num_threads(), target.dtype())?;

    let mut results: Vec<RowResult> = rows.iter().map(|row| RowResult::new(*row, &peers)).collect();
    // The first run of each warms caches and pages, here and at the peers.
    for row in &rows {
        load.measure(row)?;
        for peer in &mut peers {
            peer.measure(row).with_context(|| format!("warm {} up", peer.name()))?;
        }
    }
    for round in 0..args.rounds {
        for result in &mut results {
            eprintln!("round {} of {}: {}", round + 1, args.rounds, result.row.name());
            let limit = machine.limit(&target.work(&result.row, args.max_num_batched_tokens))?;
            let speed = load.measure(&result.row)?;
            // Said at once: whoever cuts it short has these.
            eprintln!("  {speed:.1} tok/s, limit {:.1} tok/s", limit.tokens_per_second);
            result.add(limit, speed);
            for (peer, speeds) in peers.iter_mut().zip(&mut result.peers) {
                let speed = peer.measure(&result.row).with_context(|| format!("measure {}", peer.name()))?;
                if let Some(speed) = speed {
                    eprintln!("  {} {speed:.1} tok/s", peer.name());
                }
                speeds.tokens_per_second.extend(speed);
            }
        }
    }
    Ok(EngineReport::new(target.setting(args), results, provenance))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: EngineBenchArgs,
    }

    #[test]
    fn every_row_is_measured_in_every_round_beside_its_limit() {
        let file = std::env::temp_dir().join(format!("tandem-engine-bench-{}.json", std::process::id()));
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny");
        let line = ["engine", "--model", model, "--prompt-len", "40,80", "--batch", "3", "--context", "30"];
        // So many that no sequence ends before the last is submitted.
        let rest = ["--num-tokens", "1000", "--rounds", "2", "--threads", "2", "--save-result"];
        let mut args = Command::parse_from(line.iter().chain(&rest).copied().chain([file.to_str().unwrap()])).args;
        args.dtype = Dtype::Bfloat16;
        let provenance = Provenance { command: "bench engine".into(), commit: None, cpu_model: None, num_cores: None };
        let report = run(&args, provenance).unwrap();
        let json: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        std::fs::remove_file(&file).unwrap();
        assert_eq!((&json["setting"], &json["command"]), (&report.to_json()["setting"], &json!("bench engine")));
        let rows = json["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 3);
        for row in rows {
            for figures in ["tokens_per_second", "share_of_limit", "limit_tokens_per_second", "bytes_per_second"] {
                let figures = row[figures].as_array().unwrap();
                assert_eq!(figures.len(), 2);
                assert!(figures.iter().all(|figure| figure.as_f64().is_some_and(|figure| figure > 0.0)), "{row}");
            }
        }
        assert_eq!(rows[2]["row"]["batch"], json!(3));
    }

    #[test]
    fn rows_of_a_device_are_held_against_what_the_device_can_do() {
        let device: Arc<dyn engine::cuda::Device> = Arc::new(kernels::cuda::FibreDevice::new());
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny");
        let line = ["engine", "--device", "cuda:0", "--model", model, "--dtype", "bfloat16", "--rounds", "1"];
        let rows = ["--prompt-len", "20", "--batch", "2", "--context", "9", "--num-tokens", "12"];
        let limits = ["--limit-copy-bytes", "64KiB", "--limit-product", "16"];
        let measure = |more: &[&str]| {
            let args = Command::parse_from([&line[..], &rows, &limits, more].concat()).args;
            let target = Target::load_on(&device, &args).unwrap();
            let provenance = Provenance { command: "bench".into(), commit: None, cpu_model: None, num_cores: None };
            run_on(&args, &target, args.rows(), provenance).unwrap()
        };
        let outcome = measure(&[]);
        let (text, json) = (outcome.to_string(), outcome.to_json());
        let setting = json["setting"].as_str().unwrap();
        for said in ["cuda-blas-1", "with graphs", "bytes read and written counted", "product of 16 cubed"] {
            assert!(setting.contains(said) && text.contains(said), "{said}: {text}");
        }
        for row in json["rows"].as_array().unwrap() {
            for figures in ["tokens_per_second", "share_of_limit", "bytes_per_second", "float_ops_per_second"] {
                assert!(row[figures][0].as_f64().is_some_and(|figure| figure > 0.0), "{figures}: {row}");
            }
        }
        let setting = measure(&["--batch-invariant", "--enforce-eager"]).to_json()["setting"].to_string();
        assert!(setting.contains("cuda-mma-1") && setting.contains("without graphs"), "{setting}");
    }

    #[test]
    fn a_batch_that_no_step_has_room_for_is_an_error() {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny");
        let args = Command::parse_from(["engine", "--model", model, "--batch", "9", "--max-num-batched-tokens", "8"]);
        let provenance = Provenance { command: "bench engine".into(), commit: None, cpu_model: None, num_cores: None };
        assert!(run(&args.args, provenance).unwrap_err().to_string().starts_with("--max-num-batched-tokens"));
    }

    #[test]
    fn no_row_is_an_error() {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny");
        let mut args = Command::parse_from(["engine", "--model", model]).args;
        (args.prompt_len, args.batch) = (Vec::new(), Vec::new());
        let provenance = Provenance { command: "bench engine".into(), commit: None, cpu_model: None, num_cores: None };
        assert!(run(&args, provenance.clone()).unwrap_err().to_string().starts_with("nothing to measure"));
        args.batch = vec![0];
        assert!(run(&args, provenance).unwrap_err().to_string().ends_with("are at least 1"));
    }
}
