//! Extents as bytes on a QUIC connection: one unidirectional stream each. Serves between any two nodes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::wire::ExtentHeader;
use common::wire::bulk::EXTENT_HEADER_BYTES;
use quinn::{Connection, ReadError, ReadExactError, RecvStream};

use crate::accounting::{Carrier, Kind, Ledger};
use crate::socket::Traffic;
use crate::stream::StreamCode;
use crate::transfer::bulk::ReceiveContext;
use crate::transfer::extent_stream::ExtentStream;
use crate::transfer::payload::Pieces;
use crate::transfer::{Arriving, ExtentEnd, Payload, RefusedExtent, SendExtentError};
use crate::turns;

/// Pieces of a payload, a datagram's worth each, that are taken from the connection at a time.
const NUM_PIECES_PER_READ: usize = 64;

/// Sends over one connection.
pub(super) struct QuicTransport {
    pub(super) connection: Connection,
    pub(super) ledger: Arc<Ledger>,
}

impl QuicTransport {
    /// Resolves when the connection has taken a copy of all of it, or where it reads the payload in the pool or is told
    /// that it `must_arrive`, when all of it has arrived. Dropped before, it is given up, and the pool no longer read.
    pub(super) async fn send(
        &self,
        header: &ExtentHeader,
        payload: Payload,
        end: ExtentEnd,
        must_arrive: bool,
    ) -> Result<(), SendExtentError> {
        let _held = self.ledger.hold(Kind::Stream(Traffic::Bulk));
        let num_bytes = payload.len();
        let stream = self.connection.open_uni().await.map_err(|error| SendExtentError::ConnectionLost(error.into()))?;
        let Pieces { mut bytes, in_use } = payload.into_pieces();
        // Behind the pieces, so that it is dropped before them.
        let mut extent = ExtentStream::new(stream);
        extent.write(&mut [Bytes::copy_from_slice(&header.encode())]).await?;
        extent.write(&mut bytes).await?;
        if end == ExtentEnd::Reset {
            return Ok(());
        }
        match in_use {
            Some(in_use) => {
                extent.finish_and_arrive().await?;
                drop(bytes);
                in_use.ended().await;
            }
            None if must_arrive => extent.finish_and_arrive().await?,
            None => extent.finish()?,
        }
        self.ledger.count_sent(Carrier::Quic, num_bytes);
        Ok(())
    }
}

/// Takes one extent in.
pub(super) async fn receive_extent(context: &ReceiveContext, mut stream: RecvStream) {
    if let Err(refused) = land_extent(context, &mut stream).await {
        tracing::debug!(reason = refused.as_str(), "refused an extent");
        // Fails if there was nothing left to stop.
        let _ = stream.stop(StreamCode::Refused.code());
    }
}

async fn land_extent(context: &ReceiveContext, stream: &mut RecvStream) -> Result<(), RefusedExtent> {
    let (arriving, num_bytes) = admit(context, stream).await?;
    let Some(mut arriving) = arriving else { return pass_over(context.deadline, stream, num_bytes).await };
    match read_payload(context.deadline, stream, &mut arriving).await {
        Ok(()) => arriving.finish()?,
        // Its sender sends it again over another connection.
        Err(refused @ RefusedExtent::ConnectionLost) if context.has_other_connections() => {
            arriving.refuse_untold(refused);
            return Err(refused);
        }
        Err(refused) => {
            arriving.refuse(refused);
            return Err(refused);
        }
    }
    context.ledger.count_verified(Carrier::Quic, num_bytes);
    Ok(())
}

/// Reads a header and claims its range, unless all of it is there; a refusal has been counted and told.
async fn admit(context: &ReceiveContext, stream: &mut RecvStream) -> Result<(Option<Arriving>, usize), RefusedExtent> {
    let mut bytes = [0; EXTENT_HEADER_BYTES];
    let read = read_exact(context.deadline, stream, &mut bytes).await;
    read.inspect_err(|refused| context.zone.count_refused(*refused))?;
    if context.is_of_several() {
        return context.admit_settled(&bytes).await;
    }
    context.admit(&bytes).map(|(arriving, num_bytes)| (Some(arriving), num_bytes))
}

/// Reads a payload that is there already, so that its sender learns that it has arrived.
async fn pass_over(deadline: Duration, stream: &mut RecvStream, num_bytes: usize) -> Result<(), RefusedExtent> {
    let mut num_read = 0;
    loop {
        match tokio::time::timeout(deadline, stream.read_chunk(usize::MAX, true)).await {
            Ok(Ok(Some(chunk))) => num_read += chunk.bytes.len(),
            Ok(Ok(None)) => return Ok(()),
            Ok(Err(error)) => return Err(refused_by(&error)),
            Err(_) => return Err(RefusedExtent::Stalled),
        }
        if num_read > num_bytes {
            return Err(RefusedExtent::WrongSize);
        }
    }
}

async fn read_exact(deadline: Duration, stream: &mut RecvStream, into: &mut [u8]) -> Result<(), RefusedExtent> {
    match tokio::time::timeout(deadline, stream.read_exact(into)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(ReadExactError::FinishedEarly(_))) => Err(RefusedExtent::Truncated),
        Ok(Err(ReadExactError::ReadError(error))) => Err(refused_by(&error)),
        Err(_) => Err(RefusedExtent::Stalled),
    }
}

async fn read_payload(
    deadline: Duration,
    stream: &mut RecvStream,
    arriving: &mut Arriving,
) -> Result<(), RefusedExtent> {
    let closed = arriving.closed();
    tokio::pin!(closed);
    let mut pieces = [const { Bytes::new() }; NUM_PIECES_PER_READ];
    loop {
        let read = tokio::select! {
            biased;
            () = &mut closed => return Err(RefusedExtent::Closed),
            read = tokio::time::timeout(deadline, stream.read_chunks(&mut pieces)) => read,
        };
        match read {
            Ok(Ok(Some(count))) => {
                for piece in &mut pieces[..count] {
                    arriving.write(&std::mem::take(piece))?;
                    turns::give_way();
                }
            }
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
