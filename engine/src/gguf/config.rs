//! GGUF's metadata in the words of a `config.json`.

use std::path::Path;

use common::gguf::{Gguf, Value as GgufValue};
use serde_json::{Map, Value, json};

use super::names::InterleavedHeads;
use crate::rope::RopeScaling;
use crate::spec::{ModelSpec, SpecError};

/// The architectures that are read: llama.cpp's name, Hugging Face's, and whether q and k are interleaved.
const ARCHITECTURES: [(&str, &str, bool); 3] =
    [("llama", "LlamaForCausalLM", true), ("qwen2", "Qwen2ForCausalLM", false), ("qwen3", "Qwen3ForCausalLM", false)];

/// (key of `config.json`, key of GGUF behind the architecture, whether it must be there)
const FIELDS: [(&str, &str, bool); 9] = [
    ("hidden_size", "embedding_length", true),
    ("num_hidden_layers", "block_count", true),
    ("intermediate_size", "feed_forward_length", true),
    ("num_attention_heads", "attention.head_count", true),
    ("max_position_embeddings", "context_length", true),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon", true),
    ("num_key_value_heads", "attention.head_count_kv", false),
    ("head_dim", "attention.key_length", false),
    ("rope_theta", "rope.freq_base", false),
];

/// Keys that name a token at which an answer ends.
const END_TOKENS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Whether a GGUF file's q and k rows are interleaved, with their heads; from the file's own metadata.
pub(crate) fn interleaved_heads(spec: &ModelSpec) -> [(&'static str, Option<InterleavedHeads>); 2] {
    let is_interleaved = ARCHITECTURES.iter().any(|(_, name, is)| *name == spec.architecture && *is);
    let heads = |count: usize| is_interleaved.then_some(InterleavedHeads(count));
    [(".self_attn.q_proj.", heads(spec.num_heads)), (".self_attn.k_proj.", heads(spec.num_kv_heads))]
}

/// The shape of a GGUF model. `rope_factors` are the values of its tensor `rope_freqs.weight`, if it has one.
///
/// # Errors
/// [`SpecError`] naming the key or the field.
pub(crate) fn spec(path: &Path, gguf: &Gguf<'_>, rope_factors: Option<Vec<f32>>) -> Result<ModelSpec, SpecError> {
    let mut spec = ModelSpec::from_config(path, &config(path, gguf)?)?;
    let has = |name: &str| gguf.tensor(name).is_some();
    spec.has_qkv_bias = has("blk.0.attn_q.bias");
    spec.has_output_bias = has("blk.0.attn_output.bias");
    spec.has_mlp_bias = has("blk.0.ffn_gate.bias");
    if let Some(factors) = rope_factors {
        let expected = format!("{} factors above 0", spec.head_dim / 2);
        let is_sound = factors.len() == spec.head_dim / 2 && factors.iter().all(|f| f.is_finite() && *f > 0.0);
        if !is_sound || spec.rope.scaling != RopeScaling::None {
            return Err(error(path, "rope_freqs.weight", "something else", &expected));
        }
        spec.rope.scaling = RopeScaling::Factors { factors };
    }
    Ok(spec)
}

fn error(path: &Path, field: &str, found: &str, expected: &str) -> SpecError {
    SpecError::Field {
        path: path.to_path_buf(),
        field: field.to_string(),
        found: found.to_string(),
        expected: expected.to_string(),
    }
}

fn number(value: &GgufValue<'_>) -> Option<Value> {
    // f32 as it was meant, not as the f64 nearest to it: 1e-5 and not 9.999999747378752e-6.
    match (value.as_u64(), value.as_f64()) {
        (Some(whole), _) => Some(whole.into()),
        (None, Some(float)) => Some((float as f32).to_string().parse::<f64>().unwrap_or(float).into()),
        (None, None) => None,
    }
}

fn config(path: &Path, gguf: &Gguf<'_>) -> Result<Value, SpecError> {
    let named = gguf.text("general.architecture").unwrap_or("(general.architecture is missing)");
    let Some((ours, theirs, _)) = ARCHITECTURES.iter().find(|(ours, ..)| *ours == named) else {
        return Err(SpecError::Architecture { path: path.to_path_buf(), found: named.to_string() });
    };
    let key = |key: &str| format!("{ours}.{key}");
    let mut config = Map::new();
    config.insert("architectures".to_string(), json!([theirs]));
    for (field, name, is_needed) in FIELDS {
        match gguf.value(&key(name)) {
            Some(value) => {
                let value = number(value)
                    .ok_or_else(|| error(path, &key(name), "not a number", "one number for all layers"))?;
                config.insert(field.to_string(), value);
            }
            None if is_needed => return Err(error(path, &key(name), "missing", "a number")),
            None => {}
        }
    }
    if gguf.value(&key("expert_count")).and_then(GgufValue::as_u64).is_some_and(|count| count > 0) {
        return Err(error(path, &key("expert_count"), "above 0", "a model without experts"));
    }
    let embedding = gguf.tensor("token_embd.weight").and_then(|tensor| tensor.shape.first().copied());
    let vocab_size = embedding.ok_or_else(|| error(path, "token_embd.weight", "missing", "a table of embeddings"))?;
    config.insert("vocab_size".to_string(), vocab_size.into());
    config.insert("tie_word_embeddings".to_string(), gguf.tensor("output.weight").is_none().into());
    let ends: Vec<u64> =
        END_TOKENS.iter().filter_map(|key| gguf.value(key)?.as_u64()).filter(|id| *id < vocab_size as u64).collect();
    config.insert("eos_token_id".to_string(), json!(ends));
    if let Some(rope) = rope(path, gguf, &key)? {
        let theta = config.get("rope_theta").cloned().unwrap_or(json!(10_000.0));
        let mut rope = rope;
        rope.insert("rope_theta".to_string(), theta);
        config.insert("rope_parameters".to_string(), Value::Object(rope));
    }
    let heads = ["hidden_size", "num_attention_heads"].map(|field| config[field].as_u64().unwrap_or(0));
    let head_dim = config.get("head_dim").and_then(Value::as_u64).or_else(|| heads[0].checked_div(heads[1]));
    if let Some(dims) = gguf.value(&key("rope.dimension_count")).and_then(GgufValue::as_u64)
        && Some(dims) != head_dim
    {
        let expected = format!("all {} features of a head", head_dim.unwrap_or(0));
        return Err(error(path, &key("rope.dimension_count"), &dims.to_string(), &expected));
    }
    if let (Some(values), Some(head_dim)) = (gguf.value(&key("attention.value_length")), head_dim)
        && values.as_u64() != Some(head_dim)
    {
        let expected = format!("{head_dim}, that of the keys");
        return Err(error(path, &key("attention.value_length"), "another number", &expected));
    }
    // The default that Transformers has for Qwen3 is not what llama.cpp derives.
    if let Some(head_dim) = head_dim {
        config.insert("head_dim".to_string(), head_dim.into());
    }
    Ok(Value::Object(config))
}

/// Rope scaling as `rope_parameters`, but for the base.
fn rope(path: &Path, gguf: &Gguf<'_>, key: &dyn Fn(&str) -> String) -> Result<Option<Map<String, Value>>, SpecError> {
    let kind = gguf.text(&key("rope.scaling.type")).unwrap_or("none");
    if kind == "none" {
        return Ok(None);
    }
    if !["linear", "yarn"].contains(&kind) {
        return Err(error(path, &key("rope.scaling.type"), kind, "one of none, linear, yarn"));
    }
    let mut rope = Map::new();
    rope.insert("rope_type".to_string(), kind.into());
    for (field, name) in [
        ("factor", "rope.scaling.factor"),
        ("original_max_position_embeddings", "rope.scaling.original_context_length"),
        ("attention_factor", "rope.scaling.attn_factor"),
        ("beta_fast", "rope.scaling.yarn_beta_fast"),
        ("beta_slow", "rope.scaling.yarn_beta_slow"),
    ] {
        if let Some(value) = gguf.value(&key(name)).and_then(number) {
            rope.insert(field.to_string(), value);
        }
    }
    Ok(Some(rope))
}
