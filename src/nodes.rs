//! Prefill and decode nodes: model, engine, fabric, role, in that order; and back in the drain.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use common::config::{
    DecodeArgs, DecodeNodeArgs, EngineArgs, FabricArgs, HostPort, KvQuicArgs, KvTransport, LogArgs, ModelArgs,
    NixlArgs, PrefillArgs, PrefillNodeArgs, StoreArgs, WeightsArgs,
};
use common::host_budget::HostBudget;
use common::ids::{Epoch, NodeId, Role};
use common::model::ModelInfo;
use common::scheduler::SchedulerLimits;
use common::wire::Hello;
use decode_node::DecodeNode;
use engine::core::{COPIED_BYTES_PER_STEP, EngineHandle, EngineOptions};
use engine::pool::{KvPool, PoolMemory};
use kv_connector::block_feed::BlockFeed;
use kv_connector::certs::Identity;
use kv_connector::membership::{NodePresence, stay_registered};
use kv_connector::store::NodeStore;
use kv_connector::transfer::{Nixl, NixlError, NixlPool, SharedPool};
use kv_connector::{BusyPolling, Fabric, FabricConfig, check_free, check_holder};
use prefill_node::PrefillNode;
use tokio::sync::oneshot;

use crate::device::{LoadedModel, load_model};
use crate::{admin, console, hello, shutdown, store, telemetry};

/// What a node whose engine has failed waits until its peers have heard of it.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// What a node that stops waits for its store to be written out.
const STORE_CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Settings of the engine that only one of the two roles has.
#[derive(Debug, Clone)]
pub enum RoleArgs {
    /// The sending end.
    Prefill(PrefillArgs),
    /// The receiving end.
    Decode(DecodeArgs),
}

impl RoleArgs {
    /// The role.
    pub fn role(&self) -> Role {
        match self {
            RoleArgs::Prefill(_) => Role::PrefillNode,
            RoleArgs::Decode(_) => Role::DecodeNode,
        }
    }
}

/// What a node is made of.
pub struct NodeSetup {
    /// Its name.
    pub node: NodeId,
    /// Its certificate.
    pub identity: Identity,
    /// Control listener.
    pub listen: SocketAddr,
    /// Bulk listener, of a prefill node.
    pub bulk_port: u16,
    /// What KV may travel over.
    pub kv_transports: Vec<KvTransport>,
    /// Where NIXL is, if KV may travel over it.
    pub nixl: NixlArgs,
    /// How it travels over QUIC.
    pub kv_quic: KvQuicArgs,
    /// How long its network threads look for more before they sleep, while the engine is idle.
    pub busy_poll: Duration,
    /// Its engine.
    pub engine: EngineArgs,
    /// Longest sequence, if shorter than the model's.
    pub max_model_len: Option<u32>,
    /// Where it keeps KV beyond its pool.
    pub store: StoreArgs,
    /// Its role.
    pub role: RoleArgs,
}

/// A node that serves.
pub struct RunningNode {
    name: NodeId,
    fabric: Fabric,
    presence: NodePresence,
    engine: EngineHandle,
    store: Option<Arc<NodeStore>>,
    role: RunningRole,
}

enum RunningRole {
    Prefill(Arc<PrefillNode>),
    Decode(Arc<DecodeNode>),
}

/// `tandem prefill-node`
///
/// # Errors
/// If the node cannot start.
pub async fn run_prefill_node(args: PrefillNodeArgs) -> anyhow::Result<()> {
    let PrefillNodeArgs { model, weights, engine, fabric, bulk_port, prefill, store, log, .. } = args;
    run_node(model, weights, engine, fabric, bulk_port, store, RoleArgs::Prefill(prefill), log).await
}

/// `tandem decode-node`
///
/// # Errors
/// If the node cannot start.
pub async fn run_decode_node(args: DecodeNodeArgs) -> anyhow::Result<()> {
    let DecodeNodeArgs { model, weights, engine, fabric, decode, store, log, .. } = args;
    run_node(model, weights, engine, fabric, 0, store, RoleArgs::Decode(decode), log).await
}

#[allow(clippy::too_many_arguments, reason = "each is one group of settings, taken apart by two callers")]
async fn run_node(
    model: ModelArgs,
    weights: WeightsArgs,
    engine: EngineArgs,
    fabric: FabricArgs,
    bulk_port: u16,
    store: StoreArgs,
    role: RoleArgs,
    log: LogArgs,
) -> anyhow::Result<()> {
    let recorder = telemetry::init(&log)?;
    let stop = shutdown::on_signal()?;
    let kind = role.role();
    let default_name = NodeId::new(kind.as_str()).expect("a role's name is a node name");
    let name = fabric.identity.node_id_or(default_name);
    let tls = fabric.identity.tls_paths(&name)?;
    let identity = Identity::load(&tls.ca, &tls.cert, &tls.key)?;
    check_holder(&identity, kind, &name)?;
    let starting = async {
        let listen = resolve(&HostPort { host: fabric.host.clone(), port: fabric.port }).await?;
        // Before the weights: what is wrong with a name, a port or a folder should not be told after minutes.
        let metrics = fabric.metrics_port.map(|port| admin::bind(SocketAddr::new(listen.ip(), port))).transpose()?;
        let bulk = (kind == Role::PrefillNode).then_some(SocketAddr::new(listen.ip(), bulk_port));
        check_free([listen].into_iter().chain(bulk)).with_context(|| format!("start the fabric of {name}"))?;
        for proxy in &fabric.register {
            resolve(proxy).await?;
        }
        store::check(&store, &name).with_context(|| format!("open the prefix-block store of {name}"))?;
        let loaded = load_model(model_folder(&model).await?, &weights, &engine, 1).await?;
        let setup = NodeSetup {
            node: name.clone(),
            identity,
            listen,
            bulk_port,
            kv_transports: fabric.kv_transports.clone(),
            nixl: fabric.nixl.clone(),
            kv_quic: fabric.kv_quic.clone(),
            busy_poll: fabric.busy_poll,
            engine,
            max_model_len: weights.max_model_len,
            store,
            role,
        };
        anyhow::Ok((start(loaded, setup).await?, metrics))
    };
    let Some(started) = shutdown::until_ready(&stop, starting).await else { return Ok(()) };
    let (node, metrics) = started?;
    if let Some(socket) = metrics {
        match admin::serve(socket, recorder, node.health()) {
            Ok(metrics) => tracing::info!("metrics on http://{metrics}/metrics"),
            Err(error) => {
                node.leave_at_once().await;
                return Err(error);
            }
        }
    }
    for proxy in fabric.register {
        tokio::spawn(stay_registered(node.fabric.clone(), proxy, kind, node.address()));
    }
    console::say(format_args!("{kind} {name} ready on {}", node.address()));
    let left = tokio::select! {
        () = stop.cancelled() => node.drain(fabric.identity.drain_timeout).await,
        reason = node.failed() => Err(reason),
    };
    if let Err(reason) = left {
        node.leave_at_once().await;
        anyhow::bail!("the engine of {name} failed: {reason}");
    }
    Ok(())
}

/// The first address of a host name.
///
/// # Errors
/// If it has none.
pub async fn resolve(address: &HostPort) -> anyhow::Result<SocketAddr> {
    let mut found = tokio::net::lookup_host((address.host.as_str(), address.port))
        .await
        .with_context(|| format!("look up {address}"))?;
    found.next().with_context(|| format!("{address} has no address"))
}

/// The folder of a checkpoint: given as such, or a Hub id whose files are in, or come into, the Hub's cache.
///
/// # Errors
/// If it is neither.
pub async fn model_folder(args: &ModelArgs) -> anyhow::Result<PathBuf> {
    Ok(engine::hub::resolve_from_env(&args.model, args.revision.as_deref()).await?)
}

/// Starts a node of `setup` over a loaded model.
///
/// # Errors
/// If the KV cache does not fit, the address is taken or the certificate is not usable.
pub async fn start(model: LoadedModel, setup: NodeSetup) -> anyhow::Result<RunningNode> {
    let NodeSetup {
        node,
        identity,
        listen,
        bulk_port,
        kv_transports,
        nixl,
        kv_quic,
        busy_poll,
        engine,
        max_model_len,
        store,
        role,
    } = setup;
    let is_sharing = kv_transports.contains(&KvTransport::Shm);
    // KV is read out of the pool of a prefill node; nobody else's is looked into.
    let memory = match role {
        RoleArgs::Prefill(_) if is_sharing => PoolMemory::Shareable,
        _ => PoolMemory::Private,
    };
    let runner =
        model.runner(&engine, max_model_len, memory).with_context(|| format!("make the KV cache of {node}"))?;
    let info = runner.model().clone();
    let block_bytes = runner.pool().block_bytes();
    let limits = scheduler_limits(&engine, &role, &store, &info, block_bytes);
    let host_budget = Arc::new(HostBudget::new(store.store_host_bytes));
    let options =
        EngineOptions { limits, host_budget: host_budget.clone(), role: role.role().as_str(), node: node.to_string() };
    let blocks = Arc::new(BlockFeed::default());
    let (engine, engine_thread) =
        engine::core::start_reporting(runner, options, Some(blocks.clone())).context("start the engine's thread")?;
    wait_at_the_end(engine_thread).await;
    let opened = store::open(&store, &node, role.role(), &engine, host_budget, blocks.clone()).await;
    let store = opened.with_context(|| format!("open the prefix-block store of {node}"))?;
    let hello = Hello {
        node: node.clone(),
        role: role.role(),
        epoch: Epoch(rand::random()),
        model: Some(info),
        bulk_port: None,
    };
    let check = hello::check(&hello);
    let mut config = FabricConfig::new(listen, identity, hello);
    config.check = check;
    if let RoleArgs::Prefill(_) = role {
        config.bulk_listen = Some(SocketAddr::new(listen.ip(), bulk_port));
    }
    config.shared_pool = shared_pool(engine.pool()).with_context(|| format!("share the KV cache of {node}"))?;
    config.is_reading_shared_pools = is_sharing;
    if kv_transports.contains(&KvTransport::CudaIpc) && engine.pool().device_pool().is_some() {
        config.device_pool = Some(engine.pool().clone());
    }
    if kv_transports.contains(&KvTransport::Nixl) {
        // KV is fetched out of the pool of a prefill node; nobody else's is to be got at.
        config.nixl = open_nixl(&nixl, engine.pool(), matches!(role, RoleArgs::Prefill(_)))?;
    }
    config.set_kv_quic(&kv_quic);
    config.busy_polling = busy_polling(busy_poll, &engine);
    let fabric = Fabric::bind(config).with_context(|| format!("start the fabric of {node} on {listen}"))?;
    let status = engine.status();
    let presence = NodePresence::new(move || status.borrow().load).with_blocks(blocks);
    let role = match role {
        RoleArgs::Prefill(args) => {
            let node =
                PrefillNode::new(engine.clone(), fabric.clone(), presence.clone(), args).with_store(store.clone());
            let node = Arc::new(node);
            let serving = node.clone();
            tokio::spawn(async move { serving.serve().await });
            RunningRole::Prefill(node)
        }
        RoleArgs::Decode(args) => {
            let node =
                DecodeNode::new(engine.clone(), fabric.clone(), presence.clone(), args).with_store(store.clone());
            let node = Arc::new(node);
            let serving = node.clone();
            tokio::spawn(async move { serving.serve().await });
            RunningRole::Decode(node)
        }
    };
    Ok(RunningNode { name: node, fabric, presence, engine, store, role })
}

/// The runtime's end waits for a thread that uses the device, see [`cli`](crate::cli).
async fn wait_at_the_end(thread: JoinHandle<()>) {
    let (began, has_begun) = oneshot::channel();
    tokio::task::spawn_blocking(move || {
        let _ = began.send(());
        // Its panics were told.
        let _ = thread.join();
    });
    // A task that has not begun is not waited for.
    let _ = has_begun.await;
}

/// The network's threads get a core for themselves only while the engine needs none, as while it waits for KV.
fn busy_polling(time_max: Duration, engine: &EngineHandle) -> Option<BusyPolling> {
    let status = engine.status();
    let may_poll = move || !status.borrow().load.needs_steps();
    (!time_max.is_zero()).then(|| BusyPolling { time_max, may_poll: Arc::new(may_poll) })
}

/// NIXL, unless it does not go with the device that the pool is on: as with `cuda-ipc`, only the device can tell.
///
/// # Errors
/// It cannot be loaded, or not be used at all.
fn open_nixl(args: &NixlArgs, pool: &Arc<KvPool>, is_fetched_from: bool) -> Result<Option<Nixl>, NixlError> {
    let memory = match pool.device_pool() {
        Some(_) => NixlPool::Device(pool.clone()),
        None => NixlPool::Host { memory: pool.clone(), num_bytes: pool.num_bytes() },
    };
    match Nixl::new(&args.nixl_library, memory, is_fetched_from) {
        Err(reason @ NixlError::NoDevice(_)) => {
            tracing::warn!(%reason, "KV does not go over nixl here: it takes the other ways that --kv-transports lists");
            Ok(None)
        }
        opened => opened.map(Some),
    }
}

/// What peers on this host may read KV in, if the pool is in memory that can be shared.
fn shared_pool(pool: &Arc<KvPool>) -> anyhow::Result<Option<SharedPool>> {
    let Some((file, num_bytes)) = pool.shared_file() else { return Ok(None) };
    let file = Arc::new(file.try_clone_to_owned().context("duplicate the descriptor")?);
    Ok(Some(SharedPool { memory: pool.clone(), file, num_bytes: num_bytes as u64 }))
}

fn scheduler_limits(
    engine: &EngineArgs,
    role: &RoleArgs,
    store: &StoreArgs,
    info: &ModelInfo,
    block_bytes: usize,
) -> SchedulerLimits {
    let pool_bytes = u64::from(info.num_blocks) * block_bytes as u64;
    // A prompt has all its blocks from the beginning, so nothing is ever preempted at a prefill node.
    let (max_num_prefill_tokens, growth_blocks, parked_bytes) = match role {
        RoleArgs::Prefill(_) => (engine.max_num_batched_tokens, 0, 0),
        RoleArgs::Decode(args) => {
            (args.local_prefill_tokens, args.growth_window_blocks, args.parked_bytes_max(store, pool_bytes))
        }
    };
    SchedulerLimits {
        block_size: info.block_size as usize,
        num_blocks: info.num_blocks as usize,
        max_num_seqs: engine.max_num_seqs as usize,
        max_num_batched_tokens: engine.max_num_batched_tokens as usize,
        max_num_prefill_tokens: max_num_prefill_tokens as usize,
        max_num_waiting: engine.max_num_waiting as usize,
        max_model_len: info.max_model_len as usize,
        growth_blocks: growth_blocks as usize,
        max_num_parked_blocks: (parked_bytes / block_bytes as u64) as usize,
        max_num_copied_blocks: (COPIED_BYTES_PER_STEP / block_bytes).max(1),
        is_prefix_caching: engine.has_prefix_caching(),
        eviction_policy: engine.eviction_policy,
    }
}

impl RunningNode {
    /// What it is.
    pub fn role(&self) -> Role {
        match self.role {
            RunningRole::Prefill(_) => Role::PrefillNode,
            RunningRole::Decode(_) => Role::DecodeNode,
        }
    }

    /// Its control listener.
    pub fn address(&self) -> SocketAddr {
        self.fabric.local_addr()
    }

    /// Its engine.
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// Whether its engine runs.
    pub fn health(&self) -> admin::Health {
        let status = self.engine.status();
        Arc::new(move || match &status.borrow().failure {
            None => Ok(()),
            Some(reason) => Err(format!("the engine failed: {reason}")),
        })
    }

    /// Resolves if its engine fails.
    pub async fn failed(&self) -> String {
        let mut status = self.engine.status();
        loop {
            if let Some(reason) = status.borrow_and_update().failure.clone() {
                return reason;
            }
            if status.changed().await.is_err() {
                return "its thread ended".to_string();
            }
        }
    }

    /// Tells peers that it ends, whose requests then go on elsewhere, and not after they have heard nothing for a while.
    pub async fn leave_at_once(&self) {
        let _ = tokio::time::timeout(LEAVE_TIMEOUT, self.fabric.close()).await;
        self.wait_for_kv_threads().await;
    }

    async fn wait_for_kv_threads(&self) {
        if let Some(thread) = self.fabric.take_kv_thread() {
            wait_at_the_end(thread).await;
        }
    }

    /// Refuses new work, waits for the running requests, closes the fabric, writes the store out.
    ///
    /// # Errors
    /// Why its engine failed meanwhile.
    pub async fn drain(&self, timeout: Duration) -> Result<(), String> {
        tokio::select! {
            biased;
            reason = self.failed() => return Err(reason),
            () = self.finish(timeout) => {}
        }
        self.engine.shutdown();
        tracing::info!(node = %self.name, "drained");
        Ok(())
    }

    async fn finish(&self, timeout: Duration) {
        self.presence.drain();
        let is_finished = match &self.role {
            RunningRole::Prefill(node) => node.finished(timeout).await,
            RunningRole::Decode(node) => node.finished(timeout).await,
        };
        if !is_finished {
            tracing::warn!(node = %self.name, "the drain timed out; running requests move to other nodes");
        }
        self.fabric.close().await;
        self.wait_for_kv_threads().await;
        if let Some(store) = &self.store {
            store.close(STORE_CLOSE_TIMEOUT).await;
        }
    }
}
