"""Writes the checkpoint folder from a training state: bf16 weights, configuration, tokenizer."""
import json

from safetensors.torch import save_file

import model
import tokens

MAX_POSITIONS = 2304  # 2,048 tokens of prompt and an answer

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": tokens.BOS,
    "eos_token_id": tokens.END,
    "pad_token_id": tokens.PAD,
    "head_dim": model.HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": model.HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": model.FFN,
    "max_position_embeddings": MAX_POSITIONS,
    "num_attention_heads": model.HEADS,
    "num_hidden_layers": model.LAYERS,
    "num_key_value_heads": model.KV_HEADS,
    "rms_norm_eps": model.NORM_EPS,
    "rope_scaling": None,
    "rope_theta": model.ROPE_THETA,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": tokens.VOCAB,
}
GENERATION_CONFIG = {"bos_token_id": tokens.BOS, "eos_token_id": tokens.END, "pad_token_id": tokens.PAD}


def tensors(state):
    """Names and shapes of Transformers' Qwen3 from those of model.py."""
    out = {"model.embed_tokens.weight": state["embed.weight"], "model.norm.weight": state["norm.weight"]}
    q, kv = model.HEADS * model.HEAD_DIM, model.KV_HEADS * model.HEAD_DIM
    for i in range(model.LAYERS):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), state[ours + "qkv.weight"].split([q, kv, kv])))
        parts["o_proj"] = state[ours + "out.weight"]
        out |= {f"{theirs}self_attn.{name}.weight": weight for name, weight in parts.items()}
        gate, up = state[ours + "gate_up.weight"].split(model.FFN)
        out |= {f"{theirs}mlp.gate_proj.weight": gate, f"{theirs}mlp.up_proj.weight": up,
                f"{theirs}mlp.down_proj.weight": state[ours + "down.weight"]}
        for name, norm in (("input_layernorm", "input_norm"), ("post_attention_layernorm", "post_norm"),
                           ("self_attn.q_norm", "q_norm"), ("self_attn.k_norm", "k_norm")):
            out[f"{theirs}{name}.weight"] = state[f"{ours}{norm}.weight"]
    return {name: tensor.bfloat16().contiguous() for name, tensor in out.items()}


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write(state, out):
    """All of the folder `out` but what is written by hand: the chat template and the pages."""
    tokens.train().save(str(out / "tokenizer.json"))
    write_json(out / "config.json", CONFIG)
    write_json(out / "generation_config.json", GENERATION_CONFIG)
    write_json(out / "tokenizer_config.json", {
        "added_tokens_decoder": {
            str(i): {"content": s, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                     "special": s in tokens.SPECIAL}
            for i, s in [*enumerate(tokens.SPECIAL), *enumerate(tokens.MARKUP, tokens.VOCAB - len(tokens.MARKUP))]},
        "bos_token": tokens.SPECIAL[tokens.BOS],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens.SPECIAL[tokens.END],
        "model_max_length": MAX_POSITIONS,
        "pad_token": tokens.SPECIAL[tokens.PAD],
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
    weights = out / "model.safetensors"
    save_file(tensors(state), weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    print(f"wrote {out}: {sum(t.numel() for t in state.values()):,} parameters")
