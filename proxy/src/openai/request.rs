//! A request that has been checked: what the rest of the proxy works with.

use common::tokens::Token;
use serde_json::{Map, Value};

/// Most answers to one prompt.
pub const N_MAX: i64 = 128;
/// Most prompts of one completion request.
pub const PROMPTS_MAX: usize = 128;
/// Most stop strings (OpenAI allows 4).
pub const STOP_STRINGS_MAX: usize = 16;
/// Longest stop string: what is held back from the client never exceeds it.
pub const STOP_STRING_BYTES_MAX: usize = 1024;

/// A request whose every parameter is in range. Only the tokens of its prompt are not known yet.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidatedRequest {
    /// The model's name as the client wrote it; checked against the served ones.
    pub model: Option<String>,
    /// Which endpoint's shapes the answer has, and what only that endpoint knows.
    pub endpoint: Endpoint,
    /// What to answer.
    pub prompts: Vec<Prompt>,
    /// How to choose tokens.
    pub sampling: SamplingRequest,
    /// Answers per prompt, 1 to [`N_MAX`].
    pub n: u32,
    /// Texts that end an answer, at most [`STOP_STRINGS_MAX`], none empty.
    pub stop: Vec<String>,
    /// Show the stop string that ended the answer.
    pub include_stop_string: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Answer as server-sent events.
    pub stream: bool,
    /// What a stream says beside the answer.
    pub stream_options: StreamOptions,
    /// Tenant salt from the client.
    pub cache_salt: Option<String>,
}

/// What a stream says beside the answer: OpenAI's `include_usage`, and two options of inference servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamOptions {
    /// End the stream with a chunk that carries the usage.
    pub include_usage: bool,
    /// With [`include_usage`](Self::include_usage): every chunk carries the usage of its choice so far, so
    /// that a client knows how many tokens a chunk brings (vLLM's name).
    pub continuous_usage_stats: bool,
    /// With [`include_usage`](Self::include_usage): that chunk also says where the time went on the nodes.
    pub include_timeline: bool,
}

/// The two ways to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions {
        /// Repeat the prompt in front of the answer.
        echo: bool,
    },
}

/// Where a prompt's tokens come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Messages, through the model's chat template.
    Chat(ChatPrompt),
    /// Text.
    Text {
        /// The text.
        text: String,
        /// Whether the tokenizer adds the special tokens it adds by itself (usually BOS).
        add_special_tokens: bool,
    },
    /// Tokens as they are.
    Tokens(Vec<Token>),
}

/// What a chat template is rendered with.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatPrompt {
    /// The messages: objects with `role`, and `content` as text or null.
    pub messages: Vec<Value>,
    /// OpenAI tool definitions; `None` if the client gave none.
    pub tools: Option<Vec<Value>>,
    /// End with the opening of the assistant's message.
    pub add_generation_prompt: bool,
    /// Further variables (`chat_template_kwargs`).
    pub variables: Map<String, Value>,
    /// Whether the tokenizer adds special tokens to what the template wrote.
    pub add_special_tokens: bool,
}

/// Sampling parameters as asked for: `None` leaves the choice to the model's defaults.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SamplingRequest {
    /// 0 to 2.
    pub temperature: Option<f32>,
    /// Above 0, to 1.
    pub top_p: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<u32>,
    /// 0 to 1.
    pub min_p: Option<f32>,
    /// Above 0.
    pub repetition_penalty: Option<f32>,
    /// -2 to 2.
    pub frequency_penalty: f32,
    /// -2 to 2.
    pub presence_penalty: f32,
    /// Ids below the vocabulary's size are checked with the prompt.
    pub logit_bias: Vec<(Token, f32)>,
    /// Drawn by the proxy if absent.
    pub seed: Option<u64>,
    /// The client's, beside the model's.
    pub stop_token_ids: Vec<Token>,
    /// The model's end tokens do not end the answer.
    pub ignore_eos: bool,
    /// No end before that many tokens.
    pub min_tokens: u32,
    /// What the client asked for.
    pub max_tokens: Option<u32>,
    /// Most tokens generated if the client gives no limit; fewer where the model has no room for them.
    pub max_tokens_default: u32,
    /// Which parameter the client gave it in.
    pub max_tokens_param: &'static str,
    /// `Some(k)`: log probability of the chosen token and the `k` best.
    pub logprobs: Option<u32>,
}
