//! A model's tokenizer, read from its `tokenizer.json`.

use std::path::{Path, PathBuf};

use common::tokens::Token;

use super::token_bytes::{Spelling, TokenBytes};

/// A tokenizer that could not be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file could not be read as a tokenizer.
    #[error("{path} could not be read as a tokenizer: {reason}", path = .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The library's reason.
        reason: String,
    },
    /// Text could not be encoded.
    #[error("the text could not be tokenized: {reason}")]
    Encode {
        /// The library's reason.
        reason: String,
    },
    /// Tokens could not be decoded.
    #[error("the tokens could not be turned into text: {reason}")]
    Decode {
        /// The library's reason.
        reason: String,
    },
}

/// Text to tokens and back. Encoding takes about a millisecond per few thousand tokens: callers run it
/// on a blocking thread.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    token_bytes: Option<TokenBytes>,
    is_special: Vec<bool>,
    vocab_size: u32,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError::Unreadable`].
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let unreadable = |reason: String| TokenizerError::Unreadable { path: path.to_path_buf(), reason };
        let text = std::fs::read(path).map_err(|e| unreadable(e.to_string()))?;
        Self::from_json(path, &text)
    }

    /// Reads the text of a `tokenizer.json`; `path` is where it comes from.
    ///
    /// # Errors
    /// [`TokenizerError::Unreadable`].
    pub fn from_json(path: &Path, json: &[u8]) -> Result<Self, TokenizerError> {
        Self::from_bytes(json).map_err(|reason| TokenizerError::Unreadable { path: path.to_path_buf(), reason })
    }

    fn from_bytes(json: &[u8]) -> Result<Self, String> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|e| e.to_string())?;
        // What the training script left in the file must not cut or pad a client's prompt.
        inner.with_truncation(None).map_err(|e| e.to_string())?;
        inner.with_padding(None);
        let id_max = inner.get_vocab(true).into_values().max().ok_or("it has no tokens")?;
        let vocab_size = id_max.checked_add(1).filter(|n| *n <= 1 << 24).ok_or("it has more than 2^24 tokens")?;
        let decoder = serde_json::to_value(inner.get_decoder()).map_err(|e| e.to_string())?;
        let token_bytes =
            Spelling::of_decoder(&decoder).map(|kind| TokenBytes::new(kind, vocab_size, |id| inner.id_to_token(id)));
        let mut is_special = vec![false; vocab_size as usize];
        for (id, token) in inner.get_added_tokens_decoder() {
            is_special[id as usize] = token.special;
        }
        Ok(Self { inner, token_bytes, is_special, vocab_size })
    }

    /// Largest token id and one.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// Whether a token is a mark of the model (BOS, end of turn) rather than text.
    pub fn is_special(&self, id: Token) -> bool {
        self.is_special.get(id as usize).copied().unwrap_or(false)
    }

    /// The token of this exact spelling, special ones included.
    pub fn token_to_id(&self, spelling: &str) -> Option<Token> {
        self.inner.token_to_id(spelling)
    }

    /// A token's spelling as the vocabulary has it.
    pub fn spelling(&self, id: Token) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Text to tokens; `add_special_tokens` adds those the model's post-processor adds (usually BOS).
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<Token>, TokenizerError> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|e| TokenizerError::Encode { reason: e.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A whole text from its tokens.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn decode(&self, ids: &[Token], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        self.inner.decode(ids, skip_special_tokens).map_err(|e| TokenizerError::Decode { reason: e.to_string() })
    }

    /// The bytes of a token inside a text: exact where the decoder concatenates bytes, otherwise those
    /// of the token decoded alone.
    pub fn bytes_of(&self, id: Token) -> Vec<u8> {
        match &self.token_bytes {
            Some(table) => table.of(id).to_vec(),
            None => self.decode(&[id], false).unwrap_or_default().into_bytes(),
        }
    }

    /// The table of bytes, where the decoder is a plain concatenation.
    pub(super) fn token_bytes(&self) -> Option<&TokenBytes> {
        self.token_bytes.as_ref()
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size).finish_non_exhaustive()
    }
}
