// Products of matrices, in one register-blocked kernel: out (rows x columns) = a (rows x count) b (count x columns).
//
// The columns lie side by side in b and in out and fill whole vectors; a has any strides, as its elements are broadcast
// one by one. The order of every sum is that of `count`, whatever the number of threads.
#pragma once

#include "memory.h"

namespace flowkern {
namespace FLOWKERN_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, max_rows = 12;  // 24 of 32 registers hold sums
#elif defined(__AVX__)
constexpr int vector_bytes = 32, max_rows = 6;  // 12 of 16
#else
constexpr int vector_bytes = 16, max_rows = 4;  // 8 of 16: products need registers of their own
#endif

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(vector_bytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(vector_bytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
constexpr int lanes = vector_bytes / int(sizeof(A));

template <class A>
FLOWKERN_INLINE Vector<A> load(const A* from) {
  Vector<A> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
template <class A>
FLOWKERN_INLINE void store(Vector<A> v, A* to) {
  std::memcpy(to, &v, sizeof(v));
}

// Columns, rounded up to whole vectors.
template <class A>
constexpr int64_t padded(int64_t columns) {
  return (columns + lanes<A> - 1) / lanes<A> * lanes<A>;
}

// What a sum is added to: nothing, one value per row, one per column, or what stands in `out`.
enum class Plus { nothing, rows, columns, out };

template <class A>
struct Product {
  const A* a = nullptr;
  int64_t a_row = 0, a_step = 1;
  const A* b = nullptr;
  int64_t b_step = 0, count = 0;
  A* out = nullptr;
  int64_t out_row = 0;
  Plus plus = Plus::nothing;
  const A* start = nullptr;  // for Plus::rows and Plus::columns
};

template <class A, int R, int V>
void panel(const Product<A>& p, int64_t row, int64_t column) {
  Vector<A> sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      sum[r][v] = Vector<A>{};
      if (p.plus == Plus::rows) sum[r][v] += p.start[row + r];
      if (p.plus == Plus::columns) sum[r][v] = load(p.start + column + v * lanes<A>);
    }
  }
  const A *a = p.a + row * p.a_row, *b = p.b + column;
  for (int64_t k = 0; k < p.count; ++k, a += p.a_step, b += p.b_step) {
    Vector<A> right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) right[v] = load(b + v * lanes<A>);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const A left = a[r * p.a_row];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    A* to = p.out + (row + r) * p.out_row + column;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      if (p.plus == Plus::out) sum[r][v] += load(to + v * lanes<A>);
      store<A>(sum[r][v], to + v * lanes<A>);
    }
  }
}

template <class A, int V>
FLOWKERN_INLINE void panel_of(const Product<A>& p, int64_t rows, int64_t row, int64_t column) {
  switch (rows) {
    case 1: return panel<A, 1, V>(p, row, column);
    case 2: return panel<A, 2, V>(p, row, column);
    case 3: return panel<A, 3, V>(p, row, column);
#if defined(__AVX__)
    case 4: return panel<A, 4, V>(p, row, column);
    case 5: return panel<A, 5, V>(p, row, column);
#endif
#if defined(__AVX512F__)
    case 6: return panel<A, 6, V>(p, row, column);
    case 7: return panel<A, 7, V>(p, row, column);
    case 8: return panel<A, 8, V>(p, row, column);
    case 9: return panel<A, 9, V>(p, row, column);
    case 10: return panel<A, 10, V>(p, row, column);
    case 11: return panel<A, 11, V>(p, row, column);
#endif
    default: return panel<A, max_rows, V>(p, row, column);
  }
}

// Rows [begin, end) of the product, and all columns up to `columns`, which is a multiple of the lanes.
template <class A>
void multiply(const Product<A>& p, int64_t begin, int64_t end, int64_t columns) {
  const int64_t blocks = (end - begin + max_rows - 1) / max_rows;  // of about the same size
  for (int64_t column = 0; column < columns; column += 2 * lanes<A>) {
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t row = begin + (end - begin) * i / blocks, rows = begin + (end - begin) * (i + 1) / blocks - row;
      if (columns - column > lanes<A>) {
        panel_of<A, 2>(p, rows, row, column);
      } else {
        panel_of<A, 1>(p, rows, row, column);
      }
    }
  }
}

// The product on several threads, by blocks of rows.
template <class A>
void multiply_parallel(const Product<A>& p, int64_t rows, int64_t columns, int threads) {
  constexpr int64_t together = 2 * max_rows;
  const int64_t tasks = (rows + together - 1) / together;
  parallel_for(tasks, rows * columns * p.count / 16, threads, [&](int64_t task) {
    const int64_t end = (task + 1) * together;
    multiply(p, task * together, end < rows ? end : rows, columns);
  });
}

// --- transposition, of squares of lanes x lanes values in registers ---

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FLOWKERN_SHUFFLE 1
#endif
#endif

#ifdef FLOWKERN_SHUFFLE
template <int... I>
struct Lanes {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Lanes<I...>;
};

// Exchanges the off-diagonal squares of size S in all squares of size 2 S.
template <class A, int S, int... I>
FLOWKERN_INLINE void exchange(Vector<A>* v, Lanes<I...>) {
  constexpr int n = lanes<A>;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (i & S) continue;
    const Vector<A> a = v[i], b = v[i + S];
    v[i] = __builtin_shufflevector(a, b, ((I & S) ? n + I - S : I)...);
    v[i + S] = __builtin_shufflevector(a, b, ((I & S) ? n + I : I + S)...);
  }
}

template <class A>
FLOWKERN_INLINE void transpose_square(const A* from, int64_t from_row, A* to, int64_t to_row) {
  constexpr int n = lanes<A>;
  using All = typename Count<n>::type;
  Vector<A> v[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) v[i] = load(from + i * from_row);
  if constexpr (n > 8) exchange<A, 8>(v, All());
  if constexpr (n > 4) exchange<A, 4>(v, All());
  if constexpr (n > 2) exchange<A, 2>(v, All());
  exchange<A, 1>(v, All());
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) store<A>(v[i], to + i * to_row);
}
#else
template <class A>
FLOWKERN_INLINE void transpose_square(const A* from, int64_t from_row, A* to, int64_t to_row) {
  for (int i = 0; i < lanes<A>; ++i)
    for (int j = 0; j < lanes<A>; ++j) to[j * to_row + i] = from[i * from_row + j];
}
#endif

// to[j][i] = from[i][j]; both numbers are multiples of the lanes.
template <class A>
void transpose(const A* from, int64_t from_row, int64_t rows, int64_t columns, A* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i += lanes<A>)
    for (int64_t j = 0; j < columns; j += lanes<A>)
      transpose_square(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
