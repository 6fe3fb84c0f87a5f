//! A Hugging Face folder becomes a GGUF file. Quantization is candle's, which follows ggml's reference.
//!
//! The tokenizer is written twice: in llama.cpp's keys, and whole under `tokenizer.huggingface.json`, the key that
//! the format has for it, since llama.cpp's keys have no words for every way of cutting text.
//!
//! All tensors are held in memory until the file is written.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value as GgufValue};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use serde_json::Value;

use super::config::interleaved_heads;
use super::names;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::rope::RopeScaling;
use crate::spec::{ModelSpec, SpecError};

/// What the large matrices are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types)] // ggml's names
pub enum GgufType {
    /// bfloat16.
    Bf16,
    /// 8 bits, a scale for 32.
    Q8_0,
    /// 4 bits, a scale for 32.
    Q4_0,
    /// llama.cpp's mixture: 4 bits, and 6 bits for the output, half of the value and down projections.
    Q4_K_M,
}

/// Why a folder did not become a GGUF file.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Its configuration.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Its weights.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Something that GGUF has no words for.
    #[error("{} cannot be written as GGUF: {reason}", folder.display())]
    Unsupported {
        /// Which folder.
        folder: PathBuf,
        /// What.
        reason: String,
    },
    /// A tensor could not be quantized.
    #[error("tensor {tensor} cannot be quantized: {reason}")]
    Tensor {
        /// Which.
        tensor: String,
        /// What the library said.
        reason: String,
    },
    /// The file cannot be written.
    #[error("{} cannot be written: {reason}", path.display())]
    Unwritable {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

/// Writes the model in `folder` to the file `path`, which appears when it is complete.
///
/// # Errors
/// [`WriteError`].
pub fn convert(folder: &Path, path: &Path, ty: GgufType) -> Result<(), WriteError> {
    let spec = ModelSpec::read(folder)?;
    let checkpoint = Checkpoint::open(folder)?;
    let mut metadata = Metadata::default();
    shape(folder, &spec, ty, &mut metadata)?;
    tokenizer(folder, &spec, &mut metadata)?;
    let mut tensors = Vec::new();
    if let RopeScaling::Llama3 { .. } = spec.rope.scaling {
        let factors = spec.rope.frequency_factors();
        tensors.push(("rope_freqs.weight".to_string(), quantize("rope_freqs.weight", factors, None, GgmlDType::F32)?));
    }
    let interleaved = interleaved_heads(&spec);
    let names: Vec<(String, Vec<usize>)> =
        checkpoint.sorted().iter().map(|(name, _, shape, _)| (name.to_string(), shape.to_vec())).collect();
    for (name, shape) in names {
        let Some(written) = names::to_gguf(&name).filter(|written| !(spec.is_tied && written == "output.weight"))
        else {
            continue;
        };
        let values = checkpoint.tensor(&name, &shape)?.to_f32();
        let heads = interleaved.iter().find(|(part, _)| name.contains(part)).and_then(|(_, heads)| *heads);
        let values = match heads {
            Some(heads) => {
                let cols = values.len() / shape[0];
                let mut rows = vec![0.0; values.len()];
                for row in 0..shape[0] {
                    let source = &values[row * cols..][..cols];
                    rows[heads.source_row(row, shape[0]) * cols..][..cols].copy_from_slice(source);
                }
                rows
            }
            None => values,
        };
        let (matrix, stored) = match shape[..] {
            [rows, cols] => (Some((rows, cols)), stored_as(ty, &written, cols, spec.num_layers())),
            _ => (None, GgmlDType::F32),
        };
        let tensor = quantize(&written, values, matrix, stored)?;
        tensors.push((written, tensor));
    }
    let metadata: Vec<(&str, &GgufValue)> = metadata.0.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let unwritable = |reason: String| WriteError::Unwritable { path: path.to_path_buf(), reason };
    let draft = path.with_extension(format!("{}.tmp", std::process::id()));
    let file = File::create(&draft).map_err(|error| unwritable(error.to_string()))?;
    gguf_file::write(&mut BufWriter::new(file), &metadata, &tensors).map_err(|error| unwritable(error.to_string()))?;
    fs::rename(&draft, path).map_err(|error| unwritable(error.to_string()))
}

/// `matrix` is its shape, if it is one.
fn quantize(
    name: &str,
    values: Vec<f32>,
    matrix: Option<(usize, usize)>,
    stored: GgmlDType,
) -> Result<QTensor, WriteError> {
    let len = values.len();
    let tensor = match matrix {
        Some(shape) => Tensor::from_vec(values, shape, &Device::Cpu),
        None => Tensor::from_vec(values, len, &Device::Cpu),
    };
    tensor
        .and_then(|tensor| QTensor::quantize(&tensor, stored))
        .map_err(|error| WriteError::Tensor { tensor: name.to_string(), reason: error.to_string() })
}

/// What a matrix is stored as; rows that are not whole blocks fall back to shorter blocks.
fn stored_as(ty: GgufType, name: &str, cols: usize, num_layers: usize) -> GgmlDType {
    let wanted = match ty {
        GgufType::Bf16 => GgmlDType::BF16,
        GgufType::Q8_0 => GgmlDType::Q8_0,
        GgufType::Q4_0 => GgmlDType::Q4_0,
        GgufType::Q4_K_M if has_more_bits(name, num_layers) => GgmlDType::Q6K,
        GgufType::Q4_K_M => GgmlDType::Q4K,
    };
    match (cols.is_multiple_of(256), cols.is_multiple_of(32)) {
        (true, _) => wanted,
        (false, true) if [GgmlDType::Q4K, GgmlDType::Q6K].contains(&wanted) => GgmlDType::Q8_0,
        (false, true) => wanted,
        (false, false) => GgmlDType::BF16,
    }
}

/// Whether a matrix has 6 bits in Q4_K_M: the output, and the value and down projections of the first and last
/// eighth of the layers and of every third between.
fn has_more_bits(name: &str, num_layers: usize) -> bool {
    if name == "output.weight" {
        return true;
    }
    let Some((layer, part)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else { return false };
    let layer: usize = layer.parse().expect("a name that was just made");
    let eighth = num_layers / 8;
    ["attn_v.weight", "ffn_down.weight"].contains(&part)
        && (layer < eighth || layer >= 7 * num_layers / 8 || (layer - eighth) % 3 == 2)
}

#[derive(Default)]
struct Metadata(Vec<(String, GgufValue)>);

impl Metadata {
    fn text(&mut self, key: impl Into<String>, value: &str) {
        self.0.push((key.into(), GgufValue::String(value.to_string())));
    }

    fn number(&mut self, key: impl Into<String>, value: usize) {
        self.0.push((key.into(), GgufValue::U32(value as u32)));
    }

    fn float(&mut self, key: impl Into<String>, value: f64) {
        self.0.push((key.into(), GgufValue::F32(value as f32)));
    }

    fn texts(&mut self, key: &str, values: impl IntoIterator<Item = String>) {
        self.0.push((key.to_string(), GgufValue::Array(values.into_iter().map(GgufValue::String).collect())));
    }
}

fn shape(folder: &Path, spec: &ModelSpec, ty: GgufType, metadata: &mut Metadata) -> Result<(), WriteError> {
    let unsupported =
        |reason: &str| WriteError::Unsupported { folder: folder.to_path_buf(), reason: reason.to_string() };
    let arch = match spec.architecture.as_str() {
        "Qwen2ForCausalLM" => "qwen2",
        "Qwen3ForCausalLM" => "qwen3",
        _ => "llama",
    };
    if spec.windows.iter().any(Option::is_some) {
        return Err(unsupported("its attention has a window, which these architectures have no key for"));
    }
    metadata.text("general.architecture", arch);
    metadata.text("general.name", &folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into()));
    // llama.cpp's numbers of file types.
    metadata.number(
        "general.file_type",
        match ty {
            GgufType::Bf16 => 32,
            GgufType::Q8_0 => 7,
            GgufType::Q4_0 => 2,
            GgufType::Q4_K_M => 15,
        },
    );
    metadata.number("general.quantization_version", 2);
    let key = |key: &str| format!("{arch}.{key}");
    metadata.number(key("vocab_size"), spec.vocab_size);
    metadata.number(key("embedding_length"), spec.hidden_size);
    metadata.number(key("block_count"), spec.num_layers());
    metadata.number(key("feed_forward_length"), spec.intermediate_size);
    metadata.number(key("attention.head_count"), spec.num_heads);
    metadata.number(key("attention.head_count_kv"), spec.num_kv_heads);
    metadata.number(key("attention.key_length"), spec.head_dim);
    metadata.number(key("attention.value_length"), spec.head_dim);
    metadata.float(key("attention.layer_norm_rms_epsilon"), f64::from(spec.rms_norm_eps));
    metadata.number(key("rope.dimension_count"), spec.rope.rotated_dim);
    metadata.float(key("rope.freq_base"), spec.rope.theta);
    let mut context = spec.max_position;
    match &spec.rope.scaling {
        RopeScaling::None | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => {
            context = (context as f64 / factor).round() as usize;
            metadata.text(key("rope.scaling.type"), "linear");
            metadata.float(key("rope.scaling.factor"), *factor);
        }
        RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, is_truncated: true, .. } => {
            metadata.text(key("rope.scaling.type"), "yarn");
            metadata.float(key("rope.scaling.factor"), *factor);
            metadata.number(key("rope.scaling.original_context_length"), *original_max_position);
            metadata.float(key("rope.scaling.attn_factor"), spec.rope.attention_factor());
            metadata.float(key("rope.scaling.yarn_beta_fast"), *beta_fast);
            metadata.float(key("rope.scaling.yarn_beta_slow"), *beta_slow);
        }
        _ => return Err(unsupported("it has no key for this kind of rope scaling")),
    }
    metadata.number(key("context_length"), context);
    Ok(())
}

/// The tokenizer in both forms, the chat template, and the tokens that begin and end.
fn tokenizer(folder: &Path, spec: &ModelSpec, metadata: &mut Metadata) -> Result<(), WriteError> {
    let unsupported = |reason: String| WriteError::Unsupported { folder: folder.to_path_buf(), reason };
    let read = |name: &str| -> Result<Option<String>, WriteError> {
        match fs::read_to_string(folder.join(name)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unsupported(format!("{name} cannot be read: {error}"))),
        }
    };
    let json = |name: &str, text: Option<String>| -> Result<Value, WriteError> {
        let parsed = serde_json::from_str(text.as_deref().unwrap_or("null"));
        parsed.map_err(|error| unsupported(format!("{name} is not JSON: {error}")))
    };
    let text = read("tokenizer.json")?.ok_or_else(|| unsupported("it has no tokenizer.json".to_string()))?;
    let tokenizer = json("tokenizer.json", Some(text.clone()))?;
    let config = json("tokenizer_config.json", read("tokenizer_config.json")?)?;
    let not_bpe = || unsupported("its tokenizer is not of the kind BPE over bytes".to_string());
    if tokenizer["model"]["type"] != "BPE" || tokenizer["decoder"]["type"] != "ByteLevel" {
        return Err(not_bpe());
    }
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const USER_DEFINED: i32 = 4;
    const UNUSED: i32 = 5;
    let mut tokens: Vec<(String, i32)> = (0..spec.vocab_size).map(|id| (format!("[PAD{id}]"), UNUSED)).collect();
    let mut put = |id: &Value, token: &str, kind: i32| {
        let place = id.as_u64().and_then(|id| tokens.get_mut(usize::try_from(id).ok()?));
        place.map(|place| *place = (token.to_string(), kind)).ok_or_else(not_bpe)
    };
    for (token, id) in tokenizer["model"]["vocab"].as_object().ok_or_else(not_bpe)? {
        put(id, token, NORMAL)?;
    }
    for added in tokenizer["added_tokens"].as_array().into_iter().flatten() {
        let kind = if added["special"] == true { CONTROL } else { USER_DEFINED };
        put(&added["id"], added["content"].as_str().ok_or_else(not_bpe)?, kind)?;
    }
    let merge = |merge: &Value| match merge {
        Value::String(merge) => Some(merge.clone()),
        pair => Some(format!("{} {}", pair[0].as_str()?, pair[1].as_str()?)),
    };
    let merges = tokenizer["model"]["merges"].as_array().into_iter().flatten();
    let merges = merges.map(merge).collect::<Option<Vec<String>>>().ok_or_else(not_bpe)?;
    let id_of = |name: &str| {
        let text = config[name].as_str().or_else(|| config[name]["content"].as_str())?;
        tokens.iter().position(|(token, _)| token == text)
    };
    let (bos, named_end) = (id_of("bos_token"), id_of("eos_token"));
    metadata.text("tokenizer.ggml.model", "gpt2");
    let pre = &tokenizer["pre_tokenizer"];
    if pre["type"] == "ByteLevel" && pre["use_regex"] != false && tokenizer["normalizer"].is_null() {
        metadata.text("tokenizer.ggml.pre", "gpt-2");
    }
    metadata.0.push((
        "tokenizer.ggml.token_type".to_string(),
        GgufValue::Array(tokens.iter().map(|(_, kind)| GgufValue::I32(*kind)).collect()),
    ));
    metadata.texts("tokenizer.ggml.tokens", tokens.into_iter().map(|(token, _)| token));
    metadata.texts("tokenizer.ggml.merges", merges);
    let mut ends: Vec<usize> = spec.eos_token_ids.iter().map(|id| *id as usize).chain(named_end).collect();
    ends.dedup();
    for (key, id) in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"].into_iter().zip(ends) {
        metadata.number(key, id);
    }
    if let Some(bos) = bos {
        metadata.number("tokenizer.ggml.bos_token_id", bos);
        let adds_bos = tokenizer["post_processor"].to_string().contains("TemplateProcessing");
        metadata.0.push(("tokenizer.ggml.add_bos_token".to_string(), GgufValue::Bool(adds_bos)));
    }
    metadata.text("tokenizer.huggingface.json", &text);
    let template = read("chat_template.jinja")?.or_else(|| config["chat_template"].as_str().map(str::to_string));
    if let Some(template) = template {
        metadata.text("tokenizer.chat_template", &template);
    }
    Ok(())
}
