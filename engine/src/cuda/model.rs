//! Which checkpoints run on a CUDA device, how they are loaded, and how much memory is left for KV.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::config::{Dtype, PrefillAttention};
use common::kv_spec::KvDtype;
use kernels::cuda::ops::{AttentionKernels, PART_TOKENS, PrefillKernel, TOP_MAX, partial_bytes};
use kernels::cuda::{Device, DeviceFormat};
use kernels::kv_layout::GRANULE_TOKENS;

use super::CudaBackend;
use super::attention::choose;
use super::step::{BUCKET_ROWS_MAX, DECODE_ROWS_MAX, bucket_rows};
use crate::model::{Families, LoadError, Model, Opened};
use crate::runner::IN_FLIGHT_MAX;
use crate::spec::ModelSpec;
use crate::weights::{ComputeDtype, Stacked};

/// Name of the orders of additions, part of the numerics id that nodes announce: with products of many rows by
/// cuBLASLt, whose order is the library's own, and without; where the device has too little shared memory for the
/// kernels of attention that others have for such heads; and with the attention of prompts by products of warpgroups,
/// which no other device has, and which is for products by the library.
fn numerics_family(is_batch_invariant: bool, is_attention_plain: bool, prefill: PrefillKernel) -> &'static str {
    match (is_batch_invariant, is_attention_plain, prefill) {
        (_, _, PrefillKernel::Hopper) => "cuda-blas-wgmma-1",
        (false, false, _) => "cuda-blas-1",
        (true, false, _) => "cuda-mma-1",
        (false, true, _) => "cuda-blas-plain-1",
        (true, true, _) => "cuda-mma-plain-1",
    }
}

/// What the driver and the library take beyond what they are asked for.
const OVERHEAD_BYTES: u64 = 256 << 20;

/// More of them read no faster.
const LOADING_THREADS_MAX: usize = 8;

/// How to load a model to a device.
#[derive(Debug, Clone)]
pub struct DeviceLoadOptions {
    /// As for the CPU ([`LoadOptions::dtype`](crate::model::LoadOptions::dtype)).
    pub dtype: Dtype,
    /// KV's type, if one is asked for: there is only that of the arithmetic.
    pub kv_dtype: Option<KvDtype>,
    /// Whether a row's bits shall depend on nothing but its sequence, at the price of slower products of many rows.
    pub is_batch_invariant: bool,
    /// Which kernel computes the attention of prompts.
    pub prefill_attention: PrefillAttention,
    /// Where the digest of the weights is kept, if anywhere.
    pub cache_folder: Option<PathBuf>,
}

/// What steps have in them at most, and sequences.
#[derive(Debug, Clone)]
pub struct StepLimits {
    /// Rows of a step.
    pub max_num_batched_tokens: usize,
    /// Sequences in it.
    pub max_num_seqs: usize,
    /// Tokens of a sequence, if fewer than the model knows.
    pub max_model_len: Option<usize>,
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
        let asked = options.kv_dtype.map(|asked| match asked {
            KvDtype::F32 => ComputeDtype::F32,
            KvDtype::Bf16 => ComputeDtype::Bf16,
        });
        if let Some(asked) = asked.filter(|asked| *asked != opened.dtype) {
            return Err(LoadError::KvDtypeOnDevice { asked: asked.as_str(), computed: opened.dtype.as_str() });
        }
        let (needed, free) = (weight_bytes(&opened), device.memory()?.free_bytes as u64);
        if needed > free {
            return Err(LoadError::DeviceMemory { device: device.name(), needed, free });
        }
        let backend = CudaBackend::new(device.clone(), opened.dtype, options.is_batch_invariant);
        let kernels = |shared_bytes_max| attention_kernels(opened.dtype, &opened.spec, shared_bytes_max);
        let here = kernels(device.shared_bytes_max());
        let is_attention_plain = kernels(usize::MAX).has_decode && !here.has_decode;
        let is_batch_invariant = backend.is_batch_invariant();
        let (prefill, reason) =
            choose(options.prefill_attention, device.as_ref(), &opened.spec, here, is_batch_invariant);
        let family = numerics_family(is_batch_invariant, is_attention_plain, prefill);
        let families = Families { f32: family, rest: family };
        let (backend, cache_folder) = (backend.with_prefill(prefill), options.cache_folder.as_deref());
        let model = opened.load(backend, families, num_loading_threads(), cache_folder)?;
        tracing::info!(
            device = device.name(), numerics = family, prefill_attention = ?prefill, reason, "the model is on the device"
        );
        Ok(model)
    }

    /// How much of the device's memory is left for the KV of each of `num_nodes` nodes when all of it that is used shall
    /// be this share: less what is taken by now, and what steps need in each.
    ///
    /// # Errors
    /// [`LoadError::NoDeviceMemoryForKv`] if nothing is left, or what the device says.
    pub fn kv_cache_bytes(&self, utilization: f64, limits: &StepLimits, num_nodes: usize) -> Result<u64, LoadError> {
        let device = self.backend().device().clone();
        let memory = device.memory()?;
        let total = memory.total_bytes as u64;
        let allowed = (total as f64 * utilization) as u64;
        let used = total - memory.free_bytes as u64;
        let num_nodes = num_nodes.max(1) as u64;
        let steps = self.step_bytes(limits, num_nodes);
        match allowed.checked_sub(used + steps) {
            Some(left) if left > 0 => Ok(left / num_nodes),
            _ => Err(LoadError::NoDeviceMemoryForKv { device: device.name(), total, utilization, used, steps }),
        }
    }

    /// The KV memory that was asked for in each of `num_nodes` nodes, if that much is free beside what steps need.
    ///
    /// # Errors
    /// [`LoadError::NoDeviceMemoryForAskedKv`], or what the device says.
    pub fn check_kv_cache_bytes(&self, asked: u64, limits: &StepLimits, num_nodes: usize) -> Result<u64, LoadError> {
        let device = self.backend().device().clone();
        let free = device.memory()?.free_bytes as u64;
        let num_nodes = num_nodes.max(1) as u64;
        let steps = self.step_bytes(limits, num_nodes);
        if asked.saturating_mul(num_nodes).saturating_add(steps) > free {
            let device = device.name();
            return Err(LoadError::NoDeviceMemoryForAskedKv { device, asked, num_nodes, free, steps });
        }
        Ok(asked)
    }

    fn step_bytes(&self, limits: &StepLimits, num_nodes: u64) -> u64 {
        let kernels = attention_kernels(self.dtype(), self.spec(), self.backend().device().shared_bytes_max());
        // Memory grows to the next power of two.
        let num_rows = num_rows_max(limits);
        let scratch = self.backend().scratch_bytes_max(num_rows).next_power_of_two() as u64;
        num_nodes * (step_bytes(self.spec(), kernels, limits) + scratch) + OVERHEAD_BYTES
    }
}

/// The device takes one copy at a time; what the host makes of a tensor before, and pages that come from a disk, are
/// for several threads. Each has a matrix in memory meanwhile if the file has other numbers than the device wants.
fn num_loading_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(LOADING_THREADS_MAX)
}

fn attention_kernels(dtype: ComputeDtype, spec: &ModelSpec, shared_bytes_max: usize) -> AttentionKernels {
    let dtype = match dtype {
        ComputeDtype::F32 => kernels::KvDtype::F32,
        ComputeDtype::Bf16 => kernels::KvDtype::Bf16,
    };
    AttentionKernels::of(dtype, spec.head_dim, shared_bytes_max)
}

/// Rows of the largest decode step: those of its bucket.
fn num_decode_rows_max(limits: &StepLimits) -> usize {
    match limits.max_num_seqs {
        few if few <= BUCKET_ROWS_MAX => bucket_rows(few),
        many => many,
    }
}

/// Rows of the largest step.
fn num_rows_max(limits: &StepLimits) -> usize {
    limits.max_num_batched_tokens.max(num_decode_rows_max(limits))
}

/// Activations, inputs and logits of the largest step, and angles.
fn step_bytes(spec: &ModelSpec, kernels: AttentionKernels, limits: &StepLimits) -> u64 {
    let (num_seqs, num_rows) = (num_decode_rows_max(limits) as u64, num_rows_max(limits) as u64);
    let longest = limits.max_model_len.map_or(spec.max_position, |len| len.min(spec.max_position));
    let heads = spec.num_heads * spec.head_dim;
    // hidden, and two that take turns as norm and qkv; attended; gate and up, and their product; numbers of the row
    let row = spec.hidden_size + 2 * spec.qkv_width().max(spec.hidden_size) + heads + 3 * spec.intermediate_size + 8;
    // Rows that decode attention takes, each in parts: ends of prompts too, and all where prefill has no kernel.
    let num_single_rows = match kernels {
        AttentionKernels { has_decode: false, .. } => 0,
        AttentionKernels { has_prefill: true, .. } => num_rows.min(num_seqs * DECODE_ROWS_MAX as u64),
        AttentionKernels { has_prefill: false, .. } => num_rows,
    };
    let windows: BTreeSet<_> = spec.windows.iter().collect();
    let part = partial_bytes(1, spec.num_heads, spec.head_dim) + windows.len() * 16;
    // Of decode steps, as many units as the next power of two.
    let single_row = (longest.div_ceil(PART_TOKENS)).next_power_of_two() * part;
    // Rows of logits: all, with a copy of all and one changed by its request. Alternatives are of each step that may
    // not be read yet. Changes are of tokens seen.
    let logits = 3 * spec.vocab_size + (IN_FLIGHT_MAX + 1) * 2 * TOP_MAX;
    let changes = 4 * spec.vocab_size.min(longest);
    let block_table = longest.div_ceil(GRANULE_TOKENS);
    let sequence = logits + changes + block_table + 2 * spec.hidden_size;
    let words = num_rows * row as u64 + num_seqs * sequence as u64;
    // Memory grows by doubling, so twice what is used.
    2 * (4 * words + num_single_rows.next_power_of_two() * single_row as u64) + (4 * longest * spec.head_dim) as u64
}

/// How a device has weights of a format, by its name in the numerics id; `None` if they are made dense there.
fn device_format(name: &str) -> Option<DeviceFormat> {
    Some(match name {
        "q8_0" => DeviceFormat::Int8,
        "q4_0" => DeviceFormat::Int4,
        "q4_k" => DeviceFormat::K4,
        "q6_k" => DeviceFormat::K6,
        "w8a8" => DeviceFormat::RowInt8,
        _ => return None,
    })
}

/// What the weights take on a device. Norms, biases and angles are next to nothing beside matrices and counted as one
/// part in 64.
fn weight_bytes(opened: &Opened) -> u64 {
    let bytes = Stacked::all(&opened.spec).map(|matrix| {
        let parts: Vec<_> = matrix
            .parts
            .iter()
            .map(|(name, rows)| {
                // A tensor that is missing is told by whoever asks for it.
                let format = opened.checkpoint.size_of(name).and_then(|(_, format)| format);
                Part { rows: *rows, cols: matrix.cols, format }
            })
            .collect();
        matrix_bytes(&parts, opened.dtype)
    });
    let bytes = bytes.sum::<u64>();
    bytes + bytes / 64
}

/// A tensor in its file.
struct Part {
    rows: usize,
    cols: usize,
    /// If it is quantized.
    format: Option<String>,
}

/// Codes and scales if all parts are of formats that stay quantized, a scale for each row not beside others; else all
/// are made dense.
fn matrix_bytes(parts: &[Part], dtype: ComputeDtype) -> u64 {
    let kept =
        |part: &Part| device_format(part.format.as_deref()?).filter(|format| format.has_products_over(part.cols));
    let kept: Option<Vec<_>> = parts.iter().map(kept).collect();
    let is_in_rows = |format: &DeviceFormat| *format == DeviceFormat::RowInt8;
    let kept = kept.filter(|formats| formats.iter().all(is_in_rows) || !formats.iter().any(is_in_rows));
    let bytes = match (kept, dtype) {
        (Some(formats), _) => {
            parts.iter().zip(formats).map(|(part, format)| format.num_bytes(part.rows, part.cols)).sum::<usize>()
        }
        (None, ComputeDtype::F32) => parts.iter().map(|part| part.rows * part.cols * 4).sum(),
        (None, ComputeDtype::Bf16) => parts.iter().map(|part| part.rows * part.cols * 2).sum(),
    };
    bytes as u64
}

fn check_formats(formats: &BTreeSet<String>, dtype: ComputeDtype) -> Result<(), String> {
    let joined = formats.iter().cloned().collect::<Vec<_>>().join(", ");
    if let Some(unknown) = formats.iter().find(|format| device_format(format).is_none()) {
        return Err(format!("its weights are quantized ({joined}), and there is no kernel for {unknown}"));
    }
    if !formats.is_empty() && dtype != ComputeDtype::Bf16 {
        return Err(format!("its weights are quantized ({joined}), which is computed with in bfloat16 alone"));
    }
    Ok(())
}

/// There are kernels for some formats, all in bf16, whose products read 8 values at a time.
fn check_runnable(opened: &Opened) -> Result<(), LoadError> {
    let unsupported = |reason: String| Err(LoadError::NotOnDevice { reason });
    check_formats(&opened.checkpoint.quantized_formats(), opened.dtype).or_else(unsupported)?;
    let spec = &opened.spec;
    let table = Stacked::table(spec).parts.remove(0).0;
    if opened.checkpoint.size_of(&table).and_then(|(_, format)| format).is_some_and(|format| format == "w8a8") {
        return unsupported("no kernel takes rows of an embedding table out of W8A8".to_string());
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_takes_its_codes_if_all_parts_are_of_formats_that_are_kept() {
        let bytes = |formats: &[&str]| {
            let part = |format: &&str| Part {
                rows: 16,
                cols: 512,
                format: Some(format.to_string()).filter(|format| !format.is_empty()),
            };
            matrix_bytes(&formats.iter().map(part).collect::<Vec<_>>(), ComputeDtype::Bf16)
        };
        assert_eq!(bytes(&["q4_0", "q4_0", "q4_0"]), 3 * 16 * 512 / 32 * 18);
        assert_eq!(bytes(&["q4_0", "q8_0"]), 16 * 512 / 32 * (18 + 34));
        assert_eq!(bytes(&["q4_k", "q4_k", "q6_k"]), 2 * 4736 + 6720);
        assert_eq!(bytes(&["w8a8", "w8a8"]), 2 * 16 * (512 + 4));
        for dense in [["q8_0", ""], ["", "q8_0"], ["w8a8", "q6_k"], ["", ""], ["w8a8", ""]] {
            assert_eq!(bytes(&dense), 2 * 16 * 512 * 2, "{dense:?}");
        }
    }

    #[test]
    fn formats_without_a_kernel_are_refused_by_name() {
        let check =
            |formats: &[&str], dtype| check_formats(&formats.iter().map(|format| format.to_string()).collect(), dtype);
        for taken in [&[][..], &["q8_0"], &["q4_0", "q6_k"], &["q4_k", "q6_k"], &["w8a8"]] {
            assert_eq!(check(taken, ComputeDtype::Bf16), Ok(()), "{taken:?}");
        }
        assert_eq!(check(&[], ComputeDtype::F32), Ok(()));
        let said = check(&["q3_k", "q6_k"], ComputeDtype::Bf16).unwrap_err();
        assert_eq!(said, "its weights are quantized (q3_k, q6_k), and there is no kernel for q3_k");
        let said = check(&["q8_0"], ComputeDtype::F32).unwrap_err();
        assert_eq!(said, "its weights are quantized (q8_0), which is computed with in bfloat16 alone");
    }
}
