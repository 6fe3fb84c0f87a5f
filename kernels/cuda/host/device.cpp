// All kernels as one library, for a program that treats the host as a device: kernels/src/cuda/fibres.rs.
//
// A launch is what the driver's cuLaunchKernel takes: a name, a grid, and a pointer to the bytes of each
// argument. Unlike the driver it knows how many there are and how long each is, and refuses others. Memory begins
// as NaN and ends where nobody may read or write.
#include "entries.h"

#include <mutex>

namespace {

// What follows is never destroyed: threads may still compute when the process ends.
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
    const auto found = fibres::entries().find(name);
    if (found == fibres::entries().end()) return 1;
    const fibres::Entry& entry = found->second;
    if (entry.sizes.size() != num_args) return 2;
    for (size_t i = 0; i < num_args; ++i)
        if (entry.sizes[i] != sizes[i]) return int(3 + i);
    static unsigned turn = 0; // threads run in another order every time
    fibres::launch(fibres::ORDERS[turn++ % 3], dim3(grid[0], grid[1], grid[2]), dim3(threads), shared_bytes,
                   [&] { entry.call(args); });
    return 0;
}

} // extern "C"
