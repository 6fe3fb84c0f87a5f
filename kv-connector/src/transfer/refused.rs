//! The reasons for not taking an extent, one enum for events, logs and metric labels.

/// Why an extent was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RefusedExtent {
    /// The stream does not begin with a header.
    #[error("it does not begin with an extent header")]
    Malformed,
    /// Meant for an earlier life of this node.
    #[error("it is meant for an earlier life of this node")]
    StaleEpoch,
    /// Meant for another attempt or reservation of a request that is landing.
    #[error("it is meant for an earlier attempt or reservation of its request")]
    Stale,
    /// Meant for a request that is not landing here.
    #[error("no landing is open for its request")]
    Unknown,
    /// A layer, group, plane or head range that this model does not have.
    #[error("it has another shape than this model's KV")]
    WrongShape,
    /// Tokens that the reservation does not await, or a range that does not end with a granule.
    #[error("its tokens lie outside the reservation")]
    OutOfRange,
    /// Another number of bytes than its tokens take.
    #[error("it has another number of bytes than its tokens take")]
    WrongSize,
    /// Part of it is there, or on its way.
    #[error("part of it is there already")]
    Duplicate,
    /// The bytes are not those the digest was made of, or stand for something else.
    #[error("its digest is wrong")]
    Corrupted,
    /// It ended early.
    #[error("it ended before its last byte")]
    Truncated,
    /// The sender gave it up.
    #[error("its sender gave it up")]
    Reset,
    /// Nothing came for too long.
    #[error("its bytes stopped coming")]
    Stalled,
    /// The connection went away under it.
    #[error("the bulk connection was lost")]
    ConnectionLost,
    /// The landing was closed under it.
    #[error("the landing was closed")]
    Closed,
    /// Its list of places in shared memory cannot be its payload.
    #[error("it names places in shared memory that cannot be its bytes")]
    BadRuns,
    /// Its bytes cannot be copied out of its sender's device memory.
    #[error("its bytes cannot be copied out of its sender's device memory")]
    Unreadable,
    /// There is no room to fetch it into now; its sender sends its bytes instead.
    #[error("there is no room to fetch it into now")]
    Busy,
}

impl RefusedExtent {
    /// The metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            RefusedExtent::Malformed => "malformed",
            RefusedExtent::StaleEpoch => "stale_epoch",
            RefusedExtent::Stale => "stale",
            RefusedExtent::Unknown => "unknown",
            RefusedExtent::WrongShape => "wrong_shape",
            RefusedExtent::OutOfRange => "out_of_range",
            RefusedExtent::WrongSize => "wrong_size",
            RefusedExtent::Duplicate => "duplicate",
            RefusedExtent::Corrupted => "corrupted",
            RefusedExtent::Truncated => "truncated",
            RefusedExtent::Reset => "reset",
            RefusedExtent::Stalled => "stalled",
            RefusedExtent::ConnectionLost => "connection_lost",
            RefusedExtent::Closed => "closed",
            RefusedExtent::BadRuns => "bad_runs",
            RefusedExtent::Unreadable => "unreadable",
            RefusedExtent::Busy => "busy",
        }
    }

    /// Whether the landing's owner need not hear of it.
    pub(super) fn is_harmless(self) -> bool {
        use RefusedExtent::{Busy, Closed, Duplicate, Malformed, Stale, StaleEpoch, Unknown};
        matches!(self, Malformed | StaleEpoch | Stale | Unknown | Duplicate | Closed | Busy)
    }
}
