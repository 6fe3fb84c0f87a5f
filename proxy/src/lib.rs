//! The OpenAI endpoint of a Tandem cluster: text lives here, tokens in the nodes.
//!
//! A request's way through it: [`http`] takes it in (id, key, slot, body) and has [`openai`] turn its JSON
//! into a request that cannot be invalid; [`text`] renders the chat template and tokenizes, once;
//! [`dispatch`] chooses a decode node by [`route`] over the view that [`cluster`] keeps and what its nodes are
//! believed to hold ([`index`]), sends one
//! `Generate`, commits tokens in order, and goes on elsewhere when a node is lost; [`answer`] turns tokens
//! back into text, applies stop strings and counts; [`http`] writes it out, whole or as server-sent events.
//!
//! What is deliberately absent: weights, KV, and anything that a restart would lose. A proxy holds nothing
//! that cannot be rebuilt from the nodes' words, so several can stand side by side. There is no queue: a
//! full cluster is answered with 429 and `Retry-After` (no node can serve at all: 503), and a slow client
//! holds back its own stream by flow control, never memory here.
//!
//! | bound | at it |
//! |---|---|
//! | blocks in the index (`--block-index-max-blocks`) | left out, counted and logged |
//! | requests in progress (`--max-concurrent-requests`) | 429, `Retry-After` |
//! | body (`--max-body-bytes`) | 413 |
//! | tokenizer runs at once: one per core | wait |
//! | decode nodes that all say `Busy` | 429, `Retry-After`; a request with tokens waits instead |
//! | pieces of an answer that a slow client has not read | the node's stream is not read further |
//! | node losses per request, resumes per second | 500 and quarantine of the prompt; wait, then 503 |
//! | time of a request (`--request-timeout`) | 504, or an error event in the stream |
//!
//! Reading order: [`openai`], [`text`], [`route`], [`cluster`], [`index`], [`dispatch`], [`answer`], [`http`],
//! [`metrics`], [`serve`](mod@serve).
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod answer;
pub mod cluster;
pub mod dispatch;
pub mod http;
pub mod index;
pub mod metrics;
pub mod openai;
pub mod route;
pub mod serve;
pub mod text;

pub use serve::{Endpoint, ProxyConfig, ProxyHandle, ServeError, serve};
