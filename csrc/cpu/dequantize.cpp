// x = (v + u) / levels with uniform noise u, its logit if wanted, and the log-determinant. The formulas stand at the top of
// flowkern/ops/_dequantize.py.

#include "matrix.h"
#include "philox.h"

namespace flowkern {
namespace FLOWKERN_ISA {
namespace {

constexpr int64_t chunk = 16384;  // elements of a task

// v + u, in the bin of v also after rounding.
template <class A, class V>
void add_noise(const V* v, int64_t stride, const uint32_t* bits, A* to, int64_t n) {
  constexpr A below_one = sizeof(A) == 8 ? A(1 - 0x1p-53) : A(1 - 0x1p-24);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A bin = A(v[i * stride]), u = A(bits[i] >> 8) * A(0x1p-24) + A(0x1p-25), sum = bin + u;
    to[i] = sum < bin + A(1) ? sum : (bin + A(1)) * below_one;
  }
}

// The sum of what the logit adds to the log-determinants, but for log(1 - 2 alpha).
template <class A>
A logit(const A* value, A levels, A alpha, A* x, int64_t n) {
  const A span = A(1) - A(2) * alpha, per_level = span / levels;
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const A low = log_(alpha + per_level * value[i]), high = log_(alpha + per_level * (levels - value[i]));
    x[i] = low - high;
    total -= low + high;
  }
  return total;
}

template <class A>
void rescale(const A* value, A levels, A* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = value[i] / levels;
}

// Positive values to those of the dtype H that are no larger: to the nearest could be into the next bin, or 1.
template <class H>
void round_down(float* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    H rounded;
    narrow(x[i], rounded);
    rounded.bits = uint16_t(rounded.bits - (widen(rounded) > x[i]));
    x[i] = widen(rounded);
  }
}

void round_down(Dtype dtype, float* x, int64_t n) {
  if (dtype == Dtype::bfloat16) round_down<bfloat16>(x, n);
  if (dtype == Dtype::float16) round_down<float16>(x, n);
}

void round_down(Dtype, double*, int64_t) {}  // these are stored as they are

template <class A>
void run(const Tensor& v, const Philox& philox, double levels, double alpha, const Tensor& x, const Tensor& logabsdet, int threads) {
  const int64_t batch = v.size[0], length = v.size[1], chunks = (length + chunk - 1) / chunk;
  const Buffer<double> partial(batch * chunks);
  parallel_for(batch * chunks, batch * length * 3, threads, [&](int64_t task) {
    const int64_t sample = task / chunks, begin = task % chunks * chunk, end = length < begin + chunk ? length : begin + chunk;
    double total = 0;
    for (int64_t start = begin; start < end; start += block) {
      const int64_t n = end - start < block ? end - start : block, at = sample * v.stride[0] + start * v.stride[1];
      uint32_t bits[block];
      A value[block], out[block];
      for (int64_t g = 0; g * group < n; ++g) philox.bits(sample, start / group + g, bits + g * group);
      if (v.dtype == Dtype::uint8) {
        add_noise(reinterpret_cast<const uint8_t*>(v.data) + at, v.stride[1], bits, value, n);
      } else {
        add_noise(reinterpret_cast<const int32_t*>(v.data) + at, v.stride[1], bits, value, n);
      }
      const Piece<A> to{x, sample, start, n, out};
      if (alpha < 0) {
        rescale(value, A(levels), to.at(), n);
        round_down(x.dtype, to.at(), n);
      } else {
        total += double(logit(value, A(levels), A(alpha), to.at(), n));
      }
      to.write();
    }
    partial[task] = total;
  });
  const double each = (alpha < 0 ? 0. : std::log1p(-2. * alpha)) - std::log(levels);
  for (int64_t b = 0; b < batch; ++b) {
    double total = double(length) * each;
    for (int64_t i = 0; i < chunks; ++i) total += partial[b * chunks + i];
    reinterpret_cast<A*>(logabsdet.data)[b] = A(total);
  }
}

}  // namespace

// v (B, N) of uint8 or int32; x (B, N); logabsdet (B,) in the accumulation type. A negative alpha: no logit.
void dequantize(In v, In seed, int64_t offset, int64_t levels, double alpha, Unused, Out x, Out logabsdet, int threads) {
  (logabsdet.dtype == Dtype::float64 ? run<double> : run<float>)(v, Philox(seed, offset), double(levels), alpha, x, logabsdet, threads);
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
