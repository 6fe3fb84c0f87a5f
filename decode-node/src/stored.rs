//! The prefix-block store's part in a request; without a store there is none.

use std::collections::HashMap;
use std::time::Duration;

use common::content::ContentChain;
use common::handover::{PrefixChoice, PrefixCosts, StoredPrefix};
use common::ids::ChoiceIndex;
use common::tokens::Token;
use common::wire::Generate;
use kv_connector::store::{FoundPrefix, LoadPlan, PrefixLoad};

use crate::generate::{Admitted, Ongoing};
use crate::node::Node;

/// The longest prefix that the store holds of a prompt that is prefilled here.
pub(crate) async fn find(node: &Node, generate: &Generate) -> FoundPrefix {
    match &node.store {
        Some(store) => store.find(&node.content_chain(generate), &generate.tokens.0).await,
        None => FoundPrefix::default(),
    }
}

/// Loads it into the blocks of an admitted request, while the engine computes around it. `None` if computing all of
/// it is faster.
pub(crate) fn load(ongoing: &Ongoing<'_>, admitted: &Admitted, found: FoundPrefix) -> Option<PrefixLoad> {
    let (node, num_cached_tokens) = (ongoing.node, admitted.num_cached_tokens);
    let store = node.store.as_ref()?;
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
            load: store.expected_load(&found, num_cached_tokens),
        }),
    };
    if costs.choose() != Some(PrefixChoice::Store) {
        return None;
    }
    let (blocks, engine) = (admitted.blocks.clone(), node.engine.clone());
    let block_size = engine.pool().block_size();
    let plan = LoadPlan::new(&costs, blocks, node.memory.clone(), block_size, Box::new(move || engine.wake()));
    Some(store.load(found, plan))
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
            store.publish(&prompt, &generate.tokens.0);
        }
        for tokens in self.0.into_values() {
            let (mut chain, tokens) = (prompt.clone(), [&generate.tokens.0[..], &tokens].concat());
            chain.extend(&tokens);
            store.publish(&chain, &tokens);
        }
    }
}
