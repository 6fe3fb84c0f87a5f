//! Entries in this process's memory: foyer's cache, least recently used out first. Its budget may be shared with
//! parked KV, which then takes the place of entries.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use bytes::Bytes;
use common::block_events::{BlockSink, Medium, StoredBlock};
use common::host_budget::HostBudget;
use foyer::{Cache, CacheBuilder, Event, EventListener, LruConfig};

use super::backend::{BackendError, EntryKey, StoreFuture, TierBackend};
use super::tier_events::TierEvents;

/// What an entry takes beside its bytes: key, hash table, list.
const OVERHEAD_BYTES: usize = 256;

/// Host memory with a budget.
pub struct HostBackend {
    cache: Arc<HostCache>,
    /// What the cache may hold now; its own `capacity` stays what it was made with.
    room_bytes: Arc<AtomicUsize>,
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
        Self { cache: Arc::new(cache), room_bytes: Arc::new(AtomicUsize::new(budget_bytes)), evicted_bytes, told }
    }

    /// An empty one with what `budget` has left beside parked KV, now and whenever that changes.
    pub fn sharing(budget: &HostBudget) -> Self {
        let this = Self::new(budget.bytes_max() as usize);
        let (cache, room_bytes) = (this.cache.clone(), this.room_bytes.clone());
        budget.share_with(move |num_bytes| {
            room_bytes.store(num_bytes as usize, Ordering::Release);
            if let Err(error) = cache.resize(num_bytes as usize) {
                // Only where the eviction's settings do not fit the size; ours have no sizes.
                tracing::error!(%error, "the host tier keeps its size");
            }
        });
        this
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

    fn has_room_for(&self, bytes: &Bytes) -> bool {
        weight(bytes) <= self.room_bytes.load(Ordering::Acquire)
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
            // What is larger than all of it would push everything out and stay all the same.
            if self.has_room_for(&bytes) {
                self.cache.insert(key, bytes.clone());
                // Room may have gone in between.
                if !self.has_room_for(&bytes) {
                    self.cache.remove(&key);
                }
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

#[cfg(test)]
mod tests {
    use common::content::ContentKey;

    use super::*;

    const ENTRY_BYTES: usize = 1000;

    async fn put(host: &HostBackend, number: u128) {
        host.put(key(number), vec![7; ENTRY_BYTES - OVERHEAD_BYTES].into()).await.unwrap();
    }

    fn key(number: u128) -> EntryKey {
        EntryKey { content: ContentKey(number), tag: 1 }
    }

    #[tokio::test]
    async fn parked_kv_takes_the_place_of_the_least_recently_used_and_gives_it_back() {
        let budget = HostBudget::new(10 * ENTRY_BYTES as u64);
        let host = HostBackend::sharing(&budget);
        for number in 0..10 {
            put(&host, number).await;
        }
        let held = || (0..30).filter(|number| host.is_known_to_hold(key(*number)) == Some(true)).collect::<Vec<_>>();
        assert_eq!(held(), (0..10).collect::<Vec<_>>());
        host.get(key(1), ENTRY_BYTES).await.unwrap().unwrap();
        budget.park(6500);
        assert_eq!(held(), [1, 8, 9], "the others are gone before a byte is parked");
        assert_eq!((host.used_bytes(), host.evicted_bytes()), (Some(3000), Some(7000)));
        put(&host, 10).await;
        assert_eq!((held().len(), host.used_bytes()), (3, Some(3000)), "new entries keep to what is left");
        budget.park(9001);
        put(&host, 11).await;
        assert_eq!((held(), host.used_bytes()), (vec![], Some(0)), "there is no room for one entry");
        budget.park(0);
        for number in 12..30 {
            put(&host, number).await;
        }
        assert_eq!(held(), (20..30).collect::<Vec<_>>(), "all of it is the tier's again");
    }
}
