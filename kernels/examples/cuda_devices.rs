//! Lists the GPUs of this machine and loads all kernels on each; without a driver it says so.
//!
//! ```text
//! CUDA_HOME=$(kernels/cuda/install-nvcc) cargo run -p kernels --features cuda --example cuda_devices
//! TANDEM_CUDA_KERNELS=folder/with/cubins cuda_devices
//! ```

use std::path::PathBuf;
use std::process::ExitCode;

use kernels::cuda::{Device, DeviceError, Gpu, KERNELS_FOLDER_VARIABLE};

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
    for ordinal in 0..Gpu::count()? {
        let gpu = Gpu::open(ordinal, folder.as_deref())?;
        let (major, minor) = gpu.capability;
        let gib = gpu.memory()?.total_bytes as f64 / f64::from(1 << 30);
        println!("cuda:{ordinal}  {}, compute capability {major}.{minor}, {gib:.1} GiB", gpu.name);
        let blas = if gpu.has_product() { "cuBLASLt is there" } else { "libcublasLt is not there" };
        println!("        {} kernels loaded; {blas}", gpu.num_kernels());
    }
    Ok(())
}
