// Memory of other processes: "CUDA Driver API", memory management, cuIpcGetMemHandle, cuIpcOpenMemHandle,
// cuIpcCloseMemHandle. The memory is that of a file, so it stays when the process that has exported it is gone.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "memory.h"

using namespace driver;

namespace {

// A driver may cut small memory out of such blocks, and a handle is of a whole one.
constexpr size_t BLOCK_BYTES = size_t(2) << 20;

struct Handle {
    static constexpr uint64_t MAGIC = 0x65726f6d74736f68;
    uint64_t magic, process, file, offset, num_bytes, number;
    uint64_t unused[2];
};
static_assert(sizeof(Handle) == sizeof(CUipcMemHandle));

struct Opened {
    CUdeviceptr at;
    unsigned count;
};

// By process and number.
std::map<std::pair<uint64_t, uint64_t>, Opened>& opened() {
    static auto& all = *new std::map<std::pair<uint64_t, uint64_t>, Opened>;
    return all;
}

} // namespace

EXPORT CUresult CUDAAPI cuIpcGetMemHandle(CUipcMemHandle* made, CUdeviceptr at) {
    HOLD;
    CONTEXT_OR_RETURN;
    const auto found = state().memory.find(at);
    if (found == state().memory.end() || found->second.is_opened)
        return refuse(CUDA_ERROR_INVALID_VALUE, "cuIpcGetMemHandle", "%#llx does not begin memory of cuMemAlloc", at);
    const Allocation& given = found->second;
    if (given.num_bytes % BLOCK_BYTES)
        misuse("cuIpcGetMemHandle", "%zu bytes are no whole blocks of 2 MiB: others would see what lies beside them",
               given.num_bytes);
    const size_t base = size_t(reinterpret_cast<uintptr_t>(&header_of(at, given.num_bytes)));
    const Handle handle{Handle::MAGIC,
                        uint64_t(getpid()),
                        uint64_t(memory_file()),
                        file_offset_of(base),
                        given.num_bytes,
                        given.number,
                        {}};
    std::memcpy(made, &handle, sizeof handle);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuIpcOpenMemHandle_v2(CUdeviceptr* made, CUipcMemHandle bytes, unsigned flags) {
    HOLD;
    CONTEXT_OR_RETURN;
    if (flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        return refuse(CUDA_ERROR_INVALID_VALUE, "cuIpcOpenMemHandle", "flags %u", flags);
    if (const CUresult status = check_unsafe("cuIpcOpenMemHandle"); status != CUDA_SUCCESS) return status;
    Handle handle;
    std::memcpy(&handle, &bytes, sizeof handle);
    if (handle.magic != Handle::MAGIC)
        return refuse(CUDA_ERROR_INVALID_HANDLE, "cuIpcOpenMemHandle", "no handle of exported memory");
    // Memory "exported from another process".
    if (handle.process == uint64_t(getpid()))
        return refuse(CUDA_ERROR_INVALID_CONTEXT, "cuIpcOpenMemHandle", "of this process itself");
    // Opened once more it is the same memory, and has to be closed as often.
    const auto key = std::make_pair(handle.process, handle.number);
    if (const auto found = opened().find(key); found != opened().end()) {
        ++found->second.count;
        return *made = found->second.at, CUDA_SUCCESS;
    }
    char path[64];
    std::snprintf(path, sizeof path, "/proc/%llu/fd/%llu", (unsigned long long)handle.process,
                  (unsigned long long)handle.file);
    const int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return refuse(CUDA_ERROR_MAP_FAILED, "cuIpcOpenMemHandle", "the process that exported it is gone");
    const Layout layout = layout_of(handle.num_bytes);
    unsigned char* const base = take_addresses(layout.num_bytes + page_bytes());
    const bool is_mapped = base && mmap(base, layout.num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file,
                                        off_t(handle.offset)) != MAP_FAILED;
    close(file);
    if (!is_mapped) return CUDA_ERROR_MAP_FAILED;
    auto& header = *reinterpret_cast<Header*>(base);
    if (header.magic != Header::MAGIC || header.number != handle.number || !header.is_there) {
        mmap(base, layout.num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        return refuse(CUDA_ERROR_INVALID_HANDLE, "cuIpcOpenMemHandle", "the memory was given back");
    }
    ++header.num_openers;
    *made = reinterpret_cast<CUdeviceptr>(base + layout.data_offset);
    state().memory[*made] = {handle.num_bytes, ++state().num_allocated, context->device, true};
    opened()[key] = {*made, 1};
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuIpcCloseMemHandle(CUdeviceptr at) {
    HOLD;
    CONTEXT_OR_RETURN;
    auto found = opened().begin();
    while (found != opened().end() && found->second.at != at) ++found;
    if (found == opened().end()) misuse("cuIpcCloseMemHandle", "%#llx was not opened, or was closed", at);
    if (const CUresult status = check_unsafe("cuIpcCloseMemHandle"); status != CUDA_SUCCESS) return status;
    if (--found->second.count > 0) return CUDA_SUCCESS;
    for (const Stream* stream : state().streams.all())
        for (const Operation& operation : stream->queue)
            if (operation.memory.count(at))
                misuse("cuIpcCloseMemHandle", "%s still reads from it", operation.name.c_str());
    const size_t num_bytes = state().memory.at(at).num_bytes;
    Header& header = header_of(at, num_bytes);
    --header.num_openers;
    mmap(&header, layout_of(num_bytes).num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
         -1, 0);
    state().memory.erase(at);
    opened().erase(found);
    return CUDA_SUCCESS;
}
