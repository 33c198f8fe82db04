// Products of a matrix with the samples of a tile, by all threads of a block: one phase multiplies, the next one collects.
#pragma once

#include "common.cuh"

namespace flowkern {

// Threads of a block for T samples; TILES of flowkern/ops/autoregressive/cuda.py says so too, and the compilation compares.
template <int T>
constexpr int threads_for = T > 8 ? 256 : 512;

// out += weights * values: weights are [column][stride], values and out [unit][T].
template <class A, class W>
struct Product {
  const W* weights = nullptr;
  int64_t stride = 0;
  int rows = 0, columns = 0;  // at most one row for each thread
  const A* values = nullptr;
  A* out = nullptr;
  bool fresh = false;  // out = instead

  FLOWKERN_DEVICE int slices(int threads) const { return threads / rows < columns ? threads / rows : columns; }
};

// Staged weights lie in shared memory, which the read-only cache does not serve.
template <bool staged, class W>
FLOWKERN_DEVICE W read_weight(const W* from) {
  if constexpr (staged) return *from;
  return load(from);
}

template <class A, class W, int T, bool staged>
FLOWKERN_DEVICE void multiply(const Product<A, W>& p, int thread, int threads, A* partial) {
  constexpr int unroll = 8;  // reads that are under way together
  constexpr int width = T * sizeof(A) <= 16 ? T : 16 / int(sizeof(A));
  const int slices = p.slices(threads), slice = thread / p.rows;
  if (slice >= slices) return;
  const int64_t step = slices * p.stride;
  const W* weight = p.weights + slice * p.stride + thread % p.rows;
  A sum[T];
#pragma unroll
  for (int s = 0; s < T; ++s) sum[s] = A(0);
  for (int k = slice; k < p.columns; k += unroll * slices, weight += unroll * step) {
    A w[unroll];
#pragma unroll
    for (int j = 0; j < unroll; ++j) {
      const W* from = weight + j * step;
      w[j] = k + j * slices < p.columns ? A(value_of(read_weight<staged>(from))) : A(0);
    }
#pragma unroll
    for (int j = 0; j < unroll; ++j) {
      if (k + j * slices >= p.columns) break;  // what follows is not known
      const auto* from = reinterpret_cast<const Values<A, width>*>(p.values + int64_t(k + j * slices) * T);
#pragma unroll
      for (int v = 0; v < T / width; ++v) {
        const Values<A, width> h = from[v];
#pragma unroll
        for (int s = 0; s < width; ++s) sum[v * width + s] += w[j] * h.value[s];
      }
    }
  }
#pragma unroll
  for (int s = 0; s < T; ++s) partial[s * threads + thread] = sum[s];
}

template <class A, class W, int T>
FLOWKERN_DEVICE void collect(const Product<A, W>& p, int thread, int threads, const A* partial) {
  const int slices = p.slices(threads);
  for (int item = thread; item < p.rows * T; item += threads) {
    const int row = item % p.rows, s = item / p.rows;
    A sum = A(0);
    for (int i = 0; i < slices; ++i) sum += partial[s * threads + i * p.rows + row];
    A& out = p.out[int64_t(row) * T + s];
    out = p.fresh ? sum : out + sum;
  }
}

#ifndef __CUDACC_RTC__

template <template <class, class, int> class Kernel, class A, class W, int... tiles, class Arguments>
bool run_tile(int64_t tile, int64_t blocks, int64_t shared, bool descending, const Arguments& in) {
  return ((tile == tiles && (run<Kernel<A, W, tiles>>(blocks, shared, descending, in), true)) || ...);
}

// A variant of a kernel on the host: in double, or in float with weights of float or bfloat16; false if there is none for the tile.
template <template <class, class, int> class Kernel, class Arguments>
bool run_variant(bool wide, bool half_weights, int64_t tile, int64_t blocks, int64_t shared, bool descending, const Arguments& in) {
  if (wide) return run_tile<Kernel, double, double, 1, 4>(tile, blocks, shared, descending, in);
  return half_weights ? run_tile<Kernel, float, Bfloat16, 1, 4, 8, 16>(tile, blocks, shared, descending, in)
                      : run_tile<Kernel, float, float, 1, 4, 8, 16>(tile, blocks, shared, descending, in);
}

#endif

}  // namespace flowkern
