// y = x * s(u) + t and its log-determinant, its inverse, and the backward of both: one pass over the data each.
// The formulas stand at the top of flowkern/ops/_affine_coupling.py.

#include "coupling.h"
#include "scale_maps.h"

namespace flowkern {
namespace FLOWKERN_ISA {
namespace {

struct Affine : Coupling {
  int scale, layout;  // the positions in ScaleMap's kinds, and in flowkern.ops.LAYOUTS
  double a, b;
  bool shift_first;

  Affine(const Tensor& x, const Tensor& place, const Tensor& params, int split, int scale, double a, double b, int layout,
         bool shift_first, bool inverse, int threads)
      : Coupling(x, place, params, 2, split, inverse, threads), scale(scale), layout(layout), a(a), b(b), shift_first(shift_first) {}
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

// The gradient of u by log s alone, where the output has none: zero times what overflows there would not be zero.
template <class A, class Map>
void differentiate_log(const void* address, const A*, A glog, const A*, const A* u, const A*, A* dx, A* du, A* dt, int64_t n) {
  const Map map = *static_cast<const Map*>(address);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    A slope;
    map.template scale_and_slope<false>(u[i], slope);
    du[i] = slope * glog;
    dx[i] = dt[i] = A(0);
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
Differentiate<A> differentiate_of(const Affine& c, bool of_output, const Map&) {
  if (!of_output) return differentiate_log<A, Map>;
  if (c.inverse) return c.shift_first ? differentiate<A, true, true, Map> : differentiate<A, true, false, Map>;
  return c.shift_first ? differentiate<A, false, true, Map> : differentiate<A, false, false, Map>;
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
void forward(const Affine& c, const Tensor& x, const Tensor& params, const Tensor& y, A* logabsdet) {
  const Halves h = halves(params, c);
  const Operand moved_operands[] = {operand(x, true), h.raw, h.shift, operand(y, true)};
  const Operand kept_operands[] = {moved_operands[0], moved_operands[3]};
  Nest moved[2], kept[2];
  const int nests = make_nests<A>(c, true, moved_operands, 3, 4, moved);
  const int kept_nests = make_nests<A>(c, false, kept_operands, 1, 2, kept);
  const int64_t segments = segments_of(c);
  const Buffer<double> partial(c.batch * segments);
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
  with_map<A>(c.scale, c.a, c.b, [&](const auto& map) { sweep(transform_of<A>(c, map), &map); });
  for (int64_t b = 0; b < c.batch; ++b) {
    double total = 0;
    for (int64_t s = 0; s < segments; ++s) total += partial[b * segments + s];
    logabsdet[b] = A(c.inverse ? -total : total);
  }
}

// One zero, whatever the place.
template <class A>
Operand zeros() {
  static const A zero = A(0);
  Operand o;
  o.data = const_cast<char*>(reinterpret_cast<const char*>(&zero));
  o.dtype = dtype_of<A>();
  o.whole = true;
  return o;
}

template <class A>
void backward(const Affine& c, const Tensor& grad, const Tensor& grad_logabsdet, const Tensor& x, const Tensor& params,
              const Tensor& dx, const Tensor& dparams) {
  const Halves h = halves(params, c), dh = halves(dparams, c);
  const bool of_output = grad.data;
  const Operand moved_operands[] = {of_output ? operand(grad, true) : zeros<A>(), operand(x, true), h.raw, h.shift,
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
      if (!of_output && c.inverse) glog = -glog;
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
  with_map<A>(c.scale, c.a, c.b, [&](const auto& map) { sweep(differentiate_of<A>(c, of_output, map), &map); });
}

}  // namespace

void affine_coupling(In x, In params, In place, int split, int scale, double a, double b, int layout, bool shift_first,
                     bool inverse, Out y, Out logabsdet, int threads) {
  const Affine c(x, place, params, split, scale, a, b, layout, shift_first, inverse, threads);
  if (logabsdet.dtype == Dtype::float64) {
    forward(c, x, params, y, reinterpret_cast<double*>(logabsdet.data));
  } else {
    forward(c, x, params, y, reinterpret_cast<float*>(logabsdet.data));
  }
}

void affine_coupling_backward(In x, In params, In grad, In grad_logabsdet, In place, int split, int scale, double a, double b,
                              int layout, bool shift_first, bool inverse, Out dx, Out dparams, int threads) {
  const Affine c(x, place, params, split, scale, a, b, layout, shift_first, inverse, threads);
  const auto run = x.dtype == Dtype::float64 || params.dtype == Dtype::float64 ? backward<double> : backward<float>;
  run(c, grad, grad_logabsdet, x, params, dx, dparams);
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
