"""Text completions: every form of a prompt, sampling parameters, agreement with Transformers."""
import pytest

ON = {"ignore_eos": True}
PROMPT = "the river carries seven stones"
OTHER = "Hello, world!"


def complete(client, model, prompt=PROMPT, max_tokens=16, **options):
    options.setdefault("extra_body", ON)
    options.setdefault("temperature", 0)
    return client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, **options)


def tokens_of(goldens, text):
    [golden] = [g for g in goldens["texts"] if g["text"] == text]
    return golden["ids"]


def test_answer_has_the_shape_of_openai(client, model, goldens):
    answer = complete(client, model)
    assert answer.object == "text_completion"
    assert answer.model == model
    [choice] = answer.choices
    assert choice.index == 0 and choice.finish_reason == "length" and choice.text and choice.logprobs is None
    assert answer.usage.prompt_tokens == len(tokens_of(goldens, PROMPT))
    assert answer.usage.completion_tokens == 16


def test_token_ids_say_what_their_text_says(client, model, goldens):
    assert (complete(client, model, tokens_of(goldens, PROMPT)).choices[0].text
            == complete(client, model, PROMPT).choices[0].text)


def test_a_list_of_prompts_is_answered_in_order(client, model, goldens):
    alone = [complete(client, model, p).choices[0].text for p in (PROMPT, OTHER)]
    assert alone[0] != alone[1]
    ids = [tokens_of(goldens, p) for p in (PROMPT, OTHER)]
    for prompts in ([PROMPT, OTHER], ids):
        answer = complete(client, model, prompts)
        assert [c.index for c in answer.choices] == [0, 1]
        assert [c.text for c in answer.choices] == alone
        assert answer.usage.prompt_tokens == sum(len(i) for i in ids)
        assert answer.usage.completion_tokens == 32


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(client, model):
    answer = complete(client, model, [PROMPT, OTHER], n=2, temperature=1.0, seed=1)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert len({c.text for c in answer.choices}) == 4


def test_streamed_prompts_are_told_apart_by_index(client, model):
    whole = complete(client, model, [PROMPT, OTHER])
    texts = ["", ""]
    for chunk in complete(client, model, [PROMPT, OTHER], stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [c.text for c in whole.choices]


def test_stream_with_usage(client, model):
    chunks = list(complete(client, model, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 16
    assert "".join(c.choices[0].text for c in chunks[:-1]) == complete(client, model).choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["length"]


def test_sixteen_tokens_unless_said_otherwise(client, model):
    answer = client.completions.create(model=model, prompt=PROMPT, extra_body=ON)
    assert answer.usage.completion_tokens == 16


def test_one_token_prompt_and_one_token_answer(client, model):
    answer = complete(client, model, [300], max_tokens=1)
    assert answer.usage.prompt_tokens == answer.usage.completion_tokens == 1


def test_greedy_tokens_are_those_of_transformers(client, model, goldens):
    """As far as no choice was closer than the two can differ in bf16 (bf16 logits are 0.3 apart at most)."""
    for golden in goldens["completions"]:
        count = next((i for i, gap in enumerate(golden["gaps"]) if gap < 0.6), len(golden["gaps"]))
        if count:
            # As greedy tokens of fewer steps may end inside a character, compare the bytes' sure part.
            answer = complete(client, model, golden["prompt"], max_tokens=count, logprobs=0)
            assert answer.choices[0].text.rstrip("\ufffd") == golden["text"][:len(answer.choices[0].text.rstrip("\ufffd"))]


def test_logprobs_have_one_entry_per_token(client, model):
    logprobs = complete(client, model, logprobs=2).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 16
    assert len(logprobs.text_offset) == 16 and logprobs.text_offset == sorted(logprobs.text_offset)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
        assert logprob <= 0
        if token.isascii():  # a stray byte has no text of its own by which it could be told from another
            assert top[token] == logprob == max(top.values())


def test_logit_bias_forces_and_forbids(client, model, goldens):
    forced = complete(client, model, max_tokens=3, logit_bias={"300": 100})
    one = complete(client, model, max_tokens=1, logit_bias={"300": 100})
    assert one.choices[0].text and forced.choices[0].text == 3 * one.choices[0].text
    golden = next(c for c in goldens["completions"] if c["gaps"][0] > 0.6)
    free = complete(client, model, golden["prompt"], max_tokens=1).choices[0].text
    other = complete(client, model, golden["prompt"], max_tokens=1, logit_bias={str(golden["greedy"][0]): -100})
    assert other.choices[0].text != free


def test_penalties_change_the_text(client, model):
    plain = complete(client, model, max_tokens=128).choices[0].text
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert complete(client, model, max_tokens=128, **penalty).choices[0].text != plain
    repetition = complete(client, model, max_tokens=128, extra_body=ON | {"repetition_penalty": 2.0})
    assert repetition.choices[0].text != plain


@pytest.mark.parametrize("narrow", [{"top_p": 1e-6}, {"extra_body": ON | {"min_p": 1.0}},
                                    {"extra_body": ON | {"top_k": 1}}], ids=["top_p", "min_p", "top_k"])
def test_narrowest_sampling_is_greedy(client, model, narrow):
    greedy = complete(client, model).choices[0].text
    assert complete(client, model, temperature=1.0, seed=4, **narrow).choices[0].text == greedy


def test_stop_token_id_ends_the_text(client, model, goldens):
    # A golden whose first two tokens are clear of bf16's error and differ.
    golden = next(c for c in goldens["completions"] if min(c["gaps"][:2]) > 0.6 and c["greedy"][0] != c["greedy"][1])
    before = complete(client, model, golden["prompt"], max_tokens=1).choices[0].text
    answer = complete(client, model, golden["prompt"], max_tokens=16,
                      extra_body=ON | {"stop_token_ids": [golden["greedy"][1]]})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == before


def test_end_token_ends_the_text_unless_told_otherwise(client, model):
    end = {"3": 100}  # <|im_end|>
    answer = complete(client, model, logit_bias=end, extra_body={})
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].text == ""
    assert complete(client, model, logit_bias=end).choices[0].finish_reason == "length"
    held = complete(client, model, logit_bias=end, extra_body={"min_tokens": 5})
    assert held.choices[0].finish_reason == "stop" and held.usage.completion_tokens >= 5
