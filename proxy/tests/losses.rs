//! What clients see when nodes are lost, full or silent, and what nodes see when clients are.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use common::wire::NodeError;
use futures::StreamExt;
use proxy::dispatch::fake::{Behaviour, FakeNodes, tiny_model_info};
use serde_json::{Value, json};
use support::{Endpoint, http_settings, tokens_of};

const TEXT: &str = "A tired sailor remembers the sea 🙂, and 你好 the long letter.";

fn completion(extra: Value) -> Value {
    let mut body = json!({"prompt": "a", "max_tokens": 100});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn texts(body: &Value) -> Vec<&str> {
    body["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn lost_node_is_replaced_and_the_text_is_the_same() {
    for num_tokens in [0, 1, 7, 15] {
        let endpoint = Endpoint::scripted(&["d0", "d1", "d2"], TEXT, move |call, _, _| match call {
            0 => Behaviour::LoseAfter(num_tokens),
            1 => Behaviour::FailAfter(2, NodeError::Engine { reason: "scripted".into() }),
            _ => Behaviour::Serve,
        })
        .await;
        let body = endpoint.post_ok("/v1/completions", &completion(json!({}))).await;
        assert_eq!(texts(&body), [TEXT]);
        assert!(tokens_of(TEXT).len() > 18, "the text outlives both losses");
        assert_eq!(body["usage"]["completion_tokens"], tokens_of(TEXT).len() + 1);
        let calls = endpoint.nodes.calls();
        assert_eq!(calls.len(), 3);
        // Another node each time, a newer attempt, and the committed tokens behind the prompt.
        assert!(calls[0].0 != calls[1].0 && calls[1].0 != calls[2].0 && calls[0].0 != calls[2].0);
        assert!(calls.windows(2).all(|pair| pair[0].1.attempt < pair[1].1.attempt));
        let resumed = &calls[1].1;
        let prompt_len = resumed.prompt_len as usize;
        assert_eq!(resumed.tokens.0[..prompt_len], calls[0].1.tokens.0);
        assert_eq!(resumed.tokens.0[prompt_len..], tokens_of(TEXT)[..num_tokens as usize]);
        endpoint.assert_idle().await;
    }
}

#[tokio::test]
async fn every_choice_resumes_behind_its_own_tokens() {
    let endpoint = Endpoint::scripted(&["d0", "d1"], TEXT, |call, _, _| match call {
        0 => Behaviour::LoseAfter(8),
        _ => Behaviour::Serve,
    })
    .await;
    let chunks = endpoint.post_stream("/v1/completions", &completion(json!({"n": 3, "stream": true}))).await;
    for index in 0..3 {
        let text: String = chunks
            .iter()
            .filter(|chunk| chunk["choices"][0]["index"] == index)
            .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap())
            .collect();
        assert_eq!(text, TEXT);
    }
    let calls = endpoint.nodes.calls();
    assert_eq!(calls.len(), 4, "one for all, then one per choice");
    assert!(calls[1..].iter().all(|(_, generate)| generate.choices.len() == 1));
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn repeated_and_early_tokens_are_dropped() {
    let endpoint = Endpoint::scripted(&["d0"], TEXT, |_, _, _| Behaviour::Stutter).await;
    let body = endpoint.post_ok("/v1/completions", &completion(json!({}))).await;
    assert_eq!(texts(&body), [TEXT]);
}

#[tokio::test]
async fn third_loss_is_an_error_and_quarantines_the_prompt() {
    let endpoint = Endpoint::scripted(&["d0", "d1", "d2", "d3"], TEXT, |_, _, generate| {
        if generate.tokens.0.contains(&tokens_of("!")[0]) { Behaviour::LoseAfter(2) } else { Behaviour::Serve }
    })
    .await;
    let deadly = completion(json!({"prompt": "a!"}));
    let (status, error) = endpoint.post_refused("/v1/completions", &deadly).await;
    assert_eq!((status, &error["type"]), (500, &json!("server_error")));
    assert_eq!(endpoint.nodes.calls().len(), 3);
    let (status, error) = endpoint.post_refused("/v1/completions", &deadly).await;
    assert_eq!((status, &error["code"]), (400, &json!("prompt_quarantined")));
    assert_eq!(endpoint.nodes.calls().len(), 3, "no node sees it again");
    endpoint.post_ok("/v1/completions", &completion(json!({}))).await;
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn error_behind_the_first_token_ends_the_stream_without_done() {
    let endpoint = Endpoint::scripted(&["d0"], TEXT, |_, _, _| Behaviour::LoseAfter(5)).await;
    let chunks = endpoint.post_stream("/v1/completions", &completion(json!({"stream": true}))).await;
    let last = chunks.last().unwrap();
    assert_eq!(last["error"]["type"], "server_error");
    assert!(!chunks.contains(&json!("[DONE]")));
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn busy_node_is_passed_over_and_all_busy_is_429() {
    let endpoint = Endpoint::scripted(&["d0", "d1", "d2"], TEXT, |call, _, _| {
        if call < 2 { Behaviour::Busy(Duration::from_millis(1500)) } else { Behaviour::Serve }
    })
    .await;
    assert_eq!(texts(&endpoint.post_ok("/v1/completions", &completion(json!({}))).await), [TEXT]);
    let endpoint =
        Endpoint::scripted(&["d0", "d1"], TEXT, |_, _, _| Behaviour::Busy(Duration::from_millis(1500))).await;
    for stream in [false, true] {
        let response = endpoint.post("/v1/completions", &completion(json!({"stream": stream}))).await;
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "2");
        assert_eq!(response.json::<Value>().await.unwrap()["error"]["type"], "rate_limit_error");
    }
    assert_eq!(endpoint.nodes.calls().len(), 4, "each node is asked once per request");
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn resumed_request_waits_for_a_full_node() {
    let endpoint = Endpoint::scripted(&["d0", "d1"], TEXT, |call, _, _| match call {
        0 => Behaviour::LoseAfter(3),
        1 | 2 => Behaviour::Busy(Duration::from_millis(10)),
        _ => Behaviour::Serve,
    })
    .await;
    assert_eq!(texts(&endpoint.post_ok("/v1/completions", &completion(json!({}))).await), [TEXT]);
    assert_eq!(endpoint.nodes.calls().len(), 4);
}

#[tokio::test]
async fn draining_and_unreachable_nodes_are_not_losses() {
    let endpoint = Endpoint::scripted(&["d0", "d1", "d2", "d3", "d4"], TEXT, |call, _, _| match call {
        0 => Behaviour::Unreachable,
        1 => Behaviour::FailAfter(0, NodeError::Draining),
        2 => Behaviour::LoseAfter(3),
        3 => Behaviour::LoseAfter(3),
        _ => Behaviour::Serve,
    })
    .await;
    assert_eq!(texts(&endpoint.post_ok("/v1/completions", &completion(json!({}))).await), [TEXT]);
}

#[tokio::test]
async fn nodes_that_were_lost_and_are_reached_again_go_on() {
    let endpoint = Endpoint::scripted(&["d0", "d1"], TEXT, |call, _, _| match call {
        0 => Behaviour::LoseAfter(3),
        1 => Behaviour::Unreachable,
        _ => Behaviour::Serve,
    })
    .await;
    let body = completion(json!({}));
    let rejoin = async {
        while endpoint.nodes.calls().len() < 2 {
            tokio::task::yield_now().await;
        }
        endpoint.nodes.rejoin();
    };
    let (body, ()) = tokio::join!(endpoint.post_ok("/v1/completions", &body), rejoin);
    assert_eq!(texts(&body), [TEXT]);
    assert_eq!(endpoint.nodes.calls().len(), 3);
}

#[tokio::test]
async fn a_node_that_is_lost_again_and_again_is_503_and_its_prompt_is_not_to_blame() {
    let endpoint = Endpoint::scripted(&["d0"], TEXT, |call, _, _| match call {
        0..9 => Behaviour::LoseAfter(1),
        _ => Behaviour::Serve,
    })
    .await;
    let body = completion(json!({}));
    let mut posting = std::pin::pin!(endpoint.post("/v1/completions", &body));
    let mut num_calls = 0;
    let response = loop {
        tokio::select! {
            response = &mut posting => break response,
            () = tokio::task::yield_now() => {}
        }
        if endpoint.nodes.calls().len() > num_calls {
            num_calls += 1;
            endpoint.nodes.rejoin();
        }
    };
    assert_eq!((response.status().as_u16(), endpoint.nodes.calls().len()), (503, 9));
    assert_eq!(texts(&endpoint.post_ok("/v1/completions", &body).await), [TEXT]);
}

#[tokio::test]
async fn no_node_is_503_with_retry_after() {
    let endpoint = Endpoint::answering(TEXT).await;
    endpoint.nodes.set_view(proxy::route::ClusterView::default());
    let response = endpoint.post("/v1/completions", &completion(json!({}))).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    let health = endpoint.client.get(format!("{}/health", endpoint.url)).send().await.unwrap();
    assert_eq!(health.status(), 503, "health does not say fine when nothing can be served");
    let endpoint = Endpoint::scripted(&["d0"], TEXT, |_, _, _| Behaviour::Unreachable).await;
    assert_eq!(endpoint.post("/v1/completions", &completion(json!({}))).await.status(), 503);
}

#[tokio::test]
async fn a_request_a_node_finds_invalid_is_400() {
    let invalid = NodeError::Invalid { reason: "the prompt needs 300 blocks, this node has 100".into() };
    let endpoint =
        Endpoint::scripted(&["d0", "d1"], TEXT, move |_, _, _| Behaviour::FailAfter(0, invalid.clone())).await;
    let (status, error) = endpoint.post_refused("/v1/completions", &completion(json!({}))).await;
    assert_eq!(status, 400);
    assert_eq!(error["message"], "the prompt needs 300 blocks, this node has 100");
    assert_eq!(endpoint.nodes.calls().len(), 1);
}

#[tokio::test]
async fn client_that_leaves_cancels_on_the_node() {
    let endpoint = Endpoint::scripted(&["d0"], TEXT, |_, _, _| Behaviour::HangAfter(3)).await;
    let response = endpoint.post("/v1/completions", &completion(json!({"stream": true}))).await;
    let mut body = response.bytes_stream();
    body.next().await.unwrap().unwrap();
    drop(body);
    endpoint.nodes.cancelled(1).await;
    endpoint.assert_idle().await;
    // The same for one that waits for the whole answer.
    let url = format!("{}/v1/completions", endpoint.url);
    let waiting = tokio::spawn(endpoint.client.post(url).json(&completion(json!({}))).send());
    while endpoint.nodes.calls().len() < 2 {
        tokio::task::yield_now().await;
    }
    waiting.abort();
    endpoint.nodes.cancelled(2).await;
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn slow_reader_holds_back_the_node_and_nothing_is_stored() {
    // An answer without end: about 40 MB of events if anyone read it all.
    let nodes = FakeNodes::new(&["d0"], tiny_model_info(), 3, |_, _| Some(100), |_, _, _| Behaviour::Serve);
    let mut info = tiny_model_info();
    info.max_model_len = u32::MAX;
    let mut view = (*proxy::dispatch::Nodes::view(&nodes)).clone();
    view.model = Some(info);
    nodes.set_view(view);
    let endpoint = Endpoint::over(nodes, http_settings()).await;
    let request = json!({"prompt": "a", "max_tokens": 200_000, "stream": true});
    let body = serde_json::to_string(&request).unwrap();
    // A socket that is never read, with the smallest buffer the system gives.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(endpoint.addr).await.unwrap();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    tokio::io::AsyncWriteExt::write_all(&mut stream, head.as_bytes()).await.unwrap();
    // The node's counter stands still once the buffers on the way are full.
    let mut interval = tokio::time::interval(Duration::from_millis(100));
    let (mut last, mut num_still) = (0, 0);
    while num_still < 5 {
        interval.tick().await;
        let now = endpoint.nodes.num_tokens_sent();
        num_still = if now == last && now > 0 { num_still + 1 } else { 0 };
        last = now;
    }
    assert!(last < 100_000, "{last} tokens were taken from the node for a client that reads nothing");
    drop(stream);
    endpoint.nodes.cancelled(1).await;
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn one_request_too_many_is_429() {
    let nodes = FakeNodes::new(&["d0"], tiny_model_info(), 3, |_, _| Some(100), |_, _, _| Behaviour::HangAfter(1));
    let settings = proxy::http::HttpSettings { num_requests_max: 1, ..http_settings() };
    let endpoint = Endpoint::over(nodes, settings).await;
    let first = endpoint.post("/v1/completions", &completion(json!({"stream": true}))).await;
    assert_eq!(first.status(), 200);
    let second = endpoint.post("/v1/completions", &completion(json!({}))).await;
    assert_eq!(second.status(), 429);
    assert!(second.headers().contains_key("retry-after"));
    drop(first);
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn time_limit_is_504_and_cancels_on_the_node() {
    let nodes = FakeNodes::new(&["d0"], tiny_model_info(), 3, |_, _| Some(100), |_, _, _| Behaviour::HangAfter(1));
    let settings = proxy::http::HttpSettings { request_timeout: Duration::from_secs(2), ..http_settings() };
    let endpoint = Endpoint::over(nodes, settings).await;
    let (status, error) = endpoint.post_refused("/v1/completions", &completion(json!({}))).await;
    assert_eq!((status, &error["code"]), (504, &json!("timeout")));
    endpoint.nodes.cancelled(1).await;
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn drain_refuses_new_requests_and_finishes_running_ones() {
    let nodes = FakeNodes::new(&["d0"], tiny_model_info(), 3, |_, _| Some(100), |_, _, _| Behaviour::HangAfter(1));
    let endpoint = Endpoint::over(nodes, http_settings()).await;
    let running = endpoint.post("/v1/completions", &completion(json!({"stream": true}))).await;
    endpoint.shutdown.cancel();
    while !endpoint.app.is_draining() {
        tokio::task::yield_now().await;
    }
    let (status, error) = endpoint.post_refused("/v1/completions", &completion(json!({}))).await;
    assert_eq!((status, &error["code"]), (503, &json!("unavailable")));
    let health = endpoint.client.get(format!("{}/health", endpoint.url)).send().await.unwrap();
    assert_eq!(health.status(), 503);
    // The running one ends (its client leaves), and with it the server.
    drop(running);
    endpoint.server.await.unwrap().unwrap();
}
