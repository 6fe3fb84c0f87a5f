//! One extent between its header and its verdict.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;

use common::content::GRANULE_TOKENS;
use common::ids::BlockId;
use common::kv_memory::KvMemory;
use common::wire::{ExtentHasher, ExtentHeader};

use crate::accounting::{Held, Kind, Ledger};
use crate::transfer::ahead;
use crate::transfer::converting::Converting;
use crate::transfer::gathering::Gathering;
use crate::transfer::landing::{LandingEvent, State};
use crate::transfer::pull::{PullError, is_same};
use crate::transfer::refused::RefusedExtent;

/// An extent on its way into its blocks. Dropped before it is verified, it gives its range back.
pub struct Arriving {
    state: Arc<State>,
    ledger: Arc<Ledger>,
    header: ExtentHeader,
    place: usize,
    granules: Range<usize>,
    /// Of what is in the blocks, or of what was converted into them.
    hasher: ExtentHasher,
    /// Where the sender's granules are not as they are here.
    converting: Option<Converting>,
    /// Where the blocks are a device's.
    gathering: Option<Gathering>,
    num_bytes: usize,
    /// Of what a device has copied into its blocks, made there.
    hashed: Option<u128>,
    is_verified: bool,
    _held: Held,
}

/// What is converted at a time.
const CONVERTED_BYTES_MAX: usize = 128 << 10;

impl Arriving {
    pub(super) fn claim(state: Arc<State>, header: &ExtentHeader, ledger: &Arc<Ledger>) -> Result<Self, RefusedExtent> {
        let (place, granules) = state.place(header)?;
        if !state.coverage().claim(place, granules.clone()) {
            return Err(RefusedExtent::Duplicate);
        }
        let extent = header.extent;
        let end = (extent.first_token + extent.num_tokens) as usize;
        let content = state.plan.chain.digest_of_prefix(&state.plan.tokens, end);
        let hasher = ExtentHasher::new(&header.binding(content));
        let held = ledger.hold(Kind::ReceiveBytes(header.num_payload_bytes as usize));
        let converting = state.plan.conversion.clone().map(Converting::new);
        let num_worth_a_copy = state.plan.memory.gathered_bytes();
        let gathering = num_worth_a_copy.map(|worth| Gathering::new(worth, header.num_payload_bytes as usize));
        let (ledger, header) = (ledger.clone(), *header);
        Ok(Self {
            state,
            ledger,
            header,
            place,
            granules,
            hasher,
            converting,
            gathering,
            num_bytes: 0,
            hashed: None,
            is_verified: false,
            _held: held,
        })
    }

    /// Writes the next piece into the blocks.
    ///
    /// # Errors
    /// [`RefusedExtent::WrongSize`] beyond the announced size, [`RefusedExtent::Closed`]; nothing is
    /// written then.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), RefusedExtent> {
        let mut rest = bytes;
        self.fill(bytes.len(), |into| {
            let (now, later) = rest.split_at(into.len());
            // What is copied has just been decrypted and is in a cache: it is the blocks that are not.
            ahead::to_write(into.as_ptr_range().end);
            into.copy_from_slice(now);
            rest = later;
        })
    }

    /// Lets `read` fill the next `num_bytes` of the blocks, in ascending small pieces, and hashes each while it is in
    /// the core's first-level cache: what is in the blocks is what the digest speaks of, though its source may change
    /// meanwhile.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub(super) fn fill(&mut self, num_bytes: usize, mut read: impl FnMut(&mut [u8])) -> Result<(), RefusedExtent> {
        let end = self.end_of(num_bytes)?;
        if self.converting.is_some() {
            while self.num_bytes < end {
                self.convert(CONVERTED_BYTES_MAX.min(end - self.num_bytes), &mut read)?;
            }
            return Ok(());
        }
        let plan = &self.state.plan;
        let (layer, first_granule) = self.first_granule();
        let hasher = &mut self.hasher;
        let mut fill = |bytes: &mut [u8]| {
            for piece in bytes.chunks_mut(ahead::PIECE_BYTES) {
                read(piece);
                hasher.update(piece);
            }
        };
        if let Some(gathering) = &mut self.gathering {
            if self.state.closed.is_cancelled() {
                return Err(RefusedExtent::Closed);
            }
            fill(gathering.room(num_bytes));
            self.num_bytes = end;
            if let Some(bytes) = gathering.complete(end == self.header.num_payload_bytes as usize) {
                let start = end - bytes.len();
                self.state.while_open(|| plan.memory.write_at(layer, &plan.blocks, first_granule, start, bytes))?;
                gathering.clear();
            }
            return Ok(());
        }
        self.state.while_open(|| {
            plan.memory.fill_at(layer, &plan.blocks, first_granule, self.num_bytes, num_bytes, &mut fill);
        })?;
        self.num_bytes = end;
        Ok(())
    }

    /// Whether its blocks are `memory`'s, which keeps granules as they come.
    pub(super) fn lands_in(&self, memory: &Arc<dyn KvMemory>) -> bool {
        self.converting.is_none() && is_same(memory, &self.state.plan.memory)
    }

    /// Lets `copy` put the next `num_bytes` into the blocks (layer, block table, first granule, bytes before them),
    /// behind the host's back; behind the last of them all are hashed where they lie.
    ///
    /// # Errors
    /// [`RefusedExtent::WrongSize`] beyond the announced size, [`RefusedExtent::Closed`]; what `copy` says;
    /// [`PullError::Failed`] if the memory makes no such hash.
    pub(super) fn fill_on_device(
        &mut self,
        num_bytes: usize,
        copy: impl FnOnce(u32, &[BlockId], usize, usize) -> Result<(), PullError>,
    ) -> Result<(), PullError> {
        let end = self.end_of(num_bytes)?;
        let plan = &self.state.plan;
        let (layer, first_granule) = self.first_granule();
        self.hashed = self.state.while_open(|| {
            copy(layer, &plan.blocks, first_granule, self.num_bytes)?;
            if end < self.header.num_payload_bytes as usize {
                return Ok(None);
            }
            let hashed = plan.memory.hash_granules(layer, &plan.blocks, first_granule, self.granules.len());
            hashed.map(Some).ok_or_else(|| PullError::Failed("the device makes no hash of its blocks".to_string()))
        })??;
        self.num_bytes = end;
        Ok(())
    }

    /// Takes the next `num_bytes`, which `read` puts in their place, hashes them as they came, and writes what they
    /// complete into the blocks as it is kept here.
    fn convert(&mut self, num_bytes: usize, read: impl FnOnce(&mut [u8])) -> Result<(), RefusedExtent> {
        let (layer, first_granule) = self.first_granule();
        let converting = self.converting.as_mut().expect("only what comes in another form is converted");
        let first_granule = first_granule + converting.num_granules();
        let staged = converting.stage(num_bytes);
        read(staged);
        self.hasher.update(staged);
        self.num_bytes += num_bytes;
        let plan = &self.state.plan;
        let granules = converting.take_granules(plan.memory.granule_bytes());
        self.state.while_open(|| plan.memory.write_at(layer, &plan.blocks, first_granule, 0, granules))
    }

    /// The last byte was written: compares the digest, counts the extent as verified and tells the owner.
    ///
    /// # Errors
    /// [`RefusedExtent`]: truncated, corrupted or closed; counted, and told to the owner.
    pub fn finish(mut self) -> Result<(), RefusedExtent> {
        let verdict = self.verify();
        if let Err(refused) = verdict {
            self.refuse(refused);
        }
        verdict
    }

    /// Gives the extent up; counted, and told to the owner.
    pub fn refuse(self, reason: RefusedExtent) {
        self.ledger.count_refused_extent(reason.as_str());
        let state = self.state.clone();
        // The range is free again before the owner hears of it.
        drop(self);
        state.tell_refused(reason);
    }

    /// Gives the extent up, of which its owner hears nothing: it will come again.
    pub(super) fn refuse_untold(self, reason: RefusedExtent) {
        self.ledger.count_refused_extent(reason.as_str());
    }

    /// Resolves when the landing is closed.
    pub(crate) fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        self.state.closed.clone().cancelled_owned()
    }

    /// Where the extent is behind `num_bytes` more.
    fn end_of(&self, num_bytes: usize) -> Result<usize, RefusedExtent> {
        let end = self.num_bytes + num_bytes;
        if end > self.header.num_payload_bytes as usize { Err(RefusedExtent::WrongSize) } else { Ok(end) }
    }

    /// The layer, and the granule of the sequence that the extent begins with.
    fn first_granule(&self) -> (u32, usize) {
        let extent = &self.header.extent;
        (u32::from(extent.layer), extent.first_token as usize / GRANULE_TOKENS)
    }

    fn verify(&mut self) -> Result<(), RefusedExtent> {
        let num_payload_bytes = self.header.num_payload_bytes as usize;
        if self.state.closed.is_cancelled() {
            return Err(RefusedExtent::Closed);
        }
        if self.num_bytes < num_payload_bytes {
            return Err(RefusedExtent::Truncated);
        }
        let digest = self.hashed.map_or_else(|| self.hasher.digest(), |hashed| self.hasher.digest_of_hashed(hashed));
        if digest != self.header.digest {
            return Err(RefusedExtent::Corrupted);
        }
        let state = self.state.clone();
        if self.converting.is_some() {
            self.ledger.count_converted(num_payload_bytes);
        }
        state.while_open(|| {
            // Marked and told under one lock: the owner hears of extents in the order in which they count.
            let mut coverage = state.coverage();
            coverage.verify(self.place, self.granules.clone());
            self.is_verified = true;
            let is_complete = coverage.is_complete();
            state.events.put(LandingEvent::ExtentVerified {
                extent: self.header.extent,
                num_bytes: num_payload_bytes as u64,
                num_contiguous_tokens: state.num_contiguous_tokens(&coverage),
                is_complete,
            });
            // What is complete is waited for; what is not, is heard of with others.
            if is_complete {
                state.events.ring();
            } else {
                state.events.ring_at_turn_end();
            }
        })
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if !self.is_verified {
            self.state.coverage().release(self.place, self.granules.clone());
        }
        self.state.settled.notify_waiters();
    }
}
