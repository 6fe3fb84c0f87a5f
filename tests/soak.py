#!/usr/bin/env python3
"""Hours of what tests/losses.rs does for seconds: nodes are killed, frozen and drained at random while clients ask.

    cargo build --release
    python tests/soak.py --tandem target/release/tandem --minutes 20

Two prefill nodes, two decode nodes and a proxy, as processes with settings drawn anew for each round: transports,
tiers of the prefix-block store, block sizes, small pools that preempt. Clients stream or do not, leave in the middle, ask for
several choices and log-probabilities. Every answer has to be the one that a single undisturbed node gave to the same
request, or a refusal that says when to come again. After each round the nodes have to be idle and empty-handed: nothing
referenced, no request, landing, stream or pinned byte left, and nobody but who was killed has ended.

The last line says "N answers, N refused, N failed"; the status is 0 only if nothing failed. With `--seed` and `--rounds`
a round is drawn again (its timing is the machine's own).
"""
import argparse
import collections
import http.client
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))
from server import Server, free_port  # noqa: E402

NUM_REQUESTS = 160 # that a node answers once, and clients draw from
ANSWER_SECONDS = 90 # no request takes longer, whatever is lost
IDLE_SECONDS = 20
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Of a node at rest, each 0. Registrations and connections stay with peers that stay.
AT_REST = ["kv_blocks_referenced", "num_requests_running", "num_requests_waiting", "open_requests", "fabric_landings",
           "fabric_receive_bytes"]


def request_bodies(rng, model):
    bodies = []
    shared = ["".join(rng.choices(LETTERS + " ", k=rng.randrange(200, 2000))) for _ in range(6)]
    for index in range(NUM_REQUESTS):
        prompt = "".join(rng.choices(LETTERS + " ", k=rng.choice([3, 30, 200, 900, 2500])))
        if index % 3 == 0:
            prompt = rng.choice(shared) + prompt[:200]
        body = {"model": model, "prompt": prompt, "max_tokens": rng.choice([1, 8, 40, 120]), "ignore_eos": True}
        if index % 2:
            body |= {"temperature": 1.0, "seed": rng.randrange(1 << 30), "top_p": rng.choice([1.0, 0.9])}
        else:
            body |= {"temperature": 0.0}
        if index % 5 == 0:
            body |= {"n": 2} if index % 2 else {}
        if index % 7 == 0:
            body |= {"logprobs": 3}
        if index % 11 == 0:
            body |= {"presence_penalty": 0.7, "frequency_penalty": 0.3}
        bodies.append(body)
    return bodies


def answer_of(choices):
    """What has to be the same, whoever computed it."""
    return [(choice["text"], choice["finish_reason"]) for choice in sorted(choices, key=lambda choice: choice["index"])]


def ask(url, body, stream=False, leave_after=None):
    """The answer, or ('refused' | 'left' | 'failed', why)."""
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body | {"stream": stream}).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as reply:
            if not stream:
                return "answer", answer_of(json.load(reply)["choices"])
            choices = collections.defaultdict(lambda: ["", None])
            for number, line in enumerate(reply):
                if leave_after is not None and number >= leave_after:
                    return "left", None
                line = line.strip()
                if not line.startswith(b"data: "):
                    continue
                if line == b"data: [DONE]":
                    return "answer", [tuple(choices[index]) for index in sorted(choices)]
                event = json.loads(line[6:])
                if "error" in event:
                    return "failed", f"in the stream: {event}"
                for choice in event["choices"]:
                    choices[choice["index"]][0] += choice["text"]
                    choices[choice["index"]][1] = choice["finish_reason"] or choices[choice["index"]][1]
            return "failed", "the stream ended without [DONE]"
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        if error.code in (429, 503) and error.headers.get("Retry-After"):
            return "refused", text
        return "failed", f"{error.code}: {text}"
    except (OSError, http.client.HTTPException) as error:
        return "failed", f"{type(error).__name__}: {error}"


class Node:
    """A process that is started again after it was ended."""

    def __init__(self, name, command, metrics_port, log):
        self.name, self.command, self.metrics_port, self.log = name, [str(word) for word in command], metrics_port, log
        self.lock, self.is_meant_to_run = threading.Lock(), True
        self.start()

    def start(self):
        with self.log.open("a") as out:
            self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=out)
        self.is_meant_to_run = True

    def strike(self, rng):
        """Something that happens to nodes."""
        with self.lock:
            blow = rng.choice(["kill", "freeze", "freeze", "drain"])
            if blow == "freeze":
                self.process.send_signal(signal.SIGSTOP)
                time.sleep(rng.choice([0.2, 1.0, 2.5, 6.0]))
                self.process.send_signal(signal.SIGCONT)
                return blow
            self.is_meant_to_run = False
            self.process.send_signal(signal.SIGKILL if blow == "kill" else signal.SIGTERM)
            status = self.process.wait(timeout=60)
            # One that has only begun has nothing to drain.
            if blow == "drain" and status not in (0, -signal.SIGTERM):
                raise RuntimeError(f"{self.name} ended with {status} when it was drained")
            time.sleep(rng.choice([0.0, 0.5, 3.0]))
            self.start()
            return blow

    def metrics(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        values = collections.Counter()
        for line in lines:
            if line and not line.startswith("#"):
                name, value = line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
                values[name.removeprefix("tandem_")] += float(value)
        return values

    def stop(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "had to be killed"


class Proxy(Server):
    """The proxy, whose metrics are on its own port."""


def cluster(args, rng, folder):
    certs = folder / "certs"
    names = ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    flags = [word for name in names for word in (f"--{name.split('-')[0]}-node", name)]
    subprocess.run([args.tandem, "certs", "--dir", certs, "--proxy", "proxy", *flags], check=True, stdout=subprocess.DEVNULL)
    ports = {name: free_port() for name in names}
    transports = rng.choice(["quic", "quic,shm"])
    store = rng.choice([[], ["--store-host-bytes", "64MiB"], ["--store-remote-url", f"fs://{folder}/store"]])
    nodes = []
    for name in names:
        role, metrics_port = name.split("-")[0], free_port()
        small = role == "decode" and rng.random() < 0.5
        more = ["--kv-cache-memory-bytes", rng.choice(["6MiB", "12MiB"])] if small else []
        block = rng.choice([16, 32])
        more += ["--kv-connections", 3] if role == "decode" and rng.random() < 0.3 else []
        command = [args.tandem, f"{role}-node", "--node-id", name, "--tls-dir", certs, "--port", ports[name], "--model",
                   args.model, "--metrics-port", metrics_port, "--block-size", block, "--kv-transports", transports,
                   "--threads", 1, "--drain-timeout", "5s", *store, *more]
        print("   ", " ".join(str(word) for word in command[7:]), flush=True)
        nodes.append(Node(name, command, metrics_port, folder / f"{name}.log"))
    port = free_port()
    listed = [word for name in names for word in (f"--{name.split('-')[0]}-node", f"127.0.0.1:{ports[name]}")]
    proxy = Proxy(port, folder / "proxy.log", [[args.tandem, "proxy", "--node-id", "proxy", "--tls-dir", certs, "--model",
                                               args.model, "--port", port, "--retry-budget", "10", *listed]])
    return proxy, nodes


class Soak:
    def __init__(self, args):
        self.args, self.counts, self.failures, self.lock = args, collections.Counter(), [], threading.Lock()

    def fail(self, why):
        with self.lock:
            self.failures.append(why)
        print(f"FAILED: {why}", flush=True)

    def client(self, url, number, seed, until):
        rng = random.Random(seed)
        while time.monotonic() < until:
            index = rng.randrange(NUM_REQUESTS)
            stream = rng.random() < 0.7
            leave_after = rng.randrange(30) if stream and rng.random() < 0.2 else None
            started = time.monotonic()
            what, said = ask(url, self.bodies[index], stream, leave_after)
            took = time.monotonic() - started
            with self.lock:
                self.counts[what] += 1
            if what == "failed":
                self.fail(f"client {number}, request {index} after {took:.1f} s: {said}")
            elif what == "answer" and said != self.wanted[index]:
                self.fail(f"client {number}, request {index}: {said} instead of {self.wanted[index]}")
            elif what == "refused":
                time.sleep(0.5)

    def blows(self, nodes, rng, until):
        while time.monotonic() < until:
            time.sleep(rng.uniform(0.5, 6.0))
            node = rng.choice(nodes)
            try:
                if node.is_meant_to_run and node.process.poll() is not None:
                    self.fail(f"{node.name} has ended by itself with status {node.process.returncode}")
                    node.start()
                blow = node.strike(rng)
                with self.lock:
                    self.counts[blow] += 1
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                self.fail(str(error))
                node.process.kill()
                node.process.wait()
                node.start()

    def at_rest(self, proxy, nodes):
        """Everybody is idle and holds nothing, in the end."""
        until, left = time.monotonic() + IDLE_SECONDS, ["not asked"]
        while left and time.monotonic() < until:
            time.sleep(0.5)
            left = []
            for node in nodes:
                try:
                    metrics = node.metrics()
                except OSError as error:
                    left.append(f"{node.name} does not answer: {error}")
                    continue
                left += [f"{node.name}: {name} {metrics[name]:.0f}" for name in AT_REST if metrics[name] != 0]
            open_requests = [line for line in proxy.get("/metrics").splitlines() if line.startswith("tandem_open_requests")]
            left += [f"proxy: {line}" for line in open_requests if not line.endswith(" 0")]
        for what in left:
            self.fail(f"after {IDLE_SECONDS} s of rest {what}")

    def reference(self, folder):
        port = free_port()
        single = Server(port, folder / "single.log", [[self.args.tandem, "up", "--model", self.args.model, "--port", port,
                                                       "--num-prefill-nodes", 0]])
        try:
            self.bodies, self.wanted = request_bodies(random.Random(self.args.seed), single.model), []
            for body in self.bodies:
                what, said = ask(single.url, body)
                if what != "answer":
                    sys.exit(f"an undisturbed node does not answer {body}: {said}")
                self.wanted.append(said)
        finally:
            single.stop()

    def round(self, number, folder):
        folder.mkdir()
        rng = random.Random(f"{self.args.seed}/{number}")
        print(f"round {number}", flush=True)
        proxy, nodes = cluster(self.args, rng, folder)
        until = time.monotonic() + self.args.round_seconds
        threads = [threading.Thread(target=self.client, args=(proxy.url, index, rng.random(), until))
                   for index in range(self.args.clients)]
        threads.append(threading.Thread(target=self.blows, args=(nodes, rng, until)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        try:
            self.at_rest(proxy, nodes)
        finally:
            for node in nodes:
                status = node.stop()
                if status != 0:
                    self.fail(f"{node.name} ended with {status}")
            if proxy.processes[0].poll() is not None:
                self.fail(f"the proxy has ended by itself with status {proxy.processes[0].returncode}")
            proxy.stop()
        panics = [f"{path.name}: {line}" for path in folder.glob("*.log") for line in path.read_text().splitlines()
                  if "panicked" in line]
        for panic in panics:
            self.fail(panic)
        print("    " + ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items())), flush=True)

    def run(self):
        folder = pathlib.Path(tempfile.mkdtemp(prefix="tandem-soak-"))
        print(f"logs in {folder}", flush=True)
        self.reference(folder)
        until, number = time.monotonic() + 60 * self.args.minutes, self.args.first_round
        while time.monotonic() < until:
            self.round(number, folder / f"round-{number}")
            number += 1
        if not self.failures:
            shutil.rmtree(folder)
        answers, refused = self.counts["answer"], self.counts["refused"]
        print(f"{answers} answers, {refused} refused, {len(self.failures)} failed")
        return 1 if self.failures or answers == 0 else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", type=pathlib.Path, required=True, help="the program")
    parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path("models/demo"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--round-seconds", type=float, default=90)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first-round", type=int, default=0, help="of those that the seed gives")
    sys.exit(Soak(parser.parse_args()).run())


main()
