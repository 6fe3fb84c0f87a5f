//! A model whose embeddings are its output projection holds the two once, and computes what it would with two copies.
#![allow(clippy::unwrap_used)]

#[path = "steps/mod.rs"]
mod steps;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::config::Dtype;
use common::sampling::SampledToken;
use engine::gguf::write::{GgufType, convert};
use engine::model::{LoadOptions, Model};
use kernels::Isa;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use steps::{TestSequence, generate, prompt, root, runner};

/// Its weights are f16.
const TIED: &str = "tests/checkpoints/qwen3-tied";

/// One model twice: as it is, and with a copy of its embeddings as an output projection of its own.
struct Twins(PathBuf);

impl Twins {
    fn make(test: &str) -> Self {
        let twins = Self(std::env::temp_dir().join(format!("tandem-tied-{test}-{}", std::process::id())));
        let bytes = fs::read(root().join(TIED).join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut all = tensors.tensors();
        twins.write(true, &all);
        all.push(("lm_head.weight".to_string(), tensors.tensor("model.embed_tokens.weight").unwrap()));
        twins.write(false, &all);
        twins
    }

    fn write(&self, is_tied: bool, tensors: &[(String, safetensors::tensor::TensorView<'_>)]) {
        let folder = self.folder(is_tied);
        fs::create_dir_all(&folder).unwrap();
        let mut config: Value =
            serde_json::from_slice(&fs::read(root().join(TIED).join("config.json")).unwrap()).unwrap();
        config["tie_word_embeddings"] = is_tied.into();
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let tensors = tensors.iter().map(|(name, view)| (name, view.clone()));
        fs::write(folder.join("model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
        let tokenizer = json!({
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
            "decoder": {"type": "ByteLevel"}, "added_tokens": [],
        });
        fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    }

    fn folder(&self, is_tied: bool) -> PathBuf {
        self.0.join(if is_tied { "tied" } else { "untied" })
    }

    /// As GGUF files.
    fn gguf(&self, is_tied: bool, ty: GgufType) -> PathBuf {
        let path = self.folder(is_tied).join(format!("{ty:?}.gguf"));
        convert(&self.folder(is_tied), &path, ty).unwrap();
        path
    }
}

impl Drop for Twins {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn load(path: &Path, dtype: Dtype) -> Arc<Model> {
    let options = LoadOptions { dtype, isa: Isa::detect(), threads: Some(2), cache_folder: None };
    Arc::new(Model::load_with(path, options).unwrap())
}

/// Two tokens behind a prompt of all tokens, with the log-probabilities of all others.
fn answer(model: &Arc<Model>) -> Vec<SampledToken> {
    let vocab = model.spec().vocab_size;
    let mut tokens: Vec<u32> = (0..vocab as u32).collect();
    tokens.extend(prompt(20, vocab as u32, 7));
    let mut sequence = TestSequence::new(1, &tokens, 0..32).with_logprobs(vocab);
    generate(&mut runner(model, 16, 512), &mut sequence, 2)
}

/// `table_bytes`: of an embedding table `[256, 64]`.
fn check(tied: &Arc<Model>, untied: &Arc<Model>, table_bytes: u64, what: &str) {
    assert!(tied.spec().is_tied && !untied.spec().is_tied, "{what}");
    assert_eq!(answer(tied), answer(untied), "{what}");
    let (once, twice) = (tied.weights().sizes(), untied.weights().sizes());
    assert_eq!((once.table_bytes, twice.table_bytes), (0, table_bytes), "{what}");
    assert_eq!(once.num_bytes() + table_bytes, twice.num_bytes(), "{what}");
    assert!(std::ptr::eq(tied.weights().embedding(), &tied.weights().head), "{what}");
}

#[test]
fn tied_numbers_are_held_once_and_compute_the_same_bits() {
    let twins = Twins::make("numbers");
    for (dtype, bytes) in [(Dtype::Float32, 4), (Dtype::Bfloat16, 2)] {
        let [tied, untied] = [true, false].map(|is_tied| load(&twins.folder(is_tied), dtype));
        check(&tied, &untied, 256 * 64 * bytes, &format!("{dtype:?}"));
    }
}

#[test]
fn tied_quantized_weights_are_held_once_and_compute_the_same_bits() {
    let twins = Twins::make("quantized");
    // Groups of 32 weights with a scale of two bytes.
    for (ty, group_bytes) in [(GgufType::Q8_0, 34), (GgufType::Q4_0, 18)] {
        let [tied, untied] = [true, false].map(|is_tied| load(&twins.gguf(is_tied, ty), Dtype::Auto));
        check(&tied, &untied, 256 * 64 / 32 * group_bytes, &format!("{ty:?}"));
    }
}
