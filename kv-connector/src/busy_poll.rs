//! Looking at a socket a moment longer before going to sleep.
//!
//! A thread that sleeps in the kernel is woken across cores in some 15 to 35 microseconds, as long as the whole of a
//! small extent's way. So for a short time after a fabric has sent or received anything, its endpoints ask their
//! sockets again and again instead of waiting for the kernel to call. They do it as tasks that yield in between:
//! whatever else the runtime has to do is done meanwhile, and how many threads it has makes no difference. A request
//! leaves by one socket and KV comes through another, which threads of their own wait for, so traffic of one has all
//! of them looked at; and who finds nothing offers its core to the other threads.
//!
//! It costs the CPU time of a thread, at most [`BusyPolling::time_max`] behind each datagram, and is worth it only on
//! a core that has nothing else to do: [`BusyPolling::may_poll`] is asked every time.

use std::fmt;
use std::future::{Future as _, poll_fn};
use std::io::{self, IoSliceMut};
use std::net::UdpSocket;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use quinn::udp::{RecvMeta, UdpSocketState};

use crate::turn_end;

/// Datagrams received at a time: more of them would make every look that finds nothing dearer.
const NUM_RECEIVED_MAX: usize = 4;

/// Whether, and for how long, a fabric looks for datagrams before its threads sleep.
#[derive(Clone)]
pub struct BusyPolling {
    /// How long behind the last datagram sent or received.
    pub time_max: Duration,
    /// Whether there is a core that nobody else needs now. Asked often, so it must be quick.
    pub may_poll: Arc<dyn Fn() -> bool + Send + Sync>,
}

/// What the sockets of one fabric share: a request that leaves through one is answered through another.
pub(crate) struct Activity {
    polling: BusyPolling,
    began_at: Instant,
    /// When anything was last sent or received, behind `began_at`.
    last_nanos: AtomicU64,
    /// Who no longer looks, and will when there is traffic again; one for each socket at most.
    asleep: Mutex<Vec<Waker>>,
    is_anybody_asleep: AtomicBool,
}

impl Activity {
    pub(crate) fn new(polling: BusyPolling) -> Arc<Self> {
        let (last_nanos, asleep, is_anybody_asleep) = Default::default();
        Arc::new(Self { polling, began_at: Instant::now(), last_nanos, asleep, is_anybody_asleep })
    }

    /// A datagram was sent or received, or a message of a mapped pool.
    pub(crate) fn on_traffic(&self) {
        self.last_nanos.store(self.nanos(), Ordering::Relaxed);
        if self.is_anybody_asleep.swap(false, Ordering::AcqRel) {
            let asleep = std::mem::take(&mut *self.asleep());
            asleep.into_iter().for_each(Waker::wake);
        }
    }

    /// Resolves when it is worth looking again. What the kernel says meanwhile has to be waited for beside it.
    pub(crate) async fn renewed(&self) {
        poll_fn(|cx| {
            if self.is_recent() {
                return Poll::Ready(());
            }
            self.sleep(cx.waker());
            Poll::Pending
        })
        .await;
    }

    /// `waker` is woken with the next traffic. Where that comes at the same moment it may be missed, and the kernel's
    /// word is what is left.
    fn sleep(&self, waker: &Waker) {
        let mut asleep = self.asleep();
        if !asleep.iter().any(|other| other.will_wake(waker)) {
            asleep.push(waker.clone());
        }
        drop(asleep);
        self.is_anybody_asleep.store(true, Ordering::Release);
    }

    fn asleep(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.asleep.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the next one is worth waiting for without sleeping.
    pub(crate) fn is_recent(&self) -> bool {
        let since = self.nanos().saturating_sub(self.last_nanos.load(Ordering::Relaxed));
        u128::from(since) < self.polling.time_max.as_nanos() && (self.polling.may_poll)()
    }

    fn nanos(&self) -> u64 {
        u64::try_from(self.began_at.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// To be called by a thread that has looked in vain: others may have the core, and are told what they wait for.
pub(crate) fn found_nothing() {
    turn_end::on_turn_end();
    std::thread::yield_now();
}

/// One socket, reached past the runtime, which knows what the kernel has told it and nothing newer.
pub(crate) struct PolledSocket {
    socket: UdpSocket,
    state: UdpSocketState,
    activity: Arc<Activity>,
}

impl PolledSocket {
    /// `socket` is another handle of the one that the runtime waits for.
    pub(crate) fn new(socket: UdpSocket, activity: Arc<Activity>) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self { socket, state, activity })
    }

    /// A datagram was sent or received through it.
    pub(crate) fn on_datagram(&self) {
        self.activity.on_traffic();
    }

    /// Receives what is there, or has the task come back at once, or lets it sleep. The task must have been registered
    /// with the runtime before: nothing wakes it from the last of the three here.
    pub(crate) fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        if !self.activity.is_recent() {
            self.activity.sleep(cx.waker());
            return Poll::Pending;
        }
        let num_buffers = bufs.len().min(NUM_RECEIVED_MAX);
        match self.state.recv((&self.socket).into(), &mut bufs[..num_buffers], meta) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Behind everything else that is to be done. A task that wakes itself at once would keep those waiting
                // that have yielded, until the runtime looks for events of its own accord.
                let _ = pin!(tokio::task::yield_now()).poll(cx);
                found_nothing();
                Poll::Pending
            }
            received => Poll::Ready(received),
        }
    }
}

impl fmt::Debug for PolledSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.socket.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::task::Wake;

    /// Notes that it was woken.
    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    /// What a look at `socket` gives, and whether it asked to be repeated.
    fn look(socket: &PolledSocket) -> (Poll<usize>, bool) {
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        let (mut buffer, mut meta) = ([0; 64], [RecvMeta::default()]);
        let polled = socket.poll_recv(&mut Context::from_waker(&waker), &mut [IoSliceMut::new(&mut buffer)], &mut meta);
        (polled.map(|received| received.unwrap()), woken.0.load(Ordering::SeqCst))
    }

    fn socket(time_max: Duration, may_poll: bool) -> PolledSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let activity = Activity::new(BusyPolling { time_max, may_poll: Arc::new(move || may_poll) });
        PolledSocket::new(socket, activity).unwrap()
    }

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn task_comes_back_at_once_for_as_long_as_a_datagram_is_recent() {
        let polled = socket(LONG, true);
        polled.on_datagram();
        assert_eq!(look(&polled), (Poll::Pending, true));
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.send_to(b"kv", polled.socket.local_addr().unwrap()).unwrap();
        assert_eq!(look(&polled), (Poll::Ready(1), false));
    }

    #[test]
    fn traffic_of_one_socket_has_another_looked_at() {
        let one = socket(Duration::ZERO, true);
        let other = PolledSocket::new(UdpSocket::bind("127.0.0.1:0").unwrap(), one.activity.clone()).unwrap();
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        let mut meta = [RecvMeta::default()];
        let is_woken = || woken.0.swap(false, Ordering::SeqCst);
        for _ in 0..2 {
            let polled = one.poll_recv(&mut Context::from_waker(&waker), &mut [IoSliceMut::new(&mut [0])], &mut meta);
            assert!(polled.is_pending() && !is_woken());
            other.on_datagram();
            assert!(is_woken(), "who sleeps looks again");
            other.on_datagram();
            assert!(!is_woken(), "and once");
        }
    }

    #[test]
    fn task_sleeps_when_the_time_is_over_or_a_core_is_needed() {
        for polled in [socket(Duration::ZERO, true), socket(LONG, false)] {
            polled.on_datagram();
            assert_eq!(look(&polled), (Poll::Pending, false));
        }
    }
}
