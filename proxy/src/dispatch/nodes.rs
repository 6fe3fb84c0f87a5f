//! The nodes as the story sees them.

use std::sync::Arc;

use common::content::ContentKey;
use common::wire::{Generate, GenerateEvent};
use futures::stream::BoxStream;

use crate::route::{ClusterView, HeldPrefixes, NodeView};

/// A node that does not answer any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeLost {
    /// The request never reached it.
    #[error("the node could not be reached: {0}")]
    Unreachable(String),
    /// It was lost with the request.
    #[error("the node was lost: {0}")]
    Lost(String),
}

/// What a node sends about one `Generate`. Dropping it resets the stream, which cancels the request there.
/// After an error or the last event it ends.
pub type GenerateStream = BoxStream<'static, Result<GenerateEvent, NodeLost>>;

/// The cluster's nodes.
pub trait Nodes: Send + Sync + 'static {
    /// Those that are ready, at this moment.
    fn view(&self) -> Arc<ClusterView>;

    /// How much each node is believed to hold of a prompt whose granules have the keys that `keys` makes.
    fn held_prefixes(&self, keys: &dyn Fn() -> Vec<ContentKey>) -> HeldPrefixes;

    /// Opens a stream to a node of the view.
    fn generate(&self, node: &NodeView, request: Generate) -> GenerateStream;
}
