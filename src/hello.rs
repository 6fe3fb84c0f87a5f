//! Which peers a node takes.

use std::sync::Arc;

use common::ids::Role;
use common::wire::Hello;
use engine::conversion::check_convertible;
use kv_connector::{HelloCheck, compatible_models};

/// Takes peers whose model fits, and of nodes only those whose KV and ours can be made into one another.
pub(crate) fn check(ours: &Hello) -> HelloCheck {
    let (fits, model) = (compatible_models(ours), ours.model.clone());
    Arc::new(move |peer: &Hello| {
        fits(peer)?;
        match &model {
            Some(model) if peer.role != Role::Proxy => {
                check_convertible(model, peer.model.as_ref()).map_err(|error| error.to_string())
            }
            _ => Ok(()),
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use common::ids::{Epoch, NodeId};
    use common::kv_spec::{GranuleOrder, KvDtype, KvSpec};
    use common::model::{KvExchange, ModelIdentity, ModelInfo, NumericsId, Representation};

    use super::*;

    fn model(identity: u8, values: KvDtype) -> ModelInfo {
        let mut kv_spec = KvSpec::uniform(2, 2, 8, KvDtype::F32, None);
        kv_spec.groups[0].planes[1].dtype = values;
        ModelInfo {
            identity: ModelIdentity([identity; 32]),
            numerics: NumericsId("any".to_string()),
            representation: Representation(format!("v-{}", values.as_str())),
            kv_spec,
            vocab_size: 100,
            max_model_len: 100,
            exchange: KvExchange::Dtypes,
            granule_order: GranuleOrder::Lanes,
            block_size: 16,
            num_blocks: 10,
        }
    }

    fn hello(role: Role, model: Option<ModelInfo>) -> Hello {
        Hello { node: NodeId::new("other").unwrap(), role, epoch: Epoch(1), model, bulk_port: None }
    }

    #[test]
    fn peers_are_taken_whose_model_and_kv_fit() {
        let check = super::check(&hello(Role::DecodeNode, Some(model(1, KvDtype::F32))));
        assert_eq!(check(&hello(Role::PrefillNode, Some(model(1, KvDtype::F32)))), Ok(()));
        assert_eq!(check(&hello(Role::Proxy, None)), Ok(()), "a proxy keeps no KV");
        let refused = |peer: &Hello| check(peer).unwrap_err();
        let other_model = refused(&hello(Role::PrefillNode, Some(model(2, KvDtype::F32))));
        assert!(other_model.contains("start both with the same checkpoint"), "{other_model}");
        assert_eq!(
            refused(&hello(Role::Proxy, Some(model(2, KvDtype::F32)))),
            other_model,
            "a proxy's, too, if it says one"
        );
        let mixed = refused(&hello(Role::PrefillNode, Some(model(1, KvDtype::Bf16))));
        assert!(mixed.contains("v: 2 heads of 8 in bf16"), "{mixed}");
        assert_eq!(check(&hello(Role::Proxy, Some(model(1, KvDtype::Bf16)))), Ok(()), "it keeps none");
        let nothing = refused(&hello(Role::PrefillNode, None));
        assert!(nothing.contains("announces no model"), "{nothing}");
    }
}
