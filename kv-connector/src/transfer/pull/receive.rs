//! The receiver's part: extents fetched into their blocks.

use std::sync::Arc;

use common::ids::{Epoch, NodeId};
use common::wire::bulk::EXTENT_HEADER_BYTES;
use common::wire::runs::{NUM_RUNS_BYTES, NUM_RUNS_MAX, RUN_BYTES};
use common::wire::{ExtentHeader, PoolRun};
use quinn::{Connection, ReadToEndError, RecvStream, VarInt};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use super::{PullError, PulledPool, Puller, TAKEN};
use crate::accounting::Kind;
use crate::link::CLOSE_DONE;
use crate::socket::Traffic;
use crate::stream::StreamCode;
use crate::transfer::bulk::ReceiveContext;
use crate::transfer::places::posted_runs;
use crate::transfer::{Arriving, RefusedExtent};

const POST_BYTES_MAX: usize = EXTENT_HEADER_BYTES + NUM_RUNS_BYTES + NUM_RUNS_MAX * RUN_BYTES;

/// What one sender's extents are taken in with.
pub(crate) struct Receiving {
    /// Whose pool it is.
    pub(crate) life: (NodeId, Epoch),
    pub(crate) peer: Arc<dyn PulledPool>,
    /// What has opened it.
    pub(crate) puller: Arc<Puller>,
    pub(crate) context: ReceiveContext,
    pub(crate) connection: Connection,
    /// Of the node's places, those that this sender may take.
    pub(crate) places: Arc<Semaphore>,
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
                    let code = if refused == RefusedExtent::Busy { StreamCode::Busy } else { StreamCode::Refused };
                    let _ = stream.stop(code.code());
                    let _ = answer.reset(code.code());
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
        let (mut arriving, num_bytes) = self.context.admit(header)?;
        let closed = arriving.closed();
        let beginning = async {
            let runs = posted_runs(runs, self.peer.num_bytes(), num_bytes, "a pool to fetch from")?;
            let own = self.places.clone().acquire_owned().await.expect("it is never closed");
            Ok((runs, (own, self.puller.place().await)))
        };
        let begun = tokio::select! {
            biased;
            () = closed => Err(RefusedExtent::Closed),
            begun = beginning => begun,
        };
        let (runs, place) = match begun {
            Ok(begun) => begun,
            Err(refused) => {
                arriving.refuse(refused);
                return Err(refused);
            }
        };
        let receiving = self.clone();
        // It is waited for, which is not what other tasks should wait for too. Not given up midway either; what it does to
        // the blocks of a closed landing, it has done when `close` returns.
        let pulling = tokio::task::spawn_blocking(move || {
            let pulled = receiving.pull(&runs, &mut arriving);
            drop(place);
            (pulled, arriving)
        });
        let Ok((pulled, arriving)) = pulling.await else {
            // It panicked, which gave the range back and told nobody.
            zone.count_refused(RefusedExtent::Unreadable);
            if let Ok(header) = ExtentHeader::decode(header) {
                zone.tell_refused(&header, RefusedExtent::Unreadable);
            }
            return Err(RefusedExtent::Unreadable);
        };
        match pulled {
            Ok(()) => arriving.finish()?,
            Err(refused) => {
                arriving.refuse(refused);
                return Err(refused);
            }
        }
        self.context.ledger.count_verified(self.puller.method().carrier(), num_bytes);
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

    /// Fills the blocks; what cannot be fetched from is not asked again in this life of the peer.
    fn pull(&self, runs: &[PoolRun], arriving: &mut Arriving) -> Result<(), RefusedExtent> {
        if self.puller.has_failed(&self.life) {
            return Err(RefusedExtent::Unreadable);
        }
        let reason = match self.peer.pull(runs, arriving) {
            Ok(()) => return Ok(()),
            Err(PullError::Refused(refused)) => return Err(refused),
            Err(PullError::Busy(reason)) => {
                tracing::debug!(peer = %self.life.0, %reason, "the peer is asked for an extent's bytes instead");
                return Err(RefusedExtent::Busy);
            }
            Err(PullError::Failed(reason)) => reason,
        };
        tracing::warn!(
            peer = %self.life.0,
            transport = self.puller.method().carrier().as_str(),
            %reason,
            "the peer's KV cannot be fetched: the bulk connection is given up, the next goes without this transport"
        );
        self.puller.on_failed(&self.life);
        self.connection.close(CLOSE_DONE, b"KV cannot be fetched out of the pool any more");
        Err(RefusedExtent::Unreadable)
    }
}
