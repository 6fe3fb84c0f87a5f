//! A runner without arithmetic: tokens and KV are hashes, time is a cost model.
//!
//! It has the interface, the pool and the sampling of a real runner, so routing, faults and scale are tested
//! on real processes. What it computes is as dependent as a model's: the KV of a token depends on the token
//! and on the KV of all tokens before it *as read back from the pool*, and the next token depends on all of
//! it. One wrong, stale or missing byte of KV and the text is another.
//!
//! ```text
//! record(layer, p)  =  BLAKE3( record(layer, 0) .. record(layer, p - 1), layer, p, token )     64 bytes, in the pool
//! logits(p)         =  BLAKE3( records 0..=p of every layer )
//! ```

use std::sync::Arc;
use std::time::Duration;

use common::kv_spec::{KvDtype, KvSpec};
use common::model::{ModelIdentity, ModelInfo, NumericsId, Representation};
use kernels::kv_layout::GRANULE_TOKENS;
use kernels::{Isa, KvLayout, WorkerPool};

use crate::backend::Backend;
use crate::cpu::{CpuBackend, CpuTensor};
use crate::plan::{Span, StepPlan};
use crate::pool::{KvPool, PoolError};
use crate::runner::{KvSink, Runner, StepError, StepOutput, StepToken, Ticket};
use crate::step_thread::StepThread;

/// One head of K and V of this many f32 each: 64 bytes per token and layer.
const HEAD_DIM: usize = 8;
/// Bytes of a token's record.
const RECORD: usize = 2 * HEAD_DIM * 4;

/// What a simulated model is and costs.
#[derive(Debug, Clone)]
pub struct SimOptions {
    /// Enters every record: two nodes with different seeds serve different models.
    pub seed: u64,
    /// Layers; a step's time is spread over them.
    pub num_layers: u32,
    /// Width of the logits.
    pub vocab_size: u32,
    /// Longest sequence, in tokens.
    pub max_model_len: u32,
    /// Tokens per block.
    pub block_size: usize,
    /// Blocks of the pool.
    pub num_blocks: usize,
    /// Time of a step, whatever is in it.
    pub step_time: Duration,
    /// Time of each row more.
    pub token_time: Duration,
}

impl Default for SimOptions {
    /// Takes no time.
    fn default() -> Self {
        Self {
            seed: 0,
            num_layers: 2,
            vocab_size: 512,
            max_model_len: 4096,
            block_size: 16,
            num_blocks: 1024,
            step_time: Duration::ZERO,
            token_time: Duration::ZERO,
        }
    }
}

/// A simulated model, its pool, and the thread that pretends to compute.
pub struct SimRunner {
    info: ModelInfo,
    pool: Arc<KvPool>,
    thread: StepThread,
}

impl SimRunner {
    /// A runner with a pool of its own.
    ///
    /// # Errors
    /// [`PoolError`] if there can be no such pool.
    ///
    /// # Panics
    /// If the system refuses a thread.
    pub fn new(options: SimOptions) -> Result<Self, PoolError> {
        let kv_spec = KvSpec::uniform(options.num_layers, 1, HEAD_DIM as u32, KvDtype::F32, None);
        let pool = Arc::new(KvPool::new(&kv_spec, options.block_size, options.num_blocks)?);
        let mut identity = blake3::Hasher::new();
        identity.update(b"tandem simulated model");
        identity.update(&options.seed.to_le_bytes());
        identity.update(&options.num_layers.to_le_bytes());
        identity.update(&options.vocab_size.to_le_bytes());
        let info = ModelInfo {
            identity: ModelIdentity(*identity.finalize().as_bytes()),
            numerics: NumericsId("sim-1".to_string()),
            representation: Representation("sim-1".to_string()),
            kv_spec,
            vocab_size: options.vocab_size,
            max_model_len: options.max_model_len,
            block_size: options.block_size as u32,
            num_blocks: options.num_blocks as u32,
        };
        let worker = Worker { options, pool: pool.clone() };
        let thread = StepThread::start(move |plan, sink| worker.step(plan, sink));
        Ok(Self { info, pool, thread: thread.expect("the system starts a thread at start-up") })
    }
}

impl Runner for SimRunner {
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
    options: SimOptions,
    pool: Arc<KvPool>,
}

impl Worker {
    fn step(&self, plan: StepPlan, sink: &dyn KvSink) -> StepOutput {
        let num_layers = self.options.num_layers;
        let time = self.options.step_time + self.options.token_time * plan.num_rows() as u32;
        // Per row, what all layers so far make of it.
        let mut rows = vec![blake3::Hasher::new(); plan.num_rows()];
        for layer in 0..num_layers {
            for span in &plan.spans {
                self.compute(&plan, layer, span, &mut rows);
            }
            if !time.is_zero() {
                std::thread::sleep(time / num_layers);
            }
            for span in plan.spans.iter().filter(|span| span.is_reported) {
                sink.on_layer_written(layer, span);
            }
        }
        let vocab = self.options.vocab_size as usize;
        let logits = plan.samples.iter().flat_map(|sample| logits_of(&rows[sample.row], vocab)).collect();
        let logit_rows: Vec<usize> = (0..plan.samples.len()).collect();
        let sampler = CpuBackend::new(WorkerPool::global(), Isa::detect());
        let mut drawn = Vec::new();
        sampler.sample(&CpuTensor::of(logits), vocab, &logit_rows, &plan.samples, &mut drawn);
        let tokens = plan.samples.iter().zip(drawn);
        let tokens = tokens.map(|(row, token)| StepToken { sequence: row.sequence, choice: row.choice, token });
        StepOutput { tokens: tokens.collect(), plan }
    }

    /// Records of one span in one layer, each from all before it.
    fn compute(&self, plan: &StepPlan, layer: u32, span: &Span, rows: &mut [blake3::Hasher]) {
        let blocks = &plan.block_tables[span.block_table.clone()];
        let mut before = self.hash_of_prefix(layer, blocks, span.first_position);
        for (row, all_layers) in rows.iter_mut().enumerate().skip(span.first_row).take(span.num_rows) {
            let mut record = [0; RECORD];
            let mut hasher = before.clone();
            hasher.update(&layer.to_le_bytes());
            hasher.update(&plan.positions[row].to_le_bytes());
            hasher.update(&plan.tokens[row].to_le_bytes());
            hasher.finalize_xof().fill(&mut record);
            self.write_record(layer, plan.slots[row], &record);
            before.update(&record);
            all_layers.update(before.finalize().as_bytes());
        }
    }

    /// Hash over the records of the first `num_tokens` positions, read from the pool.
    fn hash_of_prefix(&self, layer: u32, blocks: &[u32], num_tokens: usize) -> blake3::Hasher {
        let layout = self.pool.layout();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.options.seed.to_le_bytes());
        let mut granule = vec![0; layout.granule_bytes()];
        for first in (0..num_tokens).step_by(GRANULE_TOKENS) {
            let (block, within) = (blocks[first / layout.block_size], first % layout.block_size);
            let offset = layout.granule_offset(layer as usize, block, within / GRANULE_TOKENS);
            self.pool.arena().read(offset, &mut granule);
            for token in 0..GRANULE_TOKENS.min(num_tokens - first) {
                for value in places(layout, token) {
                    hasher.update(&granule[value..value + 4]);
                }
            }
        }
        hasher
    }

    fn write_record(&self, layer: u32, slot: u32, record: &[u8; RECORD]) {
        let layout = self.pool.layout();
        let (block, within) = (slot / layout.block_size as u32, slot as usize % layout.block_size);
        let granule = layout.granule_offset(layer as usize, block, within / GRANULE_TOKENS);
        for (value, place) in record.chunks_exact(4).zip(places(layout, within % GRANULE_TOKENS)) {
            self.pool.arena().write(granule + place, value);
        }
    }
}

/// Where the values of one token lie in its granule: K, then V.
fn places(layout: &KvLayout, token: usize) -> impl Iterator<Item = usize> {
    let k = (0..HEAD_DIM).map(move |dim| layout.k_offset(token, dim));
    k.chain((0..HEAD_DIM).map(move |dim| layout.plane_bytes() + layout.v_offset(token, dim)))
}

/// Logits from -8 to 8.
fn logits_of(row: &blake3::Hasher, vocab: usize) -> Vec<f32> {
    let mut bytes = vec![0; vocab * 4];
    row.finalize_xof().fill(&mut bytes);
    let (values, _) = bytes.as_chunks::<4>();
    values.iter().map(|b| (u32::from_le_bytes(*b) >> 8) as f32 / (1 << 20) as f32 - 8.0).collect()
}
