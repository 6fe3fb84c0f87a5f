//! One tier: a backend whose answers are checked, timed and counted, and that is left alone while it is unwell.
//!
//! ```text
//!            an operation fails or takes too long
//!   well ──────────────────────────────────────────> down: every get is a miss, every put is dropped, at once
//!    ^                                                │
//!    └──── a probe in the background succeeds ────────┘  after 1, 2, 4 ... 30 seconds
//! ```
//!
//! So one request waits for a tier that has gone, for no longer than its timeout, and none after it.

use std::collections::{HashSet, VecDeque};
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use common::block_events::{Medium, StoredBlock};
use common::content::{ContentKey, ContentName};
use futures::{StreamExt, stream};
use tokio::sync::Semaphore;

use super::BlockStore;
use super::backend::{BackendError, EntryKey, StoreFuture, TierBackend};
use super::entry::{Entry, EntryFormat};
use super::store_metrics::TierMetrics;

/// First wait before a tier that is down is tried again; doubles with every failure.
const PROBE_AFTER: Duration = Duration::from_secs(1);
/// Longest such wait.
const PROBE_AFTER_MAX: Duration = Duration::from_secs(30);
/// Names asked for at a time, by one caller.
const NUM_ASKED: usize = 32;
/// Operations of a backend at a time, of all callers: fewer than OpenDAL has connections to a Redis.
const NUM_OPERATIONS_MAX: usize = 8;
/// Names that are remembered to be there, where only asking could tell.
const NUM_REMEMBERED_MAX: usize = 1 << 16;

/// Which tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TierKind {
    /// This process's memory.
    Host,
    /// A disk of this node.
    Disk,
    /// Storage that all nodes share.
    Remote,
}

impl TierKind {
    /// The value of the metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            TierKind::Host => "host",
            TierKind::Disk => "disk",
            TierKind::Remote => "remote",
        }
    }

    /// What block events call it.
    pub(super) fn medium(self) -> Medium {
        match self {
            TierKind::Host => Medium::Host,
            TierKind::Disk => Medium::Disk,
            TierKind::Remote => Medium::Remote,
        }
    }

    /// How fast entries are expected to come before any has.
    pub(super) fn unmeasured_bytes_per_second(self) -> f64 {
        match self {
            TierKind::Host => 5e9,
            TierKind::Disk => 1e9,
            TierKind::Remote => 200e6,
        }
    }
}

/// See the module.
pub struct Tier {
    kind: TierKind,
    backend: Arc<dyn TierBackend>,
    format: EntryFormat,
    timeout: Duration,
    is_down: AtomicBool,
    /// Waiting for a turn is no sign of a backend that hangs, so it does not count towards the timeout.
    turns: Semaphore,
    remembered: Mutex<Remembered>,
    metrics: TierMetrics,
    this: Weak<Tier>,
}

impl Tier {
    /// A tier over `backend` with entries of `format`. No operation takes longer than `timeout` once it has its turn.
    pub fn new(
        kind: TierKind,
        backend: Arc<dyn TierBackend>,
        format: EntryFormat,
        timeout: Duration,
        labels: &[metrics::Label],
    ) -> Arc<Self> {
        let metrics = TierMetrics::new(kind, labels);
        Arc::new_cyclic(|this| Self {
            kind,
            backend,
            format,
            timeout,
            is_down: AtomicBool::new(false),
            turns: Semaphore::new(NUM_OPERATIONS_MAX),
            remembered: Mutex::default(),
            metrics,
            this: this.clone(),
        })
    }

    /// Which it is.
    pub fn kind(&self) -> TierKind {
        self.kind
    }

    /// Whether it is left alone for now.
    pub fn is_down(&self) -> bool {
        self.is_down.load(Ordering::Acquire)
    }

    /// Whether the entry is held, if that is known without asking anybody. A hint, like everything about presence.
    pub fn is_known_to_hold(&self, name: ContentName) -> Option<bool> {
        if self.is_down() {
            return Some(false);
        }
        let known = self.backend.is_known_to_hold(self.key(name));
        known.or_else(|| self.remembered().has(name.key).then_some(true))
    }

    /// What the entry is that was put under `name`, for who follows this tier.
    pub(super) fn tell_stored(&self, name: ContentName, block: StoredBlock) {
        self.backend.tell_stored(self.key(name), block);
    }

    /// Bytes kept and bytes given up, as far as they are known, into the gauges.
    pub(super) fn show_usage(&self) {
        self.metrics.show_usage(self.backend.used_bytes(), self.backend.evicted_bytes());
    }

    pub(super) fn metrics(&self) -> &TierMetrics {
        &self.metrics
    }

    /// Closes the backend.
    pub async fn close(&self) {
        self.backend.close().await;
    }

    fn key(&self, name: ContentName) -> EntryKey {
        let (tag, _) = self.format.tag().split_first_chunk::<16>().expect("a tag has 32 bytes");
        EntryKey { content: name.key, tag: u128::from_be_bytes(*tag) }
    }

    fn remembered(&self) -> MutexGuard<'_, Remembered> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the backend no longer than allowed. `None`: it failed, and the tier is down.
    async fn ask<T>(&self, operation: &'static str, asked: impl Future<Output = Result<T, BackendError>>) -> Option<T> {
        // Fails only if somebody closed the semaphore, which nobody does.
        let _turn = self.turns.acquire().await;
        // It may have been found out while this waited.
        if self.is_down() {
            return None;
        }
        let reason = match tokio::time::timeout(self.timeout, asked).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {:?}", self.timeout),
        };
        self.metrics.count_failed(operation);
        if !self.is_down.swap(true, Ordering::AcqRel) {
            tracing::warn!(tier = self.kind.as_str(), operation, reason, "a tier of the store is left alone for now");
            tokio::spawn(probe(self.this.clone()));
        }
        None
    }

    async fn refuse(&self, name: ContentName, bad: super::BadEntry) {
        tracing::warn!(tier = self.kind.as_str(), key = ?name.key, reason = %bad, "a stored entry is not used, and removed");
        self.metrics.count_refused(bad.as_str());
        self.remembered().forget(name.key);
        self.ask("remove", self.backend.remove(self.key(name))).await;
    }

    async fn is_held(&self, name: ContentName) -> bool {
        match self.is_known_to_hold(name) {
            Some(known) => known,
            None => {
                let is_held = self.ask("contains", self.backend.contains(self.key(name))).await == Some(true);
                if is_held {
                    self.remembered().add(name.key);
                }
                is_held
            }
        }
    }
}

/// Tries a tier that is down until it answers, or nobody has it any more.
async fn probe(tier: Weak<Tier>) {
    let nobody = ContentName { key: ContentKey(0), digest: common::content::PrefixDigest([0; 32]) };
    let mut wait = PROBE_AFTER;
    loop {
        tokio::time::sleep(wait).await;
        let Some(tier) = tier.upgrade() else { return };
        let asked = tokio::time::timeout(tier.timeout, tier.backend.contains(tier.key(nobody))).await;
        if let Ok(Ok(_)) = asked {
            // It may have come back empty.
            *tier.remembered() = Remembered::default();
            tier.is_down.store(false, Ordering::Release);
            tracing::info!(tier = tier.kind.as_str(), "the tier answers again");
            return;
        }
        wait = (wait * 2).min(PROBE_AFTER_MAX);
    }
}

impl BlockStore for Tier {
    fn num_held<'a>(&'a self, names: &'a [ContentName]) -> StoreFuture<'a, usize> {
        Box::pin(async move {
            let asked = stream::iter(names.iter().copied()).map(|name| self.is_held(name)).buffered(NUM_ASKED);
            asked.take_while(|is_held| std::future::ready(*is_held)).count().await
        })
    }

    fn get(&self, name: ContentName) -> StoreFuture<'_, Option<Entry>> {
        Box::pin(async move {
            if self.is_down() {
                self.metrics.count_miss();
                return None;
            }
            let started_at = Instant::now();
            let found = self.ask("get", self.backend.get(self.key(name), self.format.entry_bytes())).await;
            let Some(Some(bytes)) = found else {
                self.metrics.count_miss();
                // Something that was there is gone: so may be the rest.
                if found.is_some() && self.remembered().has(name.key) {
                    *self.remembered() = Remembered::default();
                }
                return None;
            };
            match self.format.check(name, bytes) {
                Ok(entry) => {
                    self.metrics.count_hit(entry.bytes().len(), started_at.elapsed());
                    Some(entry)
                }
                Err(bad) => {
                    self.metrics.count_miss();
                    self.refuse(name, bad).await;
                    None
                }
            }
        })
    }

    fn put(&self, name: ContentName, entry: Entry) -> StoreFuture<'_, bool> {
        Box::pin(async move {
            if self.is_down() {
                self.metrics.count_dropped("down");
                return false;
            }
            if self.is_held(name).await {
                return true;
            }
            let (started_at, num_bytes) = (Instant::now(), entry.bytes().len());
            let put = self.backend.put(self.key(name), entry.bytes().clone());
            let is_put = self.ask("put", put).await.is_some();
            if is_put {
                self.remembered().add(name.key);
                self.metrics.count_put(num_bytes, started_at.elapsed());
            } else {
                self.metrics.count_dropped("failed");
            }
            is_put
        })
    }

    fn remove(&self, name: ContentName) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            self.remembered().forget(name.key);
            if !self.is_down() {
                self.ask("remove", self.backend.remove(self.key(name))).await;
            }
        })
    }
}

/// The newest names that were seen to be there.
#[derive(Default)]
struct Remembered {
    keys: HashSet<ContentKey>,
    order: VecDeque<ContentKey>,
}

impl Remembered {
    fn has(&self, key: ContentKey) -> bool {
        self.keys.contains(&key)
    }

    fn add(&mut self, key: ContentKey) {
        if self.keys.insert(key) {
            self.order.push_back(key);
        }
        while self.order.len() > NUM_REMEMBERED_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.keys.remove(&oldest);
            }
        }
    }

    /// Its place in the order stays, and counts, until it is the oldest.
    fn forget(&mut self, key: ContentKey) {
        self.keys.remove(&key);
    }
}
