//! Bulk connections: who sends extents to whom, in which direction, and over which transport.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use common::ids::{Epoch, NodeId};
use common::kv_memory::KvMemory;
use common::wire::bulk::EXTENT_HEADER_BYTES;
use common::wire::runs::NUM_RUNS_MAX;
use common::wire::{ExtentHeader, Hello, PoolRun};
use dashmap::DashMap;
use quinn::Connection;
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use crate::accounting::{Carrier, Held, Kind, Ledger};
use crate::busy_poll::Activity;
use crate::link::{CLOSE_DONE, CloseReason};
use crate::socket::Traffic;
use crate::transfer::bulk_end::BulkEnd;
use crate::transfer::pull::{self, Posted};
use crate::transfer::quic::{self, QuicTransport};
use crate::transfer::shm::{self, Attached, Outbox};
use crate::transfer::{
    Arriving, ExtentEnd, ExtentSends, LandingZone, Payload, RefusedExtent, SendExtentError, SendFuture, Transport,
    TransportLayer, UnsealedExtent, payload::PoolExtent,
};

/// Sends extents to one life of one node. Cheap to clone.
#[derive(Clone)]
pub struct BulkSender {
    transport: Arc<dyn Transport>,
    /// Where extents are sealed and sent.
    threads: Handle,
    sealing: Arc<Semaphore>,
}

impl BulkSender {
    /// Sends through `transport`, on the threads of the runtime that this is called in.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        Self { transport, threads: Handle::current(), sealing: Arc::new(Semaphore::new(1)) }
    }

    /// Begins to hash and send one extent on the threads of KV, behind those that were begun before. `sends` says in the
    /// end whether it left; until it does, even if it is given up, the extent's blocks must stay pinned.
    pub fn begin(&self, sends: &mut ExtentSends, extent: UnsealedExtent) {
        let sender = self.clone();
        sends.spawn_on(&self.threads, async move { sender.seal_and_send(extent).await.is_ok() });
    }

    async fn seal_and_send(&self, extent: UnsealedExtent) -> Result<(), SendExtentError> {
        // One at a time up to its first wait, so that what was hashed leaves while a cache has it, and in order.
        let sealing = self.sealing.acquire().await.expect("the semaphore of the sealing is never closed");
        let (header, payload) = extent.seal();
        let mut sending = pin!(self.send_extent(&header, payload));
        let begun = poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx))).await;
        drop(sealing);
        match begun {
            Poll::Ready(sent) => sent,
            Poll::Pending => sending.await,
        }
    }

    /// Sends one extent. When it resolves, the payload's blocks may change again; dropping the future gives
    /// the extent up.
    ///
    /// # Errors
    /// [`SendExtentError`].
    pub async fn send_extent(&self, header: &ExtentHeader, payload: impl Into<Payload>) -> Result<(), SendExtentError> {
        self.transport.send(header, payload.into(), ExtentEnd::Finished).await
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        self.transport.is_closed()
    }

    /// Bytes of the largest UDP payload that KV is sent in now: what was found that the path carries. `None` where it
    /// does not travel in datagrams.
    pub fn datagram_bytes(&self) -> Option<u16> {
        self.transport.datagram_bytes()
    }

    /// What carries the extents.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }
}

/// The bulk connections that were dialled to this node, by who dialled.
pub(crate) struct BulkSenders {
    layer: Option<TransportLayer>,
    /// The memory that peers may read KV in.
    shared_memory: Option<Arc<dyn KvMemory>>,
    senders: DashMap<(NodeId, Epoch), Entry>,
}

struct Entry {
    connection: usize,
    sender: BulkSender,
    /// Whether what comes over the connection is read.
    is_receiving: bool,
}

impl BulkSenders {
    pub(crate) fn new(layer: Option<TransportLayer>, shared_memory: Option<Arc<dyn KvMemory>>) -> Self {
        Self { layer, shared_memory, senders: DashMap::new() }
    }

    /// Sends over a connection that this node has dialled: the way back, which is always `quic`.
    pub(crate) fn over(&self, connection: &Connection, ledger: &Arc<Ledger>, tasks: &TaskTracker) -> BulkSender {
        self.sender(PeerTransport::new(connection, ledger, tasks, None))
    }

    /// Through what the tests have put around it.
    fn sender(&self, transport: Arc<dyn Transport>) -> BulkSender {
        BulkSender::new(match &self.layer {
            Some(layer) => layer(transport),
            None => transport,
        })
    }

    /// A newer connection of the same life takes the place of an older one.
    pub(crate) fn insert(
        &self,
        peer: &Hello,
        connection: &Connection,
        ledger: &Arc<Ledger>,
        tasks: &TaskTracker,
        is_receiving: bool,
    ) -> Arc<PeerTransport> {
        // A connection that broke during its hello was never removed.
        self.senders.retain(|_, entry| !entry.sender.is_closed());
        let transport = PeerTransport::new(connection, ledger, tasks, self.shared_memory.clone());
        let sender = self.sender(transport.clone());
        let entry = Entry { connection: connection.stable_id(), sender, is_receiving };
        self.senders.insert((peer.node.clone(), peer.epoch), entry);
        transport
    }

    pub(crate) fn remove(&self, peer: &Hello, connection: &Connection) {
        let key = (peer.node.clone(), peer.epoch);
        self.senders.remove_if(&key, |_, entry| entry.connection == connection.stable_id());
    }

    pub(crate) fn find(&self, node: &NodeId, epoch: Epoch) -> Option<BulkSender> {
        let entry = self.senders.get(&(node.clone(), epoch))?;
        (!entry.sender.is_closed()).then(|| entry.sender.clone())
    }

    pub(crate) fn is_receiving(&self, node: &NodeId, epoch: Epoch) -> bool {
        let entry = self.senders.get(&(node.clone(), epoch));
        entry.is_some_and(|entry| entry.is_receiving && !entry.sender.is_closed())
    }
}

/// One bulk connection, seen from its sender: `quic`, until the receiver can read this node's pool; from then on it
/// fetches what lies in a pool that it has opened, or takes by `shm` what lies in one that it has mapped.
pub(crate) struct PeerTransport {
    quic: QuicTransport,
    end: Arc<BulkEnd>,
    shared_memory: Option<Arc<dyn KvMemory>>,
    outbox: OnceLock<Arc<Outbox>>,
    pulled: pull::Sending,
}

impl PeerTransport {
    fn new(
        connection: &Connection,
        ledger: &Arc<Ledger>,
        tasks: &TaskTracker,
        shared_memory: Option<Arc<dyn KvMemory>>,
    ) -> Arc<Self> {
        let quic = QuicTransport { connection: connection.clone(), ledger: ledger.clone() };
        let end = BulkEnd::of(connection, tasks);
        Arc::new(Self { quic, end, shared_memory, outbox: OnceLock::new(), pulled: pull::Sending::default() })
    }

    /// The sender's part where the receiver fetches.
    pub(crate) fn pulled(&self) -> &pull::Sending {
        &self.pulled
    }

    /// The receiver has mapped the pool, and hears over `stream` where extents lie in it. Happens once: a token works
    /// once.
    pub(super) fn on_attached(&self, stream: UnixStream, activity: Option<&Arc<Activity>>) -> Arc<Outbox> {
        let new = || Outbox::new(stream, self.quic.connection.clone(), self.quic.ledger.clone(), activity);
        self.outbox.get_or_init(new).clone()
    }

    /// Where the receiver finds the payload, if it can read it by itself, and who tells it.
    fn shared_runs(&self, payload: &Payload) -> Option<(&Outbox, Vec<PoolRun>)> {
        let outbox = self.outbox.get()?;
        let is_shared = |extent: &&PoolExtent| {
            self.shared_memory.as_ref().is_some_and(|memory| Arc::ptr_eq(memory, &extent.memory))
        };
        match payload {
            Payload::Pool(extent) => Some((outbox, Some(extent).filter(is_shared)?.runs(NUM_RUNS_MAX)?)),
            Payload::Bytes(_) => None,
        }
    }
}

impl Transport for PeerTransport {
    fn name(&self) -> &'static str {
        let mapped = || self.outbox.get().map(|_| Carrier::Shm);
        self.pulled.carrier().or_else(mapped).unwrap_or(Carrier::Quic).as_str()
    }

    fn send<'a>(&'a self, header: &'a ExtentHeader, payload: Payload, end: ExtentEnd) -> SendFuture<'a> {
        Box::pin(async move {
            if let Some((carrier, runs)) = self.pulled.runs(&payload) {
                match pull::send(&self.quic.connection, &self.quic.ledger, header, (carrier, &runs), end).await? {
                    Posted::Taken => return Ok(()),
                    Posted::Busy => return self.quic.send(header, payload, end).await,
                }
            }
            match self.shared_runs(&payload) {
                Some((outbox, runs)) if end == ExtentEnd::Finished => outbox.send(header, &runs).await,
                // What is given up behind its places is what was given up behind some of its bytes.
                _ => self.quic.send(header, payload, end).await,
            }
        })
    }

    fn is_closed(&self) -> bool {
        self.end.has_come()
    }

    fn datagram_bytes(&self) -> Option<u16> {
        (self.name() == Carrier::Quic.as_str()).then(|| self.quic.connection.stats().path.current_mtu)
    }
}

/// Receives extents from one node for as long as it lives; dropping it closes the bulk connection.
pub struct BulkReceiver {
    connection: Connection,
    end: Arc<BulkEnd>,
    threads: Handle,
    carrier: Carrier,
    sender: BulkSender,
}

impl Drop for BulkReceiver {
    fn drop(&mut self) {
        let connection = self.connection.clone();
        // Where its lock is waited for by nobody else.
        self.threads.spawn(async move { connection.close(CLOSE_DONE, b"no longer needed") });
    }
}

/// What receiving needs.
pub(crate) struct ReceiveContext {
    pub(crate) zone: LandingZone,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) num_extents_max: u32,
    pub(crate) deadline: Duration,
    pub(crate) activity: Option<Arc<Activity>>,
}

impl ReceiveContext {
    /// Decides on an extent by its header and claims its range: with it, the bytes of its payload. A refusal has been
    /// counted and told.
    pub(super) fn admit(&self, header: &[u8; EXTENT_HEADER_BYTES]) -> Result<(Arriving, usize), RefusedExtent> {
        let header = ExtentHeader::decode(header).map_err(|_| RefusedExtent::Malformed);
        let header = header.inspect_err(|refused| self.zone.count_refused(*refused))?;
        let admitted = self.zone.admit(&header);
        let arriving = admitted.inspect_err(|refused| self.zone.tell_refused(&header, *refused))?;
        Ok((arriving, header.num_payload_bytes as usize))
    }
}

impl BulkReceiver {
    /// To be called on the threads of KV.
    pub(crate) fn start(
        connection: Connection,
        sender: BulkSender,
        context: ReceiveContext,
        attached: Option<Attached>,
        held: (Held, OwnedSemaphorePermit),
        tasks: &TaskTracker,
    ) -> Self {
        let (end, threads) = (BulkEnd::of(&connection, tasks), Handle::current());
        let carrier = if attached.is_some() { Carrier::Shm } else { Carrier::Quic };
        let (context, tracker, accepting) = (Arc::new(context), tasks.clone(), connection.clone());
        if let Some(attached) = attached {
            tasks.spawn(shm::receive(attached, context.clone(), connection.clone(), tasks.clone()));
        }
        tasks.spawn(async move {
            let reason = receive(&accepting, &context, &tracker).await;
            tell_end(&accepting, &reason);
            drop(held);
        });
        Self { connection, end, threads, sender, carrier }
    }

    /// KV is fetched too, and by preference.
    pub(crate) fn with_pulling(mut self, carrier: Carrier) -> Self {
        self.carrier = carrier;
        self
    }

    /// Name of the transport that KV comes over: `quic`, `shm`, `cuda-ipc` or `nixl`.
    pub fn transport_name(&self) -> &'static str {
        self.carrier.as_str()
    }

    /// The way back: extents for the node at the other end, over the same connection.
    pub fn sender(&self) -> &BulkSender {
        &self.sender
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        self.end.has_come()
    }

    /// Resolves when the connection is gone, with the reason.
    pub async fn closed(&self) -> CloseReason {
        self.end.come().await
    }
}

/// Logs what a connection was like from here: the size of the datagrams sent at its end, how many were lost, and how
/// often its path came to carry less.
pub(crate) fn tell_end(connection: &Connection, reason: &CloseReason) {
    let path = connection.stats().path;
    tracing::debug!(
        remote = %connection.remote_address(),
        %reason,
        datagram_bytes = path.current_mtu,
        num_sent = path.sent_packets,
        num_lost = path.lost_packets,
        num_black_holes = path.black_holes_detected,
        "a bulk connection ended"
    );
}

/// Takes in what comes over a bulk connection until it ends; says how it ended.
pub(crate) async fn receive(
    connection: &Connection,
    context: &Arc<ReceiveContext>,
    tasks: &TaskTracker,
) -> CloseReason {
    let places = Arc::new(Semaphore::new(context.num_extents_max as usize));
    loop {
        let place = places.clone().acquire_owned().await.expect("the semaphore of the extents is never closed");
        let stream = match connection.accept_uni().await {
            Ok(stream) => stream,
            Err(error) => return error.into(),
        };
        let context = context.clone();
        tasks.spawn(async move {
            let _held = context.ledger.hold(Kind::Stream(Traffic::Bulk));
            quic::receive_extent(&context, stream).await;
            drop(place);
        });
    }
}
