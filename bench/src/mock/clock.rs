//! Wakes tasks at exact moments. The runtime's own timer counts in milliseconds, which is a per cent of what is
//! to be measured here; a thread that sleeps until the next moment is late by tens of microseconds.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::mpsc;
use std::time::Instant;

use tokio::sync::oneshot;

/// A handle of the clock's thread, which ends with the last of them.
#[derive(Debug, Clone)]
pub struct Clock(mpsc::Sender<Alarm>);

#[derive(Debug)]
struct Alarm {
    due: Instant,
    wake: oneshot::Sender<()>,
}

impl PartialEq for Alarm {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}

impl Eq for Alarm {}

impl PartialOrd for Alarm {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Alarm {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.due.cmp(&other.due)
    }
}

impl Clock {
    /// Starts the thread.
    pub fn start() -> Self {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || run(&receiver));
        Self(sender)
    }

    /// Returns at `due`, or at once if that is past.
    pub async fn wait_until(&self, due: Instant) {
        let (wake, woken) = oneshot::channel();
        if self.0.send(Alarm { due, wake }).is_ok() {
            // The thread drops no alarm while a handle is there.
            let _ = woken.await;
        }
    }
}

/// Holds one alarm for each waiting task.
fn run(receiver: &mpsc::Receiver<Alarm>) {
    let mut alarms = BinaryHeap::new();
    loop {
        let now = Instant::now();
        while alarms.peek().is_some_and(|Reverse(alarm): &Reverse<Alarm>| alarm.due <= now) {
            if let Some(Reverse(alarm)) = alarms.pop() {
                // A task that is gone needs no waking.
                let _ = alarm.wake.send(());
            }
        }
        let received = match alarms.peek() {
            Some(Reverse(next)) => receiver.recv_timeout(next.due.saturating_duration_since(Instant::now())),
            None => receiver.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
        };
        match received {
            Ok(alarm) => {
                // All that are there: a later one may be due before.
                alarms.push(Reverse(alarm));
                alarms.extend(receiver.try_iter().map(Reverse));
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) if alarms.is_empty() => return,
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                // Whoever waits dropped its handle with its task.
                alarms.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use futures::stream::{FuturesUnordered, StreamExt};
    use std::time::Duration;

    #[tokio::test]
    async fn tasks_wake_in_the_order_of_their_moments_and_never_before() {
        let (sender, receiver) = mpsc::channel();
        let start = Instant::now();
        let mut tasks = FuturesUnordered::new();
        for ms in [30, 10, 0, 20] {
            let due = start + Duration::from_millis(ms);
            let (wake, woken) = oneshot::channel();
            sender.send(Alarm { due, wake }).expect("the receiver is there");
            tasks.push(async move {
                woken.await.expect("the clock drops no alarm");
                assert!(Instant::now() >= due);
                ms
            });
        }
        // All wait before the first can be woken.
        assert_eq!(tasks.next().now_or_never(), None);
        std::thread::spawn(move || run(&receiver));
        assert_eq!(tasks.collect::<Vec<_>>().await, [0, 10, 20, 30]);
        drop(sender);
    }

    #[tokio::test]
    async fn what_is_past_wakes_at_once() {
        Clock::start().wait_until(Instant::now()).await;
    }
}
