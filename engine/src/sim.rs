//! A runner without arithmetic: tokens and KV are hashes, time is a cost model.
//!
//! It has the interface, the pool and the sampling of a real runner, so routing, faults and scale are tested on real
//! processes, and KV of any model's size is moved at a GPU's speed. What it makes is as dependent as a model's: the KV
//! of a token depends on the token and on the KV before it *as read back from the pool*, and so does the next token.
//!
//! ```text
//! link(layer, p)    =  BLAKE3( seed, layer, p, token, link(layer, p - 1) read from the pool )       16 numbers
//! KV(layer, p)      =  the link, at the front of the first head of K and of V; behind it numbers made from it
//! logits(p)         =  BLAKE3( links of p, and KV as read from the pool, in every layer )
//! time of a step    =  max( step_time + context_time x tokens before its sequences,  token_time x its rows )
//! ```
//!
//! A small model reads all KV for each token that is drawn: one wrong, stale or missing byte and the text is another.
//! Of a large one that would take a GPU's bandwidth. So [`read_bytes_max`](SimOptions::read_bytes_max) bounds it: the
//! newest granule is read, and others in turn, another share of them for each token. What is read depends on the
//! position alone, so split and colocated text is the same. That a transfer brings the right bytes is for the digest
//! of each extent to say, here as with any model.
//!
//! The numbers are whole, -128 to 127, which f32 and bf16 both hold: a pool of either type and either order makes the
//! same tokens, also of KV that was converted on its way.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::kv_spec::{GranuleOrder, KvDtype, KvSpec};
use common::model::{KvExchange, ModelIdentity, ModelInfo, NumericsId, Representation};
use half::bf16;
use kernels::kv_layout::GRANULE_TOKENS;
use kernels::{GranuleFormat, Isa, WorkerPool};
use xxhash_rust::xxh3::Xxh3;

use crate::backend::Backend;
use crate::checkpoint::Checkpoint;
use crate::conversion::granule_format;
use crate::cpu::{CpuBackend, CpuTensor};
use crate::gguf::is_gguf;
use crate::model::{LoadError, PoolSize, size_pool};
use crate::plan::{Span, StepPlan};
use crate::pool::{KvPool, PoolError, PoolMemory};
use crate::runner::{KvSink, Runner, StepError, StepOutput, StepToken, Ticket};
use crate::spec::ModelSpec;
use crate::step_thread::StepThread;

/// Numbers of a link, half of them in K and half in V.
const LINK: usize = 16;
/// Numbers that are made at a time.
const WORD: usize = 8;
/// Tokens that are ever drawn: a real vocabulary's width would take longer to make than a simulated step may.
const DRAWN_TOKENS_MAX: u32 = 4096;
/// KV that each drawn token of a model of real size reads, or its newest granule and one more if they are larger: half a
/// millisecond of a core.
const READ_BYTES_MAX: u64 = 4 << 20;
/// By how much a step may take longer than it should, and how often, before it is said.
const LATE_MAX: f64 = 1.1;
const NUM_LATE_MAX: u32 = 10;

/// What a simulated model is and costs.
#[derive(Debug, Clone)]
pub struct SimOptions {
    /// Enters every link: two nodes with different seeds serve different models.
    pub seed: u64,
    /// Layers; a step's time is spread over them.
    pub num_layers: u32,
    /// Heads of K and of V.
    pub num_kv_heads: u32,
    /// Values of a head: even, 8 to 256.
    pub head_dim: u32,
    /// Width of the logits that it says it has; of a wide one only the first 4,096 tokens are ever drawn.
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
    /// Whose eyes the pool is for.
    pub memory: PoolMemory,
    /// KV that each drawn token reads at most, beyond its newest granule.
    pub read_bytes_max: u64,
    /// What reading the weights takes.
    pub step_time: Duration,
    /// What reading the KV of one token takes.
    pub context_time: Duration,
    /// What computing a row takes.
    pub token_time: Duration,
}

impl Default for SimOptions {
    /// Takes no time.
    fn default() -> Self {
        Self {
            seed: 0,
            num_layers: 2,
            num_kv_heads: 1,
            head_dim: 8,
            vocab_size: 512,
            max_model_len: 4096,
            kv_dtype: KvDtype::F32,
            granule_order: GranuleOrder::Lanes,
            exchange: KvExchange::Same,
            block_size: 16,
            num_blocks: 1024,
            memory: PoolMemory::Private,
            read_bytes_max: u64::MAX,
            step_time: Duration::ZERO,
            context_time: Duration::ZERO,
            token_time: Duration::ZERO,
        }
    }
}

impl SimOptions {
    /// A model of the shape that `path` states, a checkpoint folder (of which no weights are looked at, nor need be
    /// there) or a GGUF file; with KV of type `kv_dtype`, or else what a GPU would have.
    ///
    /// # Errors
    /// [`LoadError`] about the configuration.
    pub fn of_checkpoint(path: &Path, kv_dtype: Option<KvDtype>) -> Result<Self, LoadError> {
        let spec = if is_gguf(path) {
            Checkpoint::open(path)?.stated_spec().expect("a GGUF file states its shape").clone()
        } else {
            ModelSpec::read(path)?
        };
        let is_f32 = spec.stated_dtype.as_deref() == Some("float32");
        Ok(Self {
            num_layers: spec.num_layers() as u32,
            num_kv_heads: spec.num_kv_heads as u32,
            head_dim: spec.head_dim as u32,
            vocab_size: spec.vocab_size as u32,
            max_model_len: spec.max_position as u32,
            kv_dtype: kv_dtype.unwrap_or(if is_f32 { KvDtype::F32 } else { KvDtype::Bf16 }),
            granule_order: GranuleOrder::Rows,
            read_bytes_max: READ_BYTES_MAX,
            ..Self::default()
        })
    }

    /// With a pool of as many blocks as fit `kv_cache_memory_bytes`, and sequences of at most `max_model_len` tokens,
    /// or as long as pool and model allow.
    ///
    /// # Errors
    /// [`LoadError::TooLong`], [`LoadError::PoolTooSmall`].
    pub fn with_pool_of(self, kv_cache_memory_bytes: u64, max_model_len: Option<usize>) -> Result<Self, LoadError> {
        let (bytes_per_token, supported) = (self.kv_spec().bytes_per_token(), self.max_model_len as usize);
        let PoolSize { num_blocks, max_model_len } =
            size_pool(bytes_per_token, supported, self.block_size, kv_cache_memory_bytes, max_model_len)?;
        Ok(Self { num_blocks, max_model_len: max_model_len as u32, ..self })
    }

    fn kv_spec(&self) -> KvSpec {
        KvSpec::uniform(self.num_layers, self.num_kv_heads, self.head_dim, self.kv_dtype, None)
    }

    /// Of a step of so many rows, whose sequences have so many tokens before them.
    fn time_of_step(&self, num_rows: usize, num_before: usize) -> Duration {
        let reading = self.step_time + self.context_time.mul_f64(num_before as f64);
        reading.max(self.token_time.mul_f64(num_rows as f64))
    }

    /// Tokens that are drawn.
    fn num_drawn(&self) -> usize {
        self.vocab_size.min(DRAWN_TOKENS_MAX) as usize
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
        let kv_spec = options.kv_spec();
        let pool = Arc::new(KvPool::with_memory(&kv_spec, options.block_size, options.num_blocks, options.memory)?);
        let mut identity = blake3::Hasher::new();
        identity.update(b"tandem simulated model");
        identity.update(&options.seed.to_le_bytes());
        for number in [options.num_layers, options.num_kv_heads, options.head_dim, options.vocab_size] {
            identity.update(&number.to_le_bytes());
        }
        let numerics = NumericsId::new("sim-3", options.kv_dtype);
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
        let mut worker = Worker { options, pool: pool.clone(), format, num_late: 0 };
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

type Link = [u8; LINK];

struct Worker {
    options: SimOptions,
    pool: Arc<KvPool>,
    format: GranuleFormat,
    /// Steps that took longer than they should: said once.
    num_late: u32,
}

impl Worker {
    fn step(&mut self, plan: StepPlan, sink: &dyn KvSink) -> StepOutput {
        let started_at = Instant::now();
        let num_layers = self.options.num_layers;
        let num_before = plan.spans.iter().map(|span| span.first_position).sum();
        let time = self.options.time_of_step(plan.num_rows(), num_before);
        let is_reported = plan.spans.iter().any(|span| span.is_reported);
        let mut sampled = sampled_rows(&plan);
        let vocab = self.options.num_drawn();
        let mut logits = Vec::new();
        for layer in 0..num_layers {
            for span in &plan.spans {
                self.write_span(&plan, layer, span, &mut sampled);
            }
            for (row, hasher) in &mut sampled {
                self.read_context(&plan, layer, *row, hasher);
            }
            if layer + 1 == num_layers {
                logits = sampled.iter().flat_map(|(_, hasher)| logits_of(hasher, vocab)).collect();
            }
            // Where nobody looks, one sleep does.
            if is_reported || layer + 1 == num_layers {
                sleep_until(started_at + time.mul_f64(f64::from(layer + 1) / f64::from(num_layers)));
            }
            for span in plan.spans.iter().filter(|span| span.is_reported) {
                sink.on_layer_written(layer, span);
            }
        }
        let row_of = |row| sampled.binary_search_by_key(&row, |(known, _)| *known).expect("every sampled row is there");
        let logit_rows: Vec<usize> = plan.samples.iter().map(|sample| row_of(sample.row)).collect();
        let sampler = CpuBackend::new(WorkerPool::global(), Isa::detect());
        let mut drawn = Vec::new();
        sampler.sample(&CpuTensor::of(logits), vocab, &logit_rows, &plan.samples, &mut drawn);
        self.tell_if_late(started_at.elapsed(), time, plan.num_rows());
        let tokens = plan.samples.iter().zip(drawn);
        let tokens = tokens.map(|(row, token)| StepToken { sequence: row.sequence, choice: row.choice, token });
        StepOutput { tokens: tokens.collect(), plan }
    }

    fn tell_if_late(&mut self, took: Duration, should: Duration, num_rows: usize) {
        if should.is_zero() || took < should.mul_f64(LATE_MAX) {
            return;
        }
        self.num_late = self.num_late.saturating_add(1);
        if self.num_late != NUM_LATE_MAX {
            return;
        }
        tracing::warn!(
            ?took,
            ?should,
            num_rows,
            "this machine does not make, read and draw from KV as fast as the simulated model should: times are this machine's own, not those \
             that were asked for; lower the speeds (--sim-tokens-per-second, --sim-step-time) or take a smaller model"
        );
    }

    /// KV of one span in one layer, each token's from the one before it.
    fn write_span(&self, plan: &StepPlan, layer: u32, span: &Span, sampled: &mut [(usize, blake3::Hasher)]) {
        let blocks = &plan.block_tables[span.block_table.clone()];
        let mut link = match span.first_position {
            0 => [0; LINK],
            first => self.read_link(layer, blocks, first - 1),
        };
        for row in span.first_row..span.first_row + span.num_rows {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&self.options.seed.to_le_bytes());
            for number in [layer, plan.positions[row], plan.tokens[row]] {
                hasher.update(&number.to_le_bytes());
            }
            hasher.update(&link);
            hasher.finalize_xof().fill(&mut link);
            self.write_token(layer, plan.slots[row], &link);
            if let Ok(at) = sampled.binary_search_by_key(&row, |(sampled, _)| *sampled) {
                sampled[at].1.update(&link);
            }
        }
    }

    fn write_token(&self, layer: u32, slot: u32, link: &Link) {
        let layout = self.pool.layout();
        let (block, within) = (slot / layout.block_size as u32, slot as usize % layout.block_size);
        let granule = layout.granule_offset(layer as usize, block, within / GRANULE_TOKENS);
        let token = within % GRANULE_TOKENS;
        let (size, head_dim) = (self.format.dtype.size(), self.format.head_dim);
        let mut numbers = [0; 256];
        let mut bytes = [0; 4 * 256];
        for head in self.heads() {
            let numbers = &mut numbers[..head_dim];
            numbers_of(link, head, numbers);
            let bytes = &mut bytes[..head_dim * size];
            match self.options.kv_dtype {
                KvDtype::F32 => {
                    for (number, out) in numbers.iter().zip(bytes.as_chunks_mut::<4>().0) {
                        *out = f32::from(*number).to_le_bytes();
                    }
                }
                KvDtype::Bf16 => {
                    for (number, out) in numbers.iter().zip(bytes.as_chunks_mut::<2>().0) {
                        // The numbers fit the upper half of an f32.
                        *out = ((f32::from(*number).to_bits() >> 16) as u16).to_le_bytes();
                    }
                }
            }
            let head_offset = granule + head.place * self.format.head_bytes();
            if self.format.order == kernels::GranuleOrder::Rows {
                self.pool.arena().write(head_offset + token * bytes.len(), bytes);
                continue;
            }
            for (dim, value) in bytes.chunks_exact(size).enumerate() {
                self.pool.arena().write(head_offset + self.index(head, token, dim) * size, value);
            }
        }
    }

    /// The link of a token, read from the pool.
    fn read_link(&self, layer: u32, blocks: &[u32], position: usize) -> Link {
        let layout = self.pool.layout();
        let (block, within) = (blocks[position / layout.block_size], position % layout.block_size);
        let granule = layout.granule_offset(layer as usize, block, within / GRANULE_TOKENS);
        let mut link = [0; LINK];
        let fronts = self.heads().filter(|head| head.index == 0);
        for (head, half) in fronts.zip(link.chunks_exact_mut(WORD)) {
            for (dim, number) in half.iter_mut().enumerate() {
                let place = self.index(head, within % GRANULE_TOKENS, dim) * self.format.dtype.size();
                let mut bytes = [0; 4];
                let bytes = &mut bytes[..self.format.dtype.size()];
                self.pool.arena().read(granule + head.place * self.format.head_bytes() + place, bytes);
                *number = self.load(bytes) as i8 as u8;
            }
        }
        link
    }

    /// What a drawn token depends on in one layer: the granule that it is in, and of those before it as many as
    /// may be read, which others for each position.
    fn read_context(&self, plan: &StepPlan, layer: u32, row: usize, hasher: &mut blake3::Hasher) {
        let span = &plan.spans[plan.spans.partition_point(|span| span.first_row + span.num_rows <= row)];
        let blocks = &plan.block_tables[span.block_table.clone()];
        let position = plan.positions[row] as usize;
        let newest = position / GRANULE_TOKENS;
        // Counted in bf16, so that pools of either type read the same.
        let bytes =
            self.options.num_layers as usize * 2 * self.format.num_kv_heads * self.format.head_dim * 2 * GRANULE_TOKENS;
        let share = self.options.read_bytes_max / bytes as u64;
        let num_read_max = usize::try_from(share).unwrap_or(usize::MAX).max(1);
        let stride = newest.div_ceil(num_read_max).max(1);
        let mut read = Xxh3::new();
        for granule in (position % stride..newest).step_by(stride) {
            self.read_granule(layer, blocks, granule, GRANULE_TOKENS, &mut read);
        }
        self.read_granule(layer, blocks, newest, position % GRANULE_TOKENS + 1, &mut read);
        hasher.update(&read.digest128().to_le_bytes());
    }

    /// The first `num_tokens` tokens of a granule, in an order that every pool has in common.
    fn read_granule(&self, layer: u32, blocks: &[u32], granule: usize, num_tokens: usize, out: &mut Xxh3) {
        let layout = self.pool.layout();
        let per_block = layout.block_size / GRANULE_TOKENS;
        let offset = layout.granule_offset(layer as usize, blocks[granule / per_block], granule % per_block);
        let (size, head_dim, head_bytes) = (self.format.dtype.size(), self.format.head_dim, self.format.head_bytes());
        let is_common = self.format.order == kernels::GranuleOrder::Rows && self.options.kv_dtype == KvDtype::Bf16;
        self.pool.arena().visit(offset, layout.granule_bytes(), |bytes| {
            for (head, bytes) in self.heads().zip(bytes.chunks_exact(head_bytes)) {
                if is_common {
                    out.update(&bytes[..num_tokens * head_dim * size]);
                    continue;
                }
                for token in 0..num_tokens {
                    for dim in 0..head_dim {
                        let value = self.load(&bytes[self.index(head, token, dim) * size..]);
                        let [low, high, rest @ ..] = value.to_bits().to_be_bytes();
                        out.update(&[high, low]);
                        // No number that is written here has anything there: so it was damaged.
                        if rest != [0, 0] {
                            out.update(&rest);
                        }
                    }
                }
            }
        });
    }

    /// All heads of K, then all of V, as they lie in a granule.
    fn heads(&self) -> impl Iterator<Item = Head> + use<> {
        let num_heads = self.format.num_kv_heads;
        (0..2 * num_heads).map(move |place| Head { place, index: place % num_heads, is_v: place >= num_heads })
    }

    /// Where a value lies in its head, in values.
    fn index(&self, head: Head, token: usize, dim: usize) -> usize {
        if head.is_v { self.format.v_index(token, dim) } else { self.format.k_index(token, dim) }
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

/// One head of K or V.
#[derive(Clone, Copy)]
struct Head {
    /// Among all heads of a granule.
    place: usize,
    /// Among those of its plane.
    index: usize,
    is_v: bool,
}

/// The numbers of a head of the token with this link.
fn numbers_of(link: &Link, head: Head, out: &mut [i8]) {
    let (halves, _) = link.as_chunks::<WORD>();
    let key = u64::from_le_bytes(halves[0]) ^ u64::from_le_bytes(halves[1]).rotate_left(32);
    let mut counter = key ^ ((head.place * out.len()) as u64).wrapping_mul(0xD1B5_4A32_D192_ED03);
    for word in out.chunks_mut(WORD) {
        // SplitMix64.
        counter = counter.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (counter ^ (counter >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        for (number, byte) in word.iter_mut().zip((mixed ^ (mixed >> 31)).to_le_bytes()) {
            *number = byte as i8;
        }
    }
    if head.index == 0 {
        for (number, byte) in out.iter_mut().zip(halves[usize::from(head.is_v)]) {
            *number = byte as i8;
        }
    }
}

/// Each row that is sampled, once, with what its logits are made from.
fn sampled_rows(plan: &StepPlan) -> Vec<(usize, blake3::Hasher)> {
    let mut rows: Vec<usize> = plan.samples.iter().map(|sample| sample.row).collect();
    rows.sort_unstable();
    rows.dedup();
    rows.into_iter().map(|row| (row, blake3::Hasher::new())).collect()
}

fn sleep_until(moment: Instant) {
    let left = moment.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        std::thread::sleep(left);
    }
}

/// Logits from -8 to 8.
fn logits_of(row: &blake3::Hasher, vocab: usize) -> Vec<f32> {
    let mut bytes = vec![0; vocab * 4];
    row.finalize_xof().fill(&mut bytes);
    let (values, _) = bytes.as_chunks::<4>();
    values.iter().map(|b| (u32::from_le_bytes(*b) >> 8) as f32 / (1 << 20) as f32 - 8.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_takes_the_longer_of_reading_and_computing() {
        let [step_time, context_time, token_time] = [6_000, 1, 50].map(Duration::from_micros);
        let options = SimOptions { step_time, context_time, token_time, ..SimOptions::default() };
        let micros = |num_rows, num_before| options.time_of_step(num_rows, num_before).as_micros();
        assert_eq!([micros(1, 0), micros(1, 2_000), micros(8, 8_000)], [6_000, 8_000, 14_000]);
        assert_eq!([micros(512, 0), micros(512, 19_600), micros(512, 20_000)], [25_600, 25_600, 26_000]);
    }
}
