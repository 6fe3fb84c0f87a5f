//! Entries in storage that all nodes share, through OpenDAL. It may be slow, gone, or full of other things.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use opendal::{ErrorKind, Operator};

use super::backend::{BackendError, EntryKey, StoreFuture, TierBackend};
use super::remote_url::{self, BadRemoteUrl};
use super::sweep::Sweeper;

/// Shared storage.
pub struct RemoteBackend {
    operator: Operator,
    shown: String,
    sweeper: Option<Arc<Sweeper>>,
}

impl RemoteBackend {
    /// Understands `url`; connections are made when they are needed, so a node starts without its remote. With
    /// `budget_bytes` the entries in a folder are kept within it, with `ttl` Redis forgets them by itself.
    ///
    /// # Errors
    /// [`BadRemoteUrl`], also for a limit that this kind of storage does not have.
    pub fn open(url: &str, budget_bytes: Option<u64>, ttl: Option<Duration>) -> Result<Self, BadRemoteUrl> {
        let storage = remote_url::open(url, ttl)?;
        if budget_bytes.is_some() && !storage.can_list {
            return Err(BadRemoteUrl(
                "--store-remote-bytes is for fs; Redis has maxmemory and maxmemory-policy, S3 a lifecycle rule".into(),
            ));
        }
        let sweeper = budget_bytes.map(|bytes| Arc::new(Sweeper::new(storage.operator.clone(), bytes)));
        Ok(Self { operator: storage.operator, shown: storage.shown, sweeper })
    }

    /// Where it is, without credentials.
    pub fn shown(&self) -> &str {
        &self.shown
    }
}

fn failed(error: opendal::Error) -> BackendError {
    BackendError(error.to_string())
}

impl TierBackend for RemoteBackend {
    fn is_known_to_hold(&self, _key: EntryKey) -> Option<bool> {
        None
    }

    fn contains(&self, key: EntryKey) -> StoreFuture<'_, Result<bool, BackendError>> {
        Box::pin(async move { self.operator.exists(&key.path()).await.map_err(failed) })
    }

    fn get(&self, key: EntryKey, num_bytes_max: usize) -> StoreFuture<'_, Result<Option<Bytes>, BackendError>> {
        Box::pin(async move {
            let path = key.path();
            // No more than this is taken in, whatever lies there.
            let read = self.operator.read_with(&path).range(0..num_bytes_max as u64).await;
            let error = match read {
                Ok(buffer) => return Ok(Some(buffer.to_bytes())),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                Err(error) => error,
            };
            // Some kinds of storage answer a range beyond the end with an error: then it is the entry that is bad.
            match self.operator.stat(&path).await {
                Ok(metadata) if metadata.content_length() < num_bytes_max as u64 => Ok(Some(Bytes::new())),
                _ => Err(failed(error)),
            }
        })
    }

    fn put(&self, key: EntryKey, bytes: Bytes) -> StoreFuture<'_, Result<(), BackendError>> {
        Box::pin(async move {
            let num_bytes = bytes.len() as u64;
            self.operator.write(&key.path(), bytes).await.map_err(failed)?;
            if let Some(sweeper) = &self.sweeper {
                sweeper.on_written(num_bytes);
            }
            Ok(())
        })
    }

    fn remove(&self, key: EntryKey) -> StoreFuture<'_, Result<(), BackendError>> {
        Box::pin(async move { self.operator.delete(&key.path()).await.map_err(failed) })
    }

    fn evicted_bytes(&self) -> Option<u64> {
        Some(self.sweeper.as_ref()?.evicted_bytes())
    }

    fn used_bytes(&self) -> Option<u64> {
        self.sweeper.as_ref()?.used_bytes()
    }
}
