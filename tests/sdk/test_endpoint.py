"""Everything beside completions: models, health, version, metrics, tokenize, detokenize, API keys."""
import json

import openai
import pytest


def test_models_lists_the_model(client, model):
    [entry] = client.models.list().data
    assert entry.id == model and entry.object == "model" and entry.owned_by and entry.created > 0
    assert client.models.retrieve(model).id == model


def test_served_model_name_is_the_name(start):
    server = start("--served-model-name", "noise")
    with server.client() as client:
        assert [m.id for m in client.models.list().data] == ["noise"]
        answer = client.completions.create(model="noise", prompt="Hi", max_tokens=1)
        assert answer.model == "noise"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="models/tiny", prompt="Hi", max_tokens=1)


def test_health_is_200_when_it_can_serve(server):
    assert server.request("GET", "/health")[0] == 200


def test_version_is_told(server):
    status, _, text = server.request("GET", "/version")
    assert status == 200 and json.loads(text)["version"].count(".") == 2


def test_metrics_count_requests_and_tokens(server, client, model):
    def read():
        return [server.metric(f"vllm:{name}") for name in (
            "prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count",
            "e2e_request_latency_seconds_count")]

    server.wait_idle()
    before = read()
    usage = client.completions.create(model=model, prompt="Hello, world!", max_tokens=20,
                                      extra_body={"ignore_eos": True}).usage
    server.wait_idle()
    difference = [a - b for a, b in zip(read(), before)]
    assert difference == [usage.prompt_tokens, 20, 1, 1]


def test_tokenize_and_detokenize_are_inverse(server, model, goldens):
    for golden in goldens["texts"]:
        answer = server.post("/tokenize", {"model": model, "prompt": golden["text"]})
        assert answer["tokens"] == golden["ids"]
        assert answer["count"] == len(golden["ids"])
        assert answer["max_model_len"] == 4096
        answer = server.post("/tokenize", {"model": model, "prompt": golden["text"], "add_special_tokens": False})
        assert answer["tokens"] == golden["ids_without_special"]
        back = server.post("/detokenize", {"model": model, "tokens": golden["ids_without_special"]})
        assert back == {"prompt": golden["text"]}


def test_tokenize_renders_messages(server, model, goldens):
    for golden in goldens["chats"]:
        messages = json.loads(json.dumps(golden["messages"]))
        for message in messages:
            for call in message.get("tool_calls", []):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        answer = server.post("/tokenize", {
            "model": model, "messages": messages, "add_generation_prompt": golden["add_generation_prompt"]})
        assert answer["tokens"] == golden["ids"]


def test_tokenize_refuses_what_it_cannot_do(server, model):
    for path, body in (("/tokenize", {"model": model}), ("/tokenize", {"model": model, "prompt": 5}),
                       ("/detokenize", {"model": model}), ("/detokenize", {"model": model, "tokens": [512]}),
                       ("/detokenize", {"model": model, "tokens": "text"})):
        assert server.request("POST", path, body)[0] == 400, (path, body)
    assert server.request("POST", "/tokenize", {"model": "no-such-model", "prompt": "Hi"})[0] == 404


def test_api_key_is_asked_for(start):
    server = start("--api-key", "open sesame")
    with server.client("open sesame") as client:
        model = client.models.list().data[0].id
        assert client.completions.create(model=model, prompt="Hi", max_tokens=1).choices
    for wrong in ("open", "open sesame!", "OPEN SESAME"):
        with server.client(wrong) as client, pytest.raises(openai.AuthenticationError) as info:
            client.completions.create(model=model, prompt="Hi", max_tokens=1)
        assert info.value.status_code == 401
        assert info.value.code == "invalid_api_key"
    assert server.request("GET", "/v1/models")[0] == 401
    assert server.request("POST", "/tokenize", {"model": model, "prompt": "Hi"})[0] == 401
    assert server.request("GET", "/health")[0] == 200
    assert "open sesame" not in server.log()
