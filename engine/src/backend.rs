//! What a processor must be able to do to run the decoder.
//!
//! The plain operations are required, and the one that is fused on every processor
//! ([`norm_qkv_rope_write`](Backend::norm_qkv_rope_write)). The others that the decoder calls have defaults that
//! compose plain ones, and a backend overrides what it can do better. A backend is a handle: cheap to clone, without
//! state of a request.
//!
//! Activations are row-major f32 `[num_rows, width]` in the backend's own memory. A row's result depends on
//! that row's inputs and its position alone, never on what else is in the step.

use std::borrow::Cow;

use common::kv_spec::GranuleOrder;
use kernels::cuda::DeviceError;

use crate::checkpoint::FloatDtype;
use crate::plan::{SampleRow, StepPlan};
use crate::pool::KvPool;
use crate::rope::RopeAngles;
use crate::spec::ModelSpec;
use crate::weight_sizes::MatrixSizes;
use crate::weights::{AttentionWeights, ComputeDtype, MlpWeights};

/// Rows of a matrix as a checkpoint holds them, before packing: `[its rows, cols]`.
pub enum MatrixPart<'a> {
    /// Numbers where they lie in the checkpoint's file, little-endian, aligned to nothing.
    Stored {
        /// What they are.
        dtype: FloatDtype,
        /// All of them.
        bytes: &'a [u8],
    },
    /// Numbers that lie in another order there.
    F32(Vec<f32>),
    /// Integers with scales.
    Quantized(kernels::QuantizedWeights),
}

impl MatrixPart<'_> {
    /// As the kernels take numbers; `None` of integers with scales.
    pub(crate) fn numbers(&self) -> Option<kernels::Weights<'_>> {
        match self {
            MatrixPart::Stored { dtype: FloatDtype::F32, bytes } => {
                Some(kernels::Weights::F32Bytes(bytes.as_chunks().0))
            }
            MatrixPart::Stored { dtype: FloatDtype::F16, bytes } => {
                Some(kernels::Weights::F16Bytes(bytes.as_chunks().0))
            }
            MatrixPart::Stored { dtype: FloatDtype::Bf16, bytes } => {
                Some(kernels::Weights::Bf16Bytes(bytes.as_chunks().0))
            }
            MatrixPart::F32(values) => Some(kernels::Weights::F32(values)),
            MatrixPart::Quantized(_) => None,
        }
    }

    /// Integers with scales; `None` of numbers.
    pub(crate) fn quantized(&self) -> Option<&kernels::QuantizedWeights> {
        match self {
            MatrixPart::Quantized(weights) => Some(weights),
            MatrixPart::Stored { .. } | MatrixPart::F32(_) => None,
        }
    }

    /// Little-endian numbers of type `dtype`, rounded to nearest even where they are not of it already; `None` of integers with
    /// scales.
    pub(crate) fn to_bytes(&self, dtype: ComputeDtype) -> Option<Cow<'_, [u8]>> {
        let values = match (self, dtype) {
            (MatrixPart::Stored { dtype: FloatDtype::F32, bytes }, ComputeDtype::F32)
            | (MatrixPart::Stored { dtype: FloatDtype::Bf16, bytes }, ComputeDtype::Bf16) => {
                return Some(Cow::Borrowed(bytes));
            }
            (MatrixPart::Stored { dtype, bytes }, _) => Cow::Owned(dtype.widen(bytes)),
            (MatrixPart::F32(values), _) => Cow::Borrowed(values.as_slice()),
            (MatrixPart::Quantized(_), _) => return None,
        };
        Some(Cow::Owned(match dtype {
            ComputeDtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            ComputeDtype::Bf16 => values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
        }))
    }
}

/// Some heads in the columns of a wider matrix: heads `first_head..first_head + num_heads` of each row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadRange {
    /// First head.
    pub first_head: usize,
    /// How many.
    pub num_heads: usize,
}

/// The fused q, k, v product of one step and how its heads lie: `[num_rows, q heads | k heads | v heads]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QkvHeads {
    /// Queries.
    pub q: HeadRange,
    /// Keys.
    pub k: HeadRange,
    /// Values.
    pub v: HeadRange,
}

impl QkvHeads {
    /// Of a model.
    pub fn of(spec: &ModelSpec) -> Self {
        let (q, kv) = (spec.num_heads, spec.num_kv_heads);
        Self {
            q: HeadRange { first_head: 0, num_heads: q },
            k: HeadRange { first_head: q, num_heads: kv },
            v: HeadRange { first_head: q + kv, num_heads: kv },
        }
    }
}

/// Operations of the decoder on one kind of processor.
pub trait Backend: Clone {
    /// In which order a granule of its pool is.
    const GRANULE_ORDER: GranuleOrder;

    /// A packed weight matrix `[rows, cols]`.
    type Matrix: Send + Sync;
    /// A vector of weights: a norm, a bias.
    type Vector: Send + Sync;
    /// Cosines and sines of all positions.
    type Rope: Send + Sync;
    /// Activations `[num_rows, width]`.
    type Tensor: Default + Send;
    /// The tokens that a step draws, or where they will be, and memory for the next ones; nothing by default.
    type Drawn: Default;

    /// How large a matrix is.
    fn matrix_sizes(matrix: &Self::Matrix) -> MatrixSizes;

    /// Bytes of a vector.
    fn vector_bytes(vector: &Self::Vector) -> u64;

    /// Packs a matrix of stacked parts, which may be stored differently, for products in `dtype`; `cols` is its input
    /// width.
    ///
    /// # Errors
    /// What a device says, for example that it has not as much memory. A CPU never refuses.
    fn matrix(&self, dtype: ComputeDtype, cols: usize, parts: Vec<MatrixPart<'_>>)
    -> Result<Self::Matrix, DeviceError>;

    /// Takes a vector.
    ///
    /// # Errors
    /// As [`matrix`](Self::matrix).
    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector, DeviceError>;

    /// Takes a table of angles.
    ///
    /// # Errors
    /// As [`matrix`](Self::matrix).
    fn rope_table(&self, angles: RopeAngles) -> Result<Self::Rope, DeviceError>;

    /// Copies activations to the host.
    fn read_back(&self, tensor: &Self::Tensor) -> Vec<f32>;

    /// Rows of the embedding table `[vocab, width]`, which may be the output projection: `out` `[tokens.len(), width]`.
    fn embed(&self, table: &Self::Matrix, width: usize, tokens: &[u32], out: &mut Self::Tensor);

    /// `out` = the given rows of `x` `[_, width]`.
    fn gather(&self, x: &Self::Tensor, width: usize, rows: &[usize], out: &mut Self::Tensor);

    /// `out` = rows of `x`, each divided by its root mean square, times `weight`.
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Vector, eps: f32, out: &mut Self::Tensor);

    /// `out` = `x` times the transpose of `weight`, plus `bias`.
    fn matmul(&self, x: &Self::Tensor, weight: &Self::Matrix, bias: Option<&Self::Vector>, out: &mut Self::Tensor);

    /// `out` += `x` times the transpose of `weight`, plus `bias`: the residual stream.
    fn matmul_residual(
        &self,
        x: &Self::Tensor,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        out: &mut Self::Tensor,
    );

    /// Causal attention of every row over the pool, in a window if set: `out` `[num_rows, q heads * head_dim]`.
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        pool: &KvPool,
        layer: usize,
        qkv: &Self::Tensor,
        heads: &QkvHeads,
        plan: &StepPlan,
        window: Option<u32>,
        out: &mut Self::Tensor,
    );

    /// `out` `[_, ffn]` = silu(gate) * up, from rows of gate and up side by side.
    fn silu_mul(&self, gate_up: &Self::Tensor, ffn: usize, out: &mut Self::Tensor);

    /// Draws a token into `out` for each entry of `samples`; entry i has row `logit_rows[i]` of `logits` `[_, vocab]`.
    /// What `out` held is gone, its memory may be used again.
    fn sample(
        &self,
        logits: &Self::Tensor,
        vocab: usize,
        logit_rows: &[usize],
        samples: &[SampleRow],
        out: &mut Self::Drawn,
    );

    /// Whether [`gather`](Self::gather) and [`attention`](Self::attention) take some rows of a step, with a plan of
    /// these alone: then what nobody samples is left out behind the last layer's KV.
    fn takes_some_rows(&self) -> bool {
        false
    }

    /// Norm, q, k and v with their biases and norms, rotation, and k and v into the pool. `qkv` holds the
    /// rotated q afterwards, as [`attention`](Self::attention) wants it.
    #[allow(clippy::too_many_arguments)]
    fn norm_qkv_rope_write(
        &self,
        spec: &ModelSpec,
        layer: usize,
        weights: &AttentionWeights<Self>,
        table: &Self::Rope,
        pool: &KvPool,
        plan: &StepPlan,
        hidden: &Self::Tensor,
        normed: &mut Self::Tensor,
        qkv: &mut Self::Tensor,
    );

    /// Norm, gate and up, and their product: `out` `[_, ffn]`.
    fn norm_gate_up_act(
        &self,
        spec: &ModelSpec,
        weights: &MlpWeights<Self>,
        hidden: &Self::Tensor,
        normed: &mut Self::Tensor,
        gate_up: &mut Self::Tensor,
        out: &mut Self::Tensor,
    ) {
        self.rms_norm(hidden, &weights.norm, spec.rms_norm_eps, normed);
        self.matmul(normed, &weights.gate_up, weights.gate_up_bias.as_ref(), gate_up);
        self.silu_mul(gate_up, spec.intermediate_size, out);
    }

    /// The feed-forward half of a layer: `hidden` += down(silu(gate) * up) of its norm. Of the other tensors a backend
    /// uses what it needs.
    fn feed_forward(
        &self,
        spec: &ModelSpec,
        weights: &MlpWeights<Self>,
        hidden: &mut Self::Tensor,
        normed: &mut Self::Tensor,
        gate_up: &mut Self::Tensor,
        gated: &mut Self::Tensor,
    ) {
        self.norm_gate_up_act(spec, weights, hidden, normed, gate_up, gated);
        self.matmul_residual(gated, &weights.down, weights.down_bias.as_ref(), hidden);
    }

    /// The final norm and the output projection of the given rows: `logits` `[rows.len(), vocab]`.
    #[allow(clippy::too_many_arguments)]
    fn norm_logits(
        &self,
        spec: &ModelSpec,
        norm: &Self::Vector,
        head: &Self::Matrix,
        hidden: &Self::Tensor,
        rows: &[usize],
        gathered: &mut Self::Tensor,
        normed: &mut Self::Tensor,
        logits: &mut Self::Tensor,
    ) {
        self.gather(hidden, spec.hidden_size, rows, gathered);
        self.rms_norm(gathered, norm, spec.rms_norm_eps, normed);
        self.matmul(normed, head, None, logits);
    }
}
