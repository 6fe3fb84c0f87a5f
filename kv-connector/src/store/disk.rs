//! Entries on a local disk: foyer's block engine, in a folder of this node alone. They outlive the process.
//!
//! foyer writes regions of the folder's files one after the other and gives up whole regions, the oldest first.
//! What it forgets was not promised: an entry that a restart brings back although it was removed is checked like
//! any other, and a bad one is removed again.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use common::content::ContentKey;
use foyer::{
    BlockEngineConfig, Code, DeviceBuilder, EvictionInfo, EvictionPicker, FifoPicker, FsDeviceBuilder, HybridCache,
    HybridCacheBuilder, HybridCachePolicy, InvalidRatioPicker, Load, RecoverMode,
};

use tokio::sync::Semaphore;

use super::backend::{BackendError, EntryKey, StoreFuture, TierBackend};

/// A region is given up as a whole: as foyer suggests where the budget is large.
const REGION_BYTES_MAX: usize = 16 << 20;
/// Fewer regions than this would give up a large part of everything at once.
const NUM_REGIONS_MIN: usize = 8;
/// Files and what is written to them are multiples of it.
const PAGE_BYTES: usize = 4096;
/// What foyer puts around an entry, with room to spare.
const OVERHEAD_BYTES: usize = 2 * PAGE_BYTES;
/// A length beyond it, read from the disk, is no length of an entry.
const STORED_BYTES_MAX: u64 = 1 << 30;
/// Entries that were read are not kept in memory here; that is the host tier's business.
const MEMORY_BYTES: usize = 1;

/// Why a disk tier cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenDiskError {
    /// Not even a few entries fit.
    #[error("--store-disk-bytes is {budget_bytes}, expected at least {num_bytes_min} for this model's KV")]
    TooSmall {
        /// What was given.
        budget_bytes: u64,
        /// What is needed.
        num_bytes_min: u64,
    },
    /// Somebody else has the folder.
    #[error("{} is in use by another process: give each node a --node-id or a --store-disk-path of its own", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// The file system does not do it.
    #[error("cannot use {} as --store-disk-path: {reason}", path.display())]
    Unusable {
        /// The folder.
        path: PathBuf,
        /// What it said.
        reason: String,
    },
}

/// A folder with a budget.
pub struct DiskBackend {
    cache: HybridCache<EntryKey, Stored>,
    /// One permit for each entry on its way to the disk.
    writes: Semaphore,
    evicted_bytes: Arc<AtomicU64>,
    /// Locked while this lives.
    _lock: File,
}

impl DiskBackend {
    /// Whether `folder` can be made, written to and had for this process alone; it is let go again.
    ///
    /// # Errors
    /// [`OpenDiskError`].
    pub fn check_folder(folder: &Path) -> Result<(), OpenDiskError> {
        lock(folder).map(drop)
    }

    /// Opens `folder`, with what an earlier process left in it, for entries of `entry_bytes`.
    ///
    /// # Errors
    /// [`OpenDiskError`].
    pub async fn open(folder: &Path, budget_bytes: u64, entry_bytes: usize) -> Result<Self, OpenDiskError> {
        let region_bytes = region_bytes(budget_bytes, entry_bytes)?;
        let unusable = |reason: String| OpenDiskError::Unusable { path: folder.to_path_buf(), reason };
        let lock = lock(folder)?;
        let files = folder.join(format!("v1-{}-{region_bytes}", budget_bytes));
        // Left under another budget: nobody would read it, and it would count for nothing.
        remove_others(folder, &files).map_err(|error| unusable(error.to_string()))?;
        let device = FsDeviceBuilder::new(&files).with_capacity(budget_bytes as usize).build();
        let device = device.map_err(|error| unusable(error.to_string()))?;
        let evicted_bytes = Arc::<AtomicU64>::default();
        let count = CountEvicted { evicted_bytes: evicted_bytes.clone(), region_bytes: region_bytes as u64 };
        let buffer_bytes = (4 * (entry_bytes + OVERHEAD_BYTES)).max(REGION_BYTES_MAX);
        let engine = BlockEngineConfig::new(device)
            .with_block_size(region_bytes)
            .with_buffer_pool_size(buffer_bytes)
            .with_submit_queue_size_threshold(2 * buffer_bytes)
            // The place to change how regions are chosen that go.
            .with_eviction_pickers(vec![
                Box::new(count),
                Box::new(InvalidRatioPicker::new(0.8)),
                Box::<FifoPicker>::default(),
            ]);
        let cache = HybridCacheBuilder::new()
            .with_name("tandem-store-disk")
            .with_policy(HybridCachePolicy::WriteOnInsertion)
            .with_flush_on_close(false)
            .memory(MEMORY_BYTES)
            .with_shards(1)
            .with_weighter(|_: &EntryKey, value: &Stored| value.0.len())
            .storage()
            .with_engine_config(engine)
            .with_recover_mode(RecoverMode::Quiet)
            .build()
            .await
            .map_err(|error| unusable(error.to_string()))?;
        // Half of what the buffer takes: two at least.
        let writes = Semaphore::new(buffer_bytes / (entry_bytes + OVERHEAD_BYTES) / 2);
        Ok(Self { cache, writes, evicted_bytes, _lock: lock })
    }
}

/// Regions as large as they may be, a few entries at least, and at least a few of them.
fn region_bytes(budget_bytes: u64, entry_bytes: usize) -> Result<usize, OpenDiskError> {
    let smallest = (entry_bytes + OVERHEAD_BYTES).next_multiple_of(PAGE_BYTES);
    let share = (budget_bytes / NUM_REGIONS_MIN as u64) as usize / PAGE_BYTES * PAGE_BYTES;
    if share < smallest {
        let num_bytes_min = (smallest * NUM_REGIONS_MIN) as u64;
        return Err(OpenDiskError::TooSmall { budget_bytes, num_bytes_min });
    }
    Ok(share.min(REGION_BYTES_MAX.max(4 * smallest)))
}

fn lock(folder: &Path) -> Result<File, OpenDiskError> {
    let unusable =
        |error: std::io::Error| OpenDiskError::Unusable { path: folder.to_path_buf(), reason: error.to_string() };
    fs::create_dir_all(folder).map_err(unusable)?;
    let file = File::create(folder.join("lock")).map_err(unusable)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(OpenDiskError::InUse { path: folder.to_path_buf() }),
        Err(fs::TryLockError::Error(error)) => Err(unusable(error)),
    }
}

/// Removes what this module made here with other sizes, and nothing else.
fn remove_others(folder: &Path, own: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let is_ours = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("v1-"));
        if is_ours && path != own && path.is_dir() {
            fs::remove_dir_all(path)?;
        }
    }
    Ok(())
}

impl TierBackend for DiskBackend {
    fn is_known_to_hold(&self, key: EntryKey) -> Option<bool> {
        Some(self.cache.storage().may_contains(&key))
    }

    fn contains(&self, key: EntryKey) -> StoreFuture<'_, Result<bool, BackendError>> {
        Box::pin(async move { Ok(self.cache.storage().may_contains(&key)) })
    }

    fn get(&self, key: EntryKey, num_bytes_max: usize) -> StoreFuture<'_, Result<Option<Bytes>, BackendError>> {
        Box::pin(async move {
            let cut = |bytes: &Bytes| Some(bytes.slice(..bytes.len().min(num_bytes_max)));
            match self.cache.storage().load(&key).await {
                Ok(Load::Entry { value, .. }) => Ok(cut(&value.0)),
                Ok(Load::Piece { piece, .. }) => Ok(cut(&piece.value().0)),
                Ok(Load::Miss | Load::Throttled) => Ok(None),
                // Its own checksum, or a read that failed: this entry is lost, which says little of others.
                Err(error) => {
                    tracing::warn!(%error, "an entry on the disk cannot be read and is removed");
                    self.cache.storage().delete(&key);
                    Ok(None)
                }
            }
        })
    }

    fn put(&self, key: EntryKey, bytes: Bytes) -> StoreFuture<'_, Result<(), BackendError>> {
        Box::pin(async move {
            // foyer silently forgets what exceeds its own buffer, so no more goes in than fits, until it is written.
            let _place = self.writes.acquire().await.expect("it is never closed");
            drop(self.cache.storage_writer(key).force().insert(Stored(bytes)));
            self.cache.storage().wait().await;
            Ok(())
        })
    }

    fn remove(&self, key: EntryKey) -> StoreFuture<'_, Result<(), BackendError>> {
        Box::pin(async move {
            self.cache.storage().delete(&key);
            Ok(())
        })
    }

    fn close(&self) -> StoreFuture<'_, ()> {
        Box::pin(async {
            if let Err(error) = self.cache.close().await {
                tracing::warn!(%error, "the disk tier was not closed cleanly; what it lost is a miss");
            }
        })
    }

    fn evicted_bytes(&self) -> Option<u64> {
        Some(self.evicted_bytes.load(Ordering::Relaxed))
    }
}

/// Counts regions that are given up; leaves the choice to the pickers behind it.
#[derive(Debug)]
struct CountEvicted {
    evicted_bytes: Arc<AtomicU64>,
    region_bytes: u64,
}

impl EvictionPicker for CountEvicted {
    fn pick(&mut self, _: EvictionInfo<'_>) -> Option<u32> {
        None
    }

    fn on_block_evictable(&mut self, _: EvictionInfo<'_>, _: u32) {}

    fn on_block_evict(&mut self, _: EvictionInfo<'_>, _: u32) {
        self.evicted_bytes.fetch_add(self.region_bytes, Ordering::Relaxed);
    }
}

/// An entry's bytes as foyer writes them: their number, and they.
struct Stored(Bytes);

impl Code for Stored {
    fn encode(&self, writer: &mut impl Write) -> foyer::Result<()> {
        let num_bytes = (self.0.len() as u64).to_le_bytes();
        writer.write_all(&num_bytes).and_then(|()| writer.write_all(&self.0)).map_err(foyer::Error::io_error)
    }

    fn decode(reader: &mut impl Read) -> foyer::Result<Self> {
        let mut num_bytes = [0; 8];
        reader.read_exact(&mut num_bytes).map_err(foyer::Error::io_error)?;
        // Reserves nothing on the word of a disk: it grows with what is really there.
        let num_bytes = u64::from_le_bytes(num_bytes).min(STORED_BYTES_MAX);
        let mut bytes = Vec::new();
        reader.take(num_bytes).read_to_end(&mut bytes).map_err(foyer::Error::io_error)?;
        Ok(Self(bytes.into()))
    }

    fn estimated_size(&self) -> usize {
        8 + self.0.len()
    }
}

impl Code for EntryKey {
    fn encode(&self, writer: &mut impl Write) -> foyer::Result<()> {
        let written = writer.write_all(&self.content.0.to_le_bytes());
        written.and_then(|()| writer.write_all(&self.tag.to_le_bytes())).map_err(foyer::Error::io_error)
    }

    fn decode(reader: &mut impl Read) -> foyer::Result<Self> {
        let mut number = || {
            let mut bytes = [0; 16];
            reader.read_exact(&mut bytes).map(|()| u128::from_le_bytes(bytes)).map_err(foyer::Error::io_error)
        };
        Ok(Self { content: ContentKey(number()?), tag: number()? })
    }

    fn estimated_size(&self) -> usize {
        32
    }
}
