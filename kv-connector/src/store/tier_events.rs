//! What a tier tells of its entries, so that what was said last of one is so.
//!
//! A tier is changed by several tasks, and what happened is told behind the change: an entry that one task evicted
//! may be there again, put by another, before the first has said so. So whoever has something to tell looks, with
//! everybody else who tells shut out, whether it is still true. What is not is left to whoever changed it again,
//! who tells behind this one.

use std::sync::{Arc, Mutex, PoisonError};

use common::block_events::{BlockEvent, BlockSink, Medium, StoredBlock};
use common::content::ContentKey;

/// The events of one tier.
pub(super) struct TierEvents {
    medium: Medium,
    sink: Arc<dyn BlockSink>,
    telling: Mutex<()>,
}

impl TierEvents {
    /// Events of `medium`, told to `sink`.
    pub(super) fn new(medium: Medium, sink: Arc<dyn BlockSink>) -> Self {
        Self { medium, sink, telling: Mutex::new(()) }
    }

    /// The entry of `block` was put.
    pub(super) fn on_put(&self, block: StoredBlock, is_held: impl FnOnce() -> bool) {
        self.tell(|| is_held().then_some(BlockEvent::Stored(block)));
    }

    /// An entry of this content went, whatever for.
    pub(super) fn on_left(&self, key: ContentKey, is_held: impl FnOnce() -> bool) {
        let medium = self.medium;
        self.tell(|| (!is_held()).then_some(BlockEvent::Removed { medium, key }));
    }

    fn tell(&self, event: impl FnOnce() -> Option<BlockEvent>) {
        let _telling = self.telling.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(event) = event() {
            self.sink.on_blocks(vec![event]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::time::Duration;

    use bytes::Bytes;
    use common::content::{ChainRoot, ContentChain, ContentName, GRANULE_TOKENS};
    use common::kv_spec::{KvDtype, KvSpec};
    use common::model::{ModelIdentity, ModelInfo, NumericsId, Representation};
    use futures::FutureExt;

    use super::*;
    use crate::store::named_tokens::NamedTokens;
    use crate::store::{
        BlockStore, EntryFormat, EntryKey, FaultyBackend, HostBackend, Tier, TierBackend, TierKind, TieredStore,
    };

    #[derive(Default)]
    struct Heard(Mutex<Vec<BlockEvent>>);

    impl Heard {
        /// Everything since the last call.
        fn take(&self) -> Vec<BlockEvent> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl BlockSink for Heard {
        fn on_blocks(&self, events: Vec<BlockEvent>) {
            self.0.lock().unwrap().extend(events);
        }
    }

    fn block(key: u128) -> StoredBlock {
        StoredBlock { medium: Medium::Host, key: ContentKey(key), parent: None, tokens: [7; 16].into() }
    }

    fn stored(key: u128) -> BlockEvent {
        BlockEvent::Stored(block(key))
    }

    fn removed(key: u128) -> BlockEvent {
        BlockEvent::Removed { medium: Medium::Host, key: ContentKey(key) }
    }

    fn entry_key(key: u128) -> EntryKey {
        EntryKey { content: ContentKey(key), tag: 0 }
    }

    #[test]
    fn only_what_is_still_true_is_told() {
        let heard = Arc::new(Heard::default());
        let events = TierEvents::new(Medium::Host, heard.clone());
        // Evicted, and put again before the eviction was told: in either order it is there in the end.
        events.on_left(ContentKey(1), || true);
        events.on_put(block(1), || true);
        // Put, and evicted before that was told.
        events.on_left(ContentKey(1), || false);
        events.on_put(block(1), || false);
        assert_eq!(heard.take(), [stored(1), removed(1)]);
    }

    #[tokio::test]
    async fn host_tier_tells_what_it_keeps_and_gives_up() {
        const ENTRY_BYTES: usize = 1000;
        let heard = Arc::new(Heard::default());
        // Room for three and a small one, each with what the cache itself needs.
        let host = HostBackend::new(3 * (ENTRY_BYTES + 256) + 300).telling(heard.clone());
        let put = async |key: u128, num_bytes: usize| {
            host.put(entry_key(key), Bytes::from(vec![0; num_bytes])).await.unwrap();
            host.tell_stored(entry_key(key), block(key));
            heard.take()
        };
        for key in 1..=3 {
            assert_eq!(put(key, ENTRY_BYTES).await, [stored(key)]);
        }
        assert_eq!(put(4, ENTRY_BYTES).await, [removed(1), stored(4)], "the oldest made room");
        assert_eq!(put(4, 1).await, [stored(4)], "a replaced entry is not gone");
        assert_eq!(put(5, 10 * ENTRY_BYTES).await, [], "what does not fit is not kept");
        host.remove(entry_key(2)).await.unwrap();
        assert_eq!(heard.take(), [removed(2)]);
        host.remove(entry_key(2)).await.unwrap();
        drop(host);
        assert_eq!(heard.take(), [], "a tier ends with its node");
    }

    /// Whoever comes first: what was told last of each entry is so in the end.
    #[test]
    fn events_of_several_threads_end_with_what_is_there() {
        const NUM_KEYS: u128 = 6;
        let heard = Arc::new(Heard::default());
        let host = HostBackend::new(4 * 300).telling(heard.clone());
        std::thread::scope(|scope| {
            for thread in 0..4u128 {
                let host = &host;
                scope.spawn(move || {
                    for turn in 0..2000 {
                        let key = (turn * 7 + thread * 3 + turn / 5) % NUM_KEYS;
                        if (turn + thread) % 5 == 0 {
                            host.remove(entry_key(key)).now_or_never().expect("memory answers at once").unwrap();
                        } else {
                            let put = host.put(entry_key(key), Bytes::from_static(&[0; 40]));
                            put.now_or_never().expect("memory answers at once").unwrap();
                            host.tell_stored(entry_key(key), block(key));
                        }
                    }
                });
            }
        });
        let mut told = HashSet::new();
        for event in heard.take() {
            match event {
                BlockEvent::Stored(block) => drop(told.insert(block.key)),
                BlockEvent::Removed { key, .. } => drop(told.remove(&key)),
                BlockEvent::Cleared { .. } => unreachable!("nobody cleared it"),
            }
        }
        let held = (0..NUM_KEYS).filter(|key| host.is_known_to_hold(entry_key(*key)) == Some(true));
        assert_eq!(told, held.map(ContentKey).collect::<HashSet<_>>());
    }

    #[tokio::test]
    async fn what_was_published_and_what_a_slow_tier_had_is_told_with_its_text() {
        let model = ModelInfo {
            identity: ModelIdentity([1; 32]),
            numerics: NumericsId("test".into()),
            representation: Representation("test".into()),
            kv_spec: KvSpec::uniform(1, 1, 8, KvDtype::F32, None),
            vocab_size: 100,
            max_model_len: 100,
            exchange: Default::default(),
            granule_order: Default::default(),
            block_size: 16,
            num_blocks: 1,
        };
        let format = EntryFormat::new(&model, 1, 32);
        let tokens: Vec<u32> = (0..3 * GRANULE_TOKENS as u32 + 5).collect();
        let mut chain = ContentChain::new(&ChainRoot::of_model(model.identity));
        chain.extend(&tokens);
        let granules = NamedTokens::new(&chain, &tokens, usize::MAX);
        let heard = Arc::new(Heard::default());
        let slow: Arc<dyn TierBackend> = Arc::new(FaultyBackend::new(Arc::new(HostBackend::new(1 << 20))));
        let tier = |kind, backend| Tier::new(kind, backend, format, Duration::from_secs(3600), &[]);
        let tiers = vec![
            tier(TierKind::Host, Arc::new(HostBackend::new(1 << 20).telling(heard.clone())) as Arc<dyn TierBackend>),
            tier(TierKind::Disk, slow),
        ];
        let store = TieredStore::new(tiers.clone(), format, 1 << 20, None);
        let entry = |name: ContentName| format.encode(name, |payload| payload.fill(9));
        let told = |granule: usize| {
            let from = granule * GRANULE_TOKENS;
            BlockEvent::Stored(StoredBlock {
                medium: Medium::Host,
                key: chain.granules()[granule].key,
                parent: granule.checked_sub(1).map(|parent| chain.granules()[parent].key),
                tokens: tokens[from..from + GRANULE_TOKENS].into(),
            })
        };
        for granule in 0..2 {
            assert!(store.put_granule(&granules, granule, entry(granules.names()[granule])).await);
        }
        assert_eq!(heard.take(), [told(0), told(1)]);
        assert!(store.put_granule(&granules, 0, entry(granules.names()[0])).await);
        assert_eq!(heard.take(), [], "what is held already is not told again");
        tiers[1].put(granules.names()[2], entry(granules.names()[2])).await;
        assert!(store.get_granule(&granules, 2).await.is_some());
        assert_eq!(heard.take(), [told(2)], "it is kept in memory from now on");
        store.remove(granules.names()[0]).await;
        assert_eq!(heard.take(), [BlockEvent::Removed { medium: Medium::Host, key: granules.names()[0].key }]);
    }
}
