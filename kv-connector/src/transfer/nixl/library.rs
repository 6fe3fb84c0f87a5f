//! NIXL's library, found at run time: the functions of its C interface that are used here, and one agent behind them.
//!
//! The interface is that of `libnixl_capi.so` 1.5, and an older one is not taken: agents that several threads use lose a
//! peer safely only since then. Threads call an agent at the same time: it is made with the library's
//! own mode for that, a lock that transfers share and what changes peers or registered memory has alone. What it asks
//! of its callers is that one request is used by one at a time. The library stays loaded, as its threads may outlive an
//! agent.
#![allow(unsafe_code)]

#[cfg(test)]
pub(crate) mod fake;

use std::error::Error as _;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};

use common::device_pool::MemoryPlace;

type Status = c_int;
type Handle = *mut c_void;

const SUCCESS: Status = 0;
const IN_PROGRESS: Status = 1;
const HOST_MEMORY: c_int = 0;
const GPU_MEMORY: c_int = 1;
const READ: c_int = 0;
/// Readers and writers: calls for transfers share the agent's lock. The default is none at all.
const SYNC_RW: c_int = 2;
/// The backend for memory of hosts and devices.
const UCX: &CStr = c"UCX";

macro_rules! functions {
    ($($name:ident: $type:ty,)*) => {
        /// By the names of the library, without their `nixl_capi_`.
        #[derive(Clone, Copy)]
        struct Functions {
            $($name: $type,)*
        }

        impl Functions {
            /// # Safety
            /// The library's functions must have these types.
            unsafe fn find(library: &libloading::Library) -> Result<Self, libloading::Error> {
                // SAFETY: as promised by the caller.
                unsafe { Ok(Self { $($name: *library.get(concat!("nixl_capi_", stringify!($name), "\0").as_bytes())?,)* }) }
            }
        }
    };
}

functions! {
    create_configured_agent: unsafe extern "C" fn(*const c_char, *const AgentConfig, *mut Handle) -> Status,
    destroy_agent: unsafe extern "C" fn(Handle) -> Status,
    get_plugin_params: unsafe extern "C" fn(Handle, *const c_char, *mut Handle, *mut Handle) -> Status,
    destroy_mem_list: unsafe extern "C" fn(Handle) -> Status,
    destroy_params: unsafe extern "C" fn(Handle) -> Status,
    create_backend: unsafe extern "C" fn(Handle, *const c_char, Handle, *mut Handle) -> Status,
    create_reg_dlist: unsafe extern "C" fn(c_int, *mut Handle) -> Status,
    reg_dlist_add_desc: unsafe extern "C" fn(Handle, usize, usize, u64, *const c_void, usize) -> Status,
    destroy_reg_dlist: unsafe extern "C" fn(Handle) -> Status,
    register_mem: unsafe extern "C" fn(Handle, Handle, Handle) -> Status,
    get_local_md: unsafe extern "C" fn(Handle, *mut *mut c_void, *mut usize) -> Status,
    load_remote_md: unsafe extern "C" fn(Handle, *const c_void, usize, *mut *mut c_char) -> Status,
    invalidate_remote_md: unsafe extern "C" fn(Handle, *const c_char) -> Status,
    create_xfer_dlist: unsafe extern "C" fn(c_int, *mut Handle) -> Status,
    xfer_dlist_add_desc: unsafe extern "C" fn(Handle, usize, usize, u64) -> Status,
    destroy_xfer_dlist: unsafe extern "C" fn(Handle) -> Status,
    create_xfer_req: unsafe extern "C" fn(Handle, c_int, Handle, Handle, *const c_char, *mut Handle, Handle) -> Status,
    post_xfer_req: unsafe extern "C" fn(Handle, Handle, Handle) -> Status,
    get_xfer_status: unsafe extern "C" fn(Handle, Handle) -> Status,
    release_xfer_req: unsafe extern "C" fn(Handle, Handle) -> Status,
    destroy_xfer_req: unsafe extern "C" fn(Handle) -> Status,
}

/// How an agent works, as the library lays it out.
#[repr(C)]
struct AgentConfig {
    enable_prog_thread: bool,
    enable_listen_thread: bool,
    listen_port: c_int,
    thread_sync: c_int,
    num_workers: c_uint,
    pthr_delay_us: u64,
    lthr_delay_us: u64,
    capture_telemetry: bool,
}

/// A function that no version before 1.5 has.
const SINCE_1_5: &[u8] = b"nixl_capi_release_mem_view\0";

/// UCX's own thread answers peers that cannot read by themselves. Left at zero, it asks for work without a pause and takes
/// a core for that; with a delay it sleeps until its sockets have something to say, or so long.
const PROGRESS_DELAY_US: u64 = 1000;

/// The library's functions.
#[derive(Clone, Copy)]
pub(super) struct Library(Functions);

impl Library {
    /// Loads the library at `path`.
    ///
    /// # Errors
    /// What the system's loader says.
    pub(super) fn load(path: &Path) -> Result<Self, String> {
        let said = |error: libloading::Error| error.source().map_or_else(|| error.to_string(), ToString::to_string);
        // SAFETY: runs what the library does when it is loaded, which the operator has asked for by naming it.
        let library = unsafe { libloading::Library::new(path) }.map_err(said)?;
        // SAFETY: the types are those of NIXL's C interface.
        let functions = unsafe { Functions::find(&library) }.map_err(said)?;
        // SAFETY: it is not called.
        if unsafe { library.get::<unsafe extern "C" fn()>(SINCE_1_5) }.is_err() {
            return Err("it is older than NIXL 1.5, whose agents several threads can use while a peer is lost: name a newer one".to_string());
        }
        std::mem::forget(library);
        Ok(Self(functions))
    }
}

/// One end that reads memory of others, and lets them read its own.
pub(super) struct Agent {
    functions: Functions,
    handle: Handle,
}

// SAFETY: an agent of the library has no thread of its caller.
unsafe impl Send for Agent {}
// SAFETY: made with `SYNC_RW`, with which the library's calls may come from several threads at a time; 1.5 and later also
// while a peer is lost.
unsafe impl Sync for Agent {}

/// A read. It is the library's until it is [released](Agent::release). No two threads use it at a time: it can be handed
/// over, not shared.
pub(super) struct Request(Handle);

// SAFETY: as the agent's.
unsafe impl Send for Request {}

#[cfg(test)]
impl Request {
    /// For tests without any library.
    pub(super) fn nobody_s() -> Self {
        Self(null_mut())
    }
}

/// What has become of a read that was given up.
pub(super) enum Ended {
    /// Nothing is read any more.
    Well,
    /// Some of it may still be read: that a piece has failed says nothing of the others.
    Badly,
    NotYet(Request),
}

/// Kind of memory, and number of the device that has it, in the library's words.
fn kind(gpu: Option<u32>) -> (c_int, u64) {
    gpu.map_or((HOST_MEMORY, 0), |number| (GPU_MEMORY, number.into()))
}

fn checked(call: &str, status: Status) -> Result<(), String> {
    if status == SUCCESS { Ok(()) } else { Err(format!("NIXL's {call} says status {status}")) }
}

impl Agent {
    /// An agent with its UCX backend, whose threads inherit the scheduling of the caller's. `name` must be nobody else's in
    /// the cluster.
    pub(super) fn new(library: Library, name: &CStr) -> Result<Self, String> {
        let Library(functions) = library;
        let config = AgentConfig {
            enable_prog_thread: true,
            enable_listen_thread: false,
            listen_port: 0,
            thread_sync: SYNC_RW,
            num_workers: 1,
            pthr_delay_us: PROGRESS_DELAY_US,
            lthr_delay_us: 0,
            capture_telemetry: false,
        };
        let mut handle = null_mut();
        // SAFETY: a C string, a configuration that is read during the call, and a place for the answer.
        let created = unsafe { (functions.create_configured_agent)(name.as_ptr(), &config, &mut handle) };
        checked("create_configured_agent", created)?;
        let agent = Self { functions, handle };
        agent.add_backend()?;
        Ok(agent)
    }

    fn add_backend(&self) -> Result<(), String> {
        let functions = &self.functions;
        let (mut kinds, mut params, mut backend) = (null_mut(), null_mut(), null_mut());
        // SAFETY: a live agent, a C string, places for the answers.
        let found = unsafe { (functions.get_plugin_params)(self.handle, UCX.as_ptr(), &mut kinds, &mut params) };
        checked("get_plugin_params(UCX)", found)?;
        // SAFETY: as above; both lists are ours and are given back once. The backend's own handle is kept with the agent.
        let created = unsafe {
            let created = (functions.create_backend)(self.handle, UCX.as_ptr(), params, &mut backend);
            (functions.destroy_params)(params);
            (functions.destroy_mem_list)(kinds);
            created
        };
        checked("create_backend(UCX)", created)
    }

    /// Lets `place` be read by whoever has [`metadata`](Self::metadata) of later, and be read into.
    ///
    /// # Safety
    /// It stays as long as the agent.
    pub(super) unsafe fn register(&self, place: MemoryPlace) -> Result<(), String> {
        let (functions, (kind, device)) = (&self.functions, kind(place.gpu));
        let (address, num_bytes) = (place.address as usize, place.num_bytes as usize);
        let mut list = null_mut();
        // SAFETY: a place for the answer.
        checked("create_reg_dlist", unsafe { (functions.create_reg_dlist)(kind, &mut list) })?;
        // SAFETY: a live agent and list; the memory stays, as the caller promises; the list is given back once.
        let registered = unsafe {
            let added = (functions.reg_dlist_add_desc)(list, address, num_bytes, device, null(), 0);
            let registered =
                if added == SUCCESS { (functions.register_mem)(self.handle, list, null_mut()) } else { added };
            (functions.destroy_reg_dlist)(list);
            registered
        };
        checked("register_mem", registered)
    }

    /// What others need to read what is registered.
    pub(super) fn metadata(&self) -> Result<Vec<u8>, String> {
        let (mut data, mut len) = (null_mut(), 0);
        // SAFETY: a live agent, places for the answers.
        checked("get_local_md", unsafe { (self.functions.get_local_md)(self.handle, &mut data, &mut len) })?;
        if data.is_null() {
            return Err("get_local_md gave no metadata".to_string());
        }
        // SAFETY: the library has allocated `len` bytes with malloc, for its caller to give back.
        let metadata = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), len) }.to_vec();
        // SAFETY: as above, once.
        unsafe { libc::free(data) };
        Ok(metadata)
    }

    /// Takes in another agent's metadata; with it, that agent's name.
    pub(super) fn add_peer(&self, metadata: &[u8]) -> Result<CString, String> {
        let mut name = null_mut();
        // SAFETY: a live agent, bytes that are borrowed, a place for the answer.
        let loaded = unsafe {
            (self.functions.load_remote_md)(self.handle, metadata.as_ptr().cast(), metadata.len(), &mut name)
        };
        checked("load_remote_md", loaded)?;
        if name.is_null() {
            return Err("load_remote_md named no agent".to_string());
        }
        // SAFETY: the library has made a C string with malloc, for its caller to give back.
        let owned = unsafe { CStr::from_ptr(name) }.to_owned();
        // SAFETY: as above, once.
        unsafe { libc::free(name.cast()) };
        Ok(owned)
    }

    /// Forgets another agent. Nothing is being read from it.
    pub(super) fn forget_peer(&self, name: &CStr) {
        // SAFETY: a live agent and a C string. That the agent is unknown already is no fault.
        unsafe { (self.functions.invalidate_remote_md)(self.handle, name.as_ptr()) };
    }

    /// Makes ready to read `pieces` of `peer`'s memory, which are in memory of one kind, one behind the other to `into`.
    /// Nothing is read yet.
    pub(super) fn prepare(&self, peer: &CStr, pieces: &[MemoryPlace], into: MemoryPlace) -> Result<Request, String> {
        let functions = &self.functions;
        let (there, device_there) = kind(pieces.first().and_then(|piece| piece.gpu));
        let (here, device_here) = kind(into.gpu);
        let (mut from, mut to, mut request) = (null_mut(), null_mut(), null_mut());
        // SAFETY: places for the answers.
        checked("create_xfer_dlist", unsafe { (functions.create_xfer_dlist)(there, &mut from) })?;
        // SAFETY: as above.
        if let Err(reason) = checked("create_xfer_dlist", unsafe { (functions.create_xfer_dlist)(here, &mut to) }) {
            // SAFETY: ours, given back once.
            unsafe { (functions.destroy_xfer_dlist)(from) };
            return Err(reason);
        }
        let mut offset = into.address as usize;
        let mut status = SUCCESS;
        for piece in pieces {
            let (address, num_bytes) = (piece.address as usize, piece.num_bytes as usize);
            // SAFETY: live lists; integers.
            status = status.min(unsafe { (functions.xfer_dlist_add_desc)(from, address, num_bytes, device_there) });
            // SAFETY: as above.
            status = status.min(unsafe { (functions.xfer_dlist_add_desc)(to, offset, num_bytes, device_here) });
            offset += num_bytes;
        }
        let added = checked("xfer_dlist_add_desc", status);
        // SAFETY: live handles and a C string. The request keeps nothing of the lists, which are given back once.
        let created = unsafe {
            let created = match added {
                Ok(()) => {
                    (functions.create_xfer_req)(self.handle, READ, to, from, peer.as_ptr(), &mut request, null_mut())
                }
                Err(_) => SUCCESS,
            };
            (functions.destroy_xfer_dlist)(from);
            (functions.destroy_xfer_dlist)(to);
            created
        };
        added?;
        checked("create_xfer_req", created)?;
        Ok(Request(request))
    }

    /// Begins what was [prepared](Self::prepare), once. An error does not mean that nothing has begun.
    ///
    /// # Safety
    /// What is read into is registered, and nobody else uses it before the request has [ended](Self::has_ended) or the
    /// agent is gone.
    pub(super) unsafe fn post(&self, request: &Request) -> Result<(), String> {
        // SAFETY: a live agent and request; the memory that is written to is the caller's promise.
        match unsafe { (self.functions.post_xfer_req)(self.handle, request.0, null_mut()) } {
            SUCCESS | IN_PROGRESS => Ok(()),
            posted => Err(format!("NIXL's post_xfer_req says status {posted}")),
        }
    }

    /// Whether a read has ended well; an error if it has ended otherwise.
    pub(super) fn has_ended(&self, request: &Request) -> Result<bool, String> {
        // SAFETY: a live agent and a request that was not released.
        match unsafe { (self.functions.get_xfer_status)(self.handle, request.0) } {
            IN_PROGRESS => Ok(false),
            status => checked("get_xfer_status", status).map(|()| true),
        }
    }

    /// What has become of a request; one that has ended well is given back.
    pub(super) fn end(&self, request: Request) -> Ended {
        match self.has_ended(&request) {
            Ok(true) => {
                self.release(request);
                Ended::Well
            }
            Ok(false) => Ended::NotYet(request),
            Err(_) => Ended::Badly,
        }
    }

    /// Gives back a request that has ended well.
    pub(super) fn release(&self, request: Request) {
        // SAFETY: a live agent and a request that was not released; it is destroyed only if it could be.
        unsafe {
            if (self.functions.release_xfer_req)(self.handle, request.0) == SUCCESS {
                (self.functions.destroy_xfer_req)(request.0);
            }
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // SAFETY: nobody else has the agent any more.
        unsafe { (self.functions.destroy_agent)(self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::fake::Fake;
    use super::*;

    /// As where one peer's read takes its time to begin while others' have ended.
    #[test]
    fn a_call_that_lasts_does_not_hold_up_others() {
        let fake = Fake::alone();
        let agent = Agent::new(fake.library(), c"agent").unwrap();
        let (from, into) = ([7_u8; 64], [0_u8; 64]);
        let place = |bytes: &[u8]| MemoryPlace {
            address: bytes.as_ptr().expose_provenance() as u64,
            num_bytes: bytes.len() as u64,
            gpu: None,
        };
        let request = || agent.prepare(c"peer", &[place(&from)], place(&into)).unwrap();
        let (slow, other) = (request(), request());
        fake.post_slowly();
        let agent = &agent;
        std::thread::scope(|scope| {
            let posting = scope.spawn(move || {
                // SAFETY: what is read is not looked at, and read once the other thread has ended.
                let posted = unsafe { agent.post(&slow) };
                agent.release(slow);
                posted
            });
            fake.wait_for_post();
            // Nothing was begun, so that nothing is written.
            agent.release(other);
            assert_eq!(agent.metadata().unwrap(), b"agent");
            let asked = agent.prepare(c"peer", &[], place(&into)).unwrap();
            assert_eq!((agent.has_ended(&asked), posting.join().unwrap()), (Ok(true), Ok(())));
            agent.release(asked);
        });
    }
}
