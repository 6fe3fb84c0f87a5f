// Where memory of the device lies; what memory.cpp and ipc.cpp share.
#pragma once

#include <atomic>

#include "state.h"

namespace driver {

// Before each allocation, also for those who map it.
struct Header {
    static constexpr uint64_t MAGIC = 0x79726f6d656d7468;
    uint64_t magic, number, num_bytes;
    std::atomic<uint32_t> is_there, num_openers;
};

// Bytes from the header to the page that nobody may touch, and where the data begins in them.
struct Layout {
    size_t num_bytes, data_offset;
};
Layout layout_of(size_t num_bytes);
Header& header_of(CUdeviceptr at, size_t num_bytes);

int memory_file();
size_t file_offset_of(CUdeviceptr at);
size_t page_bytes();
// Addresses of the device that nobody has had; null: there are no more.
unsigned char* take_addresses(size_t num_bytes);

} // namespace driver
