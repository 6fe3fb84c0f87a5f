//! What a node has of the store: its tiers, loading from them, and publishing to them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::block_events::BlockSink;
use common::content::{ContentChain, GRANULE_TOKENS};
use common::host_budget::HostBudget;
use common::tokens::Token;
use metrics::Label;
use tokio_util::sync::CancellationToken;

use super::disk::{DiskBackend, OpenDiskError};
use super::entry::EntryFormat;
use super::host::HostBackend;
use super::load::{self, FoundPrefix, LoadLimits, LoadPlan, PrefixLoad};
use super::named_tokens::NamedTokens;
use super::publish::{PinPrefix, Publisher};
use super::remote::RemoteBackend;
use super::remote_url::BadRemoteUrl;
use super::store_metrics::UseMetrics;
use super::tier::{Tier, TierKind};
use super::tiered::TieredStore;

/// A disk that takes longer for one entry is not worth asking.
const DISK_TIMEOUT: Duration = Duration::from_secs(5);
/// Memory answers at once.
const HOST_TIMEOUT: Duration = Duration::from_secs(5);

/// Which tiers, and their limits.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Host memory, shared with parked KV; of 0 bytes: no host tier.
    pub host_budget: Arc<HostBudget>,
    /// Folder of this node alone, and its budget.
    pub disk: Option<(PathBuf, u64)>,
    /// Shared storage.
    pub remote_url: Option<String>,
    /// Budget of a shared folder.
    pub remote_bytes: Option<u64>,
    /// How long Redis keeps an entry.
    pub remote_ttl: Option<Duration>,
    /// Longest wait for one answer of the shared storage.
    pub remote_timeout: Duration,
    /// Entries that may wait to be written, for the disk and the shared storage each.
    pub queue_bytes: u64,
    /// How fast entries are expected to come, instead of measuring it.
    pub bytes_per_second: Option<u64>,
    /// Of each load.
    pub load: LoadLimits,
}

/// A store that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenStoreError {
    /// The disk tier.
    #[error(transparent)]
    Disk(#[from] OpenDiskError),
    /// The shared storage.
    #[error(transparent)]
    Remote(#[from] BadRemoteUrl),
    /// The queues.
    #[error("--store-queue-bytes is {queue_bytes}, expected at least {num_bytes_min}: one entry of this model's KV")]
    QueueTooSmall {
        /// What was given.
        queue_bytes: u64,
        /// What is needed.
        num_bytes_min: u64,
    },
    /// The host tier.
    #[error("--store-host-bytes is {host_bytes}, expected 0 or at least {num_bytes_min}: one entry of this model's KV")]
    HostTooSmall {
        /// What was given.
        host_bytes: u64,
        /// What is needed.
        num_bytes_min: u64,
    },
}

/// See the module.
pub struct NodeStore {
    store: Arc<TieredStore>,
    publisher: Publisher,
    load_limits: LoadLimits,
    metrics: UseMetrics,
}

impl NodeStore {
    /// Opens the tiers of `config`; `None` if there are none. `pool` is where published KV is found, `events` hears
    /// what the host tier keeps and gives up, `labels` say whose metrics they are.
    ///
    /// # Errors
    /// [`OpenStoreError`]. A shared storage that does not answer is none: it may come later.
    pub async fn open(
        config: &StoreConfig,
        format: EntryFormat,
        pool: Arc<dyn PinPrefix>,
        events: Arc<dyn BlockSink>,
        labels: Vec<Label>,
    ) -> Result<Option<Arc<Self>>, OpenStoreError> {
        let mut tiers = Vec::new();
        let host_bytes = config.host_budget.bytes_max();
        if host_bytes > 0 {
            let num_bytes_min = 2 * format.entry_bytes() as u64;
            if host_bytes < num_bytes_min {
                return Err(OpenStoreError::HostTooSmall { host_bytes, num_bytes_min });
            }
            let backend = Arc::new(HostBackend::sharing(&config.host_budget).telling(events));
            tiers.push(Tier::new(TierKind::Host, backend, format, HOST_TIMEOUT, &labels));
        }
        if let Some((folder, budget_bytes)) = &config.disk {
            let backend = DiskBackend::open(folder, *budget_bytes, format.entry_bytes()).await?;
            tiers.push(Tier::new(TierKind::Disk, Arc::new(backend), format, DISK_TIMEOUT, &labels));
        }
        if let Some(url) = &config.remote_url {
            let backend = RemoteBackend::open(url, config.remote_bytes, config.remote_ttl)?;
            tracing::info!(storage = backend.shown(), "KV is shared through this storage");
            tiers.push(Tier::new(TierKind::Remote, Arc::new(backend), format, config.remote_timeout, &labels));
        }
        if tiers.is_empty() {
            return Ok(None);
        }
        let num_bytes_min = (format.entry_bytes() as u64).next_multiple_of(1024);
        if config.queue_bytes < num_bytes_min {
            return Err(OpenStoreError::QueueTooSmall { queue_bytes: config.queue_bytes, num_bytes_min });
        }
        let bytes_per_second = config.bytes_per_second.map(|bytes| bytes as f64);
        let store = TieredStore::new(tiers, format, config.queue_bytes, bytes_per_second);
        Ok(Some(Arc::new(Self::over(store, config.load, pool, labels))))
    }

    /// A node's store over tiers that are there already.
    pub fn over(store: TieredStore, load_limits: LoadLimits, pool: Arc<dyn PinPrefix>, labels: Vec<Label>) -> Self {
        let store = Arc::new(store);
        let metrics = UseMetrics::new(labels);
        let publisher = Publisher::start(store.clone(), pool, metrics.publications.clone());
        Self { store, publisher, load_limits, metrics }
    }

    /// The tiers.
    pub fn tiers(&self) -> &TieredStore {
        &self.store
    }

    /// The longest prefix of `tokens`, whose granules `chain` names, that is held; never with the last token, whose
    /// logits are needed.
    pub async fn find(&self, chain: &ContentChain, tokens: &[Token]) -> FoundPrefix {
        let mut granules = NamedTokens::new(chain, tokens, tokens.len().saturating_sub(1) / GRANULE_TOKENS);
        let lookup = self.store.look_up(granules.names()).await;
        granules.truncate(lookup.num_held());
        FoundPrefix { granules, lookup }
    }

    /// What loading what was found is expected to take, behind `first_token`.
    pub fn expected_load(&self, found: &FoundPrefix, first_token: usize) -> Duration {
        self.store.expected_load(&found.lookup, first_token / GRANULE_TOKENS)
    }

    /// Loads KV into blocks while the engine computes around it. Dropped, it stops: nothing is written afterwards.
    pub fn load(self: &Arc<Self>, found: FoundPrefix, plan: LoadPlan) -> PrefixLoad {
        let (node_store, prefix, met) = (self.clone(), plan.prefix.clone(), CancellationToken::new());
        let is_met = met.clone();
        let loading = async move {
            let loaded = load::load(&node_store.store, &found, plan, node_store.load_limits, is_met).await;
            node_store.metrics.count_load(&loaded);
            tracing::info!(
                num_tokens = loaded.num_tokens,
                num_computed_tokens = loaded.num_computed_tokens,
                millis = loaded.took.as_secs_f64() * 1e3,
                end = loaded.end.as_str(),
                "prefix loaded from the store"
            );
            loaded
        };
        PrefixLoad::new(prefix, met, loading)
    }

    /// Offers the KV of `tokens`, whose granules `chain` names, as far as it is still in the pool, to every tier that
    /// lacks it. Returns at once.
    pub fn publish(&self, chain: &ContentChain, tokens: &[Token]) {
        let granules = NamedTokens::new(chain, tokens, usize::MAX);
        if !granules.names().is_empty() && !self.publisher.offer(granules) {
            self.metrics.dropped_publications.increment(1);
        }
    }

    /// Resolves when everything that was published before is written or given up.
    pub async fn written(&self) {
        self.publisher.emptied().await;
        self.store.written().await;
    }

    /// Writes what is left, for no longer than `timeout`, and closes the tiers.
    pub async fn close(&self, timeout: Duration) {
        let closing = async {
            self.publisher.emptied().await;
            self.store.close().await;
        };
        if tokio::time::timeout(timeout, closing).await.is_err() {
            tracing::warn!("the store was not written out in time; what is missing will be computed again");
        }
    }
}
