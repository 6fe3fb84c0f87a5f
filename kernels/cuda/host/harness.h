// What the kernel tests share: buffers, random values, comparisons, and a main that runs every TEST of a file.
// A test program covers one kernel file: its reference is a plain loop in double, written from the contract on
// top of that file and not from its code.
//
// g++ builds it over host/fibres.h, nvcc over a GPU: the same tests, the same references.
#pragma once

#include "../numerics.cuh"

#ifdef __CUDACC__
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

namespace fibres {

[[noreturn]] inline void fail(const char* format, ...) {
    std::va_list args;
    va_start(args, format);
    std::printf("FAILED: ");
    std::vprintf(format, args);
    std::printf("\n");
    std::fflush(stdout);
    std::_Exit(1);
}

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) fail("%s: %s", what, cudaGetErrorString(status));
}

// A GPU has one order, its own.
enum class Order { Device };
inline constexpr Order ORDERS[] = {Order::Device};

class Guarded {
  public:
    explicit Guarded(size_t num_bytes) : num_bytes_(num_bytes) {
        check(cudaMallocManaged(&data_, num_bytes ? num_bytes : 1), "cudaMallocManaged");
    }
    ~Guarded() { cudaFree(data_); }
    Guarded(const Guarded&) = delete;
    Guarded(Guarded&& other) noexcept : data_(std::exchange(other.data_, nullptr)), num_bytes_(other.num_bytes_) {}
    Guarded& operator=(Guarded&& other) noexcept {
        std::swap(data_, other.data_), std::swap(num_bytes_, other.num_bytes_);
        return *this;
    }
    unsigned char* data() const { return static_cast<unsigned char*>(data_); }
    size_t size() const { return num_bytes_; }

  private:
    void* data_ = nullptr;
    size_t num_bytes_;
};

} // namespace fibres

#define LAUNCH(order, grid, threads, dynamic_bytes, kernel, ...)                                                       \
    do {                                                                                                               \
        (void)(order);                                                                                                 \
        fibres::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(dynamic_bytes)),   \
                      "shared memory of " #kernel);                                                                    \
        kernel<<<grid, threads, dynamic_bytes>>>(__VA_ARGS__);                                                         \
        fibres::check(cudaDeviceSynchronize(), #kernel);                                                               \
    } while (false)
#else
#include <csignal>
#include <string>

#ifdef COMPILED_KERNELS
#include "ptx.h"
#define LAUNCH(order, grid, threads, dynamic_bytes, kernel, ...)                                                       \
    ptx::launch(order, grid, threads, dynamic_bytes, kernel, __VA_ARGS__)
#else
#define LAUNCH(order, grid, threads, dynamic_bytes, kernel, ...)                                                       \
    fibres::launch(order, grid, threads, dynamic_bytes, [&] { kernel(__VA_ARGS__); })
#endif
#endif

inline float value_of(float x) { return x; }
inline float value_of(bf16 x) {
    const u32 bits = u32(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline u32 bits_of(float x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
// Nearest even; for finite values.
inline void set(float* to, double x) { *to = float(x); }
inline void set(bf16* to, double x) {
    const u32 bits = bits_of(float(x));
    to->bits = u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Of all that was in device memory when it was given back: what one build of a kernel has left there and another has to.
inline u64 digest_of_results = 0xcbf29ce484222325;

// Device memory of `count` values; begins as NaN. On the host it ends where nobody may read or write.
template <typename T>
class Device {
  public:
    explicit Device(size_t count) : memory_(count * sizeof(T)), count_(count) {
        std::memset(memory_.data(), 0xff, memory_.size());
    }
#ifndef __CUDACC__
    ~Device() {
        for (size_t i = 0; i < memory_.size(); ++i) digest_of_results = (digest_of_results ^ memory_.data()[i]) * 0x100000001b3;
    }
    Device(Device&&) = default;
    Device& operator=(Device&&) = default;
#endif
    T* get() const { return reinterpret_cast<T*>(memory_.data()); }
    T& operator[](size_t i) const {
        if (i >= count_) fibres::fail("the test itself reads value %zu of %zu", i, count_);
        return get()[i];
    }
    size_t size() const { return count_; }

  private:
    fibres::Guarded memory_;
    size_t count_;
};

inline std::mt19937_64 random_source(7);

inline double random_between(double low, double high) {
    return low + (high - low) * double(random_source() >> 11) / 9007199254740992.0;
}
inline u32 random_below(u32 end) { return u32(random_source() % end); }

template <typename T>
Device<T> random_values(size_t count, double low = -2.0, double high = 2.0) {
    Device<T> values(count);
    for (size_t i = 0; i < count; ++i) set(&values[i], random_between(low, high));
    return values;
}

// `count` distinct numbers below `end`, in random order.
inline std::vector<u32> random_choice(size_t count, u32 end) {
    std::vector<u32> all(end);
    std::iota(all.begin(), all.end(), 0u);
    std::shuffle(all.begin(), all.end(), random_source);
    all.resize(count);
    return all;
}

template <typename T>
Device<T> on_device(const std::vector<T>& values) {
    Device<T> result(values.size());
    std::copy(values.begin(), values.end(), result.get());
    return result;
}

// `tolerance` is relative to the wanted value, or absolute below 1.
inline void expect_close(double got, double want, double tolerance, const char* what, size_t index) {
    if (!(std::fabs(got - want) <= tolerance * std::max(1.0, std::fabs(want))))
        fibres::fail("%s[%zu] is %.9g, expected %.9g within %g", what, index, got, want, tolerance);
}

inline void expect_same(u64 got, u64 want, const char* what, size_t index) {
    if (got != want) fibres::fail("%s[%zu] is %llu (%llx), expected %llu (%llx)", what, index, got, got, want, want);
}

// f32 results differ from a reference in double by a few roundings, bf16 ones by half a unit of 8 bits more.
template <typename T> inline constexpr double TOLERANCE = 2e-6;
template <> inline constexpr double TOLERANCE<bf16> = 5e-3;

struct Test {
    const char* name;
    void (*run)(fibres::Order);
};
inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}
struct Registered {
    Registered(const char* name, void (*run)(fibres::Order)) { tests().push_back({name, run}); }
};
#define TEST(name)                                                                                                     \
    static void name(fibres::Order);                                                                                   \
    static const Registered registered_##name(#name, name);                                                            \
    static void name(fibres::Order order)

#ifndef __CUDACC__
inline void on_fault(int) {
    const char text[] = "FAILED: memory beyond the end of a buffer was touched\n";
    (void)!write(1, text, sizeof text - 1);
    _exit(1);
}

inline void prepare() {
    if (const char* number = std::getenv("MUTATION")) fibres::mutation = std::atoi(number);
    static char stack[64 << 10];
    stack_t alternative{};
    alternative.ss_sp = stack, alternative.ss_size = sizeof stack;
    sigaltstack(&alternative, nullptr);
    struct sigaction action{};
    action.sa_handler = on_fault, action.sa_flags = SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
}
#else
inline void prepare() {}
#endif

int main() {
    prepare();
    for (const Test& test : tests()) {
        for (fibres::Order order : fibres::ORDERS) {
            random_source.seed(7);
            test.run(order);
        }
        std::printf("ok %s\n", test.name);
        if (std::getenv("DIGESTS")) std::printf("digest %016llx\n", digest_of_results);
        std::fflush(stdout);
    }
#ifdef COMPILED_KERNELS
    if (counts::are_wanted()) counts::print();
#endif
}
