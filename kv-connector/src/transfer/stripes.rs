//! The bulk connections between two nodes, which carry KV as one.
//!
//! ```text
//!             ┌─ stripe ── QUIC connection, a UDP socket of its own at either end ─┐
//! extents ────┼─ stripe ──                                                         ├──── landing zone
//!             └─ stripe ──                                                         ┘
//!     to the one with the fewest bytes on the way       claimed, verified and counted as from one connection
//! ```
//!
//! One connection is driven by one thread at a time. An extent is on one stripe from its first byte to its last, so
//! that nothing of what an extent is, its digest, its credit, its cancellation, knows of stripes. Extents of one
//! landing may overtake each other, as streams of one connection may.
//!
//! **A stripe that is lost.** What had not arrived over it is sent again over another one, by the sender, whose blocks
//! are pinned for as long. The receiver gives what it was writing back and tells nobody. Either end may notice first:
//! an extent that comes again while its range is still claimed waits until that is settled
//! ([`LandingZone`](super::LandingZone)), and is read to its end and forgotten if it turns out to be there. So a range
//! is written by one extent at a time, as always. With the last stripe the group is lost, and what is on the way with
//! it, as over a single connection.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::wire::{BulkGroup, ExtentHeader};
use quinn::Connection;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use crate::accounting::{Carrier, Ledger};
use crate::link::{CLOSE_DONE, CloseReason};
use crate::transfer::bulk::PeerTransport;
use crate::transfer::bulk_end::BulkEnd;
use crate::transfer::{ExtentEnd, Payload, SendExtentError, SendFuture, Transport};

/// A group of bulk connections to one life of one peer.
pub(crate) struct Stripes {
    group: BulkGroup,
    num_max: usize,
    open: Mutex<Open>,
    /// That of the last.
    end: Arc<BulkEnd>,
    /// One of them was lost.
    lost: Notify,
    has_window: bool,
    /// Extents that are hashed at a time: as many as there are stripes to take one.
    sealing: Arc<Semaphore>,
    ledger: Arc<Ledger>,
}

struct Open {
    stripes: Vec<Arc<Stripe>>,
    /// Takes no further ones.
    is_closing: bool,
    num_sealing: usize,
    holds: GroupHolds,
}

/// What a group has of its node's bounds, until its last connection has ended: what one connection would have.
#[derive(Default)]
pub(crate) struct GroupHolds {
    _place: Option<OwnedSemaphorePermit>,
    window: Option<OwnedSemaphorePermit>,
}

impl GroupHolds {
    /// `place` is one among the connections that a node accepts, none where this node has dialled; `window` a share of
    /// the receive memory, if there was one.
    pub(crate) fn new(place: Option<OwnedSemaphorePermit>, window: Option<OwnedSemaphorePermit>) -> Self {
        Self { _place: place, window }
    }

    pub(crate) fn has_window(&self) -> bool {
        self.window.is_some()
    }
}

/// One connection of a group.
struct Stripe {
    /// Of those that the group may have, by number.
    slot: usize,
    transport: Arc<PeerTransport>,
    /// Payload of the extents that were begun and have not ended.
    unsent_bytes: AtomicU64,
}

/// An extent that is on its way over a stripe.
struct OnTheWay {
    stripe: Arc<Stripe>,
    num_bytes: u64,
}

impl Drop for OnTheWay {
    fn drop(&mut self) {
        self.stripe.unsent_bytes.fetch_sub(self.num_bytes, Ordering::Relaxed);
    }
}

/// Takes a stripe out of its group when its connection has ended, or the threads that would have heard of it.
struct Leaving {
    stripes: Arc<Stripes>,
    stripe: Arc<Stripe>,
    reason: CloseReason,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.stripes.lose(&self.stripe, &self.reason);
    }
}

impl Stripes {
    /// A group without a connection, of `num_max` at most.
    pub(crate) fn new(group: BulkGroup, num_max: usize, holds: GroupHolds, ledger: &Arc<Ledger>) -> Arc<Self> {
        let has_window = holds.has_window();
        let open = Open { stripes: Vec::new(), is_closing: false, num_sealing: 1, holds };
        Arc::new(Self {
            group,
            num_max,
            open: Mutex::new(open),
            end: Arc::default(),
            lost: Notify::new(),
            has_window,
            sealing: Arc::new(Semaphore::new(1)),
            ledger: ledger.clone(),
        })
    }

    /// Whether it has a share of the receive memory, so that what arrives over it is read.
    pub(crate) fn has_window(&self) -> bool {
        self.has_window
    }

    /// What the dialler said of it.
    pub(crate) fn group(&self) -> &BulkGroup {
        &self.group
    }

    /// One connection more, until it ends: that number `slot`, or in any free place. To be called on the threads of KV.
    ///
    /// # Errors
    /// A sentence: there are as many as there may be, or the group is over.
    pub(crate) fn add(
        self: &Arc<Self>,
        slot: Option<usize>,
        transport: Arc<PeerTransport>,
        tasks: &TaskTracker,
    ) -> Result<(), String> {
        let connection = transport.connection().clone();
        let stripe = {
            let mut open = self.open();
            let is_free = |slot: &usize| open.stripes.iter().all(|stripe| stripe.slot != *slot);
            let slot = slot.or_else(|| (0..self.num_max).find(is_free)).filter(is_free);
            if open.is_closing {
                return Err("the bulk connections it belongs to have ended".to_string());
            }
            let Some(slot) = slot.filter(|slot| *slot < self.num_max) else {
                return Err(format!("there are {} bulk connections already, and no more may join them", self.num_max));
            };
            let stripe = Arc::new(Stripe { slot, transport, unsent_bytes: AtomicU64::new(0) });
            open.stripes.push(stripe.clone());
            if open.stripes.len() > open.num_sealing {
                open.num_sealing += 1;
                self.sealing.add_permits(1);
            }
            stripe
        };
        let mut leaving = Leaving { stripes: self.clone(), stripe, reason: CloseReason::ClosedHere };
        tasks.spawn(async move {
            leaving.reason = connection.closed().await.into();
            drop(leaving);
        });
        Ok(())
    }

    /// `connection` has ended, which may not be known yet.
    pub(crate) fn on_ended(&self, connection: &Connection, reason: &CloseReason) {
        let id = connection.stable_id();
        let is_it = |stripe: &&Arc<Stripe>| stripe.transport.connection().stable_id() == id;
        let stripe = self.open().stripes.iter().find(is_it).cloned();
        if let Some(stripe) = stripe {
            self.lose(&stripe, reason);
        }
    }

    /// It carries no more. With the last, the group has ended.
    fn lose(&self, stripe: &Arc<Stripe>, reason: &CloseReason) {
        let mut open = self.open();
        let num_before = open.stripes.len();
        open.stripes.retain(|other| !Arc::ptr_eq(other, stripe));
        if open.stripes.len() == num_before {
            return; // known
        }
        self.lost.notify_one();
        if open.stripes.is_empty() {
            open.is_closing = true;
            open.holds = GroupHolds::default();
            drop(open);
            self.end.tell(reason.clone());
        } else if !open.is_closing {
            let num_left = open.stripes.len();
            tracing::info!(%reason, num_left, "lost one of several bulk connections to a peer: its KV goes over the others");
        }
    }

    /// Closes all, and takes no further ones.
    pub(crate) fn close(&self, reason: &[u8]) {
        let stripes = {
            let mut open = self.open();
            open.is_closing = true;
            open.stripes.clone()
        };
        for stripe in stripes {
            stripe.transport.connection().close(CLOSE_DONE, reason);
        }
    }

    /// That of the group: with its last connection.
    pub(crate) fn end(&self) -> &Arc<BulkEnd> {
        &self.end
    }

    /// Connections that are open.
    pub(crate) fn num_open(&self) -> usize {
        self.open().stripes.len()
    }

    /// Numbers of the connections that there could be and are not.
    pub(crate) fn free_slots(&self) -> Vec<usize> {
        let open = self.open();
        (0..self.num_max).filter(|slot| open.stripes.iter().all(|stripe| stripe.slot != *slot)).collect()
    }

    /// Resolves when one was lost since this was last awaited.
    pub(crate) async fn one_is_lost(&self) {
        self.lost.notified().await;
    }

    /// Whether others than `connection` are open.
    pub(crate) fn has_others(&self, connection: &Connection) -> bool {
        let id = connection.stable_id();
        self.open().stripes.iter().any(|stripe| stripe.transport.connection().stable_id() != id)
    }

    /// Connections that it may have.
    pub(crate) fn num_max(&self) -> u16 {
        u16::try_from(self.num_max).unwrap_or(u16::MAX)
    }

    /// Whether it may have more than one connection.
    pub(crate) fn is_several(&self) -> bool {
        self.num_max > 1
    }

    /// See [`BulkSender`](super::BulkSender).
    pub(crate) fn sealing(&self) -> &Arc<Semaphore> {
        &self.sealing
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        // Valid after every statement.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives an extent to the stripe with the fewest bytes on the way.
    fn begin(&self, num_bytes: usize) -> Result<OnTheWay, SendExtentError> {
        let open = self.open();
        let emptiest = open.stripes.iter().min_by_key(|stripe| stripe.unsent_bytes.load(Ordering::Relaxed));
        let Some(stripe) = emptiest.cloned() else {
            let reason = self.end.reason().unwrap_or(CloseReason::ClosedHere);
            return Err(SendExtentError::ConnectionLost(reason));
        };
        let num_bytes = num_bytes as u64;
        // Under the lock: the next one sees it.
        stripe.unsent_bytes.fetch_add(num_bytes, Ordering::Relaxed);
        Ok(OnTheWay { stripe, num_bytes })
    }

    /// What carries the extents: a group of several is never anything but `quic`.
    fn first(&self) -> Option<Arc<Stripe>> {
        self.open().stripes.first().cloned()
    }
}

impl Transport for Stripes {
    fn name(&self) -> &'static str {
        self.first().map_or(Carrier::Quic, |stripe| stripe.transport.carrier()).as_str()
    }

    fn send<'a>(&'a self, header: &'a ExtentHeader, mut payload: Payload, end: ExtentEnd) -> SendFuture<'a> {
        Box::pin(async move {
            loop {
                let on_the_way = self.begin(payload.len())?;
                // Where it could be sent again, it must be known to have arrived: others may join before this one is
                // lost, and then its receiver leaves it to them.
                let again = self.is_several().then(|| payload.clone());
                let sent = on_the_way.stripe.transport.send(header, payload, end, again.is_some()).await;
                let Err(SendExtentError::ConnectionLost(reason)) = &sent else { return sent };
                self.lose(&on_the_way.stripe, reason);
                let Some(same) = again.filter(|_| self.num_open() > 0) else { return sent };
                self.ledger.count_resent_extent();
                payload = same;
            }
        })
    }

    fn is_closed(&self) -> bool {
        self.end.has_come()
    }

    fn datagram_bytes(&self) -> Option<u16> {
        self.first()?.transport.datagram_bytes()
    }
}
