// Kernels written as phases, so that one source is a CUDA kernel under nvcc and a few loops under a C++ compiler.
//
// A kernel is a struct with `threads` and `run(block, shared, arguments)`. `block.each(f)` calls f once for each thread of the block
// and then waits for all of them: what a phase writes is read in later ones alone, and nothing but memory and PerThread lasts
// longer than a phase. All that stands outside a phase is the same for all threads of a block. On the host the threads of a
// phase run one after the other, in either order: a result that depends on the order gives away that a barrier is missing.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FLOWKERN_DEVICE __device__ __forceinline__
#else
#define FLOWKERN_DEVICE inline
#include <cstring>
#include <new>
#include <vector>
#endif

namespace flowkern {

// N values that are loaded by one instruction, at most 16 bytes.
template <class A, int N>
struct alignas(sizeof(A) * N) Values {
  A value[N];
};

// A bfloat16 in memory.
struct Bfloat16 {
  uint16_t bits;
};

#ifdef __CUDACC__

struct Block {
  FLOWKERN_DEVICE int64_t index() const { return blockIdx.x; }
  FLOWKERN_DEVICE int64_t count() const { return gridDim.x; }

  template <class F>
  FLOWKERN_DEVICE void each(F&& f) const {
    f(int(threadIdx.x));
    __syncthreads();
  }
};

// A variable that every thread has for itself.
template <class V>
struct PerThread {
  V own;
  FLOWKERN_DEVICE V& operator[](int) { return own; }
};

// What no thread writes during the launch goes through the read-only cache.
template <class V>
FLOWKERN_DEVICE V load(const V* from) {
  return __ldg(from);
}
FLOWKERN_DEVICE Bfloat16 load(const Bfloat16* from) { return {__ldg(&from->bits)}; }

FLOWKERN_DEVICE float value_of(Bfloat16 b) { return __uint_as_float(uint32_t(b.bits) << 16); }

template <class Kernel, class Arguments>
__global__ void __launch_bounds__(Kernel::threads, 1) run_kernel(const Arguments arguments) {
  extern __shared__ __align__(16) char shared[];
  Kernel::run(Block(), shared, arguments);
}

// Starts a kernel; null, or what went wrong.
template <class Kernel, class Arguments>
const char* launch(int64_t blocks, int64_t shared, uintptr_t stream, Arguments arguments) {
  const auto kernel = reinterpret_cast<const void*>(run_kernel<Kernel, Arguments>);
  void* parameters[] = {&arguments};
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess)
    error = cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(Kernel::threads), parameters, size_t(shared),
                             reinterpret_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: it is not to be found again by the next one who asks
  return cudaGetErrorString(error);
}

#else

struct Block {
  int64_t own, blocks;
  int threads;
  bool descending;

  int64_t index() const { return own; }
  int64_t count() const { return blocks; }

  template <class F>
  void each(F&& f) const {
    for (int i = 0; i < threads; ++i) f(descending ? threads - 1 - i : i);
  }
};

template <class V>
struct PerThread {
  std::vector<V> all = std::vector<V>(1024);
  V& operator[](int thread) { return all[size_t(thread)]; }
};

template <class V>
V load(const V* from) {
  return *from;
}

inline float value_of(Bfloat16 b) {
  const uint32_t bits = uint32_t(b.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The order of the threads in a phase, in place of a stream.
enum : uintptr_t { ascending = 0, descending = 1 };

template <class Kernel, class Arguments>
const char* launch(int64_t blocks, int64_t shared, uintptr_t order, const Arguments& arguments) {
  for (int64_t b = 0; b < blocks; ++b) {
    std::vector<char> memory(size_t(shared), char(0xff));  // NaN, until something is written
    Kernel::run(Block{b, blocks, Kernel::threads, order == descending}, memory.data(), arguments);
  }
  return nullptr;
}

#endif

FLOWKERN_DEVICE float value_of(float v) { return v; }
FLOWKERN_DEVICE double value_of(double v) { return v; }

}  // namespace flowkern
