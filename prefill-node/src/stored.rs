//! The prefix-block store's part in a hand-over; without a store there is none.

use std::sync::Arc;

use common::content::ContentChain;
use common::handover::PrefixCosts;
use common::ids::BlockId;
use common::tokens::Token;
use kv_connector::store::{FoundPrefix, LoadPlan, PrefixLoad};

use crate::node::Node;

/// The longest prefix that the store holds.
pub(crate) async fn find(node: &Node, chain: &ContentChain, tokens: &[Token]) -> FoundPrefix {
    match &node.store {
        Some(store) => store.find(chain, tokens).await,
        None => FoundPrefix::default(),
    }
}

/// Loads it into these blocks, while the engine computes around it.
pub(crate) fn load(node: &Node, found: FoundPrefix, costs: &PrefixCosts, blocks: Arc<[BlockId]>) -> PrefixLoad {
    let store = node.store.as_ref().expect("what is loaded was found in a store");
    let (pool, engine) = (node.engine.pool().clone(), node.engine.clone());
    let block_size = pool.block_size();
    store.load(found, LoadPlan::new(costs, blocks, pool, block_size, Box::new(move || engine.wake())))
}

/// Offers to the store what the pool has of this prompt.
pub(crate) fn publish(node: &Node, chain: &ContentChain, tokens: &[Token]) {
    if let Some(store) = &node.store {
        store.publish(chain, tokens);
    }
}
