"""A prefill node or two, a decode node and the proxy as processes of their own, and requests to them."""
import contextlib
import json
import re
import signal
import socket
import time
import urllib.error
import urllib.request

from run import Failed

READY_SECONDS = 90


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Nodes:
    """Each process writes to a log of its own; all end with the `with` block."""

    def __init__(self, machine, model, flags="", prefill_flags="", decode_flags="", num_prefill=1, env=None):
        self.machine, self.children, self.logs, self.env = machine, {}, {}, env or {}
        self.folder = machine.work / "nodes"
        self.folder.mkdir(exist_ok=True)
        self.tandem, self.model = machine.program("tandem"), model
        certs = self.folder / "certs"
        if not certs.exists():
            names = ["--prefill-node", "prefill-0", "--prefill-node", "prefill-1", "--decode-node", "decode-0"]
            machine.check([self.tandem, "certs", "--dir", certs, *names, "--proxy", "proxy"])
        common = ["--tls-dir", certs, "--model", model]
        engine = [*common, "--metrics-port", "0", *flags.split()]
        decode_port, self.port, self.metrics_port = free_port(), free_port(), free_port()
        engine_of_decode = [word if word != "0" else str(self.metrics_port) for word in engine]
        nodes = ["--decode-node", f"127.0.0.1:{decode_port}"]
        for index in range(num_prefill):
            port = free_port()
            nodes += ["--prefill-node", f"127.0.0.1:{port}"]
            names = ["--node-id", f"prefill-{index}", "--port", port]
            self.start(f"prefill-{index}", ["prefill-node", *names, *engine, *prefill_flags.split()])
        names = ["--node-id", "decode-0", "--port", decode_port]
        self.start("decode-0", ["decode-node", *names, *engine_of_decode, *decode_flags.split()])
        self.start("proxy", ["proxy", "--node-id", "proxy", "--port", self.port, *common, *nodes])

    def start(self, name, words):
        log = self.folder / f"{name}.log"
        with log.open("w") as output:
            self.children[name] = self.machine.spawn([self.tandem, *words], env=self.env, output=output)
        self.logs[name] = log

    def __enter__(self):
        try:
            limit = time.monotonic() + min(READY_SECONDS, self.machine.left())
            while not self.are_ready():
                for name, child in self.children.items():
                    if child.poll() is not None:
                        raise Failed(f"{name} ended before it was ready: {self.log(name).strip()[-300:]}")
                if time.monotonic() > limit:
                    raise Failed(f"the nodes are not ready after {READY_SECONDS} s")
                time.sleep(0.1)
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        self.machine.end(*self.children.values())
        for name in self.children:
            self.machine.say(f"--- {name}\n{self.log(name)[-20_000:]}")

    def are_ready(self):
        text = self.log("proxy")
        return all(re.search(rf"node={name} .*state=Ready", text) for name in self.children if name != "proxy")

    def log(self, name):
        return re.sub(r"\x1b\[[0-9;]*m", "", self.logs[name].read_text(errors="replace"))

    def kill(self, name, how=signal.SIGKILL):
        """To this process; it is not waited for."""
        self.children[name].send_signal(how)

    def complete(self, tokens, num_tokens, seconds=120):
        """The text that follows a prompt of token ids, drawn greedily."""
        body = {"model": str(self.model), "prompt": tokens, "max_tokens": num_tokens, "temperature": 0}
        body["ignore_eos"] = True
        return self.ask("/v1/completions", body, seconds)["choices"][0]["text"]

    def ask(self, path, body, seconds=120):
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=max(1, min(seconds, self.machine.left()))) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read()[:300].decode(errors="replace")
            raise Failed(f"{path} was answered {error.code}: {said}") from error
        except OSError as error:
            last_words = self.log("decode-0")[-300:]
            raise Failed(f"{path} was not answered: {error}; the decode node's last words: {last_words}") from error

    def metric(self, name, **labels):
        """Of the decode node: the sum of what has these labels."""
        url, lines = f"http://127.0.0.1:{self.metrics_port}/metrics", []
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as page:
            lines = page.read().decode().splitlines()
        labels = [f'{label}="{value}"' for label, value in labels.items()]
        named = [line for line in lines if re.match(rf"{name}[{{ ]", line) and all(label in line for label in labels)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in named)

    def arrived(self, transport):
        return self.metric("tandem_fabric_extent_bytes_total", direction="verified", transport=transport)


def prompt(num_tokens, seed, vocab):
    return [(i * i * 31 + i * 7 + seed * 1009) % (vocab - 10) + 5 for i in range(num_tokens)]
