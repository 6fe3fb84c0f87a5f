//! What a request meets before its handler: its id, the key, the size of its body.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use common::ids::RequestId;
use futures::StreamExt;
use serde_json::Value;
use tracing::Instrument;

use super::app::{App, BodyRoom};
use crate::openai::{ApiError, ErrorKind};

/// The header that carries a request's id in and out.
pub(super) const X_REQUEST_ID: &str = "x-request-id";
/// Time for a client to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of a body above the limit that are taken and thrown away before the refusal.
const DISCARDED_BYTES_MAX: usize = 256 << 20;
/// Time for that.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(10);
/// Bodies up to this size are parsed at once (about a millisecond), larger ones on a blocking thread.
const PARSED_HERE_BYTES_MAX: usize = 256 << 10;
/// Longest id taken from a client.
const CLIENT_ID_BYTES_MAX: usize = 128;

/// The API key a request came with, if one was asked.
#[derive(Debug, Clone)]
pub struct Tenant(pub Option<Arc<str>>);

/// Draws the request's id, logs under it, and answers with it: the client's own where it sent one.
pub async fn identify(mut request: Request, next: Next) -> Response {
    let id = RequestId(rand::random());
    let from_client = request.headers().get(X_REQUEST_ID).filter(|value| {
        value.len() <= CLIENT_ID_BYTES_MAX && !value.is_empty() && value.as_bytes().iter().all(u8::is_ascii_graphic)
    });
    let shown = from_client.cloned().unwrap_or_else(|| {
        HeaderValue::from_str(&id.to_string()).expect("hexadecimal digits are a valid header value")
    });
    let span = match from_client.and_then(|value| value.to_str().ok()) {
        Some(client_id) => tracing::info_span!("request", %id, client_id),
        None => tracing::info_span!("request", %id),
    };
    request.extensions_mut().insert(id);
    let mut response = next.run(request).instrument(span).await;
    response.headers_mut().insert(X_REQUEST_ID, shown);
    response
}

/// Asks for the API key, if there is one.
pub async fn authenticate(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    match key_of(&app.settings.api_keys, request.headers()) {
        Ok(tenant) => {
            request.extensions_mut().insert(tenant);
            next.run(request).await
        }
        Err(error) => {
            app.metrics.on_status(error.kind.status().as_u16());
            error.into_response()
        }
    }
}

fn key_of(keys: &[String], headers: &HeaderMap) -> Result<Tenant, ApiError> {
    if keys.is_empty() {
        return Ok(Tenant(None));
    }
    let unauthorized = |message| Err(ApiError::new(ErrorKind::Unauthorized, message));
    let Some(sent) = headers.get(header::AUTHORIZATION) else {
        return unauthorized("no API key: send it as \"Authorization: Bearer KEY\"");
    };
    let bearer = sent.to_str().ok().and_then(|text| {
        let (scheme, key) = text.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
    });
    let Some(sent) = bearer else {
        return unauthorized("the Authorization header is not of the form \"Bearer KEY\"");
    };
    // Every key is compared, so that the time tells nothing about which came near.
    let found = keys.iter().fold(None, |found, key| if is_same_key(key, sent) { Some(key) } else { found });
    match found {
        Some(key) => Ok(Tenant(Some(key.as_str().into()))),
        None => unauthorized("the API key is not one of this endpoint's"),
    }
}

/// Compares digests: the time depends on neither the key nor its length. (`blake3::Hash` compares in
/// constant time.)
fn is_same_key(key: &str, sent: &str) -> bool {
    blake3::hash(key.as_bytes()) == blake3::hash(sent.as_bytes())
}

/// The salt that keeps tenants' cached prompts apart: of the API key and of `cache_salt`, empty without
/// both. Nodes never see the key.
pub fn tenant_salt(tenant: &Tenant, cache_salt: Option<&str>) -> Vec<u8> {
    if tenant.0.is_none() && cache_salt.is_none() {
        return Vec::new();
    }
    let key = tenant.0.as_deref().unwrap_or_default();
    let mut hasher = blake3::Hasher::new_derive_key("tandem 2026-11 tenant salt v1");
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key.as_bytes());
    hasher.update(cache_salt.unwrap_or_default().as_bytes());
    hasher.finalize().as_bytes()[..16].to_vec()
}

/// A body as JSON, as far as there is `room` for it.
///
/// # Errors
/// 415 if it is compressed or declared to be something else, 413 if it is larger, 429 if others take all
/// room, 400 if it is not JSON or does not come.
pub async fn read_json(headers: &HeaderMap, body: Body, mut room: BodyRoom) -> Result<Value, ApiError> {
    let bytes_max = room.bytes_max;
    if let Err(error) = check_type(headers).and_then(|()| check_coding(headers)) {
        discard(body.into_data_stream()).await;
        return Err(error);
    }
    let too_large = || {
        let message = format!("the body exceeds the limit of {bytes_max} bytes");
        ApiError::new(ErrorKind::BodyTooLarge, message)
    };
    let claimed = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let mut rest = body.into_data_stream();
    let mut bytes = Vec::with_capacity(claimed.unwrap_or(0).min(PARSED_HERE_BYTES_MAX));
    let is_whole = async {
        while claimed.is_none_or(|claimed| claimed <= bytes_max) {
            let Some(piece) = rest.next().await.transpose().map_err(|error| not_read(&error))? else {
                return Ok(true);
            };
            if bytes.len() + piece.len() > bytes_max {
                break;
            }
            room.take(piece.len())?;
            bytes.extend_from_slice(&piece);
        }
        Ok(false)
    };
    match tokio::time::timeout(BODY_TIMEOUT, is_whole).await {
        Ok(Ok(true)) => {}
        Ok(Ok(false)) => {
            discard(rest).await;
            return Err(too_large());
        }
        Ok(Err(error)) => return Err(error),
        Err(_) => {
            let message = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
            return Err(ApiError::new(ErrorKind::InvalidRequest, message));
        }
    }
    let parsed = if bytes.len() > PARSED_HERE_BYTES_MAX {
        let parsing = tokio::task::spawn_blocking(move || serde_json::from_slice(&bytes)).await;
        parsing.map_err(|_| ApiError::new(ErrorKind::Internal, "the body could not be parsed"))?
    } else {
        serde_json::from_slice(&bytes)
    };
    parsed.map_err(|error| ApiError::new(ErrorKind::InvalidRequest, format!("the body is not JSON: {error}")))
}

fn not_read(error: &axum::Error) -> ApiError {
    let message = format!(
        "the body broke off, expected as many bytes as Content-Length says, or chunks up to an empty one: {}",
        innermost(error)
    );
    ApiError::new(ErrorKind::InvalidRequest, message)
}

/// What was behind an error: the outer ones only say what it was about.
fn innermost<'a>(mut error: &'a (dyn std::error::Error + 'static)) -> &'a (dyn std::error::Error + 'static) {
    while let Some(source) = error.source() {
        error = source;
    }
    error
}

/// Whether the body is declared to be JSON, or nothing at all. What a web page can send to another origin
/// without asking (`text/plain` and forms) is none of it.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(declared) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let declared = String::from_utf8_lossy(declared.as_bytes());
    let essence = declared.split(';').next().unwrap_or_default().trim();
    if essence.is_empty() || essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let message = format!(
        "Content-Type is \"{declared}\", expected application/json (with curl: -H 'Content-Type: application/json')"
    );
    Err(ApiError::new(ErrorKind::UnsupportedMediaType, message))
}

/// Whether the body is sent as it is: no coding is undone here, so that a few bytes cannot become many.
fn check_coding(headers: &HeaderMap) -> Result<(), ApiError> {
    let codings = headers.get_all(header::CONTENT_ENCODING).iter();
    let mut other = codings.filter(|coding| !coding.is_empty() && !coding.as_bytes().eq_ignore_ascii_case(b"identity"));
    match other.next() {
        None => Ok(()),
        Some(coding) => {
            let coding = String::from_utf8_lossy(coding.as_bytes());
            let message =
                format!("Content-Encoding is \"{coding}\", expected identity: compressed bodies are not supported");
            Err(ApiError::new(ErrorKind::UnsupportedMediaType, message))
        }
    }
}

/// Takes a body that is refused unread, or too large, off the connection, within bounds. A client that is still sending when its
/// connection is closed sees that and not the answer.
async fn discard(mut rest: BodyDataStream) {
    let all = async {
        let mut num_bytes = 0;
        while let Some(Ok(bytes)) = rest.next().await {
            num_bytes += bytes.len();
            if num_bytes > DISCARDED_BYTES_MAX {
                return;
            }
        }
    };
    // Whether it came to its end in time or not, the answer is the same.
    let _ = tokio::time::timeout(DISCARD_TIMEOUT, all).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::Semaphore;

    fn headers(authorization: &'static str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_static(authorization));
        headers
    }

    #[test]
    fn only_a_configured_key_passes() {
        let keys = vec!["alpha".to_string(), "beta".to_string()];
        assert_eq!(key_of(&keys, &headers("Bearer beta")).unwrap().0.as_deref(), Some("beta"));
        for wrong in ["Bearer gamma", "Basic beta", "beta", "Bearer ", "Bearer alphabeta"] {
            assert_eq!(key_of(&keys, &headers(wrong)).unwrap_err().kind, ErrorKind::Unauthorized, "{wrong}");
        }
        assert!(key_of(&keys, &HeaderMap::new()).is_err());
        assert!(key_of(&[], &HeaderMap::new()).unwrap().0.is_none());
    }

    #[tokio::test]
    async fn a_body_above_the_limit_is_taken_before_it_is_refused() {
        for claimed in [Some("30"), None] {
            let mut headers = HeaderMap::new();
            headers.extend(claimed.map(|claimed| (header::CONTENT_LENGTH, HeaderValue::from_static(claimed))));
            let num_sent = Arc::new(AtomicUsize::new(0));
            let sent = num_sent.clone();
            let pieces = futures::stream::iter(["0123456789"; 3]).map(move |piece| {
                sent.fetch_add(piece.len(), Ordering::Relaxed);
                Ok::<_, std::io::Error>(piece)
            });
            let room = BodyRoom::new(20, Arc::new(Semaphore::new(100)));
            let refused = read_json(&headers, Body::from_stream(pieces), room).await;
            assert_eq!(refused.unwrap_err().kind, ErrorKind::BodyTooLarge);
            assert_eq!(num_sent.load(Ordering::Relaxed), 30);
        }
    }

    #[tokio::test]
    async fn bodies_on_their_way_share_their_room() {
        let left = Arc::new(Semaphore::new(10));
        let headers = HeaderMap::new();
        let read = |body: &'static str| read_json(&headers, Body::from(body), BodyRoom::new(8, left.clone()));
        let mut other = BodyRoom::new(8, left.clone());
        other.take(2).unwrap();
        other.take(3).unwrap();
        assert_eq!(read("[1]").await.unwrap(), serde_json::json!([1]));
        let refused = read("[1,2,3]").await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Overloaded);
        assert!(refused.retry_after.is_some());
        drop(other);
        assert_eq!(read("[1,2,3]").await.unwrap(), serde_json::json!([1, 2, 3]));
        assert_eq!(left.available_permits(), 10);
    }

    #[test]
    fn salts_of_tenants_differ_and_no_tenant_has_none() {
        let tenant = |key: Option<&str>| Tenant(key.map(Into::into));
        assert!(tenant_salt(&tenant(None), None).is_empty());
        let salts = [
            tenant_salt(&tenant(Some("a")), None),
            tenant_salt(&tenant(Some("a")), Some("b")),
            tenant_salt(&tenant(Some("ab")), None),
            tenant_salt(&tenant(None), Some("ab")),
        ];
        for (i, salt) in salts.iter().enumerate() {
            assert!(salts[..i].iter().all(|other| other != salt));
        }
    }
}
