//! Kernels compiled on the machine, by NVIDIA's library for that, for the GPU that is there.
//!
//! For where the driver takes no embedded image: a driver older than the compiler that made the PTX refuses it. The
//! library that came with that driver makes images that it takes. Nothing here needs a GPU.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char};

use cudarc::nvrtc::{result, sys};

use super::images::Embedded;

/// Lines of the compiler that are told.
const LOG_LINES_MAX: usize = 8;

/// Machine code of a kernel file for a compute capability.
///
/// # Errors
/// A sentence: the library is not on the machine, or what it says.
pub(super) fn compile(kernel: &Embedded, (major, minor): (u32, u32)) -> Result<Vec<u8>, String> {
    // SAFETY: it opens and closes the library, whose initialisers may run at any time.
    if !unsafe { sys::is_culib_present() } {
        return Err(
            "libnvrtc, which would compile the kernels here, is not found: install the CUDA toolkit's nvrtc of \
                    the driver's version and name its folder in LD_LIBRARY_PATH"
                .to_string(),
        );
    }
    let source = CString::new(kernel.source).expect("sources hold no zero");
    let name = CString::new(format!("{}.cu", kernel.name)).expect("names hold no zero");
    let failed = |error: result::NvrtcError| format!("libnvrtc cannot compile {}.cu: {error:?}", kernel.name);
    let program = Program(result::create_program(&source, Some(&name)).map_err(failed)?);
    let only = if kernel.is_hopper() { "a" } else { "" }; // whose instructions only this architecture has
    let options = [format!("--gpu-architecture=sm_{major}{minor}{only}"), "--std=c++17".into(), "--fmad=false".into()];
    // SAFETY: made above, destroyed when `program` is dropped; so with the calls below.
    if let Err(error) = unsafe { result::compile_program(program.0, &options) } {
        return Err(format!("{}\n{}", failed(error), program.log()));
    }
    let mut num_bytes = 0;
    // SAFETY: the size is exclusively borrowed.
    unsafe { sys::nvrtcGetCUBINSize(program.0, &raw mut num_bytes) }.result().map_err(failed)?;
    let mut cubin = vec![0u8; num_bytes];
    // SAFETY: as many bytes as the library wants.
    unsafe { sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast::<c_char>()) }.result().map_err(failed)?;
    Ok(cubin)
}

struct Program(sys::nvrtcProgram);

impl Program {
    /// What the compiler says first.
    fn log(&self) -> String {
        // SAFETY: the program exists.
        let log = unsafe { result::get_program_log(self.0) }.unwrap_or_default();
        let bytes: Vec<u8> = log.iter().map(|byte| *byte as u8).collect();
        let text = CStr::from_bytes_until_nul(&bytes).map(CStr::to_string_lossy).unwrap_or_default();
        text.lines().take(LOG_LINES_MAX).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made in `compile`, not used again. What the library refuses is a few bytes of host memory.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::images::EMBEDDED;

    #[test]
    fn every_kernel_compiles_from_its_embedded_source_or_the_missing_library_is_a_sentence() {
        for kernel in EMBEDDED {
            for capability in [(8, 0), (9, 0)].into_iter().filter(|of| *of == (9, 0) || !kernel.is_hopper()) {
                match compile(kernel, capability) {
                    Ok(cubin) => {
                        assert!(cubin.starts_with(b"\x7fELF"), "{}", kernel.name);
                        for entry in kernel.entries {
                            let is_there = cubin.windows(entry.len()).any(|bytes| bytes == entry.as_bytes());
                            assert!(is_there, "{entry} of {}", kernel.name);
                        }
                    }
                    Err(said) => {
                        assert!(
                            said.starts_with("libnvrtc, which would compile the kernels here, is not found"),
                            "{said}"
                        );
                        println!("SKIPPED: {said}");
                        return;
                    }
                }
            }
        }
    }

    #[test]
    fn sources_stand_for_themselves() {
        for kernel in EMBEDDED {
            let includes: Vec<_> = kernel.source.lines().filter(|line| line.starts_with("#include")).collect();
            assert_eq!(includes[0], "#include \"host/fibres.h\"", "{}", kernel.name);
            let is_host_only = |line: &&str| line.starts_with("#include \"host/");
            assert!(includes.iter().all(is_host_only), "{}: all but what only the host sees", kernel.name);
            assert_eq!(kernel.source.matches("typedef unsigned int u32;").count(), 1, "{}", kernel.name);
        }
    }
}
