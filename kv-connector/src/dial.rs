//! Dialling: a link to a node, and the bulk connection beside it.

use std::net::SocketAddr;
use std::sync::Arc;

use common::ids::{Epoch, NodeId, Role};
use common::wire::{Hello, Registration};
use quinn::{ClientConfig, Connection, Side};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use crate::accounting::Kind;
use crate::certs::role_name;
use crate::fabric::Fabric;
use crate::hello::HelloFailure;
use crate::link::{CLOSE_DONE, CloseReason, Link};
use crate::socket::{self, Socket, Traffic};
use crate::transfer::LandingZone;
use crate::transfer::bulk::BulkReceiver;
use crate::transfer::pull::{self, AttachError};
use crate::transfer::shm::Attached;
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

impl Fabric {
    /// Makes a link to the node at `addr`. TLS checks that it has the role, the hello that it is `node` (if
    /// one is expected), and both ends' checks that they can work together.
    ///
    /// # Errors
    /// [`DialError`]; given up after the hello deadline.
    pub async fn dial(&self, addr: SocketAddr, role: Role, node: Option<&NodeId>) -> Result<Link, DialError> {
        let (connection, version, peer, _) = self.connect(&self.shared.control, addr, role).await?;
        if let Some(expected) = node.filter(|expected| **expected != peer.node) {
            let found = peer.node;
            connection.close(CLOSE_DONE, format!("expected node \"{expected}\" here").as_bytes());
            return Err(DialError::WrongNode { addr, expected: expected.clone(), found });
        }
        Ok(self.shared.link(connection, version, peer))
    }

    /// Dials the bulk port of a linked node, which from then on can send KV here: its extents land where
    /// `zone` has a landing for them. [`BulkReceiver::sender`] is the way back. The connection lives as long as
    /// the answer.
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
        let socket = self.bulk_dialler(addr)?;
        let (connection, _version, peer, registration) = self.connect(socket, addr, role).await?;
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
        let pulling = self.attach_puller((node.clone(), epoch), &connection, zone).await;
        let held = self.shared.ledger.hold(Kind::Connection(Traffic::Bulk));
        self.shared.tell_path(&node, &connection);
        let sender = self.shared.bulk_senders.over(&connection, &self.shared.ledger, &self.shared.tasks);
        let context = self.shared.receive_context(zone);
        let mut receiver =
            BulkReceiver::start(connection, sender, context, attached, (held, window), &self.shared.tasks);
        if let Some(receiving) = pulling {
            receiver = receiver.with_pulling(receiving.puller.method().carrier());
            self.shared.tasks.spawn(pull::receive(receiving, self.shared.tasks.clone()));
        }
        tracing::info!(peer = %node, transport = receiver.transport_name(), "KV of this node can arrive");
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
        zone: &LandingZone,
    ) -> Option<pull::Receiving> {
        for puller in &self.shared.pullers {
            let attached = match puller.has_failed(&life) {
                true => Err(AttachError::HasFailed),
                false => pull::attach(connection, puller, self.shared.limits.attach_deadline).await,
            };
            match attached {
                Ok(peer) => {
                    let (context, connection) = (self.shared.receive_context(zone), connection.clone());
                    let places = Arc::new(Semaphore::new(pull::NUM_PULLS_OF_PEER_MAX));
                    return Some(pull::Receiving { life, peer, puller: puller.clone(), context, connection, places });
                }
                Err(reason) => {
                    let transport = puller.method().carrier().as_str();
                    tracing::info!(peer = %life.0, transport, %reason, "KV does not come over this transport");
                }
            }
        }
        None
    }

    /// The socket that bulk connections are dialled from, bound at the first.
    fn bulk_dialler(&self, remote: SocketAddr) -> Result<&Socket, DialError> {
        if let Some(socket) = self.shared.bulk_dialler.get() {
            return Ok(socket);
        }
        let addr = SocketAddr::new(self.local_addr().ip(), 0);
        let threads = Handle::current();
        let activity = self.shared.activity.as_ref();
        let bound = socket::bind(addr, Traffic::Bulk, self.shared.bulk_path, None, activity, &threads);
        let socket = bound.map_err(|error| DialError::Unreachable {
            addr: remote,
            role: Role::PrefillNode,
            reason: format!("no UDP socket on {addr}: {error}"),
        })?;
        let socket = self.shared.bulk_dialler.get_or_init(|| socket);
        if let Ok(threads) = self.shared.kv_threads() {
            threads.linger_for(&socket.endpoint);
        }
        Ok(socket)
    }

    async fn connect(
        &self,
        socket: &Socket,
        addr: SocketAddr,
        role: Role,
    ) -> Result<(Connection, u16, Hello, Option<Registration>), DialError> {
        let ours = &self.shared.versions;
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
            let mut config = ClientConfig::new(self.shared.clients[socket.traffic as usize].clone());
            config.transport_config(socket.transport(&self.shared.limits, addr, Side::Client));
            let connecting = socket.endpoint.connect_with(config, addr, &role_name(role));
            let connection = connecting.map_err(|error| unreachable(error.to_string()))?.await;
            let connection = connection.map_err(|error| lost(error.into()))?;
            let Some(version) = versions::negotiated(&connection) else {
                return Err(match versions::part_as_dialler(&connection, ours).await.into() {
                    CloseReason::RefusedByPeer { reason } => DialError::NoCommonVersion { addr, reason },
                    other => lost(other),
                });
            };
            let (peer, registration) =
                self.shared.greeter(socket.traffic).greet(&connection).await.map_err(|failure| match failure {
                    HelloFailure::RefusedByPeer(reason) => DialError::RefusedByPeer { addr, reason },
                    HelloFailure::RefusedHere(reason) => DialError::RefusedHere { addr, reason },
                    HelloFailure::Lost(reason) => lost(reason),
                    HelloFailure::Broken(reason) => unreachable(reason),
                })?;
            Ok((connection, version, peer, registration))
        };
        let deadline = self.shared.limits.hello_deadline;
        let connected = tokio::time::timeout(deadline, connecting).await;
        connected.unwrap_or_else(|_| Err(unreachable(format!("no answer within {deadline:?}"))))
    }
}
