// What every kernel file begins with: CUDA's own names when nvcc or NVRTC compiles it, those of
// host/fibres.h when g++ does. Includes no system header, so that NVRTC can compile it too.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef __CUDACC__
// Static shared memory of `count` values.
#define SHARED_ARRAY(type, name, count) __shared__ __align__(16) type name[count]
// The shared memory asked for at launch.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// Values that every thread reads and nobody writes.
#define CONSTANT_ARRAY(type, name, count) static __constant__ const type name[count]
#else
#define CONSTANT_ARRAY(type, name, count) static const type name[count]
#include "host/fibres.h"
#endif

#define FULL_WARP 0xffffffffu
// Instead of a row or a slot: an entry that only pads a list to a length that was fixed before. Nothing is read or
// written for it.
#define NOTHING 0xffffffffu

// A place that the host tests can make wrong, by its number within a kernel file and the headers it includes;
// some test has to fail then. A device only ever knows the right one, unless one was named to its compiler.
#if defined(__CUDACC__) && defined(MUTATION)
#define MUTATE(n, right, wrong) ((n) == MUTATION ? (wrong) : (right))
#elif defined(__CUDACC__)
#define MUTATE(n, right, wrong) (right)
#else
#define MUTATE(n, right, wrong) (fibres::mutation == (n) ? (wrong) : (right))
#endif

// A launch may begin while the one ahead of it on the lane ends, where the driver was asked for that (programmatic
// dependent launch, from compute capability 9.0 on). Until a thread has called this, it touches nothing that any launch
// writes; whatever earlier launches wrote is there behind it. Every thread of every kernel calls it once.
// Pointers are not `__restrict__`: what a kernel reads by such is read as if nobody wrote it while the kernel is there, and
// then also ahead of this. `check nvcc` looks for such loads.
__device__ __forceinline__ void begin_launch() {
#ifndef __CUDACC__
    fibres::begin_thread();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    // The next one may take its places: it waits there for the end of this one.
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
