#!/usr/bin/env python3
"""Write models/tiny: a random Llama checkpoint small enough to be committed, with its own tokenizer.

    pip install numpy==2.4.6 tokenizers==0.23.3
    python models/make_tiny.py            # writes models/tiny
    python models/make_tiny.py --check    # also needs torch and transformers: greedy text is varied

The weights come from one seed, so two runs write the same bytes. What the model says is noise;
it exists so that tests have something to serve whose every token depends on the whole prompt.
"""
import argparse
import json
import pathlib

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

OUT = pathlib.Path(__file__).resolve().parent / "tiny"
SEED = 20261121

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 128, 4, 4, 2, 32, 352
VOCAB, MAX_POSITIONS = 512, 4096
SPECIAL = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
BOS, EOS, IM_START, IM_END, PAD = range(len(SPECIAL))

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": IM_END,
    "pad_token_id": PAD,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": FFN,
    "max_position_embeddings": MAX_POSITIONS,
    "mlp_bias": False,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB,
}

GENERATION_CONFIG = {
    "bos_token_id": BOS,
    "eos_token_id": [IM_END, EOS],
    "pad_token_id": PAD,
}

# One block per message; a tool's answer names the call it belongs to when the client did.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role not in ['system', 'developer', 'user', 'assistant', 'tool'] %}
{{- raise_exception('unknown role: ' + message.role) }}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'tool' and message.tool_call_id is defined and message.tool_call_id %}
{{- '[' + message.tool_call_id + '] ' }}
{%- endif %}
{%- if message.content is string %}
{{- message.content }}
{%- elif message.content %}
{%- for part in message.content %}
{%- if part.type == 'text' %}
{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- if message.tool_calls is defined and message.tool_calls %}
{%- for call in message.tool_calls %}
{{- '\\n' + (call.function | tojson) }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def training_text(rng):
    """Sentences in a handful of scripts, so that the merges hold words, whole multi-byte letters and digits."""
    subjects = "the river,a small boat,the old clock,my friend,the other train,a tired sailor,the garden,our map".split(",")
    verbs = "carries,follows,waits for,turns toward,remembers,has never seen,comes back with,listens to".split(",")
    objects = "the morning light,an open window,seven stones,the quiet street,a long letter,the sea,nothing at all".split(",")
    ends = ". , and then , but where is it now? , because the day is short. ! : so they say; ".split(" , ")
    words = "größer café naïve señal ÷ привет мир море время 你好 世界 水 火 時間 日本 안녕 שלום 🙂 🚀 → €".split(" ")
    lines = []
    for i in range(6000):
        pick = lambda xs: xs[int(rng.integers(len(xs)))]
        line = f"{pick(subjects)} {pick(verbs)} {pick(objects)}{pick(ends)}"
        line = line[0].upper() + line[1:] if i % 3 else line
        if i % 2 == 0:
            line += f"{pick(words)} {pick(words)} "
        if i % 5 == 0:
            line += f"{int(rng.integers(10000))} = {int(rng.integers(100))} * x\n"
        if i % 11 == 0:
            line += '{"name": "value", "list": [1, 2, 3]}\n\n'
        lines.append(line)
    return lines


def train_tokenizer(rng):
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(rng), trainer)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[("<|bos|>", BOS)]),
    ])
    assert tokenizer.get_vocab_size() == VOCAB
    assert [tokenizer.token_to_id(s) for s in SPECIAL] == list(range(len(SPECIAL)))
    # Every Unicode scalar value comes back as it went in.
    every = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    for start in range(0, len(every), 65536):
        text = every[start:start + 65536]
        assert tokenizer.decode(tokenizer.encode(text).ids) == text, f"does not round-trip near U+{ord(text[0]):04X}"
    return tokenizer


def bf16(values):
    """Round f32 to bf16, ties to even, as raw little-endian bytes."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def write_safetensors(path, tensors):
    """A safetensors file: header length (u64), JSON header padded to 8 bytes, then the data."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [offset, offset + 2 * t.size]}
        offset += 2 * t.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(bf16(t) for t in tensors.values()))


def random_tensors(rng, tokenizer):
    """Name -> f32 array. Projections keep the variance of their input; attention is sharper than a fresh
    initialisation, so that far tokens matter and greedy text does not fall into a loop at once."""
    def normal(rows, cols, gain=1.0):
        return rng.standard_normal((rows, cols)) * (gain / np.sqrt(cols))

    tensors = {"model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN))}
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        tensors[p + "input_layernorm.weight"] = 1 + 0.1 * rng.standard_normal(HIDDEN)
        tensors[p + "self_attn.q_proj.weight"] = normal(HEADS * HEAD_DIM, HIDDEN, ATTENTION_GAIN)
        tensors[p + "self_attn.k_proj.weight"] = normal(KV_HEADS * HEAD_DIM, HIDDEN, ATTENTION_GAIN)
        tensors[p + "self_attn.v_proj.weight"] = normal(KV_HEADS * HEAD_DIM, HIDDEN)
        tensors[p + "self_attn.o_proj.weight"] = normal(HIDDEN, HEADS * HEAD_DIM, OUTPUT_GAIN)
        tensors[p + "post_attention_layernorm.weight"] = 1 + 0.1 * rng.standard_normal(HIDDEN)
        tensors[p + "mlp.gate_proj.weight"] = normal(FFN, HIDDEN)
        tensors[p + "mlp.up_proj.weight"] = normal(FFN, HIDDEN)
        tensors[p + "mlp.down_proj.weight"] = normal(HIDDEN, FFN, OUTPUT_GAIN)
    tensors["model.norm.weight"] = 1 + 0.1 * rng.standard_normal(HIDDEN)
    head = normal(VOCAB, HIDDEN, HEAD_GAIN)
    # Whole characters are likelier than stray bytes, an end is rare, and the other marks never win.
    for token, spelling in ((i, tokenizer.id_to_token(i)) for i in range(len(SPECIAL), VOCAB)):
        if "\ufffd" in tokenizer.decode([token]) or not tokenizer.decode([token]).isprintable():
            head[token] *= 0.75
    head[[EOS, IM_END]] *= 0.5
    head[[BOS, IM_START, PAD]] = 0
    tensors["lm_head.weight"] = head
    return tensors


ATTENTION_GAIN, OUTPUT_GAIN, HEAD_GAIN = 2.0, 1.5, 4.0


def write_json(name, value):
    (OUT / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write():
    OUT.mkdir(exist_ok=True)
    tokenizer = train_tokenizer(np.random.default_rng(SEED))
    tokenizer.save(str(OUT / "tokenizer.json"))
    write_json("tokenizer_config.json", {
        "added_tokens_decoder": {
            str(i): {"content": s, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                     "special": True} for i, s in enumerate(SPECIAL)},
        "bos_token": SPECIAL[BOS],
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL[IM_END],
        "model_max_length": MAX_POSITIONS,
        "pad_token": SPECIAL[PAD],
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
    (OUT / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json("config.json", CONFIG)
    write_json("generation_config.json", GENERATION_CONFIG)
    tensors = random_tensors(np.random.default_rng(SEED + 1), tokenizer)
    write_safetensors(OUT / "model.safetensors", tensors)
    print(f"wrote {OUT}: {sum(t.size for t in tensors.values()):,} parameters, "
          f"{(OUT / 'model.safetensors').stat().st_size:,} bytes")


def check():
    """Greedy text must not be one repeated token, and must differ by prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(OUT)
    model = AutoModelForCausalLM.from_pretrained(OUT, dtype=torch.float32).eval()
    answers = []
    for prompt in ["Hello!", "What is the capital of France?", "Write a poem about the sea.", "1 + 1 =", "你好"]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, do_sample=False,
                                 eos_token_id=GENERATION_CONFIG["eos_token_id"], pad_token_id=PAD)
            logits = model(out).logits[0, ids.shape[1] - 1:-1].float()
        new = out[0, ids.shape[1]:].tolist()
        top = logits.topk(2).values
        gap = (top[:, 0] - top[:, 1])
        top_p = logits.softmax(-1).max(-1).values
        print(f"{prompt!r}: {len(new)} tokens, {len(set(new))} distinct, gap min {gap.min():.3f} "
              f"median {gap.median():.2f}, top probability median {top_p.median():.2f}\n  {tokenizer.decode(new)!r}")
        answers.append(new)
        assert len(set(new)) > len(new) // 3, "greedy text repeats itself"
    assert len({tuple(a[:8]) for a in answers}) == len(answers), "greedy text does not depend on the prompt"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="look at the greedy text of the checkpoint with Transformers")
    args = parser.parse_args()
    write()
    if args.check:
        check()
