//! What is remembered of blocks that left the pool: when they were last used, how often, and of which class.
//!
//! A returning conversation whose blocks are gone is still known to be one, and its return still teaches.
//! A fixed table, 4 entries to a set; a full set loses its oldest entry. Keys are remembered by 32 of their
//! bits: mistaking one for another misleads a guess, never a lookup.

use crate::content::ContentKey;

/// Entries per block of the pool, rounded up to a power of two.
const ENTRIES_PER_BLOCK: usize = 8;
const NUM_ENTRIES_MIN: usize = 1 << 10;
/// 12 MiB.
const NUM_ENTRIES_MAX: usize = 1 << 20;
const WAYS: usize = 4;

/// The last use of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LastUse {
    /// On the policy's clock, which wraps around.
    pub(crate) at: u32,
    /// Class it was put into.
    pub(crate) class: u8,
    /// Uses until then, capped.
    pub(crate) num_uses: u8,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    tag: u32,
    /// `num_uses` is 0 in an empty entry.
    last_use: LastUse,
}

const EMPTY: Entry = Entry { tag: 0, last_use: LastUse { at: 0, class: 0, num_uses: 0 } };

#[derive(Debug)]
pub(crate) struct History {
    entries: Vec<Entry>,
}

impl History {
    pub(crate) fn new(num_blocks: usize) -> Self {
        let num_entries = num_blocks.saturating_mul(ENTRIES_PER_BLOCK).clamp(NUM_ENTRIES_MIN, NUM_ENTRIES_MAX);
        Self { entries: vec![EMPTY; num_entries.next_power_of_two()] }
    }

    fn place(&self, key: ContentKey) -> (std::ops::Range<usize>, u32) {
        let num_sets = self.entries.len() / WAYS;
        let first = (key.0 as usize & (num_sets - 1)) * WAYS;
        (first..first + WAYS, (key.0 >> 96) as u32)
    }

    /// Remembers the last use of a block that leaves the pool. `now`: the clock.
    pub(crate) fn put(&mut self, key: ContentKey, last_use: LastUse, now: u32) {
        debug_assert!(last_use.num_uses > 0);
        let (set, tag) = self.place(key);
        let age = |entry: &Entry| match entry.last_use.num_uses {
            0 => u64::MAX,
            _ => u64::from(now.wrapping_sub(entry.last_use.at)),
        };
        let set = &mut self.entries[set];
        let known = set.iter().position(|entry| entry.tag == tag && entry.last_use.num_uses > 0);
        let oldest = known.or_else(|| (0..WAYS).max_by_key(|way| age(&set[*way])));
        set[oldest.expect("a set has entries")] = Entry { tag, last_use };
    }

    /// Takes out what is remembered of `key`.
    pub(crate) fn take(&mut self, key: ContentKey) -> Option<LastUse> {
        let (set, tag) = self.place(key);
        let entry = self.entries[set].iter_mut().find(|entry| entry.tag == tag && entry.last_use.num_uses > 0)?;
        Some(std::mem::replace(entry, EMPTY).last_use)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used_at(at: u32) -> LastUse {
        LastUse { at, class: 3, num_uses: 2 }
    }

    #[test]
    fn what_was_put_is_taken_once() {
        let mut history = History::new(1);
        history.put(ContentKey(7), used_at(5), 6);
        assert_eq!(history.take(ContentKey(8)), None);
        assert_eq!(history.take(ContentKey(7)), Some(used_at(5)));
        assert_eq!(history.take(ContentKey(7)), None);
    }

    #[test]
    fn a_full_set_loses_its_oldest_entry_also_when_the_clock_wraps() {
        let mut history = History::new(1);
        let key = |tag: u128| ContentKey(tag << 96);
        let times = [u32::MAX - 5, u32::MAX - 9, u32::MAX, 2];
        for (tag, at) in (1..).zip(times) {
            history.put(key(tag), used_at(at), 3);
        }
        history.put(key(9), used_at(3), 3);
        assert_eq!(history.take(key(2)), None);
        for tag in [1, 3, 4, 9] {
            assert!(history.take(key(tag)).is_some());
        }
    }
}
