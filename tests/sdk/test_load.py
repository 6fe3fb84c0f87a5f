"""Many clients at once, clients that leave, and a server that is told to stop."""
import json
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, binary

ON = {"ignore_eos": True}


def test_64_concurrent_clients_get_the_texts_they_would_get_alone(server, model):
    prompts = [f"{i}: " + "the old clock waits for the sea, " * (i % 7) for i in range(64)]

    def ask(i, stream):
        with server.client() as client:
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": prompts[i]}], max_tokens=16 + i % 17, stream=stream,
                extra_body=ON, **({"temperature": 0} if i % 3 else {"temperature": 1.0, "seed": i}))
            if stream:
                return "".join(c.choices[0].delta.content or "" for c in answer)
            return answer.choices[0].message.content

    alone = [ask(i, stream=False) for i in range(64)]
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, range(64), [i % 2 == 0 for i in range(64)]))
    assert together == alone


def test_client_that_leaves_mid_stream_stops_the_work(server, client, model):
    server.wait_idle()
    before = server.metric("vllm:generation_tokens_total")
    streams = [client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": f"{i} Tell me everything."}], max_tokens=3500, stream=True,
        extra_body=ON) for i in range(4)]
    for stream in streams:
        for _ in range(3):
            next(stream)
    server.wait_until(lambda: server.num_unfinished() > 0, "requests running")
    for stream in streams:
        stream.close()
    server.wait_idle()
    made = server.metric("vllm:generation_tokens_total") - before
    assert made < 4 * 3500, "nobody was there to read the rest"


def test_client_that_leaves_while_it_waits_for_a_whole_answer_stops_the_work(server, model):
    server.wait_idle()
    before = server.metric("vllm:generation_tokens_total")
    body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 3500, "n": 4, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: tandem\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body) + body)
        server.wait_until(lambda: server.num_unfinished() > 0, "the request running")
    server.wait_idle()
    assert server.metric("vllm:generation_tokens_total") - before < 4 * 3500


def test_text_after_a_cancelled_twin_is_undisturbed(server, client, model):
    options = dict(model=model, prompt="the quiet street " * 20, temperature=0, extra_body=ON)
    whole = client.completions.create(max_tokens=40, **options).choices[0].text
    for _ in range(5):
        stream = client.completions.create(max_tokens=2000, stream=True, **options)
        next(stream)
        stream.close()
    assert client.completions.create(max_tokens=40, **options).choices[0].text == whole
    server.wait_idle()


def test_interrupt_lets_a_running_stream_end(start):
    server = start()
    with server.client() as client:
        model = client.models.list().data[0].id
        stream = client.completions.create(model=model, prompt="Hello", max_tokens=400, stream=True, extra_body=ON,
                                           stream_options={"include_usage": True})
        first = next(stream)
        assert first.choices[0].finish_reason is None
        server.interrupt()
        *rest, last = stream
        assert last.usage.completion_tokens == 400
        assert rest[-1].choices[0].finish_reason == "length"
    server.wait_exit()


def test_interrupted_while_idle_it_leaves_at_once(start):
    server = start()
    server.interrupt()
    server.wait_exit()


@pytest.mark.parametrize("arguments", [("--model", "models/none"), ("--no-such-flag",)])
def test_bad_command_line_ends_with_a_sentence(arguments):
    done = subprocess.run([binary(), "up", "--port", "0", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode not in (0, 101)
    assert arguments[-1].lstrip("-") in done.stderr
    assert "panicked" not in done.stderr
