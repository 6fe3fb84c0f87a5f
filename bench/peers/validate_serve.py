#!/usr/bin/env python3
"""Hold `tandem bench serve` and an independent client (aiperf) against an endpoint whose times are known.

    pip install aiperf
    python bench/peers/validate_serve.py --tandem target/release/tandem --rounds 3

In each round `tandem bench mock` gets a load of `--rate` requests per second from `tandem bench serve`, and then one
of `--shared-rate` from either client, one after the other, with the same lengths: a client in Python does not keep up
with the first. What a client says of TTFT and of the time between tokens is divided by what the mock's script was (its
`/truth`); the tables have the largest deviation over the rounds. Nothing else should run meanwhile: a wake-up that the
machine delays is measured like one that the endpoint does.
"""
import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import urllib.request

FIGURES = ["mean_ttft_ms", "p50_ttft_ms", "p99_ttft_ms", "mean_itl_ms"]


class Load:
    """How many requests at which rate."""

    def __init__(self, rate, seconds):
        self.rate, self.requests = rate, int(rate * seconds)


class Mock:
    """A mock endpoint that is gone behind the `with`."""

    def __init__(self, tandem, seed):
        self.args = [tandem, "bench", "mock", "--ttft-ms", "100", "--itl-ms", "20", "--seed", str(seed)]

    def __enter__(self):
        self.process = subprocess.Popen(self.args, stdout=subprocess.PIPE, text=True)
        self.url = re.match(r"listening on (\S+)", self.process.stdout.readline())[1]
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def truth(self):
        with urllib.request.urlopen(f"{self.url}/truth") as answer:
            return json.load(answer)


def ours(tandem, url, args, load, seed, folder):
    path = folder / "ours.json"
    subprocess.run(
        [tandem, "bench", "serve", "--base-url", url, "--model", "mock", "--num-prompts", str(load.requests),
         "--request-rate", str(load.rate), "--random-input-len", "16", "--random-output-len", str(args.tokens),
         "--seed", str(seed), "--metric-percentiles", "50,99", "--save-result", str(path)],
        check=True, stdout=subprocess.DEVNULL)
    result = json.loads(path.read_text())
    assert result["completed"] == load.requests, result["errors_by_kind"]
    print(f"  schedule lag p99 {result['p99_schedule_lag_ms']:.2f} ms", file=sys.stderr)
    return {figure: result[figure] for figure in FIGURES}


def aiperf(url, args, load, seed, folder):
    out = folder / "aiperf"
    subprocess.run(
        [args.aiperf, "profile", "--model", "mock", "--url", url, "--endpoint-type", "completions", "--streaming",
         "--request-rate", str(load.rate), "--request-count", str(load.requests), "--tokenizer", args.tokenizer,
         "--synthetic-input-tokens-mean", "16", "--output-tokens-mean", str(args.tokens),
         "--extra-inputs", f"max_tokens:{args.tokens}", "--use-server-token-count", "--random-seed", str(seed),
         "--ui", "none", "--output-artifact-dir", str(out)],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    result = json.loads(next(out.rglob("profile_export_aiperf.json")).read_text())
    ttft, itl = result["time_to_first_token"], result["inter_token_latency"]
    return {"mean_ttft_ms": ttft["avg"], "p50_ttft_ms": ttft["p50"], "p99_ttft_ms": ttft["p99"],
            "mean_itl_ms": itl["avg"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", required=True)
    parser.add_argument("--aiperf", help="aiperf's program; left out without it")
    parser.add_argument("--tokenizer", default="models/tiny", help="any folder with a tokenizer, for aiperf's prompts")
    parser.add_argument("--rate", type=float, default=500)
    parser.add_argument("--shared-rate", type=float, default=50)
    parser.add_argument("--seconds", type=float, default=10, help="how long a run sends")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    serve = ("tandem bench serve", lambda *run: ours(args.tandem, *run))
    runs = [(Load(args.rate, args.seconds), *serve)]
    if args.aiperf:
        shared = Load(args.shared_rate, args.seconds)
        runs += [(shared, *serve), (shared, "aiperf", lambda *run: aiperf(*run))]
    told = {(load.rate, name): [] for load, name, _ in runs}
    for seed in range(args.rounds):
        for load, name, client in runs:
            with tempfile.TemporaryDirectory() as folder, Mock(args.tandem, seed) as mock:
                figures, truth = client(mock.url, args, load, seed, pathlib.Path(folder)), mock.truth()
            assert truth["completed"] == load.requests, truth
            told[load.rate, name].append({figure: figures[figure] / truth[figure] for figure in FIGURES})
            print(f"round {seed}, {load.rate:g}/s, {name}: " + ", ".join(
                f"{figure} {figures[figure]:.3f} of {truth[figure]:.3f}" for figure in FIGURES), file=sys.stderr)
    print(f"| largest deviation of {args.rounds} rounds, {args.tokens} tokens | " + " | ".join(FIGURES) + " |")
    print("|---|" + "---|" * len(FIGURES))
    for (rate, name), rounds in told.items():
        row(f"{name} from the truth, {rate:g} requests/s", rounds)
    if args.aiperf:
        pairs = zip(told[args.shared_rate, "tandem bench serve"], told[args.shared_rate, "aiperf"])
        row(f"tandem bench serve from aiperf, {args.shared_rate:g} requests/s",
            [{figure: one[figure] / other[figure] for figure in FIGURES} for one, other in pairs])


def row(name, rounds):
    worst = (max((round[figure] - 1 for round in rounds), key=abs) for figure in FIGURES)
    print(f"| {name} | " + " | ".join(f"{deviation:+.2%}" for deviation in worst) + " |")


if __name__ == "__main__":
    main()
