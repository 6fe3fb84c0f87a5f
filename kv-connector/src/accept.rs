//! What comes in: connections, their hellos, their streams, each within its bound.
//!
//! Nothing here waits for the node: a stream is read up to its first frame, held against what its opener
//! may open, and put in a queue. A full queue resets the stream. Nobody is blocked silently.

use std::net::SocketAddr;
use std::sync::Arc;

use common::config::KV_CONNECTIONS_MAX;
use common::ids::Role;
use common::wire::{BulkGroup, Hello, Open, Registration};
use quinn::{Connection, Incoming, ServerConfig, Side, VarInt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::accounting::Kind;
use crate::fabric::Shared;
use crate::hello::{HelloFailure, Unwelcome};
use crate::limits::FabricLimits;
use crate::link::{CLOSE_DONE, CloseReason, Link};
use crate::socket::{NUM_STREAMS_AT_FIRST, Socket, Traffic};
use crate::stream::{ControlReceiver, ControlSender, RecvError, StreamCode};
use crate::transfer::stripes::GroupHolds;
use crate::transfer::{bulk, pull};
use crate::versions;

/// Connections that have not said hello yet, before addresses must be proven (a QUIC retry).
const NUM_UNPROVEN_MAX: usize = 64;

/// A stream that a peer opened: answer on `sender`; when its end of the stream is gone, stop.
pub struct IncomingStream {
    /// Who opened it, as its certificate confirms.
    pub peer: Arc<Hello>,
    /// From where.
    pub remote: SocketAddr,
    /// Its first message; one that the peer's role may send here, never a hello.
    pub open: Open,
    /// To the peer.
    pub sender: ControlSender,
    /// From the peer.
    pub receiver: ControlReceiver,
    /// The connection it came over, to watch it or to close it; only the end that dialled opens streams.
    pub link: Link,
}

/// Who may open what: the chain proxy, decode node, prefill node; prefixes between prefill nodes; and registration at
/// a proxy.
pub(crate) fn may_open(opener: &Hello, accepter: Role, open: &Open) -> bool {
    let role = opener.role;
    match (accepter, open) {
        (_, Open::Hello(_)) => false,
        (Role::DecodeNode, Open::Generate(_) | Open::Watch(_)) => role == Role::Proxy,
        (Role::DecodeNode | Role::PrefillNode, Open::WatchBlocks(_)) => role == Role::Proxy,
        (Role::PrefillNode, Open::Prefill(_)) => role == Role::DecodeNode,
        (Role::PrefillNode, Open::FetchPrefix(_)) => role == Role::PrefillNode,
        (Role::PrefillNode, Open::Watch(_)) => role != Role::PrefillNode,
        (Role::Proxy, Open::Register(register)) => {
            role != Role::Proxy && (register.role, &register.peer.node) == (role, &opener.node)
        }
        _ => false,
    }
}

/// Connections of one kind of traffic that may be here at a time, over whatever socket they came. Cheap to clone.
///
/// Whoever has not said hello yet has none of the peers' places: which it would need is not known before. A link has
/// one, and a group of bulk connections, of which there may be [several](FabricLimits::num_stripes_max).
#[derive(Clone)]
pub(crate) struct Places {
    peers: Arc<Semaphore>,
    num_max: usize,
    strangers: Arc<Semaphore>,
    num_strangers_max: usize,
}

impl Places {
    pub(crate) fn new(limits: &FabricLimits) -> Self {
        let num_max = limits.num_connections_max;
        let num_strangers_max = num_max.max(NUM_UNPROVEN_MAX);
        let [peers, strangers] = [num_max, num_strangers_max].map(|places| Arc::new(Semaphore::new(places)));
        Self { peers, num_max, strangers, num_strangers_max }
    }

    /// A place to say hello from, if there is one for what may be said. A full node still hears a few at a time who may
    /// join a group that is here; how many is not exact where several sockets accept.
    fn of_stranger(&self, traffic: Traffic) -> Option<OwnedSemaphorePermit> {
        let may_join = traffic == Traffic::Bulk && self.num_strangers() < NUM_UNPROVEN_MAX;
        let has_room = self.peers.available_permits() > 0 || may_join;
        self.strangers.clone().try_acquire_owned().ok().filter(|_| has_room)
    }

    fn num_strangers(&self) -> usize {
        self.num_strangers_max - self.strangers.available_permits()
    }

    /// # Errors
    /// All are taken.
    fn of_peer(&self) -> Result<OwnedSemaphorePermit, Unwelcome> {
        let full = || format!("too many connections: it takes {} such at a time", self.num_max);
        self.peers.clone().try_acquire_owned().map_err(|_| Unwelcome::Full(full()))
    }
}

/// Accepts connections until the endpoint is closed.
pub(crate) async fn connections(
    shared: Arc<Shared>,
    (socket, places): (Socket, Places),
    waiting: mpsc::Sender<IncomingStream>,
) {
    while let Some(incoming) = socket.endpoint.accept().await {
        if places.num_strangers() >= NUM_UNPROVEN_MAX && incoming.may_retry() {
            // Fails only for a connection that may not be retried.
            let _ = incoming.retry();
            continue;
        }
        let Some(stranger) = places.of_stranger(socket.traffic) else {
            shared.ledger.count_refused_connection("too_many");
            tell_refusal(&shared, incoming.remote_address(), socket.traffic, "too many connections");
            incoming.refuse();
            continue;
        };
        let (task_shared, socket, waiting) = (shared.clone(), socket.clone(), waiting.clone());
        let places = (stranger, places.clone());
        shared.spawn(async move {
            match socket.traffic {
                Traffic::Control => serve_control(task_shared, &socket, incoming, places, waiting).await,
                Traffic::Bulk => serve_bulk(task_shared, &socket, incoming, places).await,
            }
        });
    }
}

/// Streams that the peer of one control connection may have open: few until it has opened some.
struct Allowance {
    num_allowed: u32,
    num_max: u32,
    num_accepted: u32,
}

impl Allowance {
    fn new(num_max: u32) -> Self {
        Self { num_allowed: NUM_STREAMS_AT_FIRST.min(num_max), num_max, num_accepted: 0 }
    }

    /// How many it may have open from now on, if that changes.
    ///
    /// QUIC counts a stream until its opener has ended its half, which may be long after this node has dropped its
    /// own, and nobody here hears of it. So every one that was ever accepted counts as open.
    fn on_accepted(&mut self) -> Option<u32> {
        if self.num_allowed == self.num_max {
            return None;
        }
        self.num_accepted += 1;
        // Long before the last is open, so that the peer never waits for more than a round trip.
        if self.num_accepted < self.num_allowed.div_ceil(2) {
            return None;
        }
        self.num_allowed = self.num_allowed.saturating_mul(2).min(self.num_max);
        Some(self.num_allowed)
    }
}

async fn serve_control(
    shared: Arc<Shared>,
    socket: &Socket,
    incoming: Incoming,
    (stranger, places): (OwnedSemaphorePermit, Places),
    waiting: mpsc::Sender<IncomingStream>,
) {
    let mut place = None;
    let register = |_: &_, _: &_, _| {
        place = Some(places.of_peer()?);
        Ok(None)
    };
    let Some((connection, version, peer)) = welcome(&shared, socket, incoming, register).await else { return };
    drop(stranger);
    tracing::debug!(peer = %peer.node, role = %peer.role, version, remote = %connection.remote_address(), "accepted a link");
    let link = shared.link(connection.clone(), version, peer);
    let mut allowance = Allowance::new(shared.limits.num_streams_max);
    let reason = loop {
        match connection.accept_bi().await {
            Ok(halves) => {
                let (sender, receiver) = link.stream(halves);
                if let Some(num_allowed) = allowance.on_accepted() {
                    connection.set_max_concurrent_bi_streams(VarInt::from_u32(num_allowed));
                }
                shared.spawn(serve_stream(shared.clone(), link.clone(), sender, receiver, waiting.clone()));
            }
            Err(reason) => break reason,
        }
    };
    tracing::debug!(peer = %link.peer().node, %reason, "a link ended");
    drop(place);
}

/// Reads the first frame of a stream and hands the stream on.
async fn serve_stream(
    shared: Arc<Shared>,
    link: Link,
    mut sender: ControlSender,
    mut receiver: ControlReceiver,
    waiting: mpsc::Sender<IncomingStream>,
) {
    let refuse =
        |sender: &mut ControlSender, receiver: &mut ControlReceiver, code: StreamCode, reason: &'static str| {
            shared.ledger.count_refused_stream(reason);
            sender.reset_with(code);
            receiver.stop_with(code);
        };
    let first = tokio::time::timeout(shared.limits.frame_deadline, receiver.recv::<Open>()).await;
    let open = match first {
        Ok(Ok(Some(open))) => open,
        Ok(Err(RecvError::Reset { .. } | RecvError::ConnectionLost(_))) => return,
        Ok(Ok(None) | Err(_)) | Err(_) => {
            tracing::warn!(peer = %link.peer().node, "refused a stream that does not begin with a message");
            return refuse(&mut sender, &mut receiver, StreamCode::Malformed, "malformed");
        }
    };
    if !may_open(link.peer(), shared.hello.role, &open) {
        tracing::warn!(peer = %link.peer().node, role = %link.peer().role, "refused a stream that this role may not open here");
        return refuse(&mut sender, &mut receiver, StreamCode::NotAllowed, "not_allowed");
    }
    let (peer, remote) = (link.shared_peer(), link.remote());
    let stream = IncomingStream { peer, remote, open, sender, receiver, link };
    if let Err(error) = waiting.try_send(stream) {
        let mut stream = error.into_inner();
        refuse(&mut stream.sender, &mut stream.receiver, StreamCode::Overloaded, "overloaded");
    }
}

async fn serve_bulk(
    shared: Arc<Shared>,
    socket: &Socket,
    incoming: Incoming,
    (stranger, places): (OwnedSemaphorePermit, Places),
) {
    // The registration is valid as long as the connection.
    let (mut open_registration, mut joined) = (None, None);
    let register = |connection: &Connection, peer: &Hello, group: BulkGroup| {
        let (senders, with) = (&shared.bulk_senders, (&shared.ledger, &shared.tasks));
        if group.joins {
            joined = Some((senders.join(peer, group, connection, with)?, None));
            return Ok(None);
        }
        let place = places.of_peer()?;
        // Without a share KV can still be sent to the peer; it is not asked for any.
        let window = shared.receive_windows.clone().try_acquire_owned().ok();
        let holds = GroupHolds::new(Some(place), window);
        let (stripes, transport) =
            senders.insert(peer, group, connection, (holds, shared.limits.num_stripes_max()), with)?;
        joined = Some((stripes, Some(transport.clone())));
        Ok(shared.registrar.as_ref().map(|registrar| {
            let (registration, open) = registrar.register(transport);
            open_registration = Some(open);
            registration
        }))
    };
    let Some((connection, version, peer)) = welcome(&shared, socket, incoming, register).await else { return };
    drop(stranger);
    let Some((stripes, first)) = joined else { return };
    let held = shared.ledger.hold(Kind::Connection(Traffic::Bulk));
    shared.tell_path(&peer.node, &connection);
    let (is_receiving, remote) = (stripes.has_window(), connection.remote_address());
    let num_connections = stripes.num_max();
    connection.set_receive_window(socket.receive_window(&shared.limits, remote, num_connections));
    connection.set_send_window(Socket::send_window(&shared.limits, num_connections));
    let num_open = stripes.num_open();
    tracing::debug!(peer = %peer.node, version, %remote, is_receiving, num_open, "accepted a bulk connection");
    // Whoever fetches has one connection.
    if let Some(transport) = first {
        let (asking, deadline) = (connection.clone(), shared.limits.attach_deadline);
        let attached = move |puller: &_| transport.pulled().on_attached(puller);
        shared.spawn(pull::serve(asking, shared.pullers.clone(), attached, deadline));
    }
    let reason = if is_receiving {
        let context = shared.receive_context(&shared.zone, &connection, &stripes);
        bulk::receive(&Arc::new(context), &shared.tasks).await
    } else {
        connection.closed().await.into()
    };
    drop(open_registration);
    stripes.on_ended(&connection, &reason);
    shared.bulk_senders.remove_ended(&peer, &stripes);
    bulk::tell_end(&connection, &reason);
    drop(held);
}

/// Logs a refused connection, if one was not logged a moment ago.
fn tell_refusal(shared: &Shared, remote: SocketAddr, traffic: Traffic, reason: &str) {
    let traffic = traffic.as_str();
    match shared.refusals.is_due(std::time::Instant::now()) {
        Some(num_untold) => tracing::warn!(%remote, traffic, reason, num_untold, "refused a connection"),
        None => tracing::debug!(%remote, traffic, reason, "refused a connection"),
    }
}

/// Handshake and hello within their deadline.
async fn welcome(
    shared: &Shared,
    socket: &Socket,
    incoming: Incoming,
    register: impl FnOnce(&Connection, &Hello, BulkGroup) -> Result<Option<Registration>, Unwelcome>,
) -> Option<(Connection, u16, Hello)> {
    let remote = incoming.remote_address();
    let refused = |reason: String| {
        shared.ledger.count_refused_connection("hello");
        tell_refusal(shared, remote, socket.traffic, &reason);
    };
    let deadline = tokio::time::Instant::now() + shared.limits.hello_deadline;
    let mut config = ServerConfig::with_crypto(shared.servers[socket.traffic as usize].clone());
    // Until the hello has said how many share the window.
    let transport = socket.transport(&shared.limits, remote, Side::Server, KV_CONNECTIONS_MAX);
    config.transport_config(transport).migration(false);
    let connecting = match incoming.accept_with(Arc::new(config)) {
        Ok(connecting) => connecting,
        Err(error) => {
            refused(error.to_string());
            return None;
        }
    };
    let connection = match tokio::time::timeout_at(deadline, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            refused(match CloseReason::from(error) {
                CloseReason::NoCommonProtocol => versions::no_common_protocol(&shared.versions),
                other => other.to_string(),
            });
            return None;
        }
        Err(_) => {
            refused("no handshake in time".to_string());
            return None;
        }
    };
    let Some(version) = versions::negotiated(&connection) else {
        let parting = versions::part_as_accepter(&connection, &shared.versions);
        let said = tokio::time::timeout_at(deadline, parting).await;
        refused(said.unwrap_or_else(|_| "no list of protocol versions in time".to_string()));
        return None;
    };
    let greeter = shared.greeter(socket.traffic);
    let welcoming = greeter.welcome(&connection, |peer, group| register(&connection, peer, group));
    match tokio::time::timeout_at(deadline, welcoming).await {
        Ok(Ok(peer)) => Some((connection, version, peer)),
        Ok(Err(HelloFailure::Full(reason))) => {
            shared.ledger.count_refused_connection("too_many");
            tell_refusal(shared, remote, socket.traffic, &reason);
            None
        }
        Ok(Err(failure)) => {
            refused(format!("{failure:?}"));
            connection.close(CLOSE_DONE, b"no hello");
            None
        }
        Err(_) => {
            refused("no hello in time".to_string());
            connection.close(CLOSE_DONE, b"no hello in time");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::ids::{Attempt, Epoch, Generation, NodeId, RequestId};
    use common::wire::{FetchPrefix, Peer, Register, Watch, WatchBlocks};

    const ROLES: [Role; 3] = [Role::Proxy, Role::PrefillNode, Role::DecodeNode];

    fn hello(role: Role) -> Hello {
        Hello { node: NodeId::new("n0").unwrap(), role, epoch: Epoch(1), model: None, bulk_port: None }
    }

    fn allowed(open: &Open) -> Vec<(Role, Role)> {
        let pairs = ROLES.iter().flat_map(|from| ROLES.iter().map(move |to| (*from, *to)));
        pairs.filter(|(from, to)| may_open(&hello(*from), *to, open)).collect()
    }

    #[test]
    fn proxies_watch_nodes_and_decode_nodes_watch_prefill_nodes() {
        let expected =
            [(Role::Proxy, Role::PrefillNode), (Role::Proxy, Role::DecodeNode), (Role::DecodeNode, Role::PrefillNode)];
        assert_eq!(allowed(&Open::Watch(Watch {})), expected);
    }

    #[test]
    fn only_prefill_nodes_take_prefixes_from_prefill_nodes() {
        let fetch = FetchPrefix {
            request: RequestId(1),
            attempt: Attempt(1),
            generation: Generation(1),
            tokens: vec![1; 16].into(),
            first_token: 0,
            salt: Vec::new(),
            deadline: std::time::Duration::ZERO,
        };
        assert_eq!(allowed(&Open::FetchPrefix(Box::new(fetch))), [(Role::PrefillNode, Role::PrefillNode)]);
    }

    #[test]
    fn only_proxies_hear_what_nodes_hold() {
        let watch = Open::WatchBlocks(WatchBlocks { after: None, with_tokens: false });
        assert_eq!(allowed(&watch), [(Role::Proxy, Role::PrefillNode), (Role::Proxy, Role::DecodeNode)]);
    }

    #[test]
    fn node_registers_itself_at_a_proxy_and_nobody_else() {
        let register = |node: &str, role: Role| {
            let peer = Peer { node: NodeId::new(node).unwrap(), control: ([127, 0, 0, 1], 1).into() };
            Open::Register(Register { peer, role })
        };
        assert_eq!(allowed(&register("n0", Role::DecodeNode)), [(Role::DecodeNode, Role::Proxy)]);
        assert_eq!(allowed(&register("other", Role::DecodeNode)), []);
        assert_eq!(allowed(&register("n0", Role::Proxy)), []);
    }

    #[test]
    fn nobody_says_hello_twice() {
        assert_eq!(allowed(&Open::Hello(hello(Role::Proxy))), []);
    }
}
