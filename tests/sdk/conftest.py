"""A `tandem up` process for the tests, started from the dev build, and the client that talks to it.

    TANDEM_BIN    the binary to start (default: $CARGO_TARGET_DIR/debug/tandem, target/debug/tandem)

After every test the server must be idle again, and when it is stopped by SIGINT it must leave with status 0.
"""
import collections
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import threading
import time

import openai
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = "models/tiny"
READY_DEADLINE_S = 60
STOP_DEADLINE_S = 30
IDLE_DEADLINE_S = 15


def binary():
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", "target"))
    return pathlib.Path(os.environ.get("TANDEM_BIN", ROOT / target / "debug" / "tandem"))


class Server:
    """One `tandem up` process. `url` is known once the constructor returns."""

    def __init__(self, *arguments):
        self.lines = collections.deque(maxlen=400)
        self.ready = threading.Event()
        self.url = None
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")}
        self.process = subprocess.Popen(
            [binary(), "up", "--model", MODEL, "--port", "0", *arguments], cwd=ROOT, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, encoding="utf-8", errors="replace")
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        if not self.ready.wait(READY_DEADLINE_S) or self.url is None:
            self.process.kill()
            self.process.wait()
            self.reader.join(5)
            raise AssertionError(f"the server was not ready within {READY_DEADLINE_S} s\n{self.log()}")

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if found and self.url is None:
                self.url = found.group(0)
                self.port = int(found.group(1))
                self.ready.set()
        self.ready.set()

    def log(self):
        return "---- last lines of the server\n" + "".join(self.lines)

    def client(self, api_key="unused"):
        return openai.OpenAI(base_url=self.url + "/v1", api_key=api_key, max_retries=0, timeout=60)

    def request(self, method, path, body=None, headers=None):
        """One plain HTTP request: (status, headers, body as text)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            if body is not None and not isinstance(body, (bytes, str)):
                body = json.dumps(body)
            connection.request(method, path, body, {"Content-Type": "application/json"} | (headers or {}))
            response = connection.getresponse()
            return response.status, response.headers, response.read().decode("utf-8")
        finally:
            connection.close()

    def post(self, path, body):
        """POST, expecting 200: the answer's JSON."""
        status, _, text = self.request("POST", path, body)
        assert status == 200, text
        return json.loads(text)

    def metric(self, name):
        """Sum of a metric over its labels; 0 if it has no sample yet."""
        status, _, text = self.request("GET", "/metrics")
        assert status == 200
        samples = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)", text, re.MULTILINE)
        return sum(float(s) for s in samples)

    def num_unfinished(self):
        return self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting")

    def wait_until(self, condition, what, deadline_s=IDLE_DEADLINE_S):
        end = time.monotonic() + deadline_s
        while not condition():
            assert self.process.poll() is None, f"the server left with status {self.process.returncode}\n{self.log()}"
            assert time.monotonic() < end, f"not within {deadline_s} s: {what}\n{self.log()}"
            time.sleep(0.01)

    def wait_idle(self):
        self.wait_until(lambda: self.num_unfinished() == 0, "no request running or waiting")

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def wait_exit(self):
        try:
            status = self.process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still there {STOP_DEADLINE_S} s after SIGINT\n{self.log()}") from None
        self.reader.join(5)
        assert status == 0, f"left with status {status}\n{self.log()}"

    def stop(self):
        if self.process.poll() is None:
            self.interrupt()
        self.wait_exit()


@pytest.fixture
def start():
    """Starts servers of the test's own: `start("--flag", "value")`."""
    servers = []

    def start_server(*arguments):
        servers.append(Server(*arguments))
        return servers[-1]

    yield start_server
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def shared_server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def server(shared_server):
    """The server most tests share; idle again after each of them."""
    assert shared_server.process.poll() is None, f"the server is gone\n{shared_server.log()}"
    yield shared_server
    shared_server.wait_idle()


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def model(shared_server):
    """The name under which the model is served."""
    with shared_server.client() as client:
        return client.models.list().data[0].id


@pytest.fixture(scope="session")
def goldens():
    """What Transformers makes of the same checkpoint: tests/checkpoints/README.md."""
    return json.loads((ROOT / "tests" / "checkpoints" / "tiny.json").read_text(encoding="utf-8"))
