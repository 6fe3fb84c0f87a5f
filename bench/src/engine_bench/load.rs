//! The engine under a row's load: its loop, scheduler, pool and runner, as in a node.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use common::content::ChainRoot;
use common::ids::ChoiceIndex;
use common::sampling::SamplingParams;
use common::scheduler::SchedulerLimits;
use common::sequence::{NewSequence, Work};
use engine::core::{EngineEvent, EngineHandle, EngineOptions, RequestHandle};
use engine::cpu_runner::CpuRunner;
use engine::model::Model;
use engine::runner::Runner;

use super::Row;

/// Prompt tokens of a step.
pub const CHUNK_TOKENS: usize = 2048;

const BLOCK_SIZE: usize = 16;

/// An engine that runs, and what waits for it.
pub struct EngineLoad {
    engine: EngineHandle,
    runtime: tokio::runtime::Runtime,
    /// So that no two runs have a prompt in common.
    num_runs: usize,
}

impl EngineLoad {
    /// An engine whose pool holds any of the rows.
    ///
    /// # Errors
    /// If the pool cannot be had, or the system gives no threads.
    pub fn start(model: Arc<Model>, rows: &[Row]) -> anyhow::Result<Self> {
        let blocks = |row: &Row| row.num_sequences() * (row.tokens_of_a_sequence().div_ceil(BLOCK_SIZE) + 1);
        let num_tokens_max = BLOCK_SIZE * rows.iter().map(blocks).max().unwrap_or(1);
        let longest = rows.iter().map(Row::tokens_of_a_sequence).max().unwrap_or(1);
        let bytes = model.info_for(BLOCK_SIZE, 1).kv_spec.bytes_per_token() * num_tokens_max as u64;
        let runner = CpuRunner::new(model, BLOCK_SIZE, bytes, Some(longest))?;
        let info = runner.model().clone();
        let limits = SchedulerLimits {
            block_size: BLOCK_SIZE,
            num_blocks: info.num_blocks as usize,
            max_num_seqs: 1024,
            max_num_batched_tokens: CHUNK_TOKENS,
            max_num_prefill_tokens: CHUNK_TOKENS,
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
        Ok(Self { engine, runtime, num_runs: 0 })
    }

    /// Tokens per second of one run of the row: prompt tokens until the first token is there, or tokens generated
    /// from the moment on that every sequence has its first.
    ///
    /// # Errors
    /// If the engine fails or refuses.
    pub fn measure(&mut self, row: &Row) -> anyhow::Result<f64> {
        self.num_runs += 1;
        let (len, num_tokens) = match *row {
            Row::Prefill { num_tokens } => (num_tokens, 1),
            Row::Decode { context, num_tokens, .. } => (context, num_tokens),
        };
        let run = generate(&self.engine, len, row.num_sequences(), num_tokens, self.num_runs);
        let times = self.runtime.block_on(run)?;
        let last = times.iter().flatten().max().copied().unwrap_or_default();
        if let Row::Prefill { num_tokens } = row {
            return Ok(*num_tokens as f64 / last.as_secs_f64());
        }
        let all_started = times.iter().filter_map(|times| times.first()).max().copied().unwrap_or_default();
        let num_tokens_after = times.iter().flatten().filter(|at| **at > all_started).count();
        Ok(num_tokens_after as f64 / (last - all_started).as_secs_f64())
    }

    /// Ends it.
    pub fn stop(self) {
        self.engine.shutdown();
    }
}

/// When each token of each sequence was there, from the start.
async fn generate(
    engine: &EngineHandle,
    len: usize,
    batch: usize,
    num_tokens: u32,
    seed: usize,
) -> anyhow::Result<Vec<Vec<Duration>>> {
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
    times.into_iter().collect()
}

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
