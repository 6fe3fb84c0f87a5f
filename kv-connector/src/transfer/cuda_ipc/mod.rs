//! Extents that a device copies out of its sender's pool: two processes of one host whose pools are in devices' memory.
//!
//! ```text
//! prefill node                                        decode node
//! bulk connection  <────────── dial, mutual TLS ───── Fabric::connect_bulk
//!   same host? pool exported?  <── this host's name ─ a pool of its own on a device?
//!                              ── handle, size ─────> open it
//!   from now on cuda-ipc       <────────── attached ─
//!                              ── attached ─────────>
//!
//! one extent, one bidirectional stream
//!   header, runs (offset, bytes) ──────────────────>  admit, hold the runs against pool and payload
//!                                                     device to device into own blocks, hashed there
//!   the blocks may change again  <───────── taken ──  digest right: verified
//! ```
//!
//! As with [`shm`](super::shm) the receiver pulls, and only the owner of blocks writes to them: what runs on when a sender
//! has given up, or is gone, is a read, and no block needs quarantine. No byte of KV goes through either host: sender and
//! receiver hash where it lies ([`KvMemory::hash_granules`](common::kv_memory::KvMemory::hash_granules)), the receiver
//! its own copy.
//!
//! **One trust domain**, as with `shm`: who has the handle can read the sender's whole pool. It leaves over the bulk
//! connection, so only for a node of the cluster; drivers open handles of the same user alone.
//!
//! The sender exports its pool once. A receiver keeps it open as long as its end of the connection; where a copy fails it
//! refuses the extent, ends the connection, and remembers it: the next one to the same life of the sender stays with `quic`.

mod attach;
mod copier;
mod receive;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use common::kv_memory::KvMemory;
use common::wire::runs::{NUM_RUNS_MAX, encode_runs};
use common::wire::{ExtentHeader, PoolRun};
use quinn::{Connection, ReadError, ReadExactError};

pub(crate) use attach::{AttachError, Exporter, attach, serve};
pub(crate) use copier::Copier;
pub(crate) use receive::{Receiving, receive};

use crate::accounting::{Carrier, Kind, Ledger};
use crate::socket::Traffic;
use crate::transfer::extent_stream::ExtentStream;
use crate::transfer::payload::PoolExtent;
use crate::transfer::{ExtentEnd, Payload, SendExtentError};

/// The receiver's answer to an extent whose copy it has verified.
const TAKEN: u8 = 1;

/// The sender's part of one bulk connection.
#[derive(Default)]
pub(crate) struct Sending {
    /// The pool that is exported.
    memory: Option<Arc<dyn KvMemory>>,
    is_attached: AtomicBool,
}

impl Sending {
    pub(crate) fn new(memory: Option<Arc<dyn KvMemory>>) -> Self {
        Self { memory, is_attached: AtomicBool::new(false) }
    }

    /// The receiver has opened the pool.
    pub(crate) fn on_attached(&self) {
        self.is_attached.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_attached(&self) -> bool {
        self.is_attached.load(Ordering::SeqCst)
    }

    /// Where the receiver finds the payload, if it can copy it by itself.
    pub(crate) fn runs(&self, payload: &Payload) -> Option<Vec<PoolRun>> {
        let is_exported =
            |extent: &&PoolExtent| self.memory.as_ref().is_some_and(|memory| Arc::ptr_eq(memory, &extent.memory));
        match payload {
            Payload::Pool(extent) if self.is_attached() => Some(extent).filter(is_exported)?.runs(NUM_RUNS_MAX),
            _ => None,
        }
    }
}

/// Sends one extent's places and resolves when the receiver has copied and verified it.
pub(crate) async fn send(
    connection: &Connection,
    ledger: &Arc<Ledger>,
    header: &ExtentHeader,
    runs: &[PoolRun],
    end: ExtentEnd,
) -> Result<(), SendExtentError> {
    let lost = |error: quinn::ConnectionError| SendExtentError::ConnectionLost(error.into());
    let _held = ledger.hold(Kind::Stream(Traffic::Bulk));
    let (stream, mut answer) = connection.open_bi().await.map_err(lost)?;
    let mut posting = ExtentStream::new(stream);
    posting.write(&mut [Bytes::copy_from_slice(&header.encode()), encode_runs(runs).into()]).await?;
    if end == ExtentEnd::Reset {
        return Ok(());
    }
    posting.finish()?;
    let mut taken = [0];
    match answer.read_exact(&mut taken).await {
        Ok(()) if taken == [TAKEN] => {
            ledger.count_sent(Carrier::CudaIpc, header.num_payload_bytes as usize);
            Ok(())
        }
        Err(ReadExactError::ReadError(ReadError::ConnectionLost(error))) => Err(lost(error)),
        Ok(()) | Err(_) => Err(SendExtentError::Refused),
    }
}
