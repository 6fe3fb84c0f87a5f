//! The engine under a row's load: its loop, scheduler, pool and runner, as in a node.

use std::cell::Cell;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use common::content::ChainRoot;
use common::ids::ChoiceIndex;
use common::sampling::SamplingParams;
use common::scheduler::SchedulerLimits;
use common::sequence::{NewSequence, Work};
use engine::core::{EngineEvent, EngineHandle, EngineOptions, RequestHandle};
use engine::model::LoadError;
use engine::runner::Runner;

use super::Row;

/// Tokens of a block of KV.
pub const BLOCK_SIZE: usize = 16;

/// What a run of decode showed.
#[derive(Debug, Clone)]
pub struct DecodeRun {
    /// Of all sequences together, in the steps that all of them were in.
    pub tokens_per_second: f64,
    /// Between two tokens of a sequence, of all sequences, from the moment on that every one had its first.
    pub gaps: Vec<Duration>,
}

/// An engine that runs, and what waits for it.
pub struct EngineLoad {
    engine: EngineHandle,
    /// `None` only while this is dropped.
    thread: Option<JoinHandle<()>>,
    runtime: tokio::runtime::Runtime,
    /// So that no two runs have a prompt in common.
    num_runs: usize,
}

impl EngineLoad {
    /// An engine whose pool holds any of the rows, with steps of so many tokens at most. `runner` makes one with a pool
    /// of so many tokens, for sequences of so many.
    ///
    /// # Errors
    /// If the pool cannot be had, or the system gives no threads.
    pub fn start(
        rows: &[Row],
        max_num_batched_tokens: usize,
        runner: impl FnOnce(usize, usize) -> Result<Box<dyn Runner>, LoadError>,
    ) -> anyhow::Result<Self> {
        let blocks = |row: &Row| row.num_sequences() * (row.tokens_of_a_sequence().div_ceil(BLOCK_SIZE) + 1);
        let num_tokens_max = BLOCK_SIZE * rows.iter().map(blocks).max().unwrap_or(1);
        let longest = rows.iter().map(Row::tokens_of_a_sequence).max().unwrap_or(1);
        let runner = runner(num_tokens_max, longest)?;
        let info = runner.model().clone();
        let limits = SchedulerLimits {
            block_size: BLOCK_SIZE,
            num_blocks: info.num_blocks as usize,
            max_num_seqs: 1024,
            max_num_batched_tokens,
            max_num_prefill_tokens: max_num_batched_tokens,
            max_num_waiting: 1024,
            max_model_len: info.max_model_len as usize,
            growth_blocks: 1,
            max_num_parked_blocks: 0,
            max_num_copied_blocks: 1,
            is_prefix_caching: false,
            eviction_policy: common::eviction::EvictionPolicy::default(),
        };
        let options = EngineOptions { limits, host_budget: Arc::default(), role: "bench", node: "bench".to_string() };
        let (engine, thread) =
            engine::core::start_reporting(runner, options, None).context("start the engine's thread")?;
        let runtime = tokio::runtime::Builder::new_current_thread().build().context("start the runtime")?;
        Ok(Self { engine, thread: Some(thread), runtime, num_runs: 0 })
    }

    /// Tokens per second of one run of the row: prompt tokens until the first token is there, or tokens generated in
    /// the steps that every sequence is in.
    ///
    /// # Errors
    /// If the engine fails or refuses, or if the first sequences end before the last has begun.
    pub fn measure(&mut self, row: &Row) -> anyhow::Result<f64> {
        let times = self.run(row, || ())?;
        if let Row::Prefill { num_tokens } = row {
            let last = times.iter().flatten().max().copied().unwrap_or_default();
            return Ok(*num_tokens as f64 / last.as_secs_f64());
        }
        Ok(DecodeRun::of(&times)?.tokens_per_second)
    }

    /// One run of a decode row; `on_all_started` is called when every sequence has its first token.
    ///
    /// # Errors
    /// As [`measure`](Self::measure).
    pub fn decode(&mut self, row: &Row, on_all_started: impl FnOnce()) -> anyhow::Result<DecodeRun> {
        DecodeRun::of(&self.run(row, on_all_started)?)
    }

    /// Prompt tokens per second of prompts one after the other. What is not complete when `go_on` says no does not
    /// count, but for the first.
    ///
    /// # Errors
    /// As [`measure`](Self::measure).
    pub fn prefill_while(&mut self, row: &Row, go_on: impl Fn() -> bool) -> anyhow::Result<f64> {
        let begin = Instant::now();
        let (mut num_tokens, mut time) = (0, Duration::ZERO);
        loop {
            self.measure(row)?;
            let is_over = !go_on();
            if num_tokens == 0 || !is_over {
                num_tokens += row.tokens_of_a_sequence() - 1;
                time = begin.elapsed();
            }
            if is_over {
                return Ok(num_tokens as f64 / time.as_secs_f64());
            }
        }
    }

    /// When each token of each sequence was there.
    fn run(&mut self, row: &Row, on_all_started: impl FnOnce()) -> anyhow::Result<Vec<Vec<Duration>>> {
        self.num_runs += 1;
        let (len, num_tokens) = match *row {
            Row::Prefill { num_tokens } => (num_tokens, 1),
            Row::Decode { context, num_tokens, .. } => (context, num_tokens),
        };
        let load = (len, row.num_sequences(), num_tokens);
        self.runtime.block_on(generate(&self.engine, load, self.num_runs, on_all_started))
    }
}

/// It has ended then, and given back what it had: a device is not to be asked for anything once `main` has returned.
impl Drop for EngineLoad {
    fn drop(&mut self) {
        self.engine.shutdown();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic of it was told to whoever waited
        }
    }
}

impl DecodeRun {
    /// Prompts are computed some at a time, so sequences begin and end apart: steps of a part of them are no batch.
    fn of(times: &[Vec<Duration>]) -> anyhow::Result<Self> {
        const TOO_FEW: &str = "no two steps gave every sequence a token: generate more tokens";
        let all_started = times.iter().filter_map(|times| times.first()).max().copied().context(TOO_FEW)?;
        // Until it ends, everybody is there.
        let first_to_end = times.iter().min_by_key(|times| times.last()).context(TOO_FEW)?;
        // Tokens of one step are seen one after the other.
        let shortest_step = first_to_end.windows(2).map(|pair| pair[1] - pair[0]).min().context(TOO_FEW)?;
        let first = first_to_end.partition_point(|at| *at + shortest_step / 2 < all_started);
        let [begin, .., end] = first_to_end[first..] else { anyhow::bail!(TOO_FEW) };
        let num_steps = first_to_end.len() - first - 1;
        let gaps = times.iter().flat_map(|times| times.windows(2));
        let gaps = gaps.filter(|pair| pair[0] >= all_started).map(|pair| pair[1] - pair[0]).collect();
        Ok(Self { tokens_per_second: (times.len() * num_steps) as f64 / (end - begin).as_secs_f64(), gaps })
    }
}

/// When each token of each sequence was there, from the start, of prompts of `len` tokens.
async fn generate(
    engine: &EngineHandle,
    (len, batch, num_tokens): (usize, usize, u32),
    seed: usize,
    on_all_started: impl FnOnce(),
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
    let (num_to_start, on_all_started) = (Cell::new(batch), Cell::new(Some(on_all_started)));
    let on_first_token = || {
        num_to_start.set(num_to_start.get() - 1);
        if num_to_start.get() == 0
            && let Some(on_all_started) = on_all_started.take()
        {
            on_all_started();
        }
    };
    let times = requests.into_iter().map(|request| token_times(request, started_at, &on_first_token));
    futures::future::join_all(times).await.into_iter().collect()
}

async fn token_times(
    mut request: RequestHandle,
    started_at: Instant,
    on_first_token: &impl Fn(),
) -> anyhow::Result<Vec<Duration>> {
    let mut times = Vec::new();
    loop {
        match request.next().await.context("the engine has stopped")? {
            EngineEvent::Token { .. } => {
                times.push(started_at.elapsed());
                if times.len() == 1 {
                    on_first_token();
                }
            }
            EngineEvent::Finished => return Ok(times),
            EngineEvent::Rejected(error) => anyhow::bail!(error),
            EngineEvent::Failed { reason } => anyhow::bail!(reason),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens at these milliseconds, seen so many microseconds later.
    fn times(delay: u64, at: &[u64]) -> Vec<Duration> {
        at.iter().map(|at| Duration::from_micros(at * 1000 + delay)).collect()
    }

    #[test]
    fn only_steps_that_every_sequence_is_in_count() {
        // The second prompt takes until 300; the first sequence ends at 340, the second goes on faster alone.
        let early = [100, 300, 320, 340];
        let late = [300, 320, 340, 345, 350, 355];
        for delays in [(0, 9), (9, 0)] {
            let run = DecodeRun::of(&[times(delays.0, &early), times(delays.1, &late)]).unwrap();
            assert!((run.tokens_per_second - 100.0).abs() < 1e-6, "{delays:?}: {}", run.tokens_per_second);
        }
    }

    #[test]
    fn sequences_that_are_never_all_there_have_no_speed() {
        assert!(DecodeRun::of(&[times(0, &[100, 200]), times(0, &[300, 310])]).is_err());
        assert!(DecodeRun::of(&[times(0, &[100])]).is_err());
    }
}
