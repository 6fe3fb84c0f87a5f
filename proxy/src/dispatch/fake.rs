//! Scripted nodes, for tests of everything above them.
//!
//! A fake node answers a `Generate` from a fixed text of tokens per choice, so that a resumed request must
//! give the same answer; what else happens (busy, lost, silent) is decided per call by a script.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::content::ContentKey;
use common::ids::{ChoiceIndex, Epoch, NodeId};
use common::kv_spec::{KvDtype, KvSpec};
use common::model::{ModelIdentity, ModelInfo, NumericsId, Representation};
use common::sampling::{FinishReason, SampledToken};
use common::timeline::NodeTimeline;
use common::tokens::Token;
use common::wire::{Generate, GenerateEvent, NodeError, NodeLoad};
use futures::StreamExt;
use tokio::sync::watch;

use super::nodes::{GenerateStream, NodeLost, Nodes};
use crate::route::{ClusterView, HeldPrefixes, NodeView, OthersWork, Stay};

/// What a node with the shape of the repository's small checkpoint says of its model.
pub fn tiny_model_info() -> ModelInfo {
    ModelInfo {
        identity: ModelIdentity([7; 32]),
        numerics: NumericsId("fake".into()),
        representation: Representation("fake".into()),
        kv_spec: KvSpec::uniform(4, 2, 32, KvDtype::Bf16, None),
        vocab_size: 512,
        max_model_len: 4096,
        exchange: Default::default(),
        granule_order: Default::default(),
        block_size: 16,
        num_blocks: 100,
    }
}

/// What a fake node does with one `Generate`.
#[derive(Debug, Clone, PartialEq)]
pub enum Behaviour {
    /// Answers to the end.
    Serve,
    /// Is lost after that many tokens.
    LoseAfter(u32),
    /// Sends this error after that many tokens.
    FailAfter(u32, NodeError),
    /// Says `Busy`.
    Busy(Duration),
    /// Cannot be reached.
    Unreachable,
    /// Sends every token twice, and some of another index.
    Stutter,
    /// Accepts, sends that many tokens, then nothing more and stays open.
    HangAfter(u32),
}

type Script = dyn Fn(usize, &NodeId, &Generate) -> Behaviour + Send + Sync;
type Answer = dyn Fn(ChoiceIndex, u32) -> Option<Token> + Send + Sync;

/// A cluster of fake nodes.
pub struct FakeNodes {
    view: Mutex<Arc<ClusterView>>,
    script: Box<Script>,
    answer: Arc<Answer>,
    eos: Token,
    num_cached_tokens: u32,
    held: HeldPrefixes,
    calls: Mutex<Vec<(NodeId, Generate)>>,
    seen: Arc<Seen>,
}

/// What happened to the streams.
#[derive(Debug)]
struct Seen {
    num_tokens: AtomicU64,
    num_cancelled: watch::Sender<usize>,
}

impl FakeNodes {
    /// Decode nodes called `names`, all serving `model`. `answer` gives the token of a choice at an index,
    /// `None` behind its last one; then `eos` ends it. `script` sees the number of the call.
    pub fn new(
        names: &[&str],
        model: ModelInfo,
        eos: Token,
        answer: impl Fn(ChoiceIndex, u32) -> Option<Token> + Send + Sync + 'static,
        script: impl Fn(usize, &NodeId, &Generate) -> Behaviour + Send + Sync + 'static,
    ) -> Self {
        let node = |(i, name): (usize, &&str)| NodeView {
            node: NodeId::new(*name).expect("a test's node names are valid"),
            epoch: Epoch(1),
            stay: Stay(i as u64),
            load: NodeLoad { num_available_blocks: 100, num_blocks: 100, ..NodeLoad::default() },
            others: OthersWork::default(),
            own: Arc::default(),
        };
        let decode = names.iter().enumerate().map(node).collect();
        let view = ClusterView { decode, model: Some(model), ..ClusterView::default() };
        let seen = Seen { num_tokens: AtomicU64::new(0), num_cancelled: watch::Sender::new(0) };
        Self {
            view: Mutex::new(Arc::new(view)),
            script: Box::new(script),
            answer: Arc::new(answer),
            eos,
            num_cached_tokens: 0,
            held: HeldPrefixes::default(),
            calls: Mutex::default(),
            seen: Arc::new(seen),
        }
    }

    /// Reports this many cached prompt tokens.
    pub fn with_cached_tokens(mut self, num_cached_tokens: u32) -> Self {
        self.num_cached_tokens = num_cached_tokens;
        self
    }

    /// Is believed to hold this of every prompt.
    pub fn with_held(mut self, held: HeldPrefixes) -> Self {
        self.held = held;
        self
    }

    /// Replaces the view.
    pub fn set_view(&self, view: ClusterView) {
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(view);
    }

    /// Every node was lost and is reached again, in the life that it had.
    pub fn rejoin(&self) {
        let mut view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        let view = Arc::make_mut(&mut view);
        view.decode.iter_mut().for_each(|node| node.stay.0 += 1000);
    }

    /// Every `Generate` so far, with the node it went to.
    pub fn calls(&self) -> Vec<(NodeId, Generate)> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tokens sent so far.
    pub fn num_tokens_sent(&self) -> u64 {
        self.seen.num_tokens.load(Ordering::SeqCst)
    }

    /// Waits until that many streams have been dropped before their end.
    pub async fn cancelled(&self, count: usize) {
        let mut num_cancelled = self.seen.num_cancelled.subscribe();
        num_cancelled.wait_for(|n| *n >= count).await.expect("the sender lives as long as this");
    }
}

impl Nodes for FakeNodes {
    fn view(&self) -> Arc<ClusterView> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn held_prefixes(&self, _keys: &dyn Fn() -> Vec<ContentKey>) -> HeldPrefixes {
        self.held.clone()
    }

    fn generate(&self, node: &NodeView, request: Generate) -> GenerateStream {
        let call = {
            let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
            calls.push((node.node.clone(), request.clone()));
            calls.len() - 1
        };
        let behaviour = (self.script)(call, &node.node, &request);
        let num_committed = request.tokens.0.len() as u32 - request.prompt_len;
        let stream = FakeStream {
            answers: request.choices.iter().map(|choice| (*choice, num_committed)).collect(),
            params: request.params,
            answer: self.answer.clone(),
            eos: self.eos,
            timeline: NodeTimeline { num_cached_tokens: self.num_cached_tokens, ..NodeTimeline::default() },
            behaviour,
            num_sent: 0,
            queue: VecDeque::new(),
            stage: Stage::Opened,
            seen: self.seen.clone(),
        };
        futures::stream::unfold(stream, |mut stream| async move { Some((stream.next().await?, stream)) }).boxed()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Opened,
    Running,
    Ended,
}

/// One `Generate` being answered.
struct FakeStream {
    /// Unfinished choices and the index of their next token.
    answers: VecDeque<(ChoiceIndex, u32)>,
    params: common::sampling::SamplingParams,
    answer: Arc<Answer>,
    eos: Token,
    timeline: NodeTimeline,
    behaviour: Behaviour,
    num_sent: u32,
    queue: VecDeque<GenerateEvent>,
    stage: Stage,
    seen: Arc<Seen>,
}

impl FakeStream {
    async fn next(&mut self) -> Option<Result<GenerateEvent, NodeLost>> {
        if self.stage == Stage::Ended {
            return None;
        }
        if self.stage == Stage::Opened {
            self.stage = Stage::Running;
            match &self.behaviour {
                Behaviour::Busy(retry_after) => return self.end(Ok(GenerateEvent::Busy { retry_after: *retry_after })),
                Behaviour::Unreachable => return self.end(Err(NodeLost::Unreachable("as scripted".into()))),
                _ => {
                    self.queue.push_back(GenerateEvent::Started { timeline: self.timeline });
                    return Some(Ok(GenerateEvent::Accepted));
                }
            }
        }
        if let Some(event) = self.queue.pop_front() {
            return Some(Ok(event));
        }
        match &self.behaviour {
            Behaviour::LoseAfter(n) if self.num_sent >= *n => {
                return self.end(Err(NodeLost::Lost("as scripted".into())));
            }
            Behaviour::FailAfter(n, error) if self.num_sent >= *n => {
                let error = error.clone();
                return self.end(Ok(GenerateEvent::Failed(error)));
            }
            Behaviour::HangAfter(n) if self.num_sent >= *n => std::future::pending().await,
            _ => {}
        }
        let Some((choice, index)) = self.answers.pop_front() else {
            return self.end(Ok(GenerateEvent::Done { timeline: self.timeline }));
        };
        let id = (self.answer)(choice, index).unwrap_or(self.eos);
        let num_generated = index + 1;
        let finish = self.params.finish_reason(id, num_generated, 0, u32::MAX);
        if finish.is_none() {
            self.answers.push_back((choice, index + 1));
        }
        self.num_sent += 1;
        self.seen.num_tokens.fetch_add(1, Ordering::SeqCst);
        let event = self.token(choice, index, id, finish);
        if self.behaviour == Behaviour::Stutter {
            self.queue.push_back(event.clone());
            self.queue.push_back(self.token(choice, index + 5, id + 1, None));
        }
        Some(Ok(event))
    }

    fn token(&self, choice: ChoiceIndex, index: u32, id: Token, finish: Option<FinishReason>) -> GenerateEvent {
        let top_logprobs = (0..self.params.logprobs.unwrap_or(0)).map(|k| (id + k, -0.5 - k as f32)).collect();
        let logprob = if self.params.logprobs.is_some() { -0.5 } else { 0.0 };
        GenerateEvent::Token { choice, index, token: SampledToken { id, logprob, top_logprobs }, finish }
    }

    fn end(&mut self, last: Result<GenerateEvent, NodeLost>) -> Option<Result<GenerateEvent, NodeLost>> {
        self.stage = Stage::Ended;
        Some(last)
    }
}

impl Drop for FakeStream {
    fn drop(&mut self) {
        if self.stage != Stage::Ended {
            self.seen.num_cancelled.send_modify(|n| *n += 1);
        }
    }
}
