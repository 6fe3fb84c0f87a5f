// A tensor map for the tests: by the driver, or the words that stand for one on the host.
#pragma once

#include "../hopper.cuh"
#include "harness.h"

#ifdef __CUDACC__
#include <cudaTypedefs.h>
#endif

// Of a packed tensor of bf16 with the innermost dimension first, lines of the box with the 128-byte swizzle.
inline TensorMap tensor_map(const void* address, const std::vector<u64>& dims, const std::vector<u32>& box) {
    TensorMap map{};
#ifdef __CUDACC__
    void* encode = nullptr;
    fibres::check(cudaFree(nullptr), "a context");
    fibres::check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault),
                  "cuTensorMapEncodeTiled");
    const cuuint64_t sizes[4] = {dims[0], dims[1], dims[2], dims[3]};
    const cuuint64_t strides[3] = {dims[0] * 2, dims[0] * dims[1] * 2, dims[0] * dims[1] * dims[2] * 2};
    const cuuint32_t boxes[4] = {box[0], box[1], box[2], box[3]}, steps[4] = {1, 1, 1, 1};
    CUtensorMap encoded;
    const CUresult status = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(encode)(
        &encoded, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(address), sizes, strides, boxes, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) fibres::fail("cuTensorMapEncodeTiled says %d", int(status));
    std::memcpy(&map, &encoded, sizeof map);
#else
    fibres::HostTensorMap words{fibres::HOST_TENSOR_MAP, u64(reinterpret_cast<uintptr_t>(address)), {}, {}};
    std::copy(dims.begin(), dims.end(), words.dims);
    std::copy(box.begin(), box.end(), words.box);
    std::memcpy(&map, &words, sizeof words);
#endif
    return map;
}
