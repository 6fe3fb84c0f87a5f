//! Everything that does not generate: models, health, metrics, version, tokenize and detokenize.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::admission::read_json;
use super::app::App;
use super::prepare::check_model_name;
use crate::openai::chat::parse_chat_prompt;
use crate::openai::fields::Fields;
use crate::openai::{ApiError, ErrorKind, Prompt};

/// `GET /health`: 200 while requests can be served.
pub async fn health(State(app): State<Arc<App>>) -> Response {
    let view = app.dispatcher.nodes().view();
    let (status, word) = if app.is_draining() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining")
    } else if view.decode.is_empty() {
        (StatusCode::SERVICE_UNAVAILABLE, "no decode node is ready")
    } else {
        (StatusCode::OK, "ok")
    };
    let body = json!({"status": word, "decode_nodes": view.decode.len(), "prefill_nodes": view.prefill.len()});
    (status, Json(body)).into_response()
}

/// `GET /metrics`, in Prometheus' text format.
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let view = app.dispatcher.nodes().view();
    let num_waiting = view.decode.iter().map(|node| u64::from(node.load.num_waiting)).sum();
    app.metrics.set_running(app.num_in_progress(), num_waiting);
    app.metrics.set_nodes(view.decode.len(), view.prefill.len());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.prometheus.render()).into_response()
}

/// `GET /version`.
pub async fn version() -> Response {
    Json(json!({"version": env!("CARGO_PKG_VERSION")})).into_response()
}

/// `GET /v1/models`.
pub async fn models(State(app): State<Arc<App>>) -> Response {
    let models: Vec<Value> = app.settings.model_names.iter().map(|name| model_entry(&app, name)).collect();
    Json(json!({"object": "list", "data": models})).into_response()
}

/// `GET /v1/models/{name}`; names may hold slashes.
pub async fn model(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(name) = name.map_err(|error| {
        ApiError::new(ErrorKind::NotFound, format!("the name of a model is UTF-8: {}", error.body_text()))
    })?;
    check_model_name(&app, Some(&name)).map(|name| Json(model_entry(&app, &name)))
}

fn model_entry(app: &App, name: &str) -> Value {
    let view = app.dispatcher.nodes().view();
    let max_model_len = view.model.as_ref().map(|model| model.max_model_len);
    let is_simulated = view.model.as_ref().is_some_and(|model| model.numerics.is_simulated());
    let owner = if is_simulated { "tandem simulator: answers mean nothing" } else { "tandem" };
    json!({"id": name, "object": "model", "created": app.created, "owned_by": owner,
        "root": app.settings.model_names[0], "max_model_len": max_model_len})
}

/// `POST /tokenize`: a `prompt`, or `messages` through the chat template.
pub async fn tokenize(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Result<Json<Value>, ApiError> {
    let body = read_json(&headers, body, app.body_room()).await?;
    let fields = Fields::of_body(&body)?;
    check_model_name(&app, fields.string("model")?)?;
    let prompt = match (fields.string("prompt")?, fields.value("messages")) {
        (Some(text), None) => {
            Prompt::Text { text: text.to_string(), add_special_tokens: fields.boolean("add_special_tokens", true)? }
        }
        (None, Some(_)) => Prompt::Chat(parse_chat_prompt(&fields)?),
        _ => return Err(ApiError::invalid("prompt", "exactly one of prompt and messages is expected")),
    };
    let tokens = match &prompt {
        // Nothing to refuse here: no text, no tokens.
        Prompt::Text { text, add_special_tokens: false } if text.is_empty() => Vec::new(),
        _ => app.text.encode(prompt).await?.tokens,
    };
    let max_model_len = app.dispatcher.nodes().view().model.as_ref().map(|model| model.max_model_len);
    let mut answer = json!({"count": tokens.len(), "max_model_len": max_model_len, "tokens": tokens});
    if fields.boolean("return_token_strs", false)? {
        answer["token_strs"] = tokens.iter().map(|id| app.text.tokenizer.spelling(*id)).collect();
    }
    Ok(Json(answer))
}

/// `POST /detokenize`: `tokens` to `prompt`.
pub async fn detokenize(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Result<Json<Value>, ApiError> {
    let body = read_json(&headers, body, app.body_room()).await?;
    let fields = Fields::of_body(&body)?;
    check_model_name(&app, fields.string("model")?)?;
    fields.required("tokens")?;
    let tokens = fields.token_ids("tokens", usize::MAX)?.unwrap_or_default();
    let vocab_size = app.text.tokenizer.vocab_size();
    if let Some(token) = tokens.iter().find(|token| **token >= vocab_size) {
        let message = format!("tokens has {token}, expected below the vocabulary's {vocab_size}");
        return Err(ApiError::invalid("tokens", message));
    }
    let tokenizer = app.text.tokenizer.clone();
    let text = tokio::task::spawn_blocking(move || tokenizer.decode(&tokens, false)).await;
    match text {
        Ok(Ok(text)) => Ok(Json(json!({"prompt": text}))),
        Ok(Err(error)) => Err(ApiError::invalid("tokens", error.to_string())),
        Err(_) => Err(ApiError::new(ErrorKind::Internal, "the tokens could not be turned into text")),
    }
}

/// A path that is not there.
pub async fn not_found(uri: axum::http::Uri) -> ApiError {
    ApiError::new(ErrorKind::NotFound, format!("there is no {}", uri.path()))
}

/// A path that is there for another method.
pub async fn method_not_allowed(method: axum::http::Method, uri: axum::http::Uri) -> ApiError {
    ApiError::new(ErrorKind::MethodNotAllowed, format!("{} does not take {method}", uri.path()))
}
