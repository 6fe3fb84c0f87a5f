//! The table of paths.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{get, post};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::admission::{X_REQUEST_ID, authenticate, identify};
use super::app::App;
use super::{generate, info};

/// For this long a browser need not ask again.
const PREFLIGHT_VALID_FOR: Duration = Duration::from_secs(600);

/// All paths. Those that only look at the process are open; the others ask for the API key, if there is one.
pub fn router(app: Arc<App>) -> Router {
    let open = Router::new()
        .route("/health", get(info::health))
        .route("/metrics", get(info::metrics))
        .route("/version", get(info::version));
    let keyed = Router::new()
        .route("/v1/chat/completions", post(generate::chat_completions))
        .route("/v1/completions", post(generate::completions))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*name}", get(info::model))
        .route("/tokenize", post(info::tokenize))
        .route("/detokenize", post(info::detokenize))
        .route_layer(from_fn_with_state(app.clone(), authenticate));
    let origins = app.settings.allowed_origins.clone();
    let router = open
        .merge(keyed)
        .fallback(info::not_found)
        .method_not_allowed_fallback(info::method_not_allowed)
        // Bodies are read under the endpoint's own limit.
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn(identify))
        .with_state(app);
    // Outermost: a browser's preflight carries no key, and refusals must be readable by the page too.
    if origins.is_empty() { router } else { router.layer(cors(&origins)) }
}

/// The API key travels in a header that the page sets itself, so no credentials of the browser are allowed.
fn cors(origins: &[String]) -> CorsLayer {
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([header::RETRY_AFTER, HeaderName::from_static(X_REQUEST_ID)])
        .max_age(PREFLIGHT_VALID_FOR)
}
