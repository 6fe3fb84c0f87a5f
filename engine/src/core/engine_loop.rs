//! The thread that owns scheduler and runner: drain the inbox, schedule, run, report.
//!
//! ```text
//! loop      schedule 1, submit | schedule 2, submit | wait 1, report 1, schedule 3, submit | wait 2 ...
//! runner                       [step 1 ............][step 2 ..............................][step 3 ...
//! ```
//!
//! Behind a short decode step the next one is submitted before the first is known, so that the runner never
//! waits for this thread. Behind a longer one, or a prompt chunk, it is not: there this thread's part is
//! nothing, and a request that comes meanwhile would wait for one step more.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self as std_mpsc, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::block_events::BlockSink;
use common::block_manager::BlockCounts;
use common::content::GRANULE_TOKENS;
use common::host_budget::HostBudget;
use common::ids::SequenceId;
use common::rate::Rate;
use common::scheduler::{
    DrawnToken, GroupEvent, PreemptionCounts, ScheduledStep, Scheduler, SchedulerLimits, SequenceEvent,
};
use common::wire::NodeLoad;
use metrics::{Counter, Gauge, Label};
use tokio::sync::{mpsc, watch};

use crate::core::handle::{Command, EngineEvent, EngineHandle, EngineStatus, Inbox, RequestTicket};
use crate::core::parked::ParkedKv;
use crate::core::plan_builder;
use crate::cuda::graphs::GraphCounts;
use crate::plan::{Span, StepPlan};
use crate::runner::{IN_FLIGHT_MAX, KvSink, Runner, StepError, Ticket};
use crate::step_thread::text_of;

/// Decode steps that take longer have nothing submitted behind them. What this thread does between two
/// steps takes tens of microseconds, under 1 % of this.
const STEP_AHEAD_TIME_MAX: Duration = Duration::from_millis(10);
/// An engine without work asks its runner this often whether there is still something to compute on.
const IDLE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// KV that a step copies to or from host memory, for [`SchedulerLimits::max_num_copied_blocks`]: 0.25 ms
/// at the 17 GB/s of one thread, and more where the memory is new. A step that decodes takes 3 ms with 28 million
/// parameters and 50 ms with a thousand million. Less would let a long sequence give its blocks back more slowly
/// than many others grow.
pub const COPIED_BYTES_PER_STEP: usize = 4 << 20;

/// What an engine may use, and who it is in the metrics.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Seats, budgets, blocks. `block_size`, `num_blocks` and `max_model_len` must be the runner's.
    pub limits: SchedulerLimits,
    /// Where KV of preempted sequences counts.
    pub host_budget: Arc<HostBudget>,
    /// `prefill-node` or `decode-node`.
    pub role: &'static str,
    /// The node's name.
    pub node: String,
}

/// Starts an engine's thread. It ends when every handle is dropped, on [`EngineHandle::shutdown`], or
/// when the runner fails.
///
/// # Errors
/// If the operating system refuses a thread.
pub fn start(runner: Box<dyn Runner>, options: EngineOptions) -> std::io::Result<EngineHandle> {
    start_reporting(runner, options, None).map(|(handle, _)| handle)
}

/// [`start`], and tells `blocks` after each step what happened to named blocks of the pool. When the thread has ended,
/// its runner is gone.
///
/// # Errors
/// If the operating system refuses a thread.
pub fn start_reporting(
    runner: Box<dyn Runner>,
    options: EngineOptions,
    blocks: Option<Arc<dyn BlockSink>>,
) -> std::io::Result<(EngineHandle, JoinHandle<()>)> {
    let (inbox, commands) = std_mpsc::channel();
    let (status_sender, status) = watch::channel(EngineStatus { is_idle: true, ..EngineStatus::default() });
    let handle = EngineHandle {
        inbox: Arc::new(Inbox(inbox.clone())),
        status,
        model: Arc::new(runner.model().clone()),
        pool: runner.pool().clone(),
        next_ticket: Arc::default(),
    };
    let has_graphs = runner.graph_counts().is_some();
    let parked = ParkedKv::new(options.host_budget.clone(), runner.pool().block_bytes());
    let mut scheduler = Scheduler::new(options.limits);
    if blocks.is_some() {
        scheduler.note_block_events();
    }
    let engine = Engine {
        scheduler,
        blocks,
        runner,
        commands,
        inbox,
        is_stopping: false,
        num_steps_done: 0,
        status: status_sender,
        requests: HashMap::new(),
        groups: HashMap::new(),
        parked,
        in_flight: VecDeque::new(),
        spare_plans: Vec::new(),
        slots: HashMap::new(),
        decode_step_time: Duration::ZERO,
        last_done_at: Instant::now(),
        num_steps: 0,
        prefill_rate: Rate::default(),
        gauges: EngineMetrics::new(&options, has_graphs),
    };
    let thread = std::thread::Builder::new().name(format!("engine-{}", options.node)).spawn(move || engine.run())?;
    Ok((handle, thread))
}

struct Request {
    ticket: RequestTicket,
    events: mpsc::Sender<EngineEvent>,
    first_reported_token: usize,
    queued_at: Instant,
    admitted_at: Instant,
}

struct Engine {
    scheduler: Scheduler,
    blocks: Option<Arc<dyn BlockSink>>,
    runner: Box<dyn Runner>,
    commands: std_mpsc::Receiver<Command>,
    /// Where the runner says that a step is done.
    inbox: std_mpsc::Sender<Command>,
    /// Told to stop while a step was waited for.
    is_stopping: bool,
    /// Steps that the runner is done with and that are not taken in yet.
    num_steps_done: usize,
    status: watch::Sender<EngineStatus>,
    requests: HashMap<SequenceId, Request>,
    groups: HashMap<RequestTicket, SequenceId>,
    parked: ParkedKv,
    in_flight: VecDeque<StepInFlight>,
    /// Plans whose memory is used again.
    spare_plans: Vec<StepPlan>,
    /// Where the newest step in flight puts what it draws.
    slots: HashMap<SequenceId, usize>,
    /// How long the last step took that only decoded.
    decode_step_time: Duration,
    last_done_at: Instant,
    num_steps: u64,
    prefill_rate: Rate,
    gauges: EngineMetrics,
}

/// A step that the runner has and that is not taken in yet.
struct StepInFlight {
    ticket: Ticket,
    step: ScheduledStep,
    submitted_at: Instant,
}

impl StepInFlight {
    fn only_decodes(&self) -> bool {
        self.step.spans.iter().all(|span| span.is_decode)
    }
}

/// What came of scheduling a step.
#[derive(PartialEq, Eq)]
enum Scheduled {
    /// It was submitted.
    Step,
    /// Nothing can be computed, but KV was copied, and the next step may find more.
    Copies,
    /// There is nothing to do.
    Nothing,
}

/// Why the loop goes on or ends.
enum Flow {
    Continue,
    Stop,
}

impl Engine {
    fn run(mut self) {
        // A panic is a bug, but not one that may leave requests waiting for an engine that is gone. What it
        // leaves of the books is not used again, only looked at.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let failure = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(format!("the engine's loop panicked: {}", text_of(panic.as_ref()))),
        };
        let reason = failure.clone().unwrap_or_else(|| "the node is shutting down".to_string());
        // Told before the requests: who hears of the failure may ask why.
        self.status.send_modify(|status| status.failure = Some(reason.clone()));
        for (_, request) in self.requests.drain() {
            // A request whose task is gone has nobody to tell.
            let _ = request.events.try_send(EngineEvent::Failed { reason: reason.clone() });
        }
        if let Some(reason) = &failure {
            tracing::error!(reason, "the engine stops");
        }
    }

    /// Until it is told to stop.
    fn serve(&mut self) -> Result<(), StepError> {
        self.publish_status();
        let mut is_busy = false;
        loop {
            if let Flow::Stop = self.drain_inbox(is_busy)? {
                return Ok(());
            }
            let scheduled = if self.may_submit() { self.submit_step() } else { Scheduled::Nothing };
            let is_done = (scheduled != Scheduled::Step || !self.may_submit()) && self.complete_step()?;
            is_busy = scheduled != Scheduled::Nothing || is_done || !self.in_flight.is_empty();
            if !is_busy {
                self.parked.free_spare(usize::MAX);
            }
            self.publish_status();
            self.report_blocks();
        }
    }

    /// Takes all commands that are there; waits for one if there is nothing to compute.
    fn drain_inbox(&mut self, is_busy: bool) -> Result<Flow, StepError> {
        if self.is_stopping {
            return Ok(Flow::Stop);
        }
        let mut next = if is_busy { self.commands.try_recv().ok() } else { Some(self.receive_idle()?) };
        while let Some(command) = next {
            if let Command::Shutdown = command {
                return Ok(Flow::Stop);
            }
            self.on_command(command);
            next = self.commands.try_recv().ok();
        }
        Ok(Flow::Continue)
    }

    /// Nobody else would notice meanwhile that the device is lost, and the proxy would send the next requests here.
    fn receive_idle(&self) -> Result<Command, StepError> {
        loop {
            match self.commands.recv_timeout(IDLE_CHECK_INTERVAL) {
                Ok(command) => return Ok(command),
                Err(RecvTimeoutError::Timeout) => self.runner.check()?,
                Err(RecvTimeoutError::Disconnected) => unreachable!("the engine has a sender of its own"),
            }
        }
    }

    fn receive(&self) -> Command {
        self.commands.recv().expect("the engine has a sender of its own")
    }

    /// Until the runner is done with the oldest step. Commands are carried out meanwhile, and who only awaits KV from
    /// another node is let in: a step is time lost for a prompt that could be computed there.
    fn wait_for_step(&mut self) {
        while self.num_steps_done == 0 {
            match self.receive() {
                Command::Shutdown => self.is_stopping = true,
                command => self.on_command(command),
            }
            let admitted = self.scheduler.admit_awaiting();
            self.runner.pool().clear_blocks(&admitted.fresh_blocks);
            self.dispatch(admitted.events);
        }
        self.num_steps_done -= 1;
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Submit { ticket, sequence, first_reported_token, events } => match self.scheduler.add(*sequence) {
                Ok(group) => {
                    let now = Instant::now();
                    let request = Request { ticket, events, first_reported_token, queued_at: now, admitted_at: now };
                    self.requests.insert(group, request);
                    self.groups.insert(ticket, group);
                }
                Err(error) => {
                    let _ = events.try_send(EngineEvent::Rejected(error));
                }
            },
            Command::KvComplete { ticket, first_tokens } => {
                let Some(group) = self.groups.get(&ticket) else { return };
                let events = self.scheduler.on_kv_complete(*group, first_tokens);
                self.dispatch(events);
                self.make_copies();
            }
            Command::ComputeLocally { ticket, num_valid_tokens, first_tokens } => {
                let Some(group) = self.groups.get(&ticket) else { return };
                self.scheduler.on_compute_locally(*group, num_valid_tokens, first_tokens);
            }
            Command::ComputeAround { ticket, prefix } => match self.groups.get(&ticket) {
                Some(group) => self.scheduler.on_compute_around(*group, prefix),
                None => prefix.close(),
            },
            Command::Wake => {}
            Command::Cancel { ticket } => self.cancel(ticket),
            Command::SetLimits(change) => self.scheduler.set_limits(change),
            Command::Pin { pin, names, pinned } => {
                // Whoever asked and left unpins by its drop.
                let _ = pinned.send(self.scheduler.pin(pin, &names));
            }
            Command::Unpin { pin } => self.scheduler.unpin(pin),
            Command::ClearCache => self.scheduler.clear_cache(),
            Command::StepDone => self.num_steps_done += 1,
            Command::Shutdown => unreachable!("handled by the caller"),
        }
    }

    /// Also how a finished request is forgotten: then there is nothing left to cancel.
    fn cancel(&mut self, ticket: RequestTicket) {
        let Some(group) = self.groups.remove(&ticket) else { return };
        for sequence in self.scheduler.cancel(group) {
            self.parked.forget(sequence);
        }
        self.requests.remove(&group);
    }

    /// Whether a step may be scheduled and submitted now.
    fn may_submit(&self) -> bool {
        match self.in_flight.back() {
            None => true,
            Some(last) => {
                self.in_flight.len() < IN_FLIGHT_MAX
                    && last.only_decodes()
                    && !last.step.is_starved
                    && self.decode_step_time < STEP_AHEAD_TIME_MAX
            }
        }
    }

    /// Schedules a step and hands it to the runner, if there is anything to compute.
    fn submit_step(&mut self) -> Scheduled {
        let step = self.scheduler.schedule();
        let pool = self.runner.pool().clone();
        self.parked.save(&step.saves, &pool);
        pool.clear_blocks(&step.fresh_blocks);
        self.parked.restore(&step.restores, &pool);
        for sequence in &step.restored {
            self.parked.forget(*sequence);
        }
        self.parked.free_spare(self.scheduler.limits().max_num_copied_blocks);
        self.dispatch(step.events.clone());
        if step.spans.is_empty() {
            if self.scheduler.is_idle() {
                debug_assert_eq!(self.scheduler.check_integrity(), Ok(()));
                debug_assert!(self.parked.is_empty());
            }
            return if step.has_copies() { Scheduled::Copies } else { Scheduled::Nothing };
        }
        let (plan, sink) = self.plan_step(&step);
        let ticket = self.runner.submit(plan, sink);
        self.in_flight.push_back(StepInFlight { ticket, step, submitted_at: Instant::now() });
        Scheduled::Step
    }

    /// Waits for the oldest step in flight and takes it in. False if there is none.
    fn complete_step(&mut self) -> Result<bool, StepError> {
        let Some(oldest) = self.in_flight.pop_front() else { return Ok(false) };
        self.wait_for_step();
        let output = self.runner.wait(oldest.ticket)?;
        let started_at = oldest.submitted_at.max(self.last_done_at);
        self.last_done_at = Instant::now();
        let step_time = self.last_done_at - started_at;
        if oldest.only_decodes() {
            self.decode_step_time = step_time;
        }
        // Less than a granule is a decode token, or an end that says little.
        let chunks = oldest.step.spans.iter().map(|span| span.num_tokens).filter(|num| *num >= GRANULE_TOKENS);
        let num_prompt_tokens: usize = chunks.sum();
        if num_prompt_tokens > 0 {
            self.prefill_rate.observe(num_prompt_tokens as f64, step_time);
        }
        let (mut tokens, mut plan) = (output.tokens, output.plan);
        self.num_steps += 1;
        let step = oldest.step;
        let drawn =
            tokens.drain(..).map(|t| DrawnToken { sequence: t.sequence, choice: t.choice, token: t.token }).collect();
        plan.spare_tokens = tokens;
        self.spare_plans.push(plan);
        let events = self.scheduler.on_step_done(&step, drawn);
        self.gauges.count_step(&step, &events);
        self.make_copies();
        self.dispatch(events);
        Ok(true)
    }

    fn plan_step(&mut self, step: &ScheduledStep) -> (StepPlan, Arc<dyn KvSink>) {
        let mut listeners = HashMap::new();
        for span in &step.spans {
            if let Some(request) = self.requests.get(&span.sequence)
                && request.first_reported_token < span.first_token + span.num_tokens
            {
                listeners.insert(span.sequence, (request.events.clone(), request.first_reported_token));
            }
        }
        let is_reported = |span: &common::scheduler::ScheduledSpan| listeners.contains_key(&span.sequence);
        let mut plan = self.spare_plans.pop().unwrap_or_default();
        plan_builder::build(&mut plan, &self.scheduler, &step.spans, &self.slots, is_reported);
        plan_builder::list_slots(&plan, &mut self.slots);
        (plan, Arc::new(LayerReports { listeners, inbox: self.inbox.clone() }))
    }

    fn make_copies(&mut self) {
        for (source, destination) in self.scheduler.take_copies() {
            self.runner.pool().copy_block(source, destination);
        }
    }

    fn dispatch(&mut self, events: Vec<GroupEvent>) {
        for (group, event) in events {
            let Some(request) = self.requests.get_mut(&group) else { continue };
            let event = match event {
                SequenceEvent::Admitted { num_cached_tokens, blocks } => {
                    request.admitted_at = Instant::now();
                    let queue = request.admitted_at - request.queued_at;
                    let num_tokens = self.scheduler.sequence(group).map_or(0, |sequence| sequence.tokens.len());
                    self.gauges.count_lookup(num_tokens, num_cached_tokens);
                    EngineEvent::Admitted { num_cached_tokens, blocks: blocks.into(), queue }
                }
                SequenceEvent::PrefixArrived { first_token, end_token } => {
                    EngineEvent::PrefixArrived { first_token, end_token }
                }
                SequenceEvent::FirstTokens(tokens) => {
                    EngineEvent::FirstTokens { tokens, prefill: request.admitted_at.elapsed() }
                }
                SequenceEvent::Token { choice, index, token, finish } => {
                    EngineEvent::Token { choice, index, token, finish }
                }
                SequenceEvent::Finished => EngineEvent::Finished,
            };
            let is_last = event == EngineEvent::Finished;
            // The channel has room for every event the request can cause; it fails only when the task is
            // gone, and then its handle's drop has sent a cancel.
            let _ = request.events.try_send(event);
            if is_last && let Some(request) = self.requests.remove(&group) {
                self.groups.remove(&request.ticket);
            }
        }
    }

    fn report_blocks(&mut self) {
        let Some(blocks) = &self.blocks else { return };
        let events = self.scheduler.take_block_events();
        if !events.is_empty() {
            blocks.on_blocks(events);
        }
    }

    fn publish_status(&mut self) {
        let blocks = self.scheduler.block_counts();
        let load = self.scheduler.load(self.num_steps);
        if let Some(counts) = self.runner.graph_counts() {
            self.gauges.count_graphs(counts);
        }
        self.gauges.show(&load, &blocks, self.scheduler.preemptions(), self.parked.num_bytes());
        self.status.send_replace(EngineStatus {
            load,
            blocks,
            num_running_prompt_tokens: self.scheduler.num_running_prompt_tokens() as u64,
            prefill_tokens_per_second: self.prefill_rate.per_second(),
            is_idle: self.scheduler.is_idle(),
            failure: None,
        });
    }
}

/// Sends written layers to the requests that asked, from the runner's thread, and lets the engine know when the
/// runner lets go of it: the step is done, or never will be.
struct LayerReports {
    listeners: HashMap<SequenceId, (mpsc::Sender<EngineEvent>, usize)>,
    inbox: std_mpsc::Sender<Command>,
}

impl Drop for LayerReports {
    fn drop(&mut self) {
        // An engine that has stopped waits for no step.
        let _ = self.inbox.send(Command::StepDone);
    }
}

impl KvSink for LayerReports {
    fn on_layer_written(&self, layer: u32, span: &Span) {
        if let Some((events, first_reported)) = self.listeners.get(&span.sequence) {
            let end = span.first_position + span.num_rows;
            let first_token = span.first_position.max(*first_reported);
            let event = EngineEvent::LayerWritten { layer, first_token, num_tokens: end - first_token };
            let _ = events.try_send(event);
        }
    }
}

const DECODE_LAUNCHES: &str = "tandem_decode_launches_total";

/// The engine's numbers, owned here, shown by whoever exports metrics.
struct EngineMetrics {
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge,
    blocks_referenced: Gauge,
    blocks_cached: Gauge,
    blocks_free: Gauge,
    computed_tokens: Counter,
    generated_tokens: Counter,
    cached_tokens: Counter,
    preemptions: Counter,
    parked_sequences: Counter,
    restored_sequences: Counter,
    recomputed_sequences: Counter,
    parked_bytes: Gauge,
    steps: Counter,
    /// Direct, recorded, replayed; none where the runner has no graphs.
    decode_launches: Option<[Counter; 3]>,
    /// The same under vLLM's names, which dashboards and routers read.
    vllm_kv_usage: Gauge,
    vllm_queried_tokens: Counter,
    vllm_hit_tokens: Counter,
    vllm_preemptions: Counter,
}

impl EngineMetrics {
    fn new(options: &EngineOptions, has_graphs: bool) -> Self {
        let labels = vec![Label::new("role", options.role), Label::new("node", options.node.clone())];
        let gauge = |name: &'static str, help: &'static str| {
            metrics::describe_gauge!(name, help);
            metrics::gauge!(name, labels.clone())
        };
        let counter = |name: &'static str, help: &'static str| {
            metrics::describe_counter!(name, help);
            metrics::counter!(name, labels.clone())
        };
        let launched = |how: &'static str| {
            let labels = labels.iter().cloned().chain([Label::new("launch", how)]).collect::<Vec<_>>();
            metrics::describe_counter!(DECODE_LAUNCHES, "Decode steps, by how they were launched on the device");
            metrics::counter!(DECODE_LAUNCHES, labels)
        };
        Self {
            decode_launches: has_graphs.then(|| ["direct", "recorded", "replayed"].map(launched)),
            running: gauge("tandem_num_requests_running", "Sequences in the running batch"),
            waiting: gauge("tandem_num_requests_waiting", "Sequences that wait for blocks or for their turn"),
            kv_usage: gauge("tandem_kv_cache_usage_ratio", "Blocks held by sequences, of all blocks"),
            blocks_referenced: gauge("tandem_kv_blocks_referenced", "Blocks held by sequences"),
            blocks_cached: gauge("tandem_kv_blocks_cached", "Blocks that nobody holds and that may be found again"),
            blocks_free: gauge("tandem_kv_blocks_free", "Blocks without content"),
            computed_tokens: counter("tandem_computed_tokens_total", "Tokens whose KV was computed here"),
            generated_tokens: counter("tandem_generated_tokens_total", "Tokens drawn here"),
            cached_tokens: counter("tandem_prefix_cache_hit_tokens_total", "Prompt tokens whose KV was in the pool"),
            preemptions: counter("tandem_preemptions_total", "Sequences that gave way to an older one"),
            parked_sequences: counter(
                "tandem_preempted_parked_total",
                "Preempted sequences whose KV went to host memory, at least its beginning",
            ),
            restored_sequences: counter(
                "tandem_preempted_restored_total",
                "Preempted sequences that went on with what was parked of them",
            ),
            recomputed_sequences: counter(
                "tandem_preempted_recomputed_total",
                "Preempted sequences whose KV had no room in host memory, at least its end",
            ),
            parked_bytes: gauge("tandem_kv_parked_bytes", "Host memory that holds KV of preempted sequences"),
            steps: counter("tandem_engine_steps_total", "Steps since the start"),
            vllm_kv_usage: gauge("vllm:kv_cache_usage_perc", "Blocks held by sequences, of all blocks"),
            vllm_queried_tokens: counter(
                "vllm:prefix_cache_queries_total",
                "Prompt tokens that were looked up in the pool",
            ),
            vllm_hit_tokens: counter("vllm:prefix_cache_hits_total", "Prompt tokens whose KV was in the pool"),
            vllm_preemptions: counter("vllm:num_preemptions_total", "Sequences that gave way to an older one"),
        }
    }

    fn count_graphs(&self, counts: GraphCounts) {
        let GraphCounts { num_direct, num_recorded, num_replayed } = counts;
        let counters = self.decode_launches.iter().flatten();
        counters.zip([num_direct, num_recorded, num_replayed]).for_each(|(counter, count)| counter.absolute(count));
    }

    fn count_lookup(&self, num_tokens: usize, num_cached_tokens: usize) {
        self.cached_tokens.increment(num_cached_tokens as u64);
        self.vllm_hit_tokens.increment(num_cached_tokens as u64);
        self.vllm_queried_tokens.increment(num_tokens as u64);
    }

    /// What was drawn ahead for a sequence that had ended is in no event, and is no generated token.
    fn count_step(&self, step: &ScheduledStep, events: &[GroupEvent]) {
        let num_generated = events.iter().map(|(_, event)| match event {
            SequenceEvent::Token { .. } => 1,
            SequenceEvent::FirstTokens(tokens) => tokens.len() as u64,
            SequenceEvent::Admitted { .. } | SequenceEvent::PrefixArrived { .. } | SequenceEvent::Finished => 0,
        });
        self.steps.increment(1);
        self.computed_tokens.increment(step.spans.iter().map(|span| span.num_tokens as u64).sum());
        self.generated_tokens.increment(num_generated.sum());
    }

    fn show(&self, load: &NodeLoad, blocks: &BlockCounts, preemptions: PreemptionCounts, parked_bytes: u64) {
        self.running.set(load.num_running);
        self.waiting.set(load.num_waiting);
        let kv_usage = blocks.referenced as f64 / blocks.total.max(1) as f64;
        self.kv_usage.set(kv_usage);
        self.vllm_kv_usage.set(kv_usage);
        self.blocks_referenced.set(blocks.referenced as f64);
        self.blocks_cached.set(blocks.cached as f64);
        self.blocks_free.set(blocks.free as f64);
        self.preemptions.absolute(preemptions.preempted);
        self.vllm_preemptions.absolute(preemptions.preempted);
        self.parked_sequences.absolute(preemptions.parked);
        self.restored_sequences.absolute(preemptions.restored);
        self.recomputed_sequences.absolute(preemptions.recomputed);
        self.parked_bytes.set(parked_bytes as f64);
    }
}
