//! CUDA devices and the kernels of `kernels/cuda` on them, with the `cuda` feature.
//!
//! One program serves machines with and without a GPU: the driver is looked for when it is asked for, and its
//! absence is a sentence. Kernels are embedded twice, as machine code for compute capability 9.0 and as PTX
//! that the driver compiles for 8.0 and later; a folder of cubins can replace them
//! ([`KERNELS_FOLDER_VARIABLE`]), so that kernels can be rebuilt where there is nvcc and no Rust.
//!
//! What this does not do: launch anything. What kernels expect is on top of each file in `kernels/cuda`.

mod device;
mod images;

pub use device::{Device, DeviceError, Kernels};
pub use images::{EMBEDDED, Embedded, Image, ImageError, KERNELS_FOLDER_VARIABLE};
