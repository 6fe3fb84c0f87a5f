//! A trace through the engine of a node, its `sim` runner in place of a model.
//!
//! Scaled: a block of the trace is a granule of 16 tokens, so that its content chain is real and prompts stay
//! short, and each prompt gets one token more, since a hit never covers the last. That token takes a block of
//! its own while the request runs. Requests run one after another, as a prefill node serves them.

use std::sync::Arc;

use anyhow::{Context, bail};
use common::content::{ChainRoot, GRANULE_TOKENS};
use common::eviction::EvictionPolicy;
use common::ids::ChoiceIndex;
use common::sampling::SamplingParams;
use common::scheduler::SchedulerLimits;
use common::sequence::{NewSequence, Work};
use common::tokens::Token;
use engine::core::{EngineEvent, EngineHandle, EngineOptions};
use engine::runner::Runner;
use engine::sim::{SimOptions, SimRunner};

use super::pool::Hits;
use super::trace::Trace;

/// Behind every prompt.
const LAST_TOKEN: Token = 0;

/// Serves the trace from a node's pool of `num_blocks` blocks, on a current-thread runtime of its own.
///
/// # Errors
/// If the engine cannot be started, refuses a prompt, or fails.
pub fn replay(trace: &Trace, num_blocks: usize, policy: EvictionPolicy) -> anyhow::Result<Hits> {
    let longest = trace.requests.iter().map(Vec::len).max().unwrap_or(0) * GRANULE_TOKENS;
    let options = SimOptions {
        num_layers: 1,
        vocab_size: 16,
        max_model_len: longest as u32 + 2,
        block_size: GRANULE_TOKENS,
        num_blocks,
        ..SimOptions::default()
    };
    let runner = SimRunner::new(options).context("make the simulated model's pool")?;
    let limits = SchedulerLimits {
        block_size: GRANULE_TOKENS,
        num_blocks,
        max_num_seqs: 1,
        max_num_batched_tokens: longest + GRANULE_TOKENS,
        max_num_prefill_tokens: longest + GRANULE_TOKENS,
        max_num_waiting: 1,
        max_model_len: runner.model().max_model_len as usize,
        growth_blocks: 0,
        max_num_parked_blocks: 0,
        max_num_copied_blocks: 1,
        is_prefix_caching: true,
        eviction_policy: policy,
    };
    let options = EngineOptions { limits, host_budget: Arc::default(), role: "bench", node: "replay".to_string() };
    let engine = engine::core::start(Box::new(runner), options).context("start the engine's thread")?;
    let runtime = tokio::runtime::Builder::new_current_thread().build().context("start the runtime")?;
    let mut hits = Hits::default();
    for (number, blocks) in (1..).zip(&trace.requests) {
        let num_hits = runtime.block_on(serve(&engine, blocks)).with_context(|| format!("request {number}"))?;
        hits.push(num_hits, blocks.len());
    }
    engine.shutdown();
    Ok(hits)
}

/// Blocks of the prompt that were found.
async fn serve(engine: &EngineHandle, blocks: &[u32]) -> anyhow::Result<usize> {
    let tokens = blocks.iter().flat_map(|block| Trace::tokens_of(*block));
    let tokens: Vec<Token> = tokens.chain([LAST_TOKEN]).collect();
    let sequence = NewSequence {
        prompt_len: tokens.len(),
        tokens,
        choices: vec![ChoiceIndex(0)],
        params: Arc::new(SamplingParams::greedy(1)),
        root: ChainRoot::of_model(engine.model().identity),
        work: Work::PrefillOnly,
    };
    // Dropped at the end: its blocks are given back before the next request is taken in.
    let mut request = engine.submit(sequence, usize::MAX).context("the engine has stopped")?;
    let mut num_cached = 0;
    loop {
        match request.next().await.context("the engine has stopped")? {
            EngineEvent::Admitted { num_cached_tokens, .. } => num_cached = num_cached_tokens / GRANULE_TOKENS,
            EngineEvent::FirstTokens { .. } => return Ok(num_cached),
            EngineEvent::Rejected(error) => bail!(error),
            EngineEvent::Failed { reason } => bail!(reason),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mooncake::trace_of;

    #[test]
    fn a_node_finds_what_the_block_manager_alone_finds() {
        let requests = (0..60u64).map(|n| {
            let (chat, turn) = (n * 7 % 12, n % 5);
            (0..2 + turn).map(|depth| chat * 100 + depth).collect()
        });
        let requests: Vec<Vec<u64>> = requests.collect();
        let trace = Trace::parse(trace_of(&requests).as_bytes()).unwrap();
        let names = trace.names();
        // Room for all: where something is evicted, the block of the last token makes a difference.
        for policy in [EvictionPolicy::Lru, EvictionPolicy::ReuseRate] {
            let alone = crate::replay::pool::replay(&trace, &names, 100, policy).unwrap();
            assert_eq!(replay(&trace, 101, policy).unwrap(), alone);
            assert!(alone.total().0 > 0);
        }
    }
}
