#!/usr/bin/env python3
"""vLLM's CPU build without a server, for `tandem bench engine --vllm-python`: answers one line of JSON for each it reads.

    {"phase": "prefill", "num_tokens": 512}                              -> {"tokens_per_second": 430.1}
    {"phase": "decode", "batch": 8, "context": 512, "num_tokens": 64}    -> {"tokens_per_second": 91.0}

or {"error": "..."} where there is nothing to count.

Weights are random, whatever the folder holds. Prefill is prompt tokens by the time to the first token; decode counts the
steps in which every sequence of the batch gets a token.
"""
import argparse
import json
import os
import sys
import time

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a checkpoint folder")
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--max-model-len", type=int, required=True)
parser.add_argument("--max-num-seqs", type=int, required=True)
parser.add_argument("--dtype", choices=["bfloat16", "float32"], required=True)
args = parser.parse_args()
cores = sorted(os.sched_getaffinity(0))[:args.threads]
os.environ.update(
    VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)), HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1",
)
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
# The binding alone leaves it two threads where one was asked for.
os.sched_setaffinity(0, cores)


def main():
    # Answers alone go to the standard output; what libraries print does not.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    with open(os.path.join(args.model, "config.json")) as file:
        vocab = json.load(file)["vocab_size"]
    llm = LLM(
        model=args.model, load_format="dummy", skip_tokenizer_init=True, dtype=args.dtype, seed=0,
        max_model_len=args.max_model_len, max_num_seqs=args.max_num_seqs, max_num_batched_tokens=2048,
        enable_prefix_caching=False,
    )
    count = 0

    def run(batch, length, num_tokens):
        """The seconds of each step, and how many sequences got a token in it."""
        nonlocal count
        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True, detokenize=False)
        for index in range(batch):
            count += 1
            tokens = [(i * 7919 + count * 131) % (vocab - 10) + 5 for i in range(length)]
            llm.llm_engine.add_request(str(count), {"prompt_token_ids": tokens}, params)
        steps = []
        while llm.llm_engine.has_unfinished_requests():
            start = time.perf_counter()
            outputs = llm.llm_engine.step()
            steps.append((time.perf_counter() - start, len(outputs)))
        return steps

    def measure(row):
        if row["phase"] == "prefill":
            seconds = sum(seconds for seconds, _ in run(1, row["num_tokens"], 1))
            return {"tokens_per_second": row["num_tokens"] / seconds}
        batch = row["batch"]
        steps = run(batch, row["context"], row["num_tokens"])
        # The first of these still has the end of a prompt in it.
        whole = [seconds for seconds, num in steps if num == batch][1:]
        if not whole:
            return {"error": "no two steps gave every sequence a token: generate more tokens"}
        return {"tokens_per_second": batch * len(whole) / sum(whole)}

    run(1, 64, 4)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps(measure(json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
