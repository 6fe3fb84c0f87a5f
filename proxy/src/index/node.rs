//! The part of the index that one life of a node fills.

use std::sync::Arc;

use common::block_events::Medium;
use common::content::ContentKey;
use common::wire::blocks::BlockEvent;
use common::wire::{BlockCursor, BlockNews};

use super::table::Table;
use super::{BlockIndex, Holder};
use crate::route::NodeLife;

/// What a node's events made of it. Dropping it takes all of it out of the index.
pub struct IndexedNode {
    index: Arc<BlockIndex>,
    id: u64,
    life: NodeLife,
    /// One for each medium that it uses.
    media: Vec<MediumBit>,
    num_left_out: u64,
    has_lacked_room: bool,
    cursor: Option<BlockCursor>,
}

/// Where the blocks of one medium are marked.
struct MediumBit {
    medium: Medium,
    holder: Holder,
    table: Arc<Table>,
}

impl IndexedNode {
    pub(super) fn new(index: Arc<BlockIndex>, id: u64, life: NodeLife) -> Self {
        Self { index, id, life, media: Vec::new(), num_left_out: 0, has_lacked_room: false, cursor: None }
    }

    /// Whose blocks these are.
    pub fn life(&self) -> &NodeLife {
        &self.life
    }

    /// Where to go on in the node's events; `None`: from nothing.
    pub fn cursor(&self) -> Option<BlockCursor> {
        self.cursor
    }

    /// Blocks that were stored there and not taken in for want of room, since its last snapshot began.
    pub fn num_left_out(&self) -> u64 {
        self.num_left_out
    }

    /// Whether a new snapshot would bring what was left out.
    pub fn is_worth_relearning(&self) -> bool {
        self.has_lacked_room && self.index.has_room_again()
    }

    /// Takes in what the node said. Work in proportion to the events; to the whole index where a medium is
    /// cleared or a snapshot begins.
    pub fn apply(&mut self, news: &BlockNews) {
        if news.is_restart {
            self.clear(|_| true);
            self.num_left_out = 0;
            self.has_lacked_room = false;
            self.index.metrics.on_index_restart();
        }
        let num_left_out = self.num_left_out;
        for event in &news.events {
            match event {
                BlockEvent::Stored { medium, key, parent, .. } => self.on_stored(*medium, *key, *parent),
                BlockEvent::Removed { medium, key } => self.on_removed(*medium, *key),
                BlockEvent::Cleared { medium } => self.clear(|of| of == *medium),
            }
        }
        if self.num_left_out > num_left_out {
            self.index.on_left_out(&self.life, self.num_left_out - num_left_out);
        }
        self.cursor = news.resume_at;
        for medium in Medium::ALL {
            let num_events = news.events.iter().filter(|event| event.medium() == medium).count();
            if num_events > 0 {
                self.index.metrics.on_index_events(medium, num_events as u64);
            }
        }
        self.index.show();
    }

    fn on_stored(&mut self, medium: Medium, key: ContentKey, parent: Option<ContentKey>) {
        // Its beginning may come back to the node, and a snapshot may tell it behind this one; but what was left out
        // here does not.
        if self.has_lacked_room && !parent.is_none_or(|parent| self.holds(parent)) {
            self.num_left_out += 1;
            return;
        }
        let Some(at) = self.bit_of(medium) else {
            self.num_left_out += 1;
            return;
        };
        let MediumBit { holder, table, .. } = &self.media[at];
        if !table.insert(key, holder.bit, || self.index.reserve_block()) {
            self.num_left_out += 1;
            self.has_lacked_room = true;
        }
    }

    fn on_removed(&mut self, medium: Medium, key: ContentKey) {
        let Some(marked) = self.media.iter().find(|marked| marked.medium == medium) else { return };
        let num_forgotten = marked.table.remove(key, marked.holder.bit);
        self.index.on_forgotten(num_forgotten);
    }

    fn holds(&self, key: ContentKey) -> bool {
        self.media.iter().any(|marked| marked.table.holders_of(key) & marked.holder.bit != 0)
    }

    /// Index into `media`; `None` if there are too many holders.
    fn bit_of(&mut self, medium: Medium) -> Option<usize> {
        if let Some(at) = self.media.iter().position(|marked| marked.medium == medium) {
            return Some(at);
        }
        let (holder, table) = self.index.take_holder(self.id, medium)?;
        self.media.push(MediumBit { medium, holder, table });
        Some(self.media.len() - 1)
    }

    fn clear(&self, is_meant: impl Fn(Medium) -> bool) {
        for marked in self.media.iter().filter(|marked| is_meant(marked.medium)) {
            let num_forgotten = marked.table.forget_holder(marked.holder.bit);
            self.index.on_forgotten(num_forgotten);
        }
    }
}

impl Drop for IndexedNode {
    fn drop(&mut self) {
        // Out of sight first: forgetting takes a while.
        self.index.change_view(|view| view.nodes.retain(|node| node.id != self.id));
        self.clear(|_| true);
        self.index.free_holders().extend(self.media.iter().map(|marked| marked.holder));
        self.index.show();
    }
}
