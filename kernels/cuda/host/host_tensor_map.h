// What stands for a tensor map on the host: words of it.
#pragma once

#include <cstdint>

namespace fibres {

struct HostTensorMap {
    uint64_t kind, address, dims[4], box[4];
};
inline constexpr uint64_t HOST_TENSOR_MAP = 0x70616d5f74736f68;

} // namespace fibres
