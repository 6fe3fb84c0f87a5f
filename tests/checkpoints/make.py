#!/usr/bin/env python3
"""Write the tiny random checkpoints beside this file, and what Hugging Face Transformers computes with them.

    pip install torch==2.15.0 transformers==5.23.0 numpy==2.4.6 safetensors==0.8.0 tokenizers==0.23.3
    python tests/checkpoints/make.py                # all of them
    python tests/checkpoints/make.py qwen3 tiny     # some; `tiny` writes tiny.json, the goldens of models/tiny

Per checkpoint: config.json as the Hub has it for that family, the weights, goldens.json and goldens.safetensors.
README.md says what each field holds. Weights and prompts come from a seed, so a second run writes the same
weights; logits may differ in their last bits with another version of torch or another processor.
"""
import argparse
import hashlib
import json
import pathlib
import shutil

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = pathlib.Path(__file__).resolve().parent
TINY = HERE.parent.parent / "models" / "tiny"

NUM_NEW_TOKENS = 32
PROMPT_LENGTHS = [1, 7, 33, 200]
NUM_CANDIDATE_PROMPTS = 192
NUM_SPREAD_POSITIONS, NUM_LAST_POSITIONS = 5, 11
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def llama(**changes):
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
            "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "mlp_bias": False,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2,
            "max_position_embeddings": 512} | changes


def shape(hidden, layers, heads, kv_heads, ffn, vocab):
    return {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": vocab}


# name -> (dtype of the file, number of shards, config.json)
CHECKPOINTS = {
    # Multi-head attention; no head_dim and, as in the first Llama 2 files, no rope_theta.
    "llama2-mha": ("f16", 1, {k: v for k, v in llama(
        torch_dtype="float16", **shape(64, 2, 4, 4, 112, 256)).items() if k != "rope_theta"}),
    # Grouped queries 3:1, Llama 3's rope scaling with an original length the prompts exceed, several ends.
    "llama3-gqa": ("bf16", 1, llama(
        torch_dtype="bfloat16", rope_theta=500000.0, head_dim=16, eos_token_id=[2, 5, 6],
        rope_scaling={"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                      "original_max_position_embeddings": 64, "rope_type": "llama3"},
        **shape(96, 2, 6, 2, 128, 250))),
    # Linear scaling under its old key "type"; f32 file; an FFN that is no multiple of 16.
    "llama-linear": ("f32", 1, llama(
        torch_dtype="float32", rope_scaling={"type": "linear", "factor": 4.0}, **shape(48, 2, 4, 2, 90, 160))),
    # Dynamic NTK scaling, only within the original length: beyond it Transformers' result depends on how the
    # sequence was cut into steps, so there is no answer to agree with.
    "llama-dynamic": ("f16", 1, llama(
        torch_dtype="float16", rope_scaling={"rope_type": "dynamic", "factor": 2.0}, **shape(64, 2, 4, 2, 96, 256))),
    # One KV head for all, YaRN with its attention factor, a head_dim that is no power of two.
    "llama-yarn": ("bf16", 1, llama(
        torch_dtype="bfloat16", head_dim=48,
        rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
        **shape(96, 2, 2, 1, 112, 256))),
    # A window shorter than two of the prompts.
    "mistral-window": ("bf16", 1, {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "head_dim": 16, "hidden_act": "silu", "initializer_range": 0.02,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 24,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, **shape(64, 3, 8, 2, 96, 256)}),
    # Biases on q, k and v, tied embeddings, 7:1, and a window that is switched off.
    "qwen2-tied": ("bf16", 1, {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 512,
        "max_window_layers": 1, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 16,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
        **shape(112, 2, 7, 1, 96, 256)}),
    # The same family with the window on from the second layer: two kinds of attention in one model.
    "qwen2-mixed-window": ("f32", 1, {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 512,
        "max_window_layers": 1, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 16,
        "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True, "use_sliding_window": True,
        **shape(48, 3, 3, 1, 64, 160)}),
    # Norms on q and k, head_dim twice hidden/heads, config keys as Transformers 5 writes them, three shards.
    "qwen3": ("bf16", 3, {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "bfloat16", "eos_token_id": 2, "head_dim": 32,
        "hidden_act": "silu", "initializer_range": 0.02, "layer_types": ["full_attention"] * 2,
        "max_position_embeddings": 512, "max_window_layers": 2, "pad_token_id": None, "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "sliding_window": None,
        "tie_word_embeddings": False, "transformers_version": "5.23.0", "use_cache": True,
        "use_sliding_window": False, **shape(64, 2, 4, 2, 96, 256)}),
    # The small members of that family: tied embeddings, the older config keys.
    "qwen3-tied": ("f16", 1, {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 32, "hidden_act": "silu",
        "initializer_range": 0.02, "max_position_embeddings": 512, "max_window_layers": 2, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "float16", "use_cache": True, "use_sliding_window": False, **shape(64, 2, 3, 3, 96, 256)}),
}


def seed_of(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def random_tensors(config, rng):
    """Name -> f32 array. Attention is sharper than a fresh initialisation and the head is scaled, so that the
    logits have a standard deviation of about 5 and the best one stands clear of the second."""
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    ffn, vocab, tied = config["intermediate_size"], config["vocab_size"], config["tie_word_embeddings"]
    qwen2, qwen3 = config["model_type"] == "qwen2", config["model_type"] == "qwen3"
    head_gain = 5.0
    # Tied: a small embedding keeps the input token from being its own most likely successor; the last norm
    # brings the logits to scale.
    embedding_std = 0.12 if tied else 1.0
    last_norm = head_gain / (embedding_std * np.sqrt(hidden)) if tied else 1.0

    def matrix(rows, cols, gain=1.0):
        return rng.standard_normal((rows, cols)) * (gain / np.sqrt(cols))

    def norm(dim, mean=1.0):
        return mean * (1 + 0.1 * rng.standard_normal(dim))

    t = {"model.embed_tokens.weight": embedding_std * rng.standard_normal((vocab, hidden))}
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        t[p + "input_layernorm.weight"] = norm(hidden)
        for which, rows, gain in (("q", heads, 1.4), ("k", kv_heads, 1.4), ("v", kv_heads, 1.0)):
            t[p + f"self_attn.{which}_proj.weight"] = matrix(rows * head_dim, hidden, gain)
            if qwen2:
                t[p + f"self_attn.{which}_proj.bias"] = 0.5 * rng.standard_normal(rows * head_dim)
        if qwen3:
            t[p + "self_attn.q_norm.weight"] = norm(head_dim, 1.4)
            t[p + "self_attn.k_norm.weight"] = norm(head_dim, 1.4)
        t[p + "self_attn.o_proj.weight"] = matrix(hidden, heads * head_dim, 1.5)
        t[p + "post_attention_layernorm.weight"] = norm(hidden)
        t[p + "mlp.gate_proj.weight"] = matrix(ffn, hidden)
        t[p + "mlp.up_proj.weight"] = matrix(ffn, hidden)
        t[p + "mlp.down_proj.weight"] = matrix(hidden, ffn, 1.5)
    t["model.norm.weight"] = norm(hidden, last_norm)
    if not tied:
        t["lm_head.weight"] = matrix(vocab, hidden, head_gain)
    return t


def write_weights(folder, tensors, num_shards):
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(tensors)
    weight_map, total = {}, 0
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = names[len(names) * shard // num_shards:len(names) * (shard + 1) // num_shards]
        save_file({n: tensors[n] for n in part}, folder / file, {"format": "pt"})
        weight_map |= {n: file for n in part}
        total += sum(tensors[n].nbytes for n in part)
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def load(folder, dtype, attention="eager"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


@torch.no_grad()
def logits_of(model, tokens):
    """[batch][length] token ids -> [batch, length, vocab] f32, all positions at once, no cache."""
    return model(torch.tensor(tokens), use_cache=False).logits.float()


def greedy(model, prompts, num_new_tokens):
    """Continuations without a cache: every token from a full forward. Returns tokens and gaps, [batch][new]."""
    tokens, gaps = [list(p) for p in prompts], [[] for _ in prompts]
    for _ in range(num_new_tokens):
        top = logits_of(model, tokens)[:, -1].topk(2)
        for row, (values, ids) in enumerate(zip(top.values.tolist(), top.indices.tolist())):
            tokens[row].append(ids[0])
            gaps[row].append(values[0] - values[1])
    return [t[len(p):] for t, p in zip(tokens, prompts)], gaps


def choose_prompt(model, rng, length, vocab):
    """Of many random prompts, the one whose greedy continuation is decided by the widest margin."""
    count = min(NUM_CANDIDATE_PROMPTS, max(48, 6000 // length))
    candidates = rng.integers(7, vocab, (count, length)).tolist()
    tokens, gaps = greedy(model, candidates, NUM_NEW_TOKENS)
    varied = [i for i in range(count) if len(set(tokens[i])) >= NUM_NEW_TOKENS // 2]
    best = max(varied or range(count), key=lambda i: min(gaps[i]))
    return candidates[best], tokens[best], gaps[best]


def error(ours, reference):
    difference = ours - reference
    return {"max_abs": difference.abs().max().item(), "rms": difference.square().mean().sqrt().item()}


def make(name):
    dtype, num_shards, config = CHECKPOINTS[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_json(folder / "config.json", dict(sorted(config.items())))
    rng = np.random.default_rng(seed_of(name))
    write_weights(folder, {n: torch.from_numpy(np.ascontiguousarray(t, np.float32)).to(DTYPES[dtype])
                           for n, t in random_tensors(config, rng).items()}, num_shards)

    model = load(folder, torch.float32)
    model_bf16 = {a: load(folder, torch.bfloat16, a) for a in ("eager", "sdpa")}
    prompts, rows, rows_bf16, num_rows = [], [], {"eager": [], "sdpa": []}, 0
    for length in PROMPT_LENGTHS:
        prompt, continuation, gaps = choose_prompt(model, rng, length, config["vocab_size"])
        tokens = prompt + continuation[:-1]
        generated = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW_TOKENS, do_sample=False,
                                   eos_token_id=-1, pad_token_id=0)[0, length:].tolist()
        assert generated == continuation, f"{name}: generate() with a cache disagrees at length {length}"
        spread = np.linspace(0, len(tokens) - NUM_LAST_POSITIONS - 1, NUM_SPREAD_POSITIONS).astype(int).tolist()
        positions = sorted(set(spread) | {length - 1} | set(range(len(tokens) - NUM_LAST_POSITIONS, len(tokens))))
        reference = logits_of(model, [tokens])[0, positions]
        bf16 = {a: logits_of(m, [tokens])[0] for a, m in model_bf16.items()}
        for a in bf16:
            rows_bf16[a].append(bf16[a][positions])
        prompts.append({
            "prompt": prompt, "greedy": continuation, "gaps": [round(g, 4) for g in gaps],
            "bf16_argmax": bf16["sdpa"][length - 1:].argmax(-1).tolist(),
            "positions": positions, "first_row": num_rows,
            "bf16_error": error(bf16["sdpa"][positions], reference),
        })
        rows.append(reference)
        num_rows += len(positions)

    reference = torch.cat(rows)
    bf16 = {a: torch.cat(r) for a, r in rows_bf16.items()}
    save_file({"logits_f32": reference.contiguous(), "logits_bf16": bf16["sdpa"].to(torch.bfloat16).contiguous()},
              folder / "goldens.safetensors")
    goldens = {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "num_new_tokens": NUM_NEW_TOKENS,
        "min_gap": min(min(p["gaps"]) for p in prompts),
        "logits_std": reference.std().item(),
        "bf16_error": error(bf16["sdpa"], reference),
        "bf16_error_eager": error(bf16["eager"], reference),
        "prompts": prompts,
    }
    write_json(folder / "goldens.json", goldens)
    report(name, folder, goldens)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wie groß ist das Meer? 🙂"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "size", "arguments": {"of": "<sea> & 'sky'"}}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "361 million km²"},
    {"role": "user", "content": [{"type": "text", "text": "And in "}, {"type": "text", "text": "words?"}]},
]
TEXTS = ["", " ", "Hello, world!", "  two  spaces\n\n\tand a tab ", "naïve café größer", "привет мир", "你好世界", "日本の時間",
         "🙂🚀👩‍👩‍👧‍👦", "e\u0301 \u202e \ufeff \x00\x7f", "x = 1234567890;", "the river carries seven stones",
         "<|im_start|>user\nhi<|im_end|>", "I'm we'll they've 'S"]


def make_tiny_goldens():
    """tiny.json: what Transformers makes of models/tiny, its tokenizer and its chat template."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = load(TINY, torch.float32)
    model_bf16 = load(TINY, torch.bfloat16, "sdpa")
    texts = []
    for text in TEXTS:
        ids = tokenizer.encode(text)
        texts.append({"text": text, "ids": ids, "ids_without_special": tokenizer.encode(text, add_special_tokens=False),
                      "decoded": tokenizer.decode(ids, skip_special_tokens=True)})
    chats = []
    for messages, generate in ((CHAT[1:2], True), (CHAT[:2], True), (CHAT, True), (CHAT, False)):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False)
        chats.append({"messages": messages, "add_generation_prompt": generate, "text": text,
                      "ids": tokenizer.encode(text, add_special_tokens=False)})
    completions = []
    for prompt in [t["ids"] for t in texts if len(t["ids"]) > 8] + [c["ids"] for c in chats]:
        tokens, gaps = greedy(model, [prompt], 64)
        bf16, gaps_bf16 = greedy(model_bf16, [prompt], 64)
        completions.append({"prompt": prompt, "greedy": tokens[0], "gaps": [round(g, 4) for g in gaps[0]],
                            "text": tokenizer.decode(tokens[0], skip_special_tokens=True),
                            "greedy_bf16": bf16[0], "gaps_bf16": [round(g, 4) for g in gaps_bf16[0]]})
    write_json(HERE / "tiny.json", {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "texts": texts, "chats": chats, "completions": completions})
    print(f"tiny: {len(texts)} texts, {len(chats)} chats, {len(completions)} completions")


def write_json(path, value):
    """JSON with two-space indentation, but a list of plain values on one line."""
    def text(v, indent):
        inner = indent + "  "
        if isinstance(v, dict) and v:
            items = [f"{json.dumps(k)}: {text(x, inner)}" for k, x in v.items()]
            return "{\n" + ",\n".join(inner + i for i in items) + "\n" + indent + "}"
        if isinstance(v, list) and any(isinstance(x, (dict, list)) for x in v):
            return "[\n" + ",\n".join(inner + text(x, inner) for x in v) + "\n" + indent + "]"
        return json.dumps(v, ensure_ascii=False)
    path.write_text(text(value, "") + "\n", encoding="utf-8")


def report(name, folder, goldens):
    size = sum(f.stat().st_size for f in folder.iterdir())
    weights = sum(f.stat().st_size for f in folder.glob("model*.safetensors"))
    gaps = sorted(g for p in goldens["prompts"] for g in p["gaps"])
    flips = sum(a != b for p in goldens["prompts"] for a, b in zip(p["bf16_argmax"], p["greedy"]))
    clear = sum(g > 3 * goldens["bf16_error"]["max_abs"] for g in gaps)
    print(f"{name}: {size:,} bytes (weights {weights:,}), gap min {gaps[0]:.3f} median {gaps[len(gaps) // 2]:.2f}, "
          f"bf16 error max {goldens['bf16_error']['max_abs']:.3f} rms {goldens['bf16_error']['rms']:.4f} "
          f"(eager {goldens['bf16_error_eager']['max_abs']:.3f} {goldens['bf16_error_eager']['rms']:.4f}), "
          f"bf16 flips {flips} of {len(gaps)}, {clear} clear of the tolerance", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*CHECKPOINTS, "tiny", []], metavar="name")
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in parser.parse_args().names or [*CHECKPOINTS, "tiny"]:
        make_tiny_goldens() if name == "tiny" else make(name)
