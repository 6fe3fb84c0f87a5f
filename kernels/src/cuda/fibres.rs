//! The host as a device: kernels run as fibres, one block after the other, for tests.
//!
//! The build script compiles `kernels/cuda/host/device.cpp`, which has all kernels in it, to a library that is loaded
//! here. What is launched has happened when the call returns. Wrong arguments are refused, memory begins as NaN, and
//! who leaves its bounds ends the process.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use libloading::{Library, Symbol};

use super::device::{
    Args, BoxedTensor, Device, DeviceError, Event, Landing, Lane, Launch, MemoryInfo, Product, TensorMap,
};
use super::graph::{Allocations, Graph, Named, not_recordable, out_of_order};

type Alloc = unsafe extern "C" fn(usize, *mut c_int, *mut usize) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void);
type LaunchKernel =
    unsafe extern "C" fn(*const c_char, *const c_uint, c_uint, usize, usize, *const *const u8, *const usize) -> c_int;

/// Blocks along y and along z that GPUs allow.
const GRID_YZ_MAX: u32 = 65_535;

/// First word of what stands for a tensor map, `HOST_TENSOR_MAP` of host/host_tensor_map.h.
const TENSOR_MAP_KIND: u64 = 0x7061_6d5f_7473_6f68;

/// The host, treated as a device.
pub struct FibreDevice {
    alloc: Alloc,
    free: Free,
    launch: LaunchKernel,
    memory_bytes: usize,
    shared_bytes_max: usize,
    allocated: Mutex<Allocations>,
    /// What threads are recording.
    captures: Mutex<HashMap<ThreadId, Capture>>,
    /// Files that shared memory is in, by address: descriptor, where the memory begins, its size.
    files: Mutex<HashMap<u64, [u64; 3]>>,
    /// Other processes' memory: where each mapping begins and its size, by the address that was given for it.
    opened: Mutex<HashMap<u64, (usize, usize)>>,
}

/// What was recorded, with the parameters it had.
#[derive(Default)]
struct Capture {
    nodes: Vec<Node>,
    named: Named,
}

enum Node {
    Launch { kernel: &'static str, grid: [u32; 3], threads: u32, shared_bytes: u32, args: Box<Args> },
    Product(Product),
    Copy { from: u64, to: u64, num_bytes: usize },
    Zero { at: u64, num_bytes: usize },
}

/// Nodes that are done one after the other, each as if it were launched now.
struct FibreGraph {
    device: Arc<FibreDevice>,
    capture: Capture,
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
        // Elsewhere on a machine that tests were only brought to.
        let path = std::env::var_os("TANDEM_FIBRES_LIBRARY").unwrap_or_else(|| env!("TANDEM_FIBRES_LIBRARY").into());
        let said = |error: libloading::Error| format!("{}: {error}", path.display());
        // SAFETY: our own library; its initialisers only fill tables.
        let library = unsafe { Library::new(&path) }.map_err(said).expect("the build script made it");
        // SAFETY: the types are those of the functions in device.cpp.
        let (alloc, free, launch) = unsafe {
            let alloc: Symbol<'_, Alloc> = library.get(b"fibres_alloc").expect("device.cpp has it");
            let free: Symbol<'_, Free> = library.get(b"fibres_free").expect("device.cpp has it");
            let launch: Symbol<'_, LaunchKernel> = library.get(b"fibres_launch").expect("device.cpp has it");
            (*alloc, *free, *launch)
        };
        // Its code stays: a thread may still compute when the last device goes.
        std::mem::forget(library);
        Self {
            alloc,
            free,
            launch,
            memory_bytes,
            shared_bytes_max,
            allocated: Mutex::default(),
            captures: Mutex::default(),
            files: Mutex::default(),
            opened: Mutex::default(),
        }
    }

    fn allocated(&self) -> MutexGuard<'_, Allocations> {
        self.allocated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn captures(&self) -> MutexGuard<'_, HashMap<ThreadId, Capture>> {
        self.captures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory of the device; `file` is filled with the descriptor of its file and where it begins there, if given.
    fn give(&self, num_bytes: usize, file: Option<(&mut c_int, &mut usize)>) -> Result<u64, DeviceError> {
        if self.is_recording() {
            return Err(out_of_order("give memory", "this thread is recording a graph"));
        }
        let mut allocated = self.allocated();
        let used = allocated.num_bytes();
        if num_bytes > self.memory_bytes - used {
            let reason = format!("it has {} in all, {used} in use", self.memory_bytes);
            return Err(DeviceError::Refused { asked: format!("give {num_bytes} bytes of memory"), reason });
        }
        let (file, offset) = match file {
            Some((file, offset)) => (std::ptr::from_mut(file), std::ptr::from_mut(offset)),
            None => (std::ptr::null_mut(), std::ptr::null_mut()),
        };
        // SAFETY: any size is allowed; the two are null or exclusively borrowed.
        let address = unsafe { (self.alloc)(num_bytes, file, offset) } as u64;
        allocated.on_given(address, num_bytes);
        Ok(address)
    }

    fn is_recording(&self) -> bool {
        self.captures().contains_key(&std::thread::current().id())
    }

    /// Keeps a node that names `addresses` instead of doing it, if this thread is recording on this lane.
    fn is_recorded(&self, lane: Lane, addresses: &[u64], node: impl FnOnce() -> Node) -> Result<bool, DeviceError> {
        let mut captures = self.captures();
        let Some(capture) = captures.get_mut(&std::thread::current().id()).filter(|_| lane == Lane::Compute) else {
            return Ok(false);
        };
        let allocated = self.allocated();
        addresses.iter().try_for_each(|address| capture.named.add(*address, &allocated))?;
        capture.nodes.push(node());
        Ok(true)
    }

    fn check_not_recording(&self, lane: Lane, what: &str) -> Result<(), DeviceError> {
        if lane == Lane::Compute && self.is_recording() { Err(not_recordable(what)) } else { Ok(()) }
    }
}

impl Default for FibreDevice {
    fn default() -> Self {
        Self::new()
    }
}

/// Four numbers; zeros for what is missing.
fn fields(bytes: &[u8]) -> [u64; 4] {
    let mut fields = [0; 4];
    for (field, bytes) in fields.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *field = u64::from_le_bytes(*bytes);
    }
    fields
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
        let free_bytes = self.memory_bytes - self.allocated().num_bytes();
        Ok(MemoryInfo { free_bytes, total_bytes: self.memory_bytes })
    }

    fn shared_bytes_max(&self) -> usize {
        self.shared_bytes_max
    }

    fn alloc(&self, num_bytes: usize) -> Result<u64, DeviceError> {
        self.give(num_bytes, None)
    }

    /// In a file in memory, which stands for what a GPU's driver lets other processes open.
    fn alloc_shared(&self, num_bytes: usize) -> Result<u64, DeviceError> {
        let (mut file, mut offset) = (-1, 0);
        let address = self.give(num_bytes, Some((&mut file, &mut offset)))?;
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.insert(address, [file as u64, offset as u64, num_bytes as u64]);
        Ok(address)
    }

    /// Process, descriptor, where the memory begins in its file, and its size.
    fn export(&self, address: u64) -> Result<Vec<u8>, DeviceError> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let Some([file, offset, num_bytes]) = files.get(&address).copied() else {
            return Err(out_of_order("export memory", "it was not made to be shared"));
        };
        Ok([u64::from(std::process::id()), file, offset, num_bytes].map(u64::to_le_bytes).concat())
    }

    fn open_export(&self, handle: &[u8], num_bytes: usize) -> Result<u64, DeviceError> {
        let refused = |reason: String| DeviceError::Refused { asked: "open a peer's memory".to_string(), reason };
        let ([process, file, offset, size], true) = (fields(handle), handle.len() == 32) else {
            return Err(refused(format!("a handle of {} bytes", handle.len())));
        };
        if size != num_bytes as u64 {
            return Err(refused(format!("it has {size} bytes, {num_bytes} were announced")));
        }
        let path = format!("/proc/{process}/fd/{file}");
        let file = std::fs::File::open(&path).map_err(|error| refused(format!("{path}: {error}")))?;
        let found = file.metadata().map_err(|error| refused(error.to_string()))?.len();
        let end = offset.checked_add(size).filter(|end| *end <= found);
        let Some(end) = end else { return Err(refused(format!("{path} has {found} bytes"))) };
        // SAFETY: a fresh mapping at an address of the kernel's choice, of a file that has as many bytes.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), end as usize, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(refused(std::io::Error::last_os_error().to_string()));
        }
        let address = start as u64 + offset;
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.insert(address, (start as usize, end as usize));
        Ok(address)
    }

    unsafe fn close_export(&self, address: u64) {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
        if let Some((start, num_bytes)) = opened {
            // SAFETY: mapped in `open_export`; by this function's contract nobody uses it any more.
            unsafe { libc::munmap(start as *mut c_void, num_bytes) };
        }
    }

    unsafe fn free(&self, address: u64) {
        let mut allocated = self.allocated();
        allocated.on_taken_back(address);
        self.files.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
        // SAFETY: by this function's contract it came from `alloc`; nothing runs behind the caller's back.
        unsafe { (self.free)(address as *mut c_void) }
    }

    unsafe fn copy_in(&self, lane: Lane, places: &[(u64, usize)], mut from: &[u8]) -> Result<(), DeviceError> {
        self.check_not_recording(lane, "a copy from the host")?;
        for &(to, num_bytes) in places {
            let (now, later) = from.split_at(num_bytes);
            // SAFETY: by this function's contract `to` begins as many bytes of a buffer of its own.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), to as *mut u8, num_bytes) };
            from = later;
        }
        Ok(())
    }

    unsafe fn copy_out(&self, lane: Lane, places: &[(u64, usize)], mut to: &mut [u8]) -> Result<(), DeviceError> {
        self.check_not_recording(lane, "a copy to the host")?;
        for &(from, num_bytes) in places {
            let (now, later) = to.split_at_mut(num_bytes);
            // SAFETY: by this function's contract `from` begins as many bytes of a buffer of its own.
            unsafe { std::ptr::copy_nonoverlapping(from as *const u8, now.as_mut_ptr(), num_bytes) };
            to = later;
        }
        Ok(())
    }

    unsafe fn start_copy_out(&self, from: u64, num_bytes: usize) -> Result<Box<dyn Landing>, DeviceError> {
        let mut bytes = vec![0; num_bytes];
        // SAFETY: by this function's contract.
        unsafe { self.copy_out(Lane::Compute, &[(from, num_bytes)], &mut bytes) }?;
        Ok(Box::new(Landed(bytes)))
    }

    unsafe fn copy_within(&self, lane: Lane, from: u64, to: u64, num_bytes: usize) -> Result<(), DeviceError> {
        if self.is_recorded(lane, &[from, to], || Node::Copy { from, to, num_bytes })? {
            return Ok(());
        }
        // SAFETY: by this function's contract both are within buffers and do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, num_bytes) };
        Ok(())
    }

    unsafe fn copy_all_within(&self, lane: Lane, copies: &[(u64, u64, usize)]) -> Result<(), DeviceError> {
        // SAFETY: by this function's contract.
        copies.iter().try_for_each(|(from, to, num_bytes)| unsafe { self.copy_within(lane, *from, *to, *num_bytes) })
    }

    unsafe fn zero(&self, lane: Lane, at: u64, num_bytes: usize) -> Result<(), DeviceError> {
        if self.is_recorded(lane, &[at], || Node::Zero { at, num_bytes })? {
            return Ok(());
        }
        // SAFETY: by this function's contract `at` begins as many bytes of a buffer.
        unsafe { std::ptr::write_bytes(at as *mut u8, 0, num_bytes) };
        Ok(())
    }

    unsafe fn launch(&self, lane: Lane, launch: &Launch<'_>) -> Result<(), DeviceError> {
        let refused = |reason: String| DeviceError::Refused { asked: format!("launch {}", launch.kernel), reason };
        if launch.grid[1..].iter().any(|blocks| *blocks > GRID_YZ_MAX) {
            return Err(refused(format!("{:?} blocks, at most {GRID_YZ_MAX} along y and along z", launch.grid)));
        }
        if launch.shared_bytes as usize > self.shared_bytes_max {
            let (asked, most) = (launch.shared_bytes, self.shared_bytes_max);
            return Err(refused(format!("{asked} bytes of shared memory, of at most {most}")));
        }
        let Launch { kernel, grid, threads, shared_bytes, args } = *launch;
        let node = || Node::Launch { kernel, grid, threads, shared_bytes, args: Box::new(args.clone()) };
        if self.is_recorded(lane, &args.addresses().collect::<Vec<_>>(), node)? {
            return Ok(());
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

    fn check_hopper_kernels(&self) -> Result<(), String> {
        Ok(())
    }

    /// `HostTensorMap` of host/host_tensor_map.h.
    fn tensor_map(&self, tensor: &BoxedTensor) -> Result<TensorMap, DeviceError> {
        let mut words = [0; 16];
        (words[0], words[1]) = (TENSOR_MAP_KIND, tensor.address);
        words[2..6].copy_from_slice(&tensor.dims);
        words[6..10].copy_from_slice(&tensor.box_dims.map(u64::from));
        Ok(TensorMap(words))
    }

    fn has_product(&self) -> bool {
        true
    }

    unsafe fn multiply(&self, product: &Product) -> Result<(), DeviceError> {
        let Product { x, w, bias, out, m, n, k, add } = *product;
        if self.is_recorded(Lane::Compute, &[x, w, bias, out], || Node::Product(*product))? {
            return Ok(());
        }
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
        self.check_not_recording(Lane::Compute, "an event")?;
        Ok(Box::new(Done))
    }

    fn begin_capture(&self) -> Result<(), DeviceError> {
        match self.captures().entry(std::thread::current().id()) {
            Entry::Vacant(place) => {
                place.insert(Capture::default());
                Ok(())
            }
            Entry::Occupied(_) => Err(out_of_order("begin a graph", "this thread is recording one already")),
        }
    }

    fn end_capture(self: Arc<Self>) -> Result<Box<dyn Graph>, DeviceError> {
        let capture = self.captures().remove(&std::thread::current().id());
        let capture = capture.ok_or_else(|| out_of_order("end a graph", "this thread is recording none"))?;
        Ok(Box::new(FibreGraph { device: self, capture }))
    }
}

/// Launches are over when they return, and so are copies.
struct Landed(Vec<u8>);

impl Landing for Landed {
    fn bytes(&self) -> Result<&[u8], DeviceError> {
        Ok(&self.0)
    }
}

impl Graph for FibreGraph {
    fn launch(&self) -> Result<(), DeviceError> {
        self.capture.named.check(&self.device.allocated())?;
        for node in &self.capture.nodes {
            // SAFETY: whoever launched it vouched for the arguments; the memory they name is still the same, by the
            // check above, and who uses it at this point of the lane is whoever launches the graph.
            unsafe {
                match node {
                    Node::Launch { kernel, grid, threads, shared_bytes, args } => {
                        let (grid, threads, shared_bytes) = (*grid, *threads, *shared_bytes);
                        self.device
                            .launch(Lane::Compute, &Launch { kernel, grid, threads, shared_bytes, args: args.as_ref() })
                    }
                    Node::Product(product) => self.device.multiply(product),
                    Node::Copy { from, to, num_bytes } => {
                        self.device.copy_within(Lane::Compute, *from, *to, *num_bytes)
                    }
                    Node::Zero { at, num_bytes } => self.device.zero(Lane::Compute, *at, *num_bytes),
                }
            }?;
        }
        Ok(())
    }

    fn num_nodes(&self) -> usize {
        self.capture.nodes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::device::Buffer;
    use crate::cuda::{PeerMemory, Piece, Recording, ops};

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

    fn rows(device: &Arc<dyn Device>, values: [f32; 4]) -> Buffer {
        Buffer::of(device, &values).unwrap()
    }

    fn values(of: &Buffer) -> Vec<f32> {
        let mut bytes = vec![0; of.num_bytes()];
        of.read(Lane::Compute, 0, &mut bytes).unwrap();
        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    #[test]
    fn a_graph_does_again_what_was_recorded_with_what_is_there_then() {
        let device: Arc<dyn Device> = Arc::new(FibreDevice::new());
        let (table, ids) = (rows(&device, [1.0, 2.0, 3.0, 4.0]), Buffer::of(&device, &[1u32]).unwrap());
        let (out, copy) = (rows(&device, [0.0; 4]), rows(&device, [0.0; 4]));
        device.begin_capture().unwrap();
        ops::embed(&table, ops::Dtype::F32, ops::Part::from(&ids), None, &out, 1, 2).unwrap();
        copy.copy_from(Lane::Compute, 4, &out, 0, 8).unwrap();
        copy.zero(Lane::Compute, 12, 4).unwrap();
        // Another thread is not recorded, nor is the other lane.
        std::thread::scope(|scope| scope.spawn(|| table.write(Lane::Compute, 0, &[0; 4]).unwrap()).join().unwrap());
        ids.write(Lane::Transfer, 0, &0u32.to_le_bytes()).unwrap();
        let graph = device.clone().end_capture().unwrap();
        assert_eq!((graph.num_nodes(), values(&out), values(&copy)), (3, vec![0.0; 4], vec![0.0; 4]));
        graph.launch().unwrap();
        assert_eq!((values(&out), values(&copy)), (vec![0.0, 2.0, 0.0, 0.0], vec![0.0, 0.0, 2.0, 0.0]));
        ids.write(Lane::Compute, 0, &1u32.to_le_bytes()).unwrap();
        graph.launch().unwrap();
        assert_eq!(values(&copy), [0.0, 3.0, 4.0, 0.0]);
        drop(ids);
        let said = graph.launch().unwrap_err().to_string();
        assert!(said.contains("cannot launch a graph") && said.contains("was given back"), "{said}");
    }

    #[test]
    fn memory_of_another_process_is_opened_and_outlives_what_it_was_exported_from() {
        let (one, other): (Arc<dyn Device>, Arc<dyn Device>) =
            (Arc::new(FibreDevice::new()), Arc::new(FibreDevice::new()));
        let buffer = Buffer::shared(&one, 5000).unwrap();
        buffer.write(Lane::Transfer, 4990, &[1, 2, 3, 4]).unwrap();
        let handle = buffer.export().unwrap();
        let peer = PeerMemory::open(&other, &handle, 5000).unwrap();
        drop(buffer);
        let to = Buffer::new(&other, 8).unwrap();
        to.zero(Lane::Transfer, 0, 8).unwrap();
        let pieces = [(4992, 0, 2), (4990, 4, 3)].map(|(from, to, num_bytes)| Piece { from, to, num_bytes });
        peer.copy_to(&to, &pieces).unwrap();
        let mut bytes = [0; 8];
        to.read(Lane::Transfer, 0, &mut bytes).unwrap();
        assert_eq!(bytes, [3, 4, 0, 0, 1, 2, 3, 0]);
        let mut byte = [0];
        peer.read(4991, &mut byte).unwrap();
        assert_eq!(byte, [2]);

        let said = |handle: &[u8], size| PeerMemory::open(&other, handle, size).err().unwrap().to_string();
        assert!(said(&handle, 5001).contains("it has 5000 bytes, 5001 were announced"), "{}", said(&handle, 5001));
        assert!(said(&handle[1..], 5000).contains("a handle of 31 bytes"));
        let gone = [u64::from(u32::MAX), 3, 0, 5000].map(u64::to_le_bytes).concat();
        assert!(said(&gone, 5000).contains("/proc/4294967295/fd/3"));
        let private = Buffer::new(&one, 8).unwrap();
        assert!(private.export().unwrap_err().to_string().contains("it was not made to be shared"));
    }

    #[test]
    fn what_depends_on_the_host_is_refused_while_a_graph_is_recorded() {
        let device: Arc<dyn Device> = Arc::new(FibreDevice::new());
        let buffer = rows(&device, [0.0; 4]);
        let said = device.clone().end_capture().err().unwrap().to_string();
        assert_eq!(said, "the device cannot end a graph: this thread is recording none");
        device.begin_capture().unwrap();
        let refused = [
            buffer.write(Lane::Compute, 0, &[1]).unwrap_err(),
            buffer.read(Lane::Compute, 0, &mut [1]).unwrap_err(),
            device.record().err().unwrap(),
            Buffer::new(&device, 1).unwrap_err(),
        ];
        assert_eq!(device.clone().end_capture().unwrap().num_nodes(), 0);
        let said: Vec<String> = refused.iter().map(DeviceError::to_string).collect();
        for (said, what) in
            said.iter().zip(["record a copy from", "record a copy to", "record an event", "give memory"])
        {
            assert!(said.starts_with(&format!("the device cannot {what}")), "{said}");
        }
    }

    #[test]
    fn a_refused_launch_while_a_graph_is_recorded_leaves_the_device_usable() {
        let device: Arc<dyn Device> = Arc::new(FibreDevice::new());
        let (table, ids) = (rows(&device, [1.0, 2.0, 3.0, 4.0]), Buffer::of(&device, &[1u32]).unwrap());
        let out = rows(&device, [0.0; 4]);
        let embed = |rows| ops::embed(&table, ops::Dtype::F32, ops::Part::from(&ids), None, &out, rows, 2);
        let recorded = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let recording = Recording::begin(&device).unwrap();
            embed(1).unwrap();
            device.record().map(|_| ()).unwrap();
            recording.end().unwrap().num_nodes()
        }));
        assert!(recorded.is_err());
        // Memory and events again, launches that are done at once, and a graph of nothing but what is recorded now.
        assert_eq!(values(&rows(&device, [5.0; 4])), [5.0; 4]);
        device.record().unwrap().wait().unwrap();
        embed(1).unwrap();
        assert_eq!(values(&out), [3.0, 4.0, 0.0, 0.0]);
        let recording = Recording::begin(&device).unwrap();
        assert!(Recording::begin(&device).is_err(), "and the one that is recording goes on");
        embed(1).unwrap();
        assert_eq!(recording.end().unwrap().num_nodes(), 1);
    }

    #[test]
    #[should_panic(expected = "bytes 8..+5 lie outside a buffer of 12")]
    fn access_beyond_the_end_panics() {
        let device: Arc<dyn Device> = Arc::new(FibreDevice::new());
        let _ = Buffer::new(&device, 12).unwrap().write(Lane::Compute, 8, &[0; 5]);
    }
}
