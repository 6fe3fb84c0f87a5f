//! The vocabulary and the pure logic of Tandem: no I/O, no clock, no async, no arithmetic.
//!
//! Everything two processes must agree on is defined here once: how a block of KV is named, what a
//! message looks like, when a sequence may run, what the two ends of a hand-over do next. State
//! machines take events and `now` and return actions, so that they are tested in microseconds and
//! explored exhaustively without a socket.
//!
//! What is deliberately absent: sockets, files, threads, tokio, tracing, metrics. A type in here never
//! reads a clock or an environment variable; the shells (`prefill-node`, `decode-node`, `proxy`, the
//! root command) do that and pass the values in.
//!
//! Reading order, which is the order in which a request meets them:
//!
//! 1. [`ids`], [`tokens`]: what things are called.
//! 2. [`model`], [`kv_spec`], [`kv_memory`]: what must be equal between two nodes, and what must not be confused.
//! 3. [`content`]: a block is known by its content; [`gguf`]: a file format that nodes and proxy both read.
//! 4. [`sampling`]: how the next token is chosen, and when a sequence ends.
//! 5. [`wire`]: the messages, and their bounded encoding.
//! 6. [`block_manager`], [`eviction`], [`sequence`], [`scheduler`]: paged KV and continuous batching.
//! 7. [`block_events`], [`block_log`]: what is told of a node's blocks, numbered and resumable.
//! 8. [`handover`]: reserve, grant, land, verify, cancel, resume.
//! 9. [`timeline`], [`rate`], [`shared_metrics`], [`config`]: what is measured, under which names, and what can be
//!    set.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod block_events;
pub mod block_log;
pub mod block_manager;
pub mod config;
pub mod content;
pub mod device_pool;
pub mod eviction;
pub mod gguf;
pub mod handover;
pub mod host_budget;
pub mod ids;
pub mod kv_memory;
pub mod kv_spec;
pub mod model;
pub mod rate;
pub mod sampling;
pub mod scheduler;
pub mod sequence;
pub mod shared_metrics;
pub mod timeline;
pub mod tokens;
pub mod wire;
