// What the library of products asks of the driver beside it.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

namespace driver {

// D = alpha op(A) op(B) + beta C + bias, columns first: op(A) is [m, k], op(B) [k, n], C and D [m, n] in f32.
struct Product {
    struct Matrix {
        CUdeviceptr at;
        uint64_t num_rows, num_columns;
        int64_t leading; // from one column to the next
    };
    Matrix a, b, c, d;
    bool is_a_transposed, is_b_transposed;
    CUdeviceptr bias; // one value per row of D; 0: none
    float alpha, beta;
    CUdeviceptr workspace;
    size_t workspace_bytes;
};

} // namespace driver

extern "C" CUresult host_driver_multiply(const driver::Product* product, CUstream stream);
using host_driver_multiply_t = decltype(&host_driver_multiply);
