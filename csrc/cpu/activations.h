// The activations of autoregressive networks and their slopes.
#pragma once

#include "common.h"

namespace flowkern {
namespace FLOWKERN_ISA {

FLOWKERN_INLINE double erf_(double x) { return std::erf(x); }

// A polynomial near 0, and 1 - exp(polynomial) beyond.
FLOWKERN_INLINE float erf_(float x) {
  const float z = x * x;
  const float t = abs_(x) > 4.f ? 4.f : abs_(x);
  float p = 7.889117841841653e-05f;
  p = p * z + -0.0008020840468816459f;
  p = p * z + 0.005189535208046436f;
  p = p * z + -0.026854444295167923f;
  p = p * z + 0.11283600330352783f;
  p = p * z + -0.3761262595653534f;
  p = p * z + 0.12837916612625122f;
  float q = 7.84523138008808e-07f;
  q = q * t + -1.2452926057449076e-05f;
  q = q * t + 6.434338865801692e-05f;
  q = q * t + 0.00010174796625506133f;
  q = q * t + -0.003360225586220622f;
  q = q * t + 0.02383640967309475f;
  q = q * t + -0.10696136206388474f;
  q = q * t + -0.6341962218284607f;
  q = q * t + -1.1292037963867188f;
  q = q * t + 0.00012528180377557874f;
  return abs_(x) < 1.f ? p * x + x : x != x ? x : copysign_(1.f - exp_(q), x);
}

template <class A>
FLOWKERN_INLINE A relu(A x) {
  return x < A(0) ? A(0) : x;  // NaN passes
}

template <class A, class F>
FLOWKERN_INLINE void map_run(const A* from, A* to, int64_t n, F&& f) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = f(from[i]);
}

// The positions in ACTIVATIONS of flowkern/ops/autoregressive/network.py.
template <class A>
void activate(int activation, const A* from, A* to, int64_t n) {
  switch (activation) {
    case 0: return map_run(from, to, n, [](A x) { return relu(x); });
    case 1: return map_run(from, to, n, [](A x) { return x < A(0) ? A(0.01) * x : x; });
    case 2: return map_run(from, to, n, [](A x) { return x > A(0) ? x : exp_(x) - A(1); });
    case 3: return map_run(from, to, n, [](A x) { return A(0.5) * x * (A(1) + erf_(x * A(0.70710678118654752440))); });
    case 4: return map_run(from, to, n, [](A x) { return x / (A(1) + exp_(-x)); });
    case 5: return map_run(from, to, n, [](A x) { return tanh_(x); });
    default: return map_run(from, to, n, [](A x) { return A(1) / (A(1) + exp_(-x)); });
  }
}

// `grad`, multiplied by the slope at `before`.
template <class A, class F>
FLOWKERN_INLINE void slope_run(const A* before, A* grad, int64_t n, F&& slope) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) grad[i] *= slope(before[i]);
}

template <class A>
void times_slope(int activation, const A* before, A* grad, int64_t n) {
  switch (activation) {
    case 0: return slope_run(before, grad, n, [](A x) { return x > A(0) ? A(1) : A(0); });
    case 1: return slope_run(before, grad, n, [](A x) { return x > A(0) ? A(1) : A(0.01); });
    case 2: return slope_run(before, grad, n, [](A x) { return exp_(x > A(0) ? A(0) : x); });
    case 3:
      return slope_run(before, grad, n, [](A x) {
        return A(0.5) * (A(1) + erf_(x * A(0.70710678118654752440))) + x * exp_(A(-0.5) * x * x) * A(0.39894228040143267794);
      });
    case 4:
      return slope_run(before, grad, n, [](A x) {
        const A e = exp_(-abs_(x)), inverse = A(1) / (A(1) + e), smaller = e * inverse;
        return (x >= A(0) ? inverse : smaller) * (A(1) + x * (x >= A(0) ? smaller : inverse));  // sigmoid(-x), 1 - sigmoid(-x)
      });
    case 5:
      return slope_run(before, grad, n, [](A x) {
        A slope;
        tanh_(x, slope);
        return slope;
      });
    default:
      return slope_run(before, grad, n, [](A x) {
        const A e = exp_(-abs_(x));
        return e / ((A(1) + e) * (A(1) + e));
      });
  }
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
