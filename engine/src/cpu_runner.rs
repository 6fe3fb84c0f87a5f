//! Runs a model on the CPU, on a thread of its own.

use std::sync::Arc;

use common::model::ModelInfo;
use kernels::Priority;

use crate::backend::Backend;
use crate::cpu::CpuBackend;
use crate::decoder::{Decoder, Workspace};
use crate::model::{LoadError, Model, PoolSize};
use crate::plan::StepPlan;
use crate::pool::{KvPool, PoolMemory};
use crate::rope::RopeAngles;
use crate::runner::{KvSink, Runner, StepError, StepOutput, StepToken, Ticket};
use crate::step_thread::StepThread;
use crate::weight_sizes::WeightSizes;

/// A model, a pool, and the thread that computes with them.
pub struct CpuRunner {
    info: ModelInfo,
    pool: Arc<KvPool>,
    thread: StepThread,
}

impl CpuRunner {
    /// A runner of `model` with a KV pool of its own: as many blocks of `block_size` tokens as fit
    /// `kv_cache_memory_bytes`. Sequences have at most `max_model_len` tokens; without it, as many as the
    /// model and the pool allow.
    ///
    /// # Errors
    /// [`LoadError::TooLong`], [`LoadError::PoolTooSmall`], or about the pool or the thread.
    pub fn new(
        model: Arc<Model>,
        block_size: usize,
        kv_cache_memory_bytes: u64,
        max_model_len: Option<usize>,
    ) -> Result<Self, LoadError> {
        Self::with_memory(model, block_size, kv_cache_memory_bytes, max_model_len, PoolMemory::Private)
    }

    /// As [`new`](Self::new), with a pool in memory of either kind.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_memory(
        model: Arc<Model>,
        block_size: usize,
        kv_cache_memory_bytes: u64,
        max_model_len: Option<usize>,
        memory: PoolMemory,
    ) -> Result<Self, LoadError> {
        let PoolSize { num_blocks, max_model_len } =
            model.size_pool(block_size, kv_cache_memory_bytes, max_model_len)?;
        let kv_spec = model.spec().kv_spec(model.kv_dtype());
        let pool = Arc::new(KvPool::with_memory(&kv_spec, block_size, num_blocks, memory)?);
        tracing::info!("{}", memory_report(&model.weights().sizes(), &pool));
        let info = ModelInfo { max_model_len: max_model_len as u32, ..model.info_for(block_size, num_blocks) };
        let mut worker = Worker {
            rope: model.backend().rope_table(model.spec().rope.angles(max_model_len))?,
            model,
            pool: pool.clone(),
            workspace: Workspace::default(),
        };
        let thread = StepThread::start(move |plan, sink| worker.step(plan, sink))
            .map_err(|error| LoadError::Thread { reason: error.to_string() })?;
        Ok(Self { info, pool, thread })
    }
}

/// What weights and KV take, in one sentence.
fn memory_report(weights: &WeightSizes, pool: &KvPool) -> String {
    let mib = |num_bytes: u64| num_bytes.div_ceil(1 << 20);
    let pages = if pool.gets_huge_pages() { "in huge pages" } else { "not in huge pages" };
    format!(
        "memory: {} MiB of weights, once per process, and {} MiB of KV pool ({} blocks of {} tokens), {pages}",
        mib(weights.num_bytes()),
        mib(pool.num_bytes() as u64),
        pool.num_blocks(),
        pool.block_size(),
    )
}

impl Runner for CpuRunner {
    fn model(&self) -> &ModelInfo {
        &self.info
    }

    fn pool(&self) -> &Arc<KvPool> {
        &self.pool
    }

    fn submit(&mut self, plan: StepPlan, sink: Arc<dyn KvSink>) -> Ticket {
        self.thread.submit(plan, sink)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, StepError> {
        self.thread.wait(ticket)
    }
}

struct Worker {
    model: Arc<Model>,
    rope: RopeAngles,
    pool: Arc<KvPool>,
    workspace: Workspace<CpuBackend>,
}

impl Worker {
    /// Allocates nothing once it has seen a step of this size, unless a row asks for penalties or log-probabilities.
    fn step(&mut self, mut plan: StepPlan, sink: &dyn KvSink) -> StepOutput {
        let mut tokens = std::mem::take(&mut plan.spare_tokens);
        tokens.clear();
        if plan.num_rows() == 0 {
            return StepOutput { tokens, plan };
        }
        let priority = if plan.has_decode { Priority::Decode } else { Priority::Prefill };
        let decoder = Decoder {
            backend: self.model.backend().with_priority(priority),
            spec: self.model.spec(),
            weights: self.model.weights(),
            rope: &self.rope,
            pool: &self.pool,
        };
        let drawn = decoder.forward(&plan, sink, &mut self.workspace).into_iter().flat_map(|drawn| drawn.drain(..));
        let drawn = plan.samples.iter().zip(drawn);
        tokens.extend(drawn.map(|(row, token)| StepToken { sequence: row.sequence, choice: row.choice, token }));
        StepOutput { tokens, plan }
    }
}

#[cfg(test)]
mod tests {
    use common::kv_spec::{KvDtype, KvSpec};

    use super::*;

    #[test]
    fn the_memory_report_names_weights_blocks_and_pages() {
        let pool = KvPool::new(&KvSpec::uniform(2, 2, 16, KvDtype::Bf16, None), 16, 10).unwrap();
        let weights = WeightSizes { table_bytes: 3 << 20, vector_bytes: 1, ..WeightSizes::default() };
        assert_eq!(
            memory_report(&weights, &pool),
            "memory: 4 MiB of weights, once per process, and 1 MiB of KV pool (10 blocks of 16 tokens), not in huge pages"
        );
    }
}
