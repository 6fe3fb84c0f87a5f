"""Refusals: OpenAI's status, OpenAI's JSON, and the name of the parameter that was wrong."""
import json
import socket

import openai
import pytest

HI = [{"role": "user", "content": "Hi"}]


def refused(call, status, param):
    with pytest.raises(openai.APIStatusError) as info:
        call()
    error = info.value
    assert error.status_code == status, error
    assert error.param == param, error
    assert error.type, error
    assert set(error.body) == {"message", "type", "param", "code"}
    assert len(error.body["message"]) > 10
    return error


def test_unknown_model_is_404(client):
    for call in (lambda: client.chat.completions.create(model="no-such-model", messages=HI),
                 lambda: client.completions.create(model="no-such-model", prompt="Hi")):
        error = refused(call, 404, "model")
        assert isinstance(error, openai.NotFoundError)
        assert error.code == "model_not_found"
        assert "no-such-model" in error.message


@pytest.mark.parametrize("param, value", [
    ("temperature", -0.1), ("temperature", "hot"), ("temperature", 1e9),
    ("top_p", -0.5), ("top_p", 1.5), ("top_p", "all"),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", "many"),
    ("n", 0), ("n", -1), ("n", 1_000_000), ("n", "three"),
    ("presence_penalty", 2.5), ("presence_penalty", -3), ("frequency_penalty", 2.5), ("frequency_penalty", "x"),
    ("stop", 5), ("stop", [1, 2]), ("stop", ""), ("stream", "yes"), ("seed", "lucky"),
    ("logit_bias", {"0": 101}), ("logit_bias", {"a": 1}), ("logit_bias", {"512": 1}), ("logit_bias", [1]),
])
def test_bad_sampling_parameter_is_400(client, model, param, value):
    refused(lambda: client.chat.completions.create(model=model, messages=HI, **{param: value}), 400, param)
    refused(lambda: client.completions.create(model=model, prompt="Hi", **{param: value}), 400, param)


@pytest.mark.parametrize("param, value", [
    ("top_k", -5), ("top_k", 1.5), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0), ("min_tokens", -1),
    ("stop_token_ids", "2"), ("stop_token_ids", [512]), ("ignore_eos", "no")])
def test_bad_extra_parameter_is_400(client, model, param, value):
    refused(lambda: client.chat.completions.create(model=model, messages=HI, extra_body={param: value}), 400, param)


def test_more_answers_than_a_node_can_run_are_400_and_no_warning(server, client, model):
    error = refused(lambda: client.chat.completions.create(model=model, messages=HI, n=100), 400, "n")
    assert "100" in error.message and "64" in error.message
    told = [line for line in server.lines if "n is 100" in line]
    assert told and not any("WARN" in line or "ERROR" in line for line in told), told


def test_logprobs_out_of_range_is_400(client, model):
    create = client.chat.completions.create
    refused(lambda: create(model=model, messages=HI, logprobs=True, top_logprobs=21), 400, "top_logprobs")
    refused(lambda: create(model=model, messages=HI, logprobs=True, top_logprobs=-1), 400, "top_logprobs")
    refused(lambda: create(model=model, messages=HI, top_logprobs=2), 400, "top_logprobs")
    refused(lambda: client.completions.create(model=model, prompt="Hi", logprobs=-1), 400, "logprobs")


@pytest.mark.parametrize("messages", [[], "Hi", [5], [{"role": "user"}], [{"content": "Hi"}],
                                      [{"role": "nobody", "content": "Hi"}], [{"role": "user", "content": 5}],
                                      [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
                                      [{"role": "user", "content": [{"type": "text"}]}]])
def test_bad_messages_are_400(server, model, messages):
    status, _, text = server.request("POST", "/v1/chat/completions", {"model": model, "messages": messages})
    error = json.loads(text)["error"]
    assert status == 400, text
    assert error["param"].startswith("messages"), text


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], 5, {"text": "Hi"}, ["Hi", 5], [1.5], [-1], [512],
                                    [[1], [512]], [True], [None]])
def test_bad_prompt_is_400(server, model, prompt):
    # An empty string alone is a prompt of <|bos|>.
    status, _, text = server.request("POST", "/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 1})
    if prompt in ("", [""]):
        assert status == 200 and json.loads(text)["usage"]["prompt_tokens"] == 1
    else:
        assert status == 400, text
        assert json.loads(text)["error"]["param"] == "prompt", text


def test_missing_fields_are_named(server, model):
    for path, body, param in (("/v1/chat/completions", {"model": model}, "messages"),
                              ("/v1/completions", {"model": model}, "prompt")):
        status, _, text = server.request("POST", path, body)
        assert (status, json.loads(text)["error"]["param"]) == (400, param), text


def test_too_long_prompt_is_400(client, model):
    for length in (4096, 5000, 60_000):
        error = refused(lambda: client.completions.create(model=model, prompt=[300] * length, max_tokens=1), 400, "prompt")
        assert error.code == "context_length_exceeded"
        assert "4096" in error.message.replace(",", "")
    long = [{"role": "user", "content": "seven stones " * 4000}]
    error = refused(lambda: client.chat.completions.create(model=model, messages=long), 400, "messages")
    assert error.code == "context_length_exceeded"


def test_longest_prompt_is_answered(client, model):
    answer = client.completions.create(model=model, prompt=[300] * 4095, max_tokens=1)
    assert answer.usage.total_tokens == 4096


def test_refusal_of_a_stream_is_no_stream(client, model):
    refused(lambda: client.chat.completions.create(model=model, messages=HI, temperature=-1, stream=True),
            400, "temperature")


def test_stream_options_need_a_stream(client, model):
    refused(lambda: client.chat.completions.create(model=model, messages=HI, stream_options={"include_usage": True}),
            400, "stream_options")


@pytest.mark.parametrize("body", ["", "{", "[]", "null", "\"text\"", "{\"model\": }", b"\xff\xfe", "[" * 100_000])
def test_broken_json_is_400(server, body):
    status, headers, text = server.request("POST", "/v1/chat/completions", body)
    assert status == 400, text
    assert headers["Content-Type"].startswith("application/json")
    assert json.loads(text)["error"]["message"]


def test_unknown_path_is_404_and_wrong_method_405(server):
    for method, path, expected in (("GET", "/v1/nothing", 404), ("POST", "/nothing", 404),
                                   ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405)):
        assert server.request(method, path)[0] == expected, (method, path)


def test_unknown_model_of_the_models_list_is_404(client):
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_announced_gigabyte_is_refused_before_it_is_read(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: tandem\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 1073741824\r\n\r\n{")
        assert connection.recv(4096).split(b" ")[1] == b"413"


def test_server_answers_after_all_this(client, model):
    assert client.chat.completions.create(model=model, messages=HI, max_tokens=2).choices
