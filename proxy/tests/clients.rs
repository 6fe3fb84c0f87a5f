//! Clients that send or read slowly, over scripted nodes.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use common::ids::RequestId;
use proxy::http::admission::Tenant;
use proxy::http::{HttpSettings, generate};
use serde_json::json;
use support::{Endpoint, http_settings, nodes};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The head of a request whose body has 100 bytes, and the first of them.
const BEGINNING: &[u8] = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{";

/// A client that has sent [`BEGINNING`].
async fn begin(endpoint: &Endpoint) -> TcpStream {
    let num_open = endpoint.app.accounting().num_open_requests;
    let mut client = TcpStream::connect(endpoint.addr).await.unwrap();
    client.write_all(BEGINNING).await.unwrap();
    let counted = async {
        while endpoint.app.accounting().num_open_requests == num_open {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), counted).await.expect("the request is not open");
    client
}

#[tokio::test]
async fn clients_that_do_not_send_their_bodies_keep_nobody_out() {
    let settings = HttpSettings { num_requests_max: 2, ..http_settings() };
    let endpoint = Endpoint::over(nodes("x"), settings).await;
    let mut slow = Vec::new();
    for _ in 0..3 {
        slow.push(begin(&endpoint).await);
    }
    endpoint.post_ok("/v1/completions", &json!({"prompt": "a"})).await;
    assert_eq!(endpoint.app.num_in_progress(), 0);
    drop(slow);
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn a_body_that_breaks_off_is_told_what_was_expected() {
    let endpoint = Endpoint::answering("x").await;
    let mut client = begin(&endpoint).await;
    client.shutdown().await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    assert!(answer.contains("the body broke off, expected as many bytes as Content-Length says"), "{answer}");
    endpoint.assert_idle().await;
}

/// What reads the response's body is this test: to the server that is a client that does not read.
#[tokio::test]
async fn a_client_that_does_not_read_gives_its_place_back_at_the_deadline() {
    let settings = HttpSettings { request_timeout: Duration::from_millis(50), ..http_settings() };
    let endpoint = Endpoint::over(nodes(&"word ".repeat(200)), settings).await;
    let request = json!({"prompt": "a", "max_tokens": 400, "stream": true});
    let response = generate::completions(
        State(endpoint.app.clone()),
        Extension(RequestId(1)),
        Extension(Tenant(None)),
        HeaderMap::new(),
        Body::from(request.to_string()),
    );
    let response = response.await;
    assert_eq!(response.status(), 200);
    endpoint.assert_idle().await;
    assert!(endpoint.app.prometheus.render().contains("status=\"504\"} 1\n"));
    // Who reads on later learns that the answer is not complete, and why.
    let events = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    let events = String::from_utf8(events.to_vec()).unwrap();
    assert!(events.contains("\"text\":\"w\"") && !events.contains("[DONE]"), "{events}");
    let last: serde_json::Value = serde_json::from_str(events.rsplit("data: ").next().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "timeout", "{events}");
}
