//! The `tandem` command: all roles in one binary, each also alone.
//!
//! This is the only place that knows everything: it reads flags, environment and file, loads the model,
//! binds the fabric and puts the roles together from the libraries that implement them. No protocol and no
//! policy lives here.
//!
//! 1. [`cli`]: which command, with which settings.
//! 2. [`up`]: all roles in one process. [`nodes`]: one prefill or decode node. [`endpoint`]: the proxy.
//!    [`device`]: what it computes on. [`store`]: what a node keeps KV in beyond its pool. `hello`: which peers it takes.
//! 3. [`telemetry`], [`admin`], [`console`]: logs, metrics, a node's own HTTP listener, lines for who started it.
//! 4. [`certs`]: the cluster's CA.
#![forbid(unsafe_code)]

pub mod admin;
pub mod certs;
pub mod cli;
pub mod console;
pub mod device;
pub mod endpoint;
mod hello;
pub mod nodes;
pub mod shutdown;
pub mod store;
pub mod telemetry;
pub mod up;
