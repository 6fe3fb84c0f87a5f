//! How much memory weights take, and how many of them a step multiplies with: for the report at start and for the
//! limits that speeds are held against.

use std::ops::{Add, AddAssign};

use crate::backend::Backend;
use crate::weights::Weights;

/// Of some matrices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MatrixSizes {
    /// Bytes in memory, padding included: what a step reads of them.
    pub num_bytes: u64,
    /// Weights that are multiplied as f32 or bf16.
    pub num_float_weights: u64,
    /// Weights that are multiplied as integers.
    pub num_quantized_weights: u64,
}

impl Add for MatrixSizes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            num_bytes: self.num_bytes + other.num_bytes,
            num_float_weights: self.num_float_weights + other.num_float_weights,
            num_quantized_weights: self.num_quantized_weights + other.num_quantized_weights,
        }
    }
}

impl AddAssign for MatrixSizes {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// Of a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightSizes {
    /// What k and v of the last layer need: all layers before it, and its q, k and v.
    pub up_to_last_kv: MatrixSizes,
    /// The rest of the last layer, which only sampled rows go through.
    pub behind_last_kv: MatrixSizes,
    /// The output projection.
    pub head: MatrixSizes,
    /// Bytes of the embedding table, of which a step reads some rows; 0 where it is the output projection.
    pub table_bytes: u64,
    /// Bytes of norms and biases.
    pub vector_bytes: u64,
}

impl WeightSizes {
    /// Everything in memory.
    pub fn num_bytes(&self) -> u64 {
        let matrices = self.up_to_last_kv + self.behind_last_kv + self.head;
        matrices.num_bytes + self.table_bytes + self.vector_bytes
    }
}

impl<B: Backend> Weights<B> {
    /// How large they are.
    pub fn sizes(&self) -> WeightSizes {
        let mut sizes = WeightSizes::default();
        let bytes = B::vector_bytes;
        let optional = |vector: &Option<B::Vector>| vector.as_ref().map_or(0, bytes);
        sizes.vector_bytes = bytes(&self.norm);
        for (index, layer) in self.layers.iter().enumerate() {
            let (attention, mlp) = (&layer.attention, &layer.mlp);
            let rest = [&attention.output, &mlp.gate_up, &mlp.down];
            let rest = rest.into_iter().map(B::matrix_sizes).fold(MatrixSizes::default(), Add::add);
            sizes.up_to_last_kv += B::matrix_sizes(&attention.qkv);
            match index + 1 == self.layers.len() {
                true => sizes.behind_last_kv += rest,
                false => sizes.up_to_last_kv += rest,
            }
            sizes.vector_bytes += bytes(&attention.norm) + bytes(&mlp.norm);
            sizes.vector_bytes += attention.qk_norm.as_ref().map_or(0, |(q, k)| bytes(q) + bytes(k));
            sizes.vector_bytes += optional(&attention.qkv_bias) + optional(&attention.output_bias);
            sizes.vector_bytes += optional(&mlp.gate_up_bias) + optional(&mlp.down_bias);
        }
        sizes.head = B::matrix_sizes(&self.head);
        sizes.table_bytes = self.own_embedding.as_ref().map_or(0, |table| B::matrix_sizes(table).num_bytes);
        sizes
    }
}
