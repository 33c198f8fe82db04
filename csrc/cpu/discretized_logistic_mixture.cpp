// The log-likelihood of pixels under a mixture of discretized logistics, with its gradient. The formulas stand at the top of
// flowkern/ops/_discretized_logistic_mixture.py.
//
// A tile of pixels goes through all components: the log masses with their gradients first, those weighted with the posterior
// of the components second, while all of it lies in the cache.

#include "matrix.h"

namespace flowkern {
namespace FLOWKERN_ISA {
namespace {

constexpr int64_t tile = 64, chunk = 512;  // pixels at a time, and of one task

// --- elementary functions ---

FLOWKERN_INLINE double log1p_(double x) { return std::log1p(x); }

// log(1 + x) for x > -0.29, with full relative precision near 0.
FLOWKERN_INLINE float log1p_(float x) {
  const bool large = x > 0.41f;
  const int32_t bits = bit_cast<int32_t>(1.f + x), exponent = (bits - 0x3f3504f3) >> 23;  // as in log_
  const float f = large ? bit_cast<float>(bits - exponent * 0x800000) - 1.f : x;
  const float k = large ? float(exponent) : 0.f;
  float p = -0.07634429633617401f;
  p = p * f + 0.12761549651622772f;
  p = p * f + -0.131601944565773f;
  p = p * f + 0.14201761782169342f;
  p = p * f + -0.16623356938362122f;
  p = p * f + 0.20001226663589478f;
  p = p * f + -0.250008225440979f;
  p = p * f + 0.3333333134651184f;
  return (p * f - 0.5f) * (f * f) - k * 2.12194440e-4f + f + k * 0.693359375f;
}

// 1 - exp(-x) for x >= 0, given exp(-x).
FLOWKERN_INLINE double one_minus_exp(double x, double) { return -std::expm1(-x); }

FLOWKERN_INLINE float one_minus_exp(float x, float e) {
  float p = -1.f / 40320.f;
  p = p * x + 1.f / 5040.f;
  p = p * x + -1.f / 720.f;
  p = p * x + 1.f / 120.f;
  p = p * x + -1.f / 24.f;
  p = p * x + 1.f / 6.f;
  p = p * x + -0.5f;
  p = p * x + 1.f;
  return x < 0.5f ? p * x : 1.f - e;
}

// To 1e-9: what a coefficient adds to a mean is divided by a scale that may be tiny.
FLOWKERN_INLINE double tanh_wide(double x) { return std::tanh(x); }

FLOWKERN_INLINE double tanh_wide(float x) {
  double v = -2. * double(abs_(x));
  v = v < -40. ? -40. : v;
  const double shifted = v * 1.4426950408889634 + 6755399441055744.;  // as in exp_
  const double r = v - (shifted - 6755399441055744.) * 0.6931471805599453;
  double p = 1. / 40320.;
  p = p * r + 1. / 5040.;
  p = p * r + 1. / 720.;
  p = p * r + 1. / 120.;
  p = p * r + 1. / 24.;
  p = p * r + 1. / 6.;
  p = p * r + 0.5;
  p = p * r + 1.;
  p = p * r + 1.;
  const double e = p * bit_cast<double>((bit_cast<uint64_t>(shifted) + 1023u) << 52), sum = 1. + e;
  const double rough = double(1.f / float(sum));
  const double t = (1. - e) * rough * (2. - sum * rough);
  return x < 0.f ? -t : t;
}

// --- one component of one channel ---

// Of a tile: the ends of the bins and their centre, in halves of a bin, as seen from the mean.
template <class A>
struct Bins {
  A upper[tile], lower[tile], centre[tile];
};

// Adds the log masses to `log_mass`, and writes their gradients. `level` of the bins.
template <class A, bool Compat>
void log_masses(const Bins<A>& bins, const A* level, const A* log_scale, A last_level, int64_t n, A* log_mass, A* dmean, A* dlog_scale) {
  const A inverse = A(1) / last_level;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A s = Compat && log_scale[i] < A(-7) ? A(-7) : log_scale[i];
    const A precision = exp_(-s), unit = precision * inverse, delta = A(2) * unit;
    const A p = bins.upper[i] * unit, m = bins.lower[i] * unit;
    const bool first = level[i] <= A(0), last = level[i] >= last_level;
    const A ep = last ? A(0) : exp_(-abs_(p)), em = first ? A(0) : exp_(-abs_(m)), e = exp_(-delta);
    const A ed = first || last ? A(0) : e, mass = first || last ? A(1) : one_minus_exp(delta, e);
    // sigmoid(p) - sigmoid(m) = mass / ((1 + ep) (1 + em)) but for the factors exp(-max(-p, 0)) and exp(-max(m, 0)).
    const A np = A(1) + ep, nm = A(1) + em, reciprocal = A(1) / (np * nm * mass);
    const A excess = (ep + em + ep * em + ed) * (np * nm * reciprocal);
    const A outside = (last || p > A(0) ? A(0) : p) - (first || m < A(0) ? A(0) : m);
    const A above = (p < A(0) && !last ? A(1) : ep) * (nm * mass * reciprocal);  // sigmoid(-p)
    const A below = (m > A(0) && !first ? A(1) : em) * (np * mass * reciprocal);  // sigmoid(m)
    A f = outside - log1p_(excess);
    A dm = precision * (below - above), ds = m * below - p * above - delta * ed * (np * nm * reciprocal);
    if (Compat) {
      const A c = bins.centre[i] * unit, ec = exp_(-abs_(c)), half = A(1) / (A(1) + ec);
      const A slope = c < A(0) ? (ec - A(1)) * half : (A(1) - ec) * half;  // tanh(c / 2)
      const bool density = !first && !last && f <= A(-11.512925464970229);  // log 1e-5
      f = density ? log_(delta) - abs_(c) - A(2) * log1p_unit(ec) : f;
      dm = density ? precision * slope : dm;
      ds = density ? c * slope - A(1) : ds;
      ds = log_scale[i] < A(-7) ? A(0) : ds;
    }
    log_mass[i] += f;
    dmean[i] = dm;
    dlog_scale[i] = ds;
  }
}

// Adds tanh(raw) * position to `shift`, and writes what the mean's gradient has to be multiplied by for that of raw.
template <class A>
void add_shift(const A* raw, const double* position, int64_t n, double* shift, A* slope) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double t = tanh_wide(raw[i]);
    shift[i] += t * position[i];
    slope[i] = A((1. - t * t) * position[i]);
  }
}

template <class A>
void find_bins(const A* level, const A* mean, const double* shift, double last_level, int64_t n, Bins<A>& bins) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double centre = (2. * double(level[i]) - last_level) - last_level * (double(mean[i]) + shift[i]);
    bins.upper[i] = A(centre + 1.);
    bins.lower[i] = A(centre - 1.);
    bins.centre[i] = A(centre);
  }
}

template <class A>
void multiply_rows(const A* by, int64_t n, A* row) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) row[i] *= by[i];
}

// --- a tile ---

// Rows of pixels, one per channel of the network's output: where they lie, or a copy.
template <class A>
struct Rows {
  const Tensor& t;
  int64_t sample, start, n;
  A* copies;

  bool direct() const { return t.dtype == dtype_of<A>() && (t.stride[2] == 1 || t.size[2] == 1); }
  int64_t offset(int64_t row) const { return sample * t.stride[0] + row * t.stride[1] + start * t.stride[2]; }
  A* at(int64_t row) const { return direct() ? reinterpret_cast<A*>(t.data) + offset(row) : copies + row * tile; }

  Operand operand() const {
    Operand o;
    o.data = t.data;
    o.dtype = t.dtype;
    return o;
  }
  A* read(int64_t row) const {
    A* to = at(row);
    if (!direct()) load_rows(operand(), offset(row), t.stride[2], nullptr, n, 0, 1, to);
    return to;
  }
  void write(int64_t row) const {
    if (!direct()) store_rows(operand(), offset(row), t.stride[2], nullptr, n, 0, 1, at(row));
  }
};

struct Shape {
  int64_t channels, components, pixels, rows;  // rows of params
  double last_level;
  bool compat;

  int64_t row(int64_t channel, int64_t what, int64_t k) const {
    return components * (1 + channel * (channels == 3 ? 3 : 2) + what) + k;
  }
};

template <class A>
struct Workspace {
  Buffer<A> params, gradient, joint;
  double position[3][tile], shift[tile];
  A level[3][tile];
  Bins<A> bins;
  A scratch[3][tile];

  Workspace(const Shape& s) : params(s.rows * tile), gradient(s.rows * tile), joint(s.components * tile) {}
};

// The joint log probabilities of component and pixel, but for the normalization of the logits, and the gradients of the log masses.
template <class A>
void components(const Shape& s, const Rows<A>& params, const Rows<A>* gradient, Workspace<A>& w) {
  const int64_t n = params.n;
  const auto target = [&](int64_t row, int which) { return gradient ? gradient->at(row) : w.scratch[which]; };
  for (int64_t k = 0; k < s.components; ++k) {
    A* log_mass = w.joint + k * tile;
    for (int64_t i = 0; i < n; ++i) log_mass[i] = A(0);
    for (int64_t c = 0; c < s.channels; ++c) {
      const int64_t mean = s.row(c, 0, k), log_scale = s.row(c, 1, k);
      for (int64_t i = 0; i < n; ++i) w.shift[i] = 0;
      // Green (1) has coefficient 0, blue (2) has 1 and 2: on red, and on red and green.
      for (int64_t j = 0; j < c; ++j) {
        const int64_t row = s.row(c - 1 + j, 2, k);
        add_shift(params.read(row), w.position[j], n, w.shift, target(row, 2));
      }
      find_bins(w.level[c], params.read(mean), w.shift, s.last_level, n, w.bins);
      const auto run = s.compat ? log_masses<A, true> : log_masses<A, false>;
      A* dmean = target(mean, 0);
      run(w.bins, w.level[c], params.read(log_scale), A(s.last_level), n, log_mass, dmean, target(log_scale, 1));
      for (int64_t j = 0; gradient && j < c; ++j) multiply_rows(dmean, n, gradient->at(s.row(c - 1 + j, 2, k)));
    }
  }
}

// The sum of the log-likelihoods of the tile's pixels; the gradients weighted with the posterior and with `scale`.
template <class A>
double mix(const Shape& s, const Rows<A>& params, const Rows<A>* gradient, A scale, Workspace<A>& w) {
  const int64_t n = params.n;
  A top[tile], top_logit[tile], sum[tile], sum_logit[tile], missing[tile], weight[tile], total = 0;
  for (int64_t i = 0; i < n; ++i) {
    top[i] = top_logit[i] = A(-HUGE_VAL);
    sum[i] = sum_logit[i] = missing[i] = A(0);
  }
  for (int64_t k = 0; k < s.components; ++k) {
    const A* logit = params.read(k);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) top_logit[i] = logit[i] > top_logit[i] ? logit[i] : top_logit[i];
  }
  // Logits count from the largest from here on: a large number that all have in common would swallow the log masses.
  for (int64_t k = 0; k < s.components; ++k) {
    const A *logit = params.at(k), *log_mass = w.joint + k * tile;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A joint = logit[i] - top_logit[i] + log_mass[i];
      top[i] = joint > top[i] ? joint : top[i];
    }
  }
  for (int64_t k = 0; k < s.components; ++k) {
    const A* logit = params.at(k);
    A* log_mass = w.joint + k * tile;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A less = logit[i] - top_logit[i], prior = exp_(less), joint = exp_(less + log_mass[i] - top[i]);
      sum_logit[i] += prior;
      sum[i] += joint;
      missing[i] += prior * one_minus_exp(-log_mass[i], exp_(log_mass[i]));
      log_mass[i] = joint;
    }
  }
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    // Where nearly all of the mass is there, the rest says how much to more digits.
    const A rest = missing[i] / sum_logit[i];
    total += rest < A(0.25) ? log1p_(-rest) : top[i] + log_(sum[i] / sum_logit[i]);
  }
  for (int64_t k = 0; gradient && k < s.components; ++k) {
    const A *logit = params.at(k), *joint = w.joint + k * tile;
    A* dlogit = gradient->at(k);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A posterior = joint[i] / sum[i];
      weight[i] = posterior * scale;
      dlogit[i] = (posterior - exp_(logit[i] - top_logit[i]) / sum_logit[i]) * scale;
    }
    for (int64_t row = s.components + k; row < s.rows; row += s.components) multiply_rows(weight, n, gradient->at(row));
  }
  return double(total);
}

template <class A>
double tile_of(const Shape& s, const Tensor& x, const Tensor& params, const Tensor& gradient, int64_t sample, int64_t start,
               int64_t n, A scale, Workspace<A>& w) {
  for (int64_t c = 0; c < s.channels; ++c) {
    const Rows<A> levels{x, sample, start, n, w.level[0]};
    load_rows(levels.operand(), levels.offset(c), x.stride[2], nullptr, n, 0, 1, w.level[c]);
    for (int64_t i = 0; i < n; ++i) w.position[c][i] = 2. * double(w.level[c][i]) / s.last_level - 1.;
  }
  const Rows<A> in{params, sample, start, n, w.params}, out{gradient, sample, start, n, w.gradient};
  const Rows<A>* wanted = gradient.data ? &out : nullptr;
  components(s, in, wanted, w);
  const double total = mix(s, in, wanted, scale, w);
  for (int64_t row = 0; wanted && row < s.rows; ++row) out.write(row);
  return total;
}

template <class A>
void run(const Shape& s, const Tensor& x, const Tensor& params, const Tensor& grad, const Tensor& log_prob, const Tensor& gradient,
         int threads) {
  const int64_t batch = params.size[0], chunks = (s.pixels + chunk - 1) / chunk;
  const Buffer<double> partial(batch * chunks);
  parallel_for(batch * chunks, batch * s.pixels * s.rows * 8, threads, [&](int64_t task) {
    const int64_t sample = task / chunks, begin = task % chunks * chunk, end = s.pixels < begin + chunk ? s.pixels : begin + chunk;
    Workspace<A> w(s);
    A scale = A(1);
    if (grad.data) scale = reinterpret_cast<const A*>(grad.data)[sample * grad.stride[0]];
    double total = 0;
    for (int64_t start = begin; start < end; start += tile) {
      const int64_t n = end - start < tile ? end - start : tile;
      total += tile_of(s, x, params, gradient, sample, start, n, scale, w);
    }
    partial[task] = total;
  });
  for (int64_t b = 0; b < batch; ++b) {
    double total = 0;
    for (int64_t i = 0; i < chunks; ++i) total += partial[b * chunks + i];
    reinterpret_cast<A*>(log_prob.data)[b * log_prob.stride[0]] = A(total);
  }
}

// x (B, C, P) and grad (B,) in the dtype of log_prob (B,); params and its gradient (B, rows, P) in another or the same one. Without
// `grad` the gradient is that of the sum, without `gradient` there is none.
void mixture(const Tensor& x, const Tensor& params, const Tensor& grad, int64_t levels, bool compat, const Tensor& log_prob,
             const Tensor& gradient, int threads) {
  Shape s;
  s.channels = x.size[1];
  s.rows = params.size[1];
  s.components = s.rows / (s.channels == 3 ? 10 : 3);
  s.pixels = params.size[2];
  s.last_level = double(levels - 1);
  s.compat = compat;
  (log_prob.dtype == Dtype::float64 ? run<double> : run<float>)(s, x, params, grad, log_prob, gradient, threads);
}

}  // namespace

void discretized_logistic_mixture(In x, In params, int64_t levels, bool compat, Out log_prob, int threads) {
  mixture(x, params, Tensor(), levels, compat, log_prob, Tensor(), threads);
}

void discretized_logistic_mixture_backward(In x, In params, In grad, int64_t levels, bool compat, Out log_prob, Out gradient,
                                           int threads) {
  mixture(x, params, grad, levels, compat, log_prob, gradient, threads);
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
