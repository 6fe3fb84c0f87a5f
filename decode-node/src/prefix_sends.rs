//! A prefix that is held here, on its way to the prefill node that fetches it.

use std::ops::Range;

use common::tokens::Token;
use common::wire::ExtentId;
use kv_connector::transfer::{BulkSender, ExtentSource};
use tokio::task::JoinSet;

/// Tokens whose layers are sent before the next ones': if the fetch ends early, what has arrived is of use up to
/// here.
const CHUNK_TOKENS: usize = 1024;

/// The extents that are on the way. The blocks must be pinned until [`stop`](Self::stop) has returned or all
/// have ended.
pub(crate) struct PrefixSends {
    source: ExtentSource,
    bulk: BulkSender,
    sends: JoinSet<bool>,
}

impl PrefixSends {
    pub(crate) fn new(source: ExtentSource, bulk: BulkSender) -> Self {
        Self { source, bulk, sends: JoinSet::new() }
    }

    /// The extents of these tokens in the order in which they are to leave, with their sizes.
    pub(crate) fn extents(&self, tokens: Range<usize>) -> Vec<(ExtentId, u64)> {
        let chunks = tokens.clone().step_by(CHUNK_TOKENS);
        let layers = |first: usize| {
            let end = tokens.end.min(first + CHUNK_TOKENS);
            (0..self.source.kv_spec.num_layers()).flat_map(move |layer| self.source.extents(layer, first, end))
        };
        chunks.flat_map(layers).collect()
    }

    /// Begins to send one. `tokens` are the sequence's.
    pub(crate) fn send(&mut self, tokens: &[Token], extent: ExtentId) {
        let (header, payload) = self.source.seal(tokens, extent);
        let bulk = self.bulk.clone();
        self.sends.spawn(async move { bulk.send_extent(&header, payload).await.is_ok() });
    }

    /// Resolves when one has ended: whether it left. Pending while none is on the way. Cancel-safe.
    pub(crate) async fn next_ended(&mut self) -> bool {
        match self.sends.join_next().await {
            Some(ended) => ended.unwrap_or(false),
            None => std::future::pending().await,
        }
    }

    /// Gives up what is on the way.
    pub(crate) async fn stop(mut self) {
        self.sends.shutdown().await;
    }
}
