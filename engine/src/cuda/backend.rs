//! The decoder's operations on a CUDA device: a thin skin over [`kernels::cuda::ops`].
//!
//! Activations are f32 where they are summed and of the computing type where a product or attention reads them.
//! Nothing here waits for the device: operations are launched one behind the other.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::kv_spec::GranuleOrder;
use kernels::KvLayout;
use kernels::cuda::ops::{
    self, AttentionKernels, AttentionShape, DecodeParts, Dtype, HeadWeights, Multiply, Part, PrefillKernel,
    SKINNY_ROWS_MAX,
};
use kernels::cuda::{Buffer, Device, DeviceError, DeviceWeights, Lane, MultiplyQuantized};

use super::done;
use super::sampling::{Drawn, DrawnMemory, Sampler};
use super::step::{Bucket, Growing, StepArrays, StepMemory, Words};
use crate::backend::{Backend, MatrixPart, QkvHeads};
use crate::plan::{SampleRow, StepPlan};
use crate::pool::KvPool;
use crate::rope::RopeAngles;
use crate::spec::ModelSpec;
use crate::weight_sizes::MatrixSizes;
use crate::weights::{AttentionWeights, ComputeDtype, MlpWeights};

/// A device, what is computed in, and the step that is being launched. Clones share the memory that steps use one
/// after the other: a runner has a backend [of its own](Self::for_runner).
#[derive(Clone)]
pub struct CudaBackend {
    device: Arc<dyn Device>,
    dtype: Dtype,
    is_batch_invariant: bool,
    prefill: PrefillKernel,
    memory: Arc<StepMemory>,
    sampler: Arc<Sampler>,
    quantized_max: Arc<QuantizedMax>,
    step: Option<Arc<Step>>,
}

/// The largest of what is quantized: what products need memory for.
#[derive(Default)]
struct QuantizedMax {
    /// Values of a matrix that becomes bf16.
    values: AtomicUsize,
    /// Activations of a row that become integers.
    activations: AtomicUsize,
}

/// What is known of a step on the device.
struct Step {
    arrays: StepArrays,
    /// What the step before it drew.
    previous: Option<Arc<DrawnMemory>>,
}

/// Rows of a weight matrix `[rows, cols]`, or of the embedding table.
pub struct CudaMatrix {
    values: Values,
    rows: usize,
    cols: usize,
}

enum Values {
    /// In the type that is computed in.
    Dense(Buffer),
    /// Codes and scales.
    Quantized(DeviceWeights),
}

/// Cosines and sines.
pub struct CudaRope {
    cosines: Buffer,
    sines: Buffer,
    rotated_dim: usize,
}

/// Activations on the device: so many values of a type, in memory that may be larger.
#[derive(Default)]
pub struct CudaTensor {
    memory: Growing,
    len: usize,
    dtype: Option<Dtype>,
}

impl CudaTensor {
    /// `len` values of `dtype`; what they were before is of no interest.
    fn sized(&mut self, backend: &CudaBackend, len: usize, dtype: Dtype) -> &Buffer {
        (self.len, self.dtype) = (len, Some(dtype));
        self.memory.at_least(&backend.device, len * dtype.size(), Some(backend.memory.moves()))
    }

    /// Its memory, which holds values of `dtype`.
    fn of(&self, dtype: Dtype) -> &Buffer {
        assert_eq!(self.dtype, Some(dtype), "the type that an operation left here and another reads");
        self.memory.get()
    }

    /// Its memory, if it holds f32.
    pub(super) fn logits(&self) -> &Buffer {
        self.of(Dtype::F32)
    }
}

impl CudaBackend {
    /// A backend on `device` that computes in `dtype`. One that is batch-invariant gives a row the same bits
    /// whatever is in the step, at the price of slower products of many rows.
    pub fn new(device: Arc<dyn Device>, dtype: ComputeDtype, is_batch_invariant: bool) -> Self {
        let dtype = match dtype {
            ComputeDtype::F32 => Dtype::F32,
            ComputeDtype::Bf16 => Dtype::Bf16,
        };
        let (memory, sampler, quantized_max) = (Arc::default(), Arc::default(), Arc::default());
        let prefill = PrefillKernel::Portable;
        Self { device, dtype, is_batch_invariant, prefill, memory, sampler, quantized_max, step: None }
    }

    /// The same with this kernel for the attention of prompts, which the device has.
    pub(super) fn with_prefill(self, prefill: PrefillKernel) -> Self {
        Self { prefill, ..self }
    }

    /// The same with memory of its own for steps: those of two runners of one model are launched in any order.
    pub fn for_runner(&self) -> Self {
        Self { memory: Arc::default(), sampler: Arc::default(), step: None, ..self.clone() }
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Whether a row's bits depend on nothing but its sequence. In f32 they never do.
    pub fn is_batch_invariant(&self) -> bool {
        self.is_batch_invariant || self.dtype == Dtype::F32 || !self.device.has_product()
    }

    /// The same, with `plan` on the device. Tokens that are not known yet are taken from `previous`, what the step
    /// before it draws.
    pub fn at_step(&self, plan: &StepPlan, layout: &KvLayout, spec: &ModelSpec, previous: &Drawn) -> Self {
        self.at_padded_step(plan, None, layout, spec, previous)
    }

    /// The same for a plan that was padded to `bucket`.
    pub(super) fn at_padded_step(
        &self,
        plan: &StepPlan,
        bucket: Option<Bucket>,
        layout: &KvLayout,
        spec: &ModelSpec,
        previous: &Drawn,
    ) -> Self {
        let (mut words, moves) = (Words::default(), Some(self.memory.moves()));
        let arrays = StepArrays::of(plan, self.attention_kernels(layout), &spec.windows, bucket, &mut words);
        words.upload(&self.device, &mut self.memory.inputs(), moves);
        let units = arrays.decode.iter().map(|decode| decode.units.len).max().unwrap_or(0);
        let bytes = ops::partial_bytes(units, spec.num_heads, layout.head_dim);
        self.memory.partials().at_least(&self.device, bytes, moves);
        let previous = previous.memory();
        assert!(plan.from_slots.is_empty() || previous.is_some(), "a step whose tokens are drawn by no other");
        Self { step: Some(Arc::new(Step { arrays, previous })), ..self.clone() }
    }

    /// What the device has for a pool's kind of KV.
    pub(super) fn attention_kernels(&self, layout: &KvLayout) -> AttentionKernels {
        AttentionKernels::of(layout.dtype, layout.head_dim, self.device.shared_bytes_max())
    }

    /// How often memory of this backend's steps has moved.
    pub(super) fn num_moves(&self) -> u64 {
        self.memory.moves().count()
    }

    /// Where everything of the step lies.
    pub(super) fn step_arrays(&self) -> StepArrays {
        self.step().arrays.clone()
    }

    fn step(&self) -> &Step {
        self.step.as_ref().expect("whoever runs the decoder says at which step")
    }

    /// Whether so many rows are multiplied by a kernel of our own.
    fn is_skinny(&self, rows: usize) -> bool {
        rows <= SKINNY_ROWS_MAX || self.is_batch_invariant()
    }

    fn rows_of(&self, len: usize, width: usize) -> usize {
        debug_assert!(len.is_multiple_of(width), "{len} values in rows of {width}");
        len / width
    }

    fn multiply(&self, x: &CudaTensor, weight: &CudaMatrix, bias: Option<&Buffer>, add: bool, out: &Buffer) {
        let (m, n, k) = (self.rows_of(x.len, weight.cols), weight.rows, weight.cols);
        let (x, is_skinny) = (x.of(self.dtype), self.is_skinny(m));
        done(match (&weight.values, self.dtype) {
            (Values::Dense(w), dtype) => {
                let multiply = Multiply { x, w, bias, out, m, n, k, add };
                match dtype {
                    Dtype::F32 => ops::plain_matmul(&multiply),
                    Dtype::Bf16 if is_skinny => ops::skinny_matmul(&multiply),
                    Dtype::Bf16 => ops::library_matmul(&multiply),
                }
            }
            (Values::Quantized(w), _) => {
                let multiply = MultiplyQuantized { x, m, bias, out, add };
                if is_skinny && !w.quantizes_activations() {
                    return done(w.multiply(&multiply));
                }
                let mut scratch = self.memory.dense();
                let scratch = scratch.at_least(&self.device, w.scratch_bytes(m), Some(self.memory.moves()));
                w.multiply_with(&multiply, scratch)
            }
        });
    }

    /// What products with quantized matrices take beside them in steps of `num_rows`: the matrix in bf16, or
    /// activations as integers with a scale.
    pub(super) fn scratch_bytes_max(&self, num_rows: usize) -> usize {
        let of = |max: &AtomicUsize| max.load(Ordering::Relaxed);
        let dense = if self.is_batch_invariant() { 0 } else { 2 * of(&self.quantized_max.values) };
        let integers = match of(&self.quantized_max.activations) {
            0 => 0,
            width => (num_rows * width).next_multiple_of(16) + num_rows * 4,
        };
        dense.max(integers)
    }

    /// Stacks quantized parts; `None` if they are not all such as the device multiplies with.
    fn stack_quantized(&self, cols: usize, parts: &[MatrixPart<'_>]) -> Result<Option<CudaMatrix>, DeviceError> {
        let quantized = parts.iter().map(MatrixPart::quantized);
        let Some(parts) = quantized.collect::<Option<Vec<_>>>() else { return Ok(None) };
        let Some(weights) = DeviceWeights::new(&self.device, &parts)? else { return Ok(None) };
        match weights.quantizes_activations() {
            true => self.quantized_max.activations.fetch_max(cols, Ordering::Relaxed),
            false => self.quantized_max.values.fetch_max(weights.num_values(), Ordering::Relaxed),
        };
        let rows = weights.num_values() / cols.max(1);
        Ok(Some(CudaMatrix { values: Values::Quantized(weights), rows, cols }))
    }

    /// Stacks parts in the one type that is computed in.
    fn stack(&self, dtype: ComputeDtype, cols: usize, parts: &[MatrixPart<'_>]) -> Result<CudaMatrix, DeviceError> {
        let parts: Vec<_> = parts.iter().map(|part| dense_bytes(part, dtype)).collect();
        let num_bytes = parts.iter().map(|part| part.len()).sum::<usize>();
        let buffer = Buffer::new(&self.device, num_bytes)?;
        let mut offset = 0;
        for bytes in &parts {
            buffer.write(Lane::Transfer, offset, bytes)?;
            offset += bytes.len();
        }
        Ok(CudaMatrix { values: Values::Dense(buffer), rows: num_bytes / self.dtype.size() / cols.max(1), cols })
    }
}

/// What is computed with, quantized values too.
fn dense_bytes<'a>(part: &'a MatrixPart<'_>, dtype: ComputeDtype) -> Cow<'a, [u8]> {
    let Some(weights) = part.quantized() else { return part.to_bytes(dtype).expect("numbers have bytes") };
    let values = MatrixPart::F32(weights.dequantize());
    Cow::Owned(values.to_bytes(dtype).expect("numbers have bytes").into_owned())
}

impl Backend for CudaBackend {
    const GRANULE_ORDER: GranuleOrder = GranuleOrder::Rows;

    type Matrix = CudaMatrix;
    type Vector = Buffer;
    type Rope = CudaRope;
    type Tensor = CudaTensor;
    type Drawn = Drawn;

    /// Quantized weights count as what they are multiplied as: bf16.
    fn matrix_sizes(matrix: &CudaMatrix) -> MatrixSizes {
        let num_bytes = match &matrix.values {
            Values::Dense(buffer) => buffer.num_bytes(),
            Values::Quantized(weights) => weights.num_bytes(),
        } as u64;
        MatrixSizes { num_bytes, num_float_weights: (matrix.rows * matrix.cols) as u64, num_quantized_weights: 0 }
    }

    fn vector_bytes(vector: &Buffer) -> u64 {
        vector.num_bytes() as u64
    }

    fn matrix(&self, dtype: ComputeDtype, cols: usize, parts: Vec<MatrixPart<'_>>) -> Result<CudaMatrix, DeviceError> {
        match self.stack_quantized(cols, &parts)? {
            Some(quantized) => Ok(quantized),
            None => {
                if parts.iter().any(|part| part.quantized().is_some()) {
                    tracing::warn!(
                        cols,
                        parts = parts.len(),
                        "a matrix of quantized weights is bfloat16 on the device"
                    );
                }
                self.stack(dtype, cols, &parts)
            }
        }
    }

    fn vector(&self, values: Vec<f32>) -> Result<Buffer, DeviceError> {
        Buffer::of(&self.device, &values)
    }

    fn rope_table(&self, angles: RopeAngles) -> Result<CudaRope, DeviceError> {
        let on_device = |values: &[f32]| Buffer::of(&self.device, values);
        let (cosines, sines) = (on_device(&angles.cos)?, on_device(&angles.sin)?);
        Ok(CudaRope { cosines, sines, rotated_dim: angles.rotated_dim })
    }

    fn read_back(&self, tensor: &CudaTensor) -> Vec<f32> {
        let Some(dtype) = tensor.dtype else { return Vec::new() };
        let mut bytes = vec![0; tensor.len * dtype.size()];
        done(tensor.memory.get().read(Lane::Compute, 0, &mut bytes));
        match dtype {
            Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::Bf16 => bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        }
    }

    fn embed(&self, table: &CudaMatrix, width: usize, tokens: &[u32], out: &mut CudaTensor) {
        let Step { arrays, previous } = self.step();
        assert_eq!(tokens.len(), arrays.ids.len, "the tokens of the step that was said");
        let inputs = self.memory.inputs();
        let out = out.sized(self, tokens.len() * width, Dtype::F32);
        let drawn = previous.as_ref().map(|previous| previous.tokens());
        let (ids, rows) = (arrays.ids.of(inputs.get()), tokens.len());
        done(match &table.values {
            Values::Dense(values) => ops::embed(values, self.dtype, ids, drawn, out, rows, width),
            Values::Quantized(weights) => weights.embed(ids, drawn, out, rows),
        });
    }

    fn gather(&self, x: &CudaTensor, width: usize, rows: &[usize], out: &mut CudaTensor) {
        let (mut words, mut memory) = (Words::default(), self.memory.rows());
        let ids = words.push(rows.iter().map(|row| [*row as u32]));
        let uploaded = words.upload(&self.device, &mut memory, None);
        let out = out.sized(self, rows.len() * width, Dtype::F32);
        // A row of activations is a row of a table.
        done(ops::embed(x.of(Dtype::F32), Dtype::F32, ids.of(uploaded), None, out, rows.len(), width));
    }

    fn rms_norm(&self, x: &CudaTensor, weight: &Buffer, eps: f32, out: &mut CudaTensor) {
        let width = weight.num_bytes() / 4;
        let rows = self.rows_of(x.len, width);
        let out = out.sized(self, x.len, self.dtype);
        done(ops::rms_norm(x.of(Dtype::F32), weight, eps, out, self.dtype, rows, width));
    }

    fn matmul(&self, x: &CudaTensor, weight: &CudaMatrix, bias: Option<&Buffer>, out: &mut CudaTensor) {
        let len = self.rows_of(x.len, weight.cols) * weight.rows;
        self.multiply(x, weight, bias, false, out.sized(self, len, Dtype::F32));
    }

    fn matmul_residual(&self, x: &CudaTensor, weight: &CudaMatrix, bias: Option<&Buffer>, out: &mut CudaTensor) {
        self.multiply(x, weight, bias, true, out.of(Dtype::F32));
    }

    fn attention(
        &self,
        pool: &KvPool,
        layer: usize,
        qkv: &CudaTensor,
        heads: &QkvHeads,
        _plan: &StepPlan,
        window: Option<u32>,
        out: &mut CudaTensor,
    ) {
        let on_device = pool.device_pool().expect("a CUDA runner's pool is on its device");
        let arrays = &self.step().arrays;
        let dtype = on_device.layout.dtype;
        let shape = AttentionShape {
            layer,
            num_heads: heads.q.num_heads,
            scale: 1.0 / (on_device.layout.head_dim as f32).sqrt(),
            window: window.unwrap_or(0),
            num_rows: arrays.positions.len,
        };
        let q = qkv.of(dtype);
        let out = out.sized(self, qkv.len, dtype);
        let (inputs, partials) = (self.memory.inputs(), self.memory.partials());
        let inputs = inputs.get();
        let tables = arrays.block_tables.of(inputs);
        let of = |array: super::step::Array| -> Part<'_> { array.of(inputs) };
        if arrays.tiles.len > 0 {
            let tiles = arrays.tiles;
            done(ops::attention_prefill(self.prefill, on_device, &shape, q, of(tiles), tiles.len, tables, out));
        }
        if arrays.plain_rows.len > 0 {
            let rows = arrays.plain_rows;
            done(ops::attention_plain(on_device, &shape, q, of(rows), rows.len, tables, out));
        }
        let decode = arrays.decode.iter().find(|decode| decode.window == window);
        let decode = decode.expect("every layer's window is laid out");
        if decode.rows.len > 0 {
            let parts = DecodeParts {
                units: of(decode.units),
                num_units: decode.units.len,
                rows: of(decode.rows),
                num_rows: decode.rows.len,
                partials: partials.get(),
            };
            done(ops::attention_decode(on_device, &shape, q, &parts, tables, out));
        }
    }

    /// Without the copy where all rows are wanted as they are.
    fn norm_logits(
        &self,
        spec: &ModelSpec,
        norm: &Buffer,
        head: &CudaMatrix,
        hidden: &CudaTensor,
        rows: &[usize],
        gathered: &mut CudaTensor,
        normed: &mut CudaTensor,
        logits: &mut CudaTensor,
    ) {
        let num_rows = self.rows_of(hidden.len, spec.hidden_size);
        let hidden = if rows.len() == num_rows && rows.iter().enumerate().all(|(index, row)| index == *row) {
            hidden
        } else {
            self.gather(hidden, spec.hidden_size, rows, gathered);
            gathered
        };
        self.rms_norm(hidden, norm, spec.rms_norm_eps, normed);
        self.matmul(normed, head, None, logits);
    }

    fn silu_mul(&self, gate_up: &CudaTensor, ffn: usize, out: &mut CudaTensor) {
        let rows = self.rows_of(gate_up.len, 2 * ffn);
        let out = out.sized(self, rows * ffn, self.dtype);
        done(ops::silu_mul(gate_up.of(Dtype::F32), out, self.dtype, rows, ffn));
    }

    /// In one launch where few rows meet dense weights.
    fn norm_gate_up_act(
        &self,
        spec: &ModelSpec,
        weights: &MlpWeights<Self>,
        hidden: &CudaTensor,
        normed: &mut CudaTensor,
        gate_up: &mut CudaTensor,
        out: &mut CudaTensor,
    ) {
        let (rows, ffn, k) = (self.rows_of(hidden.len, spec.hidden_size), spec.intermediate_size, spec.hidden_size);
        self.rms_norm(hidden, &weights.norm, spec.rms_norm_eps, normed);
        match (&weights.gate_up.values, &weights.gate_up_bias) {
            (Values::Dense(w), None) if self.dtype == Dtype::Bf16 && self.is_skinny(rows) => {
                let out = out.sized(self, rows * ffn, Dtype::Bf16);
                done(ops::skinny_gate_up(normed.of(Dtype::Bf16), w, out, rows, ffn, k));
            }
            (_, bias) => {
                self.matmul(normed, &weights.gate_up, bias.as_ref(), gate_up);
                self.silu_mul(gate_up, ffn, out);
            }
        }
    }

    fn sample(&self, logits: &CudaTensor, vocab: usize, logit_rows: &[usize], samples: &[SampleRow], out: &mut Drawn) {
        *out = self.sampler.sample(&self.device, &self.memory, logits.logits(), vocab, logit_rows, samples);
    }

    fn norm_qkv_rope_write(
        &self,
        spec: &ModelSpec,
        layer: usize,
        weights: &AttentionWeights<Self>,
        table: &CudaRope,
        pool: &KvPool,
        plan: &StepPlan,
        hidden: &CudaTensor,
        normed: &mut CudaTensor,
        qkv: &mut CudaTensor,
    ) {
        let on_device = pool.device_pool().expect("a CUDA runner's pool is on its device");
        let rows = plan.num_rows();
        // The two change places below, in every layer: neither grows once both have held what either does.
        for tensor in [&mut *normed, &mut *qkv] {
            tensor.sized(self, rows * spec.qkv_width().max(spec.hidden_size), Dtype::F32);
        }
        self.rms_norm(hidden, &weights.norm, spec.rms_norm_eps, normed);
        self.matmul(normed, &weights.qkv, weights.qkv_bias.as_ref(), qkv);
        let heads = HeadWeights {
            norms: weights.qk_norm.as_ref().map(|(q, k)| (q, k)),
            eps: spec.rms_norm_eps,
            num_positions: self.step().arrays.num_positions,
            cosines: &table.cosines,
            sines: &table.sines,
            rotated_dim: table.rotated_dim,
        };
        let (inputs, arrays) = (self.memory.inputs(), &self.step().arrays);
        // The norm has been read: its memory takes the rotated queries, and the two change places.
        let q_len = rows * spec.num_heads * spec.head_dim;
        let q_out = normed.sized(self, q_len, on_device.layout.dtype);
        let (positions, slots) = (arrays.positions.of(inputs.get()), arrays.slots.of(inputs.get()));
        let q_heads = spec.num_heads;
        let qkv_values = qkv.of(Dtype::F32);
        done(ops::rope_kv_write(on_device, layer, q_heads, &heads, qkv_values, positions, slots, q_out, rows));
        std::mem::swap(normed, qkv);
    }
}
