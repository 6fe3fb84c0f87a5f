//! The CUDA driver of the host notices what NVIDIA's documents forbid: each misuse in a process of its own, which has to
//! end with a line, or gets the error that the documents name.
#![allow(clippy::unwrap_used, unsafe_code)]

use std::ffi::{CString, c_void};
use std::ptr::null_mut;

use cudarc::cublaslt::{result as lt, sys as lt_sys};
use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, DriverError, result};
use kernels::cuda::{EMBEDDED, Image};

const MISUSE: &str = "HOST_DRIVER_MISUSE";

/// Runs one of [`misuse`] with the driver of the host. Whether it ended well, and what it said.
fn said_by(name: &str, wishes: &str) -> (bool, String) {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["misuse", "--exact", "--ignored", "--nocapture"])
        .env(MISUSE, name)
        .env("LD_LIBRARY_PATH", kernels::cuda::host_driver_folder())
        .env("HOST_CUDA_DRIVER", wishes)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn what_is_undefined_ends_the_process_with_the_rule() {
    for (name, expected) in [
        ("memory freed while a graph names it", "cuMemFree: a graph's a fill names memory at"),
        ("memory freed under a fill", "cuMemFree: a fill names memory at"),
        ("memory freed twice", "cuMemFree: 0x"),
        ("a stream destroyed twice", "cuStreamDestroy: stream 0x"),
        ("an event used after its end", "cuEventRecord: event 0x"),
        ("pinned memory freed under a copy", "cuMemFreeHost: a copy to the device names pinned memory"),
        ("a module unloaded under a launch", "cuModuleUnload: the module of embed_f32 was unloaded"),
        ("a copy onto itself", "cuMemcpyDtoDAsync: the two overlap"),
        ("a part of a block exported", "cuIpcGetMemHandle: 1000 bytes are no whole blocks"),
        ("a description destroyed twice", "cublasLtMatmulDescDestroy: it does not exist"),
        ("a call after main", "Initialization: cuMemGetInfo_v2 after main has returned"),
    ] {
        let (is_success, said) = said_by(name, "seed=1,linger=60000");
        assert!(!is_success && said.contains(&format!("host driver: {expected}")), "{name}: {said}");
    }
}

#[test]
fn what_is_refused_is_refused_and_what_is_not_waited_for_is_not_there() {
    for name in [
        "a copy that nobody waits for",
        "streams that do not wait for each other",
        "a thread without a context",
        "a copy beyond an allocation",
        "limits of a launch",
        "calls while a thread captures",
        "memory opened where it was exported",
        "a stray access",
        "an image of another device",
        "attributes of another size",
    ] {
        for seed in 1..4 {
            let (is_success, said) = said_by(name, &format!("seed={seed}"));
            assert!(is_success, "{name}: {said}");
        }
    }
    let (is_success, said) = said_by("less memory than is asked for", "memory=1000000");
    assert!(is_success, "{said}");
}

fn error_of<T>(outcome: Result<T, DriverError>) -> CUresult {
    outcome.err().expect("it is refused").0
}

fn stream() -> sys::CUstream {
    result::stream::create(result::stream::StreamKind::NonBlocking).unwrap()
}

fn event(stream: sys::CUstream) -> sys::CUevent {
    let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).unwrap();
    // SAFETY: both were made in the context of this thread.
    unsafe { result::event::record(event, stream) }.unwrap();
    event
}

fn pinned(num_bytes: usize) -> &'static mut [u8] {
    // SAFETY: any size; never given back but where that is the test.
    let at = unsafe { result::malloc_host(num_bytes, 0) }.unwrap();
    unsafe { std::slice::from_raw_parts_mut(at.cast(), num_bytes) }
}

fn memory(num_bytes: usize) -> u64 {
    // SAFETY: any size.
    unsafe { result::malloc_sync(num_bytes) }.unwrap()
}

/// `embed_f32` copies rows of `dim` values: table, ids, parents, out, dim.
fn embed(capability: (u32, u32)) -> (sys::CUmodule, sys::CUfunction) {
    let kernel = EMBEDDED.iter().find(|kernel| kernel.name == "embed").unwrap();
    let image = match kernel.image(capability, None).unwrap() {
        Image::Cubin(bytes) => bytes.into_owned(),
        Image::Ptx(text) => CString::new(text).unwrap().into_bytes_with_nul(),
    };
    // SAFETY: an image that is embedded here, and a name that ends with a zero.
    let module = unsafe { result::module::load_data(image.as_ptr().cast()) }.unwrap();
    (module, unsafe { result::module::get_function(module, CString::new("embed_f32").unwrap()) }.unwrap())
}

/// As many words as any kernel here has parameters.
fn launch(
    function: sys::CUfunction,
    words: &[u64; 8],
    grid: [u32; 3],
    shared: u32,
    on: sys::CUstream,
) -> Result<(), DriverError> {
    let mut parameters: Vec<*mut c_void> =
        words.iter().map(|word| std::ptr::from_ref(word).cast_mut().cast()).collect();
    let config = sys::CUlaunchConfig {
        gridDimX: grid[0],
        gridDimY: grid[1],
        gridDimZ: grid[2],
        blockDimX: 32,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        hStream: on,
        attrs: std::ptr::null_mut(),
        numAttrs: 0,
    };
    // SAFETY: as many parameters as any kernel has; what they mean is what the driver is to judge.
    unsafe { sys::cuLaunchKernelEx(&raw const config, function, parameters.as_mut_ptr(), std::ptr::null_mut()) }
        .result()
}

fn capture(of: sys::CUstream) {
    // SAFETY: a stream of this thread's context.
    unsafe { result::stream::begin_capture(of, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) }
        .unwrap();
}

#[test]
#[ignore = "a part of the other tests, which run it in processes of its own"]
fn misuse() {
    let name = std::env::var(MISUSE).expect("it is run by the other tests");
    let _context = CudaContext::new(0).unwrap();
    let stream = stream();
    // SAFETY: it is not: each arm breaks one of the driver's rules, which the driver of the host has to notice. No memory of
    // this process is touched by what it refuses.
    unsafe {
        match name.as_str() {
            "memory freed while a graph names it" => {
                let memory = memory(1000);
                capture(stream);
                result::memset_d8_async(memory, 0, 1000, stream).unwrap();
                let graph = result::stream::end_capture(stream).unwrap();
                let graph = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)).unwrap();
                result::free_sync(memory).unwrap();
                result::graph::launch(graph, stream).unwrap();
                result::stream::synchronize(stream).unwrap();
            }
            "memory freed under a fill" => {
                let memory = memory(1000);
                result::memset_d8_async(memory, 0, 1000, stream).unwrap();
                result::free_sync(memory).unwrap();
                result::stream::synchronize(stream).unwrap();
            }
            "a call after main" => {
                // Without a context, since that of the test is gone before `main` returns: each call is an error, until one
                // is a misuse.
                std::thread::spawn(|| {
                    loop {
                        let _ = result::mem_get_info();
                    }
                });
            }
            "memory freed twice" => {
                let memory = memory(1000);
                result::free_sync(memory).unwrap();
                result::free_sync(memory).unwrap();
            }
            "a stream destroyed twice" => {
                result::stream::destroy(stream).unwrap();
                result::stream::destroy(stream).unwrap();
            }
            "an event used after its end" => {
                let event = event(stream);
                result::event::destroy(event).unwrap();
                result::event::record(event, stream).unwrap();
            }
            "pinned memory freed under a copy" => {
                let (from, to) = (pinned(1000), memory(1000));
                result::memcpy_htod_async(to, from, stream).unwrap();
                result::free_host(from.as_mut_ptr().cast()).unwrap();
                result::stream::synchronize(stream).unwrap();
            }
            "a module unloaded under a launch" => {
                let (module, function) = embed((9, 0));
                launch(function, &[memory(1000); 8], [1; 3], 0, stream).unwrap();
                result::module::unload(module).unwrap();
                result::stream::synchronize(stream).unwrap();
            }
            "a copy onto itself" => {
                let memory = memory(1000);
                result::memcpy_dtod_async(memory + 10, memory, 20, stream).unwrap();
            }
            "a part of a block exported" => {
                let mut handle = sys::CUipcMemHandle { reserved: [0; _] };
                let _ = sys::cuIpcGetMemHandle(&raw mut handle, memory(1000));
            }
            "a description destroyed twice" => {
                let compute = lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
                let description = lt::create_matmul_desc(compute, lt_sys::cudaDataType_t::CUDA_R_32F).unwrap();
                lt::destroy_matmul_desc(description).unwrap();
                lt::destroy_matmul_desc(description).unwrap();
            }
            "a copy that nobody waits for" => {
                let (from, to, memory) = (pinned(8), pinned(8), memory(8));
                from.fill(1);
                result::memcpy_htod_async(memory, from, stream).unwrap();
                result::memcpy_dtoh_async(to, memory, stream).unwrap();
                let event = event(stream);
                assert_eq!(*to, [0xff; 8], "it is there before anybody has waited");
                from.fill(2);
                result::event::synchronize(event).unwrap();
                assert_eq!(*to, [2; 8], "what changes before it is copied is copied as changed");
                // What the driver may move anywhere is taken at once.
                let mut pageable = [3u8; 8];
                result::memcpy_htod_async(memory, &pageable, stream).unwrap();
                pageable.fill(4);
                result::memcpy_dtoh_async(&mut pageable, memory, stream).unwrap();
                assert_eq!(pageable, [3; 8]);
            }
            "streams that do not wait for each other" => {
                let (other, memory, to) = (self::stream(), memory(8), pinned(8));
                let mut num_early = 0;
                for turn in 0..64 {
                    result::memset_d8_async(memory, turn, 8, other).unwrap();
                    result::memcpy_dtoh_async(to, memory, stream).unwrap();
                    result::stream::synchronize(stream).unwrap();
                    num_early += usize::from(*to != [turn; 8]);
                    result::stream::synchronize(other).unwrap();
                }
                assert!((1..64).contains(&num_early), "{num_early} of 64 came too early");
            }
            "a thread without a context" => {
                let made = std::thread::spawn(|| error_of(result::malloc_sync(8)));
                assert_eq!(made.join().unwrap(), CUresult::CUDA_ERROR_INVALID_CONTEXT);
            }
            "a copy beyond an allocation" => {
                let (memory, other) = (memory(1000), memory(1000));
                assert_eq!(
                    error_of(result::memset_d8_async(memory, 0, 1001, stream)),
                    CUresult::CUDA_ERROR_INVALID_VALUE
                );
                assert_eq!(
                    error_of(result::memcpy_dtod_async(other, memory + 999, 2, stream)),
                    CUresult::CUDA_ERROR_INVALID_VALUE
                );
            }
            "limits of a launch" => {
                let (_, function) = embed((9, 0));
                let refused = |grid, shared| error_of(launch(function, &[0; 8], grid, shared, stream));
                for grid in [[1, 65536, 1], [1, 1, 65536], [0, 1, 1]] {
                    assert_eq!(refused(grid, 0), CUresult::CUDA_ERROR_INVALID_VALUE);
                }
                assert_eq!(refused([1; 3], (48 << 10) + 1), CUresult::CUDA_ERROR_INVALID_VALUE);
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                let set = |bytes| result::function::set_function_attribute(function, attribute, bytes);
                assert_eq!(error_of(set((227 << 10) + 1)), CUresult::CUDA_ERROR_INVALID_VALUE);
                set(64 << 10).unwrap();
                assert_eq!(refused([1; 3], (64 << 10) + 1), CUresult::CUDA_ERROR_INVALID_VALUE);
            }
            "calls while a thread captures" => {
                for call in [|| error_of(result::malloc_sync(8)), || error_of(result::ctx::synchronize())] {
                    capture(stream);
                    // Of other threads none is forbidden.
                    let context = result::ctx::get_current().unwrap().unwrap() as usize;
                    let other = std::thread::spawn(move || {
                        result::ctx::set_current(context as sys::CUcontext).unwrap();
                        result::malloc_sync(8).is_ok()
                    });
                    assert!(other.join().unwrap());
                    assert_eq!(call(), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
                    let mut graph = null_mut();
                    let ended = sys::cuStreamEndCapture(stream, &raw mut graph);
                    assert_eq!(ended, CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
                    assert!(graph.is_null());
                }
                result::stream::synchronize(stream).unwrap();
            }
            "memory opened where it was exported" => {
                let mut handle = sys::CUipcMemHandle { reserved: [0; _] };
                sys::cuIpcGetMemHandle(&raw mut handle, memory(2 << 20)).result().unwrap();
                let (mut at, flags) = (0, sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32);
                let status = sys::cuIpcOpenMemHandle_v2(&raw mut at, handle, flags);
                assert_eq!(status, CUresult::CUDA_ERROR_INVALID_CONTEXT);
            }
            "a stray access" => {
                let (_, function) = embed((9, 0));
                let memory = memory(1000);
                result::free_sync(memory).unwrap();
                launch(function, &[memory, memory, 0, memory, 8, 0, 0, 0], [1; 3], 0, stream).unwrap();
                assert_eq!(error_of(result::stream::synchronize(stream)), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
                // And so it stays.
                assert_eq!(error_of(result::malloc_sync(8)), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
                assert_eq!(error_of(result::stream::synchronize(stream)), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
            }
            "an image of another device" => {
                let text = c".version 9.0\n.target sm_100\n.address_size 64\n";
                let load = |text: &std::ffi::CStr| error_of(result::module::load_data(text.as_ptr().cast()));
                assert_eq!(load(text), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
                assert_eq!(load(c".version 9.4\n.target sm_80\n"), CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
                assert_eq!(load(c"neither"), CUresult::CUDA_ERROR_INVALID_IMAGE);
            }
            "attributes of another size" => {
                let compute = lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
                let description = lt::create_matmul_desc(compute, lt_sys::cudaDataType_t::CUDA_R_32F).unwrap();
                let attribute = lt_sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
                let wide = 1u64;
                let set =
                    lt::set_matmul_desc_attribute(description, attribute, (&raw const wide).cast(), size_of_val(&wide));
                assert_eq!(set.unwrap_err().0, lt_sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE);
            }
            "less memory than is asked for" => {
                memory(900_000);
                assert_eq!(error_of(result::malloc_sync(200_000)), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
            }
            other => panic!("no misuse is called {other}"),
        }
    }
}
