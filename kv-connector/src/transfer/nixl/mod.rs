//! `nixl`: KV fetched through NVIDIA's NIXL library, which carries it over UCX: InfiniBand, RoCE, memory of one host, TCP.
//!
//! The library is loaded at run time, by its C interface ([`library`]); a node that is to use it and cannot does not
//! start. The sender registers its pool, and its agent's metadata is what receivers get over the bulk connection. A
//! receiver reads into memory of its own ([`staging`]) and copies and hashes from there into the blocks: NIXL cannot
//! always prove that a read has stopped, and so no node has it write to a block. A read that does not end well costs its
//! buffer, and this transport for that life of the peer; KV comes over `quic` then.
//!
//! **NIXL authenticates nobody and encrypts nothing, and what is registered can be written as well as read.** Whoever has
//! the metadata, or reaches what UCX listens on, may read and write the memory of the process: it is off unless
//! `--kv-transports` lists it, and belongs on a network that nobody else reaches. The digest of an extent proves what
//! arrived, not that nobody writes to the block later.
//!
//! Pools in hosts' memory only, so far.

mod library;
mod staging;

use std::collections::HashMap;
use std::ffi::CString;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use common::device_pool::ExportedPool;
use common::kv_memory::KvMemory;
use common::wire::PoolRun;

use self::library::{Agent, Library};
use self::staging::{Borrowed, HALF_BYTES, NUM_LOST_MAX, Staging};
use crate::accounting::Carrier;
use crate::transfer::Arriving;
use crate::transfer::pull::{NUM_PULLS_MAX, PullError, PullMethod, PulledPool};
use crate::turns;

/// Copied and hashed at a time; as long as closing a landing waits.
const SLICE_BYTES: usize = 64 << 10;

/// NIXL cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NixlError {
    /// The library is not there, or is another.
    #[error(
        "NIXL cannot be loaded ({0}): install it so that {path} is found (LD_LIBRARY_PATH, --nixl-library), or take nixl out of --kv-transports",
        path = .1
    )]
    Library(String, String),
    /// It is there, and does not work.
    #[error(
        "NIXL is there and does not work ({0}): NIXL_LOG_LEVEL=INFO and UCX_LOG_LEVEL=info make it say more; without it, take nixl out of --kv-transports"
    )]
    Refused(String),
    /// The pool is not in this host's memory.
    #[error(
        "the KV pool is in a device's memory, which nixl does not read yet: take nixl out of --kv-transports, cuda-ipc and quic serve such pools"
    )]
    NotInHostMemory,
}

/// This node's pool, registered with an agent of NIXL. Cheap to clone.
#[derive(Clone)]
pub struct Nixl {
    inner: Arc<Inner>,
    memory: Arc<dyn KvMemory>,
    address: usize,
    num_bytes: usize,
}

/// What reads: the agent goes first, then what it may have written to.
struct Inner {
    agent: Agent,
    free: Mutex<Vec<Staging>>,
    num_lost: AtomicUsize,
    /// Agents of peers whose pools are open, by name.
    peers: Mutex<HashMap<CString, Weak<Peer>>>,
    /// What peers read.
    _memory: Arc<dyn KvMemory>,
}

impl Inner {
    fn free(&self) -> MutexGuard<'_, Vec<Staging>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A staging for one that is lost.
    #[allow(unsafe_code)] // what is registered stays as long as the agent
    fn replace_lost(&self) -> Result<(), String> {
        if self.num_lost.fetch_add(1, Ordering::SeqCst) >= NUM_LOST_MAX {
            return Err(format!("{NUM_LOST_MAX} reads did not end, no more are replaced"));
        }
        let staging = Staging::new();
        let (address, num_bytes) = staging.place();
        // SAFETY: it goes to those that are dropped behind the agent, or is lost for ever.
        if let Err(reason) = unsafe { self.agent.register(address, num_bytes) } {
            std::mem::forget(staging);
            return Err(reason);
        }
        self.free().push(staging);
        Ok(())
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<CString, Weak<Peer>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Nixl {
    /// Loads the library at `path`, and registers the `num_bytes` of `memory`, to which nobody writes meanwhile.
    ///
    /// # Errors
    /// [`NixlError`].
    #[allow(unsafe_code)] // what is registered stays as long as the agent
    pub fn new(path: &Path, memory: Arc<dyn KvMemory>, num_bytes: usize) -> Result<Self, NixlError> {
        let library = Library::load(path).map_err(|reason| NixlError::Library(reason, path.display().to_string()))?;
        let address = memory.bytes_at(0, num_bytes).ok_or(NixlError::NotInHostMemory)?.as_ptr() as usize;
        let name = CString::new(format!("tandem-{:032x}", rand::random::<u128>())).expect("digits have no zero byte");
        // NIXL's own threads move KV, too, and inherit how this one is scheduled.
        let created = std::thread::scope(|scope| {
            let creating = scope.spawn(|| {
                turns::step_behind();
                Agent::new(library, &name)
            });
            creating.join().expect("it returns its errors")
        });
        let inner = Arc::new(Inner {
            agent: created.map_err(NixlError::Refused)?,
            num_lost: AtomicUsize::new(0),
            free: Mutex::new((0..NUM_PULLS_MAX).map(|_| Staging::new()).collect()),
            peers: Mutex::default(),
            _memory: memory.clone(),
        });
        let staged: Vec<_> = inner.free().iter().map(Staging::place).collect();
        for (address, num_bytes) in [(address, num_bytes)].into_iter().chain(staged) {
            // SAFETY: the memory and the stagings are `inner`'s, which drops its agent first.
            unsafe { inner.agent.register(address, num_bytes) }.map_err(NixlError::Refused)?;
        }
        Ok(Self { inner, memory, address, num_bytes })
    }
}

impl PullMethod for Nixl {
    fn carrier(&self) -> Carrier {
        Carrier::Nixl
    }

    fn question(&self) -> [u8; 4] {
        *b"TKNX"
    }

    fn is_within_host(&self) -> bool {
        false
    }

    fn handle_bytes_max(&self) -> usize {
        32 << 10
    }

    fn memory(&self) -> &Arc<dyn KvMemory> {
        &self.memory
    }

    /// Where the pool begins, and the agent's metadata.
    fn export(&self) -> Result<ExportedPool, String> {
        let mut handle = (self.address as u64).to_le_bytes().to_vec();
        handle.extend(self.inner.agent.metadata()?);
        Ok(ExportedPool { handle, num_bytes: self.num_bytes as u64 })
    }

    fn open_peer(&self, exported: &ExportedPool) -> Result<Arc<dyn PulledPool>, String> {
        let (address, metadata) = exported.handle.split_first_chunk().ok_or("a handle without an address")?;
        let address = u64::from_le_bytes(*address);
        address.checked_add(exported.num_bytes).ok_or("a pool that goes beyond the last address")?;
        let mut peers = self.inner.peers();
        let name = self.inner.agent.add_peer(metadata)?;
        // Of a peer that has connected again while the pool is open for its connection before.
        if let Some(peer) = peers.get(&name).and_then(Weak::upgrade) {
            // Before the peer, which takes the lock if this is the last to hold it.
            drop(peers);
            let is_same = (peer.address, peer.num_bytes) == (address, exported.num_bytes);
            return if is_same { Ok(peer) } else { Err("an agent whose pool is open at another place".to_string()) };
        }
        let inner = self.inner.clone();
        let num_bytes = exported.num_bytes;
        let peer = Arc::new(Peer { inner, name: name.clone(), address, num_bytes, is_lost: AtomicBool::new(false) });
        peers.insert(name, Arc::downgrade(&peer));
        Ok(peer)
    }
}

/// A peer's pool.
struct Peer {
    inner: Arc<Inner>,
    name: CString,
    address: u64,
    num_bytes: u64,
    /// Something may still be read from it.
    is_lost: AtomicBool,
}

impl Drop for Peer {
    fn drop(&mut self) {
        if self.is_lost.load(Ordering::SeqCst) {
            return;
        }
        let mut peers = self.inner.peers();
        // Unless it was opened again.
        if peers.get(&self.name).is_some_and(|peer| peer.strong_count() == 0) {
            peers.remove(&self.name);
            self.inner.agent.forget_peer(&self.name);
        }
    }
}

impl PulledPool for Peer {
    fn num_bytes(&self) -> u64 {
        self.num_bytes
    }

    fn pull(&self, runs: &[PoolRun], arriving: &mut Arriving) -> Result<(), PullError> {
        let batches = batches(runs);
        let pieces = |batch: &[PoolRun]| -> Vec<(usize, usize)> {
            batch.iter().map(|run| ((self.address + run.offset) as usize, run.num_bytes as usize)).collect()
        };
        let mut staging = Borrowed::new(self)?;
        for (index, batch) in batches.iter().enumerate() {
            if index == 0 {
                staging.begin(index, &pieces(batch))?;
            }
            staging.wait()?;
            if let Some(next) = batches.get(index + 1) {
                staging.begin(index + 1, &pieces(next))?;
            }
            let (mut offset, end) = (0, batch.iter().map(|run| run.num_bytes as usize).sum());
            while offset < end {
                arriving.fill(SLICE_BYTES.min(end - offset), |into| {
                    staging.copy_out(index, offset, into);
                    offset += into.len();
                })?;
                turns::give_way();
            }
        }
        Ok(())
    }
}

/// Runs in order, cut into lots of at most half a staging.
fn batches(runs: &[PoolRun]) -> Vec<Vec<PoolRun>> {
    let (mut batches, mut batch, mut room) = (Vec::new(), Vec::new(), HALF_BYTES);
    for run in runs {
        let (mut offset, end) = (run.offset, run.end());
        while offset < end {
            let num_bytes = room.min((end - offset) as usize);
            batch.push(PoolRun { offset, num_bytes: num_bytes as u32 });
            offset += num_bytes as u64;
            room -= num_bytes;
            if room == 0 {
                batches.push(std::mem::take(&mut batch));
                room = HALF_BYTES;
            }
        }
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lots_hold_all_bytes_in_order_and_none_is_too_large() {
        let run = |offset: u64, num_bytes: usize| PoolRun { offset, num_bytes: num_bytes as u32 };
        for runs in [
            vec![],
            vec![run(7, 1)],
            vec![run(0, HALF_BYTES)],
            vec![run(64, HALF_BYTES - 1), run(1 << 30, 2)],
            vec![run(0, 3 * HALF_BYTES + 5), run(1 << 40, HALF_BYTES), run(9, 10)],
        ] {
            let batches = batches(&runs);
            let size = |batch: &Vec<PoolRun>| batch.iter().map(|run| run.num_bytes as usize).sum::<usize>();
            assert!(batches.iter().all(|batch| (1..=HALF_BYTES).contains(&size(batch))));
            let every = |runs: &[PoolRun]| -> Vec<u64> {
                let ends = runs.iter().flat_map(|run| [run.offset, run.end()]).collect::<Vec<_>>();
                // Neighbours joined: where one ends and the next begins at the same place.
                let mut joined: Vec<u64> = Vec::new();
                for pair in ends.chunks(2) {
                    if joined.last() == Some(&pair[0]) {
                        joined.pop();
                    } else {
                        joined.push(pair[0]);
                    }
                    joined.push(pair[1]);
                }
                joined
            };
            assert_eq!(every(&batches.concat()), every(&runs));
        }
    }
}
