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

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use common::config::Dtype;
use engine::model::Model;
use engine::weights::ComputeDtype;
use serde_json::{Value, json};

use crate::serve::provenance::Provenance;
use limit::{Machine, StepWork};
use load::EngineLoad;
use peers::Peer;
use report::{EngineReport, RowResult};
use sharing::SharingReport;

/// What is measured.
#[derive(Debug, Args)]
pub struct EngineBenchArgs {
    /// Checkpoint folder or GGUF file.
    #[arg(long, value_name = "PATH", default_value = "models/tiny")]
    pub model: PathBuf,
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
    /// Instead: an engine that computes prompts of the first length beside one that decodes the first batch, on the same
    /// cores, in one process and in two; each against itself alone.
    #[arg(long, conflicts_with_all = ["llama_bench", "vllm_python"])]
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
    let isa = engine::Isa::parse(&args.isa)?;
    let options = engine::model::LoadOptions {
        dtype: args.dtype,
        isa,
        threads: args.threads,
        cache_folder: engine::identity::cache_folder_from_env(),
    };
    let model = Arc::new(Model::load_with(&args.model, options)?);
    if args.sharing_prefill {
        sharing::run_other(args, model)?;
        return Ok(EngineOutcome::Answered);
    }
    let outcome = if args.sharing {
        EngineOutcome::Sharing(sharing::run(args, &model, provenance)?)
    } else {
        EngineOutcome::Rows(run_rows(args, &model, rows, provenance)?)
    };
    if let Some(path) = &args.save_result {
        let json = serde_json::to_string_pretty(&outcome.to_json()).context("write the result")?;
        std::fs::write(path, json).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(outcome)
}

fn run_rows(
    args: &EngineBenchArgs,
    model: &Arc<Model>,
    rows: Vec<Row>,
    provenance: Provenance,
) -> anyhow::Result<EngineReport> {
    let machine = Machine::new(model, &rows);
    let mut load = EngineLoad::start(model.clone(), &rows).context("start the engine")?;
    let mut peers = args.peers(model.backend().ctx().pool.threads(), model.dtype())?;

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
            let limit = machine.limit(&StepWork::of(model, &result.row));
            result.add(limit, load.measure(&result.row)?);
            for (peer, speeds) in peers.iter_mut().zip(&mut result.peers) {
                let speed = peer.measure(&result.row).with_context(|| format!("measure {}", peer.name()))?;
                speeds.tokens_per_second.extend(speed);
            }
        }
    }
    load.stop();
    Ok(EngineReport::new(model, results, provenance))
}

#[cfg(test)]
mod tests {
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
