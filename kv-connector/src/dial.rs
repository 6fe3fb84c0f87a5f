//! Dialling: a link to a node, and the bulk connection beside it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use common::ids::{Epoch, NodeId, Role};
use common::wire::{BULK_GROUPS_SINCE, BulkGroup, Hello, Registration};
use quinn::{ClientConfig, Connection, Side};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use crate::accounting::Kind;
use crate::certs::role_name;
use crate::fabric::{Fabric, Shared};
use crate::hello::HelloFailure;
use crate::joins::Joins;
use crate::link::{CLOSE_DONE, CloseReason, Link};
use crate::socket::{self, Port, Socket, Traffic};
use crate::transfer::LandingZone;
use crate::transfer::bulk::{BulkReceiver, PeerTransport};
use crate::transfer::pull::{self, AttachError, PulledPool, Puller};
use crate::transfer::shm::Attached;
use crate::transfer::stripes::{GroupHolds, Stripes};
use crate::versions;

/// A link that could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// Nobody answered, or the address cannot be dialled.
    #[error("{addr} cannot be reached ({reason}): check that the {role} runs there and that UDP gets through")]
    Unreachable {
        /// The address.
        addr: SocketAddr,
        /// Who was expected there.
        role: Role,
        /// What happened.
        reason: String,
    },
    /// TLS failed.
    #[error(
        "{addr} is not a {role} of this cluster ({reason}): check the address, and that all certificates come from one `tandem certs`"
    )]
    NotTrusted {
        /// The address.
        addr: SocketAddr,
        /// Who was expected there.
        role: Role,
        /// What TLS said.
        reason: String,
    },
    /// The two ends share no version of the protocol.
    #[error("{addr} cannot be talked to: {reason}")]
    NoCommonVersion {
        /// The address.
        addr: SocketAddr,
        /// Which versions met, as far as they are known.
        reason: String,
    },
    /// The other end does not want us.
    #[error("{addr} refused this node: {reason}")]
    RefusedByPeer {
        /// The address.
        addr: SocketAddr,
        /// Its words.
        reason: String,
    },
    /// We do not want the other end.
    #[error("this node refused {addr}: {reason}")]
    RefusedHere {
        /// The address.
        addr: SocketAddr,
        /// Our words.
        reason: String,
    },
    /// Another node answers there.
    #[error("node \"{found}\" answers at {addr}, expected \"{expected}\": correct the list of nodes")]
    WrongNode {
        /// The address.
        addr: SocketAddr,
        /// Who was expected.
        expected: NodeId,
        /// Who is there.
        found: NodeId,
    },
    /// The peer has no bulk listener.
    #[error("node \"{node}\" serves no KV (it announces no bulk port)")]
    NoBulkListener {
        /// The peer.
        node: NodeId,
    },
    /// Another life of the peer answers on the bulk port.
    #[error("node \"{node}\" was restarted between its control and its bulk connection: dial it again")]
    Restarted {
        /// The peer.
        node: NodeId,
    },
    /// No receive memory left for one more bulk connection.
    #[error(
        "all receive memory is in use by {num_connections} bulk connections: raise the receive memory of this node"
    )]
    NoReceiveMemory {
        /// Connections that share it.
        num_connections: usize,
    },
}

impl DialError {
    /// Whether dialling again later may succeed without anybody changing the configuration.
    pub fn is_worth_a_retry(&self) -> bool {
        matches!(self, DialError::Unreachable { .. } | DialError::Restarted { .. } | DialError::NoReceiveMemory { .. })
    }
}

/// A connection whose both ends have said who they are.
pub(crate) struct Dialled {
    pub(crate) connection: Connection,
    version: u16,
    pub(crate) peer: Hello,
    registration: Option<Registration>,
}

impl Fabric {
    /// Makes a link to the node at `addr`. TLS checks that it has the role, the hello that it is `node` (if
    /// one is expected), and both ends' checks that they can work together.
    ///
    /// # Errors
    /// [`DialError`]; given up after the hello deadline.
    pub async fn dial(&self, addr: SocketAddr, role: Role, node: Option<&NodeId>) -> Result<Link, DialError> {
        let dialled = self.shared.connect(&self.shared.control, addr, role, None).await?;
        let Dialled { connection, version, peer, .. } = dialled;
        if let Some(expected) = node.filter(|expected| **expected != peer.node) {
            let found = peer.node;
            connection.close(CLOSE_DONE, format!("expected node \"{expected}\" here").as_bytes());
            return Err(DialError::WrongNode { addr, expected: expected.clone(), found });
        }
        Ok(self.shared.link(connection, version, peer))
    }

    /// Dials the bulk port of a linked node, which from then on can send KV here: its extents land where
    /// `zone` has a landing for them. [`BulkReceiver::sender`] is the way back. The connection lives as long as
    /// the answer, and with it the further ones that are made beside it where KV comes over `quic`.
    ///
    /// # Errors
    /// [`DialError`].
    pub async fn connect_bulk(&self, link: &Link, zone: &LandingZone) -> Result<BulkReceiver, DialError> {
        let unreachable = |reason: String| {
            let (addr, role) = (link.remote(), link.peer().role);
            DialError::Unreachable { addr, role, reason }
        };
        let threads = self.shared.kv_threads();
        let threads = threads.map_err(|error| unreachable(format!("the threads of KV cannot be started: {error}")))?;
        let (fabric, link, zone) = (self.clone(), link.clone(), zone.clone());
        let connecting = threads.handle().spawn(async move { fabric.connect_bulk_here(&link, &zone).await });
        let connected = AbortOnDropHandle::new(connecting).await;
        connected.unwrap_or_else(|error| Err(unreachable(format!("the threads of KV have ended: {error}"))))
    }

    /// On the threads of KV, which whatever is made here stays on.
    async fn connect_bulk_here(&self, link: &Link, zone: &LandingZone) -> Result<BulkReceiver, DialError> {
        let (role, node, epoch) = (link.peer().role, link.peer().node.clone(), link.peer().epoch);
        let port = link.peer().bulk_port.ok_or_else(|| DialError::NoBulkListener { node: node.clone() })?;
        let window =
            self.shared.receive_windows.clone().try_acquire_owned().map_err(|_| DialError::NoReceiveMemory {
                num_connections: self.shared.limits.receive_bytes_max
                    / self.shared.limits.bulk_window_bytes.max(1) as usize,
            })?;
        let addr = SocketAddr::new(link.remote().ip(), port);
        let num_wanted = self.shared.bulk_diallers.len() as u16;
        let group = BulkGroup { id: rand::random(), num_connections: num_wanted, joins: false };
        let socket = self.shared.bulk_dialler(0, addr)?;
        let dialled = self.shared.connect(socket, addr, role, Some(group)).await?;
        let Dialled { connection, version, peer, registration } = dialled;
        if peer.node != node {
            connection.close(CLOSE_DONE, b"another node was expected here");
            return Err(DialError::WrongNode { addr, expected: node, found: peer.node });
        }
        if peer.epoch != epoch {
            connection.close(CLOSE_DONE, b"another life of this node was expected");
            return Err(DialError::Restarted { node });
        }
        let attached = match registration.filter(|_| self.shared.is_reading_shared_pools) {
            Some(registration) => self.attach(&node, &registration).await,
            None => None,
        };
        let pulling = self.attach_puller((node.clone(), epoch), &connection).await;
        // An earlier version has no word for more than one, and KV that does not come as bytes needs no more.
        let is_alone = version < BULK_GROUPS_SINCE || attached.is_some() || pulling.is_some();
        let num_connections = if is_alone { 1 } else { num_wanted };
        if num_connections < num_wanted {
            connection.set_receive_window(socket.receive_window(&self.shared.limits, addr, num_connections));
            connection.set_send_window(Socket::send_window(&self.shared.limits, num_connections));
        }
        let holds = GroupHolds::new(None, Some(window));
        let stripes = Stripes::new(group, usize::from(num_connections), holds, &self.shared.ledger);
        let transport = PeerTransport::new(&connection, &self.shared.ledger, None);
        stripes.add(Some(0), transport, &self.shared.tasks).expect("a new group has room for its first connection");
        let held = self.shared.ledger.hold(Kind::Connection(Traffic::Bulk));
        self.shared.tell_path(&node, &connection);
        let context = || self.shared.receive_context(zone, &connection, &stripes);
        let sender = self.shared.bulk_senders.over(&stripes);
        let mut receiver = BulkReceiver::start(sender, context(), attached, held, &self.shared.tasks);
        if let Some((puller, peer)) = pulling {
            receiver = receiver.with_pulling(puller.method().carrier());
            let (life, context, connection) = ((node.clone(), epoch), context(), connection.clone());
            let places = Arc::new(Semaphore::new(pull::NUM_PULLS_OF_PEER_MAX));
            let receiving = pull::Receiving { life, peer, puller, context, connection, places };
            self.shared.tasks.spawn(pull::receive(receiving, self.shared.tasks.clone()));
        }
        let transport = receiver.transport_name();
        tracing::info!(peer = %node, transport, num_connections, "KV of this node can arrive");
        if num_connections > 1 {
            let (shared, zone, life) = (self.shared.clone(), zone.clone(), (node, epoch));
            self.shared.tasks.spawn(Joins { shared, stripes, addr, role, life, zone }.keep());
        }
        Ok(receiver)
    }

    /// The peer's pool, if it can be read here.
    async fn attach(&self, node: &NodeId, registration: &Registration) -> Option<Attached> {
        let attached = Attached::attach(registration, self.shared.limits.attach_deadline, &self.shared.ledger).await;
        attached.inspect_err(|reason| tracing::info!(peer = %node, %reason, "KV comes over quic, not shm")).ok()
    }

    /// The peer's pool, if it can be fetched from here, in the first way that both ends have.
    async fn attach_puller(
        &self,
        life: (NodeId, Epoch),
        connection: &Connection,
    ) -> Option<(Arc<Puller>, Arc<dyn PulledPool>)> {
        for puller in &self.shared.pullers {
            let attached = match puller.has_failed(&life) {
                true => Err(AttachError::HasFailed),
                false => pull::attach(connection, puller, self.shared.limits.attach_deadline).await,
            };
            match attached {
                Ok(peer) => return Some((puller.clone(), peer)),
                Err(reason) => {
                    let transport = puller.method().carrier().as_str();
                    tracing::info!(peer = %life.0, transport, %reason, "KV does not come over this transport");
                }
            }
        }
        None
    }
}

impl Shared {
    /// The socket that connections number `slot` to peers are dialled from, bound at the first. To be called on the
    /// threads of KV.
    pub(crate) fn bulk_dialler(&self, slot: usize, remote: SocketAddr) -> Result<&Socket, DialError> {
        let place = &self.bulk_diallers[slot];
        if let Some(socket) = place.get() {
            return Ok(socket);
        }
        let own = self.control.endpoint.local_addr().map_or(Ipv4Addr::UNSPECIFIED.into(), |addr| addr.ip());
        let addr = SocketAddr::new(own, 0);
        let (threads, activity) = (Handle::current(), self.activity.as_ref());
        let bound = socket::bind((addr, Port::Own), Traffic::Bulk, self.bulk_path, None, activity, &threads);
        let socket = bound.map_err(|error| DialError::Unreachable {
            addr: remote,
            role: Role::PrefillNode,
            reason: format!("no UDP socket on {addr}: {error}"),
        })?;
        let socket = place.get_or_init(|| socket);
        if let Ok(threads) = self.kv_threads() {
            threads.linger_for(&socket.endpoint);
        }
        Ok(socket)
    }

    /// Dials and says hello; `group` is what a bulk connection belongs to, for a peer that knows of groups.
    pub(crate) async fn connect(
        &self,
        socket: &Socket,
        addr: SocketAddr,
        role: Role,
        group: Option<BulkGroup>,
    ) -> Result<Dialled, DialError> {
        let ours = &self.versions;
        let unreachable = |reason: String| DialError::Unreachable { addr, role, reason };
        let lost = |reason: CloseReason| match reason {
            CloseReason::NotTrusted { reason } => DialError::NotTrusted { addr, role, reason },
            CloseReason::NoCommonProtocol => {
                DialError::NoCommonVersion { addr, reason: versions::no_common_protocol(ours) }
            }
            CloseReason::RefusedByPeer { reason } => DialError::RefusedByPeer { addr, reason },
            // Closed without a refusal too: a node that is leaving, and may be back in a moment.
            other => unreachable(other.to_string()),
        };
        let connecting = async {
            let mut config = ClientConfig::new(self.clients[socket.traffic as usize].clone());
            let num_connections = group.map_or(1, |group| group.num_connections);
            config.transport_config(socket.transport(&self.limits, addr, Side::Client, num_connections));
            let connecting = socket.endpoint.connect_with(config, addr, &role_name(role));
            let connection = connecting.map_err(|error| unreachable(error.to_string()))?.await;
            let connection = connection.map_err(|error| lost(error.into()))?;
            let Some(version) = versions::negotiated(&connection) else {
                return Err(match versions::part_as_dialler(&connection, ours).await.into() {
                    CloseReason::RefusedByPeer { reason } => DialError::NoCommonVersion { addr, reason },
                    other => lost(other),
                });
            };
            let group = group.filter(|_| version >= BULK_GROUPS_SINCE);
            let (peer, registration) =
                self.greeter(socket.traffic).greet(&connection, group).await.map_err(|failure| match failure {
                    HelloFailure::RefusedByPeer(reason) => DialError::RefusedByPeer { addr, reason },
                    HelloFailure::RefusedHere(reason) => DialError::RefusedHere { addr, reason },
                    HelloFailure::Lost(reason) => lost(reason),
                    HelloFailure::Broken(reason) | HelloFailure::Full(reason) => unreachable(reason),
                })?;
            Ok(Dialled { connection, version, peer, registration })
        };
        let deadline = self.limits.hello_deadline;
        let connected = tokio::time::timeout(deadline, connecting).await;
        connected.unwrap_or_else(|_| Err(unreachable(format!("no answer within {deadline:?}"))))
    }
}
