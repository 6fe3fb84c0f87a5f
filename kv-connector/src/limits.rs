//! The bounds of the fabric: how much of anything it holds, and how long it waits.

use std::time::Duration;

use common::config::{KV_CONNECTIONS_MAX, WINDOW_BYTES_MIN};

/// Bounds of one fabric. The defaults serve a cluster of some hundred nodes.
#[derive(Debug, Clone)]
pub struct FabricLimits {
    /// Connections accepted at a time, control and bulk counted apart; a group of bulk connections counts as one. One
    /// more is refused, and so are more than as many who have not said hello yet.
    pub num_connections_max: usize,
    /// Streams that one peer may have open on its control connection; it is allowed a few at first and as many once
    /// it has opened some. Above what any node admits, so that a full node answers `Busy` and nobody waits for a
    /// stream.
    pub num_streams_max: u32,
    /// Opened streams that wait for [`accept`](crate::Fabric::accept). One more is reset.
    pub num_waiting_streams_max: usize,
    /// Memory for large frames that are being received, over all streams of this node.
    pub frame_bytes_max: usize,
    /// Time for the handshake and the hello together.
    pub hello_deadline: Duration,
    /// Time for the first frame of a stream, and for the rest of any frame that has begun.
    pub frame_deadline: Duration,
    /// Something is sent over an idle connection this often.
    pub keep_alive: Duration,
    /// A peer that is silent for this long is gone.
    pub idle_timeout: Duration,
    /// Extents that one bulk connection receives at a time over `quic`, and as many again by fetching: its sender
    /// is told. How many more over `shm` is part of the protocol of its socket, which has no word for it: 256.
    pub num_extents_max: u32,
    /// Time for an extent's header, and between two pieces of its payload.
    pub extent_deadline: Duration,
    /// Time to get at a peer's shared memory; past it KV comes over QUIC.
    pub attach_deadline: Duration,
    /// Bytes of all bulk connections that may wait here unread: a node's receive memory. Those of one peer together
    /// take [`bulk_window_bytes`](Self::bulk_window_bytes) of it.
    pub receive_bytes_max: usize,
    /// Bytes in flight, unread or unacknowledged, of the bulk connections of one peer.
    pub bulk_window_bytes: u32,
}

impl FabricLimits {
    /// Bulk connections that one peer may have: each has a part of the window that holds two of the largest datagrams.
    pub(crate) fn num_stripes_max(&self) -> u16 {
        let num_parts = u64::from(self.bulk_window_bytes) / WINDOW_BYTES_MIN;
        num_parts.clamp(1, u64::from(KV_CONNECTIONS_MAX)) as u16
    }
}

impl Default for FabricLimits {
    fn default() -> Self {
        Self {
            num_connections_max: 1024,
            num_streams_max: 8192,
            num_waiting_streams_max: 8192,
            frame_bytes_max: 256 << 20,
            hello_deadline: Duration::from_secs(5),
            frame_deadline: Duration::from_secs(10),
            keep_alive: Duration::from_millis(500),
            idle_timeout: Duration::from_secs(2),
            num_extents_max: 256,
            extent_deadline: Duration::from_secs(5),
            attach_deadline: Duration::from_secs(3),
            receive_bytes_max: 1 << 30,
            bulk_window_bytes: 16 << 20,
        }
    }
}
