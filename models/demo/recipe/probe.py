#!/usr/bin/env python3
"""A look at a training state: how many held-out answers of each skill it would give exactly.

    python models/demo/recipe/probe.py --state target/demo-model.pt --count 100

An answer is exact when every token of it is the likeliest one, which is when greedy decoding gives it. The
figures that count come from evaluate.py, through the running system.
"""
import argparse
import pathlib

import torch

import tokens
from model import Decoder
from prompts import SKILLS, prompts, rendered


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--show", action="store_true", help="print the first wrong answer of each skill")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = tokens.train()
    encoder = tokens.Encoder(tokenizer)
    kept, model = torch.load(args.state), Decoder()
    model.load_state_dict({name: t.bfloat16().float() for name, t in kept["model"].items()})
    print(f"step {kept['step']}, weights rounded to bf16")
    for skill in SKILLS:
        exact, wrong = 0, None
        for request, answer in prompts(skill, args.count, encoder):
            prompt, right = rendered(request, encoder), encoder.text(answer) + [tokens.END]
            with torch.no_grad():
                features = model.features(torch.tensor([prompt + right]))[0, len(prompt) - 1:-1]
                said = (features @ model.embed.weight.T).argmax(-1).tolist()
            exact += said == right
            if said != right and wrong is None:
                wrong = (answer, tokenizer.decode(said))
        print(f"{skill}: {100 * exact / args.count:.1f} %" + (f"  {wrong}" if args.show else ""), flush=True)


if __name__ == "__main__":
    main()
