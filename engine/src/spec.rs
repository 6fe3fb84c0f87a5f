//! A model's shape, read from `config.json`: everything the decoder needs to know about a family.
//!
//! One decoder serves all families; what tells them apart is in [`ModelSpec`]: biases, norms on q and k,
//! windows per layer, rope scaling, tied embeddings. Both spellings of Transformers are read: the older
//! `rope_theta` + `rope_scaling` and the newer `rope_parameters`.

use std::fs;
use std::path::{Path, PathBuf};

use common::kv_spec::{KvDtype, KvExtentKind, KvGroup, KvSpec};
use common::tokens::Token;
use serde::Serialize;
use serde_json::Value;

use crate::config_fields::Fields;
use crate::rope::{RopeScaling, RopeSpec};

/// The architectures that are read, as `config.json` names them.
pub const SUPPORTED_ARCHITECTURES: [&str; 4] =
    ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"];

/// Layers at most; what a configuration may ask for is bounded.
const LAYERS_MAX: usize = 1024;

/// Why a configuration cannot be served. Each names the file.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("{} cannot be read: {reason}; expected a folder as it comes from the Hugging Face Hub", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// Not JSON, or not an object.
    #[error("{} is not a JSON object: {reason}", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// Where it ends being JSON.
        reason: String,
    },
    /// A field is missing or has a value that cannot be.
    #[error("{}: `{field}` is {found}, expected {expected}", path.display())]
    Field {
        /// Which file.
        path: PathBuf,
        /// Which field.
        field: String,
        /// What it says.
        found: String,
        /// What would do.
        expected: String,
    },
    /// Not one of the families.
    #[error("{}: architecture {found} is not supported; supported are {}", path.display(), SUPPORTED_ARCHITECTURES.join(", "))]
    Architecture {
        /// Which file.
        path: PathBuf,
        /// What it names.
        found: String,
    },
}

/// A decoder-only transformer: shapes and switches.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelSpec {
    /// As `config.json` names it.
    pub architecture: String,
    /// Width of the logits.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// KV heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Features of a head: even, 8 to 256, not always `hidden_size / num_heads`.
    pub head_dim: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// Rotary embedding.
    pub rope: RopeSpec,
    /// Per layer: a token sees itself and the `window - 1` before it; `None` sees all.
    pub windows: Vec<Option<u32>>,
    /// Biases on q, k and v.
    pub has_qkv_bias: bool,
    /// A bias on the attention's output projection.
    pub has_output_bias: bool,
    /// Biases in the feed-forward layers.
    pub has_mlp_bias: bool,
    /// Norms on the heads of q and k, before the rotation.
    pub has_qk_norm: bool,
    /// The embedding table is also the output projection.
    pub is_tied: bool,
    /// Longest sequence the model is meant for, scaling included, in tokens.
    pub max_position: usize,
    /// What a model may end with, from `generation_config.json`, else `config.json`. Not part of the
    /// model's identity.
    #[serde(skip)]
    pub eos_token_ids: Vec<Token>,
    /// Type of the checkpoint's weights as `config.json` states it (`torch_dtype` or `dtype`).
    #[serde(skip)]
    pub stated_dtype: Option<String>,
}

impl ModelSpec {
    /// Reads `config.json` and, if there, `generation_config.json` of a checkpoint folder.
    ///
    /// # Errors
    /// [`SpecError`]: unreadable, malformed, an unknown architecture, or a field that cannot be served.
    pub fn read(folder: &Path) -> Result<Self, SpecError> {
        let path = folder.join("config.json");
        let mut spec = Self::from_config(&path, &read_object(&path)?)?;
        let generation = folder.join("generation_config.json");
        if generation.exists() {
            let object = read_object(&generation)?;
            let ids = Fields::new(&generation, &object).token_ids("eos_token_id", spec.vocab_size)?;
            if !ids.is_empty() {
                spec.eos_token_ids = ids;
            }
        }
        Ok(spec)
    }

    /// Reads a parsed `config.json`; `path` is only named in errors.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn from_config(path: &Path, config: &Value) -> Result<Self, SpecError> {
        let fields = Fields::new(path, config);
        let architecture = architecture(&fields)?;
        let is_qwen2 = architecture == "Qwen2ForCausalLM";
        let is_qwen3 = architecture == "Qwen3ForCausalLM";
        if let Some(found) = fields.optional("quantization_config") {
            check_quantization(&fields, found)?;
        }
        let activation = fields.text("hidden_act", Some("silu"))?;
        if activation != "silu" && activation != "swish" {
            return Err(fields.error("hidden_act", &Value::from(activation), "\"silu\""));
        }
        let hidden_size = fields.count("hidden_size", None, 1..=1 << 20)?;
        let num_heads = fields.count("num_attention_heads", None, 1..=4096)?;
        let num_kv_heads = fields.count("num_key_value_heads", Some(num_heads), 1..=num_heads)?;
        if !num_heads.is_multiple_of(num_kv_heads) {
            let expected = format!("a divisor of the {num_heads} attention heads");
            return Err(fields.error("num_key_value_heads", &Value::from(num_kv_heads), &expected));
        }
        // Qwen3's default is 128, the others derive it.
        let default_head_dim = if is_qwen3 { 128 } else { hidden_size / num_heads };
        let head_dim = fields.count("head_dim", Some(default_head_dim), 1..=1 << 16)?;
        if !(8..=256).contains(&head_dim) || head_dim % 2 != 0 {
            return Err(fields.error("head_dim", &Value::from(head_dim), "an even number from 8 to 256"));
        }
        let num_layers = fields.count("num_hidden_layers", None, 1..=LAYERS_MAX)?;
        let stated_max_position = fields.count("max_position_embeddings", None, 1..=1 << 26)?;
        let rope = RopeSpec::from_config(&fields, head_dim, stated_max_position)?;
        let vocab_size = fields.count("vocab_size", None, 1..=1 << 24)?;
        // Llama's switch covers all four projections; Qwen2's biases are fixed.
        let attention_bias = fields.switch("attention_bias", false)?;
        Ok(Self {
            vocab_size,
            hidden_size,
            intermediate_size: fields.count("intermediate_size", None, 1..=1 << 24)?,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps: fields.number("rms_norm_eps", Some(1e-6))? as f32,
            windows: windows(&fields, &architecture, num_layers)?,
            has_qkv_bias: is_qwen2 || attention_bias,
            has_output_bias: !is_qwen2 && attention_bias,
            has_mlp_bias: fields.switch("mlp_bias", false)?,
            has_qk_norm: is_qwen3,
            is_tied: fields.switch("tie_word_embeddings", false)?,
            max_position: rope.scaled_max_position(stated_max_position),
            rope,
            eos_token_ids: fields.token_ids("eos_token_id", vocab_size)?,
            stated_dtype: ["torch_dtype", "dtype"]
                .iter()
                .find_map(|name| fields.optional(name).and_then(Value::as_str))
                .map(str::to_string),
            architecture,
        })
    }

    /// Transformer layers.
    pub fn num_layers(&self) -> usize {
        self.windows.len()
    }

    /// Columns of the fused q, k, v product.
    pub fn qkv_width(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// The shape of its KV cache: layers of equal window are one group.
    pub fn kv_spec(&self, dtype: KvDtype) -> KvSpec {
        let uniform = |window| {
            KvSpec::uniform(0, self.num_kv_heads as u32, self.head_dim as u32, dtype, window).groups.remove(0).planes
        };
        let mut groups: Vec<KvGroup> = Vec::new();
        for (layer, window) in self.windows.iter().enumerate() {
            match groups.iter_mut().find(|group| group.window == *window) {
                Some(group) => group.layers.push(layer as u32),
                None => groups.push(KvGroup {
                    layers: vec![layer as u32],
                    planes: uniform(*window),
                    kind: KvExtentKind::PerToken,
                    window: *window,
                }),
            }
        }
        KvSpec { groups }
    }
}

pub(crate) fn read_object(path: &Path) -> Result<Value, SpecError> {
    let bytes = fs::read(path)
        .map_err(|error| SpecError::Unreadable { path: path.to_path_buf(), reason: error.to_string() })?;
    let malformed = |reason: String| SpecError::Malformed { path: path.to_path_buf(), reason };
    let value: Value = serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
    if value.is_object() { Ok(value) } else { Err(malformed("another kind of value".to_string())) }
}

/// Of quantized checkpoints, compressed-tensors' W8A8 is read: 8-bit weights with a scale for each row,
/// activations quantized as they come. Which tensors those are is seen by their type.
fn check_quantization(fields: &Fields<'_>, found: &Value) -> Result<(), SpecError> {
    let is = |object: &Value, field: &str, value: Value| object[field] == value;
    let is_int8 = |object: &Value, strategy: &str| {
        is(object, "num_bits", 8.into())
            && is(object, "type", "int".into())
            && is(object, "symmetric", true.into())
            && is(object, "strategy", strategy.into())
    };
    let is_w8a8 = |group: &Value| {
        let (weights, activations) = (&group["weights"], &group["input_activations"]);
        is_int8(weights, "channel") && is_int8(activations, "token") && is(activations, "dynamic", true.into())
    };
    let groups = found["config_groups"].as_object();
    let is_read = found["quant_method"] == "compressed-tensors"
        && found["format"] == "int-quantized"
        && groups.is_some_and(|groups| !groups.is_empty() && groups.values().all(is_w8a8));
    let expected = "compressed-tensors with 8-bit weights per channel and dynamic 8-bit activations per token (W8A8), \
                    or none: f32, f16 and bf16 weights, or a GGUF file";
    if is_read { Ok(()) } else { Err(fields.error("quantization_config", found, expected)) }
}

fn architecture(fields: &Fields<'_>) -> Result<String, SpecError> {
    let named = fields.optional("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    let found = named.map(str::to_string).or_else(|| {
        // Some folders name only the family.
        let family = fields.optional("model_type")?.as_str()?;
        let name = match family {
            "llama" => "LlamaForCausalLM",
            "mistral" => "MistralForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            other => other,
        };
        Some(name.to_string())
    });
    match found {
        Some(found) if SUPPORTED_ARCHITECTURES.contains(&found.as_str()) => Ok(found),
        found => Err(SpecError::Architecture {
            path: fields.path().to_path_buf(),
            found: found.unwrap_or_else(|| "(neither `architectures` nor `model_type` is given)".to_string()),
        }),
    }
}

/// Which layers see only a window: Mistral's all, Qwen's from `max_window_layers` on if switched on,
/// Transformers 5 says it per layer.
fn windows(fields: &Fields<'_>, architecture: &str, num_layers: usize) -> Result<Vec<Option<u32>>, SpecError> {
    let is_qwen = architecture.starts_with("Qwen");
    let is_on = match architecture {
        "MistralForCausalLM" => true,
        _ if is_qwen => fields.switch("use_sliding_window", false)?,
        _ => false,
    };
    if !is_on || fields.is_null("sliding_window") {
        return Ok(vec![None; num_layers]);
    }
    // Absent is Transformers' default, null is none.
    let window = fields.count("sliding_window", Some(4096), 1..=u32::MAX as usize)? as u32;
    if let Some(types) = fields.optional("layer_types") {
        let expected = format!("a list of {num_layers} of \"full_attention\" and \"sliding_attention\"");
        let error = || fields.error("layer_types", types, &expected);
        let types = types.as_array().filter(|types| types.len() == num_layers).ok_or_else(error)?;
        return types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => Ok(Some(window)),
                _ => Err(error()),
            })
            .collect();
    }
    let first = if is_qwen { fields.count("max_window_layers", Some(28), 0..=1 << 20)? } else { 0 };
    Ok((0..num_layers).map(|layer| (layer >= first).then_some(window)).collect())
}

impl RopeSpec {
    /// Reads `rope_parameters`, or `rope_theta` with `rope_scaling`.
    fn from_config(fields: &Fields<'_>, head_dim: usize, max_position: usize) -> Result<Self, SpecError> {
        let object = ["rope_parameters", "rope_scaling"]
            .into_iter()
            .find_map(|name| fields.optional(name).map(|object| (name, object)));
        let Some((name, object)) = object else {
            let theta = fields.number("rope_theta", Some(10_000.0))?;
            return Ok(RopeSpec { theta, rotated_dim: head_dim, scaling: RopeScaling::None });
        };
        if !object.is_object() {
            return Err(fields.error(name, object, "an object"));
        }
        let inner = fields.inside(name, object);
        let theta = inner.number("rope_theta", Some(fields.number("rope_theta", Some(10_000.0))?))?;
        let partial = inner.number("partial_rotary_factor", Some(1.0))?;
        if partial != 1.0 {
            return Err(inner.error("partial_rotary_factor", &Value::from(partial), "1"));
        }
        let kind = match inner.optional("rope_type").or_else(|| inner.optional("type")) {
            None => "default",
            Some(kind) => kind.as_str().ok_or_else(|| inner.error("rope_type", kind, "text"))?,
        };
        let factor = |default| inner.number_in("factor", default, 1.0..=1e6);
        let original = || inner.count("original_max_position_embeddings", Some(max_position), 1..=1 << 26);
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: factor(None)? },
            "dynamic" => {
                factor(None)?;
                RopeScaling::Dynamic
            }
            "llama3" => RopeScaling::Llama3 {
                factor: factor(None)?,
                low_freq_factor: inner.number_in("low_freq_factor", Some(1.0), 1e-6..=1e6)?,
                high_freq_factor: inner.number_in("high_freq_factor", Some(4.0), 1e-6..=1e6)?,
                original_max_position: original()?,
            },
            "yarn" => {
                let original_max_position = original()?;
                RopeScaling::Yarn {
                    factor: factor(Some((max_position as f64 / original_max_position as f64).max(1.0)))?,
                    original_max_position,
                    beta_fast: inner.number_in("beta_fast", Some(32.0), 1e-6..=1e6)?,
                    beta_slow: inner.number_in("beta_slow", Some(1.0), 1e-6..=1e6)?,
                    is_truncated: inner.switch("truncate", true)?,
                    attention_factor: inner.optional_number("attention_factor")?,
                    mscale: inner.optional_number("mscale")?,
                    mscale_all_dim: inner.optional_number("mscale_all_dim")?,
                }
            }
            other => {
                let expected = "one of default, linear, dynamic, llama3, yarn";
                return Err(inner.error("rope_type", &Value::from(other), expected));
            }
        };
        Ok(RopeSpec { theta, rotated_dim: head_dim, scaling })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(extra: Value) -> Value {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_attention_heads": 4, "num_hidden_layers": 3, "max_position_embeddings": 512, "vocab_size": 100,
        });
        for (key, value) in extra.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    fn read(extra: Value) -> Result<ModelSpec, SpecError> {
        ModelSpec::from_config(Path::new("m/config.json"), &config(extra))
    }

    fn sentence(extra: Value) -> String {
        read(extra).unwrap_err().to_string()
    }

    #[test]
    fn what_is_not_said_has_the_family_s_default() {
        let spec = read(json!({})).unwrap();
        assert_eq!((spec.num_kv_heads, spec.head_dim, spec.num_layers()), (4, 16, 3));
        assert_eq!(spec.rope, RopeSpec { theta: 10_000.0, rotated_dim: 16, scaling: RopeScaling::None });
        assert!(!spec.has_qkv_bias && !spec.has_qk_norm && !spec.is_tied && spec.eos_token_ids.is_empty());
    }

    #[test]
    fn both_spellings_of_rope_are_read() {
        let scaling = json!({"type": "linear", "factor": 4.0});
        let older = read(json!({"rope_theta": 5e5, "rope_scaling": scaling})).unwrap();
        let newer = json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4}});
        assert_eq!(older, read(newer).unwrap());
        assert_eq!(older.rope.scaling, RopeScaling::Linear { factor: 4.0 });
        assert_eq!(older.max_position, 2048);
    }

    #[test]
    fn windows_follow_the_switch_and_the_first_window_layer() {
        let qwen = |extra: Value| {
            let mut all = json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16, "max_window_layers": 1});
            all.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            read(all).unwrap().windows
        };
        assert_eq!(qwen(json!({"use_sliding_window": false})), [None, None, None]);
        assert_eq!(qwen(json!({"use_sliding_window": true})), [None, Some(16), Some(16)]);
        let types = json!(["sliding_attention", "full_attention", "full_attention"]);
        assert_eq!(qwen(json!({"use_sliding_window": true, "layer_types": types})), [Some(16), None, None]);
        let mistral = json!({"architectures": ["MistralForCausalLM"], "sliding_window": 24});
        let spec = read(mistral).unwrap();
        assert_eq!(spec.windows, [Some(24); 3]);
        assert_eq!(spec.kv_spec(KvDtype::F32).groups.len(), 1);
        assert_eq!(read(json!({"sliding_window": 24})).unwrap().windows, [None; 3]);
        let mistral = |window: Value| json!({"architectures": ["MistralForCausalLM"], "sliding_window": window});
        assert_eq!(read(mistral(Value::Null)).unwrap().windows, [None; 3]);
        assert_eq!(read(json!({"architectures": ["MistralForCausalLM"]})).unwrap().windows, [Some(4096); 3]);
    }

    #[test]
    fn a_mixed_model_has_a_group_of_layers_per_window() {
        let spec = read(json!({
            "architectures": ["Qwen2ForCausalLM"], "sliding_window": 16, "max_window_layers": 1, "use_sliding_window": true
        }))
        .unwrap();
        let kv = spec.kv_spec(KvDtype::Bf16);
        let groups: Vec<_> = kv.groups.iter().map(|group| (group.layers.clone(), group.window)).collect();
        assert_eq!(groups, [(vec![0], None), (vec![1, 2], Some(16))]);
        assert_eq!(kv.bytes_per_token(), 3 * 2 * 4 * 16 * 2);
    }

    #[test]
    fn what_cannot_be_served_is_said_in_a_sentence() {
        assert_eq!(
            sentence(json!({"architectures": ["GPT2LMHeadModel"]})),
            "m/config.json: architecture GPT2LMHeadModel is not supported; supported are LlamaForCausalLM, \
             MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
        );
        assert_eq!(
            sentence(json!({"num_key_value_heads": 3})),
            "m/config.json: `num_key_value_heads` is 3, expected a divisor of the 4 attention heads"
        );
        assert_eq!(
            sentence(json!({"hidden_size": "big"})),
            "m/config.json: `hidden_size` is \"big\", expected a whole number from 1 to 1048576"
        );
        assert_eq!(
            sentence(json!({"vocab_size": null})),
            "m/config.json: `vocab_size` is missing, expected a whole number from 1 to 16777216"
        );
        assert_eq!(
            sentence(json!({"rope_scaling": {"rope_type": "longrope"}})),
            "m/config.json: `rope_scaling.rope_type` is \"longrope\", expected one of default, linear, dynamic, llama3, yarn"
        );
        assert!(sentence(json!({"head_dim": 7})).ends_with("an even number from 8 to 256"));
        assert!(sentence(json!({"hidden_act": "gelu"})).contains("`hidden_act` is \"gelu\""));
        assert!(sentence(json!({"quantization_config": {"bits": 4}})).contains("quantization_config"));
        assert!(sentence(json!({"eos_token_id": 100})).contains("below 100"));
    }

    #[test]
    fn end_tokens_are_one_or_several() {
        assert_eq!(read(json!({"eos_token_id": 7})).unwrap().eos_token_ids, [7]);
        assert_eq!(read(json!({"eos_token_id": [7, 8]})).unwrap().eos_token_ids, [7, 8]);
    }
}
