use super::*;
use crate::text::{ModelText, Tokenizer};

/// Little-endian pieces of a file's metadata.
#[derive(Default)]
struct Metadata {
    num: u64,
    bytes: Vec<u8>,
}

impl Metadata {
    fn key(mut self, key: &str, kind: u32) -> Self {
        self.num += 1;
        self.push_text(key);
        self.bytes.extend(kind.to_le_bytes());
        self
    }

    fn push_text(&mut self, text: &str) {
        self.bytes.extend((text.len() as u64).to_le_bytes());
        self.bytes.extend(text.as_bytes());
    }

    fn text(self, key: &str, value: &str) -> Self {
        let mut all = self.key(key, 8);
        all.push_text(value);
        all
    }

    fn number(self, key: &str, value: u32) -> Self {
        let mut all = self.key(key, 4);
        all.bytes.extend(value.to_le_bytes());
        all
    }

    fn array(self, key: &str, kind: u32, len: usize) -> Self {
        let mut all = self.key(key, 9);
        all.bytes.extend(kind.to_le_bytes());
        all.bytes.extend((len as u64).to_le_bytes());
        all
    }

    fn texts(self, key: &str, values: &[&str]) -> Self {
        let mut all = self.array(key, 8, values.len());
        values.iter().for_each(|value| all.push_text(value));
        all
    }

    fn kinds(self, kinds: &[i32]) -> Self {
        let mut all = self.array("tokenizer.ggml.token_type", 5, kinds.len());
        kinds.iter().for_each(|kind| all.bytes.extend(kind.to_le_bytes()));
        all
    }

    fn scores(self, scores: &[f32]) -> Self {
        let mut all = self.array("tokenizer.ggml.scores", 6, scores.len());
        scores.iter().for_each(|score| all.bytes.extend(score.to_le_bytes()));
        all
    }

    fn file(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend(0u64.to_le_bytes());
        file.extend(self.num.to_le_bytes());
        file.extend(&self.bytes);
        file
    }

    fn read(&self) -> Result<GgufText, String> {
        let file = self.file();
        GgufText::of(&Gguf::parse_metadata(&file).map_err(|error| error.to_string())?)
    }

    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::from_json(Path::new("m.gguf"), &self.read().unwrap().tokenizer).unwrap()
    }
}

/// The keys that llama.cpp's converter writes for the tokenizer of `models/tiny`.
fn tiny() -> Metadata {
    let folder = crate::text::model_text::tiny_model_dir();
    let json: Value = serde_json::from_slice(&std::fs::read(folder.join("tokenizer.json")).unwrap()).unwrap();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![""; vocab.len()];
    vocab.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize] = token);
    let mut kinds = vec![1; tokens.len()];
    json["added_tokens"].as_array().unwrap().iter().for_each(|t| kinds[t["id"].as_u64().unwrap() as usize] = 3);
    let merge = |pair: &Value| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
    let merges: Vec<String> = json["model"]["merges"].as_array().unwrap().iter().map(merge).collect();
    let merges: Vec<&str> = merges.iter().map(String::as_str).collect();
    Metadata::default()
        .text("tokenizer.ggml.model", "gpt2")
        .texts("tokenizer.ggml.tokens", &tokens)
        .kinds(&kinds)
        .texts("tokenizer.ggml.merges", &merges)
        .number("tokenizer.ggml.bos_token_id", 0)
        .number("tokenizer.ggml.eos_token_id", 1)
        .number("tokenizer.ggml.eot_token_id", 3)
}

const TEXTS: [&str; 5] =
    ["hello there", "  two  spaces\n\nand 12345 lines", "naïve שלום 世界 🙂", "<|im_start|>user\nhi<|im_end|>", ""];

#[test]
fn byte_level_keys_give_the_tokens_of_the_tokenizer_they_were_made_of() {
    let ours = tiny().text("tokenizer.ggml.pre", "gpt-2").tokenizer();
    let theirs = Tokenizer::from_file(&crate::text::model_text::tiny_model_dir().join("tokenizer.json")).unwrap();
    for text in TEXTS {
        let tokens = ours.encode(text, false).unwrap();
        assert_eq!(tokens, theirs.encode(text, false).unwrap(), "{text:?}");
        assert_eq!(ours.decode(&tokens, false).unwrap(), text);
    }
    assert!(ours.is_special(0) && !ours.is_special(20));
    // `gpt-2` alone says nothing of BOS; the file's own switch does.
    assert_ne!(ours.encode("hi", true).unwrap()[0], 0);
    let mut with_bos = tiny().text("tokenizer.ggml.pre", "gpt-2").key("tokenizer.ggml.add_bos_token", 7);
    with_bos.bytes.push(1);
    assert_eq!(with_bos.tokenizer().encode("hi", true).unwrap(), theirs.encode("hi", true).unwrap());
}

#[test]
fn digits_are_cut_as_the_named_models_cut_them() {
    let words = |pre: &str| {
        let tokenizer = tiny().text("tokenizer.ggml.pre", pre).tokenizer();
        tokenizer.encode("1234", false).unwrap().len()
    };
    // The vocabulary of models/tiny has no numbers of several digits: all ways end in single digits.
    assert_eq!([words("gpt-2"), words("llama-bpe"), words("qwen2")], [4, 4, 4]);
    let cut = |pre: &str| pre_tokenizer(pre).unwrap().pre_tokenizer.to_string();
    assert!(cut("llama-bpe").contains("{1,3}") && !cut("qwen2").contains("{1,3}"));
    assert!(pre_tokenizer("llama-bpe").unwrap().ignores_merges);
}

/// `▁` is a space; a character that is no piece becomes bytes; the join with the highest score goes first.
#[test]
fn scores_are_merges_in_the_order_of_sentencepiece() {
    let bytes: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let mut tokens = vec!["<unk>", "<s>", "</s>"];
    tokens.extend(bytes.iter().map(String::as_str));
    let first = tokens.len();
    tokens.extend(["▁", "a", "b", "c", "ab", "bc", "▁ab", "abc"]);
    let mut kinds = vec![2, 3, 3];
    kinds.extend([6; 256]);
    kinds.extend([1; 8]);
    let mut scores = vec![0.0; first];
    scores.extend([-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0]);
    let metadata = Metadata::default()
        .text("tokenizer.ggml.model", "llama")
        .texts("tokenizer.ggml.tokens", &tokens)
        .kinds(&kinds)
        .scores(&scores)
        .number("tokenizer.ggml.bos_token_id", 1)
        .number("tokenizer.ggml.eos_token_id", 2)
        .number("tokenizer.ggml.unknown_token_id", 0);
    let tokenizer = metadata.tokenizer();
    let spell = |text: &str| -> Vec<String> {
        tokenizer.encode(text, false).unwrap().into_iter().map(|id| tokenizer.spelling(id).unwrap()).collect()
    };
    assert_eq!(spell("ab"), ["▁ab"]);
    // "bc" has the better score, so "ab" never comes to be; then "abc" from "a" and "bc".
    assert_eq!(spell("abc"), ["▁", "abc"]);
    assert_eq!(spell("é"), ["▁", "<0xC3>", "<0xA9>"]);
    assert_eq!(tokenizer.encode("ab", true).unwrap()[0], 1);
    assert_eq!(tokenizer.decode(&tokenizer.encode("ab é", false).unwrap(), false).unwrap(), "ab é");
    assert!(tokenizer.token_bytes().is_some());
}

#[test]
fn a_whole_tokenizer_in_the_file_goes_first() {
    let json = std::fs::read_to_string(crate::text::model_text::tiny_model_dir().join("tokenizer.json")).unwrap();
    let tokenizer = tiny().text("tokenizer.huggingface.json", &json).tokenizer();
    assert_eq!(tokenizer.encode("hi", true).unwrap()[0], 0);
}

#[test]
fn template_and_end_tokens_come_from_the_file() {
    let folder = std::env::temp_dir().join(format!("tandem-gguf-text-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("m.gguf");
    let metadata = tiny().text("tokenizer.ggml.pre", "gpt-2").text("tokenizer.chat_template", "{{ bos_token }}x");
    std::fs::write(&path, metadata.file()).unwrap();
    let text = ModelText::load(&path).unwrap();
    assert_eq!(text.eos_token_ids, [1, 3]);
    assert!(text.template.is_some());
    for len in (0..metadata.file().len()).step_by(97) {
        std::fs::write(&path, &metadata.file()[..len]).unwrap();
        let error = ModelText::load(&path).unwrap_err().to_string();
        assert!(error.contains("m.gguf could not be read: it "), "{error}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let error = |metadata: Metadata| metadata.read().unwrap_err();
    assert_eq!(error(Metadata::default()), "it has no `tokenizer.ggml.tokens`");
    assert!(error(tiny().text("tokenizer.ggml.pre", "tekken")).contains("`tokenizer.ggml.pre` is \"tekken\""));
    assert!(error(tiny()).contains("`tokenizer.ggml.pre` is \"(missing)\""));
    let tokens = || Metadata::default().texts("tokenizer.ggml.tokens", &["a", "b"]);
    assert!(error(tokens()).contains("`tokenizer.ggml.model` is missing, expected gpt2 or llama"));
    assert!(error(tokens().text("tokenizer.ggml.model", "bert")).contains("is \"bert\""));
    let scores = tokens().text("tokenizer.ggml.model", "llama").scores(&[1.0]);
    assert_eq!(error(scores), "it has 2 tokens and 1 scores of them");
    let numbers = Metadata::default().array("tokenizer.ggml.tokens", 4, 0).text("tokenizer.ggml.model", "llama");
    assert!(error(numbers).contains("it has 0 tokens"));
}
