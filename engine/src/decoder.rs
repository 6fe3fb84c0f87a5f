//! The decoder of all families: one step of prefill chunks and decode tokens, from tokens to tokens.

use crate::backend::{Backend, QkvHeads};
use crate::plan::{SampleRow, StepPlan};
use crate::pool::KvPool;
use crate::runner::{KvSink, NoSink};
use crate::spec::ModelSpec;
use crate::weights::{LayerWeights, Weights};

/// Activations of some rows as they go through a layer.
struct Activations<B: Backend> {
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
}

impl<B: Backend> Default for Activations<B> {
    fn default() -> Self {
        Self {
            hidden: B::Tensor::default(),
            normed: B::Tensor::default(),
            qkv: B::Tensor::default(),
            attended: B::Tensor::default(),
            gate_up: B::Tensor::default(),
            gated: B::Tensor::default(),
        }
    }
}

/// Bytes of the [`Activations`] of one row on a CPU, in f32: what is normed or gated there is so on its way into a
/// product, and has no tensor.
fn activation_bytes(spec: &ModelSpec) -> u64 {
    let attended = spec.num_heads * spec.head_dim;
    4 * (spec.hidden_size + spec.qkv_width() + attended + 2 * spec.intermediate_size) as u64
}

/// What a row of a step takes on a CPU at most: its activations, and those of the widest product packed, which is 4
/// bytes a value, or fewer where products are of bf16 pairs or 8 bits.
pub(crate) fn row_bytes(spec: &ModelSpec) -> u64 {
    let widest = spec.hidden_size.max(spec.num_heads * spec.head_dim).max(spec.intermediate_size);
    activation_bytes(spec) + 4 * widest as u64
}

/// What a sampled row takes beside: the activations of its way behind the last layer's KV, gathered, normed, logits.
pub(crate) fn sampled_row_bytes(spec: &ModelSpec) -> u64 {
    activation_bytes(spec) + 4 * (2 * spec.hidden_size + spec.vocab_size) as u64
}

/// What a step computes in; kept between steps for its memory.
pub struct Workspace<B: Backend> {
    /// Of all rows.
    all: Activations<B>,
    /// Of the rows that are sampled, behind the last layer's KV.
    sampled: Activations<B>,
    /// The plan of the latter.
    sampled_plan: StepPlan,
    /// Which rows are sampled, each once.
    rows: Vec<usize>,
    /// For every sample its index in `rows`: n choices of one prompt share a row.
    logit_rows: Vec<usize>,
    /// Rows to be sampled `[rows.len(), hidden]`.
    gathered: B::Tensor,
    /// Their norm.
    normed: B::Tensor,
    /// `[rows.len(), vocab]`
    logits: B::Tensor,
    /// What was drawn.
    drawn: B::Drawn,
}

impl<B: Backend> Default for Workspace<B> {
    fn default() -> Self {
        Self {
            all: Activations::default(),
            sampled: Activations::default(),
            sampled_plan: StepPlan::default(),
            rows: Vec::new(),
            logit_rows: Vec::new(),
            gathered: B::Tensor::default(),
            normed: B::Tensor::default(),
            logits: B::Tensor::default(),
            drawn: B::Drawn::default(),
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
    /// Computes one step: K and V of all rows into the pool, a token for each of the plan's samples, in their order
    /// and in the workspace's memory; `None` without samples.
    ///
    /// `sink` hears of each reported span when a layer's K and V are written, before that layer's attention.
    pub fn forward<'w>(
        &self,
        plan: &StepPlan,
        sink: &dyn KvSink,
        workspace: &'w mut Workspace<B>,
    ) -> Option<&'w mut B::Drawn> {
        self.embed(plan, workspace);
        self.write_all_kv(plan, sink, workspace);
        if plan.samples.is_empty() {
            return None; // a chunk in the middle of a prompt: its KV is all that was wanted
        }
        distinct_rows(&plan.samples, &mut workspace.rows, &mut workspace.logit_rows);
        self.logits(plan, workspace);
        Some(self.sample(plan, workspace))
    }

    /// A step in three parts, of which the one in the middle is the same launches for all steps of as many rows:
    /// [`embed`](Self::embed) takes the tokens in, [`all_logits`](Self::all_logits) computes, and
    /// [`sample_rows`](Self::sample_rows) draws. Nobody hears of layers.
    pub fn all_logits(&self, plan: &StepPlan, workspace: &mut Workspace<B>) {
        self.write_all_kv(plan, &NoSink, workspace);
        workspace.rows.clear();
        workspace.rows.extend(0..plan.num_rows());
        self.logits(plan, workspace);
    }

    /// Rows of the embedding table.
    pub fn embed(&self, plan: &StepPlan, workspace: &mut Workspace<B>) {
        let Self { backend, spec, weights, .. } = self;
        backend.embed(weights.embedding(), spec.hidden_size, &plan.tokens, &mut workspace.all.hidden);
    }

    /// Draws behind [`all_logits`](Self::all_logits): every row has logits.
    pub fn sample_rows<'w>(&self, plan: &StepPlan, workspace: &'w mut Workspace<B>) -> &'w mut B::Drawn {
        workspace.logit_rows.clear();
        workspace.logit_rows.extend(plan.samples.iter().map(|sample| sample.row));
        self.sample(plan, workspace)
    }

    fn sample<'w>(&self, plan: &StepPlan, workspace: &'w mut Workspace<B>) -> &'w mut B::Drawn {
        let Workspace { logit_rows, logits, drawn, .. } = workspace;
        self.backend.sample(logits, self.spec.vocab_size, logit_rows, &plan.samples, drawn);
        drawn
    }

    /// All layers, of the last one what leads to its KV.
    fn write_all_kv(&self, plan: &StepPlan, sink: &dyn KvSink, workspace: &mut Workspace<B>) {
        let last = self.spec.num_layers() - 1;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            self.write_kv(index, layer, plan, sink, &mut workspace.all);
            if index < last {
                self.finish_layer(index, layer, plan, &mut workspace.all);
            }
        }
    }

    /// The rest of the last layer, and logits of the workspace's rows.
    fn logits(&self, plan: &StepPlan, workspace: &mut Workspace<B>) {
        let Workspace { all, sampled, sampled_plan, rows, gathered, normed, logits, .. } = workspace;
        let Self { backend, spec, weights, .. } = self;
        let last = spec.num_layers() - 1;
        let layer = &weights.layers[last];
        let hidden = if backend.takes_some_rows() && rows.len() < plan.num_rows() {
            // Nobody looks at the other rows behind the last layer's KV.
            sampled_plan.take_rows(plan, rows);
            backend.gather(&all.hidden, spec.hidden_size, rows, &mut sampled.hidden);
            backend.gather(&all.qkv, spec.qkv_width(), rows, &mut sampled.qkv);
            self.finish_layer(last, layer, sampled_plan, sampled);
            rows.iter_mut().enumerate().for_each(|(index, row)| *row = index);
            &sampled.hidden
        } else {
            self.finish_layer(last, layer, plan, all);
            &all.hidden
        };
        backend.norm_logits(spec, &weights.norm, &weights.head, hidden, rows, gathered, normed, logits);
    }

    /// Norm and q, k, v of a layer; k and v into the pool.
    fn write_kv(
        &self,
        index: usize,
        layer: &LayerWeights<B>,
        plan: &StepPlan,
        sink: &dyn KvSink,
        rows: &mut Activations<B>,
    ) {
        let Self { backend, spec, rope, pool, .. } = self;
        let Activations { hidden, normed, qkv, .. } = rows;
        backend.norm_qkv_rope_write(spec, index, &layer.attention, rope, pool, plan, hidden, normed, qkv);
        for span in plan.spans.iter().filter(|span| span.is_reported) {
            sink.on_layer_written(index as u32, span);
        }
    }

    /// Attention over the pool, and the feed-forward half.
    fn finish_layer(&self, index: usize, layer: &LayerWeights<B>, plan: &StepPlan, rows: &mut Activations<B>) {
        let Self { backend, spec, pool, .. } = self;
        let Activations { hidden, normed, qkv, attended, gate_up, gated } = rows;
        let LayerWeights { attention, mlp } = layer;
        backend.attention(pool, index, qkv, &QkvHeads::of(spec), plan, spec.windows[index], attended);
        backend.matmul_residual(attended, &attention.output, attention.output_bias.as_ref(), hidden);
        backend.feed_forward(spec, mlp, hidden, normed, gate_up, gated);
    }
}

/// The rows that are sampled, each once, and for every sample its index among them.
fn distinct_rows(samples: &[SampleRow], rows: &mut Vec<usize>, logit_rows: &mut Vec<usize>) {
    rows.clear();
    logit_rows.clear();
    for sample in samples {
        if rows.last() != Some(&sample.row) {
            rows.push(sample.row);
        }
        logit_rows.push(rows.len() - 1);
    }
}
