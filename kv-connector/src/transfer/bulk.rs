//! Extents over QUIC: one unidirectional stream each, on a connection of their own, in both directions.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::ids::{Epoch, NodeId};
use common::wire::bulk::EXTENT_HEADER_BYTES;
use common::wire::{ExtentHeader, Hello};
use dashmap::DashMap;
use quinn::{Connection, ReadError, ReadExactError, WriteError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use crate::accounting::{Held, Kind, Ledger};
use crate::link::{CLOSE_DONE, CloseReason};
use crate::socket::Traffic;
use crate::stream::StreamCode;
use crate::transfer::{
    Arriving, ExtentEnd, LandingZone, RefusedExtent, SendExtentError, SendFuture, Transport, TransportLayer,
};

/// Payload bytes taken from the connection at a time.
const READ_BYTES: usize = 256 << 10;

/// Sends extents to one life of one node. Cheap to clone.
#[derive(Clone)]
pub struct BulkSender {
    transport: Arc<dyn Transport>,
}

impl BulkSender {
    /// Sends through `transport`.
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        Self { transport }
    }

    /// Sends one extent. Resolves when the connection has taken all of it, which is when the receiver keeps
    /// up; dropping the future gives the extent up.
    ///
    /// # Errors
    /// [`SendExtentError`].
    pub async fn send_extent(&self, header: &ExtentHeader, payload: Bytes) -> Result<(), SendExtentError> {
        self.transport.send(header, payload, ExtentEnd::Finished).await
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        self.transport.is_closed()
    }

    /// What carries the extents.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }
}

/// The bulk connections that were dialled to this node, by who dialled.
pub(crate) struct BulkSenders {
    layer: Option<TransportLayer>,
    senders: DashMap<(NodeId, Epoch), Entry>,
}

struct Entry {
    connection: usize,
    sender: BulkSender,
    /// Whether what comes over the connection is read.
    is_receiving: bool,
}

impl BulkSenders {
    pub(crate) fn new(layer: Option<TransportLayer>) -> Self {
        Self { layer, senders: DashMap::new() }
    }

    /// Sends over `connection`, through what the tests have put around it.
    pub(crate) fn over(&self, connection: &Connection, ledger: &Arc<Ledger>) -> BulkSender {
        let quic = QuicTransport { connection: connection.clone(), ledger: ledger.clone() };
        let transport: Arc<dyn Transport> = Arc::new(quic);
        BulkSender::new(match &self.layer {
            Some(layer) => layer(transport),
            None => transport,
        })
    }

    /// A newer connection of the same life takes the place of an older one.
    pub(crate) fn insert(&self, peer: &Hello, connection: &Connection, ledger: &Arc<Ledger>, is_receiving: bool) {
        // A connection that broke during its hello was never removed.
        self.senders.retain(|_, entry| !entry.sender.is_closed());
        let sender = self.over(connection, ledger);
        let entry = Entry { connection: connection.stable_id(), sender, is_receiving };
        self.senders.insert((peer.node.clone(), peer.epoch), entry);
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

struct QuicTransport {
    connection: Connection,
    ledger: Arc<Ledger>,
}

/// quinn finishes a stream that is dropped; here a dropped stream is an extent given up.
struct ExtentStream {
    stream: quinn::SendStream,
    is_finished: bool,
}

impl Drop for ExtentStream {
    fn drop(&mut self) {
        if !self.is_finished {
            // Fails only if the receiver stopped it already.
            let _ = self.stream.reset(StreamCode::Cancelled.code());
        }
    }
}

impl Transport for QuicTransport {
    fn name(&self) -> &'static str {
        "quic"
    }

    fn send<'a>(&'a self, header: &'a ExtentHeader, payload: Bytes, end: ExtentEnd) -> SendFuture<'a> {
        Box::pin(async move {
            let _held = self.ledger.hold(Kind::Stream(Traffic::Bulk));
            let num_bytes = payload.len();
            let stream =
                self.connection.open_uni().await.map_err(|error| SendExtentError::ConnectionLost(error.into()))?;
            let mut extent = ExtentStream { stream, is_finished: false };
            let mut chunks = [Bytes::copy_from_slice(&header.encode()), payload];
            extent.stream.write_all_chunks(&mut chunks).await.map_err(send_error)?;
            if end == ExtentEnd::Reset {
                return Ok(());
            }
            extent.stream.finish().map_err(|_| SendExtentError::Refused)?;
            extent.is_finished = true;
            self.ledger.count_sent(num_bytes);
            Ok(())
        })
    }

    fn is_closed(&self) -> bool {
        self.connection.close_reason().is_some()
    }
}

fn send_error(error: WriteError) -> SendExtentError {
    match error {
        WriteError::Stopped(_) | WriteError::ClosedStream | WriteError::ZeroRttRejected => SendExtentError::Refused,
        WriteError::ConnectionLost(error) => SendExtentError::ConnectionLost(error.into()),
    }
}

/// Receives extents from one node for as long as it lives; dropping it closes the bulk connection.
pub struct BulkReceiver {
    connection: Connection,
    sender: BulkSender,
}

impl Drop for BulkReceiver {
    fn drop(&mut self) {
        self.connection.close(CLOSE_DONE, b"no longer needed");
    }
}

/// What receiving needs.
pub(crate) struct ReceiveContext {
    pub(crate) zone: LandingZone,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) num_extents_max: u32,
    pub(crate) deadline: Duration,
}

impl BulkReceiver {
    pub(crate) fn start(
        connection: Connection,
        sender: BulkSender,
        context: ReceiveContext,
        held: (Held, OwnedSemaphorePermit),
        tasks: &TaskTracker,
    ) -> Self {
        let (context, tracker, accepting) = (Arc::new(context), tasks.clone(), connection.clone());
        tasks.spawn(async move {
            let reason = receive(&accepting, &context, &tracker).await;
            tracing::debug!(remote = %accepting.remote_address(), %reason, "a bulk connection ended");
            drop(held);
        });
        Self { connection, sender }
    }

    /// The way back: extents for the node at the other end, over the same connection.
    pub fn sender(&self) -> &BulkSender {
        &self.sender
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        self.connection.close_reason().is_some()
    }

    /// Resolves when the connection is gone, with the reason.
    pub async fn closed(&self) -> CloseReason {
        self.connection.closed().await.into()
    }
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
            receive_extent(&context, stream).await;
            drop(place);
        });
    }
}

async fn receive_extent(context: &ReceiveContext, mut stream: quinn::RecvStream) {
    if let Err(refused) = land_extent(context, &mut stream).await {
        tracing::debug!(reason = refused.as_str(), "refused an extent");
        // Fails if there was nothing left to stop.
        let _ = stream.stop(StreamCode::Refused.code());
    }
}

async fn land_extent(context: &ReceiveContext, stream: &mut quinn::RecvStream) -> Result<(), RefusedExtent> {
    let header = read_header(context, stream).await.inspect_err(|refused| context.zone.count_refused(*refused))?;
    let admitted = context.zone.admit(&header);
    let mut arriving = admitted.inspect_err(|refused| context.zone.tell_refused(&header, *refused))?;
    match read_payload(context, stream, &mut arriving).await {
        Ok(()) => arriving.finish(),
        Err(refused) => {
            arriving.refuse(refused);
            Err(refused)
        }
    }
}

async fn read_header(context: &ReceiveContext, stream: &mut quinn::RecvStream) -> Result<ExtentHeader, RefusedExtent> {
    let mut bytes = [0; EXTENT_HEADER_BYTES];
    match tokio::time::timeout(context.deadline, stream.read_exact(&mut bytes)).await {
        Ok(Ok(())) => ExtentHeader::decode(&bytes).map_err(|_| RefusedExtent::Malformed),
        Ok(Err(ReadExactError::FinishedEarly(_))) => Err(RefusedExtent::Truncated),
        Ok(Err(ReadExactError::ReadError(error))) => Err(refused_by(&error)),
        Err(_) => Err(RefusedExtent::Stalled),
    }
}

async fn read_payload(
    context: &ReceiveContext,
    stream: &mut quinn::RecvStream,
    arriving: &mut Arriving,
) -> Result<(), RefusedExtent> {
    let closed = arriving.closed();
    tokio::pin!(closed);
    loop {
        let chunk = tokio::select! {
            biased;
            () = &mut closed => return Err(RefusedExtent::Closed),
            chunk = tokio::time::timeout(context.deadline, stream.read_chunk(READ_BYTES, true)) => chunk,
        };
        match chunk {
            Ok(Ok(Some(chunk))) => arriving.write(&chunk.bytes)?,
            Ok(Ok(None)) => return Ok(()),
            Ok(Err(error)) => return Err(refused_by(&error)),
            Err(_) => return Err(RefusedExtent::Stalled),
        }
    }
}

fn refused_by(error: &ReadError) -> RefusedExtent {
    match error {
        ReadError::ConnectionLost(_) => RefusedExtent::ConnectionLost,
        _ => RefusedExtent::Reset,
    }
}
