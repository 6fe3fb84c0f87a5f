//! Bytes between processes: links that carry messages, bulk connections that carry KV, and the
//! reservations that KV lands in.
//!
//! It knows `common` only: what a message means, which blocks are free and when a request is over are the
//! business of the nodes. It never allocates or waits because of a peer beyond the stated [`limits`].
//!
//! A request's way through it: the proxy [`dial`](Fabric::dial)s a decode node, which is held to its
//! certificate and its hello, and [`open`](Link::open)s a stream with `Generate`. The decode node finds it
//! at [`accept`](Fabric::accept), links to a prefill node in the same way, connects its bulk port, opens
//! a [`Landing`](transfer::Landing) over the blocks it reserved, and asks with `Prefill`. The prefill node
//! answers on the stream and sends extents through [`bulk_to`](Fabric::bulk_to); they are written into
//! the blocks as they arrive and count once their digest is right. A prefix that the decode node holds may first
//! go the other way over the same bulk connection, into a landing of the prefill node; one that another prefill
//! node holds comes as from a prefill node to a decode node. Whoever drops its half of a stream cancels what the
//! stream stands for; a lost connection does the same to all its streams.
//!
//! Reading order:
//!
//! 1. [`certs`], `tls`: who may speak.
//! 2. [`fabric`], `dial`, `joins`, `versions`, `hello`, `accept`: bind, dial, accept.
//! 3. [`link`], [`stream`]: messages, and ends that mean something; [`peers`], `redial`: links that are kept for the
//!    next use, and when to try again.
//! 4. [`transfer`]: extents, landings, transports (QUIC, and shared memory on one host) and their faults.
//! 5. [`membership`], [`block_feed`], [`fencing`]: what nodes tell proxies, and newer attempts.
//! 6. [`store`]: KV that was computed before, in memory, on disk, in shared storage.
//! 7. `kv_threads`, `turns`, `kv_time`: where KV is moved, so that no message waits for it, and what that takes.
//! 8. `socket`, `segments`, `busy_poll`, `congestion`, `path_metrics`, [`limits`], [`accounting`]: datagram sizes, what
//!    is on the way, bounds, what is held.
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod accept;
pub mod accounting;
pub mod block_feed;
mod busy_poll;
pub mod certs;
mod congestion;
mod dial;
pub mod fabric;
pub mod fencing;
mod hello;
mod joins;
mod kv_threads;
mod kv_time;
pub mod limits;
pub mod link;
pub mod membership;
mod path_metrics;
pub mod peers;
mod quiet;
mod redial;
mod segments;
mod socket;
pub mod store;
pub mod stream;
mod tls;
pub mod transfer;
mod turn_end;
mod turns;
mod versions;

pub use accept::IncomingStream;
pub use accounting::FabricAccounting;
pub use busy_poll::BusyPolling;
pub use certs::{CertError, ClusterCa, Identity};
pub use dial::DialError;
pub use fabric::{BindError, Fabric, FabricConfig, check_free, check_holder};
pub use hello::{HelloCheck, compatible_models};
pub use limits::FabricLimits;
pub use link::{CloseReason, Link, OpenError};
pub use socket::BulkPath;
pub use stream::{ControlReceiver, ControlSender, RecvError, SendError};
pub use tls::TlsError;

#[cfg(test)]
extern crate self as kv_connector;

/// What the tests of this crate's API share, for those of its inside.
#[cfg(test)]
#[path = "../tests/support/mod.rs"]
mod test_support;
