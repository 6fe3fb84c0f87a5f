//! The engine's loop over the CUDA runner, on the host: crowded batches and a hand-over give the CPU's tokens, and
//! nothing is left afterwards.
#![allow(clippy::unwrap_used)]

#[path = "on_fibres/mod.rs"]
mod on_fibres;
#[path = "steps/mod.rs"]
mod steps;

use std::collections::BTreeMap;
use std::future::Future;
use std::ops::Deref;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use common::config::Dtype;
use common::content::ChainRoot;
use common::ids::ChoiceIndex;
use common::model::ModelIdentity;
use common::sampling::SamplingParams;
use common::scheduler::SchedulerLimits;
use common::sequence::{NewSequence, Work};
use engine::core::{EngineEvent, EngineHandle, EngineOptions, RequestHandle, start_reporting};
use engine::runner::Runner;
use steps::prompt;

const CHECKPOINT: &str = "tests/checkpoints/qwen3";
const NUM_BLOCKS: usize = 12;
/// Fibres are slow, and so may the machine be.
const DEADLINE: Duration = Duration::from_secs(300);

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what}: nothing within {DEADLINE:?}"))
}

/// An engine that has given back what it has of a device when this is dropped: no process may end before.
struct Engine {
    handle: EngineHandle,
    thread: Option<JoinHandle<()>>,
}

impl Deref for Engine {
    type Target = EngineHandle;

    fn deref(&self) -> &EngineHandle {
        &self.handle
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.handle.shutdown();
        // Its panics were told.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn engine(runner: Box<dyn Runner>, block_size: usize, num_blocks: usize) -> Engine {
    let limits = SchedulerLimits {
        block_size,
        num_blocks,
        max_num_seqs: 8,
        max_num_batched_tokens: 32,
        max_num_prefill_tokens: 24,
        max_num_waiting: 8,
        max_model_len: NUM_BLOCKS * 16,
        growth_blocks: 1,
        max_num_parked_blocks: num_blocks,
        max_num_copied_blocks: 2,
        is_prefix_caching: true,
        eviction_policy: common::eviction::EvictionPolicy::default(),
    };
    let options = EngineOptions { limits, host_budget: Arc::default(), role: "decode-node", node: "test".to_string() };
    let (handle, thread) = start_reporting(runner, options, None).unwrap();
    Engine { handle, thread: Some(thread) }
}

/// In f32, where a row's bits depend on nothing else.
fn on_device(block_size: usize, num_blocks: usize) -> Engine {
    let model = on_fibres::load(&steps::root().join(CHECKPOINT), Dtype::Float32);
    engine(Box::new(on_fibres::runner(&model, block_size, num_blocks * block_size)), block_size, num_blocks)
}

fn on_cpu() -> Engine {
    let model = steps::load(CHECKPOINT, Dtype::Float32);
    engine(Box::new(steps::runner(&model, 16, 64 * 16)), 16, 64)
}

fn request(len: usize, seed: u64, num_choices: u32, max_tokens: u32, work: Work) -> NewSequence {
    let params = SamplingParams { temperature: 0.8, top_p: 0.95, seed, ..SamplingParams::greedy(max_tokens) };
    NewSequence {
        tokens: prompt(len, 250, seed % 2),
        prompt_len: len,
        choices: (0..num_choices).map(ChoiceIndex).collect(),
        params: Arc::new(params),
        root: ChainRoot::of_model(ModelIdentity([7; 32])),
        work,
    }
}

type Texts = BTreeMap<ChoiceIndex, Vec<u32>>;

/// To the end, whatever comes on the way.
async fn texts(request: &mut RequestHandle, mut texts: Texts) -> Texts {
    loop {
        match soon("the request goes on", request.next()).await {
            Some(EngineEvent::Token { choice, token, .. }) => texts.entry(choice).or_default().push(token.id),
            Some(EngineEvent::Finished) => return texts,
            Some(EngineEvent::Admitted { .. }) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
}

async fn run_all(engine: &EngineHandle, requests: &[NewSequence]) -> Vec<Texts> {
    let mut handles: Vec<_> =
        requests.iter().map(|request| engine.submit(request.clone(), usize::MAX).unwrap()).collect();
    let mut all = Vec::new();
    for handle in &mut handles {
        all.push(texts(handle, Texts::new()).await);
    }
    all
}

async fn assert_nothing_left(engine: &EngineHandle) {
    let mut status = engine.status();
    let idle = status.wait_for(|status| status.is_idle && status.blocks.referenced == 0);
    let idle = soon("the engine becomes idle", idle).await.unwrap().clone();
    assert_eq!(idle.blocks.free + idle.blocks.cached, idle.blocks.total);
    assert_eq!(idle.failure, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn crowded_batches_draw_the_cpu_s_tokens() {
    // Equal beginnings, several choices (blocks are copied), more blocks than there are (KV is parked and comes back).
    let sizes = [(20, 1, 1), (33, 2, 2), (33, 3, 1), (5, 4, 1), (40, 5, 1)];
    let requests: Vec<_> =
        sizes.iter().map(|(len, seed, choices)| request(*len, *seed, *choices, 18, Work::Generate)).collect();
    let wanted = run_all(&on_cpu(), &requests).await;
    let engine = on_device(16, NUM_BLOCKS);
    assert_eq!(run_all(&engine, &requests).await, wanted);
    assert_nothing_left(&engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_handed_over_layer_by_layer_goes_on_in_another_engine() {
    let whole = request(37, 3, 2, 4, Work::AwaitKv);
    let wanted = run_all(&on_cpu(), &[NewSequence { work: Work::Generate, ..whole.clone() }]).await.remove(0);
    let (from, to) = (on_device(16, NUM_BLOCKS), on_device(32, NUM_BLOCKS));
    let mut receiver = to.submit(whole.clone(), usize::MAX).unwrap();
    let Some(EngineEvent::Admitted { blocks: landing, .. }) = soon("admitted", receiver.next()).await else {
        panic!("the receiver has room")
    };
    let mut sender = from.submit(NewSequence { work: Work::PrefillOnly, ..whole.clone() }, 0).unwrap();
    let Some(EngineEvent::Admitted { blocks, .. }) = soon("admitted", sender.next()).await else {
        panic!("the sender has room")
    };
    let mut num_landed = 0;
    let first = loop {
        match soon("the prompt is computed", sender.next()).await {
            // Bytes leave as soon as the layer is told, while the rest is being computed.
            Some(EngineEvent::LayerWritten { layer, first_token, num_tokens }) => {
                let (first, end) = (first_token / 16, (first_token + num_tokens).div_ceil(16));
                let mut bytes = vec![0; from.pool().extent_bytes(end - first)];
                from.pool().read_granules(layer, &blocks, first, end - first, &mut bytes);
                to.pool().write_at(layer, &landing, first, 0, &bytes);
                num_landed += num_tokens;
            }
            Some(EngineEvent::FirstTokens { tokens, .. }) => break tokens,
            other => panic!("unexpected {other:?}"),
        }
    };
    assert_eq!(num_landed, 2 * 37, "both layers of all tokens");
    receiver.on_kv_complete(first.clone());
    let delivered = whole.choices.iter().zip(&first).map(|(choice, token)| (*choice, vec![token.id])).collect();
    assert_eq!(texts(&mut receiver, delivered).await, wanted);
    drop((sender, receiver));
    assert_nothing_left(&from).await;
    assert_nothing_left(&to).await;
}

#[cfg(feature = "cuda")]
#[test]
fn all_of_it_passes_by_nvidias_interface() {
    on_fibres::run_again_by_a_driver("all_of_it_passes_by_nvidias_interface");
}
