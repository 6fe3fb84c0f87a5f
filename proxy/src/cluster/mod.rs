//! Who is in the cluster: nodes listed or self-registered, dialled, watched, and dropped when they are gone.
//!
//! A task per node ([`follow`]) keeps a link and a `Watch` stream; what it hears goes into the table of
//! [`members`], from which the router's view and the prefill directory are made. Beside it the node's block
//! events go into the [index](crate::index). [`registration`] accepts
//! nodes that announce themselves. [`fabric_nodes`] is the way from the story to a node.

pub mod fabric_nodes;
pub mod follow;
mod follow_blocks;
pub mod members;
pub mod registration;
pub mod step_watch;

pub use fabric_nodes::Cluster;
pub use members::Members;
