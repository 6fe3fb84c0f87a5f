//! From the key of a block to the bits of its holders.
//!
//! Shards, each a hash map behind its own lock: a map that grows copies itself, and a holder that is forgotten
//! is looked for in all entries; both are short where a shard has a 64th of them.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::sync::{PoisonError, RwLock};

use common::content::ContentKey;

/// Bits of an entry.
pub(super) const HOLDERS_PER_TABLE: usize = 64;
const NUM_SHARDS: usize = 64;

type Shard = HashMap<u64, u64, KeyHash>;

/// Entries of 16 bytes: half a key, and a bit for each of 64 holders.
pub(super) struct Table {
    shards: Vec<RwLock<Shard>>,
    hash: KeyHash,
}

impl Table {
    pub(super) fn new() -> Self {
        let hash = KeyHash { seed: rand::random() };
        Self { shards: (0..NUM_SHARDS).map(|_| RwLock::new(Shard::with_hasher(hash))).collect(), hash }
    }

    /// Bits of those who hold the block.
    pub(super) fn holders_of(&self, key: ContentKey) -> u64 {
        let shard = self.shard(key).read().unwrap_or_else(PoisonError::into_inner);
        shard.get(&short(key)).copied().unwrap_or(0)
    }

    /// Adds a holder; an entry more only if `has_room` says so. Whether it is in.
    pub(super) fn insert(&self, key: ContentKey, bit: u64, has_room: impl FnOnce() -> bool) -> bool {
        let mut shard = self.shard(key).write().unwrap_or_else(PoisonError::into_inner);
        if let Some(holders) = shard.get_mut(&short(key)) {
            *holders |= bit;
        } else if has_room() {
            shard.insert(short(key), bit);
        } else {
            return false;
        }
        true
    }

    /// Takes a holder away. Entries that are gone with it: 0 or 1.
    pub(super) fn remove(&self, key: ContentKey, bit: u64) -> usize {
        let mut shard = self.shard(key).write().unwrap_or_else(PoisonError::into_inner);
        let Some(holders) = shard.get_mut(&short(key)) else { return 0 };
        *holders &= !bit;
        if *holders != 0 {
            return 0;
        }
        shard.remove(&short(key));
        1
    }

    /// Takes a holder away from everything. How many entries are gone with it.
    pub(super) fn forget_holder(&self, bit: u64) -> usize {
        let mut num_gone = 0;
        for shard in &self.shards {
            let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
            let num_before = shard.len();
            shard.retain(|_, holders| {
                *holders &= !bit;
                *holders != 0
            });
            num_gone += num_before - shard.len();
            // What was full once must not stay allocated for ever.
            if shard.len() < shard.capacity() / 4 {
                shard.shrink_to_fit();
            }
        }
        num_gone
    }

    fn shard(&self, key: ContentKey) -> &RwLock<Shard> {
        // The map itself uses the lowest and the highest bits.
        &self.shards[(self.hash.of(short(key)) >> 32) as usize % NUM_SHARDS]
    }
}

fn short(key: ContentKey) -> u64 {
    key.0 as u64
}

/// Keys are well mixed already, but whoever chooses the tokens chooses them: a secret keeps them from meeting
/// in one place.
#[derive(Debug, Clone, Copy)]
struct KeyHash {
    seed: u64,
}

impl KeyHash {
    fn of(self, key: u64) -> u64 {
        let product = u128::from(key ^ self.seed) * u128::from(self.seed | 1);
        product as u64 ^ (product >> 64) as u64
    }
}

impl BuildHasher for KeyHash {
    type Hasher = KeyHasher;

    fn build_hasher(&self) -> KeyHasher {
        KeyHasher { hash: *self, value: 0 }
    }
}

/// Hashes one `u64`.
struct KeyHasher {
    hash: KeyHash,
    value: u64,
}

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.value
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte) ^ self.value);
        }
    }

    fn write_u64(&mut self, key: u64) {
        self.value = self.hash.of(key);
    }
}
