//! A backend with something wrong with it, for tests of everything above.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use common::block_events::StoredBlock;

use super::backend::{BackendError, EntryKey, StoreFuture, TierBackend};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// What is read has this bit flipped, counted from the first one, modulo its length.
    FlipBit(usize),
    /// What is read is cut behind this many bytes.
    Truncate(usize),
    /// Every operation fails.
    Fail,
    /// No operation ever ends.
    Hang,
    /// Every operation takes so much longer.
    Slow(Duration),
    /// What is put is accepted and lost.
    Lose,
}

/// Wraps a backend.
pub struct FaultyBackend {
    inner: Arc<dyn TierBackend>,
    fault: Mutex<Fault>,
}

impl FaultyBackend {
    /// Well, for now.
    pub fn new(inner: Arc<dyn TierBackend>) -> Self {
        Self { inner, fault: Mutex::default() }
    }

    /// From now on this is wrong.
    pub fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    fn fault(&self) -> Fault {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn stumble(&self) -> Result<Fault, BackendError> {
        match self.fault() {
            Fault::Fail => Err(BackendError("it was told to fail".to_string())),
            Fault::Hang => std::future::pending().await,
            Fault::Slow(wait) => {
                tokio::time::sleep(wait).await;
                Ok(Fault::None)
            }
            fault => Ok(fault),
        }
    }
}

impl TierBackend for FaultyBackend {
    fn is_known_to_hold(&self, key: EntryKey) -> Option<bool> {
        match self.fault() {
            Fault::Fail | Fault::Hang => None,
            _ => self.inner.is_known_to_hold(key),
        }
    }

    fn contains(&self, key: EntryKey) -> StoreFuture<'_, Result<bool, BackendError>> {
        Box::pin(async move {
            self.stumble().await?;
            self.inner.contains(key).await
        })
    }

    fn get(&self, key: EntryKey, num_bytes_max: usize) -> StoreFuture<'_, Result<Option<Bytes>, BackendError>> {
        Box::pin(async move {
            let fault = self.stumble().await?;
            let found = self.inner.get(key, num_bytes_max).await?;
            Ok(found.map(|bytes| match fault {
                Fault::FlipBit(bit) if !bytes.is_empty() => {
                    let mut flipped = bytes.to_vec();
                    flipped[bit / 8 % bytes.len()] ^= 1 << (bit % 8);
                    flipped.into()
                }
                Fault::Truncate(num_bytes) => bytes.slice(..bytes.len().min(num_bytes)),
                _ => bytes,
            }))
        })
    }

    fn put(&self, key: EntryKey, bytes: Bytes) -> StoreFuture<'_, Result<(), BackendError>> {
        Box::pin(async move {
            match self.stumble().await? {
                Fault::Lose => Ok(()),
                _ => self.inner.put(key, bytes).await,
            }
        })
    }

    fn remove(&self, key: EntryKey) -> StoreFuture<'_, Result<(), BackendError>> {
        Box::pin(async move {
            self.stumble().await?;
            self.inner.remove(key).await
        })
    }

    fn tell_stored(&self, key: EntryKey, block: StoredBlock) {
        self.inner.tell_stored(key, block);
    }
}
