//! What runs a model: checkpoints, the configurable decoder, the paged KV pool, the model runner, the
//! sampler, and the loop that drives them.
//!
//! Knows nothing of sockets. A node crate gives the engine sequences and takes tokens and written
//! layers from it; how those reach another process is not decided here.
//!
//! Reading order:
//!
//! 1. [`hub`], [`spec`], [`rope`], [`checkpoint`], [`identity`]: a Hugging Face folder becomes a shape, tensors, a
//!    name; [`gguf`]: so does a GGUF file; [`w8a8`]: a folder of 8-bit weights.
//! 2. [`plan`]: one step as flat arrays; the same call for prefill chunks and decode tokens.
//! 3. [`pool`]: the memory that KV lies in; [`conversion`]: KV out of pools that have it otherwise.
//! 4. [`decoder`]: a step on one screen; [`backend`]: the operations it needs; [`weights`], [`load_progress`],
//!    [`weight_sizes`], [`cpu`].
//! 5. [`runner`]: submit a plan, wait for its tokens; [`model`], [`cpu_runner`], [`cuda`]: who does it.
//! 6. [`core`]: the thread that schedules and runs steps.
//! 7. [`sim`]: a runner without arithmetic; [`oracle`]: arithmetic without a runner.
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod backend;
pub mod checkpoint;
mod config_fields;
pub mod conversion;
pub mod core;
pub mod cpu;
pub mod cpu_runner;
pub mod cuda;
pub mod decoder;
pub mod gguf;
pub mod hub;
pub mod identity;
pub mod load_progress;
pub mod model;
pub mod oracle;
pub mod plan;
pub mod pool;
pub mod rope;
pub mod runner;
pub mod sim;
pub mod spec;
mod staging;
mod step_thread;
#[cfg(test)]
mod test_folder;
pub mod w8a8;
pub mod weight_sizes;
pub mod weights;

/// Instruction sets to choose from, and what the machine can do at most.
pub use kernels::{Isa, limits};
