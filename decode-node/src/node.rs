//! The node: what its requests share, and the loop that accepts them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::config::DecodeArgs;
use common::content::{ChainRoot, ContentChain};
use common::handover::prefix_choice::{UNMEASURED_PREFILL_TOKENS_PER_SECOND, expected_prefill};
use common::ids::Generation;
use common::kv_memory::KvMemory;
use common::wire::{Directory, Generate, GenerateEvent, NodeError, Open};
use engine::core::EngineHandle;
use kv_connector::fencing::Fences;
use kv_connector::membership::NodePresence;
use kv_connector::peers::Peers;
use kv_connector::store::NodeStore;
use kv_connector::transfer::LandingZone;
use kv_connector::{ControlReceiver, Fabric, IncomingStream};
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::generate;
use crate::node_metrics::NodeMetrics;

/// Connections to prefill nodes that are kept: as many as have a share of the receive memory by default.
const NUM_WARM_LINKS_MAX: usize = 64;

/// A decode node over a running engine and a bound fabric.
pub struct DecodeNode {
    node: Arc<Node>,
    tasks: TaskTracker,
}

pub(crate) struct Node {
    pub(crate) engine: EngineHandle,
    pub(crate) peers: Peers,
    pub(crate) landing_zone: LandingZone,
    pub(crate) memory: Arc<dyn KvMemory>,
    pub(crate) fences: Fences,
    pub(crate) args: DecodeArgs,
    pub(crate) metrics: NodeMetrics,
    /// KV beyond the pool.
    pub(crate) store: Option<Arc<NodeStore>>,
    presence: NodePresence,
    fabric: Fabric,
    generations: AtomicU64,
}

impl Node {
    pub(crate) fn is_draining(&self) -> bool {
        self.presence.is_draining()
    }

    pub(crate) fn next_generation(&self) -> Generation {
        Generation(self.generations.fetch_add(1, Ordering::Relaxed))
    }

    /// What computing `num_tokens` more prompt tokens here would take, behind those that are being computed.
    pub(crate) fn expected_prefill(&self, num_tokens: u64) -> Duration {
        let num_tokens_ahead = self.engine.status().borrow().num_running_prompt_tokens;
        expected_prefill(num_tokens, num_tokens_ahead, self.prefill_tokens_per_second())
    }

    /// How fast prompts are computed here, beside what decodes.
    pub(crate) fn prefill_tokens_per_second(&self) -> f64 {
        let set = self.args.local_prefill_tokens_per_second.map(f64::from);
        let measured = || self.engine.status().borrow().prefill_tokens_per_second;
        set.or_else(measured).unwrap_or(UNMEASURED_PREFILL_TOKENS_PER_SECOND)
    }

    pub(crate) fn content_chain(&self, generate: &Generate) -> ContentChain {
        let root = ChainRoot { salt: generate.salt.clone(), ..ChainRoot::of_model(self.engine.model().identity) };
        let mut chain = ContentChain::new(&root);
        chain.extend(&generate.tokens.0);
        chain
    }
}

impl DecodeNode {
    /// Puts a node together; [`serve`](Self::serve) runs it.
    pub fn new(engine: EngineHandle, fabric: Fabric, presence: NodePresence, args: DecodeArgs) -> Self {
        let landing_zone = fabric.landing_zone();
        let memory: Arc<dyn KvMemory> = engine.pool().clone();
        let metrics = NodeMetrics::new(fabric.hello().node.as_str());
        let node = Node {
            peers: Peers::new(fabric.clone(), NUM_WARM_LINKS_MAX),
            engine,
            landing_zone,
            memory,
            fences: Fences::default(),
            args,
            metrics,
            store: None,
            presence,
            fabric,
            generations: AtomicU64::new(1),
        };
        Self { node: Arc::new(node), tasks: TaskTracker::new() }
    }

    /// Loads from this store, and publishes to it. To be called before it serves.
    pub fn with_store(mut self, store: Option<Arc<NodeStore>>) -> Self {
        let node = Arc::get_mut(&mut self.node).expect("nobody else has the node before it serves");
        node.store = store;
        self
    }

    /// Requests that are being served.
    pub fn num_requests(&self) -> usize {
        self.node.fences.num_requests()
    }

    /// Accepts streams until the fabric is closed. While draining, new requests are refused; waiting for
    /// the running ones is the caller's ([`Self::finished`]).
    pub async fn serve(&self) {
        while let Some(stream) = self.node.fabric.accept().await {
            self.on_stream(stream);
        }
    }

    /// Resolves when no request is being served; call it once draining has begun.
    pub async fn finished(&self, deadline: Duration) -> bool {
        self.tasks.close();
        tokio::time::timeout(deadline, self.tasks.wait()).await.is_ok()
    }

    fn on_stream(&self, stream: IncomingStream) {
        let node = self.node.clone();
        let IncomingStream { peer, open, mut sender, receiver, .. } = stream;
        match open {
            Open::Generate(generate) => {
                let span = tracing::info_span!("request", id = %generate.request, attempt = generate.attempt.0, node = %node.fabric.hello().node);
                if self.tasks.is_closed() {
                    tokio::spawn(async move {
                        let refusal = GenerateEvent::Failed(NodeError::Draining);
                        if sender.send(&refusal).await.is_ok() {
                            sender.finish();
                        }
                    });
                    return;
                }
                self.tasks.spawn(generate::serve(node, *generate, sender, receiver).instrument(span));
            }
            Open::Watch(_) => {
                tracing::info!(proxy = %peer.node, "a proxy watches this node");
                let directory = follow_directory(node.clone(), receiver);
                let presence = node.presence.clone();
                tokio::spawn(async move {
                    tokio::select! {
                        () = presence.serve_watch(sender) => {}
                        () = directory => {}
                    }
                });
            }
            Open::WatchBlocks(watch) => {
                tokio::spawn(async move { node.presence.serve_blocks(node.fabric.hello().epoch, watch, sender).await });
            }
            // The fabric lets nobody open anything else here.
            other => tracing::warn!(peer = %peer.node, "refused a stream that is not for a decode node: {other:?}"),
        }
    }
}

async fn follow_directory(node: Arc<Node>, mut receiver: ControlReceiver) {
    while let Ok(Some(directory)) = receiver.recv::<Directory>().await {
        node.peers.update(&directory);
    }
}
