// An autoregressive network as the CPU's kernels read it: the plan, and the weights in the order of use.
#pragma once

#include "matrix.h"

namespace flowkern {
namespace FLOWKERN_ISA {

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
  int64_t widest() const {
    int64_t width = 0;
    for (int64_t i = 0; i < linears; ++i) width = layers[i].width > width ? layers[i].width : width;
    return width;
  }
  bool activated(int64_t layer) const { return !(residual && layer == linears - 1); }
  bool added(int64_t layer) const { return residual && layer >= 3 && layer % 2 == 1; }
};

// --- the weights in the order of use ---

// n elements of a tensor from `offset` on, `stride` apart or where `index` says.
template <class A>
__attribute__((noinline)) void read(const Tensor& t, int64_t offset, int64_t stride, const int32_t* index, int64_t n, A* to) {
  Operand o;
  o.data = t.data;
  o.dtype = t.dtype;
  load_rows(o, offset, stride, index, n, 0, 1, to);
}

template <class A>
__attribute__((noinline)) void write(const Tensor& t, int64_t offset, int64_t stride, const int32_t* index, int64_t n,
                                     const A* from) {
  Operand o;
  o.data = t.data;
  o.dtype = t.dtype;
  store_rows(o, offset, stride, index, n, 0, 1, from);
}

inline bool identity(const int32_t* order, int64_t n) {
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
      const Buffer<int32_t> index(plan.rows(i) * layer.count);
      int64_t count = 0;
      each_row(i, 0, layer.count, [&](int64_t row) { index[count++] = int32_t(row); });
      read(from, 0, from.stride[0], index, count, to);
      to += count;
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
  // How far the last of the rows of a panel sees; they are packed to one size.
  int64_t seen(int64_t panel, int64_t i) const { return rows(panel, i) == 0 ? 0 : plan.layers[i].prefix[end(panel, i) - 1]; }
  int64_t row_size(int64_t panel, int64_t i) const { return rows(panel, i) == 0 ? 0 : packed_row<A>(seen(panel, i)); }

  int64_t row_stride(int64_t i) const { return given.tensors[2 * (i - 1)].stride[0]; }

  // Row `row` of linear layer i as far as `prefix`, sorted: where it lies, or else copied to `room`.
  const A* row_of(int64_t i, int64_t row, int64_t prefix, A* room) const {
    const Tensor& weight = given.tensors[2 * (i - 1)];
    if (weight.dtype == dtype_of<A>() && weight.stride[1] == 1 && in_order[i - 1])
      return reinterpret_cast<const A*>(weight.data) + row * row_stride(i);
    const int32_t* index = in_order[i - 1] ? nullptr : plan.layers[i - 1].order;
    read(weight, row * row_stride(i), weight.stride[1], index, prefix, room);
    return room;
  }

  // The rows of a panel, layer after layer, each as far as it sees the layer before; zeros beyond.
  void pack(int64_t panel, A* to) const {
    for (int64_t i = 1; i <= plan.linears; ++i) {
      const Tensor& weight = given.tensors[2 * (i - 1)];
      const int32_t* index = in_order[i - 1] ? nullptr : plan.layers[i - 1].order;
      const int64_t size = row_size(panel, i), most = seen(panel, i);
      int64_t count = 0;
      each_row(i, begin(panel, i), end(panel, i), [&](int64_t row) {
        const int64_t prefix = plan.layers[i].prefix[begin(panel, i) + count++ / plan.rows(i)];
        read(weight, row * weight.stride[0], weight.stride[1], index, prefix, to);
        for (int64_t k = prefix; k < most; ++k) to[k] = A(0);
        to += size;
      });
    }
  }
};

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
