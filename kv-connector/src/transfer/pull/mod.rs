//! Extents that a receiver fetches out of its sender's pool by itself, told where they lie.
//!
//! ```text
//! prefill node                                        decode node
//! bulk connection  <────────── dial, mutual TLS ───── Fabric::connect_bulk
//!   such a pool? exported?  <──── this host's name ── a PullMethod of the same kind?
//!                              ── handle, size ─────> open it
//!   from now on by pulling     <────────── attached ─
//!                              ── attached ─────────>
//!
//! one extent, one bidirectional stream
//!   header, runs (offset, bytes) ──────────────────>  admit, hold the runs against pool and payload
//!                                                     fetch into own blocks, hash what is there
//!   the blocks may change again  <───────── taken ──  digest right: verified
//! ```
//!
//! What fetches is a [`PullMethod`]: `cuda-ipc` between the devices of one host, `nixl` through that library. As with
//! [`shm`](super::shm) only the owner of blocks writes to them: what runs on when a sender has given up, or is gone, is a
//! read, and no block needs quarantine.
//!
//! **One trust domain**, as with `shm`: who has the handle can read the sender's whole pool. It leaves over the bulk
//! connection, so only for a node of the cluster.
//!
//! The sender exports its pool once. A receiver keeps it open as long as its end of the connection; where a fetch fails it
//! refuses the extent, ends the connection, and remembers it: the next one to the same life of the sender goes without.
//! Where it has no room to fetch into, it says that of this one extent, which its sender then sends as bytes.

mod attach;
mod puller;
mod receive;

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use common::device_pool::ExportedPool;
use common::kv_memory::KvMemory;
use common::wire::runs::{NUM_RUNS_MAX, encode_runs};
use common::wire::{ExtentHeader, PoolRun};
use quinn::{Connection, ReadError, ReadExactError};

pub(crate) use attach::{AttachError, attach, serve};
pub(crate) use puller::{NUM_PULLS_MAX, NUM_PULLS_OF_PEER_MAX, Puller};
pub(crate) use receive::{Receiving, receive};

use crate::accounting::{Carrier, Kind, Ledger};
use crate::socket::Traffic;
use crate::stream::StreamCode;
use crate::transfer::extent_stream::ExtentStream;
use crate::transfer::payload::PoolExtent;
use crate::transfer::{Arriving, ExtentEnd, Payload, RefusedExtent, SendExtentError};

/// The receiver's answer to an extent that it has fetched and verified.
const TAKEN: u8 = 1;

/// A way to fetch out of another node's pool, and to let others fetch out of this one's.
pub(crate) trait PullMethod: Send + Sync {
    /// Its name in logs and metrics.
    fn carrier(&self) -> Carrier;

    /// What a receiver asks with: for this way, in this version's words.
    fn question(&self) -> [u8; 4];

    /// Whether both ends must be on one host.
    fn is_within_host(&self) -> bool;

    /// Bytes of a handle at most, 65,535 or less.
    fn handle_bytes_max(&self) -> usize;

    /// This node's pool.
    fn memory(&self) -> &Arc<dyn KvMemory>;

    /// Lets others fetch out of it. May take its time.
    ///
    /// # Errors
    /// A sentence.
    fn export(&self) -> Result<ExportedPool, String>;

    /// Opens another node's. May take its time.
    ///
    /// # Errors
    /// A sentence.
    fn open_peer(&self, exported: &ExportedPool) -> Result<Arc<dyn PulledPool>, String>;
}

/// Another node's pool. What it holds may change while it is read: what was fetched is worth what a digest of it says.
pub(crate) trait PulledPool: Send + Sync {
    /// Size in bytes.
    fn num_bytes(&self) -> u64;

    /// Fetches runs, which lie within it, one behind the other into the blocks of an extent. Done when the call returns,
    /// which may take its time.
    ///
    /// # Errors
    /// [`PullError`].
    fn pull(&self, runs: &[PoolRun], arriving: &mut Arriving) -> Result<(), PullError>;
}

/// Why an extent was not fetched.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PullError {
    /// Nobody wants it any more, or it is not what was announced.
    Refused(RefusedExtent),
    /// There is no room for it here now; the pool can be fetched from later.
    Busy(String),
    /// The pool can be fetched from no more.
    Failed(String),
}

impl From<RefusedExtent> for PullError {
    fn from(refused: RefusedExtent) -> Self {
        PullError::Refused(refused)
    }
}

/// Whether two handles are of the same memory, whatever they know it as.
pub(crate) fn is_same(one: &Arc<dyn KvMemory>, other: &Arc<dyn KvMemory>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(one), Arc::as_ptr(other))
}

/// The sender's part of one bulk connection.
#[derive(Default)]
pub(crate) struct Sending {
    /// How its receiver fetches, once it does.
    attached: OnceLock<Arc<Puller>>,
}

impl Sending {
    /// The receiver has opened the pool. It opens it once; what a second time would say is not heard.
    pub(crate) fn on_attached(&self, puller: &Arc<Puller>) {
        let _ = self.attached.set(puller.clone());
    }

    /// What carries the extents, if this does.
    pub(crate) fn carrier(&self) -> Option<Carrier> {
        Some(self.attached.get()?.method().carrier())
    }

    /// Where the receiver finds the payload, if it can fetch it by itself.
    pub(crate) fn runs(&self, payload: &Payload) -> Option<(Carrier, Vec<PoolRun>)> {
        let method = self.attached.get()?.method();
        let is_exported = |extent: &&PoolExtent| is_same(method.memory(), &extent.memory);
        match payload {
            Payload::Pool(extent) => Some((method.carrier(), Some(extent).filter(is_exported)?.runs(NUM_RUNS_MAX)?)),
            Payload::Bytes(_) => None,
        }
    }
}

/// What a receiver did about an extent that it was told the places of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Posted {
    /// Fetched and verified it, or was told of none after all.
    Taken,
    /// Has no room to fetch into now, and wants its bytes.
    Busy,
}

/// Sends one extent's places and resolves when the receiver has fetched and verified it, or will not fetch it.
pub(crate) async fn send(
    connection: &Connection,
    ledger: &Arc<Ledger>,
    header: &ExtentHeader,
    (carrier, runs): (Carrier, &[PoolRun]),
    end: ExtentEnd,
) -> Result<Posted, SendExtentError> {
    let lost = |error: quinn::ConnectionError| SendExtentError::ConnectionLost(error.into());
    let _held = ledger.hold(Kind::Stream(Traffic::Bulk));
    let (stream, mut answer) = connection.open_bi().await.map_err(lost)?;
    let mut posting = ExtentStream::new(stream);
    posting.write(&mut [Bytes::copy_from_slice(&header.encode()), encode_runs(runs).into()]).await?;
    if end == ExtentEnd::Reset {
        return Ok(Posted::Taken);
    }
    posting.finish()?;
    let mut taken = [0];
    match answer.read_exact(&mut taken).await {
        Ok(()) if taken == [TAKEN] => {
            ledger.count_sent(carrier, header.num_payload_bytes as usize);
            Ok(Posted::Taken)
        }
        Err(ReadExactError::ReadError(ReadError::Reset(code))) if code == StreamCode::Busy.code() => Ok(Posted::Busy),
        Err(ReadExactError::ReadError(ReadError::ConnectionLost(error))) => Err(lost(error)),
        Ok(()) | Err(_) => Err(SendExtentError::Refused),
    }
}
