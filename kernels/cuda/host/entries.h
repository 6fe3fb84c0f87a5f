// Every kernel by its name, with the bytes of each of its parameters, for who runs them on the host as a device.
#pragma once

#include "fibres.h"

#include "../attention_decode.cu"
#include "../attention_plain.cu"
#include "../attention_prefill.cu"
#include "../attention_prefill_hopper.cu"
#include "../block_copy.cu"
#include "../dequantize.cu"
#include "../digest.cu"
#include "../embed.cu"
#include "../k_quant_matmul.cu"
#include "../plain_matmul.cu"
#include "../quantized_matmul.cu"
#include "../rms_norm.cu"
#include "../rope_kv_write.cu"
#include "../sample.cu"
#include "../silu_mul.cu"
#include "../skinny_matmul.cu"
#include "../top_logprobs.cu"
#include "../w8a8_matmul.cu"

#include <string>
#include <utility>

namespace fibres {

template <typename T>
T value_at(const void* bytes) {
    T value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

struct Entry {
    std::vector<size_t> sizes;
    void (*call)(const void* const* args);
};

template <auto KERNEL>
struct Caller;
template <typename... Args, void (*KERNEL)(Args...)>
struct Caller<KERNEL> {
    template <size_t... I>
    static void call_with(const void* const* args, std::index_sequence<I...>) {
        KERNEL(value_at<Args>(args[I])...);
    }
    static void call(const void* const* args) { call_with(args, std::index_sequence_for<Args...>()); }
    static Entry entry() { return {{sizeof(Args)...}, call}; }
};

#define ENTRY_OF(kernel) {#kernel, Caller<&kernel>::entry()}
// Never destroyed: threads may still compute when the process ends.
inline const std::map<std::string, Entry>& entries() {
    static const auto& all = *new std::map<std::string, Entry>{
        ENTRY_OF(adjust_logits),        ENTRY_OF(attention_decode_64),  ENTRY_OF(attention_decode_128),
        ENTRY_OF(attention_decode_256), ENTRY_OF(attention_merge_64),   ENTRY_OF(attention_merge_128),
        ENTRY_OF(attention_merge_256),  ENTRY_OF(attention_plain_bf16), ENTRY_OF(attention_plain_f32),
        ENTRY_OF(attention_prefill_64), ENTRY_OF(attention_prefill_128), ENTRY_OF(clear_blocks),
        ENTRY_OF(attention_prefill_hopper_64), ENTRY_OF(attention_prefill_hopper_128),
        ENTRY_OF(copy_blocks),          ENTRY_OF(dequantize_4),         ENTRY_OF(dequantize_8),
        ENTRY_OF(digest_pieces),        ENTRY_OF(quantized_matmul_4),   ENTRY_OF(quantized_matmul_8),
        ENTRY_OF(embed_4),              ENTRY_OF(embed_8),              ENTRY_OF(embed_bf16),
        ENTRY_OF(embed_f32),
        ENTRY_OF(plain_matmul_f32),     ENTRY_OF(rms_norm_bf16),        ENTRY_OF(rms_norm_f32),
        ENTRY_OF(rope_kv_write_bf16),   ENTRY_OF(rope_kv_write_f32),    ENTRY_OF(sample),
        ENTRY_OF(silu_mul_bf16),        ENTRY_OF(silu_mul_f32),         ENTRY_OF(skinny_matmul_bf16),
        ENTRY_OF(skinny_gate_up_bf16),  ENTRY_OF(embed_k_quant_4),      ENTRY_OF(embed_k_quant_6),
        ENTRY_OF(k_quant_matmul_4),     ENTRY_OF(k_quant_matmul_6),     ENTRY_OF(k_quant_dequantize_4),
        ENTRY_OF(k_quant_dequantize_6), ENTRY_OF(w8a8_quantize),        ENTRY_OF(w8a8_matmul),
        ENTRY_OF(w8a8_matmul_tiled),    ENTRY_OF(top_logprobs),
    };
    return all;
}
#undef ENTRY_OF

} // namespace fibres
