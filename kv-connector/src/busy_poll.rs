//! Looking at a socket a moment longer before going to sleep.
//!
//! A thread that sleeps in the kernel is woken across cores in some 15 to 35 microseconds, as long as the whole of a
//! small extent's way. So for a short time after a fabric has sent or received anything, its endpoints ask their
//! sockets again and again instead of waiting for the kernel to call. They do it as tasks that yield in between:
//! whatever else the runtime has to do is done meanwhile, and how many threads it has makes no difference.
//!
//! It costs the CPU time of a thread, at most [`BusyPolling::time_max`] behind each datagram, and is worth it only on
//! a core that has nothing else to do: [`BusyPolling::may_poll`] is asked every time.

use std::fmt;
use std::future::Future as _;
use std::io::{self, IoSliceMut};
use std::net::UdpSocket;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use quinn::udp::{RecvMeta, UdpSocketState};

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
}

impl Activity {
    pub(crate) fn new(polling: BusyPolling) -> Arc<Self> {
        Arc::new(Self { polling, began_at: Instant::now(), last_nanos: AtomicU64::new(0) })
    }

    /// A datagram was sent or received, or a message of a mapped pool.
    pub(crate) fn on_traffic(&self) {
        self.last_nanos.store(self.nanos(), Ordering::Relaxed);
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
            return Poll::Pending;
        }
        let num_buffers = bufs.len().min(NUM_RECEIVED_MAX);
        match self.state.recv((&self.socket).into(), &mut bufs[..num_buffers], meta) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Behind everything else that is to be done. A task that wakes itself at once would keep those waiting
                // that have yielded, until the runtime looks for events of its own accord.
                let _ = pin!(tokio::task::yield_now()).poll(cx);
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

    use std::sync::atomic::AtomicBool;
    use std::task::{Wake, Waker};

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
    fn task_sleeps_when_the_time_is_over_or_a_core_is_needed() {
        for polled in [socket(Duration::ZERO, true), socket(LONG, false)] {
            polled.on_datagram();
            assert_eq!(look(&polled), (Poll::Pending, false));
        }
    }
}
