//! Whole checkpoint folders that cannot be served say why.
#![allow(clippy::unwrap_used)]

#[path = "steps/mod.rs"]
mod steps;

use std::fs;
use std::path::{Path, PathBuf};

use common::config::Dtype;
use engine::model::{LoadError, LoadOptions, Model};
use kernels::Isa;
use steps::{load, root};

fn load_folder(folder: &Path) -> Result<Model, LoadError> {
    let options = LoadOptions { dtype: Dtype::Bfloat16, isa: Isa::detect(), threads: Some(2), cache_folder: None };
    Model::load_with(folder, options)
}

/// A copy of a checkpoint with its `config.json` changed.
struct Copy(PathBuf);

impl Copy {
    fn of(name: &str, test: &str, change: impl Fn(&mut serde_json::Value)) -> Self {
        let source = root().join("tests/checkpoints").join(name);
        let folder = std::env::temp_dir().join(format!("tandem-loading-{test}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        for entry in fs::read_dir(source).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
        }
        let mut config = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        change(&mut config);
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        Self(folder)
    }

    fn error(&self) -> String {
        load_folder(&self.0).err().unwrap().to_string()
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_layer_too_many_is_a_missing_tensor() {
    let copy = Copy::of("llama3-gqa", "layers", |config| config["num_hidden_layers"] = 3.into());
    assert_eq!(
        copy.error(),
        format!(
            "{} has no tensor model.layers.2.input_layernorm.weight, expected f32, f16 or bf16 of shape [96]",
            copy.0.join("model.safetensors").display()
        )
    );
}

#[test]
fn another_width_is_a_wrong_shape() {
    let copy = Copy::of("llama3-gqa", "width", |config| config["intermediate_size"] = 120.into());
    let error = copy.error();
    assert!(error.ends_with("mlp.gate_proj.weight has shape [128, 96], config.json implies [120, 96]"), "{error}");
}

#[test]
fn a_removed_shard_is_named() {
    let copy = Copy::of("qwen3", "shard", |_| {});
    fs::remove_file(copy.0.join("model-00002-of-00003.safetensors")).unwrap();
    assert!(copy.error().contains("names the shard model-00002-of-00003.safetensors for tensor "), "{}", copy.error());
}

#[test]
fn a_folder_without_anything_says_what_was_expected() {
    let error = load_folder(&root().join("docs")).err().unwrap().to_string();
    assert!(error.contains("config.json cannot be read") && error.contains("Hugging Face"), "{error}");
}

#[test]
fn identity_tells_models_and_types_apart_and_copies_not() {
    let identity = |model: &Model| model.info_for(16, 1).identity;
    let original = load("tests/checkpoints/qwen3", Dtype::Bfloat16);
    let copy = Copy::of("qwen3", "copy", |_| {});
    let copied = load_folder(&copy.0).unwrap();
    assert_eq!(identity(&original), identity(&copied));
    assert_ne!(identity(&original), identity(&load("tests/checkpoints/qwen3", Dtype::Float32)));
    assert_ne!(identity(&original), identity(&load("tests/checkpoints/qwen3-tied", Dtype::Bfloat16)));
    let other_rope = Copy::of("qwen3", "rope", |config| config["rope_parameters"]["rope_theta"] = 5000.into());
    assert_ne!(identity(&original), identity(&load_folder(&other_rope.0).unwrap()));
}
