// The kernels, as fibres.

#include <csetjmp>
#include <csignal>

#include "../entries.h"
#include "state.h"

namespace driver {

namespace {

sigjmp_buf before;
bool is_running = false; // under `lock`
struct sigaction others_action;

// Who touches what is not there, on the device, does no more.
void on_stray_access(int signal, siginfo_t* info, void* context) {
    if (is_running && is_device_address(reinterpret_cast<uintptr_t>(info->si_addr))) siglongjmp(before, 1);
    sigaction(SIGSEGV, &others_action, nullptr);
    if (others_action.sa_flags & SA_SIGINFO && others_action.sa_sigaction)
        others_action.sa_sigaction(signal, info, context);
}

} // namespace

bool is_run_safely(const std::function<void()>& run) {
    static const bool is_installed = [] {
        struct sigaction action{};
        action.sa_sigaction = on_stray_access;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        return sigaction(SIGSEGV, &action, &others_action) == 0;
    }();
    if (!is_installed) misuse("host driver", "no handler of stray accesses");
    if (sigsetjmp(before, 1) != 0) {
        is_running = false;
        fibres::block = nullptr; // its fibres stand where they stood: nothing runs any more after this
        return false;
    }
    is_running = true;
    run();
    is_running = false;
    return true;
}

void run_kernel(const std::string& name, const unsigned grid[3], unsigned threads, size_t shared_bytes,
                const std::vector<std::vector<unsigned char>>& parameters) {
    std::vector<const unsigned char*> args;
    for (const auto& value : parameters) args.push_back(value.data());
    static unsigned turn = 0; // threads run in another order every time
    const auto launch = [&](auto call) {
        fibres::launch(fibres::ORDERS[turn++ % 3], dim3(grid[0], grid[1], grid[2]), dim3(threads), shared_bytes,
                       [&] { call(args.data()); });
    };
    if (wishes().major == 9) return launch(compiled_kernel(name));
    launch([call = fibres::entries().at(name).call](const unsigned char* const* values) {
        call(reinterpret_cast<const void* const*>(values));
    });
}

std::vector<size_t> host_parameters(const std::string& name, bool& is_known) {
    const auto found = fibres::entries().find(name);
    is_known = found != fibres::entries().end();
    return is_known ? found->second.sizes : std::vector<size_t>();
}

} // namespace driver
