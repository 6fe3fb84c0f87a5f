//! The threads that share the arithmetic of one process.
//!
//! A job is a closure over tile numbers. The submitting thread and the workers claim tiles from the job's
//! counter until none is left, so a thread that loses its core delays one tile, not a share of the job.
//!
//! ```text
//! submit -> listed, workers woken -> tiles claimed one by one -> last tile done -> submitter returns
//! ```
//!
//! Several threads may submit at once (a prefill and a decode runner in one process). Between two tiles of
//! a prefill job every thread, its submitter too, looks for decode jobs with unclaimed tiles and works on
//! those first. Nobody holds a lock while computing. Idle workers and waiting submitters spin for some
//! microseconds, since steps are chains of short jobs, then sleep, since cores may be shared.
#![allow(unsafe_code)]

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, Thread};

/// Which job goes first when several wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Long steps that give way at tile boundaries.
    Prefill,
    /// Steps that someone's next token waits for.
    Decode,
}

/// Rounds of `spin_loop` before sleeping: 10 to 40 microseconds.
const SPINS: usize = if cfg!(miri) { 10 } else { 1000 };

/// A fixed set of threads. Dropping it stops them.
pub struct WorkerPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    /// Counts submissions (and the stop), so that a worker can wait for the next without the lock.
    epoch: AtomicUsize,
    /// Decode jobs that still have unclaimed tiles.
    open_decode_jobs: AtomicUsize,
    /// Jobs of more than one tile, ever.
    num_barriers: AtomicUsize,
}

struct State {
    jobs: Vec<Arc<Job>>,
    /// Jobs that are over, whose memory is used again: a step lists hundreds and allocates none. Some may still be
    /// held by a worker that has yet to see that nothing is left of them.
    spare: Vec<Arc<Job>>,
    num_sleeping: usize,
    stop: bool,
}

/// Jobs beside one for each thread that are kept for another use: a thread holds at most one that is over, and
/// this many submitters have one that is not.
const SPARE_JOBS: usize = 8;

struct Job {
    /// The submitter's closure with its lifetime erased; see `Job::call`.
    tile: *const (dyn Fn(usize) + Sync),
    priority: Priority,
    num_tiles: usize,
    next: AtomicUsize,
    num_done: AtomicUsize,
    failed: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    submitter: Thread,
}

// SAFETY: everything but `tile` is Send and Sync by itself; `tile` points to a `Sync` closure and is only
// called while its owner waits in `WorkerPool::run`, see `Job::call`.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

impl WorkerPool {
    /// A pool of `threads` threads (at least one), the submitting one included: `threads - 1` are started.
    ///
    /// Panics when the system cannot start them.
    pub fn new(threads: usize) -> Self {
        let num_spare = threads.max(1) + SPARE_JOBS;
        let state = State {
            jobs: Vec::with_capacity(num_spare),
            spare: (0..num_spare).map(|_| Arc::new(Job::over())).collect(),
            num_sleeping: 0,
            stop: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            wake: Condvar::new(),
            epoch: AtomicUsize::new(0),
            open_decode_jobs: AtomicUsize::new(0),
            num_barriers: AtomicUsize::new(0),
        });
        let workers = (1..threads.max(1))
            .map(|i| {
                let shared = shared.clone();
                thread::Builder::new()
                    .name(format!("kernels-{i}"))
                    .spawn(move || shared.work())
                    .expect("the system starts a few threads at start-up")
            })
            .collect();
        WorkerPool { shared, workers }
    }

    /// The pool of this process: a thread per core unless [`WorkerPool::init_global`] came first.
    pub fn global() -> &'static WorkerPool {
        WorkerPool::init_global(thread::available_parallelism().map_or(1, |n| n.get()))
    }

    /// The pool of this process, made with `threads` threads if this is its first use.
    pub fn init_global(threads: usize) -> &'static WorkerPool {
        static POOL: OnceLock<WorkerPool> = OnceLock::new();
        POOL.get_or_init(|| WorkerPool::new(threads))
    }

    /// Threads, the submitting one included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// How often somebody has waited for all tiles of a job so far, single tiles apart: what steps are held to.
    pub fn num_barriers(&self) -> usize {
        self.shared.num_barriers.load(Ordering::Relaxed)
    }

    /// Calls `tile(i)` once for each `i` in `0..num_tiles`, on the calling thread and the workers, and
    /// returns when all are done. While it waits for its turn a prefill job's caller may compute tiles of
    /// decode jobs.
    ///
    /// A panic in a tile skips the tiles not yet begun and is raised again here.
    pub fn run(&self, priority: Priority, num_tiles: usize, tile: &(dyn Fn(usize) + Sync)) {
        if num_tiles <= 1 {
            // A single tile cannot be shared, so nobody else needs to know of it.
            return (0..num_tiles).for_each(tile);
        }
        self.shared.num_barriers.fetch_add(1, Ordering::Relaxed);
        // SAFETY: only the lifetime changes. `Job::call` uses the pointer only between a successful claim
        // and its `num_done` increment, and this function does not return before `num_done` has reached
        // `num_tiles`, so never after the borrow ends.
        let tile = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(tile)
        };
        let job = self.shared.list(Job::new(tile, priority, num_tiles));
        while !job.is_claimed() {
            if priority == Priority::Prefill
                && let Some(urgent) = self.shared.pick(Priority::Decode)
            {
                self.shared.help(&urgent);
            }
            self.shared.help(&job);
        }
        job.wait();
        let panic = lock(&job.panic).take();
        lock(&self.shared.state).retire(job);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        lock(&self.shared.state).stop = true;
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of tiles; it has none of its own to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The life of a worker.
    fn work(&self) {
        loop {
            let seen = self.epoch.load(Ordering::SeqCst);
            if let Some(job) = self.pick(Priority::Prefill) {
                self.help(&job);
                continue;
            }
            if spin_until(|| self.epoch.load(Ordering::Relaxed) != seen) {
                if lock(&self.state).stop {
                    return;
                }
                continue;
            }
            let mut state = lock(&self.state);
            while !state.stop && self.epoch.load(Ordering::SeqCst) == seen {
                state.num_sleeping += 1;
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.num_sleeping -= 1;
            }
            if state.stop {
                return;
            }
        }
    }

    fn list(&self, job: Job) -> Arc<Job> {
        if job.priority == Priority::Decode {
            self.open_decode_jobs.fetch_add(1, Ordering::SeqCst);
        }
        let mut state = lock(&self.state);
        let job = state.place(job);
        state.jobs.push(job.clone());
        self.epoch.fetch_add(1, Ordering::SeqCst);
        let num_sleeping = state.num_sleeping;
        drop(state);
        for _ in 0..num_sleeping.min(job.num_tiles - 1) {
            self.wake.notify_one();
        }
        job
    }

    /// The most urgent, then oldest, job of at least this priority with unclaimed tiles.
    fn pick(&self, least: Priority) -> Option<Arc<Job>> {
        if least == Priority::Decode && self.open_decode_jobs.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let state = lock(&self.state);
        let open = |job: &&Arc<Job>, priority| job.priority == priority && !job.is_claimed();
        let decode = state.jobs.iter().find(|job| open(job, Priority::Decode));
        let any = || state.jobs.iter().find(|job| open(job, Priority::Prefill));
        if least == Priority::Decode { decode.cloned() } else { decode.or_else(any).cloned() }
    }

    /// Computes tiles of `job` until none is unclaimed or something more urgent is there.
    fn help(&self, job: &Job) {
        loop {
            let tile = job.next.fetch_add(1, Ordering::Relaxed);
            if tile >= job.num_tiles {
                return;
            }
            if tile + 1 == job.num_tiles && job.priority == Priority::Decode {
                self.open_decode_jobs.fetch_sub(1, Ordering::SeqCst);
            }
            job.call(tile);
            if job.priority == Priority::Prefill && self.open_decode_jobs.load(Ordering::SeqCst) > 0 {
                return;
            }
        }
    }
}

impl State {
    /// The job in memory that nobody else holds.
    fn place(&mut self, job: Job) -> Arc<Job> {
        let is_free = |spare: &mut Arc<Job>| Arc::get_mut(spare).is_some();
        let Some(index) = self.spare.iter_mut().position(is_free) else { return Arc::new(job) };
        let mut spare = self.spare.swap_remove(index);
        *Arc::get_mut(&mut spare).expect("nobody can have taken a clone of what only this list holds") = job;
        spare
    }

    /// Takes a job that is over off the list.
    fn retire(&mut self, job: Arc<Job>) {
        self.jobs.retain(|other| !Arc::ptr_eq(other, &job));
        if self.spare.len() < self.spare.capacity() {
            self.spare.push(job);
        }
    }
}

impl Job {
    fn new(tile: *const (dyn Fn(usize) + Sync), priority: Priority, num_tiles: usize) -> Self {
        Job {
            tile,
            priority,
            num_tiles,
            next: AtomicUsize::new(0),
            num_done: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            panic: Mutex::new(None),
            submitter: thread::current(),
        }
    }

    /// One without tiles.
    fn over() -> Self {
        const NOTHING: &(dyn Fn(usize) + Sync) = &|_| {};
        Job::new(NOTHING, Priority::Prefill, 0)
    }

    fn is_claimed(&self) -> bool {
        self.next.load(Ordering::Relaxed) >= self.num_tiles
    }

    /// Computes one tile that the caller has claimed.
    fn call(&self, tile: usize) {
        if !self.failed.load(Ordering::Relaxed) {
            // SAFETY: this tile is claimed and not yet counted as done, so the submitter is still inside
            // `run`, which borrows the closure.
            let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { (*self.tile)(tile) }));
            if let Err(panic) = outcome {
                self.failed.store(true, Ordering::Relaxed);
                lock(&self.panic).get_or_insert(panic);
            }
        }
        // Release: what the tile wrote is seen by the submitter once it has read the full count.
        if self.num_done.fetch_add(1, Ordering::AcqRel) + 1 == self.num_tiles {
            self.submitter.unpark();
        }
    }

    /// Waits, on the submitting thread, for tiles that others have claimed.
    fn wait(&self) {
        let done = || self.num_done.load(Ordering::Acquire) == self.num_tiles;
        if !spin_until(done) {
            while !done() {
                thread::park();
            }
        }
    }
}

/// Waits some microseconds at most; whether it is so by then.
pub(crate) fn spin_until(condition: impl Fn() -> bool) -> bool {
    for _ in 0..SPINS {
        if condition() {
            return true;
        }
        std::hint::spin_loop();
    }
    condition()
}

/// No code of a tile runs under our locks, so a poisoned one still guards sound data.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const ROUNDS: usize = if cfg!(miri) { 5 } else { 500 };

    #[test]
    fn every_tile_runs_exactly_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let pool = WorkerPool::new(threads);
            assert_eq!(pool.threads(), threads);
            for num_tiles in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..num_tiles).map(|_| AtomicUsize::new(0)).collect();
                pool.run(Priority::Decode, num_tiles, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn several_submitters_share_the_workers() {
        let pool = WorkerPool::new(3);
        thread::scope(|scope| {
            for submitter in 0..4 {
                let pool = &pool;
                scope.spawn(move || {
                    let priority = if submitter % 2 == 0 { Priority::Decode } else { Priority::Prefill };
                    for round in 0..ROUNDS {
                        let sum = AtomicUsize::new(0);
                        pool.run(priority, 1 + round % 9, &|i| {
                            sum.fetch_add(i + 1, Ordering::Relaxed);
                        });
                        let n = 1 + round % 9;
                        assert_eq!(sum.load(Ordering::Relaxed), n * (n + 1) / 2);
                    }
                });
            }
        });
        assert!(lock(&pool.shared.state).jobs.is_empty());
        assert_eq!(pool.shared.open_decode_jobs.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn panic_of_a_tile_reaches_the_submitter_and_the_pool_lives_on() {
        for threads in [1, 3] {
            let pool = WorkerPool::new(threads);
            for priority in [Priority::Prefill, Priority::Decode] {
                let caught = catch_unwind(AssertUnwindSafe(|| {
                    pool.run(priority, 20, &|i| assert!(i != 7, "tile seven"));
                }));
                assert_eq!(caught.unwrap_err().downcast_ref::<&str>(), Some(&"tile seven"));
                let count = AtomicUsize::new(0);
                pool.run(priority, 20, &|_| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(count.load(Ordering::Relaxed), 20);
            }
            assert_eq!(pool.shared.open_decode_jobs.load(Ordering::SeqCst), 0);
        }
    }

    #[test]
    fn prefill_gives_way_to_decode_between_two_tiles() {
        // A pool without workers: the prefill submitter itself has to take the second decode tile, since
        // the decode submitter waits inside the first.
        let pool = WorkerPool::new(1);
        let order = Mutex::new(Vec::new());
        let (begun, begin) = mpsc::channel::<()>();
        let (helped, wait_for_help) = mpsc::channel::<()>();
        let wait_for_help = Mutex::new(wait_for_help);
        thread::scope(|scope| {
            let (pool, order) = (&pool, &order);
            scope.spawn(move || {
                begin.recv().unwrap();
                pool.run(Priority::Decode, 2, &|i| {
                    if i == 0 {
                        lock(&wait_for_help).recv().unwrap();
                    } else {
                        lock(order).push(("decode", i));
                        helped.send(()).unwrap();
                    }
                });
            });
            pool.run(Priority::Prefill, 3, &|i| {
                lock(order).push(("prefill", i));
                if i == 0 {
                    begun.send(()).unwrap();
                    // Until the decode job is listed and its submitter is inside its first tile.
                    while !lock(&pool.shared.state)
                        .jobs
                        .iter()
                        .any(|job| job.priority == Priority::Decode && job.next.load(Ordering::SeqCst) == 1)
                    {
                        thread::yield_now();
                    }
                }
            });
        });
        assert_eq!(*lock(&order), [("prefill", 0), ("decode", 1), ("prefill", 1), ("prefill", 2)]);
    }

    #[test]
    fn dropping_a_pool_ends_its_sleeping_threads() {
        for _ in 0..20 {
            let pool = WorkerPool::new(4);
            pool.run(Priority::Decode, 4, &|_| {});
            drop(pool);
        }
    }

    #[test]
    fn a_tile_may_submit_a_job_itself() {
        let pool = WorkerPool::new(2);
        let count = AtomicUsize::new(0);
        pool.run(Priority::Prefill, 4, &|_| {
            pool.run(Priority::Decode, 3, &|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(count.load(Ordering::Relaxed), 12);
    }
}
