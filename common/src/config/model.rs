//! Which model is served.

use clap::{Args, ValueEnum};

use super::values::parse_above_zero;
use crate::kv_spec::KvDtype;

/// The checkpoint that is served if none is named: it answers from what its prompt says, so a right answer
/// shows that the prompt's KV arrived.
pub const DEMO_MODEL: &str = "models/demo";

/// The model, as every role names it.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Checkpoint folder in Hugging Face's layout, a GGUF file, or a Hub id such as `Qwen/Qwen3-0.6B`, which is
    /// downloaded into the Hub's cache.
    ///
    /// Must be the same model on every node and the proxy: a node with other weights is refused.
    #[arg(long, value_name = "PATH_OR_ID", default_value = DEMO_MODEL)]
    pub model: String,

    /// Commit, tag or branch of a Hub id.
    ///
    /// Without it the main branch is taken as it is today, which two nodes may see differently tomorrow.
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
}

/// What a node makes of the model.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Model")]
pub struct WeightsArgs {
    /// Element type of weights and, unless --kv-cache-dtype says otherwise, KV: `auto` takes the checkpoint's own,
    /// bfloat16 beside quantized weights, which stay as they are.
    ///
    /// bfloat16 halves memory and transfer; float32 is for comparing against references. Part of the
    /// numerics id: nodes with different ones do not exchange KV unless --kv-exchange numerics says so.
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,

    /// Longest sequence in tokens, prompt and answer together. Default: the checkpoint's own limit.
    ///
    /// A smaller one admits more requests at a time, since none can claim more KV than this.
    #[arg(long, value_name = "TOKENS", value_parser = parse_above_zero)]
    pub max_model_len: Option<u32>,
}

/// Element type of weights or KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// Weights: the checkpoint's own. KV: that of the weights.
    Auto,
    /// 32-bit float.
    Float32,
    /// bfloat16.
    Bfloat16,
}

impl Dtype {
    /// The type that was asked for, if one was.
    pub fn kv_dtype(self) -> Option<KvDtype> {
        match self {
            Dtype::Auto => None,
            Dtype::Float32 => Some(KvDtype::F32),
            Dtype::Bfloat16 => Some(KvDtype::Bf16),
        }
    }
}
