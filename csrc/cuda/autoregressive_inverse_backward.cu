// The reverse sweep of a chain of masked autoregressive affine layers in one launch: the gradient of z, and those of all units before
// their activations. The formulas stand at the top of flowkern/ops/autoregressive/inverse.py; the networks' passes before it and
// the products that make the parameters' gradients after it are torch's.
//
// Layout. A block takes T samples at a time through the whole chain. The gradients of the units of one network lie in shared memory
// as [unit][sample], or in a scratch buffer of the block; what the passes left, and what is found, in one buffer of rows
// [row][sample of the batch]. The weights are one stream in the order of use, each group as [summed unit][unit], with
// zeros where the masks hide one.
//
// Order of work. It is a list of instructions that flowkern/ops/autoregressive/cuda_backward.py writes, in reverse order of the
// steps: products by the whole block with what later steps found, and the units of a step, one thread for a unit of a sample, which
// add what the later steps of their own panel found. Every sum has a fixed order for a given tile size, and samples never meet.

#include "products.cuh"

namespace flowkern {
namespace {

// What a launch is given.
struct Arguments {
  void* rows;  // [row][sample of the batch]
  const void* weights;
  const int32_t *instructions, *entering;
  void* scratch;  // null: the units lie in shared memory
  int64_t batch, features, count, units;
};

enum Kind { product, hidden, features };

// Units [0, n) and the sum over k others that each of them sees. -1: there is none.
struct Instruction {
  int kind, n, k;
  int weights, stride;  // of the unit 0 and the first of the others, and from one of the others to the next
  int values, sums;     // places of the others' gradients, and of what is known of the sums
  int first;            // product: whether it is the first one of the sums. hidden: row of the slope. features: row of the scale,
                        // and a layer's features further on each those of dz by raw output and by shift, and of dL by raw output
  int added;            // hidden: place of a gradient to add. features: of the number of the row that enters
  int target, row;      // place and row of the result, of features (u, t) by turns
  int solved;           // features: row of the gradient of z
};
constexpr int instruction_size = 12;

FLOWKERN_DEVICE Instruction instruction(const int32_t* from) {
  return {load(from),     load(from + 1), load(from + 2), load(from + 3), load(from + 4),  load(from + 5),
          load(from + 6), load(from + 7), load(from + 8), load(from + 9), load(from + 10), load(from + 11)};
}

// scratch: where the units' gradients lie, so that their addresses are known to be global, or shared.
template <class A, class W, int T, bool scratch>
struct Backward {
  static constexpr int threads = threads_for<T>;

  const Block& block;
  const Arguments& in;
  A* memory;
  A* partial;
  int64_t sample = 0;  // the first one of the tile

  static FLOWKERN_DEVICE void run(const Block& block, char* shared, const Arguments& in) {
    A* free = reinterpret_cast<A*>(shared);
    A* memory = free;
    if constexpr (scratch)
      memory = static_cast<A*>(in.scratch) + block.index() * in.units * T;
    else
      free += in.units * T;
    Backward sweep{block, in, memory, free};
    for (int64_t tile = block.index(); tile * T < in.batch; tile += block.count()) {
      sweep.sample = tile * T;
      for (int64_t i = 0; i < in.count; ++i) sweep.execute(instruction(in.instructions + i * instruction_size));
    }
  }

  FLOWKERN_DEVICE void execute(const Instruction& i) {
    if (i.kind == product) return multiplied(i);
    block.each([&](int thread) {
      for (int item = thread; item < i.n * T; item += threads) {
        const int unit = item / T, s = item % T;
        const A sum = summed(i, unit, s);
        if (i.kind == hidden)
          finish_hidden(i, unit, s, sum);
        else
          finish_feature(i, unit, s, sum);
      }
    });
  }

  FLOWKERN_DEVICE const W* weights(const Instruction& i) const { return static_cast<const W*>(in.weights) + i.weights; }
  FLOWKERN_DEVICE A& at(int place, int s) const { return memory[int64_t(place) * T + s]; }

  // Samples past the end of the batch are of zeros.
  FLOWKERN_DEVICE A row(int number, int s) const {
    return sample + s < in.batch ? static_cast<const A*>(in.rows)[number * in.batch + sample + s] : A(0);
  }
  FLOWKERN_DEVICE void set_row(int number, int s, A value) const {
    if (sample + s < in.batch) static_cast<A*>(in.rows)[number * in.batch + sample + s] = value;
  }

  FLOWKERN_DEVICE void multiplied(const Instruction& i) {
    for (int unit = 0; unit < i.n; unit += threads) {
      const int some = i.n - unit < threads ? i.n - unit : threads;
      const Product<A, W> part{weights(i) + unit, i.stride, some, i.k, &at(i.values, 0), &at(i.sums + unit, 0), i.first != 0};
      block.each([&](int thread) { multiply<A, W, T, false>(part, thread, threads, partial); });
      block.each([&](int thread) { collect<A, W, T>(part, thread, threads, partial); });
    }
  }

  FLOWKERN_DEVICE A summed(const Instruction& i, int unit, int s) const {
    A sum = i.sums < 0 ? A(0) : at(i.sums + unit, s);
    const W* weight = weights(i) + unit;
#pragma unroll 4
    for (int k = 0; k < i.k; ++k) sum += A(value_of(load(weight + int64_t(k) * i.stride))) * at(i.values + k, s);
    return sum;
  }

  FLOWKERN_DEVICE void finish_hidden(const Instruction& i, int unit, int s, A sum) const {
    if (i.first >= 0) sum *= row(i.first + unit, s);
    if (i.added >= 0) sum += at(i.added + unit, s);
    at(i.target + unit, s) = sum;
    set_row(i.row + unit, s, sum);
  }

  FLOWKERN_DEVICE void finish_feature(const Instruction& i, int unit, int s, A sum) const {
    const int d = int(in.features), scale = i.first + unit;
    const A entering = row(load(in.entering + i.added + unit), s) - sum;
    const A v = sample + s < in.batch ? entering / row(scale, s) : A(0);
    const A by_raw = row(scale + d, s) * entering + row(scale + 3 * d, s), by_shift = row(scale + 2 * d, s) * v;
    at(i.target + 2 * unit, s) = by_raw;
    at(i.target + 2 * unit + 1, s) = by_shift;
    set_row(i.row + 2 * unit, s, by_raw);
    set_row(i.row + 2 * unit + 1, s, by_shift);
    set_row(i.solved + unit, s, v);
  }
};

}  // namespace

#ifdef __CUDACC_RTC__

// One variant, which the compilation names.
using Variant = Backward<FLOWKERN_VALUE, FLOWKERN_WEIGHT, FLOWKERN_TILE, FLOWKERN_SCRATCH>;
static_assert(Variant::threads == FLOWKERN_THREADS, "the launcher starts other blocks");

extern "C" __global__ void __launch_bounds__(Variant::threads, 1) autoregressive_inverse_backward(const Arguments arguments) {
  run<Variant>(arguments);
}

#else

template <class A, class W, int T>
using InScratch = Backward<A, W, T, true>;
template <class A, class W, int T>
using InShared = Backward<A, W, T, false>;

extern "C" bool autoregressive_inverse_backward(const Arguments& in, bool wide, bool half_weights, int64_t tile, int64_t blocks, int64_t shared,
                                                bool descending) {
  return in.scratch ? run_variant<InScratch>(wide, half_weights, tile, blocks, shared, descending, in)
                    : run_variant<InShared>(wide, half_weights, tile, blocks, shared, descending, in);
}

#endif

}  // namespace flowkern
