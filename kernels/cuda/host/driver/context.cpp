// Devices, contexts, names of errors.
#include "state.h"

#include <cstdio>
#include <cstring>

using namespace driver;

namespace {

thread_local Context* current_context = nullptr;

// Initialization: any call before cuInit is refused.
CUresult check_device(CUdevice device) {
    if (!state().is_initialised) return CUDA_ERROR_NOT_INITIALIZED;
    return device >= 0 && device < wishes().num_devices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

struct Name {
    CUresult error;
    const char *name, *text;
};
#define NAME(error, text) {error, #error, text}
const Name NAMES[] = {
    NAME(CUDA_SUCCESS, "no error"),
    NAME(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    NAME(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    NAME(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    NAME(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    NAME(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    NAME(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    NAME(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    NAME(CUDA_ERROR_MAP_FAILED, "mapping of buffer object failed"),
    NAME(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    NAME(CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed"),
    NAME(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "the provided PTX was compiled with an unsupported toolchain"),
    NAME(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    NAME(CUDA_ERROR_ILLEGAL_STATE, "the operation cannot be performed in the present state"),
    NAME(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    NAME(CUDA_ERROR_NOT_READY, "device not ready"),
    NAME(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    NAME(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    NAME(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    NAME(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    NAME(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD,
         "attempt to terminate a thread-local capture sequence from another thread"),
};
#undef NAME

CUresult find_name(CUresult error, const char** text, const char* Name::* which) {
    for (const Name& name : NAMES)
        if (name.error == error) return *text = name.*which, CUDA_SUCCESS;
    return *text = nullptr, CUDA_ERROR_INVALID_VALUE;
}

} // namespace

namespace driver {

Context* current(CUresult& error) {
    if (!state().is_initialised) return error = CUDA_ERROR_NOT_INITIALIZED, nullptr;
    if (!current_context) return error = CUDA_ERROR_INVALID_CONTEXT, nullptr;
    // cuDevicePrimaryCtxRelease: with the last release the context and all that is in it is gone.
    if (current_context->num_retained == 0) return error = CUDA_ERROR_CONTEXT_IS_DESTROYED, nullptr;
    // CUDA_ERROR_ILLEGAL_ADDRESS: "any further CUDA work will return the same error".
    if (current_context->sticky != CUDA_SUCCESS) return error = current_context->sticky, nullptr;
    return current_context;
}

} // namespace driver

EXPORT CUresult CUDAAPI cuInit(unsigned flags) {
    HOLD;
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (wishes().num_devices == 0) return CUDA_ERROR_NO_DEVICE;
    watch_main();
    state().is_initialised = true;
    state().contexts.resize(size_t(wishes().num_devices));
    for (int i = 0; i < wishes().num_devices; ++i) state().contexts[size_t(i)].device = i;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuGetErrorName(CUresult error, const char** text) {
    return find_name(error, text, &Name::name);
}
EXPORT CUresult CUDAAPI cuGetErrorString(CUresult error, const char** text) {
    return find_name(error, text, &Name::text);
}

EXPORT CUresult CUDAAPI cuDeviceGetCount(int* count) {
    HOLD;
    if (!state().is_initialised) return CUDA_ERROR_NOT_INITIALIZED;
    return *count = wishes().num_devices, CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
    HOLD;
    const CUresult status = check_device(ordinal);
    if (status == CUDA_SUCCESS) *device = ordinal;
    return status;
}

EXPORT CUresult CUDAAPI cuDeviceGetName(char* name, int num_bytes, CUdevice device) {
    HOLD;
    const CUresult status = check_device(device);
    if (status == CUDA_SUCCESS)
        std::snprintf(name, size_t(num_bytes), "Host driver %d.%d", wishes().major, wishes().minor);
    return status;
}

EXPORT CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    HOLD;
    const CUresult status = check_device(device);
    if (status != CUDA_SUCCESS) return status;
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = wishes().major; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = wishes().minor; break;
        // "CUDA C++ Programming Guide", table of compute capabilities.
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
            *value = (wishes().major == 9 ? 227 : wishes().major == 8 && wishes().minor == 0 ? 163 : 99) << 10;
            break;
        case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED: *value = 1; break;
        case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 0; break;
        default:
            return refuse(CUDA_ERROR_INVALID_VALUE, "cuDeviceGetAttribute", "attribute %d is not known here",
                          attribute);
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* made, CUdevice device) {
    HOLD;
    const CUresult status = check_device(device);
    if (status != CUDA_SUCCESS) return status;
    Context& context = state().contexts[size_t(device)];
    ++context.num_retained;
    return *made = reinterpret_cast<CUcontext>(&context), CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    HOLD;
    const CUresult status = check_device(device);
    if (status != CUDA_SUCCESS) return status;
    Context& context = state().contexts[size_t(device)];
    if (context.num_retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (--context.num_retained > 0) return CUDA_SUCCESS;
    // With the context goes what is in it: a test hears what a program has left there.
    size_t num_streams = 0, num_events = 0;
    for (const Stream* stream : state().streams.all()) num_streams += stream->context == &context;
    for (const Event* event : state().events.all()) num_events += event->context == &context;
    // After an error that stays nothing can be given back.
    if (context.sticky == CUDA_SUCCESS && num_streams + num_events + num_used(device) > 0)
        refuse(CUDA_SUCCESS, "cuDevicePrimaryCtxRelease", "%zu streams, %zu events and %zu bytes were left",
               num_streams, num_events, num_used(device));
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuCtxGetCurrent(CUcontext* context) {
    HOLD;
    if (!state().is_initialised) return CUDA_ERROR_NOT_INITIALIZED;
    return *context = reinterpret_cast<CUcontext>(current_context), CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) {
    HOLD;
    if (!state().is_initialised) return CUDA_ERROR_NOT_INITIALIZED;
    auto* const found = reinterpret_cast<Context*>(context);
    if (found && found->num_retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
    return current_context = found, CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    HOLD;
    CONTEXT_OR_RETURN;
    return *least = 0, *greatest = -5, CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuCtxSynchronize() {
    HOLD;
    CONTEXT_OR_RETURN;
    const CUresult status = check_unsafe("cuCtxSynchronize");
    return status == CUDA_SUCCESS ? run_all(*context) : status;
}
