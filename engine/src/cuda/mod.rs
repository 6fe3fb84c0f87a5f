//! The engine on a CUDA device: the same decoder, over the kernels of `kernels/cuda`.
//!
//! - [`backend`]: the decoder's operations.
//! - `attention`: which kernel computes the attention of prompts.
//! - [`step`]: what a plan is for the device: flat arrays in one copy, the rows of attention sorted by kernel.
//! - [`sampling`]: from logits to tokens without the host.
//! - [`graphs`]: decode steps that are recorded once and launched as a whole.
//! - [`runner`]: steps launched ahead of what is known, layers reported by events.
//! - [`model`]: what of a checkpoint can run there, and how much memory is left for KV.
//!
//! Everything here runs on whatever is a [`Device`]: a GPU, or the host in tests.

mod attention;
pub mod backend;
pub mod graphs;
pub mod model;
pub mod runner;
pub mod sampling;
pub mod step;

pub use backend::CudaBackend;
pub use runner::CudaRunner;

pub use kernels::cuda::{Device, limits, open};

use kernels::cuda::DeviceError;

/// For steps: a device that refuses a launch or a copy is lost, and with it the step: the runner's thread catches this and
/// tells whoever waits.
fn done<T>(outcome: Result<T, DeviceError>) -> T {
    outcome.unwrap_or_else(|error| panic!("{error}"))
}
