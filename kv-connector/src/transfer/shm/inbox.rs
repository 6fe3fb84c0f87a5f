//! The receiver's part: copies extents out of the mapped pool into its own blocks.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use common::wire::PoolRun;
use common::wire::bulk::EXTENT_HEADER_BYTES;
use quinn::Connection;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::attach::{Attached, Mapping};
use super::mailbox::{
    Broken, Mailbox, Message, NUM_ON_THE_WAY_MAX, UNSENT_ANSWERS_BYTES_MAX, take_attached, take_message,
};
use crate::accounting::{Carrier, Kind};
use crate::link::CLOSE_DONE;
use crate::socket::Traffic;
use crate::transfer::bulk::ReceiveContext;
use crate::transfer::places::posted_runs;
use crate::transfer::{Arriving, RefusedExtent};
use crate::turn_end;
use crate::turns;

/// Copied and hashed at a time: stays in the second-level cache, takes some 20 microseconds, and
/// is as long as other tasks wait.
const SLICE_BYTES: usize = 64 << 10;

/// From one sender whose pool is mapped.
struct Inbox {
    mailbox: Arc<Mailbox>,
    mapping: Mapping,
    context: Arc<ReceiveContext>,
    /// What is being copied, by id.
    copying: Mutex<HashMap<u64, CancellationToken>>,
    lost: CancellationToken,
}

/// Takes in what comes until the socket or the bulk connection ends, and ends the other one.
pub(crate) async fn receive(
    attached: Attached,
    context: Arc<ReceiveContext>,
    connection: Connection,
    tasks: TaskTracker,
) {
    let Attached { mapping, stream, received } = attached;
    let inbox = Arc::new(Inbox {
        mailbox: Arc::new(Mailbox::new(stream, &[], UNSENT_ANSWERS_BYTES_MAX, context.activity.as_ref())),
        mapping,
        context,
        copying: Mutex::default(),
        lost: CancellationToken::new(),
    });
    let broken = tokio::select! {
        _ = connection.closed() => None,
        Err(broken) = inbox.read(received, &tasks) => Some(broken),
        Err(broken) = inbox.mailbox.flush() => Some(broken),
    };
    inbox.lost.cancel();
    if let Some(reason) = broken {
        if matches!(reason, Broken::Ended) {
            tracing::debug!(%reason, "the socket of a mapped pool ended");
        } else {
            tracing::warn!(%reason, "the socket of a mapped pool is given up, and the bulk connection with it");
        }
        connection.close(CLOSE_DONE, b"the socket of the mapped pool ended");
    }
}

impl Inbox {
    async fn read(
        self: &Arc<Self>,
        mut buffer: BytesMut,
        tasks: &TaskTracker,
    ) -> Result<std::convert::Infallible, Broken> {
        if buffer.is_empty() {
            self.mailbox.read(&mut buffer, self.context.deadline).await?;
        }
        take_attached(&mut buffer)?;
        loop {
            while let Some(message) = take_message(&mut buffer)? {
                // Also where nothing is copied, as of extents that nobody asked for: answers leave at the end of a turn.
                turns::give_way();
                match message {
                    Message::Extent { id, body } => {
                        let given_up = self.begin(id)?;
                        let inbox = self.clone();
                        tasks.spawn(async move { inbox.receive_extent(id, &body, given_up).await });
                    }
                    Message::GiveUp { id } => {
                        // It may have been answered meanwhile.
                        if let Some(given_up) = self.copying().get(&id) {
                            given_up.cancel();
                        }
                    }
                }
            }
            self.mailbox.read(&mut buffer, self.context.deadline).await?;
        }
    }

    fn begin(&self, id: u64) -> Result<CancellationToken, Broken> {
        let mut copying = self.copying();
        if copying.len() >= NUM_ON_THE_WAY_MAX {
            return Err(Broken::Malformed("more extents than may be on the way"));
        }
        let given_up = self.lost.child_token();
        match copying.insert(id, given_up.clone()) {
            Some(_) => Err(Broken::Malformed("an extent of an id that is in use")),
            None => Ok(given_up),
        }
    }

    async fn receive_extent(self: Arc<Self>, id: u64, body: &Bytes, given_up: CancellationToken) {
        let _held = self.context.ledger.hold(Kind::Stream(Traffic::Bulk));
        let landed = self.land(body, &given_up).await;
        if let Err(refused) = landed {
            tracing::debug!(reason = refused.as_str(), "refused an extent");
        }
        // Before the answer, behind which the sender may post another.
        self.copying().remove(&id);
        self.mailbox.put_answer(id, landed.is_ok());
        // With those of others: the sender has as many extents on the way as it wants, and waits for none of them.
        turn_end::at_turn_end(self.mailbox.clone());
    }

    async fn land(&self, body: &Bytes, given_up: &CancellationToken) -> Result<(), RefusedExtent> {
        let Some((header, runs)) = body.split_first_chunk::<EXTENT_HEADER_BYTES>() else {
            self.context.zone.count_refused(RefusedExtent::Malformed);
            return Err(RefusedExtent::Malformed);
        };
        let (mut arriving, num_bytes) = self.context.admit(header)?;
        let closed = arriving.closed();
        let copying = async {
            let runs = posted_runs(runs, self.mapping.num_bytes(), num_bytes, "shared memory")?;
            copy(&self.mapping, &runs, &mut arriving).await
        };
        // Between two slices the copying looks up, so that whoever no longer wants it is heard.
        let copied = tokio::select! {
            biased;
            () = closed => Err(RefusedExtent::Closed),
            () = given_up.cancelled() => Err(match self.lost.is_cancelled() {
                true => RefusedExtent::ConnectionLost,
                false => RefusedExtent::Reset,
            }),
            copied = copying => copied,
        };
        match copied {
            Ok(()) => arriving.finish()?,
            Err(refused) => {
                arriving.refuse(refused);
                return Err(refused);
            }
        }
        self.context.ledger.count_verified(Carrier::Shm, num_bytes);
        Ok(())
    }

    fn copying(&self) -> MutexGuard<'_, HashMap<u64, CancellationToken>> {
        self.copying.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
        turns::give_way();
        if rest > 0 {
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}
