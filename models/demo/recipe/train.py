#!/usr/bin/env python3
"""Make the demo model: generated conversations in, the checkpoint folder out.

    pip install -r models/demo/recipe/requirements.txt
    python models/demo/recipe/train.py

One thread, fixed seeds. A run that was interrupted goes on from its last state.
"""
import argparse
import pathlib
import random
import time

import torch

import export
import tokens
from conversations import STAGES, Conversation
from model import Decoder
from muon import Muon

SEED = 20261121
STEP_TOKENS = 4096
MUON_LR, ADAM_LR, WARMUP_STEPS, DECAY_SHARE = 0.02, 4e-3, 100, 0.3


def batch(step, encoder):
    """The ids and marks of a step: they depend on the step's number alone."""
    rng = random.Random(SEED * 1_000_003 + step)
    stage = next(stage for stage in STAGES if step < stage.until_step)
    length = rng.choice(stage.lengths)
    rows = [Conversation(rng, encoder, length, stage).write() for _ in range(STEP_TOKENS // length)]
    return torch.tensor([ids for ids, _ in rows]), torch.tensor([marks for _, marks in rows]), length


def rate(step, steps):
    """Share of the full learning rate at a step."""
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, (steps - step) / (DECAY_SHARE * steps)))


def optimizers(model):
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if p.ndim < 2 or name.startswith("embed")]
    return Muon(matrices, MUON_LR), torch.optim.AdamW(rest, ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=23_000_000)
    parser.add_argument("--state", type=pathlib.Path, default=tokens.FOLDER.parents[1] / "target" / "demo-model.pt",
                        help="where the state is kept; a run goes on from what is there")
    parser.add_argument("--out", type=pathlib.Path, default=tokens.FOLDER, help="the checkpoint folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    encoder = tokens.Encoder(tokens.train())
    model = Decoder()
    muon, adam = optimizers(model)
    first = 0
    if args.state.exists():
        kept = torch.load(args.state)
        model.load_state_dict(kept["model"])
        muon.load_state_dict(kept["muon"])
        adam.load_state_dict(kept["adam"])
        first = kept["step"]
    args.state.parent.mkdir(parents=True, exist_ok=True)
    steps = args.tokens // STEP_TOKENS
    start, told = time.monotonic(), {}
    for step in range(first, steps):
        ids, is_answer, length = batch(step, encoder)
        loss, right = model.loss(ids, is_answer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, full in ((muon, MUON_LR), (adam, ADAM_LR)):
            for group in optimizer.param_groups:
                group["lr"] = full * rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        told.setdefault(length, []).append((loss.item(), right.item()))
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.monotonic() - start
            parts = [f"{n}: loss {sum(l for l, _ in rows) / len(rows):.3f} right {sum(r for _, r in rows) / len(rows):.3f}"
                     for n, rows in sorted(told.items())]
            print(f"step {step + 1}/{steps} {(step + 1 - first) * STEP_TOKENS / seconds:.0f} tok/s | {' | '.join(parts)}",
                  flush=True)
            told = {}
        if (step + 1) % 200 == 0 or step + 1 == steps:
            new = args.state.with_suffix(".new")
            torch.save({"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict(),
                        "step": step + 1}, new)
            new.replace(args.state)
    export.write(model.state_dict(), args.out)


if __name__ == "__main__":
    main()
