//! Runs a model on a CUDA device: one thread launches, another waits for what was launched.
//!
//! ```text
//! caller     submit(1) submit(2)            wait(1)          submit(3) wait(2)
//! launches      [1][2]                                          [3]
//! device           [step 1: layer 0 ... L-1, sample][step 2 .............][step 3
//! waits                   layer 0 .. L-1, tokens 1 ->         tokens 2 ->
//! ```
//!
//! A step behind another is launched before anybody has seen what the first draws: its tokens are taken on the
//! device. Only penalties, which count tokens on the host, make the launch wait. Layers are told to the
//! [`KvSink`] by the thread that waits, when their event has come, while the device computes the next ones.
//! Decode steps, of which nobody wants to hear layers, are [graphs](super::graphs).
//!
//! A panic of either thread (a device that is lost, a plan that cannot be) ends both and is told to whoever waits.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use common::model::ModelInfo;
use common::tokens::Token;
use kernels::cuda::{Device, Event, Graph, Recording};

use super::backend::{CudaBackend, CudaRope};
use super::done;
use super::graphs::{DecodeGraphs, GraphCounts, Way};
use super::sampling::Drawn;
use super::step::Bucket;
use crate::backend::Backend;
use crate::decoder::{Decoder, Workspace};
use crate::model::{LoadError, Model, PoolSize};
use crate::plan::{Span, StepPlan};
use crate::pool::KvPool;
use crate::runner::{IN_FLIGHT_MAX, KvSink, Runner, StepError, StepOutput, StepToken, Ticket};
use crate::step_thread::text_of;

/// A model, a pool in the device's memory, and the threads that launch and wait.
pub struct CudaRunner {
    info: ModelInfo,
    pool: Arc<KvPool>,
    device: Arc<dyn Device>,
    /// `None` only while it is dropped.
    jobs: Option<Sender<Job>>,
    outcomes: Receiver<Result<StepOutput, StepError>>,
    num_submitted: u64,
    num_waited: u64,
    threads: Vec<JoinHandle<()>>,
    graph_counts: Arc<Mutex<GraphCounts>>,
}

struct Job {
    plan: StepPlan,
    sink: Arc<dyn KvSink>,
}

/// From the thread that launches to the one that waits, in the order of the launches.
enum Launched {
    /// The layers and the end that follow are of this step.
    Step(Arc<dyn KvSink>),
    /// K and V of a layer will be written for this span.
    Layer { layer: u32, span: Span, event: Arc<dyn Event> },
    /// Everything of the step is launched.
    End {
        plan: StepPlan,
        drawn: Drawn,
        event: Box<dyn Event>,
        /// Of steps before it; to be dropped when it is over.
        retired: Vec<Box<dyn Graph>>,
    },
    /// It could not be.
    Failed(StepError),
}

impl CudaRunner {
    /// A runner of `model` with a KV pool of its own on the device: as many blocks of `block_size` tokens as fit
    /// `kv_cache_memory_bytes`. Sequences have at most `max_model_len` tokens; without it, as many as the model and the
    /// pool allow.
    ///
    /// # Errors
    /// [`LoadError::TooLong`], [`LoadError::PoolTooSmall`], or about the pool, the device or the threads.
    pub fn new(
        model: Arc<Model<CudaBackend>>,
        block_size: usize,
        kv_cache_memory_bytes: u64,
        max_model_len: Option<usize>,
    ) -> Result<Self, LoadError> {
        Self::with_graphs(model, block_size, kv_cache_memory_bytes, max_model_len, true)
    }

    /// As [`new`](Self::new), without graphs if `has_graphs` says so: then every decode step is launched kernel by
    /// kernel, the same ones.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_graphs(
        model: Arc<Model<CudaBackend>>,
        block_size: usize,
        kv_cache_memory_bytes: u64,
        max_model_len: Option<usize>,
        has_graphs: bool,
    ) -> Result<Self, LoadError> {
        let PoolSize { num_blocks, max_model_len } =
            model.size_pool(block_size, kv_cache_memory_bytes, max_model_len)?;
        let (backend, kv_spec) = (model.backend().for_runner(), model.spec().kv_spec(model.kv_dtype()));
        // Before the pool, which may take all that is left.
        let rope = backend.rope_table(model.spec().rope.angles(max_model_len))?;
        let pool = Arc::new(KvPool::on_device(&kv_spec, block_size, num_blocks, backend.device())?);
        let info = ModelInfo { max_model_len: max_model_len as u32, ..model.info_for(block_size, num_blocks) };
        let graph_counts = Arc::new(Mutex::new(GraphCounts::default()));
        let device = backend.device().clone();
        let (jobs, job_receiver) = channel();
        let (launched, launched_receiver) = channel();
        let (drawn, drawn_receiver) = channel();
        let (outcome_sender, outcomes) = channel();
        let launcher = Launcher {
            model,
            backend,
            rope,
            pool: pool.clone(),
            workspace: Workspace::default(),
            padded: StepPlan::default(),
            graphs: DecodeGraphs::new(!has_graphs),
            graph_counts: graph_counts.clone(),
            launched,
            drawn: drawn_receiver,
            num_unseen: 0,
            previous: Drawn::default(),
            last_tokens: Vec::new(),
        };
        let (jobs, threads) = (Some(jobs), Vec::new());
        let mut runner =
            Self { info, pool, device, jobs, outcomes, num_submitted: 0, num_waited: 0, threads, graph_counts };
        let mut start = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.to_string()).spawn(run);
            thread.map(|thread| runner.threads.push(thread))
        };
        start("runner", Box::new(move || launcher.run(&job_receiver)))
            .and_then(|()| {
                start("runner-wait", Box::new(move || wait_for(&launched_receiver, &drawn, &outcome_sender)))
            })
            .map_err(|error| LoadError::Thread { reason: error.to_string() })?;
        Ok(runner)
    }
}

impl Runner for CudaRunner {
    fn model(&self) -> &ModelInfo {
        &self.info
    }

    fn pool(&self) -> &Arc<KvPool> {
        &self.pool
    }

    fn graph_counts(&self) -> Option<GraphCounts> {
        Some(*self.graph_counts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn check(&self) -> Result<(), StepError> {
        // Waits for nothing, whoever else computes on the device; an error that sticks to it comes with any call.
        self.device.memory().map(|_| ()).map_err(|error| StepError { reason: error.to_string() })
    }

    fn submit(&mut self, plan: StepPlan, sink: Arc<dyn KvSink>) -> Ticket {
        assert!(
            self.num_submitted - self.num_waited < IN_FLIGHT_MAX as u64,
            "at most {IN_FLIGHT_MAX} steps are in flight"
        );
        self.num_submitted += 1;
        // A thread that has ended is told by `wait`.
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(Job { plan, sink });
        }
        Ticket(self.num_submitted)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, StepError> {
        self.num_waited += 1;
        assert_eq!(ticket.0, self.num_waited, "steps are waited for in the order they were submitted");
        self.outcomes.recv().unwrap_or_else(|_| {
            Err(StepError { reason: "an earlier step failed and the threads that compute have ended".to_string() })
        })
    }
}

impl Drop for CudaRunner {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // Its panics were caught and told.
            let _ = thread.join();
        }
    }
}

struct Launcher {
    model: Arc<Model<CudaBackend>>,
    /// With memory for this runner's steps.
    backend: CudaBackend,
    rope: CudaRope,
    pool: Arc<KvPool>,
    workspace: Workspace<CudaBackend>,
    /// A decode step as its bucket has it; kept for its memory.
    padded: StepPlan,
    graphs: DecodeGraphs,
    graph_counts: Arc<Mutex<GraphCounts>>,
    launched: Sender<Launched>,
    /// Tokens of each step, once the thread that waits has them.
    drawn: Receiver<Vec<Token>>,
    /// Steps whose tokens have not come by `drawn`.
    num_unseen: usize,
    /// What the last step draws, on the device.
    previous: Drawn,
    /// The same on the host, if `num_unseen` is 0.
    last_tokens: Vec<Token>,
}

impl Launcher {
    fn run(mut self, jobs: &Receiver<Job>) {
        while let Ok(Job { plan, sink }) = jobs.recv() {
            // Who waits has the only one from here on: its drop says that the step is done.
            if self.launched.send(Launched::Step(sink)).is_err() {
                return;
            }
            let launched = catch_unwind(AssertUnwindSafe(|| self.step(plan)));
            let is_failed = launched.is_err();
            let message =
                launched.unwrap_or_else(|panic| Launched::Failed(StepError { reason: text_of(panic.as_ref()) }));
            if self.launched.send(message).is_err() || is_failed {
                return;
            }
        }
    }

    fn step(&mut self, mut plan: StepPlan) -> Launched {
        while let Ok(tokens) = self.drawn.try_recv() {
            self.take(tokens);
        }
        let needs_tokens = |plan: &StepPlan| {
            let is_from_slot = |row: usize| plan.from_slots.iter().any(|from| from.row == row);
            plan.samples.iter().any(|sample| sample.history.is_some() && is_from_slot(sample.row))
        };
        if needs_tokens(&plan) {
            self.see_tokens();
            plan.resolve(&self.last_tokens);
        }
        let device = self.backend.device().clone();
        if plan.num_rows() == 0 {
            self.num_unseen += 1;
            self.previous = Drawn::default();
            return Launched::End { plan, drawn: Drawn::default(), event: done(device.record()), retired: Vec::new() };
        }
        let kernels = self.backend.attention_kernels(self.pool.layout());
        let drawn = match Bucket::of(&plan, kernels, &self.model.spec().windows) {
            Some(bucket) => self.decode(&plan, bucket),
            None => {
                let events = LayerEvents { device: device.clone(), last: Mutex::default(), launched: &self.launched };
                let decoder = decoder(&self.model, &self.rope, &self.pool, self.at_step(&plan, None));
                decoder.forward(&plan, &events, &mut self.workspace).map(std::mem::take).unwrap_or_default()
            }
        };
        self.num_unseen += 1;
        self.previous = drawn.clone();
        Launched::End { plan, drawn, event: done(device.record()), retired: self.graphs.take_retired() }
    }

    /// A decode step, padded to its bucket, as a graph if one was recorded.
    fn decode(&mut self, plan: &StepPlan, bucket: Bucket) -> Drawn {
        let mut padded = std::mem::take(&mut self.padded);
        bucket.pad(plan, &mut padded);
        let backend = self.at_step(&padded, Some(bucket));
        let (device, arrays) = (backend.device().clone(), backend.step_arrays());
        let decoder = decoder(&self.model, &self.rope, &self.pool, backend);
        let workspace = &mut self.workspace;
        decoder.embed(&padded, workspace);
        let num_moves = || self.backend.num_moves();
        match self.graphs.way(bucket, &arrays, num_moves()) {
            Way::Replay(graph) => done(graph.launch()),
            Way::Record => {
                let recording = done(Recording::begin(&device));
                decoder.all_logits(&padded, workspace);
                done(self.graphs.on_recorded(done(recording.end())));
            }
            Way::Direct => {
                decoder.all_logits(&padded, workspace);
                self.graphs.on_direct(bucket, arrays, num_moves());
            }
        }
        let drawn = std::mem::take(decoder.sample_rows(&padded, workspace));
        *self.graph_counts.lock().unwrap_or_else(PoisonError::into_inner) = self.graphs.counts();
        self.padded = padded;
        drawn
    }

    /// The backend with `plan` on the device.
    fn at_step(&self, plan: &StepPlan, bucket: Option<Bucket>) -> CudaBackend {
        self.backend.at_padded_step(plan, bucket, self.pool.layout(), self.model.spec(), &self.previous)
    }

    /// Waits for the tokens of all steps so far.
    fn see_tokens(&mut self) {
        while self.num_unseen > 0 {
            let tokens = self.drawn.recv().expect("whoever waits for the device has not failed");
            self.take(tokens);
        }
    }

    fn take(&mut self, tokens: Vec<Token>) {
        self.last_tokens = tokens;
        self.num_unseen -= 1;
    }
}

fn decoder<'a>(
    model: &'a Model<CudaBackend>,
    rope: &'a CudaRope,
    pool: &'a KvPool,
    backend: CudaBackend,
) -> Decoder<'a, CudaBackend> {
    Decoder { backend, spec: model.spec(), weights: model.weights(), rope, pool }
}

/// Records an event behind each layer and hands it on with the span.
struct LayerEvents<'a> {
    device: Arc<dyn Device>,
    last: Mutex<Option<(u32, Arc<dyn Event>)>>,
    launched: &'a Sender<Launched>,
}

impl KvSink for LayerEvents<'_> {
    fn on_layer_written(&self, layer: u32, span: &Span) {
        let mut last = self.last.lock().expect("one thread uses it");
        let event = match &*last {
            Some((of, event)) if *of == layer => event.clone(),
            _ => Arc::from(done(self.device.record())),
        };
        *last = Some((layer, event.clone()));
        // If nobody waits any more, the end of the step says so.
        let _ = self.launched.send(Launched::Layer { layer, span: span.clone(), event });
    }
}

/// The thread that waits for the device.
fn wait_for(
    launched: &Receiver<Launched>,
    drawn: &Sender<Vec<Token>>,
    outcomes: &Sender<Result<StepOutput, StepError>>,
) {
    while let Ok(Launched::Step(sink)) = launched.recv() {
        let waited = catch_unwind(AssertUnwindSafe(|| one_step(launched, sink.as_ref())));
        let outcome = waited.unwrap_or_else(|panic| Err(StepError { reason: text_of(panic.as_ref()) }));
        if let Ok(output) = &outcome {
            // Whoever launches has ended if nobody takes them.
            let _ = drawn.send(output.tokens.iter().map(|token| token.token.id).collect());
        }
        let is_failed = outcome.is_err();
        if outcomes.send(outcome).is_err() || is_failed {
            return;
        }
    }
}

/// Takes in layers and the end of one step.
fn one_step(launched: &Receiver<Launched>, sink: &dyn KvSink) -> Result<StepOutput, StepError> {
    loop {
        match launched.recv() {
            Ok(Launched::Layer { layer, span, event }) => {
                done(event.wait());
                sink.on_layer_written(layer, &span);
            }
            Ok(Launched::End { plan, drawn, event, retired }) => {
                done(event.wait());
                drop(retired);
                let tokens = plan.samples.iter().zip(drawn.read());
                let tokens = tokens.map(|(row, token)| StepToken { sequence: row.sequence, choice: row.choice, token });
                return Ok(StepOutput { tokens: tokens.collect(), plan });
            }
            Ok(Launched::Failed(error)) => return Err(error),
            Ok(Launched::Step(_)) => unreachable!("a step ends before the next begins"),
            Err(_) => return Err(StepError { reason: "the thread that launches has ended".to_string() }),
        }
    }
}
