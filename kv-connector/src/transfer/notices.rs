//! From the threads of KV to whoever waits elsewhere: what has landed, what has left.
//!
//! A queue in which a notice can be seen at once and whoever waits is woken for many of them together
//! ([`turn_end`](crate::turn_end)). It has one reader.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::turn_end::{self, AtTurnEnd};

/// Both ends. Cheap to clone. Notices are plain data: they may be dropped at the end of a turn, see [`AtTurnEnd`].
pub(super) struct Notices<T>(Arc<Shared<T>>);

struct Shared<T> {
    queue: Mutex<Queue<T>>,
    bell: Notify,
    num_unread_max: usize,
}

struct Queue<T> {
    notices: VecDeque<T>,
    has_ended: bool,
}

impl<T> Shared<T> {
    fn queue(&self) -> MutexGuard<'_, Queue<T>> {
        // Valid after every statement.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Send> AtTurnEnd for Shared<T> {
    fn on_turn_end(&self) {
        self.bell.notify_one();
    }
}

impl<T> Clone for Notices<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Send + 'static> Notices<T> {
    /// With room for `num_unread_max`.
    pub(super) fn new(num_unread_max: usize) -> Self {
        let queue = Mutex::new(Queue { notices: VecDeque::new(), has_ended: false });
        Self(Arc::new(Shared { queue, bell: Notify::new(), num_unread_max }))
    }

    /// Can be read from now on, by a reader that waits when [`ring`](Self::ring) is called. Lost beyond the room.
    pub(super) fn put(&self, notice: T) {
        let mut queue = self.0.queue();
        if queue.notices.len() < self.0.num_unread_max {
            queue.notices.push_back(notice);
        }
    }

    /// Wakes a reader that waits.
    pub(super) fn ring(&self) {
        self.0.bell.notify_one();
    }

    /// As [`ring`](Self::ring), at the end of the calling thread's turn.
    pub(super) fn ring_at_turn_end(&self) {
        turn_end::at_turn_end(self.0.clone());
    }

    /// Nothing more is put in.
    pub(super) fn end(&self) {
        self.0.queue().has_ended = true;
        self.ring();
    }

    /// The next notice; `None` behind the last. Cancel-safe.
    pub(super) async fn next(&self) -> Option<T> {
        loop {
            {
                let mut queue = self.0.queue();
                if let Some(notice) = queue.notices.pop_front() {
                    return Some(notice);
                }
                if queue.has_ended {
                    return None;
                }
            }
            // A bell that rang meanwhile is remembered.
            self.0.bell.notified().await;
        }
    }

    /// Whether there is none to be read.
    pub(super) fn is_empty(&self) -> bool {
        self.0.queue().notices.is_empty()
    }

    /// The next notice, if it is there.
    pub(super) fn try_next(&self) -> Option<T> {
        self.0.queue().notices.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::pin::pin;

    use futures::FutureExt;

    #[tokio::test]
    async fn notices_are_read_in_order_and_behind_them_the_end() {
        let notices = Notices::new(2);
        (1..=3).for_each(|number| notices.put(number));
        assert_eq!(notices.next().await, Some(1));
        assert_eq!((notices.try_next(), notices.try_next()), (Some(2), None), "there is no room for a third");
        notices.put(4);
        notices.end();
        assert_eq!((notices.next().await, notices.next().await), (Some(4), None));
    }

    #[tokio::test]
    async fn reader_that_waits_is_woken_by_the_bell_and_by_the_end() {
        let notices = Notices::new(4);
        for number in 0..2 {
            let mut reading = pin!(notices.next());
            assert_eq!(reading.as_mut().now_or_never(), None);
            notices.put(number);
            notices.ring();
            assert_eq!(reading.await, Some(number));
        }
        // The bell of what was read already.
        notices.ring();
        let mut reading = pin!(notices.next());
        assert_eq!(reading.as_mut().now_or_never(), None);
        notices.end();
        assert_eq!(reading.await, None);
    }

    #[test]
    fn bell_waits_for_the_end_of_a_turn_and_the_notice_does_not() {
        let notices = Notices::new(4);
        let reader = notices.clone();
        let turns = std::thread::spawn(move || {
            turn_end::on_park();
            let mut reading = pin!(reader.next());
            let before = reading.as_mut().now_or_never();
            reader.put(7);
            reader.ring_at_turn_end();
            let is_rung = reader.0.bell.notified().now_or_never().is_some();
            turn_end::on_turn_end();
            (before, is_rung, reading.now_or_never())
        });
        assert_eq!(turns.join().unwrap(), (None, false, Some(Some(7))));
        assert_eq!(notices.try_next(), None);
    }
}
