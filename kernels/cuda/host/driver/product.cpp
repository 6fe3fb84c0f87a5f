// A product in a stream. Sums are in f32 and in ascending order; the library's own order is its affair.
#include "product.h"

#include <cstring>

#include "state.h"

using namespace driver;

namespace {

float bf16(const uint16_t* at) {
    const uint32_t bits = uint32_t(*at) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename T>
T* at(CUdeviceptr address) {
    return reinterpret_cast<T*>(address);
}

void multiply(const Product& p) {
    // Whoever else uses the workspace finds it changed.
    if (p.workspace) std::memset(at<void>(p.workspace), 0xff, p.workspace_bytes < 65536 ? p.workspace_bytes : 65536);
    const auto* const a = at<const uint16_t>(p.a.at);
    const auto* const b = at<const uint16_t>(p.b.at);
    const uint64_t depth = p.is_a_transposed ? p.a.num_rows : p.a.num_columns;
    const int64_t a_row = p.is_a_transposed ? p.a.leading : 1, a_depth = p.is_a_transposed ? 1 : p.a.leading;
    const int64_t b_depth = p.is_b_transposed ? p.b.leading : 1, b_column = p.is_b_transposed ? 1 : p.b.leading;
    for (uint64_t column = 0; column < p.d.num_columns; ++column)
        for (uint64_t row = 0; row < p.d.num_rows; ++row) {
            const uint16_t *left = a + int64_t(row) * a_row, *right = b + int64_t(column) * b_column;
            float sum = 0;
            for (uint64_t i = 0; i < depth; ++i, left += a_depth, right += b_depth) sum += bf16(left) * bf16(right);
            float value = p.alpha * sum;
            // With beta 0 nothing of C is read.
            if (p.beta != 0) value += p.beta * at<const float>(p.c.at)[int64_t(column) * p.c.leading + int64_t(row)];
            if (p.bias) value += at<const float>(p.bias)[row];
            at<float>(p.d.at)[int64_t(column) * p.d.leading + int64_t(row)] = value;
        }
}

} // namespace

EXPORT CUresult host_driver_multiply(const Product* product, CUstream stream) {
    HOLD;
    CONTEXT_OR_RETURN;
    const Product p = *product;
    Operation operation{"a product", [p] { multiply(p); }, {}, {}, Operation::Kind::Launch};
    const auto is_there = [&](const Product::Matrix& matrix, size_t width) {
        const size_t num_values = (matrix.num_columns - 1) * size_t(matrix.leading) + matrix.num_rows;
        name_memory(operation, matrix.at);
        return allocation_of(matrix.at, num_values * width) != nullptr;
    };
    const bool is_c_there = p.beta == 0 || is_there(p.c, 4);
    if (!is_there(p.a, 2) || !is_there(p.b, 2) || !is_there(p.d, 4) || !is_c_there)
        return refuse(CUDA_ERROR_INVALID_VALUE, "cublasLtMatmul", "a matrix is not within one allocation");
    if (p.bias && !allocation_of(p.bias, p.d.num_rows * 4))
        return refuse(CUDA_ERROR_INVALID_VALUE, "cublasLtMatmul", "the bias is not within one allocation");
    if (p.workspace_bytes && !allocation_of(p.workspace, p.workspace_bytes))
        return refuse(CUDA_ERROR_INVALID_VALUE, "cublasLtMatmul", "the workspace is not within one allocation");
    name_memory(operation, p.bias), name_memory(operation, p.workspace);
    return enqueue(stream, std::move(operation), "cublasLtMatmul");
}
