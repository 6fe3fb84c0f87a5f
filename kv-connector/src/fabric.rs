//! The fabric of one node: its sockets, whom it dials, and what it accepts.
//!
//! ```text
//! listen         control socket    dials and accepts links           streams of messages
//! bulk_listen    bulk sockets      accept bulk connections           exchange KV with whoever dialled
//! (any port)     bulk sockets      dial bulk connections             exchange KV with whom it dialled
//! ```
//!
//! Of the bulk sockets there are as many as this node makes connections to one peer. Those that listen share a port,
//! where the kernel divides peers and their connections among them; of those that dial, each of a peer's connections
//! has another one.
//!
//! A bulk connection carries extents both ways, so a node that is only dialled out from (a decode node behind
//! its own firewall) can still be asked for KV it holds. Each end reads what arrives only while it has a share
//! of its receive memory for the connection.
//!
//! Control and bulk never share a connection, a socket or a thread: a send window is per connection, and KV must
//! not be able to hold a message back. Links are served on the runtime that [`Fabric::bind`] is called in, bulk
//! connections on `kv_threads`, started with the first bulk socket.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use common::config::{KV_CONNECTIONS_MAX, KvQuicArgs};
use common::device_pool::DevicePool;
use common::ids::{Epoch, NodeId, Role};
use common::wire::{Hello, PROTOCOL_VERSIONS};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, ServerConfig};
use tokio::runtime::Handle;
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio_util::task::TaskTracker;

use crate::accept::{self, IncomingStream, Places};
use crate::accounting::{FabricAccounting, Ledger};
use crate::busy_poll::{Activity, BusyPolling};
use crate::certs::Identity;
use crate::hello::{Greeter, HelloCheck, compatible_models};
use crate::kv_threads::KvThreads;
use crate::limits::FabricLimits;
use crate::link::{CLOSE_DONE, Link};
use crate::path_metrics::PeerPaths;
use crate::quiet::Quiet;
use crate::socket::{self, BulkPath, Port, Socket, Traffic};
use crate::stream::FrameBudget;
use crate::tls::{self, TlsError};
use crate::transfer::bulk::{BulkSenders, ReceiveContext};
use crate::transfer::pull::Puller;
use crate::transfer::shm::Registrar;
use crate::transfer::stripes::Stripes;
use crate::transfer::{BulkSender, CudaIpc, LandingZone, Nixl, SharedPool, TransportLayer};
use crate::versions::alpn_ids;

/// What a fabric is made of.
#[derive(Clone)]
pub struct FabricConfig {
    /// Where links are accepted; port 0 takes any. Links are dialled from the same socket, so that a
    /// loopback address reaches loopback only.
    pub listen: SocketAddr,
    /// Where bulk connections are accepted, for nodes that serve KV. Its port goes into the hello.
    pub bulk_listen: Option<SocketAddr>,
    /// Certificate and key.
    pub identity: Identity,
    /// What this node says of itself; must name the role and node of `identity`. `bulk_port` is filled in.
    pub hello: Hello,
    /// Which peers are taken, when dialling and when accepting.
    pub check: HelloCheck,
    /// Bounds.
    pub limits: FabricLimits,
    /// How KV travels over QUIC.
    pub bulk_path: BulkPath,
    /// Connections to one peer for KV over QUIC, and sockets that listen for those of peers.
    pub num_bulk_connections: u16,
    /// Whether its threads look for datagrams a little longer before they sleep.
    pub busy_polling: Option<BusyPolling>,
    /// Versions of the protocol that are spoken, newest first; never empty.
    pub versions: Vec<u16>,
    /// This node's pool, for peers on the same host to read KV in; they become one trust domain with it. With a
    /// bulk listener only. Without it all KV is sent over QUIC.
    pub shared_pool: Option<SharedPool>,
    /// Whether this node reads KV in the pools of peers on the same host that let it.
    pub is_reading_shared_pools: bool,
    /// This node's pool, if it is in a device's memory: for devices of peers on the same host to copy KV out of, and to
    /// copy theirs into. Without it `cuda-ipc` is off.
    pub device_pool: Option<Arc<dyn DevicePool>>,
    /// What fetches KV out of peers' pools through NIXL, and may let them fetch out of this node's. Without it `nixl`
    /// is off.
    pub nixl: Option<Nixl>,
    /// Put around every transport that extents are sent over; tests inject faults here.
    pub transport_layer: Option<TransportLayer>,
}

impl FabricConfig {
    /// No bulk listener, default limits, one bulk connection to a peer, no busy polling, the versions of this build, no
    /// shared memory, and every peer taken whose model fits.
    pub fn new(listen: SocketAddr, identity: Identity, hello: Hello) -> Self {
        let check = compatible_models(&hello);
        let limits = FabricLimits::default();
        Self {
            listen,
            bulk_listen: None,
            identity,
            hello,
            check,
            limits,
            bulk_path: BulkPath::default(),
            num_bulk_connections: 1,
            busy_polling: None,
            versions: PROTOCOL_VERSIONS.to_vec(),
            shared_pool: None,
            is_reading_shared_pools: false,
            device_pool: None,
            nixl: None,
            transport_layer: None,
        }
    }

    /// Takes over what an operator has set; `args` have been validated.
    pub fn set_kv_quic(&mut self, args: &KvQuicArgs) {
        self.bulk_path = BulkPath {
            congestion_control: args.kv_congestion_control,
            max_udp_payload_bytes: u16::try_from(args.kv_max_udp_payload_size).unwrap_or(u16::MAX),
        };
        self.limits.bulk_window_bytes = u32::try_from(args.window_bytes()).unwrap_or(u32::MAX);
        self.num_bulk_connections = args.kv_connections;
    }
}

/// A fabric that could not be started.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address cannot be had.
    #[error("cannot listen on UDP {addr} ({source}): choose a free port and an address of this host")]
    Socket {
        /// The address.
        addr: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// Certificate of another node.
    #[error(
        "this node is {hello_role} \"{hello_node}\", its certificate was issued to {cert_role} \"{cert_node}\": use the certificate of this node"
    )]
    WrongIdentity {
        /// Role of the hello.
        hello_role: Role,
        /// Node of the hello.
        hello_node: NodeId,
        /// Role in the certificate.
        cert_role: Role,
        /// Node in the certificate.
        cert_node: NodeId,
    },
    /// TLS refused certificate or key.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The system gives no more threads.
    #[error("the threads that move KV cannot be started: {0}")]
    Threads(std::io::Error),
}

/// Whether a certificate is that of `node` in `role`. [`Fabric::bind`] asks too; asked before a model is
/// loaded, a wrong file costs moments.
///
/// # Errors
/// [`BindError::WrongIdentity`].
pub fn check_holder(identity: &Identity, role: Role, node: &NodeId) -> Result<(), BindError> {
    if (identity.role(), identity.node()) == (role, node) {
        return Ok(());
    }
    Err(BindError::WrongIdentity {
        hello_role: role,
        hello_node: node.clone(),
        cert_role: identity.role(),
        cert_node: identity.node().clone(),
    })
}

/// Whether a fabric could listen at `addresses`, which are let go again: to be asked before a model is loaded, so that a
/// wrong address or a taken port costs moments. Held until then, they would swallow what peers send.
///
/// # Errors
/// [`BindError::Socket`].
pub fn check_free(addresses: impl IntoIterator<Item = SocketAddr>) -> Result<(), BindError> {
    addresses.into_iter().try_for_each(|addr| match std::net::UdpSocket::bind(addr) {
        Ok(_) => Ok(()),
        Err(source) => Err(BindError::Socket { addr, source }),
    })
}

/// A node's place in the cluster. Cheap to clone; everything closes when the last clone is gone.
#[derive(Clone)]
pub struct Fabric {
    pub(crate) shared: Arc<Shared>,
    incoming: Arc<Mutex<mpsc::Receiver<IncomingStream>>>,
    _guard: Arc<CloseGuard>,
}

/// What the fabric's tasks share. It does not keep the fabric alive.
pub(crate) struct Shared {
    pub(crate) hello: Hello,
    pub(crate) check: HelloCheck,
    pub(crate) limits: FabricLimits,
    pub(crate) bulk_path: BulkPath,
    pub(crate) activity: Option<Arc<Activity>>,
    pub(crate) versions: Vec<u16>,
    pub(crate) ledger: Arc<Ledger>,
    paths: Arc<PeerPaths>,
    /// Refused connections, which anyone can cause.
    pub(crate) refusals: Quiet,
    pub(crate) budget: FrameBudget,
    pub(crate) bulk_senders: BulkSenders,
    /// Hands this node's pool out to peers on the same host.
    pub(crate) registrar: Option<Arc<Registrar>>,
    pub(crate) is_reading_shared_pools: bool,
    /// Ways to fetch KV out of pools, the best first.
    pub(crate) pullers: Vec<Arc<Puller>>,
    pub(crate) zone: LandingZone,
    pub(crate) servers: [Arc<QuicServerConfig>; 2],
    pub(crate) clients: [Arc<QuicClientConfig>; 2],
    pub(crate) control: Socket,
    kv_threads: OnceLock<KvThreads>,
    /// On one port.
    bulk_listeners: Vec<Socket>,
    /// For each connection to a peer one, bound when it is first used.
    pub(crate) bulk_diallers: Vec<OnceLock<Socket>>,
    pub(crate) receive_windows: Arc<Semaphore>,
    pub(crate) tasks: TaskTracker,
}

struct CloseGuard(Arc<Shared>);

impl Drop for CloseGuard {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Fabric {
    /// Binds the sockets and starts to accept. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(config: FabricConfig) -> Result<Self, BindError> {
        let FabricConfig {
            listen,
            bulk_listen,
            identity,
            mut hello,
            check,
            limits,
            bulk_path,
            num_bulk_connections,
            busy_polling,
            versions,
            shared_pool,
            is_reading_shared_pools,
            device_pool,
            nixl,
            transport_layer,
        } = config;
        let num_bulk_connections = num_bulk_connections.clamp(1, KV_CONNECTIONS_MAX);
        check_holder(&identity, hello.role, &hello.node)?;
        let server = |traffic: Traffic| tls::server(&identity, alpn_ids(traffic, &versions));
        let client = |traffic: Traffic| tls::client(&identity, alpn_ids(traffic, &versions));
        let servers = [server(Traffic::Control)?, server(Traffic::Bulk)?];
        let clients = [client(Traffic::Control)?, client(Traffic::Bulk)?];
        let activity = busy_polling.map(Activity::new);
        let listener = |(addr, port): (SocketAddr, Port), traffic: Traffic, threads: &Handle| {
            // Replaced for every connection that is accepted.
            let server = ServerConfig::with_crypto(servers[traffic as usize].clone());
            let bound = socket::bind((addr, port), traffic, bulk_path, Some(server), activity.as_ref(), threads);
            bound.map_err(|source| BindError::Socket { addr, source })
        };
        let control = listener((listen, Port::Own), Traffic::Control, &Handle::current())?;
        let ledger = Ledger::new(hello.role, hello.node.as_str());
        let kv_threads = OnceLock::new();
        let mut bulk_listeners = Vec::<Socket>::new();
        if let Some(addr) = bulk_listen {
            let threads = started(&kv_threads, &ledger).map_err(BindError::Threads)?;
            let first = if num_bulk_connections > 1 { Port::First } else { Port::Own };
            bulk_listeners.push(listener((addr, first), Traffic::Bulk, threads.handle())?);
            let found = bulk_listeners[0].endpoint.local_addr().map_err(|source| BindError::Socket { addr, source })?;
            for _ in 1..num_bulk_connections {
                bulk_listeners.push(listener((found, Port::Joins), Traffic::Bulk, threads.handle())?);
            }
            bulk_listeners.iter().for_each(|socket| threads.linger_for(&socket.endpoint));
            hello.bulk_port = Some(found.port());
        }

        let registrar = shared_pool.filter(|_| !bulk_listeners.is_empty()).and_then(|pool| {
            let _on_them = kv_threads.get().map(|threads| threads.handle().enter());
            let bound = Registrar::bind(pool, ledger.clone(), activity.clone());
            bound
                .inspect_err(|error| tracing::warn!(%error, "no socket for shared memory: KV goes over quic only"))
                .ok()
        });
        let (registrar, registrations) = registrar.unzip();
        let shared_memory = registrar.as_ref().map(|registrar| registrar.memory().clone());
        let between_devices = device_pool.map(|pool| Arc::new(Puller::new(CudaIpc::new(pool))));
        let through_nixl = nixl.map(|nixl| Arc::new(Puller::new(nixl)));
        let zone = LandingZone::new(hello.epoch, ledger.clone());
        let (waiting, incoming) = mpsc::channel(limits.num_waiting_streams_max);
        let num_windows = (limits.receive_bytes_max / limits.bulk_window_bytes.max(1) as usize).max(1);
        let shared = Arc::new(Shared {
            hello,
            check,
            budget: FrameBudget::new(limits.frame_bytes_max, limits.frame_deadline),
            bulk_senders: BulkSenders::new(transport_layer, shared_memory),
            registrar,
            is_reading_shared_pools,
            pullers: between_devices.into_iter().chain(through_nixl).collect(),
            zone,
            limits,
            bulk_path,
            activity,
            versions,
            ledger,
            paths: Arc::default(),
            refusals: Quiet::default(),
            servers,
            clients,
            control,
            kv_threads,
            bulk_listeners,
            bulk_diallers: (0..num_bulk_connections).map(|_| OnceLock::new()).collect(),
            receive_windows: Arc::new(Semaphore::new(num_windows)),
            tasks: TaskTracker::new(),
        });
        let control = (shared.control.clone(), Places::new(&shared.limits));
        shared.tasks.spawn(accept::connections(shared.clone(), control, waiting.clone()));
        if let Some(threads) = shared.kv_threads.get() {
            let places = Places::new(&shared.limits);
            for socket in &shared.bulk_listeners {
                let (socket, waiting) = ((socket.clone(), places.clone()), waiting.clone());
                shared.tasks.spawn_on(accept::connections(shared.clone(), socket, waiting), threads.handle());
            }
            if let Some((registrar, listener)) = shared.registrar.clone().zip(registrations) {
                let (deadline, tasks) = (shared.limits.attach_deadline, shared.tasks.clone());
                shared.tasks.spawn_on(registrar.serve(listener, deadline, tasks), threads.handle());
            }
        }
        Ok(Self { incoming: Arc::new(Mutex::new(incoming)), _guard: Arc::new(CloseGuard(shared.clone())), shared })
    }

    /// What this node says of itself, bulk port included.
    pub fn hello(&self) -> &Hello {
        &self.shared.hello
    }

    /// Where links are accepted.
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.control.endpoint.local_addr().expect("a bound UDP socket knows its address")
    }

    /// Where bulk connections are accepted, if they are.
    pub fn bulk_addr(&self) -> Option<SocketAddr> {
        let socket = self.shared.bulk_listeners.first()?;
        Some(socket.endpoint.local_addr().expect("a bound UDP socket knows its address"))
    }

    /// Sockets that listen there.
    pub fn num_bulk_listeners(&self) -> usize {
        self.shared.bulk_listeners.len()
    }

    /// Where to send KV for a node that has dialled this one's bulk port in its life `epoch`.
    pub fn bulk_to(&self, node: &NodeId, epoch: Epoch) -> Option<BulkSender> {
        self.shared.bulk_senders.find(node, epoch)
    }

    /// Whether KV that a node sends over the bulk connection it dialled in its life `epoch` is taken in here:
    /// the connection is open and has a share of the receive memory.
    pub fn receives_from(&self, node: &NodeId, epoch: Epoch) -> bool {
        self.shared.bulk_senders.is_receiving(node, epoch)
    }

    /// Where KV sent to this node's present life lands.
    pub fn landing_zone(&self) -> LandingZone {
        self.shared.zone.clone()
    }

    /// The next stream that a peer opened and was allowed to open; `None` once the fabric is closed.
    pub async fn accept(&self) -> Option<IncomingStream> {
        self.incoming.lock().await.recv().await
    }

    /// What is open and held now.
    pub fn accounting(&self) -> FabricAccounting {
        self.shared.ledger.snapshot()
    }

    /// What ends when the fabric's own threads have, behind the last of its handles; asked for once, and if there are any.
    pub fn take_kv_thread(&self) -> Option<std::thread::JoinHandle<()>> {
        self.shared.kv_threads.get().and_then(KvThreads::take_thread)
    }

    /// Closes every connection and waits until the peers were told and the fabric's tasks have ended. Call
    /// it before the process ends, or the peers learn of it from the silence only.
    pub async fn close(&self) {
        self.shared.close();
        for socket in self.shared.sockets() {
            socket.endpoint.wait_idle().await;
        }
        let deadline = self.shared.limits.hello_deadline;
        if tokio::time::timeout(deadline, self.shared.tasks.wait()).await.is_err() {
            tracing::warn!(num_tasks = self.shared.tasks.len(), "the fabric closed with tasks left");
        }
    }
}

impl Shared {
    pub(crate) fn greeter(&self, traffic: Traffic) -> Greeter<'_> {
        let (ours, check) = (&self.hello, &self.check);
        Greeter { ours, check, traffic, ledger: &self.ledger, budget: &self.budget }
    }

    pub(crate) fn link(&self, connection: Connection, version: u16, peer: Hello) -> Link {
        Link::new(connection, version, peer, self.ledger.clone(), self.budget.clone())
    }

    pub(crate) fn receive_context(
        &self,
        zone: &LandingZone,
        connection: &Connection,
        stripes: &Arc<Stripes>,
    ) -> ReceiveContext {
        ReceiveContext {
            connection: connection.clone(),
            stripes: stripes.clone(),
            zone: zone.clone(),
            ledger: self.ledger.clone(),
            num_extents_max: self.limits.num_extents_max,
            deadline: self.limits.extent_deadline,
            activity: self.activity.clone(),
        }
    }

    /// Keeps the metrics of a bulk connection's path while it lasts.
    pub(crate) fn tell_path(&self, peer: &NodeId, connection: &Connection) {
        self.tasks.spawn(self.paths.begin(&self.ledger, peer).tell(connection.clone()));
    }

    /// Where bulk connections are served.
    pub(crate) fn kv_threads(&self) -> std::io::Result<&KvThreads> {
        started(&self.kv_threads, &self.ledger)
    }

    /// On the threads of the caller.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    fn sockets(&self) -> impl Iterator<Item = &Socket> {
        let diallers = self.bulk_diallers.iter().filter_map(OnceLock::get);
        std::iter::once(&self.control).chain(&self.bulk_listeners).chain(diallers)
    }

    fn close(&self) {
        for socket in self.sockets() {
            socket.endpoint.close(CLOSE_DONE, b"the node is leaving");
        }
        if let Some(registrar) = &self.registrar {
            registrar.close();
        }
        self.tasks.close();
    }
}

/// The threads in `place`, started if they are not there yet.
fn started<'a>(place: &'a OnceLock<KvThreads>, ledger: &Arc<Ledger>) -> std::io::Result<&'a KvThreads> {
    if let Some(threads) = place.get() {
        return Ok(threads);
    }
    let threads = KvThreads::start(ledger)?;
    Ok(place.get_or_init(|| threads))
}
