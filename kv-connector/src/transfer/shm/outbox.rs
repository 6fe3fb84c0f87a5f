//! The sender's part: posts where extents lie, and waits until the receiver has verified its copies.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use common::wire::runs::encode_runs;
use common::wire::{ExtentHeader, PoolRun};
use quinn::Connection;
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::mailbox::{ATTACHED, Broken, Mailbox, NUM_ON_THE_WAY_MAX, UNSENT_MESSAGES_BYTES_MAX, take_answer};
use crate::accounting::{Carrier, Kind, Ledger};
use crate::busy_poll::Activity;
use crate::link::{CLOSE_DONE, CloseReason};
use crate::socket::Traffic;
use crate::transfer::SendExtentError;

/// An answer is nine bytes: the rest of one is there, or the peer is broken.
const REST_DEADLINE: Duration = Duration::from_secs(5);

/// To one receiver that has mapped this node's pool.
pub(crate) struct Outbox {
    mailbox: Mailbox,
    connection: Connection,
    ledger: Arc<Ledger>,
    places: Arc<Semaphore>,
    posted: Mutex<Posted>,
}

#[derive(Default)]
struct Posted {
    next_id: u64,
    /// Not answered yet, those that were given up included: they keep their places. Nothing more is posted once the
    /// attachment has ended.
    unanswered: HashMap<u64, (oneshot::Sender<bool>, OwnedSemaphorePermit)>,
    has_ended: bool,
}

impl Outbox {
    /// Its first word, that the sender knows of the mapping, leaves with [`say_attached`](Self::say_attached).
    pub(crate) fn new(
        stream: UnixStream,
        connection: Connection,
        ledger: Arc<Ledger>,
        activity: Option<&Arc<Activity>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            mailbox: Mailbox::new(stream, &[ATTACHED], UNSENT_MESSAGES_BYTES_MAX, activity),
            connection,
            ledger,
            places: Arc::new(Semaphore::new(NUM_ON_THE_WAY_MAX)),
            posted: Mutex::default(),
        })
    }

    pub(super) fn say_attached(&self) {
        self.mailbox.post(&[]);
    }

    /// Sends one extent's places and resolves when the receiver has read and verified it. Dropped before, it asks the
    /// receiver to give up.
    pub(crate) async fn send(&self, header: &ExtentHeader, runs: &[PoolRun]) -> Result<(), SendExtentError> {
        let _held = self.ledger.hold(Kind::Stream(Traffic::Bulk));
        let place = self.places.clone().acquire_owned().await.map_err(|_| self.lost())?;
        let (id, answer) = self.begin(place)?;
        let mut unanswered = Unanswered { outbox: self, id: Some(id) };
        self.mailbox.post_extent(id, &header.encode(), &encode_runs(runs));
        let answer = answer.await;
        unanswered.id = None;
        match answer {
            Ok(true) => {
                self.ledger.count_sent(Carrier::Shm, header.num_payload_bytes as usize);
                Ok(())
            }
            Ok(false) => Err(SendExtentError::Refused),
            Err(_) => Err(self.lost()),
        }
    }

    /// Hears answers until the socket or the bulk connection ends, and ends the other one.
    pub(super) async fn run(self: Arc<Self>) {
        let broken = tokio::select! {
            _ = self.connection.closed() => None,
            Err(broken) = self.hear() => Some(broken),
            Err(broken) = self.mailbox.flush() => Some(broken),
        };
        if let Some(reason) = broken {
            tracing::debug!(%reason, "the socket of a mapped pool ended");
            self.connection.close(CLOSE_DONE, b"the socket of the mapped pool ended");
        }
        self.places.close();
        let mut posted = self.posted();
        posted.has_ended = true;
        posted.unanswered.clear();
    }

    async fn hear(&self) -> Result<std::convert::Infallible, Broken> {
        let mut buffer = BytesMut::new();
        loop {
            self.mailbox.read(&mut buffer, REST_DEADLINE).await?;
            while let Some((id, is_taken)) = take_answer(&mut buffer) {
                let answered = self.posted().unanswered.remove(&id);
                let (answer, _place) = answered.ok_or(Broken::Malformed("an answer to nothing"))?;
                // Fails if the send was given up.
                let _ = answer.send(is_taken);
            }
        }
    }

    fn begin(&self, place: OwnedSemaphorePermit) -> Result<(u64, oneshot::Receiver<bool>), SendExtentError> {
        let mut posted = self.posted();
        if posted.has_ended {
            // Which asks the connection.
            drop(posted);
            return Err(self.lost());
        }
        let id = posted.next_id;
        posted.next_id += 1;
        let (sender, receiver) = oneshot::channel();
        posted.unanswered.insert(id, (sender, place));
        Ok((id, receiver))
    }

    fn lost(&self) -> SendExtentError {
        let reason = self.connection.close_reason().map_or(CloseReason::ClosedHere, CloseReason::from);
        SendExtentError::ConnectionLost(reason)
    }

    fn posted(&self) -> MutexGuard<'_, Posted> {
        self.posted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A send that has not been answered, unless its id is gone.
struct Unanswered<'a> {
    outbox: &'a Outbox,
    id: Option<u64>,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        // Not for one that was answered meanwhile, whose place another may have: a place has one such word at a time.
        let posted = self.outbox.posted();
        if posted.unanswered.contains_key(&id) {
            self.outbox.mailbox.post_give_up(id);
        }
    }
}
