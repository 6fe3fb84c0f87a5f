//! What a tier is made of: somewhere that bytes are kept under a name. It promises nothing about them; who reads
//! them checks ([`Tier`](super::Tier)).

use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;
use common::block_events::StoredBlock;
use common::content::{ContentKey, hex};

/// A future of the store.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What an entry is kept under: its content, and the format it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EntryKey {
    /// The granule and everything before it: model, adapter, salt and tokens.
    pub content: ContentKey,
    /// The beginning of the format's tag.
    pub tag: u128,
}

impl EntryKey {
    /// Its path in storage that has paths. Spread over folders, so that none grows large.
    pub fn path(&self) -> String {
        let (tag, key) = (hex(&self.tag.to_be_bytes()), hex(&self.content.0.to_be_bytes()));
        format!("v1/{tag}/{}/{key}", &key[..2])
    }
}

/// An operation that did not come through: the tier is unwell, which is no news about the entry.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BackendError(pub String);

/// Keeps bytes by name.
pub trait TierBackend: Send + Sync {
    /// Whether something is kept under `key`, if that is known without asking anybody.
    fn is_known_to_hold(&self, key: EntryKey) -> Option<bool>;

    /// Whether something is kept under `key`.
    fn contains(&self, key: EntryKey) -> StoreFuture<'_, Result<bool, BackendError>>;

    /// What is kept under `key`. What is longer than `num_bytes_max` is cut behind it.
    fn get(&self, key: EntryKey, num_bytes_max: usize) -> StoreFuture<'_, Result<Option<Bytes>, BackendError>>;

    /// Keeps `bytes` under `key`, in place of what was there. Resolves when they are where they belong.
    fn put(&self, key: EntryKey, bytes: Bytes) -> StoreFuture<'_, Result<(), BackendError>>;

    /// Forgets what is kept under `key`.
    fn remove(&self, key: EntryKey) -> StoreFuture<'_, Result<(), BackendError>>;

    /// The entry that was put under `key` is this block, as block events call it. For a backend that tells what it
    /// keeps; what leaves, it tells by itself.
    fn tell_stored(&self, _key: EntryKey, _block: StoredBlock) {}

    /// Puts everything where it belongs; nothing is done afterwards.
    fn close(&self) -> StoreFuture<'_, ()> {
        Box::pin(async {})
    }

    /// Bytes that are kept, if that is known.
    fn used_bytes(&self) -> Option<u64> {
        None
    }

    /// Bytes that were given up for others since the start, if that is known.
    fn evicted_bytes(&self) -> Option<u64> {
        None
    }
}
