//! How the threads that move KV share a core with others: last, and in short turns.
//!
//! They have a lower weight than ordinary threads, never take a core from one that runs (`SCHED_BATCH`), and offer it
//! to whoever waits behind every [`TURN`] of work. A core that nobody else wants is theirs alone; beside a thread that
//! never sleeps, as an engine's, they have a quarter of it or so, and are off it for some milliseconds at a time: KV
//! always gets on.
//!
//! A turn is offered by the work itself, at places where it holds nothing that threads of other kinds wait for (between
//! two datagrams it holds its connection, which only KV waits for): the kernel looks at who
//! should run only when somebody wakes or a clock ticks, which is every 4 ms in many kernels.
//!
//! No privilege is needed: any thread may step back, though not forward again.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

use libc::sched_attr;

use crate::turn_end;

/// Work of a thread until it offers its core: with the piece that is being worked on then, some 50 microseconds, the
/// longest that a message or a step of an engine waits for KV.
const TURN: Duration = Duration::from_micros(250);
/// Added to the process's own: a third of the weight.
const NICE: i32 = 5;
const NICE_MAX: i32 = 19;

/// A thread's turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Turn {
    /// CPU time of the thread then.
    began_at: Duration,
    /// Before this it cannot be over, however much of the core the thread has had. To ask a clock costs a twentieth of
    /// asking the kernel for CPU time, and this is asked for every datagram.
    lasts_until: Instant,
}

impl Turn {
    fn begin() -> Self {
        Self { began_at: cpu_time(), lasts_until: Instant::now() + TURN }
    }
}

thread_local! {
    /// Of this thread, if it takes turns.
    static OWN_TURN: Cell<Option<Turn>> = const { Cell::new(None) };
}

/// The calling thread moves KV from now on.
pub(crate) fn step_behind() {
    if let Err(error) = put_behind() {
        tracing::debug!(%error, "the threads of KV are not put behind others");
    }
    OWN_TURN.set(Some(Turn::begin()));
}

/// If this thread's turn is over, does what [waits for that](turn_end) and offers the core to others; nothing on a
/// thread that takes none.
pub(crate) fn give_way() {
    let Some(turn) = OWN_TURN.get() else { return };
    let now = Instant::now();
    if now < turn.lasts_until {
        return;
    }
    let left = TURN.saturating_sub(cpu_time().saturating_sub(turn.began_at));
    if left.is_zero() {
        turn_end::on_turn_end();
        std::thread::yield_now();
        OWN_TURN.set(Some(Turn::begin()));
    } else {
        // The core was somebody else's for a while.
        OWN_TURN.set(Some(Turn { lasts_until: now + left, ..turn }));
    }
}

/// CPU time of the calling thread.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes into `time`, which is valid for the call. The clock exists on every Linux, so it does not fail; if
    // it did, `time` stays zero.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// How the kernel schedules the calling thread.
fn scheduling() -> io::Result<sched_attr> {
    // SAFETY: integers, for which zero is valid.
    let mut own: sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes at most the size it is given, which is that of `own`.
    let failed = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut own, size_of::<sched_attr>(), 0) };
    if failed == 0 { Ok(own) } else { Err(io::Error::last_os_error()) }
}

fn set_scheduling(wanted: &sched_attr) -> io::Result<()> {
    debug_assert!(wanted.size as usize <= size_of::<sched_attr>());
    // SAFETY: the kernel reads `wanted.size` bytes, which `wanted` has: the kernel itself has set it.
    let failed = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(wanted), 0) };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn put_behind() -> io::Result<()> {
    let mut wanted = scheduling()?;
    // Whoever starts the process under another policy has decided.
    if wanted.sched_policy != libc::SCHED_OTHER as u32 {
        return Ok(());
    }
    wanted.sched_policy = libc::SCHED_BATCH as u32;
    wanted.sched_nice = (wanted.sched_nice + NICE).min(NICE_MAX);
    // Asked for at a stretch. With more of it the kernel lets a thread wait for longer behind a turn that it gives up
    // early. Kernels before 6.12 have one length for all.
    wanted.sched_runtime = TURN.as_nanos() as u64;
    set_scheduling(&wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_thread_that_moves_kv_steps_back() {
        let place = || scheduling().map(|own| (own.sched_policy, own.sched_nice)).unwrap();
        let before = place();
        let moving = std::thread::spawn(move || {
            put_behind().unwrap();
            place()
        });
        let expected = match before {
            (policy, nice) if policy == libc::SCHED_OTHER as u32 => {
                (libc::SCHED_BATCH as u32, (nice + NICE).min(NICE_MAX))
            }
            decided => decided,
        };
        assert_eq!((moving.join().unwrap(), place()), (expected, before));
    }

    #[test]
    fn turn_ends_behind_its_share_of_work_and_not_before() {
        let moving = std::thread::spawn(|| {
            step_behind();
            let first = OWN_TURN.get().unwrap().began_at;
            give_way();
            let still_first = OWN_TURN.get().unwrap().began_at == first || cpu_time() - first >= TURN;
            // What others have of the core meanwhile does not count.
            while Instant::now() < OWN_TURN.get().unwrap().lasts_until {
                std::thread::yield_now();
            }
            give_way();
            let still_first = still_first && (OWN_TURN.get().unwrap().began_at == first || cpu_time() - first >= TURN);
            while cpu_time() - first < TURN {}
            while Instant::now() < OWN_TURN.get().unwrap().lasts_until {}
            give_way();
            (still_first, OWN_TURN.get().unwrap().began_at - first >= TURN)
        });
        assert_eq!(moving.join().unwrap(), (true, true));
        give_way();
        assert_eq!(OWN_TURN.get(), None, "a thread that moves no KV takes no turns");
    }
}
