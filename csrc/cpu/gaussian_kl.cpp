// z = mean + exp(log_scale) eps with the KL divergence to a standard normal, and the backward, which makes the noise eps again.
// The formulas stand at the top of flowkern/ops/_gaussian_kl.py.

#include "matrix.h"
#include "philox.h"

namespace flowkern {
namespace FLOWKERN_ISA {
namespace {

constexpr int64_t chunk = 16384;  // elements of a task

constexpr double factorial(int k) { return k < 2 ? 1. : k * factorial(k - 1); }

// 1 / first! + t / (first + 1)! + ... + t^(last - first) / last!
template <int first, int last, class A>
FLOWKERN_INLINE A exponential_series(A t) {
  constexpr A constant = A(1. / factorial(first));
  if constexpr (first == last) {
    return constant;
  } else {
    return exponential_series<first + 1, last>(t) * t + constant;
  }
}

// exp(2 x) - 1 and exp(2 x) - 1 - 2 x, given exp(x). Near 0, where they cancel, by the series of the second.
template <class A>
FLOWKERN_INLINE void exp_less_tangent(A x, A root, A& less_one, A& less_tangent) {
  constexpr int last = sizeof(A) == 8 ? 19 : 10;
  const A t = A(2) * x, series = exponential_series<2, last>(t) * (t * t), far = root * root - A(1);
  const bool near = abs_(t) < A(1);
  less_one = near ? t + series : far;
  less_tangent = near ? series : far - t;
}

template <class A>
A reparameterize(const A* mean, const A* log_scale, const A* noise, A* z, int64_t n) {
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const A scale = exp_(log_scale[i]);
    A less_one, less_tangent;
    exp_less_tangent(log_scale[i], scale, less_one, less_tangent);
    z[i] = mean[i] + scale * noise[i];
    total += A(0.5) * (mean[i] * mean[i] + less_tangent);
  }
  return total;
}

// A gradient that is absent is not taken for zero: zero times a scale that overflows is not zero.
template <class A, bool OfZ, bool OfKl>
void differentiate(const A* grad, A grad_kl, const A* mean, const A* log_scale, const A* noise, A* dmean, A* dlog_scale, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A scale = exp_(log_scale[i]), g = OfZ ? grad[i] : A(0);
    A less_one, less_tangent;
    exp_less_tangent(log_scale[i], scale, less_one, less_tangent);
    dmean[i] = OfKl ? g + grad_kl * mean[i] : g;
    const A by_z = OfZ ? g * scale * noise[i] : A(0);
    dlog_scale[i] = OfKl ? by_z + grad_kl * less_one : by_z;
  }
}

template <class A>
auto differentiate_of(bool of_z, bool of_kl) {
  if (of_z) return of_kl ? differentiate<A, true, true> : differentiate<A, true, false>;
  return of_kl ? differentiate<A, false, true> : differentiate<A, false, false>;
}

// Calls f(task, sample, start, n) for pieces of at most a block of each task.
template <class F>
void for_pieces(int64_t batch, int64_t length, int threads, F&& f) {
  const int64_t chunks = (length + chunk - 1) / chunk;
  parallel_for(batch * chunks, batch * length * 4, threads, [&](int64_t task) {
    const int64_t sample = task / chunks, begin = task % chunks * chunk, end = length < begin + chunk ? length : begin + chunk;
    for (int64_t start = begin; start < end; start += block) f(task, sample, start, end - start < block ? end - start : block);
  });
}

template <class A>
void forward(const Tensor& mean, const Tensor& log_scale, const Philox& philox, const Tensor& z, const Tensor& kl, int threads) {
  const int64_t batch = mean.size[0], length = mean.size[1], chunks = (length + chunk - 1) / chunk;
  const Buffer<double> partial(batch * chunks);
  for (int64_t i = 0; i < batch * chunks; ++i) partial[i] = 0;
  for_pieces(batch, length, threads, [&](int64_t task, int64_t sample, int64_t start, int64_t n) {
    A noise[block], m[block], s[block], out[block];
    normal_noise(philox, sample, start, n, noise);
    const Piece<A> to{z, sample, start, n, out};
    partial[task] += double(reparameterize(Piece<A>{mean, sample, start, n, m}.read(), Piece<A>{log_scale, sample, start, n, s}.read(),
                                           noise, to.at(), n));
    to.write();
  });
  for (int64_t b = 0; b < batch; ++b) {
    double total = 0;
    for (int64_t i = 0; i < chunks; ++i) total += partial[b * chunks + i];
    reinterpret_cast<A*>(kl.data)[b] = A(total);
  }
}

template <class A>
void backward(const Tensor& mean, const Tensor& log_scale, const Philox& philox, const Tensor& grad, const Tensor& grad_kl,
              const Tensor& dmean, const Tensor& dlog_scale, int threads) {
  const auto run = differentiate_of<A>(grad.data, grad_kl.data);
  for_pieces(mean.size[0], mean.size[1], threads, [&](int64_t, int64_t sample, int64_t start, int64_t n) {
    A noise[block], g[block], m[block], s[block], dm[block], ds[block];
    normal_noise(philox, sample, start, n, noise);
    A of_kl = 0;
    if (grad_kl.data) of_kl = reinterpret_cast<const A*>(grad_kl.data)[sample * grad_kl.stride[0]];
    const Piece<A> to_mean{dmean, sample, start, n, dm}, to_log_scale{dlog_scale, sample, start, n, ds};
    run(grad.data ? Piece<A>{grad, sample, start, n, g}.read() : nullptr, of_kl, Piece<A>{mean, sample, start, n, m}.read(),
        Piece<A>{log_scale, sample, start, n, s}.read(), noise, to_mean.at(), to_log_scale.at(), n);
    to_mean.write();
    to_log_scale.write();
  });
}

bool in_double(const Tensor& mean, const Tensor& log_scale) {
  return mean.dtype == Dtype::float64 || log_scale.dtype == Dtype::float64;
}

}  // namespace

// All (B, N), kl and its gradient (B,) in the accumulation type; gradients that were not given are absent.
void gaussian_kl(In mean, In log_scale, In seed, int64_t offset, Out z, Out kl, int threads) {
  (in_double(mean, log_scale) ? forward<double> : forward<float>)(mean, log_scale, Philox(seed, offset), z, kl, threads);
}

void gaussian_kl_backward(In mean, In log_scale, In seed, int64_t offset, In grad, In grad_kl, Out dmean, Out dlog_scale, int threads) {
  (in_double(mean, log_scale) ? backward<double> : backward<float>)(mean, log_scale, Philox(seed, offset), grad, grad_kl, dmean,
                                                                      dlog_scale, threads);
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
