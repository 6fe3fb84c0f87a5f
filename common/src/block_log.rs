//! The block events of one life of a node, numbered, so that a listener can stop and go on later.
//!
//! A compacted log: a stored block stays in it for as long as it is stored, under the number of its event;
//! removals are kept in a ring. Reading from number 0 therefore gives a snapshot without one being made, in
//! pieces of any size and while blocks come and go:
//!
//! ```text
//! numbers      1  2  3  4  5  6  7  8          stored  2     4     7        (1, 3 were removed)
//! events       S  S  S  S  R1 R3 S  ...        gone             5  6        (ring)
//! ```
//!
//! A listener needs every removal behind the number at which it began. If the ring has lost one of those, it
//! starts over: [`LogBatch::is_restart`]. So memory is bounded whatever a listener does, and nobody waits.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;

use crate::block_events::{BlockEvent, Medium, StoredBlock};
use crate::content::ContentKey;

/// Bytes that an event counts for in a batch, beside its tokens.
const EVENT_BYTES: usize = 64;

/// See the module. Holds one entry per block that is stored, in whatever medium, and a ring of removals.
#[derive(Debug)]
pub struct BlockLog {
    /// Number of the newest event; the first one is 1.
    newest: u64,
    stored: BTreeMap<u64, StoredBlock>,
    numbers: HashMap<(Medium, ContentKey), u64>,
    gone: VecDeque<(u64, BlockEvent)>,
    num_gone_max: usize,
    /// Number of the newest removal that the ring has lost.
    lost: u64,
}

/// How far one listener has read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogReader {
    /// Everything up to here was read; `None`: it starts from nothing.
    position: Option<u64>,
    /// Removals up to here do not matter: what they removed was never read.
    began_at: u64,
}

/// A piece of the log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogBatch {
    /// Forget everything that is known of this node, then take the events in.
    pub is_restart: bool,
    /// In order.
    pub events: Vec<BlockEvent>,
    /// Where another reader can go on behind this batch; `None` inside a snapshot.
    pub resume_at: Option<u64>,
}

impl LogBatch {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty() && !self.is_restart
    }
}

impl LogReader {
    /// Goes on behind event number `after`, or starts from nothing.
    pub fn new(after: Option<u64>) -> Self {
        Self { position: after, began_at: after.unwrap_or(0) }
    }
}

impl BlockLog {
    /// An empty log that remembers `num_gone_max` removals.
    pub fn new(num_gone_max: usize) -> Self {
        Self {
            newest: 0,
            stored: BTreeMap::new(),
            numbers: HashMap::new(),
            gone: VecDeque::new(),
            num_gone_max,
            lost: 0,
        }
    }

    /// Number of the newest event, 0 before the first.
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// Blocks that are stored now, over all media.
    pub fn num_stored(&self) -> usize {
        self.stored.len()
    }

    /// Takes an event in; not the removal of what is not stored, which would say nothing and take room in the ring.
    pub fn append(&mut self, event: BlockEvent) {
        if let BlockEvent::Removed { medium, key } = &event
            && !self.numbers.contains_key(&(*medium, *key))
        {
            return;
        }
        self.newest += 1;
        match event {
            BlockEvent::Stored(block) => {
                if let Some(older) = self.numbers.insert((block.medium, block.key), self.newest) {
                    self.stored.remove(&older);
                }
                self.stored.insert(self.newest, block);
                return;
            }
            BlockEvent::Removed { medium, key } => {
                if let Some(number) = self.numbers.remove(&(medium, key)) {
                    self.stored.remove(&number);
                }
            }
            BlockEvent::Cleared { medium } => {
                self.stored.retain(|_, block| block.medium != medium);
                self.numbers.retain(|(of, _), _| *of != medium);
            }
        }
        self.gone.push_back((self.newest, event));
        while self.gone.len() > self.num_gone_max {
            let (number, _) = self.gone.pop_front().expect("it is longer than a length");
            self.lost = number;
        }
    }

    /// What comes next for `reader`, about `num_bytes_max` bytes of it; empty if it has read everything.
    pub fn read(&self, reader: &mut LogReader, num_bytes_max: usize) -> LogBatch {
        let mut batch = LogBatch::default();
        let position = match reader.position {
            Some(position) if position <= self.newest && self.lost <= position.max(reader.began_at) => position,
            // Nothing was read yet, or too much was missed, or the number is not one of this log.
            _ => {
                batch.is_restart = true;
                reader.began_at = self.newest;
                0
            }
        };
        let mut stored = self.stored.range((Bound::Excluded(position), Bound::Unbounded)).peekable();
        let first_gone = self.gone.partition_point(|(number, _)| *number <= position.max(reader.began_at));
        let mut gone = self.gone.range(first_gone..).peekable();
        let (mut last, mut num_bytes) = (self.newest, 0);
        loop {
            let is_stored_next = match (stored.peek(), gone.peek()) {
                (None, None) => {
                    last = self.newest;
                    break;
                }
                (Some(_), None) => true,
                (None, Some(_)) => false,
                (Some((stored, _)), Some((gone, _))) => *stored < gone,
            };
            if num_bytes >= num_bytes_max {
                break;
            }
            if is_stored_next {
                let (number, block) = stored.next().expect("it was peeked at");
                num_bytes += EVENT_BYTES + block.tokens.len() * 4;
                batch.events.push(BlockEvent::Stored(block.clone()));
                last = *number;
            } else {
                let (number, event) = gone.next().expect("it was peeked at");
                num_bytes += EVENT_BYTES;
                batch.events.push(event.clone());
                last = *number;
            }
        }
        reader.position = Some(last);
        batch.resume_at = (last >= reader.began_at).then_some(last);
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    use Medium::{Host, Pool};

    fn stored_in(medium: Medium, n: u8) -> BlockEvent {
        let key = ContentKey(n.into());
        BlockEvent::Stored(StoredBlock { medium, key, parent: None, tokens: [u32::from(n); 16].into() })
    }

    fn removed_from(medium: Medium, n: u8) -> BlockEvent {
        BlockEvent::Removed { medium, key: ContentKey(n.into()) }
    }

    fn stored(n: u8) -> BlockEvent {
        stored_in(Pool, n)
    }

    fn removed(n: u8) -> BlockEvent {
        removed_from(Pool, n)
    }

    /// What a listener makes of the events.
    #[derive(Debug, Default, Clone)]
    struct Listener {
        known: HashSet<(Medium, ContentKey)>,
        num_restarts: usize,
    }

    impl Listener {
        fn hear(&mut self, batch: LogBatch) {
            if batch.is_restart {
                self.known.clear();
                self.num_restarts += 1;
            }
            for event in batch.events {
                match event {
                    BlockEvent::Stored(block) => {
                        self.known.insert((block.medium, block.key));
                    }
                    BlockEvent::Removed { medium, key } => {
                        self.known.remove(&(medium, key));
                    }
                    BlockEvent::Cleared { medium } => self.known.retain(|(of, _)| *of != medium),
                }
            }
        }
    }

    #[test]
    fn listener_that_stops_goes_on_where_it_was() {
        let mut log = BlockLog::new(10);
        (1..=3).for_each(|n| log.append(stored(n)));
        let mut reader = LogReader::new(None);
        let first = log.read(&mut reader, usize::MAX);
        assert!(first.is_restart && first.events.len() == 3);
        assert!(log.read(&mut reader, usize::MAX).is_empty());
        log.append(removed(2));
        log.append(stored(4));
        let next = log.read(&mut LogReader::new(first.resume_at), usize::MAX);
        assert!(!next.is_restart);
        assert_eq!(next.events, [removed(2), stored(4)]);
        assert_eq!(next, log.read(&mut reader, usize::MAX));
    }

    #[test]
    fn listener_that_missed_a_removal_starts_over_and_no_other() {
        let mut log = BlockLog::new(2);
        (1..=5).for_each(|n| log.append(stored(n)));
        let (mut early, mut late) = (LogReader::new(Some(5)), LogReader::new(Some(6)));
        (1..=3).for_each(|n| log.append(removed(n)));
        let batch = log.read(&mut early, usize::MAX);
        assert!(batch.is_restart);
        assert_eq!(batch.events, [stored(4), stored(5)]);
        assert_eq!(log.read(&mut late, usize::MAX).events, [removed(2), removed(3)]);
        // Fresh ones need no removal of what they never read.
        assert_eq!(log.read(&mut LogReader::new(None), usize::MAX).events, [stored(4), stored(5)]);
        assert!(log.read(&mut LogReader::new(Some(99)), usize::MAX).is_restart, "a number from elsewhere");
    }

    #[test]
    fn snapshot_in_pieces_can_be_resumed_only_behind_its_end() {
        let mut log = BlockLog::new(10);
        (1..=3).for_each(|n| log.append(stored(n)));
        let mut reader = LogReader::new(None);
        assert_eq!(log.read(&mut reader, 1).resume_at, None);
        assert_eq!(log.read(&mut reader, 1).resume_at, None);
        assert_eq!(log.read(&mut reader, 1).resume_at, Some(3));
    }

    #[test]
    fn removal_of_what_is_not_stored_is_no_event() {
        let mut log = BlockLog::new(1);
        [stored(1), removed(1), removed(1), removed_from(Host, 2)].into_iter().for_each(|event| log.append(event));
        assert_eq!(log.newest(), 2);
        assert_eq!(log.read(&mut LogReader::new(Some(1)), usize::MAX).events, [removed(1)], "the ring still has it");
    }

    #[test]
    fn cleared_medium_leaves_the_others() {
        let mut log = BlockLog::new(10);
        log.append(stored(1));
        log.append(stored_in(Host, 1));
        log.append(BlockEvent::Cleared { medium: Pool });
        assert_eq!(log.read(&mut LogReader::new(None), usize::MAX).events, [stored_in(Host, 1)]);
    }

    #[test]
    fn block_that_moves_from_the_pool_to_a_tier_is_told_at_each_step() {
        let mut log = BlockLog::new(10);
        let mut reader = LogReader::new(None);
        log.read(&mut reader, usize::MAX);
        let steps = [stored(1), stored_in(Host, 1), removed(1), removed_from(Host, 1)];
        for step in steps {
            log.append(step.clone());
            assert_eq!(log.read(&mut reader, usize::MAX).events, [step]);
            // Whoever was away sees the same, from where it was.
            assert!(log.read(&mut LogReader::new(Some(log.newest())), usize::MAX).is_empty());
        }
        assert_eq!(log.num_stored(), 0);
    }

    proptest! {
        /// Whatever happens between the pieces it reads, a listener ends with exactly what is stored, in each medium.
        #[test]
        fn listeners_agree_with_the_log(
            ops in prop::collection::vec((0u8..20, 0u8..12, any::<bool>()), 0..300),
            num_gone_max in 0usize..12,
        ) {
            let mut log = BlockLog::new(num_gone_max);
            let mut truth = HashSet::new();
            let mut listeners = [(LogReader::new(None), Listener::default()), (LogReader::new(None), Listener::default())];
            for (op, n, is_host) in ops {
                let medium = if is_host { Host } else { Pool };
                let place = (medium, ContentKey(n.into()));
                match op {
                    0..9 => { log.append(stored_in(medium, n)); truth.insert(place); }
                    9..15 => { log.append(removed_from(medium, n)); truth.remove(&place); }
                    15 => { log.append(BlockEvent::Cleared { medium }); truth.retain(|(of, _)| *of != medium); }
                    16..18 => {
                        let (reader, listener) = &mut listeners[0];
                        listener.hear(log.read(reader, 1));
                    }
                    18 => {
                        let (reader, listener) = &mut listeners[1];
                        listener.hear(log.read(reader, 200));
                    }
                    // The connection is lost: it resumes by the number it was told.
                    _ => {
                        let (reader, listener) = &mut listeners[1];
                        let batch = log.read(reader, 1);
                        let resume_at = batch.resume_at;
                        listener.hear(batch);
                        *reader = LogReader::new(resume_at);
                    }
                }
            }
            for (reader, listener) in &mut listeners {
                loop {
                    let batch = log.read(reader, 300);
                    if batch.is_empty() {
                        break;
                    }
                    listener.hear(batch);
                }
                prop_assert_eq!(&listener.known, &truth);
            }
            prop_assert_eq!(log.num_stored(), truth.len());
        }
    }
}
