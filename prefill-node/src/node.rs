//! The node: what its requests share, and the loop that accepts them.

use std::sync::Arc;
use std::time::Duration;

use common::config::PrefillArgs;
use common::shared_metrics::{
    KV_TRANSFERRED_BYTES, OPEN_REQUESTS, REQUEST_PREFILL_SECONDS, REQUEST_QUEUE_SECONDS, SharedMetric,
};
use common::timeline::NodeTimeline;
use common::wire::{NodeError, Open, PrefillEvent};
use engine::core::EngineHandle;
use kv_connector::fencing::Fences;
use kv_connector::membership::NodePresence;
use kv_connector::{Fabric, IncomingStream};
use metrics::{Counter, Gauge, Histogram, Label};
use tokio_util::task::TaskTracker;
use tracing::Instrument;

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
    presence: NodePresence,
    requests: Gauge,
    sent_bytes: Counter,
    queue: Histogram,
    prefill: Histogram,
}

/// Counts a hand-over while it lives.
struct Counted(Gauge);

impl Counted {
    fn new(requests: &Gauge) -> Self {
        requests.increment(1);
        Self(requests.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.decrement(1);
    }
}

impl Node {
    pub(crate) fn is_draining(&self) -> bool {
        self.presence.is_draining()
    }

    pub(crate) fn count_sent(&self, num_bytes: u64) {
        self.sent_bytes.increment(num_bytes);
    }

    pub(crate) fn observe(&self, timeline: &NodeTimeline) {
        self.queue.record(timeline.queue);
        self.prefill.record(timeline.prefill);
    }
}

impl PrefillNode {
    /// Puts a node together; [`serve`](Self::serve) runs it.
    pub fn new(engine: EngineHandle, fabric: Fabric, presence: NodePresence, args: PrefillArgs) -> Self {
        let labels = vec![Label::new("role", "prefill-node"), Label::new("node", fabric.hello().node.to_string())];
        let histogram = |metric: SharedMetric| {
            metrics::describe_histogram!(metric.name, metric.help);
            metrics::histogram!(metric.name, labels.clone())
        };
        metrics::describe_gauge!(OPEN_REQUESTS.name, OPEN_REQUESTS.help);
        metrics::describe_counter!(KV_TRANSFERRED_BYTES.name, KV_TRANSFERRED_BYTES.help);
        let node = Node {
            engine,
            fences: Fences::default(),
            args,
            presence,
            requests: metrics::gauge!(OPEN_REQUESTS.name, labels.clone()),
            sent_bytes: metrics::counter!(KV_TRANSFERRED_BYTES.name, labels.clone()),
            queue: histogram(REQUEST_QUEUE_SECONDS),
            prefill: histogram(REQUEST_PREFILL_SECONDS),
            fabric,
        };
        Self { node: Arc::new(node), tasks: TaskTracker::new() }
    }

    /// Hand-overs that are being served.
    pub fn num_requests(&self) -> usize {
        self.node.fences.num_requests()
    }

    /// Accepts streams until the fabric is closed. While draining, new hand-overs are refused; waiting
    /// for the running ones is the caller's ([`Self::finished`]).
    pub async fn serve(&self) {
        while let Some(stream) = self.node.fabric.accept().await {
            self.on_stream(stream);
        }
    }

    /// Resolves when no hand-over is being served; call it once draining has begun.
    pub async fn finished(&self, deadline: Duration) -> bool {
        self.tasks.close();
        tokio::time::timeout(deadline, self.tasks.wait()).await.is_ok()
    }

    fn on_stream(&self, stream: IncomingStream) {
        let node = self.node.clone();
        let IncomingStream { peer, open, mut sender, receiver, .. } = stream;
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
                let counted = Counted::new(&node.requests);
                let serving = request::serve(node, peer, *prefill, sender, receiver);
                let serving = async move {
                    serving.await;
                    drop(counted);
                };
                self.tasks.spawn(serving.instrument(span));
            }
            Open::Watch(_) => {
                let presence = node.presence.clone();
                tokio::spawn(async move { presence.serve_watch(sender).await });
            }
            // The fabric lets nobody open anything else here.
            other => tracing::warn!(peer = %peer.node, "refused a stream that is not for a prefill node: {other:?}"),
        }
    }
}
