//! The prefix-block store's part in a request; without a store there is none.

use std::collections::HashMap;
use std::time::Duration;

use common::content::ContentChain;
use common::handover::{PrefixChoice, PrefixCosts, StoredPrefix};
use common::ids::ChoiceIndex;
use common::tokens::Token;
use common::wire::Generate;
use kv_connector::store::{FoundPrefix, LoadPlan};

use crate::generate::{Admitted, End, Ongoing, interrupted};
use crate::node::Node;

/// The longest prefix that the store holds of a prompt that is prefilled here.
pub(crate) async fn find(node: &Node, generate: &Generate) -> FoundPrefix {
    match &node.store {
        Some(store) => store.find(&node.content_chain(generate), generate.tokens.0.len()).await,
        None => FoundPrefix::default(),
    }
}

/// Loads it into the blocks of an admitted request if that is faster than computing it. Says how many leading tokens
/// have their KV then.
pub(crate) async fn load(ongoing: &mut Ongoing<'_>, admitted: &Admitted, found: &FoundPrefix) -> Result<usize, End> {
    let (node, num_cached_tokens) = (ongoing.node, admitted.num_cached_tokens);
    let Some(store) = &node.store else { return Ok(num_cached_tokens) };
    let costs = PrefixCosts {
        num_tokens: ongoing.generate.tokens.0.len() as u32,
        num_cached_tokens: num_cached_tokens as u32,
        num_held_tokens: 0,
        num_tokens_ahead: node.engine.status().borrow().num_running_prompt_tokens,
        prefill_tokens_per_second: node.prefill_tokens_per_second(),
        kv_bytes_per_token: node.engine.model().kv_spec.bytes_per_token(),
        fetch_bytes_per_second: None,
        round_trip: Duration::ZERO,
        local_rest: None,
        peer: None,
        stored: Some(StoredPrefix {
            num_tokens: found.num_tokens() as u32,
            load: store.expected_load(found, num_cached_tokens),
        }),
    };
    if costs.choose() != Some(PrefixChoice::Store) {
        return Ok(num_cached_tokens);
    }
    let plan = LoadPlan {
        first_token: num_cached_tokens,
        blocks: admitted.blocks.clone(),
        memory: node.memory.clone(),
        total_timeout: costs.recompute_stored(),
    };
    // In this future, so that it has ended wherever the request, and its blocks, are dropped.
    tokio::select! {
        biased;
        () = ongoing.sender.stopped() => Err(End::Gone),
        end = interrupted(&ongoing.fence, ongoing.deadline, ongoing.generate.deadline) => Err(end),
        loaded = store.load(found, plan, |_| {}) => Ok(loaded.num_tokens),
    }
}

/// What a request has generated, by choice: the next turn of a conversation begins with it.
#[derive(Default)]
pub(crate) struct Generated(HashMap<ChoiceIndex, Vec<Token>>);

impl Generated {
    /// One more token of a choice.
    pub(crate) fn push(&mut self, choice: ChoiceIndex, token: Token) {
        self.0.entry(choice).or_default().push(token);
    }

    /// Offers to the store what the pool has of the prompt and of each choice.
    pub(crate) fn publish(self, node: &Node, generate: &Generate) {
        let Some(store) = &node.store else { return };
        let prompt: ContentChain = node.content_chain(generate);
        if self.0.is_empty() {
            store.publish(prompt.granules());
        }
        for tokens in self.0.into_values() {
            let mut chain = prompt.clone();
            chain.extend(&[&generate.tokens.0[..], &tokens].concat());
            store.publish(chain.granules());
        }
    }
}
