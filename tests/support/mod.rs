//! The harness of the end-to-end tests: real processes of the built binary, real sockets, real signals.
//!
//! A test starts a [`Cluster`], talks to it through a [`client::Api`] as any client would, and ends with
//! [`Cluster::settle`], which waits until every node holds nothing of any request: no referenced block, no
//! stream, no landing. Whatever happens, the processes end with the test, by their id. When a test fails,
//! the end of every process's log is printed.
//!
//! 1. [`cluster`]: `tandem up`, or a proxy and nodes as processes of their own. [`process`]: one of them.
//!    [`blow`]: what is done to one.
//! 2. [`client`]: requests and streams. [`corpus`]: requests of every kind with prompts of every length.
//! 3. [`metrics`]: what a process says about itself. [`accounting`]: what it must say when it is idle.
//! 4. [`seed`]: every random choice comes from one number. [`wait`]: waiting for a fact with a deadline.
#![allow(dead_code, unused_imports, reason = "each test file uses a part of it")]

pub(crate) mod accounting;
pub(crate) mod blow;
pub(crate) mod client;
pub(crate) mod cluster;
pub(crate) mod corpus;
pub(crate) mod metrics;
pub(crate) mod process;
pub(crate) mod seed;
pub(crate) mod wait;

pub(crate) use blow::Blow;
pub(crate) use cluster::{Cluster, Shape};
pub(crate) use seed::Seed;
