//! Where the engine of a row computes: on the CPU or on a device.

use std::sync::Arc;

use anyhow::Context;
use common::config::DeviceChoice;
use engine::cpu_runner::CpuRunner;
use engine::cuda::limits::{DeviceProbe, ProbeSizes};
use engine::cuda::model::{DeviceLoadOptions, StepLimits};
use engine::cuda::{CudaBackend, CudaRunner, Device};
use engine::model::{LoadError, LoadOptions, Model};
use engine::runner::Runner;
use engine::weights::ComputeDtype;

use super::limit::{Machine, StepWork};
use super::load::{BLOCK_SIZE, EngineLoad};
use super::{EngineBenchArgs, Row};

/// A model, loaded.
pub enum Target {
    /// In host memory.
    Cpu(Arc<Model>),
    /// In a device's.
    Device(Arc<Model<CudaBackend>>),
}

/// A runner on the CPU with a pool of so many tokens, for sequences of at most `longest`.
pub(super) fn cpu_runner(model: &Arc<Model>, num_tokens: usize, longest: usize) -> Result<Box<dyn Runner>, LoadError> {
    let bytes = model.info_for(BLOCK_SIZE, 1).kv_spec.bytes_per_token() * num_tokens as u64;
    Ok(Box::new(CpuRunner::new(model.clone(), BLOCK_SIZE, bytes, Some(longest))?))
}

impl Target {
    /// Loads `--model` to `--device`.
    ///
    /// # Errors
    /// If the model cannot be loaded, or a GPU that is asked for is not there or too small.
    pub fn load(args: &EngineBenchArgs) -> anyhow::Result<Self> {
        match args.device {
            DeviceChoice::Cpu => {}
            DeviceChoice::Cuda(ordinal) => {
                let device = engine::cuda::open(ordinal)?;
                if args.enable_pdl {
                    device.enable_pdl().map_err(|reason| anyhow::anyhow!("--enable-pdl: {reason}"))?;
                }
                return Self::load_on(&device, args);
            }
            DeviceChoice::Auto | DeviceChoice::Sim => anyhow::bail!("--device is cpu, or a GPU such as cuda:0"),
        }
        let options = LoadOptions {
            dtype: args.dtype,
            isa: engine::Isa::parse(&args.isa)?,
            threads: args.threads,
            cache_folder: engine::identity::cache_folder_from_env(),
        };
        Ok(Self::Cpu(Arc::new(Model::load_with(&args.model, options)?)))
    }

    /// Loads `--model` to this device.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_on(device: &Arc<dyn Device>, args: &EngineBenchArgs) -> anyhow::Result<Self> {
        let options = DeviceLoadOptions {
            dtype: args.dtype,
            kv_dtype: None,
            is_batch_invariant: args.batch_invariant,
            prefill_attention: args.prefill_attention,
            cache_folder: engine::identity::cache_folder_from_env(),
        };
        Ok(Self::Device(Arc::new(Model::load_on_device(&args.model, device, options)?)))
    }

    /// What a row needs.
    pub fn work(&self, row: &Row, chunk_tokens: usize) -> StepWork {
        match self {
            Self::Cpu(model) => StepWork::of(model, row, chunk_tokens),
            Self::Device(model) => StepWork::of(model, row, chunk_tokens),
        }
    }

    /// What its limits are measured with.
    ///
    /// # Errors
    /// What the device says.
    pub fn machine(&self, args: &EngineBenchArgs, rows: &[Row]) -> anyhow::Result<Machine> {
        match self {
            Self::Cpu(model) => Ok(Machine::cpu(model, rows, args.max_num_batched_tokens)),
            Self::Device(model) => {
                let sizes = ProbeSizes { copy_bytes: args.limit_copy_bytes as usize, product: args.limit_product };
                let probe = DeviceProbe::new(model.backend().device(), sizes);
                Ok(Machine::Device(probe.context("take memory to measure limits with")?))
            }
        }
    }

    /// An engine for any of the rows.
    ///
    /// # Errors
    /// If its pool does not fit.
    pub fn start(&self, args: &EngineBenchArgs, rows: &[Row]) -> anyhow::Result<EngineLoad> {
        let step_tokens = args.max_num_batched_tokens;
        EngineLoad::start(rows, step_tokens, |num_tokens, longest| match self {
            Self::Cpu(model) => cpu_runner(model, num_tokens, longest),
            Self::Device(model) => {
                let bytes = model.info_for(BLOCK_SIZE, 1).kv_spec.bytes_per_token() * num_tokens as u64;
                let limits = StepLimits {
                    max_num_batched_tokens: step_tokens,
                    max_num_seqs: rows.iter().map(Row::num_sequences).max().unwrap_or(1),
                    max_model_len: Some(longest),
                };
                let bytes = model.check_kv_cache_bytes(bytes, &limits, 1)?;
                let has_graphs = !args.enforce_eager;
                Ok(Box::new(CudaRunner::with_graphs(model.clone(), BLOCK_SIZE, bytes, Some(longest), has_graphs)?))
            }
        })
    }

    /// What weights and activations are computed in.
    pub fn dtype(&self) -> ComputeDtype {
        match self {
            Self::Cpu(model) => model.dtype(),
            Self::Device(model) => model.dtype(),
        }
    }

    /// Threads of the arithmetic; where a device does that, those that peers may have beside it.
    pub fn num_threads(&self) -> usize {
        match self {
            Self::Cpu(model) => model.backend().ctx().pool.threads(),
            Self::Device(_) => std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// Model, numerics, what it runs on, and what its limits are of.
    pub fn setting(&self, args: &EngineBenchArgs) -> String {
        let mib = |num_bytes: u64| num_bytes.div_ceil(1 << 20);
        match self {
            Self::Cpu(model) => {
                let backend = model.backend();
                let ctx = backend.ctx();
                format!(
                    "{}, {}, {}, {} threads, {} MiB of weights",
                    model.folder().display(),
                    model.numerics().0,
                    ctx.isa.name(),
                    ctx.pool.threads(),
                    mib(model.weights().sizes().num_bytes())
                )
            }
            Self::Device(model) => {
                let graphs = match (args.enforce_eager, args.enable_pdl) {
                    (false, false) => "with graphs",
                    (false, true) => "with graphs, launches overlap",
                    (true, false) => "without graphs",
                    (true, true) => "without graphs, launches overlap",
                };
                format!(
                    "{}, {}, {}, {graphs}, steps of {} tokens, {} MiB of weights; limits: a copy of {} MiB within the \
                     device, bytes read and written counted, and a bf16 product of {} cubed by its library",
                    model.folder().display(),
                    model.numerics().0,
                    model.backend().device().name(),
                    args.max_num_batched_tokens,
                    mib(model.weights().sizes().num_bytes()),
                    mib(args.limit_copy_bytes),
                    args.limit_product,
                )
            }
        }
    }
}
