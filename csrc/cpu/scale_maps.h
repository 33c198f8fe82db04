// The scale maps of affine layers: how a raw output u becomes a scale s. Their formulas stand in
// flowkern/_core/scale_map.py.
#pragma once

#include "common.h"

namespace flowkern {
namespace FLOWKERN_ISA {

// Each map gives, for a raw output u: scale (or its reciprocal) with log s, and scale with the slope of log s.

template <class A>
struct Exp {
  Exp(double, double) {}
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale(A u, A& log_s) const {
    log_s = u;
    return exp_(Reciprocal ? -u : u);
  }
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale_and_slope(A u, A& slope) const {
    slope = A(1);
    return exp_(Reciprocal ? -u : u);
  }
};

// sigmoid(v) = numerator / (1 + e) with e = exp(-|v|): nothing overflows, nothing cancels.
template <class A>
struct Sigmoid {
  A bias;
  Sigmoid(double a, double) : bias(A(a)) {}
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale(A u, A& log_s) const {
    const A v = u + bias, e = exp_(-abs_(v)), numerator = v >= A(0) ? A(1) : e;
    log_s = (v < A(0) ? v : A(0)) - log1p_unit(e);
    return Reciprocal ? (A(1) + e) / numerator : numerator / (A(1) + e);
  }
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale_and_slope(A u, A& slope) const {
    const A v = u + bias, e = exp_(-abs_(v)), inverse = A(1) / (A(1) + e);
    const A numerator = v >= A(0) ? A(1) : e;
    slope = (v >= A(0) ? e : A(1)) * inverse;
    return Reciprocal ? (A(1) + e) / numerator : numerator * inverse;
  }
};

template <class A>
struct SigmoidPlus {
  A bias, eps;
  SigmoidPlus(double a, double b) : bias(A(a)), eps(A(b)) {}
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale(A u, A& log_s) const {
    const A v = u + bias, e = exp_(-abs_(v)), inverse = A(1) / (A(1) + e);
    const A s = (v >= A(0) ? A(1) : e) * inverse + eps;
    log_s = log_(s, v >= A(0) ? eps - e * inverse : s - A(1));
    return Reciprocal ? A(1) / s : s;
  }
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale_and_slope(A u, A& slope) const {
    const A v = u + bias, e = exp_(-abs_(v)), inverse = A(1) / (A(1) + e);
    const A s = (v >= A(0) ? A(1) : e) * inverse + eps;
    slope = e * inverse * inverse / s;
    return Reciprocal ? A(1) / s : s;
  }
};

// Below `tail` log s is u to the last digit; s itself goes on to 0, and its logarithm would be -infinity.
template <class A>
struct Softplus {
  A eps, tail;
  Softplus(double a, double) : eps(A(a)), tail(a == 0 ? A(-40) : A(-HUGE_VAL)) {}
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale(A u, A& log_s) const {
    const A s = (u > A(0) ? u : A(0)) + log1p_unit(exp_(-abs_(u))) + eps;
    log_s = u < tail ? u : log_(s);
    return Reciprocal ? A(1) / s : s;
  }
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale_and_slope(A u, A& slope) const {
    const A e = exp_(-abs_(u)), s = (u > A(0) ? u : A(0)) + log1p_unit(e) + eps;
    slope = u < tail ? A(1) : (u >= A(0) ? A(1) : e) / ((A(1) + e) * s);
    return Reciprocal ? A(1) / s : s;
  }
};

template <class A>
struct Tanh {
  A clamp, inverse_clamp;
  Tanh(double a, double) : clamp(A(a)), inverse_clamp(A(1 / a)) {}
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale(A u, A& log_s) const {
    log_s = clamp * tanh_(u * inverse_clamp);
    return exp_(Reciprocal ? -log_s : log_s);
  }
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale_and_slope(A u, A& slope) const {
    const A t = tanh_(u * inverse_clamp, slope);
    return exp_(Reciprocal ? -clamp * t : clamp * t);
  }
};

template <class A>
struct Atan {
  A clamp;
  Atan(double a, double) : clamp(A(0.636 * a)) {}
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale(A u, A& log_s) const {
    log_s = clamp * atan_(u);
    return exp_(Reciprocal ? -log_s : log_s);
  }
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale_and_slope(A u, A& slope) const {
    const A log_s = clamp * atan_(u);
    slope = clamp / (A(1) + u * u);
    return exp_(Reciprocal ? -log_s : log_s);
  }
};

// From `most` on log s is the bound to the last digit, and an infinite u would give infinity / infinity.
template <class A>
struct SoftClip {
  A inverse_bound, most;
  SoftClip(double a, double) : inverse_bound(A(1 / a)), most(A(a * (sizeof(A) == 8 ? 1e300 : 1e30))) {}
  FLOWKERN_INLINE A limited(A u) const { return u > most ? most : u < -most ? -most : u; }
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale(A u, A& log_s) const {
    u = limited(u);
    log_s = u / (A(1) + abs_(u * inverse_bound));
    return exp_(Reciprocal ? -log_s : log_s);
  }
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale_and_slope(A u, A& slope) const {
    u = limited(u);
    const A inverse = A(1) / (A(1) + abs_(u * inverse_bound));
    slope = inverse * inverse;
    return exp_(Reciprocal ? -u * inverse : u * inverse);
  }
};

// Calls f with the scale map of a code: it is a constant there, so that the loops inside vectorize.
template <class A, class F>
FLOWKERN_INLINE void with_map(int code, double a, double b, F&& f) {
  switch (code) {
    case 0: return f(Exp<A>(a, b));
    case 1: return b == 0 ? f(Sigmoid<A>(a, b)) : f(SigmoidPlus<A>(a, b));
    case 2: return f(Softplus<A>(a, b));
    case 3: return f(Tanh<A>(a, b));
    case 4: return f(Atan<A>(a, b));
    default: return f(SoftClip<A>(a, b));
  }
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
