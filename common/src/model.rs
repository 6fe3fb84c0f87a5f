//! Three things that must not be confused: which model it is, how its KV is represented, how a node
//! lays it out.
//!
//! [`ModelIdentity`] must match between nodes, or the hello is refused. [`Representation`] is a tag
//! beside the content key: nodes of different ones exchange KV only where [`KvExchange`] says so, and then the tag
//! says that what a pool holds may have been converted. Layout (block size, order inside a granule) is nobody's
//! identity and does not appear in either; it is told in the hello, and who receives converts.

use std::fmt;

use bincode::{Decode, Encode};
use clap::ValueEnum;

use crate::content::hex;
use crate::kv_spec::{GranuleOrder, KvDtype, KvSpec};

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
/// weight format and KV representation, joined by `/` (for example `cpu-fold-2/tp1/bf16/kv-bf16`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode)]
pub struct NumericsId(pub String);

/// What the arithmetic of a simulated model begins with, and no other.
const SIMULATED: &str = "sim-";

impl NumericsId {
    /// `arithmetic` over KV of this type.
    pub fn new(arithmetic: &str, kv: KvDtype) -> Self {
        Self(format!("{arithmetic}/kv-{}", kv.as_str()))
    }

    /// The same where attention over KV of this type adds up in another order than the rest of `arithmetic`.
    pub fn with_attention(arithmetic: &str, kv: KvDtype, attention: &str) -> Self {
        Self(format!("{arithmetic}/kv-{}-by-{attention}", kv.as_str()))
    }

    /// Whether nothing is computed: tokens are made up by the `sim` runner.
    pub fn is_simulated(&self) -> bool {
        self.0.starts_with(SIMULATED)
    }

    /// What it says without the KV.
    pub fn arithmetic(&self) -> &str {
        self.0.rsplit_once("/kv-").map_or(&self.0, |(arithmetic, _)| arithmetic)
    }
}

impl fmt::Display for NumericsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How KV values are represented: dtype and scales, numerics id, codec history. Two blocks of the same
/// content and different representation are different blocks.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode)]
pub struct Representation(pub String);

impl Representation {
    /// KV of this type, computed here within `numerics` or taken from whom `exchange` admits.
    pub fn new(kv: KvDtype, numerics: &NumericsId, exchange: KvExchange) -> Self {
        let history = match exchange {
            KvExchange::Same => "",
            KvExchange::Dtypes => "/from-any-dtype",
            KvExchange::Numerics => "/from-any-numerics",
        };
        Self(format!("{}/{numerics}{history}", kv.as_str()))
    }
}

impl fmt::Display for Representation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// With whom a node exchanges KV of the same model.
///
/// KV that was converted, or computed by other arithmetic, is kept and found like any other. So both ends of an
/// exchange must have the same setting, and it is part of the [`Representation`] of all that they store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Encode, Decode, ValueEnum)]
pub enum KvExchange {
    /// With nodes of the same numerics id only: the same tokens give the same bits on all of them.
    #[default]
    Same,
    /// Also with nodes that keep KV in another type and compute alike otherwise. f32 is rounded to bf16 as it arrives;
    /// bf16 becomes f32 exactly.
    Dtypes,
    /// Also with nodes of other arithmetic: other kernels, other weight formats of the same checkpoint.
    Numerics,
}

impl fmt::Display for KvExchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value().expect("no variant is hidden");
        f.write_str(value.get_name())
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
    /// With whom KV may be exchanged.
    pub exchange: KvExchange,
    /// How granules lie in this node's pool; who receives KV from here reorders it if its own lie otherwise.
    pub granule_order: GranuleOrder,
    /// Tokens per block of this node's pool: what is a block to whoever follows this node's block events. KV travels
    /// in granules, whatever the block sizes.
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
    /// Different ideas of whom KV may be exchanged with.
    #[error("this node is set to --kv-exchange {ours}, the other end to {theirs}: set the same on both")]
    Exchange {
        /// Ours.
        ours: KvExchange,
        /// Theirs.
        theirs: KvExchange,
    },
    /// Different arithmetic; the same prompt would give other bits.
    #[error(
        "this node computes with numerics {ours}, the other end with {theirs}: KV is only exchanged within one numerics id: set the same --device and --cpu-isa on both, or --kv-exchange numerics on both to exchange it nevertheless"
    )]
    Numerics {
        /// Ours.
        ours: NumericsId,
        /// Theirs.
        theirs: NumericsId,
    },
    /// Different KV values.
    #[error(
        "this node keeps KV as {ours}, the other end as {theirs}: set the same --kv-cache-dtype on both, or --kv-exchange dtypes to have it converted"
    )]
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
    /// Whether KV may be exchanged with a node that announced `other`. Where layout or type differ, what arrives is
    /// converted.
    ///
    /// # Errors
    /// The first mismatch, in the order identity, setting, arithmetic, representation, shape.
    pub fn check_compatible(&self, other: &ModelInfo) -> Result<(), ModelMismatch> {
        if self.identity != other.identity {
            return Err(ModelMismatch::Identity { ours: self.identity, theirs: other.identity });
        }
        if self.exchange != other.exchange {
            return Err(ModelMismatch::Exchange { ours: self.exchange, theirs: other.exchange });
        }
        // First, since its sentence says more than that of the representation, which it is part of.
        let is_other = self.numerics.arithmetic() != other.numerics.arithmetic();
        if self.exchange != KvExchange::Numerics && is_other {
            return Err(ModelMismatch::Numerics { ours: self.numerics.clone(), theirs: other.numerics.clone() });
        }
        if self.exchange == KvExchange::Same && self.representation != other.representation {
            let (ours, theirs) = (self.representation.clone(), other.representation.clone());
            return Err(ModelMismatch::Representation { ours, theirs });
        }
        if self.exchange == KvExchange::Same && self.numerics != other.numerics {
            return Err(ModelMismatch::Numerics { ours: self.numerics.clone(), theirs: other.numerics.clone() });
        }
        let fits = match self.exchange {
            KvExchange::Same => self.kv_spec == other.kv_spec,
            KvExchange::Dtypes | KvExchange::Numerics => self.kv_spec.has_shape_of(&other.kv_spec),
        };
        if !fits {
            let (ours, theirs) = (self.kv_spec.bytes_per_token(), other.kv_spec.bytes_per_token());
            return Err(ModelMismatch::KvSpec { ours, theirs });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(arithmetic: &str, kv: KvDtype, exchange: KvExchange) -> ModelInfo {
        let numerics = NumericsId::new(arithmetic, kv);
        ModelInfo {
            identity: ModelIdentity([1; 32]),
            representation: Representation::new(kv, &numerics, exchange),
            numerics,
            kv_spec: KvSpec::uniform(2, 2, 8, kv, None),
            vocab_size: 100,
            max_model_len: 100,
            exchange,
            granule_order: GranuleOrder::Lanes,
            block_size: 16,
            num_blocks: 10,
        }
    }

    fn refusal(ours: &ModelInfo, theirs: &ModelInfo) -> Option<String> {
        ours.check_compatible(theirs).err().map(|mismatch| mismatch.to_string())
    }

    #[test]
    fn layout_is_no_reason_to_refuse() {
        let ours = node("cpu/tp1", KvDtype::Bf16, KvExchange::Same);
        let theirs = ModelInfo { block_size: 64, num_blocks: 3, granule_order: GranuleOrder::Rows, ..ours.clone() };
        assert_eq!(refusal(&ours, &theirs), None);
    }

    #[test]
    fn other_types_of_kv_are_refused_unless_both_ends_are_set_to_convert() {
        let of = |kv, exchange| node("cpu/tp1/f32", kv, exchange);
        let (f32, bf16) = (of(KvDtype::F32, KvExchange::Same), of(KvDtype::Bf16, KvExchange::Same));
        let sentence = refusal(&f32, &bf16).unwrap();
        assert!(sentence.contains("f32/cpu/tp1/f32/kv-f32"), "{sentence}");
        assert!(sentence.contains("bf16/cpu/tp1/f32/kv-bf16"), "{sentence}");
        assert!(sentence.contains("--kv-exchange dtypes"), "{sentence}");
        for exchange in [KvExchange::Dtypes, KvExchange::Numerics] {
            let (f32_set, bf16_set) = (of(KvDtype::F32, exchange), of(KvDtype::Bf16, exchange));
            assert_eq!(refusal(&f32_set, &bf16_set), None);
            assert_eq!(refusal(&bf16_set, &f32_set), None);
            let sentence = refusal(&f32_set, &f32).unwrap();
            let named = format!("--kv-exchange {exchange}, the other end to same");
            assert!(sentence.contains(&named), "{sentence}");
        }
        let (dtypes, numerics) = (of(KvDtype::F32, KvExchange::Dtypes), of(KvDtype::F32, KvExchange::Numerics));
        assert!(refusal(&dtypes, &numerics).is_some(), "one of them may hold what the other does not take");
    }

    #[test]
    fn other_arithmetic_is_refused_unless_both_ends_take_it() {
        let of = |arithmetic, exchange| node(arithmetic, KvDtype::Bf16, exchange);
        for exchange in [KvExchange::Same, KvExchange::Dtypes] {
            let sentence = refusal(&of("cpu/tp1", exchange), &of("cuda/tp1", exchange)).unwrap();
            assert!(sentence.contains("cpu/tp1/kv-bf16") && sentence.contains("cuda/tp1/kv-bf16"), "{sentence}");
            assert!(sentence.contains("--cpu-isa on both"), "{sentence}");
        }
        let taken = KvExchange::Numerics;
        assert_eq!(refusal(&of("cpu/tp1", taken), &of("cuda/tp1", taken)), None);
    }

    #[test]
    fn another_shape_or_model_is_refused_whatever_the_setting() {
        for exchange in [KvExchange::Same, KvExchange::Dtypes, KvExchange::Numerics] {
            let ours = node("cpu", KvDtype::F32, exchange);
            let shape = ModelInfo { kv_spec: KvSpec::uniform(2, 4, 8, KvDtype::F32, None), ..ours.clone() };
            assert!(refusal(&ours, &shape).unwrap().contains("256 against 512 bytes per token"));
            let model = ModelInfo { identity: ModelIdentity([2; 32]), ..ours.clone() };
            assert!(refusal(&ours, &model).unwrap().contains("0202020202020202"));
        }
    }

    #[test]
    fn only_what_the_simulator_makes_counts_as_simulated() {
        let is_simulated = |arithmetic| NumericsId::new(arithmetic, KvDtype::Bf16).is_simulated();
        assert_eq!(["sim-3", "cpu-fold-2/tp1/bf16", "similar"].map(is_simulated), [true, false, false]);
    }

    #[test]
    fn what_may_have_been_converted_has_a_tag_of_its_own() {
        let numerics = NumericsId::new("cpu-fold-2/tp1/f32", KvDtype::Bf16);
        assert_eq!(numerics.0, "cpu-fold-2/tp1/f32/kv-bf16");
        assert_eq!(numerics.arithmetic(), "cpu-fold-2/tp1/f32");
        let other = NumericsId::with_attention("cpu-fold-2/tp1/f32", KvDtype::Bf16, "cpu-tiles-2");
        assert_eq!((other.arithmetic(), other == numerics), (numerics.arithmetic(), false));
        let tag = |exchange| Representation::new(KvDtype::Bf16, &numerics, exchange).0;
        assert_eq!(tag(KvExchange::Same), "bf16/cpu-fold-2/tp1/f32/kv-bf16");
        assert_ne!(tag(KvExchange::Dtypes), tag(KvExchange::Same));
        assert_ne!(tag(KvExchange::Dtypes), tag(KvExchange::Numerics));
    }
}
