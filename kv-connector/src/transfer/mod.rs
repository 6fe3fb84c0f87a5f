//! KV from a prefill node's pool into the blocks that a decode node reserved for it.
//!
//! ```text
//! prefill node                                   decode node
//! fabric.bulk_to(node, epoch)                    zone.open(plan)            blocks reserved
//!   ExtentSource::unsealed(extent)                 -> Landing, events
//!   BulkSender::begin(extent)
//!     UnsealedExtent::seal                hashed
//!     Transport ── one extent, one stream ──>    BulkReceiver
//!                                                  LandingZone::admit(header)   known? in range? not held?
//!                                                  Arriving::write(bytes)       straight into KvMemory, hashed
//!                                                  Arriving::finish()           digest right: verified
//! ```
//!
//! The other direction is the same with the roles exchanged: a prefill node opens a landing in its fabric's zone,
//! and the decode node sends through [`BulkReceiver::sender`], over the same connection. Between two prefill nodes
//! the one that fetches a prefix dials, as a decode node would.
//!
//! The receiver writes what arrives directly where it belongs, since nothing reads a reserved block
//! before its extents are verified; the digest decides whether it counts. Only where the two pools keep a granule in
//! different order or type does it convert on the way (`converting`), by what the two hellos said; and where the pool is in
//! a device's memory, pieces come together on the host until they are worth a copy (`gathering`).
//!
//! Transports, behind [`Transport`] and chosen at the hello from what both ends can do: `quic` serves
//! everywhere; `shm` lets a receiver on the same host read the sender's pool where it is, `cuda-ipc` lets its device do
//! so where both pools are in devices' memory, `nixl` fetches through that library, out of memory of either kind into
//! memory of either. Only the owner of the destination moves bytes. Where a stop could not be proven, blocks would have
//! to stay quarantined until the endpoint is torn down; why these need none is said in their modules.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use common::wire::ExtentHeader;

use crate::link::CloseReason;

mod ahead;
mod arriving;
pub(crate) mod bulk;
pub(crate) mod bulk_end;
mod converting;
mod coverage;
mod cuda_ipc;
mod extent_stream;
mod faulty;
mod gathering;
mod landing;
mod nixl;
mod notices;
mod payload;
mod places;
mod prefix_sends;
pub(crate) mod pull;
mod quic;
mod refused;
mod sends;
pub(crate) mod shm;
mod source;
pub(crate) mod stripes;

pub use arriving::Arriving;
pub use bulk::{BulkReceiver, BulkSender};
pub(crate) use cuda_ipc::CudaIpc;
pub use faulty::{FaultPlan, FaultyTransport, InjectedFaults};
pub use landing::{Landing, LandingEvent, LandingEvents, LandingPlan, LandingZone};
pub use nixl::{Nixl, NixlError, NixlPool};
pub use payload::{Payload, PoolExtent};
pub use prefix_sends::PrefixSends;
pub use refused::RefusedExtent;
pub use sends::ExtentSends;
pub use shm::SharedPool;
pub use source::{ExtentRequest, ExtentSource, UnsealedExtent};

/// How the bytes of an extent end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentEnd {
    /// All were sent.
    Finished,
    /// Given up behind what was sent; the receiver refuses the extent.
    Reset,
}

/// An extent that could not be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendExtentError {
    /// The receiver refused it: it no longer wants the KV, or it found something wrong.
    #[error("the receiver refused the extent")]
    Refused,
    /// The connection is gone.
    #[error("the bulk connection was lost: {0}")]
    ConnectionLost(CloseReason),
}

/// The future of [`Transport::send`].
pub type SendFuture<'a> = Pin<Box<dyn Future<Output = Result<(), SendExtentError>> + Send + 'a>>;

/// Carries extents to one peer.
///
/// What every transport upholds (`tests/transport_contract.rs`): an extent arrives whole and unchanged,
/// or is refused, or never arrives; extents do not wait for each other's losses; dropping the future
/// gives the extent up.
pub trait Transport: Send + Sync {
    /// Name in logs and metrics: `quic`, `shm`, `cuda-ipc`, `nixl`.
    fn name(&self) -> &'static str;

    /// Sends one extent. Resolves when nobody needs the payload any more: the transport has copied all of it,
    /// or the receiver has read it. Nobody does either once the future has been dropped.
    fn send<'a>(&'a self, header: &'a ExtentHeader, payload: Payload, end: ExtentEnd) -> SendFuture<'a>;

    /// Whether nothing can be sent any more.
    fn is_closed(&self) -> bool;

    /// Bytes of the largest UDP payload that it sends now, where it sends datagrams.
    fn datagram_bytes(&self) -> Option<u16> {
        None
    }
}

/// Puts something around a transport, for tests.
pub type TransportLayer = Arc<dyn Fn(Arc<dyn Transport>) -> Arc<dyn Transport> + Send + Sync>;
