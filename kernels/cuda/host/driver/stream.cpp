// Streams, events, captures, graphs: when something is done.
#include "state.h"

#include <sched.h>

#include <algorithm>

using namespace driver;

namespace {

// A driver makes who asks for more wait.
constexpr size_t QUEUE_MAX = 1024;

uint64_t draw() { // splitmix64
    uint64_t& random = state().random;
    if (random == 0) random = wishes().seed * 0x9e3779b97f4a7c15u;
    uint64_t z = random += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

// Memory that is named and was given back since is what a device would read or write all the same.
void check_named(const Operation& operation) {
    for (const auto& [at, number] : operation.memory) {
        const auto found = state().memory.find(at);
        if (found == state().memory.end() || found->second.number != number)
            misuse("cuMemFree", "%s names memory at %#llx that was given back", operation.name.c_str(), at);
    }
    for (const Range& range : operation.host)
        if (!is_pinned(reinterpret_cast<const void*>(range.from), range.num_bytes))
            misuse("cuMemFreeHost", "%s names pinned memory at %#llx that was given back", operation.name.c_str(),
                   range.from);
    if (operation.module && !state().modules.all().count(operation.module))
        misuse("cuModuleUnload", "the module of %s was unloaded before it was done", operation.name.c_str());
}

CUresult run(Context& context, const Operation& operation) {
    check_named(operation);
    Driver& all = state();
    const bool is_launch = operation.kind == Operation::Kind::Launch, is_copy = operation.kind == Operation::Kind::Copy;
    const bool is_asked = (is_launch && ++all.num_launches == wishes().failing_launch) ||
                          (is_copy && ++all.num_copies == wishes().failing_copy);
    if (is_asked || !is_run_safely(operation.run)) {
        context.sticky =
            refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "%s touched memory that is not there%s",
                   operation.name.c_str(), is_asked ? ", as was asked for" : "");
        for (Stream* stream : all.streams.all())
            if (stream->context == &context) stream->num_done += stream->queue.size(), stream->queue.clear();
    }
    return context.sticky;
}

CUresult run_next(Stream& stream) {
    const Operation operation = std::move(stream.queue.front());
    stream.queue.pop_front();
    const CUresult status = run(*stream.context, operation);
    if (status == CUDA_SUCCESS) ++stream.num_done;
    return status;
}

} // namespace

namespace driver {

CUresult check_unsafe(const char* call) {
    // cuStreamBeginCapture, cuThreadExchangeStreamCaptureMode: a thread whose own capture is not relaxed may not make
    // potentially unsafe calls; those of other threads do not count in thread-local mode.
    CUresult status = CUDA_SUCCESS;
    for (Stream* stream : state().streams.all()) {
        Capture* const capture = stream->capture.get();
        if (!capture || capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED) continue;
        if (capture->mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL && capture->thread != std::this_thread::get_id())
            continue;
        capture->is_valid = false;
        status = refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "cuThreadExchangeStreamCaptureMode",
                        "%s while this thread captures: the capture is invalid", call);
    }
    return status;
}

CUresult enqueue(CUstream handle, Operation operation, const char* call) {
    if (!handle) misuse(call, "the default stream: nothing here asks for it");
    Stream* const stream = state().streams.find(handle, "stream", call);
    CONTEXT_OR_RETURN;
    if (stream->context != context) return refuse(CUDA_ERROR_INVALID_HANDLE, call, "a stream of another context");
    if (stream->capture) {
        if (!stream->capture->is_valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        stream->capture->nodes.push_back(std::move(operation));
        return CUDA_SUCCESS;
    }
    stream->queue.push_back(std::move(operation));
    ++stream->num_asked;
    return stream->queue.size() > QUEUE_MAX ? run_next(*stream) : CUDA_SUCCESS;
}

CUresult run_until(Stream& stream, uint64_t num) {
    // What other streams have done by now is their affair: anything from nothing to everything.
    std::vector<Stream*> others;
    for (Stream* other : state().streams.all())
        if (other != &stream && other->context == stream.context && draw() % 2) others.push_back(other);
    std::stable_sort(others.begin(), others.end(),
                     [](const Stream* a, const Stream* b) { return a->priority < b->priority; });
    for (Stream* other : others)
        for (uint64_t left = draw() % 8; left > 0 && !other->queue.empty(); --left)
            if (const CUresult status = run_next(*other); status != CUDA_SUCCESS) return status;
    while (stream.num_done < num && stream.context->sticky == CUDA_SUCCESS) {
        if (stream.queue.empty()) misuse("host driver", "an operation was lost");
        run_next(stream);
        // Others may ask for something meanwhile.
        lock.unlock();
        sched_yield();
        lock.lock();
    }
    return stream.context->sticky;
}

CUresult run_all(Context& context) {
    for (Stream* stream : std::set<Stream*>(state().streams.all()))
        while (stream->context == &context && !stream->queue.empty())
            if (run_next(*stream) != CUDA_SUCCESS) break;
    return context.sticky;
}

} // namespace driver

EXPORT CUresult CUDAAPI cuStreamCreateWithPriority(CUstream* made, unsigned flags, int priority) {
    HOLD;
    CONTEXT_OR_RETURN;
    if (flags != CU_STREAM_NON_BLOCKING)
        return refuse(CUDA_ERROR_INVALID_VALUE, "cuStreamCreate", "flags %u: only non-blocking ones are known here",
                      flags);
    Stream* const stream = state().streams.make();
    stream->context = context;
    stream->priority = std::clamp(priority, -5, 0); // what is beyond is clamped to the range
    return *made = reinterpret_cast<CUstream>(stream), CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuStreamCreate(CUstream* made, unsigned flags) {
    return cuStreamCreateWithPriority(made, flags, 0);
}

EXPORT CUresult CUDAAPI cuStreamSynchronize(CUstream handle) {
    HOLD;
    CONTEXT_OR_RETURN;
    Stream* const stream = state().streams.find(handle, "stream", "cuStreamSynchronize");
    if (stream->capture) {
        stream->capture->is_valid = false;
        return refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "cuStreamSynchronize",
                      "the stream captures: the capture is invalid");
    }
    const CUresult status = check_unsafe("cuStreamSynchronize");
    return status == CUDA_SUCCESS ? run_until(*stream, stream->num_asked) : status;
}

EXPORT CUresult CUDAAPI cuStreamDestroy_v2(CUstream handle) {
    HOLD;
    CONTEXT_OR_RETURN;
    Stream* const stream = state().streams.find(handle, "stream", "cuStreamDestroy");
    if (stream->capture) misuse("cuStreamDestroy", "the stream captures");
    // It returns at once and what the stream has is done later; here it is done now.
    const CUresult status = run_until(*stream, stream->num_asked);
    for (Event* event : state().events.all())
        if (event->stream == stream) event->stream = nullptr;
    state().streams.destroy(stream);
    return status;
}

EXPORT CUresult CUDAAPI cuEventCreate(CUevent* made, unsigned flags) {
    HOLD;
    CONTEXT_OR_RETURN;
    if (flags & ~unsigned(CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING)) return CUDA_ERROR_INVALID_VALUE;
    Event* const event = state().events.make();
    event->context = context;
    event->has_timing = !(flags & CU_EVENT_DISABLE_TIMING);
    return *made = reinterpret_cast<CUevent>(event), CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuEventRecord(CUevent handle, CUstream stream_handle) {
    HOLD;
    CONTEXT_OR_RETURN;
    Event* const event = state().events.find(handle, "event", "cuEventRecord");
    Stream* const stream = state().streams.find(stream_handle, "stream", "cuEventRecord");
    if (event->context != stream->context) return refuse(CUDA_ERROR_INVALID_HANDLE, "cuEventRecord", "of two contexts");
    if (stream->capture) misuse("cuEventRecord", "in a stream that captures: nothing here asks for it");
    event->stream = stream;
    event->at = stream->num_asked;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuEventSynchronize(CUevent handle) {
    HOLD;
    CONTEXT_OR_RETURN;
    Event* const event = state().events.find(handle, "event", "cuEventSynchronize");
    const CUresult status = check_unsafe("cuEventSynchronize");
    if (status != CUDA_SUCCESS || !event->stream) return status; // one that was never recorded is there
    return run_until(*event->stream, event->at);
}

EXPORT CUresult CUDAAPI cuEventDestroy_v2(CUevent handle) {
    HOLD;
    CONTEXT_OR_RETURN;
    state().events.destroy(state().events.find(handle, "event", "cuEventDestroy"));
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    HOLD;
    CONTEXT_OR_RETURN;
    Stream* const stream = state().streams.find(handle, "stream", "cuStreamBeginCapture");
    if (stream->capture) return refuse(CUDA_ERROR_ILLEGAL_STATE, "cuStreamBeginCapture", "the stream captures already");
    stream->capture = std::make_unique<Capture>();
    stream->capture->thread = std::this_thread::get_id();
    stream->capture->mode = mode;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuStreamEndCapture(CUstream handle, CUgraph* made) {
    HOLD;
    CONTEXT_OR_RETURN;
    Stream* const stream = state().streams.find(handle, "stream", "cuStreamEndCapture");
    *made = nullptr;
    if (!stream->capture) return refuse(CUDA_ERROR_ILLEGAL_STATE, "cuStreamEndCapture", "the stream does not capture");
    if (stream->capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED &&
        stream->capture->thread != std::this_thread::get_id())
        return refuse(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "cuStreamEndCapture", "another thread has begun");
    const std::unique_ptr<Capture> capture = std::move(stream->capture);
    if (!capture->is_valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    Graph* const graph = state().graphs.make();
    graph->nodes = capture->nodes;
    return *made = reinterpret_cast<CUgraph>(graph), CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuGraphInstantiateWithFlags(CUgraphExec* made, CUgraph handle, unsigned long long flags) {
    HOLD;
    CONTEXT_OR_RETURN;
    Graph* const graph = state().graphs.find(handle, "graph", "cuGraphInstantiate");
    if (flags != 0)
        return refuse(CUDA_ERROR_INVALID_VALUE, "cuGraphInstantiate", "flags %llu are not known here", flags);
    GraphExec* const exec = state().graph_execs.make();
    exec->nodes = std::make_shared<const std::vector<Operation>>(graph->nodes);
    return *made = reinterpret_cast<CUgraphExec>(exec), CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuGraphLaunch(CUgraphExec handle, CUstream stream) {
    HOLD;
    CONTEXT_OR_RETURN;
    GraphExec* const exec = state().graph_execs.find(handle, "executable graph", "cuGraphLaunch");
    // Each node is an operation of its own: other streams may come between.
    CUresult status = CUDA_SUCCESS;
    for (size_t i = 0; status == CUDA_SUCCESS && i < exec->nodes->size(); ++i) {
        Operation operation = (*exec->nodes)[i];
        operation.name = "a graph's " + operation.name;
        status = enqueue(stream, std::move(operation), "cuGraphLaunch");
    }
    return status;
}

// A graph that runs is freed when it has ended: what is in the queue has copies of its nodes.
EXPORT CUresult CUDAAPI cuGraphExecDestroy(CUgraphExec handle) {
    HOLD;
    CONTEXT_OR_RETURN;
    state().graph_execs.destroy(state().graph_execs.find(handle, "executable graph", "cuGraphExecDestroy"));
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuGraphDestroy(CUgraph handle) {
    HOLD;
    CONTEXT_OR_RETURN;
    state().graphs.destroy(state().graphs.find(handle, "graph", "cuGraphDestroy"));
    return CUDA_SUCCESS;
}
