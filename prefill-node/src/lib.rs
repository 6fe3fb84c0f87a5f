//! The prefill role: compute prompts in chunks and send their KV as it appears.
//!
//! ```text
//!  decode node ── Prefill ──> request   queue ─> admitted ─> chunk by chunk ─> first tokens ─> Received
//!                                 │                │
//!                              engine          a prefix that the decode node holds may be fetched first;
//!                                              each layer of each chunk, as it is written:
//!                                              read the pool, digest, send one extent
//! ```
//!
//! The stream is the lease: when it ends, for whatever reason, the request's future ends, its engine
//! handle is dropped and the blocks are unpinned; what was computed stays as evictable cache.
//!
//! What it does not do: generate beyond token #1, choose decode nodes, dial them (they dial it).
//!
//! 1. `request`: one hand-over as a story.
//! 2. `prefix`: a prefix that the decode node or the store holds: fetch it, load it, recompute it, or leave the rest
//!    to that node.
//! 3. `stored`: the store's part in it.
//! 4. `estimates`: the figures behind that choice.
//! 5. `node`: what requests share.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod estimates;
mod node;
mod node_metrics;
mod prefix;
mod request;
mod stored;

pub use node::PrefillNode;
