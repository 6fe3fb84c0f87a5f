//! The prefill role: compute prompts in chunks and send their KV as it appears.
//!
//! ```text
//!  decode node ── Prefill ──> request   queue ─> admitted ─> chunk by chunk ─> first tokens ─> Received
//!                                 │                │
//!                              engine          a prefix that another node holds may be fetched first;
//!                                              each layer of each chunk, as it is written:
//!                                              read the pool, digest, send one extent
//! ```
//!
//! The stream is the lease: when it ends, for whatever reason, the request's future ends, its engine
//! handle is dropped and the blocks are unpinned; what was computed stays as evictable cache.
//!
//! What it does not do: generate beyond token #1, choose decode nodes, dial them (they dial it). It dials other
//! prefill nodes, whose prefixes it fetches as they fetch its own.
//!
//! 1. `request`: one hand-over as a story.
//! 2. `prefix`: a prefix that the decode node, the store or a peer holds: fetch it, load it, recompute it, or leave the
//!    rest to that node.
//! 3. `stored`: the store's part in it. `peer`: asking another prefill node.
//! 4. `prefix_serving`: what another prefill node fetches from here.
//! 5. `estimates`: the figures behind that choice.
//! 6. `node`: what requests share.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod estimates;
mod node;
mod node_metrics;
mod peer;
mod prefix;
mod prefix_serving;
mod request;
mod stored;

pub use node::PrefillNode;
