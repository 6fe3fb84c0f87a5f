//! A prefix that is held here, on its way to the node that fetches it: from a decode node to the prefill node it
//! asked, and from a prefill node to another one.

use std::ops::Range;

use common::tokens::Token;
use common::wire::ExtentId;

use crate::transfer::{BulkSender, ExtentSends, ExtentSource};

/// Tokens whose layers are sent before the next ones': if the fetch ends early, what has arrived is of use up to
/// here.
const CHUNK_TOKENS: usize = 1024;

/// The extents that are on the way. The blocks must be pinned until [`stop`](Self::stop) has returned or all
/// have ended.
pub struct PrefixSends {
    source: ExtentSource,
    bulk: BulkSender,
    sends: ExtentSends,
}

impl PrefixSends {
    /// Nothing is on the way yet.
    pub fn new(source: ExtentSource, bulk: BulkSender) -> Self {
        Self { source, bulk, sends: ExtentSends::default() }
    }

    /// The extents of these tokens in the order in which they are to leave, with their sizes.
    pub fn extents(&self, tokens: Range<usize>) -> Vec<(ExtentId, u64)> {
        in_order(&self.source, tokens)
    }

    /// Begins to send one. `tokens` are the sequence's.
    pub fn send(&mut self, tokens: &[Token], extent: ExtentId) {
        self.bulk.begin(&mut self.sends, self.source.unsealed(tokens, extent));
    }

    /// Resolves when one has ended: whether it left. Pending while none is on the way. Cancel-safe.
    pub async fn next_ended(&mut self) -> bool {
        match self.sends.next_ended().await {
            Some(has_left) => has_left,
            None => std::future::pending().await,
        }
    }

    /// Gives up what is on the way.
    pub async fn stop(mut self) {
        self.sends.stop().await;
    }
}

fn in_order(source: &ExtentSource, tokens: Range<usize>) -> Vec<(ExtentId, u64)> {
    let layers = |first: usize| {
        let end = tokens.end.min(first + CHUNK_TOKENS);
        (0..source.kv_spec.num_layers()).flat_map(move |layer| source.extents(layer, first, end))
    };
    tokens.clone().step_by(CHUNK_TOKENS).flat_map(layers).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::transfer::ExtentRequest;
    use common::content::{ChainRoot, ContentChain};
    use common::ids::{Attempt, BlockId, Epoch, Generation, RequestId};
    use common::kv_memory::KvMemory;
    use common::kv_spec::{KvDtype, KvSpec};
    use common::model::ModelIdentity;

    /// Nothing is read of it.
    struct ShapeOnly;

    impl KvMemory for ShapeOnly {
        fn write_at(&self, _: u32, _: &[BlockId], _: usize, _: usize, _: &[u8]) {
            unreachable!("nothing is written");
        }

        fn read_granules(&self, _: u32, _: &[BlockId], _: usize, _: usize, _: &mut [u8]) {
            unreachable!("nothing is read");
        }

        fn visit_granules(&self, _: u32, _: &[BlockId], _: usize, _: usize, _: &mut dyn FnMut(u64, &[u8])) {
            unreachable!("nothing is read");
        }

        fn granule_bytes(&self) -> usize {
            64
        }

        fn num_layers(&self) -> usize {
            2
        }
    }

    #[test]
    fn every_layer_of_a_chunk_leaves_before_the_next_chunk() {
        let kv_spec = KvSpec::uniform(2, 1, 8, KvDtype::F32, None);
        let request =
            ExtentRequest { epoch: Epoch(1), request: RequestId(1), attempt: Attempt(1), generation: Generation(1) };
        let source = ExtentSource {
            memory: Arc::new(ShapeOnly),
            kv_spec,
            blocks: Arc::default(),
            chain: ContentChain::new(&ChainRoot::of_model(ModelIdentity([0; 32]))),
            request,
        };
        let extents = in_order(&source, 48..2112);
        let places: Vec<_> =
            extents.iter().map(|(extent, _)| (extent.first_token, extent.num_tokens, extent.layer)).collect();
        let expected = [(48, 1024, 0), (48, 1024, 1), (1072, 1024, 0), (1072, 1024, 1), (2096, 16, 0), (2096, 16, 1)];
        assert_eq!(places, expected);
    }
}
