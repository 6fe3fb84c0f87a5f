//! Prefill and decode speed of the engine, without a network.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use common::config::Dtype;
use common::content::ChainRoot;
use common::ids::ChoiceIndex;
use common::sampling::SamplingParams;
use common::scheduler::SchedulerLimits;
use common::sequence::{NewSequence, Work};
use engine::core::{EngineEvent, EngineHandle, EngineOptions, RequestHandle};

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
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    pub num_tokens: u32,
    /// Each figure is the median of this many runs.
    #[arg(long, value_name = "RUNS", default_value_t = 3)]
    pub runs: usize,
    /// Threads that compute. Default: all cores.
    #[arg(long, value_name = "THREADS")]
    pub threads: Option<usize>,
}

/// Tokens per second.
#[derive(Debug)]
pub struct Report {
    prefill: Vec<(usize, f64)>,
    decode: Vec<(usize, f64)>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (len, speed) in &self.prefill {
            writeln!(f, "prefill {len:>6} tokens   {speed:>10.0} tok/s")?;
        }
        for (batch, speed) in &self.decode {
            writeln!(f, "decode  batch {batch:>6}    {speed:>10.0} tok/s")?;
        }
        Ok(())
    }
}

/// Runs the workload.
///
/// # Errors
/// If the model cannot be loaded or the engine fails.
pub fn run(args: &EngineBenchArgs) -> anyhow::Result<Report> {
    let model = Arc::new(engine::model::Model::load(&args.model, args.dtype, args.threads)?);
    let num_tokens_max = args.batch.iter().copied().max().unwrap_or(1) * (args.context + args.num_tokens as usize + 32);
    let num_tokens_max = num_tokens_max.max(args.prompt_len.iter().copied().max().unwrap_or(0) + 64);
    let bytes = model.info_for(16, 1).kv_spec.bytes_per_token() * num_tokens_max as u64;
    let runner = engine::cpu_runner::CpuRunner::new(model, 16, bytes, None)?;
    let info = engine::runner::Runner::model(&runner).clone();
    let limits = SchedulerLimits {
        block_size: 16,
        num_blocks: info.num_blocks as usize,
        max_num_seqs: 1024,
        max_num_batched_tokens: 2048,
        max_num_prefill_tokens: 2048,
        max_num_waiting: 1024,
        max_model_len: info.max_model_len as usize,
        growth_blocks: 1,
        max_num_parked_blocks: 0,
        max_num_copied_blocks: 1,
        is_prefix_caching: false,
        eviction_policy: common::eviction::EvictionPolicy::default(),
    };
    let options = EngineOptions { limits, host_budget: Arc::default(), role: "bench", node: "bench".to_string() };
    let engine = engine::core::start(Box::new(runner), options).context("start the engine's thread")?;
    let runtime = tokio::runtime::Builder::new_current_thread().build().context("start the runtime")?;
    let median = |runs: &mut Vec<f64>| {
        runs.sort_by(f64::total_cmp);
        runs[runs.len() / 2]
    };
    let mut report = Report { prefill: Vec::new(), decode: Vec::new() };
    for len in &args.prompt_len {
        let mut speeds = Vec::new();
        for run in 0..=args.runs.max(1) {
            let seconds = runtime.block_on(generate(&engine, *len, 1, 1, run))?.last.as_secs_f64();
            // The first run warms caches and pages.
            if run > 0 {
                speeds.push(*len as f64 / seconds);
            }
        }
        report.prefill.push((*len, median(&mut speeds)));
    }
    for batch in &args.batch {
        let mut speeds = Vec::new();
        for run in 0..args.runs.max(1) {
            let spans = runtime.block_on(generate(&engine, args.context, *batch, args.num_tokens, run))?;
            let seconds = (spans.last - spans.all_started).as_secs_f64();
            speeds.push(spans.num_tokens_after as f64 / seconds);
        }
        report.decode.push((*batch, median(&mut speeds)));
    }
    engine.shutdown();
    Ok(report)
}

/// When a batch had its first and last tokens, from its start.
struct Spans {
    /// Every sequence has its first token.
    all_started: Duration,
    last: Duration,
    /// Tokens drawn after `all_started`.
    num_tokens_after: usize,
}

async fn generate(
    engine: &EngineHandle,
    len: usize,
    batch: usize,
    num_tokens: u32,
    seed: usize,
) -> anyhow::Result<Spans> {
    let vocab_size = engine.model().vocab_size;
    let started_at = Instant::now();
    let mut requests = Vec::new();
    for index in 0..batch {
        let token = |i: usize| ((i * i * 31 + i * 7 + index * 97 + seed * 13) as u32) % vocab_size;
        let sequence = NewSequence {
            tokens: (0..len).map(token).collect(),
            prompt_len: len,
            choices: vec![ChoiceIndex(0)],
            params: Arc::new(SamplingParams::greedy(num_tokens)),
            root: ChainRoot::of_model(engine.model().identity),
            work: Work::Generate,
        };
        requests.push(engine.submit(sequence, usize::MAX).context("the engine has stopped")?);
    }
    let times = futures::future::join_all(requests.into_iter().map(|request| token_times(request, started_at))).await;
    let times: Vec<Vec<Duration>> = times.into_iter().collect::<anyhow::Result<_>>()?;
    let all_started = times.iter().filter_map(|times| times.first()).max().copied().unwrap_or_default();
    let last = times.iter().flatten().max().copied().unwrap_or_default();
    let num_tokens_after = times.iter().flatten().filter(|at| **at > all_started).count();
    Ok(Spans { all_started, last, num_tokens_after })
}

/// When each token of a request was there.
async fn token_times(mut request: RequestHandle, started_at: Instant) -> anyhow::Result<Vec<Duration>> {
    let mut times = Vec::new();
    loop {
        match request.next().await.context("the engine has stopped")? {
            EngineEvent::Token { .. } => times.push(started_at.elapsed()),
            EngineEvent::Finished => return Ok(times),
            EngineEvent::Rejected(error) => anyhow::bail!(error),
            EngineEvent::Failed { reason } => anyhow::bail!(reason),
            _ => {}
        }
    }
}
