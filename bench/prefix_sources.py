#!/usr/bin/env python3
"""Time to first token of a long shared prefix, by where its KV comes from.

    cargo build --release
    target/release/tandem model random s /tmp/model-s
    python bench/prefix_sources.py --tandem target/release/tandem --model /tmp/model-s --tokens 512,2048

Each source is a `tandem up` of its own whose settings leave no other way: small pools give the prompt up to the
prompts that follow it, so that it comes back from one tier, or by computing it again. For the peer there are two
prefill nodes with a core each: the one that holds the prefix is busy with a longer prompt, so the proxy goes to the
other, which fetches the prefix from it. All run at the same time and idle but for the one that is asked; rounds go
through all sources in turn. The answer's `cached_tokens` prove that the prefix was not computed. Redis is started
here if `redis-server` is installed.
"""
import argparse
import json
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

from server import Server, free_port

NUM_OTHERS = 3
# What follows a prompt must push it out, whatever is worth keeping; and a node's own choice between loading and
# computing is not the question here.
EVICT = ["--eviction-policy", "lru"]
LOAD = ["--store-bytes-per-second", "100GiB"]


class Source(Server):
    """Where a prefix may come from."""

    def ask_again(self, prompt, others):
        """The same prompt when `others` have been asked since."""
        self.ask(prompt)
        for other in others:
            self.ask(other)
        return self.ask(prompt)

    def ask(self, prompt):
        """Milliseconds until the first token, and the prompt tokens that were not computed."""
        body = json.dumps({"model": self.model, "prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True,
                           "ignore_eos": True, "stream_options": {"include_usage": True}}).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"content-type": "application/json"})
        begun, first, cached = time.perf_counter(), None, None
        with urllib.request.urlopen(request, timeout=300) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if event["choices"] and first is None:
                    first = time.perf_counter()
                if event.get("usage"):
                    cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
        return (first - begun) * 1e3, cached


class OneProcess(Source):
    """Every role in one process."""

    def __init__(self, tandem, model, flags, log):
        port = free_port()
        super().__init__(port, log, [[tandem, "up", "--model", model, "--port", port, *flags]])


class Peers(Source):
    """Two prefill nodes, one of which has the prefix and is busy, so that the other one is asked."""

    def __init__(self, tandem, model, flags, folder):
        certs = folder / "certs"
        subprocess.run([tandem, "certs", "--dir", certs, "--prefill-node", "prefill-0", "--prefill-node", "prefill-1",
                        "--decode-node", "decode-0", "--proxy", "proxy"], check=True, stdout=subprocess.DEVNULL)
        port, *nodes = (free_port() for _ in range(4))
        common = ["--tls-dir", str(certs), "--model", model]
        node = lambda role, name, at: [tandem, role, "--node-id", name, "--port", str(at), "--threads", "1", *common,
                                       *flags]
        listed = [word for flag, at in zip(("--prefill-node", "--prefill-node", "--decode-node"), nodes)
                  for word in (flag, f"127.0.0.1:{at}")]
        super().__init__(port, folder / "peers.log", [
            ["taskset", "-c", "0", *node("prefill-node", "prefill-0", nodes[0])],
            ["taskset", "-c", "1", *node("prefill-node", "prefill-1", nodes[1])],
            # It holds no prefix itself: that would be the nearer way.
            ["taskset", "-c", "1", *node("decode-node", "decode-0", nodes[2]), "--no-enable-prefix-caching"],
            [tandem, "proxy", "--node-id", "proxy", "--port", str(port), *common, *listed],
        ])

    def ask_again(self, prompt, others):
        """`others` follow the prompt where it is held, and keep that node busy."""
        self.ask(prompt)
        busy = threading.Thread(target=self.ask, args=(prompt + sum(others, []),))
        busy.start()
        # Until it has reached the node.
        time.sleep(0.3)
        found = self.ask(prompt + others[0][:16])
        assert busy.is_alive(), "the node that holds the prefix was not busy: ask for fewer tokens"
        busy.join()
        return found


def kv_bytes_per_token(model):
    config = json.loads((pathlib.Path(model) / "config.json").read_text())
    return config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2 * 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", default="512,2048")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    lengths = [int(length) for length in args.tokens.split(",")]
    per_token = kv_bytes_per_token(args.model)
    # One prompt and a half: what follows pushes it out.
    small = str(int(max(lengths) * per_token * 1.5) + 64 * per_token)
    large = str(max(lengths) * per_token * 64)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tandem-sources-"))
    redis = None
    tiers = {"host memory": ["--store-host-bytes", "4GiB"],
             "local disk": ["--store-disk-path", str(folder / "disk"), "--store-disk-bytes", "4GiB"],
             "shared folder": ["--store-remote-url", f"fs://{folder / 'shared'}"]}
    if shutil.which("redis-server"):
        port = free_port()
        redis = subprocess.Popen(["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "",
                                  "--dir", str(folder)], stdout=subprocess.DEVNULL)
        tiers["Redis"] = ["--store-remote-url", f"redis://127.0.0.1:{port}/0"]
    sources = {"computed": ["--kv-cache-memory-bytes", small, *EVICT], "pool": ["--kv-cache-memory-bytes", large]}
    for name, flags in tiers.items():
        sources[name] = ["--kv-cache-memory-bytes", small, *EVICT, *flags, *LOAD]
    servers = {}
    try:
        for name, flags in sources.items():
            servers[name] = OneProcess(args.tandem, args.model, flags, folder / f"{name.replace(' ', '-')}.log")
        servers["peer, busy"] = Peers(args.tandem, args.model, ["--kv-cache-memory-bytes", large], folder)
        rng = random.Random(0)
        prompt = lambda length: [rng.randrange(5, 500) for _ in range(length)]
        print("| prefix from | " + " | ".join(f"{n} tokens, ms (of computed)" for n in lengths) + " |")
        print("|---|" + "---|" * len(lengths))
        times = {name: {length: [] for length in lengths} for name in servers}
        for length in lengths:
            for round_number in range(args.rounds + 1):
                for name, server in servers.items():
                    own = prompt(length)
                    others = [prompt(max(lengths)) for _ in range(0 if name == "pool" else NUM_OTHERS)]
                    took, cached = server.ask_again(own, others)
                    expected = 0 if name == "computed" else length - 16
                    assert (cached >= expected if expected else cached < 16), f"{name}: {cached} of {length} tokens were cached"
                    if round_number:
                        times[name][length].append(took)
                    print(f"{name}, {length} tokens, round {round_number}: {took:.1f} ms, {cached} cached", file=sys.stderr)
        for name, of_length in times.items():
            cells = []
            for length in lengths:
                ratio = statistics.median(t / c for t, c in zip(of_length[length], times["computed"][length]))
                cells.append(f"{statistics.median(of_length[length]):.1f} ({ratio:.3f})")
            print(f"| {name} | " + " | ".join(cells) + " |")
    finally:
        for server in servers.values():
            server.stop()
        if redis:
            redis.terminate()
            redis.wait()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
