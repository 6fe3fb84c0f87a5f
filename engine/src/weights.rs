//! A model's weights as a backend holds them, and where each comes from in a checkpoint.
//!
//! A tensor that is quantized in the checkpoint stays so; the others become the type that is computed in. Names are
//! those of Transformers: `model.layers.0.self_attn.q_proj.weight` and so on, for every family.
//! q, k and v are stacked into one matrix, gate and up into another.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::backend::{Backend, MatrixPart};
use crate::checkpoint::{Checkpoint, CheckpointTensor};
use crate::load_progress::LoadProgress;
use crate::model::LoadError;
use crate::spec::ModelSpec;

/// Embedding table, of every family.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// What weights and activations are computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ComputeDtype {
    /// f32 weights, f32 KV.
    F32,
    /// bf16 weights, activations rounded to bf16 as operands, f32 sums, bf16 KV. Quantized weights have products of
    /// their own.
    Bf16,
}

impl ComputeDtype {
    /// As `--dtype` names it.
    pub fn as_str(self) -> &'static str {
        match self {
            ComputeDtype::F32 => "float32",
            ComputeDtype::Bf16 => "bfloat16",
        }
    }
}

/// All weights of a model.
pub struct Weights<B: Backend> {
    /// Embedding table, if it is not the output projection.
    pub own_embedding: Option<B::Matrix>,
    /// Layers, first to last.
    pub layers: Vec<LayerWeights<B>>,
    /// Norm before the output projection.
    pub norm: B::Vector,
    /// Output projection, and where the two are tied the embedding table.
    pub head: B::Matrix,
}

/// One transformer layer.
pub struct LayerWeights<B: Backend> {
    /// Attention.
    pub attention: AttentionWeights<B>,
    /// Feed-forward.
    pub mlp: MlpWeights<B>,
}

/// The attention half of a layer.
pub struct AttentionWeights<B: Backend> {
    /// Norm before it.
    pub norm: B::Vector,
    /// q, k, v stacked: `[qkv_width, hidden]`.
    pub qkv: B::Matrix,
    /// Their biases, stacked alike.
    pub qkv_bias: Option<B::Vector>,
    /// Norms on the heads of q and of k.
    pub qk_norm: Option<(B::Vector, B::Vector)>,
    /// Output projection `[hidden, num_heads * head_dim]`.
    pub output: B::Matrix,
    /// Its bias.
    pub output_bias: Option<B::Vector>,
}

/// The feed-forward half of a layer.
pub struct MlpWeights<B: Backend> {
    /// Norm before it.
    pub norm: B::Vector,
    /// Gate and up stacked: `[2 * ffn, hidden]`.
    pub gate_up: B::Matrix,
    /// Their biases, stacked alike.
    pub gate_up_bias: Option<B::Vector>,
    /// Down projection `[hidden, ffn]`.
    pub down: B::Matrix,
    /// Its bias.
    pub down_bias: Option<B::Vector>,
}

impl<B: Backend> Weights<B> {
    /// Loads everything `spec` asks for, on `num_threads` threads that take a layer each at a time, and tells `progress`
    /// of each matrix.
    ///
    /// # Errors
    /// A tensor that is missing, misshapen or of an unknown type: of several, that of the first layer. Or what the device
    /// says that they are put on.
    ///
    /// # Panics
    /// If the system refuses a thread.
    pub fn load(
        backend: &B,
        spec: &ModelSpec,
        checkpoint: &Checkpoint,
        dtype: ComputeDtype,
        num_threads: usize,
        progress: &LoadProgress,
    ) -> Result<Self, LoadError>
    where
        B: Sync,
    {
        let loader = Loader { backend, checkpoint, dtype, progress };
        let slots: Vec<OnceLock<Result<LayerWeights<B>, LoadError>>> =
            (0..spec.num_layers()).map(|_| OnceLock::new()).collect();
        let (next, has_failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let load_layers = || {
            while !has_failed.load(Ordering::Relaxed)
                && let layer = next.fetch_add(1, Ordering::Relaxed)
                && let Some(slot) = slots.get(layer)
            {
                let loaded = slot.get_or_init(|| loader.layer(spec, layer));
                has_failed.fetch_or(loaded.is_err(), Ordering::Relaxed);
            }
        };
        // The table and the head are loaded by this thread, meanwhile.
        let ends = std::thread::scope(|scope| {
            for _ in 1..num_threads {
                scope.spawn(load_layers);
            }
            let ends = loader.ends(spec);
            has_failed.fetch_or(ends.is_err(), Ordering::Relaxed);
            load_layers();
            ends
        });
        // A layer behind one that failed may be missing; the failure comes before it.
        let layers = slots.into_iter().map_while(OnceLock::into_inner).collect::<Result<_, _>>()?;
        let (own_embedding, norm, head) = ends?;
        Ok(Self { own_embedding, layers, norm, head })
    }

    /// Embedding table `[vocab, hidden]`.
    pub fn embedding(&self) -> &B::Matrix {
        self.own_embedding.as_ref().unwrap_or(&self.head)
    }
}

/// A matrix as a checkpoint has it: the tensors that are stacked, each with its rows, and the width of all.
pub(crate) struct Stacked {
    pub(crate) cols: usize,
    pub(crate) parts: Vec<(String, usize)>,
}

impl Stacked {
    /// All of a model.
    pub(crate) fn all(spec: &ModelSpec) -> impl Iterator<Item = Self> {
        let layers = (0..spec.num_layers()).flat_map(|layer| Self::of_layer(spec, layer));
        let head = (!spec.is_tied).then(|| Self::head(spec));
        layers.chain([Self::table(spec)]).chain(head)
    }

    pub(crate) fn table(spec: &ModelSpec) -> Self {
        Self { cols: spec.hidden_size, parts: vec![(EMBEDDING.to_string(), spec.vocab_size)] }
    }

    fn head(spec: &ModelSpec) -> Self {
        Self { cols: spec.hidden_size, parts: vec![("lm_head.weight".to_string(), spec.vocab_size)] }
    }

    /// q, k, v; the output of attention; gate and up; down.
    fn of_layer(spec: &ModelSpec, layer: usize) -> [Self; 4] {
        let (hidden, ffn) = (spec.hidden_size, spec.intermediate_size);
        let (q, kv) = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
        let stacked = |cols: usize, parts: &[(&str, usize)]| {
            let named = |(part, rows): &(&str, usize)| (format!("model.layers.{layer}.{part}.weight"), *rows);
            Self { cols, parts: parts.iter().map(named).collect() }
        };
        [
            stacked(hidden, &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)]),
            stacked(q, &[("self_attn.o_proj", hidden)]),
            stacked(hidden, &[("mlp.gate_proj", ffn), ("mlp.up_proj", ffn)]),
            stacked(ffn, &[("mlp.down_proj", hidden)]),
        ]
    }
}

struct Loader<'a, B> {
    backend: &'a B,
    checkpoint: &'a Checkpoint,
    dtype: ComputeDtype,
    progress: &'a LoadProgress,
}

impl<B: Backend> Loader<'_, B> {
    /// Embedding table, last norm, output projection.
    #[allow(clippy::type_complexity)] // one caller, which takes it apart
    fn ends(&self, spec: &ModelSpec) -> Result<(Option<B::Matrix>, B::Vector, B::Matrix), LoadError> {
        let table = self.matrix(&Stacked::table(spec))?;
        let (table, head) = match spec.is_tied {
            true => (None, table),
            false => (Some(table), self.matrix(&Stacked::head(spec))?),
        };
        Ok((table, self.vector("model.norm.weight", spec.hidden_size)?, head))
    }

    fn layer(&self, spec: &ModelSpec, layer: usize) -> Result<LayerWeights<B>, LoadError> {
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        let (hidden, ffn, head_dim) = (spec.hidden_size, spec.intermediate_size, spec.head_dim);
        let (q, kv) = (spec.num_heads * head_dim, spec.num_kv_heads * head_dim);
        let [qkv, output, gate_up, down] = Stacked::of_layer(spec, layer);
        let bias = |part: &str, rows: usize| (name(&format!("{part}.bias")), rows);
        let attention = AttentionWeights {
            norm: self.vector(&name("input_layernorm.weight"), hidden)?,
            qkv: self.matrix(&qkv)?,
            qkv_bias: self.biases(
                spec.has_qkv_bias,
                &[bias("self_attn.q_proj", q), bias("self_attn.k_proj", kv), bias("self_attn.v_proj", kv)],
            )?,
            qk_norm: match spec.has_qk_norm {
                true => Some((
                    self.vector(&name("self_attn.q_norm.weight"), head_dim)?,
                    self.vector(&name("self_attn.k_norm.weight"), head_dim)?,
                )),
                false => None,
            },
            output: self.matrix(&output)?,
            output_bias: self.biases(spec.has_output_bias, &[bias("self_attn.o_proj", hidden)])?,
        };
        let mlp = MlpWeights {
            norm: self.vector(&name("post_attention_layernorm.weight"), hidden)?,
            gate_up: self.matrix(&gate_up)?,
            gate_up_bias: self.biases(spec.has_mlp_bias, &[bias("mlp.gate_proj", ffn), bias("mlp.up_proj", ffn)])?,
            down: self.matrix(&down)?,
            down_bias: self.biases(spec.has_mlp_bias, &[bias("mlp.down_proj", hidden)])?,
        };
        Ok(LayerWeights { attention, mlp })
    }

    fn matrix(&self, Stacked { cols, parts }: &Stacked) -> Result<B::Matrix, LoadError> {
        let tensors = parts.iter().map(|(name, rows)| self.checkpoint.tensor(name, &[*rows, *cols]));
        let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        let matrix = self.backend.matrix(self.dtype, *cols, tensors.iter().map(part).collect())?;
        self.progress.add(tensors.iter().map(CheckpointTensor::num_bytes).sum());
        Ok(matrix)
    }

    /// Norms and biases stay f32: they cost nothing, and rounding them would.
    fn vector(&self, name: &str, len: usize) -> Result<B::Vector, LoadError> {
        Ok(self.backend.vector(self.values(name, len)?)?)
    }

    fn biases(&self, is_there: bool, parts: &[(String, usize)]) -> Result<Option<B::Vector>, LoadError> {
        if !is_there {
            return Ok(None);
        }
        let mut values = Vec::new();
        for (name, len) in parts {
            values.extend(self.values(name, *len)?);
        }
        Ok(Some(self.backend.vector(values)?))
    }

    fn values(&self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        Ok(self.checkpoint.tensor(name, &[len])?.to_f32())
    }
}

/// What a backend packs of a tensor; numbers stay where they are in the file as long as their order is that of the
/// file.
fn part<'a>(tensor: &CheckpointTensor<'a>) -> MatrixPart<'a> {
    if let Some(quantized) = tensor.to_quantized() {
        return MatrixPart::Quantized(quantized);
    }
    match tensor.stored() {
        Some((dtype, bytes)) => MatrixPart::Stored { dtype, bytes },
        None => MatrixPart::F32(tensor.to_f32()),
    }
}
