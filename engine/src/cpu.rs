//! The decoder's operations on CPUs: a thin skin over `kernels`.

use std::cell::Cell;
use std::collections::HashMap;
use std::ops::{Add, Deref, DerefMut, Range};
use std::sync::{Mutex, PoisonError};

use common::kv_spec::GranuleOrder;
use common::sampling::SampledToken;
use common::tokens::Token;
use kernels::cuda::DeviceError;
use kernels::kv_layout::KvLayout;
use kernels::{
    AttentionParams, Columns, Ctx, Isa, MatrixRef, Operand, Order, PackedMatrix, Priority, Product, Qkv,
    QuantizedMatrix, QuantizedWeights, QueryBatch, QuerySpan, RopeTable, SECTIONS_MAX, SampleParams, TokenCount,
    WeightDtype, WorkerPool,
};

use crate::backend::{Backend, HeadRange, MatrixPart, QkvHeads};
use crate::plan::{SampleRow, StepPlan};
use crate::pool::KvPool;
use crate::rope::RopeAngles;
use crate::spec::ModelSpec;
use crate::weight_sizes::MatrixSizes;
use crate::weights::{AttentionWeights, ComputeDtype, MlpWeights};

/// Threads, instruction set and priority. None of them changes a result but the instruction set's order of additions.
#[derive(Clone, Copy)]
pub struct CpuBackend {
    workers: &'static WorkerPool,
    isa: Isa,
    priority: Priority,
}

impl std::fmt::Debug for CpuBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (threads, isa) = (self.workers.threads(), self.isa);
        f.debug_struct("CpuBackend").field("threads", &threads).field("isa", &isa).finish_non_exhaustive()
    }
}

/// A matrix of stacked parts: neighbours of one format are packed together.
#[derive(Debug)]
pub struct CpuMatrix {
    rows: usize,
    cols: usize,
    /// At most [`SECTIONS_MAX`], one below the other.
    sections: Vec<Section>,
}

#[derive(Debug)]
enum Section {
    Float(PackedMatrix),
    Quantized(QuantizedMatrix),
}

impl CpuMatrix {
    fn pack(dtype: ComputeDtype, order: Order, cols: usize, parts: &[MatrixPart<'_>]) -> Self {
        // All that a packed format is chosen by: q4_0 and q4_K differ in nothing but the offset, the block and minima.
        let format =
            |w: &QuantizedWeights| (w.bits, w.offset, w.group, w.block, w.group_scales.is_some(), w.mins.is_some());
        let is_alike = |a: &MatrixPart<'_>, b: &MatrixPart<'_>| match (a, b) {
            (MatrixPart::Quantized(a), MatrixPart::Quantized(b)) => format(a) == format(b),
            (MatrixPart::Quantized(_), _) | (_, MatrixPart::Quantized(_)) => false,
            _ => true,
        };
        let mut matrix = Self { rows: 0, cols, sections: Vec::new() };
        for parts in parts.chunk_by(is_alike) {
            let section = Section::pack(dtype, order, cols, parts);
            matrix.rows += section.rows();
            matrix.sections.push(section);
        }
        assert!(matrix.sections.len() <= SECTIONS_MAX, "a matrix of {} formats", matrix.sections.len());
        matrix
    }

    /// Of each section.
    pub(crate) fn section_sizes(&self) -> impl Iterator<Item = MatrixSizes> {
        self.sections.iter().map(|section| {
            let num_weights = (section.rows() * self.cols) as u64;
            match section {
                Section::Float(w) => MatrixSizes {
                    num_bytes: w.size_bytes() as u64,
                    num_float_weights: num_weights,
                    ..MatrixSizes::default()
                },
                Section::Quantized(w) => MatrixSizes {
                    num_bytes: w.size_bytes() as u64,
                    num_quantized_weights: num_weights,
                    ..MatrixSizes::default()
                },
            }
        })
    }

    /// The product with these rows.
    fn product<'a>(&'a self, operand: Operand<'a>, bias: Option<&'a Vec<f32>>, add: bool) -> Product<'a> {
        Product { operand, sections: self.sections(), bias: bias.map(Vec::as_slice), add }
    }

    fn sections(&self) -> [Option<MatrixRef<'_>>; SECTIONS_MAX] {
        std::array::from_fn(|index| self.sections.get(index).map(Section::as_ref))
    }
}

impl Section {
    /// Of numbers alone, or of integers with scales alone.
    fn pack(dtype: ComputeDtype, order: Order, cols: usize, parts: &[MatrixPart<'_>]) -> Self {
        let quantized: Vec<&QuantizedWeights> = parts.iter().filter_map(MatrixPart::quantized).collect();
        if !quantized.is_empty() {
            let packed = QuantizedMatrix::pack(order, &quantized);
            return Self::Quantized(packed.expect("loaders make only formats that have a kernel"));
        }
        let numbers: Vec<kernels::Weights<'_>> = parts.iter().filter_map(MatrixPart::numbers).collect();
        let dtype = match dtype {
            ComputeDtype::F32 => WeightDtype::F32,
            ComputeDtype::Bf16 => WeightDtype::Bf16,
        };
        Self::Float(PackedMatrix::pack(dtype, cols, &numbers))
    }

    fn rows(&self) -> usize {
        match self {
            Section::Float(w) => w.rows(),
            Section::Quantized(w) => w.rows(),
        }
    }

    fn as_ref(&self) -> MatrixRef<'_> {
        match self {
            Section::Float(w) => MatrixRef::Float(w),
            Section::Quantized(w) => MatrixRef::Quantized(w),
        }
    }
}

/// Activations in host memory, on whole lines of the cache: vectors and tiles that lie across two are stored at half
/// the speed.
#[derive(Debug, Default)]
pub struct CpuTensor {
    memory: Vec<f32>,
    place: Range<usize>,
}

impl CpuTensor {
    pub(crate) fn of(values: Vec<f32>) -> Self {
        let place = 0..values.len();
        Self { memory: values, place }
    }

    /// Exactly `len` values; what they were before is of no interest.
    fn sized(&mut self, len: usize) -> &mut [f32] {
        const LINE: usize = 64;
        if self.memory.len() < len + LINE / size_of::<f32>() {
            // Not both at a time.
            self.memory = Vec::new();
            self.memory = vec![0.0; len + LINE / size_of::<f32>()];
        }
        let start = self.memory.as_ptr().align_offset(LINE);
        self.place = start..start + len;
        self
    }
}

impl Deref for CpuTensor {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.memory[self.place.clone()]
    }
}

impl DerefMut for CpuTensor {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.memory[self.place.clone()]
    }
}

impl CpuBackend {
    /// On the given threads with the given instruction set.
    pub fn new(workers: &'static WorkerPool, isa: Isa) -> Self {
        Self { workers, isa, priority: Priority::Prefill }
    }

    /// The same with another priority.
    pub fn with_priority(self, priority: Priority) -> Self {
        Self { priority, ..self }
    }

    /// What the operations are given: threads, instruction set, priority.
    pub fn ctx(&self) -> Ctx<'static> {
        Ctx { pool: self.workers, isa: self.isa, priority: self.priority }
    }
}

fn columns(heads: HeadRange, head_dim: usize, width: usize) -> Columns {
    Columns { first: heads.first_head * head_dim, stride: width }
}

fn qkv_width(heads: &QkvHeads, layout: &KvLayout) -> usize {
    (heads.q.num_heads + heads.k.num_heads + heads.v.num_heads) * layout.head_dim
}

impl Backend for CpuBackend {
    const GRANULE_ORDER: GranuleOrder = GranuleOrder::Lanes;

    type Matrix = CpuMatrix;
    type Vector = Vec<f32>;
    type Rope = RopeAngles;
    type Tensor = CpuTensor;
    type Drawn = Vec<SampledToken>;

    fn matrix_sizes(matrix: &CpuMatrix) -> MatrixSizes {
        matrix.section_sizes().fold(MatrixSizes::default(), Add::add)
    }

    fn vector_bytes(vector: &Vec<f32>) -> u64 {
        4 * vector.len() as u64
    }

    fn matrix(&self, dtype: ComputeDtype, cols: usize, parts: Vec<MatrixPart<'_>>) -> Result<CpuMatrix, DeviceError> {
        Ok(CpuMatrix::pack(dtype, self.isa.order(), cols, &parts))
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vec<f32>, DeviceError> {
        Ok(values)
    }

    fn rope_table(&self, angles: RopeAngles) -> Result<RopeAngles, DeviceError> {
        Ok(angles)
    }

    fn read_back(&self, tensor: &CpuTensor) -> Vec<f32> {
        tensor.to_vec()
    }

    fn embed(&self, table: &CpuMatrix, width: usize, tokens: &[u32], out: &mut CpuTensor) {
        let out = out.sized(tokens.len() * width);
        match table.sections.as_slice() {
            [Section::Float(table)] => kernels::embed(&self.ctx(), table, tokens, out),
            [Section::Quantized(table)] => kernels::embed_quantized(&self.ctx(), table, tokens, out),
            _ => unreachable!("an embedding table is one tensor"),
        }
    }

    fn gather(&self, x: &CpuTensor, width: usize, rows: &[usize], out: &mut CpuTensor) {
        let out = out.sized(rows.len() * width);
        for (out, row) in out.chunks_exact_mut(width).zip(rows) {
            out.copy_from_slice(&x[row * width..][..width]);
        }
    }

    fn rms_norm(&self, x: &CpuTensor, weight: &Vec<f32>, eps: f32, out: &mut CpuTensor) {
        kernels::rms_norm(&self.ctx(), x, weight, eps, out.sized(x.len()));
    }

    fn matmul(&self, x: &CpuTensor, weight: &CpuMatrix, bias: Option<&Vec<f32>>, out: &mut CpuTensor) {
        let out = out.sized(x.len() / weight.cols * weight.rows);
        kernels::multiply(&self.ctx(), &weight.product(Operand::Rows(x), bias, false), out);
    }

    fn matmul_residual(&self, x: &CpuTensor, weight: &CpuMatrix, bias: Option<&Vec<f32>>, out: &mut CpuTensor) {
        kernels::multiply(&self.ctx(), &weight.product(Operand::Rows(x), bias, true), out);
    }

    fn attention(
        &self,
        pool: &KvPool,
        layer: usize,
        qkv: &CpuTensor,
        heads: &QkvHeads,
        plan: &StepPlan,
        window: Option<u32>,
        out: &mut CpuTensor,
    ) {
        let layout = pool.layout();
        let q_columns = columns(heads.q, layout.head_dim, qkv_width(heads, layout));
        let mut spans = SPANS.take();
        spans.clear();
        spans.extend(plan.spans.iter().map(|span| QuerySpan {
            first_row: span.first_row,
            num_rows: span.num_rows,
            first_position: span.first_position,
            block_table: span.block_table.clone(),
        }));
        let batch = QueryBatch { spans: &spans, block_tables: &plan.block_tables };
        let params = AttentionParams {
            num_heads: heads.q.num_heads,
            scale: 1.0 / (layout.head_dim as f32).sqrt(),
            window: window.map(|window| window as usize),
            softcap: None,
        };
        let out = out.sized(plan.num_rows() * heads.q.num_heads * layout.head_dim);
        kernels::attention(&self.ctx(), pool.arena(), layout, layer, qkv, q_columns, batch, &params, out);
        SPANS.set(spans);
    }

    fn norm_qkv_rope_write(
        &self,
        spec: &ModelSpec,
        layer: usize,
        weights: &AttentionWeights<Self>,
        table: &RopeAngles,
        pool: &KvPool,
        plan: &StepPlan,
        hidden: &CpuTensor,
        _normed: &mut CpuTensor,
        qkv: &mut CpuTensor,
    ) {
        let norm = Operand::Normed { x: hidden, weight: &weights.norm, eps: spec.rms_norm_eps };
        let qk_norm = weights.qk_norm.as_ref();
        let fused = Qkv {
            product: weights.qkv.product(norm, weights.qkv_bias.as_ref(), false),
            num_heads: spec.num_heads,
            head_norms: qk_norm.map(|(q, k)| (q.as_slice(), k.as_slice(), spec.rms_norm_eps)),
            rope: RopeTable { cos: &table.cos, sin: &table.sin, rot_dim: table.rotated_dim },
            positions: &plan.positions,
            arena: pool.arena(),
            layout: pool.layout(),
            layer,
            slots: &plan.slots,
        };
        kernels::qkv_rope_write(&self.ctx(), &fused, qkv.sized(plan.num_rows() * spec.qkv_width()));
    }

    fn feed_forward(
        &self,
        spec: &ModelSpec,
        weights: &MlpWeights<Self>,
        hidden: &mut CpuTensor,
        _normed: &mut CpuTensor,
        gate_up: &mut CpuTensor,
        _gated: &mut CpuTensor,
    ) {
        let num_rows = hidden.len() / spec.hidden_size;
        let gate_up = gate_up.sized(num_rows * weights.gate_up.rows);
        let norm = Operand::Normed { x: hidden, weight: &weights.norm, eps: spec.rms_norm_eps };
        let product = weights.gate_up.product(norm, weights.gate_up_bias.as_ref(), false);
        let gated = kernels::multiply_gated(&self.ctx(), &product, &weights.down.sections(), gate_up);
        let down = weights.down.product(gated, weights.down_bias.as_ref(), true);
        kernels::multiply(&self.ctx(), &down, hidden);
    }

    fn silu_mul(&self, gate_up: &CpuTensor, ffn: usize, out: &mut CpuTensor) {
        kernels::silu_mul(&self.ctx(), gate_up, ffn, out.sized(gate_up.len() / 2));
    }

    fn takes_some_rows(&self) -> bool {
        true
    }

    fn sample(
        &self,
        logits: &CpuTensor,
        vocab: usize,
        logit_rows: &[usize],
        samples: &[SampleRow],
        out: &mut Vec<SampledToken>,
    ) {
        out.clear();
        out.resize_with(samples.len(), SampledToken::default);
        let out = Mutex::new(out);
        self.workers.run(self.priority, samples.len(), &|index| {
            let inputs = SampleInputs::of(&samples[index], vocab);
            let logits = &logits[logit_rows[index] * vocab..][..vocab];
            let sampled = kernels::sample_row(self.isa, logits, &inputs.params(&samples[index]));
            // A poisoned lock means that another row panicked, which the pool raises again.
            out.lock().unwrap_or_else(PoisonError::into_inner)[index] =
                SampledToken { id: sampled.token, logprob: sampled.logprob.unwrap_or(0.0), top_logprobs: sampled.top };
        });
    }
}

thread_local! {
    /// The spans of an attention call as the kernel wants them, kept for their memory.
    static SPANS: Cell<Vec<QuerySpan>> = const { Cell::new(Vec::new()) };
}

/// What the kernel wants as slices. Ids beyond the vocabulary stand for nothing and are left out.
struct SampleInputs {
    counts: Vec<TokenCount>,
    bias: Vec<(Token, f32)>,
    banned: Vec<Token>,
}

impl SampleInputs {
    fn of(sample: &SampleRow, vocab: usize) -> Self {
        let is_known = |token: Token| (token as usize) < vocab;
        let params = &sample.params;
        let banned = if sample.is_stop_banned { params.stop_token_ids.as_slice() } else { &[] };
        Self {
            counts: match &sample.history {
                Some((tokens, prompt_len)) => count_tokens(tokens, *prompt_len, is_known),
                None => Vec::new(),
            },
            bias: params.logit_bias.iter().copied().filter(|(token, _)| is_known(*token)).collect(),
            banned: banned.iter().copied().filter(|token| is_known(*token)).collect(),
        }
    }

    fn params(&self, sample: &SampleRow) -> SampleParams<'_> {
        let params = &sample.params;
        SampleParams {
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            repetition_penalty: params.repetition_penalty,
            frequency_penalty: params.frequency_penalty,
            presence_penalty: params.presence_penalty,
            token_counts: &self.counts,
            logit_bias: &self.bias,
            banned: &self.banned,
            uniform: kernels::uniform(params.seed, sample.choice.0, sample.position),
            num_logprobs: params.logprobs.map(|num_top| num_top as usize),
        }
    }
}

fn count_tokens(tokens: &[Token], prompt_len: usize, is_known: impl Fn(Token) -> bool) -> Vec<TokenCount> {
    let mut counts: HashMap<Token, TokenCount> = HashMap::new();
    for (index, &token) in tokens.iter().enumerate().filter(|(_, token)| is_known(**token)) {
        let count = counts.entry(token).or_insert(TokenCount { token, in_prompt: false, num_output: 0 });
        if index < prompt_len {
            count.in_prompt = true;
        } else {
            count.num_output += 1;
        }
    }
    counts.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_and_output_are_counted_apart() {
        let mut counts = count_tokens(&[5, 6, 5, 6, 6, 900], 3, |token| token < 100);
        counts.sort_by_key(|count| count.token);
        let count = |token, num_output| TokenCount { token, in_prompt: true, num_output };
        assert_eq!(counts, [count(5, 0), count(6, 2)]);
    }
}
