//! A node's prefix-block store: its settings, and the engine's pool as where published KV is found.

use std::sync::Arc;

use common::block_events::BlockSink;
use common::config::StoreArgs;
use common::content::{ContentName, GRANULE_TOKENS};
use common::host_budget::HostBudget;
use common::ids::{NodeId, Role};
use engine::core::EngineHandle;
use kv_connector::store::{
    DiskBackend, EntryFormat, LoadLimits, NodeStore, OpenStoreError, PinPrefix, PinnedKv, RemoteBackend, StoreConfig,
    StoreFuture,
};
use metrics::Label;

/// Whether what a node's store is made of can be had, as far as that can be told before there is a model.
///
/// # Errors
/// A URL that names no storage, a folder that is not for this node to write to.
pub fn check(args: &StoreArgs, node: &NodeId) -> Result<(), OpenStoreError> {
    if let Some(path) = &args.store_disk_path {
        DiskBackend::check_folder(&path.join(node.as_str()))?;
    }
    if let Some(url) = &args.store_remote_url {
        RemoteBackend::open(url, args.store_remote_bytes, args.store_remote_ttl)?;
    }
    Ok(())
}

/// Opens the store of a node, if its settings have a tier. `host_budget` is that of the host tier, with what is
/// parked; `events` hears what the host tier keeps and gives up.
///
/// # Errors
/// If a tier cannot be had.
pub async fn open(
    args: &StoreArgs,
    node: &NodeId,
    role: Role,
    engine: &EngineHandle,
    host_budget: Arc<HostBudget>,
    events: Arc<dyn BlockSink>,
) -> Result<Option<Arc<NodeStore>>, OpenStoreError> {
    let config = StoreConfig {
        host_budget,
        disk: args.store_disk_path.as_ref().map(|path| (path.join(node.as_str()), args.store_disk_bytes)),
        remote_url: args.store_remote_url.clone(),
        remote_bytes: args.store_remote_bytes,
        remote_ttl: args.store_remote_ttl,
        remote_timeout: args.store_remote_timeout,
        queue_bytes: args.store_queue_bytes,
        bytes_per_second: args.store_bytes_per_second,
        load: LoadLimits { window_bytes: args.store_load_bytes, stall_timeout: args.store_load_stall_timeout },
    };
    let pool = engine.pool();
    let format = EntryFormat::new(engine.model(), pool.num_layers() as usize, pool.extent_bytes(1));
    let labels = vec![Label::new("role", role.as_str()), Label::new("node", node.to_string())];
    NodeStore::open(&config, format, Arc::new(EnginePool(engine.clone())), events, labels).await
}

struct EnginePool(EngineHandle);

impl PinPrefix for EnginePool {
    fn pin(&self, names: Vec<ContentName>) -> StoreFuture<'_, Option<PinnedKv>> {
        Box::pin(async move {
            let pinned = self.0.pin_prefix(names).await?;
            let blocks = pinned.blocks().to_vec();
            let memory = self.0.pool().clone();
            let num_granules = blocks.len() * memory.block_size() / GRANULE_TOKENS;
            Some(PinnedKv { blocks, num_granules, memory, pin: Box::new(pinned) })
        })
    }
}
