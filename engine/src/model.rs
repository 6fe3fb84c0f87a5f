//! A model loaded into memory, ready to be shared by the runners of a process.

use std::path::{Path, PathBuf};

use common::config::Dtype;
use common::kv_spec::{GranuleOrder, KvDtype};
use common::model::{KvExchange, ModelIdentity, ModelInfo, NumericsId, Representation};
use kernels::{Isa, NUMERICS_FAMILY, WorkerPool};

use crate::checkpoint::{Checkpoint, CheckpointError, FloatDtype};
use crate::cpu::CpuBackend;
use crate::gguf::is_gguf;
use crate::identity::{self, model_identity};
use crate::pool::PoolError;
use crate::spec::{ModelSpec, SpecError};
use crate::weights::{ComputeDtype, Weights};

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its configuration.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Its weights.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Its KV cache.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// Longer sequences were asked for than the model knows.
    #[error("--max-model-len {asked} is longer than the {supported} tokens the model supports by its config.json")]
    TooLong {
        /// Asked for.
        asked: usize,
        /// By the configuration.
        supported: usize,
    },
    /// A sequence of the longest length would not fit the pool.
    #[error(
        "--kv-cache-memory-bytes {bytes} hold {held} tokens ({bytes_per_token} bytes each, blocks of {block_size}), fewer than the {needed} needed: give more memory or lower --max-model-len"
    )]
    PoolTooSmall {
        /// Memory given.
        bytes: u64,
        /// Bytes of a token's KV.
        bytes_per_token: u64,
        /// Tokens per block.
        block_size: usize,
        /// Tokens that fit.
        held: usize,
        /// Tokens that must fit.
        needed: usize,
    },
    /// No thread for the runner.
    #[error("the system refuses to start the runner's thread: {reason}")]
    Thread {
        /// What it said.
        reason: String,
    },
}

/// How to load a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Type of weights, activations as operands, and KV. `Auto` takes that of the checkpoint; f16 is run as
    /// float32, which holds its values exactly. Quantized weights stay as they are, and `Auto` is bf16 for the rest.
    pub dtype: Dtype,
    /// Instruction set; never changes a result.
    pub isa: Isa,
    /// Threads of the arithmetic; the first model of a process decides. Default: one per core.
    pub threads: Option<usize>,
    /// Where the digest of the weights is kept, if anywhere.
    pub cache_folder: Option<PathBuf>,
}

/// Weights, shape and name of a model. Loaded once per process; any number of runners share it.
pub struct Model {
    folder: PathBuf,
    spec: ModelSpec,
    dtype: ComputeDtype,
    kv_dtype: KvDtype,
    exchange: KvExchange,
    /// `bf16`, or with quantized formats `bf16+q8_0`.
    weight_format: String,
    identity: ModelIdentity,
    weights: Weights<CpuBackend>,
    backend: CpuBackend,
}

impl Model {
    /// Loads the checkpoint in `folder`, or the GGUF file of that path, keeping the digest of its weights in the user's cache folder.
    ///
    /// # Errors
    /// [`LoadError`] about the configuration or the weights.
    pub fn load(folder: &Path, dtype: Dtype, threads: Option<usize>) -> Result<Self, LoadError> {
        let cache_folder = identity::cache_folder_from_env();
        Self::load_with(folder, LoadOptions { dtype, isa: Isa::detect(), threads, cache_folder })
    }

    /// As [`load`](Self::load), with everything said.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_with(folder: &Path, options: LoadOptions) -> Result<Self, LoadError> {
        let (spec, checkpoint) = open(folder)?;
        let formats = checkpoint.quantized_formats();
        let dtype = match options.dtype {
            Dtype::Float32 => ComputeDtype::F32,
            Dtype::Bfloat16 => ComputeDtype::Bf16,
            Dtype::Auto if !formats.is_empty() => ComputeDtype::Bf16,
            Dtype::Auto => match checkpoint.dtype_of("model.embed_tokens.weight") {
                Some(FloatDtype::Bf16) => ComputeDtype::Bf16,
                _ => ComputeDtype::F32,
            },
        };
        let workers = match options.threads {
            Some(threads) => WorkerPool::init_global(threads),
            None => WorkerPool::global(),
        };
        let backend = CpuBackend::new(workers, options.isa);
        let weights = Weights::load(&backend, &spec, &checkpoint, dtype)?;
        let identity = model_identity(&checkpoint, &spec, dtype.as_str(), options.cache_folder.as_deref());
        let kv_dtype = match dtype {
            ComputeDtype::F32 => KvDtype::F32,
            ComputeDtype::Bf16 => KvDtype::Bf16,
        };
        let weight_format =
            std::iter::once(kv_dtype.as_str().to_string()).chain(formats).collect::<Vec<String>>().join("+");
        tracing::info!(
            model = %folder.display(), %identity, dtype = dtype.as_str(), weights = weight_format, isa = options.isa.name(),
            threads = workers.threads(), "model loaded"
        );
        let (folder, exchange) = (folder.to_path_buf(), KvExchange::Same);
        Ok(Self { folder, spec, dtype, kv_dtype, exchange, weight_format, identity, weights, backend })
    }

    /// The same with KV of another type than the arithmetic's, if one is asked for, and with other nodes that KV may be
    /// exchanged with.
    pub fn with_kv(self, kv_dtype: Option<KvDtype>, exchange: KvExchange) -> Self {
        Self { kv_dtype: kv_dtype.unwrap_or(self.kv_dtype), exchange, ..self }
    }

    /// The checkpoint's folder or GGUF file: tokenizer and chat template are there too.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its shape, and what it may end with.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Its weights.
    pub fn weights(&self) -> &Weights<CpuBackend> {
        &self.weights
    }

    /// What it computes on.
    pub fn backend(&self) -> CpuBackend {
        self.backend
    }

    /// What it computes in.
    pub fn dtype(&self) -> ComputeDtype {
        self.dtype
    }

    /// What its KV is kept in.
    pub fn kv_dtype(&self) -> KvDtype {
        self.kv_dtype
    }

    /// What a node with such a pool announces; sequences may be as long as the model allows.
    pub fn info_for(&self, block_size: usize, num_blocks: usize) -> ModelInfo {
        let numerics = NumericsId::new(&format!("{NUMERICS_FAMILY}/tp1/{}", self.weight_format), self.kv_dtype);
        ModelInfo {
            identity: self.identity,
            representation: Representation::new(self.kv_dtype, &numerics, self.exchange),
            numerics,
            kv_spec: self.spec.kv_spec(self.kv_dtype),
            vocab_size: self.spec.vocab_size as u32,
            max_model_len: self.spec.max_position as u32,
            exchange: self.exchange,
            granule_order: GranuleOrder::Lanes,
            block_size: block_size as u32,
            num_blocks: num_blocks as u32,
        }
    }
}

/// Shape and tensors. Of a folder the shape comes first: what is wrong with it is said before anything of weights.
fn open(path: &Path) -> Result<(ModelSpec, Checkpoint), LoadError> {
    if is_gguf(path) {
        let checkpoint = Checkpoint::open(path)?;
        let spec = checkpoint.stated_spec().expect("a GGUF file states its shape").clone();
        return Ok((spec, checkpoint));
    }
    let spec = ModelSpec::read(path)?;
    Ok((spec, Checkpoint::open(path)?))
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let identity = &self.identity;
        f.debug_struct("Model").field("folder", &self.folder).field("identity", identity).finish_non_exhaustive()
    }
}
