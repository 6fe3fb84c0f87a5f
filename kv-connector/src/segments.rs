//! A UDP socket that keeps segmentation offload within what the kernel takes, at both ends.
//!
//! quinn fills up to ten datagrams of the path's size and hands them over as one send. Linux takes 65,507 bytes in
//! one; what is more fails, counts as lost, and the connection falls back to small datagrams. So quinn is told to fill
//! no more than that of the size it last sent, and what it has filled beyond is divided here. The other way round, quinn makes room for 64 of the largest datagrams in each of 32 buffers, which
//! for datagrams of 65,507 bytes is 134 MB for what can never be more than 65,527 bytes each.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

use crate::busy_poll::PolledSocket;
use crate::turns;

/// Most bytes of one send: the largest UDP payload over IPv4; over IPv6 20 more would fit.
pub(crate) const SEND_BYTES_MAX: usize = 65_507;
/// Most bytes that arrive at once, with or without receive offload.
const RECEIVE_BYTES_MAX: usize = 65_535;
/// What is received in one system call is copied once more before it is decrypted: beyond this it would no longer
/// be in the core's own cache by then.
const RECEIVE_BATCH_BYTES: usize = 256 << 10;

/// See the [module](self).
pub(crate) struct SegmentedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    num_receive_segments: usize,
    /// Of the last send of several segments, the bytes of each; 0 before it.
    segment_bytes: AtomicUsize,
    /// Of the last system call, the mean bytes per buffer.
    received_bytes: AtomicUsize,
    polled: Option<PolledSocket>,
}

impl SegmentedSocket {
    /// `max_udp_payload_bytes` is what the endpoint announces; `polled` is the same socket, if it is to be looked at
    /// without sleeping.
    pub(crate) fn new(
        inner: Arc<dyn AsyncUdpSocket>,
        max_udp_payload_bytes: u16,
        polled: Option<PolledSocket>,
    ) -> Self {
        let num_segments = RECEIVE_BYTES_MAX.div_ceil(usize::from(max_udp_payload_bytes));
        let num_receive_segments = inner.max_receive_segments().min(num_segments);
        Self {
            inner,
            num_receive_segments,
            segment_bytes: AtomicUsize::new(0),
            received_bytes: AtomicUsize::new(0),
            polled,
        }
    }

    /// If the socket is full before the last part, the whole is sent again later; the receiver drops duplicates.
    fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(segment_bytes) = transmit.segment_size else { return self.inner.try_send(transmit) };
        // One at a time would go unnoticed, and stay when another path's are small.
        if 2 * segment_bytes <= SEND_BYTES_MAX {
            self.segment_bytes.store(segment_bytes, Ordering::Relaxed);
        }
        if transmit.contents.len() <= SEND_BYTES_MAX {
            return self.inner.try_send(transmit);
        }
        for contents in transmit.contents.chunks(part_bytes(transmit.contents.len(), segment_bytes)) {
            let segment_size = Some(segment_bytes).filter(|bytes| *bytes < contents.len());
            self.inner.try_send(&Transmit { contents, segment_size, ..*transmit })?;
        }
        Ok(())
    }
}

/// Bytes of each part of a send of `num_bytes` in segments of `segment_bytes`: as few parts as can be, of about the
/// same size.
fn part_bytes(num_bytes: usize, segment_bytes: usize) -> usize {
    let num_segments = num_bytes.div_ceil(segment_bytes);
    let num_parts = num_segments.div_ceil((SEND_BYTES_MAX / segment_bytes).max(1));
    num_segments.div_ceil(num_parts) * segment_bytes
}

impl AsyncUdpSocket for SegmentedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if let Some(polled) = &self.polled {
            polled.on_datagram();
        }
        self.send(transmit)?;
        // quinn goes on with the next ones, up to twenty, before its task ends.
        turns::give_way();
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let expected = self.received_bytes.load(Ordering::Relaxed).max(1);
        let num_buffers = (RECEIVE_BATCH_BYTES / expected).clamp(1, bufs.len().max(1)).min(bufs.len());
        let bufs = &mut bufs[..num_buffers];
        let received = match (self.inner.poll_recv(cx, bufs, meta), &self.polled) {
            (Poll::Pending, Some(polled)) => polled.poll_recv(cx, bufs, meta),
            (received, _) => received,
        };
        if let Poll::Ready(Ok(count)) = received {
            if let Some(polled) = &self.polled {
                polled.on_datagram();
            }
            let num_bytes: usize = meta[..count].iter().map(|meta| meta.len).sum();
            self.received_bytes.store(num_bytes / count.max(1), Ordering::Relaxed);
            turns::give_way();
        }
        received
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        let num_fitting = match self.segment_bytes.load(Ordering::Relaxed) {
            0 => usize::MAX,
            segment_bytes => SEND_BYTES_MAX / segment_bytes,
        };
        self.inner.max_transmit_segments().min(num_fitting)
    }

    fn max_receive_segments(&self) -> usize {
        self.num_receive_segments
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

impl fmt::Debug for SegmentedSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_send_is_divided_into_few_parts_that_the_kernel_takes() {
        // (segments, bytes of each) -> segments of each part
        let cases = [((10, 8_972), 5), ((8, 8_972), 4), ((10, 32_753), 2), ((10, 65_507), 1), ((50, 1_472), 25)];
        for ((num_segments, segment_bytes), expected) in cases {
            let part = part_bytes(num_segments * segment_bytes, segment_bytes);
            assert_eq!(part, expected * segment_bytes, "{num_segments} of {segment_bytes}");
            assert!(part <= SEND_BYTES_MAX);
        }
        // The last segment may be shorter.
        assert_eq!(part_bytes(9 * 8_972 + 1, 8_972), 5 * 8_972);
    }
}
