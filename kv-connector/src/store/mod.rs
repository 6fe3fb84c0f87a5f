//! The prefix-block store: KV that was computed once, by whoever, and is found again by its content.
//!
//! ```text
//!             prefill node / decode node
//!   pool ──── publish: pin, copy, put ────> TieredStore ─┬─ Tier host    foyer, memory
//!     ^                                        │         ├─ Tier disk    foyer, a folder of this node
//!     └────── load: get, check, write <────────┘         └─ Tier remote  OpenDAL, shared by all nodes
//! ```
//!
//! What holds: an entry is used only if its header says what its name says, whole-prefix digest and representation
//! included, and its payload has its digest; anything else is a miss, counted, and removed. No request waits for a
//! write. A tier that fails is a miss within a deadline, and is then left alone. Everything has a bound.
//!
//! What it does not do: choose between loading and computing (`common::handover::prefix_choice`), know which
//! sequences are in the pool (the engine), tell other nodes what it holds (the host tier tells the node's block feed),
//! or decide who may share with whom: the salt in the root of every name has done that.
//!
//! Reading order: [`entry`] (the format, and what is checked), [`backend`] (a place for bytes) with [`host`],
//! [`disk`], [`remote`] and [`faulty`], `tier_events` (what is told of a tier), [`tier`] (checks, deadlines, counts),
//! [`tiered`] (several as one), `write_queue`, `named_tokens` (granules of a text), `load`, `publish`, `node_store`
//! (what a node has).

use common::content::ContentName;

pub mod backend;
pub mod disk;
pub mod entry;
pub mod faulty;
pub mod host;
mod load;
mod named_tokens;
mod node_store;
mod publish;
pub mod remote;
mod remote_url;
mod store_metrics;
mod sweep;
pub mod tier;
mod tier_events;
pub mod tiered;
mod write_queue;

pub use backend::{BackendError, EntryKey, StoreFuture, TierBackend};
pub use disk::{DiskBackend, OpenDiskError};
pub use entry::{BadEntry, Entry, EntryFormat};
pub use faulty::{Fault, FaultyBackend};
pub use host::HostBackend;
pub use load::{FoundPrefix, LoadEnd, LoadLimits, LoadPlan, Loaded, PrefixLoad};
pub use node_store::{NodeStore, OpenStoreError, StoreConfig};
pub use publish::{PinPrefix, PinnedKv};
pub use remote::RemoteBackend;
pub use remote_url::BadRemoteUrl;
pub use tier::{Tier, TierKind};
pub use tiered::{Lookup, TieredStore};

/// Entries by name: one tier, or several as one (`tests/store_contract.rs` holds all to the same).
pub trait BlockStore: Send + Sync {
    /// How many leading `names` are held. A hint: presence can change, and bytes are checked when they are got.
    fn num_held<'a>(&'a self, names: &'a [ContentName]) -> StoreFuture<'a, usize>;

    /// The entry of `name`, checked. `None`: not there, not usable, or not within the deadline.
    fn get(&self, name: ContentName) -> StoreFuture<'_, Option<Entry>>;

    /// Keeps an entry, unless it is held already. False: it was dropped, which is counted.
    fn put(&self, name: ContentName, entry: Entry) -> StoreFuture<'_, bool>;

    /// Forgets an entry.
    fn remove(&self, name: ContentName) -> StoreFuture<'_, ()>;
}
