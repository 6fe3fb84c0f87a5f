//! Sends requests at the times of a schedule, whatever became of those before.

use std::sync::Arc;
use std::time::Duration;

use indicatif::ProgressBar;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::client::{Client, Slot};
use super::record::RequestRecord;
use super::workload::{Phase, Workload};

/// Sends request `index` of `phase` at `schedule[index]`, at most `max_concurrency` at a time, and returns the
/// records of all, in any order. `progress` is moved by each that ends.
///
/// Without `max_concurrency` the loop is open: nothing waits for an answer. With it, a request that finds no
/// place waits, in order, and its record tells how long.
pub async fn run(
    client: Arc<Client>,
    workload: &Workload,
    phase: Phase,
    schedule: &[Duration],
    max_concurrency: Option<usize>,
    progress: &ProgressBar,
) -> Vec<RequestRecord> {
    let places = Arc::new(Semaphore::new(max_concurrency.unwrap_or(Semaphore::MAX_PERMITS)));
    let mut requests = JoinSet::new();
    let start = Instant::now();
    for (index, scheduled) in schedule.iter().copied().enumerate() {
        let ready = client.ready(phase, index, &workload.ask(phase, index));
        tokio::time::sleep_until(start + scheduled).await;
        let (place, due) = match places.clone().try_acquire_owned() {
            Ok(place) => (place, scheduled),
            Err(_) => {
                let place = places.clone().acquire_owned().await.expect("nobody closes the semaphore");
                (place, start.elapsed().max(scheduled))
            }
        };
        let (client, progress) = (client.clone(), progress.clone());
        requests.spawn(async move {
            let record = client.send(ready, Slot { start, scheduled, due }).await;
            drop(place);
            progress.inc(1);
            record
        });
    }
    requests.join_all().await
}
