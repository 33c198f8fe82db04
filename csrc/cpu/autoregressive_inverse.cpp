// The inverse of masked autoregressive affine layers: every hidden unit once, as soon as what it sees is known. The formulas
// stand at the top of flowkern/ops/_autoregressive_inverse.py, the order of work in flowkern/ops/_autoregressive_network.py.
//
// Samples lie innermost, in tiles of one or two vectors, and never meet: a thread takes some tiles through the whole chain.
// The steps go in panels. For each, the rows of the weights are copied in the order of use, short of what the masks hide;
// what was known before the panel comes in by products that fill the registers, the rest step by step.

#include "../autoregressive.h"
#include "matrix.h"

namespace flowkern {
namespace FLOWKERN_ISA {
namespace {

// --- the plan ---

// Units of a layer, sorted by degree: the unit at each place, how many of the layer before it sees, and the places where
// steps end.
struct Layer {
  const int32_t *order = nullptr, *prefix = nullptr, *ends = nullptr;
  int64_t width = 0, count = 0;
};

struct Plan {
  static constexpr int header = 11;
  int64_t linears, depth, panels;
  int activation, scale;
  bool residual, gated;
  int64_t raw_first, raw_step, shift_first, shift_step;  // rows of the output layer
  const int32_t *source, *panel;
  Buffer<Layer> layers;  // the features, the hidden layers, and the features as outputs

  explicit Plan(const int32_t* table)
      : linears(table[0]),
        depth(table[1]),
        panels(table[2]),
        activation(table[3]),
        scale(table[4]),
        residual(table[5] != 0),
        gated(table[6] != 0),
        raw_first(table[7]),
        raw_step(table[8]),
        shift_first(table[9]),
        shift_step(table[10]),
        layers(linears + 1) {
    const int32_t *widths = table + header, *at = widths + linears + 1;
    for (int64_t i = 0; i <= linears; ++i) {
      Layer& layer = layers[i];
      layer.width = widths[i];
      layer.order = at;
      layer.prefix = at + layer.width;
      layer.ends = layer.prefix + layer.width;
      layer.count = layer.ends[depth];
      at = layer.ends + depth + 1;
    }
    source = at;
    panel = source + layers[0].width;
  }

  const int32_t* panel_at(int64_t i) const { return panel + i * (2 + linears); }  // begin, end, and the known units

  // Rows of a linear layer that a place has: the outputs are pairs.
  int64_t rows(int64_t layer) const { return layer == linears ? 2 : 1; }
  bool activated(int64_t layer) const { return !(residual && layer == linears - 1); }
  bool added(int64_t layer) const { return residual && layer >= 3 && layer % 2 == 1; }
};

// --- elementary functions ---

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

// The positions in ACTIVATIONS of flowkern/ops/_autoregressive_network.py.
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

// y = (z - t) / s, or (z - (1 - s) t) / s; log s is added to `logs`. `scale_of(u, log_s)` gives s.
template <class A, class F>
FLOWKERN_INLINE void solve_run(const A* u, const A* t, const A* z, bool gated, A* y, double* logs, int64_t n, F&& scale_of) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    A log_s;
    const A s = scale_of(u[i], log_s);
    y[i] = (z[i] - (gated ? (A(1) - s) * t[i] : t[i])) / s;
    logs[i] += double(log_s);
  }
}

template <class A>
void solve(int scale, double a, double b, const A* u, const A* t, const A* z, bool gated, A* y, double* logs, int64_t n) {
  const A c = A(a), eps = A(b);
  const auto run = [&](auto&& scale_of) { solve_run(u, t, z, gated, y, logs, n, scale_of); };
  switch (scale) {
    case 0: return run([](A v, A& log_s) { return exp_(log_s = v); });
    case 1:
      if (eps == A(0))
        return run([c](A v, A& log_s) {
          const A w = v + c, e = exp_(-abs_(w));
          log_s = (w > A(0) ? A(0) : w) - log1p_unit(e);
          return (w >= A(0) ? A(1) : e) / (A(1) + e);
        });
      return run([c, eps](A v, A& log_s) {
        const A w = v + c, e = exp_(-abs_(w)), s = (w >= A(0) ? A(1) : e) / (A(1) + e) + eps;
        log_s = log_(s);
        return s;
      });
    case 2:
      return run([c](A v, A& log_s) {
        const A s = relu(v) + log1p_unit(exp_(-abs_(v))) + c;
        log_s = log_(s);
        return s;
      });
    case 3: return run([c](A v, A& log_s) { return exp_(log_s = c * tanh_(v / c)); });
    case 4: return run([c](A v, A& log_s) { return exp_(log_s = A(0.636) * c * atan_(v)); });
    default: return run([c](A v, A& log_s) { return exp_(log_s = v / (A(1) + abs_(v / c))); });
  }
}

// --- the weights in the order of use ---

// n elements of a tensor from `offset` on, `stride` apart or where `index` says.
template <class A>
void read(const Tensor& t, int64_t offset, int64_t stride, const int32_t* index, int64_t n, A* to) {
  Operand o;
  o.data = t.data;
  o.dtype = t.dtype;
  load_rows(o, offset, stride, index, n, 0, 1, to);
}

template <class A>
void write(const Tensor& t, int64_t offset, int64_t stride, int64_t n, const A* from) {
  Operand o;
  o.data = t.data;
  o.dtype = t.dtype;
  store_rows(o, offset, stride, nullptr, n, 0, 1, from);
}

bool identity(const int32_t* order, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (order[i] != i) return false;
  return true;
}

// An odd number of cache lines, so that rows do not share places in the cache.
template <class A>
int64_t packed_row(int64_t columns) {
  constexpr int64_t line = 64 / int64_t(sizeof(A));
  return ((columns + line - 1) / line | 1) * line;
}

template <class A>
struct Network {
  Plan plan;
  const Autoregressive& given;
  Buffer<A> biases;       // of all linear layers, sorted
  Buffer<A*> bias;        // where those of each begin
  Buffer<bool> in_order;  // whether the columns of each linear layer are sorted as they are
  int64_t largest = 0;    // packed panel

  explicit Network(const Autoregressive& g)
      : plan(g.table), given(g), biases(rows_of(plan)), bias(plan.linears), in_order(plan.linears) {
    A* to = biases;
    for (int64_t i = 1; i <= plan.linears; ++i) {
      const Layer &layer = plan.layers[i], &before = plan.layers[i - 1];
      in_order[i - 1] = identity(before.order, before.count);
      bias[i - 1] = to;
      const Tensor& from = g.tensors[2 * (i - 1) + 1];
      each_row(i, 0, layer.count, [&](int64_t row) { read(from, row * from.stride[0], 0, nullptr, 1, to++); });
    }
    for (int64_t p = 0; p < plan.panels; ++p) {
      int64_t size = 0;
      for (int64_t i = 1; i <= plan.linears; ++i) size += rows(p, i) * row_size(p, i);
      largest = size > largest ? size : largest;
    }
  }

  static int64_t rows_of(const Plan& plan) {
    int64_t total = 0;
    for (int64_t i = 1; i <= plan.linears; ++i) total += plan.rows(i) * plan.layers[i].count;
    return total;
  }

  // Calls f with the number of each row of a linear layer that belongs to places [begin, end).
  template <class F>
  void each_row(int64_t i, int64_t begin, int64_t end, F&& f) const {
    const int32_t* order = plan.layers[i].order;
    for (int64_t place = begin; place < end; ++place) {
      if (i < plan.linears) {
        f(int64_t(order[place]));
      } else {
        f(plan.raw_first + order[place] * plan.raw_step);
        f(plan.shift_first + order[place] * plan.shift_step);
      }
    }
  }

  int64_t begin(int64_t panel, int64_t i) const { return plan.layers[i].ends[plan.panel_at(panel)[0]]; }
  int64_t end(int64_t panel, int64_t i) const { return plan.layers[i].ends[plan.panel_at(panel)[1]]; }
  int64_t rows(int64_t panel, int64_t i) const { return plan.rows(i) * (end(panel, i) - begin(panel, i)); }
  int64_t row_size(int64_t panel, int64_t i) const {
    return rows(panel, i) == 0 ? 0 : packed_row<A>(plan.layers[i].prefix[end(panel, i) - 1]);
  }

  // The rows of a panel, layer after layer, each as far as it sees the layer before.
  void pack(int64_t panel, A* to) const {
    for (int64_t i = 1; i <= plan.linears; ++i) {
      const Tensor& weight = given.tensors[2 * (i - 1)];
      const int32_t* index = in_order[i - 1] ? nullptr : plan.layers[i - 1].order;
      const int64_t size = row_size(panel, i);
      int64_t count = 0;
      each_row(i, begin(panel, i), end(panel, i), [&](int64_t row) {
        const int64_t place = begin(panel, i) + count++ / plan.rows(i);
        read(weight, row * weight.stride[0], weight.stride[1], index, plan.layers[i].prefix[place], to);
        to += size;
      });
    }
  }
};

// --- the sweep ---

// What a tile of samples knows: of each layer the values, and for layers to which others are added those before the activation.
template <class A>
struct State {
  const Network<A>& network;
  const int64_t width;  // samples of a tile, whole vectors
  A* memory;

  static int64_t units(const Plan& plan) {
    int64_t total = 0;
    for (int64_t i = 0; i < plan.linears; ++i) total += plan.layers[i].count * (plan.residual ? 2 : 1);
    int64_t outputs = 0;
    for (int64_t p = 0; p < plan.panels; ++p) {
      const int32_t *panel = plan.panel_at(p), *ends = plan.layers[plan.linears].ends;
      const int64_t rows = 2 * (ends[panel[1]] - ends[panel[0]]);
      outputs = rows > outputs ? rows : outputs;
    }
    return total + outputs;
  }

  A* values(int64_t layer) const {
    A* at = memory;
    for (int64_t i = 0; i < layer; ++i) at += network.plan.layers[i].count * width * (network.plan.residual ? 2 : 1);
    return at;
  }
  A* before(int64_t layer) const {
    const Plan& plan = network.plan;
    const bool separate = plan.residual && layer > 0 && layer < plan.linears && plan.activated(layer);
    return values(layer) + (separate ? plan.layers[layer].count * width : 0);
  }

  // One panel: `packed` are its weights, z and logs those of the tile, and `samples` the first and the number of its samples.
  void sweep(int64_t panel, const A* packed, const A* z, double* logs, int64_t first, int64_t samples) const {
    const Plan& plan = network.plan;
    const int32_t* numbers = plan.panel_at(panel);
    const A* weights = packed;
    for (int64_t i = 1; i <= plan.linears; ++i) {
      const int64_t begin = network.begin(panel, i), rows = network.rows(panel, i);
      Product<A> p;
      p.a = weights;
      p.a_row = network.row_size(panel, i);
      p.b = values(i - 1);
      p.b_step = width;
      p.count = numbers[1 + i];
      p.out = i == plan.linears ? before(i) : before(i) + begin * width;
      p.out_row = width;
      p.plus = Plus::rows;
      p.start = network.bias[i - 1] + plan.rows(i) * begin;
      multiply(p, 0, rows, width);
      if (i == 1 && network.given.context.data) add_context(panel, p.out, first, samples);
      weights += rows * p.a_row;
    }
    for (int64_t step = numbers[0]; step < numbers[1]; ++step) {
      weights = packed;
      for (int64_t i = 1; i <= plan.linears; ++i) {
        finish(panel, step, i, weights);
        weights += network.rows(panel, i) * network.row_size(panel, i);
      }
      const Layer& features = plan.layers[0];
      const int64_t start = network.begin(panel, plan.linears);
      for (int64_t f = features.ends[step]; f < features.ends[step + 1]; ++f) {
        const A* u = before(plan.linears) + 2 * (f - start) * width;
        solve(plan.scale, network.given.a, network.given.b, u, u + width, z + features.order[f] * width, plan.gated,
              values(0) + f * width, logs, width);
      }
    }
  }

  // The rows of one step in one layer: what they see of this panel, and the activation.
  void finish(int64_t panel, int64_t step, int64_t i, const A* weights) const {
    const Plan& plan = network.plan;
    const Layer& layer = plan.layers[i];
    const int64_t start = network.begin(panel, i), known = plan.panel_at(panel)[1 + i], twice = plan.rows(i);
    A* out = i == plan.linears ? before(i) - twice * start * width : before(i);
    const int64_t begin = layer.ends[step], end = layer.ends[step + 1];
    Product<A> p;
    p.a_row = network.row_size(panel, i);
    p.b = values(i - 1) + known * width;
    p.b_step = width;
    p.out_row = width;
    p.plus = Plus::out;
    for (int64_t place = begin, next; place < end; place = next) {
      for (next = place + 1; next < end && layer.prefix[next] == layer.prefix[place]; ++next) {
      }
      p.count = layer.prefix[place] - known;
      if (p.count <= 0) continue;
      p.a = weights + twice * (place - start) * p.a_row + known;
      p.out = out + twice * place * width;
      multiply(p, 0, twice * (next - place), width);
    }
    if (i == plan.linears || begin == end) return;
    A *pre = before(i) + begin * width, *to = values(i) + begin * width;
    const int64_t n = (end - begin) * width;
    if (plan.added(i)) {
      const A* more = before(i - 2) + begin * width;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) pre[j] += more[j];
    }
    if (plan.activated(i)) activate(plan.activation, pre, to, n);
  }

  void add_context(int64_t panel, A* out, int64_t first, int64_t samples) const {
    const Tensor& context = network.given.context;
    const Buffer<A> row(width);
    network.each_row(1, network.begin(panel, 1), network.end(panel, 1), [&](int64_t unit) {
      read(context, first * context.stride[0] + unit * context.stride[1], context.stride[0], nullptr, samples, row + 0);
      for (int64_t j = 0; j < samples; ++j) out[j] += row[j];
      out += width;
    });
  }
};

// Features of samples [first, first + n), sample by sample in the tensor, [feature][width] in the tile; zeros beyond them.
template <class A>
void read_tile(const Tensor& t, int64_t first, int64_t n, A* to, int64_t width) {
  for (int64_t d = 0; d < t.size[1]; ++d, to += width) {
    read(t, first * t.stride[0] + d * t.stride[1], t.stride[0], nullptr, n, to);
    for (int64_t j = n; j < width; ++j) to[j] = A(0);
  }
}

template <class A>
void write_tile(const A* from, int64_t width, const Tensor& t, int64_t first, int64_t n) {
  for (int64_t d = 0; d < t.size[1]; ++d) write(t, first * t.stride[0] + d * t.stride[1], t.stride[0], n, from + d * width);
}

template <class A>
void forward(const Autoregressive* networks, int64_t count, const Tensor& z, const Tensor& x, const Tensor& logabsdet,
             int threads) {
  constexpr int64_t most = 8;  // tiles that share a packed panel: their states stay in the second cache
  const int64_t batch = z.size[0], features = z.size[1];
  if (batch == 0) return;
  const bool narrow_tiles = batch < 2 * lanes<A> * threads;  // rather a tile for every thread
  const int64_t width = narrow_tiles ? lanes<A> : 2 * lanes<A>, tiles = (batch + width - 1) / width;
  const int64_t each = (tiles + threads - 1) / threads, together = each < most ? each : most;
  int64_t work = 0;
  for (int64_t k = 0; k < count; ++k) {
    const Plan plan(networks[k].table);
    for (int64_t i = 1; i <= plan.linears; ++i) work += plan.layers[i].count * plan.layers[i - 1].count / 2;
  }
  parallel_for((tiles + together - 1) / together, work * batch / 16, threads, [&](int64_t task) {
    const int64_t first = task * together, last = first + together < tiles ? first + together : tiles, own = last - first;
    const auto samples = [&](int64_t tile) {
      const int64_t left = batch - (first + tile) * width;
      return left < width ? left : width;
    };
    const int64_t room = features * width;
    const Buffer<A> states(own * room);
    const Buffer<double> logs(own * width);
    for (int64_t j = 0; j < own * width; ++j) logs[j] = 0;
    for (int64_t tile = 0; tile < own; ++tile)
      read_tile<A>(z, (first + tile) * width, samples(tile), states + tile * room, width);
    for (int64_t k = count - 1; k >= 0; --k) {
      const Network<A> network(networks[k]);
      const int64_t units = State<A>::units(network.plan) * width;
      const Buffer<A> packed(network.largest), memory(own * units);
      for (int64_t panel = 0; panel < network.plan.panels; ++panel) {
        network.pack(panel, packed);
        for (int64_t tile = 0; tile < own; ++tile) {
          const State<A> state{network, width, memory + tile * units};
          state.sweep(panel, packed, states + tile * room, logs + tile * width, (first + tile) * width, samples(tile));
        }
      }
      for (int64_t tile = 0; tile < own; ++tile) {
        const A* y = memory + tile * units;
        for (int64_t f = 0; f < features; ++f)
          std::memcpy(states + tile * room + network.plan.source[f] * width, y + f * width, size_t(width) * sizeof(A));
      }
    }
    for (int64_t tile = 0; tile < own; ++tile) {
      write_tile<A>(states + tile * room, width, x, (first + tile) * width, samples(tile));
      A* to = reinterpret_cast<A*>(logabsdet.data) + (first + tile) * width;
      for (int64_t j = 0; j < samples(tile); ++j) to[j] = A(-logs[tile * width + j]);
    }
  });
}

}  // namespace

void autoregressive_inverse_forward(const Autoregressive* networks, int64_t count, const Tensor& z, const Tensor& x,
                                    const Tensor& logabsdet, int threads) {
  const auto run = logabsdet.dtype == Dtype::float64 ? forward<double> : forward<float>;
  run(networks, count, z, x, logabsdet, threads);
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
