// Memory of the device and pinned memory, tensor maps.
//
// All memory of the device lies in one file in memory, so that other processes can map what is exported:
//
//   | header, a page | ... poison ... | data, up to a page's end but for alignment to 256 bytes | no access |
//
// No address is given twice, so memory that was given back stays untouchable.
#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "../host_tensor_map.h"

namespace driver {

namespace {

constexpr size_t SPACE_BYTES = size_t(1) << 40;
// "CUDA C++ Programming Guide", device memory accesses: addresses of allocations are aligned to at least 256 bytes.
constexpr size_t ALIGNMENT = 256;

struct Space {
    unsigned char* base;
    size_t num_bytes_used;
    int file;
};

Space& space() {
    static Space& all =
        *new Space{static_cast<unsigned char*>(
                       mmap(nullptr, SPACE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)),
                   0, memfd_create("host-driver", MFD_CLOEXEC)};
    if (all.base == MAP_FAILED || all.file < 0) misuse("host driver", "no address space or no file in memory");
    return all;
}

} // namespace

int memory_file() { return space().file; }

size_t page_bytes() { return size_t(sysconf(_SC_PAGESIZE)); }

unsigned char* take_addresses(size_t num_bytes) {
    Space& all = space();
    if (all.num_bytes_used + num_bytes > SPACE_BYTES) return nullptr;
    all.num_bytes_used += num_bytes;
    return all.base + all.num_bytes_used - num_bytes;
}

bool is_device_address(uintptr_t at) { return at - reinterpret_cast<uintptr_t>(space().base) < SPACE_BYTES; }

Layout layout_of(size_t num_bytes) {
    const size_t page = page_bytes(), rounded = (num_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    const size_t data_pages = (rounded + page - 1) / page * page;
    return {page + data_pages, page + data_pages - rounded};
}

Header& header_of(CUdeviceptr at, size_t num_bytes) {
    return *reinterpret_cast<Header*>(at - layout_of(num_bytes).data_offset);
}

size_t file_offset_of(CUdeviceptr at) { return size_t(reinterpret_cast<unsigned char*>(at) - space().base); }

const std::pair<const CUdeviceptr, Allocation>* allocation_of(CUdeviceptr at, size_t num_bytes) {
    auto found = state().memory.upper_bound(at);
    if (found == state().memory.begin()) return nullptr;
    --found;
    const size_t offset = at - found->first, size = found->second.num_bytes;
    return offset < size && num_bytes <= size - offset ? &*found : nullptr;
}

bool is_pinned(const void* at, size_t num_bytes) {
    const auto address = reinterpret_cast<CUdeviceptr>(at);
    auto found = state().pinned.upper_bound(address);
    if (found == state().pinned.begin()) return false;
    --found;
    return address - found->first <= found->second && num_bytes <= found->second - (address - found->first);
}

size_t num_used(int device) {
    size_t num_bytes = 0;
    for (const auto& [at, given] : state().memory)
        num_bytes += given.device == device && !given.is_opened ? given.num_bytes : 0;
    return num_bytes;
}

void name_memory(Operation& operation, CUdeviceptr at) {
    if (const auto* const found = allocation_of(at, 1)) operation.memory[found->first] = found->second.number;
}

} // namespace driver

using namespace driver;

EXPORT CUresult CUDAAPI cuMemGetInfo_v2(size_t* num_free, size_t* num_total) {
    HOLD;
    CONTEXT_OR_RETURN;
    // "May also return error codes from previous, asynchronous launches": of nobody's in particular here.
    if (++state().num_queries == wishes().failing_query)
        return context->sticky = refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS",
                                        "something touched memory that is not there, as was asked for");
    return *num_total = wishes().memory_bytes, *num_free = *num_total - num_used(context->device), CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemAlloc_v2(CUdeviceptr* made, size_t num_bytes) {
    HOLD;
    CONTEXT_OR_RETURN;
    if (num_bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (const CUresult status = check_unsafe("cuMemAlloc"); status != CUDA_SUCCESS) return status;
    if (num_bytes > wishes().memory_bytes - num_used(context->device)) return CUDA_ERROR_OUT_OF_MEMORY;
    const Layout layout = layout_of(num_bytes);
    unsigned char* const base = take_addresses(layout.num_bytes + page_bytes());
    const off_t offset = off_t(file_offset_of(reinterpret_cast<CUdeviceptr>(base)));
    if (!base || ftruncate(memory_file(), offset + off_t(layout.num_bytes)) != 0 ||
        mmap(base, layout.num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory_file(), offset) ==
            MAP_FAILED)
        return CUDA_ERROR_OUT_OF_MEMORY;
    // What is in new memory is not said: NaN, here.
    std::memset(base + page_bytes(), 0xff, layout.num_bytes - page_bytes());
    auto& header = *reinterpret_cast<Header*>(base);
    header.magic = Header::MAGIC, header.number = ++state().num_allocated, header.num_bytes = num_bytes,
    header.is_there = 1;
    *made = reinterpret_cast<CUdeviceptr>(base + layout.data_offset);
    state().memory[*made] = {num_bytes, header.number, context->device};
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemFree_v2(CUdeviceptr at) {
    HOLD;
    CONTEXT_OR_RETURN;
    const auto found = state().memory.find(at);
    if (found == state().memory.end() || found->second.is_opened)
        misuse("cuMemFree", "%#llx was not given by cuMemAlloc, or was given back", at);
    if (const CUresult status = check_unsafe("cuMemFree"); status != CUDA_SUCCESS) return status;
    // "Memory Management": it "may perform implicit synchronization", and here does not. See `check_named`.
    const size_t num_bytes = found->second.num_bytes;
    Header& header = header_of(at, num_bytes);
    header.is_there = 0;
    // cuIpcOpenMemHandle: undefined. What the others read from now on is zero here.
    if (header.num_openers > 0)
        refuse(CUDA_SUCCESS, "cuIpcOpenMemHandle", "memory was given back that %u other processes have open",
               unsigned(header.num_openers));
    const Layout layout = layout_of(num_bytes);
    auto* const base = reinterpret_cast<unsigned char*>(&header);
    const off_t offset = off_t(file_offset_of(reinterpret_cast<CUdeviceptr>(base)));
    fallocate(memory_file(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset + off_t(page_bytes()),
              off_t(layout.num_bytes - page_bytes()));
    mmap(base, layout.num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    state().memory.erase(found);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* num_bytes, CUdeviceptr at) {
    HOLD;
    CONTEXT_OR_RETURN;
    const auto* const found = allocation_of(at, 1);
    if (!found) return CUDA_ERROR_NOT_FOUND;
    return *base = found->first, *num_bytes = found->second.num_bytes, CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemHostAlloc(void** made, size_t num_bytes, unsigned flags) {
    HOLD;
    CONTEXT_OR_RETURN;
    if (num_bytes == 0 || flags > 7) return CUDA_ERROR_INVALID_VALUE;
    if (const CUresult status = check_unsafe("cuMemHostAlloc"); status != CUDA_SUCCESS) return status;
    void* const at = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    std::memset(at, 0xff, num_bytes);
    state().pinned[reinterpret_cast<CUdeviceptr>(at)] = num_bytes;
    return *made = at, CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemFreeHost(void* at) {
    HOLD;
    CONTEXT_OR_RETURN;
    const auto found = state().pinned.find(reinterpret_cast<CUdeviceptr>(at));
    if (found == state().pinned.end())
        misuse("cuMemFreeHost", "%p was not given by cuMemHostAlloc, or was given back", at);
    if (const CUresult status = check_unsafe("cuMemFreeHost"); status != CUDA_SUCCESS) return status;
    munmap(at, found->second);
    state().pinned.erase(found);
    return CUDA_SUCCESS;
}

// The limits are those of the function's description, for what the kernels here can use: no interleave.
EXPORT CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap* made, CUtensorMapDataType type, cuuint32_t rank,
                                               void* address, const cuuint64_t* dims, const cuuint64_t* strides,
                                               const cuuint32_t* box, const cuuint32_t* steps,
                                               CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                               CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    HOLD;
    CONTEXT_OR_RETURN;
    const auto invalid = [](const char* what) {
        return refuse(CUDA_ERROR_INVALID_VALUE, "cuTensorMapEncodeTiled", "%s", what);
    };
    if (reinterpret_cast<uintptr_t>(made) % 64) return invalid("the map is not at a multiple of 64 bytes");
    if (type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || rank != 4 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
        swizzle != CU_TENSOR_MAP_SWIZZLE_128B)
        return invalid("only bf16 in four dimensions with the 128-byte swizzle is known here");
    if (reinterpret_cast<uintptr_t>(address) % 16) return invalid("the tensor is not at a multiple of 16 bytes");
    fibres::HostTensorMap words{fibres::HOST_TENSOR_MAP, reinterpret_cast<uintptr_t>(address), {}, {}};
    size_t num_bytes = 2;
    for (unsigned i = 0; i < rank; ++i) {
        if (dims[i] == 0 || dims[i] > cuuint64_t(1) << 32) return invalid("a dimension is 0 or above 2^32");
        if (box[i] == 0 || box[i] > 256) return invalid("a box is 0 or above 256 along a dimension");
        if (steps[i] == 0 || steps[i] > 8) return invalid("an element stride is 0 or above 8");
        num_bytes *= dims[i];
        // The host's copies know packed tensors alone.
        const bool has_stride = i + 1 < rank;
        if (has_stride && (strides[i] % 16 || strides[i] >= cuuint64_t(1) << 40))
            return invalid("a stride is no multiple of 16, or 2^40 or more");
        if (has_stride && strides[i] != num_bytes) return invalid("only packed tensors are known here");
        words.dims[i] = dims[i], words.box[i] = box[i];
    }
    if (box[0] * 2 % 16 || box[0] * 2 > 128)
        return invalid("the box's first dimension is no multiple of 16 bytes, or too wide");
    if (!allocation_of(reinterpret_cast<CUdeviceptr>(address), num_bytes))
        return invalid("the tensor is not within one allocation");
    std::memcpy(made, &words, sizeof words);
    std::memset(reinterpret_cast<char*>(made) + sizeof words, 0, sizeof *made - sizeof words);
    return CUDA_SUCCESS;
}
