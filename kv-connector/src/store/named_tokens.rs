//! Granules of a sequence: how each is called, and what block events tell of it.

use std::sync::Arc;

use common::block_events::{Medium, StoredBlock};
use common::content::{ContentChain, ContentName, GRANULE_TOKENS};
use common::tokens::Token;

/// The leading granules of a sequence, with their tokens.
#[derive(Debug, Clone, Default)]
pub(super) struct NamedTokens {
    names: Vec<ContentName>,
    tokens: Arc<[Token]>,
}

impl NamedTokens {
    /// The first granules of `tokens`, as `chain` names them: `num_granules_max` at most.
    pub(super) fn new(chain: &ContentChain, tokens: &[Token], num_granules_max: usize) -> Self {
        let num_granules = chain.granules().len().min(tokens.len() / GRANULE_TOKENS).min(num_granules_max);
        Self {
            names: chain.granules()[..num_granules].to_vec(),
            tokens: tokens[..num_granules * GRANULE_TOKENS].into(),
        }
    }

    /// How they are called, in order.
    pub(super) fn names(&self) -> &[ContentName] {
        &self.names
    }

    /// Only the first `num_granules` of them.
    pub(super) fn truncate(&mut self, num_granules: usize) {
        self.names.truncate(num_granules);
    }

    /// What is said of granule `index` where it is stored in `medium`.
    ///
    /// # Panics
    /// If there is no such granule.
    pub(super) fn stored(&self, index: usize, medium: Medium) -> StoredBlock {
        StoredBlock {
            medium,
            key: self.names[index].key,
            parent: index.checked_sub(1).map(|parent| self.names[parent].key),
            tokens: self.tokens[index * GRANULE_TOKENS..(index + 1) * GRANULE_TOKENS].into(),
        }
    }
}
