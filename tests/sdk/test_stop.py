"""Stop strings: found wherever they lie, never shown, and held text is not lost."""
import pytest

PROMPT = "Hello, world!"


def complete(client, model, **options):
    return client.completions.create(
        model=model, prompt=PROMPT, temperature=0, max_tokens=64, extra_body={"ignore_eos": True}, **options)


@pytest.fixture
def greedy(client, model):
    """(text, tokens as text) of the undisturbed answer."""
    choice = complete(client, model, logprobs=0).choices[0]
    return choice.text, choice.logprobs.tokens


def streamed(client, model, **options):
    text, finishes = "", []
    for chunk in complete(client, model, stream=True, **options):
        text += chunk.choices[0].text
        finishes += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    return text, finishes


def boundary_stops(text, tokens):
    """Stop strings made of the end of one token and the beginning of the next, each at its first occurrence."""
    for left, right in zip(tokens[2:], tokens[3:]):
        stop = left[-2:] + right[:2]
        if left and right and stop.isprintable() and stop.isascii() and text.find(stop) > 0:
            yield stop


def test_stop_inside_a_token(client, model, greedy):
    text, tokens = greedy
    stop = next(t[1:-1] for t in tokens[4:] if len(t) > 3 and t.isascii() and text.find(t[1:-1]) > 0)
    choice = complete(client, model, stop=stop).choices[0]
    assert choice.text == text[:text.index(stop)]
    assert choice.finish_reason == "stop"
    assert streamed(client, model, stop=stop) == (choice.text, ["stop"])


def test_stop_across_tokens(client, model, greedy):
    text, tokens = greedy
    stops = list(boundary_stops(text, tokens))[:6]
    assert len(stops) >= 3
    for stop in stops:
        choice = complete(client, model, stop=stop).choices[0]
        assert choice.text == text[:text.index(stop)]
        assert choice.finish_reason == "stop"
        assert streamed(client, model, stop=[stop]) == (choice.text, ["stop"])


def test_earliest_of_several_stops_wins(client, model, greedy):
    text, tokens = greedy
    stops = list(boundary_stops(text, tokens))[:3]
    choice = complete(client, model, stop=stops[::-1]).choices[0]
    assert choice.text == text[:min(text.index(s) for s in stops)]


def test_text_held_back_for_a_stop_that_never_comes_is_given(client, model, greedy):
    text, tokens = greedy
    # A prefix of this stop string ends the text, another lies in its middle.
    for stop in (text[-3:] + "never", text[10:14] + "never"):
        assert complete(client, model, stop=stop).choices[0].text == text
        assert streamed(client, model, stop=stop) == (text, ["length"])


def test_stop_in_the_prompt_does_not_count(client, model, greedy):
    assert "world" not in greedy[0]
    assert complete(client, model, stop="world").choices[0].text == greedy[0]


def test_stop_ends_the_work_too(server, client, model, greedy):
    text, tokens = greedy
    stop = next(boundary_stops(text, tokens))
    answer = client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=3000, stop=stop,
                                       extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens < 64
    server.wait_idle()


def test_stop_ends_one_choice_and_not_the_others(client, model):
    options = dict(model=model, prompt=PROMPT, n=3, seed=8, temperature=1.0, max_tokens=48,
                   extra_body={"ignore_eos": True})
    plain = [c.text for c in client.completions.create(**options).choices]
    stop = next(plain[1][i:i + 4] for i in range(8, len(plain[1]) - 4)
                if plain[1][i:i + 4].isascii() and all(plain[1][i:i + 4] not in plain[j] for j in (0, 2)))
    stopped = client.completions.create(stop=stop, **options).choices
    assert [c.finish_reason for c in stopped] == ["length", "stop", "length"]
    assert [c.text for c in stopped] == [plain[0], plain[1][:plain[1].index(stop)], plain[2]]
