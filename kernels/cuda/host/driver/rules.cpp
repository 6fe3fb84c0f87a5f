// What a program may not do, said in one line; what a test asks to go wrong.
#include "state.h"

#include <time.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace driver {

// Never destroyed: threads may still compute when the process ends.
FairLock& lock = *new FairLock;

void FairLock::lock() {
    std::unique_lock<std::mutex> guard(mutex_);
    const uint64_t ticket = next_++;
    changed_.wait(guard, [&] { return serving_ == ticket; });
}

void FairLock::unlock() {
    const std::lock_guard<std::mutex> guard(mutex_);
    ++serving_;
    changed_.notify_all();
}

Driver& state() {
    static Driver& all = *new Driver;
    return all;
}

namespace {

void say(const char* rule, const char* format, std::va_list args) {
    char text[600];
    std::vsnprintf(text, sizeof text, format, args);
    std::fprintf(stderr, "host driver: %s: %s\n", rule, text);
    std::fflush(stderr);
}

Wishes parse(const char* text) {
    Wishes wishes;
    std::string rest = text ? text : "";
    while (!rest.empty()) {
        const std::string one = rest.substr(0, rest.find(','));
        rest = one.size() == rest.size() ? "" : rest.substr(one.size() + 1);
        const size_t equals = one.find('=');
        const std::string key = one.substr(0, equals),
                          value = equals == std::string::npos ? "" : one.substr(equals + 1);
        char* end = nullptr;
        const unsigned long long number = std::strtoull(value.c_str(), &end, 10);
        if (key == "capability" && std::sscanf(value.c_str(), "%d.%d", &wishes.major, &wishes.minor) == 2) continue;
        const bool is_number = !value.empty() && *end == 0;
        if (is_number && key == "devices")
            wishes.num_devices = int(number);
        else if (is_number && key == "memory")
            wishes.memory_bytes = number;
        else if (is_number && key == "seed")
            wishes.seed = number;
        else if (is_number && key == "launch")
            wishes.failing_launch = number;
        else if (is_number && key == "copy")
            wishes.failing_copy = number;
        else if (is_number && key == "query")
            wishes.failing_query = number;
        else if (is_number && key == "refuse")
            wishes.refused_launch = number;
        else if (is_number && key == "linger")
            wishes.linger_ms = number;
        else
            misuse("HOST_CUDA_DRIVER", "\"%s\" is not known", one.c_str());
    }
    return wishes;
}

std::atomic<bool> is_main_over = false;

// Handlers of a process's end are called in the opposite order of their registration: those of whoever came before this
// driver are still to come, and take a while.
void on_end_of_main() {
    is_main_over = true;
    timespec left = {time_t(wishes().linger_ms / 1000), long(wishes().linger_ms % 1000) * 1'000'000};
    while (nanosleep(&left, &left) != 0) {}
}

} // namespace

void watch_main() {
    static const int registered = std::atexit(on_end_of_main);
    if (registered != 0) misuse("host driver", "the end of main cannot be watched");
}

// "CUDA C++ Programming Guide", initialization: the driver's state ends with the program and it cannot tell; a call during
// termination after main is undefined.
void check_main_runs(const char* call) {
    if (is_main_over) misuse("Initialization", "%s after main has returned", call);
}

const Wishes& wishes() {
    static const Wishes& all = *new Wishes(parse(std::getenv("HOST_CUDA_DRIVER")));
    return all;
}

void misuse(const char* rule, const char* format, ...) {
    std::va_list args;
    va_start(args, format);
    say(rule, format, args);
    va_end(args);
    std::abort();
}

CUresult refuse(CUresult error, const char* rule, const char* format, ...) {
    std::va_list args;
    va_start(args, format);
    say(rule, format, args);
    va_end(args);
    return error;
}

} // namespace driver
