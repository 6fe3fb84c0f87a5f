"""The shared tier on S3: moto's server, which speaks its protocol, stands for one."""
import subprocess
import sys
import threading
import urllib.request

import pytest

from conftest import MODEL, Server

# moto takes any.
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
PROMPT = list(range(40, 240))


@pytest.fixture
def bucket():
    """The address of an empty bucket's server; it ends with the test."""
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        # Werkzeug says where it listens.
        line = next(line for line in process.stderr if "Running on http://" in line)
        # By name: the first address of loopback in the node's log is taken for the endpoint's.
        endpoint = line.split("Running on ")[1].split()[0].replace("127.0.0.1", "localhost")
        # What it says later must not fill the pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        urllib.request.urlopen(urllib.request.Request(endpoint + "/bucket", method="PUT"), timeout=30).close()
        yield endpoint
    finally:
        process.kill()
        process.wait()


def test_kv_survives_all_nodes_in_a_bucket(bucket, monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    url = f"s3://bucket/kv?region=us-east-1&endpoint={bucket}"
    # Loading is slower than computing a model of this size, which is not the question here.
    flags = ["--store-remote-url", url, "--store-bytes-per-second", "100GiB", "--store-remote-timeout", "20s"]
    answers, cached = [], []
    for turn in range(2):
        server = Server(*flags)
        try:
            body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
            answer = server.post("/v1/completions", body)
            answers.append(answer["choices"][0]["text"])
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            if turn == 0:
                server.wait_until(lambda: stored(bucket) >= len(PROMPT) // 16, "the prompt is in the bucket", 60)
        finally:
            server.stop()
    assert cached[0] == 0 and cached[1] >= 176, cached
    assert answers[0] == answers[1]


def stored(endpoint):
    with urllib.request.urlopen(f"{endpoint}/bucket?list-type=2", timeout=30) as answer:
        return answer.read().decode().count("<Key>")
