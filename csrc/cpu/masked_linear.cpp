// y = x (W * M)^T + b and its backward, where M lets output r see the first reach[r] inputs, once both are sorted by
// degree. The formulas stand at the top of flowkern/ops/_masked_linear.py. Every product ends where the mask does; the
// weights that it hides are not read.
//
// The vectors of y run over the batch, so that W's elements are broadcast from where they lie; those of the gradients
// run over the inputs. Rows of little work are given to a thread together with rows of much.

#include "../checks.h"
#include "matrix.h"

namespace flowkern {
namespace FLOWKERN_ISA {
namespace {

constexpr int64_t group = 48;  // rows that a thread takes at a time: a multiple of all max_rows and all lanes but one
constexpr int64_t most_count = 256;  // terms of a sum that are taken at a time, so that the operands stay in the cache

constexpr int64_t few = 4;  // samples: products with them are as fast as the weights are read or written

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

struct Degrees {
  const int32_t *reach, *first, *rows, *columns;  // rows and columns: null where the units come sorted

  Degrees(const Tensor& reach, const Tensor& first, const Tensor& rows, const Tensor& columns)
      : reach(numbers(reach)), first(numbers(first)), rows(numbers(rows)), columns(numbers(columns)) {}

  static const int32_t* numbers(const Tensor& t) { return reinterpret_cast<const int32_t*>(t.data); }
  int64_t row(int64_t r) const { return rows ? rows[r] : r; }
};

// A matrix as Python holds it.
struct Matrix {
  char* data;
  Dtype dtype;
  int64_t row, step;  // strides

  explicit Matrix(const Tensor& t) : data(t.data), dtype(t.dtype), row(t.stride[0]), step(t.stride[1]) {}

  template <class A>
  A* direct() const {
    return dtype == dtype_of<A>() ? reinterpret_cast<A*>(data) : nullptr;
  }

  // Elements [begin, end) of row i, or of `index`.
  template <class A>
  __attribute__((noinline)) void read(int64_t i, int64_t begin, int64_t end, const int32_t* index, A* to) const {
    with_dtype(dtype, [&](auto* type) {
      const auto* from = reinterpret_cast<decltype(type)>(data) + i * row;
      if (index) {
        load_run(from, step, index + begin, end - begin, to);
      } else {
        load_run(from + begin * step, step, nullptr, end - begin, to);
      }
    });
  }

  template <class A>
  __attribute__((noinline)) void write(int64_t i, int64_t begin, int64_t end, const int32_t* index, const A* from) const {
    with_dtype(dtype, [&](auto* type) {
      auto* to = reinterpret_cast<decltype(type)>(data) + i * row;
      if (index) {
        store_run(from, to, step, index + begin, end - begin);
      } else {
        store_run(from, to + begin * step, step, nullptr, end - begin);
      }
    });
  }
};

template <class A>
void fill(A* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = A(0);
}

// Calls f(chunk, i) for i in [0, count) of each chunk; a task has one from the start and one from the end, as those at one
// end have all the work.
template <class F>
void for_both_ends(int64_t chunks, int64_t count, int64_t products, int threads, F&& f) {
  const int64_t pairs = (count + 1) / 2;
  parallel_for(chunks * pairs, products / 16, threads, [&](int64_t task) {
    const int64_t chunk = task / pairs, i = task % pairs;
    f(chunk, i);
    if (count - 1 - i != i) f(chunk, count - 1 - i);
  });
}

// Values of all samples, sorted, [sample][unit]; where they lie, if that will do.
template <class A>
struct Sorted {
  const A* data;
  int64_t row, step;
  Buffer<A> packed;

  // `whole`: vectors are read from it, so that rows must be filled up to whole ones.
  Sorted(const Tensor& t, const int32_t* index, bool whole, int threads)
      : packed(lies(t, index, whole) ? 0 : t.size[0] * padded<A>(t.size[1])) {
    const Matrix from(t);
    const int64_t width = padded<A>(t.size[1]);
    const bool there = lies(t, index, whole);
    data = there ? from.direct<A>() : packed;
    row = there ? from.row : width;
    step = there ? from.step : 1;
    if (there) return;
    parallel_for(t.size[0], t.size[0] * width, threads, [&](int64_t b) {
      from.read<A>(b, 0, t.size[1], index, packed + b * width);
      fill(packed + b * width + t.size[1], width - t.size[1]);
    });
  }

  static bool lies(const Tensor& t, const int32_t* index, bool whole) {
    return t.dtype == dtype_of<A>() && !index && (!whole || (t.stride[1] == 1 && t.size[1] % lanes<A> == 0));
  }
};

// --- forward ---

// A few samples of x, sorted, [input][sample]: `width` samples to a row.
template <class A>
void flip(const Matrix& x, const int32_t* columns, int64_t inputs, int64_t start, int64_t samples, int64_t width, A* to, int threads) {
  constexpr int64_t together = 4 * lanes<A>;
  parallel_for(blocks_of(inputs, together), inputs * width, threads, [&](int64_t task) {
    const int64_t begin = task * together, end = least(inputs, begin + together);
    const Buffer<A> some(width * together);
    fill(some + 0, width * together);
    for (int64_t j = 0; j < samples; ++j) x.read<A>(start + j, begin, end, columns, some + j * together);
    transpose<A>(some, together, width, padded<A>(end - begin), to + begin * width, width);
  });
}

// Rows [begin, end), [row][sample]: those that see further go on where the others end.
template <class A>
void staircase(Product<A> p, const int32_t* reach, int64_t begin, int64_t end, int64_t width) {
  const A *a = p.a, *b = p.b;
  for (int64_t done = 0; begin < end; p.plus = Plus::out) {
    p.count = reach[begin] - done;
    p.a = a + done * p.a_step;
    p.b = b + done * p.b_step;
    multiply(p, begin, end, width);
    done = reach[begin];
    while (begin < end && reach[begin] == done) ++begin;
  }
}

template <class A>
void forward_group(const Matrix& weight, const A* bias, const Degrees& d, int64_t begin, int64_t end, const A* x, int64_t width,
                   const Matrix& y, int64_t start, int64_t samples) {
  const int64_t seen = d.reach[end - 1];
  const bool direct = weight.dtype == dtype_of<A>() && !d.rows && !d.columns;
  const Buffer<A> packed(direct ? 0 : group * seen), out(group * width), flipped(width * group);
  for (int64_t r = begin; !direct && r < end; ++r)
    weight.read<A>(d.row(r), 0, d.reach[r], d.columns, packed + (r - begin) * seen);
  Product<A> p;
  p.a = direct ? weight.direct<A>() + begin * weight.row : packed;
  p.a_row = direct ? weight.row : seen;
  p.a_step = direct ? weight.step : 1;
  p.b = x;
  p.b_step = width;
  p.out = out;
  p.out_row = width;
  p.plus = bias ? Plus::rows : Plus::nothing;
  p.start = bias ? bias + begin : nullptr;
  for (int64_t r = 0; r < end - begin; r += max_rows)
    staircase(p, d.reach + begin, r, least(r + max_rows, end - begin), width);
  fill(out + (end - begin) * width, (padded<A>(end - begin) - (end - begin)) * width);
  transpose<A>(out, width, padded<A>(end - begin), width, flipped, group);
  for (int64_t j = 0; j < samples; ++j) y.write<A>(start + j, begin, end, d.rows, flipped + j * group);
}

template <class A>
A dot(const A* a, const A* b, int64_t n) {
  Vector<A> sum[4] = {};
  int64_t k = 0;
  for (; k + 4 * lanes<A> <= n; k += 4 * lanes<A>) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[v] += load(a + k + v * lanes<A>) * load(b + k + v * lanes<A>);
  }
  for (; k + lanes<A> <= n; k += lanes<A>) sum[0] += load(a + k) * load(b + k);
  const Vector<A> all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  A total = 0;
  for (int i = 0; i < lanes<A>; ++i) total += all[i];
  for (; k < n; ++k) total += a[k] * b[k];
  return total;
}

// Rows [begin, end) for so few samples that vectors of them would be mostly empty: vectors run along the rows.
template <class A>
void forward_rows(const Sorted<A>& x, const Matrix& weight, const A* bias, const Degrees& d, int64_t begin, int64_t end,
                  const Matrix& y, int64_t samples) {
  const bool direct = weight.dtype == dtype_of<A>() && weight.step == 1 && !d.columns;
  const Buffer<A> row(direct ? 0 : d.reach[end - 1]), out(samples * group);
  for (int64_t r = begin; r < end; ++r) {
    const A* own = direct ? weight.direct<A>() + d.row(r) * weight.row : row;
    if (!direct) weight.read<A>(d.row(r), 0, d.reach[r], d.columns, row);
    for (int64_t j = 0; j < samples; ++j)
      out[j * group + r - begin] = dot<A>(x.data + j * x.row, own, d.reach[r]) + (bias ? bias[r] : A(0));
  }
  for (int64_t j = 0; j < samples; ++j) y.write<A>(j, begin, end, d.rows, out + j * group);
}

template <class A>
void forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Degrees& d, const Tensor& y, int threads) {
  const int64_t batch = x.size[0], outputs = weight.size[0];
  const int64_t tile = 256 / int64_t(sizeof(A)), width = least(tile, padded<A>(batch)), seen = outputs ? d.reach[outputs - 1] : 0;
  const int64_t chunks = blocks_of(batch, width);
  const Buffer<A> shift(outputs);
  for (int64_t r = 0; bias.data && r < outputs; ++r)
    with_dtype(bias.dtype, [&](auto* type) {
      shift[r] = A(widen(reinterpret_cast<decltype(type)>(bias.data)[d.row(r) * bias.stride[0]]));
    });
  const A* plus = bias.data ? shift + 0 : nullptr;
  if (batch <= few) {
    const Sorted<A> rows(x, d.columns, true, threads);
    for_both_ends(1, blocks_of(outputs, group), batch * outputs * seen * 4, threads, [&](int64_t, int64_t i) {
      forward_rows<A>(rows, Matrix(weight), plus, d, i * group, least(outputs, (i + 1) * group), Matrix(y), batch);
    });
    return;
  }
  const Buffer<A> flipped(chunks * padded<A>(seen) * width);
  for (int64_t c = 0; c < chunks; ++c)
    flip<A>(Matrix(x), d.columns, seen, c * width, least(width, batch - c * width), width, flipped + c * padded<A>(seen) * width, threads);
  for_both_ends(chunks, blocks_of(outputs, group), chunks * width * outputs * seen / 2, threads, [&](int64_t c, int64_t i) {
    forward_group<A>(Matrix(weight), plus, d, i * group, least(outputs, (i + 1) * group),
                     flipped + c * padded<A>(seen) * width, width, Matrix(y), c * width, least(width, batch - c * width));
  });
}

// --- backward ---

// The product in steps of most_count terms. Elements of `out` that no step reaches are not written.
template <class A>
void multiply_long(Product<A> p, int64_t begin, int64_t end, int64_t columns) {
  const int64_t count = p.count;
  for (int64_t k = 0; k == 0 || k < count; k += most_count) {
    p.count = least(most_count, count - k);
    multiply(p, begin, end, columns);
    p.a += p.count * p.a_step;
    p.b += p.count * p.b_step;
    p.plus = Plus::out;
  }
}

// Columns [begin, end) of the gradient of x, of some samples: a few rows of W at a time, the weights that are hidden as
// zeros. The first of several vectors of columns see rows that the others do not.
template <class A>
void input_gradient(const Sorted<A>& grad, const Matrix& weight, const Degrees& d, int64_t outputs, int64_t begin, int64_t end,
                    const Matrix& dx, int64_t start, int64_t samples) {
  constexpr int64_t together = 2 * lanes<A>;
  const int64_t width = padded<A>(end - begin);
  const Buffer<A> packed(most_count * width), out(samples * width);
  fill(out + 0, samples * width);
  Product<A> p;
  p.a_row = grad.row;
  p.a_step = grad.step;
  p.b_step = width;
  p.out_row = width;
  p.plus = Plus::out;
  for (int64_t r = d.first[begin]; r < outputs; r += most_count) {
    const int64_t until = least(outputs, r + most_count);
    for (int64_t i = r; i < until; ++i) {
      A* to = packed + (i - r) * width;
      const int64_t seen = least(end, d.reach[i]);
      weight.read<A>(d.row(i), begin, seen, d.columns, to);
      fill(to + seen - begin, width - (seen - begin));
    }
    for (int64_t c = 0; c < width; c += together) {
      const int64_t first = d.first[begin + c] < r ? r : d.first[begin + c];
      if (first >= until) break;
      p.a = grad.data + start * grad.row + first * grad.step;
      p.b = packed + (first - r) * width + c;
      p.count = until - first;
      p.out = out + c;
      multiply(p, 0, samples, least(together, width - c));
    }
  }
  for (int64_t j = 0; j < samples; ++j) dx.write<A>(start + j, begin, end, d.columns, out + j * width);
}

// Rows [begin, end) of the gradient of W.
template <class A>
void weight_gradient(const Sorted<A>& grad, const Sorted<A>& x, const Degrees& d, int64_t batch, int64_t inputs, int64_t begin,
                     int64_t end, const Matrix& dweight) {
  const int64_t width = padded<A>(d.reach[end - 1]);
  const Buffer<A> out((end - begin) * width), zeros(inputs);
  fill(zeros + 0, inputs);
  Product<A> p;
  p.a = grad.data + begin * grad.step;
  p.a_row = grad.step;
  p.a_step = grad.row;
  p.b = x.data;
  p.b_step = x.row;
  p.count = batch;
  p.out = out;
  p.out_row = width;
  multiply_long(p, 0, end - begin, width);
  for (int64_t r = begin; r < end; ++r) {
    dweight.write<A>(d.row(r), 0, d.reach[r], d.columns, out + (r - begin) * width);
    dweight.write<A>(d.row(r), d.reach[r], inputs, d.columns, zeros);
  }
}

// to[0 .. n) = the sum over some rows of from[row][0 .. n) times its factor; `Added` to what stands there.
template <class A, int Rows, bool Added>
FLOWKERN_INLINE void sum_rows(const A* from, int64_t row, const A* factor, int64_t step, int64_t n, A* to) {
  A times[Rows];
#pragma GCC unroll 4
  for (int k = 0; k < Rows; ++k) times[k] = factor[k * step];
  int64_t i = 0;
  for (; i + lanes<A> <= n; i += lanes<A>) {
    Vector<A> sum = {};
    if (Added) sum = load(to + i);
#pragma GCC unroll 4
    for (int k = 0; k < Rows; ++k) sum += times[k] * load(from + k * row + i);
    store<A>(sum, to + i);
  }
  for (; i < n; ++i) {
    A sum = Added ? to[i] : A(0);
    for (int k = 0; k < Rows; ++k) sum += times[k] * from[k * row + i];
    to[i] = sum;
  }
}

// input_gradient for a few samples, from weights as they lie.
template <class A>
void input_gradient_of_few(const Sorted<A>& grad, const Matrix& weight, const Degrees& d, int64_t outputs, int64_t begin, int64_t end,
                           const Matrix& dx, int64_t samples) {
  constexpr int together = 4;
  const int64_t width = end - begin;
  const Buffer<A> out(samples * width);
  fill(out + 0, samples * width);
  for (int64_t r = d.first[begin]; r < outputs; r += together) {
    const int64_t rows = least(together, outputs - r), shared = least(end, d.reach[r]) - begin;
    for (int64_t j = 0; j < samples; ++j) {
      const A *from = weight.direct<A>() + r * weight.row + begin, *factor = grad.data + j * grad.row + r * grad.step;
      A* to = out + j * width;
      if (rows == together) sum_rows<A, together, true>(from, weight.row, factor, grad.step, shared, to);
      for (int64_t k = 0; k < rows; ++k) {
        const int64_t done = rows == together ? shared : 0, own = least(end, d.reach[r + k]) - begin;
        if (own > done) sum_rows<A, 1, true>(from + k * weight.row + done, 0, factor + k * grad.step, 0, own - done, to + done);
      }
    }
  }
  for (int64_t j = 0; j < samples; ++j) dx.write<A>(j, begin, end, d.columns, out + j * width);
}

// weight_gradient for a few samples, written where it shall be.
template <class A>
void weight_gradient_of_few(const Sorted<A>& grad, const Sorted<A>& x, const Degrees& d, int64_t samples, int64_t inputs,
                            int64_t begin, int64_t end, const Matrix& dweight) {
  for (int64_t r = begin; r < end; ++r) {
    A* to = dweight.direct<A>() + d.row(r) * dweight.row;
    const A* factor = grad.data + r * grad.step;
    const int64_t seen = d.reach[r];
    switch (samples) {
      case 1: sum_rows<A, 1, false>(x.data, x.row, factor, grad.row, seen, to); break;
      case 2: sum_rows<A, 2, false>(x.data, x.row, factor, grad.row, seen, to); break;
      case 3: sum_rows<A, 3, false>(x.data, x.row, factor, grad.row, seen, to); break;
      default: sum_rows<A, few, false>(x.data, x.row, factor, grad.row, seen, to);
    }
    fill(to + seen, inputs - seen);
  }
}

template <class A>
void bias_gradient(const Tensor& grad, const Tensor& dbias) {
  constexpr int64_t together = 64;
  const Matrix from(grad);
  const A* direct = from.step == 1 ? from.direct<A>() : nullptr;
  for (int64_t begin = 0; begin < grad.size[1]; begin += together) {
    const int64_t n = least(together, grad.size[1] - begin);
    double totals[together] = {};
    A packed[together] = {};
    for (int64_t b = 0; b < grad.size[0]; ++b) {
      const A* row = direct && n == together ? direct + b * from.row + begin : packed;
      if (row == packed) from.read<A>(b, begin, begin + n, nullptr, packed);
      for (int64_t i = 0; i < together; ++i) totals[i] += double(row[i]);
    }
    with_dtype(dbias.dtype, [&](auto* type) {
      auto* to = reinterpret_cast<decltype(type)>(dbias.data) + begin * dbias.stride[0];
      store_run(totals, to, dbias.stride[0], nullptr, n);
    });
  }
}

template <class A>
void backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Degrees& d, const Tensor& dx, const Tensor& dweight,
              const Tensor& dbias, int threads) {
  const int64_t batch = x.size[0], inputs = x.size[1], outputs = weight.size[0], products = batch * inputs * outputs / 2;
  if (dbias.data) bias_gradient<A>(grad, dbias);
  const Sorted<A> g(grad, d.rows, false, threads);
  const Matrix w(weight);
  if (dx.data && inputs && batch && batch <= few && w.step == 1 && w.direct<A>() && !d.rows && !d.columns) {
    constexpr int64_t columns = 8 * lanes<A>;
    for_both_ends(1, blocks_of(inputs, columns), 8 * products, threads, [&](int64_t, int64_t i) {
      input_gradient_of_few<A>(g, w, d, outputs, i * columns, least(inputs, (i + 1) * columns), Matrix(dx), batch);
    });
  } else if (dx.data && inputs && batch) {
    constexpr int64_t columns = 4 * lanes<A>, samples = 256;
    for_both_ends(blocks_of(batch, samples), blocks_of(inputs, columns), products, threads, [&](int64_t c, int64_t i) {
      input_gradient<A>(g, w, d, outputs, i * columns, least(inputs, (i + 1) * columns), Matrix(dx), c * samples,
                        least(samples, batch - c * samples));
    });
  }
  if (dweight.data && outputs) {
    const Sorted<A> operand(x, d.columns, true, threads);
    const Matrix to(dweight);
    if (batch && batch <= few && to.step == 1 && to.direct<A>() && !d.columns) {
      for_both_ends(1, blocks_of(outputs, max_rows), 8 * products, threads, [&](int64_t, int64_t i) {
        weight_gradient_of_few<A>(g, operand, d, batch, inputs, i * max_rows, least(outputs, (i + 1) * max_rows), to);
      });
      return;
    }
    for_both_ends(1, blocks_of(outputs, max_rows), products, threads, [&](int64_t, int64_t i) {
      weight_gradient<A>(g, operand, d, batch, inputs, i * max_rows, least(outputs, (i + 1) * max_rows), to);
    });
  }
}

bool in_double(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  return x.dtype == Dtype::float64 || weight.dtype == Dtype::float64 || (bias.data && bias.dtype == Dtype::float64);
}

}  // namespace

void masked_linear(In x, In weight, In bias, In reach, In first, In rows, In columns, Unused, Out y, int threads) {
  check_degrees(x, weight, reach, Tensor(), rows, columns);
  const auto run = in_double(x, weight, bias) ? forward<double> : forward<float>;
  if (y.size[0] && y.size[1]) run(x, weight, bias, Degrees(reach, first, rows, columns), y, threads);
}

void masked_linear_backward(In grad, In x, In weight, In bias, In reach, In first, In rows, In columns, Unused, Unused, Unused,
                            Unused, Out dx, Out dweight, Out dbias, int threads) {
  check_degrees(x, weight, reach, first, rows, columns);
  const auto run = in_double(x, weight, bias) ? backward<double> : backward<float>;
  run(grad, x, weight, Degrees(reach, first, rows, columns), dx, dweight, dbias, threads);
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
