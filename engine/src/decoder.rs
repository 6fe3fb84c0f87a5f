//! The decoder of all families: one step of prefill chunks and decode tokens, from tokens to tokens.

use crate::backend::{Backend, QkvHeads};
use crate::plan::{SampleRow, StepPlan};
use crate::pool::KvPool;
use crate::runner::KvSink;
use crate::spec::ModelSpec;
use crate::weights::{LayerWeights, Weights};

/// Activations of a step; kept between steps for their memory.
pub struct Workspace<B: Backend> {
    /// The residual stream `[num_rows, hidden]`.
    hidden: B::Tensor,
    /// Its norm, the input of the products `[num_rows, hidden]`.
    normed: B::Tensor,
    /// `[num_rows, qkv_width]`
    qkv: B::Tensor,
    /// `[num_rows, num_heads * head_dim]`
    attended: B::Tensor,
    /// `[num_rows, 2 * ffn]`
    gate_up: B::Tensor,
    /// `[num_rows, ffn]`
    gated: B::Tensor,
    /// Rows to be sampled `[num_logit_rows, hidden]`.
    gathered: B::Tensor,
    /// `[num_logit_rows, vocab]`
    logits: B::Tensor,
}

impl<B: Backend> Default for Workspace<B> {
    fn default() -> Self {
        Self {
            hidden: B::Tensor::default(),
            normed: B::Tensor::default(),
            qkv: B::Tensor::default(),
            attended: B::Tensor::default(),
            gate_up: B::Tensor::default(),
            gated: B::Tensor::default(),
            gathered: B::Tensor::default(),
            logits: B::Tensor::default(),
        }
    }
}

impl<B: Backend> Workspace<B> {
    /// Logits of the last step's sampled rows, `[num_logit_rows, vocab]`: for tests that compare them.
    pub fn logits(&self) -> &B::Tensor {
        &self.logits
    }
}

/// Everything a step computes with.
pub struct Decoder<'a, B: Backend> {
    /// The processor.
    pub backend: B,
    /// The model's shape.
    pub spec: &'a ModelSpec,
    /// Its weights.
    pub weights: &'a Weights<B>,
    /// Angles of every position up to the longest sequence.
    pub rope: &'a B::Rope,
    /// Where K and V lie.
    pub pool: &'a KvPool,
}

impl<B: Backend> Decoder<'_, B> {
    /// Computes one step: K and V of all rows into the pool, a token for each of the plan's samples.
    ///
    /// `sink` hears of each reported span when a layer's K and V are written, before that layer's attention.
    pub fn forward(&self, plan: &StepPlan, sink: &dyn KvSink, workspace: &mut Workspace<B>) -> B::Drawn {
        let Workspace { hidden, normed, qkv, attended, gate_up, gated, gathered, logits } = workspace;
        let Self { backend, spec, weights, rope, pool } = self;
        let heads = QkvHeads::of(spec);
        let last = spec.num_layers() - 1;

        backend.embed(&weights.embedding, spec.hidden_size, &plan.tokens, hidden);
        for (index, layer) in weights.layers.iter().enumerate() {
            let LayerWeights { attention, mlp } = layer;
            backend.norm_qkv_rope_write(spec, index, attention, rope, pool, plan, hidden, normed, qkv);
            for span in plan.spans.iter().filter(|span| span.is_reported) {
                sink.on_layer_written(index as u32, span);
            }
            if index == last && plan.samples.is_empty() {
                return B::Drawn::default(); // a chunk in the middle of a prompt: its KV is all that was wanted
            }
            backend.attention(pool, index, qkv, &heads, plan, spec.windows[index], attended);
            backend.matmul_residual(attended, &attention.output, attention.output_bias.as_ref(), hidden);
            backend.norm_gate_up_act(spec, mlp, hidden, normed, gate_up, gated);
            backend.matmul_residual(gated, &mlp.down, mlp.down_bias.as_ref(), hidden);
        }
        let (rows, logit_rows) = distinct_rows(&plan.samples);
        backend.norm_logits(spec, &weights.norm, &weights.head, hidden, &rows, gathered, normed, logits);
        backend.sample(logits, spec.vocab_size, &logit_rows, &plan.samples)
    }
}

/// The rows that are sampled, each once, and for every sample its index among them: n choices of one prompt
/// share a row.
fn distinct_rows(samples: &[SampleRow]) -> (Vec<usize>, Vec<usize>) {
    let mut rows: Vec<usize> = Vec::new();
    let mut logit_rows = Vec::with_capacity(samples.len());
    for sample in samples {
        if rows.last() != Some(&sample.row) {
            rows.push(sample.row);
        }
        logit_rows.push(rows.len() - 1);
    }
    (rows, logit_rows)
}
