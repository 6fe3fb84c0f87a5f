"""Incremental UTF-8: a character made of several tokens appears whole, a broken one as U+FFFD, once."""
import pytest

# Characters of two, three and four bytes that are no tokens of their own.
CHARACTERS = ["ł", "ꙮ", "𝄞"]


def byte_tokens(server, model, character):
    tokens = server.post("/tokenize", {"model": model, "prompt": character, "add_special_tokens": False})["tokens"]
    assert len(tokens) > 1, f"{character} is one token"
    return tokens


@pytest.mark.parametrize("seed", range(6))
def test_deltas_join_to_the_decoded_bytes(server, client, model, seed):
    # Only the bytes of these characters and the letter "a" can be drawn: whole, broken and unfinished characters.
    allowed = {t for c in CHARACTERS[:1 + seed % 3] for t in byte_tokens(server, model, c)}
    [letter] = server.post("/tokenize", {"model": model, "prompt": "a", "add_special_tokens": False})["tokens"]
    options = dict(model=model, messages=[{"role": "user", "content": "bytes"}], max_tokens=80, temperature=1.5,
                   seed=seed, logprobs=True, logit_bias={str(t): 100 for t in allowed | {letter}},
                   extra_body={"ignore_eos": True})
    whole = client.chat.completions.create(**options).choices[0]
    expected = b"".join(bytes(p.bytes) for p in whole.logprobs.content).decode("utf-8", "replace")
    assert whole.message.content == expected
    deltas = [c.choices[0].delta.content or "" for c in client.chat.completions.create(stream=True, **options)]
    assert "".join(deltas) == expected


@pytest.mark.parametrize("seed", range(4))
def test_hot_streams_join_to_the_whole_text(client, model, seed):
    options = dict(model=model, prompt="你好世界", max_tokens=200, temperature=2.0, seed=seed,
                   extra_body={"ignore_eos": True})
    whole = client.completions.create(**options).choices[0].text
    deltas = [c.choices[0].text for c in client.completions.create(stream=True, **options)]
    assert "".join(deltas) == whole
    assert not any("\ud800" <= c < "\ue000" for c in whole)


def test_any_text_survives_the_way_in(client, model, goldens):
    for golden in goldens["texts"]:
        if golden["text"]:
            answer = client.completions.create(model=model, prompt=golden["text"], max_tokens=1)
            assert answer.usage.prompt_tokens == len(golden["ids"]), golden["text"]
