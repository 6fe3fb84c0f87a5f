//! The shape of a model's KV cache, without assuming that all layers look alike.
//!
//! Layers are gathered in groups of equal shape. A group has planes (K and V are two; MLA's latent and
//! rope part would be one group with its own planes), is kept per token or per sequence (a recurrent
//! state), and may be limited to a window.

use bincode::{Decode, Encode};

/// Element type of a plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
pub enum KvDtype {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
}

impl KvDtype {
    /// Bytes of one element.
    pub fn num_bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::Bf16 => 2,
        }
    }

    /// Name in numerics and representation ids.
    pub fn as_str(self) -> &'static str {
        match self {
            KvDtype::F32 => "f32",
            KvDtype::Bf16 => "bf16",
        }
    }
}

/// How the values of a head of a granule follow one another in a pool. A node's own business, told in the hello: where
/// two differ, the receiver reorders what arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Encode, Decode)]
pub enum GranuleOrder {
    /// What the CPU kernels read: in K tokens are next to one another, in V features.
    #[default]
    Lanes,
    /// `[16 tokens][head_dim]`, K and V alike: what the CUDA kernels read.
    Rows,
}

impl GranuleOrder {
    /// Name in logs and in the tags of stored entries.
    pub fn as_str(self) -> &'static str {
        match self {
            GranuleOrder::Lanes => "lanes",
            GranuleOrder::Rows => "rows",
        }
    }
}

/// One tensor that a group of layers keeps.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct KvPlane {
    /// `k`, `v`, ...
    pub name: String,
    /// KV heads.
    pub num_heads: u32,
    /// Features of a head.
    pub head_dim: u32,
    /// Element type.
    pub dtype: KvDtype,
    /// Bytes of scales beside the values of one head of one token; 0 without quantization.
    pub scale_bytes: u32,
}

impl KvPlane {
    /// Bytes that one token of one layer takes in this plane.
    pub fn bytes_per_token(&self) -> u64 {
        let per_head = u64::from(self.head_dim) * self.dtype.num_bytes() as u64 + u64::from(self.scale_bytes);
        u64::from(self.num_heads) * per_head
    }
}

/// Whether a group keeps something for each token or one state for the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum KvExtentKind {
    /// Attention: grows with the sequence.
    PerToken,
    /// Recurrent state: constant size.
    PerSequence,
}

/// Layers whose KV has the same shape.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct KvGroup {
    /// The model's layer numbers in this group, ascending.
    pub layers: Vec<u32>,
    /// What each of them keeps.
    pub planes: Vec<KvPlane>,
    /// Per token or per sequence.
    pub kind: KvExtentKind,
    /// Only the last `window` tokens are ever read, if set.
    pub window: Option<u32>,
}

/// The KV cache of a model.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct KvSpec {
    /// Groups; every layer is in exactly one.
    pub groups: Vec<KvGroup>,
}

impl KvSpec {
    /// The common case: `num_layers` layers that all keep K and V per token.
    pub fn uniform(num_layers: u32, num_kv_heads: u32, head_dim: u32, dtype: KvDtype, window: Option<u32>) -> Self {
        let plane =
            |name: &str| KvPlane { name: name.to_string(), num_heads: num_kv_heads, head_dim, dtype, scale_bytes: 0 };
        let layers = (0..num_layers).collect();
        let planes = vec![plane("k"), plane("v")];
        Self { groups: vec![KvGroup { layers, planes, kind: KvExtentKind::PerToken, window }] }
    }

    /// Whether `other` differs from this in the types of the values at most.
    pub fn has_shape_of(&self, other: &KvSpec) -> bool {
        let untyped = |spec: &KvSpec| {
            let mut spec = spec.clone();
            spec.groups.iter_mut().flat_map(|group| &mut group.planes).for_each(|plane| plane.dtype = KvDtype::F32);
            spec
        };
        untyped(self) == untyped(other)
    }

    /// Layers in all groups.
    pub fn num_layers(&self) -> u32 {
        self.groups.iter().map(|group| group.layers.len() as u32).sum()
    }

    /// Bytes that one more token takes over all layers.
    pub fn bytes_per_token(&self) -> u64 {
        self.groups
            .iter()
            .filter(|group| group.kind == KvExtentKind::PerToken)
            .map(|group| group.layers.len() as u64 * group.planes.iter().map(KvPlane::bytes_per_token).sum::<u64>())
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_per_token_counts_all_layers_planes_and_heads() {
        // Shape M of the benchmarks: 16 layers, 8 KV heads of 64, bf16: 32 KiB per token.
        assert_eq!(KvSpec::uniform(16, 8, 64, KvDtype::Bf16, None).bytes_per_token(), 32 * 1024);
    }

    #[test]
    fn shape_is_everything_but_the_types_of_the_values() {
        let spec = KvSpec::uniform(2, 8, 64, KvDtype::Bf16, None);
        assert!(spec.has_shape_of(&KvSpec::uniform(2, 8, 64, KvDtype::F32, None)));
        for other in [(3, 8, 64, None), (2, 4, 64, None), (2, 8, 32, None), (2, 8, 64, Some(7))] {
            let (layers, heads, dim, window) = other;
            assert!(!spec.has_shape_of(&KvSpec::uniform(layers, heads, dim, KvDtype::Bf16, window)), "{other:?}");
        }
    }
}
