//! What the proxy knows of the nodes at one moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use common::ids::{Epoch, NodeId};
use common::model::ModelInfo;
use common::wire::NodeLoad;

/// A node that takes requests.
#[derive(Debug, Clone)]
pub struct NodeView {
    /// Its name.
    pub node: NodeId,
    /// Its life: a restarted node is another one.
    pub epoch: Epoch,
    /// What it said last; at most about 250 ms old.
    pub load: NodeLoad,
    /// Requests this proxy has open there: known at once, where `load` is a moment old.
    pub num_open: Arc<AtomicUsize>,
    /// Prompt tokens that this proxy has sent there to be computed and that are not known to be: as early as
    /// `num_open`.
    pub num_sent_tokens: Arc<AtomicU64>,
}

/// One life of a node: what a failure is remembered of.
pub type NodeLife = (NodeId, Epoch);

impl NodeView {
    /// The node in its present life.
    pub fn life(&self) -> NodeLife {
        (self.node.clone(), self.epoch)
    }

    /// Requests there, as far as anyone knows by now.
    pub fn num_requests(&self) -> usize {
        let told = (self.load.num_running as usize).saturating_add(self.load.num_waiting as usize);
        told.max(self.num_open.load(Ordering::Relaxed))
    }

    /// Prompt tokens to be computed there, as far as anyone knows by now.
    pub fn num_queued_tokens(&self) -> u64 {
        self.load.num_queued_tokens.max(self.num_sent_tokens.load(Ordering::Relaxed))
    }
}

/// The nodes that are up, by role, and what they serve.
#[derive(Debug, Clone, Default)]
pub struct ClusterView {
    /// Ready decode nodes.
    pub decode: Vec<NodeView>,
    /// Ready prefill nodes.
    pub prefill: Vec<NodeView>,
    /// Prefill nodes that take no requests any more and still send what they hold.
    pub draining_prefill: Vec<NodeView>,
    /// The model all of them serve; `None` until the first decode node was reached. `max_model_len` is
    /// the smallest of the ready decode nodes', so that any of them can take over.
    pub model: Option<ModelInfo>,
}
