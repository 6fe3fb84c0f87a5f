//! The UNIX socket of one attachment: places one way, answers the other.
//!
//! ```text
//! sender -> receiver    ATTACHED u8 | messages: kind u8, id u64, bytes u32 | that many bytes
//!                         EXTENT    extent header, runs       GIVE_UP   nothing
//! receiver -> sender    answers: id u64, TAKEN or REFUSED u8
//! ```
//!
//! All little-endian. An id stands for one extent and is never used again. Whatever else comes, and the end of the
//! socket, is the end of the attachment and of its bulk connection.
//!
//! Posting never waits and is never torn: what the kernel has no room for is kept and leaves in order, so a send that
//! is dropped midway has said all of a message or nothing of it. What is kept is bounded by what the extents that may
//! be on the way need; a peer that makes it more, since it does not read and yet goes on to post or to answer, ends the
//! attachment.

use std::convert::Infallible;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use common::wire::bulk::EXTENT_HEADER_BYTES;
use common::wire::runs::{NUM_RUNS_BYTES, NUM_RUNS_MAX, RUN_BYTES};
use tokio::net::UnixStream;
use tokio::sync::Notify;

use crate::busy_poll::{self, Activity};
use crate::turn_end::AtTurnEnd;

/// Said by the receiver when it has mapped the pool, and by the sender when it knows: its first byte here.
pub(super) const ATTACHED: u8 = 1;
/// Extents of one connection that may be on the way; no sender posts more, no receiver takes more.
pub(super) const NUM_ON_THE_WAY_MAX: usize = 256;

const EXTENT: u8 = 1;
const GIVE_UP: u8 = 2;
const MESSAGE_HEAD_BYTES: usize = 1 + 8 + 4;
const BODY_BYTES_MAX: usize = EXTENT_HEADER_BYTES + NUM_RUNS_BYTES + NUM_RUNS_MAX * RUN_BYTES;
const REFUSED: u8 = 0;
const TAKEN: u8 = 1;
const ANSWER_BYTES: usize = 8 + 1;
/// What a sender keeps at most for a receiver that reads: the places of every extent on the way, and the word that it
/// is given up, which may find that of as many before it still unsent.
pub(super) const UNSENT_MESSAGES_BYTES_MAX: usize =
    1 + NUM_ON_THE_WAY_MAX * (MESSAGE_HEAD_BYTES + BODY_BYTES_MAX + 2 * MESSAGE_HEAD_BYTES);
/// What a receiver keeps at most for a sender that reads: a place is free only once its answer was read.
pub(super) const UNSENT_ANSWERS_BYTES_MAX: usize = NUM_ON_THE_WAY_MAX * ANSWER_BYTES;
/// Taken from the kernel at a time.
const READ_BYTES: usize = 32 << 10;
/// Taken at a time by who looks again and again: an extent in 64 runs and more.
const POLLED_BYTES: usize = 1 << 10;

/// From the sender of extents.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// Header and runs.
    Extent { id: u64, body: Bytes },
    /// The extent is no longer to be copied.
    GiveUp { id: u64 },
}

/// Why there is nothing more to read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("the peer has closed it")]
    Ended,
    #[error("the rest of a message did not come within {0:?}")]
    Stalled(Duration),
    #[error("what came is no message: {0}")]
    Malformed(&'static str),
    #[error("the peer does not read: more than {0} bytes wait for it")]
    Unread(usize),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// One end.
pub(super) struct Mailbox {
    stream: UnixStream,
    /// What the kernel had no room for.
    unsent: Mutex<BytesMut>,
    unsent_bytes_max: usize,
    is_full: Notify,
    /// More than that was to be kept, and is not.
    is_unread: Notify,
    polled: Option<Polled>,
}

impl AtTurnEnd for Mailbox {
    fn on_turn_end(&self) {
        self.post(&[]);
    }
}

/// The same socket past the runtime, which knows what the kernel has told it and nothing newer
/// ([`busy_poll`](crate::busy_poll)).
struct Polled {
    stream: net::UnixStream,
    activity: Arc<Activity>,
}

impl Polled {
    fn new(stream: &UnixStream, activity: Arc<Activity>) -> io::Result<Self> {
        Ok(Self { stream: stream.as_fd().try_clone_to_owned()?.into(), activity })
    }

    /// What is there, as long as it is worth waiting for without sleeping; false: nothing came.
    async fn read(&self, buffer: &mut BytesMut) -> Result<bool, Broken> {
        let mut bytes = [0; POLLED_BYTES];
        while self.activity.is_recent() {
            match (&self.stream).read(&mut bytes) {
                Ok(0) => return Err(Broken::Ended),
                Ok(count) => {
                    buffer.extend_from_slice(&bytes[..count]);
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    busy_poll::found_nothing();
                    tokio::task::yield_now().await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(false)
    }
}

impl Mailbox {
    /// `first` leaves before everything that is posted, with the first of it or with [`post`](Self::post) of nothing.
    /// Keeps at most `unsent_bytes_max` that the kernel has no room for.
    pub(super) fn new(
        stream: UnixStream,
        first: &[u8],
        unsent_bytes_max: usize,
        activity: Option<&Arc<Activity>>,
    ) -> Self {
        // Without a descriptor left it is woken by the kernel, as without busy polling.
        let polled = activity.and_then(|activity| Polled::new(&stream, activity.clone()).ok());
        let (unsent, is_full, is_unread) = (Mutex::new(first.into()), Notify::new(), Notify::new());
        Self { stream, unsent, unsent_bytes_max, is_full, is_unread, polled }
    }

    fn on_traffic(&self) {
        if let Some(polled) = &self.polled {
            polled.activity.on_traffic();
        }
    }

    pub(super) fn post_extent(&self, id: u64, header: &[u8; EXTENT_HEADER_BYTES], runs: &[u8]) {
        let num_bytes = (header.len() + runs.len()) as u32;
        self.post(&[&[EXTENT], &id.to_le_bytes(), &num_bytes.to_le_bytes(), header, runs]);
    }

    pub(super) fn post_give_up(&self, id: u64) {
        self.post(&[&[GIVE_UP], &id.to_le_bytes(), &0u32.to_le_bytes()]);
    }

    /// Puts an answer behind what has not left yet; it leaves with what is posted next, or with
    /// [`post`](Self::post) of nothing.
    pub(super) fn put_answer(&self, id: u64, is_taken: bool) {
        let mut unsent = self.unsent();
        unsent.extend_from_slice(&id.to_le_bytes());
        unsent.extend_from_slice(&[if is_taken { TAKEN } else { REFUSED }]);
        if unsent.len() > self.unsent_bytes_max {
            self.write_or_give_up(&mut unsent);
        }
    }

    pub(super) fn post(&self, parts: &[&[u8]]) {
        self.on_traffic();
        let mut unsent = self.unsent();
        parts.iter().for_each(|part| unsent.extend_from_slice(part));
        self.write_or_give_up(&mut unsent);
    }

    fn write_or_give_up(&self, unsent: &mut BytesMut) {
        if self.write(unsent).is_err() {
            // Nobody reads any more, which whoever reads here learns as well.
            unsent.clear();
        }
        if unsent.len() > self.unsent_bytes_max {
            *unsent = BytesMut::new();
            self.is_unread.notify_one();
        }
        if !unsent.is_empty() {
            self.is_full.notify_one();
        }
    }

    /// Has what the kernel had no room for leave, until the socket breaks or more is to be kept than may be.
    pub(super) async fn flush(&self) -> Result<Infallible, Broken> {
        tokio::select! {
            broken = self.flush_on() => broken,
            () = self.is_unread.notified() => Err(Broken::Unread(self.unsent_bytes_max)),
        }
    }

    async fn flush_on(&self) -> Result<Infallible, Broken> {
        loop {
            self.is_full.notified().await;
            while !self.unsent().is_empty() {
                self.stream.writable().await?;
                self.write(&mut self.unsent())?;
            }
        }
    }

    /// More bytes into `buffer`. In the middle of a message they must come within `deadline`.
    pub(super) async fn read(&self, buffer: &mut BytesMut, deadline: Duration) -> Result<(), Broken> {
        buffer.reserve(READ_BYTES);
        loop {
            if buffer.is_empty() {
                if let Some(polled) = &self.polled
                    && polled.read(buffer).await?
                {
                    self.on_traffic();
                    return Ok(());
                }
                tokio::select! {
                    readable = self.stream.readable() => readable?,
                    () = self.is_worth_a_look() => continue,
                }
            } else {
                let readable = tokio::time::timeout(deadline, self.stream.readable()).await;
                readable.map_err(|_| Broken::Stalled(deadline))??;
            }
            match self.stream.try_read_buf(buffer) {
                Ok(0) => return Err(Broken::Ended),
                Ok(_) => {
                    self.on_traffic();
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn is_worth_a_look(&self) {
        match &self.polled {
            Some(polled) => polled.activity.renewed().await,
            None => std::future::pending().await,
        }
    }

    fn write(&self, unsent: &mut BytesMut) -> io::Result<()> {
        while !unsent.is_empty() {
            match self.stream.try_write(unsent) {
                Ok(num_bytes) => unsent.advance(num_bytes),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn unsent(&self) -> MutexGuard<'_, BytesMut> {
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the sender's first byte, once it is there.
pub(super) fn take_attached(buffer: &mut BytesMut) -> Result<(), Broken> {
    if buffer.is_empty() || buffer.get_u8() == ATTACHED {
        return Ok(());
    }
    Err(Broken::Malformed("it does not begin with the sender's word that it knows of the mapping"))
}

/// Takes the next message, if all of it is there.
pub(super) fn take_message(buffer: &mut BytesMut) -> Result<Option<Message>, Broken> {
    let Some(mut head) = buffer.first_chunk::<MESSAGE_HEAD_BYTES>().map(|head| &head[..]) else { return Ok(None) };
    let (kind, id, num_bytes) = (head.get_u8(), head.get_u64_le(), head.get_u32_le() as usize);
    match (kind, num_bytes) {
        (EXTENT, 0..=BODY_BYTES_MAX) | (GIVE_UP, 0) => {}
        (EXTENT | GIVE_UP, _) => return Err(Broken::Malformed("a message of an impossible size")),
        _ => return Err(Broken::Malformed("a message of an unknown kind")),
    }
    if buffer.len() < MESSAGE_HEAD_BYTES + num_bytes {
        return Ok(None);
    }
    buffer.advance(MESSAGE_HEAD_BYTES);
    let body = buffer.split_to(num_bytes).freeze();
    Ok(Some(if kind == EXTENT { Message::Extent { id, body } } else { Message::GiveUp { id } }))
}

/// Takes the next answer, if all of it is there: which extent, and whether it was taken.
pub(super) fn take_answer(buffer: &mut BytesMut) -> Option<(u64, bool)> {
    if buffer.len() < ANSWER_BYTES {
        return None;
    }
    Some((buffer.get_u64_le(), buffer.get_u8() == TAKEN))
}

#[cfg(test)]
mod tests {
    use super::*;

    use futures::FutureExt;

    use crate::busy_poll::BusyPolling;

    const DEADLINE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn what_the_kernel_has_no_room_for_arrives_whole_and_in_order() {
        arrives_whole_and_in_order(None).await;
        let polling = BusyPolling { time_max: DEADLINE, may_poll: Arc::new(|| true) };
        arrives_whole_and_in_order(Some(&Activity::new(polling))).await;
    }

    async fn arrives_whole_and_in_order(activity: Option<&Arc<Activity>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let sender = Mailbox::new(ours, &[ATTACHED], UNSENT_MESSAGES_BYTES_MAX, activity);
        let receiver = Mailbox::new(theirs, &[], UNSENT_ANSWERS_BYTES_MAX, activity);
        let runs = vec![7; NUM_RUNS_BYTES + NUM_RUNS_MAX * RUN_BYTES];
        for id in 0..NUM_ON_THE_WAY_MAX as u64 {
            sender.post_extent(id, &[1; EXTENT_HEADER_BYTES], &runs);
            sender.post_give_up(id);
        }
        assert!(!sender.unsent().is_empty(), "all of it fits the socket, so nothing is shown");
        let reading = async {
            let mut buffer = BytesMut::new();
            receiver.read(&mut buffer, DEADLINE).await.unwrap();
            take_attached(&mut buffer).unwrap();
            for expected in 0..NUM_ON_THE_WAY_MAX as u64 {
                for is_extent in [true, false] {
                    let message = loop {
                        match take_message(&mut buffer).unwrap() {
                            Some(message) => break message,
                            None => receiver.read(&mut buffer, DEADLINE).await.unwrap(),
                        }
                    };
                    match message {
                        Message::Extent { id, body } if is_extent => {
                            assert_eq!((id, body.len()), (expected, BODY_BYTES_MAX));
                            assert_eq!(body[EXTENT_HEADER_BYTES..], runs);
                        }
                        message => assert_eq!(message, Message::GiveUp { id: expected }),
                    }
                }
            }
        };
        tokio::select! {
            broken = sender.flush() => panic!("{broken:?}"),
            () = reading => {}
        }
    }

    fn answer(mailbox: &Mailbox, id: u64) {
        mailbox.put_answer(id, true);
        mailbox.post(&[]);
    }

    #[tokio::test]
    async fn peer_that_does_not_read_is_given_up_and_nothing_is_kept_for_it() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mailbox = Mailbox::new(ours, &[], UNSENT_ANSWERS_BYTES_MAX, None);
        // The kernel takes some, and then as many are kept as may be.
        let mut id = 0;
        while mailbox.unsent().len() + ANSWER_BYTES <= UNSENT_ANSWERS_BYTES_MAX {
            answer(&mailbox, id);
            id += 1;
        }
        let mut flushing = std::pin::pin!(mailbox.flush());
        assert!((&mut flushing).now_or_never().is_none());
        answer(&mailbox, id);
        assert_eq!(mailbox.unsent().capacity(), 0);
        assert!(matches!(tokio::time::timeout(DEADLINE, flushing).await, Ok(Err(Broken::Unread(_)))));
    }

    #[test]
    fn what_is_no_message_is_noticed_before_it_is_all_there() {
        let message = |kind: u8, num_bytes: u32| {
            let mut bytes = BytesMut::from(&[kind][..]);
            bytes.extend_from_slice(&7u64.to_le_bytes());
            bytes.extend_from_slice(&num_bytes.to_le_bytes());
            bytes
        };
        for (kind, num_bytes) in [(0, 0), (3, 0), (GIVE_UP, 1), (EXTENT, BODY_BYTES_MAX as u32 + 1), (EXTENT, u32::MAX)]
        {
            let taken = take_message(&mut message(kind, num_bytes));
            assert!(matches!(taken, Err(Broken::Malformed(_))), "{kind}, {num_bytes}");
        }
        assert!(matches!(take_message(&mut message(EXTENT, 1)), Ok(None)));
        assert!(matches!(take_message(&mut message(GIVE_UP, 0)), Ok(Some(Message::GiveUp { id: 7 }))));
        assert!(take_attached(&mut BytesMut::from(&[0][..])).is_err());
    }
}
