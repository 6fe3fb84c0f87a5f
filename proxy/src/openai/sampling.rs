//! The parameters that both endpoints share.

use common::sampling::{LOGIT_BIAS_MAX, STOP_TOKEN_IDS_MAX};
use serde_json::Value;

use super::error::ApiError;
use super::fields::Fields;
use super::request::{N_MAX, STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX, SamplingRequest, StreamOptions};

/// Longest `cache_salt`.
const SALT_BYTES_MAX: usize = 1024;

/// Reads the sampling parameters that mean the same in both endpoints; `max_tokens` and `logprobs` do not.
///
/// # Errors
/// Names the first parameter that is wrong.
pub fn parse_sampling(fields: &Fields<'_>) -> Result<SamplingRequest, ApiError> {
    let top_p = fields.number("top_p", 0.0..=1.0)?;
    if top_p == Some(0.0) {
        return Err(ApiError::invalid("top_p", "top_p is 0, expected above 0, to 1 (0 would keep no token)"));
    }
    // -1 is vLLM's older spelling of "all".
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| k.max(0) as u32);
    let repetition_penalty = fields.number("repetition_penalty", 0.0..=100.0)?;
    if repetition_penalty == Some(0.0) {
        return Err(ApiError::invalid("repetition_penalty", "repetition_penalty is 0, expected above 0"));
    }
    Ok(SamplingRequest {
        temperature: fields.number("temperature", 0.0..=2.0)?,
        top_p,
        top_k,
        min_p: fields.number("min_p", 0.0..=1.0)?,
        repetition_penalty,
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        logit_bias: parse_logit_bias(fields)?,
        seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64),
        stop_token_ids: fields.token_ids("stop_token_ids", STOP_TOKEN_IDS_MAX / 2)?.unwrap_or_default(),
        ignore_eos: fields.boolean("ignore_eos", false)?,
        min_tokens: fields.integer("min_tokens", 0..=i64::from(u32::MAX))?.unwrap_or(0) as u32,
        max_tokens: None,
        max_tokens_default: u32::MAX,
        max_tokens_param: "max_tokens",
        logprobs: None,
    })
}

fn parse_logit_bias(fields: &Fields<'_>) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(value) = fields.value("logit_bias") else { return Ok(Vec::new()) };
    let entries = Fields::at("logit_bias", value)?;
    if entries.map().len() > LOGIT_BIAS_MAX {
        let message = format!("logit_bias has {} entries, at most {LOGIT_BIAS_MAX}", entries.map().len());
        return Err(ApiError::invalid("logit_bias", message));
    }
    let mut biases = Vec::with_capacity(entries.map().len());
    for key in entries.map().keys() {
        let Ok(token) = key.parse::<u32>() else {
            return Err(ApiError::invalid("logit_bias", format!("logit_bias has key \"{key}\", expected a token id")));
        };
        let Some(bias) = entries.number(key, -100.0..=100.0).map_err(|e| e.with_param("logit_bias"))? else { continue };
        biases.push((token, bias));
    }
    // Two spellings of one id ("7" and "07") would be added twice.
    biases.sort_by_key(|(token, _)| *token);
    if let Some(pair) = biases.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(ApiError::invalid("logit_bias", format!("logit_bias names token {} twice", pair[0].0)));
    }
    Ok(biases)
}

/// `n`, and `best_of` where it is the same.
///
/// # Errors
/// Out of range, or a `best_of` that would mean another algorithm.
pub fn parse_n(fields: &Fields<'_>) -> Result<u32, ApiError> {
    let n = fields.integer("n", 1..=N_MAX)?.unwrap_or(1);
    match fields.integer("best_of", 1..=N_MAX)? {
        Some(best_of) if best_of != n => Err(ApiError::invalid(
            "best_of",
            format!("best_of is {best_of} and n is {n}: generating more answers than are returned is not supported"),
        )),
        _ => Ok(n as u32),
    }
}

/// `stop`: a string or a list of them.
///
/// # Errors
/// Something else, too many, too long or empty ones.
pub fn parse_stop(fields: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    let items = match fields.value("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(items)) => items
            .iter()
            .map(|item| item.as_str().map(str::to_string))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| ApiError::invalid("stop", "stop holds something else than strings"))?,
        Some(_) => return Err(ApiError::invalid("stop", "stop is neither a string nor a list of strings")),
    };
    if items.len() > STOP_STRINGS_MAX {
        return Err(ApiError::invalid("stop", format!("stop has {} strings, at most {STOP_STRINGS_MAX}", items.len())));
    }
    if items.iter().any(String::is_empty) {
        return Err(ApiError::invalid("stop", "stop holds an empty string, which would end every answer at once"));
    }
    if items.iter().any(|s| s.len() > STOP_STRING_BYTES_MAX) {
        let message = format!("stop holds a string of more than {STOP_STRING_BYTES_MAX} bytes");
        return Err(ApiError::invalid("stop", message));
    }
    Ok(items)
}

/// `stream` and `stream_options`.
///
/// # Errors
/// Wrong types, or options without a stream.
pub fn parse_stream(fields: &Fields<'_>) -> Result<(bool, StreamOptions), ApiError> {
    let stream = fields.boolean("stream", false)?;
    let Some(options) = fields.value("stream_options") else { return Ok((stream, StreamOptions::default())) };
    if !stream {
        return Err(ApiError::invalid("stream_options", "stream_options is only allowed when stream is true"));
    }
    let options = Fields::at("stream_options", options)?;
    let include_usage = options.boolean("include_usage", false)?;
    let continuous_usage_stats = options.boolean("continuous_usage_stats", false)? && include_usage;
    let include_timeline = options.boolean("include_timeline", false)? && include_usage;
    Ok((stream, StreamOptions { include_usage, continuous_usage_stats, include_timeline }))
}

/// `cache_salt`: a non-empty string.
///
/// # Errors
/// Something else.
pub fn parse_cache_salt(fields: &Fields<'_>) -> Result<Option<String>, ApiError> {
    match fields.string("cache_salt")? {
        Some("") => Err(ApiError::invalid("cache_salt", "cache_salt is empty: leave it out or give it a value")),
        Some(salt) if salt.len() > SALT_BYTES_MAX => {
            Err(ApiError::invalid("cache_salt", format!("cache_salt exceeds {SALT_BYTES_MAX} bytes")))
        }
        salt => Ok(salt.map(str::to_string)),
    }
}

/// Parameters of OpenAI and vLLM that would change the answer and that nothing here implements: refused
/// in words, since an answer that ignored them would be wrong without anyone noticing.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("structured_outputs", "structured output is not supported yet"),
    ("guided_json", "structured output is not supported yet"),
    ("guided_regex", "structured output is not supported yet"),
    ("guided_choice", "structured output is not supported yet"),
    ("guided_grammar", "structured output is not supported yet"),
    ("prompt_logprobs", "log probabilities of prompt tokens are not supported"),
    ("truncate_prompt_tokens", "truncating prompts is not supported: shorten the prompt"),
    ("bad_words", "bad_words is not supported: use logit_bias"),
    ("allowed_token_ids", "allowed_token_ids is not supported: use logit_bias"),
    ("return_token_ids", "return_token_ids is not supported: /tokenize gives the ids of a text"),
    ("return_tokens_as_token_ids", "tokens are shown as text: /tokenize gives the ids of a text"),
    ("logits_processors", "logits processors are not supported"),
    ("length_penalty", "beam search is not supported"),
    ("functions", "functions is OpenAI's former name of tools: use tools"),
    ("function_call", "function_call is OpenAI's former name of tool_choice: use tools"),
    ("audio", "audio output is not supported"),
    ("web_search_options", "web search is not supported"),
    ("mm_processor_kwargs", "multimodal input is not supported"),
    ("chat_template", "a chat template in the request is not supported: the model's own is used"),
    ("documents", "documents is not supported: put their text into a message"),
    ("prompt_embeds", "prompt embeddings are not supported"),
    ("suffix", "suffix (filling in the middle) is not supported"),
];

/// Refuses what is known, changes the answer and is not implemented.
///
/// # Errors
/// Names the first such parameter.
pub fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ApiError> {
    for (name, reason) in UNSUPPORTED {
        let is_asked_for = match fields.value(name) {
            None | Some(Value::Bool(false)) => false,
            Some(Value::Array(items)) => !items.is_empty(),
            Some(Value::String(text)) => !text.is_empty(),
            Some(Value::Number(number)) if *name == "length_penalty" => number.as_f64() != Some(1.0),
            Some(_) => true,
        };
        if is_asked_for {
            return Err(ApiError::invalid(*name, *reason));
        }
    }
    if fields.boolean("use_beam_search", false)? {
        return Err(ApiError::invalid("use_beam_search", "beam search is not supported"));
    }
    if let Some(format) = fields.value("response_format") {
        let format = Fields::at("response_format", format)?;
        let kind = format.string("type")?.unwrap_or("text");
        if kind != "text" {
            let message = format!("response_format.type \"{kind}\" is not supported yet: only \"text\" is");
            return Err(ApiError::invalid("response_format", message));
        }
    }
    if let Some(Value::Array(modalities)) = fields.value("modalities")
        && modalities.iter().any(|m| m != "text")
    {
        return Err(ApiError::invalid("modalities", "only the modality \"text\" is supported"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn param_of<T: std::fmt::Debug>(result: Result<T, ApiError>) -> Option<String> {
        result.unwrap_err().param
    }

    #[test]
    fn every_bad_sampling_value_is_named() {
        for (body, param) in [
            (json!({"temperature": 2.1}), "temperature"),
            (json!({"temperature": -0.1}), "temperature"),
            (json!({"top_p": 0}), "top_p"),
            (json!({"min_p": 1.5}), "min_p"),
            (json!({"top_k": -2}), "top_k"),
            (json!({"repetition_penalty": 0}), "repetition_penalty"),
            (json!({"frequency_penalty": 3}), "frequency_penalty"),
            (json!({"presence_penalty": "x"}), "presence_penalty"),
            (json!({"logit_bias": {"a": 1}}), "logit_bias"),
            (json!({"logit_bias": {"1": 101}}), "logit_bias"),
            (json!({"logit_bias": {"1": 1, "01": 1}}), "logit_bias"),
            (json!({"seed": "x"}), "seed"),
            (json!({"stop_token_ids": [-1]}), "stop_token_ids"),
            (json!({"min_tokens": -1}), "min_tokens"),
        ] {
            assert_eq!(param_of(parse_sampling(&Fields::of_body(&body).unwrap())).as_deref(), Some(param), "{body}");
        }
    }

    #[test]
    fn what_would_change_the_answer_is_refused_and_the_harmless_is_not() {
        for (body, param) in [
            (json!({"response_format": {"type": "json_schema"}}), "response_format"),
            (json!({"guided_choice": ["a"]}), "guided_choice"),
            (json!({"use_beam_search": true}), "use_beam_search"),
            (json!({"modalities": ["text", "audio"]}), "modalities"),
            (json!({"suffix": "x"}), "suffix"),
            (json!({"return_token_ids": true}), "return_token_ids"),
        ] {
            assert_eq!(param_of(refuse_unsupported(&Fields::of_body(&body).unwrap())).as_deref(), Some(param));
        }
        let harmless = json!({"response_format": {"type": "text"}, "user": "u", "store": true, "metadata": {},
            "service_tier": "auto", "guided_json": null, "length_penalty": 1.0, "bad_words": [], "suffix": ""});
        refuse_unsupported(&Fields::of_body(&harmless).unwrap()).unwrap();
    }

    #[test]
    fn stop_is_a_string_or_a_list() {
        let stop = |value: Value| parse_stop(&Fields::of_body(&json!({"stop": value})).unwrap());
        assert_eq!(stop(json!("a")).unwrap(), ["a"]);
        assert_eq!(stop(json!(["a", "b"])).unwrap(), ["a", "b"]);
        assert!(stop(json!(null)).unwrap().is_empty());
        for bad in [json!(""), json!([1]), json!(7), json!(vec!["x"; 17]), json!("x".repeat(2000))] {
            assert_eq!(param_of(stop(bad)).as_deref(), Some("stop"));
        }
    }
}
