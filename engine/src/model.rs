//! A model loaded into memory, ready to be shared by the runners of a process.

use std::path::{Path, PathBuf};
use std::time::Instant;

use common::config::Dtype;
use common::kv_spec::KvDtype;
use common::model::{KvExchange, ModelIdentity, ModelInfo, NumericsId, Representation};
use kernels::cuda::DeviceError;
use kernels::{Isa, IsaError, Order, WorkerPool};

use crate::backend::Backend;
use crate::checkpoint::{Checkpoint, CheckpointError, FloatDtype};
use crate::cpu::CpuBackend;
use crate::gguf::is_gguf;
use crate::identity::{self, model_identity};
use crate::load_progress::LoadProgress;
use crate::pool::PoolError;
use crate::spec::{ModelSpec, SpecError};
use crate::weights::{self, ComputeDtype, Stacked, Weights};

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
    /// The instruction set that was asked for.
    #[error("--cpu-isa: {0}")]
    Isa(#[from] IsaError),
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
        "--kv-cache-memory-bytes {bytes} hold {held} tokens ({bytes_per_token} bytes each, blocks of {block_size}), fewer than the {needed} needed: give {} bytes or more{}",
        bytes_per_token * (needed.div_ceil(*block_size) * block_size) as u64, if *held > 0 { " or lower --max-model-len" } else { "" }
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
    /// A device cannot run it.
    #[error("this model cannot run on a CUDA device: {reason}; use --device cpu, or another checkpoint")]
    NotOnDevice {
        /// Why.
        reason: String,
    },
    /// A device cannot hold it.
    #[error(
        "the model needs {needed} bytes of memory, and {device} has {free} free: use another device, or a smaller model"
    )]
    DeviceMemory {
        /// Which.
        device: String,
        /// Of the weights.
        needed: u64,
        /// Now.
        free: u64,
    },
    /// KV of another type than the arithmetic's.
    #[error(
        "--kv-cache-dtype {asked} is not supported on a CUDA device, where this model's KV is {computed}, the type that is computed in: leave it at auto, or use --device cpu"
    )]
    KvDtypeOnDevice {
        /// Asked for.
        asked: &'static str,
        /// What there is.
        computed: &'static str,
    },
    /// A KV cache of the size that was asked for does not fit beside what steps need.
    #[error(
        "--kv-cache-memory-bytes {asked} for each of {num_nodes} nodes does not fit: {device} has {free} bytes free, and steps need {steps} of them: lower it, or leave it out to take what is left"
    )]
    NoDeviceMemoryForAskedKv {
        /// Which.
        device: String,
        /// Of each node.
        asked: u64,
        /// In this process.
        num_nodes: u64,
        /// Now.
        free: u64,
        /// For activations of all nodes.
        steps: u64,
    },
    /// Nothing is left for KV.
    #[error(
        "--gpu-memory-utilization {utilization} of the {total} bytes of {device} leaves nothing for KV: {used} are in use and steps need {steps}: raise it, or lower --max-num-batched-tokens or --max-num-seqs"
    )]
    NoDeviceMemoryForKv {
        /// Which.
        device: String,
        /// Its memory.
        total: u64,
        /// The share that may be used.
        utilization: f64,
        /// By now, by anybody.
        used: u64,
        /// For activations.
        steps: u64,
    },
    /// A device fails.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No thread for the runner.
    #[error("the system refuses to start the runner's thread: {reason}")]
    Thread {
        /// What it said.
        reason: String,
    },
}

impl LoadError {
    /// Whether it is the device that cannot, where a CPU may.
    pub fn is_of_device(&self) -> bool {
        match self {
            LoadError::Device(_)
            | LoadError::NotOnDevice { .. }
            | LoadError::KvDtypeOnDevice { .. }
            | LoadError::DeviceMemory { .. }
            | LoadError::NoDeviceMemoryForAskedKv { .. }
            | LoadError::NoDeviceMemoryForKv { .. } => true,
            LoadError::Spec(_)
            | LoadError::Checkpoint(_)
            | LoadError::Pool(_)
            | LoadError::Isa(_)
            | LoadError::TooLong { .. }
            | LoadError::PoolTooSmall { .. }
            | LoadError::Thread { .. } => false,
        }
    }
}

/// How to load a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Type of weights, activations as operands, and KV. `Auto` takes that of the checkpoint; f16 is run as
    /// float32, which holds its values exactly. Quantized weights stay as they are, and `Auto` is bf16 for the rest.
    pub dtype: Dtype,
    /// Instruction set. Those of one order of additions give the same results.
    pub isa: Isa,
    /// Threads of the arithmetic; the first model of a process decides. Default: one per core.
    pub threads: Option<usize>,
    /// Where the digest of the weights is kept, if anywhere.
    pub cache_folder: Option<PathBuf>,
}

/// Weights, shape and name of a model. Loaded once per process; any number of runners share it.
pub struct Model<B: Backend = CpuBackend> {
    folder: PathBuf,
    spec: ModelSpec,
    dtype: ComputeDtype,
    kv_dtype: KvDtype,
    exchange: KvExchange,
    /// `bf16`, or with quantized formats `bf16+q8_0`.
    weight_format: String,
    families: Families,
    identity: ModelIdentity,
    weights: Weights<B>,
    backend: B,
}

/// Names of a backend's orders of additions, part of the numerics id that nodes announce.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Families {
    /// Of what is f32.
    pub(crate) f32: &'static str,
    /// Of what is not.
    pub(crate) rest: &'static str,
}

/// A checkpoint whose shape is known and whose weights are not loaded yet.
pub(crate) struct Opened {
    folder: PathBuf,
    pub(crate) spec: ModelSpec,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) dtype: ComputeDtype,
}

impl Opened {
    pub(crate) fn open(folder: &Path, dtype: Dtype) -> Result<Self, LoadError> {
        let (spec, checkpoint) = open(folder)?;
        let dtype = match dtype {
            Dtype::Float32 => ComputeDtype::F32,
            Dtype::Bfloat16 => ComputeDtype::Bf16,
            Dtype::Auto if !checkpoint.quantized_formats().is_empty() => ComputeDtype::Bf16,
            Dtype::Auto => match checkpoint.dtype_of(weights::EMBEDDING) {
                Some(FloatDtype::Bf16) => ComputeDtype::Bf16,
                _ => ComputeDtype::F32,
            },
        };
        Ok(Self { folder: folder.to_path_buf(), spec, checkpoint, dtype })
    }

    pub(crate) fn load<B: Backend + Sync>(
        self,
        backend: B,
        families: Families,
        num_threads: usize,
        cache_folder: Option<&Path>,
    ) -> Result<Model<B>, LoadError> {
        let Self { folder, spec, checkpoint, dtype } = self;
        let started_at = Instant::now();
        // Both read all of the checkpoint, so both do it while it is in memory.
        let (weights, identity) = std::thread::scope(|scope| {
            let identity = scope.spawn(|| model_identity(&checkpoint, &spec, dtype.as_str(), cache_folder));
            let progress = LoadProgress::start(checkpoint.num_bytes_of(Stacked::all(&spec)));
            let weights = Weights::load(&backend, &spec, &checkpoint, dtype, num_threads, &progress);
            drop(progress);
            (weights, identity.join().expect("a digest of mapped bytes does not panic"))
        });
        let weights = weights?;
        let (kv_dtype, exchange) = (kv_dtype_of(dtype), KvExchange::Same);
        let formats = checkpoint.quantized_formats();
        let weight_format =
            std::iter::once(kv_dtype.as_str().to_string()).chain(formats).collect::<Vec<String>>().join("+");
        tracing::info!(
            model = %folder.display(), %identity, dtype = dtype.as_str(), weights = weight_format,
            seconds = started_at.elapsed().as_secs_f32(), "model loaded"
        );
        Ok(Model { folder, spec, dtype, kv_dtype, exchange, weight_format, families, identity, weights, backend })
    }
}

fn kv_dtype_of(dtype: ComputeDtype) -> KvDtype {
    match dtype {
        ComputeDtype::F32 => KvDtype::F32,
        ComputeDtype::Bf16 => KvDtype::Bf16,
    }
}

impl Model {
    /// Loads the checkpoint in `folder`, or the GGUF file of that path, keeping the digest of its weights in the user's
    /// cache folder.
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
        let opened = Opened::open(folder, options.dtype)?;
        let workers = match options.threads {
            Some(threads) => WorkerPool::init_global(threads),
            None => WorkerPool::global(),
        };
        let backend = CpuBackend::new(workers, options.isa);
        let cache_folder = options.cache_folder.as_deref();
        // Orders differ in products of bf16 alone, which those with weights in q8_0 are in tiles.
        let order = options.isa.order();
        let opens = opened.checkpoint.quantized_formats().contains("q8_0");
        let families = Families { f32: if opens { order } else { Order::Pairs }.family(), rest: order.family() };
        let model = opened.load(backend, families, workers.threads(), cache_folder)?;
        tracing::info!(isa = options.isa.name(), threads = workers.threads(), "the model runs on the CPU");
        Ok(model)
    }
}

impl<B: Backend> Model<B> {
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
    pub fn weights(&self) -> &Weights<B> {
        &self.weights
    }

    /// What it computes on.
    pub fn backend(&self) -> B {
        self.backend.clone()
    }

    /// What it computes in.
    pub fn dtype(&self) -> ComputeDtype {
        self.dtype
    }

    /// What its KV is kept in.
    pub fn kv_dtype(&self) -> KvDtype {
        self.kv_dtype
    }

    /// Within which the same tokens give the same bits. Attention over bf16 adds up as other products of bf16 do, also
    /// where there are none.
    pub fn numerics(&self) -> NumericsId {
        let Families { f32, rest } = self.families;
        let arithmetic = |family| format!("{family}/tp1/{}", self.weight_format);
        match (self.dtype, self.kv_dtype) {
            (ComputeDtype::F32, KvDtype::Bf16) if f32 != rest => {
                NumericsId::with_attention(&arithmetic(f32), self.kv_dtype, rest)
            }
            (ComputeDtype::F32, _) => NumericsId::new(&arithmetic(f32), self.kv_dtype),
            (ComputeDtype::Bf16, _) => NumericsId::new(&arithmetic(rest), self.kv_dtype),
        }
    }

    /// What a node with such a pool announces; sequences may be as long as the model allows.
    pub fn info_for(&self, block_size: usize, num_blocks: usize) -> ModelInfo {
        let numerics = self.numerics();
        ModelInfo {
            identity: self.identity,
            representation: Representation::new(self.kv_dtype, &numerics, self.exchange),
            numerics,
            kv_spec: self.spec.kv_spec(self.kv_dtype),
            vocab_size: self.spec.vocab_size as u32,
            max_model_len: self.spec.max_position as u32,
            exchange: self.exchange,
            granule_order: B::GRANULE_ORDER,
            block_size: block_size as u32,
            num_blocks: num_blocks as u32,
        }
    }

    /// As the function of this name, for this model.
    pub(crate) fn size_pool(
        &self,
        block_size: usize,
        kv_cache_memory_bytes: u64,
        max_model_len: Option<usize>,
    ) -> Result<PoolSize, LoadError> {
        let bytes_per_token = self.spec.kv_spec(self.kv_dtype()).bytes_per_token();
        size_pool(bytes_per_token, self.spec.max_position, block_size, kv_cache_memory_bytes, max_model_len)
    }
}

/// How many blocks of `block_size` tokens of `bytes_per_token` fit `kv_cache_memory_bytes`, and how long sequences may
/// be then: at most `max_model_len`, or without it as long as the model (`supported` tokens) and the pool allow.
///
/// # Errors
/// [`LoadError::TooLong`], [`LoadError::PoolTooSmall`].
pub(crate) fn size_pool(
    bytes_per_token: u64,
    supported: usize,
    block_size: usize,
    kv_cache_memory_bytes: u64,
    max_model_len: Option<usize>,
) -> Result<PoolSize, LoadError> {
    let num_blocks = kv_cache_memory_bytes / (bytes_per_token * block_size.max(1) as u64);
    let num_blocks = usize::try_from(num_blocks).unwrap_or(usize::MAX);
    let held = num_blocks.saturating_mul(block_size);
    let wanted = max_model_len.unwrap_or(supported.min(held));
    if wanted > supported {
        return Err(LoadError::TooLong { asked: wanted, supported });
    }
    if wanted > held || held == 0 {
        let needed = wanted.max(block_size);
        let bytes = kv_cache_memory_bytes;
        return Err(LoadError::PoolTooSmall { bytes, bytes_per_token, block_size, held, needed });
    }
    if wanted < supported && max_model_len.is_none() {
        tracing::warn!(
            max_model_len = wanted,
            supported,
            "the KV cache holds no sequence as long as the model supports: longer requests are refused; \
             raise --kv-cache-memory-bytes, or set --max-model-len to say that it is meant"
        );
    }
    Ok(PoolSize { num_blocks, max_model_len: wanted })
}

/// What fits a KV cache.
pub(crate) struct PoolSize {
    pub(crate) num_blocks: usize,
    pub(crate) max_model_len: usize,
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

impl<B: Backend> std::fmt::Debug for Model<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let identity = &self.identity;
        f.debug_struct("Model").field("folder", &self.folder).field("identity", identity).finish_non_exhaustive()
    }
}
