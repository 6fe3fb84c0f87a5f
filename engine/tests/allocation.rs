//! A step allocates nothing: whatever it needs, a step of its size before it has left behind.
#![allow(clippy::unwrap_used)]

#[path = "steps/mod.rs"]
mod steps;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::config::Dtype;
use common::sampling::SamplingParams;
use engine::cpu_runner::CpuRunner;
use engine::gguf::write::{GgufType, convert};
use engine::model::Model;
use engine::plan::{Span, StepPlan};
use engine::runner::{KvSink, NoSink, Runner, StepOutput};
use steps::{TestSequence, load, plan, prompt, root, runner};

/// Allocations of all threads but those that say otherwise.
static NUM_ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static IS_COUNTED: Cell<bool> = const { Cell::new(true) };
}

struct Counting;

fn count() {
    if IS_COUNTED.get() {
        NUM_ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
    }
}

// SAFETY: every call goes to the system's allocator as it came; counting touches a static and a thread-local that
// has no destructor, neither of which allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as required of the caller.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as required of the caller.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as required of the caller.
        unsafe { System.realloc(old, layout, size) }
    }
    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: as required of the caller.
        unsafe { System.dealloc(old, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Steps in a row that allocate nothing. More than the 31 messages after which an unbounded channel of the standard
/// library takes another piece of memory.
const QUIET_STEPS: usize = 70;

/// Steps until then: which thread computes what is up to the system, and each may meet a kind of work for the first
/// time late.
const STEPS_MAX: usize = 2000;

/// Whether the same step, run again and again, allocates nothing in the end.
fn becomes_quiet(runner: &mut CpuRunner, plan: StepPlan, sink: &Arc<dyn KvSink>, steps_max: usize) -> bool {
    let (mut plan, mut num_quiet) = (plan, 0);
    for _ in 0..steps_max {
        let before = NUM_ALLOCATIONS.load(Ordering::SeqCst);
        let ticket = runner.submit(plan, sink.clone());
        let output = runner.wait(ticket).unwrap();
        // What the step's thread does behind its answer counts too, in this step or in the next.
        num_quiet = if NUM_ALLOCATIONS.load(Ordering::SeqCst) == before { num_quiet + 1 } else { 0 };
        if num_quiet == QUIET_STEPS {
            return true;
        }
        let StepOutput { tokens, plan: used } = output;
        plan = used;
        plan.spare_tokens = tokens;
    }
    false
}

fn assert_becomes_quiet(runner: &mut CpuRunner, name: &str, plan: StepPlan) {
    let sink: Arc<dyn KvSink> = Arc::new(NoSink);
    assert!(becomes_quiet(runner, plan, &sink, STEPS_MAX), "{name}: after {STEPS_MAX} steps they still allocate");
}

fn sequence(model: &Model, id: u64, len: usize, params: SamplingParams) -> TestSequence {
    let blocks = id as u32 * 64..(id as u32 + 1) * 64;
    let tokens = prompt(len, model.spec().vocab_size as u32, id);
    TestSequence { params: Arc::new(params), ..TestSequence::new(id, &tokens, blocks) }
}

/// A sequence whose last token alone is to be computed. What is in the pool before it is zero, which is as good.
fn decoding(model: &Model, id: u64, len: usize, params: SamplingParams) -> TestSequence {
    TestSequence { num_computed: len - 1, ..sequence(model, id, len, params) }
}

fn assert_steps_become_quiet(name: &str, model: &Arc<Model>) {
    let mut runner = runner(model, 16, 16 * 64 * 16);
    let greedy = || SamplingParams::greedy(1000);
    let random = || SamplingParams { temperature: 0.9, top_k: 20, top_p: 0.8, seed: 3, ..greedy() };

    let mut chunk = sequence(model, 0, 300, greedy());
    assert_becomes_quiet(&mut runner, &format!("{name}: half of a prompt"), plan(&[(&mut chunk, 150)], 16, true));
    assert_becomes_quiet(&mut runner, &format!("{name}: a prompt"), plan(&[(&mut chunk, 300)], 16, true));

    // Long enough that their attention is cut into parts.
    let mut long = decoding(model, 1, 1000, greedy());
    assert_becomes_quiet(&mut runner, &format!("{name}: one token"), plan(&[(&mut long, 1)], 16, false));

    let mut batch: Vec<TestSequence> = (2..10)
        .map(|id| decoding(model, id, 100 + 100 * id as usize, if id % 2 == 0 { greedy() } else { random() }))
        .collect();
    let batch: Vec<(&mut TestSequence, usize)> = batch.iter_mut().map(|sequence| (sequence, 1)).collect();
    assert_becomes_quiet(&mut runner, &format!("{name}: a batch"), plan(&batch, 16, false));

    let mut mixed: Vec<(&mut TestSequence, usize)> = batch.into_iter().take(3).collect();
    mixed.push((&mut chunk, 80));
    assert_becomes_quiet(&mut runner, &format!("{name}: tokens beside a chunk"), plan(&mixed, 16, false));
}

#[test]
fn prefill_and_decode_steps_allocate_nothing() {
    // This thread stands for the engine's, which schedules and may allocate.
    IS_COUNTED.set(false);
    for dtype in [Dtype::Bfloat16, Dtype::Float32] {
        assert_steps_become_quiet(&format!("{dtype:?}"), &load("models/tiny", dtype));
    }
    let file = std::env::temp_dir().join(format!("tandem-allocation-{}.gguf", std::process::id()));
    convert(&root().join("models/tiny"), &file, GgufType::Q8_0).unwrap();
    let model = steps::load_on(file.to_str().unwrap(), Dtype::Auto, kernels::Isa::detect());
    std::fs::remove_file(&file).unwrap();
    assert_steps_become_quiet("q8_0", &model);
}

/// Allocates within a step, once for each layer.
struct AllocatingSink;

impl KvSink for AllocatingSink {
    fn on_layer_written(&self, _layer: u32, span: &Span) {
        std::hint::black_box(vec![0u8; span.num_rows]);
    }
}

#[test]
fn a_step_that_allocates_is_noticed() {
    IS_COUNTED.set(false);
    let model = load("models/tiny", Dtype::Bfloat16);
    let mut runner = runner(&model, 16, 16 * 64);
    let mut chunk = sequence(&model, 0, 40, SamplingParams::greedy(1000));
    let sink: Arc<dyn KvSink> = Arc::new(AllocatingSink);
    assert!(!becomes_quiet(&mut runner, plan(&[(&mut chunk, 20)], 16, true), &sink, 2 * QUIET_STEPS));
}
