//! The thread behind a runner: takes plans in order, gives outcomes in order, survives nothing silently.
//!
//! ```text
//! caller   submit(1) submit(2)  wait(1)      submit(3)   wait(2)
//! thread     [step 1............] [step 2............] [step 3 ...
//! ```
//!
//! What a step drew is put into the next one's plan here, before anybody else has seen it.
//!
//! A panic while computing (a bug, or a plan that cannot be) ends the thread and is told to whoever waits.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use common::tokens::Token;

use crate::plan::StepPlan;
use crate::runner::{IN_FLIGHT_MAX, KvSink, StepError, StepOutput, Ticket};

/// Runs steps one after the other. Dropping it waits for the steps in flight.
pub(crate) struct StepThread {
    /// `None` only while it is dropped.
    jobs: Option<SyncSender<(StepPlan, Arc<dyn KvSink>)>>,
    outcomes: Receiver<Result<StepOutput, StepError>>,
    num_submitted: u64,
    num_waited: u64,
    thread: Option<JoinHandle<()>>,
}

impl StepThread {
    /// Starts the thread; `step` computes one plan.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub(crate) fn start(
        mut step: impl FnMut(StepPlan, &dyn KvSink) -> StepOutput + Send + 'static,
    ) -> std::io::Result<Self> {
        // With a bound, channels have their memory from the start. Neither is ever full: see `submit`.
        let (jobs, job_receiver) = sync_channel::<(StepPlan, Arc<dyn KvSink>)>(IN_FLIGHT_MAX);
        let (outcome_sender, outcomes) = sync_channel(IN_FLIGHT_MAX);
        let run = move || {
            let mut drawn: Vec<Token> = Vec::new();
            while let Ok((mut plan, sink)) = job_receiver.recv() {
                // What a failed step leaves behind is not used again: the thread ends.
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    plan.resolve(&drawn);
                    step(plan, sink.as_ref())
                }));
                drawn.clear();
                drawn.extend(outcome.iter().flat_map(|output| &output.tokens).map(|token| token.token.id));
                let outcome = outcome.map_err(|panic| StepError { reason: text_of(panic.as_ref()) });
                let is_failed = outcome.is_err();
                if outcome_sender.send(outcome).is_err() || is_failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("runner".to_string()).spawn(run)?;
        Ok(Self { jobs: Some(jobs), outcomes, num_submitted: 0, num_waited: 0, thread: Some(thread) })
    }

    /// Queues a step.
    pub(crate) fn submit(&mut self, plan: StepPlan, sink: Arc<dyn KvSink>) -> Ticket {
        assert!(
            self.num_submitted - self.num_waited < IN_FLIGHT_MAX as u64,
            "at most {IN_FLIGHT_MAX} steps are in flight"
        );
        self.num_submitted += 1;
        // A thread that has ended is told by `wait`.
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send((plan, sink));
        }
        Ticket(self.num_submitted)
    }

    /// Waits for the oldest step in flight.
    pub(crate) fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, StepError> {
        self.num_waited += 1;
        assert_eq!(ticket.0, self.num_waited, "steps are waited for in the order they were submitted");
        self.outcomes.recv().unwrap_or_else(|_| {
            Err(StepError { reason: "an earlier step failed and the thread that computes has ended".to_string() })
        })
    }
}

impl Drop for StepThread {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // Its panics were caught and told.
            let _ = thread.join();
        }
    }
}

/// What a panic said.
pub(crate) fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "it panicked".to_string())
}
