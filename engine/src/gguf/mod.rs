//! GGUF files as checkpoints: llama.cpp's keys and names in the words of Hugging Face.
//!
//! - `config`: metadata becomes a `config.json`, so that one reader checks both kinds of models.
//! - `names`: `blk.0.attn_q.weight` is `model.layers.0.self_attn.q_proj.weight`, its rows in another order.
//! - `blocks`: ggml's blocks become [`kernels::QuantizedWeights`].
//! - [`write`](mod@write): a Hugging Face folder becomes a GGUF file.

pub(crate) mod blocks;
pub(crate) mod config;
pub(crate) mod names;
pub mod write;

use std::path::Path;

/// Whether a model's path is that of a GGUF file, by its name.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}
