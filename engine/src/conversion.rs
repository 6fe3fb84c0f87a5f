//! KV of a node whose pool has another order or type made into KV of this node's.

use std::sync::Arc;

use common::kv_memory::GranuleConversion;
use common::kv_spec::{GranuleOrder, KvDtype, KvPlane};
use common::model::ModelInfo;
use kernels::{GranuleFormat, convert_granules};

use crate::pool::uniform_plane;

struct Conversion {
    from: GranuleFormat,
    to: GranuleFormat,
}

impl GranuleConversion for Conversion {
    fn source_granule_bytes(&self) -> usize {
        self.from.granule_bytes()
    }

    fn convert(&self, source: &[u8], out: &mut [u8]) {
        convert_granules(&self.from, &self.to, source, out);
    }
}

/// KV of one node that cannot become KV of another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConversionError {
    /// The two pools have no values in common, or one keeps them as nobody here can.
    #[error(
        "KV kept as {from} ({from_planes}) cannot be made into {to} ({to_planes}): set the same --kv-cache-dtype on both nodes, and run the same Tandem version"
    )]
    Unlike {
        /// Representation of the node that sends.
        from: String,
        /// Its planes.
        from_planes: String,
        /// Representation of the node that receives.
        to: String,
        /// Its planes.
        to_planes: String,
    },
    /// Nobody knows what would arrive.
    #[error(
        "the other node announces no model, this one keeps KV as {to}: run a node of this cluster there, of the same Tandem version"
    )]
    NoModel {
        /// Representation of the node that receives.
        to: String,
    },
}

/// What makes KV of the pool of a node that announced `from` into KV of the pool that `to` announces. `None` if the
/// bytes of a granule are the same in both, whatever the block sizes.
///
/// # Errors
/// [`ConversionError::Unlike`]; never between nodes that may exchange KV ([`ModelInfo::check_compatible`]) and whose
/// pools are of this version.
pub fn conversion(from: &ModelInfo, to: &ModelInfo) -> Result<Option<Arc<dyn GranuleConversion>>, ConversionError> {
    if (&from.kv_spec, from.granule_order) == (&to.kv_spec, to.granule_order) {
        return Ok(None);
    }
    let formats = granule_format(from).zip(granule_format(to));
    let has_same_values = |(from, to): &(GranuleFormat, GranuleFormat)| {
        (from.num_kv_heads, from.head_dim) == (to.num_kv_heads, to.head_dim)
    };
    let Some((from, to)) = formats.filter(has_same_values) else {
        return Err(ConversionError::Unlike {
            from: from.representation.to_string(),
            from_planes: planes(from),
            to: to.representation.to_string(),
            to_planes: planes(to),
        });
    };
    Ok((from != to).then(|| Arc::new(Conversion { from, to }) as Arc<dyn GranuleConversion>))
}

/// As [`conversion`], of KV from a node that said `from` of itself.
///
/// # Errors
/// [`ConversionError`]: also where it announced no model.
pub fn conversion_from_peer(
    from: Option<&ModelInfo>,
    to: &ModelInfo,
) -> Result<Option<Arc<dyn GranuleConversion>>, ConversionError> {
    let from = from.ok_or_else(|| ConversionError::NoModel { to: to.representation.to_string() })?;
    conversion(from, to)
}

/// Whether KV of either of two nodes can become KV of the other; `theirs` is what the other one said of itself.
///
/// # Errors
/// [`ConversionError`].
pub fn check_convertible(ours: &ModelInfo, theirs: Option<&ModelInfo>) -> Result<(), ConversionError> {
    conversion_from_peer(theirs, ours)?;
    theirs.map_or(Ok(()), |theirs| conversion(ours, theirs).map(drop))
}

/// The planes of a model's first layers, for sentences.
fn planes(model: &ModelInfo) -> String {
    let shape = |plane: &KvPlane| {
        format!("{}: {} heads of {} in {}", plane.name, plane.num_heads, plane.head_dim, plane.dtype.as_str())
    };
    // A peer may announce any number of groups.
    let groups = model.kv_spec.groups.iter().take(1);
    groups.flat_map(|group| &group.planes).take(4).map(shape).collect::<Vec<_>>().join(", ")
}

/// What a granule is in the pool of a node that announced `model`.
pub(crate) fn granule_format(model: &ModelInfo) -> Option<GranuleFormat> {
    let plane = uniform_plane(&model.kv_spec).ok()?;
    Some(GranuleFormat {
        order: match model.granule_order {
            GranuleOrder::Lanes => kernels::GranuleOrder::Lanes,
            GranuleOrder::Rows => kernels::GranuleOrder::Rows,
        },
        dtype: match plane.dtype {
            KvDtype::F32 => kernels::KvDtype::F32,
            KvDtype::Bf16 => kernels::KvDtype::Bf16,
        },
        num_kv_heads: plane.num_heads as usize,
        head_dim: plane.head_dim as usize,
    })
}

#[cfg(test)]
mod tests {
    use common::kv_spec::KvSpec;
    use common::model::{KvExchange, ModelIdentity, NumericsId, Representation};

    use super::*;

    fn model(dtypes: [KvDtype; 2], granule_order: GranuleOrder) -> ModelInfo {
        let mut kv_spec = KvSpec::uniform(2, 2, 8, KvDtype::F32, None);
        for (plane, dtype) in kv_spec.groups[0].planes.iter_mut().zip(dtypes) {
            plane.dtype = dtype;
        }
        ModelInfo {
            identity: ModelIdentity([1; 32]),
            numerics: NumericsId("any".to_string()),
            representation: Representation(format!("k-{}/v-{}", dtypes[0].as_str(), dtypes[1].as_str())),
            kv_spec,
            vocab_size: 100,
            max_model_len: 100,
            exchange: KvExchange::Dtypes,
            granule_order,
            block_size: 16,
            num_blocks: 10,
        }
    }

    const F32: [KvDtype; 2] = [KvDtype::F32; 2];
    const BF16: [KvDtype; 2] = [KvDtype::Bf16; 2];
    /// No pool of this version is like that.
    const MIXED: [KvDtype; 2] = [KvDtype::F32, KvDtype::Bf16];

    #[test]
    fn same_bytes_are_not_converted_and_unequal_ones_are() {
        let is_converted = |from: &ModelInfo, to: &ModelInfo| conversion(from, to).unwrap().is_some();
        let lanes = |dtypes| model(dtypes, GranuleOrder::Lanes);
        let rows = |dtypes| model(dtypes, GranuleOrder::Rows);
        assert!(!is_converted(&lanes(F32), &ModelInfo { block_size: 64, ..lanes(F32) }));
        assert!(!is_converted(&lanes(MIXED), &lanes(MIXED)), "whatever they are, they are the same");
        assert!(is_converted(&lanes(F32), &lanes(BF16)) && is_converted(&rows(F32), &lanes(F32)));
    }

    #[test]
    fn what_cannot_be_converted_is_refused_in_words_that_name_both() {
        let (ours, theirs) = (model(F32, GranuleOrder::Lanes), model(MIXED, GranuleOrder::Lanes));
        assert_eq!(ours.check_compatible(&theirs), Ok(()), "all but the conversion is fine");
        for error in [conversion(&theirs, &ours).err(), conversion(&ours, &theirs).err()] {
            let sentence = error.unwrap().to_string();
            for part in ["k-f32/v-f32 (k: 2 heads of 8 in f32", "k-f32/v-bf16", "v: 2 heads of 8 in bf16"] {
                assert!(sentence.contains(part), "{part}: {sentence}");
            }
        }
        assert!(matches!(check_convertible(&ours, Some(&theirs)), Err(ConversionError::Unlike { .. })));
        let fewer_heads = ModelInfo { kv_spec: KvSpec::uniform(2, 1, 8, KvDtype::F32, None), ..ours.clone() };
        assert!(check_convertible(&ours, Some(&fewer_heads)).is_err());
        assert_eq!(check_convertible(&ours, Some(&model(BF16, GranuleOrder::Rows))), Ok(()));
    }

    #[test]
    fn node_that_announces_no_model_sends_nothing() {
        let ours = model(F32, GranuleOrder::Lanes);
        let error = conversion_from_peer(None, &ours).err().unwrap();
        assert!(error.to_string().contains("announces no model, this one keeps KV as k-f32/v-f32"), "{error}");
        assert!(check_convertible(&ours, None).is_err());
        assert!(conversion_from_peer(Some(&ours), &ours).unwrap().is_none());
    }
}
