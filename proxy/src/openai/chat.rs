//! `/v1/chat/completions`: from JSON to a [`ValidatedRequest`].

use common::sampling::LOGPROBS_MAX;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::{Fields, kind_of};
use super::request::{ChatPrompt, Endpoint, Prompt, ValidatedRequest};
use super::sampling::{parse_cache_salt, parse_n, parse_sampling, parse_stop, parse_stream, refuse_unsupported};

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Checks a chat request.
///
/// # Errors
/// Names the first parameter that is wrong or that would change the answer and is not supported.
pub fn parse_chat(body: &Value) -> Result<ValidatedRequest, ApiError> {
    let fields = Fields::of_body(body)?;
    let prompt = parse_chat_prompt(&fields)?;
    refuse_unsupported(&fields)?;
    let mut sampling = parse_sampling(&fields)?;
    for param in ["max_completion_tokens", "max_tokens"] {
        if sampling.max_tokens.is_none()
            && let Some(max) = fields.integer(param, 1..=i64::from(u32::MAX))?
        {
            (sampling.max_tokens, sampling.max_tokens_param) = (Some(max as u32), param);
        }
    }
    sampling.logprobs = parse_logprobs(&fields)?;
    let (stream, stream_options) = parse_stream(&fields)?;
    Ok(ValidatedRequest {
        model: fields.string("model")?.map(str::to_string),
        endpoint: Endpoint::Chat,
        prompts: vec![Prompt::Chat(prompt)],
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

/// The part of a request that the chat template sees; `/tokenize` reads the same.
///
/// # Errors
/// As [`parse_chat`].
pub fn parse_chat_prompt(fields: &Fields<'_>) -> Result<ChatPrompt, ApiError> {
    let messages = match fields.required("messages")? {
        Value::Array(items) if items.is_empty() => {
            return Err(ApiError::invalid("messages", "messages is empty, expected at least one message"));
        }
        Value::Array(items) => {
            items.iter().enumerate().map(|(i, item)| parse_message(i, item)).collect::<Result<Vec<_>, _>>()?
        }
        other => return Err(ApiError::invalid("messages", format!("messages is {}, expected a list", kind_of(other)))),
    };
    if fields.boolean("continue_final_message", false)? {
        return Err(ApiError::invalid("continue_final_message", "continue_final_message is not supported"));
    }
    let mut variables = match fields.value("chat_template_kwargs") {
        None => Map::new(),
        Some(value) => Fields::at("chat_template_kwargs", value)?.map().clone(),
    };
    if let Some(effort) = fields.string("reasoning_effort")? {
        variables.entry("reasoning_effort").or_insert_with(|| effort.into());
    }
    Ok(ChatPrompt {
        messages,
        tools: parse_tools(fields)?,
        add_generation_prompt: fields.boolean("add_generation_prompt", true)?,
        variables,
        add_special_tokens: fields.boolean("add_special_tokens", false)?,
    })
}

fn parse_message(index: usize, item: &Value) -> Result<Value, ApiError> {
    let path = format!("messages[{index}]");
    let fields = Fields::at(&path, item)?;
    let role = fields.string("role")?.ok_or_else(|| {
        let param = fields.path_of("role");
        ApiError::invalid(&param, format!("{param} is missing, expected one of {}", ROLES.join(", ")))
    })?;
    if !ROLES.contains(&role) {
        let param = fields.path_of("role");
        return Err(ApiError::invalid(&param, format!("{param} is \"{role}\", expected one of {}", ROLES.join(", "))));
    }
    let mut message = fields.map().clone();
    let content = match fields.value("content") {
        None if role == "assistant" => Value::Null,
        None => {
            let param = fields.path_of("content");
            return Err(ApiError::invalid(&param, format!("{param} is missing: a {role} message needs text")));
        }
        Some(Value::String(text)) => Value::String(text.clone()),
        Some(Value::Array(parts)) => parse_parts(&fields.path_of("content"), parts)?,
        Some(other) => {
            let param = fields.path_of("content");
            let message = format!("{param} is {}, expected a string or a list of text parts", kind_of(other));
            return Err(ApiError::invalid(&param, message));
        }
    };
    message.insert("content".into(), content);
    if let Some(calls) = fields.value("tool_calls") {
        let path = fields.path_of("tool_calls");
        message.insert("tool_calls".into(), parse_tool_calls(&path, calls)?);
    } else {
        // Templates ask whether it is there, not whether it is null.
        message.remove("tool_calls");
    }
    Ok(Value::Object(message))
}

/// A message given as parts, as a list of `{"type": "text", "text": ...}`; the template's side makes of it
/// what the template expects.
fn parse_parts(path: &str, parts: &[Value]) -> Result<Value, ApiError> {
    let mut texts: Vec<Value> = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let path = format!("{path}[{i}]");
        let part = Fields::at(&path, part)?;
        let param = match part.string("type")?.unwrap_or("text") {
            "text" | "input_text" | "output_text" => "text",
            "refusal" => "refusal",
            other => {
                let param = part.path_of("type");
                return Err(ApiError::invalid(
                    &param,
                    format!("{param} is \"{other}\": this model takes text only, expected \"text\""),
                ));
            }
        };
        part.required(param)?;
        texts.extend(part.string(param)?.map(|text| json!({"type": "text", "text": text})));
    }
    Ok(Value::Array(texts))
}

/// Calls the assistant made earlier. Their arguments are JSON in a string in OpenAI's API; templates
/// expect the object.
fn parse_tool_calls(path: &str, calls: &Value) -> Result<Value, ApiError> {
    let Value::Array(calls) = calls else {
        return Err(ApiError::invalid(path, format!("{path} is {}, expected a list", kind_of(calls))));
    };
    let mut calls = calls.clone();
    for (i, call) in calls.iter_mut().enumerate() {
        let path = format!("{path}[{i}].function");
        let function = call.get_mut("function").and_then(Value::as_object_mut);
        let Some(function) = function else {
            return Err(ApiError::invalid(&path, format!("{path} is missing, expected the function that was called")));
        };
        let parsed = match function.get("arguments") {
            Some(Value::String(text)) => serde_json::from_str::<Map<String, Value>>(text).ok(),
            _ => None,
        };
        if let Some(parsed) = parsed {
            function.insert("arguments".into(), Value::Object(parsed));
        }
    }
    Ok(Value::Array(calls))
}

fn parse_tools(fields: &Fields<'_>) -> Result<Option<Vec<Value>>, ApiError> {
    let tools = match fields.value("tools") {
        None => None,
        Some(Value::Array(tools)) => {
            for (i, tool) in tools.iter().enumerate() {
                let path = format!("tools[{i}]");
                let tool = Fields::at(&path, tool)?;
                let kind = tool.string("type")?.unwrap_or("function");
                if kind != "function" {
                    let param = tool.path_of("type");
                    return Err(ApiError::invalid(&param, format!("{param} is \"{kind}\", expected \"function\"")));
                }
                let function = tool.path_of("function");
                let function = Fields::at(&function, tool.required("function")?)?;
                function.required("name")?;
                function.string("name")?;
            }
            (!tools.is_empty()).then(|| tools.clone())
        }
        Some(other) => return Err(ApiError::invalid("tools", format!("tools is {}, expected a list", kind_of(other)))),
    };
    match fields.value("tool_choice") {
        None => Ok(tools),
        Some(Value::String(choice)) if choice == "auto" => Ok(tools),
        Some(Value::String(choice)) if choice == "none" => Ok(None),
        Some(other) => Err(ApiError::invalid(
            "tool_choice",
            format!("tool_choice {other} is not supported yet, expected \"auto\" or \"none\""),
        )),
    }
}

fn parse_logprobs(fields: &Fields<'_>) -> Result<Option<u32>, ApiError> {
    let wanted = fields.boolean("logprobs", false)?;
    let top = fields.integer("top_logprobs", 0..=i64::from(LOGPROBS_MAX))?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0) as u32)),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(mut extra: Value) -> Result<ValidatedRequest, ApiError> {
        let body = extra.as_object_mut().unwrap();
        body.entry("messages").or_insert(json!([{"role": "user", "content": "hi"}]));
        body.entry("model").or_insert("m".into());
        parse_chat(&extra)
    }

    fn messages(request: ValidatedRequest) -> Vec<Value> {
        match request.prompts.into_iter().next() {
            Some(Prompt::Chat(prompt)) => prompt.messages,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn content_parts_of_all_names_become_text_parts() {
        let parts = json!([{"type": "input_text", "text": "a"}, {"text": "b"}, {"type": "refusal", "refusal": "c"}]);
        let request = chat(json!({"messages": [{"role": "user", "content": parts}]})).unwrap();
        let text = |text: &str| json!({"type": "text", "text": text});
        assert_eq!(messages(request)[0]["content"], json!([text("a"), text("b"), text("c")]));
    }

    #[test]
    fn tool_call_arguments_become_an_object() {
        let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}});
        let request = chat(json!({"messages": [{"role": "assistant", "tool_calls": [call]}]})).unwrap();
        let message = &messages(request)[0];
        assert_eq!(message["content"], Value::Null);
        assert_eq!(message["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
    }

    #[test]
    fn the_wrong_parameter_is_named_by_its_path() {
        for (body, param) in [
            (json!({"messages": null}), "messages"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": "hi"}), "messages"),
            (json!({"messages": [{"content": "x"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "king", "content": "x"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
            (json!({"messages": [{"role": "user", "content": 3}]}), "messages[0].content"),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
                "messages[0].content[0].type",
            ),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"max_completion_tokens": -1}), "max_completion_tokens"),
            (json!({"n": 0}), "n"),
            (json!({"top_logprobs": 2}), "top_logprobs"),
            (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
            (json!({"logprobs": 3}), "logprobs"),
            (json!({"stream_options": {"include_usage": true}}), "stream_options"),
            (json!({"stream": true, "stream_options": {"include_timeline": 1}}), "stream_options.include_timeline"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
            (json!({"model": 3}), "model"),
            (json!({"cache_salt": ""}), "cache_salt"),
        ] {
            assert_eq!(chat(body.clone()).unwrap_err().param.as_deref(), Some(param), "{body}");
        }
    }

    #[test]
    fn newer_name_of_the_token_limit_wins() {
        let request = chat(json!({"max_tokens": 5, "max_completion_tokens": 7})).unwrap();
        assert_eq!(request.sampling.max_tokens, Some(7));
        assert_eq!(request.sampling.max_tokens_param, "max_completion_tokens");
    }

    #[test]
    fn tool_choice_none_hides_the_tools_from_the_template() {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let prompt = |choice: &str| match &chat(json!({"tools": tools, "tool_choice": choice})).unwrap().prompts[0] {
            Prompt::Chat(prompt) => prompt.tools.clone(),
            other => panic!("{other:?}"),
        };
        assert!(prompt("auto").is_some());
        assert!(prompt("none").is_none());
    }
}
