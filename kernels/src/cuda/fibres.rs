//! The host as a device: kernels run as fibres, one block after the other, for tests.
//!
//! The build script compiles `kernels/cuda/host/device.cpp`, which has all kernels in it, to a library that is loaded
//! here. What is launched has happened when the call returns. Wrong arguments are refused, memory begins as NaN, and
//! who leaves its bounds ends the process.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libloading::{Library, Symbol};

use super::device::{Device, DeviceError, Event, Lane, Launch, MemoryInfo, Product};

type Alloc = unsafe extern "C" fn(usize) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void);
type LaunchKernel =
    unsafe extern "C" fn(*const c_char, *const c_uint, c_uint, usize, usize, *const *const u8, *const usize) -> c_int;

/// Blocks along y and along z that GPUs allow.
const GRID_YZ_MAX: u32 = 65_535;

/// The host, treated as a device.
pub struct FibreDevice {
    alloc: Alloc,
    free: Free,
    launch: LaunchKernel,
    memory_bytes: usize,
    shared_bytes_max: usize,
    allocated: Mutex<Allocated>,
    /// Where the functions are.
    _library: Library,
}

/// Memory that was given.
#[derive(Default)]
struct Allocated {
    sizes: HashMap<u64, usize>,
    num_bytes: usize,
}

impl FibreDevice {
    /// A device with 1 GiB and the shared memory of compute capability 9.0.
    ///
    /// # Panics
    /// If the library that was built with this program cannot be loaded.
    pub fn new() -> Self {
        Self::with_limits(1 << 30, 227 << 10)
    }

    /// A device with so much memory, and so much shared memory for a block.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn with_limits(memory_bytes: usize, shared_bytes_max: usize) -> Self {
        let path = env!("TANDEM_FIBRES_LIBRARY");
        let said = |error: libloading::Error| format!("{path}: {error}");
        // SAFETY: our own library; its initialisers only fill tables.
        let library = unsafe { Library::new(path) }.map_err(said).expect("the build script made it");
        // SAFETY: the types are those of the functions in device.cpp.
        let (alloc, free, launch) = unsafe {
            let alloc: Symbol<'_, Alloc> = library.get(b"fibres_alloc").expect("device.cpp has it");
            let free: Symbol<'_, Free> = library.get(b"fibres_free").expect("device.cpp has it");
            let launch: Symbol<'_, LaunchKernel> = library.get(b"fibres_launch").expect("device.cpp has it");
            (*alloc, *free, *launch)
        };
        Self { alloc, free, launch, memory_bytes, shared_bytes_max, allocated: Mutex::default(), _library: library }
    }

    fn allocated(&self) -> MutexGuard<'_, Allocated> {
        self.allocated.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for FibreDevice {
    fn default() -> Self {
        Self::new()
    }
}

struct Done;

impl Event for Done {
    fn wait(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

impl Device for FibreDevice {
    fn name(&self) -> String {
        "fibres on the host".to_string()
    }

    fn memory(&self) -> Result<MemoryInfo, DeviceError> {
        let free_bytes = self.memory_bytes - self.allocated().num_bytes;
        Ok(MemoryInfo { free_bytes, total_bytes: self.memory_bytes })
    }

    fn shared_bytes_max(&self) -> usize {
        self.shared_bytes_max
    }

    fn alloc(&self, num_bytes: usize) -> Result<u64, DeviceError> {
        let mut allocated = self.allocated();
        if num_bytes > self.memory_bytes - allocated.num_bytes {
            let reason = format!("it has {} in all, {} in use", self.memory_bytes, allocated.num_bytes);
            return Err(DeviceError::Refused { asked: format!("give {num_bytes} bytes of memory"), reason });
        }
        // SAFETY: any size is allowed.
        let address = unsafe { (self.alloc)(num_bytes) } as u64;
        allocated.sizes.insert(address, num_bytes);
        allocated.num_bytes += num_bytes;
        Ok(address)
    }

    unsafe fn free(&self, address: u64) {
        let mut allocated = self.allocated();
        allocated.num_bytes -= allocated.sizes.remove(&address).unwrap_or(0);
        // SAFETY: by this function's contract it came from `alloc`; nothing runs behind the caller's back.
        unsafe { (self.free)(address as *mut c_void) }
    }

    unsafe fn copy_in(&self, _lane: Lane, to: u64, from: &[u8]) -> Result<(), DeviceError> {
        // SAFETY: by this function's contract `to` begins as many bytes of a buffer of its own.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    unsafe fn copy_out(&self, _lane: Lane, from: u64, to: &mut [u8]) -> Result<(), DeviceError> {
        // SAFETY: by this function's contract `from` begins as many bytes of a buffer of its own.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn copy_within(&self, _lane: Lane, from: u64, to: u64, num_bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: by this function's contract both are within buffers and do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, num_bytes) };
        Ok(())
    }

    unsafe fn zero(&self, _lane: Lane, at: u64, num_bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: by this function's contract `at` begins as many bytes of a buffer.
        unsafe { std::ptr::write_bytes(at as *mut u8, 0, num_bytes) };
        Ok(())
    }

    unsafe fn launch(&self, _lane: Lane, launch: &Launch<'_>) -> Result<(), DeviceError> {
        let refused = |reason: String| DeviceError::Refused { asked: format!("launch {}", launch.kernel), reason };
        if launch.grid[1..].iter().any(|blocks| *blocks > GRID_YZ_MAX) {
            return Err(refused(format!("{:?} blocks, at most {GRID_YZ_MAX} along y and along z", launch.grid)));
        }
        if launch.shared_bytes as usize > self.shared_bytes_max {
            let (asked, most) = (launch.shared_bytes, self.shared_bytes_max);
            return Err(refused(format!("{asked} bytes of shared memory, of at most {most}")));
        }
        let name = CString::new(launch.kernel).expect("names of kernels hold no zero");
        let (args, sizes): (Vec<*const u8>, Vec<usize>) = launch.args.values().unzip();
        // SAFETY: pointers and sizes are of values that live until the call returns; sizes are compared there with
        // the kernel's own; what the values mean is right by this function's contract.
        let status = unsafe {
            (self.launch)(
                name.as_ptr(),
                launch.grid.as_ptr(),
                launch.threads,
                launch.shared_bytes as usize,
                args.len(),
                args.as_ptr(),
                sizes.as_ptr(),
            )
        };
        let reason = match status {
            0 => return Ok(()),
            1 => "there is no such kernel".to_string(),
            2 => format!("it has another number of arguments than {}", args.len()),
            other => format!("argument {} is given as {} bytes", other - 3, sizes[other as usize - 3]),
        };
        Err(refused(reason))
    }

    fn has_product(&self) -> bool {
        true
    }

    unsafe fn multiply(&self, product: &Product) -> Result<(), DeviceError> {
        let Product { x, w, bias, out, m, n, k, add } = *product;
        // SAFETY: by this function's contract the addresses begin matrices of these shapes, and nobody writes them.
        let (x, w) = unsafe {
            (std::slice::from_raw_parts(x as *const u16, m * k), std::slice::from_raw_parts(w as *const u16, n * k))
        };
        // SAFETY: likewise; the result overlaps neither operand.
        let out = unsafe { std::slice::from_raw_parts_mut(out as *mut f32, m * n) };
        for (x, out) in x.chunks_exact(k).zip(out.chunks_exact_mut(n)) {
            for (column, (w, out)) in w.chunks_exact(k).zip(out).enumerate() {
                let widen = |bits: &u16| f64::from(crate::numerics::widen_bf16(*bits));
                let mut sum: f64 = x.iter().zip(w).map(|(x, w)| widen(x) * widen(w)).sum();
                if bias != 0 {
                    // SAFETY: by this function's contract it begins `n` values.
                    sum += f64::from(unsafe { *(bias as *const f32).add(column) });
                }
                *out = if add { *out + sum as f32 } else { sum as f32 };
            }
        }
        Ok(())
    }

    fn record(&self) -> Result<Box<dyn Event>, DeviceError> {
        Ok(Box::new(Done))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::cuda::device::{Args, Buffer};

    fn refusal(kernel: &'static str, args: &Args) -> String {
        refusal_of(&Launch { kernel, grid: [1, 1, 1], threads: 256, shared_bytes: 0, args })
    }

    fn refusal_of(launch: &Launch<'_>) -> String {
        // SAFETY: wrong launches are refused before anything of them is used, which is what is tested.
        unsafe { FibreDevice::new().launch(Lane::Compute, launch) }.unwrap_err().to_string()
    }

    #[test]
    fn more_blocks_or_shared_memory_than_a_gpu_has_are_refused() {
        let (args, kernel, threads) = (Args::default(), "embed_f32", 256);
        for grid in [[1, 65_536, 1], [1, 1, 65_536]] {
            let said = refusal_of(&Launch { kernel, grid, threads, shared_bytes: 0, args: &args });
            assert!(said.contains("at most 65535 along y and along z"), "{said}");
        }
        let said = refusal_of(&Launch { kernel, grid: [1, 1, 1], threads, shared_bytes: (227 << 10) + 1, args: &args });
        assert!(said.ends_with("232449 bytes of shared memory, of at most 232448"), "{said}");
    }

    #[test]
    fn wrong_arguments_are_refused() {
        assert_eq!(refusal("embed", &Args::default()), "the device cannot launch embed: there is no such kernel");
        let three = Args::default().address(0).address(0).u32(8);
        assert!(refusal("silu_mul_f32", &three.u32(1)).contains("another number of arguments than 4"));
        let wide = Args::default().address(0).address(0).u64(8);
        assert!(refusal("silu_mul_f32", &wide).contains("argument 2 is given as 8 bytes"));
    }

    #[test]
    fn memory_begins_as_nan_and_gives_back_what_was_written() {
        let device: Arc<dyn Device> = Arc::new(FibreDevice::new());
        let buffer = Buffer::new(&device, 12).unwrap();
        let mut bytes = [0; 12];
        buffer.read(Lane::Compute, 0, &mut bytes).unwrap();
        assert_eq!(bytes, [0xff; 12]);
        buffer.write(Lane::Transfer, 4, &[1, 2, 3, 4]).unwrap();
        buffer.zero(Lane::Transfer, 0, 4).unwrap();
        buffer.copy_from(Lane::Compute, 8, &buffer, 4, 4).unwrap();
        buffer.read(Lane::Compute, 0, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0, 0, 0, 1, 2, 3, 4, 1, 2, 3, 4]);
        let said = Buffer::new(&device, (1 << 30) - 11).unwrap_err().to_string();
        assert!(said.ends_with("it has 1073741824 in all, 12 in use"), "{said}");
        drop(buffer);
        assert_eq!(device.memory().unwrap().free_bytes, 1 << 30);
    }

    #[test]
    #[should_panic(expected = "bytes 8..+5 lie outside a buffer of 12")]
    fn access_beyond_the_end_panics() {
        let device: Arc<dyn Device> = Arc::new(FibreDevice::new());
        let _ = Buffer::new(&device, 12).unwrap().write(Lane::Compute, 8, &[0; 5]);
    }
}
