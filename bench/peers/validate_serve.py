#!/usr/bin/env python3
"""Hold `tandem bench serve` and an independent client (aiperf) against an endpoint whose times are known.

    pip install aiperf
    python bench/peers/validate_serve.py --tandem target/release/tandem --rounds 3

In each round `tandem bench mock` gets a load from either client, one after the other, at the same rate and with
the same lengths. What a client says of TTFT and of the time between tokens is divided by what the mock's script
was (its `/truth`); the table has the largest deviation over the rounds. Nothing else should run meanwhile.
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


def ours(tandem, url, args, seed, folder):
    path = folder / "ours.json"
    subprocess.run(
        [tandem, "bench", "serve", "--base-url", url, "--model", "mock", "--num-prompts", str(args.requests),
         "--request-rate", str(args.rate), "--random-input-len", "16", "--random-output-len", str(args.tokens),
         "--seed", str(seed), "--metric-percentiles", "50,99", "--save-result", str(path)],
        check=True, stdout=subprocess.DEVNULL)
    result = json.loads(path.read_text())
    assert result["completed"] == args.requests, result["errors_by_kind"]
    print(f"  schedule lag p99 {result['p99_schedule_lag_ms']:.2f} ms", file=sys.stderr)
    return {figure: result[figure] for figure in FIGURES}


def aiperf(url, args, seed, folder):
    out = folder / "aiperf"
    subprocess.run(
        [args.aiperf, "profile", "--model", "mock", "--url", url, "--endpoint-type", "completions", "--streaming",
         "--request-rate", str(args.rate), "--request-count", str(args.requests), "--tokenizer", args.tokenizer,
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
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    clients = {"tandem bench serve": lambda url, seed, folder: ours(args.tandem, url, args, seed, folder)}
    if args.aiperf:
        clients["aiperf"] = lambda url, seed, folder: aiperf(url, args, seed, folder)
    deviations = {name: {figure: [] for figure in FIGURES} for name in clients}
    for seed in range(args.rounds):
        for name, client in clients.items():
            with tempfile.TemporaryDirectory() as folder, Mock(args.tandem, seed) as mock:
                told, truth = client(mock.url, seed, pathlib.Path(folder)), mock.truth()
            assert truth["completed"] == args.requests, truth
            for figure in FIGURES:
                deviation = told[figure] / truth[figure] - 1
                deviations[name][figure].append(deviation)
                print(f"round {seed} {name} {figure} {told[figure]:.3f} of {truth[figure]:.3f}: {deviation:+.3%}",
                      file=sys.stderr)
    print(f"| {args.requests} requests at {args.rate:g}/s, {args.tokens} tokens | " + " | ".join(FIGURES) + " |")
    print("|---|" + "---|" * len(FIGURES))
    for name, by_figure in deviations.items():
        print(f"| {name} | " + " | ".join(f"{max(by_figure[figure], key=abs):+.2%}" for figure in FIGURES) + " |")


if __name__ == "__main__":
    main()
