//! CUDA devices and the kernels of `kernels/cuda` on them.
//!
//! - [`device`]: what a device can do, and memory on it.
//! - [`ops`]: the kernels as functions.
//! - `driver`, `blas`, `images` (feature `cuda`): GPUs through NVIDIA's driver. One program serves machines with and
//!   without a GPU: the driver is looked for when it is asked for, and its absence is a sentence. Kernels are
//!   embedded twice, as machine code for compute capability 9.0 and as PTX that the driver compiles for 8.0 and
//!   later; a folder of cubins can replace them (`TANDEM_CUDA_KERNELS`), so that kernels can be rebuilt where there is
//!   nvcc and no Rust.
//! - `fibres` (feature `fibres`): the host as a device, for tests of everything above a device.

#[cfg(feature = "cuda")]
mod blas;
pub mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "fibres")]
mod fibres;
#[cfg(feature = "cuda")]
mod images;
pub mod ops;

use std::sync::Arc;

pub use device::{Buffer, Device, DeviceError, Event, Lane, MemoryInfo};
#[cfg(feature = "cuda")]
pub use driver::Gpu;
#[cfg(feature = "fibres")]
pub use fibres::FibreDevice;
#[cfg(feature = "cuda")]
pub use images::{EMBEDDED, Embedded, Image, ImageError, KERNELS_FOLDER_VARIABLE};

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
