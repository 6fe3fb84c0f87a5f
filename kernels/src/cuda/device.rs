//! A GPU, found at run time, and the kernels loaded on it.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, DriverError};
use cudarc::nvrtc::Ptx;

use super::images::{EMBEDDED, Image, ImageError};

/// A GPU of this machine.
pub struct Device {
    context: Arc<CudaContext>,
    /// Which, as `cuda:N` counts.
    pub ordinal: usize,
    /// As the driver names it.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// All of its memory.
    pub memory_bytes: usize,
}

/// Why there is no device, or no kernels on it.
#[derive(Debug)]
pub enum DeviceError {
    /// The machine has no NVIDIA driver.
    NoDriver,
    /// There are fewer devices.
    Missing {
        /// Asked for.
        ordinal: usize,
        /// How many there are.
        num_devices: usize,
    },
    /// The driver refused.
    Driver {
        /// What was asked of it, as a verb phrase.
        asked: String,
        /// What it said.
        reason: String,
    },
    /// A kernel file has no image for it.
    Image(ImageError),
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceError::NoDriver => f.write_str(
                "this machine has no NVIDIA driver (libcuda.so.1 is not there): install one, or use the CPU",
            ),
            DeviceError::Missing { ordinal, num_devices } => {
                write!(f, "cuda:{ordinal} was asked for, and the driver knows {num_devices} GPUs, counted from 0")
            }
            DeviceError::Driver { asked, reason } => write!(f, "the NVIDIA driver cannot {asked}: {reason}"),
            DeviceError::Image(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for DeviceError {}

fn refused(asked: impl Into<String>) -> impl FnOnce(DriverError) -> DeviceError {
    let asked = asked.into();
    move |error| DeviceError::Driver { asked, reason: error.to_string() }
}

impl Device {
    /// How many GPUs the driver knows.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`], or what the driver says.
    pub fn count() -> Result<usize, DeviceError> {
        // SAFETY: it opens and closes the driver's library, whose initialisers may run at any time and are
        // the same that the next call would run.
        if !unsafe { cudarc::driver::sys::is_culib_present() } {
            return Err(DeviceError::NoDriver);
        }
        let count = CudaContext::device_count().map_err(refused("count the GPUs"))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// The GPU number `ordinal`.
    ///
    /// # Errors
    /// [`DeviceError`]: no driver, no such GPU, or what the driver says.
    pub fn open(ordinal: usize) -> Result<Self, DeviceError> {
        let num_devices = Self::count()?;
        if ordinal >= num_devices {
            return Err(DeviceError::Missing { ordinal, num_devices });
        }
        let context = CudaContext::new(ordinal).map_err(refused(format!("open cuda:{ordinal}")))?;
        let name = context.name().map_err(refused("name the GPU"))?;
        let (major, minor) = context.compute_capability().map_err(refused("tell the GPU's compute capability"))?;
        let memory_bytes = context.total_mem().map_err(refused("tell the GPU's memory"))?;
        Ok(Self { context, ordinal, name, capability: (major as u32, minor as u32), memory_bytes })
    }

    /// Loads every kernel, from cubins in `folder` if given, else those embedded.
    ///
    /// # Errors
    /// [`DeviceError::Image`] if a file has no image for this device, [`DeviceError::Driver`] if the driver
    /// refuses one or a kernel is not in it.
    pub fn load_kernels(&self, folder: Option<&Path>) -> Result<Kernels, DeviceError> {
        let mut functions = HashMap::new();
        for kernel in EMBEDDED {
            let image = match kernel.image(self.capability, folder).map_err(DeviceError::Image)? {
                Image::Cubin(bytes) => Ptx::from_binary(bytes.into_owned()),
                Image::Ptx(text) => Ptx::from_src(text),
            };
            let module = self.context.load_module(image).map_err(refused(format!("load {}", kernel.name)))?;
            for &entry in kernel.entries {
                let found = module.load_function(entry);
                functions.insert(entry, found.map_err(refused(format!("find {entry} in {}", kernel.name)))?);
            }
        }
        Ok(Kernels { functions })
    }
}

/// Kernels loaded on a device, by name.
pub struct Kernels {
    functions: HashMap<&'static str, CudaFunction>,
}

impl Kernels {
    /// The kernel of this name.
    ///
    /// # Panics
    /// If there is none: names are those in `kernels/cuda`.
    pub fn function(&self, name: &str) -> &CudaFunction {
        self.functions.get(name).unwrap_or_else(|| panic!("kernels/cuda has no kernel {name}"))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.functions.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.functions.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_not_there_is_a_sentence() {
        let error = Device::open(4096).err().unwrap().to_string();
        let says = |part: &str| error.contains(part);
        assert!(says("has no NVIDIA driver") || says("cuda:4096 was asked for") || says("cannot count"), "{error}");
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn every_embedded_kernel_loads() {
        let kernels = Device::open(0).unwrap().load_kernels(None).unwrap();
        assert_eq!(kernels.len(), EMBEDDED.iter().map(|kernel| kernel.entries.len()).sum());
        kernels.function("copy_blocks");
    }
}
