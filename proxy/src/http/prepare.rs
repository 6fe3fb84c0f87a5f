//! From a validated request to what is dispatched: names checked, prompts encoded, limits known.

use std::sync::Arc;

use common::ids::RequestId;
use common::model::ModelInfo;
use common::sampling::SamplingParams;
use tokio::time::Instant;

use super::admission::{Tenant, tenant_salt};
use super::app::App;
use crate::dispatch::DispatchRequest;
use crate::openai::{ApiError, Endpoint, ErrorKind, Prompt, SamplingRequest, ValidatedRequest};

/// One prompt, ready to go.
#[derive(Debug)]
pub struct PreparedPrompt {
    /// For the dispatch.
    pub request: DispatchRequest,
    /// Its text, for `echo`.
    pub text: Option<String>,
}

/// The name under which the model answers.
///
/// # Errors
/// 404 if the client asked for another model.
pub fn check_model_name(app: &App, asked: Option<&str>) -> Result<String, ApiError> {
    let names = &app.settings.model_names;
    match asked {
        Some(asked) if !names.iter().any(|name| name == asked) => {
            let message =
                format!("the model \"{asked}\" does not exist here: this endpoint serves {}", names.join(", "));
            Err(ApiError::new(ErrorKind::ModelNotFound, message).with_param("model"))
        }
        Some(asked) => Ok(asked.to_string()),
        None => Ok(names[0].clone()),
    }
}

/// Encodes the prompts of a request and settles every sampling parameter.
///
/// # Errors
/// 503 while no decode node is known; 400 if a prompt does not fit the model or its vocabulary.
pub async fn prepare(
    app: &Arc<App>,
    id: RequestId,
    tenant: &Tenant,
    request: &mut ValidatedRequest,
    arrived: Instant,
) -> Result<Vec<PreparedPrompt>, ApiError> {
    let view = app.dispatcher.nodes().view();
    let model = view.model.as_ref().filter(|_| !view.decode.is_empty()).ok_or_else(|| {
        let message = "no decode node is ready: repeat the request after the time in Retry-After";
        ApiError::new(ErrorKind::Unavailable, message).with_retry_after(std::time::Duration::from_secs(2))
    })?;
    let salt = tenant_salt(tenant, request.cache_salt.as_deref());
    let seed = request.sampling.seed.or(app.settings.seed).unwrap_or_else(rand::random);
    let wants_echo = matches!(request.endpoint, Endpoint::Completions { echo: true });
    let mut prepared = Vec::with_capacity(request.prompts.len());
    for (i, prompt) in std::mem::take(&mut request.prompts).into_iter().enumerate() {
        let param = if matches!(prompt, Prompt::Chat(_)) { "messages" } else { "prompt" };
        let mut encoded = app.text.encode(prompt).await?;
        if let Some(token) = encoded.tokens.iter().find(|token| **token >= model.vocab_size) {
            let message = format!("{param} has token {token}, expected below the vocabulary's {}", model.vocab_size);
            return Err(ApiError::invalid(param, message));
        }
        if wants_echo && encoded.text.is_none() {
            let text = app.text.tokenizer.decode(&encoded.tokens, request.skip_special_tokens);
            encoded.text = Some(text.map_err(|e| ApiError::invalid(param, e.to_string()))?);
        }
        let max_tokens = fit_max_tokens(&request.sampling, encoded.tokens.len(), model, param)?;
        let params = settle(app, &request.sampling, max_tokens, seed, model)?;
        prepared.push(PreparedPrompt {
            text: encoded.text.filter(|_| wants_echo),
            request: DispatchRequest {
                // Ids of further prompts follow the first one's, so that one search finds all.
                id: RequestId(id.0.wrapping_add(i as u128)),
                prompt: encoded.tokens,
                params,
                n: request.n,
                salt: salt.clone(),
                deadline: arrived + app.settings.request_timeout,
            },
        });
    }
    Ok(prepared)
}

/// How many tokens may be generated.
fn fit_max_tokens(
    sampling: &SamplingRequest,
    num_prompt_tokens: usize,
    model: &ModelInfo,
    param: &str,
) -> Result<u32, ApiError> {
    let len_max = model.max_model_len as usize;
    let too_long = |message: String, param: &str| {
        Err(ApiError::new(ErrorKind::ContextLengthExceeded, message).with_param(param.to_string()))
    };
    let Some(room) = len_max.checked_sub(num_prompt_tokens).filter(|room| *room > 0) else {
        let message = format!(
            "the prompt has {num_prompt_tokens} tokens, but prompt and answer together may have {len_max}: shorten it"
        );
        return too_long(message, param);
    };
    match sampling.max_tokens {
        None => Ok(sampling.max_tokens_default.min(room as u32)),
        Some(max) if max as usize <= room => Ok(max),
        Some(max) => too_long(
            format!(
                "{} is {max} and the prompt has {num_prompt_tokens} tokens, but together they may have {len_max}: \
                 shorten the prompt or ask for at most {room}",
                sampling.max_tokens_param
            ),
            sampling.max_tokens_param,
        ),
    }
}

fn settle(
    app: &App,
    asked: &SamplingRequest,
    max_tokens: u32,
    seed: u64,
    model: &ModelInfo,
) -> Result<SamplingParams, ApiError> {
    let in_vocabulary = |param: &str, token: u32| {
        if token < model.vocab_size {
            return Ok(());
        }
        let message = format!("{param} names token {token}, expected below the vocabulary's {}", model.vocab_size);
        Err(ApiError::invalid(param, message))
    };
    asked.logit_bias.iter().try_for_each(|(token, _)| in_vocabulary("logit_bias", *token))?;
    asked.stop_token_ids.iter().try_for_each(|token| in_vocabulary("stop_token_ids", *token))?;
    if asked.min_tokens > max_tokens {
        let message =
            format!("min_tokens is {}, expected at most the {max_tokens} that may be generated", asked.min_tokens);
        return Err(ApiError::invalid("min_tokens", message));
    }
    let defaults = &app.text.defaults;
    let mut stop_token_ids = asked.stop_token_ids.clone();
    if !asked.ignore_eos {
        stop_token_ids.extend(&app.text.eos_token_ids);
    }
    stop_token_ids.sort_unstable();
    stop_token_ids.dedup();
    Ok(SamplingParams {
        temperature: asked.temperature.unwrap_or(defaults.temperature),
        top_p: asked.top_p.unwrap_or(defaults.top_p),
        top_k: asked.top_k.unwrap_or(defaults.top_k),
        min_p: asked.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: asked.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        frequency_penalty: asked.frequency_penalty,
        presence_penalty: asked.presence_penalty,
        logit_bias: asked.logit_bias.clone(),
        seed,
        stop_token_ids,
        min_tokens: asked.min_tokens,
        max_tokens,
        logprobs: asked.logprobs,
    })
}
