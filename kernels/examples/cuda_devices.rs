//! Lists the GPUs of this machine and loads all kernels on each; without a driver it says so.
//!
//! ```text
//! CUDA_HOME=$(kernels/cuda/install-nvcc) cargo run -p kernels --features cuda --example cuda_devices
//! TANDEM_CUDA_KERNELS=folder/with/cubins cuda_devices
//! ```

use std::path::PathBuf;
use std::process::ExitCode;

use kernels::cuda::{Device, DeviceError, KERNELS_FOLDER_VARIABLE};

fn main() -> ExitCode {
    match list() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn list() -> Result<(), DeviceError> {
    let folder = std::env::var_os(KERNELS_FOLDER_VARIABLE).map(PathBuf::from);
    for ordinal in 0..Device::count()? {
        let device = Device::open(ordinal)?;
        let (major, minor) = device.capability;
        let gib = device.memory_bytes as f64 / f64::from(1 << 30);
        println!("cuda:{ordinal}  {}, compute capability {major}.{minor}, {gib:.1} GiB", device.name);
        println!("        {} kernels loaded", device.load_kernels(folder.as_deref())?.len());
    }
    Ok(())
}
