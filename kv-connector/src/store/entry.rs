//! One entry of the store: a granule of 16 tokens in all layers, behind a header that says what it is.
//!
//! ```text
//! 0     4        6         8             24              56          88              96               128
//! | TKVB | version | 0 | content key | prefix digest | format tag | payload bytes | payload digest | payload
//!                                                                                   layer 0, layer 1, ...
//! ```
//!
//! The payload is each layer's granule in the order of bytes that pools have, which does not depend on a node's
//! block size. Numbers are little-endian. The payload's digest covers the header before it, so that bytes moved
//! from one entry to another are not proven by their old digest.
//!
//! The digest proves that an entry is what its writer wrote, not who the writer was: whoever may write to a shared
//! tier is trusted with what all its readers compute.

use bytes::Bytes;
use common::content::{ContentKey, ContentName, PrefixDigest, hex};
use common::model::ModelInfo;

/// Version of this layout. Another one is another entry, which is never read.
pub const ENTRY_VERSION: u16 = 1;
/// Bytes before the payload.
pub const ENTRY_HEADER_BYTES: usize = 128;

const MAGIC: [u8; 4] = *b"TKVB";
/// What the payload's digest covers of the header: all before the digest itself.
const DIGEST_AT: usize = 96;

/// Why bytes that were found are not used. The entry is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum BadEntry {
    /// Shorter or longer than an entry of this format.
    #[error("it has the wrong size")]
    WrongSize,
    /// Not an entry of this version.
    #[error("it is no entry of this version")]
    NotAnEntry,
    /// Another KV representation or another model's shape.
    #[error("it is in another representation")]
    WrongRepresentation,
    /// Its name is another one: it lies in the wrong place.
    #[error("it has another name")]
    WrongKey,
    /// The same key stands for another prefix.
    #[error("its key stands for another prefix")]
    Collision,
    /// The payload is not what was written.
    #[error("its payload is damaged")]
    Damaged,
}

impl BadEntry {
    /// The value of the metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            BadEntry::WrongSize => "wrong_size",
            BadEntry::NotAnEntry => "not_an_entry",
            BadEntry::WrongRepresentation => "wrong_representation",
            BadEntry::WrongKey => "wrong_key",
            BadEntry::Collision => "collision",
            BadEntry::Damaged => "damaged",
        }
    }
}

/// Which entries a node reads and writes: how KV is represented, and how much a granule takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryFormat {
    tag: [u8; 32],
    num_payload_bytes: usize,
}

impl EntryFormat {
    /// The format of a model's KV in a pool with `num_layers` layers and `granule_bytes` per granule and layer.
    /// The numerics id is in it: KV of other arithmetic would give other tokens. So is the order of a granule, which
    /// the payload has.
    pub fn new(model: &ModelInfo, num_layers: usize, granule_bytes: usize) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("tandem prefix-block store, entry format, version 1");
        for text in [&model.representation.0[..], &model.numerics.0, model.granule_order.as_str()] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        for number in [num_layers, granule_bytes] {
            hasher.update(&(number as u64).to_le_bytes());
        }
        Self { tag: *hasher.finalize().as_bytes(), num_payload_bytes: num_layers * granule_bytes }
    }

    /// What tells this format apart from others, in names and headers.
    pub fn tag(&self) -> &[u8; 32] {
        &self.tag
    }

    /// Bytes of a whole entry.
    pub fn entry_bytes(&self) -> usize {
        ENTRY_HEADER_BYTES + self.num_payload_bytes
    }

    /// Bytes of KV in an entry.
    pub fn payload_bytes(&self) -> usize {
        self.num_payload_bytes
    }

    /// Makes the entry of `name`; `fill` writes the payload, every byte of it.
    pub fn encode(&self, name: ContentName, fill: impl FnOnce(&mut [u8])) -> Entry {
        let mut bytes = vec![0; self.entry_bytes()];
        let (header, payload) = bytes.split_at_mut(ENTRY_HEADER_BYTES);
        fill(payload);
        header[..DIGEST_AT].copy_from_slice(&self.header_of(name));
        let digest = payload_digest(&header[..DIGEST_AT], payload);
        header[DIGEST_AT..].copy_from_slice(&digest);
        Entry(bytes.into())
    }

    /// Takes `bytes` as the entry of `name` if they are.
    ///
    /// # Errors
    /// [`BadEntry`].
    pub fn check(&self, name: ContentName, bytes: Bytes) -> Result<Entry, BadEntry> {
        if bytes.len() != self.entry_bytes() {
            return Err(BadEntry::WrongSize);
        }
        let (header, payload) = bytes.split_at(ENTRY_HEADER_BYTES);
        let expected = self.header_of(name);
        let differs = |from: usize, to: usize| header[from..to] != expected[from..to];
        for (from, to, bad) in [
            (0, 8, BadEntry::NotAnEntry),
            (56, 88, BadEntry::WrongRepresentation),
            (88, 96, BadEntry::WrongSize),
            (8, 24, BadEntry::WrongKey),
            (24, 56, BadEntry::Collision),
        ] {
            if differs(from, to) {
                return Err(bad);
            }
        }
        if payload_digest(&header[..DIGEST_AT], payload) != header[DIGEST_AT..] {
            return Err(BadEntry::Damaged);
        }
        Ok(Entry(bytes))
    }

    fn header_of(&self, name: ContentName) -> [u8; DIGEST_AT] {
        let (ContentKey(key), PrefixDigest(digest)) = (name.key, name.digest);
        let mut header = [0; DIGEST_AT];
        header[..4].copy_from_slice(&MAGIC);
        header[4..6].copy_from_slice(&ENTRY_VERSION.to_le_bytes());
        header[8..24].copy_from_slice(&key.to_le_bytes());
        header[24..56].copy_from_slice(&digest);
        header[56..88].copy_from_slice(&self.tag);
        header[88..96].copy_from_slice(&(self.num_payload_bytes as u64).to_le_bytes());
        header
    }
}

fn payload_digest(header: &[u8], payload: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header);
    hasher.update(payload);
    *hasher.finalize().as_bytes()
}

/// An entry that is what its name says: made here, or checked.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry(Bytes);

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Entry({} bytes, digest {})", self.0.len(), hex(&self.0[DIGEST_AT..DIGEST_AT + 8]))
    }
}

impl Entry {
    /// The whole entry, as tiers keep it.
    pub fn bytes(&self) -> &Bytes {
        &self.0
    }

    /// KV of all layers, ascending.
    pub fn payload(&self) -> &[u8] {
        &self.0[ENTRY_HEADER_BYTES..]
    }
}

#[cfg(test)]
mod tests {
    use common::kv_spec::{KvDtype, KvSpec};
    use common::model::{ModelIdentity, NumericsId, Representation};
    use proptest::prelude::*;

    use super::*;

    fn model(representation: &str, numerics: &str) -> ModelInfo {
        ModelInfo {
            identity: ModelIdentity([1; 32]),
            numerics: NumericsId(numerics.to_string()),
            representation: Representation(representation.to_string()),
            kv_spec: KvSpec::uniform(2, 1, 8, KvDtype::F32, None),
            vocab_size: 1,
            max_model_len: 1,
            exchange: Default::default(),
            granule_order: Default::default(),
            block_size: 16,
            num_blocks: 1,
        }
    }

    fn format() -> EntryFormat {
        EntryFormat::new(&model("kv-f32", "cpu"), 2, 100)
    }

    fn name(number: u8) -> ContentName {
        ContentName { key: ContentKey(u128::from(number)), digest: PrefixDigest([number; 32]) }
    }

    fn entry() -> Entry {
        format().encode(name(1), |payload| payload.iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8))
    }

    #[test]
    fn entry_survives_the_round_trip() {
        let checked = format().check(name(1), entry().bytes().clone()).unwrap();
        assert_eq!(checked.payload(), (0..200).map(|i| i as u8).collect::<Vec<_>>());
        assert_eq!(checked.bytes().len(), format().entry_bytes());
    }

    /// A change here makes every stored entry unreadable and needs a new version.
    #[test]
    fn layout_is_the_drawn_one() {
        let bytes = entry().bytes().clone();
        assert_eq!(&bytes[..8], b"TKVB\x01\0\0\0");
        assert_eq!(bytes[8..24], 1u128.to_le_bytes());
        assert_eq!(bytes[24..56], [1; 32]);
        assert_eq!(bytes[56..88], *format().tag());
        assert_eq!(bytes[88..96], 200u64.to_le_bytes());
        let payload: Vec<u8> = (0..200).map(|i| i as u8).collect();
        let covered: Vec<u8> = [&bytes[..96], &payload].concat();
        assert_eq!(bytes[96..128], *blake3::hash(&covered).as_bytes());
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = entry().bytes().clone();
        for bit in 0..good.len() * 8 {
            let mut bytes = good.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(format().check(name(1), bytes.into()).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn each_wrong_entry_is_refused_for_its_reason() {
        let check = |format: EntryFormat, name, bytes: Bytes| format.check(name, bytes).unwrap_err();
        let bytes = entry().bytes().clone();
        assert_eq!(check(format(), name(1), bytes.slice(..bytes.len() - 1)), BadEntry::WrongSize);
        assert_eq!(check(format(), name(1), Bytes::new()), BadEntry::WrongSize);
        assert_eq!(check(format(), name(2), bytes.clone()), BadEntry::WrongKey);
        let forged = ContentName { digest: PrefixDigest([9; 32]), ..name(1) };
        assert_eq!(check(format(), forged, bytes.clone()), BadEntry::Collision);
        for (representation, numerics) in [("kv-bf16", "cpu"), ("kv-f32", "gpu")] {
            let other = EntryFormat::new(&model(representation, numerics), 2, 100);
            assert_eq!(check(other, name(1), bytes.clone()), BadEntry::WrongRepresentation);
        }
        // Two layers of 100 are not one of 200, and names do not run into each other.
        assert_ne!(EntryFormat::new(&model("kv-f32", "cpu"), 1, 200), format());
        assert_ne!(EntryFormat::new(&model("kv-f3", "2cpu"), 2, 100), format());
        let mut older = bytes.to_vec();
        older[4] = 0;
        assert_eq!(check(format(), name(1), older.into()), BadEntry::NotAnEntry);
        let mut damaged = bytes.to_vec();
        damaged[200] ^= 1;
        assert_eq!(check(format(), name(1), damaged.into()), BadEntry::Damaged);
        // A payload does not carry its proof to another name.
        let mut moved = format().encode(name(2), |_| {}).bytes().to_vec();
        moved[DIGEST_AT..].copy_from_slice(&bytes[DIGEST_AT..]);
        assert_eq!(check(format(), name(2), moved.into()), BadEntry::Damaged);
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(format().check(name(1), bytes.into()).is_err());
        }
    }
}
