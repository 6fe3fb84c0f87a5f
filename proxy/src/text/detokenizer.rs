//! Tokens to text as they come, one answer at a time.
//!
//! A token may end inside a character. With a byte table (byte-level BPE, SentencePiece) at most the
//! three bytes of an unfinished character wait for the next token; bytes that can no longer become one
//! are shown as U+FFFD, as decoding all at once would. Other decoders are asked to decode a short
//! window twice, without and with the new token; the text is the difference.

use std::sync::Arc;

use common::tokens::Token;

use super::tokenizer::Tokenizer;

/// Tokens of the prompt that a window decoder needs to get spaces right.
const WINDOW_CONTEXT: usize = 6;
/// Tokens that a window decoder waits for the rest of a character.
const WINDOW_WAIT_MAX: usize = 8;

/// Turns the tokens of one choice into text.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Bytes of an unfinished character.
    Bytes(Vec<u8>),
    /// `tokens[..num_shown]` have been shown; all of them are context.
    Window { tokens: Vec<Token>, num_shown: usize },
}

impl Detokenizer {
    /// For an answer that continues `prompt`.
    pub fn new(tokenizer: Arc<Tokenizer>, prompt: &[Token], skip_special_tokens: bool) -> Self {
        let state = if tokenizer.token_bytes().is_some() {
            State::Bytes(Vec::new())
        } else {
            let tokens = prompt[prompt.len().saturating_sub(WINDOW_CONTEXT)..].to_vec();
            State::Window { num_shown: tokens.len(), tokens }
        };
        Self { tokenizer, skip_special_tokens, state }
    }

    /// The text that one more token makes certain; often a word, sometimes nothing yet.
    pub fn push(&mut self, id: Token) -> String {
        if self.skip_special_tokens && self.tokenizer.is_special(id) {
            return String::new();
        }
        match &mut self.state {
            State::Bytes(pending) => {
                let table = self.tokenizer.token_bytes().expect("this state exists only with a table");
                pending.extend_from_slice(table.of(id));
                take_text(pending, false)
            }
            State::Window { tokens, num_shown } => {
                tokens.push(id);
                push_window(&self.tokenizer, tokens, num_shown, false)
            }
        }
    }

    /// The answer ended: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        match &mut self.state {
            State::Bytes(pending) => take_text(pending, true),
            State::Window { tokens, num_shown } => push_window(&self.tokenizer, tokens, num_shown, true),
        }
    }
}

/// Takes the valid text from the front of `pending`, leaving a character that may still be completed.
fn take_text(pending: &mut Vec<u8>, is_end: bool) -> String {
    let mut text = String::with_capacity(pending.len());
    let mut at = 0;
    while at < pending.len() {
        match std::str::from_utf8(&pending[at..]) {
            Ok(rest) => {
                text.push_str(rest);
                at = pending.len();
            }
            Err(error) => {
                let valid = &pending[at..at + error.valid_up_to()];
                text.push_str(std::str::from_utf8(valid).expect("the error says it is valid up to here"));
                at += error.valid_up_to();
                match error.error_len() {
                    Some(len) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        at += len;
                    }
                    None if is_end => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        at = pending.len();
                    }
                    None => break,
                }
            }
        }
    }
    pending.drain(..at);
    text
}

fn push_window(tokenizer: &Tokenizer, tokens: &mut Vec<Token>, num_shown: &mut usize, is_end: bool) -> String {
    if *num_shown == tokens.len() {
        return String::new();
    }
    let decode = |ids: &[Token]| tokenizer.decode(ids, false).unwrap_or_default();
    let (before, after) = (decode(&tokens[..*num_shown]), decode(tokens));
    let is_waiting = after.ends_with(char::REPLACEMENT_CHARACTER) && tokens.len() - *num_shown < WINDOW_WAIT_MAX;
    if is_waiting && !is_end {
        return String::new();
    }
    let text = after.get(before.len()..).unwrap_or_default().to_string();
    // The shown tokens become the next context; older ones are no longer needed.
    let keep_from = tokens.len().saturating_sub(WINDOW_CONTEXT);
    tokens.drain(..keep_from.min(*num_shown));
    *num_shown = tokens.len();
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::model_text::tiny_model_dir;

    fn tiny() -> Arc<Tokenizer> {
        Arc::new(Tokenizer::from_file(&tiny_model_dir().join("tokenizer.json")).unwrap())
    }

    fn incremental(tokenizer: &Arc<Tokenizer>, ids: &[Token], skip: bool) -> String {
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), &[], skip);
        let mut text = String::new();
        for id in ids {
            let piece = detokenizer.push(*id);
            assert!(!piece.ends_with('\u{FFFD}') || !skip, "only tests with random bytes may see U+FFFD here");
            text.push_str(&piece);
        }
        text + &detokenizer.finish()
    }

    #[test]
    fn characters_split_over_tokens_come_whole() {
        let tokenizer = tiny();
        for text in ["größer café naïve", "你好，世界", "🙂🚀 👩‍👩‍👧‍👦", "a\u{0301} שלום", "plain"]
        {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(incremental(&tokenizer, &ids, true), text);
        }
    }

    #[test]
    fn random_tokens_decode_as_all_at_once() {
        let tokenizer = tiny();
        let mut state = 1u64;
        for len in 0..200 {
            let ids: Vec<Token> = (0..len)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    ((state >> 33) % u64::from(tokenizer.vocab_size())) as Token
                })
                .collect();
            assert_eq!(incremental(&tokenizer, &ids, false), tokenizer.decode(&ids, false).unwrap());
        }
    }

    #[test]
    fn special_tokens_are_left_out_or_shown() {
        let tokenizer = tiny();
        let ids = tokenizer.encode("<|im_start|>hi<|im_end|>", false).unwrap();
        assert_eq!(incremental(&tokenizer, &ids, true), "hi");
        assert_eq!(incremental(&tokenizer, &ids, false), "<|im_start|>hi<|im_end|>");
    }

    #[test]
    fn at_most_three_bytes_wait() {
        let mut pending = "🙂".as_bytes()[..3].to_vec();
        assert_eq!(take_text(&mut pending, false), "");
        assert_eq!(pending.len(), 3);
        pending.push(b'a');
        assert_eq!(take_text(&mut pending, false), "\u{FFFD}a");
        assert!(pending.is_empty());
    }

    /// A word-level tokenizer with SentencePiece's decoder, to check spaces and byte tokens without a file.
    fn sentencepiece(decoder: serde_json::Value) -> Arc<Tokenizer> {
        let vocab = serde_json::json!({"<unk>": 0, "▁Hello": 1, "▁world": 2, "!": 3, "<0xE4>": 4, "<0xBD>": 5,
            "<0xA0>": 6, "ing": 7});
        let json = serde_json::json!({"version": "1.0", "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}});
        let dir =
            std::env::temp_dir().join(format!("tandem-tokenizer-{}-{}", std::process::id(), rand::random::<u64>()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        let tokenizer = Tokenizer::from_file(&path).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        Arc::new(tokenizer)
    }

    #[test]
    fn sentencepiece_keeps_the_space_behind_the_prompt_and_joins_byte_tokens() {
        let tokenizer = sentencepiece(serde_json::json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}));
        let mut detokenizer = Detokenizer::new(tokenizer, &[1], true);
        let pieces: Vec<String> = [2, 4, 5, 6, 3].iter().map(|id| detokenizer.push(*id)).collect();
        assert_eq!(pieces, [" world", "", "", "你", "!"]);
    }

    #[test]
    fn other_decoders_are_asked_window_by_window() {
        let tokenizer = sentencepiece(serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": true}));
        let ids = [1, 2, 3, 7, 2, 1, 3, 3, 2, 7, 1];
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), &ids[..1], true);
        let text: String = ids[1..].iter().map(|id| detokenizer.push(*id)).collect();
        let first = tokenizer.decode(&ids[..1], false).unwrap();
        assert_eq!(first + &text, tokenizer.decode(&ids, false).unwrap());
    }
}
