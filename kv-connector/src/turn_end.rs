//! What a thread of KV does once for many extents, at the end of its [turn](crate::turns).
//!
//! To wake another thread takes a system call, and where the two share a core the one that is woken takes it at once:
//! two switches, which together take longer than 64 KiB take to be hashed. So what need not be known at once is put
//! where it will be looked for, and whoever waits for it is woken when the turn ends or the thread has nothing more to
//! do. That is within one turn.

use std::cell::RefCell;
use std::sync::Arc;

/// Something to be done at the end of a turn, once for all who have asked for it.
///
/// A turn may end while the thread has a connection or an endpoint locked, and what was put off may be dropped there:
/// neither what is done nor what is dropped may touch one, so nothing that has one in it may be put off.
pub(crate) trait AtTurnEnd: Send + Sync {
    /// The turn has ended.
    fn on_turn_end(&self);
}

/// What is to be done; when a thread ends, it is done.
#[derive(Default)]
struct Waiting(Vec<Arc<dyn AtTurnEnd>>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.drain(..).for_each(|what| what.on_turn_end());
    }
}

thread_local! {
    /// Of a thread that takes turns.
    static WAITING: RefCell<Option<Waiting>> = const { RefCell::new(None) };
}

/// The calling thread is about to sleep, and was or will be told of when its turns [end](on_turn_end). Only from its
/// first time on is anything put off there: a thread that never calls this, as one for blocking work, does all at once.
pub(crate) fn on_park() {
    let ended = WAITING.replace(Some(Waiting::default()));
    drop(ended);
}

/// Has `what` done at the end of the turn; at once on a thread that takes none.
pub(crate) fn at_turn_end(what: Arc<dyn AtTurnEnd>) {
    let does_wait = WAITING.try_with(|waiting| match &mut *waiting.borrow_mut() {
        Some(Waiting(waiting)) => {
            // A turn is some ten extents of the smallest kind, so these are few.
            if !waiting.iter().any(|other| Arc::ptr_eq(other, &what)) {
                waiting.push(what.clone());
            }
            true
        }
        None => false,
    });
    // Also on a thread that is about to end, whose own values are gone.
    if !does_wait.unwrap_or(false) {
        what.on_turn_end();
    }
}

/// The turn has ended.
pub(crate) fn on_turn_end() {
    // Taken out first: what is done may wake whoever puts more in.
    let ended = WAITING.with_borrow_mut(|waiting| waiting.as_mut().map(std::mem::take));
    drop(ended);
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl AtTurnEnd for Count {
        fn on_turn_end(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Count {
        fn now(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    #[test]
    fn what_is_asked_for_many_times_is_done_once_for_each_turn() {
        let (one, other) = (Arc::new(Count::default()), Arc::new(Count::default()));
        let counted = (one.clone(), other.clone());
        let turns = std::thread::spawn(move || {
            on_park();
            for _ in 0..3 {
                at_turn_end(one.clone());
                at_turn_end(other.clone());
            }
            let within = (one.now(), other.now());
            on_turn_end();
            on_turn_end();
            let behind = (one.now(), other.now());
            at_turn_end(one);
            (within, behind)
        });
        assert_eq!(turns.join().unwrap(), ((0, 0), (1, 1)));
        assert_eq!((counted.0.now(), counted.1.now()), (2, 1), "a thread that ends leaves nothing undone");
    }

    #[test]
    fn thread_that_takes_no_turns_does_it_at_once() {
        let count = Arc::new(Count::default());
        at_turn_end(count.clone());
        assert_eq!(count.now(), 1);
        on_turn_end();
        assert_eq!(count.now(), 1);
    }
}
