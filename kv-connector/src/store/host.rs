//! Entries in this process's memory: foyer's cache, least recently used out first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use foyer::{Cache, CacheBuilder, Event, EventListener, LruConfig};

use super::backend::{BackendError, EntryKey, StoreFuture, TierBackend};

/// What an entry takes beside its bytes: key, hash table, list.
const OVERHEAD_BYTES: usize = 256;

/// Host memory with a budget.
pub struct HostBackend {
    cache: Cache<EntryKey, Bytes>,
    evicted_bytes: Arc<AtomicU64>,
}

struct CountEvicted(Arc<AtomicU64>);

impl EventListener for CountEvicted {
    type Key = EntryKey;
    type Value = Bytes;

    fn on_leave(&self, reason: Event, _key: &EntryKey, value: &Bytes) {
        if reason == Event::Evict {
            self.0.fetch_add(weight(value) as u64, Ordering::Relaxed);
        }
    }
}

fn weight(value: &Bytes) -> usize {
    value.len() + OVERHEAD_BYTES
}

impl HostBackend {
    /// An empty one.
    pub fn new(budget_bytes: usize) -> Self {
        let evicted_bytes = Arc::default();
        let cache = CacheBuilder::new(budget_bytes)
            // One budget: shards would each have their own, too small for an entry where the whole is small.
            .with_shards(1)
            .with_weighter(|_: &EntryKey, value: &Bytes| weight(value))
            // The place to change how entries are chosen that go.
            .with_eviction_config(LruConfig::default())
            .with_event_listener(Arc::new(CountEvicted(Arc::clone(&evicted_bytes))))
            .build();
        Self { cache, evicted_bytes }
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

    fn used_bytes(&self) -> Option<u64> {
        Some(self.cache.usage() as u64)
    }

    fn evicted_bytes(&self) -> Option<u64> {
        Some(self.evicted_bytes.load(Ordering::Relaxed))
    }
}
