//! Pools that count as a device's: a file in memory stands for what a driver lets other processes open.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::content::PrefixDigest;
use common::device_pool::{DevicePool, ExportedPool, MemoryPlace, PeerPool, StagingMemory};
use common::ids::{Attempt, BlockId, Generation, RequestId};
use common::kv_memory::KvMemory;
use common::wire::{ExtentBinding, ExtentHasher, PoolRun};

use super::file_pool::FilePool;
use super::{GRANULE_BYTES, Job, TestMemory};

/// Another memory, whose bytes the host sees by copies only.
pub struct OnDevice {
    memory: Arc<dyn KvMemory>,
    /// What others may open.
    file: Option<(OwnedFd, u64)>,
    before_copy: Mutex<Option<Box<dyn FnMut() + Send>>>,
    is_failing: AtomicBool,
    is_said_to_be_gpu: AtomicBool,
    /// Of copies: how many are at the device now, and how many were at most.
    num_copying: AtomicUsize,
    num_copying_most: AtomicUsize,
}

impl OnDevice {
    /// A sender's.
    pub fn exported(pool: &Arc<FilePool>) -> Arc<Self> {
        let file = pool.shared().file.try_clone().unwrap();
        Arc::new(Self::over(pool.clone(), Some((file, pool.num_bytes()))))
    }

    /// A receiver's.
    pub fn new(memory: &Arc<TestMemory>) -> Arc<Self> {
        Arc::new(Self::over(memory.clone(), None))
    }

    fn over(memory: Arc<dyn KvMemory>, file: Option<(OwnedFd, u64)>) -> Self {
        Self {
            memory,
            file,
            before_copy: Mutex::default(),
            is_failing: AtomicBool::new(false),
            is_said_to_be_gpu: AtomicBool::new(false),
            num_copying: AtomicUsize::new(0),
            num_copying_most: AtomicUsize::new(0),
        }
    }

    /// From now on it says that its memory is a GPU's, which it is not.
    pub fn claim_to_be_gpu(&self) {
        self.is_said_to_be_gpu.store(true, Ordering::SeqCst);
    }

    fn gpu(&self) -> Option<u32> {
        self.is_said_to_be_gpu.load(Ordering::SeqCst).then_some(0)
    }

    /// Runs `act` before every copy into it, whoever makes it.
    pub fn before_copies(&self, act: impl FnMut() + Send + 'static) {
        *self.before_copy.lock().unwrap() = Some(Box::new(act));
    }

    /// The device is about to copy.
    fn copies(&self) -> Result<(), String> {
        let num_copying = self.num_copying.fetch_add(1, Ordering::SeqCst) + 1;
        self.num_copying_most.fetch_max(num_copying, Ordering::SeqCst);
        self.act();
        self.num_copying.fetch_sub(1, Ordering::SeqCst);
        if self.is_failing.load(Ordering::SeqCst) {
            return Err("the device has fallen off the bus".to_string());
        }
        Ok(())
    }

    fn act(&self) {
        if let Some(act) = self.before_copy.lock().unwrap().as_mut() {
            act();
        }
    }

    /// From now on every copy fails.
    pub fn fail_copies(&self) {
        self.is_failing.store(true, Ordering::SeqCst);
    }

    /// Copies that are at the device now; it makes one at a time.
    pub fn num_copying(&self) -> usize {
        self.num_copying.load(Ordering::SeqCst)
    }

    /// The most of them that there ever were.
    pub fn num_copying_most(&self) -> usize {
        self.num_copying_most.load(Ordering::SeqCst)
    }
}

/// XXH3 as every digest of an extent has it in it.
fn hashed(bytes: &[u8]) -> u128 {
    let extent = Job::new(1, 16, 0, 0).extent(0, 0, 16);
    let (request, attempt, generation, content) = (RequestId(0), Attempt(0), Generation(0), PrefixDigest([0; 32]));
    let mut hasher = ExtentHasher::new(&ExtentBinding { request, attempt, generation, extent, content });
    hasher.update(bytes);
    hasher.digest().0 ^ hasher.digest_of_hashed(0).0
}

/// What is worth a copy to it: no whole number of granules.
pub const GATHERED_BYTES: usize = 3000;

impl KvMemory for OnDevice {
    fn gathered_bytes(&self) -> Option<usize> {
        Some(GATHERED_BYTES)
    }

    fn write_at(&self, layer: u32, blocks: &[BlockId], first_granule: usize, byte_offset: usize, bytes: &[u8]) {
        self.act();
        self.memory.write_at(layer, blocks, first_granule, byte_offset, bytes);
    }

    fn read_granules(&self, layer: u32, blocks: &[BlockId], first_granule: usize, num_granules: usize, out: &mut [u8]) {
        self.memory.read_granules(layer, blocks, first_granule, num_granules, out);
    }

    fn visit_granules(
        &self,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        num_granules: usize,
        visit: &mut dyn FnMut(u64, &[u8]),
    ) {
        self.memory.visit_granules(layer, blocks, first_granule, num_granules, visit);
    }

    fn hash_granules(&self, layer: u32, blocks: &[BlockId], first_granule: usize, num_granules: usize) -> Option<u128> {
        let mut bytes = vec![0; num_granules * GRANULE_BYTES];
        self.memory.read_granules(layer, blocks, first_granule, num_granules, &mut bytes);
        Some(hashed(&bytes))
    }

    fn granule_bytes(&self) -> usize {
        self.memory.granule_bytes()
    }

    fn num_layers(&self) -> usize {
        self.memory.num_layers()
    }
}

impl DevicePool for OnDevice {
    fn export(&self) -> Result<ExportedPool, String> {
        let (file, num_bytes) = self.file.as_ref().ok_or("this pool is nobody's to see")?;
        let handle = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into_bytes();
        Ok(ExportedPool { handle, num_bytes: *num_bytes })
    }

    fn open_peer(self: Arc<Self>, exported: &ExportedPool) -> Result<Arc<dyn PeerPool>, String> {
        let path = String::from_utf8(exported.handle.clone()).map_err(|error| error.to_string())?;
        let file = File::open(path).map_err(|error| error.to_string())?;
        Ok(Arc::new(Opened { file, num_bytes: exported.num_bytes, own: self }))
    }

    fn place(&self) -> Result<MemoryPlace, String> {
        let (_, num_bytes) = self.file.as_ref().ok_or("this pool is nobody's to see")?;
        let bytes = self.memory.bytes_at(0, *num_bytes as usize).unwrap();
        Ok(MemoryPlace { address: bytes.as_ptr() as u64, num_bytes: *num_bytes, gpu: self.gpu() })
    }

    fn staging(self: Arc<Self>, num_bytes: usize) -> Result<Box<dyn StagingMemory>, String> {
        let words = (0..num_bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect();
        Ok(Box::new(Staging { words, own: self }))
    }

    fn enter(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Written to behind the program's back.
struct Staging {
    words: Vec<AtomicU64>,
    own: Arc<OnDevice>,
}

impl Staging {
    fn bytes(&self, range: Range<usize>) -> Vec<u8> {
        let first = range.start / 8;
        let words = self.words[first..range.end.div_ceil(8)].iter();
        let bytes: Vec<u8> = words.flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
        bytes[range.start - first * 8..range.end - first * 8].to_vec()
    }
}

impl StagingMemory for Staging {
    fn place(&self) -> MemoryPlace {
        let (address, num_bytes) = (self.words.as_ptr() as u64, self.words.len() as u64 * 8);
        MemoryPlace { address, num_bytes, gpu: self.own.gpu() }
    }

    fn copy_to_blocks(
        &self,
        from: Range<usize>,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        byte_offset: usize,
    ) -> Result<(), String> {
        self.own.copies()?;
        self.own.memory.write_at(layer, blocks, first_granule, byte_offset, &self.bytes(from));
        Ok(())
    }

    fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), String> {
        into.copy_from_slice(&self.bytes(offset..offset + into.len()));
        Ok(())
    }
}

struct Opened {
    file: File,
    num_bytes: u64,
    own: Arc<OnDevice>,
}

impl PeerPool for Opened {
    fn num_bytes(&self) -> u64 {
        self.num_bytes
    }

    fn copy_granules(
        &self,
        runs: &[PoolRun],
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
    ) -> Result<(), String> {
        self.own.copies()?;
        let mut bytes = Vec::new();
        for run in runs {
            let start = bytes.len();
            bytes.resize(start + run.num_bytes as usize, 0);
            self.read(run.offset, &mut bytes[start..])?;
        }
        self.own.memory.write_at(layer, blocks, first_granule, 0, &bytes);
        Ok(())
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), String> {
        self.file.read_exact_at(into, offset).map_err(|error| error.to_string())
    }
}
