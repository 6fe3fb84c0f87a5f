//! What the proxy knows of a model: its tokenizer, chat template, end tokens and sampling defaults.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::tokens::Token;
use serde_json::{Map, Value};
use tokio::sync::Semaphore;

use super::chat_template::{ChatTemplate, TemplateError};
use super::gguf::GgufText;
use super::tokenizer::{Tokenizer, TokenizerError};
use crate::openai::{ApiError, ErrorKind, Prompt};

/// A checkpoint folder whose text side cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelTextError {
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// Another file of the folder.
    #[error("{path} could not be read: {reason}", path = .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
}

/// Values from `generation_config.json` for what a request leaves open.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingDefaults {
    /// 1 unless the model says otherwise.
    pub temperature: f32,
    /// 1 unless the model says otherwise.
    pub top_p: f32,
    /// 0 (all) unless the model says otherwise.
    pub top_k: u32,
    /// 0 unless the model says otherwise.
    pub min_p: f32,
    /// 1 unless the model says otherwise.
    pub repetition_penalty: f32,
}

impl Default for SamplingDefaults {
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

/// The text side of a checkpoint.
#[derive(Debug)]
pub struct ModelText {
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Messages to text.
    pub template: Option<ChatTemplate>,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<Token>,
    /// For what a request leaves open.
    pub defaults: SamplingDefaults,
    /// Tokenizer runs at once: as many as cores, so that prompts cannot fill the blocking pool.
    slots: Arc<Semaphore>,
    /// Half of them, which is all that long prompts get: each takes seconds, and a hundred times its size
    /// of memory.
    long_slots: Arc<Semaphore>,
}

/// Prompts from this many bytes of text are long: tokenizing one takes some 20 ms.
const LONG_PROMPT_BYTES: usize = 64 << 10;

/// A prompt ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedPrompt {
    /// Its tokens, at least one.
    pub tokens: Vec<Token>,
    /// Its text, where it came as text.
    pub text: Option<String>,
}

impl ModelText {
    /// Reads `tokenizer.json` and, where present, `tokenizer_config.json`, `chat_template.jinja`,
    /// `generation_config.json` and `config.json` of a checkpoint folder; or what stands for them in a GGUF file.
    ///
    /// # Errors
    /// A file that is there but cannot be used, or no tokenizer.
    pub fn load(folder: &Path) -> Result<Self, ModelTextError> {
        if folder.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            let unreadable = |reason| ModelTextError::Unreadable { path: folder.to_path_buf(), reason };
            let GgufText { tokenizer, tokenizer_config, generation } = GgufText::read(folder).map_err(unreadable)?;
            let tokenizer = Tokenizer::from_json(folder, &tokenizer)?;
            let template = tokenizer_config["chat_template"].as_str().map(str::to_string);
            let template = template.map(|source| ChatTemplate::new(source, None, special_tokens(&tokenizer_config)));
            return Ok(Self::of(tokenizer, template.transpose()?, &tokenizer_config, &generation, &Value::Null));
        }
        let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"))?;
        let tokenizer_config = read_json(&folder.join("tokenizer_config.json"))?;
        let generation = read_json(&folder.join("generation_config.json"))?;
        let config = read_json(&folder.join("config.json"))?;
        let template = load_template(folder, &tokenizer_config)?;
        Ok(Self::of(tokenizer, template, &tokenizer_config, &generation, &config))
    }

    fn of(
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        tokenizer_config: &Value,
        generation: &Value,
        config: &Value,
    ) -> Self {
        let mut eos_token_ids = token_list(&generation["eos_token_id"]);
        if eos_token_ids.is_empty() {
            eos_token_ids = token_list(&config["eos_token_id"]);
        }
        // The tokenizer's own end token is the end of a turn in many chat models.
        let named = special_token_text(&tokenizer_config["eos_token"]).and_then(|text| tokenizer.token_to_id(&text));
        eos_token_ids.extend(named);
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        eos_token_ids.truncate(common::sampling::STOP_TOKEN_IDS_MAX / 2);
        let num_slots = std::thread::available_parallelism().map_or(1, usize::from).max(2);
        Self {
            tokenizer: Arc::new(tokenizer),
            template,
            eos_token_ids,
            defaults: sampling_defaults(generation),
            slots: Arc::new(Semaphore::new(num_slots)),
            long_slots: Arc::new(Semaphore::new(num_slots / 2)),
        }
    }

    /// Renders and tokenizes one prompt on a blocking thread.
    ///
    /// # Errors
    /// What the client sees: no template, a template's refusal, an empty prompt.
    pub async fn encode(self: &Arc<Self>, prompt: Prompt) -> Result<EncodedPrompt, ApiError> {
        if let Prompt::Tokens(tokens) = prompt {
            return Ok(EncodedPrompt { tokens, text: None });
        }
        let long_slot = match num_text_bytes(&prompt) < LONG_PROMPT_BYTES {
            true => None,
            false => Some(self.long_slots.clone().acquire_owned().await.expect("the semaphore is never closed")),
        };
        let slot = self.slots.clone().acquire_owned().await.expect("the semaphore is never closed");
        let this = self.clone();
        let span = tracing::Span::current();
        let encoding = tokio::task::spawn_blocking(move || {
            // Until the work is done, also where nobody waits for it any more.
            let _slots = (slot, long_slot);
            span.in_scope(|| this.encode_now(prompt))
        });
        encoding.await.unwrap_or_else(|panic| {
            tracing::error!(%panic, "tokenizing a prompt failed");
            Err(ApiError::new(ErrorKind::Internal, "the prompt could not be tokenized: the tokenizer failed on it"))
        })
    }

    fn encode_now(&self, prompt: Prompt) -> Result<EncodedPrompt, ApiError> {
        let (text, add_special_tokens, param) = match prompt {
            Prompt::Tokens(tokens) => return Ok(EncodedPrompt { tokens, text: None }),
            Prompt::Text { text, add_special_tokens } => (text, add_special_tokens, "prompt"),
            Prompt::Chat(chat) => {
                let template = self.template.as_ref().ok_or(TemplateError::Missing);
                let text = template.and_then(|template| template.render(&chat));
                let text = text.map_err(|e| ApiError::invalid("messages", e.to_string()))?;
                (text, chat.add_special_tokens, "messages")
            }
        };
        let encoded = self.tokenizer.encode(&text, add_special_tokens);
        let tokens = encoded.map_err(|e| ApiError::invalid(param, e.to_string()))?;
        if tokens.is_empty() {
            return Err(ApiError::invalid(param, format!("{param} is empty, expected at least one token")));
        }
        Ok(EncodedPrompt { tokens, text: Some(text) })
    }
}

/// Bytes of text that a prompt brings; what a chat template adds is little.
fn num_text_bytes(prompt: &Prompt) -> usize {
    match prompt {
        Prompt::Tokens(_) => 0,
        Prompt::Text { text, .. } => text.len(),
        Prompt::Chat(chat) => {
            let values = chat.messages.iter().chain(chat.tools.iter().flatten()).chain(chat.variables.values());
            values.map(num_string_bytes).sum()
        }
    }
}

fn num_string_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(num_string_bytes).sum(),
        Value::Object(map) => map.iter().map(|(name, value)| name.len() + num_string_bytes(value)).sum(),
        _ => 0,
    }
}

/// A JSON file of the folder; `Null` if it is not there.
fn read_json(path: &Path) -> Result<Value, ModelTextError> {
    let unreadable = |reason: String| ModelTextError::Unreadable { path: path.to_path_buf(), reason };
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| unreadable(e.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(unreadable(error.to_string())),
    }
}

/// The template from its own file, or from the tokenizer's configuration: one, or a list of named ones.
fn load_template(folder: &Path, tokenizer_config: &Value) -> Result<Option<ChatTemplate>, ModelTextError> {
    let path = folder.join("chat_template.jinja");
    let (source, tool_source) = match std::fs::read_to_string(&path) {
        Ok(source) => (Some(source), None),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => match &tokenizer_config["chat_template"] {
            Value::String(source) => (Some(source.clone()), None),
            Value::Array(named) => {
                let find = |name: &str| {
                    let entry = named.iter().find(|entry| entry["name"] == name)?;
                    entry["template"].as_str().map(str::to_string)
                };
                (find("default"), find("tool_use"))
            }
            _ => (None, None),
        },
        Err(error) => return Err(ModelTextError::Unreadable { path, reason: error.to_string() }),
    };
    let Some(source) = source else { return Ok(None) };
    Ok(Some(ChatTemplate::new(source, tool_source, special_tokens(tokenizer_config))?))
}

/// The variables Transformers hands to a template, `bos_token` and the like.
fn special_tokens(tokenizer_config: &Value) -> Map<String, Value> {
    let names = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
    names
        .iter()
        .filter_map(|name| special_token_text(&tokenizer_config[*name]).map(|text| (name.to_string(), text.into())))
        .collect()
}

/// A special token is written as its text or as an object with `content`.
fn special_token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_string)
}

/// One token id or a list of them.
fn token_list(value: &Value) -> Vec<Token> {
    let one = |v: &Value| v.as_u64().and_then(|id| Token::try_from(id).ok());
    match value {
        Value::Array(items) => items.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}

fn sampling_defaults(generation: &Value) -> SamplingDefaults {
    let default = SamplingDefaults::default();
    let number = |name: &str, range: std::ops::RangeInclusive<f64>| {
        generation[name].as_f64().filter(|value| range.contains(value)).map(|value| value as f32)
    };
    SamplingDefaults {
        temperature: number("temperature", 0.0..=2.0).unwrap_or(default.temperature),
        top_p: number("top_p", 1e-6..=1.0).unwrap_or(default.top_p),
        top_k: generation["top_k"].as_u64().and_then(|k| u32::try_from(k).ok()).unwrap_or(default.top_k),
        min_p: number("min_p", 0.0..=1.0).unwrap_or(default.min_p),
        repetition_penalty: number("repetition_penalty", 1e-6..=100.0).unwrap_or(default.repetition_penalty),
    }
}

/// The checkpoint that ships with the repository.
#[cfg(test)]
pub(crate) fn tiny_model_dir() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::fields::Fields;
    use serde_json::json;

    #[tokio::test]
    async fn messages_become_the_tokens_of_the_rendered_template() {
        let text = Arc::new(ModelText::load(&tiny_model_dir()).unwrap());
        let chat = crate::openai::chat::parse_chat(&json!({"messages": [{"role": "user", "content": "hi"}]})).unwrap();
        let encoded = text.encode(chat.prompts[0].clone()).await.unwrap();
        let rendered = encoded.text.unwrap();
        assert_eq!(rendered, "<|bos|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
        // One BOS: the template writes it, the tokenizer does not add another.
        assert_eq!(encoded.tokens.iter().filter(|id| **id == 0).count(), 1);
        assert_eq!(text.tokenizer.decode(&encoded.tokens, false).unwrap(), rendered);
    }

    #[tokio::test]
    async fn short_prompts_do_not_wait_for_long_ones() {
        let text = Arc::new(ModelText::load(&tiny_model_dir()).unwrap());
        let prompt = |len: usize| Prompt::Text { text: "x".repeat(len), add_special_tokens: false };
        let chat = |len: usize| {
            let messages = json!([{"role": "user", "content": [{"type": "text", "text": "x".repeat(len)}]}]);
            let body = json!({"messages": messages});
            Prompt::Chat(crate::openai::chat::parse_chat_prompt(&Fields::of_body(&body).unwrap()).unwrap())
        };
        let others = text.long_slots.clone().acquire_many_owned(text.long_slots.available_permits() as u32);
        let others = others.await.unwrap();
        assert!(text.slots.available_permits() > others.num_permits(), "short prompts have slots of their own");
        let mut long = Box::pin(text.encode(prompt(LONG_PROMPT_BYTES)));
        let mut long_chat = Box::pin(text.encode(chat(LONG_PROMPT_BYTES)));
        assert!(futures::poll!(long.as_mut()).is_pending() && futures::poll!(long_chat.as_mut()).is_pending());
        for short in [prompt(LONG_PROMPT_BYTES - 1), chat(100)] {
            let encoded = tokio::time::timeout(std::time::Duration::from_secs(10), text.encode(short)).await;
            encoded.expect("a short prompt waits for long ones").unwrap();
        }
        drop(others);
        // One after the other: both may need the only slot that long prompts have.
        long.await.unwrap();
        long_chat.await.unwrap();
    }

    #[test]
    fn an_abandoned_prompt_holds_its_slot_until_the_work_is_done() {
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
        runtime.block_on(async {
            let text = Arc::new(ModelText::load(&tiny_model_dir()).unwrap());
            let num_slots = text.slots.available_permits();
            let (go_on, wait) = std::sync::mpsc::channel::<()>();
            let only_thread = tokio::task::spawn_blocking(move || wait.recv());
            let mut abandoned = Box::pin(text.encode(Prompt::Text { text: "hi".into(), add_special_tokens: true }));
            assert!(futures::poll!(abandoned.as_mut()).is_pending());
            drop(abandoned);
            assert_eq!(text.slots.available_permits(), num_slots - 1);
            go_on.send(()).unwrap();
            only_thread.await.unwrap().unwrap();
            // It runs when its turn comes, and then gives the slot back.
            let all = text.slots.acquire_many(num_slots as u32).await.unwrap();
            assert_eq!(all.num_permits(), num_slots);
        });
    }

    #[tokio::test]
    async fn text_prompts_get_bos_unless_told() {
        let text = Arc::new(ModelText::load(&tiny_model_dir()).unwrap());
        let encode = |add_special_tokens| text.encode(Prompt::Text { text: "hi".into(), add_special_tokens });
        assert_eq!(encode(true).await.unwrap().tokens[0], 0);
        assert_ne!(encode(false).await.unwrap().tokens[0], 0);
        let empty = text.encode(Prompt::Text { text: "".into(), add_special_tokens: false }).await;
        assert_eq!(empty.unwrap_err().param.as_deref(), Some("prompt"));
    }

    #[test]
    fn end_tokens_and_defaults_come_from_the_checkpoint() {
        let text = ModelText::load(&tiny_model_dir()).unwrap();
        assert_eq!(text.eos_token_ids, [1, 3]);
        let config = json!({"temperature": 0.6, "top_k": 20, "top_p": 7.0});
        let defaults = sampling_defaults(&config);
        assert_eq!((defaults.temperature, defaults.top_k, defaults.top_p), (0.6, 20, 1.0));
    }
}
