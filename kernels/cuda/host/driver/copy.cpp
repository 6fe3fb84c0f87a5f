// Copies and fills: "CUDA Driver API", API synchronization behavior.
#include <cstring>
#include <memory>

#include "state.h"

using namespace driver;

namespace {

Stream* capturing(CUstream handle, const char* call) {
    Stream* const stream = handle ? state().streams.find(handle, "stream", call) : nullptr;
    return stream && stream->capture ? stream : nullptr;
}

// All bytes have to be of one allocation.
CUresult check_range(CUdeviceptr at, size_t num_bytes, const char* call) {
    if (allocation_of(at, num_bytes)) return CUDA_SUCCESS;
    return refuse(CUDA_ERROR_INVALID_VALUE, call, "%zu bytes at %#llx are not within one allocation", num_bytes, at);
}

} // namespace

EXPORT CUresult CUDAAPI cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t num_bytes, CUstream stream) {
    HOLD;
    CONTEXT_OR_RETURN;
    if (num_bytes == 0) return CUDA_SUCCESS;
    if (const CUresult status = check_range(to, num_bytes, "cuMemcpyHtoDAsync"); status != CUDA_SUCCESS) return status;
    Operation operation{"a copy to the device", {}, {}, {}, Operation::Kind::Copy};
    name_memory(operation, to);
    auto* const target = reinterpret_cast<void*>(to);
    if (is_pinned(from, num_bytes)) {
        // Fully asynchronous: what is there when it is done.
        operation.host.push_back({reinterpret_cast<CUdeviceptr>(from), num_bytes});
        operation.run = [=] { std::memcpy(target, from, num_bytes); };
    } else {
        if (capturing(stream, "cuMemcpyHtoDAsync")) misuse("cuMemcpyHtoDAsync", "pageable memory in a capture");
        // Staged at once.
        const auto* const bytes = static_cast<const unsigned char*>(from);
        const auto staged = std::make_shared<std::vector<unsigned char>>(bytes, bytes + num_bytes);
        operation.run = [=] { std::memcpy(target, staged->data(), num_bytes); };
    }
    return enqueue(stream, std::move(operation), "cuMemcpyHtoDAsync");
}

EXPORT CUresult CUDAAPI cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t num_bytes, CUstream handle) {
    HOLD;
    CONTEXT_OR_RETURN;
    if (num_bytes == 0) return CUDA_SUCCESS;
    if (const CUresult status = check_range(from, num_bytes, "cuMemcpyDtoHAsync"); status != CUDA_SUCCESS)
        return status;
    Operation operation{"a copy to the host", {}, {}, {}, Operation::Kind::Copy};
    name_memory(operation, from);
    auto* const source = reinterpret_cast<const void*>(from);
    operation.run = [=] { std::memcpy(to, source, num_bytes); };
    const bool is_async = is_pinned(to, num_bytes);
    if (is_async)
        operation.host.push_back({reinterpret_cast<CUdeviceptr>(to), num_bytes});
    else if (capturing(handle, "cuMemcpyDtoHAsync"))
        misuse("cuMemcpyDtoHAsync", "pageable memory in a capture");
    const CUresult status = enqueue(handle, std::move(operation), "cuMemcpyDtoHAsync");
    if (is_async || status != CUDA_SUCCESS) return status;
    // To pageable memory it returns when it is done.
    Stream* const stream = state().streams.find(handle, "stream", "cuMemcpyDtoHAsync");
    return run_until(*stream, stream->num_asked);
}

EXPORT CUresult CUDAAPI cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t num_bytes, CUstream stream) {
    HOLD;
    CONTEXT_OR_RETURN;
    if (num_bytes == 0) return CUDA_SUCCESS;
    for (const CUdeviceptr at : {to, from})
        if (const CUresult status = check_range(at, num_bytes, "cuMemcpyDtoDAsync"); status != CUDA_SUCCESS)
            return status;
    if (to < from + num_bytes && from < to + num_bytes) misuse("cuMemcpyDtoDAsync", "the two overlap");
    Operation operation{"a copy on the device", {}, {}, {}, Operation::Kind::Copy};
    name_memory(operation, to), name_memory(operation, from);
    operation.run = [=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), num_bytes); };
    return enqueue(stream, std::move(operation), "cuMemcpyDtoDAsync");
}

EXPORT CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t num_bytes, CUstream stream) {
    HOLD;
    CONTEXT_OR_RETURN;
    if (num_bytes == 0) return CUDA_SUCCESS;
    if (const CUresult status = check_range(at, num_bytes, "cuMemsetD8Async"); status != CUDA_SUCCESS) return status;
    Operation operation{"a fill", {}, {}, {}};
    name_memory(operation, at);
    operation.run = [=] { std::memset(reinterpret_cast<void*>(at), value, num_bytes); };
    return enqueue(stream, std::move(operation), "cuMemsetD8Async");
}
