//! The receiver's part: extents copied by the device into their blocks.

use std::sync::Arc;

use common::device_pool::PeerPool;
use common::kv_memory::KvMemory;
use common::wire::bulk::EXTENT_HEADER_BYTES;
use common::wire::runs::{InvalidRuns, NUM_RUNS_BYTES, NUM_RUNS_MAX, RUN_BYTES, decode_num_runs, decode_runs};
use common::wire::{ExtentHeader, PoolRun};
use quinn::{Connection, ReadToEndError, RecvStream, VarInt};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use super::TAKEN;
use crate::accounting::{Carrier, Kind};
use crate::link::CLOSE_DONE;
use crate::socket::Traffic;
use crate::stream::StreamCode;
use crate::transfer::bulk::ReceiveContext;
use crate::transfer::{Arriving, RefusedExtent};

const POST_BYTES_MAX: usize = EXTENT_HEADER_BYTES + NUM_RUNS_BYTES + NUM_RUNS_MAX * RUN_BYTES;

/// What one sender's extents are taken in with.
pub(crate) struct Receiving {
    pub(crate) peer: Arc<dyn PeerPool>,
    /// The pool that has opened it.
    pub(crate) memory: Arc<dyn KvMemory>,
    pub(crate) context: ReceiveContext,
    pub(crate) connection: Connection,
}

/// Takes in what the peer of `connection` posts until that ends.
pub(crate) async fn receive(receiving: Receiving, tasks: TaskTracker) {
    let receiving = Arc::new(receiving);
    let Receiving { context, connection, .. } = receiving.as_ref();
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(context.num_extents_max));
    let _held = context.ledger.hold(Kind::Registration);
    let places = Arc::new(Semaphore::new(context.num_extents_max as usize));
    loop {
        let place = places.clone().acquire_owned().await.expect("the semaphore of the extents is never closed");
        let Ok((mut answer, mut stream)) = connection.accept_bi().await else { return };
        let receiving = receiving.clone();
        tasks.spawn(async move {
            let _held = receiving.context.ledger.hold(Kind::Stream(Traffic::Bulk));
            match receiving.land(&mut stream).await {
                // One byte fits any window; and a sender that no longer listens need not hear it.
                Ok(()) => drop(answer.write_all(&[TAKEN]).await),
                Err(refused) => {
                    tracing::debug!(reason = refused.as_str(), "refused an extent");
                    // Each fails if the sender gave up first.
                    let _ = stream.stop(StreamCode::Refused.code());
                    let _ = answer.reset(StreamCode::Refused.code());
                }
            }
            drop(place);
        });
    }
}

impl Receiving {
    async fn land(self: &Arc<Self>, stream: &mut RecvStream) -> Result<(), RefusedExtent> {
        let zone = &self.context.zone;
        let posted = self.read(stream).await.inspect_err(|refused| zone.count_refused(*refused))?;
        let Some((header, runs)) = posted.split_first_chunk::<EXTENT_HEADER_BYTES>() else {
            zone.count_refused(RefusedExtent::Malformed);
            return Err(RefusedExtent::Malformed);
        };
        let header = ExtentHeader::decode(header).map_err(|_| RefusedExtent::Malformed);
        let header = header.inspect_err(|refused| zone.count_refused(*refused))?;
        let admitted = zone.admit(&header);
        let mut arriving = admitted.inspect_err(|refused| zone.tell_refused(&header, *refused))?;
        let num_bytes = header.num_payload_bytes as usize;
        let runs = match self.runs(runs, num_bytes) {
            Ok(runs) => runs,
            Err(refused) => {
                arriving.refuse(refused);
                return Err(refused);
            }
        };
        let receiving = self.clone();
        // A copy and a hash on the device, which are waited for: not what other tasks should wait for too. Not given up
        // midway either; what it does to the blocks of a closed landing, it has done when `close` returns.
        let copying = tokio::task::spawn_blocking(move || {
            let copied = receiving.copy(&runs, &mut arriving);
            (copied, arriving)
        });
        let Ok((copied, arriving)) = copying.await else { return Err(RefusedExtent::Unreadable) };
        match copied {
            Ok(()) => arriving.finish()?,
            Err(refused) => {
                arriving.refuse(refused);
                return Err(refused);
            }
        }
        self.context.ledger.count_verified(Carrier::CudaIpc, num_bytes);
        Ok(())
    }

    async fn read(&self, stream: &mut RecvStream) -> Result<Vec<u8>, RefusedExtent> {
        match tokio::time::timeout(self.context.deadline, stream.read_to_end(POST_BYTES_MAX)).await {
            Ok(Ok(posted)) => Ok(posted),
            Ok(Err(ReadToEndError::TooLong)) => Err(RefusedExtent::Malformed),
            Ok(Err(ReadToEndError::Read(quinn::ReadError::ConnectionLost(_)))) => Err(RefusedExtent::ConnectionLost),
            Ok(Err(ReadToEndError::Read(_))) => Err(RefusedExtent::Reset),
            Err(_) => Err(RefusedExtent::Stalled),
        }
    }

    /// The list behind the header.
    fn runs(&self, encoded: &[u8], payload_bytes: usize) -> Result<Vec<PoolRun>, RefusedExtent> {
        let refused = |invalid: InvalidRuns| {
            tracing::warn!(%invalid, "an extent names places in a device's memory that cannot be its payload");
            match invalid {
                InvalidRuns::TooShort => RefusedExtent::Truncated,
                InvalidRuns::TooLong => RefusedExtent::WrongSize,
                _ => RefusedExtent::BadRuns,
            }
        };
        let (number, list) = encoded.split_first_chunk::<NUM_RUNS_BYTES>().ok_or(RefusedExtent::Truncated)?;
        let num_bytes = decode_num_runs(*number).map_err(refused)?;
        match list.len().cmp(&num_bytes) {
            std::cmp::Ordering::Less => Err(RefusedExtent::Truncated),
            std::cmp::Ordering::Greater => Err(RefusedExtent::BadRuns),
            std::cmp::Ordering::Equal => {
                decode_runs(list, self.peer.num_bytes(), payload_bytes as u32).map_err(refused)
            }
        }
    }

    /// Device to device where the landing is in the pool that opened the peer's; else through the host.
    fn copy(&self, runs: &[PoolRun], arriving: &mut Arriving) -> Result<(), RefusedExtent> {
        let failed = |reason: String| {
            tracing::warn!(%reason, "a peer's pool cannot be read any more: the bulk connection is given up");
            self.connection.close(CLOSE_DONE, b"the device cannot read the pool any more");
            RefusedExtent::Unreadable
        };
        if arriving.lands_in(&self.memory) {
            return arriving.fill_on_device(|layer, blocks, first_granule| {
                self.peer.copy_granules(runs, layer, blocks, first_granule).map_err(failed)
            });
        }
        for run in runs {
            let mut bytes = vec![0; run.num_bytes as usize];
            self.peer.read(run.offset, &mut bytes).map_err(failed)?;
            arriving.write(&bytes)?;
        }
        Ok(())
    }
}
