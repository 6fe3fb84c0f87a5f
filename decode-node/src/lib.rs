//! The decode role: reserve blocks, have the prompt computed, receive its KV, generate tokens.
//!
//! A request's way through here, and the file that tells it:
//!
//! ```text
//!  proxy ── Generate ──> generate   admit (blocks reserved) ─> receive ─> stream tokens ─> Done
//!                           │            │                        │
//!                        engine       a link to a             DecodeHandover (common) decides;
//!                                     prefill node            landing (kv-connector) takes the bytes
//! ```
//!
//! What it does not do: text (the proxy's), choosing among prefill nodes (the proxy proposes candidates
//! in order), arithmetic and scheduling (`engine`), moving bytes (`kv-connector`).
//!
//! Everything a request holds is held by values inside one future: its engine handle (blocks), its
//! landing (the right to write them), its stream to the prefill node (what is pinned there). However the
//! future ends, they are dropped in that order's reverse, and nothing is left.
//!
//! 1. `generate`: one request as a story.
//! 2. `receive`: the shell around the hand-over state machine.
//! 3. `stored`: what the prefix-block store holds, and what is published to it.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod generate;
mod node;
mod node_metrics;
mod receive;
mod stored;

pub use node::DecodeNode;
