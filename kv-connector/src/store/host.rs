//! Entries in this process's memory: foyer's cache, least recently used out first.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use bytes::Bytes;
use common::block_events::{BlockSink, Medium, StoredBlock};
use foyer::{Cache, CacheBuilder, Event, EventListener, LruConfig};

use super::backend::{BackendError, EntryKey, StoreFuture, TierBackend};
use super::tier_events::TierEvents;

/// What an entry takes beside its bytes: key, hash table, list.
const OVERHEAD_BYTES: usize = 256;

/// Host memory with a budget.
pub struct HostBackend {
    cache: Arc<HostCache>,
    evicted_bytes: Arc<AtomicU64>,
    told: Arc<OnceLock<Told>>,
}

type HostCache = Cache<EntryKey, Bytes>;

/// Who is told what is kept and given up, and where it is looked up whether that is still so. The cache owns this.
struct Told {
    events: TierEvents,
    cache: Weak<HostCache>,
}

/// Counts what is evicted, and tells what goes, for whatever reason: a replaced entry leaves, too.
struct Leaving {
    evicted_bytes: Arc<AtomicU64>,
    told: Arc<OnceLock<Told>>,
}

impl EventListener for Leaving {
    type Key = EntryKey;
    type Value = Bytes;

    /// Called without the cache's locks.
    fn on_leave(&self, reason: Event, key: &EntryKey, value: &Bytes) {
        if reason == Event::Evict {
            self.evicted_bytes.fetch_add(weight(value) as u64, Ordering::Relaxed);
        }
        // Without a cache this is the end of the tier, and of the node.
        if let Some(told) = self.told.get()
            && let Some(cache) = told.cache.upgrade()
        {
            told.events.on_left(key.content, || cache.contains(key));
        }
    }
}

fn weight(value: &Bytes) -> usize {
    value.len() + OVERHEAD_BYTES
}

impl HostBackend {
    /// An empty one.
    pub fn new(budget_bytes: usize) -> Self {
        let (evicted_bytes, told) = (Arc::<AtomicU64>::default(), Arc::<OnceLock<Told>>::default());
        let leaving = Leaving { evicted_bytes: evicted_bytes.clone(), told: told.clone() };
        let cache = CacheBuilder::new(budget_bytes)
            // One budget: shards would each have their own, too small for an entry where the whole is small.
            .with_shards(1)
            .with_weighter(|_: &EntryKey, value: &Bytes| weight(value))
            // The place to change how entries are chosen that go.
            .with_eviction_config(LruConfig::default())
            .with_event_listener(Arc::new(leaving))
            .build();
        Self { cache: Arc::new(cache), evicted_bytes, told }
    }

    /// Tells `sink` what it keeps and gives up from now on. To be called while it is empty.
    ///
    /// # Panics
    /// If it tells somebody already.
    pub fn telling(self, sink: Arc<dyn BlockSink>) -> Self {
        let told = Told { events: TierEvents::new(Medium::Host, sink), cache: Arc::downgrade(&self.cache) };
        assert!(self.told.set(told).is_ok(), "a host tier tells one listener");
        self
    }
}

impl TierBackend for HostBackend {
    fn is_known_to_hold(&self, key: EntryKey) -> Option<bool> {
        Some(self.cache.contains(&key))
    }

    fn contains(&self, key: EntryKey) -> StoreFuture<'_, Result<bool, BackendError>> {
        Box::pin(async move { Ok(self.cache.contains(&key)) })
    }

    fn get(&self, key: EntryKey, num_bytes_max: usize) -> StoreFuture<'_, Result<Option<Bytes>, BackendError>> {
        Box::pin(async move {
            let found = self.cache.get(&key).map(|entry| entry.value().clone());
            Ok(found.map(|bytes| bytes.slice(..bytes.len().min(num_bytes_max))))
        })
    }

    fn put(&self, key: EntryKey, bytes: Bytes) -> StoreFuture<'_, Result<(), BackendError>> {
        Box::pin(async move {
            // What is larger than all of it would push everything out and not stay itself.
            if weight(&bytes) <= self.cache.capacity() {
                self.cache.insert(key, bytes);
            }
            Ok(())
        })
    }

    fn remove(&self, key: EntryKey) -> StoreFuture<'_, Result<(), BackendError>> {
        Box::pin(async move {
            self.cache.remove(&key);
            Ok(())
        })
    }

    fn tell_stored(&self, key: EntryKey, block: StoredBlock) {
        if let Some(told) = self.told.get() {
            told.events.on_put(block, || self.cache.contains(&key));
        }
    }

    fn used_bytes(&self) -> Option<u64> {
        Some(self.cache.usage() as u64)
    }

    fn evicted_bytes(&self) -> Option<u64> {
        Some(self.evicted_bytes.load(Ordering::Relaxed))
    }
}
