//! What a simulated model is, and what its steps take.

use std::path::Path;
use std::time::Duration;

use common::kv_spec::{GranuleOrder, KvDtype, KvSpec};
use common::model::KvExchange;

use crate::checkpoint::Checkpoint;
use crate::gguf::is_gguf;
use crate::model::{LoadError, PoolSize, size_pool};
use crate::pool::PoolMemory;
use crate::spec::ModelSpec;

/// Tokens that are ever drawn: a real vocabulary's width would take longer to make than a simulated step may.
const DRAWN_TOKENS_MAX: u32 = 4096;
/// KV that each drawn token of a model of real size reads, or its newest granule and one more if they are larger: half a
/// millisecond of a core.
const READ_BYTES_MAX: u64 = 4 << 20;

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

    pub(super) fn kv_spec(&self) -> KvSpec {
        KvSpec::uniform(self.num_layers, self.num_kv_heads, self.head_dim, self.kv_dtype, None)
    }

    /// Of a step of so many rows, whose sequences have so many tokens before them.
    pub(super) fn time_of_step(&self, num_rows: usize, num_before: usize) -> Duration {
        let reading = self.step_time + self.context_time.mul_f64(num_before as f64);
        reading.max(self.token_time.mul_f64(num_rows as f64))
    }

    /// Tokens that are drawn.
    pub(super) fn num_drawn(&self) -> usize {
        self.vocab_size.min(DRAWN_TOKENS_MAX) as usize
    }
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
