//! `nixl`: KV fetched through NVIDIA's NIXL library, which carries it over UCX: InfiniBand, RoCE, memory of one host, TCP;
//! between pools of hosts and of GPUs in any pairing.
//!
//! The library is loaded at run time, by its C interface ([`library`]); a node that is to use it and cannot does not
//! start. The sender registers its pool, and where that lies and its agent's metadata is what receivers get over the bulk
//! connection ([`handle`]). A receiver [fetches](fetch) into memory of its own ([`staging`]), on its device if its pool is
//! on one, and from there into the blocks, hashed as they are filled or, on a device, where they lie then: NIXL cannot
//! always prove that a read has stopped, and so no node has it write to a block. A read that does not end well costs its
//! buffer ([`stock`]), and this transport for that life of the peer; KV comes over `quic` then. An extent that comes while
//! no buffer is left is asked for over `quic`, and the next is fetched again.
//!
//! **NIXL authenticates nobody and encrypts nothing, and what is registered can be written as well as read.** So a pool is
//! registered only where peers fetch out of it. Whoever has the metadata, or reaches what UCX listens on, may read and
//! write the memory of the process: it is off unless `--kv-transports` lists it, and belongs on a network that nobody else
//! reaches. The digest of an extent proves what arrived, not that nobody writes to the block later.

mod fetch;
mod handle;
mod library;
mod staging;
mod stock;

use std::collections::HashMap;
use std::ffi::CString;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use common::device_pool::{DevicePool, ExportedPool, MemoryPlace};
use common::kv_memory::KvMemory;
use common::wire::PoolRun;

use self::library::{Agent, Library};
use self::stock::Stock;
use crate::accounting::Carrier;
use crate::transfer::Arriving;
use crate::transfer::pull::{PullError, PullMethod, PulledPool};
use crate::turns;

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
    /// It works, but not with memory of this node's device.
    #[error(
        "NIXL cannot be used with the KV pool's device ({0}): its UCX needs support for CUDA, which NIXL_LOG_LEVEL=INFO and UCX_LOG_LEVEL=info tell of"
    )]
    NoDevice(String),
    /// The pool's memory can be registered nowhere.
    #[error("the KV pool keeps its bytes where no network can read them: take nixl out of --kv-transports")]
    NotInPlace,
}

/// A node's KV pool, by what its memory is.
#[derive(Clone)]
pub enum NixlPool {
    /// The host's.
    Host {
        /// The pool.
        memory: Arc<dyn KvMemory>,
        /// Its size.
        num_bytes: usize,
    },
    /// A device's.
    Device(Arc<dyn DevicePool>),
}

impl NixlPool {
    fn memory(&self) -> Arc<dyn KvMemory> {
        match self {
            NixlPool::Host { memory, .. } => memory.clone(),
            NixlPool::Device(pool) => pool.clone(),
        }
    }

    fn place(&self) -> Result<MemoryPlace, NixlError> {
        match self {
            NixlPool::Host { memory, num_bytes } => {
                let bytes = memory.bytes_at(0, *num_bytes).ok_or(NixlError::NotInPlace)?;
                Ok(MemoryPlace { address: bytes.as_ptr() as u64, num_bytes: bytes.len() as u64, gpu: None })
            }
            NixlPool::Device(pool) => pool.place().map_err(NixlError::NoDevice),
        }
    }

    /// Why NIXL is of no use with it.
    fn refused(&self, reason: String) -> NixlError {
        match self {
            NixlPool::Host { .. } => NixlError::Refused(reason),
            NixlPool::Device(_) => NixlError::NoDevice(reason),
        }
    }
}

/// What fetches into this node's pool, and lets peers fetch out of it, if so. Cheap to clone.
#[derive(Clone)]
pub struct Nixl {
    inner: Arc<Inner>,
    memory: Arc<dyn KvMemory>,
    /// Of the pool, where peers fetch out of it.
    registered: Option<MemoryPlace>,
}

/// What reads: the agent goes first, then what it may have written to, and what peers read.
struct Inner {
    agent: Agent,
    stock: Mutex<Stock>,
    /// Agents of peers whose pools are open, by name.
    peers: Mutex<HashMap<CString, Weak<Peer>>>,
    pool: NixlPool,
}

impl Inner {
    fn stock(&self) -> MutexGuard<'_, Stock> {
        self.stock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<CString, Weak<Peer>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before the library is given anything to do with the pool's device by this thread.
    fn enter(&self) -> Result<(), String> {
        match &self.pool {
            NixlPool::Host { .. } => Ok(()),
            NixlPool::Device(pool) => pool.enter(),
        }
    }
}

impl Nixl {
    /// Loads the library at `path`. Where peers fetch out of `pool`, all of it is registered, which may take its time;
    /// else nobody can by NIXL.
    ///
    /// # Errors
    /// [`NixlError`]; [`NixlError::NoDevice`] only where the pool is on a device.
    pub fn new(path: &Path, pool: NixlPool, is_fetched_from: bool) -> Result<Self, NixlError> {
        let library = Library::load(path).map_err(|reason| NixlError::Library(reason, path.display().to_string()))?;
        Self::with(library, pool, is_fetched_from)
    }

    #[allow(unsafe_code)] // what is registered stays as long as the agent
    fn with(library: Library, pool: NixlPool, is_fetched_from: bool) -> Result<Self, NixlError> {
        let name = CString::new(format!("tandem-{:032x}", rand::random::<u128>())).expect("digits have no zero byte");
        // NIXL's own threads move KV, too, and inherit how this one is scheduled.
        let created = std::thread::scope(|scope| {
            let creating = scope.spawn(|| {
                turns::step_behind();
                Agent::new(library, &name)
            });
            creating.join().expect("it returns its errors")
        });
        let agent = created.map_err(NixlError::Refused)?;
        let (stock, peers) = (Mutex::default(), Mutex::default());
        let inner = Arc::new(Inner { agent, stock, peers, pool });
        let refused = |reason: String| inner.pool.refused(reason);
        inner.enter().map_err(refused)?;
        inner.fill_stock().map_err(refused)?;
        let registered = is_fetched_from.then(|| inner.pool.place()).transpose()?;
        if let Some(place) = registered {
            // SAFETY: the memory is that of the pool, which `inner` drops behind its agent.
            unsafe { inner.agent.register(place) }.map_err(refused)?;
        }
        Ok(Self { memory: inner.pool.memory(), registered, inner })
    }
}

impl PullMethod for Nixl {
    fn carrier(&self) -> Carrier {
        Carrier::Nixl
    }

    fn question(&self) -> [u8; 4] {
        *b"TKN3"
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

    fn export(&self) -> Result<ExportedPool, String> {
        let place = self.registered.ok_or("nobody fetches out of this pool")?;
        Ok(handle::encode(place, &self.inner.agent.metadata()?))
    }

    fn open_peer(&self, exported: &ExportedPool) -> Result<Arc<dyn PulledPool>, String> {
        let (pool, metadata) = handle::decode(exported)?;
        self.inner.enter()?;
        let mut peers = self.inner.peers();
        let name = self.inner.agent.add_peer(metadata)?;
        // Of a peer that has connected again while the pool is open for its connection before.
        if let Some(peer) = peers.get(&name).and_then(Weak::upgrade) {
            // Before the peer, which takes the lock if this is the last to hold it.
            drop(peers);
            let is_same = peer.pool == pool;
            return if is_same {
                Ok(Arc::new(Opened(peer)))
            } else {
                Err("an agent whose pool is open at another place".to_string())
            };
        }
        let peer = Arc::new(Peer { inner: self.inner.clone(), name: name.clone(), pool });
        peers.insert(name, Arc::downgrade(&peer));
        Ok(Arc::new(Opened(peer)))
    }
}

/// A peer, known to the agent for as long as this lives: as its pool is open, or something may still be read from it.
struct Peer {
    inner: Arc<Inner>,
    name: CString,
    pool: MemoryPlace,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let mut peers = self.inner.peers();
        // Unless it was opened again.
        if peers.get(&self.name).is_some_and(|peer| peer.strong_count() == 0) {
            peers.remove(&self.name);
            self.inner.agent.forget_peer(&self.name);
        }
    }
}

/// A peer's pool.
struct Opened(Arc<Peer>);

impl PulledPool for Opened {
    fn num_bytes(&self) -> u64 {
        self.0.pool.num_bytes
    }

    fn pull(&self, runs: &[PoolRun], arriving: &mut Arriving) -> Result<(), PullError> {
        fetch::fetch(&self.0, runs, arriving)
    }
}

#[cfg(test)]
mod tests {
    use common::ids::{BlockId, Epoch, Role};

    use super::library::fake::Fake;
    use super::staging::Staging;
    use super::stock::NUM_STAGINGS_MAX;
    use super::*;
    use crate::Fabric;
    use crate::test_support::file_pool::FilePool;
    use crate::test_support::{Cluster, Job, TestMemory, assert_nothing_left, eventually, node, soon};

    const NUM_BLOCKS: usize = 400;

    fn receiver(fake: &Fake, memory: &Arc<TestMemory>) -> Nixl {
        let pool = NixlPool::Host { memory: memory.clone(), num_bytes: 0 };
        Nixl::with(fake.library(), pool, false).unwrap()
    }

    fn take_all(nixl: &Nixl) -> Vec<Staging> {
        (0..NUM_STAGINGS_MAX).map(|_| nixl.inner.take_staging().unwrap()).collect()
    }

    #[test]
    fn what_is_left_of_buffers_is_not_counted_off_where_none_can_be_made() {
        let fake = Fake::alone();
        let nixl = receiver(&fake, &TestMemory::new(1));
        let taken: Vec<Staging> = (0..6).map(|_| nixl.inner.take_staging().unwrap()).collect();
        fake.register(false);
        for _ in 0..2 * NUM_STAGINGS_MAX {
            let refused = nixl.inner.take_staging().err();
            assert!(
                matches!(&refused, Some(PullError::Busy(reason)) if reason.contains("register_mem")),
                "{refused:?}"
            );
        }
        fake.register(true);
        taken.into_iter().for_each(|staging| nixl.inner.give_back(staging));
        let all = take_all(&nixl);
        assert!(matches!(nixl.inner.take_staging(), Err(PullError::Busy(_))));
        drop((all, nixl));
    }

    /// As where all buffers are lost to reads from peers that stand still, of which this one is none.
    #[tokio::test]
    async fn while_no_buffer_is_left_kv_comes_over_quic_and_behind_that_through_nixl_again() {
        let (fake, cluster) = (Fake::alone(), Cluster::new());
        let (pool, memory) = (FilePool::new(NUM_BLOCKS), TestMemory::new(NUM_BLOCKS));
        let sender = NixlPool::Host { memory: pool.clone(), num_bytes: pool.num_bytes() as usize };
        let own = receiver(&fake, &memory);
        let mut config = cluster.config("p0", Role::PrefillNode);
        config.nixl = Some(Nixl::with(fake.library(), sender, true).unwrap());
        let prefill = Fabric::bind(config).unwrap();
        let mut config = cluster.config("d0", Role::DecodeNode);
        config.nixl = Some(own.clone());
        let decode = Fabric::bind(config).unwrap();
        let link = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap();
        let zone = decode.landing_zone();
        let bulk = soon("bulk", decode.connect_bulk(&link, &zone)).await.unwrap();
        let sender = prefill.bulk_to(&node("d0"), Epoch(11)).unwrap();
        let mut lost = Vec::new();
        for request in 1..7 {
            let (job, num_posted) = (Job::new(request, 1000, 0, 60 * request as u32), fake.num_posted());
            let is_busy = request % 2 == 0;
            if is_busy {
                lost = take_all(&own);
            }
            let source = pool.source(&job, (0..job.blocks.len() as u32).map(BlockId).collect());
            let (landing, mut events) = zone.open(job.plan(&memory));
            for extent in job.extents(160) {
                let (header, payload) = source.seal(&job.tokens, extent);
                soon("send", sender.send_extent(&header, payload)).await.unwrap();
            }
            eventually("all has landed", || landing.is_complete()).await;
            assert!(job.extents(160).iter().all(|extent| job.holds(&memory, extent)));
            assert_eq!(fake.num_posted() == num_posted, is_busy);
            // That an extent came in another way is nothing that its owner hears of.
            while let Some(event) = events.try_recv() {
                assert!(matches!(event, crate::transfer::LandingEvent::ExtentVerified { .. }), "{event:?}");
            }
            assert!(bulk.transport_name() == "nixl" && sender.transport().name() == "nixl" && !bulk.is_closed());
            lost.drain(..).for_each(|staging| own.inner.give_back(staging));
        }
        drop((bulk, sender, link, zone, own));
        assert_nothing_left([prefill, decode]).await;
    }
}
