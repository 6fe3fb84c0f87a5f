//! Runs a model on the CPU, on a thread of its own.

use std::sync::Arc;

use common::model::ModelInfo;
use kernels::Priority;

use crate::backend::Backend;
use crate::cpu::CpuBackend;
use crate::decoder::{self, Decoder, Workspace};
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
    memory: Memory,
    thread: StepThread,
}

/// What is in memory beside the pool.
struct Memory {
    weights: WeightSizes,
    /// Of the angles of all positions.
    angle_bytes: u64,
    /// Of a row of a step.
    row_bytes: u64,
    /// Of a sampled row beside.
    sampled_row_bytes: u64,
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
        let info = ModelInfo { max_model_len: max_model_len as u32, ..model.info_for(block_size, num_blocks) };
        let rope = model.backend().rope_table(model.spec().rope.angles(max_model_len))?;
        let memory = Memory {
            weights: model.weights().sizes(),
            angle_bytes: (size_of_val(rope.cos.as_slice()) + size_of_val(rope.sin.as_slice())) as u64,
            row_bytes: decoder::row_bytes(model.spec()),
            sampled_row_bytes: decoder::sampled_row_bytes(model.spec()),
        };
        let mut worker = Worker { rope, model, pool: pool.clone(), workspace: Workspace::default() };
        let thread = StepThread::start(move |plan, sink| worker.step(plan, sink))
            .map_err(|error| LoadError::Thread { reason: error.to_string() })?;
        Ok(Self { info, pool, memory, thread })
    }

    /// What weights and KV take by now, and what steps of so many tokens and sequences will, in one sentence.
    pub fn memory_report(&self, max_num_batched_tokens: usize, max_num_seqs: usize) -> String {
        self.memory.report(&self.pool, max_num_batched_tokens as u64, max_num_seqs as u64)
    }
}

impl Memory {
    fn report(&self, pool: &KvPool, max_num_rows: u64, max_num_sampled_rows: u64) -> String {
        let mib = |num_bytes: u64| num_bytes.div_ceil(1 << 20);
        let pages = if pool.gets_huge_pages() { "in huge pages" } else { "not in huge pages" };
        format!(
            "memory: {} MiB of weights, once per process, {} MiB of KV pool ({} blocks of {} tokens), {pages}, \
             {} MiB of angles, and up to {} MiB for steps when they come",
            mib(self.weights.num_bytes()),
            mib(pool.num_bytes() as u64),
            pool.num_blocks(),
            pool.block_size(),
            mib(self.angle_bytes),
            mib(max_num_rows * self.row_bytes + max_num_sampled_rows * self.sampled_row_bytes),
        )
    }
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
    fn the_memory_report_names_weights_blocks_pages_and_steps() {
        let pool = KvPool::new(&KvSpec::uniform(2, 2, 16, KvDtype::Bf16, None), 16, 10).unwrap();
        let weights = WeightSizes { table_bytes: 3 << 20, vector_bytes: 1, ..WeightSizes::default() };
        let memory = Memory { weights, angle_bytes: 100, row_bytes: 4 << 10, sampled_row_bytes: 2 << 10 };
        assert_eq!(
            memory.report(&pool, 1024, 512),
            "memory: 4 MiB of weights, once per process, 1 MiB of KV pool (10 blocks of 16 tokens), not in huge pages, \
             1 MiB of angles, and up to 5 MiB for steps when they come"
        );
    }
}
