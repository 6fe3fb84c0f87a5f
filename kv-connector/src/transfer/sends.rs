//! The extents that one owner has begun to send.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::runtime::Handle;
use tokio::task::JoinSet;

use crate::transfer::notices::Notices;

/// Tasks on the threads of KV, each of which ends once: the extent has left, or has not. How they ended is heard of
/// many at a time, though one by one.
pub struct ExtentSends {
    tasks: JoinSet<()>,
    ended: Notices<bool>,
    /// Begun, and not heard of.
    num_begun: usize,
}

/// Says how a send has ended, once nothing of it is left; unless it said otherwise, the extent did not leave.
struct Ending {
    has_left: bool,
    ended: Notices<bool>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.ended.put(self.has_left);
        self.ended.ring_at_turn_end();
    }
}

/// A send and, dropped behind it whether it has begun or not, its end: once that is told, nobody reads the extent's
/// blocks.
struct Sending<F> {
    sending: Pin<Box<F>>,
    ending: Ending,
}

impl<F: Future<Output = bool>> Future for Sending<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        this.sending.as_mut().poll(cx).map(|has_left| this.ending.has_left = has_left)
    }
}

impl Default for ExtentSends {
    fn default() -> Self {
        // Bounded by the sends themselves: each has one end.
        Self { tasks: JoinSet::new(), ended: Notices::new(usize::MAX), num_begun: 0 }
    }
}

impl ExtentSends {
    /// Runs `sending` there; it resolves with whether the extent has left.
    pub(super) fn spawn_on(&mut self, threads: &Handle, sending: impl Future<Output = bool> + Send + 'static) {
        // Whose end has been heard of is done, or about to be.
        while self.tasks.try_join_next().is_some() {}
        self.num_begun += 1;
        // From here on, so that what is given up before it begins has an end too.
        let ending = Ending { has_left: false, ended: self.ended.clone() };
        self.tasks.spawn_on(Sending { sending: Box::pin(sending), ending }, threads);
    }

    /// Sends whose end has not been heard of.
    pub fn len(&self) -> usize {
        self.num_begun
    }

    /// Whether all ends have been heard of.
    pub fn is_empty(&self) -> bool {
        self.num_begun == 0
    }

    /// The next end: whether the extent has left. `None` if there is nothing to end. Cancel-safe.
    pub async fn next_ended(&mut self) -> Option<bool> {
        if self.num_begun == 0 {
            return None;
        }
        let has_left = self.ended.next().await.unwrap_or(false);
        self.num_begun -= 1;
        Some(has_left)
    }

    /// Gives up all that have not ended; their ends are still to be heard.
    pub fn give_up(&mut self) {
        self.tasks.abort_all();
    }

    /// Gives up, and resolves when nothing is read any more.
    pub async fn stop(&mut self) {
        self.tasks.shutdown().await;
        while self.ended.try_next().is_some() {}
        self.num_begun = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn every_send_has_one_end_however_it_ends() {
        let mut sends = ExtentSends::default();
        assert_eq!(sends.next_ended().await, None);
        let threads = Handle::current();
        sends.spawn_on(&threads, async { true });
        assert_eq!(sends.next_ended().await, Some(true));
        sends.spawn_on(&threads, async { false });
        sends.spawn_on(&threads, async { panic!("as a bug would") });
        sends.spawn_on(&threads, std::future::pending());
        assert_eq!(sends.len(), 3);
        for _ in 0..2 {
            assert_eq!(sends.next_ended().await, Some(false));
        }
        sends.give_up();
        assert_eq!(sends.next_ended().await, Some(false));
        assert!(sends.is_empty());
        // Before it begins.
        sends.spawn_on(&threads, async { true });
        sends.give_up();
        assert_eq!(sends.next_ended().await, Some(false));
        sends.spawn_on(&threads, std::future::pending());
        sends.stop().await;
        assert!(sends.is_empty() && sends.next_ended().await.is_none());
    }

    #[tokio::test]
    async fn end_is_told_behind_the_last_use() {
        /// What is told when it goes.
        struct Block(Notices<bool>, Arc<Mutex<Option<bool>>>);
        impl Drop for Block {
            fn drop(&mut self) {
                *self.1.lock().unwrap() = Some(self.0.try_next().is_some());
            }
        }
        for (is_aborted, has_begun) in [(true, true), (true, false), (false, true)] {
            let (mut sends, was_told) = (ExtentSends::default(), Arc::default());
            let block = Block(sends.ended.clone(), Arc::clone(&was_told));
            let sending = async move {
                let _block = &block;
                tokio::task::yield_now().await;
                if is_aborted { std::future::pending().await } else { true }
            };
            sends.spawn_on(&Handle::current(), sending);
            if has_begun {
                tokio::task::yield_now().await;
            }
            if is_aborted {
                sends.give_up();
            }
            assert_eq!(sends.next_ended().await, Some(!is_aborted));
            assert_eq!(*was_told.lock().unwrap(), Some(false));
        }
    }
}
