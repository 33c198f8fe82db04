// What every CPU kernel shares: dtypes, elementary functions, and threads.
//
// Each kernel file is compiled once per instruction set, into a namespace of its own (FLOWKERN_ISA), and the plain
// loops here are vectorized by the compiler. Nothing in such a file may instantiate a template of the standard
// library: the linker keeps one copy of those for all variants, perhaps the one with the newest instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#include "../kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef FLOWKERN_ISA
#define FLOWKERN_ISA baseline
#endif

#define FLOWKERN_INLINE inline __attribute__((always_inline))

namespace flowkern {

bool in_forked_child();  // bindings.cpp

namespace FLOWKERN_ISA {

template <class To, class From>
FLOWKERN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// --- dtypes: 16-bit values are converted with integer arithmetic, which vectorizes everywhere ---

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

FLOWKERN_INLINE float widen(float v) { return v; }
FLOWKERN_INLINE double widen(double v) { return v; }
FLOWKERN_INLINE float widen(bfloat16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }

FLOWKERN_INLINE float widen(float16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  // Subnormals are fixed-point numbers with 2^-24 as unit; the rest is a shift and a new exponent bias.
  const float subnormal = float(int32_t(magnitude)) * 0x1p-24f;
  const uint32_t rebias = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
  const uint32_t normal = (magnitude << 13) + rebias;
  return bit_cast<float>(sign | (magnitude < 0x0400u ? bit_cast<uint32_t>(subnormal) : normal));
}

FLOWKERN_INLINE void narrow(float v, float& to) { to = v; }
FLOWKERN_INLINE void narrow(double v, double& to) { to = v; }
FLOWKERN_INLINE void narrow(double v, float& to) { to = float(v); }
FLOWKERN_INLINE void narrow(float v, double& to) { to = double(v); }

FLOWKERN_INLINE void narrow(float v, bfloat16& to) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = uint16_t(v != v ? (bits >> 16) | 0x40u : rounded);
}

FLOWKERN_INLINE void narrow(float v, float16& to) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(v), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal's 2^-24 units in the low mantissa bits, rounded by the hardware.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = uint16_t(((bits >> 16) & 0x8000u) | half);
}

// A double goes to 16 bits through float: two roundings, off by at most half a unit in the 24th bit.
FLOWKERN_INLINE void narrow(double v, bfloat16& to) { narrow(float(v), to); }
FLOWKERN_INLINE void narrow(double v, float16& to) { narrow(float(v), to); }

// Calls f with a null pointer of the dtype's C++ type.
template <class F>
FLOWKERN_INLINE void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float64: return f(static_cast<double*>(nullptr));
    case Dtype::bfloat16: return f(static_cast<bfloat16*>(nullptr));
    case Dtype::float16: return f(static_cast<float16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

template <class A>
constexpr Dtype dtype_of() {
  return sizeof(A) == 8 ? Dtype::float64 : Dtype::float32;
}

// --- elementary functions: branch-free in float (about 1 ulp, NaN passes through), the C library's in double ---

FLOWKERN_INLINE double exp_(double x) { return std::exp(x); }
FLOWKERN_INLINE double log_(double x) { return std::log(x); }
FLOWKERN_INLINE double log1p_unit(double x) { return std::log1p(x); }
FLOWKERN_INLINE double tanh_(double x) { return std::tanh(x); }
FLOWKERN_INLINE double atan_(double x) { return std::atan(x); }

FLOWKERN_INLINE float abs_(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) & 0x7fffffffu); }
FLOWKERN_INLINE double abs_(double x) { return std::fabs(x); }

FLOWKERN_INLINE float copysign_(float magnitude, float sign) {
  return bit_cast<float>((bit_cast<uint32_t>(magnitude) & 0x7fffffffu) | (bit_cast<uint32_t>(sign) & 0x80000000u));
}

FLOWKERN_INLINE double copysign_(double magnitude, double sign) { return std::copysign(magnitude, sign); }

FLOWKERN_INLINE float exp_(float x) {
  x = x > 89.f ? 89.f : x;  // exp overflows here
  x = x < -104.f ? -104.f : x;  // and is 0 here
  // Adding 1.5 * 2^23 rounds x / log 2 to an integer n, which then stands in the low bits.
  const float shifted = x * 1.44269504f + 12582912.f;
  const int32_t n = bit_cast<int32_t>(shifted) - 0x4b400000;
  const float k = shifted - 12582912.f;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 0.0013813142431899905f;
  p = p * r + 0.008369418792426586f;
  p = p * r + 0.04166845604777336f;
  p = p * r + 0.16666515171527863f;
  p = p * r + 0.4999999403953552f;
  p = p * (r * r) + r + 1.f;
  const int32_t half = n >> 1;  // 2^n in two factors, so that subnormal and infinite results come out
  return p * bit_cast<float>((half + 127) << 23) * bit_cast<float>((n - half + 127) << 23);
}

// log(1 + x) for 0 <= x <= 1, with full relative precision near 0.
FLOWKERN_INLINE float log1p_unit(float x) {
  float p = -0.003243980696424842f;
  p = p * x + 0.019851261749863625f;
  p = p * x + -0.056959159672260284f;
  p = p * x + 0.10603617131710052f;
  p = p * x + -0.15305569767951965f;
  p = p * x + 0.19675931334495544f;
  p = p * x + -0.24954132735729218f;
  p = p * x + 0.3332996368408203f;
  p = p * x + -0.4999990165233612f;
  return p * (x * x) + x;
}

// x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); returns k.
FLOWKERN_INLINE float take_exponent(float x, float& f) {
  const bool subnormal = x < 0x1p-126f;
  const int32_t bits = bit_cast<int32_t>(subnormal ? x * 0x1p24f : x);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  f = bit_cast<float>(bits - exponent * 0x800000) - 1.f;
  return float(subnormal ? exponent - 24 : exponent);
}

// log x = k log 2 + log(1 + f).
FLOWKERN_INLINE float log_of_parts(float x, float k, float f) {
  float p = -0.07634429633617401f;
  p = p * f + 0.12761549651622772f;
  p = p * f + -0.131601944565773f;
  p = p * f + 0.14201761782169342f;
  p = p * f + -0.16623356938362122f;
  p = p * f + 0.20001226663589478f;
  p = p * f + -0.250008225440979f;
  p = p * f + 0.3333333134651184f;
  float y = (p * f - 0.5f) * (f * f) - k * 2.12194440e-4f + f + k * 0.693359375f;
  y = x == 0.f ? -HUGE_VALF : y;
  y = x < HUGE_VALF ? y : x;  // infinity and NaN
  return x < 0.f ? NAN : y;
}

FLOWKERN_INLINE float log_(float x) {
  float f;
  const float k = take_exponent(x, f);
  return log_of_parts(x, k, f);
}

// log x, given x - 1 too, which near x = 1 has digits that x has not.
FLOWKERN_INLINE float log_(float x, float less_one) {
  float f;
  const float k = take_exponent(x, f);
  return log_of_parts(x, k, k == 0.f ? less_one : f);
}
FLOWKERN_INLINE double log_(double x, double less_one) {
  return less_one > -0.25 && less_one < 0.25 ? std::log1p(less_one) : std::log(x);
}

// tanh x for |x| < 0.625.
FLOWKERN_INLINE float tanh_near(float x) {
  const float z = x * x;
  float p = -0.005704978480935097f;
  p = p * z + 0.020639078691601753f;
  p = p * z + -0.05373971164226532f;
  p = p * z + 0.13331441581249237f;
  p = p * z + -0.3333328068256378f;
  return p * z * x + x;
}
FLOWKERN_INLINE double tanh_near(double x) { return std::tanh(x); }

// tanh x and its slope, in which 1 - tanh^2 would cancel.
template <class A>
FLOWKERN_INLINE A tanh_(A x, A& slope) {
  const A e = exp_(A(-2) * abs_(x)), inverse = A(1) / (A(1) + e);
  slope = A(4) * e * inverse * inverse;
  return abs_(x) < A(0.625) ? tanh_near(x) : copysign_((A(1) - e) * inverse, x);
}

FLOWKERN_INLINE float tanh_(float x) {
  float slope;
  return tanh_(x, slope);
}

FLOWKERN_INLINE float atan_(float x) {
  const bool outside = abs_(x) > 1.f;
  const float t = (outside ? 1.f : abs_(x)) / (outside ? abs_(x) : 1.f);
  const float z = t * t;
  float p = -0.001793593866750598f;
  p = p * z + 0.010914481244981289f;
  p = p * z + -0.031177612021565437f;
  p = p * z + 0.05795735865831375f;
  p = p * z + -0.08403436839580536f;
  p = p * z + 0.10952181369066238f;
  p = p * z + -0.14264240860939026f;
  p = p * z + 0.19998548924922943f;
  p = p * z + -0.33333298563957214f;
  const float y = p * z * t + t;
  return copysign_(outside ? 1.57079632679f - y : y, x);
}

// --- threads ---

// Calls f(task) for every task in [0, tasks). The split of the work into tasks must not depend on the threads.
// A child that was forked while OpenMP had threads would wait for them for ever: it works alone. No exception may leave
// OpenMP's loop: std::bad_alloc, the only one there is, is thrown again behind it.
template <class F>
void parallel_for(int64_t tasks, int64_t elements, int threads, F&& f) {
#ifdef _OPENMP
  constexpr int64_t worth_a_thread = 32768;  // starting one takes some microseconds
  const int64_t useful = elements / worth_a_thread;
  const int64_t wanted = useful < threads ? useful : threads;
  if (wanted > 1 && tasks > 1 && !in_forked_child()) {
    bool failed = false;
#pragma omp parallel for schedule(static) num_threads(int(wanted))
    for (int64_t task = 0; task < tasks; ++task) {
      try {
        f(task);
      } catch (const std::bad_alloc&) {
#pragma omp atomic write
        failed = true;
      }
    }
    if (failed) throw std::bad_alloc();
    return;
  }
#endif
  for (int64_t task = 0; task < tasks; ++task) f(task);
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
