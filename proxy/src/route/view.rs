//! What the proxy knows of the nodes at one moment.

use std::sync::Arc;

use common::ids::{Epoch, NodeId};
use common::model::ModelInfo;
use common::wire::NodeLoad;

use super::own_work::OwnWork;

/// A node that takes requests.
#[derive(Debug, Clone)]
pub struct NodeView {
    /// Its name.
    pub node: NodeId,
    /// Its life: a restarted node is another one.
    pub epoch: Epoch,
    /// Its stay in the view.
    pub stay: Stay,
    /// What it said last; at most about 250 ms old.
    pub load: NodeLoad,
    /// What of that is other proxies' work.
    pub others: OthersWork,
    /// What this proxy has there, as of now.
    pub own: Arc<OwnWork>,
}

/// What a node does for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OthersWork {
    /// Requests.
    pub num_requests: u64,
    /// Prompt tokens to be computed.
    pub num_queued_tokens: u64,
}

impl OthersWork {
    /// Of a node that says `load` now. To be asked once for each of its words.
    pub fn of(load: &NodeLoad, own: &OwnWork) -> Self {
        let num_requests = u64::from(load.num_running).saturating_add(u64::from(load.num_waiting));
        Self {
            num_requests: own.requests.others_of(num_requests),
            num_queued_tokens: own.tokens.others_of(load.num_queued_tokens),
        }
    }
}

/// One life of a node: what it holds is remembered of.
pub type NodeLife = (NodeId, Epoch);

/// One stay of a node among those that can be reached: what a failure is remembered of. A node that was lost and
/// reached again is at another one, even if it was the way there that failed, or this proxy that stood still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stay(pub u64);

impl NodeView {
    /// The node in its present life.
    pub fn life(&self) -> NodeLife {
        (self.node.clone(), self.epoch)
    }

    /// Requests there, as far as anyone knows by now.
    pub fn num_requests(&self) -> usize {
        let requests = self.others.num_requests.saturating_add(self.own.requests.now());
        usize::try_from(requests).unwrap_or(usize::MAX)
    }

    /// Prompt tokens to be computed there, as far as anyone knows by now.
    pub fn num_queued_tokens(&self) -> u64 {
        self.others.num_queued_tokens.saturating_add(self.own.tokens.now())
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
