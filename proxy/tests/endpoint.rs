//! The endpoint's shapes, over scripted nodes and real HTTP.
#![allow(clippy::unwrap_used)]

mod support;

use common::ids::{ChoiceIndex, Epoch, NodeId};
use common::wire::{Generate, NodeError};
use proxy::dispatch::fake::{Behaviour, FakeNodes, tiny_model_info};
use proxy::http::HttpSettings;
use proxy::route::HeldPrefixes;
use serde_json::{Value, json};
use support::{EOS, Endpoint, http_settings, tokens_of};

const TEXT: &str = "The river carries 你好 🙂 the morning light.";

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn chat_answer_has_openais_shape() {
    let endpoint = Endpoint::answering(TEXT).await;
    let body = endpoint.post_ok("/v1/chat/completions", &chat(json!({}))).await;
    assert_eq!(body["object"], "chat.completion");
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["model"], "tiny");
    let choice = &body["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": TEXT, "refusal": null}));
    assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(0), &json!("stop")));
    assert_eq!(choice["logprobs"], Value::Null);
    let num_tokens = tokens_of(TEXT).len() + 1;
    let usage = &body["usage"];
    assert_eq!(usage["completion_tokens"], num_tokens);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 2);
    let total = usage["prompt_tokens"].as_u64().unwrap() + num_tokens as u64;
    assert_eq!(usage["total_tokens"], total);
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn chat_stream_has_role_text_finish_usage_and_done() {
    let endpoint = Endpoint::answering(TEXT).await;
    let request = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let chunks = endpoint.post_stream("/v1/chat/completions", &request).await;
    assert_eq!(chunks[0]["object"], "chat.completion.chunk");
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(chunks[0]["usage"], Value::Null);
    let [.., finish, usage, done] = chunks.as_slice() else { panic!() };
    assert_eq!(finish["choices"][0]["finish_reason"], "stop");
    assert_eq!(finish["choices"][0]["delta"], json!({}));
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], tokens_of(TEXT).len() + 1);
    assert_eq!(done, "[DONE]");
    let text: String = chunks[1..chunks.len() - 3]
        .iter()
        .map(|chunk| {
            let piece = chunk["choices"][0]["delta"]["content"].as_str().unwrap();
            assert!(!piece.is_empty() && !piece.contains('\u{FFFD}'));
            piece
        })
        .collect();
    assert_eq!(text, TEXT);
    assert!(chunks.iter().take(chunks.len() - 1).all(|chunk| chunk["id"] == chunks[0]["id"]));
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn a_stream_tells_the_tokens_of_each_chunk_and_where_the_time_went() {
    let endpoint = Endpoint::answering(TEXT).await;
    let options = json!({"include_usage": true, "continuous_usage_stats": true, "include_timeline": true});
    let request = chat(json!({"stream": true, "stream_options": options, "n": 2}));
    let chunks = endpoint.post_stream("/v1/chat/completions", &request).await;
    let [chunks @ .., last, done] = chunks.as_slice() else { panic!() };
    assert_eq!(done, "[DONE]");
    let num_prompt_tokens = &last["usage"]["prompt_tokens"];
    for choice in 0..2 {
        let of_choice = chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == choice);
        let told: Vec<u64> = of_choice
            .inspect(|chunk| assert_eq!(&chunk["usage"]["prompt_tokens"], num_prompt_tokens))
            .map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap())
            .collect();
        // The role brings none, then each event one, also those of a character that is not complete, and the end.
        let num_tokens = tokens_of(TEXT).len() as u64 + 1;
        assert_eq!(told, (0..=num_tokens).collect::<Vec<u64>>());
    }
    let [timeline] = last["timelines"].as_array().unwrap().as_slice() else { panic!("{last}") };
    for phase in ["queue_ms", "prefill_ms", "transfer_ms", "handover_ms", "first_gap_ms", "fetch_ms"] {
        assert!(timeline[phase].is_number(), "{phase} of {timeline}");
    }
    endpoint.assert_idle().await;
    // As in vLLM, they mean nothing without a usage.
    let options = json!({"continuous_usage_stats": true, "include_timeline": true});
    let request = chat(json!({"stream": true, "stream_options": options}));
    let chunks = endpoint.post_stream("/v1/chat/completions", &request).await;
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none() && chunk.get("timelines").is_none()));
}

#[tokio::test]
async fn completions_take_text_lists_and_tokens() {
    let endpoint = Endpoint::answering("one two").await;
    for prompt in [json!("a"), json!([5, 6, 7])] {
        let body = endpoint.post_ok("/v1/completions", &json!({"prompt": prompt, "n": 2})).await;
        assert_eq!(body["object"], "text_completion");
        assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
        let expected =
            |index: u32| json!({"index": index, "text": "one two", "logprobs": null, "finish_reason": "stop"});
        assert_eq!(body["choices"], json!([expected(0), expected(1)]));
    }
    let body = endpoint.post_ok("/v1/completions", &json!({"prompt": ["a", "bc"], "echo": true})).await;
    let texts: Vec<&str> = body["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["aone two", "bcone two"]);
    let chunks = endpoint.post_stream("/v1/completions", &json!({"prompt": "a", "stream": true})).await;
    let [.., finish, done] = chunks.as_slice() else { panic!() };
    assert_eq!(finish["choices"][0], json!({"index": 0, "text": "", "logprobs": null, "finish_reason": "stop"}));
    assert_eq!(done, "[DONE]");
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn length_is_the_reason_when_tokens_run_out() {
    let endpoint = Endpoint::answering(TEXT).await;
    let body = endpoint.post_ok("/v1/completions", &json!({"prompt": "a", "max_tokens": 3})).await;
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn stop_string_across_tokens_ends_the_answer_and_the_node_is_told() {
    let endpoint = Endpoint::answering(TEXT).await;
    // "r ca" lies across the words' tokens.
    let request = chat(json!({"stop": ["xyz", "r ca"]}));
    let body = endpoint.post_ok("/v1/chat/completions", &request).await;
    assert_eq!(body["choices"][0]["message"]["content"], "The rive");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let cached_tokens = &body["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert_eq!(cached_tokens, 2, "the stream ends before Done, but this is known from its start");
    endpoint.nodes.cancelled(1).await;
    let request = chat(json!({"stop": "r ca", "stream": true}));
    let chunks = endpoint.post_stream("/v1/chat/completions", &request).await;
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "The rive", "nothing of a stop string is ever sent");
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn logprobs_have_both_shapes() {
    let endpoint = Endpoint::answering("one 你").await;
    let body = endpoint
        .post_ok("/v1/chat/completions", &chat(json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 2})))
        .await;
    let content = body["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 2);
    assert_eq!(content[0]["logprob"], -0.5);
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
    let bytes: Vec<u8> = content
        .iter()
        .flat_map(|entry| entry["bytes"].as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8))
        .collect();
    assert!("one 你".as_bytes().starts_with(&bytes));
    let body = endpoint.post_ok("/v1/completions", &json!({"prompt": "a", "logprobs": 1, "max_tokens": 3})).await;
    let logprobs = &body["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 3);
    assert_eq!(logprobs["token_logprobs"], json!([-0.5, -0.5, -0.5]));
    assert_eq!(logprobs["text_offset"][0], 0);
    assert!(logprobs["top_logprobs"][0].is_object());
}

#[tokio::test]
async fn refusals_name_the_parameter() {
    let endpoint = Endpoint::answering("x").await;
    for (path, body, status, param, code) in [
        ("/v1/chat/completions", chat(json!({"temperature": 9})), 400, json!("temperature"), Value::Null),
        ("/v1/chat/completions", chat(json!({"model": "gpt"})), 404, json!("model"), json!("model_not_found")),
        ("/v1/chat/completions", chat(json!({"tool_choice": "required"})), 400, json!("tool_choice"), Value::Null),
        (
            "/v1/chat/completions",
            chat(json!({"response_format": {"type": "json_object"}})),
            400,
            json!("response_format"),
            Value::Null,
        ),
        (
            "/v1/chat/completions",
            chat(json!({"max_tokens": 5000})),
            400,
            json!("max_tokens"),
            json!("context_length_exceeded"),
        ),
        ("/v1/chat/completions", chat(json!({"logit_bias": {"512": 1}})), 400, json!("logit_bias"), Value::Null),
        ("/v1/completions", json!({"prompt": [512]}), 400, json!("prompt"), Value::Null),
        ("/v1/completions", json!({"prompt": vec![5; 4096]}), 400, json!("prompt"), json!("context_length_exceeded")),
        ("/v1/completions", json!([]), 400, Value::Null, Value::Null),
    ] {
        let (found_status, error) = endpoint.post_refused(path, &body).await;
        assert_eq!((found_status, &error["param"], &error["code"]), (status, &param, &code), "{error}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().unwrap().len() > 10);
    }
    assert_eq!(endpoint.nodes.calls().len(), 0);
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn more_answers_than_a_node_can_run_are_a_wrong_n() {
    let refusal = NodeError::TooManyChoices { num_choices: 100, max_num_choices: 64 };
    let endpoint = Endpoint::scripted(&["d0"], "x", move |_, _, _| Behaviour::FailAfter(0, refusal.clone())).await;
    let (status, error) = endpoint.post_refused("/v1/chat/completions", &chat(json!({"n": 100}))).await;
    assert_eq!((status, &error["param"]), (400, &json!("n")), "{error}");
    assert_eq!(error["message"], "n is 100, expected at most 64: more answers cannot run at once here");
    assert_eq!(endpoint.nodes.calls().len(), 1, "no other node is asked");
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn wrong_paths_methods_and_bodies_are_answered_in_json() {
    let endpoint = Endpoint::answering("x").await;
    let get = |path: &str| endpoint.client.get(format!("{}{path}", endpoint.url)).send();
    let response = get("/v1/nothing").await.unwrap();
    assert_eq!(response.status(), 404);
    assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "unknown_url");
    let response = get("/v1/models/%ff").await.unwrap();
    assert_eq!(response.status(), 404);
    assert_eq!(response.json::<Value>().await.unwrap()["error"]["type"], "invalid_request_error");
    let response = get("/v1/completions").await.unwrap();
    assert_eq!(response.status(), 405);
    assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "method_not_allowed");
    let (status, error) = endpoint.post_refused("/v1/completions", &json!({"prompt": "x".repeat(2 << 20)})).await;
    assert_eq!((status, &error["code"]), (413, &json!("request_too_large")));
    let url = format!("{}/v1/completions", endpoint.url);
    let response = endpoint.client.post(url).body("{\"prompt\": ").send().await.unwrap();
    assert_eq!(response.status(), 400);
    assert!(response.json::<Value>().await.unwrap()["error"]["message"].as_str().unwrap().contains("not JSON"));
}

#[tokio::test]
async fn compressed_bodies_are_refused_and_identity_is_none() {
    let endpoint = Endpoint::answering("x").await;
    let send = async |path: &str, coding: &str| {
        let request = endpoint.client.post(format!("{}{path}", endpoint.url)).header("content-encoding", coding);
        request.json(&chat(json!({"prompt": "x"}))).send().await.unwrap()
    };
    for path in ["/v1/chat/completions", "/v1/completions", "/tokenize"] {
        for coding in ["gzip", "br", "identity, zstd"] {
            let response = send(path, coding).await;
            assert_eq!(response.status(), 415, "{path} {coding}");
            let error = response.json::<Value>().await.unwrap()["error"].clone();
            assert_eq!(
                (&error["code"], &error["type"]),
                (&json!("unsupported_media_type"), &json!("invalid_request_error"))
            );
            let message = error["message"].as_str().unwrap();
            assert!(message.contains(coding) && message.contains("expected identity"), "{message}");
        }
    }
    assert_eq!(send("/v1/chat/completions", "Identity").await.status(), 200);
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn bodies_are_json_or_not_declared() {
    let endpoint = Endpoint::answering("x").await;
    let send = async |path: &str, declared: Option<&str>| {
        let body = if path.contains("chat") { chat(json!({})) } else { json!({"prompt": "x"}) };
        let mut request = endpoint.client.post(format!("{}{path}", endpoint.url)).body(body.to_string());
        if let Some(declared) = declared {
            request = request.header("content-type", declared);
        }
        request.send().await.unwrap()
    };
    for path in ["/v1/chat/completions", "/v1/completions", "/tokenize"] {
        for declared in [None, Some("application/json"), Some("Application/JSON ; charset=utf-8; v=1")] {
            assert_eq!(send(path, declared).await.status(), 200, "{path} {declared:?}");
        }
        for declared in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json"] {
            let response = send(path, Some(declared)).await;
            assert_eq!(response.status(), 415, "{path} {declared}");
            let error = response.json::<Value>().await.unwrap()["error"].clone();
            assert_eq!(error["code"], "unsupported_media_type");
            let message = error["message"].as_str().unwrap();
            assert!(message.starts_with(&format!("Content-Type is \"{declared}\", expected application/json")));
        }
    }
    endpoint.assert_idle().await;
}

#[tokio::test]
async fn web_pages_may_call_only_from_allowed_origins() {
    let over = async |origins: &[&str]| {
        let allowed_origins = origins.iter().map(|origin| origin.to_string()).collect();
        let settings = HttpSettings { api_keys: vec!["alpha".into()], allowed_origins, ..http_settings() };
        Endpoint::over(support::nodes("x"), settings).await
    };
    let preflight = async |endpoint: &Endpoint| {
        let url = format!("{}/v1/chat/completions", endpoint.url);
        let request = endpoint.client.request(reqwest::Method::OPTIONS, url).header("origin", "https://chat.example");
        let request = request.header("access-control-request-method", "POST");
        request.header("access-control-request-headers", "authorization,content-type").send().await.unwrap()
    };
    let allowed = |response: &reqwest::Response| {
        let value = response.headers().get("access-control-allow-origin");
        value.map(|value| value.to_str().unwrap().to_string())
    };
    let off = over(&[]).await;
    let response = preflight(&off).await;
    assert_eq!((response.status().as_u16(), allowed(&response)), (405, None));
    assert_eq!(allowed(&preflight(&over(&["https://other.example"]).await).await), None);
    assert_eq!(allowed(&preflight(&over(&["*"]).await).await).as_deref(), Some("*"));

    let endpoint = over(&["https://other.example", "https://chat.example"]).await;
    let response = preflight(&endpoint).await;
    assert_eq!((response.status().as_u16(), allowed(&response).as_deref()), (200, Some("https://chat.example")));
    assert_eq!(response.headers()["access-control-allow-headers"], "authorization,content-type");
    assert!(response.headers().get("access-control-allow-credentials").is_none());
    // A refusal can be read by the page as well as an answer.
    for (key, status) in [("wrong", 401), ("alpha", 200)] {
        let request = endpoint.client.post(format!("{}/v1/chat/completions", endpoint.url)).bearer_auth(key);
        let response = request.header("origin", "https://chat.example").json(&chat(json!({}))).send().await.unwrap();
        assert_eq!((response.status().as_u16(), allowed(&response).as_deref()), (status, Some("https://chat.example")));
    }
}

#[tokio::test]
async fn tokenize_and_detokenize_are_inverse() {
    let endpoint = Endpoint::answering("x").await;
    let request = json!({"prompt": TEXT, "add_special_tokens": false, "return_token_strs": true});
    let body = endpoint.post_ok("/tokenize", &request).await;
    assert_eq!(body["tokens"], json!(tokens_of(TEXT)));
    assert_eq!(body["count"], tokens_of(TEXT).len());
    assert_eq!(body["max_model_len"], 4096);
    assert_eq!(body["token_strs"].as_array().unwrap().len(), tokens_of(TEXT).len());
    let back = endpoint.post_ok("/detokenize", &json!({"tokens": body["tokens"]})).await;
    assert_eq!(back, json!({"prompt": TEXT}));
    let body = endpoint.post_ok("/tokenize", &json!({"messages": [{"role": "user", "content": "hi"}]})).await;
    assert_eq!(body["tokens"][0], 0);
    let (status, error) = endpoint.post_refused("/detokenize", &json!({"tokens": [99999]})).await;
    assert_eq!((status, &error["param"]), (400, &json!("tokens")));
}

#[tokio::test]
async fn models_health_version_and_metrics_answer() {
    let endpoint = Endpoint::answering("one two three").await;
    endpoint.post_ok("/v1/completions", &json!({"prompt": "a"})).await;
    let get = async |path: &str| {
        let response = endpoint.client.get(format!("{}{path}", endpoint.url)).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        response.text().await.unwrap()
    };
    let models: Value = serde_json::from_str(&get("/v1/models").await).unwrap();
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(models["data"][0]["max_model_len"], 4096);
    let model: Value = serde_json::from_str(&get("/v1/models/other/name").await).unwrap();
    assert_eq!(model["id"], "other/name");
    let health: Value = serde_json::from_str(&get("/health").await).unwrap();
    assert_eq!(health, json!({"status": "ok", "decode_nodes": 3, "prefill_nodes": 0}));
    assert!(get("/version").await.contains(env!("CARGO_PKG_VERSION")));
    let metrics = get("/metrics").await;
    for name in [
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_count",
        "vllm:e2e_request_latency_seconds_sum",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "tandem_first_token_gap_seconds",
        "tandem_requests_total",
    ] {
        assert!(metrics.contains(name), "{name} is missing in\n{metrics}");
    }
    assert!(metrics.contains("role=\"proxy\"") && metrics.contains("model_name=\"tiny\""));
}

#[tokio::test]
async fn request_id_comes_back() {
    let endpoint = Endpoint::answering("x").await;
    let url = format!("{}/v1/completions", endpoint.url);
    let request = || endpoint.client.post(&url).json(&json!({"prompt": "a"}));
    let response = request().header("x-request-id", "mine-1").send().await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "mine-1");
    let response = request().send().await.unwrap();
    let id = response.headers()["x-request-id"].to_str().unwrap().to_string();
    assert_eq!(id.len(), 32);
    assert_eq!(response.json::<Value>().await.unwrap()["id"], format!("cmpl-{id}"));
}

#[tokio::test]
async fn key_is_asked_where_something_is_served_and_separates_tenants() {
    let nodes = support::nodes("x");
    let settings = HttpSettings { api_keys: vec!["alpha".into(), "beta".into()], ..http_settings() };
    let endpoint = Endpoint::over(nodes, settings).await;
    let (status, error) = endpoint.post_refused("/v1/completions", &json!({"prompt": "a"})).await;
    assert_eq!((status, &error["code"]), (401, &json!("invalid_api_key")));
    let counted = |status: &str| endpoint.app.prometheus.render().contains(&format!("status=\"{status}\"}} 1\n"));
    assert!(counted("401"));
    for key in ["alpha", "beta"] {
        let url = format!("{}/v1/completions", endpoint.url);
        let response = endpoint.client.post(url).bearer_auth(key).json(&json!({"prompt": "a"})).send().await.unwrap();
        assert_eq!(response.status(), 200);
    }
    let calls = endpoint.nodes.calls();
    assert!(!calls[0].1.salt.is_empty());
    assert_ne!(calls[0].1.salt, calls[1].1.salt);
    let health = endpoint.client.get(format!("{}/health", endpoint.url)).send().await.unwrap();
    assert_eq!(health.status(), 200);
}

#[tokio::test]
async fn sampling_parameters_reach_the_node() {
    let endpoint = Endpoint::answering("x").await;
    let request = chat(json!({"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 42, "n": 2,
        "frequency_penalty": 1, "presence_penalty": -1, "repetition_penalty": 1.1, "logit_bias": {"7": -5},
        "max_completion_tokens": 9, "min_tokens": 2, "stop_token_ids": [9], "logprobs": true, "top_logprobs": 3}));
    endpoint.post_ok("/v1/chat/completions", &request).await;
    let (_, generate) = endpoint.nodes.calls().remove(0);
    let params = generate.params;
    assert_eq!((params.temperature, params.top_p, params.top_k, params.min_p), (0.5, 0.9, 7, 0.1));
    assert_eq!((params.frequency_penalty, params.presence_penalty, params.repetition_penalty), (1.0, -1.0, 1.1));
    assert_eq!((params.seed, params.max_tokens, params.min_tokens, params.logprobs), (42, 9, 2, Some(3)));
    assert_eq!(params.logit_bias, [(7, -5.0)]);
    assert_eq!(params.stop_token_ids, [1, 3, 9]);
    assert_eq!(generate.choices.len(), 2);
    endpoint.post_ok("/v1/chat/completions", &chat(json!({"ignore_eos": true, "max_tokens": 4}))).await;
    let (_, generate) = endpoint.nodes.calls().remove(1);
    assert!(generate.params.stop_token_ids.is_empty());
    assert_eq!(generate.params.seed, 1, "the configured seed");
}

#[tokio::test]
async fn requests_go_where_their_prefix_is_and_elsewhere_if_that_node_is_lost() {
    let mut held = HeldPrefixes::default();
    held.add(&(NodeId::new("d2").unwrap(), Epoch(1)), 4);
    let answer = tokens_of(TEXT);
    let answer = move |_: ChoiceIndex, index: u32| answer.get(index as usize).copied();
    let script = |call: usize, _: &NodeId, _: &Generate| match call {
        4 => Behaviour::LoseAfter(2),
        _ => Behaviour::Serve,
    };
    let nodes = FakeNodes::new(&["d0", "d1", "d2"], tiny_model_info(), EOS, answer, script).with_held(held);
    let endpoint = Endpoint::over(nodes, http_settings()).await;
    let prompt: Vec<u32> = (100..200).collect();
    for _ in 0..5 {
        let body = endpoint.post_ok("/v1/completions", &json!({"prompt": prompt})).await;
        assert_eq!(body["choices"][0]["text"], TEXT);
    }
    let asked: Vec<String> = endpoint.nodes.calls().into_iter().map(|(node, _)| node.to_string()).collect();
    assert_eq!(asked[..5], ["d2"; 5]);
    assert!(asked.len() == 6 && asked[5] != "d2", "{asked:?}");
    endpoint.assert_idle().await;
}
