//! Three things that must not be confused: which model it is, how its KV is represented, how a node
//! lays it out.
//!
//! [`ModelIdentity`] must match between nodes, or the hello is refused. [`Representation`] is a tag
//! beside the content key that a lookup states it accepts. Layout (block size, pool order) is nobody's
//! identity and does not appear in either.

use std::fmt;

use bincode::{Decode, Encode};

use crate::content::hex;
use crate::kv_spec::KvSpec;

/// Digest of the weights, of the config fields that change KV, and of the quantization.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
pub struct ModelIdentity(pub [u8; 32]);

impl fmt::Display for ModelIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0[..8]))
    }
}

impl fmt::Debug for ModelIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Within one numerics id, the same tokens give the same bits: kernel family, tensor-parallel degree,
/// weight format and KV representation, joined by `/` (for example `cpu-fold-1/tp1/bf16/kv-bf16`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode)]
pub struct NumericsId(pub String);

impl fmt::Display for NumericsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How KV values are represented: dtype and scales, numerics id, codec history. Two blocks of the same
/// content and different representation are different blocks.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode)]
pub struct Representation(pub String);

impl fmt::Display for Representation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a node announces about its model in the hello.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ModelInfo {
    /// Which model.
    pub identity: ModelIdentity,
    /// Which arithmetic.
    pub numerics: NumericsId,
    /// Which KV values.
    pub representation: Representation,
    /// The shape of its KV.
    pub kv_spec: KvSpec,
    /// Tokens in the vocabulary, the logits' width.
    pub vocab_size: u32,
    /// Longest sequence, prompt and answer together, in tokens.
    pub max_model_len: u32,
    /// Tokens per block of this node's pool; informative (layout is negotiated, not identity).
    pub block_size: u32,
    /// Blocks in this node's pool.
    pub num_blocks: u32,
}

/// Why two nodes cannot exchange KV. Each names both values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelMismatch {
    /// Different weights or configuration.
    #[error(
        "this node serves model {ours}, the other end serves model {theirs}: start both with the same checkpoint and --dtype"
    )]
    Identity {
        /// Ours.
        ours: ModelIdentity,
        /// Theirs.
        theirs: ModelIdentity,
    },
    /// Different arithmetic; the same prompt would give other bits.
    #[error(
        "this node computes with numerics {ours}, the other end with {theirs}: KV is only exchanged within one numerics id"
    )]
    Numerics {
        /// Ours.
        ours: NumericsId,
        /// Theirs.
        theirs: NumericsId,
    },
    /// Different KV values.
    #[error("this node keeps KV as {ours}, the other end as {theirs}: set the same KV dtype on both")]
    Representation {
        /// Ours.
        ours: Representation,
        /// Theirs.
        theirs: Representation,
    },
    /// Different KV shape (an identical identity with this is a bug in one of the builds).
    #[error(
        "the two ends disagree on the shape of the KV cache ({ours} against {theirs} bytes per token): run the same Tandem version on both"
    )]
    KvSpec {
        /// Our bytes per token.
        ours: u64,
        /// Their bytes per token.
        theirs: u64,
    },
}

impl ModelInfo {
    /// Whether KV may be exchanged with a node that announced `other`.
    ///
    /// # Errors
    /// The first mismatch, in the order identity, representation, numerics, shape.
    pub fn check_compatible(&self, other: &ModelInfo) -> Result<(), ModelMismatch> {
        if self.identity != other.identity {
            return Err(ModelMismatch::Identity { ours: self.identity, theirs: other.identity });
        }
        if self.representation != other.representation {
            let (ours, theirs) = (self.representation.clone(), other.representation.clone());
            return Err(ModelMismatch::Representation { ours, theirs });
        }
        if self.numerics != other.numerics {
            return Err(ModelMismatch::Numerics { ours: self.numerics.clone(), theirs: other.numerics.clone() });
        }
        if self.kv_spec != other.kv_spec {
            let (ours, theirs) = (self.kv_spec.bytes_per_token(), other.kv_spec.bytes_per_token());
            return Err(ModelMismatch::KvSpec { ours, theirs });
        }
        Ok(())
    }
}
