// y = x * s(u) + t and its log-determinant, its inverse, and the backward of both: one pass over the data each.
// The formulas stand at the top of flowkern/ops/_affine_coupling.py.

#include "coupling.h"

namespace flowkern {
namespace FLOWKERN_ISA {
namespace {

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
    const A v = u + bias, e = exp_(-abs_(v)), s = (v >= A(0) ? A(1) : e) / (A(1) + e) + eps;
    log_s = log_(s);
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

template <class A>
struct Softplus {
  A eps;
  Softplus(double a, double) : eps(A(a)) {}
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale(A u, A& log_s) const {
    const A s = (u > A(0) ? u : A(0)) + log1p_unit(exp_(-abs_(u))) + eps;
    log_s = log_(s);
    return Reciprocal ? A(1) / s : s;
  }
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale_and_slope(A u, A& slope) const {
    const A e = exp_(-abs_(u)), s = (u > A(0) ? u : A(0)) + log1p_unit(e) + eps;
    slope = (u >= A(0) ? A(1) : e) / ((A(1) + e) * s);
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
    const A t = tanh_(u * inverse_clamp);
    slope = A(1) - t * t;
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

template <class A>
struct SoftClip {
  A inverse_bound;
  SoftClip(double a, double) : inverse_bound(A(1 / a)) {}
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale(A u, A& log_s) const {
    log_s = u / (A(1) + abs_(u * inverse_bound));
    return exp_(Reciprocal ? -log_s : log_s);
  }
  template <bool Reciprocal>
  FLOWKERN_INLINE A scale_and_slope(A u, A& slope) const {
    const A inverse = A(1) / (A(1) + abs_(u * inverse_bound));
    slope = inverse * inverse;
    return exp_(Reciprocal ? -u * inverse : u * inverse);
  }
};

// The loops take their map as an address, so that what surrounds them is compiled once.
template <class A, bool Inverse, bool ShiftFirst, class Map>
A transform(const void* address, const A* x, const A* u, const A* t, A* y, int64_t n) {
  const Map map = *static_cast<const Map*>(address);
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    A log_s;
    const A s = map.template scale<Inverse>(u[i], log_s);
    if (Inverse) {
      y[i] = ShiftFirst ? x[i] * s - t[i] : (x[i] - t[i]) * s;
    } else {
      y[i] = ShiftFirst ? (x[i] + t[i]) * s : x[i] * s + t[i];
    }
    total += log_s;
  }
  return total;
}

template <class A, bool Inverse, bool ShiftFirst, class Map>
void differentiate(const void* address, const A* g, A glog, const A* x, const A* u, const A* t, A* dx, A* du, A* dt, int64_t n) {
  const Map map = *static_cast<const Map*>(address);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    A slope;
    const A s = map.template scale_and_slope<Inverse>(u[i], slope);
    const A through = g[i] * s;
    if (Inverse) {
      du[i] = -slope * (through * (ShiftFirst ? x[i] : x[i] - t[i]) + glog);
      dt[i] = ShiftFirst ? -g[i] : -through;
    } else {
      du[i] = slope * (through * (ShiftFirst ? x[i] + t[i] : x[i]) + glog);
      dt[i] = ShiftFirst ? through : g[i];
    }
    dx[i] = through;
  }
}

template <class A>
using Transform = A (*)(const void* map, const A* x, const A* u, const A* t, A* y, int64_t n);

template <class A, class Map>
Transform<A> transform_of(const Affine& c, const Map&) {
  if (c.inverse) return c.shift_first ? transform<A, true, true, Map> : transform<A, true, false, Map>;
  return c.shift_first ? transform<A, false, true, Map> : transform<A, false, false, Map>;
}

template <class A>
using Differentiate = void (*)(const void* map, const A* g, A glog, const A* x, const A* u, const A* t, A* dx, A* du, A* dt,
                               int64_t n);

template <class A, class Map>
Differentiate<A> differentiate_of(const Affine& c, const Map&) {
  if (c.inverse) return c.shift_first ? differentiate<A, true, true, Map> : differentiate<A, true, false, Map>;
  return c.shift_first ? differentiate<A, false, true, Map> : differentiate<A, false, false, Map>;
}

// Calls f with the scale map: it and the two flags of the loops above are constants there, the layout is strides alone.
template <class A, class F>
void with_map(const Affine& c, F&& f) {
  switch (c.scale) {
    case 0: return f(Exp<A>(c.a, c.b));
    case 1: return c.b == 0 ? f(Sigmoid<A>(c.a, c.b)) : f(SigmoidPlus<A>(c.a, c.b));
    case 2: return f(Softplus<A>(c.a, c.b));
    case 3: return f(Tanh<A>(c.a, c.b));
    case 4: return f(Atan<A>(c.a, c.b));
    default: return f(SoftClip<A>(c.a, c.b));
  }
}

struct Halves {
  Operand raw, shift;
};

// The conditioner's output, or its gradient, as two operands.
Halves halves(const Tensor& p, const Affine& c) {
  const bool pair = c.layout >= 4, interleaved = c.layout == 2 || c.layout == 3, raw_first = c.layout % 2 == 0;
  const int64_t count = pair ? p.size[1] : p.size[1] / 2;
  const int64_t second = pair ? p.stride[p.dims - 1] : interleaved ? p.stride[1] : count * p.stride[1];
  Halves h;
  h.raw = operand(p, false, raw_first ? 0 : second, interleaved ? 2 : 1);
  h.shift = operand(p, false, raw_first ? second : 0, interleaved ? 2 : 1);
  return h;
}

template <class A>
void forward(const Affine& c, const Tensor& x, const Tensor& params, const Tensor& y, A* logabsdet, double* partial) {
  const Halves h = halves(params, c);
  const Operand moved_operands[] = {operand(x, true), h.raw, h.shift, operand(y, true)};
  const Operand kept_operands[] = {moved_operands[0], moved_operands[3]};
  Nest moved[2], kept[2];
  const int nests = make_nests<A>(c, true, moved_operands, 3, 4, moved);
  const int kept_nests = make_nests<A>(c, false, kept_operands, 1, 2, kept);
  const int64_t segments = segments_of(c);
  const auto sweep = [&](Transform<A> run, const void* map) {
    parallel_for(c.batch * segments, c.batch * c.channels * c.height * c.width, c.threads, [&](int64_t task) {
      const int64_t sample = task / segments, s = task % segments;
      double total = 0;
      for (int k = 0; k < nests; ++k) {
        walk<A>(moved[k], 3, sample, segment_begin(moved[k], s, segments), segment_begin(moved[k], s + 1, segments),
                Body<A>([&](A* const* p, int64_t n) {
                  total += double(run(map, p[0], p[1], p[2], p[3], n));
                }));
        if (k >= kept_nests) continue;
        walk<A>(kept[k], 1, sample, segment_begin(kept[k], s, segments), segment_begin(kept[k], s + 1, segments),
                Body<A>([](A* const* p, int64_t n) { copy_run(p[0], p[1], n); }));
      }
      partial[task] = total;
    });
  };
  with_map<A>(c, [&](const auto& map) { sweep(transform_of<A>(c, map), &map); });
  for (int64_t b = 0; b < c.batch; ++b) {
    double total = 0;
    for (int64_t s = 0; s < segments; ++s) total += partial[b * segments + s];
    logabsdet[b] = A(c.inverse ? -total : total);
  }
}

template <class A>
void backward(const Affine& c, const Tensor& grad, const Tensor& grad_logabsdet, const Tensor& x, const Tensor& params,
              const Tensor& dx, const Tensor& dparams) {
  const Halves h = halves(params, c), dh = halves(dparams, c);
  const Operand moved_operands[] = {operand(grad, true), operand(x, true), h.raw, h.shift,
                                    operand(dx, true),   dh.raw,           dh.shift};
  const Operand kept_operands[] = {moved_operands[0], moved_operands[4], moved_operands[5], moved_operands[6]};
  const bool kept_params = c.split == Split::checkerboard || c.split == Split::checkerboard_swap;
  Nest moved[2], kept[2];
  const int nests = make_nests<A>(c, true, moved_operands, 4, 7, moved);
  const int kept_nests = make_nests<A>(c, false, kept_operands, 1, kept_params ? 4 : 2, kept);
  const int64_t segments = segments_of(c);
  const auto sweep = [&](Differentiate<A> run, const void* map) {
    parallel_for(c.batch * segments, c.batch * c.channels * c.height * c.width, c.threads, [&](int64_t task) {
      const int64_t sample = task / segments, s = task % segments;
      A glog = 0;
      if (grad_logabsdet.data) load_rows(operand(grad_logabsdet, true), sample * grad_logabsdet.stride[0], 1, nullptr, 1, 0, 1, &glog);
      for (int k = 0; k < nests; ++k) {
        walk<A>(moved[k], 4, sample, segment_begin(moved[k], s, segments), segment_begin(moved[k], s + 1, segments),
                Body<A>([&](A* const* p, int64_t n) {
                  run(map, p[0], glog, p[1], p[2], p[3], p[4], p[5], p[6], n);
                }));
        if (k >= kept_nests) continue;
        walk<A>(kept[k], 1, sample, segment_begin(kept[k], s, segments), segment_begin(kept[k], s + 1, segments),
                Body<A>([&](A* const* p, int64_t n) {
                  copy_run(p[0], p[1], n);
                  for (int z = 2; z < kept[k].operands; ++z) std::memset(p[z], 0, size_t(n) * sizeof(A));
                }));
      }
    });
  };
  with_map<A>(c, [&](const auto& map) { sweep(differentiate_of<A>(c, map), &map); });
}

}  // namespace

int64_t affine_coupling_partials(const Affine& c) { return c.batch * segments_of(c); }

void affine_coupling_forward(const Affine& c, const Tensor& x, const Tensor& params, const Tensor& y, const Tensor& logabsdet,
                             double* partial) {
  if (logabsdet.dtype == Dtype::float64) {
    forward(c, x, params, y, reinterpret_cast<double*>(logabsdet.data), partial);
  } else {
    forward(c, x, params, y, reinterpret_cast<float*>(logabsdet.data), partial);
  }
}

void affine_coupling_backward(const Affine& c, const Tensor& grad, const Tensor& grad_logabsdet, const Tensor& x,
                              const Tensor& params, const Tensor& dx, const Tensor& dparams) {
  if (x.dtype == Dtype::float64 || params.dtype == Dtype::float64) {
    backward<double>(c, grad, grad_logabsdet, x, params, dx, dparams);
  } else {
    backward<float>(c, grad, grad_logabsdet, x, params, dx, dparams);
  }
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
