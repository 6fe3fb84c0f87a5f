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
use common::wire::{BulkGroup, ExtentHeader, Hello, PoolRun};
use dashmap::DashMap;
use quinn::Connection;
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::accounting::{Carrier, Held, Kind, Ledger};
use crate::busy_poll::Activity;
use crate::link::CloseReason;
use crate::socket::Traffic;
use crate::transfer::pull::{self, Posted};
use crate::transfer::quic::{self, QuicTransport};
use crate::transfer::shm::{self, Attached, Outbox};
use crate::transfer::stripes::{GroupHolds, Stripes};
use crate::transfer::{
    Arriving, ExtentEnd, ExtentSends, LandingZone, Payload, RefusedExtent, SendExtentError, Transport, TransportLayer,
    UnsealedExtent, payload::PoolExtent,
};

/// Sends extents to one life of one node. Cheap to clone.
#[derive(Clone)]
pub struct BulkSender {
    transport: Arc<dyn Transport>,
    /// Where extents are sealed and sent.
    threads: Handle,
    /// One for each connection.
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

    /// Sends over `stripes`, through what the tests have put around them.
    fn over(stripes: &Arc<Stripes>, layer: Option<&TransportLayer>) -> Self {
        let transport: Arc<dyn Transport> = stripes.clone();
        let transport = layer.map_or(transport.clone(), |layer| layer(transport));
        Self { transport, threads: Handle::current(), sealing: stripes.sealing().clone() }
    }

    /// Begins to hash and send one extent on the threads of KV, behind those that were begun before. `sends` says in
    /// the end whether it left; until it does, even if it is given up, the extent's blocks must stay pinned.
    pub fn begin(&self, sends: &mut ExtentSends, extent: UnsealedExtent) {
        let sender = self.clone();
        sends.spawn_on(&self.threads, async move { sender.seal_and_send(extent).await.is_ok() });
    }

    async fn seal_and_send(&self, extent: UnsealedExtent) -> Result<(), SendExtentError> {
        // One of a connection at a time up to its first wait, so that what was hashed leaves while a cache has it, and
        // in order.
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

    /// Whether the last of the connections is gone.
    pub fn is_closed(&self) -> bool {
        self.transport.is_closed()
    }

    /// Bytes of the largest UDP payload that KV is sent in now, on one of the connections: what was found that the path
    /// carries. `None` where it does not travel in datagrams.
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
    stripes: Arc<Stripes>,
    sender: BulkSender,
    /// Whether what comes over the connections is read.
    is_receiving: bool,
}

impl BulkSenders {
    pub(crate) fn new(layer: Option<TransportLayer>, shared_memory: Option<Arc<dyn KvMemory>>) -> Self {
        Self { layer, shared_memory, senders: DashMap::new() }
    }

    /// Sends over connections that this node has dialled: the way back, which is always `quic`.
    pub(crate) fn over(&self, stripes: &Arc<Stripes>) -> BulkSender {
        BulkSender::over(stripes, self.layer.as_ref())
    }

    /// A connection begins a group, which takes the place of an older one of the same life. What arrives over it is
    /// read if it holds a window; it has `num_stripes_max` connections at most.
    pub(crate) fn insert(
        &self,
        peer: &Hello,
        group: BulkGroup,
        connection: &Connection,
        (holds, num_stripes_max): (GroupHolds, u16),
        (ledger, tasks): (&Arc<Ledger>, &TaskTracker),
    ) -> Result<(Arc<Stripes>, Arc<PeerTransport>), String> {
        // A connection that broke during its hello was never removed.
        self.senders.retain(|_, entry| !entry.sender.is_closed());
        let is_receiving = holds.has_window();
        let num_max = group.num_connections.clamp(1, num_stripes_max);
        let stripes = Stripes::new(group, usize::from(num_max), holds, ledger);
        let transport = PeerTransport::new(connection, ledger, self.shared_memory.clone());
        stripes.add(None, transport.clone(), tasks)?;
        let entry = Entry { stripes: stripes.clone(), sender: self.over(&stripes), is_receiving };
        self.senders.insert((peer.node.clone(), peer.epoch), entry);
        Ok((stripes, transport))
    }

    /// A connection becomes part of the group that it names.
    ///
    /// # Errors
    /// A sentence: there is no such group, or it has as many as it may.
    pub(crate) fn join(
        &self,
        peer: &Hello,
        group: BulkGroup,
        connection: &Connection,
        (ledger, tasks): (&Arc<Ledger>, &TaskTracker),
    ) -> Result<Arc<Stripes>, String> {
        let entry = self.senders.get(&(peer.node.clone(), peer.epoch));
        let stripes = entry.filter(|entry| entry.stripes.group().id == group.id).map(|entry| entry.stripes.clone());
        let stripes = stripes.ok_or("the bulk connections it belongs to have ended, or others took their place")?;
        stripes.add(None, PeerTransport::new(connection, ledger, None), tasks)?;
        Ok(stripes)
    }

    /// Forgets a group whose last connection has ended.
    pub(crate) fn remove_ended(&self, peer: &Hello, stripes: &Arc<Stripes>) {
        let key = (peer.node.clone(), peer.epoch);
        self.senders.remove_if(&key, |_, entry| Arc::ptr_eq(&entry.stripes, stripes) && stripes.num_open() == 0);
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
    shared_memory: Option<Arc<dyn KvMemory>>,
    outbox: OnceLock<Arc<Outbox>>,
    pulled: pull::Sending,
}

impl PeerTransport {
    pub(crate) fn new(
        connection: &Connection,
        ledger: &Arc<Ledger>,
        shared_memory: Option<Arc<dyn KvMemory>>,
    ) -> Arc<Self> {
        let quic = QuicTransport { connection: connection.clone(), ledger: ledger.clone() };
        Arc::new(Self { quic, shared_memory, outbox: OnceLock::new(), pulled: pull::Sending::default() })
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.quic.connection
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

impl PeerTransport {
    /// What carries the extents now.
    pub(super) fn carrier(&self) -> Carrier {
        let mapped = || self.outbox.get().map(|_| Carrier::Shm);
        self.pulled.carrier().or_else(mapped).unwrap_or(Carrier::Quic)
    }

    /// Sends one extent, as [`Transport::send`]. What `must_arrive` has arrived when this resolves.
    pub(super) async fn send(
        &self,
        header: &ExtentHeader,
        payload: Payload,
        end: ExtentEnd,
        must_arrive: bool,
    ) -> Result<(), SendExtentError> {
        if let Some((carrier, runs)) = self.pulled.runs(&payload) {
            match pull::send(&self.quic.connection, &self.quic.ledger, header, (carrier, &runs), end).await? {
                Posted::Taken => return Ok(()),
                Posted::Busy => return self.quic.send(header, payload, end, must_arrive).await,
            }
        }
        match self.shared_runs(&payload) {
            Some((outbox, runs)) if end == ExtentEnd::Finished => outbox.send(header, &runs).await,
            // What is given up behind its places is what was given up behind some of its bytes.
            _ => self.quic.send(header, payload, end, must_arrive).await,
        }
    }

    /// Bytes of the largest UDP payload, if it sends any.
    pub(super) fn datagram_bytes(&self) -> Option<u16> {
        (self.carrier() == Carrier::Quic).then(|| self.quic.connection.stats().path.current_mtu)
    }
}

/// Receives extents from one node for as long as it lives; dropping it closes the bulk connections.
pub struct BulkReceiver {
    stripes: Arc<Stripes>,
    threads: Handle,
    carrier: Carrier,
    sender: BulkSender,
}

impl Drop for BulkReceiver {
    fn drop(&mut self) {
        let stripes = self.stripes.clone();
        // Where their locks are waited for by nobody else.
        self.threads.spawn(async move { stripes.close(b"no longer needed") });
    }
}

/// What receiving needs.
pub(crate) struct ReceiveContext {
    pub(crate) zone: LandingZone,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) num_extents_max: u32,
    pub(crate) deadline: Duration,
    pub(crate) activity: Option<Arc<Activity>>,
    /// The connection, and those it is one of.
    pub(crate) connection: Connection,
    pub(crate) stripes: Arc<Stripes>,
}

impl ReceiveContext {
    /// Whether extents may come again, over another connection.
    pub(super) fn is_of_several(&self) -> bool {
        self.stripes.is_several()
    }

    /// Whether what is lost with this connection will come again.
    pub(super) fn has_other_connections(&self) -> bool {
        self.stripes.has_others(&self.connection)
    }

    /// As [`admit`](Self::admit), where an extent may come again: `None` if all of it came before, over another
    /// connection.
    pub(super) async fn admit_settled(
        &self,
        header: &[u8; EXTENT_HEADER_BYTES],
    ) -> Result<(Option<Arriving>, usize), RefusedExtent> {
        let header = ExtentHeader::decode(header).map_err(|_| RefusedExtent::Malformed);
        let header = header.inspect_err(|refused| self.zone.count_refused(*refused))?;
        let num_bytes = header.num_payload_bytes as usize;
        match self.zone.admit_settled(&header, self.deadline).await {
            Ok(arriving) => Ok((arriving, num_bytes)),
            Err(refused) => {
                self.zone.tell_refused(&header, refused);
                Err(refused)
            }
        }
    }

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
    /// From the first connection of a group; others may join it. To be called on the threads of KV.
    pub(crate) fn start(
        sender: BulkSender,
        context: ReceiveContext,
        attached: Option<Attached>,
        held: Held,
        tasks: &TaskTracker,
    ) -> Self {
        let carrier = if attached.is_some() { Carrier::Shm } else { Carrier::Quic };
        let (stripes, context) = (context.stripes.clone(), Arc::new(context));
        if let Some(attached) = attached {
            tasks.spawn(shm::receive(attached, context.clone(), context.connection.clone(), tasks.clone()));
        }
        tasks.spawn(receive_until_the_end(context, held, tasks.clone()));
        Self { stripes, threads: Handle::current(), sender, carrier }
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

    /// The way back: extents for the node at the other end, over the same connections.
    pub fn sender(&self) -> &BulkSender {
        &self.sender
    }

    /// Connections that KV goes over now. More may come, up to those that were asked for, and may be lost.
    pub fn num_connections(&self) -> usize {
        self.stripes.num_open()
    }

    /// Whether the last of the connections is gone.
    pub fn is_closed(&self) -> bool {
        self.stripes.end().has_come()
    }

    /// Resolves when the last of the connections is gone, with the reason.
    pub async fn closed(&self) -> CloseReason {
        self.stripes.end().come().await
    }
}

/// Takes in what comes over a connection that this node has dialled.
pub(crate) async fn receive_until_the_end(context: Arc<ReceiveContext>, held: Held, tasks: TaskTracker) {
    let reason = receive(&context, &tasks).await;
    tell_end(&context.connection, &reason);
    drop(held);
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
pub(crate) async fn receive(context: &Arc<ReceiveContext>, tasks: &TaskTracker) -> CloseReason {
    let places = Arc::new(Semaphore::new(context.num_extents_max as usize));
    loop {
        let place = places.clone().acquire_owned().await.expect("the semaphore of the extents is never closed");
        let stream = match context.connection.accept_uni().await {
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
