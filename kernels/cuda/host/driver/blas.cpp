// cuBLASLt on the host: as much of it as kernels/src/cuda/blas.rs asks for. Rules are those of NVIDIA's "cuBLAS"
// 13.0, using the cuBLASLt API; each names the function or the attribute that says it.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>

#include "product.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum DataType { R_32F = 0, R_16BF = 14 };
constexpr int COMPUTE_32F = 68;
enum Epilogue { EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4 };
enum DescAttribute { TRANSA = 3, TRANSB = 4, EPILOGUE = 7, BIAS_POINTER = 8 };
enum PreferenceAttribute { MAX_WORKSPACE_BYTES = 1, MIN_ALIGNMENT_A = 5, MIN_ALIGNMENT_D = 8 };

// What the fastest way would take.
constexpr size_t WORKSPACE_WANTED = 4 << 20;
constexpr uint64_t ALGORITHM = 0x6d687469726f676c;

struct Library {};
struct Layout {
    int type;
    uint64_t num_rows, num_columns;
    int64_t leading;
};
struct Description {
    int transa = 0, transb = 0;
    uint32_t epilogue = EPILOGUE_DEFAULT;
    CUdeviceptr bias = 0;
};
struct Preference {
    uint64_t workspace_bytes = 0;
    uint32_t alignment[4] = {256, 256, 256, 256};
};
// Words of cublasLtMatmulAlgo_t: what the heuristic has promised it for.
struct Algorithm {
    uint64_t kind, workspace_bytes;
    uint32_t alignment[4];
    uint64_t shape[3];
    uint32_t epilogue, unused;
};
struct Result {
    Algorithm algorithm;
    size_t workspace_bytes;
    int status;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Algorithm) == 64 && sizeof(Result) == 96);

std::mutex& lock = *new std::mutex;

Status refuse(Status status, const char* rule, const char* what) {
    std::fprintf(stderr, "host driver: %s: %s\n", rule, what);
    return status;
}

template <typename T>
struct Table {
    std::set<const void*> here;
    T* find(const void* handle, const char* rule) const {
        if (!here.count(handle)) {
            refuse(INVALID_VALUE, rule, "it does not exist, or was destroyed");
            std::abort();
        }
        return static_cast<T*>(const_cast<void*>(handle));
    }
    template <typename... Args>
    Status make(T** made, Args... args) {
        const std::lock_guard<std::mutex> hold(lock);
        here.insert(*made = new T{args...});
        return SUCCESS;
    }
    Status destroy(T* at, const char* rule) {
        const std::lock_guard<std::mutex> hold(lock);
        here.erase(find(at, rule)); // kept, so that its address is nobody else's
        return SUCCESS;
    }
};
Table<Library>& libraries = *new Table<Library>;
Table<Layout>& layouts = *new Table<Layout>;
Table<Description>& descriptions = *new Table<Description>;
Table<Preference>& preferences = *new Table<Preference>;

template <typename T>
Status set(T& to, const void* from, size_t num_bytes) {
    if (num_bytes != sizeof(T))
        return refuse(INVALID_VALUE, "cublasLt...SetAttribute", "sizeInBytes is not that of the attribute");
    std::memcpy(&to, from, sizeof(T));
    return SUCCESS;
}

// "Dimensions of the matrices": op(A) [m, k], op(B) [k, n], C and D [m, n].
bool fits(const Description& description, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
    const uint64_t m = description.transa ? a.num_columns : a.num_rows,
                   depth = description.transa ? a.num_rows : a.num_columns;
    const uint64_t b_depth = description.transb ? b.num_columns : b.num_rows,
                   n = description.transb ? b.num_rows : b.num_columns;
    const auto is_out = [&](const Layout& out) { return out.num_rows == m && out.num_columns == n; };
    return depth == b_depth && is_out(c) && is_out(d);
}

bool is_supported(const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
    return a.type == R_16BF && b.type == R_16BF && c.type == R_32F && d.type == R_32F;
}

} // namespace

EXPORT Status cublasLtCreate(Library** made) { return libraries.make(made); }
EXPORT Status cublasLtDestroy(Library* at) { return libraries.destroy(at, "cublasLtDestroy"); }

EXPORT Status cublasLtMatrixLayoutCreate(Layout** made, int type, uint64_t num_rows, uint64_t num_columns,
                                         int64_t leading) {
    if (leading < int64_t(num_rows))
        return refuse(INVALID_VALUE, "cublasLtMatrixLayoutCreate", "ld is below the rows, columns first");
    return layouts.make(made, type, num_rows, num_columns, leading);
}
EXPORT Status cublasLtMatrixLayoutDestroy(Layout* at) { return layouts.destroy(at, "cublasLtMatrixLayoutDestroy"); }

EXPORT Status cublasLtMatmulDescCreate(Description** made, int compute, int scale) {
    if (compute != COMPUTE_32F || scale != R_32F)
        return refuse(NOT_SUPPORTED, "cublasLtMatmulDescCreate", "only f32 is known here");
    return descriptions.make(made);
}
EXPORT Status cublasLtMatmulDescDestroy(Description* at) {
    return descriptions.destroy(at, "cublasLtMatmulDescDestroy");
}

EXPORT Status cublasLtMatmulDescSetAttribute(Description* at, int attribute, const void* from, size_t num_bytes) {
    const std::lock_guard<std::mutex> hold(lock);
    Description& description = *descriptions.find(at, "cublasLtMatmulDescSetAttribute");
    switch (attribute) {
        case TRANSA: return set(description.transa, from, num_bytes);
        case TRANSB: return set(description.transb, from, num_bytes);
        case EPILOGUE: return set(description.epilogue, from, num_bytes);
        case BIAS_POINTER: return set(description.bias, from, num_bytes);
        default: return refuse(INVALID_VALUE, "cublasLtMatmulDescSetAttribute", "an attribute that is not known here");
    }
}

EXPORT Status cublasLtMatmulPreferenceCreate(Preference** made) { return preferences.make(made); }
EXPORT Status cublasLtMatmulPreferenceDestroy(Preference* at) {
    return preferences.destroy(at, "cublasLtMatmulPreferenceDestroy");
}

EXPORT Status cublasLtMatmulPreferenceSetAttribute(Preference* at, int attribute, const void* from, size_t num_bytes) {
    const std::lock_guard<std::mutex> hold(lock);
    Preference& preference = *preferences.find(at, "cublasLtMatmulPreferenceSetAttribute");
    if (attribute == MAX_WORKSPACE_BYTES) return set(preference.workspace_bytes, from, num_bytes);
    if (attribute >= MIN_ALIGNMENT_A && attribute <= MIN_ALIGNMENT_D)
        return set(preference.alignment[attribute - MIN_ALIGNMENT_A], from, num_bytes);
    return refuse(INVALID_VALUE, "cublasLtMatmulPreferenceSetAttribute", "an attribute that is not known here");
}

EXPORT Status cublasLtMatmulAlgoGetHeuristic(Library* library, Description* description, Layout* a, Layout* b,
                                             Layout* c, Layout* d, Preference* preference, int num_wanted,
                                             Result* results, int* num_found) {
    const std::lock_guard<std::mutex> hold(lock);
    const char* const rule = "cublasLtMatmulAlgoGetHeuristic";
    libraries.find(library, rule), descriptions.find(description, rule), preferences.find(preference, rule);
    for (const Layout* layout : {a, b, c, d}) layouts.find(layout, rule);
    if (num_wanted < 1) return INVALID_VALUE;
    *num_found = 0;
    if (!fits(*description, *a, *b, *c, *d)) return refuse(INVALID_VALUE, rule, "the matrices do not go together");
    if (!is_supported(*a, *b, *c, *d)) return refuse(NOT_SUPPORTED, rule, "types that are not known here");
    Result& result = results[0];
    result = {};
    result.workspace_bytes = preference->workspace_bytes < WORKSPACE_WANTED ? 0 : WORKSPACE_WANTED;
    Algorithm& algorithm = result.algorithm;
    algorithm.kind = ALGORITHM, algorithm.workspace_bytes = result.workspace_bytes,
    algorithm.epilogue = description->epilogue;
    std::memcpy(algorithm.alignment, preference->alignment, sizeof algorithm.alignment);
    const uint64_t shape[3] = {d->num_rows, d->num_columns, description->transa ? a->num_rows : a->num_columns};
    std::memcpy(algorithm.shape, shape, sizeof shape);
    result.waves = 1;
    return *num_found = 1, SUCCESS;
}

EXPORT Status cublasLtMatmul(Library* library, Description* description, const float* alpha, const void* a,
                             Layout* a_layout, const void* b, Layout* b_layout, const float* beta, const void* c,
                             Layout* c_layout, void* d, Layout* d_layout, const Algorithm* algorithm, void* workspace,
                             size_t workspace_bytes, CUstream stream) {
    const std::lock_guard<std::mutex> hold(lock);
    const char* const rule = "cublasLtMatmul";
    libraries.find(library, rule), descriptions.find(description, rule);
    for (const Layout* layout : {a_layout, b_layout, c_layout, d_layout}) layouts.find(layout, rule);
    if (!fits(*description, *a_layout, *b_layout, *c_layout, *d_layout))
        return refuse(INVALID_VALUE, rule, "the matrices do not go together");
    if (!is_supported(*a_layout, *b_layout, *c_layout, *d_layout))
        return refuse(NOT_SUPPORTED, rule, "types that are not known here");
    if (algorithm->kind != ALGORITHM) return refuse(INVALID_VALUE, rule, "the algorithm is not of the heuristic");
    const uint64_t depth = description->transa ? a_layout->num_rows : a_layout->num_columns;
    const uint64_t shape[3] = {d_layout->num_rows, d_layout->num_columns, depth};
    if (std::memcmp(shape, algorithm->shape, sizeof shape) != 0 || algorithm->epilogue != description->epilogue)
        return refuse(NOT_SUPPORTED, rule, "the algorithm was found for another product");
    if (workspace_bytes < algorithm->workspace_bytes)
        return refuse(INVALID_VALUE, rule, "the workspace is smaller than the algorithm's");
    if (reinterpret_cast<uintptr_t>(workspace) % 16)
        return refuse(INVALID_VALUE, rule, "the workspace is not at a multiple of 16 bytes");
    // CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES and so on: 256 unless it was said to be less.
    const void* const matrices[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i)
        if (reinterpret_cast<uintptr_t>(matrices[i]) % algorithm->alignment[i]) {
            std::fprintf(
                stderr, "host driver: CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT: matrix %c is at %p, %u bytes were promised\n",
                "ABCD"[i], matrices[i], algorithm->alignment[i]);
            return INVALID_VALUE;
        }
    if (description->epilogue == EPILOGUE_BIAS && !description->bias)
        return refuse(INVALID_VALUE, rule, "the epilogue has no bias");
    if (description->epilogue != EPILOGUE_BIAS && description->epilogue != EPILOGUE_DEFAULT) return NOT_SUPPORTED;
    // "In place": C may be D if their layouts are the same.
    if (c == d && std::memcmp(c_layout, d_layout, sizeof *c_layout) != 0)
        return refuse(INVALID_VALUE, rule, "C is D with another layout");
    static const auto multiply = [] {
        void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
        return driver ? reinterpret_cast<host_driver_multiply_t>(dlsym(driver, "host_driver_multiply")) : nullptr;
    }();
    if (!multiply) return refuse(NOT_INITIALIZED, rule, "the driver beside it is not loaded");
    const auto matrix = [](const void* at, const Layout& layout) {
        return driver::Product::Matrix{reinterpret_cast<CUdeviceptr>(at), layout.num_rows, layout.num_columns,
                                       layout.leading};
    };
    const driver::Product product{matrix(a, *a_layout),
                                  matrix(b, *b_layout),
                                  matrix(c, *c_layout),
                                  matrix(d, *d_layout),
                                  description->transa != 0,
                                  description->transb != 0,
                                  description->epilogue == EPILOGUE_BIAS ? description->bias : 0,
                                  *alpha,
                                  *beta,
                                  reinterpret_cast<CUdeviceptr>(workspace),
                                  algorithm->workspace_bytes};
    return multiply(&product, stream) == CUDA_SUCCESS ? SUCCESS : EXECUTION_FAILED;
}
