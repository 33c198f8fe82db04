// y = W x + b at every pixel, its inverse and the backward of both: one pass over the data each, in tiles of pixels that
// stay in the cache; and the factorization of W. The formulas stand at the top of flowkern/ops/_invertible_linear.py.
//
// Two forms, by how the output lies in memory: pixels side by side (contiguous images), where the vectors of a product
// run over pixels, or channels side by side (channels_last, vectors), where they run over channels.

#include "matrix.h"

namespace flowkern {
namespace FLOWKERN_ISA {
namespace {

// --- where the pixels of a tensor lie ---

// Pixels are numbered over all samples. Axes that collapse are collapsed: `run` pixels in a row lie `step` apart.
struct Pixels {
  char* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t channel = 0, sample = 0, row = 0, step = 0;  // strides
  int64_t per_sample = 1, run = 1;

  explicit Pixels(const Tensor& t) : data(t.data), dtype(t.dtype), channel(t.stride[1]), sample(t.stride[0]) {
    const bool image = t.dims == 4;
    int64_t height = image ? t.size[2] : 1, width = image ? t.size[3] : 1;
    row = image ? t.stride[2] : 0;
    step = image ? t.stride[3] : 0;
    if (width == 1) {
      width = height;
      step = row;
      height = 1;
    }
    per_sample = height * width;
    run = height == 1 || row == width * step ? per_sample : width;
    if (per_sample == 1) step = sample;
    if (run == per_sample && (t.size[0] == 1 || sample == per_sample * step)) run = per_sample = t.size[0] * per_sample;
  }

  // Calls f(offset, j, m): pixels first + j .. first + j + m lie `step` apart from `offset` on.
  template <class F>
  FLOWKERN_INLINE void each_run(int64_t first, int64_t n, F&& f) const {
    for (int64_t j = 0; j < n;) {
      const int64_t b = (first + j) / per_sample, inside = first + j - b * per_sample, h = inside / run, w = inside - h * run;
      const int64_t m = n - j < run - w ? n - j : run - w;
      f(b * sample + h * row + w * step, j, m);
      j += m;
    }
  }

  // Whether pixels lie one behind the other, with nothing in between.
  bool dense(int64_t channels) const { return channel == 1 && step == channels; }

  // Where these pixels lie, if it is in one run and in the type A; else null.
  template <class A>
  A* direct(int64_t first, int64_t n) const {
    if (dtype != dtype_of<A>() || first % run + n > run) return nullptr;
    const int64_t b = first / per_sample, inside = first - b * per_sample;
    return reinterpret_cast<A*>(data) + b * sample + inside / run * row + inside % run * step;
  }
};

// Values of n pixels, as `rows` of a product's operand or in its columns.
template <class A>
struct Tile {
  A* data = nullptr;
  int64_t channel = 0, pixel = 0;  // strides
};

// [channel][pixel], `minus` (or null) subtracted; zeros up to a whole vector of pixels.
template <class A>
void pack_channels(const Pixels& p, int64_t channels, int64_t first, int64_t n, const A* minus, const Tile<A>& to) {
  with_dtype(p.dtype, [&](auto* type) {
    const auto* from = reinterpret_cast<decltype(type)>(p.data);
    p.each_run(first, n, [&](int64_t offset, int64_t j, int64_t m) {
      for (int64_t c = 0; c < channels; ++c)
        load_run(from + offset + c * p.channel, p.step, nullptr, m, to.data + c * to.channel + j);
    });
  });
  for (int64_t c = 0; c < channels; ++c) {
    A* row = to.data + c * to.channel;
    if (minus) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) row[j] -= minus[c];
    }
    for (int64_t j = n; j < padded<A>(n); ++j) row[j] = A(0);
  }
}

// [pixel][channel], zeros up to a whole vector of channels.
template <class A>
void pack_pixels(const Pixels& p, int64_t channels, int64_t first, int64_t n, const A* minus, const Tile<A>& to) {
  with_dtype(p.dtype, [&](auto* type) {
    const auto* from = reinterpret_cast<decltype(type)>(p.data);
    p.each_run(first, n, [&](int64_t offset, int64_t j, int64_t m) {
      for (int64_t i = 0; i < m; ++i)
        load_run(from + offset + i * p.step, p.channel, nullptr, channels, to.data + (j + i) * to.pixel);
    });
  });
  for (int64_t j = 0; j < n; ++j) {
    A* row = to.data + j * to.pixel;
    if (minus) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) row[c] -= minus[c];
    }
    for (int64_t c = channels; c < padded<A>(channels); ++c) row[c] = A(0);
  }
}

template <class A>
void unpack(const Tile<A>& from, const Pixels& p, int64_t channels, int64_t first, int64_t n) {
  with_dtype(p.dtype, [&](auto* type) {
    auto* to = reinterpret_cast<decltype(type)>(p.data);
    p.each_run(first, n, [&](int64_t offset, int64_t j, int64_t m) {
      if (from.pixel == 1) {
        for (int64_t c = 0; c < channels; ++c)
          store_run(from.data + c * from.channel + j, to + offset + c * p.channel, p.step, nullptr, m);
      } else {
        for (int64_t i = 0; i < m; ++i)
          store_run(from.data + (j + i) * from.pixel, to + offset + i * p.step, p.channel, nullptr, channels);
      }
    });
  });
}

// --- small dense matrices ---

template <class A>
void read_vector(const Tensor& t, A* to) {
  Operand o;
  o.data = t.data;
  o.dtype = t.dtype;
  load_rows(o, 0, t.stride[0], nullptr, t.size[0], 0, 1, to);
}

template <class A>
void read_matrix(const Tensor& t, A* to, int64_t to_row) {
  Operand o;
  o.data = t.data;
  o.dtype = t.dtype;
  for (int64_t i = 0; i < t.size[0]; ++i) {
    load_rows(o, i * t.stride[0], t.stride[1], nullptr, t.size[1], 0, 1, to + i * to_row);
    for (int64_t j = t.size[1]; j < to_row; ++j) to[i * to_row + j] = A(0);
  }
}

template <class A>
void write_matrix(const A* from, int64_t from_row, const Tensor& t) {
  Operand o;
  o.data = t.data;
  o.dtype = t.dtype;
  for (int64_t i = 0; i < t.size[0]; ++i)
    store_rows(o, i * t.stride[0], t.dims == 2 ? t.stride[1] : 1, nullptr, t.dims == 2 ? t.size[1] : 1, 0, 1, from + i * from_row);
}

// A square matrix, filled up with zeros to width x width.
template <class A>
void read_square(const Tensor& t, int64_t width, A* to) {
  read_matrix(t, to, width);
  for (int64_t i = t.size[0] * width; i < width * width; ++i) to[i] = A(0);
}

// log|det w|; with `inverse` w becomes its inverse, without it is spent. Gauss-Jordan elimination in place with row
// pivoting, by blocks of columns: the steps of a block are collected in `step`, and the other columns get them in one product.
// A zero pivot gives infinities and NaN.
double factorize(double* w, int64_t n, int64_t width, bool inverse, int threads) {
  constexpr int64_t most = 16;
  const Buffer<double> step(n * most), above(most * width);
  const Buffer<int64_t> swaps(n);
  double logabsdet = 0;
  for (int64_t k = 0; k < n; k += most) {
    const int64_t count = n - k < most ? n - k : most, top = inverse ? 0 : k;
    for (int64_t i = top; i < n; ++i)
      for (int64_t c = 0; c < most; ++c) step[i * most + c] = c < count ? w[i * width + k + c] : 0.0;
    for (int64_t c = 0; c < count; ++c) {
      int64_t pivot = k + c;
      for (int64_t i = k + c + 1; i < n; ++i)
        if (abs_(step[i * most + c]) > abs_(step[pivot * most + c])) pivot = i;
      swaps[k + c] = pivot;
      double *own = step + (k + c) * most, *other = step + pivot * most;
      if (pivot != k + c) {
        for (int64_t j = 0; j < most; ++j) {
          const double kept = own[j];
          own[j] = other[j];
          other[j] = kept;
        }
        for (int64_t j = 0; j < width; ++j) {
          const double kept = w[(k + c) * width + j];
          w[(k + c) * width + j] = w[pivot * width + j];
          w[pivot * width + j] = kept;
        }
      }
      logabsdet += log_(abs_(own[c]));
      const double reciprocal = 1.0 / own[c];
      for (int64_t j = 0; j < most; ++j) own[j] *= reciprocal;
      own[c] = reciprocal;
      for (int64_t i = top; i < n; ++i) {
        if (i == k + c) continue;
        double* row = step + i * most;
        const double factor = row[c];
        for (int64_t j = 0; j < most; j += lanes<double>) store<double>(load(row + j) - factor * load(own + j), row + j);
        row[c] = -factor * reciprocal;
      }
    }
    for (int64_t c = 0; c < count; ++c)
      for (int64_t j = 0; j < width; ++j) {
        above[c * width + j] = w[(k + c) * width + j];
        w[(k + c) * width + j] = 0.0;
      }
    const int64_t left = inverse ? 0 : k + most < width ? k + most : width;
    Product<double> update;
    update.a = step + top * most;
    update.a_row = most;
    update.b = above + left;
    update.b_step = width;
    update.count = count;
    update.out = w + top * width + left;
    update.out_row = width;
    update.plus = Plus::out;
    multiply_parallel(update, n - top, width - left, threads);
    for (int64_t i = top; i < n; ++i)
      for (int64_t c = 0; c < count; ++c) w[i * width + k + c] = step[i * most + c];
  }
  for (int64_t i = 0; inverse && i < n; ++i) {
    double* row = w + i * width;
    for (int64_t k = n - 1; k >= 0; --k) {
      const double kept = row[k];
      row[k] = row[swaps[k]];
      row[swaps[k]] = kept;
    }
  }
  return logabsdet;
}

// --- the division of the work: it depends on the sizes alone ---

struct Division {
  int64_t pixels, tile, tiles, tasks;

  template <class A>
  static Division of(int64_t channels, const Pixels& p, int64_t pixels, int64_t most_tasks) {
    constexpr int64_t unit = 2 * lanes<A>;
    int64_t tile = (channels <= 16 ? 16 : channels <= 64 ? 8 : 4) * (64 / int64_t(sizeof(A)));
    // Tiles that end where runs end write straight to the output.
    const int64_t lowest = p.run < tile ? unit : tile / 2;
    for (int64_t t = tile; t >= lowest && p.run > 0; t -= unit) {
      if (p.run % t) continue;
      tile = t;
      break;
    }
    const int64_t tiles = (pixels + tile - 1) / tile;
    return {pixels, tile, tiles, tiles < most_tasks ? tiles : most_tasks};
  }

  // Calls f(first pixel, pixels) for every tile of a task.
  template <class F>
  FLOWKERN_INLINE void each_tile(int64_t task, F&& f) const {
    for (int64_t t = tiles * task / tasks; t < tiles * (task + 1) / tasks; ++t)
      f(t * tile, pixels - t * tile < tile ? pixels - t * tile : tile);
  }
};

// In elements of the cost of copying.
int64_t cost(int64_t pixels, int64_t channels) { return pixels * channels * (1 + channels / 16); }

bool channels_inside(const Tensor& t) { return t.stride[1] == 1; }

// y = matrix (x - minus) + plus at the pixels of a tile, pixels side by side. Matrix element (i, j) is [i * row + j * step].
template <class A>
void apply_to_channels(const A* matrix, int64_t row, int64_t step, const A* plus, const Tile<A>& x, const Pixels& y,
                       int64_t channels, int64_t first, int64_t n, const Tile<A>& buffer) {
  A* direct = y.step == 1 && n % lanes<A> == 0 ? y.direct<A>(first, n) : nullptr;
  Product<A> p;
  p.a = matrix;
  p.a_row = row;
  p.a_step = step;
  p.b = x.data;
  p.b_step = x.channel;
  p.count = channels;
  p.out = direct ? direct : buffer.data;
  p.out_row = direct ? y.channel : buffer.channel;
  p.plus = plus ? Plus::rows : Plus::nothing;
  p.start = plus;
  multiply(p, 0, channels, padded<A>(n));
  if (!direct) unpack(buffer, y, channels, first, n);
}

// The same, channels side by side. `flipped` is the matrix's transpose, its rows filled up to whole vectors, as is `plus`.
template <class A>
void apply_to_pixels(const A* flipped, const A* plus, const Tile<A>& x, const Pixels& y, int64_t channels, int64_t first, int64_t n,
                     const Tile<A>& buffer) {
  // Where pixels are dense and one panel holds all channels, the surplus of its vectors goes where the next pixels are
  // written afterwards; only the last ones of the tile take the way through the buffer.
  const bool whole = channels % lanes<A> == 0, spill = !whole && channels <= 2 * lanes<A> && y.dense(channels);
  A* direct = y.channel == 1 && (whole || spill) ? y.direct<A>(first, n) : nullptr;
  Product<A> p;
  p.a = x.data;
  p.a_row = x.pixel;
  p.a_step = x.channel;
  p.b = flipped;
  p.b_step = padded<A>(channels);
  p.count = channels;
  p.plus = plus ? Plus::columns : Plus::nothing;
  p.start = plus;
  const int64_t surplus = (padded<A>(channels) - 1) / channels;  // in pixels, rounded up
  const int64_t through = !direct || (!whole && surplus > n) ? 0 : whole ? n : n - surplus;  // pixels written directly
  p.out = direct;
  p.out_row = y.step;
  multiply(p, 0, through, padded<A>(channels));
  if (through == n) return;
  p.out = buffer.data;
  p.out_row = buffer.pixel;
  multiply(p, through, n, padded<A>(channels));
  const Tile<A> rest{buffer.data + through * buffer.pixel, buffer.channel, buffer.pixel};
  unpack(rest, y, channels, first + through, n - through);
}

// A tile of values, [channel][pixel] or [pixel][channel], where it lies if that will do, else packed into `buffer`.
// `whole`: whole vectors are read from it, so that they must end where the tile ends.
template <class A>
Tile<A> tile_of(const Pixels& p, bool inside, bool whole, int64_t channels, int64_t first, int64_t n, const A* minus,
                const Tile<A>& buffer) {
  if (A* direct = minus ? nullptr : p.direct<A>(first, n)) {
    // Beyond the tile there must be as much as the last whole vector reads.
    const int64_t left = (p.run - first % p.run - n) * channels;
    const bool vectors = p.channel == 1 && (channels % lanes<A> == 0 || (p.dense(channels) && left >= lanes<A>));
    if (inside && (!whole || vectors)) return {direct, p.channel, p.step};
    // Rows a power of two apart share places in the cache: only few of them.
    if (!inside && p.step == 1 && n % lanes<A> == 0 && channels <= 16) return {direct, p.channel, 1};
  }
  if (inside) {
    pack_pixels(p, channels, first, n, minus, buffer);
  } else {
    pack_channels(p, channels, first, n, minus, buffer);
  }
  return buffer;
}

template <class A>
void transform(const Tensor& x, const A* matrix, const A* bias, const Tensor& y, bool inverse, int threads) {
  const bool inside = channels_inside(y);
  const int64_t channels = x.size[1], width = padded<A>(channels);
  const Pixels from(x), to(y);
  const int64_t pixels = x.size[0] * (x.dims == 4 ? x.size[2] * x.size[3] : 1);
  const Division division = Division::of<A>(channels, to, pixels, 64);
  const A *minus = inverse ? bias : nullptr, *plus = inverse ? nullptr : bias;
  const Buffer<A> flipped(inside ? width * width : 0);
  if (inside) transpose<A>(matrix, width, width, width, flipped, width);
  parallel_for(division.tasks, cost(pixels, channels), threads, [&](int64_t task) {
    const int64_t room = inside ? division.tile * width : channels * division.tile;
    const bool dense = inside && minus && from.dense(channels);
    const Buffer<A> memory(2 * room), repeated(dense ? division.tile * channels : 0);
    for (int64_t j = 0; dense && j < division.tile; ++j)
      for (int64_t c = 0; c < channels; ++c) repeated[j * channels + c] = minus[c];
    const Tile<A> in{memory, inside ? 1 : division.tile, inside ? width : 1};
    const Tile<A> out{memory + room, in.channel, in.pixel};
    division.each_tile(task, [&](int64_t first, int64_t n) {
      Tile<A> values{in.data, 1, channels};
      if (const A* given = dense ? from.direct<A>(first, n) : nullptr) {
        // One long run instead of many short ones.
#pragma omp simd
        for (int64_t i = 0; i < n * channels; ++i) in.data[i] = given[i] - repeated[i];
      } else {
        values = tile_of(from, inside, false, channels, first, n, minus, in);
      }
      if (inside) {
        apply_to_pixels<A>(flipped, plus, values, to, channels, first, n, out);
      } else {
        apply_to_channels(matrix, width, 1, plus, values, to, channels, first, n, out);
      }
    });
  });
}

template <class A>
void forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& weight_inverse, const Tensor& known,
             const Tensor& y, const Tensor& logabsdet, const Tensor& found, bool inverse, int threads) {
  const int64_t channels = x.size[1], width = padded<A>(channels);
  const Buffer<A> matrix(width * width), shift(width);
  double log_of_weight = 0;
  if (known.data) read_vector(known, &log_of_weight);
  if (found.data || !known.data) {
    const int64_t wide = padded<double>(channels);
    const Buffer<double> exact(channels * wide);
    read_matrix(weight, exact + 0, wide);
    const double log_found = factorize(exact, channels, wide, found.data != nullptr, threads);
    if (!known.data) log_of_weight = log_found;
    if (found.data) write_matrix<double>(exact, wide, found);
  }
  read_square(inverse ? (found.data ? found : weight_inverse) : weight, width, matrix + 0);
  if (bias.data) {
    for (int64_t c = 0; c < width; ++c) shift[c] = A(0);
    read_vector(bias, shift + 0);
  }
  const int64_t per_sample = x.dims == 4 ? x.size[2] * x.size[3] : 1;
  const A value = A((inverse ? -1.0 : 1.0) * double(per_sample) * log_of_weight);
  for (int64_t b = 0; b < x.size[0]; ++b) reinterpret_cast<A*>(logabsdet.data)[b] = value;
  transform<A>(x, matrix, bias.data ? shift + 0 : nullptr, y, inverse, threads);
}

// --- backward ---

// sum[c] += the values of channel c at n pixels; four pixels at a time, so that the sums are read and written less often.
template <class A>
void add_pixels(const Tile<A>& g, int64_t channels, int64_t n, A* sum) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    const A *a = g.data + j * g.pixel, *b = a + g.pixel, *c = b + g.pixel, *d = c + g.pixel;
    if (g.channel == 1) {
#pragma omp simd
      for (int64_t i = 0; i < channels; ++i) sum[i] += (a[i] + b[i]) + (c[i] + d[i]);
    } else {
      for (int64_t i = 0; i < channels; ++i)
        sum[i] += (a[i * g.channel] + b[i * g.channel]) + (c[i * g.channel] + d[i * g.channel]);
    }
  }
  for (; j < n; ++j)
    for (int64_t i = 0; i < channels; ++i) sum[i] += g.data[j * g.pixel + i * g.channel];
}

// dx = matrix^T g at every pixel. By task: products = sum g x^T, and sums = sum g.
template <class A>
void pass_back(const Tensor& grad, const Tensor& x, const A* matrix, const Tensor& dx, A* products, A* sums,
               const Division& division, bool inside, int threads) {
  const int64_t channels = x.size[1], width = padded<A>(channels);
  const Pixels from_g(grad), from_x(x), to(dx.data ? dx : x);
  parallel_for(division.tasks, 2 * cost(division.pixels, channels), threads, [&](int64_t task) {
    const int64_t room = division.tile * width;
    const Buffer<A> memory(4 * room);
    const auto tile = [&](int64_t i, bool pixels_outside) {
      return Tile<A>{memory + i * room, pixels_outside ? 1 : division.tile, pixels_outside ? width : 1};
    };
    const Tile<A> g_buffer = tile(0, inside), out = tile(1, inside), x_buffer = tile(2, inside), x_flipped = tile(3, true);
    A *product = products ? products + task * channels * width : nullptr, *sum = products ? sums + task * channels : nullptr;
    if (product) {
      std::memset(product, 0, size_t(channels * width) * sizeof(A));
      std::memset(sum, 0, size_t(channels) * sizeof(A));
      std::memset(x_buffer.data, 0, size_t(room) * sizeof(A));  // the channels that are not there are flipped, too
    }
    division.each_tile(task, [&](int64_t first, int64_t n) {
      const A* none = nullptr;
      const Tile<A> g = tile_of(from_g, inside, false, channels, first, n, none, g_buffer);
      if (dx.data && inside) apply_to_pixels(matrix, none, g, to, channels, first, n, out);
      if (dx.data && !inside) apply_to_channels(matrix, int64_t(1), width, none, g, to, channels, first, n, out);
      if (!product) return;
      Tile<A> values = x_flipped;
      if (inside) {
        values = tile_of(from_x, true, true, channels, first, n, none, x_buffer);
      } else {
        pack_channels(from_x, channels, first, n, none, x_buffer);
        transpose<A>(x_buffer.data, x_buffer.channel, width, padded<A>(n), x_flipped.data, width);
      }
      Product<A> p;
      p.a = g.data;
      p.a_row = g.channel;
      p.a_step = g.pixel;
      p.b = values.data;
      p.b_step = values.pixel;
      p.count = n;
      p.out = product;
      p.out_row = width;
      p.plus = Plus::out;
      multiply(p, 0, channels, width);
      if (g.pixel == 1) {
        for (int64_t c = 0; c < channels; ++c) {
          const A* row = g.data + c * g.channel;
          A total = 0;
#pragma omp simd reduction(+ : total)
          for (int64_t j = 0; j < n; ++j) total += row[j];
          sum[c] += total;
        }
      } else {
        add_pixels(g, channels, n, sum);
      }
    });
  });
}

// The gradients of W and b from sum g x^T and sum g: `product` and `sum`, both spent.
template <class A>
void finish(A* product, A* sum, const A* inverted, const A* bias, A log_gradient, bool inverse, const Tensor& dweight,
            const Tensor& dbias, int threads) {
  const int64_t n = dweight.size[0], width = padded<A>(n);
  const Buffer<A> flipped(inverted ? width * width : 0), half(inverse ? n * width : 0), turned(inverse ? n : 0);
  if (inverted) transpose<A>(inverted, width, width, width, flipped, width);
  if (inverse) {
    if (bias)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) product[i * width + j] -= sum[i] * bias[j];
    Product<A> p;
    p.a = product;
    p.a_row = width;
    p.b = flipped;
    p.b_step = width;
    p.count = n;
    p.out = half;
    p.out_row = width;
    multiply_parallel(p, n, width, threads);
    p.a = inverted;
    p.a_row = 1;
    p.a_step = width;
    p.b = half;
    p.out = product;
    multiply_parallel(p, n, width, threads);
    for (int64_t i = 0; i < n; ++i) turned[i] = A(0);
    for (int64_t o = 0; o < n; ++o)
      for (int64_t i = 0; i < n; ++i) turned[i] += inverted[o * width + i] * sum[o];
    for (int64_t i = 0; i < n; ++i) {
      sum[i] = -turned[i];
      for (int64_t j = 0; j < n; ++j) product[i * width + j] = -product[i * width + j];
    }
  }
  if (inverted && log_gradient != A(0))
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) product[i * width + j] += log_gradient * flipped[i * width + j];
  write_matrix<A>(product, width, dweight);
  if (dbias.data) write_matrix<A>(sum, 1, dbias);
}

template <class A>
void backward(const Tensor& grad, const Tensor& grad_logabsdet, const Tensor& x, const Tensor& weight, const Tensor& bias,
              const Tensor& weight_inverse, const Tensor& dx, const Tensor& dweight, const Tensor& dbias, const Tensor& dknown,
              bool inverse, int threads) {
  const int64_t channels = x.size[1], width = padded<A>(channels);
  const int64_t per_sample = x.dims == 4 ? x.size[2] * x.size[3] : 1;
  double log_gradient = 0;
  for (int64_t b = 0; grad_logabsdet.data && b < x.size[0]; ++b)
    log_gradient += double(reinterpret_cast<const A*>(grad_logabsdet.data)[b * grad_logabsdet.stride[0]]);
  log_gradient *= (inverse ? -1.0 : 1.0) * double(per_sample);
  if (dknown.data) write_matrix<double>(&log_gradient, 1, dknown);

  const Buffer<A> matrix(channels * width), inverted(width * width);
  if (weight_inverse.data) read_square(weight_inverse, width, inverted + 0);
  read_matrix(inverse ? weight_inverse : weight, matrix + 0, width);

  const bool inside = channels_inside(dx.data ? dx : x);
  const int64_t pixels = x.size[0] * per_sample;
  // Every task has a product of its own: not more than 16 MB of them.
  const int64_t fit = (int64_t(1) << 22) / (channels * width), most = fit < 2 ? 2 : fit < 32 ? fit : 32;
  Division division = Division::of<A>(channels, Pixels(dx.data ? dx : x), pixels, most);
  if (division.tasks > (division.tiles + 3) / 4) division.tasks = (division.tiles + 3) / 4;
  const bool wanted = dweight.data;
  const Buffer<A> products(wanted ? division.tasks * channels * width : 0), sums(wanted ? division.tasks * channels : 0);
  pass_back<A>(grad, x, matrix, dx, wanted ? products + 0 : nullptr, sums, division, inside, threads);
  if (!wanted) return;

  const Buffer<A> product(channels * width), sum(channels), shift(channels);
  parallel_for(channels, division.tasks * channels * width / 4, threads, [&](int64_t i) {
    constexpr int64_t together = 64;
    for (int64_t j = 0; j < width; j += together) {
      const int64_t columns = width - j < together ? width - j : together;
      double totals[together] = {};
      for (int64_t t = 0; t < division.tasks; ++t) {
        const A* from = products + (t * channels + i) * width + j;
#pragma omp simd
        for (int64_t k = 0; k < columns; ++k) totals[k] += double(from[k]);
      }
      for (int64_t k = 0; k < columns; ++k) product[i * width + j + k] = A(totals[k]);
    }
    double total = 0;
    for (int64_t t = 0; t < division.tasks; ++t) total += double(sums[t * channels + i]);
    sum[i] = A(total);
  });
  if (bias.data) read_vector(bias, shift + 0);
  finish<A>(product, sum, weight_inverse.data ? inverted + 0 : nullptr, bias.data ? shift + 0 : nullptr,
            dknown.data ? A(0) : A(log_gradient), inverse, dweight, dbias, threads);
}

bool in_double(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  return x.dtype == Dtype::float64 || weight.dtype == Dtype::float64 || (bias.data && bias.dtype == Dtype::float64);
}

}  // namespace

void invertible_linear(In x, In weight, In bias, In weight_inverse, In known, bool inverse, Unused, Out y, Out logabsdet, Out found,
                       int threads) {
  const auto run = in_double(x, weight, bias) ? forward<double> : forward<float>;
  run(x, weight, bias, weight_inverse, known, y, logabsdet, found, inverse, threads);
}

void invertible_linear_backward(In x, In weight, In bias, In weight_inverse, In, bool inverse, Unused, Unused, In grad,
                                In grad_logabsdet, Out dx, Out dweight, Out dbias, Out dknown, int threads) {
  const auto run = in_double(x, weight, bias) ? backward<double> : backward<float>;
  run(grad, grad_logabsdet, x, weight, bias, weight_inverse, dx, dweight, dbias, dknown, inverse, threads);
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
