//! Sends requests at the times of a schedule, whatever became of those before.

use std::sync::Arc;
use std::time::Duration;

use indicatif::ProgressBar;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::client::{Client, Slot};
use super::record::RequestRecord;
use super::workload::{Phase, Workload};

/// Sends request `index` of `phase` at `schedule[index]`, at most `max_concurrency` at a time, and returns the
/// records of all, in any order. `progress` is moved by each that ends.
///
/// Without `max_concurrency` the loop is open: nothing waits for an answer. With it, a request that finds no
/// place waits, in order, and its record tells how long. A place is the time since which it is free, so what
/// the generator is late is not taken for a wait, nor a wait for lateness.
pub async fn run(
    client: Arc<Client>,
    workload: &Workload,
    phase: Phase,
    schedule: &[Duration],
    max_concurrency: Option<usize>,
    progress: &ProgressBar,
) -> Vec<RequestRecord> {
    // Never holds more than one entry for each request.
    let (give_back, mut places) = mpsc::unbounded_channel();
    for _ in 0..max_concurrency.unwrap_or(0).min(schedule.len()) {
        give_back.send(Duration::ZERO).expect("the receiver lives as long as this function");
    }
    let mut requests = JoinSet::new();
    let start = Instant::now();
    for (index, scheduled) in schedule.iter().copied().enumerate() {
        let ready = client.ready(phase, index, &workload.ask(phase, index));
        tokio::time::sleep_until(start + scheduled).await;
        let free_since = match max_concurrency {
            Some(_) => places.recv().await.expect("this function holds a sender"),
            None => Duration::ZERO,
        };
        let slot = Slot { start, scheduled, due: scheduled.max(free_since) };
        let (client, progress, give_back) = (client.clone(), progress.clone(), give_back.clone());
        requests.spawn(async move {
            let record = client.send(ready, slot).await;
            progress.inc(1);
            // After the last request was sent nobody wants a place.
            let _ = give_back.send(record.ended);
            record
        });
    }
    requests.join_all().await
}
