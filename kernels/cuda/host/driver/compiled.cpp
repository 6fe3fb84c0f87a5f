// The kernels as nvcc has made them for sm_90a, by their names (host/ptx.h).
#define COMPILED_KERNEL(name) static const bool is_known_##name = driver::by_name().emplace(#name, run_##name).second;
#include "../ptx.h"
#include "state.h"

namespace driver {

static std::map<std::string, CompiledKernel>& by_name() {
    static auto& all = *new std::map<std::string, CompiledKernel>; // never destroyed: threads may still compute at the end
    return all;
}

static const bool is_watched = ptx::are_addresses_unique = true;

CompiledKernel compiled_kernel(const std::string& name) { return by_name().at(name); }

} // namespace driver

#include "compiled_kernels.h"
