//! CUDA devices and the kernels of `kernels/cuda` on them.
//!
//! - [`device`]: what a device can do, and memory on it.
//! - [`ops`]: the kernels as functions; [`DeviceWeights`]: those for quantized weights.
//! - [`PeerMemory`]: what processes of one host let each other read.
//! - [`limits`]: what a device can do at most, which speeds are held against.
//! - [`Graph`]: launches that are recorded once and done again as a whole.
//! - `driver`, `blas`, `images`, `nvrtc` (feature `cuda`): GPUs through NVIDIA's driver. One program serves machines with and
//!   without a GPU: the driver is looked for when it is asked for, and its absence is a sentence. Kernels are
//!   embedded twice, as machine code for compute capability 9.0 and as PTX that the driver compiles for 8.0 and
//!   later; those that are for 9.0 alone once, and every device does without them. A folder of cubins can replace them
//!   (`TANDEM_CUDA_KERNELS`), so that kernels can be rebuilt where there is nvcc and no Rust. Where the driver takes
//!   neither image (it is older than the compiler that made them), `nvrtc` compiles the embedded sources, if NVIDIA's
//!   library for that is on the machine.
//! - `fibres` (feature `fibres`): the host as a device, for tests of everything above a device. With both features there
//!   is also a driver of the host, so that tests run all of the above without a GPU: `host_driver_folder`.

#[cfg(feature = "cuda")]
mod blas;
pub mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "fibres")]
mod fibres;
#[cfg_attr(not(any(feature = "cuda", feature = "fibres")), allow(dead_code, reason = "for the devices"))]
mod graph;
#[cfg(feature = "cuda")]
mod images;
pub mod limits;
#[cfg(feature = "cuda")]
mod nvrtc;
pub mod ops;
mod quantized;
mod shared;

use std::sync::Arc;

pub use device::{BoxedTensor, Buffer, Device, DeviceError, Event, Landing, Lane, MemoryInfo, TensorMap};
#[cfg(feature = "cuda")]
pub use driver::Gpu;
#[cfg(feature = "fibres")]
pub use fibres::FibreDevice;
pub use graph::{Graph, Recording};
#[cfg(feature = "cuda")]
pub use images::{EMBEDDED, Embedded, Image, ImageError, KERNELS_FOLDER_VARIABLE};
pub use quantized::{DeviceFormat, DeviceWeights, MultiplyQuantized};
pub use shared::{PeerMemory, Piece};

/// A folder for `LD_LIBRARY_PATH` of processes that tests start: in it are a CUDA driver and a cuBLASLt that run on the
/// host, and hold a program to NVIDIA's documentation (`kernels/cuda/host/driver`).
#[cfg(all(feature = "cuda", feature = "fibres"))]
pub fn host_driver_folder() -> &'static std::path::Path {
    std::path::Path::new(env!("TANDEM_HOST_DRIVER_FOLDER"))
}

/// The GPU number `ordinal` of this machine, with all kernels on it.
///
/// # Errors
/// [`DeviceError`]: this program was built without the feature `cuda`, there is no driver or no such GPU, or it cannot
/// be used.
pub fn open(ordinal: usize) -> Result<Arc<dyn Device>, DeviceError> {
    #[cfg(feature = "cuda")]
    {
        let folder = std::env::var_os(KERNELS_FOLDER_VARIABLE).map(std::path::PathBuf::from);
        Ok(Arc::new(Gpu::open(ordinal, folder.as_deref())?))
    }
    #[cfg(not(feature = "cuda"))]
    {
        let _ = ordinal;
        Err(DeviceError::NotBuilt)
    }
}
