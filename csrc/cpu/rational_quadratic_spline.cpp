// The monotone rational-quadratic spline of every value, its inverse, and the backward of both: one pass over the data each.
// The formulas stand at the top of flowkern/ops/_rational_quadratic_spline.py.
//
// A tile of values is gathered, parameter by parameter, so that a vector holds one parameter of several values; whatever the
// number of bins, nothing branches: the bin of a value is chosen while the shares are summed.

#include "memory.h"

namespace flowkern {
namespace FLOWKERN_ISA {
namespace {

constexpr int64_t lanes = 64;         // values of a tile: all of its parameters stay in the first cache
constexpr int64_t of_a_task = 4096;  // values, about, whatever the number of threads

enum Tails { linear, circular, box };  // the positions in flowkern._core.spline_map.TAILS

template <class A>
struct Spline {
  int bins, tails;
  bool zuko, inverse;
  A low, high, min_width, min_height, min_derivative, inverse_slope, inverse_divisor;

  int derivatives() const { return bins - 1 + tails; }
  int params() const { return 2 * bins + derivatives(); }
};

// --- where values lie ---

// A tensor as the walk sees it. `step` leads to the next parameter of a value, or from low to high.
struct Field {
  Operand operand;
  int64_t stride[4] = {}, step = 0;

  explicit Field(const Tensor& t, bool trailing = false) {
    operand.data = t.data;
    operand.dtype = t.dtype;
    if (!t.data) return;
    const int axes = t.dims - (trailing ? 1 : 0);
    for (int a = 0; a < axes; ++a) stride[a] = t.stride[a];
    if (trailing) step = t.stride[axes];
  }
  Field() = default;
};

// What a pixel's row and column add up to.
inline Field row_plus_column() {
  Field f;
  f.stride[2] = f.stride[3] = 1;
  return f;
}

// Low and high of each channel.
inline Field of_channels(const Tensor& bounds) {
  Field f;
  f.operand.data = bounds.data;
  f.operand.dtype = bounds.dtype;
  if (!bounds.data) return f;
  f.stride[1] = bounds.stride[0];
  f.step = bounds.stride[1];
  return f;
}

constexpr int max_fields = 7;

// All values of a tensor in one order: sample by sample, inside a sample as the parameters lie. Axes that go on as one are one.
struct Walk {
  int fields, axes = 0;
  int64_t batch, per_sample = 1, count[4] = {}, stride[4][max_fields] = {};
  Field field[max_fields];

  Walk(const Tensor& x, const Field* given, int fields, int by) : fields(fields), batch(x.size[0]) {
    for (int k = 0; k < fields; ++k) field[k] = given[k];
    int order[4] = {0, 1, 2, 3};
    const auto size = [&](int a) { return a < x.dims ? x.size[a] : 1; };
    for (int a = 2; a < 4; ++a)  // the smallest step of the parameters comes last
      for (int b = a; b > 1 && field[by].stride[order[b - 1]] < field[by].stride[order[b]]; --b) {
        const int other = order[b];
        order[b] = order[b - 1];
        order[b - 1] = other;
      }
    for (int a = 1; a < 4; ++a) per_sample *= size(a);
    for (int a = 0; a < 4; ++a)
      if (size(order[a]) != 1) add(size(order[a]), order[a]);
    if (!axes) add(1, 0);
  }

  void add(int64_t n, int axis) {
    bool one = axes > 0;
    for (int k = 0; k < fields; ++k) one = one && stride[axes - 1][k] == field[k].stride[axis] * n;
    const int at = one ? axes - 1 : axes++;
    count[at] = one ? count[at] * n : n;
    for (int k = 0; k < fields; ++k) stride[at][k] = field[k].stride[axis];
  }

  // Calls f(at, n, offsets) for the runs of values [begin, begin + total), `at` values behind the first.
  template <class F>
  FLOWKERN_INLINE void each_run(int64_t begin, int64_t total, F&& f) const {
    for (int64_t at = 0; at < total;) {
      int64_t rest = begin + at, offset[max_fields] = {}, inner = 0;
      for (int a = axes - 1; a >= 0; --a) {
        const int64_t i = a ? rest % count[a] : rest;
        if (a == axes - 1) inner = i;
        for (int k = 0; k < fields; ++k) offset[k] += i * stride[a][k];
        rest = a ? rest / count[a] : 0;
      }
      const int64_t left = count[axes - 1] - inner, n = total - at < left ? total - at : left;
      f(at, n, offset);
      at += n;
    }
  }

  template <class A>
  void load(int k, int64_t begin, int64_t total, A* to) const {
    each_run(begin, total, [&](int64_t at, int64_t n, const int64_t* offset) {
      load_rows(field[k].operand, offset[k], stride[axes - 1][k], nullptr, n, 0, 1, to + at);
    });
  }
  template <class A>
  void store(int k, int64_t begin, int64_t total, const A* from) const {
    each_run(begin, total, [&](int64_t at, int64_t n, const int64_t* offset) {
      store_rows(field[k].operand, offset[k], stride[axes - 1][k], nullptr, n, 0, 1, from + at);
    });
  }

  // `rows` parameters of each value, one row of lanes behind the other.
  template <class A>
  void load_parameters(int k, int64_t begin, int64_t total, int rows, A* to) const {
    each_run(begin, total, [&](int64_t at, int64_t n, const int64_t* offset) {
      with_dtype(field[k].operand.dtype, [&](auto* type) {
        const auto* from = reinterpret_cast<decltype(type)>(field[k].operand.data) + offset[k];
        for (int j = 0; j < rows; ++j)
          load_run(from + j * field[k].step, stride[axes - 1][k], nullptr, n, to + j * lanes + at);
      });
    });
  }
  template <class A>
  void store_parameters(int k, int64_t begin, int64_t total, int rows, const A* from) const {
    each_run(begin, total, [&](int64_t at, int64_t n, const int64_t* offset) {
      with_dtype(field[k].operand.dtype, [&](auto* type) {
        auto* to = reinterpret_cast<decltype(type)>(field[k].operand.data) + offset[k];
        for (int j = 0; j < rows; ++j)
          store_run(from + j * lanes + at, to + j * field[k].step, stride[axes - 1][k], nullptr, n);
      });
    });
  }
};

// --- one tile ---

// sum + rest grows by value; rest is what the rounded sum leaves out. A value is divided by the width of its bin, a small number,
// after the sum of all shares before that was taken away.
template <class A>
FLOWKERN_INLINE void add(A& sum, A& rest, A value) {
  const A next = sum + value, part = next - sum;
  rest += (sum - (next - part)) + (value - part);
  sum = next;
}

// A softmax over the bins, and what it says of the bin that a value is in: `before` and `own` are sums of exponentials.
template <class A>
struct Shares {
  A* e;  // a row for each bin
  A minimum, most;
  A scale[lanes], before[lanes], own[lanes];

  A start(A bin, int64_t i) const { return minimum * bin + scale[i] * before[i]; }
  A width(int64_t i) const { return minimum + scale[i] * own[i]; }

  Shares(const Spline<A>& s, A minimum, A* e) : e(e), minimum(minimum), most(A(1) - A(s.bins) * minimum) {}

  void exponentials(const Spline<A>& s, const A* raw, int64_t n) {
    A top[lanes], sum[lanes], rest[lanes];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      top[i] = raw[i];
      sum[i] = rest[i] = A(0);
    }
    for (int j = 1; j < s.bins; ++j)
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) top[i] = raw[j * lanes + i] > top[i] ? raw[j * lanes + i] : top[i];
    const A limit = A(2) * s.inverse_slope, far = A(sizeof(A) == 8 ? 1e300 : 1e30);
    for (int j = 0; j < s.bins; ++j) {
      if (s.zuko) {  // bounded: they need not be shifted
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const A given = raw[j * lanes + i], u = given > far ? far : given < -far ? -far : given;
          add(sum[i], rest[i], e[j * lanes + i] = exp_(u / (A(1) + abs_(u) * limit)));
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
          add(sum[i], rest[i], e[j * lanes + i] = exp_((raw[j * lanes + i] - top[i]) * s.inverse_divisor));
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) scale[i] = most / (sum[i] + rest[i]);
  }

  // The bin that each place lies in; at a knot the one on its right. Products with 0 and 1, because a choice would be loads and
  // stores under a mask, which some processors do one element at a time.
  void find(const A* place, A* bin, int bins, int64_t n) {
    A sum[lanes], sum_rest[lanes], rest[lanes];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] = sum_rest[i] = before[i] = rest[i] = bin[i] = A(0);
    for (int j = 1; j < bins; ++j) {
      const A *last = e + (j - 1) * lanes, least = minimum * A(j);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        add(sum[i], sum_rest[i], last[i]);
        const A knot = least + scale[i] * (sum[i] + sum_rest[i]);
        const A behind = place[i] >= knot ? A(1) : A(0);
        bin[i] += behind;
        add(before[i], rest[i], behind * last[i]);
      }
    }
    finish(bin, rest, bins, n);
  }

  void look_up(const A* bin, int bins, int64_t n) {
    A rest[lanes];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) before[i] = rest[i] = A(0);
    for (int j = 1; j < bins; ++j) {
      const A *last = e + (j - 1) * lanes, number = A(j);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) add(before[i], rest[i], (bin[i] >= number ? A(1) : A(0)) * last[i]);
    }
    finish(bin, rest, bins, n);
  }

  void finish(const A* bin, const A* rest, int bins, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      before[i] += rest[i];
      own[i] = A(0);
    }
    for (int j = 0; j < bins; ++j) {
      const A *value = e + j * lanes, number = A(j);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) own[i] += (bin[i] == number ? A(1) : A(0)) * value[i];
    }
  }

  // In place of the raw numbers, their gradients by those of the bin's start and width.
  void differentiate(const Spline<A>& s, const A* bin, const A* of_start, const A* of_width, A* raw, int64_t n) const {
    A mean[lanes];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) mean[i] = (of_start[i] * before[i] + of_width[i] * own[i]) * (scale[i] / most);
    const A limit = A(2) * s.inverse_slope, divided = s.inverse_divisor;
    for (int j = 0; j < s.bins; ++j) {
      A *to = raw + j * lanes, number = A(j);
      const A* exponential = e + j * lanes;
      const auto by_share = [&](int64_t i) {
        const A later = bin[i] > number ? A(1) : A(0), here = bin[i] == number ? A(1) : A(0);
        return exponential[i] * scale[i] * (later * of_start[i] + here * of_width[i] - mean[i]);
      };
      if (s.zuko) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const A clipped = A(1) / (A(1) + abs_(to[i]) * limit);
          to[i] = by_share(i) * clipped * clipped;
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = by_share(i) * divided;
      }
    }
  }
};

// The slopes at both ends of each value's bin, and their derivatives by what the network gives.
template <class A>
struct Ends {
  A slope[2][lanes], derivative[2][lanes];
  int row[2][lanes];  // of the raw derivatives; -1 for an end whose slope is 1

  void find(const Spline<A>& s, const A* raw, const A* bin, int64_t n) {
    const int rows = s.derivatives();
    for (int end = 0; end < 2; ++end) {
      A u[lanes];
      for (int64_t i = 0; i < n; ++i) {
        const int knot = int(bin[i]) + end;
        const int found = s.tails == linear ? (knot == s.bins ? -1 : knot - 1) : s.tails == circular && knot == s.bins ? 0 : knot;
        row[end][i] = found < rows ? found : -1;
        u[i] = raw[(found < 0 ? 0 : found) * lanes + i];
      }
      if (s.zuko) {
        const A far = A(sizeof(A) == 8 ? 1e300 : 1e30);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const A v = u[i] > far ? far : u[i] < -far ? -far : u[i], clipped = A(1) / (A(1) + abs_(v) * s.inverse_slope);
          const A d = exp_(v * clipped);
          slope[end][i] = row[end][i] < 0 ? A(1) : d;
          derivative[end][i] = d * clipped * clipped;
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const A e = exp_(-abs_(u[i]));
          const A d = s.min_derivative + (u[i] > A(0) ? u[i] : A(0)) + log1p_unit(e);
          slope[end][i] = row[end][i] < 0 ? A(1) : d;
          derivative[end][i] = (u[i] >= A(0) ? A(1) : e) / (A(1) + e);
        }
      }
    }
  }
};

template <class A>
FLOWKERN_INLINE A unit(A v) {
  v = v < A(0) ? A(0) : v;
  return v > A(1) ? A(1) : v;
}

// A tile of values with all that their splines say.
template <class A>
struct Tile {
  const Spline<A>& s;
  A *raw, *of_derivatives;
  Shares<A> widths, heights;
  Ends<A> ends;
  A x[lanes], low[lanes], high[lanes], place[lanes], turns[lanes], bin[lanes];
  A t[lanes], u[lanes];  // how far into its bin a value is, and how far it is from the end
  A kept[lanes], inside[lanes];  // 1 or 0: whether a checkerboard keeps the value, and whether the spline has it

  // Rows of lanes that a tile takes.
  static int64_t rows(const Spline<A>& s) { return s.params() + 2 * s.bins; }

  Tile(const Spline<A>& s, A* buffer)
      : s(s),
        raw(buffer),
        of_derivatives(buffer + 2 * s.bins * lanes),
        widths(s, s.min_width, buffer + s.params() * lanes),
        heights(s, s.min_height, buffer + (s.params() + s.bins) * lanes) {}

  template <bool Inverse>
  void locate(int64_t n) {
    const A around = s.tails == circular ? A(1) : A(0), endless = s.tails == circular ? A(HUGE_VAL) : A(0);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A least = low[i] - endless, most = high[i] + endless, size = abs_(x[i]);
      const bool in = (x[i] >= least) & (x[i] <= most) & (size < A(HUGE_VAL)) & (kept[i] == A(0));
      const A distance = in ? x[i] - low[i] : A(0), at = distance / (high[i] - low[i]);
      turns[i] = around * std::floor(at);
      place[i] = unit(at - turns[i]);
      inside[i] = in ? A(1) : A(0);
    }
    widths.exponentials(s, raw, n);
    heights.exponentials(s, raw + s.bins * lanes, n);
    if (Inverse) {
      heights.find(place, bin, s.bins, n);
      widths.look_up(bin, s.bins, n);
    } else {
      widths.find(place, bin, s.bins, n);
      heights.look_up(bin, s.bins, n);
    }
    ends.find(s, of_derivatives, bin, n);
    const A last = A(s.bins - 1);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A w = widths.width(i), h = heights.width(i);
      const A size = Inverse ? h : w, start = Inverse ? heights.start(bin[i], i) : widths.start(bin[i], i);
      // In the last bin by the distance from the end of the interval, where the sum of all shares may be off.
      const A from_start = unit((place[i] - start) / size), from_end = unit((A(1) - place[i]) / size);
      const A into = bin[i] == last ? A(1) - from_end : from_start, short_of = bin[i] == last ? from_end : A(1) - from_start;
      if (!Inverse) {
        t[i] = into;
        u[i] = short_of;
      } else {
        const A slope = h / w, d_0 = ends.slope[0][i], d_1 = ends.slope[1][i];
        const A r = d_0 - into * (d_0 + d_1), square = A(4) * slope * slope * into * short_of;
        const A both = std::sqrt(r * r + square) + abs_(r), quotient = square / both, least = A(2) * slope * into;
        t[i] = least / (least + (r >= A(0) ? both : quotient));
        u[i] = A(1) - t[i];
      }
    }
  }

  // Where the values go, and log|dy / dx|.
  template <bool Inverse>
  void apply(A* y, A* log_slope, int64_t n) const {
    const A outside = s.tails == box ? A(-HUGE_VAL) : A(0), endless = s.tails == circular ? A(HUGE_VAL) : A(0);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A w = widths.width(i), h = heights.width(i), slope = h / w, d_0 = ends.slope[0][i], d_1 = ends.slope[1][i];
      const A into = t[i], left = u[i], q = into * left, bend = (d_0 - slope) + (d_1 - slope), ratio = slope / (slope + bend * q);
      const A mean = d_1 * into * into + A(2) * slope * q + d_0 * left * left;
      const A log = log_(mean * ratio) + log_(ratio);
      const A to = Inverse ? widths.start(bin[i], i) + w * into
                           : heights.start(bin[i], i) + h * (into * into + d_0 * q / slope) * ratio;
      const A far = low[i] + (high[i] - low[i]) * (unit(to) + turns[i]), least = low[i] - endless, most = high[i] + endless;
      const A near = far < least ? least : far > most ? most : far;  // rounding may lead out
      const A without = x[i] != x[i] ? x[i] : outside, unless_kept = kept[i] != A(0) ? A(0) : without;
      y[i] = inside[i] != A(0) ? near : x[i];
      log_slope[i] = inside[i] != A(0) ? (Inverse ? -log : log) : unless_kept;
    }
  }

  // The gradients of x, and those of the parameters in their place, by those of y and of log|dy / dx|.
  template <bool Inverse>
  void differentiate(const A* g, const A* of_log, A* dx, int64_t n) {
    A of_left[lanes], of_width[lanes], of_bottom[lanes], of_height[lanes], of_end[2][lanes];
    const A last = A(s.bins - 1);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A w = widths.width(i), h = heights.width(i), slope = h / w, d_0 = ends.slope[0][i], d_1 = ends.slope[1][i];
      const A into = t[i], left = u[i], q = into * left;
      const A over_0 = d_0 - slope, over_1 = d_1 - slope, bend = over_0 + over_1;  // what is left where all slopes are alike
      const A inverse_d = A(1) / (slope + bend * q), numerator = slope * into * into + d_0 * q;
      const A mean = d_1 * into * into + A(2) * slope * q + d_0 * left * left, inverse_mean = A(1) / mean;
      const A by_t = A(2) * (over_1 * into - over_0 * left) * inverse_mean - A(2) * bend * (left - into) * inverse_d;
      const A rise = h * slope * mean * inverse_d * inverse_d;  // dy / dt
      const A range = high[i] - low[i];
      const A of_root = (g[i] * range * w - of_log[i] * by_t) / rise;  // of the input, where that is what the spline gives
      const A of_y = Inverse ? -of_root : g[i] * range, l = Inverse ? -of_log[i] : of_log[i];
      const A of_t = of_y * rise + l * by_t;
      const A of_slope = of_y * h * (into * into - numerator * (A(1) - A(2) * q) * inverse_d) * inverse_d +
                         l * A(2) * (A(1) / slope + q * inverse_mean - (A(1) - A(2) * q) * inverse_d);
      const bool in = inside[i] != A(0);
      const A through = of_y * h * q * inverse_d * inverse_d, less = A(2) * q * inverse_d;
      of_end[0][i] = in ? through * (slope + bend * q - numerator) + l * (left * left * inverse_mean - less) : A(0);
      of_end[1][i] = in ? -through * numerator + l * (into * into * inverse_mean - less) : A(0);
      // To start and width of a bin the same may be added: the last bin, which ends where the interval does, needs no start.
      const bool from_end = bin[i] == last;
      of_left[i] = in ? (from_end ? A(0) : -of_t / w) : A(0);
      of_width[i] = in ? -(of_slope * slope + of_t * (from_end ? -left : into)) / w : A(0);
      of_bottom[i] = in ? of_y : A(0);
      of_height[i] = in ? of_y * numerator * inverse_d + of_slope / w : A(0);
      const A of_place = Inverse ? of_root : of_t / w;
      dx[i] = in ? of_place / range : g[i];
    }
    widths.differentiate(s, bin, of_left, of_width, raw, n);
    heights.differentiate(s, bin, of_bottom, of_height, raw + s.bins * lanes, n);
    for (int j = 0; j < s.derivatives(); ++j) std::memset(of_derivatives + j * lanes, 0, size_t(n) * sizeof(A));
    for (int end = 0; end < 2; ++end)
      for (int64_t i = 0; i < n; ++i)
        if (ends.row[end][i] >= 0) of_derivatives[ends.row[end][i] * lanes + i] = of_end[end][i] * ends.derivative[end][i];
  }
};

// --- all tiles ---

// The values of a task: whole samples, or a part of one.
struct Tasks {
  int64_t batch, per_sample, parts, together;

  explicit Tasks(const Walk& walk)
      : batch(walk.batch),
        per_sample(walk.per_sample),
        parts(per_sample > of_a_task ? (per_sample + of_a_task - 1) / of_a_task : 1),
        together(per_sample && per_sample < of_a_task ? of_a_task / per_sample : 1) {}
  int64_t count() const { return parts > 1 ? batch * parts : (batch + together - 1) / together; }
  int64_t begin(int64_t task) const {
    if (parts > 1) return task / parts * per_sample + per_sample * (task % parts) / parts;
    const int64_t sample = task * together;
    return (sample < batch ? sample : batch) * per_sample;
  }
  int64_t end(int64_t task) const {
    return parts > 1 && task % parts == parts - 1 ? (task / parts + 1) * per_sample : begin(task + 1);
  }
};

// The fields of a walk: what both directions have, and the backward alone.
enum { X, PARAMS, BOUNDS, PARITY, Y, DPARAMS, GRAD };

template <class A>
struct Op {
  Spline<A> s;
  bool bounded;
  int parity;
  Walk walk;
  Tasks tasks;
  int threads;

  Op(const Spline<A>& s, In x, In bounds, int parity, const Field* fields, int count, int threads)
      : s(s), bounded(bounds.data), parity(parity), walk(x, fields, count, PARAMS), tasks(walk), threads(threads) {}

  void gather(Tile<A>& tile, int64_t begin, int64_t n) const {
    walk.load(X, begin, n, tile.x);
    walk.load_parameters(PARAMS, begin, n, s.params(), tile.raw);
    for (int64_t i = 0; i < n; ++i) {
      tile.low[i] = s.low;
      tile.high[i] = s.high;
      tile.kept[i] = A(0);
    }
    if (bounded) {
      A limits[2 * lanes];
      walk.load_parameters(BOUNDS, begin, n, 2, limits);
      for (int64_t i = 0; i < n; ++i) {
        tile.low[i] = limits[i];
        tile.high[i] = limits[lanes + i];
      }
    }
    if (parity < 0) return;
    walk.each_run(begin, n, [&](int64_t at, int64_t length, const int64_t* offset) {
      const int64_t step = walk.stride[walk.axes - 1][PARITY];
      for (int64_t i = 0; i < length; ++i) tile.kept[at + i] = ((offset[PARITY] + i * step) & 1) == parity ? A(0) : A(1);
    });
  }

  // Calls f(tile, begin, n) for the tiles of each task.
  template <class F>
  void each_tile(F&& f) const {
    parallel_for(tasks.count(), walk.batch * walk.per_sample * s.params(), threads, [&](int64_t task) {
      const Buffer<A> buffer(Tile<A>::rows(s) * lanes);
      Tile<A> tile(s, buffer);
      const int64_t end = tasks.end(task);
      for (int64_t begin = tasks.begin(task); begin < end; begin += lanes) {
        const int64_t n = end - begin < lanes ? end - begin : lanes;
        gather(tile, begin, n);
        s.inverse ? tile.template locate<true>(n) : tile.template locate<false>(n);
        f(tile, begin, n, task);
      }
    });
  }
};

// Calls f(sample, from, to) for the lanes of a tile that belong to one sample.
template <class F>
FLOWKERN_INLINE void each_sample(int64_t begin, int64_t n, int64_t per_sample, F&& f) {
  for (int64_t at = 0; at < n;) {
    const int64_t sample = (begin + at) / per_sample, left = (sample + 1) * per_sample - begin - at;
    const int64_t to = n - at < left ? n : at + left;
    f(sample, at, to);
    at = to;
  }
}

template <class A>
void forward(const Spline<A>& s, In x, In params, In bounds, int parity, Out y, Out logabsdet, int threads) {
  const Field fields[] = {Field(x), Field(params, true), of_channels(bounds), parity < 0 ? Field() : row_plus_column(), Field(y)};
  const Op<A> op(s, x, bounds, parity, fields, 5, threads);
  const Tasks& tasks = op.tasks;
  const Buffer<double> partial(tasks.batch * tasks.parts);
  for (int64_t i = 0; i < tasks.batch * tasks.parts; ++i) partial[i] = 0;
  op.each_tile([&](const Tile<A>& tile, int64_t begin, int64_t n, int64_t task) {
    A to[lanes], log_slope[lanes];
    s.inverse ? tile.template apply<true>(to, log_slope, n) : tile.template apply<false>(to, log_slope, n);
    op.walk.store(Y, begin, n, to);
    each_sample(begin, n, tasks.per_sample, [&](int64_t sample, int64_t from, int64_t end) {
      A total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t i = from; i < end; ++i) total += log_slope[i];
      partial[tasks.parts > 1 ? task : sample] += double(total);
    });
  });
  for (int64_t b = 0; b < tasks.batch; ++b) {
    double total = 0;
    for (int64_t part = 0; part < tasks.parts; ++part) total += partial[b * tasks.parts + part];
    reinterpret_cast<A*>(logabsdet.data)[b] = A(total);
  }
}

template <class A>
void backward(const Spline<A>& s, In x, In params, In grad, In grad_logabsdet, In bounds, int parity, Out dx, Out dparams,
              int threads) {
  const Field fields[] = {Field(x),  Field(params, true), of_channels(bounds), parity < 0 ? Field() : row_plus_column(),
                          Field(dx), Field(dparams, true), Field(grad)};
  const Op<A> op(s, x, bounds, parity, fields, 7, threads);
  op.each_tile([&](Tile<A>& tile, int64_t begin, int64_t n, int64_t) {
    A g[lanes] = {}, of_log[lanes] = {}, to[lanes];
    if (grad.data) op.walk.load(GRAD, begin, n, g);
    if (grad_logabsdet.data)
      each_sample(begin, n, op.walk.per_sample, [&](int64_t sample, int64_t from, int64_t end) {
        A l;
        load_rows(Field(grad_logabsdet).operand, sample * grad_logabsdet.stride[0], 1, nullptr, 1, 0, 1, &l);
        for (int64_t i = from; i < end; ++i) of_log[i] = l;
      });
    s.inverse ? tile.template differentiate<true>(g, of_log, to, n) : tile.template differentiate<false>(g, of_log, to, n);
    op.walk.store(Y, begin, n, to);
    op.walk.store_parameters(DPARAMS, begin, n, s.params(), tile.raw);
  });
}

template <class A>
Spline<A> spline(int bins, int tails, int kind, double low, double high, double min_width, double min_height,
                 double min_derivative, double inverse_slope, double inverse_divisor, bool inverse) {
  const bool zuko = kind == 0;  // whose shares have no minimum
  return {bins, tails, zuko, inverse, A(low), A(high), A(zuko ? 0 : min_width), A(zuko ? 0 : min_height), A(min_derivative),
          A(inverse_slope), A(inverse_divisor)};
}

}  // namespace

void rational_quadratic_spline(In x, In params, In bounds, int bins, int tails, int kind, double low, double high,
                               double min_width, double min_height, double min_derivative, double inverse_slope,
                               double inverse_divisor, int parity, bool inverse, Out y, Out logabsdet, int threads) {
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    const auto s = spline<A>(bins, tails, kind, low, high, min_width, min_height, min_derivative, inverse_slope, inverse_divisor, inverse);
    forward<A>(s, x, params, bounds, parity, y, logabsdet, threads);
  };
  if (logabsdet.dtype == Dtype::float64) return run(double());
  run(float());
}

void rational_quadratic_spline_backward(In x, In params, In grad, In grad_logabsdet, In bounds, int bins, int tails, int kind,
                                        double low, double high, double min_width, double min_height, double min_derivative,
                                        double inverse_slope, double inverse_divisor, int parity, bool inverse, Out dx,
                                        Out dparams, int threads) {
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    const auto s = spline<A>(bins, tails, kind, low, high, min_width, min_height, min_derivative, inverse_slope, inverse_divisor, inverse);
    backward<A>(s, x, params, grad, grad_logabsdet, bounds, parity, dx, dparams, threads);
  };
  if (x.dtype == Dtype::float64 || params.dtype == Dtype::float64) return run(double());
  run(float());
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
