//! The text side of a GGUF file: its tokenizer keys as a `tokenizer.json`, its other keys as the JSON files that a
//! Hugging Face folder has beside it.
//!
//! A file that carries its `tokenizer.json` whole (`tokenizer.huggingface.json`) is believed. Of llama.cpp's own
//! kinds, byte-level BPE (`gpt2`) and SentencePiece's BPE (`llama`) are read. Byte-level files name their way of
//! cutting text into words; those known here are in [`pre_tokenizer`], and an unknown name is refused: cutting
//! differently would give other tokens than the model was trained on, silently.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use common::gguf::{Array, Gguf, GgufError, HEADER_BYTES_MAX, Value as GgufValue};
use serde_json::{Map, Value, json};

/// Llama 3's way of cutting text.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's: digits alone.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Kinds of tokens, by llama.cpp's numbers.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// Tokens at most, as in `tokenizer.json`.
const NUM_TOKENS_MAX: usize = 1 << 24;

/// What a folder has in files.
#[derive(Debug)]
pub(super) struct GgufText {
    /// `tokenizer.json`
    pub(super) tokenizer: Vec<u8>,
    /// `tokenizer_config.json`
    pub(super) tokenizer_config: Value,
    /// `generation_config.json`
    pub(super) generation: Value,
}

impl GgufText {
    /// Reads the metadata at the beginning of a file; weights are not touched.
    pub(super) fn read(path: &Path) -> Result<Self, String> {
        let mut file = File::open(path).map_err(|error| error.to_string())?;
        let mut bytes = Vec::new();
        let mut wanted = 1 << 20;
        loop {
            let missing = (wanted - bytes.len()) as u64;
            let num_read = file.by_ref().take(missing).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
            match Gguf::parse_metadata(&bytes) {
                Err(GgufError::Truncated { .. }) if num_read as u64 == missing && wanted < HEADER_BYTES_MAX => {
                    wanted *= 2;
                }
                parsed => return Self::of(&parsed.map_err(|error| error.to_string())?),
            }
        }
    }

    fn of(gguf: &Gguf<'_>) -> Result<Self, String> {
        let tokens = Tokens::of(gguf)?;
        let tokenizer = match gguf.text("tokenizer.huggingface.json") {
            Some(text) => text.as_bytes().to_vec(),
            None => tokens.tokenizer(gguf)?.to_string().into_bytes(),
        };
        let mut tokenizer_config = Map::new();
        for (name, key) in [
            ("bos_token", "tokenizer.ggml.bos_token_id"),
            ("eos_token", "tokenizer.ggml.eos_token_id"),
            ("unk_token", "tokenizer.ggml.unknown_token_id"),
            ("pad_token", "tokenizer.ggml.padding_token_id"),
        ] {
            if let Some(token) = tokens.named(gguf, key) {
                tokenizer_config.insert(name.to_string(), token.into());
            }
        }
        if let Some(template) = gguf.text("tokenizer.chat_template") {
            tokenizer_config.insert("chat_template".to_string(), template.into());
        }
        let ends = ["eos", "eot", "eom"].map(|end| gguf.value(&format!("tokenizer.ggml.{end}_token_id")));
        let ends: Vec<u64> = ends.into_iter().flatten().filter_map(GgufValue::as_u64).collect();
        Ok(Self {
            tokenizer,
            tokenizer_config: Value::Object(tokenizer_config),
            generation: json!({ "eos_token_id": ends }),
        })
    }
}

/// The vocabulary.
struct Tokens<'a> {
    spellings: Vec<&'a str>,
    kinds: Vec<u64>,
}

impl<'a> Tokens<'a> {
    fn of(gguf: &Gguf<'a>) -> Result<Self, String> {
        let spellings = texts(gguf, "tokenizer.ggml.tokens")?.ok_or("it has no `tokenizer.ggml.tokens`")?;
        if spellings.is_empty() || spellings.len() > NUM_TOKENS_MAX {
            return Err(format!("it has {} tokens, expected 1 to {NUM_TOKENS_MAX}", spellings.len()));
        }
        let kinds = array(gguf, "tokenizer.ggml.token_type")
            .map_or_else(Vec::new, |kinds| kinds.values().map(|kind| kind.as_u64().unwrap_or(1)).collect());
        Ok(Self { spellings, kinds })
    }

    fn kind(&self, id: usize) -> u64 {
        self.kinds.get(id).copied().unwrap_or(1)
    }

    /// The spelling of the token whose id is under `key`.
    fn named(&self, gguf: &Gguf<'_>, key: &str) -> Option<&'a str> {
        let id = usize::try_from(gguf.value(key)?.as_u64()?).ok()?;
        self.spellings.get(id).copied()
    }

    /// Ids by spelling. Where a spelling is there twice, the first counts, and the second gets a name of its own
    /// so that every id has one.
    fn vocab(&self) -> Map<String, Value> {
        let mut vocab = Map::new();
        for (id, spelling) in self.spellings.iter().enumerate() {
            let name = if vocab.contains_key(*spelling) { format!("{spelling}\u{0}{id}") } else { (*spelling).into() };
            vocab.insert(name, id.into());
        }
        vocab
    }

    fn added(&self) -> Vec<Value> {
        let ids = 0..self.spellings.len();
        ids.filter(|id| [CONTROL, USER_DEFINED, UNKNOWN].contains(&self.kind(*id)))
            .map(|id| {
                json!({
                    "id": id, "content": self.spellings[id], "special": self.kind(id) != USER_DEFINED,
                    "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                })
            })
            .collect()
    }

    fn tokenizer(&self, gguf: &Gguf<'_>) -> Result<Value, String> {
        match gguf.text("tokenizer.ggml.model") {
            Some("gpt2") => self.byte_level(gguf),
            Some("llama") => self.sentence_piece(gguf),
            found => Err(format!(
                "`tokenizer.ggml.model` is {}, expected gpt2 or llama",
                found.map_or("missing".to_string(), |found| format!("{found:?}"))
            )),
        }
    }

    /// BPE over bytes.
    fn byte_level(&self, gguf: &Gguf<'_>) -> Result<Value, String> {
        let merges = texts(gguf, "tokenizer.ggml.merges")?.ok_or("it has no `tokenizer.ggml.merges`")?;
        let pre = gguf.text("tokenizer.ggml.pre").unwrap_or("(missing)");
        let cut = pre_tokenizer(pre).ok_or_else(|| {
            format!("`tokenizer.ggml.pre` is {pre:?}, expected one of gpt-2, llama-bpe, qwen2, or a `tokenizer.huggingface.json`")
        })?;
        let adds_bos = gguf.value("tokenizer.ggml.add_bos_token").and_then(GgufValue::as_bool).unwrap_or(cut.adds_bos);
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added(),
            "normalizer": cut.normalizer,
            "pre_tokenizer": cut.pre_tokenizer,
            "post_processor": self.post_processor(gguf, adds_bos),
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": cut.ignores_merges, "vocab": self.vocab(), "merges": merges,
            },
        }))
    }

    /// BPE over characters with scores instead of merges: two pieces merge if their join is a piece, the join with
    /// the highest score first. As merges: all cuts of each piece into two pieces, in the order of scores.
    fn sentence_piece(&self, gguf: &Gguf<'_>) -> Result<Value, String> {
        let scores = array(gguf, "tokenizer.ggml.scores").ok_or("it has no `tokenizer.ggml.scores`")?;
        let scores: Vec<f64> = scores.values().filter_map(|score| score.as_f64()).collect();
        if scores.len() != self.spellings.len() {
            return Err(format!("it has {} tokens and {} scores of them", self.spellings.len(), scores.len()));
        }
        let ids: HashMap<&str, usize> = self.spellings.iter().enumerate().map(|(id, text)| (*text, id)).collect();
        let mut merges: Vec<(f64, usize, usize, &str, &str)> = Vec::new();
        for (id, piece) in self.spellings.iter().enumerate().filter(|(id, _)| self.kind(*id) == 1) {
            if piece.len() > PIECE_BYTES_MAX {
                return Err(format!("token {id} has {} bytes, expected at most {PIECE_BYTES_MAX}", piece.len()));
            }
            for (at, _) in piece.char_indices().skip(1) {
                let (left, right) = piece.split_at(at);
                if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                    merges.push((scores[id], *l, *r, left, right));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let merges: Vec<Value> = merges.iter().map(|(.., left, right)| json!([left, right])).collect();
        let switch = |key: &str, default| gguf.value(key).and_then(GgufValue::as_bool).unwrap_or(default);
        let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if switch("tokenizer.ggml.add_space_prefix", true) {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added(),
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null,
            "post_processor": self.post_processor(gguf, switch("tokenizer.ggml.add_bos_token", true)),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": self.named(gguf, "tokenizer.ggml.unknown_token_id"),
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                "byte_fallback": true, "ignore_merges": false, "vocab": self.vocab(), "merges": merges,
            },
        }))
    }

    /// What puts BOS in front.
    fn post_processor(&self, gguf: &Gguf<'_>, adds_bos: bool) -> Value {
        let id = gguf.value("tokenizer.ggml.bos_token_id").and_then(GgufValue::as_u64);
        let Some((id, bos)) = id.zip(self.named(gguf, "tokenizer.ggml.bos_token_id")).filter(|_| adds_bos) else {
            return Value::Null;
        };
        let mark = json!({"SpecialToken": {"id": bos, "type_id": 0}});
        let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
        let mut marks = Map::new();
        marks.insert(bos.to_string(), json!({"id": bos, "ids": [id], "tokens": [bos]}));
        json!({
            "type": "TemplateProcessing",
            "single": [mark, text("A")],
            "pair": [mark, text("A"), mark, text("B")],
            "special_tokens": marks,
        })
    }
}

/// Bytes of a piece at most: cutting it everywhere takes the square of its length.
const PIECE_BYTES_MAX: usize = 4096;

/// How byte-level text is cut into words.
struct Cut {
    normalizer: Value,
    pre_tokenizer: Value,
    ignores_merges: bool,
    adds_bos: bool,
}

/// llama.cpp's names of ways of cutting text.
fn pre_tokenizer(name: &str) -> Option<Cut> {
    let split = |pattern: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]})
    };
    let plain = Cut { normalizer: Value::Null, pre_tokenizer: Value::Null, ignores_merges: false, adds_bos: false };
    match name {
        "gpt-2" | "gpt2" => Some(Cut {
            pre_tokenizer: json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
            }),
            ..plain
        }),
        "llama-bpe" | "llama3" | "llama-v3" => {
            Some(Cut { pre_tokenizer: split(LLAMA3), ignores_merges: true, adds_bos: true, ..plain })
        }
        "qwen2" => Some(Cut { pre_tokenizer: split(QWEN2), normalizer: json!({"type": "NFC"}), ..plain }),
        _ => None,
    }
}

fn array<'a>(gguf: &Gguf<'a>, key: &str) -> Option<Array<'a>> {
    gguf.value(key)?.as_array()
}

/// The texts under `key`, if it is there.
fn texts<'a>(gguf: &Gguf<'a>, key: &str) -> Result<Option<Vec<&'a str>>, String> {
    let Some(values) = array(gguf, key) else { return Ok(None) };
    let texts: Option<Vec<&str>> = values.values().map(|value| value.as_text()).collect();
    texts.map(Some).ok_or_else(|| format!("`{key}` holds something else than texts"))
}

#[cfg(test)]
#[path = "gguf_tests.rs"]
mod tests;
