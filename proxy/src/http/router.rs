//! The table of paths.

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{get, post};

use super::admission::{authenticate, identify};
use super::app::App;
use super::{generate, info};

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
    open.merge(keyed)
        .fallback(info::not_found)
        .method_not_allowed_fallback(info::method_not_allowed)
        // Bodies are read under the endpoint's own limit.
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn(identify))
        .with_state(app)
}
