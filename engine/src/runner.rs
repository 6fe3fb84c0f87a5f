//! The contract between the engine's loop and whatever computes: submit a plan, wait for its tokens.

use std::sync::Arc;

use common::ids::{ChoiceIndex, SequenceId};
use common::model::ModelInfo;
use common::sampling::SampledToken;

use crate::cuda::graphs::GraphCounts;
use crate::plan::{Span, StepPlan};
use crate::pool::KvPool;

/// Told as the layers of a step are written, on the thread that computes. Must return quickly: it sits
/// between two layers of a forward pass.
pub trait KvSink: Send + Sync {
    /// K and V of `layer` are in the pool for all rows of `span`, and stay unchanged until the blocks
    /// are released.
    fn on_layer_written(&self, layer: u32, span: &Span);
}

/// A sink that wants to know nothing.
#[derive(Debug, Default)]
pub struct NoSink;

impl KvSink for NoSink {
    fn on_layer_written(&self, _layer: u32, _span: &Span) {}
}

/// Names a submitted step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(pub u64);

/// A token drawn in a step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepToken {
    /// For which sequence.
    pub sequence: SequenceId,
    /// For which of its choices.
    pub choice: ChoiceIndex,
    /// The token.
    pub token: SampledToken,
}

/// What a step produced, in the order of [`StepPlan::samples`], and the plan back so that its memory is
/// used again; that of `tokens` may become its [`StepPlan::spare_tokens`].
#[derive(Debug)]
pub struct StepOutput {
    /// Tokens drawn.
    pub tokens: Vec<StepToken>,
    /// The plan that was run.
    pub plan: StepPlan,
}

/// A step that could not be computed. The runner is not usable afterwards.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the model runner failed: {reason}")]
pub struct StepError {
    /// What happened.
    pub reason: String,
}

/// Steps that may be submitted and not waited for: one that computes, and one so that it need not wait.
pub const IN_FLIGHT_MAX: usize = 2;

/// Runs a model. At most [`IN_FLIGHT_MAX`] steps may be in flight; they complete in order.
pub trait Runner: Send {
    /// The model it runs.
    fn model(&self) -> &ModelInfo;

    /// The memory its KV is in.
    fn pool(&self) -> &Arc<KvPool>;

    /// How decode steps that were waited for went to the device, and maybe one or two more; `None`: it has no graphs of
    /// them.
    fn graph_counts(&self) -> Option<GraphCounts> {
        None
    }

    /// Whether what it computes on still works: asked now and then while no step is in flight. Takes moments.
    ///
    /// # Errors
    /// [`StepError`]: no step would succeed any more.
    fn check(&self) -> Result<(), StepError> {
        Ok(())
    }

    /// Starts a step and returns at once. The sink is dropped when the step is done and can be waited for. What the step before
    /// it draws may be named in the plan without being known ([`FromSlot`](crate::plan::FromSlot)).
    fn submit(&mut self, plan: StepPlan, sink: Arc<dyn KvSink>) -> Ticket;

    /// Waits for the oldest step in flight, which must be `ticket`.
    ///
    /// # Errors
    /// [`StepError`] if the computation failed.
    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, StepError>;
}
