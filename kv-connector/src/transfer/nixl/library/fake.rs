//! A library for tests that have none: agents of one process, whose reads are copies made when they are asked for their
//! end.
//!
//! What it does is every test's, so one has it at a time.

use std::collections::HashSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::*;

static ALONE: Mutex<()> = Mutex::new(());
static STATE: Mutex<State> = Mutex::new(State::new());
static CHANGED: Condvar = Condvar::new();

/// The only test that uses the library now.
pub(crate) struct Fake(#[expect(dead_code)] MutexGuard<'static, ()>);

struct State {
    num_posted: usize,
    is_registering: bool,
    /// Posting does not return before another call has come in.
    is_posting_slowly: bool,
    num_in_post: usize,
    num_asked: usize,
    /// Requests that a call is using.
    in_use: Option<HashSet<usize>>,
}

impl State {
    const fn new() -> Self {
        Self {
            num_posted: 0,
            is_registering: true,
            is_posting_slowly: false,
            num_in_post: 0,
            num_asked: 0,
            in_use: None,
        }
    }
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for what another thread's call does; false if it does not come.
fn waited_for(is_true: impl Fn(&State) -> bool) -> bool {
    let waited = CHANGED.wait_timeout_while(state(), Duration::from_secs(10), |state| !is_true(state));
    !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
}

impl Fake {
    pub(crate) fn alone() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        *state() = State::new();
        Self(alone)
    }

    pub(crate) fn library(&self) -> Library {
        Library(FUNCTIONS)
    }

    /// Reads that were begun.
    pub(crate) fn num_posted(&self) -> usize {
        state().num_posted
    }

    /// Whether memory can be registered from now on.
    pub(crate) fn register(&self, is_registering: bool) {
        state().is_registering = is_registering;
    }

    /// From now on posting a read lasts until some read is asked for its end.
    pub(crate) fn post_slowly(&self) {
        state().is_posting_slowly = true;
    }

    /// Waits until a read is being posted.
    pub(crate) fn wait_for_post(&self) {
        assert!(waited_for(|state| state.num_in_post > 0), "no read is posted");
    }
}

/// A request that one call has, which no other may have meanwhile.
struct Using(usize);

impl Using {
    fn of(request: Handle) -> Self {
        let request = request as usize;
        assert!(state().in_use.get_or_insert_default().insert(request), "two calls use one request");
        Self(request)
    }
}

impl Drop for Using {
    fn drop(&mut self) {
        state().in_use.get_or_insert_default().remove(&self.0);
    }
}

/// Address and bytes.
type Pieces = Vec<(usize, usize)>;

struct Read {
    into: Pieces,
    from: Pieces,
}

/// Of lists and backends that nobody looks into.
fn some_handle() -> Handle {
    std::ptr::dangling_mut::<u8>().cast()
}

const FUNCTIONS: Functions = Functions {
    create_configured_agent,
    destroy_agent,
    get_plugin_params,
    destroy_mem_list: nothing,
    destroy_params: nothing,
    create_backend,
    create_reg_dlist,
    reg_dlist_add_desc,
    destroy_reg_dlist: nothing,
    register_mem,
    get_local_md,
    load_remote_md,
    invalidate_remote_md,
    create_xfer_dlist,
    xfer_dlist_add_desc,
    destroy_xfer_dlist,
    create_xfer_req,
    post_xfer_req,
    get_xfer_status,
    release_xfer_req,
    destroy_xfer_req: nothing,
};

unsafe extern "C" fn nothing(_: Handle) -> Status {
    SUCCESS
}

unsafe extern "C" fn create_configured_agent(
    name: *const c_char,
    config: *const AgentConfig,
    agent: *mut Handle,
) -> Status {
    // SAFETY: the caller's name, configuration and place for the answer.
    unsafe {
        assert_eq!((*config).thread_sync, SYNC_RW, "an agent that several threads call is to lock by itself");
        *agent = CStr::from_ptr(name).to_owned().into_raw().cast();
    }
    SUCCESS
}

unsafe extern "C" fn destroy_agent(agent: Handle) -> Status {
    // SAFETY: made by `create_configured_agent`.
    drop(unsafe { CString::from_raw(agent.cast()) });
    SUCCESS
}

unsafe extern "C" fn get_plugin_params(_: Handle, _: *const c_char, kinds: *mut Handle, params: *mut Handle) -> Status {
    // SAFETY: the caller's places for the answers.
    unsafe { (*kinds, *params) = (some_handle(), some_handle()) };
    SUCCESS
}

unsafe extern "C" fn create_backend(_: Handle, _: *const c_char, _: Handle, backend: *mut Handle) -> Status {
    // SAFETY: the caller's place for the answer.
    unsafe { *backend = some_handle() };
    SUCCESS
}

unsafe extern "C" fn create_reg_dlist(_: c_int, list: *mut Handle) -> Status {
    // SAFETY: the caller's place for the answer.
    unsafe { *list = some_handle() };
    SUCCESS
}

unsafe extern "C" fn reg_dlist_add_desc(_: Handle, _: usize, _: usize, _: u64, _: *const c_void, _: usize) -> Status {
    SUCCESS
}

unsafe extern "C" fn register_mem(_: Handle, _: Handle, _: Handle) -> Status {
    if state().is_registering { SUCCESS } else { -2 }
}

unsafe extern "C" fn get_local_md(agent: Handle, data: *mut *mut c_void, len: *mut usize) -> Status {
    // SAFETY: an agent of `create_configured_agent`, and places for the answers; a copy for the caller to give back.
    unsafe { (*data, *len) = (libc::strdup(agent.cast()).cast(), CStr::from_ptr(agent.cast()).count_bytes()) };
    SUCCESS
}

unsafe extern "C" fn load_remote_md(_: Handle, data: *const c_void, len: usize, name: *mut *mut c_char) -> Status {
    // SAFETY: bytes of the caller, a place for the answer; a copy for the caller to give back.
    unsafe { *name = libc::strndup(data.cast(), len) };
    SUCCESS
}

unsafe extern "C" fn invalidate_remote_md(_: Handle, _: *const c_char) -> Status {
    SUCCESS
}

unsafe extern "C" fn create_xfer_dlist(_: c_int, list: *mut Handle) -> Status {
    // SAFETY: the caller's place for the answer.
    unsafe { *list = Box::into_raw(Box::new(Pieces::new())).cast() };
    SUCCESS
}

unsafe extern "C" fn xfer_dlist_add_desc(list: Handle, address: usize, num_bytes: usize, _: u64) -> Status {
    // SAFETY: made by `create_xfer_dlist`, used by the caller alone.
    unsafe { (*list.cast::<Pieces>()).push((address, num_bytes)) };
    SUCCESS
}

unsafe extern "C" fn destroy_xfer_dlist(list: Handle) -> Status {
    // SAFETY: made by `create_xfer_dlist`, given back once.
    drop(unsafe { Box::from_raw(list.cast::<Pieces>()) });
    SUCCESS
}

unsafe extern "C" fn create_xfer_req(
    _: Handle,
    operation: c_int,
    into: Handle,
    from: Handle,
    _: *const c_char,
    request: *mut Handle,
    _: Handle,
) -> Status {
    assert_eq!(operation, READ);
    // SAFETY: lists of `create_xfer_dlist`, and a place for the answer.
    unsafe {
        let (into, from) = ((*into.cast::<Pieces>()).clone(), (*from.cast::<Pieces>()).clone());
        *request = Box::into_raw(Box::new(Read { into, from })).cast();
    }
    SUCCESS
}

unsafe extern "C" fn post_xfer_req(_: Handle, request: Handle, _: Handle) -> Status {
    let _using = Using::of(request);
    let num_asked = {
        let mut state = state();
        state.num_posted += 1;
        state.num_in_post += 1;
        CHANGED.notify_all();
        state.num_asked
    };
    let is_slow = state().is_posting_slowly;
    let has_come = !is_slow || waited_for(|state| state.num_asked > num_asked);
    state().num_in_post -= 1;
    if has_come { IN_PROGRESS } else { -2 }
}

unsafe extern "C" fn get_xfer_status(_: Handle, request: Handle) -> Status {
    let _using = Using::of(request);
    {
        state().num_asked += 1;
        CHANGED.notify_all();
    }
    // SAFETY: made by `create_xfer_req` and not released; what it reads and writes is memory of this process that its
    // caller has registered.
    unsafe {
        let read = &*request.cast::<Read>();
        for ((into, num_bytes), (from, _)) in read.into.iter().zip(&read.from) {
            std::ptr::copy(
                std::ptr::with_exposed_provenance::<u8>(*from),
                std::ptr::with_exposed_provenance_mut::<u8>(*into),
                *num_bytes,
            );
        }
    }
    SUCCESS
}

unsafe extern "C" fn release_xfer_req(_: Handle, request: Handle) -> Status {
    let _using = Using::of(request);
    // SAFETY: made by `create_xfer_req`, given back once.
    drop(unsafe { Box::from_raw(request.cast::<Read>()) });
    SUCCESS
}
