//! KV of a node whose pool has another order or type made into KV of this node's.

use std::sync::Arc;

use common::kv_memory::GranuleConversion;
use common::kv_spec::{GranuleOrder, KvDtype};
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

/// What makes KV of the pool of a node that announced `from` into KV of the pool that `to` announces. `None` if the
/// bytes of a granule are the same in both, whatever the block sizes.
///
/// Only of nodes that may exchange KV ([`ModelInfo::check_compatible`]): others have no common values.
pub fn conversion(from: &ModelInfo, to: &ModelInfo) -> Option<Arc<dyn GranuleConversion>> {
    let (from, to) = (granule_format(from)?, granule_format(to)?);
    let has_same_values = (from.num_kv_heads, from.head_dim) == (to.num_kv_heads, to.head_dim);
    (from != to && has_same_values).then(|| Arc::new(Conversion { from, to }) as Arc<dyn GranuleConversion>)
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
