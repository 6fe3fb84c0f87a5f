// All kernels as one library, for a program that treats the host as a device: kernels/src/cuda/fibres.rs.
//
// A launch is what the driver's cuLaunchKernel takes: a name, a grid, and a pointer to the bytes of each
// argument. Unlike the driver it knows how many there are and how long each is, and refuses others. Memory begins
// as NaN and ends where nobody may read or write.
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

#include <mutex>
#include <string>
#include <utility>

namespace {

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
// What follows is never destroyed: threads may still compute when the process ends.
const std::map<std::string, Entry>& entries() {
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
        ENTRY_OF(embed_k_quant_4),      ENTRY_OF(embed_k_quant_6),      ENTRY_OF(k_quant_matmul_4),
        ENTRY_OF(k_quant_matmul_6),     ENTRY_OF(k_quant_dequantize_4), ENTRY_OF(k_quant_dequantize_6),
        ENTRY_OF(w8a8_quantize),        ENTRY_OF(w8a8_matmul),          ENTRY_OF(w8a8_matmul_tiled),
        ENTRY_OF(plain_matmul_f32),     ENTRY_OF(rms_norm_bf16),        ENTRY_OF(rms_norm_f32),
        ENTRY_OF(rope_kv_write_bf16),   ENTRY_OF(rope_kv_write_f32),    ENTRY_OF(sample),
        ENTRY_OF(silu_mul_bf16),        ENTRY_OF(silu_mul_f32),         ENTRY_OF(skinny_matmul_bf16),
        ENTRY_OF(top_logprobs),
    };
    return all;
}

std::mutex one_at_a_time; // a launch, or a change of the table of memory

std::map<void*, fibres::Guarded>& memory() {
    static auto& all = *new std::map<void*, fibres::Guarded>;
    return all;
}

} // namespace

extern "C" {

// With `file` not null, the memory is that of a file, which other processes can map: its descriptor, which closes with
// the memory, and where in the file the memory begins.
void* fibres_alloc(size_t num_bytes, int* file, size_t* offset) {
    const std::lock_guard<std::mutex> guard(one_at_a_time);
    fibres::Guarded bytes(num_bytes, file != nullptr);
    if (file) *file = bytes.file(), *offset = bytes.file_offset();
    std::memset(bytes.data(), 0xff, bytes.size());
    void* const at = bytes.data();
    memory().emplace(at, std::move(bytes));
    return at;
}

void fibres_free(void* at) {
    const std::lock_guard<std::mutex> guard(one_at_a_time);
    if (memory().erase(at) != 1) fibres::fail("memory was freed that was not allocated");
}

// 0: done; 1: there is no such kernel; 2: another number of arguments; 3 + i: argument i has another size.
int fibres_launch(const char* name, const unsigned* grid, unsigned threads, size_t shared_bytes, size_t num_args,
                  const void* const* args, const size_t* sizes) {
    const std::lock_guard<std::mutex> guard(one_at_a_time);
    const auto found = entries().find(name);
    if (found == entries().end()) return 1;
    const Entry& entry = found->second;
    if (entry.sizes.size() != num_args) return 2;
    for (size_t i = 0; i < num_args; ++i)
        if (entry.sizes[i] != sizes[i]) return int(3 + i);
    static unsigned turn = 0; // threads run in another order every time
    fibres::launch(fibres::ORDERS[turn++ % 3], dim3(grid[0], grid[1], grid[2]), dim3(threads), shared_bytes,
                   [&] { entry.call(args); });
    return 0;
}

} // extern "C"
