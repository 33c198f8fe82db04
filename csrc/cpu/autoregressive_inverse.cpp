// The inverse of masked autoregressive affine layers: every hidden unit once, as soon as what it sees is known. The formulas
// stand at the top of flowkern/ops/autoregressive/inverse.py, the order of work in flowkern/ops/autoregressive/network.py.
//
// Samples lie innermost, in tiles of one or two vectors, and never meet: a thread takes some tiles through the whole chain.
// The steps go in panels. For each, the rows of the weights are copied in the order of use, short of what the masks hide;
// what was known before the panel comes in by products that fill the registers, the rest step by step. The backward goes
// through the panels in reverse and solves for the gradient of z in the same way, the transposed weights in the same copies.
//
// For few samples vectors run along the rows of the weights instead, which are read where they lie.

#include "activations.h"
#include "autoregressive.h"
#include "scale_maps.h"

namespace flowkern {
namespace FLOWKERN_ISA {
namespace {

constexpr int64_t few = 4;  // samples

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// --- the affine maps ---

// y = (z - t) / s, or (z - (1 - s) t) / s; log s is added to `logs`.
template <class A>
void solve(const Plan& plan, double a, double b, const A* u, const A* t, const A* z, A* y, double* logs, int64_t n) {
  const bool gated = plan.gated;
  with_map<A>(plan.scale, a, b, [&](const auto& given) {
    const auto map = given;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      A log_s;
      const A s = map.template scale<false>(u[i], log_s);
      y[i] = (z[i] - (gated ? (A(1) - s) * t[i] : t[i])) / s;
      logs[i] += double(log_s);
    }
  });
}

// The reverse, in place: v = -sum / s for the sum of all that enters y, y becomes z, and u and t become their gradients, those
// by z = s y + t (gated: s y + (1 - s) t) along v, and by log s along `grad_log`. Where nothing enters, the x that a scale of 0
// has made infinite has no say.
template <class A>
void pull_affine(const Plan& plan, double a, double b, A* u, A* t, A* y, A* sum, const A* grad_log, int64_t n) {
  const bool gated = plan.gated;
  with_map<A>(plan.scale, a, b, [&](const auto& given) {
    const auto map = given;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      A slope;
      const A s = map.template scale_and_slope<false>(u[i], slope);
      const bool nothing = sum[i] == A(0);
      const A v = nothing ? A(0) : -sum[i] / s;
      const A moved = gated ? y[i] - t[i] : y[i], by_shift = gated ? A(1) - s : A(1);
      y[i] = s * y[i] + by_shift * t[i];
      u[i] = slope * ((nothing ? A(0) : -sum[i] * moved) + grad_log[i]);  // sum = -s v
      t[i] = by_shift * v;
      sum[i] = v;
    }
  });
}

// --- one tile ---

// What a tile of samples knows of each layer: the values, and those before the activation. They are kept apart where the latter
// are used again: in residual networks, and if `whole`, for the backward. That keeps all outputs, too, not those of a panel
// alone, and has places for what enters the features.
template <class A>
struct State {
  const Network<A>& network;
  const int64_t width;  // samples of a tile, whole vectors
  A* memory;
  const bool whole;

  static int64_t units(const Plan& plan, bool whole) {
    int64_t hidden = 0, outputs = 0;
    for (int64_t i = 1; i < plan.linears; ++i) hidden += plan.layers[i].count;
    for (int64_t p = 0; p < plan.panels; ++p) {
      const int32_t *panel = plan.panel_at(p), *ends = plan.layers[plan.linears].ends;
      const int64_t rows = 2 * (ends[panel[1]] - ends[panel[0]]);
      outputs = whole ? outputs + rows : rows > outputs ? rows : outputs;
    }
    return plan.layers[0].count * (whole ? 2 : 1) + hidden * (whole || plan.residual ? 2 : 1) + outputs;
  }

  A* values(int64_t layer) const {
    A* at = memory;
    for (int64_t i = 0; i < layer; ++i) at += network.plan.layers[i].count * width * (apart(i) ? 2 : 1);
    return at;
  }
  A* before(int64_t layer) const { return values(layer) + (apart(layer) ? network.plan.layers[layer].count * width : 0); }
  bool apart(int64_t layer) const {
    const Plan& plan = network.plan;
    return layer > 0 && layer < plan.linears && (whole || (plan.residual && plan.activated(layer)));
  }

  // The outputs of a panel.
  A* outputs(int64_t panel) const {
    const int64_t begin = whole ? 2 * network.begin(panel, network.plan.linears) : 0;
    return before(network.plan.linears) + begin * width;
  }

  // Where the rows of a linear layer in a panel write to.
  A* rows(int64_t panel, int64_t i) const {
    return i == network.plan.linears ? outputs(panel) : before(i) + network.begin(panel, i) * width;
  }

  // One panel: `packed` are its weights, z and logs those of the tile, and `samples` the first and the number of its samples.
  void sweep(int64_t panel, const A* packed, const A* z, double* logs, int64_t first, int64_t samples) const {
    const Plan& plan = network.plan;
    const int32_t* numbers = plan.panel_at(panel);
    each_layer(panel, packed, [&](int64_t i, const A* weights) { begin(panel, i, weights, first, samples); });
    for (int64_t step = numbers[0]; step < numbers[1]; ++step) {
      each_layer(panel, packed, [&](int64_t i, const A* weights) {
        finish(panel, i, weights, plan.layers[i].ends[step], plan.layers[i].ends[step + 1]);
      });
      const Layer& features = plan.layers[0];
      const int64_t start = network.begin(panel, plan.linears);
      for (int64_t f = features.ends[step]; f < features.ends[step + 1]; ++f) {
        const A* u = outputs(panel) + 2 * (f - start) * width;
        solve(plan, network.given.a, network.given.b, u, u + width, z + features.order[f] * width, values(0) + f * width, logs,
              width);
      }
    }
  }

  // One panel where the features are known.
  void pass(int64_t panel, const A* packed, int64_t first, int64_t samples) const {
    each_layer(panel, packed, [&](int64_t i, const A* weights) {
      begin(panel, i, weights, first, samples);
      finish(panel, i, weights, network.begin(panel, i), network.end(panel, i));
    });
  }

  // Calls f with each linear layer and its packed weights.
  template <class F>
  void each_layer(int64_t panel, const A* packed, F&& f) const {
    for (int64_t i = 1; i <= network.plan.linears; ++i) {
      f(i, packed);
      packed += network.rows(panel, i) * network.row_size(panel, i);
    }
  }

  // The rows of a layer, as far as all of them see what was known before the panel.
  void begin(int64_t panel, int64_t i, const A* weights, int64_t first, int64_t samples) const {
    Product<A> p;
    p.a = weights;
    p.a_row = network.row_size(panel, i);
    p.b = values(i - 1);
    p.b_step = width;
    p.count = network.plan.panel_at(panel)[1 + i];
    p.out = rows(panel, i);
    p.out_row = width;
    p.plus = Plus::rows;
    p.start = network.bias[i - 1] + network.plan.rows(i) * network.begin(panel, i);
    multiply(p, 0, network.rows(panel, i), width);
    if (i == 1 && network.given.context.data) add_context(panel, p.out, first, samples);
  }

  // Places [begin, end) of a layer: what they see of this panel, and the activation.
  void finish(int64_t panel, int64_t i, const A* weights, int64_t begin, int64_t end) const {
    const Plan& plan = network.plan;
    const int64_t together = max_rows / plan.rows(i);
    for (int64_t place = begin; place < end; place += together) staircase(panel, i, weights, place, least(end, place + together));
    if (i == plan.linears || begin == end) return;
    A *pre = before(i) + begin * width, *to = values(i) + begin * width;
    const int64_t n = (end - begin) * width;
    if (plan.added(i)) {
      const A* more = before(i - 2) + begin * width;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) pre[j] += more[j];
    }
    if (plan.activated(i)) {
      activate(plan.activation, pre, to, n);
    } else if (pre != to) {
      std::memcpy(to, pre, size_t(n) * sizeof(A));
    }
  }

  // Rows that see further go on where the others end.
  void staircase(int64_t panel, int64_t i, const A* weights, int64_t begin, int64_t end) const {
    const int32_t* prefix = network.plan.layers[i].prefix;
    const int64_t start = network.begin(panel, i), twice = network.plan.rows(i);
    int64_t done = network.plan.panel_at(panel)[1 + i];
    Product<A> p;
    p.a_row = network.row_size(panel, i);
    p.b_step = width;
    p.out_row = width;
    p.plus = Plus::out;
    for (; begin < end; ++begin) {
      if (prefix[begin] <= done) continue;
      p.count = prefix[begin] - done;
      p.a = weights + twice * (begin - start) * p.a_row + done;
      p.b = values(i - 1) + done * width;
      p.out = rows(panel, i) + twice * (begin - start) * width;
      multiply(p, 0, twice * (end - begin), width);
      done = prefix[begin];
    }
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

  // --- in reverse ---

  // What enters the units of a layer. That of hidden ones takes the places of the values, which are not used any more, and
  // becomes the gradient before the activation; that of the outputs, the places of the outputs.
  A* entering(int64_t layer) const {
    if (layer == network.plan.linears) return before(layer);
    return layer == 0 ? before(network.plan.linears) + 2 * network.plan.layers[0].count * width : values(layer);
  }

  // One panel: all that comes from later ones has been added to what enters.
  void pull(int64_t panel, const A* packed, const A* grad_log) const {
    const Plan& plan = network.plan;
    const int32_t* numbers = plan.panel_at(panel);
    for (int64_t step = numbers[1] - 1; step >= numbers[0]; --step) {
      pull_step(panel, step, 0, packed, grad_log);
      for (int64_t i = plan.linears - 1; i > 0; --i) pull_step(panel, step, i, packed, grad_log);
    }
    each_layer(panel, packed, [&](int64_t i, const A* weights) {
      transposed(panel, i, weights, network.begin(panel, i), 0, plan.layers[i - 1].ends[numbers[0]]);
    });
  }

  // The units of a layer in one step: what enters them from this panel, and what leaves.
  void pull_step(int64_t panel, int64_t step, int64_t layer, const A* packed, const A* grad_log) const {
    const Plan& plan = network.plan;
    const int64_t begin = plan.layers[layer].ends[step], end = plan.layers[layer].ends[step + 1];
    if (begin == end) return;
    each_layer(panel, packed, [&](int64_t i, const A* weights) {
      if (i == layer + 1) transposed(panel, i, weights, plan.layers[i].ends[step + (layer == 0)], begin, end);
    });
    if (layer == 0) {
      for (int64_t f = begin; f < end; ++f) {
        A* u = before(plan.linears) + 2 * f * width;
        pull_affine(plan, network.given.a, network.given.b, u, u + width, values(0) + f * width, entering(0) + f * width, grad_log,
                    width);
      }
      return;
    }
    A* grad = entering(layer) + begin * width;
    const int64_t n = (end - begin) * width;
    if (plan.activated(layer)) times_slope(plan.activation, before(layer) + begin * width, grad, n);
    if (layer + 2 < plan.linears && plan.added(layer + 2)) {
      const A* more = entering(layer + 2) + begin * width;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) grad[j] += more[j];
    }
  }

  // What leaves a panel's rows of linear layer i, from place `row` on, enters columns [begin, end).
  void transposed(int64_t panel, int64_t i, const A* weights, int64_t row, int64_t begin, int64_t end) const {
    const int64_t twice = network.plan.rows(i);
    end = least(end, network.seen(panel, i));
    Product<A> p;
    p.a_row = 1;
    p.a_step = network.row_size(panel, i);
    p.a = weights + twice * (row - network.begin(panel, i)) * p.a_step + begin;
    p.b = entering(i) + twice * row * width;
    p.b_step = width;
    p.count = twice * (network.end(panel, i) - row);
    p.out = entering(i - 1) + begin * width;
    p.out_row = width;
    p.plus = Plus::out;
    if (begin < end && p.count > 0) multiply(p, 0, end - begin, width);
  }
};

// --- tiles and tensors ---

// Features of samples [first, first + n), sample by sample in the tensor, [feature][width] in the tile; zeros beyond them.
// `source`: the column of each feature, or null.
template <class A>
void read_tile(const Tensor& t, const int32_t* source, int64_t first, int64_t n, A* to, int64_t width) {
  for (int64_t d = 0; d < t.size[1]; ++d, to += width) {
    const int64_t column = source ? source[d] : d;
    read(t, first * t.stride[0] + column * t.stride[1], t.stride[0], nullptr, n, to);
    for (int64_t j = n; j < width; ++j) to[j] = A(0);
  }
}

template <class A>
void write_row(const A* from, const Tensor& t, int64_t column, int64_t first, int64_t n) {
  write(t, first * t.stride[0] + column * t.stride[1], t.stride[0], nullptr, n, from);
}

// `units` rows of a tile, whose columns in the tensor are `order`, sample by sample.
template <class A>
void write_turned(const A* from, int64_t width, const Tensor& t, const int32_t* order, int64_t units, int64_t first, int64_t n) {
  constexpr int64_t together = 64;
  const Buffer<A> turned(width * together), rest(together * width);
  for (int64_t begin = 0; begin < units; begin += together) {
    const int64_t count = least(together, units - begin);
    const A* rows = from + begin * width;
    if (count < together) {
      std::memset(rest + 0, 0, size_t(together * width) * sizeof(A));
      std::memcpy(rest + 0, rows, size_t(count * width) * sizeof(A));
      rows = rest;
    }
    transpose<A>(rows, width, together, width, turned, together);
    for (int64_t j = 0; j < n; ++j) write(t, (first + j) * t.stride[0], t.stride[1], order + begin, count, turned + j * together);
  }
}

// How the samples are split: tiles of `width`, `together` of them to a task.
struct Tiles {
  int64_t batch, width, count, together, work = 0;

  Tiles(const Autoregressive* networks, int64_t networks_count, int64_t samples, int64_t lanes, int threads, int64_t most)
      : batch(samples) {
    width = batch < 2 * lanes * threads ? lanes : 2 * lanes;  // rather a tile for every thread
    count = (batch + width - 1) / width;
    together = least((count + threads - 1) / threads, most);
    for (int64_t k = 0; k < networks_count; ++k) {
      const Plan plan(networks[k].table);
      for (int64_t i = 1; i <= plan.linears; ++i) work += plan.layers[i].count * plan.layers[i - 1].count / 2;
    }
  }

  int64_t samples(int64_t tile) const { return least(width, batch - tile * width); }

  // Calls f with the first and the number of the tiles of each task.
  template <class F>
  void each_task(int threads, F&& f) const {
    parallel_for((count + together - 1) / together, work * batch / 16, threads, [&](int64_t task) {
      f(task * together, least(together, count - task * together));
    });
  }
};

template <class A>
void forward(const Autoregressive* networks, int64_t count, const Tensor& z, const Tensor& x, const Tensor& logabsdet,
             int threads) {
  // The states of 8 tiles, which share a packed panel, stay in the second cache.
  const Tiles tiles(networks, count, z.size[0], lanes<A>, threads, 8);
  const int64_t width = tiles.width, features = z.size[1], room = features * width;
  tiles.each_task(threads, [&](int64_t first, int64_t own) {
    const Buffer<A> states(own * room);
    const Buffer<double> logs(own * width);
    for (int64_t j = 0; j < own * width; ++j) logs[j] = 0;
    for (int64_t tile = 0; tile < own; ++tile)
      read_tile<A>(z, nullptr, (first + tile) * width, tiles.samples(first + tile), states + tile * room, width);
    for (int64_t k = count - 1; k >= 0; --k) {
      const Network<A> network(networks[k]);
      const int64_t units = State<A>::units(network.plan, false) * width;
      const Buffer<A> packed(network.largest), memory(own * units);
      for (int64_t panel = 0; panel < network.plan.panels; ++panel) {
        network.pack(panel, packed);
        for (int64_t tile = 0; tile < own; ++tile) {
          const State<A> state{network, width, memory + tile * units, false};
          const int64_t start = (first + tile) * width, samples = tiles.samples(first + tile);
          state.sweep(panel, packed, states + tile * room, logs + tile * width, start, samples);
        }
      }
      for (int64_t tile = 0; tile < own; ++tile) {
        const A* y = memory + tile * units;
        for (int64_t f = 0; f < features; ++f)
          std::memcpy(states + tile * room + network.plan.source[f] * width, y + f * width, size_t(width) * sizeof(A));
      }
    }
    for (int64_t tile = 0; tile < own; ++tile) {
      const int64_t start = (first + tile) * width, samples = tiles.samples(first + tile);
      for (int64_t d = 0; d < features; ++d) write_row<A>(states + tile * room + d * width, x, d, start, samples);
      A* to = reinterpret_cast<A*>(logabsdet.data) + start;
      for (int64_t j = 0; j < samples; ++j) to[j] = A(-logs[tile * width + j]);
    }
  });
}

// --- few samples ---

// Sums in lanes, whose halves are added up: short chains of additions, the same for any company. A row that begins `ahead` of
// a is asked for: every row is read once, and where the next one begins the processor cannot guess.
template <class A>
FLOWKERN_INLINE A dot(const A* a, const A* b, int64_t n, int64_t ahead) {
  Vector<A> sum[4] = {};
  int64_t k = 0;
  for (; k + 4 * lanes<A> <= n; k += 4 * lanes<A>) {
    for (int line = 0; line < int(sizeof(sum)); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(a + k + ahead) + line, 0, 2);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[v] += load(a + k + v * lanes<A>) * load(b + k + v * lanes<A>);
  }
  for (; k + lanes<A> <= n; k += lanes<A>) sum[0] += load(a + k) * load(b + k);
  A total[lanes<A>];
  store<A>((sum[0] + sum[1]) + (sum[2] + sum[3]), total);
#pragma GCC unroll 4
  for (int half = lanes<A> / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) total[i] += total[i + half];
  for (; k < n; ++k) total[0] += a[k] * b[k];
  return total[0];
}

// What a few samples know, [layer][sample][unit]; values and those before the activation are apart in residual networks.
template <class A>
struct Few {
  const Network<A>& network;
  const int64_t samples;
  A* memory;
  A* room;  // for a row

  static int64_t units(const Plan& plan) {
    int64_t total = 0;
    for (int64_t i = 0; i < plan.linears; ++i) total += plan.layers[i].count * (plan.residual ? 2 : 1);
    return total + 2 * plan.layers[0].count;
  }

  A* values(int64_t layer, int64_t sample) const {
    const Layer* layers = network.plan.layers;
    A* at = memory + sample * layers[layer].count;
    for (int64_t i = 0; i < layer; ++i) at += layers[i].count * samples * (network.plan.residual ? 2 : 1);
    return at;
  }
  A* before(int64_t layer, int64_t sample) const {
    const Plan& plan = network.plan;
    return values(layer, sample) + (plan.residual && plan.activated(layer) ? plan.layers[layer].count * samples : 0);
  }
  A* outputs(int64_t which, int64_t sample) const {  // u, or t
    return values(network.plan.linears, 0) + (which * samples + sample) * network.plan.layers[0].count;
  }

  // z and logs are [sample][feature], in the order of use.
  void sweep(const A* z, double* logs) const {
    const Plan& plan = network.plan;
    for (int64_t step = 0; step < plan.depth; ++step) {
      for (int64_t i = 1; i < plan.linears; ++i) hidden(i, plan.layers[i].ends[step], plan.layers[i].ends[step + 1]);
      features(plan.layers[0].ends[step], plan.layers[0].ends[step + 1], z, logs);
    }
  }

  void hidden(int64_t i, int64_t begin, int64_t end) const {
    const Plan& plan = network.plan;
    const Layer& layer = plan.layers[i];
    for (int64_t place = begin; place < end; ++place) {
      const A* row = network.row_of(i, layer.order[place], layer.prefix[place], room);
      for (int64_t j = 0; j < samples; ++j) {
        A& sum = before(i, j)[place];
        sum = dot<A>(row, values(i - 1, j), layer.prefix[place], 2 * network.row_stride(i)) + network.bias[i - 1][place];
        if (i == 1) sum += context(j, layer.order[place]);
        if (plan.added(i)) sum += before(i - 2, j)[place];
      }
    }
    for (int64_t j = 0; plan.activated(i) && j < samples; ++j)
      activate(plan.activation, before(i, j) + begin, values(i, j) + begin, end - begin);
  }

  void features(int64_t begin, int64_t end, const A* z, double* logs) const {
    const Plan& plan = network.plan;
    const int64_t last = plan.linears, count = plan.layers[0].count;
    int64_t output = 2 * begin;
    network.each_row(last, begin, end, [&](int64_t unit) {
      const int64_t place = output / 2, prefix = plan.layers[last].prefix[place];
      const A* row = network.row_of(last, unit, prefix, room);
      for (int64_t j = 0; j < samples; ++j) {
        A& sum = outputs(output % 2, j)[place];
        sum = dot<A>(row, values(last - 1, j), prefix, 2 * network.row_stride(last)) + network.bias[last - 1][output];
        if (last == 1) sum += context(j, unit);
      }
      ++output;
    });
    for (int64_t j = 0; j < samples; ++j)
      solve(plan, network.given.a, network.given.b, outputs(0, j) + begin, outputs(1, j) + begin, z + j * count + begin,
            values(0, j) + begin, logs + j * count + begin, end - begin);
  }

  A context(int64_t sample, int64_t unit) const {
    const Tensor& t = network.given.context;
    A value = A(0);
    if (t.data) read(t, sample * t.stride[0] + unit * t.stride[1], 0, nullptr, 1, &value);
    return value;
  }
};

template <class A>
void forward_few(const Autoregressive* networks, int64_t count, const Tensor& z, const Tensor& x, const Tensor& logabsdet) {
  const int64_t samples = z.size[0], features = z.size[1];
  const Buffer<A> state(samples * features), sorted(samples * features);
  const Buffer<double> logs(samples * features);
  for (int64_t i = 0; i < samples * features; ++i) logs[i] = 0;
  for (int64_t j = 0; j < samples; ++j) read(z, j * z.stride[0], z.stride[1], nullptr, features, state + j * features);
  for (int64_t k = count - 1; k >= 0; --k) {
    const Network<A> network(networks[k]);
    const Plan& plan = network.plan;
    const Buffer<A> memory(Few<A>::units(plan) * samples), room(plan.widest());
    const Few<A> known{network, samples, memory, room};
    for (int64_t i = 0; i < samples * features; ++i)
      sorted[i] = state[i / features * features + plan.layers[0].order[i % features]];
    known.sweep(sorted, logs);
    for (int64_t i = 0; i < samples * features; ++i)
      state[i / features * features + plan.source[i % features]] = known.values(0, 0)[i];
  }
  for (int64_t j = 0; j < samples; ++j) {
    write(x, j * x.stride[0], x.stride[1], nullptr, features, state + j * features);
    double total = 0;
    for (int64_t i = 0; i < features; ++i) total += logs[j * features + i];
    reinterpret_cast<A*>(logabsdet.data)[j] = A(-total);
  }
}

// --- the backward ---

// What one network's backward is given, and what it writes. `values` and `grads`, if not null, are one tensor for each linear
// layer: what it sees, and the negated gradient of what it gives.
struct Pull {
  const Autoregressive& given;
  const Tensor &grad, &grad_log, &x, &z, &dz;
  const Tensor *values, *grads;
};

// A tile before the sweep in reverse.
template <class A>
void begin_tile(const State<A>& state, const Pull& pull, int64_t first, int64_t samples) {
  const Plan& plan = state.network.plan;
  const int64_t width = state.width;
  for (int64_t i = 0; pull.values && i < plan.linears; ++i)
    write_turned<A>(state.values(i), width, pull.values[i], plan.layers[i].order, plan.layers[i].count, first, samples);
  A* entering = state.entering(0);
  if (pull.grad.data) {
    read_tile<A>(pull.grad, plan.source, first, samples, entering, width);
    for (int64_t j = 0; j < plan.layers[0].count * width; ++j) entering[j] = -entering[j];
  } else {
    std::memset(entering, 0, size_t(plan.layers[0].count * width) * sizeof(A));
  }
  for (int64_t i = 1; i < plan.linears; ++i)
    std::memset(state.entering(i), 0, size_t(plan.layers[i].count * width) * sizeof(A));
}

// A tile after it.
template <class A>
void end_tile(const State<A>& state, const Pull& pull, int64_t first, int64_t samples) {
  const Plan& plan = state.network.plan;
  const int64_t width = state.width;
  for (int64_t f = 0; f < plan.layers[0].count; ++f) {
    write_row<A>(state.values(0) + f * width, pull.z, plan.layers[0].order[f], first, samples);
    write_row<A>(state.entering(0) + f * width, pull.dz, plan.layers[0].order[f], first, samples);
  }
  for (int64_t i = 1; pull.grads && i <= plan.linears; ++i) {
    A* row = state.entering(i);
    state.network.each_row(i, 0, plan.layers[i].count, [&](int64_t unit) {
      for (int64_t j = 0; j < samples; ++j) row[j] = -row[j];
      write_row<A>(row, pull.grads[i - 1], unit, first, samples);
      row += width;
    });
  }
}

template <class A>
void backward(const Pull& pull, int threads) {
  const Tiles tiles(&pull.given, 1, pull.x.size[0], lanes<A>, threads, 4);
  const int64_t width = tiles.width;
  tiles.each_task(threads, [&](int64_t first, int64_t own) {
    const Network<A> network(pull.given);
    const Plan& plan = network.plan;
    const int64_t units = State<A>::units(plan, true) * width;
    const Buffer<A> packed(network.largest), memory(own * units), logs(own * width);
    const auto each_tile = [&](auto&& f) {
      for (int64_t tile = 0; tile < own; ++tile) {
        const State<A> state{network, width, memory + tile * units, true};
        f(state, (first + tile) * width, tiles.samples(first + tile), logs + tile * width);
      }
    };
    each_tile([&](const State<A>& state, int64_t start, int64_t samples, A* log) {
      read_tile<A>(pull.x, plan.source, start, samples, state.values(0), width);
      for (int64_t j = 0; j < width; ++j) log[j] = A(0);
      if (pull.grad_log.data) read(pull.grad_log, start * pull.grad_log.stride[0], pull.grad_log.stride[0], nullptr, samples, log);
    });
    for (int64_t panel = 0; panel < plan.panels; ++panel) {
      network.pack(panel, packed);
      each_tile([&](const State<A>& state, int64_t start, int64_t samples, A*) { state.pass(panel, packed, start, samples); });
    }
    each_tile([&](const State<A>& state, int64_t start, int64_t samples, A*) { begin_tile(state, pull, start, samples); });
    for (int64_t panel = plan.panels - 1; panel >= 0; --panel) {
      network.pack(panel, packed);
      each_tile([&](const State<A>& state, int64_t, int64_t, const A* log) { state.pull(panel, packed, log); });
    }
    each_tile([&](const State<A>& state, int64_t start, int64_t samples, A*) { end_tile(state, pull, start, samples); });
  });
}

}  // namespace

void autoregressive_inverse(const Autoregressive* networks, int64_t count, In z, Out x, Out logabsdet, int threads) {
  const bool wide = logabsdet.dtype == Dtype::float64;
  if (z.size[0] <= few) return (wide ? forward_few<double> : forward_few<float>)(networks, count, z, x, logabsdet);
  (wide ? forward<double> : forward<float>)(networks, count, z, x, logabsdet, threads);
}

void autoregressive_inverse_backward(const Autoregressive& network, In grad, In grad_log, In x, Out z, Out dz, const Tensor* values,
                                     const Tensor* grads, int threads) {
  const Pull pull{network, grad, grad_log, x, z, dz, values, grads};
  const auto run = z.dtype == Dtype::float64 ? backward<double> : backward<float>;
  if (x.size[0]) run(pull, threads);
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
