//! Text to tokens and back: the only place in the cluster where text lives.
//!
//! In: [`chat_template`] renders messages ([`content_format`]: as parts or as strings), [`tokenizer`] encodes, each once per request, on blocking
//! threads. Out: [`token_bytes`] knows the bytes behind each token, [`detokenizer`] joins them into
//! valid UTF-8 as they come, [`stop_strings`] ends an answer and holds back what may become an end.
//! [`model_text`] loads all of it, with the sampling defaults, from a checkpoint folder or,
//! through `gguf`, from a GGUF file.

pub mod chat_template;
pub mod content_format;
pub mod detokenizer;
mod gguf;
pub mod model_text;
pub mod python_json;
pub mod stop_strings;
pub mod strftime;
pub mod token_bytes;
pub mod tokenizer;

pub use chat_template::{ChatTemplate, TemplateError};
pub use detokenizer::Detokenizer;
pub use model_text::{ModelText, ModelTextError, SamplingDefaults};
pub use stop_strings::StopStrings;
pub use tokenizer::{Tokenizer, TokenizerError};
