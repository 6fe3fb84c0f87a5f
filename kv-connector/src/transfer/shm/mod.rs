//! Extents that the receiver reads where they lie in the sender's memory: two processes of one host.
//!
//! ```text
//! prefill node                                        decode node
//! pool in a sealed memfd
//! bulk connection  <────────── dial, mutual TLS ───── Fabric::connect_bulk
//!   Welcome { registration: socket, token } ────────>
//! UNIX socket      <──────────────────────── token ── same host? else nobody is there: quic
//!   same user? token known? once?  ── descriptor ──>  sealed? of that size? map it, read only
//!                  <───────────────────── attached ──
//!   from now on shm              ───── attached ───>
//!
//! one extent, one bidirectional stream
//!   header, runs (offset, bytes) ──────────────────>  admit, hold the runs against pool and payload
//!                                                     slice by slice: copy into own blocks, hash them there
//!   the blocks may change again  <───────── taken ──  digest right: verified
//! ```
//!
//! The sender hashes its blocks and moves nothing; the receiver takes it in one pass: it copies a slice into
//! its own reserved blocks and hashes it there while it is in the cache.
//!
//! **One trust domain.** Who is attached can read the sender's whole pool, the KV of every request. Both ends
//! hold certificates of one cluster, are the same user on the same host, and were told so by their operator
//! (`--kv-transports`). Nobody but the sender can write: the memory is sealed against it.
//!
//! **No byte is trusted for having been read.** The sender may change a block while it is being read, by
//! mistake or because it gave the request up. The receiver reads the shared memory once and hashes its own
//! copy, in its own blocks; so what is in its blocks is what was proven, or the extent is refused. That is also why no block needs quarantine here: what may run on after a
//! stop, a lost connection or a closed landing is a read, and a read that comes too late changes nothing at
//! the sender and fails its digest, or has no landing, at the receiver. In a design where the sender writes
//! into the receiver's memory, a write that cannot be proven to have stopped would have to keep the
//! destination's blocks out of use until the mapping is torn down; this one never lets anybody else write.
//!
//! A registration is valid for one bulk connection: its token is forgotten with the connection and works
//! once. The mapping lives as long as the receiver's end of the connection.

mod attach;
mod memory;
mod registrar;

use bytes::Bytes;
use common::wire::bulk::EXTENT_TAKEN;
use common::wire::runs::{InvalidRuns, NUM_RUNS_BYTES, decode_num_runs, decode_runs, encode_runs};
use common::wire::{ExtentHeader, PoolRun};
use quinn::{ReadError, ReadExactError, RecvStream, SendStream, StoppedError};

use crate::accounting::{Carrier, Kind};
use crate::socket::Traffic;
use crate::stream::StreamCode;
use crate::transfer::bulk::ReceiveContext;
use crate::transfer::quic::{self, ExtentStream, QuicTransport};
use crate::transfer::{Arriving, ExtentEnd, RefusedExtent, SendExtentError};

pub(crate) use attach::Mapping;
pub(crate) use registrar::Registrar;
pub use registrar::SharedPool;

/// Copied and hashed at a time: stays in the second-level cache, takes some 20 microseconds, and
/// is as long as other tasks wait.
const SLICE_BYTES: usize = 64 << 10;

/// Sends one extent's places and resolves when the receiver has read and verified it.
pub(super) async fn send(
    quic: &QuicTransport,
    header: &ExtentHeader,
    runs: &[PoolRun],
    end: ExtentEnd,
) -> Result<(), SendExtentError> {
    let lost = |error: quinn::ConnectionError| SendExtentError::ConnectionLost(error.into());
    let _held = quic.ledger.hold(Kind::Stream(Traffic::Bulk));
    let (stream, mut answer) = quic.connection.open_bi().await.map_err(lost)?;
    let mut extent = ExtentStream::new(stream);
    extent.write(&mut [Bytes::copy_from_slice(&header.encode()), encode_runs(runs).into()]).await?;
    if end == ExtentEnd::Reset {
        return Ok(());
    }
    extent.finish()?;
    // Dropped before the answer, this half is stopped, which is how the receiver learns to give up.
    let mut taken = [0];
    match answer.read_exact(&mut taken).await {
        Ok(()) if taken == [EXTENT_TAKEN] => {
            quic.ledger.count_sent(Carrier::Shm, header.num_payload_bytes as usize);
            Ok(())
        }
        Err(ReadExactError::ReadError(ReadError::ConnectionLost(error))) => Err(lost(error)),
        Ok(()) | Err(_) => Err(SendExtentError::Refused),
    }
}

/// Takes one extent in.
pub(super) async fn receive_extent(context: &ReceiveContext, mut answer: SendStream, mut stream: RecvStream) {
    let landed = match &context.mapping {
        Some(mapping) => land_extent(context, mapping, &answer, &mut stream).await,
        None => Err(RefusedExtent::NotRegistered).inspect_err(|refused| context.zone.count_refused(*refused)),
    };
    match landed {
        // One byte fits any window; and a sender that no longer listens need not hear it.
        Ok(()) => drop(answer.write_all(&[EXTENT_TAKEN]).await),
        Err(refused) => {
            tracing::debug!(reason = refused.as_str(), "refused an extent");
            // Each fails if the sender gave up first.
            let _ = stream.stop(StreamCode::Refused.code());
            let _ = answer.reset(StreamCode::Refused.code());
        }
    }
}

async fn land_extent(
    context: &ReceiveContext,
    mapping: &Mapping,
    answer: &SendStream,
    stream: &mut RecvStream,
) -> Result<(), RefusedExtent> {
    let (mut arriving, num_bytes) = quic::admit(context, stream).await?;
    let closed = arriving.closed();
    let given_up = answer.stopped();
    let reading = async {
        let runs = read_runs(context, mapping, num_bytes, stream).await?;
        copy(mapping, &runs, &mut arriving).await
    };
    // Between two slices the copying looks up, so that whoever no longer wants it is heard.
    let read = tokio::select! {
        biased;
        () = closed => Err(RefusedExtent::Closed),
        reason = given_up => Err(match reason {
            Err(StoppedError::ConnectionLost(_)) => RefusedExtent::ConnectionLost,
            Ok(_) | Err(_) => RefusedExtent::Reset,
        }),
        read = reading => read,
    };
    match read {
        Ok(()) => arriving.finish()?,
        Err(refused) => {
            arriving.refuse(refused);
            return Err(refused);
        }
    }
    context.ledger.count_verified(Carrier::Shm, num_bytes);
    Ok(())
}

/// The list behind the header, and the stream's end behind it.
async fn read_runs(
    context: &ReceiveContext,
    mapping: &Mapping,
    payload_bytes: usize,
    stream: &mut RecvStream,
) -> Result<Vec<PoolRun>, RefusedExtent> {
    let refused = |invalid: InvalidRuns| {
        tracing::warn!(%invalid, "an extent names places in shared memory that cannot be its payload");
        match invalid {
            InvalidRuns::TooShort => RefusedExtent::Truncated,
            InvalidRuns::TooLong => RefusedExtent::WrongSize,
            _ => RefusedExtent::BadRuns,
        }
    };
    let mut number = [0; NUM_RUNS_BYTES];
    quic::read_exact(context.deadline, stream, &mut number).await?;
    let mut encoded = vec![0; decode_num_runs(number).map_err(refused)?];
    quic::read_exact(context.deadline, stream, &mut encoded).await?;
    match tokio::time::timeout(context.deadline, stream.read_chunk(1, true)).await {
        Ok(Ok(None)) => {}
        Ok(Ok(Some(_))) => return Err(RefusedExtent::BadRuns),
        Ok(Err(error)) => return Err(quic::refused_by(&error)),
        Err(_) => return Err(RefusedExtent::Stalled),
    }
    decode_runs(&encoded, mapping.num_bytes(), payload_bytes as u32).map_err(refused)
}

/// Copies the runs, one behind the other, into the blocks of the landing: each byte once, and each slice is hashed
/// while it is still in the cache.
async fn copy(mapping: &Mapping, runs: &[PoolRun], arriving: &mut Arriving) -> Result<(), RefusedExtent> {
    let mut rest: usize = runs.iter().map(|run| run.num_bytes as usize).sum();
    let mut runs = runs.iter().map(|run| (run.offset, run.end()));
    let (mut offset, mut end) = (0, 0);
    while rest > 0 {
        let num_bytes = SLICE_BYTES.min(rest);
        arriving.fill(num_bytes, |mut bytes| {
            while !bytes.is_empty() {
                if offset == end {
                    (offset, end) = runs.next().expect("the runs are as long as their sum");
                }
                let (now, later) = bytes.split_at_mut(bytes.len().min((end - offset) as usize));
                mapping.read(offset, now);
                offset += now.len() as u64;
                bytes = later;
            }
        })?;
        rest -= num_bytes;
        if rest > 0 {
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}
