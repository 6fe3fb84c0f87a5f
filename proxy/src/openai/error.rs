//! The error a client sees: OpenAI's JSON, with the wrong parameter named in `param`.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// What went wrong, as far as a client can act on it. The one place where a cause becomes an HTTP status,
/// an OpenAI `type` and `code`, and a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// A parameter is wrong: do not repeat the request unchanged.
    InvalidRequest,
    /// Prompt and answer do not fit the model.
    ContextLengthExceeded,
    /// No model of that name is served here.
    ModelNotFound,
    /// The API key is missing or wrong.
    Unauthorized,
    /// No such path.
    NotFound,
    /// The path exists for another method.
    MethodNotAllowed,
    /// The body exceeds the limit.
    BodyTooLarge,
    /// The body is in a form that is not taken.
    UnsupportedMediaType,
    /// This prompt ended several nodes a short while ago.
    Quarantined,
    /// Every node or the proxy is full: repeat later.
    Overloaded,
    /// No node can serve, or the proxy is leaving: repeat later or elsewhere.
    Unavailable,
    /// The request's time limit passed.
    Timeout,
    /// Nodes failed under this request.
    Internal,
}

impl ErrorKind {
    /// HTTP status.
    pub fn status(self) -> StatusCode {
        match self {
            Self::InvalidRequest | Self::ContextLengthExceeded | Self::Quarantined => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::ModelNotFound | Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Overloaded => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// OpenAI's `type`.
    pub fn type_name(self) -> &'static str {
        match self {
            Self::Unauthorized => "authentication_error",
            Self::Overloaded => "rate_limit_error",
            Self::Unavailable | Self::Timeout | Self::Internal => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// OpenAI's `code`, where one exists, and the metric label.
    pub fn code(self) -> Option<&'static str> {
        match self {
            Self::InvalidRequest => None,
            Self::ContextLengthExceeded => Some("context_length_exceeded"),
            Self::ModelNotFound => Some("model_not_found"),
            Self::Unauthorized => Some("invalid_api_key"),
            Self::NotFound => Some("unknown_url"),
            Self::MethodNotAllowed => Some("method_not_allowed"),
            Self::BodyTooLarge => Some("request_too_large"),
            Self::UnsupportedMediaType => Some("unsupported_media_type"),
            Self::Quarantined => Some("prompt_quarantined"),
            Self::Overloaded => Some("overloaded"),
            Self::Unavailable => Some("unavailable"),
            Self::Timeout => Some("timeout"),
            Self::Internal => Some("node_failure"),
        }
    }
}

/// Longest message that is passed on whole.
const MESSAGE_BYTES_MAX: usize = 1024;

/// An error as the client gets it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What kind.
    pub kind: ErrorKind,
    /// A sentence: what was wrong, what was expected.
    pub message: String,
    /// The parameter it is about, as a path (`messages[0].role`).
    pub param: Option<String>,
    /// When it is worth asking again.
    pub retry_after: Option<Duration>,
}

impl ApiError {
    /// An error of `kind` that is about no single parameter.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: shortened(message.into()), param: None, retry_after: None }
    }

    /// A wrong value of `param`.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(ErrorKind::InvalidRequest, message) }
    }

    /// With the time after which another try is worth it.
    pub fn with_retry_after(mut self, retry_after: Duration) -> Self {
        self.retry_after = Some(retry_after);
        self
    }

    /// About this parameter.
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// The body: `{"error": {"message", "type", "param", "code"}}`.
    pub fn to_json(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind.type_name(),
            "param": self.param,
            "code": self.kind.code(),
        }})
    }
}

/// A message that quotes a client's megabytes keeps its beginning and its end, where what was expected is.
fn shortened(message: String) -> String {
    if message.len() <= MESSAGE_BYTES_MAX {
        return message;
    }
    let first = message.floor_char_boundary(MESSAGE_BYTES_MAX / 2);
    let last = message.ceil_char_boundary(message.len() - MESSAGE_BYTES_MAX / 2);
    format!("{} [{} bytes left out] {}", &message[..first], last - first, &message[last..])
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.kind.status(), Json(self.to_json())).into_response();
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after {
            // Whole seconds, rounded up: the header knows nothing finer.
            let seconds = after.as_millis().div_ceil(1000).max(1) as u64;
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.kind == ErrorKind::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_body_names_message_type_param_and_code() {
        let body = ApiError::invalid("temperature", "temperature is 3, expected 0 to 2").to_json();
        assert_eq!(
            body,
            json!({"error": {"message": "temperature is 3, expected 0 to 2", "type": "invalid_request_error",
                "param": "temperature", "code": null}})
        );
    }

    #[test]
    fn what_a_client_wrote_is_quoted_in_part() {
        let message = |len: usize| ApiError::invalid("n", format!("n is {}, expected 1", "é".repeat(len))).message;
        assert_eq!(message(100).matches('é').count(), 100);
        let shortened = message(3_000_000);
        assert!(shortened.len() < MESSAGE_BYTES_MAX + 40, "{}", shortened.len());
        assert!(shortened.starts_with("n is éé") && shortened.ends_with("éé, expected 1"), "{shortened}");
    }

    #[test]
    fn retry_after_is_rounded_up_to_whole_seconds() {
        let error = ApiError::new(ErrorKind::Overloaded, "full").with_retry_after(Duration::from_millis(1200));
        let response = error.into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
    }
}
