"""Chat completions, streamed and not."""
import json
from uuid import uuid4

import pytest

SEA = [{"role": "user", "content": "Write a poem about the sea."}]
# The random model seldom ends by itself; with this it never does, so lengths are known.
ON = {"ignore_eos": True}


def chat(client, model, messages=SEA, max_tokens=24, **options):
    options.setdefault("extra_body", ON)
    return client.chat.completions.create(model=model, messages=messages, max_tokens=max_tokens, **options)


def joined(stream, index=0):
    """Text, finish reason and usage of one choice of a stream; the text as its list of deltas."""
    deltas, finish, usage = [], None, None
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.index == index:
                assert finish is None or not choice.delta.content, "text after the finish reason"
                deltas += [choice.delta.content] if choice.delta.content else []
                finish = choice.finish_reason or finish
    return deltas, finish, usage


def test_answer_has_the_shape_of_openai(client, model):
    answer = chat(client, model, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.id
    assert answer.model == model
    assert answer.created > 1_700_000_000
    [choice] = answer.choices
    assert choice.index == 0
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert not choice.message.tool_calls
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_two_answers_have_two_ids(client, model):
    assert chat(client, model).id != chat(client, model).id


def test_prompt_tokens_are_those_of_the_rendered_template(client, model, goldens):
    for golden in goldens["chats"]:
        if golden["add_generation_prompt"] and all("tool_calls" not in m for m in golden["messages"]):
            answer = chat(client, model, golden["messages"], max_tokens=1)
            assert answer.usage.prompt_tokens == len(golden["ids"])


def test_every_role_and_text_parts_are_accepted(client, model, goldens):
    [golden] = [g for g in goldens["chats"] if g["add_generation_prompt"] and len(g["messages"]) == 5]
    messages = json.loads(json.dumps(golden["messages"]))
    # On OpenAI's wire the arguments of a call are JSON in a string; the template sees an object.
    function = messages[2]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    assert chat(client, model, messages, max_tokens=1).usage.prompt_tokens == len(golden["ids"])
    chat(client, model, [{"role": "developer", "content": "Be brief."}, *SEA], max_tokens=1)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "seeded"])
def test_stream_says_what_the_whole_answer_says(client, model, options):
    whole = chat(client, model, max_tokens=64, **options).choices[0]
    deltas, finish, _ = joined(chat(client, model, max_tokens=64, stream=True, **options))
    assert "".join(deltas) == whole.message.content
    assert finish == whole.finish_reason == "length"
    assert len(deltas) > 10, "tokens arrive as they are made"


def test_first_chunk_of_a_stream_names_the_role(client, model):
    chunks = list(chat(client, model, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({c.id for c in chunks}) == 1
    assert {c.model for c in chunks} == {model}
    finishes = [choice.finish_reason for c in chunks for choice in c.choices if choice.finish_reason]
    assert finishes == ["length"]


def test_include_usage_adds_one_last_chunk(client, model):
    chunks = list(chat(client, model, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage.completion_tokens == 24
    assert usage.total_tokens == usage.prompt_tokens + 24
    assert all(c.usage is None for c in chunks[:-1])


def test_stream_without_include_usage_has_no_usage(client, model):
    assert all(c.usage is None and c.choices for c in chat(client, model, stream=True))


def test_stream_is_server_sent_events_with_done_at_the_end(server, model):
    status, headers, text = server.request("POST", "/v1/chat/completions", {
        "model": model, "messages": SEA, "max_tokens": 5, "stream": True})
    assert status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    events = [e for e in text.split("\n\n") if e and not e.startswith(":")]
    assert all(e.startswith("data: ") for e in events)
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(e[6:])["object"] == "chat.completion.chunk" for e in events[:-1])


def test_max_completion_tokens_is_max_tokens_by_its_new_name(client, model):
    answer = client.chat.completions.create(model=model, messages=SEA, max_completion_tokens=5, extra_body=ON)
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"


def test_three_choices_differ_and_repeat_with_their_seed(client, model):
    first = chat(client, model, n=3, temperature=1.0, seed=11)
    again = chat(client, model, n=3, temperature=1.0, seed=11)
    texts = [c.message.content for c in first.choices]
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [c.message.content for c in again.choices]
    assert first.usage.completion_tokens == 3 * 24
    assert first.usage.prompt_tokens == chat(client, model).usage.prompt_tokens, "the prompt counts once"


def test_streamed_choices_are_told_apart_by_their_index(client, model):
    whole = chat(client, model, n=3, temperature=1.0, seed=12)
    chunks = list(chat(client, model, n=3, temperature=1.0, seed=12, stream=True))
    for choice in whole.choices:
        deltas, finish, _ = joined(chunks, choice.index)
        assert "".join(deltas) == choice.message.content
        assert finish == choice.finish_reason


def test_same_seed_same_text_other_seed_other_text(client, model):
    texts = [chat(client, model, temperature=1.0, seed=s, max_tokens=48).choices[0].message.content for s in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_without_a_seed_two_answers_differ(client, model):
    texts = [chat(client, model, temperature=1.0, max_tokens=48).choices[0].message.content for _ in range(2)]
    assert texts[0] != texts[1]


def test_temperature_zero_ignores_the_seed(client, model):
    texts = {chat(client, model, temperature=0, seed=s).choices[0].message.content for s in (1, 2, None)}
    assert len(texts) == 1


def test_top_k_of_one_is_greedy(client, model):
    greedy = chat(client, model, temperature=0).choices[0].message.content
    narrow = chat(client, model, temperature=1.0, seed=5, extra_body=ON | {"top_k": 1}).choices[0].message.content
    assert narrow == greedy


def test_repeated_prompt_is_cached(client, model):
    messages = [{"role": "user", "content": f"{uuid4()} " + "the river carries seven stones, " * 12}]

    def cached(answer):
        details = answer.usage.prompt_tokens_details
        return (details.cached_tokens or 0) if details else 0

    first, second = (chat(client, model, messages, temperature=0) for _ in range(2))
    assert first.usage.prompt_tokens > 64
    assert cached(first) < 32, "only the head of the template can have been seen before"
    # Whole blocks of the prompt, never its last token.
    assert first.usage.prompt_tokens - 64 <= cached(second) < first.usage.prompt_tokens
    assert first.choices[0].message.content == second.choices[0].message.content

    *_, last = chat(client, model, messages, temperature=0, stream=True, stream_options={"include_usage": True})
    assert last.usage.prompt_tokens_details.cached_tokens == cached(second)


def test_logprobs_follow_the_text(client, model):
    answer = chat(client, model, temperature=0, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 24
    for position in content:
        top = position.top_logprobs
        assert len(top) == 3
        assert top[0].logprob >= top[1].logprob >= top[2].logprob
        assert position.token == top[0].token and position.logprob == top[0].logprob, "greedy takes the best"
        assert position.logprob <= 0
        assert len({bytes(t.bytes) for t in top}) == 3
    joined_bytes = b"".join(bytes(position.bytes) for position in content)
    assert joined_bytes.decode("utf-8", "replace") == answer.choices[0].message.content


def test_streamed_logprobs_are_those_of_the_whole_answer(client, model):
    options = dict(temperature=1.0, seed=3, logprobs=True, top_logprobs=2)
    whole = chat(client, model, **options).choices[0].logprobs.content
    streamed = [p for chunk in chat(client, model, stream=True, **options) for c in chunk.choices if c.logprobs
                for p in c.logprobs.content or []]
    assert streamed == whole


def test_logprobs_without_alternatives(client, model):
    content = chat(client, model, logprobs=True).choices[0].logprobs.content
    assert all(position.top_logprobs == [] for position in content)
    assert chat(client, model).choices[0].logprobs is None
