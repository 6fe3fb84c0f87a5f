//! One request as a story: choose a decode node, generate, and go on elsewhere when it is lost.
//!
//! [`story`] tells it. It commits the tokens of each choice in order ([`choice`]), and a token is the
//! client's once it is committed: a node that takes over continues behind it. What a loss may cost is
//! bounded by the [`retry_budget`] of the whole proxy and, per prompt, by the [`quarantine`], which the
//! [`dispatcher`] keeps. Nodes are
//! reached through [`nodes::Nodes`], over the fabric in operation and scripted ([`fake`]) in tests.
//!
//! Nothing is queued here: tokens are read from the node's stream only when the answer has room for them,
//! so a slow client slows its own stream by flow control and nothing else.

pub mod choice;
pub mod dispatcher;
pub mod fake;
mod leg;
pub mod nodes;
pub mod quarantine;
pub mod retry_budget;
pub mod story;

pub use dispatcher::{DispatchEvent, DispatchRequest, DispatchSettings, Dispatcher};
pub use nodes::{GenerateStream, NodeLost, Nodes};
pub use story::Dispatch;
