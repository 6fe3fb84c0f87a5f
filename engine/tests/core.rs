//! The engine's loop over a simulated runner: whatever becomes of its requests, the tokens are those of an
//! undisturbed run, and nothing is left afterwards.
//!
//! Seeded tests print their seed; `TANDEM_TEST_SEED=17 cargo test -p engine --test core` runs that one alone.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::content::{ChainRoot, ContentChain, GRANULE_TOKENS};
use common::host_budget::HostBudget;
use common::ids::{BlockId, ChoiceIndex};
use common::model::ModelInfo;
use common::sampling::{FinishReason, SampledToken, SamplingParams};
use common::scheduler::{AddError, SchedulerLimits};
use common::sequence::{NewSequence, Work};
use engine::core::{EngineEvent, EngineHandle, EngineOptions, RequestHandle, start};
use engine::plan::StepPlan;
use engine::pool::KvPool;
use engine::runner::{KvSink, Runner, StepError, StepOutput, Ticket};
use engine::sim::{SimOptions, SimRunner};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::watch;
use tokio::task::JoinHandle;

const BLOCK: usize = 16;
const DEADLINE: Duration = Duration::from_secs(30);

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what}: nothing within {DEADLINE:?}"))
}

fn seeds(num: u64) -> Vec<u64> {
    match std::env::var("TANDEM_TEST_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..num).collect(),
    }
}

fn limits(num_blocks: usize) -> SchedulerLimits {
    SchedulerLimits {
        block_size: BLOCK,
        num_blocks,
        max_num_seqs: 64,
        max_num_batched_tokens: 64,
        max_num_prefill_tokens: 48,
        max_num_waiting: 64,
        max_model_len: 4096,
        growth_blocks: 1,
        max_num_parked_blocks: num_blocks,
        max_num_copied_blocks: 2,
        is_prefix_caching: true,
        eviction_policy: common::eviction::EvictionPolicy::default(),
    }
}

fn sim(num_blocks: usize, step_time: Duration) -> SimRunner {
    SimRunner::new(SimOptions { block_size: BLOCK, num_blocks, step_time, ..SimOptions::default() }).unwrap()
}

fn engine_with(runner: Box<dyn Runner>, limits: SchedulerLimits) -> EngineHandle {
    let host_budget = Arc::default();
    start(runner, EngineOptions { limits, host_budget, role: "decode-node", node: "test".to_string() }).unwrap()
}

fn engine(limits: SchedulerLimits) -> EngineHandle {
    engine_with(Box::new(sim(limits.num_blocks, Duration::ZERO)), limits)
}

fn slow_engine(limits: SchedulerLimits) -> EngineHandle {
    engine_with(Box::new(sim(limits.num_blocks, Duration::from_millis(2))), limits)
}

fn prompt(len: usize, seed: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i * 31 + i * 7 + seed * 101) % 512).collect()
}

fn sampled(max_tokens: u32, seed: u64) -> SamplingParams {
    SamplingParams { temperature: 1.0, seed, ..SamplingParams::greedy(max_tokens) }
}

fn sequence(tokens: Vec<u32>, num_choices: u32, params: SamplingParams, work: Work) -> NewSequence {
    let prompt_len = tokens.len();
    let choices = (0..num_choices).map(ChoiceIndex).collect();
    NewSequence { tokens, prompt_len, choices, params: Arc::new(params), root: root(), work }
}

fn root() -> ChainRoot {
    ChainRoot::of_model(sim(1, Duration::ZERO).model().identity)
}

fn generating(tokens: Vec<u32>, max_tokens: u32) -> NewSequence {
    sequence(tokens, 1, SamplingParams::greedy(max_tokens), Work::Generate)
}

/// Runs a request of two steps through: afterwards the engine has seen, and its status shows, whatever was
/// sent to it before.
async fn catch_up(engine: &EngineHandle) {
    let mut request = engine.submit(generating(vec![1], 2), usize::MAX).unwrap();
    loop {
        match soon("a request runs beside the others", request.next()).await {
            Some(EngineEvent::Finished) => return,
            Some(EngineEvent::Admitted { .. } | EngineEvent::Token { .. }) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
}

/// Nobody holds anything any more.
async fn assert_nothing_left(engine: &EngineHandle) {
    catch_up(engine).await;
    let mut status = engine.status();
    let idle = status.wait_for(|status| status.is_idle && status.blocks.referenced == 0);
    let idle = soon("the engine becomes idle", idle).await.unwrap().clone();
    assert_eq!(idle.blocks.free + idle.blocks.cached, idle.blocks.total);
    assert_eq!((idle.load.num_running, idle.load.num_waiting, idle.load.num_queued_tokens), (0, 0, 0));
    assert_eq!(idle.failure, None);
}

async fn until_admitted(request: &mut RequestHandle) -> (usize, Arc<[BlockId]>) {
    match soon("the request is admitted", request.next()).await {
        Some(EngineEvent::Admitted { num_cached_tokens, blocks, .. }) => (num_cached_tokens, blocks),
        other => panic!("unexpected {other:?}"),
    }
}

type Texts = BTreeMap<ChoiceIndex, Vec<u32>>;

/// Tokens of each choice to the end; `texts` holds what was delivered elsewhere. Order and ends of the events
/// are checked on the way.
async fn finish(request: &mut RequestHandle, mut texts: Texts, params: &SamplingParams) -> Texts {
    let mut ended = HashMap::new();
    loop {
        match soon("the request goes on", request.next()).await {
            Some(EngineEvent::Token { choice, index, token, finish }) => {
                assert!(!ended.contains_key(&choice), "a token behind the last one of {choice:?}");
                let text = texts.entry(choice).or_default();
                assert_eq!(index as usize, text.len(), "tokens of a choice come in order");
                text.push(token.id);
                if let Some(finish) = finish {
                    ended.insert(choice, finish);
                }
            }
            Some(EngineEvent::Finished) => break,
            other => panic!("unexpected {other:?}"),
        }
    }
    for (choice, finish) in ended {
        let text = &texts[&choice];
        match finish {
            FinishReason::Length => assert_eq!(text.len(), params.max_tokens as usize),
            FinishReason::StopToken(stop) => assert_eq!(text.last(), Some(&stop)),
        }
    }
    assert_eq!(soon("nothing comes behind the end", request.next()).await, None);
    texts
}

async fn run(engine: &EngineHandle, sequence: NewSequence) -> Texts {
    let params = sequence.params.clone();
    let mut request = engine.submit(sequence, usize::MAX).unwrap();
    until_admitted(&mut request).await;
    finish(&mut request, Texts::new(), &params).await
}

fn spawn_all(engine: &EngineHandle, requests: &[NewSequence]) -> Vec<JoinHandle<Texts>> {
    let spawn = |request: &NewSequence| {
        let (engine, request) = (engine.clone(), request.clone());
        tokio::spawn(async move { run(&engine, request).await })
    };
    requests.iter().map(spawn).collect()
}

/// What a prefill node does with a sequence: its KV, layer by layer, and the first tokens.
async fn prefill(sequence: &NewSequence) -> (Vec<Vec<u8>>, Vec<SampledToken>) {
    let engine = engine(limits(64));
    let sequence = NewSequence { work: Work::PrefillOnly, ..sequence.clone() };
    let num_granules = sequence.tokens.len().div_ceil(GRANULE_TOKENS);
    let mut request = engine.submit(sequence, 0).unwrap();
    let (_, blocks) = until_admitted(&mut request).await;
    let tokens = loop {
        match soon("the prefill goes on", request.next()).await {
            Some(EngineEvent::FirstTokens { tokens, .. }) => break tokens,
            Some(EngineEvent::LayerWritten { .. }) => {}
            other => panic!("unexpected {other:?}"),
        }
    };
    let pool = engine.pool();
    let layers = (0..pool.num_layers()).map(|layer| {
        let mut bytes = vec![0; pool.extent_bytes(num_granules)];
        pool.read_granules(layer, &blocks, 0, num_granules, &mut bytes);
        bytes
    });
    (layers.collect(), tokens)
}

fn land(engine: &EngineHandle, blocks: &[BlockId], kv: &[Vec<u8>], num_granules: usize) {
    for (layer, bytes) in kv.iter().enumerate() {
        engine.pool().write_at(layer as u32, blocks, 0, 0, &bytes[..engine.pool().extent_bytes(num_granules)]);
    }
}

/// Keeps the counters of one engine.
#[derive(Default, Clone)]
struct Counters(Arc<Mutex<HashMap<String, Arc<AtomicU64>>>>);

impl Counters {
    fn value(&self, name: &str) -> u64 {
        self.0.lock().unwrap().get(name).map_or(0, |value| value.load(Ordering::SeqCst))
    }
}

impl metrics::Recorder for Counters {
    fn describe_counter(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_gauge(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_histogram(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn register_counter(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
        metrics::Counter::from_arc(self.0.lock().unwrap().entry(key.name().to_string()).or_default().clone())
    }
    fn register_gauge(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
        metrics::Gauge::noop()
    }
    fn register_histogram(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Histogram {
        metrics::Histogram::noop()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn request_dropped_in_any_phase_leaves_nothing() {
    // Waiting, behind one that holds the pool.
    let engine = slow_engine(limits(4));
    let mut holder = engine.submit(sequence(prompt(40, 1), 1, sampled(8, 1), Work::AwaitKv), usize::MAX).unwrap();
    until_admitted(&mut holder).await;
    let mut waiting = engine.submit(generating(prompt(40, 2), 8), usize::MAX).unwrap();
    let mut status = engine.status();
    soon("one waits", status.wait_for(|status| status.load.num_waiting == 1)).await.unwrap();
    assert_eq!(waiting.try_next(), None, "it holds nothing while it waits");
    drop(waiting);
    soon("it left", status.wait_for(|status| status.load.num_waiting == 0)).await.unwrap();
    // Awaiting its KV.
    drop(holder);
    assert_nothing_left(&engine).await;

    // Computing its prompt, generating, and before anybody looked at it.
    let engine = slow_engine(limits(64));
    for num_events in 0..6 {
        let mut request = engine.submit(sequence(prompt(20, 3), 3, sampled(500, 3), Work::Generate), usize::MAX);
        let request = request.as_mut().unwrap();
        for _ in 0..num_events {
            soon("an event", request.next()).await.unwrap();
        }
        // Dropped at the end of the scope, in the middle of a step.
    }
    assert_nothing_left(&engine).await;

    // Held by a prefill node, with its KV computed.
    let mut request = engine.submit(sequence(prompt(40, 4), 2, sampled(8, 4), Work::PrefillOnly), 0).unwrap();
    while !matches!(soon("the prefill", request.next()).await, Some(EngineEvent::FirstTokens { .. })) {}
    let mut status = engine.status();
    soon("its blocks are pinned", status.wait_for(|status| status.blocks.referenced == 3)).await.unwrap();
    drop(request);
    assert_nothing_left(&engine).await;

    // Finished.
    let params = SamplingParams::greedy(3);
    let mut request = engine.submit(generating(prompt(10, 5), 3), usize::MAX).unwrap();
    until_admitted(&mut request).await;
    finish(&mut request, Texts::new(), &params).await;
    assert_nothing_left(&engine).await;
    request.on_kv_complete(Vec::new());
    request.compute_locally(0, None);
    drop(request);
    assert_nothing_left(&engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parked_request_dropped_leaves_nothing() {
    let engine = slow_engine(limits(8));
    let mut first = engine.submit(generating(prompt(40, 1), 60), usize::MAX).unwrap();
    let mut second = engine.submit(generating(prompt(40, 2), 60), usize::MAX).unwrap();
    until_admitted(&mut first).await;
    until_admitted(&mut second).await;
    // The only sequence that can wait now is the one that was parked.
    let mut status = engine.status();
    soon("the younger is parked", status.wait_for(|status| status.load.num_waiting == 1)).await.unwrap();
    drop(second);
    soon("the parked one left", status.wait_for(|status| status.load.num_waiting == 0)).await.unwrap();
    drop(first);
    assert_nothing_left(&engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_dropped_at_seeded_moments_leave_nothing_and_disturb_nobody() {
    let roomy = engine(limits(256));
    let steady = sequence(prompt(50, 9), 2, sampled(40, 9), Work::Generate);
    let expected = run(&roomy, steady.clone()).await;
    for seed in seeds(40) {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let engine = engine(SchedulerLimits { max_num_parked_blocks: rng.random_range(0..24), ..limits(24) });
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..12u32 {
            let work = [Work::Generate, Work::AwaitKv, Work::PrefillOnly][rng.random_range(0..3)];
            let tokens = prompt(rng.random_range(1..90), number % 3);
            let request = sequence(tokens, rng.random_range(1..4), sampled(rng.random_range(1..30), seed), work);
            let (num_events, is_told) = (rng.random_range(0..20), rng.random_range(0..3));
            let engine = engine.clone();
            tasks.spawn(async move {
                let mut handle = engine.submit(request, if is_told == 0 { 0 } else { usize::MAX }).unwrap();
                for _ in 0..num_events {
                    // An awaiting request hears nothing more, a prefilled one neither.
                    if tokio::time::timeout(Duration::from_millis(5), handle.next()).await.is_err() {
                        match is_told {
                            1 => handle.compute_locally(0, None),
                            _ => break,
                        }
                    }
                }
            });
        }
        assert_eq!(run(&engine, steady.clone()).await, expected, "seed {seed}");
        tasks.join_all().await;
        assert_nothing_left(&engine).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn preempted_requests_generate_the_same_tokens_as_alone() {
    let roomy = engine(limits(512));
    let requests: Vec<NewSequence> = (0..14u32)
        .map(|number| {
            let tokens = prompt(8 + 11 * (number as usize % 5), number % 6);
            sequence(tokens, 1 + number % 3, sampled(20 + number * 3, u64::from(number)), Work::Generate)
        })
        .collect();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(run(&roomy, request.clone()).await);
        roomy.clear_cache();
    }
    // With room to save all, some and none of what is parked; with and without a cache to find it again.
    for (max_num_parked_blocks, is_prefix_caching) in [(20, true), (4, true), (0, true), (0, false), (20, false)] {
        let limits = SchedulerLimits { max_num_parked_blocks, is_prefix_caching, ..limits(20) };
        let counters = Counters::default();
        let (budget, mut room, least_room) = watched_budget();
        let crowded = metrics::with_local_recorder(&counters, || {
            let host_budget = budget.clone();
            let options = EngineOptions { limits, host_budget, role: "decode-node", node: "test".to_string() };
            start(Box::new(sim(limits.num_blocks, Duration::ZERO)), options).unwrap()
        });
        let running = spawn_all(&crowded, &requests);
        for (number, (task, expected)) in running.into_iter().zip(&alone).enumerate() {
            assert_eq!(&task.await.unwrap(), expected, "request {number}, {max_num_parked_blocks} parked blocks");
        }
        assert!(counters.value("tandem_preemptions_total") > 0, "nothing was preempted");
        assert_nothing_left(&crowded).await;
        let all_room = soon("the room of what was parked comes back", room.wait_for(|room| *room == BUDGET_BYTES));
        drop(all_room.await.unwrap());
        let [parked, restored, recomputed] =
            ["parked", "restored", "recomputed"].map(|what| counters.value(&format!("tandem_preempted_{what}_total")));
        assert_eq!(parked, restored, "all of them went on");
        assert_eq!(parked > 0, max_num_parked_blocks > 0, "{parked} parked with {max_num_parked_blocks} blocks");
        assert!(recomputed > 0 || max_num_parked_blocks > 0, "{recomputed} recomputed");
        let num_parked_max = (BUDGET_BYTES - least_room.load(Ordering::Relaxed)) / crowded.pool().block_bytes() as u64;
        assert!(num_parked_max <= max_num_parked_blocks as u64, "{num_parked_max} blocks were held");
        assert_eq!(num_parked_max > 0, max_num_parked_blocks > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sequence_is_restored_in_several_steps_though_nothing_else_runs() {
    let requests = [generating(prompt(30, 1), 120), generating(prompt(150, 2), 40)];
    let roomy = engine(limits(64));
    let alone = [run(&roomy, requests[0].clone()).await, run(&roomy, requests[1].clone()).await];
    let counters = Counters::default();
    // The second comes back when the first has ended: they need 22 blocks.
    let limits = SchedulerLimits { max_num_copied_blocks: 1, is_prefix_caching: false, ..limits(16) };
    let runner = Box::new(sim(limits.num_blocks, Duration::from_millis(5)));
    let crowded = metrics::with_local_recorder(&counters, || engine_with(runner, limits));
    let params = requests.clone().map(|request| request.params);
    let mut running = requests.map(|request| crowded.submit(request, usize::MAX).unwrap());
    for ((request, params), expected) in running.iter_mut().zip(&params).zip(&alone) {
        until_admitted(request).await;
        assert_eq!(&finish(request, Texts::new(), params).await, expected);
    }
    assert_eq!(counters.value("tandem_preempted_restored_total"), 1);
    assert_nothing_left(&crowded).await;
}

const BUDGET_BYTES: u64 = 1 << 30;

/// A budget, what it has left, and the least that it had left.
fn watched_budget() -> (Arc<HostBudget>, watch::Receiver<u64>, Arc<AtomicU64>) {
    let (budget, (sender, room)) = (HostBudget::new(BUDGET_BYTES), watch::channel(0));
    let least_room = Arc::new(AtomicU64::new(u64::MAX));
    let least = least_room.clone();
    budget.share_with(move |num_bytes| {
        least.fetch_min(num_bytes, Ordering::Relaxed);
        sender.send_replace(num_bytes);
    });
    (Arc::new(budget), room, least_room)
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_that_landed_or_is_computed_here_continues_the_same() {
    let roomy = engine(limits(256));
    for (num_tokens, num_choices) in [(1, 1), (16, 3), (37, 1), (48, 2), (70, 3)] {
        let params = sampled(12, num_tokens as u64);
        let request = sequence(prompt(num_tokens, 7), num_choices, params.clone(), Work::AwaitKv);
        let expected = run(&roomy, NewSequence { work: Work::Generate, ..request.clone() }).await;
        let (kv, first) = prefill(&request).await;
        let delivered: Texts = request.choices.iter().zip(&first).map(|(c, t)| (*c, vec![t.id])).collect();

        let engine = engine(limits(64));
        let mut handle = engine.submit(request.clone(), usize::MAX).unwrap();
        let (_, blocks) = until_admitted(&mut handle).await;
        land(&engine, &blocks, &kv, num_tokens.div_ceil(16));
        handle.on_kv_complete(first.clone());
        // A repeated or late word is nothing.
        handle.on_kv_complete(first.clone());
        handle.compute_locally(0, None);
        assert_eq!(finish(&mut handle, delivered.clone(), &params).await, expected);

        for num_valid in (0..=num_tokens).step_by(16) {
            for is_delivered in [false, true] {
                engine.clear_cache();
                let mut handle = engine.submit(request.clone(), usize::MAX).unwrap();
                let (_, blocks) = until_admitted(&mut handle).await;
                land(&engine, &blocks, &kv, num_valid / 16);
                handle.compute_locally(num_valid, is_delivered.then(|| first.clone()));
                let so_far = if is_delivered { delivered.clone() } else { Texts::new() };
                assert_eq!(finish(&mut handle, so_far, &params).await, expected, "{num_valid} valid");
            }
        }
        assert_nothing_left(&engine).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn choice_that_ends_with_its_first_token_ends_alone() {
    let request = sequence(prompt(37, 7), 3, sampled(12, 5), Work::AwaitKv);
    let (kv, first) = prefill(&request).await;
    let stop = first[1].id;
    assert!(first[0].id != stop && first[2].id != stop, "the seed makes them differ");
    let params = SamplingParams { stop_token_ids: vec![stop], ..(*request.params).clone() };
    let request = NewSequence { params: Arc::new(params.clone()), ..request };
    let expected = run(&engine(limits(64)), NewSequence { work: Work::Generate, ..request.clone() }).await;
    assert_eq!(expected[&ChoiceIndex(1)], [stop]);
    let engine = engine(limits(64));
    let mut handle = engine.submit(request.clone(), usize::MAX).unwrap();
    let (_, blocks) = until_admitted(&mut handle).await;
    land(&engine, &blocks, &kv, 3);
    handle.on_kv_complete(first.clone());
    let delivered: Texts = request.choices.iter().zip(&first).map(|(c, t)| (*c, vec![t.id])).collect();
    assert_eq!(finish(&mut handle, delivered, &params).await, expected);
    assert_nothing_left(&engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_are_told_in_order_before_the_first_tokens() {
    let engine = engine(limits(64));
    for (num_tokens, first_reported) in [(150usize, 0usize), (150, 48), (17, 16), (16, 0)] {
        engine.clear_cache();
        let request = sequence(prompt(num_tokens, 2), 2, sampled(4, 2), Work::PrefillOnly);
        let mut handle = engine.submit(request, first_reported).unwrap();
        assert_eq!(until_admitted(&mut handle).await.0, 0);
        let mut written = vec![first_reported; engine.pool().num_layers() as usize];
        loop {
            match soon("the prefill goes on", handle.next()).await {
                Some(EngineEvent::LayerWritten { layer, first_token, num_tokens: num_written }) => {
                    let end = &mut written[layer as usize];
                    assert_eq!(first_token, *end, "no gap, no repeat");
                    *end += num_written;
                    assert!(*end == num_tokens || end.is_multiple_of(GRANULE_TOKENS), "chunks end at granules");
                }
                Some(EngineEvent::FirstTokens { tokens, .. }) => break assert_eq!(tokens.len(), 2),
                other => panic!("unexpected {other:?}"),
            }
        }
        assert!(written.iter().all(|end| *end == num_tokens), "all layers were told of: {written:?}");
        drop(handle);
    }
    assert_nothing_left(&engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_run_is_rejected_in_words() {
    let small = SchedulerLimits { max_num_seqs: 2, max_num_waiting: 1, max_model_len: 200, ..limits(8) };
    let engine = engine(small);
    let rejected = async |sequence: NewSequence| {
        let mut request = engine.submit(sequence, usize::MAX).unwrap();
        match soon("an answer", request.next()).await {
            Some(EngineEvent::Rejected(error)) => {
                assert_eq!(request.next().await, None);
                error
            }
            other => panic!("unexpected {other:?}"),
        }
    };
    assert_eq!(rejected(generating(vec![], 1)).await, AddError::Empty);
    assert_eq!(rejected(sequence(vec![1], 0, sampled(1, 0), Work::Generate)).await, AddError::Empty);
    assert!(matches!(rejected(generating(prompt(200, 1), 1)).await, AddError::TooLong { max_num_tokens: 199, .. }));
    assert!(matches!(rejected(generating(prompt(100, 1), 60)).await, AddError::TooLong { max_num_tokens: 128, .. }));
    let wide = sequence(vec![1], 3, sampled(1, 0), Work::AwaitKv);
    assert_eq!(rejected(wide).await, AddError::TooManyChoices { num_choices: 3, max_num_choices: 2 });

    // One holds the pool, one waits, the third is told so.
    let mut holder = engine.submit(sequence(prompt(100, 1), 1, sampled(8, 1), Work::AwaitKv), usize::MAX).unwrap();
    until_admitted(&mut holder).await;
    let _waiting = engine.submit(generating(prompt(40, 2), 8), usize::MAX).unwrap();
    assert_eq!(rejected(generating(prompt(40, 3), 8)).await, AddError::Full { max_num_waiting: 1 });
    // A longer queue takes it.
    engine.set_limits(|limits| limits.max_num_waiting = 2);
    let third = engine.submit(generating(prompt(40, 3), 8), usize::MAX).unwrap();
    let mut status = engine.status();
    soon("two wait", status.wait_for(|status| status.load.num_waiting == 2)).await.unwrap();
    drop((holder, third));
    drop(_waiting);
    engine.set_limits(|limits| limits.max_num_waiting = 64);
    assert_nothing_left(&engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_changed_while_running_change_no_token() {
    let roomy = engine(limits(256));
    let requests: Vec<NewSequence> = (0..8u32)
        .map(|number| sequence(prompt(90, number), 2, sampled(40, u64::from(number)), Work::Generate))
        .collect();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(run(&roomy, request.clone()).await);
    }
    for seed in seeds(8) {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let engine = engine(limits(40));
        let mut status = engine.status();
        let running = spawn_all(&engine, &requests);
        for _ in 0..20 {
            let (seats, tokens, chunk) = (rng.random_range(2..9), rng.random_range(0..100), rng.random_range(0..100));
            let (growth, parked, copied) = (rng.random_range(0..4), rng.random_range(0..40), rng.random_range(0..5));
            engine.set_limits(move |limits| {
                limits.max_num_seqs = seats;
                limits.max_num_batched_tokens = tokens;
                limits.max_num_prefill_tokens = chunk;
                limits.growth_blocks = growth;
                limits.max_num_parked_blocks = parked;
                limits.max_num_copied_blocks = copied;
                // What cannot change does not.
                limits.block_size = 1;
                limits.num_blocks = 1;
                limits.max_model_len = 1;
            });
            soon("the engine looks at its inbox", status.changed()).await.unwrap();
        }
        engine.set_limits(|limits| *limits = self::limits(40));
        for (task, expected) in running.into_iter().zip(&alone) {
            assert_eq!(&task.await.unwrap(), expected, "seed {seed}");
        }
        assert_nothing_left(&engine).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn budget_below_a_granule_still_computes_prompts() {
    for (max_num_batched_tokens, max_num_prefill_tokens) in [(5, 5), (64, 3), (17, 15)] {
        let engine = engine(SchedulerLimits { max_num_batched_tokens, max_num_prefill_tokens, ..limits(64) });
        let mut decoding = engine.submit(generating(prompt(3, 1), 400), usize::MAX).unwrap();
        until_admitted(&mut decoding).await;
        let texts = run(&engine, generating(prompt(50, 2), 3)).await;
        assert_eq!(texts, run(&self::engine(limits(64)), generating(prompt(50, 2), 3)).await);
        drop(decoding);
        assert_nothing_left(&engine).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prefix_hits_are_told_and_never_cover_the_last_token() {
    let engine = engine(limits(64));
    let tokens = prompt(64, 1);
    let first = run(&engine, generating(tokens.clone(), 5)).await;
    let hits = async |tokens: &[u32]| {
        let mut request = engine.submit(generating(tokens.to_vec(), 5), usize::MAX).unwrap();
        let (num_cached_tokens, _) = until_admitted(&mut request).await;
        (num_cached_tokens, finish(&mut request, Texts::new(), &SamplingParams::greedy(5)).await)
    };
    assert_eq!(hits(&tokens).await, (48, first.clone()));
    assert_eq!(hits(&[&tokens[..], &[1]].concat()).await.0, 64);
    assert_eq!(hits(&tokens[..40]).await.0, 32);
    assert_eq!(hits(&[&[9], &tokens[1..]].concat()).await.0, 0);
    engine.clear_cache();
    assert_eq!(hits(&tokens).await, (0, first));
    assert_nothing_left(&engine).await;
}

/// Fails, or panics, in its `fails_at`-th step.
/// Counts what is submitted ahead.
struct CountingRunner {
    inner: SimRunner,
    num_in_flight: usize,
    /// Most steps in flight, and rows whose token was not known when they were submitted.
    seen: Arc<Mutex<(usize, usize)>>,
}

impl Runner for CountingRunner {
    fn model(&self) -> &ModelInfo {
        self.inner.model()
    }

    fn pool(&self) -> &Arc<KvPool> {
        self.inner.pool()
    }

    fn submit(&mut self, plan: StepPlan, sink: Arc<dyn KvSink>) -> Ticket {
        self.num_in_flight += 1;
        let mut seen = self.seen.lock().unwrap();
        *seen = (seen.0.max(self.num_in_flight), seen.1 + plan.from_slots.len());
        self.inner.submit(plan, sink)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, StepError> {
        self.num_in_flight -= 1;
        self.inner.wait(ticket)
    }
}

/// Texts of `requests` that run together where a step takes `step_time`, and what was submitted ahead.
async fn run_counted(requests: &[NewSequence], step_time: Duration) -> (Vec<Texts>, (usize, usize)) {
    let seen = Arc::default();
    // With few tokens to choose from, each comes again and again: the penalties see a draw that is missing.
    let options = SimOptions { vocab_size: 8, block_size: BLOCK, num_blocks: 64, step_time, ..SimOptions::default() };
    let inner = SimRunner::new(options).unwrap();
    let runner = CountingRunner { inner, num_in_flight: 0, seen: Arc::clone(&seen) };
    let engine = engine_with(Box::new(runner), limits(64));
    let mut texts = Vec::new();
    for task in spawn_all(&engine, requests) {
        texts.push(task.await.unwrap());
    }
    assert_nothing_left(&engine).await;
    let seen = *seen.lock().unwrap();
    (texts, seen)
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_submitted_ahead_change_no_token() {
    let tokens: Vec<u32> = prompt(20, 1).iter().map(|token| token % 8).collect();
    let plain = sampled(48, 1);
    let penalized = SamplingParams { frequency_penalty: 2.0, presence_penalty: 2.0, ..plain.clone() };
    // One token ends a text in the middle, which no step ahead can foresee.
    let stopping = SamplingParams { stop_token_ids: vec![3], ..plain.clone() };
    let later = SamplingParams { min_tokens: 25, ..stopping.clone() };
    let requests: Vec<NewSequence> = [plain.clone(), penalized, stopping, later, plain]
        .into_iter()
        .zip([1, 1, 1, 1, 3])
        .map(|(params, num_choices)| sequence(tokens.clone(), num_choices, params, Work::Generate))
        .collect();
    let (ahead, (num_in_flight_max, num_from_slots)) = run_counted(&requests, Duration::ZERO).await;
    let (alone, (num_alone_max, num_known)) = run_counted(&requests, Duration::from_millis(12)).await;
    // Until the first step was timed, one may be submitted ahead.
    assert!(num_alone_max <= 2 && num_known <= 8, "{num_known} rows were submitted ahead of steps of 12 ms");
    assert_eq!(num_in_flight_max, 2);
    assert!(num_from_slots > 20, "{num_from_slots}");
    assert_eq!(ahead, alone);
    let lens: Vec<usize> = ahead.iter().map(|texts| texts[&ChoiceIndex(0)].len()).collect();
    assert!(lens[0] == 48 && lens[2] < 25 && lens[3] >= 25, "{lens:?}");
    assert_ne!(ahead[1], ahead[0]);
}

struct FailingRunner {
    inner: SimRunner,
    num_steps: u32,
    fails_at: u32,
    panics: bool,
}

impl Runner for FailingRunner {
    fn model(&self) -> &ModelInfo {
        self.inner.model()
    }

    fn pool(&self) -> &Arc<KvPool> {
        self.inner.pool()
    }

    fn submit(&mut self, plan: StepPlan, sink: Arc<dyn KvSink>) -> Ticket {
        self.inner.submit(plan, sink)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, StepError> {
        self.num_steps += 1;
        let output = self.inner.wait(ticket);
        if self.num_steps < self.fails_at {
            return output;
        }
        assert!(!self.panics, "the device is on fire");
        Err(StepError { reason: "the device is gone".to_string() })
    }
}

async fn until_failed(mut request: RequestHandle) -> String {
    loop {
        match soon("the request ends", request.next()).await {
            Some(EngineEvent::Failed { reason }) => {
                assert_eq!(request.next().await, None);
                return reason;
            }
            Some(EngineEvent::Admitted { .. } | EngineEvent::Token { .. } | EngineEvent::LayerWritten { .. }) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
}

async fn assert_takes_nothing(engine: &EngineHandle) {
    if let Some(mut request) = engine.submit(generating(vec![1], 1), usize::MAX) {
        assert!(matches!(soon("an end", request.next()).await, None | Some(EngineEvent::Failed { .. })));
    }
}

fn all_phases(engine: &EngineHandle) -> Vec<RequestHandle> {
    let works = [Work::Generate, Work::AwaitKv, Work::PrefillOnly, Work::Generate, Work::Generate];
    let requests = works.into_iter().enumerate().filter_map(|(number, work)| {
        // The last waits: it does not fit beside the others.
        let num_tokens = if number == 4 { 700 } else { 100 };
        let request = sequence(prompt(num_tokens, number as u32), 1, sampled(100, 1), work);
        // None once it has failed.
        engine.submit(request, 0)
    });
    requests.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn runner_that_fails_fails_every_request_and_takes_nothing_more() {
    for (panics, expected) in [(false, "the device is gone"), (true, "the device is on fire")] {
        for fails_at in [1, 2, 9] {
            let runner = FailingRunner { inner: sim(64, Duration::ZERO), num_steps: 0, fails_at, panics };
            let engine = engine_with(Box::new(runner), SchedulerLimits { max_num_batched_tokens: 512, ..limits(64) });
            for request in all_phases(&engine) {
                let reason = until_failed_or_refused(request).await;
                assert!(reason.is_none_or(|reason| reason.contains(expected)));
                let failure = engine.status().borrow().failure.clone();
                assert!(failure.as_ref().is_some_and(|reason| reason.contains(expected)), "{failure:?}");
            }
            assert_takes_nothing(&engine).await;
            engine.set_limits(|_| ());
            engine.shutdown();
        }
    }
}

/// A request that was still in the inbox ends without a word.
async fn until_failed_or_refused(mut request: RequestHandle) -> Option<String> {
    match soon("the request ends", request.next()).await {
        None => None,
        Some(EngineEvent::Failed { reason }) => Some(reason),
        // Token #1 of a prefill node may have come before.
        Some(EngineEvent::Admitted { .. }) => loop {
            match soon("the request ends", request.next()).await {
                Some(EngineEvent::Failed { reason }) => return Some(reason),
                Some(_) => {}
                None => panic!("an admitted request is told of the failure"),
            }
        },
        other => panic!("unexpected {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_fails_running_requests() {
    let engine = slow_engine(limits(64));
    let mut running = engine.submit(generating(prompt(20, 1), 2000), usize::MAX);
    // Longer than the pool: refused, so the engine still runs.
    assert!(matches!(running.as_mut().unwrap().next().await, Some(EngineEvent::Rejected(_))));
    let mut running = engine.submit(generating(prompt(20, 1), 900), usize::MAX).unwrap();
    until_admitted(&mut running).await;
    let mut awaiting = engine.submit(sequence(prompt(20, 2), 1, sampled(8, 1), Work::AwaitKv), usize::MAX).unwrap();
    until_admitted(&mut awaiting).await;
    engine.shutdown();
    for request in [running, awaiting] {
        assert!(until_failed(request).await.contains("shutting down"));
    }
    assert!(engine.status().borrow().failure.is_some());
    assert_takes_nothing(&engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pinned_prefix_stays_where_it_is_until_it_is_dropped() {
    let engine = engine(limits(8));
    let text = prompt(64, 3);
    run(&engine, sequence(text.clone(), 1, SamplingParams::greedy(1), Work::Generate)).await;
    let mut chain = ContentChain::new(&ChainRoot::of_model(engine.model().identity));
    chain.extend(&text);
    let pinned = soon("the pin", engine.pin_prefix(chain.granules().to_vec())).await.unwrap();
    assert_eq!(pinned.blocks().len(), 4);
    let read = |blocks: &[BlockId]| {
        let mut bytes = vec![0; engine.pool().extent_bytes(4)];
        engine.pool().read_granules(0, blocks, 0, 4, &mut bytes);
        bytes
    };
    let before = read(pinned.blocks());
    // Six blocks: more than the four that are left, so it waits; and two that go through meanwhile.
    let mut waiting =
        engine.submit(sequence(prompt(80, 4), 1, SamplingParams::greedy(1), Work::Generate), usize::MAX).unwrap();
    let pinned_again = soon("the pin", engine.pin_prefix(chain.granules()[..1].to_vec())).await.unwrap();
    assert_eq!(pinned_again.blocks(), &pinned.blocks()[..1]);
    drop(pinned_again);
    assert_eq!(waiting.try_next(), None);
    assert_eq!(read(pinned.blocks()), before);
    drop(pinned);
    soon("the waiting one", waiting.next()).await.unwrap();
    while soon("its end", waiting.next()).await != Some(EngineEvent::Finished) {}
    drop(waiting);
    // Asked for and left before the answer.
    drop(engine.pin_prefix(chain.granules().to_vec()));
    let _ = polled_once(engine.pin_prefix(chain.granules().to_vec())).await;
    assert_nothing_left(&engine).await;
}

/// An engine in the middle of a step of half a minute, and whose step it is; `text` is cached.
async fn in_a_long_step(text: &[u32]) -> (EngineHandle, RequestHandle) {
    let limits = SchedulerLimits { max_num_batched_tokens: 640, max_num_prefill_tokens: 640, ..limits(64) };
    let token_time = Duration::from_millis(50);
    let options = SimOptions { block_size: BLOCK, num_blocks: 64, token_time, ..SimOptions::default() };
    let engine = engine_with(Box::new(SimRunner::new(options).unwrap()), limits);
    run(&engine, generating(text.to_vec(), 1)).await;
    let mut long = engine.submit(generating(prompt(640, 4), 1), usize::MAX).unwrap();
    until_admitted(&mut long).await;
    (engine, long)
}

#[tokio::test(flavor = "multi_thread")]
async fn cached_blocks_are_pinned_while_a_long_step_runs() {
    let text = prompt(16, 3);
    let (engine, mut long) = in_a_long_step(&text).await;
    let mut chain = ContentChain::new(&ChainRoot::of_model(engine.model().identity));
    chain.extend(&text);
    let pinned = soon("the pin", engine.pin_prefix(chain.granules().to_vec())).await;
    assert_eq!(pinned.map(|pinned| pinned.blocks().len()), Some(1));
    assert_eq!(long.try_next(), None, "the step has ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_awaits_kv_has_its_blocks_while_a_long_step_runs() {
    let (engine, mut long) = in_a_long_step(&prompt(16, 3)).await;
    // 64 blocks, of which the long prompt has 41: 21 and one to grow go in once, and again when they are given back.
    let awaiting = || sequence(prompt(330, 5), 1, SamplingParams::greedy(1), Work::AwaitKv);
    for _ in 0..3 {
        let mut request = engine.submit(awaiting(), usize::MAX).unwrap();
        let (num_cached_tokens, blocks) = until_admitted(&mut request).await;
        assert_eq!((num_cached_tokens, blocks.len()), (0, 22));
    }
    // What is computed here goes in with a step.
    let mut local = engine.submit(generating(prompt(20, 6), 1), usize::MAX).unwrap();
    let mut behind = engine.submit(awaiting(), usize::MAX).unwrap();
    catch_up_with_commands(&engine).await;
    assert_eq!((local.try_next(), behind.try_next()), (None, None));
    assert_eq!(long.try_next(), None, "the step has ended");
}

/// The engine has carried out what was sent to it before, whether a step runs or not.
async fn catch_up_with_commands(engine: &EngineHandle) {
    soon("the pin", engine.pin_prefix(Vec::new())).await;
}

/// Polls a future once and drops it.
async fn polled_once<T>(future: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        value = future => Some(value),
        () = std::future::ready(()) => None,
    }
}
