// W = P L U from its factors, and the backward: triangular products that skip the zeros. The formulas stand at the top of
// flowkern/ops/_plu_weight.py.

#include "../checks.h"
#include "matrix.h"

namespace flowkern {
namespace FLOWKERN_ISA {
namespace {

Operand matrix(const Tensor& t) {
  Operand o;
  o.data = t.data;
  o.dtype = t.dtype;
  return o;
}

// Elements [begin, end) of row i of a matrix, or of a vector (i = 0).
template <class A>
void read(const Tensor& t, int64_t i, int64_t begin, int64_t end, A* to) {
  const int64_t along = t.stride[t.dims - 1], row = t.dims == 2 ? i * t.stride[0] : 0;
  load_rows(matrix(t), row + begin * along, along, nullptr, end - begin, 0, 1, to);
}

template <class A>
void write(const Tensor& t, int64_t i, int64_t n, const A* from) {
  const int64_t along = t.stride[t.dims - 1], row = t.dims == 2 ? i * t.stride[0] : 0;
  store_rows(matrix(t), row, along, nullptr, n, 0, 1, from);
}

int64_t target(const Tensor& permutation, int64_t i) {
  return reinterpret_cast<const int64_t*>(permutation.data)[i * permutation.stride[0]];
}

template <class A>
void fill(A* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = A(0);
}

// L and U, `width` to a row, and zeros elsewhere.
template <class A>
void unpack(const Tensor& lower, const Tensor& upper, const Tensor& log_diagonal, const Tensor& sign, int64_t width, A* l, A* u) {
  const int64_t n = lower.size[0];
  const Buffer<A> logs(n), signs(n);
  read(log_diagonal, 0, 0, n, logs + 0);
  read(sign, 0, 0, n, signs + 0);
  for (int64_t i = 0; i < n; ++i) {
    A *li = l + i * width, *ui = u + i * width;
    fill(li, width);
    fill(ui, width);
    read(lower, i, 0, i, li);
    li[i] = A(1);
    ui[i] = signs[i] * exp_(logs[i]);
    read(upper, i, i + 1, n, ui + i + 1);
  }
}

// Calls f(begin, end, column, columns) for the blocks of an n x n product; a task has one block of rows from the top and
// one from the bottom, as triangles have rows of all lengths.
template <class A, class F>
void each_block(int64_t n, int64_t width, int threads, F&& f) {
  const int64_t blocks = (n + max_rows - 1) / max_rows;
  const auto row_of_blocks = [&](int64_t i) {
    const int64_t begin = n * i / blocks, end = n * (i + 1) / blocks;
    for (int64_t column = 0; column < width; column += 2 * lanes<A>)
      f(begin, end, column, width - column < 2 * lanes<A> ? width - column : 2 * lanes<A>);
  };
  parallel_for((blocks + 1) / 2, n * n * n / 24, threads, [&](int64_t task) {
    row_of_blocks(task);
    if (blocks - 1 - task != task) row_of_blocks(blocks - 1 - task);
  });
}

template <class A>
Product<A> product(const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t width, int64_t count, A* out) {
  Product<A> p;
  p.a = a;
  p.a_row = a_row;
  p.a_step = a_step;
  p.b = b;
  p.b_step = width;
  p.count = count;
  p.out = out;
  p.out_row = width;
  return p;
}

template <class A>
void forward(const Tensor& lower, const Tensor& upper, const Tensor& log_diagonal, const Tensor& sign, const Tensor& permutation,
             const Tensor& weight, int threads) {
  const int64_t n = lower.size[0], width = padded<A>(n);
  const Buffer<A> l(n * width), u(n * width), lu(n * width);
  unpack(lower, upper, log_diagonal, sign, width, l + 0, u + 0);
  each_block<A>(n, width, threads, [&](int64_t begin, int64_t end, int64_t column, int64_t columns) {
    // Row r of L ends at r, and column c of U too.
    const int64_t last = column + columns, count = last < end ? last : end;
    multiply(product<A>(l, width, 1, u + column, width, count, lu + column), begin, end, columns);
  });
  for (int64_t i = 0; i < n; ++i) write<A>(weight, i, n, lu + target(permutation, i) * width);
}

template <class A>
void backward(const Tensor& grad, const Tensor& lower, const Tensor& upper, const Tensor& log_diagonal, const Tensor& sign,
              const Tensor& permutation, const Tensor& dlower, const Tensor& dupper, const Tensor& dlog_diagonal, int threads) {
  const int64_t n = lower.size[0], width = padded<A>(n);
  const Buffer<A> l(n * width), u(width * width), g(n * width), flipped(width * width), by_lower(n * width), by_upper(n * width);
  unpack(lower, upper, log_diagonal, sign, width, l + 0, u + 0);
  fill(u + n * width, (width - n) * width);
  transpose<A>(u, width, width, width, flipped, width);
  fill(g + 0, n * width);
  const Buffer<A> row(n);
  for (int64_t i = 0; i < n; ++i) {
    A* to = g + target(permutation, i) * width;
    read(grad, i, 0, n, row + 0);
    for (int64_t j = 0; j < n; ++j) to[j] += row[j];
  }
  each_block<A>(n, width, threads, [&](int64_t begin, int64_t end, int64_t column, int64_t columns) {
    // Row c of U begins at c, and column r of L at r.
    if (column < end)
      multiply(product<A>(g + column, width, 1, flipped + column * width + column, width, n - column, by_lower + column), begin, end,
               columns);
    if (column + columns > begin)
      multiply(product<A>(l + begin * width, 1, width, g + begin * width + column, width, n - begin, by_upper + column), begin, end,
               columns);
  });
  for (int64_t r = 0; r < n; ++r) {
    A *by_l = by_lower + r * width, *by_u = by_upper + r * width;
    row[r] = by_u[r] * u[r * width + r];
    fill(by_l + r, n - r);
    fill(by_u, r + 1);
    write(dlower, r, n, by_l);
    write(dupper, r, n, by_u);
  }
  write<A>(dlog_diagonal, 0, n, row);
}

bool in_double(const Tensor& a, const Tensor& b, const Tensor& c) {
  return a.dtype == Dtype::float64 || b.dtype == Dtype::float64 || c.dtype == Dtype::float64;
}

}  // namespace

void plu_weight(In lower, In upper, In log_diagonal, In sign, In permutation, Out weight, int threads) {
  check_permutation(permutation, lower.size[0]);
  const auto run = in_double(lower, upper, log_diagonal) ? forward<double> : forward<float>;
  run(lower, upper, log_diagonal, sign, permutation, weight, threads);
}

void plu_weight_backward(In grad, In lower, In upper, In log_diagonal, In sign, In permutation, Out dlower, Out dupper,
                         Out dlog_diagonal, int threads) {
  check_permutation(permutation, lower.size[0]);
  const auto run = in_double(lower, upper, log_diagonal) ? backward<double> : backward<float>;
  run(grad, lower, upper, log_diagonal, sign, permutation, dlower, dupper, dlog_diagonal, threads);
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
