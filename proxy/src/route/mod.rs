//! Which nodes get a request: a pure choice over a view of the cluster.
//!
//! Nodes are the authority on their own admission, so this only has to be good, not exact: a node that
//! is full says `Busy` and the next one is asked.

pub mod held;
pub mod own_work;
pub mod policy;
pub mod view;

pub use held::HeldPrefixes;
pub use own_work::{OwnCount, OwnWork};
pub use policy::{PromptDemand, pick_decode_node, pick_prefill_nodes, pick_prefix_peer};
pub use view::{ClusterView, NodeLife, NodeView, OthersWork, Stay};
