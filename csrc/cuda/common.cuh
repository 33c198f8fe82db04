// Kernels written as phases, so that one source is a CUDA kernel under NVRTC and a few loops under a C++ compiler.
//
// A kernel is a struct with `threads` and `run(block, shared, arguments)`. `block.each(f)` calls f once for each thread of the block
// and then waits for all of them: what a phase writes is read in later ones alone, and nothing but memory and PerThread lasts
// longer than a phase. All that stands outside a phase is the same for all threads of a block. On the host the threads of a
// phase run one after the other, in either order: a result that depends on the order gives away that a barrier is missing.
#pragma once

#ifdef __CUDACC_RTC__
// NVRTC has no headers of the standard library; what <cmath> declares is there without one.
#define FLOWKERN_DEVICE __device__ __forceinline__
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long long;
#else
#define FLOWKERN_DEVICE inline
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#endif

namespace flowkern {

// N values that are loaded by one instruction, at most 16 bytes.
template <class A, int N>
struct alignas(sizeof(A) * N) Values {
  A value[N];
};

// A bfloat16 and a float16 in memory.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#ifdef __CUDACC_RTC__

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

FLOWKERN_DEVICE float of_bits(uint32_t bits) { return __uint_as_float(bits); }
FLOWKERN_DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }

// The body of a __global__ function.
template <class Kernel, class Arguments>
FLOWKERN_DEVICE void run(const Arguments& arguments) {
  extern __shared__ __align__(16) char shared[];
  Kernel::run(Block(), shared, arguments);
}

#else

// As under NVRTC, where they are global, for float and for double.
using std::abs, std::atan, std::erf, std::exp, std::expm1, std::log, std::log1p, std::tanh;

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

inline float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// All blocks, one after the other.
template <class Kernel, class Arguments>
void run(int64_t blocks, int64_t shared, bool descending, const Arguments& arguments) {
  for (int64_t b = 0; b < blocks; ++b) {
    std::vector<char> memory(size_t(shared), char(0xff));  // NaN, until something is written
    Kernel::run(Block{b, blocks, Kernel::threads, descending}, memory.data(), arguments);
  }
}

#endif

FLOWKERN_DEVICE float value_of(float v) { return v; }
FLOWKERN_DEVICE double value_of(double v) { return v; }
FLOWKERN_DEVICE float value_of(Bfloat16 b) { return of_bits(uint32_t(b.bits) << 16); }
// Exact: the exponent moves by the product, which makes normal numbers of subnormal ones. Infinity and NaN have the largest exponent.
FLOWKERN_DEVICE float value_of(Float16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16, rest = uint32_t(h.bits & 0x7fffu) << 13;
  return rest < 0x0f800000u ? of_bits(sign | bits_of(of_bits(rest) * 0x1p112f)) : of_bits(sign | rest | 0x7f800000u);
}

FLOWKERN_DEVICE void narrow(float v, float& to) { to = v; }
FLOWKERN_DEVICE void narrow(double v, double& to) { to = v; }
FLOWKERN_DEVICE void narrow(float v, Bfloat16& to) { to.bits = uint16_t(bits_of(v) >> 16); }  // of a value that came from one

}  // namespace flowkern
