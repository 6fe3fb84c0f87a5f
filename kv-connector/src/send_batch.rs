//! Sends that follow each other on one path, handed to the kernel as one.
//!
//! quinn fills ten datagrams at a time, a constant of its own. Of 1,472 bytes the kernel takes 44 as one send, and most
//! of what it does it does for a send, whatever its size; so does the receiving end, which gets them as one buffer. So
//! a send of full datagrams waits for what follows it on the same path, until
//!
//! - no further one of that size fits,
//! - a shorter one follows, which ends what the kernel divides evenly, and is how a burst of quinn's ends,
//! - anything follows that goes elsewhere: nothing overtakes, or
//! - the [turn](crate::turn_end) ends, or the thread has nothing more to do.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use quinn::AsyncUdpSocket;
use quinn::udp::{EcnCodepoint, Transmit};
use tokio::runtime::Handle;

use crate::segments::SEND_BYTES_MAX;
use crate::turn_end::{AtTurnEnd, at_turn_end};

/// What waits to be sent through one socket.
pub(crate) struct SendBatch {
    socket: Arc<dyn AsyncUdpSocket>,
    threads: Handle,
    waiting: Mutex<Waiting>,
    /// Itself, for the end of the turn.
    own: Weak<Self>,
}

#[derive(Default)]
struct Waiting {
    /// Datagrams of this path, one behind the other; none if there are no bytes.
    path: Option<Path>,
    contents: Vec<u8>,
    /// The socket was full: somebody waits until it takes more.
    is_blocked: bool,
}

/// What the datagrams of one send have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Path {
    destination: SocketAddr,
    src_ip: Option<IpAddr>,
    ecn: Option<EcnCodepoint>,
    /// Of each datagram but the last, which may be shorter.
    segment_bytes: usize,
}

impl Path {
    fn of(transmit: &Transmit<'_>, segment_bytes: usize) -> Self {
        let Transmit { destination, ecn, src_ip, .. } = *transmit;
        Self { destination, src_ip, ecn, segment_bytes }
    }
}

impl Waiting {
    /// Whether `transmit` can be part of what waits.
    fn takes(&self, transmit: &Transmit<'_>, num_segments_max: usize) -> bool {
        let Some(path) = &self.path else { return false };
        let num_bytes = self.contents.len() + transmit.contents.len();
        let segment_bytes = transmit.segment_size.unwrap_or(transmit.contents.len().max(path.segment_bytes));
        *path == Path::of(transmit, segment_bytes)
            && self.contents.len().is_multiple_of(path.segment_bytes)
            && num_bytes <= SEND_BYTES_MAX
            && num_bytes.div_ceil(path.segment_bytes) <= num_segments_max
    }

    /// Whether one datagram more could be part of it.
    fn is_open(&self, num_segments_max: usize) -> bool {
        self.path.is_some_and(|path| {
            let num_bytes = self.contents.len();
            num_bytes.is_multiple_of(path.segment_bytes)
                && num_bytes + path.segment_bytes <= SEND_BYTES_MAX
                && num_bytes / path.segment_bytes < num_segments_max
        })
    }
}

impl SendBatch {
    /// In front of `socket`; where it is full, tasks of `threads` wait.
    pub(crate) fn new(socket: Arc<dyn AsyncUdpSocket>, threads: Handle) -> Arc<Self> {
        Arc::new_cyclic(|own| Self { socket, threads, waiting: Mutex::default(), own: own.clone() })
    }

    /// Takes `transmit`, which is at most what the kernel takes in one send.
    ///
    /// # Errors
    /// The socket's, of this send alone. With `WouldBlock` nothing of it was taken.
    pub(crate) fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let num_segments_max = self.socket.max_transmit_segments();
        let mut waiting = self.waiting();
        if !waiting.takes(transmit, num_segments_max) {
            self.flush(&mut waiting)?;
            // One datagram is what ends a burst, if not a message.
            let several = transmit.segment_size.filter(|bytes| 2 * bytes <= SEND_BYTES_MAX);
            let Some(segment_bytes) = several else { return self.socket.try_send(transmit) };
            waiting.path = Some(Path::of(transmit, segment_bytes));
        }
        // From here on it is taken, and no error is this send's.
        waiting.contents.extend_from_slice(transmit.contents);
        if waiting.is_open(num_segments_max) {
            drop(waiting);
            self.own.upgrade().into_iter().for_each(|own| at_turn_end(own));
        } else {
            self.flush_or_wait(&mut waiting);
        }
        Ok(())
    }

    /// Sends what waits. What the socket does not take for another reason than being full is lost, as datagrams may be.
    ///
    /// # Errors
    /// The socket is full.
    fn flush(&self, waiting: &mut Waiting) -> io::Result<()> {
        let Some(Path { destination, src_ip, ecn, segment_bytes }) = waiting.path else { return Ok(()) };
        let contents = &waiting.contents[..];
        let segment_size = Some(segment_bytes).filter(|bytes| *bytes < contents.len());
        match self.socket.try_send(&Transmit { destination, ecn, contents, segment_size, src_ip }) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
            Err(error) => tracing::debug!(%destination, %error, "datagrams were not sent"),
            Ok(()) => {}
        }
        waiting.path = None;
        waiting.contents.clear();
        Ok(())
    }

    /// Sends what waits, now or when the socket takes it: nobody else asks again.
    fn flush_or_wait(&self, waiting: &mut Waiting) {
        if self.flush(waiting).is_ok() || waiting.is_blocked {
            return;
        }
        let Some(own) = self.own.upgrade() else { return };
        waiting.is_blocked = true;
        self.threads.spawn(async move { own.flush_when_writable().await });
    }

    async fn flush_when_writable(&self) {
        let mut poller = self.socket.clone().create_io_poller();
        loop {
            let writable = poll_fn(|cx| poller.as_mut().poll_writable(cx)).await;
            let mut waiting = self.waiting();
            if writable.is_err() || self.flush(&mut waiting).is_ok() {
                waiting.is_blocked = false;
                return;
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Valid after every statement.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AtTurnEnd for SendBatch {
    fn on_turn_end(&self) {
        self.flush_or_wait(&mut self.waiting());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fmt;
    use std::io::IoSliceMut;
    use std::pin::Pin;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::{Context, Poll, Waker};

    use proptest::prelude::*;
    use quinn::UdpPoller;
    use quinn::udp::RecvMeta;

    use crate::turn_end;

    const NUM_SEGMENTS_MAX: usize = 64;

    /// A socket that keeps what it is given, and is full when it is said to be.
    #[derive(Default)]
    struct Kept {
        /// Each send: its path, and its bytes.
        sends: Mutex<Vec<(Path, Vec<u8>)>>,
        is_full: AtomicBool,
        waker: Mutex<Option<Waker>>,
    }

    impl fmt::Debug for Kept {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("kept")
        }
    }

    struct KeptPoller(Arc<Kept>);

    impl fmt::Debug for KeptPoller {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0.fmt(f)
        }
    }

    impl UdpPoller for KeptPoller {
        fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            *self.0.waker.lock().unwrap() = Some(cx.waker().clone());
            if self.0.is_full.load(Ordering::SeqCst) { Poll::Pending } else { Poll::Ready(Ok(())) }
        }
    }

    impl AsyncUdpSocket for Kept {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
            Box::pin(KeptPoller(self))
        }

        fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
            if self.is_full.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let num_bytes = transmit.contents.len();
            let segment_bytes = transmit.segment_size.unwrap_or(num_bytes);
            assert!(num_bytes <= SEND_BYTES_MAX && num_bytes.div_ceil(segment_bytes) <= NUM_SEGMENTS_MAX);
            self.sends.lock().unwrap().push((Path::of(transmit, segment_bytes), transmit.contents.to_vec()));
            Ok(())
        }

        fn poll_recv(
            &self,
            _: &mut Context<'_>,
            _: &mut [IoSliceMut<'_>],
            _: &mut [RecvMeta],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn max_transmit_segments(&self) -> usize {
            NUM_SEGMENTS_MAX
        }
    }

    impl Kept {
        fn set_full(&self, is_full: bool) {
            self.is_full.store(is_full, Ordering::SeqCst);
            self.waker.lock().unwrap().take().into_iter().for_each(Waker::wake);
        }

        /// Bytes of each send.
        fn num_bytes(&self) -> Vec<usize> {
            self.sends.lock().unwrap().iter().map(|(_, contents)| contents.len()).collect()
        }

        /// Every datagram that left, in order: where to, and its bytes.
        fn datagrams(&self) -> Vec<(SocketAddr, Option<EcnCodepoint>, Vec<u8>)> {
            let sends = self.sends.lock().unwrap();
            let of_send = |(path, contents): &(Path, Vec<u8>)| datagrams(path, contents);
            sends.iter().flat_map(of_send).collect()
        }
    }

    fn datagrams(path: &Path, contents: &[u8]) -> Vec<(SocketAddr, Option<EcnCodepoint>, Vec<u8>)> {
        contents.chunks(path.segment_bytes).map(|bytes| (path.destination, path.ecn, bytes.to_vec())).collect()
    }

    fn addr(number: u16) -> SocketAddr {
        ([127, 0, 0, 1], number).into()
    }

    /// As quinn sends: one datagram has no size of segments.
    fn transmit<'a>(path: &Path, contents: &'a [u8]) -> Transmit<'a> {
        let segment_size = Some(path.segment_bytes).filter(|bytes| *bytes < contents.len());
        Transmit { destination: path.destination, ecn: path.ecn, contents, segment_size, src_ip: path.src_ip }
    }

    fn path(segment_bytes: usize) -> Path {
        Path { destination: addr(1), src_ip: None, ecn: None, segment_bytes }
    }

    /// Runs `what` on a thread that takes turns, with a socket and what batches its sends.
    fn on_turns(what: impl FnOnce(&Arc<Kept>, &Arc<SendBatch>) + Send + 'static) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let handle = runtime.handle().clone();
        let thread = std::thread::spawn(move || {
            turn_end::on_park();
            let kept = Arc::new(Kept::default());
            what(&kept, &SendBatch::new(kept.clone(), handle));
        });
        thread.join().unwrap();
    }

    #[test]
    fn full_datagrams_wait_for_more_and_leave_when_no_more_fit_or_the_turn_ends() {
        on_turns(|kept, batch| {
            for _ in 0..9 {
                batch.send(&transmit(&path(1472), &[7; 10 * 1472])).unwrap();
            }
            // Four are 40 of the 44 that fit.
            assert_eq!(kept.num_bytes(), [40 * 1472; 2]);
            turn_end::on_turn_end();
            assert_eq!(kept.num_bytes(), [40 * 1472, 40 * 1472, 10 * 1472]);
            turn_end::on_turn_end();
            assert_eq!(kept.num_bytes().len(), 3, "nothing is left");
            for _ in 0..4 {
                batch.send(&transmit(&path(1472), &[7; 11 * 1472])).unwrap();
            }
            assert_eq!(kept.num_bytes()[3..], [44 * 1472], "what is full does not wait");
        });
    }

    #[test]
    fn end_of_a_burst_does_not_wait() {
        on_turns(|kept, batch| {
            batch.send(&transmit(&path(1472), &[7; 10 * 1472])).unwrap();
            batch.send(&transmit(&path(1472), &[7; 3 * 1472 + 1])).unwrap();
            assert_eq!(kept.num_bytes(), [13 * 1472 + 1]);
            // Nor does an acknowledgement, or a message.
            batch.send(&transmit(&path(40), &[7; 40])).unwrap();
            assert_eq!(kept.num_bytes()[1..], [40]);
            // Nor what no other fits.
            batch.send(&transmit(&path(8972), &[7; 7 * 8972])).unwrap();
            batch.send(&transmit(&path(65_507), &[7; 65_507])).unwrap();
            assert_eq!(kept.num_bytes()[2..], [7 * 8972, 65_507]);
        });
    }

    #[test]
    fn thread_without_turns_sends_at_once() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let kept = Arc::new(Kept::default());
        let batch = SendBatch::new(kept.clone(), runtime.handle().clone());
        batch.send(&transmit(&path(1472), &[7; 10 * 1472])).unwrap();
        assert_eq!(kept.num_bytes(), [10 * 1472]);
    }

    #[test]
    fn what_waits_for_a_full_socket_leaves_when_it_is_not() {
        let runtime = tokio::runtime::Builder::new_current_thread().on_thread_park(turn_end::on_park).build().unwrap();
        let handle = runtime.handle().clone();
        runtime.block_on(async move {
            // From its first time to sleep on, the thread takes turns.
            tokio::task::yield_now().await;
            turn_end::on_park();
            let kept = Arc::new(Kept::default());
            let batch = SendBatch::new(kept.clone(), handle);
            kept.set_full(true);
            batch.send(&transmit(&path(1472), &[1; 40 * 1472])).unwrap();
            turn_end::on_turn_end();
            tokio::task::yield_now().await;
            let refused = batch.send(&transmit(&path(1472), &[2; 10 * 1472])).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::WouldBlock, "quinn waits too");
            assert_eq!(kept.num_bytes(), [0; 0]);
            kept.set_full(false);
            while kept.num_bytes().is_empty() {
                tokio::task::yield_now().await;
            }
            assert_eq!(kept.num_bytes(), [40 * 1472]);
            assert!(!batch.waiting().is_blocked);
        });
    }

    proptest! {
        /// Whatever is sent in whatever sizes to whomever, each datagram leaves once, as it was, in order.
        #[test]
        fn datagrams_leave_as_they_came(
            sends in prop::collection::vec(
                (1u16..3, prop::sample::select(vec![200, 1200, 1472, 8972, 40_000]), 1usize..13, 0usize..3, 0u8..4, 0u8..5),
                1..40,
            )
        ) {
            on_turns(move |kept, batch| {
                let mut expected = Vec::new();
                for (index, (to, segment_bytes, num_segments, num_cut, ecn, event)) in sends.into_iter().enumerate() {
                    let num_segments = num_segments.min(SEND_BYTES_MAX / segment_bytes);
                    let path = Path { destination: addr(to), ecn: EcnCodepoint::from_bits(ecn), ..path(segment_bytes) };
                    let contents = vec![index as u8; num_segments * segment_bytes - num_cut * 50];
                    // A full socket takes nothing, or keeps what it was given.
                    kept.is_full.store(event == 0, Ordering::SeqCst);
                    let mut sent = batch.send(&transmit(&path, &contents));
                    if sent.is_err() {
                        kept.is_full.store(false, Ordering::SeqCst);
                        sent = batch.send(&transmit(&path, &contents));
                    }
                    sent.unwrap();
                    expected.extend(datagrams(&path, &contents));
                    if event == 1 {
                        turn_end::on_turn_end();
                    }
                }
                kept.is_full.store(false, Ordering::SeqCst);
                batch.on_turn_end();
                let left = kept.datagrams();
                assert_eq!(left.len(), expected.len());
                assert!(left == expected, "changed, or out of order");
            });
        }
    }
}
