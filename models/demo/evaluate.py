#!/usr/bin/env python3
"""Ask the running system held-out prompts and count the answers that are exactly right.

    pip install tokenizers==0.23.3
    cargo build --release
    python models/demo/evaluate.py                    # 1,000 prompts per skill and length of recall, 15 minutes
    python models/demo/evaluate.py --count 50         # a quick look

Three ways: split (`tandem up`, every prompt computed by the prefill node, its KV handed over by the fabric),
the same prompt again (a prefix hit on the decode node), and colocated (a decode node alone). The answers of
the three must be equal prompt by prompt; the table is of the split ones. The status is 1 if any differ, if a
prompt has another number of tokens than training would have given it, if a second turn hit no prefix, or if a
skill is below its bar.
"""
import argparse
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
sys.path.insert(0, str(FOLDER / "recipe"))

from tokenizers import Tokenizer  # noqa: E402

import tokens  # noqa: E402
from prompts import SKILLS, prompts, rendered  # noqa: E402

CLIENTS = 8
# What is asked a second time before it can be evicted.
CHUNK = 50
BLOCK_TOKENS = 16
MAX_ANSWER_TOKENS = 128
SPLIT = ["--local-offer-max-tokens", "0"]
COLOCATED = ["--num-prefill-nodes", "0"]


def bar(skill):
    """Exact answers that a skill needs to be kept, in percent."""
    return 95 if skill.startswith("recall") else 90


class Server:
    """A `tandem up` process."""

    def __init__(self, binary, flags):
        command = [binary, "up", "--model", "models/demo", "--port", "0", "--kv-cache-memory-bytes", "512MiB",
                   "--log-level", "warn", *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.port = None
        for line in self.process.stdout:
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if found:
                self.port = int(found.group(1))
                break
        if self.port is None:
            sys.exit(f"{' '.join(map(str, command))} left with {self.process.wait()} before it was ready")
        # What else it prints must not fill the pipe.
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        self.local = threading.local()

    def ask(self, request):
        """(answer, tokens of the prompt, tokens of it that were cached)."""
        body = {"model": "models/demo", "temperature": 0, "max_tokens": MAX_ANSWER_TOKENS, **request}
        if not hasattr(self.local, "connection"):
            self.local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection = self.local.connection
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {text[:500]}")
        answer = json.loads(text)
        usage = answer["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return answer["choices"][0]["message"]["content"], usage["prompt_tokens"], cached

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)


def row(skill, count, encoder, split, colocated, pool):
    """Asks `count` prompts three ways: (exact in percent, tokens from, tokens to, differing answers, faults)."""
    asked, exact, differing, faults, lengths, wrong = prompts(skill, count, encoder), 0, 0, 0, [], None
    for at in range(0, len(asked), CHUNK):
        chunk = asked[at:at + CHUNK]
        requests = [request for request, _ in chunk]
        first, again, alone = (list(pool.map(server.ask, requests)) for server in (split, split, colocated))
        for (request, answer), one, two, three in zip(chunk, first, again, alone):
            lengths.append(one[1])
            exact += one[0] == answer
            differing += not one[0] == two[0] == three[0]
            is_hit = two[2] > 0 or one[1] <= BLOCK_TOKENS
            faults += one[1] != len(rendered(request, encoder)) or not is_hit
            if one[0] != answer and wrong is None:
                wrong = f"first wrong: {request['messages'][-1]['content'][-80:]!r} -> {one[0]!r}, not {answer!r}"
    return 100 * exact / len(asked), min(lengths), max(lengths), differing, faults, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser.add_argument("--binary", type=pathlib.Path, default=target / "release" / "tandem")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--skill", action="append", choices=list(SKILLS), help="only these")
    args = parser.parse_args()
    encoder = tokens.Encoder(Tokenizer.from_file(str(FOLDER / "tokenizer.json")))
    split, colocated = Server(args.binary, SPLIT), Server(args.binary, COLOCATED)
    start, is_good = time.monotonic(), True
    print("| skill | prompts | tokens of the prompt | exact | differ split, again, colocated |\n|---|---|---|---|---|")
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            for skill in args.skill or SKILLS:
                exact, low, high, differing, faults, wrong = row(skill, args.count, encoder, split, colocated, pool)
                print(f"| {skill} | {args.count} | {low} to {high} | {exact:.1f} % | {differing} |", flush=True)
                is_good &= exact >= bar(skill) and not differing and not faults
                for problem in ([wrong] if exact < bar(skill) else []) + ([f"{faults} wrong lengths or no prefix hit"] if faults else []):
                    print(f"{skill}: {problem}", file=sys.stderr)
    finally:
        split.stop()
        colocated.stop()
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
