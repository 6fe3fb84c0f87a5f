//! A GPU through NVIDIA's driver, found at run time, with the kernels loaded on it.
#![allow(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, c_char, c_void};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use cudarc::driver::sys::{
    self, CUdevice_attribute, CUevent_flags, CUfunction_attribute, CUgraphInstantiate_flags, CUipcMem_flags,
    CUipcMemHandle, CUstream, CUstreamCaptureMode,
};
use cudarc::driver::{CudaContext, CudaFunction, CudaGraph, CudaStream, DriverError, result};
use cudarc::nvrtc::Ptx;

use super::blas::{Blas, WORKSPACE_BYTES};
use super::device::{BoxedTensor, Device, DeviceError, Event, Landing, Lane, Launch, MemoryInfo, Product, TensorMap};
use super::graph::{Allocations, Graph, Named, not_recordable, out_of_order};
use super::images::{EMBEDDED, Embedded, Image};
use super::nvrtc;

/// Bytes of one piece of a copy between the device and memory of the host that the driver may move anywhere: it
/// goes through memory that stays where it is.
const STAGING_BYTES: usize = 2 << 20;
/// Pieces that may be on their way, or wait behind what computes: a step has three, and two are in flight.
const COMPUTE_STAGES: usize = 8;
/// Pieces of a transfer that may be on their way: one that the device moves, one that the host does.
const TRANSFER_STAGES: usize = 2;
/// What comes from the device lands in memory of this size at least.
const LANDING_BYTES_MIN: usize = 4 << 10;
/// Memory in multiples of this is cut out of no larger block.
const SHARED_BLOCK_BYTES: usize = 2 << 20;
/// Shared memory that a launch may ask for without more: of 48 KiB, what the kernel itself and the driver have (1 KiB on
/// compute capability 9.0) counts as well.
const SHARED_BYTES_UNASKED: u32 = 32 << 10;

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
    functions: HashMap<&'static str, Function>,
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

/// A stream that records and does nothing: the compute lane goes on for the other threads.
struct Capture {
    stream: Arc<CudaStream>,
    named: Named,
    num_nodes: usize,
}

/// A graph that is ready to be launched on the compute lane.
struct GpuGraph {
    /// Dropped before the device, whose kernels and workspace it uses. If it runs then, the driver lets it end first
    /// (`cuGraphExecDestroy`), and nobody waits.
    graph: CudaGraph,
    named: Named,
    num_nodes: usize,
    gpu: Arc<Gpu>,
}

// SAFETY: a graph may be used from any thread as long as one does at a time: that is who holds the compute lane, and
// whoever drops it, which takes exclusive access.
unsafe impl Send for GpuGraph {}
// SAFETY: likewise.
unsafe impl Sync for GpuGraph {}

struct Function {
    function: CudaFunction,
    /// Sizes of its parameters as its compiler counts them, if the driver tells.
    parameters: Option<Vec<usize>>,
    /// Of a block; kernels ask for as much as they want at their first launch.
    shared_bytes: Mutex<u32>,
}

/// A stream, and memory through which copies go.
struct LaneState {
    stream: Arc<CudaStream>,
    /// Free, then those that a copy may still read.
    free: Vec<Pinned>,
    busy: VecDeque<(Pinned, RecordedEvent)>,
}

/// Memory of the host that the driver keeps where it is, so that copies reach it by themselves.
struct Pinned {
    context: Arc<CudaContext>,
    start: *mut u8,
    num_bytes: usize,
}
// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}
// SAFETY: likewise; whoever borrows it reads.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// The context is current on this thread.
    fn new(context: &Arc<CudaContext>, num_bytes: usize) -> Result<Self, DeviceError> {
        // SAFETY: any size; freed in `drop`.
        let start = unsafe { result::malloc_host(num_bytes, 0) }.map_err(refused("give memory for copies"))?;
        Ok(Self { context: context.clone(), start: start.cast(), num_bytes })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A context that is gone has taken its memory with it.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: from `malloc_host`; whoever drops it knows that no copy uses it.
            let _ = unsafe { result::free_host(self.start.cast::<c_void>()) };
        }
    }
}

/// Memory for bytes that come from the device; as many as ever were on their way at the same time.
type Landings = Arc<Mutex<Vec<Pinned>>>;

struct GpuLanding {
    /// There until the landing is dropped.
    memory: Option<Pinned>,
    num_bytes: usize,
    /// Behind the copy.
    event: RecordedEvent,
    home: Landings,
}

impl Landing for GpuLanding {
    fn bytes(&self) -> Result<&[u8], DeviceError> {
        self.event.wait()?;
        let memory = self.memory.as_ref().expect("it is there until the drop");
        // SAFETY: as many bytes were copied, the copy is done, and nobody writes here before the drop.
        Ok(unsafe { std::slice::from_raw_parts(memory.start, self.num_bytes) })
    }
}

impl Drop for GpuLanding {
    fn drop(&mut self) {
        let memory = self.memory.take().expect("dropped once");
        // The copy may still write.
        match self.event.wait() {
            Ok(()) => self.home.lock().unwrap_or_else(PoisonError::into_inner).push(memory),
            Err(_) => std::mem::forget(memory), // whether it ever ends is not known
        }
    }
}

/// A point of a stream.
struct RecordedEvent {
    context: Arc<CudaContext>,
    event: cudarc::driver::sys::CUevent,
}
// SAFETY: events may be used from any thread.
unsafe impl Send for RecordedEvent {}
// SAFETY: likewise.
unsafe impl Sync for RecordedEvent {}

fn refused(asked: impl Into<String>) -> impl FnOnce(DriverError) -> DeviceError {
    let asked = asked.into();
    move |error| DeviceError::Refused { asked, reason: format!("the NVIDIA driver says {}", sentence(error)) }
}

/// An error by its name and in words.
fn sentence(error: DriverError) -> String {
    let text = |text: Result<&CStr, _>| text.map(|text: &CStr| text.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Ok(name), Ok(words)) => format!("{name}: {words}"),
        _ => format!("error {}", error.0 as u32),
    }
}

impl RecordedEvent {
    fn on(context: &Arc<CudaContext>, stream: CUstream) -> Result<Self, DeviceError> {
        let event = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(refused("make an event"))?;
        let recorded = Self { context: context.clone(), event };
        // SAFETY: both were made in this context.
        unsafe { result::event::record(event, stream) }.map_err(refused("record an event"))?;
        Ok(recorded)
    }
}

impl Event for RecordedEvent {
    fn wait(&self) -> Result<(), DeviceError> {
        self.context.bind_to_thread().map_err(refused("be used by this thread"))?;
        // SAFETY: made in `on`, destroyed in `drop`.
        unsafe { result::event::synchronize(self.event) }.map_err(refused("finish what was launched"))
    }
}

impl Drop for RecordedEvent {
    fn drop(&mut self) {
        // A context that is gone has taken its events with it.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: made in `on`, not used again.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
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

type Functions = HashMap<&'static str, Function>;

/// All kernels. Those for compute capability 9.0 alone may be missing, for which there is a reason then; but what is in
/// a folder is what whoever named it wants, or an error.
fn load_kernels(
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

/// Of streams; 0 is the default, and what it is where the device has only one.
fn highest_priority(context: &Arc<CudaContext>) -> i32 {
    let supported = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED);
    if supported != Ok(1) {
        return 0;
    }
    result::stream::get_priority_range().map_or(0, |(_, highest)| highest)
}

/// Places of a copy, taken in portions of any size.
struct Portions<'a> {
    places: &'a [(u64, usize)],
    /// Of the first, taken already.
    num_taken: usize,
}

impl<'a> Portions<'a> {
    fn of(places: &'a [(u64, usize)]) -> Self {
        Self { places, num_taken: 0 }
    }

    /// The next `num_bytes`: addresses, and which of these bytes belong there.
    fn next(&mut self, num_bytes: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let &(address, held) = self.places.first().filter(|_| start < num_bytes)?;
            let address = address + self.num_taken as u64;
            let range = start..num_bytes.min(start + held - self.num_taken);
            (start, self.num_taken) = (range.end, self.num_taken + range.len());
            if self.num_taken == held {
                (self.places, self.num_taken) = (&self.places[1..], 0);
            }
            Some((address, range))
        })
        .filter(|(_, range)| !range.is_empty())
    }
}

impl LaneState {
    fn new(context: &Arc<CudaContext>, priority: i32, stages: usize) -> Result<Self, DeviceError> {
        let stream = context.new_stream_with_priority(priority).map_err(refused("make a stream"))?;
        let free = (0..stages).map(|_| Pinned::new(context, STAGING_BYTES)).collect::<Result<_, _>>()?;
        Ok(Self { stream, free, busy: VecDeque::new() })
    }

    /// Memory that no copy reads any more.
    fn stage(&mut self) -> Result<Pinned, DeviceError> {
        if let Some(stage) = self.free.pop() {
            return Ok(stage);
        }
        let Some((stage, event)) = self.busy.pop_front() else {
            let reason = "earlier copies have failed".to_string();
            return Err(DeviceError::Refused { asked: "copy".to_string(), reason });
        };
        event.wait()?;
        Ok(stage)
    }

    fn copy_in(&mut self, context: &Arc<CudaContext>, places: &[(u64, usize)], from: &[u8]) -> Result<(), DeviceError> {
        let mut places = Portions::of(places);
        for piece in from.chunks(STAGING_BYTES) {
            let stage = self.stage()?;
            // SAFETY: a stage has room for a piece, and nothing reads it.
            let staged = unsafe {
                std::ptr::copy_nonoverlapping(piece.as_ptr(), stage.start, piece.len());
                std::slice::from_raw_parts(stage.start, piece.len())
            };
            let copied = places.next(piece.len()).try_for_each(|(to, range)| {
                // SAFETY: `to` has room by the caller's contract; the stage is as it is until the event has come.
                unsafe { result::memcpy_htod_async(to, &staged[range], self.stream.cu_stream()) }
            });
            let on_its_way = self.mark(context, stage)?;
            self.busy.push_back(on_its_way);
            copied.map_err(refused("take a copy"))?;
        }
        Ok(())
    }

    fn copy_out(
        &mut self,
        context: &Arc<CudaContext>,
        places: &[(u64, usize)],
        to: &mut [u8],
    ) -> Result<(), DeviceError> {
        let mut places = Portions::of(places);
        let mut landing: VecDeque<(Pinned, RecordedEvent, &mut [u8])> = VecDeque::new();
        for piece in to.chunks_mut(STAGING_BYTES) {
            // One piece is copied on by the host while the next is on its way.
            if landing.len() == TRANSFER_STAGES {
                let first = landing.pop_front().expect("there are some");
                self.land(first)?;
            }
            let stage = self.stage()?;
            // SAFETY: a stage has room for a piece, and nothing else uses it.
            let staged = unsafe { std::slice::from_raw_parts_mut(stage.start, piece.len()) };
            let copied = places.next(piece.len()).try_for_each(|(from, range)| {
                // SAFETY: `from` has as many bytes by the caller's contract; nobody reads the stage before the event.
                unsafe { result::memcpy_dtoh_async(&mut staged[range], from, self.stream.cu_stream()) }
            });
            let (stage, event) = self.mark(context, stage)?;
            if let Err(error) = copied {
                self.busy.push_back((stage, event));
                return Err(refused("give a copy")(error));
            }
            landing.push_back((stage, event, piece));
        }
        for piece in landing {
            self.land(piece)?;
        }
        Ok(())
    }

    /// Copies from or to `stage` are on their way: the event that says when they are over.
    fn mark(&self, context: &Arc<CudaContext>, stage: Pinned) -> Result<(Pinned, RecordedEvent), DeviceError> {
        match RecordedEvent::on(context, self.stream.cu_stream()) {
            Ok(event) => Ok((stage, event)),
            Err(error) => {
                std::mem::forget(stage); // nobody hears of their end
                Err(error)
            }
        }
    }

    fn land(&mut self, (stage, event, to): (Pinned, RecordedEvent, &mut [u8])) -> Result<(), DeviceError> {
        event.wait()?;
        // SAFETY: the copy into the stage is done, by the event.
        unsafe { std::ptr::copy_nonoverlapping(stage.start, to.as_mut_ptr(), to.len()) };
        self.free.push(stage);
        Ok(())
    }
}

impl Drop for LaneState {
    fn drop(&mut self) {
        // Its stages are free when nothing runs any more. What the driver refuses now, it is gone.
        let _ = self.stream.synchronize();
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

impl Drop for GpuGraph {
    fn drop(&mut self) {
        // For the fields, which are dropped on this thread. What the driver refuses, it has taken back with the context.
        let _ = self.gpu.bind();
    }
}

impl Graph for GpuGraph {
    fn launch(&self) -> Result<(), DeviceError> {
        self.gpu.bind()?;
        let state = self.gpu.lane(Lane::Compute);
        self.named.check(&self.gpu.allocations())?;
        // SAFETY: instantiated from a capture of this device, whose kernels, workspace and named memory are there;
        // nobody else uses it while the lane is held.
        unsafe { result::graph::launch(self.graph.cu_graph_exec(), state.stream.cu_stream()) }
            .map_err(refused("launch a graph"))
    }

    fn num_nodes(&self) -> usize {
        self.num_nodes
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
mod tests {
    use super::*;
    use crate::cuda::device::{Args, Buffer, as_bytes};
    use crate::cuda::ops::{self, Multiply, PrefillKernel};
    use crate::cuda::{PeerMemory, Piece};
    use crate::kv_layout::KvLayout;

    #[test]
    fn a_gpu_that_is_not_there_is_a_sentence() {
        let error = Gpu::open(4096, None).err().unwrap().to_string();
        let says = |part: &str| error.contains(part);
        assert!(
            says("has no NVIDIA driver") || says("cuda:4096 was asked for") || says("cannot be counted"),
            "{error}"
        );
    }

    /// What only runs where there is a driver, with the one of the host: in processes of their own, one thread each.
    #[cfg(feature = "fibres")]
    #[test]
    fn tests_that_need_a_gpu_pass_on_the_host_driver() {
        for wishes in ["capability=9.0,seed=1", "capability=8.0,seed=2"] {
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["cuda::driver::tests", "--ignored", "--test-threads=1", "--nocapture"])
                .args(["--skip", "opens_what_was_exported"])
                .env("LD_LIBRARY_PATH", crate::cuda::host_driver_folder())
                .env("HOST_CUDA_DRIVER", wishes)
                .output()
                .unwrap();
            let said =
                format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "{wishes}: {said}");
            assert!(said.contains(" 11 passed"), "{wishes}: {said}");
            assert!(!said.contains("host driver:"), "{wishes}: {said}");
        }
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn every_embedded_kernel_loads() {
        let gpu = Gpu::open(0, None).unwrap();
        let is_hopper = gpu.check_hopper_kernels().is_ok();
        assert_eq!(is_hopper, gpu.capability == (9, 0), "{:?}", gpu.check_hopper_kernels());
        let wanted = EMBEDDED.iter().filter(|kernel| is_hopper || !kernel.is_hopper());
        assert_eq!(gpu.num_kernels(), wanted.map(|kernel| kernel.entries.len()).sum::<usize>());
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn arguments_of_another_number_or_size_are_refused() {
        let gpu = Gpu::open(0, None).unwrap();
        if gpu.functions["silu_mul_f32"].parameters.is_none() {
            println!("SKIPPED: the driver is older than CUDA 12.4");
            return;
        }
        let two = Args::default().address(0).address(0);
        for args in [two.clone(), two.clone().u64(8), two.u32(8).u32(1)] {
            let launch = Launch { kernel: "silu_mul_f32", grid: [1; 3], threads: 32, shared_bytes: 0, args: &args };
            // SAFETY: it is refused before anything is launched.
            let said = unsafe { gpu.launch(Lane::Compute, &launch) }.unwrap_err().to_string();
            assert!(said.contains("bytes, the kernel has [8, 8, 4]"), "{said}");
        }
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn copies_of_several_pieces_come_back() {
        let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
        let bytes: Vec<u8> = (0..5 * STAGING_BYTES + 3).map(|i| (i % 251) as u8).collect();
        for lane in [Lane::Compute, Lane::Transfer] {
            let (from, to) = (Buffer::new(&device, bytes.len()).unwrap(), Buffer::new(&device, bytes.len()).unwrap());
            from.write(lane, 0, &bytes).unwrap();
            to.copy_from(lane, 0, &from, 0, bytes.len()).unwrap();
            to.zero(lane, 1, 2).unwrap();
            let mut back = vec![0; bytes.len()];
            to.read(lane, 0, &mut back).unwrap();
            assert!(back[0] == bytes[0] && back[1..3] == [0, 0] && back[3..] == bytes[3..], "{lane:?}");
        }
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn what_lies_in_many_places_is_copied_in_one_go() {
        let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
        let buffer = Buffer::of(&device, &vec![0xffu8; 4 * STAGING_BYTES]).unwrap();
        // Out of order, of all sizes, none on a border of a stage, one larger than a stage.
        let places: Vec<(usize, usize)> =
            [(3 * STAGING_BYTES, 1000), (5, 0), (100, STAGING_BYTES + 77), (10, 1), (40, 30)]
                .into_iter()
                .chain((0..40).map(|i| (2 * STAGING_BYTES + (39 - i) * 5000, 4999)))
                .collect();
        let num_bytes = places.iter().map(|(_, num_bytes)| num_bytes).sum();
        for (turn, lane) in [Lane::Compute, Lane::Transfer].into_iter().enumerate() {
            let bytes: Vec<u8> = (0..num_bytes).map(|i| ((i + turn) % 251) as u8).collect();
            buffer.write_places(lane, &places, &bytes).unwrap();
            let mut back = vec![0; num_bytes];
            buffer.read_places(lane, &places, &mut back).unwrap();
            assert!(back == bytes, "{lane:?}");
            let mut all = vec![0; buffer.num_bytes()];
            buffer.read(lane, 0, &mut all).unwrap();
            let mut expected = vec![0xff; all.len()];
            let mut rest = &bytes[..];
            for &(offset, num_bytes) in &places {
                let (now, later) = rest.split_at(num_bytes);
                expected[offset..][..num_bytes].copy_from_slice(now);
                rest = later;
            }
            assert!(all == expected, "{lane:?}: what lies between the places is as it was");
        }
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn memory_is_given_back_when_what_was_asked_for_before_is_done() {
        let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
        let kept = Buffer::of(&device, &[1u32, 2]).unwrap();
        let given_back = Buffer::of(&device, &[3u32, 4]).unwrap();
        kept.copy_from(Lane::Compute, 0, &given_back, 0, 8).unwrap();
        drop(given_back);
        let mut bytes = [0; 8];
        kept.read(Lane::Compute, 0, &mut bytes).unwrap();
        assert_eq!(bytes, as_bytes(&[3u32, 4]));
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn what_is_read_in_the_order_of_the_lane_lands_by_itself() {
        let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
        let buffer = Buffer::of(&device, &[1u32, 2, 3]).unwrap();
        let before = buffer.start_read(4, 8).unwrap();
        buffer.zero(Lane::Compute, 0, 12).unwrap();
        let behind = buffer.start_read(0, 12).unwrap();
        assert_eq!((before.bytes().unwrap(), behind.bytes().unwrap()), (as_bytes(&[2u32, 3]), &[0; 12][..]));
        // The memory of one that nobody waited for is not given to another before its copy is over.
        (0..100u32).for_each(|_| drop(buffer.start_read(0, 12).unwrap()));
        assert_eq!(behind.bytes().unwrap(), [0; 12]);
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn a_graph_does_again_what_was_recorded_with_what_is_there_then() {
        let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
        let table = Buffer::of(&device, &[1f32, 2.0, 3.0, 4.0]).unwrap();
        let (ids, out) = (Buffer::of(&device, &[1u32]).unwrap(), Buffer::of(&device, &[0f32; 2]).unwrap());
        device.begin_capture().unwrap();
        ops::embed(&table, ops::Dtype::F32, ops::Part::from(&ids), None, &out, 1, 2).unwrap();
        let graph = device.clone().end_capture().unwrap();
        for (id, wanted) in [(0u32, [1f32, 2.0]), (1, [3.0, 4.0])] {
            ids.write(Lane::Compute, 0, &id.to_le_bytes()).unwrap();
            graph.launch().unwrap();
            let mut bytes = [0; 8];
            out.read(Lane::Compute, 0, &mut bytes).unwrap();
            assert_eq!(bytes, wanted.map(f32::to_le_bytes).as_flattened());
        }
        drop(ids);
        assert!(graph.launch().unwrap_err().to_string().contains("was given back"));
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn launches_that_overlap_see_what_the_one_ahead_wrote() {
        let gpu = Gpu::open(0, None).unwrap();
        let can_overlap = gpu.capability == (9, 0);
        let device: Arc<dyn Device> = Arc::new(gpu);
        assert_eq!(device.enable_pdl().is_ok(), can_overlap, "{:?}", device.enable_pdl());
        let (rows, width) = (64, 4096);
        let table: Vec<f32> = (0..width).map(|i| if i % 2 == 0 { 3.0 } else { -3.0 }).collect();
        let (table, ones) = (Buffer::of(&device, &table).unwrap(), Buffer::of(&device, &vec![1f32; width]).unwrap());
        let ids = Buffer::of(&device, &vec![0u32; rows]).unwrap();
        let (x, out) =
            (Buffer::new(&device, rows * width * 4).unwrap(), Buffer::new(&device, rows * width * 4).unwrap());
        for _ in 0..20 {
            x.zero(Lane::Compute, 0, x.num_bytes()).unwrap();
            ops::embed(&table, ops::Dtype::F32, ops::Part::from(&ids), None, &x, rows, width).unwrap();
            ops::rms_norm(&x, &ones, 0.0, &out, ops::Dtype::F32, rows, width).unwrap();
        }
        let landing = out.start_read(0, out.num_bytes()).unwrap();
        let signs = landing.bytes().unwrap().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        assert!(signs.enumerate().all(|(i, value)| value == if i % 2 == 0 { 1.0 } else { -1.0 }));
    }

    /// Values between -1 and 1.
    fn random_bf16(device: &Arc<dyn Device>, seed: u64, count: usize) -> Buffer {
        let value = |i: u32| half::bf16::from_f64(2.0 * crate::uniform(seed, 0, i) - 1.0);
        Buffer::of(device, &(0..count as u32).map(value).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn attention_of_prompts_by_warpgroups_is_that_of_the_portable_kernel() {
        let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
        if let Err(reason) = device.check_hopper_kernels() {
            println!("SKIPPED: {reason}");
            return;
        }
        for (head_dim, block_size, window) in [(64, 16, 0), (64, 48, 100), (128, 64, 0), (128, 32, 700)] {
            let (num_heads, num_kv_heads, first_position, num_rows) = (6, 2, 900, 300usize);
            let num_blocks = (first_position + num_rows).div_ceil(block_size);
            let dtype = ops::Dtype::Bf16;
            let layout = KvLayout { num_layers: 2, num_blocks, block_size, num_kv_heads, head_dim, dtype };
            let memory = random_bf16(&device, 1, layout.total_bytes() / 2);
            let pool = ops::Pool { buffer: &memory, layout: &layout };
            let q = random_bf16(&device, 2, num_rows * num_heads * head_dim);
            let tiles = (0..num_rows).step_by(ops::PREFILL_ROWS).map(|first| {
                [first, ops::PREFILL_ROWS.min(num_rows - first), first_position + first, 0].map(|n| n as u32)
            });
            let tiles: Vec<[u32; 4]> = tiles.collect();
            let table: Vec<u32> = (0..num_blocks as u32).rev().collect();
            let (num_tiles, tiles) = (tiles.len(), Buffer::of(&device, tiles.as_flattened()).unwrap());
            let table = Buffer::of(&device, &table).unwrap();
            let shape = ops::AttentionShape { layer: 1, num_heads, scale: 0.1, window, num_rows };
            let attended = |kernel| {
                let out = Buffer::new(&device, q.num_bytes()).unwrap();
                let (tiles, table) = (ops::Part::from(&tiles), ops::Part::from(&table));
                ops::attention_prefill(kernel, pool, &shape, &q, tiles, num_tiles, table, &out).unwrap();
                let mut bytes = vec![0; out.num_bytes()];
                out.read(Lane::Compute, 0, &mut bytes).unwrap();
                bytes.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect::<Vec<f32>>()
            };
            let (found, wanted) = (attended(PrefillKernel::Hopper), attended(PrefillKernel::Portable));
            let same = found.iter().zip(&wanted).filter(|(found, wanted)| found == wanted).count();
            println!("heads of {head_dim}: {same} of {} values are the same", wanted.len());
            for (found, wanted) in found.iter().zip(&wanted) {
                assert!((found - wanted).abs() <= 1e-2 * wanted.abs().max(1.0), "{found} and {wanted}");
            }
        }
    }

    const HANDLE: &str = "TANDEM_TEST_HANDLE";

    fn some_bytes() -> Vec<u8> {
        (0..3 << 20).map(|i: u32| (i % 253) as u8).collect()
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn exported_memory_is_copied_by_another_process() {
        let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
        let bytes = some_bytes();
        let buffer = Buffer::shared(&device, bytes.len()).unwrap();
        buffer.write(Lane::Transfer, 0, &bytes).unwrap();
        let handle: String = buffer.export().unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
        let other = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["cuda::driver::tests::opens_what_was_exported", "--exact", "--ignored", "--nocapture"])
            .env(HANDLE, handle)
            .status();
        assert!(other.unwrap().success());
    }

    #[test]
    #[ignore = "a part of another test, which runs it in a process of its own"]
    fn opens_what_was_exported() {
        let hex = std::env::var(HANDLE).expect("it is run by the other test");
        let handle: Vec<u8> = hex
            .as_bytes()
            .chunks(2)
            .map(|byte| u8::from_str_radix(std::str::from_utf8(byte).unwrap(), 16).unwrap())
            .collect();
        let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
        let bytes = some_bytes();
        let peer = PeerMemory::open(&device, &handle, bytes.len()).unwrap();
        let (own, scratch) =
            (Buffer::new(&device, bytes.len()).unwrap(), Buffer::new(&device, ops::DIGEST_BYTES).unwrap());
        let half = bytes.len() / 2;
        let pieces = [(half, 0), (0, half)].map(|(from, to)| Piece { from, to, num_bytes: half });
        peer.copy_to(&own, &pieces).unwrap();
        let mut back = vec![0; bytes.len()];
        own.read(Lane::Transfer, 0, &mut back).unwrap();
        assert!(back == [&bytes[half..], &bytes[..half]].concat());
        let digest = |pieces: &[(usize, usize)]| ops::digest(&own, pieces, &scratch).unwrap();
        assert_eq!(digest(&[(0, half), (half, half)]), digest(&[(0, bytes.len())]));
    }

    #[test]
    #[ignore = "needs a GPU and cuBLASLt"]
    fn a_product_of_the_library_is_that_of_the_kernel() {
        let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
        assert!(device.has_product(), "libcublasLt is not found: name its folder in LD_LIBRARY_PATH");
        let (m, n, k) = (40, 48, 64);
        let values = |seed, count: usize| (0..count as u32).map(move |i| crate::uniform(seed, 0, i) as f32 - 0.5);
        let bf16 = |seed, count| {
            Buffer::of(&device, &values(seed, count).map(half::bf16::from_f32).collect::<Vec<_>>()).unwrap()
        };
        let (x, w) = (bf16(1, m * k), bf16(2, n * k));
        let bias = Buffer::of(&device, &values(3, n).collect::<Vec<_>>()).unwrap();
        for (bias, add) in [(None, false), (Some(&bias), false), (None, true), (Some(&bias), true)] {
            let product = |multiply: fn(&Multiply<'_>) -> Result<(), DeviceError>| {
                let out = Buffer::of(&device, &values(4, m * n).collect::<Vec<_>>()).unwrap();
                multiply(&Multiply { x: &x, w: &w, bias, out: &out, m, n, k, add }).unwrap();
                let mut bytes = vec![0; m * n * 4];
                out.read(Lane::Compute, 0, &mut bytes).unwrap();
                bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<f32>>()
            };
            let (library, kernel) = (product(ops::library_matmul), product(ops::skinny_matmul));
            for (library, kernel) in library.iter().zip(&kernel) {
                assert!((library - kernel).abs() < 1e-4, "{library} and {kernel}, add {add}");
            }
        }
    }
}
