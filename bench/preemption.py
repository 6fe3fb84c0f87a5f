#!/usr/bin/env python3
"""Inter-token latency of running sequences while others are preempted.

    cargo build --release
    target/release/tandem model random s /tmp/model-s
    python bench/preemption.py --tandem target/release/tandem --model /tmp/model-s

Three decode nodes that prefill by themselves get the same load: `roomy` has blocks for all, `parking` and
`recomputing` have too few, and save the KV of a preempted sequence in the host tier or compute it again. A few
streams begin first; being the oldest they are never preempted, and their inter-token latency is what is told. Then
requests keep coming until the streams end, `--others` at a time, and grow beyond the pool. All nodes are started at once and
idle but for the one that is asked; rounds go through them in turn, beginning with another one each time. Ratios are
within a round, and told as their geometric mean with the lowest and the highest.

Each node's own counters must show what it is for: preemptions in two of them and none in the roomy one, parked
sequences in one of those two and none in the other.
"""
import argparse
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from server import Server, free_port

COUNTERS = ["preemptions_total", "preempted_parked_total", "preempted_restored_total", "preempted_recomputed_total"]
STATISTICS = {"p50": 0.50, "p99": 0.99, "max": 1.0}


class Node(Server):
    def __init__(self, args, name, flags, folder):
        self.args, self.name, self.folder = args, name, folder
        port = free_port()
        start = [args.tandem, "up", "--model", args.model, "--port", port, "--num-prefill-nodes", 0,
                 "--growth-window-blocks", 1, *flags]
        super().__init__(port, folder / f"{name}.log", [start])

    def metric(self, name):
        lines = [line for line in self.get("/metrics").splitlines() if line.split("{")[0] == f"tandem_{name}"]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def load(self, name, seed, num, input_len, output_len, *more):
        """`tandem bench serve` in the background, and where its result will be."""
        result = self.folder / f"{self.name}-{name}-{seed}.json"
        command = [self.args.tandem, "bench", "serve", "--base-url", self.url, "--model", self.model,
                   "--num-prompts", num, "--random-input-len", input_len, "--random-output-len", output_len,
                   "--vocab-size", 500, "--ignore-eos", "--seed", seed, "--save-result", result, "--save-detailed", *more]
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return process, result

    def wait_for(self, process):
        _, errors = process.communicate()
        if process.returncode:
            sys.exit(f"{self.name}: a load failed:\n{errors.decode()}")

    def round(self, seed):
        """Inter-token latencies of the streams in ms, and what was counted meanwhile."""
        args = self.args
        before = {counter: self.metric(counter) for counter in COUNTERS}
        streams, result = self.load("streams", seed, args.streams, args.input_len, args.stream_len)
        while self.metric("num_requests_running") < args.streams:
            if streams.poll() is not None:
                self.wait_for(streams)
                sys.exit("the streams were over before the others began: raise --stream-len")
            time.sleep(0.005)
        others, _ = self.load("others", seed + 1, args.num_others, args.input_len, args.output_len,
                              "--max-concurrency", args.others)
        self.wait_for(streams)
        if others.poll() is not None:
            self.wait_for(others)
            sys.exit("the others were over before the streams: raise --num-others")
        # Their connections end with it, and so do they.
        others.kill()
        others.communicate()
        deadline = time.monotonic() + 60
        while self.metric("num_requests_running") + self.metric("num_requests_waiting") > 0:
            if time.monotonic() > deadline:
                sys.exit(f"{self.name} still works on requests whose clients left a minute ago")
            time.sleep(0.01)
        itls = sorted(itl * 1e3 for of_stream in json.loads(result.read_text())["itls"] for itl in of_stream)
        counted = {counter: self.metric(counter) - before[counter] for counter in COUNTERS}
        figures = {name: itls[min(len(itls) - 1, int(share * len(itls)))] for name, share in STATISTICS.items()}
        print(f"round {seed // 2}, {self.name}: {figures}, {counted}", file=sys.stderr)
        return figures, counted


def check(name, counted):
    preempted, parked, restored, recomputed = (counted[counter] for counter in COUNTERS)
    wanted = {"roomy": preempted == 0, "parking": parked > 0 and restored > 0,
              "recomputing": recomputed > 0 and parked == 0}
    if not wanted[name]:
        sys.exit(f"{name} did not do what it is for: {counted}; change --others, --output-len or --share")


def bytes_per_token(model):
    config = json.loads((pathlib.Path(model) / "config.json").read_text())
    return config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2 * 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", required=True, help="the release binary")
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=4, help="sequences whose inter-token latency is measured")
    parser.add_argument("--stream-len", type=int, default=1024, help="tokens that a stream generates")
    parser.add_argument("--others", type=int, default=8, help="further requests at a time")
    parser.add_argument("--num-others", type=int, default=1000, help="further requests, of which those count that come before the streams end")
    parser.add_argument("--input-len", type=int, default=256, help="tokens of every prompt")
    parser.add_argument("--output-len", type=int, default=256, help="tokens that a further request generates")
    parser.add_argument("--share", type=float, default=0.3, help="of the others' KV that the small pools have room for")
    args = parser.parse_args()
    others = args.others * (args.input_len + args.output_len)
    streams = args.streams * (args.input_len + args.stream_len)
    per_token = bytes_per_token(args.model)
    pool = lambda share: ["--kv-cache-memory-bytes", int((streams + share * others) * per_token)]
    # The same tier everywhere, with room for all that could be parked; nothing is loaded from it.
    tier = ["--store-host-bytes", 2 * others * per_token, "--store-bytes-per-second", 0]
    flags = {"roomy": [*pool(1.5), *tier], "parking": [*pool(args.share), *tier],
             "recomputing": [*pool(args.share), *tier, "--parked-kv-bytes", 0]}
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tandem-preemption-"))
    nodes = {}
    try:
        for name, own in flags.items():
            nodes[name] = Node(args, name, own, folder)
        rounds = []
        # The first one only warms up.
        for number in range(args.rounds + 1):
            names = list(nodes)
            turn = names[number % 3:] + names[:number % 3]
            rounds.append({name: nodes[name].round(2 * number) for name in turn})
        rounds = rounds[1:]
        for name in nodes:
            check(name, {counter: sum(one[name][1][counter] for one in rounds) for counter in COUNTERS})
        print("| node | preempted, parked, restored, recomputed | "
              + " | ".join(f"ITL {statistic}, ms (of roomy, lowest to highest)" for statistic in STATISTICS) + " |")
        print("|---|---|" + "---|" * len(STATISTICS))
        for name in nodes:
            counted = ", ".join(f"{sum(one[name][1][counter] for one in rounds):.0f}" for counter in COUNTERS)
            cells = []
            for statistic in STATISTICS:
                values = [one[name][0][statistic] for one in rounds]
                ratios = [one[name][0][statistic] / one["roomy"][0][statistic] for one in rounds]
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                cells.append(f"{sum(values) / len(values):.2f} ({mean:.2f}, {min(ratios):.2f} to {max(ratios):.2f})")
            print(f"| {name} | {counted} | " + " | ".join(cells) + " |")
    finally:
        for node in nodes.values():
            node.stop()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
