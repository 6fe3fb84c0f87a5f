//! Which checkpoints run on a CUDA device, how they are loaded, and how much memory is left for KV.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::config::Dtype;
use kernels::cuda::Device;

use super::CudaBackend;
use crate::model::{LoadError, Model, Opened};
use crate::spec::ModelSpec;
use crate::weights::ComputeDtype;

/// Name of the orders of additions, part of the numerics id that nodes announce: with products of many rows by
/// cuBLASLt, whose order is the library's own, and without.
const FAMILY_OF_LIBRARY: &str = "cuda-blas-1";
const FAMILY_INVARIANT: &str = "cuda-mma-1";

/// What the driver and the library take beyond what they are asked for.
const OVERHEAD_BYTES: u64 = 256 << 20;

/// How to load a model to a device.
#[derive(Debug, Clone)]
pub struct DeviceLoadOptions {
    /// As for the CPU ([`LoadOptions::dtype`](crate::model::LoadOptions::dtype)).
    pub dtype: Dtype,
    /// Whether a row's bits shall depend on nothing but its sequence, at the price of slower products of many rows.
    pub is_batch_invariant: bool,
    /// Where the digest of the weights is kept, if anywhere.
    pub cache_folder: Option<PathBuf>,
}

impl Model<CudaBackend> {
    /// Loads the checkpoint in `folder` to a device.
    ///
    /// # Errors
    /// [`LoadError`] about the configuration or the weights, or if the device cannot run or hold them.
    pub fn load_on_device(
        folder: &Path,
        device: &Arc<dyn Device>,
        options: DeviceLoadOptions,
    ) -> Result<Self, LoadError> {
        let opened = Opened::open(folder, options.dtype)?;
        check_runnable(&opened)?;
        let (needed, free) = (opened.weight_bytes(), device.memory()?.free_bytes as u64);
        if needed > free {
            return Err(LoadError::DeviceMemory { device: device.name(), needed, free });
        }
        let backend = CudaBackend::new(device.clone(), opened.dtype, options.is_batch_invariant);
        let family = if backend.is_batch_invariant() { FAMILY_INVARIANT } else { FAMILY_OF_LIBRARY };
        let model = opened.load(backend, family, 1, options.cache_folder.as_deref())?;
        tracing::info!(device = device.name(), numerics = family, "the model is on the device");
        Ok(model)
    }

    /// How much of the device's memory is left for the KV of each of `num_nodes` nodes when all of it that is used shall
    /// be this share: less what is taken by now, and what steps of so many rows, so many of them sampled, need in each.
    ///
    /// # Errors
    /// [`LoadError::NoDeviceMemoryForKv`] if nothing is left, or what the device says.
    pub fn kv_cache_bytes(
        &self,
        utilization: f64,
        max_num_rows: usize,
        max_num_sampled: usize,
        num_nodes: usize,
    ) -> Result<u64, LoadError> {
        let device = self.backend().device().clone();
        let memory = device.memory()?;
        let total = memory.total_bytes as u64;
        let allowed = (total as f64 * utilization) as u64;
        let used = total - memory.free_bytes as u64;
        let num_nodes = num_nodes.max(1) as u64;
        let steps = num_nodes * step_bytes(self.spec(), max_num_rows, max_num_sampled) + OVERHEAD_BYTES;
        match allowed.checked_sub(used + steps) {
            Some(left) if left > 0 => Ok(left / num_nodes),
            _ => Err(LoadError::NoDeviceMemoryForKv { device: device.name(), total, utilization, used, steps }),
        }
    }
}

/// Activations and inputs of the largest step. Memory grows by doubling, so twice what is used.
fn step_bytes(spec: &ModelSpec, num_rows: usize, num_sampled: usize) -> u64 {
    let heads = spec.num_heads * spec.head_dim;
    let ffn = spec.intermediate_size;
    // hidden, and two that take turns as norm and qkv; attended; gate and up, and their product
    let row = spec.hidden_size + 2 * spec.qkv_width().max(spec.hidden_size) + heads + 3 * ffn;
    // Parts of decode attention: one per 512 positions and sampled row.
    let parts = spec.max_position.div_ceil(kernels::cuda::ops::PART_TOKENS);
    let partials = parts * spec.num_heads * (spec.head_dim + 2);
    let sampled = 2 * spec.vocab_size + 2 * spec.hidden_size + partials;
    2 * 4 * (num_rows as u64 * row as u64 + num_sampled as u64 * sampled as u64)
}

/// Kernels have no quantized weights, and bf16 products read 8 values at a time.
fn check_runnable(opened: &Opened) -> Result<(), LoadError> {
    let unsupported = |reason: String| Err(LoadError::NotOnDevice { reason });
    let formats = opened.checkpoint.quantized_formats();
    if !formats.is_empty() {
        return unsupported(format!(
            "its weights are quantized ({})",
            formats.into_iter().collect::<Vec<_>>().join(", ")
        ));
    }
    let spec = &opened.spec;
    let sums = [spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim];
    if opened.dtype == ComputeDtype::Bf16
        && let Some(odd) = sums.into_iter().find(|size| !size.is_multiple_of(8))
    {
        return unsupported(format!("bfloat16 products over {odd} values have no kernel, only over multiples of 8"));
    }
    if spec.vocab_size >= 1 << 24 {
        return unsupported(format!("a vocabulary of {} tokens; at most 2^24 - 1 are sampled", spec.vocab_size));
    }
    Ok(())
}
