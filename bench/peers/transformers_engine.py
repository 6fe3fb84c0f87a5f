#!/usr/bin/env python3
"""PyTorch and Transformers under the rows of `tandem bench engine --transformers-python`: answers one line of JSON for
each it reads.

    {"phase": "prefill", "num_tokens": 512}                              -> {"tokens_per_second": 21430.1}
    {"phase": "decode", "batch": 8, "context": 512, "num_tokens": 64}    -> {"tokens_per_second": 910.0}

or {"skipped": "..."} where a row does not fit its memory.

With the weights of the folder. Attention is PyTorch's `scaled_dot_product_attention`, which takes flash attention for
prompts on a GPU. A prompt is one forward pass with logits of its last token alone. Decode has a static cache of `context
+ num_tokens` positions and, on a GPU, a step recorded as a CUDA graph, as its users do it who want it fast; with
`--compile` the step is what `torch.compile` makes of it, recorded too. The KV of the context is zeros and nobody's time: it is as
long as that of a prompt. Each step's tokens are brought to the host.
"""
import argparse
import json
import os
import sys
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a checkpoint folder")
parser.add_argument("--device", required=True, help="cpu, or a GPU such as cuda:0")
parser.add_argument("--dtype", choices=["bfloat16", "float32"], required=True)
parser.add_argument("--threads", type=int, help="on a CPU")
parser.add_argument("--compile", action="store_true", help="decode by torch.compile")
args = parser.parse_args()
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")


def main():
    # Answers alone go to the standard output; what libraries print does not.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, StaticCache

    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    is_gpu = device.type == "cuda"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa")
    model = model.to(device).eval()
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    count = 0

    def settle():
        if is_gpu:
            torch.cuda.synchronize(device)

    def prefill(num_tokens):
        nonlocal count
        count += 1
        tokens = [(i * 7919 + count * 131) % (config.vocab_size - 10) + 5 for i in range(num_tokens)]
        settle()
        start = time.perf_counter()
        logits = model(torch.tensor([tokens], device=device), use_cache=True, logits_to_keep=1).logits
        logits[:, -1].argmax(-1).tolist()
        return num_tokens / (time.perf_counter() - start)

    class Decode:
        """A batch behind contexts of zeros: one step is one token of each sequence."""

        def __init__(self, batch, context, num_tokens):
            self.context, length = context, context + num_tokens
            self.cache = StaticCache(config=config, max_cache_len=length)
            self.cache.early_initialization(batch, config.num_key_value_heads, head_dim, model.dtype, device)
            self.tokens = torch.full((batch, 1), 5, device=device)
            self.positions = torch.full((batch, 1), context, device=device)
            self.places = torch.arange(length, device=device)
            self.forward = torch.compile(model.forward, dynamic=False) if args.compile else model.forward
            self.reset()
            self.graph = None
            if is_gpu:
                # What a recorded step needs must be there before: plans of libraries, compiled code.
                side = torch.cuda.Stream(device)
                side.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(side):
                    for _ in range(3):
                        self.forward_step()
                torch.cuda.current_stream(device).wait_stream(side)
                self.reset()
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.forward_step()
                self.reset()

        def reset(self):
            self.positions.fill_(self.context)
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.context)

        def forward_step(self):
            seen = (self.places <= self.positions[:, :1])[:, None, None, :]
            logits = self.forward(self.tokens, attention_mask=seen, position_ids=self.positions, past_key_values=self.cache,
                                  use_cache=True, logits_to_keep=1).logits
            self.tokens.copy_(logits[:, -1].argmax(-1, keepdim=True))
            self.positions.add_(1)

        def step(self):
            self.graph.replay() if self.graph else self.forward_step()
            return self.tokens.tolist()

    def decode(batch, context, num_tokens):
        running = Decode(batch, context, num_tokens)
        running.step()
        start = time.perf_counter()
        # The first token of a sequence is its prompt's; here it was the step before.
        for _ in range(num_tokens - 1):
            running.step()
        return batch * (num_tokens - 1) / (time.perf_counter() - start)

    def measure(row):
        try:
            with torch.inference_mode():
                if row["phase"] == "prefill":
                    return {"tokens_per_second": prefill(row["num_tokens"])}
                return {"tokens_per_second": decode(row["batch"], row["context"], row["num_tokens"])}
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        # Behind the handler, whose error holds what was allocated. Only now: memory that was given back has to be had
        # again, which would be a part of the next row's time.
        if is_gpu:
            torch.cuda.empty_cache()
        return {"skipped": reason}

    versions = f"PyTorch {torch.__version__}, Transformers {transformers.__version__}"
    print(json.dumps({"ready": True, "versions": versions}), file=answers)
    for line in sys.stdin:
        print(json.dumps(measure(json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
