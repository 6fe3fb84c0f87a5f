//! The prefix-block store's part in a hand-over; without a store there is none.

use std::sync::atomic::{AtomicU32, Ordering};

use common::content::ContentChain;
use common::wire::PrefillEvent;
use kv_connector::ControlSender;
use kv_connector::store::{FoundPrefix, LoadPlan, Loaded};
use tokio::time::Interval;

use crate::node::Node;

/// The longest prefix that the store holds.
pub(crate) async fn find(node: &Node, chain: &ContentChain, num_tokens: usize) -> FoundPrefix {
    match &node.store {
        Some(store) => store.find(chain, num_tokens).await,
        None => FoundPrefix::default(),
    }
}

/// Loads it, and tells the decode node how far it is: an engine that waits makes no steps. `None`: the decode node
/// is gone. Dropped, nothing is written any more.
pub(crate) async fn load(
    node: &Node,
    found: &FoundPrefix,
    plan: LoadPlan,
    sender: &mut ControlSender,
    progress: &mut Interval,
) -> Option<Loaded> {
    let store = node.store.as_ref().expect("what is loaded was found in a store");
    let num_tokens = AtomicU32::new(plan.first_token as u32);
    let loading = store.load(found, plan, |num| num_tokens.store(num as u32, Ordering::Relaxed));
    tokio::pin!(loading);
    loop {
        tokio::select! {
            biased;
            () = sender.stopped() => return None,
            loaded = &mut loading => return Some(loaded),
            _ = progress.tick() => {
                let num_computed_tokens = num_tokens.load(Ordering::Relaxed);
                let event = PrefillEvent::Progress { num_steps: node.engine.num_steps(), num_computed_tokens };
                sender.send(&event).await.ok()?;
            }
        }
    }
}

/// Offers to the store what the pool has of this prompt.
pub(crate) fn publish(node: &Node, chain: &ContentChain) {
    if let Some(store) = &node.store {
        store.publish(chain.granules());
    }
}
