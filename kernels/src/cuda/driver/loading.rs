//! Kernels as functions of the driver: from what is embedded, from a folder, or compiled here.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaContext, CudaFunction, sys};
use cudarc::nvrtc::Ptx;

use super::refusal::refused;
use crate::cuda::device::DeviceError;
use crate::cuda::images::{EMBEDDED, Embedded, Image};
use crate::cuda::nvrtc;

/// Shared memory that a launch may ask for without more: of 48 KiB, what the kernel itself and the driver have (1 KiB on
/// compute capability 9.0) counts as well.
const SHARED_BYTES_UNASKED: u32 = 32 << 10;

/// A kernel on the device.
pub(super) struct Function {
    pub(super) function: CudaFunction,
    /// Sizes of its parameters as its compiler counts them, if the driver tells.
    pub(super) parameters: Option<Vec<usize>>,
    /// Of a block; kernels ask for as much as they want at their first launch.
    pub(super) shared_bytes: Mutex<u32>,
}

/// Kernels by their names.
pub(super) type Functions = HashMap<&'static str, Function>;

/// All kernels. Those for compute capability 9.0 alone may be missing, for which there is a reason then; but what is in
/// a folder is what whoever named it wants, or an error.
pub(super) fn load_kernels(
    context: &Arc<CudaContext>,
    capability: (u32, u32),
    folder: Option<&Path>,
) -> Result<(Functions, Result<(), String>), DeviceError> {
    let (mut functions, mut hopper_kernels) = (HashMap::new(), Ok(()));
    for kernel in EMBEDDED {
        match load_kernel(context, kernel, capability, folder) {
            Ok(loaded) => functions.extend(loaded),
            Err(error) if kernel.is_hopper() => {
                hopper_kernels = Err(error.to_string());
            }
            Err(error) => return Err(error),
        }
    }
    Ok((functions, hopper_kernels))
}

fn load_kernel(
    context: &Arc<CudaContext>,
    kernel: &'static Embedded,
    capability: (u32, u32),
    folder: Option<&Path>,
) -> Result<Vec<(&'static str, Function)>, DeviceError> {
    let image = kernel.image(capability, folder).map_err(|error| DeviceError::Image(error.to_string()))?;
    let image = match image {
        Image::Cubin(bytes) => Ptx::from_binary(bytes.into_owned()),
        Image::Ptx(text) => Ptx::from_src(text),
    };
    let module = match context.load_module(image) {
        Ok(module) => module,
        Err(error) if folder.is_some() => return Err(refused(format!("load {}", kernel.name))(error)),
        Err(error) => {
            let refusal = refused(format!("load {} as it is embedded", kernel.name))(error);
            let cubin = nvrtc::compile(kernel, capability);
            let cubin = cubin.map_err(|reason| DeviceError::Image(format!("{refusal}; and {reason}")))?;
            context
                .load_module(Ptx::from_binary(cubin))
                .map_err(refused(format!("load {} as libnvrtc compiled it", kernel.name)))?
        }
    };
    let entries = kernel.entries.iter().map(|&entry| {
        let function = module.load_function(entry).map_err(refused(format!("find {entry} in {}", kernel.name)))?;
        let parameters = parameters_of(&function);
        Ok((entry, Function { function, parameters, shared_bytes: Mutex::new(SHARED_BYTES_UNASKED) }))
    });
    entries.collect()
}

/// Drivers tell since CUDA 12.4. A launch only says where its arguments are, and the driver takes as many bytes there
/// as the kernel wants: nobody else notices an argument too few, or one of another size.
fn parameters_of(function: &CudaFunction) -> Option<Vec<usize>> {
    type ParamInfo = unsafe extern "C" fn(sys::CUfunction, usize, *mut usize, *mut usize) -> sys::CUresult;
    // SAFETY: the library is loaded already; the type is that of the driver's documentation.
    let param_info = unsafe { sys::culib().get::<ParamInfo>(b"cuFuncGetParamInfo") }.ok()?;
    let sizes = (0..).map_while(|index| {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function is loaded, the two are exclusively borrowed. Behind the last one it is an error.
        let status = unsafe { param_info(function.cu_function(), index, &raw mut offset, &raw mut size) };
        (status == sys::CUresult::CUDA_SUCCESS).then_some(size)
    });
    Some(sizes.collect())
}
