//! A GPU through NVIDIA's driver, found at run time, with the kernels loaded on it.
//!
//! In reading order: what a [`Gpu`] is and does is here; `loading` makes functions of kernels; `lane` is the order of
//! launches and copies, through memory that is `pinned`, with an `event` behind each; `recording` has what graphs are made
//! of; `refusal` puts into words what the driver says.
#![allow(unsafe_code)]

mod event;
mod lane;
mod loading;
mod pinned;
mod recording;
mod refusal;

use std::collections::HashMap;
use std::ffi::{c_char, c_void};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use cudarc::driver::sys::{
    self, CUdevice_attribute, CUfunction_attribute, CUgraphInstantiate_flags, CUipcMem_flags, CUipcMemHandle, CUstream,
    CUstreamCaptureMode,
};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};

use self::event::RecordedEvent;
use self::lane::{COMPUTE_STAGES, LaneState, TRANSFER_STAGES, highest_priority};
use self::loading::{Function, Functions, load_kernels};
use self::pinned::{GpuLanding, Landings, Pinned};
use self::recording::{Capture, GpuGraph};
use self::refusal::refused;
use super::blas::{Blas, WORKSPACE_BYTES};
use super::device::{BoxedTensor, Device, DeviceError, Event, Landing, Lane, Launch, MemoryInfo, Product, TensorMap};
use super::graph::{Allocations, Graph, Named, not_recordable, out_of_order};

/// What comes from the device lands in memory of this size at least.
const LANDING_BYTES_MIN: usize = 4 << 10;
/// Memory in multiples of this is cut out of no larger block.
const SHARED_BLOCK_BYTES: usize = 2 << 20;

/// A GPU of this machine, with the kernels on it.
pub struct Gpu {
    context: Arc<CudaContext>,
    /// Which, as `cuda:N` counts.
    pub ordinal: usize,
    /// As the driver names it.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Of a block, for kernels that ask for it.
    shared_bytes_max: usize,
    functions: Functions,
    /// Whether the kernels for compute capability 9.0 alone are among them, or why not.
    hopper_kernels: Result<(), String>,
    /// Whether its kernels are somebody else's, of whom it is not known that they wait.
    has_foreign_kernels: bool,
    /// Whether launches may begin before the one ahead of them has ended.
    has_pdl: AtomicBool,
    compute: Mutex<LaneState>,
    transfer: Mutex<LaneState>,
    blas: Option<Blas>,
    /// Of the library, on the compute lane; 0 without it.
    workspace: u64,
    /// Free memory for what comes from the device.
    landings: Landings,
    /// What was given to users.
    allocations: Mutex<Allocations>,
    /// What threads are recording.
    captures: Mutex<HashMap<ThreadId, Capture>>,
    /// Streams that recorded and do not now: as many as threads ever did at the same time.
    idle_captures: Mutex<Vec<Arc<CudaStream>>>,
}

impl Gpu {
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
        match CudaContext::device_count() {
            Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
            // A driver that is installed where no GPU is, or where none is to be seen.
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
            Err(error) => Err(refused("be counted")(error)),
        }
    }

    /// The GPU number `ordinal`, with every kernel loaded: from cubins in `folder` if given, else those embedded, or
    /// compiled here where the driver takes none of these.
    ///
    /// # Errors
    /// [`DeviceError`]: no driver, no such GPU, no image of a kernel for it, or what the driver says.
    pub fn open(ordinal: usize, folder: Option<&Path>) -> Result<Self, DeviceError> {
        let num_devices = Self::count()?;
        if ordinal >= num_devices {
            return Err(DeviceError::Missing { ordinal, num_devices });
        }
        let context = CudaContext::new(ordinal).map_err(refused(format!("be opened as cuda:{ordinal}")))?;
        let name = context.name().map_err(refused("tell its name"))?;
        let (major, minor) = context.compute_capability().map_err(refused("tell its compute capability"))?;
        let capability = (major as u32, minor as u32);
        let shared_bytes_max = context
            .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
            .map_err(refused("tell its shared memory"))? as usize;
        let (functions, hopper_kernels) = load_kernels(&context, capability, folder)?;
        let compute = LaneState::new(&context, 0, COMPUTE_STAGES)?;
        // Copies of blocks are small and go before what computes.
        let transfer = LaneState::new(&context, highest_priority(&context), TRANSFER_STAGES)?;
        let blas = Blas::open()?;
        let workspace = match &blas {
            // SAFETY: the context is current on this thread; freed in `drop`.
            Some(_) => unsafe { result::malloc_sync(WORKSPACE_BYTES) }.map_err(refused("give memory to cuBLASLt"))?,
            None => 0,
        };
        Ok(Self {
            context,
            ordinal,
            name,
            capability,
            shared_bytes_max,
            functions,
            hopper_kernels,
            has_foreign_kernels: folder.is_some(),
            has_pdl: AtomicBool::new(false),
            compute: Mutex::new(compute),
            transfer: Mutex::new(transfer),
            blas,
            workspace,
            landings: Landings::default(),
            allocations: Mutex::default(),
            captures: Mutex::default(),
            idle_captures: Mutex::default(),
        })
    }

    /// How many kernels there are.
    pub fn num_kernels(&self) -> usize {
        self.functions.len()
    }

    fn bind(&self) -> Result<(), DeviceError> {
        self.context.bind_to_thread().map_err(refused("be used by this thread"))
    }

    /// Holding it is the order of the lane. A panic with it leaves nothing half done that counts.
    fn lane(&self, lane: Lane) -> MutexGuard<'_, LaneState> {
        let state = match lane {
            Lane::Compute => &self.compute,
            Lane::Transfer => &self.transfer,
        };
        state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn allocations(&self) -> MutexGuard<'_, Allocations> {
        self.allocations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn captures(&self) -> MutexGuard<'_, HashMap<ThreadId, Capture>> {
        self.captures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives `put` the stream that something naming `addresses` goes to: the one that this thread records, or the
    /// lane's, which is held meanwhile.
    fn put(
        &self,
        lane: Lane,
        addresses: impl IntoIterator<Item = u64>,
        put: impl FnOnce(CUstream) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        if lane == Lane::Compute {
            let mut captures = self.captures();
            if let Some(capture) = captures.get_mut(&std::thread::current().id()) {
                let allocations = self.allocations();
                addresses.into_iter().try_for_each(|address| capture.named.add(address, &allocations))?;
                capture.num_nodes += 1;
                return put(capture.stream.cu_stream());
            }
        }
        let state = self.lane(lane);
        put(state.stream.cu_stream())?;
        self.settle(lane, &state)
    }

    /// Waits for both lanes, as whoever gives memory back has to: `cuMemFree` may wait by itself, and need not.
    fn finish(&self) {
        for lane in [Lane::Compute, Lane::Transfer] {
            let stream = self.lane(lane).stream.clone();
            // A device that is lost does nothing any more.
            let _ = stream.synchronize();
        }
    }

    fn check_not_recording(&self, lane: Lane, what: &str) -> Result<(), DeviceError> {
        let is_recording = lane == Lane::Compute && self.captures().contains_key(&std::thread::current().id());
        if is_recording { Err(not_recordable(what)) } else { Ok(()) }
    }

    /// What is asked of the transfer lane is done when the call returns.
    fn settle(&self, lane: Lane, state: &LaneState) -> Result<(), DeviceError> {
        match lane {
            Lane::Compute => Ok(()),
            Lane::Transfer => state.stream.synchronize().map_err(refused("finish a copy")),
        }
    }
}

impl Device for Gpu {
    fn name(&self) -> String {
        format!("cuda:{} ({})", self.ordinal, self.name)
    }

    fn gpu(&self) -> Option<usize> {
        Some(self.ordinal)
    }

    fn enter(&self) -> Result<(), DeviceError> {
        self.bind()
    }

    fn memory(&self) -> Result<MemoryInfo, DeviceError> {
        self.bind()?;
        let (free_bytes, total_bytes) = result::mem_get_info().map_err(refused("tell its memory"))?;
        Ok(MemoryInfo { free_bytes, total_bytes })
    }

    fn shared_bytes_max(&self) -> usize {
        self.shared_bytes_max
    }

    fn alloc(&self, num_bytes: usize) -> Result<u64, DeviceError> {
        self.bind()?;
        if self.captures().contains_key(&std::thread::current().id()) {
            return Err(out_of_order("give memory", "this thread is recording a graph"));
        }
        // SAFETY: any size.
        let given = unsafe { result::malloc_sync(num_bytes) };
        let address = given.map_err(refused(format!("give {num_bytes} bytes of memory")))?;
        self.allocations().on_given(address, num_bytes);
        Ok(address)
    }

    /// In whole blocks of the driver: it may cut small memory out of a larger block, and a handle is of all of that.
    fn alloc_shared(&self, num_bytes: usize) -> Result<u64, DeviceError> {
        self.alloc(num_bytes.next_multiple_of(SHARED_BLOCK_BYTES))
    }

    fn export(&self, address: u64) -> Result<Vec<u8>, DeviceError> {
        self.bind()?;
        let mut handle = CUipcMemHandle { reserved: [0; _] };
        // SAFETY: the handle is exclusively borrowed; the driver knows which addresses it has given.
        let status = unsafe { sys::cuIpcGetMemHandle(&raw mut handle, address) };
        status.result().map_err(refused("export memory to other processes"))?;
        Ok(handle.reserved.map(|byte| byte as u8).to_vec())
    }

    fn open_export(&self, handle: &[u8], num_bytes: usize) -> Result<u64, DeviceError> {
        self.bind()?;
        let asked = format!("open {num_bytes} bytes of another process");
        let Ok(bytes) = <[u8; _]>::try_from(handle) else {
            return Err(DeviceError::Refused { asked, reason: format!("a handle of {} bytes", handle.len()) });
        };
        let handle = CUipcMemHandle { reserved: bytes.map(|byte| byte as c_char) };
        let (mut address, flags) = (0, CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32);
        // SAFETY: the address is exclusively borrowed; what the handle names is for the driver to find out.
        let status = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut address, handle, flags) };
        status.result().map_err(refused(asked.clone()))?;
        let (mut base, mut found) = (0, 0);
        // SAFETY: both are exclusively borrowed.
        let status = unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut found, address) };
        match status.result().map_err(refused(asked.clone())) {
            Ok(()) if found - ((address - base) as usize).min(found) >= num_bytes => Ok(address),
            outcome => {
                // SAFETY: opened above, and nobody has heard of it.
                unsafe { self.close_export(address) };
                outcome?;
                Err(DeviceError::Refused { asked, reason: format!("it has {found}") })
            }
        }
    }

    unsafe fn close_export(&self, address: u64) {
        // What the driver refuses, it has taken back with the context.
        if self.bind().is_ok() {
            // SAFETY: by this function's contract.
            let _ = unsafe { sys::cuIpcCloseMemHandle(address) };
        }
    }

    unsafe fn free(&self, address: u64) {
        // Before the driver has it back and may give it to another thread.
        self.allocations().on_taken_back(address);
        // What it refuses, it has taken back with the context.
        if self.bind().is_ok() {
            self.finish();
            // SAFETY: by this function's contract, and nothing runs any more that names it.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    unsafe fn copy_in(&self, lane: Lane, places: &[(u64, usize)], from: &[u8]) -> Result<(), DeviceError> {
        self.check_not_recording(lane, "a copy from the host")?;
        self.bind()?;
        let mut state = self.lane(lane);
        state.copy_in(&self.context, places, from)?;
        self.settle(lane, &state)
    }

    unsafe fn copy_out(&self, lane: Lane, places: &[(u64, usize)], to: &mut [u8]) -> Result<(), DeviceError> {
        self.check_not_recording(lane, "a copy to the host")?;
        self.bind()?;
        self.lane(lane).copy_out(&self.context, places, to)
    }

    unsafe fn start_copy_out(&self, from: u64, num_bytes: usize) -> Result<Box<dyn Landing>, DeviceError> {
        self.check_not_recording(Lane::Compute, "a copy to the host")?;
        self.bind()?;
        let free = {
            let mut landings = self.landings.lock().unwrap_or_else(PoisonError::into_inner);
            let index = landings.iter().position(|memory| memory.num_bytes >= num_bytes);
            index.map(|index| landings.swap_remove(index))
        };
        let memory = match free {
            Some(memory) => memory,
            None => Pinned::new(&self.context, num_bytes.next_power_of_two().max(LANDING_BYTES_MIN))?,
        };
        let state = self.lane(Lane::Compute);
        // SAFETY: the memory has room, and nobody uses it before the event has come; `from` has as much by this
        // function's contract.
        let copied = unsafe {
            let to = std::slice::from_raw_parts_mut(memory.start, num_bytes);
            result::memcpy_dtoh_async(to, from, state.stream.cu_stream())
        };
        copied.map_err(refused("give a copy"))?;
        match RecordedEvent::on(&self.context, state.stream.cu_stream()) {
            Ok(event) => {
                Ok(Box::new(GpuLanding { memory: Some(memory), num_bytes, event, home: self.landings.clone() }))
            }
            Err(error) => {
                std::mem::forget(memory); // the copy is on its way, and nobody hears of its end
                Err(error)
            }
        }
    }

    unsafe fn copy_within(&self, lane: Lane, from: u64, to: u64, num_bytes: usize) -> Result<(), DeviceError> {
        self.bind()?;
        self.put(lane, [from, to], |stream| {
            // SAFETY: by this function's contract.
            unsafe { result::memcpy_dtod_async(to, from, num_bytes, stream) }.map_err(refused("copy within its memory"))
        })
    }

    unsafe fn copy_all_within(&self, lane: Lane, copies: &[(u64, u64, usize)]) -> Result<(), DeviceError> {
        self.bind()?;
        if lane == Lane::Compute && self.captures().contains_key(&std::thread::current().id()) {
            // SAFETY: by this function's contract.
            return copies.iter().try_for_each(|&(from, to, bytes)| unsafe { self.copy_within(lane, from, to, bytes) });
        }
        let state = self.lane(lane);
        for &(from, to, num_bytes) in copies {
            // SAFETY: by this function's contract.
            unsafe { result::memcpy_dtod_async(to, from, num_bytes, state.stream.cu_stream()) }
                .map_err(refused("copy within its memory"))?;
        }
        self.settle(lane, &state)
    }

    unsafe fn zero(&self, lane: Lane, at: u64, num_bytes: usize) -> Result<(), DeviceError> {
        self.bind()?;
        self.put(lane, [at], |stream| {
            // SAFETY: by this function's contract.
            unsafe { result::memset_d8_async(at, 0, num_bytes, stream) }.map_err(refused("clear memory"))
        })
    }

    unsafe fn launch(&self, lane: Lane, launch: &Launch<'_>) -> Result<(), DeviceError> {
        self.bind()?;
        let Some(Function { function, parameters, shared_bytes }) = self.functions.get(launch.kernel) else {
            let reason = "kernels/cuda has no such kernel".to_string();
            return Err(DeviceError::Refused { asked: format!("launch {}", launch.kernel), reason });
        };
        if let Some(wanted) = parameters
            && !launch.args.values().map(|(_, size)| size).eq(wanted.iter().copied())
        {
            let given: Vec<usize> = launch.args.values().map(|(_, size)| size).collect();
            let reason = format!("its arguments are given as {given:?} bytes, the kernel has {wanted:?}");
            return Err(DeviceError::Refused { asked: format!("launch {}", launch.kernel), reason });
        }
        {
            let mut allowed = shared_bytes.lock().unwrap_or_else(PoisonError::into_inner);
            if launch.shared_bytes > *allowed {
                let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                function
                    .set_attribute(attribute, launch.shared_bytes as i32)
                    .map_err(refused(format!("give {} its shared memory", launch.kernel)))?;
                *allowed = launch.shared_bytes;
            }
        }
        let mut args: Vec<*mut c_void> = launch.args.values().map(|(value, _)| value.cast_mut().cast()).collect();
        let [x, y, z] = launch.grid;
        self.put(lane, launch.args.addresses(), |stream| {
            let mut overlap = sys::CUlaunchAttribute {
                id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                pad: [0; 4],
                value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            };
            let config = sys::CUlaunchConfig {
                gridDimX: x,
                gridDimY: y,
                gridDimZ: z,
                blockDimX: launch.threads,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: launch.shared_bytes,
                hStream: stream,
                attrs: &raw mut overlap,
                numAttrs: u32::from(lane == Lane::Compute && self.has_pdl.load(Ordering::Relaxed)),
            };
            // SAFETY: the function's module is loaded for as long as `function` lives; the arguments are the kernel's
            // by this function's contract, and read, as the attribute is, before the call returns. Kernels that overlap
            // wait by themselves, see `begin_launch` of device.cuh.
            let status = unsafe {
                sys::cuLaunchKernelEx(
                    &raw const config,
                    function.cu_function(),
                    args.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            status.result().map_err(refused(format!("launch {} on {:?} blocks", launch.kernel, launch.grid)))
        })
    }

    fn enable_pdl(&self) -> Result<(), String> {
        let Self { capability: (major, minor), .. } = *self;
        if (major, minor) != (9, 0) {
            // What runs there is made of PTX for compute capability 8.0, which has no instruction to wait with.
            return Err(format!("the GPU has compute capability {major}.{minor}, launches overlap on 9.0 alone"));
        }
        if self.has_foreign_kernels {
            let variable = super::images::KERNELS_FOLDER_VARIABLE;
            return Err(format!(
                "its kernels are from {variable}, and it cannot be seen whether they wait for earlier launches"
            ));
        }
        self.has_pdl.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn check_hopper_kernels(&self) -> Result<(), String> {
        self.hopper_kernels.clone()
    }

    fn tensor_map(&self, tensor: &BoxedTensor) -> Result<TensorMap, DeviceError> {
        self.bind()?;
        let BoxedTensor { address, dims, box_dims } = tensor;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let strides = [dims[0] * 2, dims[0] * dims[1] * 2, dims[0] * dims[1] * dims[2] * 2];
        // SAFETY: the arrays have as many entries as there are dimensions, and one stride fewer; the map is exclusively
        // borrowed. The driver checks what they say and touches no memory of the device.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                dims.len() as u32,
                *address as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                box_dims.as_ptr(),
                [1; 4].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        status.result().map_err(refused(format!("make a tensor map of {tensor:?}")))?;
        Ok(TensorMap(map.opaque))
    }

    fn has_product(&self) -> bool {
        self.blas.is_some()
    }

    unsafe fn multiply(&self, product: &Product) -> Result<(), DeviceError> {
        self.bind()?;
        let Some(blas) = &self.blas else {
            let reason = "libcublasLt is not there".to_string();
            return Err(DeviceError::Refused { asked: "multiply many rows".to_string(), reason });
        };
        let Product { x, w, bias, out, .. } = *product;
        self.put(Lane::Compute, [x, w, bias, out], |stream| {
            // SAFETY: by this function's contract; the workspace is used on this lane alone, also by graphs that are
            // launched on it; the context is bound.
            unsafe { blas.multiply(product, self.workspace, stream) }
        })
    }

    fn record(&self) -> Result<Box<dyn Event>, DeviceError> {
        self.check_not_recording(Lane::Compute, "an event")?;
        self.bind()?;
        let state = self.lane(Lane::Compute);
        Ok(Box::new(RecordedEvent::on(&self.context, state.stream.cu_stream())?))
    }

    fn begin_capture(&self) -> Result<(), DeviceError> {
        let thread = std::thread::current().id();
        if self.captures().contains_key(&thread) {
            return Err(out_of_order("begin a graph", "this thread is recording one already"));
        }
        let idle = self.idle_captures.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let stream = match idle {
            Some(stream) => stream,
            None => self.context.new_stream().map_err(refused("make a stream"))?,
        };
        // Of other threads' calls to the driver none is forbidden meanwhile.
        stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(refused("begin a graph"))?;
        self.captures().insert(thread, Capture { stream, named: Named::default(), num_nodes: 0 });
        Ok(())
    }

    fn end_capture(self: Arc<Self>) -> Result<Box<dyn Graph>, DeviceError> {
        let capture = self.captures().remove(&std::thread::current().id());
        let Some(Capture { stream, named, num_nodes }) = capture else {
            return Err(out_of_order("end a graph", "this thread is recording none"));
        };
        // A stream that failed is not used again.
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).map_err(refused("make a graph"))?;
        self.idle_captures.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
        let graph = graph.ok_or_else(|| out_of_order("make a graph", "the driver says that nothing was recorded"))?;
        Ok(Box::new(GpuGraph { graph, named, num_nodes, gpu: self }))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.workspace != 0 && self.bind().is_ok() {
            self.finish();
            // SAFETY: from `malloc_sync` in `open`, not used again, and nothing runs any more.
            let _ = unsafe { result::free_sync(self.workspace) };
        }
    }
}

#[cfg(test)]
mod tests;
