//! Models on the host as a CUDA device, and a checkpoint with heads that tensor cores have kernels for.
//!
//! `TANDEM_TEST_DEVICE=cuda:0`, with the feature `cuda`, takes that GPU instead; `TANDEM_TEST_PDL` as well has its launches
//! overlap.
// Each test binary uses a part of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use common::config::{Dtype, PrefillAttention};
use engine::cuda::model::DeviceLoadOptions;
use engine::cuda::{CudaBackend, CudaRunner};
use engine::model::{LoadError, Model};
use kernels::cuda::{Device, FibreDevice};
use safetensors::tensor::TensorView;
use serde_json::json;

pub(crate) fn device() -> Arc<dyn Device> {
    match std::env::var("TANDEM_TEST_DEVICE") {
        Ok(name) => {
            let ordinal = name.strip_prefix("cuda:").and_then(|number| number.parse().ok());
            let device = engine::cuda::open(ordinal.expect("TANDEM_TEST_DEVICE is a GPU such as cuda:0")).unwrap();
            if std::env::var_os("TANDEM_TEST_PDL").is_some() {
                device.enable_pdl().unwrap();
            }
            device
        }
        Err(_) => Arc::new(FibreDevice::new()),
    }
}

/// Runs all tests of this file once more in a process of its own, on a GPU of NVIDIA's driver, which is one that runs on
/// the host: whatever is asked of it is done late, and NVIDIA's rules are checked.
#[cfg(feature = "cuda")]
pub(crate) fn run_again_by_a_driver(this_test: &str) {
    if std::env::var_os("TANDEM_TEST_DEVICE").is_some() {
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--skip", this_test])
        .env("TANDEM_TEST_DEVICE", "cuda:0")
        .env("LD_LIBRARY_PATH", kernels::cuda::host_driver_folder())
        .output();
    let output = output.unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && !said.contains("host driver:") && !said.contains(" 0 passed"), "{said}");
}

pub(crate) fn try_load(folder: &Path, dtype: Dtype, is_invariant: bool) -> Result<Model<CudaBackend>, LoadError> {
    load_to(&device(), folder, DeviceLoadOptions { is_batch_invariant: is_invariant, ..options(dtype) })
}

pub(crate) fn options(dtype: Dtype) -> DeviceLoadOptions {
    DeviceLoadOptions {
        dtype,
        kv_dtype: None,
        is_batch_invariant: false,
        prefill_attention: PrefillAttention::Portable,
        cache_folder: None,
    }
}

pub(crate) fn load_to(
    device: &Arc<dyn Device>,
    folder: &Path,
    options: DeviceLoadOptions,
) -> Result<Model<CudaBackend>, LoadError> {
    Model::load_on_device(folder, device, options)
}

pub(crate) fn load(folder: &Path, dtype: Dtype) -> Arc<Model<CudaBackend>> {
    Arc::new(try_load(folder, dtype, false).unwrap())
}

/// A runner of `model` with a pool of `num_tokens` tokens.
pub(crate) fn runner(model: &Arc<Model<CudaBackend>>, block_size: usize, num_tokens: usize) -> CudaRunner {
    let bytes = model.info_for(block_size, 1).kv_spec.bytes_per_token() * num_tokens as u64;
    CudaRunner::new(model.clone(), block_size, bytes, None).unwrap()
}

/// A Qwen3 of two layers with random weights, the second with a window, and heads of a size of its own.
pub(crate) struct WideHeads {
    folder: PathBuf,
}

impl WideHeads {
    pub(crate) const VOCAB: usize = 96;

    pub(crate) fn new(head_dim: usize, num_heads: usize, window: Option<u32>) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("tandem-wide-heads-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let config = json!({
            "architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "intermediate_size": 40, "head_dim": head_dim,
            "num_attention_heads": num_heads, "num_key_value_heads": 1, "num_hidden_layers": 2,
            "max_position_embeddings": 2048, "vocab_size": Self::VOCAB, "torch_dtype": "bfloat16",
            "use_sliding_window": window.is_some(), "sliding_window": window, "max_window_layers": 1,
        });
        std::fs::write(folder.join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
        std::fs::write(folder.join("model.safetensors"), weights(head_dim, num_heads)).unwrap();
        Self { folder }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for WideHeads {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn weights(head_dim: usize, num_heads: usize) -> Vec<u8> {
    let (hidden, ffn, q) = (32, 40, num_heads * head_dim);
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".to_string(), vec![WideHeads::VOCAB, hidden]),
        ("model.norm.weight".to_string(), vec![hidden]),
        ("lm_head.weight".to_string(), vec![WideHeads::VOCAB, hidden]),
    ];
    for layer in 0..2 {
        let mut add =
            |name: &str, shape: Vec<usize>| shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        add("input_layernorm", vec![hidden]);
        add("post_attention_layernorm", vec![hidden]);
        add("self_attn.q_proj", vec![q, hidden]);
        add("self_attn.k_proj", vec![head_dim, hidden]);
        add("self_attn.v_proj", vec![head_dim, hidden]);
        add("self_attn.q_norm", vec![head_dim]);
        add("self_attn.k_norm", vec![head_dim]);
        add("self_attn.o_proj", vec![hidden, q]);
        add("mlp.gate_proj", vec![ffn, hidden]);
        add("mlp.up_proj", vec![ffn, hidden]);
        add("mlp.down_proj", vec![hidden, ffn]);
    }
    let bytes: Vec<Vec<u8>> = shapes.iter().enumerate().map(|(seed, (_, shape))| values(seed as u64, shape)).collect();
    let tensors = shapes.iter().zip(&bytes).map(|((name, shape), bytes)| {
        (name.clone(), TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize(tensors, None).unwrap()
}

/// Norms near 1, matrices such that sums over a row are near 1.
fn values(seed: u64, shape: &[usize]) -> Vec<u8> {
    let (width, is_norm) = (shape[shape.len() - 1] as f64, shape.len() == 1);
    let value = |i: u32| {
        let random = 2.0 * kernels::uniform(seed, 1, i) - 1.0;
        if is_norm { 1.0 + 0.2 * random } else { random * 2.0 / width.sqrt() }
    };
    let count = shape.iter().product::<usize>() as u32;
    (0..count).flat_map(|i| half::bf16::from_f64(value(i)).to_le_bytes()).collect()
}
