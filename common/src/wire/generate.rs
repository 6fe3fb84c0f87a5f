//! Proxy to decode node: generate tokens.

use std::time::Duration;

use bincode::{Decode, Encode};

use crate::ids::{Attempt, ChoiceIndex, NodeId, RequestId};
use crate::sampling::{FinishReason, SampledToken, SamplingParams};
use crate::timeline::NodeTimeline;
use crate::tokens::PackedTokens;
use crate::wire::fetch::PrefixPeer;

/// One attempt at a request, or at the unfinished part of it.
///
/// The first attempt has all `n` choices and `tokens` is the prompt. A resumed attempt has one choice,
/// and `tokens` is the prompt followed by the tokens of that choice that the proxy has committed: the
/// decode node continues behind them.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct Generate {
    /// The request.
    pub request: RequestId,
    /// Which try; fences older ones.
    pub attempt: Attempt,
    /// Prompt and committed tokens.
    pub tokens: PackedTokens,
    /// How many of `tokens` are the prompt.
    pub prompt_len: u32,
    /// The choices to generate, all continuing `tokens`. Never empty.
    pub choices: Vec<ChoiceIndex>,
    /// How to choose tokens and when to end. `max_tokens` and `min_tokens` count committed tokens too.
    pub params: SamplingParams,
    /// Tenant salt in the root of the content chain.
    pub salt: Vec<u8>,
    /// Prefill nodes to try, best first. Empty: prefill locally.
    pub prefill_candidates: Vec<NodeId>,
    /// Time left for the whole request.
    pub deadline: Duration,
    /// Another prefill node that is believed to hold more of the prompt than the first candidate and this node.
    pub prefix_peer: Option<PrefixPeer>,
}

/// What a decode node answers, in this order: `Busy` or `Failed` and nothing else; or `Accepted`, `Started`, then
/// `Token`s and `Finished` of the choices interleaved, then `Done`; `Failed` may end it at any point.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum GenerateEvent {
    /// Not now. Nothing is held.
    Busy {
        /// When it is worth asking again.
        retry_after: Duration,
    },
    /// Blocks are reserved; the prompt is being computed.
    Accepted,
    /// The prompt is computed; token #1 follows at once. What is known by now, for a request whose stream the
    /// proxy ends itself (a stop string) and that never sees `Done`.
    Started {
        /// Queue, prefill and cached tokens; what comes later is zero.
        timeline: NodeTimeline,
    },
    /// One more token of a choice.
    Token {
        /// Which choice.
        choice: ChoiceIndex,
        /// Its index in the generated text of this choice, from 0, committed tokens included.
        index: u32,
        /// The token.
        token: SampledToken,
        /// Set with the last token of the choice.
        finish: Option<FinishReason>,
    },
    /// All choices finished.
    Done {
        /// Where the time went.
        timeline: NodeTimeline,
    },
    /// The attempt ended without finishing.
    Failed(NodeError),
}

/// Why a node could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub enum NodeError {
    /// The node is leaving.
    #[error("the node is draining: ask another")]
    Draining,
    /// The request does not fit this node, now or later.
    #[error("{reason}")]
    Invalid {
        /// The sentence for the client.
        reason: String,
    },
    /// Deadline or progress limit passed.
    #[error("no progress in {phase} for {waited:?}: the request was given up")]
    Stalled {
        /// The phase, in words.
        phase: String,
        /// How long.
        waited: Duration,
    },
    /// A newer attempt of the same request took over.
    #[error("a newer attempt of this request took over")]
    Superseded,
    /// The engine failed.
    #[error("the engine failed: {reason}")]
    Engine {
        /// What it said.
        reason: String,
    },
    /// More answers at once than this node has places and blocks for, now or later.
    #[error("n is {num_choices}, expected at most {max_num_choices}: more answers cannot run at once here")]
    TooManyChoices {
        /// Answers asked for.
        num_choices: u32,
        /// Most that this node can run beside this prompt.
        max_num_choices: u32,
    },
}

impl NodeError {
    /// Whether another node, or a later try, may succeed.
    pub fn is_worth_a_retry(&self) -> bool {
        match self {
            NodeError::Draining | NodeError::Stalled { .. } | NodeError::Engine { .. } => true,
            NodeError::Invalid { .. } | NodeError::TooManyChoices { .. } | NodeError::Superseded => false,
        }
    }

    /// Whether the request was wrong, and nothing at the node.
    pub fn is_of_the_client(&self) -> bool {
        matches!(self, NodeError::Invalid { .. } | NodeError::TooManyChoices { .. })
    }
}
