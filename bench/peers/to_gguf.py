#!/usr/bin/env python3
"""Write a Llama checkpoint folder (bf16 safetensors, one file) as a GGUF file with the same weights, for llama.cpp.

    pip install gguf numpy
    python bench/peers/to_gguf.py /tmp/model-s /tmp/model-s.gguf

Matrices stay bf16, bit for bit; norms become f32, as llama.cpp wants them. Rows of Q and K are reordered from
Hugging Face's rotary halves to llama.cpp's pairs.
"""
import argparse
import json
import pathlib

import gguf
import numpy as np


def read_safetensors(path):
    """Tensors by name: shape and bf16 bits `[rows, cols]` as u16."""
    raw = np.memmap(path, np.uint8, "r")
    header_bytes = int(raw[:8].view(np.uint64)[0])
    header = json.loads(raw[8:8 + header_bytes].tobytes())
    data = raw[8 + header_bytes:]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}, expected BF16"
        begin, end = entry["data_offsets"]
        tensors[name] = np.array(data[begin:end].view(np.uint16)).reshape(entry["shape"])
    return tensors


def in_pairs(weight, heads):
    """Rows of each head from [first halves, second halves] to pairs of neighbours."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("file")
    args = parser.parse_args()
    config = json.loads((args.folder / "config.json").read_text())
    assert config["model_type"] == "llama", f"model_type is {config['model_type']}, expected llama"
    tokenizer = json.loads((args.folder / "tokenizer.json").read_text())
    tensors = read_safetensors(args.folder / "model.safetensors")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

    out = gguf.GGUFWriter(args.file, "llama")
    out.add_name(args.folder.name)
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_key_length(config["head_dim"])
    out.add_value_length(config["head_dim"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_dimension_count(config["head_dim"])
    out.add_rope_freq_base(config["rope_theta"])
    out.add_vocab_size(config["vocab_size"])
    out.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)

    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = {**{index: text for text, index in tokenizer["model"]["vocab"].items()}, **special}
    assert sorted(tokens) == list(range(config["vocab_size"])), "the vocabulary has gaps"
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list([tokens[index] for index in range(len(tokens))])
    kinds = (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL)
    out.add_token_types([kinds[index not in special] for index in range(len(tokens))])
    out.add_token_merges(merges)
    out.add_bos_token_id(config["bos_token_id"])
    out.add_eos_token_id(config["eos_token_id"])

    def matrix(name, bits):
        out.add_tensor(name, bits.view(np.uint8), raw_shape=(*bits.shape[:-1], bits.shape[-1] * 2),
                       raw_dtype=gguf.GGMLQuantizationType.BF16)

    def norm(name, bits):
        out.add_tensor(name, (bits.astype(np.uint32) << 16).view(np.float32))

    matrix("token_embd.weight", tensors["model.embed_tokens.weight"])
    matrix("output.weight", tensors["lm_head.weight"])
    norm("output_norm.weight", tensors["model.norm.weight"])
    for layer in range(config["num_hidden_layers"]):
        of = lambda name: tensors[f"model.layers.{layer}.{name}.weight"]
        to = lambda name: f"blk.{layer}.{name}.weight"
        norm(to("attn_norm"), of("input_layernorm"))
        norm(to("ffn_norm"), of("post_attention_layernorm"))
        matrix(to("attn_q"), in_pairs(of("self_attn.q_proj"), heads))
        matrix(to("attn_k"), in_pairs(of("self_attn.k_proj"), kv_heads))
        for name, ours in (("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"),
                           ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):
            matrix(to(name), of(ours))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    main()
