//! Two prefill nodes and a decode node in one process, joined over loopback, and the test in the place of the
//! proxy. The engines are simulated: the next token depends on every byte of KV read back, so KV that is wrong,
//! stale or missing gives other tokens than the undisturbed run. After every test nobody holds anything.
//!
//! Seeded tests print their seed; `TANDEM_TEST_SEED=17 cargo test -p decode-node --test hand_over` runs it alone.
#![allow(clippy::unwrap_used)]

mod cluster;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use cluster::{Cluster, FakeEnd, FakePrefillNode, Shape, generate, node_id, prompt, sampled, soon};
use common::ids::{Attempt, ChoiceIndex};
use common::sampling::{SampledToken, SamplingParams};
use common::timeline::NodeTimeline;
use common::wire::{Generate, NodeError, PrefillEvent};
use kv_connector::transfer::FaultPlan;
use tokio::task::JoinSet;

fn seeds(num: u64) -> Vec<u64> {
    match std::env::var("TANDEM_TEST_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..num).collect(),
    }
}

/// Most seeds have one kind of fault, so that none can hide behind another.
fn plan(seed: u64) -> FaultPlan {
    let none = FaultPlan { seed, ..FaultPlan::default() };
    match seed % 7 {
        0 => FaultPlan { corruption: 0.1, ..none },
        1 => FaultPlan { truncation: 0.1, ..none },
        2 => FaultPlan { reset: 0.1, ..none },
        3 => FaultPlan { loss: 0.05, ..none },
        4 => FaultPlan { duplication: 0.7, ..none },
        5 => FaultPlan { delay_max: Duration::from_millis(20), duplication: 0.3, ..none },
        _ => FaultPlan {
            delay_max: Duration::from_millis(5),
            corruption: 0.03,
            truncation: 0.03,
            reset: 0.03,
            loss: 0.02,
            duplication: 0.3,
            ..none
        },
    }
}

/// Requests of different length, some with several choices; each prefers another node.
fn requests(cluster: &Cluster, seed: u64) -> Vec<Generate> {
    let request = |index: u32| {
        let len = [7, 33, 100, 180, 64][index as usize % 5] + seed as usize % 16;
        let mut generate = generate(u128::from(index) + 1, prompt(len, index % 4 + seed as u32), sampled(12, seed));
        generate.choices = (0..1 + index % 3).map(ChoiceIndex).collect();
        generate.prefill_candidates = cluster.candidates();
        if index.is_multiple_of(2) {
            generate.prefill_candidates.reverse();
        }
        generate
    };
    (0..6).map(request).collect()
}

async fn run_with_faults(seed: u64) {
    println!("seed {seed}");
    let mut shape = Shape { faults: Some(plan(seed)), ..Shape::default() };
    if plan(seed).loss > 0.0 {
        shape.decode.prefill_progress_timeout = Duration::from_millis(300);
    }
    shape.decode.credit_bytes = 16 << 10;
    let cluster = Cluster::start(shape).await;
    let mut running = JoinSet::new();
    for request in requests(&cluster, seed) {
        let expected = cluster.undisturbed(&request).await;
        let answer = cluster.ask(&request).await;
        running.spawn(async move {
            let answer = answer.finish().await;
            assert_eq!(answer.texts, expected, "seed {seed}, request {}", request.request);
        });
    }
    while let Some(done) = running.join_next().await {
        done.unwrap();
    }
    cluster.is_clean().await;
    let (injected, refused, lost) = (cluster.injected(), cluster.refused_extents(), cluster.lost_candidates());
    println!("seed {seed}: {injected:?}, refused {refused:?}, candidates lost {lost:?}");
    assert!(injected.num_extents > 0);
    let num_refused: u64 = refused.values().sum();
    // One whose request has turned to another node before it came is refused for that, and not told apart.
    let num_damaged = injected.num_corrupted + injected.num_truncated + injected.num_reset;
    assert!(num_damaged == 0 || num_refused > 0, "seed {seed}: damage is refused and counted");
    if matches!(seed % 7, 4 | 5) {
        assert!(injected.num_duplicated > 0);
        assert_eq!(lost, BTreeMap::new(), "seed {seed}: what is late or comes twice harms nobody");
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_lost_late_and_repeated_extents_change_no_token() {
    let mut tasks = JoinSet::new();
    for seed in seeds(35) {
        if tasks.len() >= 5 {
            tasks.join_next().await.unwrap().unwrap();
        }
        tasks.spawn(run_with_faults(seed));
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn undisturbed_hand_over_loses_and_refuses_nothing() {
    let cluster = Cluster::start(Shape::default()).await;
    for request in requests(&cluster, 1) {
        let answer = cluster.ask(&request).await.finish().await;
        assert_eq!(answer.texts, cluster.undisturbed(&request).await);
        assert!(!answer.timeline.is_local_prefill);
    }
    assert_eq!(cluster.lost_candidates(), BTreeMap::new());
    assert_eq!(cluster.refused_extents(), BTreeMap::new());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_arrived_before_a_loss_is_kept() {
    let mut shape = Shape { drops_from: Some(320), ..Shape::default() };
    shape.decode.prefill_progress_timeout = Duration::from_millis(700);
    let cluster = Cluster::start(shape).await;
    let mut request = generate(1, prompt(500, 1), sampled(10, 1));
    request.prefill_candidates = vec![cluster.candidates()[0].clone()];
    let answer = cluster.ask(&request).await.finish().await;
    assert_eq!(answer.texts, cluster.undisturbed(&request).await);
    assert!(answer.timeline.is_local_prefill, "nobody else was there to ask");
    // Token #1 came before the loss, and the last token is not computed.
    let num_computed = cluster.decode.counter("tandem_computed_tokens_total");
    assert_eq!(num_computed, 500 - 320 + 9, "only what did not arrive is computed");
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prefill_node_that_leaves_midway_is_replaced() {
    for num_tokens_seen in [0, 1] {
        let cluster = Cluster::start(Shape { prefill_step_time: Duration::from_millis(8), ..Shape::default() }).await;
        let mut request = generate(1, prompt(700, 2), sampled(30, 2));
        request.prefill_candidates = cluster.candidates();
        let mut answer = cluster.ask(&request).await;
        answer.until_accepted().await;
        answer.until_tokens(num_tokens_seen).await;
        let mut status = cluster.prefills[0].engine.status();
        soon("it computes", status.wait_for(|status| status.load.num_steps > 3)).await.unwrap();
        cluster.prefills[0].fabric.close().await;
        assert_eq!(answer.finish().await.texts, cluster.undisturbed(&request).await);
        cluster.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn full_prefill_node_is_passed_over() {
    let cluster = Cluster::start(Shape { first_prefill_waiting_max: 0, ..Shape::default() }).await;
    let mut request = generate(1, prompt(100, 3), sampled(10, 3));
    request.prefill_candidates = cluster.candidates();
    let answer = cluster.ask(&request).await.finish().await;
    assert_eq!(answer.texts, cluster.undisturbed(&request).await);
    assert!(!answer.timeline.is_local_prefill);
    assert_eq!(cluster.lost_candidates(), [("busy".to_string(), 1)].into());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prefill_node_that_is_silent_or_breaks_the_protocol_is_left_in_time() {
    use FakeEnd::{Finishes, Resets, SaysAnotherMessage, Stays};
    let mut shape = Shape::default();
    shape.decode.prefill_accept_timeout = Duration::from_secs(1);
    shape.decode.prefill_progress_timeout = Duration::from_millis(700);
    let mut cluster = Cluster::start(shape).await;
    let mut request = generate(0, prompt(100, 4), sampled(10, 4));
    let expected = cluster.undisturbed(&request).await;

    let first = |ids: &[u32]| {
        let token = |id: &u32| SampledToken { id: *id, logprob: 0.0, top_logprobs: Vec::new() };
        PrefillEvent::FirstTokens { tokens: ids.iter().map(token).collect(), timeline: NodeTimeline::default() }
    };
    let right = expected[&ChoiceIndex(0)][0];
    let accepted = PrefillEvent::Accepted { num_cached_tokens: 0 };
    let sent = PrefillEvent::Sent { num_extents: 4, num_bytes: 4096 };
    let busy = PrefillEvent::Busy { retry_after: Duration::ZERO };
    let failed = PrefillEvent::Failed(NodeError::Engine { reason: "it tries".into() });
    let scripts: Vec<(&str, Vec<PrefillEvent>, FakeEnd)> = vec![
        ("not_accepted", vec![], Stays),
        ("no_progress", vec![accepted.clone()], Stays),
        ("no_progress", vec![accepted.clone(), first(&[right])], Stays),
        ("no_progress", vec![accepted.clone(), first(&[right]), sent.clone()], Stays),
        ("stream_lost", vec![accepted.clone(), first(&[right]), sent.clone()], Finishes),
        ("stream_lost", vec![accepted.clone()], Resets),
        ("stream_lost", vec![], Resets),
        ("stream_lost", vec![accepted.clone()], SaysAnotherMessage),
        ("stream_lost", vec![accepted.clone(), first(&[1_000_000])], Stays),
        ("protocol", vec![first(&[right])], Stays),
        ("protocol", vec![sent], Stays),
        ("protocol", vec![accepted.clone(), busy], Stays),
        ("protocol", vec![accepted.clone(), first(&[])], Stays),
        ("protocol", vec![accepted.clone(), first(&[right, right])], Stays),
        ("failed", vec![accepted, failed], Stays),
    ];
    let fake = FakePrefillNode::start(&cluster);
    cluster.learn(&fake).await;
    for (number, (loss, events, end)) in scripts.into_iter().enumerate() {
        cluster.decode.engine.clear_cache();
        let before = cluster.lost_candidates().get(loss).copied().unwrap_or(0);
        request.request.0 = number as u128 + 1;
        request.prefill_candidates = vec![fake.node(), cluster.candidates()[0].clone()];
        let began = Instant::now();
        let answer = cluster.ask(&request).await;
        let (answer, ()) = tokio::join!(answer.finish(), fake.serve(&events, end));
        assert_eq!(answer.texts, expected, "{number}: {loss}");
        assert!(!answer.timeline.is_local_prefill, "{number}: the next candidate is asked");
        assert_eq!(cluster.lost_candidates()[loss], before + 1, "{number}: {:?}", cluster.lost_candidates());
        assert!(began.elapsed() < Duration::from_secs(5), "{number}: not much longer than the timeout");
    }
    fake.end().await;
    cluster.end().await;
}

/// How far a request has come when something is done to it: accepted or not, and tokens seen.
const PHASES: [(bool, usize); 4] = [(false, 0), (true, 0), (true, 1), (true, 20)];

fn slow() -> Shape {
    Shape {
        prefill_step_time: Duration::from_millis(3),
        decode_step_time: Duration::from_millis(1),
        decode_blocks: 64,
        ..Shape::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn newer_attempt_takes_over_in_every_phase() {
    let cluster = Cluster::start(Shape { decode_blocks: 512, ..slow() }).await;
    for (number, (is_accepted, num_tokens)) in PHASES.into_iter().enumerate() {
        let mut request = generate(number as u128 + 1, prompt(400, 10 + number as u32), sampled(200, 5));
        request.prefill_candidates = cluster.candidates();
        let mut first = cluster.ask(&request).await;
        if is_accepted {
            first.until_accepted().await;
        }
        first.until_tokens(num_tokens).await;
        request.attempt = Attempt(2);
        request.prefill_candidates.reverse();
        let second = cluster.ask(&request).await;
        assert_eq!(first.failure().await, NodeError::Superseded);
        // The older one once more, over another way.
        let late = cluster.ask(&Generate { attempt: Attempt(1), ..request.clone() }).await;
        assert_eq!(late.failure().await, NodeError::Superseded);
        assert_eq!(second.finish().await.texts, cluster.undisturbed(&request).await);
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn proxy_that_resets_in_any_phase_leaves_both_nodes_clean() {
    let cluster = Cluster::start(slow()).await;
    for round in 0..3 {
        for (number, (is_accepted, num_tokens)) in PHASES.into_iter().enumerate() {
            let id = round * 10 + number as u128 + 1;
            let mut request = generate(id, prompt(400, id as u32), sampled(200, 5));
            request.prefill_candidates = cluster.candidates();
            let mut answer = cluster.ask(&request).await;
            if is_accepted {
                answer.until_accepted().await;
            }
            answer.until_tokens(num_tokens).await;
            drop(answer);
            // In the first round one comes right behind the other.
            if round > 0 {
                cluster.is_clean().await;
            }
        }
    }
    cluster.is_clean().await;
    // In the queue, behind another that holds the blocks.
    let holder = generate(100, prompt(400, 1), sampled(400, 5));
    let mut holding = cluster.ask(&holder).await;
    holding.until_tokens(1).await;
    let waiting = cluster.ask(&generate(101, prompt(700, 1), sampled(200, 5))).await;
    let mut status = cluster.decode.engine.status();
    soon("it waits", status.wait_for(|status| status.load.num_waiting == 1)).await.unwrap();
    drop(waiting);
    soon("it left", status.wait_for(|status| status.load.num_waiting == 0)).await.unwrap();
    assert_eq!(holding.finish().await.texts, cluster.undisturbed(&holder).await);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_the_decode_node_lacks_is_shipped() {
    let cluster = Cluster::start(Shape::default()).await;
    let granule_bytes = cluster.granule_bytes();
    let mut request = generate(1, prompt(100, 6), sampled(5, 6));
    request.prefill_candidates = cluster.candidates();
    let whole = cluster.ask(&request).await.finish().await;
    assert_eq!(whole.timeline.transferred_bytes, 7 * granule_bytes);
    // The same again, longer ones and a shorter one.
    for (id, num_tokens, num_held, num_granules) in [(2, 100, 96, 1), (3, 200, 96, 7), (4, 97, 96, 1), (5, 96, 80, 1)] {
        request.request.0 = id;
        request.tokens = prompt(num_tokens, 6).into();
        if num_tokens == 200 {
            request.tokens.0[96..].iter_mut().for_each(|token| *token ^= 1);
        }
        request.prompt_len = num_tokens as u32;
        let answer = cluster.ask(&request).await.finish().await;
        assert_eq!(answer.texts, cluster.undisturbed(&request).await);
        assert_eq!(answer.timeline.transferred_bytes, num_granules * granule_bytes, "request {id}");
        assert!(answer.timeline.num_cached_tokens >= num_held && !answer.timeline.is_local_prefill);
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_that_end_with_token_one_end_alone_or_all_together() {
    let cluster = Cluster::start(Shape::default()).await;
    let mut request = generate(1, prompt(100, 7), sampled(10, 8));
    request.prefill_candidates = cluster.candidates();
    request.choices = (0..3).map(ChoiceIndex).collect();
    request.params.stop_token_ids = vec![cluster.undisturbed(&request).await[&ChoiceIndex(1)][0]];
    let expected = cluster.undisturbed(&request).await;
    assert_eq!(expected[&ChoiceIndex(1)].len(), 1);
    assert!(expected.values().any(|text| text.len() > 1), "the seed lets another choice go on");
    assert_eq!(cluster.ask(&request).await.finish().await.texts, expected);

    cluster.decode.engine.clear_cache();
    request.request.0 = 2;
    request.params = SamplingParams { max_tokens: 1, ..request.params };
    assert_eq!(cluster.ask(&request).await.finish().await.texts, cluster.undisturbed(&request).await);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn resumed_choice_continues_as_if_nothing_had_happened() {
    let cluster = Cluster::start(Shape::default()).await;
    let mut request = generate(1, prompt(90, 8), sampled(40, 9));
    request.prefill_candidates = cluster.candidates();
    request.choices = (0..2).map(ChoiceIndex).collect();
    let whole = cluster.ask(&request).await.finish().await.texts;
    assert_eq!(whole, cluster.undisturbed(&request).await);
    let text = &whole[&ChoiceIndex(1)];
    for num_committed in [1, 6, 22, 39] {
        for is_cached in [false, true] {
            if !is_cached {
                cluster.decode.engine.clear_cache();
                cluster.prefills[0].engine.clear_cache();
            }
            let mut resumed = request.clone();
            resumed.attempt = Attempt(2);
            // Two runs of this loop are two requests.
            resumed.request.0 = 10 + num_committed as u128 * 2 + u128::from(is_cached);
            resumed.choices = vec![ChoiceIndex(1)];
            resumed.tokens = [&prompt(90, 8)[..], &text[..num_committed]].concat().into();
            let rest = cluster.ask(&resumed).await.finish().await;
            assert_eq!(rest.texts[&ChoiceIndex(1)], text[num_committed..], "behind {num_committed} tokens");
        }
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_time_and_all_time_are_both_deadlines() {
    let cluster = Cluster::start(Shape::default()).await;
    let mut request = generate(1, prompt(100, 9), sampled(5, 9));
    request.prefill_candidates = cluster.candidates();
    request.deadline = Duration::ZERO;
    assert!(matches!(cluster.ask(&request).await.failure().await, NodeError::Stalled { .. }));
    for (id, deadline) in [(2, Duration::MAX), (3, Duration::from_secs(u64::MAX / 2))] {
        request.request.0 = id;
        request.deadline = deadline;
        cluster.decode.engine.clear_cache();
        let answer = cluster.ask(&request).await.finish().await;
        assert_eq!(answer.texts, cluster.undisturbed(&request).await);
        assert!(!answer.timeline.is_local_prefill);
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn node_whose_engine_has_stopped_is_left_and_says_so() {
    let cluster = Cluster::start(Shape::default()).await;
    let mut request = generate(1, prompt(100, 9), sampled(5, 9));
    request.prefill_candidates = cluster.candidates();
    cluster.prefills[0].engine.shutdown();
    let answer = cluster.ask(&request).await.finish().await;
    assert_eq!(answer.texts, cluster.undisturbed(&request).await);
    assert_eq!(cluster.lost_candidates(), [("failed".to_string(), 1)].into());
    cluster.decode.engine.shutdown();
    request.request.0 = 2;
    assert!(matches!(cluster.ask(&request).await.failure().await, NodeError::Engine { .. }));
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_and_unreachable_nodes_are_passed_over() {
    let mut cluster = Cluster::start(Shape::default()).await;
    let gone = FakePrefillNode::start(&cluster);
    cluster.learn(&gone).await;
    let gone_node = gone.node();
    gone.end().await;
    let mut request = generate(1, prompt(100, 9), sampled(5, 9));
    request.prefill_candidates = vec![node_id("nobody"), gone_node, cluster.candidates()[1].clone()];
    let answer = cluster.ask(&request).await.finish().await;
    assert_eq!(answer.texts, cluster.undisturbed(&request).await);
    assert!(!answer.timeline.is_local_prefill);
    cluster.end().await;
}
