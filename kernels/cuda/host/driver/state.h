// A CUDA driver on the host: what it knows, and what its parts share. See docs/decisions/0035.
//
//   rules.cpp    what a program may not do, said in one line; what a test asks to go wrong
//   image.cpp    kernels of a cubin or of PTX: their parameters, shared memory, threads
//   context.cpp  devices, contexts, names of errors
//   memory.cpp   memory of the device and pinned memory, tensor maps
//   ipc.cpp      memory of other processes
//   stream.cpp   streams, events, captures, graphs: when something is done
//   copy.cpp     copies and fills
//   module.cpp   modules, functions, launches
//   kernels.cpp  the kernels, as fibres: on compute capability 9.0 what nvcc has made of them, else their sources
//   compiled.cpp what nvcc has made of them, translated by the build script
//
// Nothing that is asked for is done before somebody waits for it: a program that does not wait finds the memory as it
// was. Every call holds `lock`, and so does what is done.
//
// Rules are those of NVIDIA's "CUDA Driver API" 13.0 (docs.nvidia.com/cuda/cuda-driver-api, and the comments of
// cuda.h); each names its section. Where that says "undefined", the process ends with a line.
#pragma once

#include <cuda.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace driver {

// Whoever waits longest is next: who does a long queue of operations lets others in between.
class FairLock {
  public:
    void lock();
    void unlock();

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    uint64_t next_ = 0, serving_ = 0;
};
extern FairLock& lock;

// What a test asks for in HOST_CUDA_DRIVER: "devices=2,memory=1048576,capability=8.0,seed=3,launch=7,copy=2,query=8".
struct Wishes {
    int num_devices = 1;
    size_t memory_bytes = size_t(1) << 30;
    int major = 9, minor = 0;
    uint64_t seed = 1;
    uint64_t failing_launch = 0, failing_copy = 0; // which of them touches an illegal address; 0: none
    uint64_t failing_query = 0;                    // which question about free memory finds the device lost
    uint64_t refused_launch = 0;                   // which is refused when it is asked for
    uint64_t linger_ms = 0;                        // how long the process takes from the end of `main` to its own
};
const Wishes& wishes();

// Ends the process with a line: `rule` is the section that says it.
[[noreturn]] void misuse(const char* rule, const char* format, ...) __attribute__((format(printf, 2, 3)));
// The same line for what has an error of its own, which it returns.
CUresult refuse(CUresult error, const char* rule, const char* format, ...) __attribute__((format(printf, 3, 4)));
const char* name_of(CUresult error);
// From here on the end of `main`, or `exit`, is noticed; again it does nothing.
void watch_main();
// Ends the process if that was before this call.
void check_main_runs(const char* call);

struct Parameter {
    size_t offset, size;
};

// What the compiler says of a kernel.
struct KernelInfo {
    std::vector<Parameter> parameters;
    size_t static_shared_bytes = 0;
    unsigned max_threads = 1024, num_registers = 0;
};

// The kernels of an image for a device, or why it takes none.
CUresult read_image(const void* image, int major, int minor, std::map<std::string, KernelInfo>& kernels);

// Bytes that begin at `from`.
struct Range {
    CUdeviceptr from;
    size_t num_bytes;
};

struct Allocation {
    size_t num_bytes;
    uint64_t number; // no other has or had it
    int device;
    bool is_opened = false; // another process's
};

// Something to be done in a stream, or a node of a graph.
struct Operation {
    std::string name;
    std::function<void()> run;
    std::vector<Range> host; // pinned memory it names
    // Memory of the device it may touch, by first address and number.
    std::map<CUdeviceptr, uint64_t> memory;
    enum class Kind { Launch, Copy, Other } kind = Kind::Other;
    struct Module* module = nullptr;
};

struct Graph {
    std::vector<Operation> nodes;
};
struct GraphExec {
    std::shared_ptr<const std::vector<Operation>> nodes;
};

struct Capture {
    std::thread::id thread;
    CUstreamCaptureMode mode;
    bool is_valid = true;
    std::vector<Operation> nodes;
};

struct Context;

struct Stream {
    Context* context;
    int priority;
    std::deque<Operation> queue;
    uint64_t num_asked = 0, num_done = 0;
    std::unique_ptr<Capture> capture;
};

struct Event {
    Context* context;
    bool has_timing;
    Stream* stream = nullptr; // where it was recorded last
    uint64_t at = 0;          // when that many operations of it are done
};

struct Function;
struct Module {
    Context* context;
    std::map<std::string, std::unique_ptr<Function>> functions;
};
struct Function {
    Module* module;
    std::string name;
    KernelInfo info;
    size_t dynamic_bytes_max = 0;
};

// Things of one kind that exist. Addresses of those that are gone are never used again.
template <typename T>
class Table {
  public:
    T* make() {
        T* const made = new T();
        here_.insert(made);
        return made;
    }
    // Ends the process if it is not there.
    T* find(const void* handle, const char* what, const char* call) const {
        T* const at = static_cast<T*>(const_cast<void*>(handle));
        if (here_.count(at)) return at;
        if (gone_.count(at)) misuse(call, "%s %p was destroyed and is used", what, handle);
        misuse(call, "%p is no %s", handle, what);
    }
    void destroy(T* at) {
        *at = T();
        here_.erase(at);
        gone_.insert(at);
    }
    const std::set<T*>& all() const { return here_; }

  private:
    std::set<T*> here_, gone_;
};

struct Context {
    int device = 0;
    int num_retained = 0;
    CUresult sticky = CUDA_SUCCESS; // an error after which nothing works any more
};

struct Driver {
    bool is_initialised = false;
    std::vector<Context> contexts; // the primary ones
    Table<Stream> streams;
    Table<Event> events;
    Table<Module> modules;
    Table<Graph> graphs;
    Table<GraphExec> graph_execs;
    std::set<const void*> functions, functions_gone;
    std::map<CUdeviceptr, Allocation> memory;
    std::map<CUdeviceptr, size_t> pinned;
    uint64_t num_allocated = 0, num_launches = 0, num_copies = 0, num_queries = 0, random = 0;
};
Driver& state();

// The current context, which has to be there and whole. `error` is set where it is not.
Context* current(CUresult& error);
// Of what may not be done by a thread that captures in another mode than relaxed: the capture becomes invalid.
CUresult check_unsafe(const char* call);

// The allocation that holds all the bytes; null: there is none.
const std::pair<const CUdeviceptr, Allocation>* allocation_of(CUdeviceptr at, size_t num_bytes);
bool is_pinned(const void* at, size_t num_bytes);
size_t num_used(int device);
// Adds the memory of `at`, if it is in some.
void name_memory(Operation& operation, CUdeviceptr at);
bool is_device_address(uintptr_t at);

// Behind what the stream has, or into its capture.
CUresult enqueue(CUstream stream, Operation operation, const char* call);
// Does operations until `stream` has done `num`, and maybe some of other streams before.
CUresult run_until(Stream& stream, uint64_t num);
CUresult run_all(Context& context);

// Runs a kernel with the bytes of its parameters.
using CompiledKernel = void (*)(const unsigned char* const* parameters);
CompiledKernel compiled_kernel(const std::string& name);
void run_kernel(const std::string& name, const unsigned grid[3], unsigned threads, size_t shared_bytes,
                const std::vector<std::vector<unsigned char>>& parameters);
// Runs something that touches memory of the device; false: it touched what is not there.
bool is_run_safely(const std::function<void()>& run);
// Bytes of each parameter as the host's compiler counts them; empty with `is_known` false: there is no such kernel.
std::vector<size_t> host_parameters(const std::string& name, bool& is_known);

} // namespace driver

#define EXPORT extern "C" __attribute__((visibility("default")))
#define HOLD                                                      \
    const std::lock_guard<driver::FairLock> hold(driver::lock); \
    driver::check_main_runs(__func__)
#define CONTEXT_OR_RETURN                                            \
    CUresult context_error = CUDA_SUCCESS;                           \
    driver::Context* const context = driver::current(context_error); \
    if (!context) return context_error
