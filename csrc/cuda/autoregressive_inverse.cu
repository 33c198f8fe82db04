// The inverse of a chain of masked autoregressive affine layers in one launch. The formulas stand at the top of
// flowkern/ops/autoregressive/inverse.py, the order of work in flowkern/ops/autoregressive/network.py.
//
// Layout. A block takes T samples at a time through the whole chain. What is known of them lies in shared memory as
// [unit][sample], the units of each layer sorted by degree: the state between the layers, then features, hidden units, and the
// outputs of one panel. Where one sample does not fit, it lies in a scratch buffer of the block. The weights are one stream in the
// order of use (flowkern/ops/autoregressive/cuda.py packs it): for each panel of each network the heads of all linear layers, then
// their tails, each as [column][row], so that neighbouring threads read neighbouring weights. Heads are the columns that are
// known before the panel and seen by all of its rows, tails the others. All blocks read the same stream at about the same time:
// after the first it comes from the second-level cache.
//
// Order of work. The heads need nothing of their panel, so the whole block multiplies them with what is known, one phase for each
// layer: a thread has one row, every so many columns and all T samples; the partial sums of a row meet in shared memory, in a
// fixed order, while the next layer's are computed. Meanwhile the tails are copied to shared memory. Then the steps of
// the panel follow one another, one phase for each layer: a thread finishes one unit of one sample, and the one that finishes a
// feature's outputs solves for the feature. Steps whose units see many new ones (few features, wide layers) multiply with
// the whole block first, as for heads.
//
// Samples never meet, so there is no barrier between blocks, no atomic operation, and NaN stays in its sample. Nothing is read before
// it is known. Every sum has a fixed order for a given tile size: the same bits each time.
//
// Cost of a tile, with w weights that the masks let through, d steps, p panels and L linear layers:
//   max(bytes of w / what a multiprocessor reads from the second-level cache, T w / its multiply-adds)
//   + d L (a barrier and some reads of shared memory that wait for each other) + p (L + 1) (a barrier and reads of the stream).
// T is in the second argument of the maximum alone, so tiles of a few samples take about as long as those of one: the launcher
// takes the smallest T with which every tile has a multiprocessor, and the largest where there is none.

#include "products.cuh"

namespace flowkern {
namespace {

// What a launch is given: addresses on the device, in elements all strides and counts.
struct Arguments {
  const void* z;
  int64_t z_row, z_column;
  void* x;
  int64_t x_row, x_column;
  void* logabsdet;
  const void *weights, *biases, *contexts;
  int64_t context_row;
  const int32_t* table;
  const double* constants;  // a and b of each network's scale map
  void* scratch;            // null: what is known lies in shared memory
  int64_t batch, features, networks;
  int64_t units, staged;  // per sample of what is known, and room for tails
};

// --- the plan ---

// The rows of a linear layer in a panel: places [first, last); units that are known before the panel, and seen by the last row.
struct Rows {
  int first, last, known, top, twice;  // twice: rows of a place, 2 for the outputs
  FLOWKERN_DEVICE int count() const { return twice * (last - first); }
  FLOWKERN_DEVICE int64_t head() const { return int64_t(count()) * known; }
  FLOWKERN_DEVICE int64_t tail() const { return int64_t(count()) * (top - known); }
};

// One network's part of the table; flowkern/ops/autoregressive/cuda.py says how it is laid out.
struct Network {
  static constexpr int header = 12, per_layer = 4;
  const int32_t* table;

  FLOWKERN_DEVICE int at(int64_t i) const { return load(table + i); }
  FLOWKERN_DEVICE int size() const { return at(0); }
  FLOWKERN_DEVICE int linears() const { return at(1); }
  FLOWKERN_DEVICE int depth() const { return at(2); }
  FLOWKERN_DEVICE int panels() const { return at(3); }
  FLOWKERN_DEVICE int activation() const { return at(4); }
  FLOWKERN_DEVICE int scale() const { return at(5); }
  FLOWKERN_DEVICE bool residual() const { return at(6) != 0; }
  FLOWKERN_DEVICE bool gated() const { return at(7) != 0; }
  FLOWKERN_DEVICE int context() const { return at(8); }  // its first column among the contexts, or -1
  FLOWKERN_DEVICE int order(int place) const { return at(at(9) + place); }
  FLOWKERN_DEVICE int source(int place) const { return at(at(10) + place); }
  FLOWKERN_DEVICE int values(int layer) const { return at(header + per_layer * layer); }
  FLOWKERN_DEVICE int before(int layer) const { return at(header + per_layer * layer + 1); }
  FLOWKERN_DEVICE int biases(int layer) const { return at(header + per_layer * layer + 2); }
  FLOWKERN_DEVICE int prefix(int layer, int place) const { return at(at(header + per_layer * layer + 3) + int64_t(place)); }
  // Units of a layer that are finished before a step: the features as outputs are those as inputs.
  FLOWKERN_DEVICE int end(int layer, int step) const {
    const int64_t n = linears();
    return at(header + per_layer * (n + 1) + (layer == n ? 0 : layer) * int64_t(depth() + 1) + step);
  }
  FLOWKERN_DEVICE const int32_t* panel(int p) const { return table + at(11) + int64_t(p) * (2 + 4 * linears()); }
  FLOWKERN_DEVICE Rows rows(int p, int layer) const {
    const int32_t* r = panel(p) + 4 * layer - 2;
    return {load(r), load(r + 1), load(r + 2), load(r + 3), layer == linears() ? 2 : 1};
  }
  FLOWKERN_DEVICE bool activated(int layer) const { return !(residual() && layer == linears() - 1); }
  FLOWKERN_DEVICE bool added(int layer) const { return residual() && layer >= 3 && layer % 2 == 1; }
};

// --- elementary functions ---

// The positions in ACTIVATIONS of flowkern/ops/autoregressive/network.py.
template <class A>
FLOWKERN_DEVICE A activate(int activation, A v) {
  switch (activation) {
    case 0: return v < A(0) ? A(0) : v;  // NaN passes
    case 1: return v < A(0) ? A(0.01) * v : v;
    case 2: return v > A(0) ? v : expm1(v);
    case 3: return A(0.5) * v * (A(1) + erf(v * A(0.70710678118654752440)));
    case 4: return v / (A(1) + exp(-v));
    case 5: return tanh(v);
    default: return A(1) / (A(1) + exp(-v));
  }
}

// s and log s of a raw output.
template <class A>
FLOWKERN_DEVICE A scale_of(int scale, A a, A b, A u, A& log_s) {
  switch (scale) {
    case 0: log_s = u; break;
    case 1: {
      const A v = u + a, e = exp(-abs(v)), s = (v >= A(0) ? A(1) : e) / (A(1) + e) + b;
      log_s = b == A(0) ? (v > A(0) ? A(0) : v) - log1p(e) : v > A(0) ? log1p(b - e / (A(1) + e)) : log(s);
      return s;
    }
    case 2: {
      const A s = (u < A(0) ? A(0) : u) + log1p(exp(-abs(u))) + a;
      log_s = a == A(0) && u < A(-40) ? u : log(s);  // u to the last digit, where s goes on to 0
      return s;
    }
    case 3: log_s = a * tanh(u / a); break;
    case 4: log_s = A(0.636) * a * atan(u); break;
    default: {
      const A most = a * A(sizeof(A) == 8 ? 1e300 : 1e30);  // an infinite u would give infinity / infinity
      const A limited = u > most ? most : u < -most ? -most : u;
      log_s = limited / (A(1) + abs(limited / a));
    }
  }
  return exp(log_s);
}

// --- the sweep ---

// scratch: where what is known lies, so that its addresses are known to be global, or shared.
template <class A, class W, int T, bool scratch>
struct Inverse {
  static constexpr int threads = threads_for<T>, groups = threads / T;
  static constexpr int few = 32;  // columns that one thread multiplies by itself

  const Block& block;
  const Arguments& in;
  A* memory;
  A* partial;  // two buffers, used by turns
  W* stage;
  PerThread<A> logs;
  int64_t sample = 0;  // the first one of the tile
  Network network{};
  const W* stream = nullptr;
  A a = 0, b = 0;

  static FLOWKERN_DEVICE void run(const Block& block, char* shared, const Arguments& in) {
    A* free = reinterpret_cast<A*>(shared);
    A* memory = free;
    if constexpr (scratch)
      memory = static_cast<A*>(in.scratch) + block.index() * in.units * T;
    else
      free += in.units * T;
    Inverse sweep{block, in, memory, free, reinterpret_cast<W*>(free + 2 * threads * T), {}};
    for (int64_t tile = block.index(); tile * T < in.batch; tile += block.count()) sweep.whole_chain(tile * T);
  }

  FLOWKERN_DEVICE void whole_chain(int64_t first) {
    sample = first;
    stream = static_cast<const W*>(in.weights);
    network.table = in.table;
    read();
    for (int64_t k = 0; k < in.networks; ++k) {
      a = A(load(in.constants + 2 * k));
      b = A(load(in.constants + 2 * k + 1));
      for (int p = 0; p < network.panels(); ++p) {
        int64_t head = 0, tail = 0;
        for (int i = 1; i <= network.linears(); ++i) {
          head += network.rows(p, i).head();
          tail += network.rows(p, i).tail();
        }
        const bool staged = tail <= in.staged;
        heads(p, staged ? tail : 0, stream + head);
        if (staged)
          steps<true>(p, stage);
        else
          steps<false>(p, stream + head);
        stream += head + tail;
      }
      block.each([&](int thread) {
        for (int64_t item = thread; item < in.features * T; item += threads)
          memory[int64_t(network.source(int(item / T))) * T + item % T] = values(0)[item];
      });
      network.table += network.size();
    }
    write();
  }

  FLOWKERN_DEVICE A* values(int layer) const { return memory + int64_t(network.values(layer)) * T; }
  FLOWKERN_DEVICE A* before(int layer) const { return memory + int64_t(network.before(layer)) * T; }
  // The sums of a panel's rows: those of the outputs lie where those of every panel do.
  FLOWKERN_DEVICE A* sums(int layer, const Rows& rows) const {
    return layer == network.linears() ? before(layer) : before(layer) + int64_t(rows.first) * T;
  }

  // Samples past the end of the batch are zeros.
  FLOWKERN_DEVICE void read() {
    block.each([&](int thread) {
      for (int64_t item = thread; item < in.features * T; item += threads) {
        const int64_t f = item % in.features, s = item / in.features;
        const A* z = static_cast<const A*>(in.z) + (sample + s) * in.z_row + f * in.z_column;
        memory[f * T + s] = sample + s < in.batch ? load(z) : A(0);
      }
      logs[thread] = A(0);
    });
  }

  // The logs of a sample are summed in pairs.
  FLOWKERN_DEVICE void write() {
    block.each([&](int thread) {
      for (int64_t item = thread; item < in.features * T; item += threads) {
        const int64_t f = item % in.features, s = item / in.features;
        if (sample + s < in.batch) static_cast<A*>(in.x)[(sample + s) * in.x_row + f * in.x_column] = memory[f * T + s];
      }
      partial[thread] = logs[thread];
    });
    for (int n = threads / 2; n >= T; n /= 2)
      block.each([&](int thread) {
        if (thread < n) partial[thread] += partial[thread + n];
      });
    block.each([&](int thread) {
      if (thread < T && sample + thread < in.batch) static_cast<A*>(in.logabsdet)[sample + thread] = -partial[thread];
    });
  }

  // What the rows of a panel get from all that is known before it. Meanwhile ``size`` weights of the tails are staged.
  FLOWKERN_DEVICE void heads(int p, int64_t size, const W* tails) {
    const W* weights = stream;
    block.each([&](int thread) {
      for (int64_t i = thread; i < size; i += threads) stage[i] = load(tails + i);
      start(p, thread);
    });
    Product<A, W> last;
    A *buffer = partial, *other = partial + threads * T;
    for (int i = 1; i <= network.linears(); ++i) {
      const Rows rows = network.rows(p, i);
      for (int row = 0; row < rows.count() && rows.known > 0; row += threads) {
        const int count = rows.count() - row < threads ? rows.count() - row : threads;
        const Product<A, W> next{weights + row, rows.count(), count, rows.known, values(i - 1), sums(i, rows) + int64_t(row) * T};
        block.each([&](int thread) {
          multiply<A, W, T, false>(next, thread, threads, buffer);
          if (last.rows) collect<A, W, T>(last, thread, threads, other);
        });
        last = next;
        A* const swapped = buffer;
        buffer = other;
        other = swapped;
      }
      weights += rows.head();
    }
    if (last.rows) block.each([&](int thread) { collect<A, W, T>(last, thread, threads, other); });
  }

  // The sums start as the biases and the context's term.
  FLOWKERN_DEVICE void start(int p, int thread) {
    for (int i = 1; i <= network.linears(); ++i) {
      const Rows rows = network.rows(p, i);
      const int64_t first = int64_t(rows.twice) * rows.first;
      const A* biases = static_cast<const A*>(in.biases) + network.biases(i) + first;
      A* out = sums(i, rows);
      for (int64_t item = thread; item < int64_t(rows.count()) * T; item += threads) {
        A sum = load(biases + item / T);
        const int64_t s = sample + item % T;
        if (i == 1 && network.context() >= 0 && s < in.batch)
          sum += load(static_cast<const A*>(in.contexts) + s * in.context_row + network.context() + first + item / T);
        out[item] = sum;
      }
    }
  }

  // The steps: each computes the units of every layer that can be computed now, and the features that follow from them.
  // Staged weights lie in shared memory, the others in global.
  template <bool staged>
  FLOWKERN_DEVICE void steps(int p, const W* tails) {
    for (int step = load(network.panel(p)); step < load(network.panel(p) + 1); ++step) {
      const W* weights = tails;
      for (int i = 1; i <= network.linears(); ++i) {
        const Rows rows = network.rows(p, i);
        const int begin = network.end(i, step), end = network.end(i, step + 1);
        if (begin < end) finish<staged>(i, rows, begin, end, weights, common<staged>(i, rows, begin, end, weights));
        weights += rows.tail();
      }
    }
  }

  // Where the rows of a step all see many units of their panel, the whole block multiplies. How far that went.
  template <bool staged>
  FLOWKERN_DEVICE int common(int i, const Rows& rows, int begin, int end, const W* weights) {
    const int seen = rows.top - rows.known > few ? network.prefix(i, begin) : rows.known;
    if (seen - rows.known <= few) return rows.known;
    const int first = rows.twice * (begin - rows.first), count = rows.twice * (end - begin);
    for (int row = 0; row < count; row += threads) {
      const int some = count - row < threads ? count - row : threads;
      const Product<A, W> product{weights + first + row,        rows.count(), some, seen - rows.known,
                                  values(i - 1) + int64_t(rows.known) * T, sums(i, rows) + int64_t(first + row) * T};
      block.each([&](int thread) { multiply<A, W, T, staged>(product, thread, threads, partial); });
      block.each([&](int thread) { collect<A, W, T>(product, thread, threads, partial); });
    }
    return seen;
  }

  // The rest of the rows' sums, and what follows from them. A place always has the same threads, so that their logs spread over all.
  template <bool staged>
  FLOWKERN_DEVICE void finish(int i, const Rows& rows, int begin, int end, const W* weights, int from) {
    block.each([&](int thread) {
      const int s = thread % T, group = thread / T;
      for (int place = begin + ((group - begin) & (groups - 1)); place < end; place += groups) {
        const int64_t row = int64_t(rows.twice) * (place - rows.first);
        const W* weight = weights + int64_t(from - rows.known) * rows.count() + row;
        const A* known = values(i - 1) + int64_t(from) * T + s;
        const int columns = network.prefix(i, place) - from;
        A* sum = sums(i, rows) + row * T + s;
        if (i < network.linears())
          unit<staged>(i, place, s, sum, weight, rows.count(), known, columns);
        else
          feature<staged>(place, s, sum, weight, rows.count(), known, columns, logs[thread]);
      }
    });
  }

  template <bool staged>
  FLOWKERN_DEVICE void unit(int i, int place, int s, A* sum, const W* weight, int64_t stride, const A* known, int columns) {
    A v = *sum;
#pragma unroll 4
    for (int k = 0; k < columns; ++k) v += A(value_of(read_weight<staged>(weight + k * stride))) * known[int64_t(k) * T];
    if (network.added(i)) v += before(i - 2)[int64_t(place) * T + s];
    *sum = v;
    if (network.activated(i)) values(i)[int64_t(place) * T + s] = activate(network.activation(), v);
  }

  template <bool staged>
  FLOWKERN_DEVICE void feature(int place, int s, const A* sum, const W* weight, int64_t stride, const A* known, int columns, A& total) {
    A u = sum[0], t = sum[T];
#pragma unroll 4
    for (int k = 0; k < columns; ++k) {
      const A v = known[int64_t(k) * T];
      u += A(value_of(read_weight<staged>(weight + k * stride))) * v;
      t += A(value_of(read_weight<staged>(weight + k * stride + 1))) * v;
    }
    A log_s;
    const A scale = scale_of(network.scale(), a, b, u, log_s), z = memory[int64_t(network.order(place)) * T + s];
    values(0)[int64_t(place) * T + s] = (z - (network.gated() ? (A(1) - scale) * t : t)) / scale;
    total += log_s;
  }
};

}  // namespace

#ifdef __CUDACC_RTC__

// One variant, which the compilation names.
using Variant = Inverse<FLOWKERN_VALUE, FLOWKERN_WEIGHT, FLOWKERN_TILE, FLOWKERN_SCRATCH>;
static_assert(Variant::threads == FLOWKERN_THREADS, "the launcher starts other blocks");

extern "C" __global__ void __launch_bounds__(Variant::threads, 1) autoregressive_inverse(const Arguments arguments) {
  run<Variant>(arguments);
}

#else

template <class A, class W, int T>
using InScratch = Inverse<A, W, T, true>;
template <class A, class W, int T>
using InShared = Inverse<A, W, T, false>;

extern "C" bool autoregressive_inverse(const Arguments& in, bool wide, bool half_weights, int64_t tile, int64_t blocks, int64_t shared,
                                       bool descending) {
  return in.scratch ? run_variant<InScratch>(wide, half_weights, tile, blocks, shared, descending, in)
                    : run_variant<InShared>(wide, half_weights, tile, blocks, shared, descending, in);
}

#endif

}  // namespace flowkern
