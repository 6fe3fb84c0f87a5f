//! Where a process computes: the model on a GPU, on the CPU or nowhere, and a runner of it for each node.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use common::config::{DeviceChoice, EngineArgs, WeightsArgs};
use engine::Isa;
use engine::cpu_runner::CpuRunner;
use engine::cuda::model::{DeviceLoadOptions, StepLimits};
use engine::cuda::{CudaBackend, CudaRunner};
use engine::model::{LoadError, LoadOptions, Model};
use engine::pool::PoolMemory;
use engine::runner::Runner;
use engine::sim::{SimOptions, SimRunner};

/// A model, loaded once per process.
#[derive(Clone)]
pub enum LoadedModel {
    /// In host memory.
    Cpu(Arc<Model>),
    /// In a GPU's.
    Cuda {
        /// The model.
        model: Arc<Model<CudaBackend>>,
        /// What is left there for the KV of each node.
        kv_cache_bytes: u64,
    },
    /// Nowhere: it is simulated.
    Sim(SimOptions),
}

/// Loads the weights in a checkpoint folder to what `--device` says, for `num_nodes` nodes of this process.
///
/// # Errors
/// If the checkpoint is not there, not supported or damaged, or a GPU that is asked for is not there or too small.
pub async fn load_model(
    folder: PathBuf,
    weights: &WeightsArgs,
    engine: &EngineArgs,
    num_nodes: usize,
) -> anyhow::Result<LoadedModel> {
    let (weights, engine) = (weights.clone(), engine.clone());
    let load = move || load(&folder, &weights, &engine, num_nodes);
    Ok(tokio::task::spawn_blocking(load).await.context("load the model")??)
}

fn load(folder: &Path, weights: &WeightsArgs, engine: &EngineArgs, num_nodes: usize) -> Result<LoadedModel, LoadError> {
    // Whatever computes: a word that means nothing is told in any case.
    let isa = Isa::parse(&engine.cpu_isa)?;
    let on_gpu = |ordinal| load_on_gpu(folder, ordinal, weights, engine, num_nodes);
    match engine.device {
        DeviceChoice::Cuda(ordinal) => return on_gpu(ordinal),
        DeviceChoice::Cpu => {}
        DeviceChoice::Sim => return simulate(folder, weights, engine),
        DeviceChoice::Auto => match on_gpu(0) {
            Ok(loaded) => return Ok(loaded),
            Err(LoadError::Device(error)) if error.is_absence() => {
                tracing::info!(reason = %error, "--device auto: the CPU computes");
            }
            Err(error) if error.is_of_device() => {
                tracing::warn!(reason = %error, "--device auto: there is a GPU, and the CPU computes");
            }
            Err(error) => return Err(error),
        },
    }
    for (flag, is_set) in [("--enable-pdl", engine.enable_pdl), ("--enforce-eager", engine.enforce_eager)] {
        if is_set {
            tracing::warn!("{flag} does nothing: it is for GPUs, and the CPU computes");
        }
    }
    let threads = engine.threads.map(|threads| threads as usize);
    let cache_folder = engine::identity::cache_folder_from_env();
    let options = LoadOptions { dtype: weights.dtype, isa, threads, cache_folder };
    // Only where they would be used: the question itself changes what the process may do.
    if engine.cpu_isa == "auto"
        && let Some(reason) = Isa::tiles_refused()
    {
        tracing::warn!(reason, "the processor has tile registers, and they are not used");
    }
    let model = Model::load_with(folder, options)?.with_kv(engine.kv_cache_dtype.kv_dtype(), engine.kv_exchange);
    tracing::info!(
        numerics = %model.numerics(), kv_exchange = %engine.kv_exchange,
        "what the bits of this node's answers and KV depend on"
    );
    Ok(LoadedModel::Cpu(Arc::new(model)))
}

fn simulate(folder: &Path, weights: &WeightsArgs, engine: &EngineArgs) -> Result<LoadedModel, LoadError> {
    let kv_dtype = engine.kv_cache_dtype.kv_dtype().or(weights.dtype.kv_dtype());
    let options = SimOptions {
        exchange: engine.kv_exchange,
        block_size: engine.block_size as usize,
        step_time: engine.sim.sim_step_time,
        context_time: engine.sim.sim_context_time / 1000,
        token_time: Duration::from_secs(1) / engine.sim.sim_tokens_per_second,
        ..SimOptions::of_checkpoint(folder, kv_dtype)?
    };
    let SimOptions { num_layers, num_kv_heads, head_dim, .. } = options;
    tracing::warn!(
        shape_of = %folder.display(), num_layers, num_kv_heads, head_dim, kv_dtype = options.kv_dtype.as_str(),
        tokens_per_second = engine.sim.sim_tokens_per_second, step_time = ?options.step_time,
        "--device sim: the model is simulated, no weights are read, and what it answers means nothing"
    );
    Ok(LoadedModel::Sim(options))
}

fn load_on_gpu(
    folder: &Path,
    ordinal: usize,
    weights: &WeightsArgs,
    engine: &EngineArgs,
    num_nodes: usize,
) -> Result<LoadedModel, LoadError> {
    let device = engine::cuda::open(ordinal)?;
    if engine.enable_pdl
        && let Err(reason) = device.enable_pdl()
    {
        tracing::warn!(reason, "--enable-pdl does nothing");
    }
    let cache_folder = engine::identity::cache_folder_from_env();
    let options = DeviceLoadOptions {
        dtype: weights.dtype,
        kv_dtype: engine.kv_cache_dtype.kv_dtype(),
        is_batch_invariant: engine.batch_invariant,
        prefill_attention: engine.prefill_attention,
        cache_folder,
    };
    let model = Model::load_on_device(folder, &device, options)?;
    let model = Arc::new(model.with_kv(None, engine.kv_exchange));
    let limits = StepLimits {
        max_num_batched_tokens: engine.max_num_batched_tokens as usize,
        max_num_seqs: engine.max_num_seqs as usize,
        max_model_len: weights.max_model_len.map(|len| len as usize),
    };
    let kv_cache_bytes = match engine.kv_cache_memory_bytes {
        Some(asked) => model.check_kv_cache_bytes(asked, &limits, num_nodes)?,
        None => model.kv_cache_bytes(engine.gpu_memory_utilization, &limits, num_nodes)?,
    };
    Ok(LoadedModel::Cuda { model, kv_cache_bytes })
}

impl LoadedModel {
    /// A runner with a KV pool of its own. `memory` is whose eyes a pool in host memory is for; nobody else sees
    /// one in a GPU's.
    ///
    /// # Errors
    /// If the KV cache does not fit.
    pub fn runner(
        self,
        engine: &EngineArgs,
        max_model_len: Option<u32>,
        memory: PoolMemory,
    ) -> Result<Box<dyn Runner>, LoadError> {
        let (block_size, longest) = (engine.block_size as usize, max_model_len.map(|len| len as usize));
        Ok(match self {
            LoadedModel::Cpu(model) => {
                let bytes = engine.kv_cache_bytes_on_cpu();
                let runner = CpuRunner::with_memory(model, block_size, bytes, longest, memory)?;
                let (num_tokens, num_seqs) = (engine.max_num_batched_tokens as usize, engine.max_num_seqs as usize);
                tracing::info!("{}", runner.memory_report(num_tokens, num_seqs));
                Box::new(runner)
            }
            LoadedModel::Cuda { model, kv_cache_bytes } => {
                let has_graphs = !engine.enforce_eager;
                Box::new(CudaRunner::with_graphs(model, block_size, kv_cache_bytes, longest, has_graphs)?)
            }
            LoadedModel::Sim(options) => {
                let options = options.with_pool_of(engine.kv_cache_bytes_on_cpu(), longest)?;
                Box::new(SimRunner::new(SimOptions { memory, ..options })?)
            }
        })
    }
}
