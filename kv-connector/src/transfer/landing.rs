//! Where extents land: reservations that are open, and what each has received.
//!
//! ```text
//! open(plan) ──> Landing ── extent: admit -> write ... -> finish ──> ExtentVerified
//!                   │                  └────────┴─> refused: counted, claim given back, ExtentRefused
//!                   └── close / drop: afterwards not one byte is written into its blocks
//! ```
//!
//! Every piece is written under a read lock on the landing's gate, and closing takes the write lock: when
//! [`Landing::close`] returns, whoever owns the blocks may give them to somebody else. A range is claimed
//! by one extent at a time, so neither a late duplicate nor an overlap touches what another extent writes
//! or has written.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use common::content::{ContentChain, GRANULE_TOKENS};
use common::ids::{Attempt, BlockId, Epoch, Generation, RequestId};
use common::kv_memory::{GranuleConversion, KvMemory};
use common::kv_spec::{KvExtentKind, KvSpec};
use common::tokens::Token;
use common::wire::{ExtentHeader, ExtentId};
use dashmap::DashMap;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::accounting::{Held, Kind, Ledger};
use crate::transfer::arriving::Arriving;
use crate::transfer::coverage::Coverage;
use crate::transfer::notices::Notices;
use crate::transfer::refused::RefusedExtent;

/// Refusals that a landing's owner is told of; what is behind them is only counted.
const NUM_REFUSALS_TOLD_MAX: usize = 64;

/// A reservation that extents may land in.
pub struct LandingPlan {
    /// The request.
    pub request: RequestId,
    /// Its attempt.
    pub attempt: Attempt,
    /// The reservation; rises with every one this node makes.
    pub generation: Generation,
    /// The sequence's whole block table, enough for `num_tokens`. Reserved for this landing until it is
    /// closed.
    pub blocks: Vec<BlockId>,
    /// Names of the content, which every extent's digest is bound to.
    pub chain: ContentChain,
    /// The tokens whose KV is awaited, from position 0.
    pub tokens: Vec<Token>,
    /// Tokens held already: a multiple of the granule.
    pub first_token: usize,
    /// Where the KV ends; the extents cover `first_token..num_tokens` in every layer.
    pub num_tokens: usize,
    /// The shape of the KV.
    pub kv_spec: KvSpec,
    /// The pool.
    pub memory: Arc<dyn KvMemory>,
    /// Makes the sender's granules those of `memory`; `None` if their bytes are the same.
    pub conversion: Option<Arc<dyn GranuleConversion>>,
}

impl LandingPlan {
    /// Bytes of one granule in one layer as it arrives.
    fn source_granule_bytes(&self) -> usize {
        match &self.conversion {
            Some(conversion) => conversion.source_granule_bytes(),
            None => self.memory.granule_bytes(),
        }
    }
}

/// What happened to a landing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LandingEvent {
    /// An extent is in place and proven.
    ExtentVerified {
        /// Which.
        extent: ExtentId,
        /// Its payload.
        num_bytes: u64,
        /// Tokens from position 0 whose KV is there in every layer, the held ones included.
        num_contiguous_tokens: usize,
        /// Whether it was the last.
        is_complete: bool,
    },
    /// An extent was not taken, and its sender will not send it again. Late copies of extents that are
    /// there, or on their way, are refused without an event.
    ExtentRefused {
        /// Why.
        reason: RefusedExtent,
    },
}

/// What happens to a landing, for its owner; those of several extents may be told at once, in the order in which they
/// count. Ends when nothing can land any more.
pub struct LandingEvents(Notices<LandingEvent>);

impl LandingEvents {
    /// The next event; `None` behind the last. Cancel-safe.
    pub async fn recv(&mut self) -> Option<LandingEvent> {
        self.0.next().await
    }

    /// Whether there is none to be heard at the moment.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next event, if it is there.
    pub fn try_recv(&mut self) -> Option<LandingEvent> {
        self.0.try_next()
    }
}

/// The open landings of a node's present life. Cheap to clone.
#[derive(Clone)]
pub struct LandingZone {
    epoch: Epoch,
    ledger: Arc<Ledger>,
    /// One request may land several attempts at a time, each for another choice.
    landings: Arc<DashMap<RequestId, Vec<Arc<State>>>>,
}

impl LandingZone {
    pub(crate) fn new(epoch: Epoch, ledger: Arc<Ledger>) -> Self {
        Self { epoch, ledger, landings: Arc::default() }
    }

    /// Opens a reservation. From now until the landing is closed, the connector writes into its blocks and
    /// nobody else may.
    ///
    /// # Panics
    /// If `first_token` is no multiple of the granule or not within `num_tokens`, or there are fewer
    /// tokens than `num_tokens`.
    pub fn open(&self, plan: LandingPlan) -> (Landing, LandingEvents) {
        let (state, events) = State::new(plan, self.ledger.hold(Kind::Landing));
        let state = Arc::new(state);
        self.landings.entry(state.plan.request).or_default().push(state.clone());
        (Landing { state, zone: self.clone() }, events)
    }

    /// Landings that are open.
    pub fn num_landings(&self) -> usize {
        self.landings.iter().map(|entry| entry.len()).sum()
    }

    /// Decides on an extent by its header and claims its range. A refusal has been counted.
    ///
    /// # Errors
    /// [`RefusedExtent`]: unknown, stale, wrong shape, out of range, wrong size, duplicate.
    pub fn admit(&self, header: &ExtentHeader) -> Result<Arriving, RefusedExtent> {
        let admitted = self.find(header).and_then(|state| Arriving::claim(state, header, &self.ledger));
        admitted.inspect_err(|refused| self.count_refused(*refused))
    }

    /// As [`admit`](Self::admit), for what may come again over another connection than the one it was lost with: while
    /// its range is claimed by what is still landing, it waits until that has landed or was given up, or for
    /// `deadline`. `None` if all of it is there.
    pub(crate) async fn admit_settled(
        &self,
        header: &ExtentHeader,
        deadline: Duration,
    ) -> Result<Option<Arriving>, RefusedExtent> {
        let settling = async {
            loop {
                let state = self.find(header)?;
                let settled = state.settled.notified();
                tokio::pin!(settled);
                // From here on, so that what is settled before it is awaited is not missed.
                settled.as_mut().enable();
                match Arriving::claim(state.clone(), header, &self.ledger) {
                    Err(RefusedExtent::Duplicate) if state.is_landing(header) => tokio::select! {
                        () = settled => {}
                        () = state.closed.cancelled() => return Err(RefusedExtent::Closed),
                    },
                    decided => return decided,
                }
            }
        };
        let admitted = tokio::time::timeout(deadline, settling).await.unwrap_or(Err(RefusedExtent::Duplicate));
        match admitted {
            Ok(arriving) => Ok(Some(arriving)),
            Err(refused) => {
                self.count_refused(refused);
                let is_there = refused == RefusedExtent::Duplicate
                    && self.find(header).is_ok_and(|state| state.has_landed(header));
                if is_there { Ok(None) } else { Err(refused) }
            }
        }
    }

    pub(crate) fn count_refused(&self, refused: RefusedExtent) {
        self.ledger.count_refused_extent(refused.as_str());
    }

    /// Tells the owner of the landing, if there is one, of an extent that was not admitted.
    pub(crate) fn tell_refused(&self, header: &ExtentHeader, reason: RefusedExtent) {
        if let Ok(state) = self.find(header) {
            state.tell_refused(reason);
        }
    }

    fn find(&self, header: &ExtentHeader) -> Result<Arc<State>, RefusedExtent> {
        if header.epoch != self.epoch {
            return Err(RefusedExtent::StaleEpoch);
        }
        let landings = self.landings.get(&header.request).ok_or(RefusedExtent::Unknown)?;
        let meant =
            |state: &&Arc<State>| (state.plan.attempt, state.plan.generation) == (header.attempt, header.generation);
        landings.iter().find(meant).cloned().ok_or(RefusedExtent::Stale)
    }

    fn forget(&self, state: &Arc<State>) {
        if let dashmap::Entry::Occupied(mut entry) = self.landings.entry(state.plan.request) {
            entry.get_mut().retain(|other| !Arc::ptr_eq(other, state));
            if entry.get().is_empty() {
                entry.remove();
            }
        }
    }
}

/// An open reservation; closing or dropping it stops all writing into its blocks.
pub struct Landing {
    state: Arc<State>,
    zone: LandingZone,
}

impl Landing {
    /// Whether every layer of every awaited token is verified.
    pub fn is_complete(&self) -> bool {
        self.state.coverage().is_complete()
    }

    /// Tokens from position 0 whose KV is there in every layer, the held ones included. All of them once
    /// complete, before that a multiple of the granule.
    pub fn num_contiguous_tokens(&self) -> usize {
        self.state.num_contiguous_tokens(&self.state.coverage())
    }

    /// Refuses everything from now on. When this returns, no byte will be written into the blocks any
    /// more, and what counts as verified no longer changes.
    pub fn close(&self) {
        self.zone.forget(&self.state);
        // Writers hold the lock for one piece at a time, so the wait is one copy at most.
        *self.state.is_open.write().unwrap_or_else(PoisonError::into_inner) = false;
        self.state.closed.cancel();
        drop(self.state.lock_held().take());
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.close();
    }
}

pub(super) struct State {
    pub(super) plan: LandingPlan,
    /// Group and place in the coverage of each layer, by the model's layer number.
    layers: HashMap<u16, (u16, usize)>,
    num_granules: usize,
    is_open: RwLock<bool>,
    coverage: Mutex<Coverage>,
    pub(super) closed: CancellationToken,
    /// An extent has landed or was given up.
    pub(super) settled: Notify,
    /// Has room for every event there can be.
    pub(super) events: Notices<LandingEvent>,
    num_refusals_told: AtomicUsize,
    held: Mutex<Option<Held>>,
}

impl Drop for State {
    fn drop(&mut self) {
        self.events.end();
    }
}

impl State {
    fn new(mut plan: LandingPlan, held: Held) -> (Self, LandingEvents) {
        assert!(plan.first_token.is_multiple_of(GRANULE_TOKENS), "a landing begins with a granule");
        assert!(
            plan.first_token <= plan.num_tokens && plan.num_tokens <= plan.tokens.len(),
            "a landing within its tokens"
        );
        plan.chain.extend(&plan.tokens[..plan.num_tokens]);
        let groups = plan.kv_spec.groups.iter().enumerate();
        let per_token = groups.filter(|(_, group)| group.kind == KvExtentKind::PerToken);
        let numbered = per_token.flat_map(|(group, layers)| layers.layers.iter().map(move |layer| (group, *layer)));
        let layers: HashMap<u16, (u16, usize)> =
            numbered.enumerate().map(|(place, (group, layer))| (layer as u16, (group as u16, place))).collect();
        let num_granules = (plan.num_tokens - plan.first_token).div_ceil(GRANULE_TOKENS);
        // At most one extent for each granule of each layer is ever verified.
        let events = Notices::new(layers.len() * num_granules + NUM_REFUSALS_TOLD_MAX);
        let told = LandingEvents(events.clone());
        let state = Self {
            coverage: Mutex::new(Coverage::new(layers.len(), num_granules)),
            plan,
            layers,
            num_granules,
            is_open: RwLock::new(true),
            closed: CancellationToken::new(),
            settled: Notify::new(),
            events,
            num_refusals_told: AtomicUsize::new(0),
            held: Mutex::new(Some(held)),
        };
        (state, told)
    }

    // A panic elsewhere spoils none of these: each is valid after every statement.
    pub(super) fn coverage(&self) -> MutexGuard<'_, Coverage> {
        self.coverage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `act` unless the landing is closed, which waits until `act` has ended.
    pub(super) fn while_open<T>(&self, act: impl FnOnce() -> T) -> Result<T, RefusedExtent> {
        let is_open = self.is_open.read().unwrap_or_else(PoisonError::into_inner);
        if *is_open { Ok(act()) } else { Err(RefusedExtent::Closed) }
    }

    pub(super) fn num_contiguous_tokens(&self, coverage: &Coverage) -> usize {
        (self.plan.first_token + coverage.num_contiguous() * GRANULE_TOKENS).min(self.plan.num_tokens)
    }

    /// Place in the coverage and granules (from the landing's first) of an extent; what passes lies within
    /// the reservation.
    pub(super) fn place(&self, header: &ExtentHeader) -> Result<(usize, Range<usize>), RefusedExtent> {
        let extent = &header.extent;
        let (group, place) = *self.layers.get(&extent.layer).ok_or(RefusedExtent::WrongShape)?;
        let planes = &self.plan.kv_spec.groups[group as usize].planes;
        let num_heads = planes.first().map_or(0, |plane| plane.num_heads);
        let all_planes = u16::MAX.checked_shr(16u32.saturating_sub(planes.len() as u32)).unwrap_or(0);
        let whole = (group, all_planes, 0, num_heads);
        if whole != (extent.group, extent.plane_mask, extent.first_head, u32::from(extent.num_heads))
            || usize::from(extent.layer) >= self.plan.memory.num_layers()
        {
            return Err(RefusedExtent::WrongShape);
        }
        let (first, num_tokens) = (extent.first_token as usize, extent.num_tokens as usize);
        let end = first + num_tokens;
        let ends_well = end.is_multiple_of(GRANULE_TOKENS) || end == self.plan.num_tokens;
        let is_within = first >= self.plan.first_token && end <= self.plan.num_tokens && num_tokens > 0;
        if !is_within || !ends_well || !first.is_multiple_of(GRANULE_TOKENS) {
            return Err(RefusedExtent::OutOfRange);
        }
        let first_granule = (first - self.plan.first_token) / GRANULE_TOKENS;
        let end_granule = (end - self.plan.first_token).div_ceil(GRANULE_TOKENS);
        let num_bytes = (end_granule - first_granule) * self.plan.source_granule_bytes();
        if header.num_payload_bytes as usize != num_bytes {
            return Err(RefusedExtent::WrongSize);
        }
        debug_assert!(end_granule <= self.num_granules);
        Ok((place, first_granule..end_granule))
    }

    fn is_landing(&self, header: &ExtentHeader) -> bool {
        self.place(header).is_ok_and(|(place, granules)| self.coverage().is_landing(place, granules))
    }

    fn has_landed(&self, header: &ExtentHeader) -> bool {
        self.place(header).is_ok_and(|(place, granules)| self.coverage().has_landed(place, granules))
    }

    pub(super) fn tell_refused(&self, reason: RefusedExtent) {
        let is_told =
            !reason.is_harmless() && self.num_refusals_told.fetch_add(1, Ordering::Relaxed) < NUM_REFUSALS_TOLD_MAX;
        if is_told {
            // Not after the close.
            let _ = self.while_open(|| {
                self.events.put(LandingEvent::ExtentRefused { reason });
                self.events.ring();
            });
        }
    }
}
