//! The decoder's operations on a CUDA device: a thin skin over [`kernels::cuda::ops`].
//!
//! Activations are f32 where they are summed and of the computing type where a product or attention reads them.
//! Nothing here waits for the device: operations are launched one behind the other.

use std::sync::Arc;

use common::kv_spec::GranuleOrder;
use kernels::KvLayout;
use kernels::cuda::ops::{
    self, AttentionKernels, AttentionShape, DecodeParts, Dtype, HeadWeights, Multiply, Part, SKINNY_ROWS_MAX,
};
use kernels::cuda::{Buffer, Device, DeviceError, Lane};

use super::done;
use super::sampling::{Drawn, DrawnMemory, Sampler};
use super::step::{Growing, StepArrays, StepMemory, Words};
use crate::backend::{Backend, MatrixPart, QkvHeads};
use crate::plan::{SampleRow, StepPlan};
use crate::pool::KvPool;
use crate::rope::RopeAngles;
use crate::spec::ModelSpec;
use crate::weights::{AttentionWeights, ComputeDtype};

/// A device, what is computed in, and the step that is being launched. Clones share the memory that steps use one
/// after the other: a runner has a backend [of its own](Self::for_runner).
#[derive(Clone)]
pub struct CudaBackend {
    device: Arc<dyn Device>,
    dtype: Dtype,
    is_batch_invariant: bool,
    memory: Arc<StepMemory>,
    sampler: Arc<Sampler>,
    step: Option<Arc<Step>>,
}

/// What is known of a step on the device.
struct Step {
    arrays: StepArrays,
    /// What the step before it drew.
    previous: Option<Arc<DrawnMemory>>,
}

/// Rows of a weight matrix `[rows, cols]`, or of the embedding table.
pub struct CudaMatrix {
    buffer: Buffer,
    rows: usize,
    cols: usize,
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
    fn sized(&mut self, device: &Arc<dyn Device>, len: usize, dtype: Dtype) -> &Buffer {
        (self.len, self.dtype) = (len, Some(dtype));
        self.memory.at_least(device, len * dtype.size())
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
        let (memory, sampler) = (Arc::default(), Arc::default());
        Self { device, dtype, is_batch_invariant, memory, sampler, step: None }
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
        let mut words = Words::default();
        let kernels = AttentionKernels::of(layout.dtype, layout.head_dim, self.device.shared_bytes_max());
        let arrays = StepArrays::of(plan, kernels, &spec.windows, &mut words);
        words.upload(&self.device, &mut self.memory.inputs());
        let units = arrays.decode.iter().map(|decode| decode.units.len).max().unwrap_or(0);
        let bytes = ops::partial_bytes(units, spec.num_heads, layout.head_dim);
        self.memory.partials().at_least(&self.device, bytes);
        let previous = previous.memory();
        assert!(plan.from_slots.is_empty() || previous.is_some(), "a step whose tokens are drawn by no other");
        Self { step: Some(Arc::new(Step { arrays, previous })), ..self.clone() }
    }

    fn step(&self) -> &Step {
        self.step.as_ref().expect("whoever runs the decoder says at which step")
    }

    fn rows_of(&self, len: usize, width: usize) -> usize {
        debug_assert!(len.is_multiple_of(width), "{len} values in rows of {width}");
        len / width
    }

    fn multiply(&self, x: &CudaTensor, weight: &CudaMatrix, bias: Option<&Buffer>, add: bool, out: &Buffer) {
        let (m, n, k) = (self.rows_of(x.len, weight.cols), weight.rows, weight.cols);
        let multiply = Multiply { x: x.of(self.dtype), w: &weight.buffer, bias, out, m, n, k, add };
        done(match self.dtype {
            Dtype::F32 => ops::plain_matmul(&multiply),
            Dtype::Bf16 if m <= SKINNY_ROWS_MAX || self.is_batch_invariant() => ops::skinny_matmul(&multiply),
            Dtype::Bf16 => ops::library_matmul(&multiply),
        });
    }
}

impl Backend for CudaBackend {
    const GRANULE_ORDER: GranuleOrder = GranuleOrder::Rows;

    type Matrix = CudaMatrix;
    type Vector = Buffer;
    type Rope = CudaRope;
    type Tensor = CudaTensor;
    type Drawn = Drawn;

    fn matrix(&self, dtype: ComputeDtype, cols: usize, parts: Vec<MatrixPart<'_>>) -> Result<CudaMatrix, DeviceError> {
        let in_dtype = |part| MatrixPart::to_bytes(part, dtype).expect("an opened model has no quantized weights here");
        let parts: Vec<_> = parts.iter().map(in_dtype).collect();
        let num_bytes = parts.iter().map(|part| part.len()).sum::<usize>();
        let buffer = Buffer::new(&self.device, num_bytes)?;
        let mut offset = 0;
        for bytes in &parts {
            buffer.write(Lane::Transfer, offset, bytes)?;
            offset += bytes.len();
        }
        Ok(CudaMatrix { buffer, rows: num_bytes / self.dtype.size() / cols, cols })
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
        let out = out.sized(&self.device, tokens.len() * width, Dtype::F32);
        let drawn = previous.as_ref().map(|previous| previous.tokens());
        done(ops::embed(&table.buffer, self.dtype, arrays.ids.of(inputs.get()), drawn, out, tokens.len(), width));
    }

    fn gather(&self, x: &CudaTensor, width: usize, rows: &[usize], out: &mut CudaTensor) {
        let (mut words, mut memory) = (Words::default(), self.memory.rows());
        let ids = words.push(rows.iter().map(|row| [*row as u32]));
        let uploaded = words.upload(&self.device, &mut memory);
        let out = out.sized(&self.device, rows.len() * width, Dtype::F32);
        // A row of activations is a row of a table.
        done(ops::embed(x.of(Dtype::F32), Dtype::F32, ids.of(uploaded), None, out, rows.len(), width));
    }

    fn rms_norm(&self, x: &CudaTensor, weight: &Buffer, eps: f32, out: &mut CudaTensor) {
        let width = weight.num_bytes() / 4;
        let rows = self.rows_of(x.len, width);
        let out = out.sized(&self.device, x.len, self.dtype);
        done(ops::rms_norm(x.of(Dtype::F32), weight, eps, out, self.dtype, rows, width));
    }

    fn matmul(&self, x: &CudaTensor, weight: &CudaMatrix, bias: Option<&Buffer>, out: &mut CudaTensor) {
        let len = self.rows_of(x.len, weight.cols) * weight.rows;
        self.multiply(x, weight, bias, false, out.sized(&self.device, len, Dtype::F32));
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
        let out = out.sized(&self.device, qkv.len, dtype);
        let (inputs, partials) = (self.memory.inputs(), self.memory.partials());
        let inputs = inputs.get();
        let tables = arrays.block_tables.of(inputs);
        let of = |array: super::step::Array| -> Part<'_> { array.of(inputs) };
        if arrays.tiles.len > 0 {
            let tiles = arrays.tiles;
            done(ops::attention_prefill(on_device, &shape, q, of(tiles), tiles.len, tables, out));
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

    fn silu_mul(&self, gate_up: &CudaTensor, ffn: usize, out: &mut CudaTensor) {
        let rows = self.rows_of(gate_up.len, 2 * ffn);
        let out = out.sized(&self.device, rows * ffn, self.dtype);
        done(ops::silu_mul(gate_up.of(Dtype::F32), out, self.dtype, rows, ffn));
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
        self.rms_norm(hidden, &weights.norm, spec.rms_norm_eps, normed);
        self.matmul(normed, &weights.qkv, weights.qkv_bias.as_ref(), qkv);
        let rows = plan.num_rows();
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
        let q_out = normed.sized(&self.device, q_len, on_device.layout.dtype);
        let (positions, slots) = (arrays.positions.of(inputs.get()), arrays.slots.of(inputs.get()));
        let q_heads = spec.num_heads;
        let qkv_values = qkv.of(Dtype::F32);
        done(ops::rope_kv_write(on_device, layer, q_heads, &heads, qkv_values, positions, slots, q_out, rows));
        std::mem::swap(normed, qkv);
    }
}
