//! `/v1/completions`: from JSON to a [`ValidatedRequest`].

use common::sampling::LOGPROBS_MAX;
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, kind_of, parse_token_ids};
use super::request::{Endpoint, PROMPTS_MAX, Prompt, ValidatedRequest};
use super::sampling::{parse_cache_salt, parse_n, parse_sampling, parse_stop, parse_stream, refuse_unsupported};

/// OpenAI's default of `max_tokens` at this endpoint.
const MAX_TOKENS_DEFAULT: u32 = 16;

/// Checks a completion request.
///
/// # Errors
/// Names the first parameter that is wrong or that would change the answer and is not supported.
pub fn parse_completions(body: &Value) -> Result<ValidatedRequest, ApiError> {
    let fields = Fields::of_body(body)?;
    let add_special_tokens = fields.boolean("add_special_tokens", true)?;
    let prompts = parse_prompts(fields.required("prompt")?, add_special_tokens)?;
    refuse_unsupported(&fields)?;
    let mut sampling = parse_sampling(&fields)?;
    let max_tokens = fields.integer("max_tokens", 0..=i64::from(u32::MAX))?;
    if max_tokens == Some(0) {
        return Err(ApiError::invalid("max_tokens", "max_tokens is 0, expected at least 1"));
    }
    sampling.max_tokens = max_tokens.map(|max| max as u32);
    sampling.max_tokens_default = MAX_TOKENS_DEFAULT;
    sampling.logprobs = fields.integer("logprobs", 0..=i64::from(LOGPROBS_MAX))?.map(|k| k as u32);
    let echo = fields.boolean("echo", false)?;
    if echo && sampling.logprobs.is_some() {
        return Err(ApiError::invalid(
            "echo",
            "echo with logprobs is not supported: prompt tokens have no logprobs here",
        ));
    }
    let (stream, stream_options) = parse_stream(&fields)?;
    Ok(ValidatedRequest {
        model: fields.string("model")?.map(str::to_string),
        endpoint: Endpoint::Completions { echo },
        prompts,
        sampling,
        n: parse_n(&fields)?,
        stop: parse_stop(&fields)?,
        include_stop_string: fields.boolean("include_stop_str_in_output", false)?,
        skip_special_tokens: fields.boolean("skip_special_tokens", true)?,
        stream,
        stream_options,
        cache_salt: parse_cache_salt(&fields)?,
    })
}

/// A string, a list of strings, a list of token ids, or a list of lists of token ids.
fn parse_prompts(value: &Value, add_special_tokens: bool) -> Result<Vec<Prompt>, ApiError> {
    let text = |text: &str| Prompt::Text { text: text.to_string(), add_special_tokens };
    let tokens = |path: &str, items: &[Value]| {
        if items.is_empty() {
            return Err(ApiError::invalid("prompt", format!("{path} is empty, expected at least one token")));
        }
        parse_token_ids(path, items).map(Prompt::Tokens).map_err(|e| e.with_param("prompt"))
    };
    let items = match value {
        Value::String(one) => return Ok(vec![text(one)]),
        Value::Array(items) => items,
        other => {
            let message = format!("prompt is {}, expected a string, a list of strings, or token ids", kind_of(other));
            return Err(ApiError::invalid("prompt", message));
        }
    };
    match items.first() {
        None => Err(ApiError::invalid("prompt", "prompt is empty, expected at least one")),
        Some(Value::Number(_)) => Ok(vec![tokens("prompt", items)?]),
        Some(_) if items.len() > PROMPTS_MAX => {
            Err(ApiError::invalid("prompt", format!("prompt lists {} prompts, at most {PROMPTS_MAX}", items.len())))
        }
        Some(_) => items
            .iter()
            .enumerate()
            .map(|(i, item)| match item {
                Value::String(one) => Ok(text(one)),
                Value::Array(ids) => tokens(&format!("prompt[{i}]"), ids),
                other => {
                    let message = format!("prompt[{i}] is {}, expected a string or token ids", kind_of(other));
                    Err(ApiError::invalid("prompt", message))
                }
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn prompts(prompt: Value) -> Result<Vec<Prompt>, ApiError> {
        parse_completions(&json!({"model": "m", "prompt": prompt})).map(|request| request.prompts)
    }

    #[test]
    fn a_prompt_is_text_or_tokens_one_or_many() {
        let text = |s: &str| Prompt::Text { text: s.into(), add_special_tokens: true };
        assert_eq!(prompts(json!("a")).unwrap(), [text("a")]);
        assert_eq!(prompts(json!(["a", "b"])).unwrap(), [text("a"), text("b")]);
        assert_eq!(prompts(json!([1, 2])).unwrap(), [Prompt::Tokens(vec![1, 2])]);
        assert_eq!(prompts(json!([[1], [2, 3]])).unwrap(), [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]);
        for bad in [json!([]), json!(3), json!([1, "a"]), json!([[]]), json!([-1]), json!([{"a": 1}]), json!(null)] {
            assert_eq!(prompts(bad.clone()).unwrap_err().param.as_deref(), Some("prompt"), "{bad}");
        }
    }

    #[test]
    fn sixteen_tokens_unless_told() {
        let request = parse_completions(&json!({"prompt": "a"})).unwrap();
        assert_eq!((request.sampling.max_tokens, request.sampling.max_tokens_default), (None, 16));
    }

    #[test]
    fn suffix_and_a_larger_best_of_are_refused() {
        for (body, param) in [
            (json!({"prompt": "a", "suffix": "x"}), "suffix"),
            (json!({"prompt": "a", "best_of": 2}), "best_of"),
            (json!({"prompt": "a", "echo": true, "logprobs": 1}), "echo"),
            (json!({"prompt": "a", "max_tokens": 0}), "max_tokens"),
            (json!({"model": "m"}), "prompt"),
        ] {
            assert_eq!(parse_completions(&body).unwrap_err().param.as_deref(), Some(param));
        }
        parse_completions(&json!({"prompt": "a", "best_of": 2, "n": 2})).unwrap();
    }
}
