//! A runner without arithmetic: tokens and KV are hashes, time is a cost model.
//!
//! It has the interface, the pool and the sampling of a real runner, so routing, faults and scale are tested
//! on real processes. What it computes is as dependent as a model's: the KV of a token depends on the token
//! and on the KV of all tokens before it *as read back from the pool*, and the next token depends on all of
//! it. One wrong, stale or missing byte of KV and the text is another.
//!
//! ```text
//! record(layer, p)  =  BLAKE3( record(layer, 0) .. record(layer, p - 1), layer, p, token )     16 numbers, in the pool
//! logits(p)         =  BLAKE3( records 0..=p of every layer )
//! ```
//!
//! The numbers are whole, -128 to 127, which f32 and bf16 both hold: a pool of either type and either order makes the
//! same tokens, also of KV that was converted on its way.

use std::sync::Arc;
use std::time::Duration;

use common::kv_spec::{GranuleOrder, KvDtype, KvSpec};
use common::model::{KvExchange, ModelIdentity, ModelInfo, NumericsId, Representation};
use half::bf16;
use kernels::kv_layout::GRANULE_TOKENS;
use kernels::{GranuleFormat, Isa, WorkerPool};

use crate::backend::Backend;
use crate::conversion::granule_format;
use crate::cpu::{CpuBackend, CpuTensor};
use crate::plan::{Span, StepPlan};
use crate::pool::{KvPool, PoolError};
use crate::runner::{KvSink, Runner, StepError, StepOutput, StepToken, Ticket};
use crate::step_thread::StepThread;

/// One head of K and V of this many values each.
const HEAD_DIM: usize = 8;
/// Values of a token's record.
const RECORD: usize = 2 * HEAD_DIM;

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
    /// What the pool's values are.
    pub kv_dtype: KvDtype,
    /// How they lie in it.
    pub granule_order: GranuleOrder,
    /// With whom KV may be exchanged.
    pub exchange: KvExchange,
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
            kv_dtype: KvDtype::F32,
            granule_order: GranuleOrder::Lanes,
            exchange: KvExchange::Same,
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
        let kv_spec = KvSpec::uniform(options.num_layers, 1, HEAD_DIM as u32, options.kv_dtype, None);
        let pool = Arc::new(KvPool::new(&kv_spec, options.block_size, options.num_blocks)?);
        let mut identity = blake3::Hasher::new();
        identity.update(b"tandem simulated model");
        identity.update(&options.seed.to_le_bytes());
        identity.update(&options.num_layers.to_le_bytes());
        identity.update(&options.vocab_size.to_le_bytes());
        let numerics = NumericsId::new("sim-2", options.kv_dtype);
        let info = ModelInfo {
            identity: ModelIdentity(*identity.finalize().as_bytes()),
            representation: Representation::new(options.kv_dtype, &numerics, options.exchange),
            numerics,
            kv_spec,
            vocab_size: options.vocab_size,
            max_model_len: options.max_model_len,
            exchange: options.exchange,
            granule_order: options.granule_order,
            block_size: options.block_size as u32,
            num_blocks: options.num_blocks as u32,
        };
        let format = granule_format(&info).expect("K and V of a simulated model have one shape");
        let worker = Worker { options, pool: pool.clone(), format };
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
    format: GranuleFormat,
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
            let mut numbers = [0; RECORD];
            let mut hasher = before.clone();
            hasher.update(&layer.to_le_bytes());
            hasher.update(&plan.positions[row].to_le_bytes());
            hasher.update(&plan.tokens[row].to_le_bytes());
            hasher.finalize_xof().fill(&mut numbers);
            let record = numbers.map(|number| f32::from(number as i8));
            self.write_record(layer, plan.slots[row], &record);
            for value in record {
                before.update(&value.to_le_bytes());
            }
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
                for value in places(&self.format, token) {
                    hasher.update(&self.load(&granule[value..]).to_le_bytes());
                }
            }
        }
        hasher
    }

    fn write_record(&self, layer: u32, slot: u32, record: &[f32; RECORD]) {
        let layout = self.pool.layout();
        let (block, within) = (slot / layout.block_size as u32, slot as usize % layout.block_size);
        let granule = layout.granule_offset(layer as usize, block, within / GRANULE_TOKENS);
        for (value, place) in record.iter().zip(places(&self.format, within % GRANULE_TOKENS)) {
            match self.options.kv_dtype {
                KvDtype::F32 => self.pool.arena().write(granule + place, &value.to_le_bytes()),
                KvDtype::Bf16 => self.pool.arena().write(granule + place, &bf16::from_f32(*value).to_le_bytes()),
            }
        }
    }

    /// The value that `bytes` begin with.
    fn load(&self, bytes: &[u8]) -> f32 {
        match (self.options.kv_dtype, bytes) {
            (KvDtype::F32, [a, b, c, d, ..]) => f32::from_le_bytes([*a, *b, *c, *d]),
            (KvDtype::Bf16, [a, b, ..]) => bf16::from_le_bytes([*a, *b]).to_f32(),
            _ => unreachable!("a place in a granule has room for a value"),
        }
    }
}

/// Where the values of one token lie in its granule, in bytes: K, then V.
fn places(format: &GranuleFormat, token: usize) -> impl Iterator<Item = usize> {
    let (format, size) = (*format, format.dtype.size());
    let k = (0..HEAD_DIM).map(move |dim| format.k_index(token, dim) * size);
    k.chain((0..HEAD_DIM).map(move |dim| format.plane_bytes() + format.v_index(token, dim) * size))
}

/// Logits from -8 to 8.
fn logits_of(row: &blake3::Hasher, vocab: usize) -> Vec<f32> {
    let mut bytes = vec![0; vocab * 4];
    row.finalize_xof().fill(&mut bytes);
    let (values, _) = bytes.as_chunks::<4>();
    values.iter().map(|b| (u32::from_le_bytes(*b) >> 8) as f32 / (1 << 20) as f32 - 8.0).collect()
}
