//! The node: what its requests share, and the loop that accepts them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::config::PrefillArgs;
use common::ids::{Generation, Role};
use common::wire::{Directory, NodeError, Open, PrefillEvent};
use engine::core::EngineHandle;
use kv_connector::fencing::Fences;
use kv_connector::membership::NodePresence;
use kv_connector::peers::Peers;
use kv_connector::store::NodeStore;
use kv_connector::{ControlReceiver, Fabric, IncomingStream};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::estimates::Estimates;
use crate::node_metrics::NodeMetrics;
use crate::peer::NUM_WARM_PEERS_MAX;
use crate::prefix_serving::{self, NUM_SERVED_MAX};
use crate::request;

/// A prefill node over a running engine and a bound fabric.
pub struct PrefillNode {
    node: Arc<Node>,
    tasks: TaskTracker,
}

pub(crate) struct Node {
    pub(crate) engine: EngineHandle,
    pub(crate) fabric: Fabric,
    pub(crate) fences: Fences,
    pub(crate) args: PrefillArgs,
    pub(crate) estimates: Estimates,
    pub(crate) metrics: NodeMetrics,
    /// Other prefill nodes, to fetch prefixes from.
    pub(crate) peers: Peers,
    /// Places for prefixes that are sent to them.
    pub(crate) served: Arc<Semaphore>,
    /// KV beyond the pool.
    pub(crate) store: Option<Arc<NodeStore>>,
    presence: NodePresence,
    generations: AtomicU64,
}

impl Node {
    pub(crate) fn is_draining(&self) -> bool {
        self.presence.is_draining()
    }

    /// Names a reservation that KV is fetched into.
    pub(crate) fn next_generation(&self) -> Generation {
        Generation(self.generations.fetch_add(1, Ordering::Relaxed))
    }
}

impl PrefillNode {
    /// Puts a node together; [`serve`](Self::serve) runs it.
    pub fn new(engine: EngineHandle, fabric: Fabric, presence: NodePresence, args: PrefillArgs) -> Self {
        let node = Node {
            engine,
            fences: Fences::default(),
            estimates: Estimates::new(&args),
            metrics: NodeMetrics::new(fabric.hello().node.as_str()),
            args,
            store: None,
            peers: Peers::new(fabric.clone(), NUM_WARM_PEERS_MAX),
            served: Arc::new(Semaphore::new(NUM_SERVED_MAX)),
            presence,
            generations: AtomicU64::new(1),
            fabric,
        };
        Self { node: Arc::new(node), tasks: TaskTracker::new() }
    }

    /// Loads from this store, and publishes to it. To be called before it serves.
    pub fn with_store(mut self, store: Option<Arc<NodeStore>>) -> Self {
        let node = Arc::get_mut(&mut self.node).expect("nobody else has the node before it serves");
        node.store = store;
        self
    }

    /// Hand-overs that are being served.
    pub fn num_requests(&self) -> usize {
        self.node.fences.num_requests()
    }

    /// Accepts streams until the fabric is closed. While draining, new hand-overs are refused and prefixes still
    /// sent to peers; waiting for the running ones is the caller's ([`Self::finished`]).
    pub async fn serve(&self) {
        while let Some(stream) = self.node.fabric.accept().await {
            self.on_stream(stream);
        }
    }

    /// Resolves when no hand-over and no peer is being served; call it once draining has begun.
    pub async fn finished(&self, deadline: Duration) -> bool {
        self.tasks.close();
        tokio::time::timeout(deadline, self.tasks.wait()).await.is_ok()
    }

    fn on_stream(&self, stream: IncomingStream) {
        let node = self.node.clone();
        let IncomingStream { peer, open, mut sender, receiver, link, .. } = stream;
        match open {
            Open::Prefill(prefill) => {
                if self.tasks.is_closed() {
                    tokio::spawn(async move {
                        if sender.send(&PrefillEvent::Failed(NodeError::Draining)).await.is_ok() {
                            sender.finish();
                        }
                    });
                    return;
                }
                let span = tracing::info_span!("request", id = %prefill.request, attempt = prefill.attempt.0, node = %node.fabric.hello().node);
                let counted = node.metrics.count_request();
                let serving = request::serve(node, peer, *prefill, link.rtt(), sender, receiver);
                let serving = async move {
                    serving.await;
                    drop(counted);
                };
                self.tasks.spawn(serving.instrument(span));
            }
            Open::FetchPrefix(ask) => {
                let span = tracing::info_span!("request", id = %ask.request, attempt = ask.attempt.0, node = %node.fabric.hello().node);
                self.tasks.spawn(prefix_serving::serve(node, peer, *ask, sender, receiver).instrument(span));
            }
            Open::Watch(_) => {
                let presence = node.presence.clone();
                let has_directory = peer.role == Role::Proxy;
                tokio::spawn(async move {
                    tokio::select! {
                        () = presence.serve_watch(sender) => {}
                        () = follow_directory(node, receiver), if has_directory => {}
                    }
                });
            }
            Open::WatchBlocks(watch) => {
                tokio::spawn(async move { node.presence.serve_blocks(node.fabric.hello().epoch, watch, sender).await });
            }
            // The fabric lets nobody open anything else here.
            other => tracing::warn!(peer = %peer.node, "refused a stream that is not for a prefill node: {other:?}"),
        }
    }
}

/// Of the other prefill nodes.
async fn follow_directory(node: Arc<Node>, mut receiver: ControlReceiver) {
    while let Ok(Some(directory)) = receiver.recv::<Directory>().await {
        node.peers.update(&directory);
    }
}
