//! How long the threads of KV had a core, and how long they were ready and others had it.
//!
//! The first is what moving KV costs, the second what the engine and the control streams took before it: the kernel
//! counts both for each thread. Where it does not, nothing is told.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metrics::{Counter, Label, Unit};

use crate::accounting::Ledger;

/// Told this often.
const PERIOD: Duration = Duration::from_secs(1);

/// The threads of one fabric. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct KvTime {
    threads: Arc<Mutex<Vec<Thread>>>,
}

struct Thread {
    schedstat: PathBuf,
    counted: Micros,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Micros {
    running: u64,
    waiting: u64,
}

impl KvTime {
    /// Counts the calling thread, until it ends.
    pub(crate) fn add_this_thread(&self) {
        if let Ok(thread) = std::fs::read_link("/proc/thread-self") {
            let schedstat = Path::new("/proc").join(thread).join("schedstat");
            self.threads().push(Thread { schedstat, counted: Micros::default() });
        }
    }

    /// Keeps the metrics of `ledger`'s node for as long as it runs.
    pub(crate) async fn tell(self, ledger: Arc<Ledger>) {
        metrics::describe_counter!(
            THREAD_MICROS,
            Unit::Microseconds,
            "Time in which threads that move KV had a core (running), or were ready and had none (waiting)"
        );
        let [running, waiting] = ["running", "waiting"]
            .map(|state| -> Counter { metrics::counter!(THREAD_MICROS, ledger.with(Label::new("state", state))) });
        loop {
            let since = self.count();
            running.increment(since.running);
            waiting.increment(since.waiting);
            tokio::time::sleep(PERIOD).await;
        }
    }

    /// What has been added since it was last asked.
    fn count(&self) -> Micros {
        let mut sum = Micros::default();
        self.threads().retain_mut(|thread| {
            let Some(now) = std::fs::read_to_string(&thread.schedstat).ok().and_then(|text| parsed(&text)) else {
                return false; // it has ended
            };
            sum.running += now.running.saturating_sub(thread.counted.running);
            sum.waiting += now.waiting.saturating_sub(thread.counted.waiting);
            thread.counted = now;
            true
        });
        sum
    }

    fn threads(&self) -> MutexGuard<'_, Vec<Thread>> {
        // Valid after every statement.
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const THREAD_MICROS: &str = "tandem_fabric_kv_thread_microseconds_total";

/// The kernel's line: nanoseconds on a core, nanoseconds ready without one, and how often it had one.
fn parsed(schedstat: &str) -> Option<Micros> {
    let mut nanos = schedstat.split_ascii_whitespace().map(|number| number.parse::<u64>().ok());
    let mut micros = || Some(nanos.next()?? / 1000);
    Some(Micros { running: micros()?, waiting: micros()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::time::Instant;

    #[test]
    fn line_of_the_kernel_is_read_or_refused() {
        assert_eq!(parsed("1516428 119132 2\n"), Some(Micros { running: 1516, waiting: 119 }));
        assert_eq!(parsed("1516428"), None);
        assert_eq!(parsed("much little 2"), None);
    }

    #[test]
    fn work_of_a_thread_counts_once_and_not_behind_its_end() {
        let time = KvTime::default();
        let (told, hear) = std::sync::mpsc::channel::<()>();
        let (begun, begin) = std::sync::mpsc::channel::<()>();
        let counted = time.clone();
        let working = std::thread::spawn(move || {
            counted.add_this_thread();
            let began_at = Instant::now();
            // The kernel may count no earlier than with its next tick, and time that was waited before that.
            let mut running = 0;
            while running == 0 && began_at.elapsed() < Duration::from_secs(30) {
                running += counted.count().running;
            }
            begun.send(()).unwrap();
            hear.recv().unwrap();
        });
        begin.recv().unwrap();
        assert_eq!(time.threads().len(), 1);
        assert!(time.threads()[0].counted.running > 0);
        told.send(()).unwrap();
        working.join().unwrap();
        time.count();
        assert!(time.threads().is_empty());
        assert_eq!(time.count(), Micros::default());
    }
}
