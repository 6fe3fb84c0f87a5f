//! The eager reference: the same [`ModelSpec`] computed with candle-core, in f32, without paging, kernels,
//! chunks or a cache. Slow and plain, for tests to compare with.

use candle_core::{D, Device, Result, Tensor};

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::spec::ModelSpec;

/// Why the oracle has no answer.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// The checkpoint lacks something.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A tensor operation was refused.
    #[error("the reference computation failed: {0}")]
    Candle(#[from] candle_core::Error),
}

/// Reads weights as it goes and keeps none.
pub struct Oracle<'a> {
    spec: &'a ModelSpec,
    checkpoint: &'a Checkpoint,
}

impl<'a> Oracle<'a> {
    /// Of a model.
    pub fn new(spec: &'a ModelSpec, checkpoint: &'a Checkpoint) -> Self {
        Self { spec, checkpoint }
    }

    /// Logits after each of `tokens`, `[tokens.len(), vocab]`.
    ///
    /// # Errors
    /// [`OracleError`] if a tensor is missing or misshapen.
    pub fn logits(&self, tokens: &[u32]) -> std::result::Result<Vec<Vec<f32>>, OracleError> {
        let spec = self.spec;
        let embedding = self.weight("model.embed_tokens.weight", &[spec.vocab_size, spec.hidden_size])?;
        let tokens = Tensor::new(tokens, &Device::Cpu)?;
        let mut hidden = embedding.index_select(&tokens, 0)?;
        for layer in 0..spec.num_layers() {
            hidden = (&hidden + self.attention(layer, &hidden)?)?;
            hidden = (&hidden + self.feed_forward(layer, &hidden)?)?;
        }
        let hidden = self.norm("model.norm", &hidden)?;
        let head = match spec.is_tied {
            true => embedding,
            false => self.weight("lm_head.weight", &[spec.vocab_size, spec.hidden_size])?,
        };
        Ok(hidden.matmul(&head.t()?)?.to_vec2()?)
    }

    /// `x` `[n, hidden]` to `[n, hidden]`.
    fn attention(&self, layer: usize, x: &Tensor) -> std::result::Result<Tensor, OracleError> {
        let spec = self.spec;
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let x = self.norm(&format!("model.layers.{layer}.input_layernorm"), x)?;
        let heads = |part: &str, count: usize| -> std::result::Result<Tensor, OracleError> {
            let y = self.linear(&name(part), count * spec.head_dim, &x, spec.has_qkv_bias)?;
            Ok(y.reshape((x.dim(0)?, count, spec.head_dim))?.transpose(0, 1)?.contiguous()?)
        };
        let (mut q, mut k) = (heads("q_proj", spec.num_heads)?, heads("k_proj", spec.num_kv_heads)?);
        let v = heads("v_proj", spec.num_kv_heads)?;
        if spec.has_qk_norm {
            (q, k) = (self.norm(&name("q_norm"), &q)?, self.norm(&name("k_norm"), &k)?);
        }
        let (q, k) = (self.rotate(&q)?, self.rotate(&k)?);
        let (k, v) = (self.repeat(&k)?, self.repeat(&v)?);
        let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? / (spec.head_dim as f64).sqrt())?;
        let scores = scores.broadcast_add(&mask(x.dim(0)?, spec.windows[layer])?)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let y = weights.matmul(&v)?.transpose(0, 1)?.contiguous()?;
        let y = y.reshape((x.dim(0)?, spec.num_heads * spec.head_dim))?;
        self.linear(&name("o_proj"), spec.hidden_size, &y, spec.has_output_bias)
    }

    fn feed_forward(&self, layer: usize, x: &Tensor) -> std::result::Result<Tensor, OracleError> {
        let (spec, name) = (self.spec, |part: &str| format!("model.layers.{layer}.mlp.{part}"));
        let x = self.norm(&format!("model.layers.{layer}.post_attention_layernorm"), x)?;
        let gate = self.linear(&name("gate_proj"), spec.intermediate_size, &x, spec.has_mlp_bias)?;
        let up = self.linear(&name("up_proj"), spec.intermediate_size, &x, spec.has_mlp_bias)?;
        self.linear(&name("down_proj"), spec.hidden_size, &(gate.silu()? * up)?, spec.has_mlp_bias)
    }

    /// `[heads, n, head_dim]`, position = second index.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let (_, n, head_dim) = x.dims3()?;
        let angles = self.spec.rope.angles(n);
        let half = head_dim / 2;
        let cos = Tensor::from_vec(angles.cos, (n, half), &Device::Cpu)?;
        let sin = Tensor::from_vec(angles.sin, (n, half), &Device::Cpu)?;
        let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let high = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::cat(&[low, high], 2)
    }

    /// KV heads `[kv heads, n, head_dim]` as often as query heads share them.
    fn repeat(&self, x: &Tensor) -> Result<Tensor> {
        let (heads, n, head_dim) = x.dims3()?;
        let group = self.spec.num_heads / heads;
        let wide = x.unsqueeze(1)?.broadcast_as((heads, group, n, head_dim))?.contiguous()?;
        wide.reshape((heads * group, n, head_dim))
    }

    fn norm(&self, name: &str, x: &Tensor) -> std::result::Result<Tensor, OracleError> {
        let weight = self.weight(&format!("{name}.weight"), &[x.dim(D::Minus1)?])?;
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let scaled = x.broadcast_div(&(mean + f64::from(self.spec.rms_norm_eps))?.sqrt()?)?;
        Ok(scaled.broadcast_mul(&weight)?)
    }

    fn linear(&self, name: &str, rows: usize, x: &Tensor, bias: bool) -> std::result::Result<Tensor, OracleError> {
        let weight = self.weight(&format!("{name}.weight"), &[rows, x.dim(D::Minus1)?])?;
        let y = x.matmul(&weight.t()?)?;
        match bias {
            true => Ok(y.broadcast_add(&self.weight(&format!("{name}.bias"), &[rows])?)?),
            false => Ok(y),
        }
    }

    fn weight(&self, name: &str, shape: &[usize]) -> std::result::Result<Tensor, OracleError> {
        let values = self.checkpoint.tensor(name, shape)?.to_f32();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}

/// 0 where row p sees column c, else minus infinity: `[n, n]`.
fn mask(n: usize, window: Option<u32>) -> Result<Tensor> {
    let window = window.map_or(usize::MAX, |window| window as usize);
    let sees = |row: usize, column: usize| column <= row && row - column < window;
    let value = |i: usize| if sees(i / n, i % n) { 0.0 } else { f32::NEG_INFINITY };
    Tensor::from_vec((0..n * n).map(value).collect(), (n, n), &Device::Cpu)
}
