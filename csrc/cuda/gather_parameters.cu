// The parameters of a chain of masked networks, gathered from their tensors in the order in which the sweeps read them: all of them
// by one launch. They are gathered in each call: nothing says whether a tensor was written to since the last one, for not every
// write counts as one (a replayed CUDA graph, an edit of `.data`, another library's kernel).
//
// The elements of all tensors are numbered through, one tensor after the other, row by row; a list of numbers says what comes where.
// Terms of contexts have a row for each sample, and a number for each column. A number below 0 stands for a zero.

#include "products.cuh"

namespace flowkern {
namespace {

// As many as fit into the 4 KB that every driver takes as arguments: SOURCES of flowkern/ops/autoregressive/cuda_gather.py.
constexpr int most_sources = 96;

// One tensor: its address, its first number, its strides, and 8 times its columns plus the code of its dtype.
struct Source {
  const void* data;
  int64_t first, row, column, columns_and_kind;
};

struct Arguments {
  const void* numbers;
  void *weights, *values;              // values: biases, and then the terms of contexts, sample by sample
  int64_t wide;                        // whether numbers have 64 bits
  int64_t weight_count, bias_count, context_count, batch;
  int64_t begin, end;                  // the numbers of these sources
  int64_t count;
  Source sources[most_sources];
};
static_assert(sizeof(Arguments) <= 4096, "more than what a kernel may be given");

template <class A>
FLOWKERN_DEVICE A element(const Source& source, int64_t at) {
  switch (source.columns_and_kind & 7) {
    case 0: return A(load(static_cast<const double*>(source.data) + at));
    case 1: return A(load(static_cast<const float*>(source.data) + at));
    case 2: return A(value_of(load(static_cast<const Bfloat16*>(source.data) + at)));
    default: return A(value_of(Float16{load(static_cast<const uint16_t*>(source.data) + at)}));
  }
}

template <class A, class W, int>
struct Gather {
  static constexpr int threads = 256;

  static FLOWKERN_DEVICE void run(const Block& block, char*, const Arguments& in) {
    const int64_t single = in.weight_count + in.bias_count, total = single + in.batch * in.context_count;
    block.each([&](int thread) {
      for (int64_t i = block.index() * threads + thread; i < total; i += block.count() * threads) {
        const int64_t sample = i < single ? 0 : (i - single) / in.context_count;
        const int64_t place = i < single ? i : single + (i - single) % in.context_count;
        const int64_t number = in.wide ? load(static_cast<const int64_t*>(in.numbers) + place)
                                       : int64_t(load(static_cast<const int32_t*>(in.numbers) + place));
        // A zero is the first launch's.
        if (number < 0 ? in.begin > 0 : number < in.begin || number >= in.end) continue;
        const A value = number < 0 ? A(0) : find(in, number, sample);
        if (i < in.weight_count)
          narrow(value, static_cast<W*>(in.weights)[i]);
        else
          static_cast<A*>(in.values)[i - in.weight_count] = value;
      }
    });
  }

  static FLOWKERN_DEVICE A find(const Arguments& in, int64_t number, int64_t sample) {
    int low = 0;
    for (int high = int(in.count); high - low > 1;) {
      const int middle = (low + high) / 2;
      (in.sources[middle].first <= number ? low : high) = middle;
    }
    const Source& source = in.sources[low];
    const int64_t offset = number - source.first, columns = source.columns_and_kind >> 3;
    const int64_t row = offset >> 32 ? offset / columns : int64_t(uint32_t(offset) / uint32_t(columns));
    return element<A>(source, (row + sample) * source.row + (offset - row * columns) * source.column);
  }
};

}  // namespace

#ifdef __CUDACC_RTC__

using Variant = Gather<FLOWKERN_VALUE, FLOWKERN_WEIGHT, FLOWKERN_TILE>;
static_assert(Variant::threads == FLOWKERN_THREADS, "the launcher starts other blocks");

// The arguments are read where they lie: there is an index among them.
extern "C" __global__ void __launch_bounds__(Variant::threads) gather_parameters(const __grid_constant__ Arguments arguments) {
  run<Variant>(arguments);
}

#else

extern "C" bool gather_parameters(const Arguments& in, bool wide, bool half_weights, int64_t tile, int64_t blocks, int64_t shared,
                                  bool descending) {
  return run_variant<Gather>(wide, half_weights, tile, blocks, shared, descending, in);
}

#endif

}  // namespace flowkern
