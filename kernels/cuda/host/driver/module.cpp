// Modules, functions, launches: "CUDA Driver API", module management and execution control; limits of a launch as in
// the "CUDA C++ Programming Guide", compute capabilities.
#include <algorithm>
#include <cstring>

#include "state.h"

using namespace driver;

namespace {

constexpr size_t NUM_REGISTERS = 65536;
constexpr size_t SHARED_BYTES_UNASKED = 48 << 10;

size_t shared_bytes_max() {
    return size_t(wishes().major == 9 ? 227 : wishes().major == 8 && wishes().minor == 0 ? 163 : 99) << 10;
}

Function& function_of(CUfunction handle, const char* call) {
    if (state().functions_gone.count(handle)) misuse(call, "a function of a module that was unloaded");
    if (!state().functions.count(handle)) misuse(call, "%p is no function", static_cast<void*>(handle));
    return *reinterpret_cast<Function*>(handle);
}

CUresult check_launch(const Function& f, const unsigned grid[3], unsigned num_threads, size_t shared_bytes) {
    const auto invalid = [&](const char* what) {
        return refuse(CUDA_ERROR_INVALID_VALUE, "cuLaunchKernelEx",
                      "%s on %u x %u x %u blocks of %u threads with %zu bytes: %s", f.name.c_str(), grid[0], grid[1],
                      grid[2], num_threads, shared_bytes, what);
    };
    if (!grid[0] || !grid[1] || !grid[2] || !num_threads) return invalid("none");
    if (grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535) return invalid("too many blocks");
    if (num_threads > 1024 || num_threads > f.info.max_threads) return invalid("more threads than it was compiled for");
    if (shared_bytes > f.dynamic_bytes_max) return invalid("more shared memory than cuFuncSetAttribute has allowed");
    if (shared_bytes + f.info.static_shared_bytes > shared_bytes_max())
        return invalid("more shared memory than a block has");
    // Registers are given to warps in units of 256.
    const size_t per_warp = (size_t(f.info.num_registers) * 32 + 255) / 256 * 256;
    if (per_warp * ((num_threads + 31) / 32) > NUM_REGISTERS)
        return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "cuLaunchKernelEx", "%s: %u threads of %u registers",
                      f.name.c_str(), num_threads, f.info.num_registers);
    return CUDA_SUCCESS;
}

// Launches may overlap from compute capability 9.0 on ("CUDA Programming Guide", programmatic dependent launch). Here they
// do not; that every kernel waits is what fibres.h sees to.
CUresult check_attributes(const CUlaunchConfig& config) {
    for (unsigned i = 0; i < config.numAttrs; ++i) {
        const CUlaunchAttribute& attribute = config.attrs[i];
        if (attribute.id != CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            misuse("cuLaunchKernelEx", "attribute %d: nothing here asks for it", int(attribute.id));
        if (wishes().major < 9)
            return refuse(CUDA_ERROR_NOT_SUPPORTED, "cuLaunchKernelEx", "no launches overlap on compute capability %d.%d",
                          wishes().major, wishes().minor);
    }
    return CUDA_SUCCESS;
}

} // namespace

EXPORT CUresult CUDAAPI cuModuleLoadData(CUmodule* made, const void* image) {
    HOLD;
    CONTEXT_OR_RETURN;
    if (const CUresult status = check_unsafe("cuModuleLoadData"); status != CUDA_SUCCESS) return status;
    std::map<std::string, KernelInfo> kernels;
    const CUresult status = read_image(image, wishes().major, wishes().minor, kernels);
    if (status != CUDA_SUCCESS) return status;
    Module* const module = state().modules.make();
    module->context = context;
    for (auto& [name, info] : kernels) {
        // What nvcc and the host's compiler say of the same source.
        bool is_known = false;
        const std::vector<size_t> sizes = host_parameters(name, is_known);
        if (!is_known) misuse("host driver", "kernel %s is not in host/entries.h", name.c_str());
        bool is_same = sizes.size() == info.parameters.size();
        for (size_t i = 0; is_same && i < sizes.size(); ++i) is_same = sizes[i] == info.parameters[i].size;
        if (!is_same)
            misuse("host driver", "the parameters of %s in the image are not those of the source", name.c_str());
        auto function = std::make_unique<Function>();
        function->module = module, function->name = name, function->info = info;
        const size_t static_bytes = info.static_shared_bytes;
        function->dynamic_bytes_max = SHARED_BYTES_UNASKED - std::min(static_bytes, SHARED_BYTES_UNASKED);
        state().functions.insert(function.get());
        module->functions[name] = std::move(function);
    }
    return *made = reinterpret_cast<CUmodule>(module), CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuModuleGetFunction(CUfunction* found, CUmodule handle, const char* name) {
    HOLD;
    CONTEXT_OR_RETURN;
    Module* const module = state().modules.find(handle, "module", "cuModuleGetFunction");
    const auto function = module->functions.find(name);
    if (function == module->functions.end()) return CUDA_ERROR_NOT_FOUND;
    return *found = reinterpret_cast<CUfunction>(function->second.get()), CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuModuleUnload(CUmodule handle) {
    HOLD;
    CONTEXT_OR_RETURN;
    Module* const module = state().modules.find(handle, "module", "cuModuleUnload");
    for (auto& [name, function] : module->functions) {
        state().functions.erase(function.get());
        state().functions_gone.insert(function.release()); // kept, so that its address is nobody else's
    }
    state().modules.destroy(module);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuFuncGetParamInfo(CUfunction handle, size_t index, size_t* offset, size_t* size) {
    HOLD;
    CONTEXT_OR_RETURN;
    const Function& function = function_of(handle, "cuFuncGetParamInfo");
    if (index >= function.info.parameters.size()) return CUDA_ERROR_INVALID_VALUE;
    *offset = function.info.parameters[index].offset;
    if (size) *size = function.info.parameters[index].size;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
    HOLD;
    CONTEXT_OR_RETURN;
    Function& function = function_of(handle, "cuFuncSetAttribute");
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
    // The sum with what is static cannot exceed what a block can have.
    if (value < 0 || size_t(value) + function.info.static_shared_bytes > shared_bytes_max())
        return refuse(CUDA_ERROR_INVALID_VALUE, "cuFuncSetAttribute", "%s: %d bytes and %zu static ones",
                      function.name.c_str(), value, function.info.static_shared_bytes);
    return function.dynamic_bytes_max = size_t(value), CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction handle, void** parameters, void** extra) {
    HOLD;
    CONTEXT_OR_RETURN;
    const Function& function = function_of(handle, "cuLaunchKernelEx");
    if (extra || (!parameters && !function.info.parameters.empty())) return CUDA_ERROR_INVALID_VALUE;
    if (function.module->context != context) return CUDA_ERROR_INVALID_HANDLE;
    if (config->blockDimY != 1 || config->blockDimZ != 1)
        misuse("cuLaunchKernelEx", "blocks of more than one dimension: nothing here asks for them");
    if (const CUresult status = check_attributes(*config); status != CUDA_SUCCESS) return status;
    static uint64_t num_asked = 0;
    if (++num_asked == wishes().refused_launch)
        return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "cuLaunchKernelEx", "refused, as was asked for");
    const unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    const unsigned num_threads = config->blockDimX, shared_bytes = config->sharedMemBytes;
    if (const CUresult status = check_launch(function, grid, num_threads, shared_bytes); status != CUDA_SUCCESS)
        return status;
    Operation operation{function.name, {}, {}, {}, Operation::Kind::Launch, function.module};
    // They are copied before the call returns.
    std::vector<std::vector<unsigned char>> values;
    for (size_t i = 0; i < function.info.parameters.size(); ++i) {
        const auto* const bytes = static_cast<const unsigned char*>(parameters[i]);
        if (!bytes) return CUDA_ERROR_INVALID_VALUE;
        values.emplace_back(bytes, bytes + function.info.parameters[i].size);
        if (values.back().size() != sizeof(CUdeviceptr)) continue;
        CUdeviceptr at;
        std::memcpy(&at, bytes, sizeof at);
        name_memory(operation, at);
    }
    operation.run = [name = function.name, x = grid[0], y = grid[1], z = grid[2], num_threads, shared_bytes, values] {
        const unsigned blocks[3] = {x, y, z};
        run_kernel(name, blocks, num_threads, shared_bytes, values);
    };
    return enqueue(config->hStream, std::move(operation), "cuLaunchKernelEx");
}
