//! Sends sessions at the times of a schedule, whatever became of those before.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use indicatif::ProgressBar;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::client::{Client, History, Ready, Slot, Which};
use super::record::RequestRecord;
use super::workload::{Phase, Session, Workload};

/// How sessions go on.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Sessions in progress at a time.
    pub max_concurrency: Option<usize>,
    /// Between an answer and the next turn of its session.
    pub think_time: Duration,
}

/// Sends session `index` of `phase` at `schedule[index]`, at most `max_concurrency` at a time, and returns the
/// records of all requests, in any order. `progress` is moved by each session that ends.
///
/// Without `max_concurrency` the loop is open: nothing waits for the answer of another session. With it, a
/// session that finds no place waits, in order, and its record tells how long. A place is the time since which
/// it is free, so what the generator is late is not taken for a wait, nor a wait for lateness. A turn behind
/// the first is scheduled for when the answer before it has come and the time to think has passed.
///
/// When `stop` completes no further session begins; those that have begun go on to their end.
pub async fn run(
    client: Arc<Client>,
    workload: &Workload,
    phase: Phase,
    schedule: &[Duration],
    pace: Pace,
    progress: &ProgressBar,
    stop: impl Future<Output = ()>,
) -> Vec<RequestRecord> {
    let mut stop = pin!(stop);
    // Never holds more than one entry for each session.
    let (give_back, mut places) = mpsc::unbounded_channel();
    for _ in 0..pace.max_concurrency.unwrap_or(0).min(schedule.len()) {
        give_back.send(Duration::ZERO).expect("the receiver lives as long as this function");
    }
    let mut sessions = JoinSet::new();
    let start = Instant::now();
    for (index, scheduled) in schedule.iter().copied().enumerate() {
        let session = workload.session(phase, index);
        let history = History::default();
        let first = client.ready(Which { phase, session: index, turn: 0 }, &session, &history);
        let turn = async {
            tokio::time::sleep_until(start + scheduled).await;
            match pace.max_concurrency {
                Some(_) => places.recv().await.expect("this function holds a sender"),
                None => Duration::ZERO,
            }
        };
        let free_since = tokio::select! {
            biased;
            () = &mut stop => break,
            free_since = turn => free_since,
        };
        let slot = Slot { start, scheduled, due: scheduled.max(free_since) };
        let (client, progress, give_back) = (client.clone(), progress.clone(), give_back.clone());
        sessions.spawn(async move {
            let records = run_session(&client, phase, index, session, history, (first, slot), pace.think_time).await;
            progress.inc(1);
            let ended = records.last().map_or(slot.due, |record| record.ended);
            // After the last session was begun nobody wants a place.
            let _ = give_back.send(ended);
            records
        });
    }
    sessions.join_all().await.into_iter().flatten().collect()
}

/// A session is over when a turn has no answer: what would follow is not known.
async fn run_session(
    client: &Client,
    phase: Phase,
    index: usize,
    session: Session,
    mut history: History,
    (first, slot): (Ready, Slot),
    think_time: Duration,
) -> Vec<RequestRecord> {
    let mut records = vec![client.send(first, slot).await];
    for turn in 1..session.turns.len() {
        let Some(RequestRecord { ended, outcome: Ok(answer), .. }) = records.last() else { break };
        history.add(&session.turns[turn - 1], &answer.text);
        let ready = client.ready(Which { phase, session: index, turn }, &session, &history);
        let scheduled = *ended + think_time;
        tokio::time::sleep_until(slot.start + scheduled).await;
        records.push(client.send(ready, Slot { start: slot.start, scheduled, due: scheduled }).await);
    }
    records
}
