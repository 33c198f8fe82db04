// Couplings on any strides: the elements that a split transforms (or keeps) as nests of at most three loops.
//
// A nest is a set of elements of one sample, addressed alike in several operands: the whole tensors (x, y and their
// gradients) and the conditioner's parts (scale, shift and theirs). `walk` hands a kernel contiguous runs in the
// accumulation type: straight from memory where that is what lies there, else through small buffers.
#pragma once

#include "../coupling.h"
#include "common.h"

namespace flowkern {
namespace FLOWKERN_ISA {

constexpr int max_operands = 7;
constexpr int64_t block = 1024;  // elements a kernel sees at a time: seven buffers of them stay in the first cache
constexpr int64_t segment = 32768;  // elements of a sample that are one task, whatever the number of threads

struct Operand {
  char* data = nullptr;
  Dtype dtype = Dtype::float32;
  bool whole = false;  // x-like: channels are counted over the whole tensor
  int64_t sample = 0;  // strides in elements: from sample to sample,
  int64_t channel = 0, row = 0, column = 0;
};

// (B, C) or (B, C, H, W), given as the strides of an operand of up to four dimensions.
inline Operand operand(const Tensor& t, bool whole, int64_t offset = 0, int64_t channel_step = 1) {
  Operand o;
  o.data = t.data + offset * (t.dtype == Dtype::float64 ? 8 : t.dtype == Dtype::float32 ? 4 : 2);
  o.dtype = t.dtype;
  o.whole = whole;
  o.sample = t.stride[0];
  o.channel = t.stride[1] * channel_step;
  if (t.dims >= 4) {
    o.row = t.stride[2];
    o.column = t.stride[3];
  }
  return o;
}

struct Axis {
  int64_t count = 1;
  const int32_t* index = nullptr;  // channel numbers for the whole operands, if they are not an arithmetic sequence
  int64_t stride[max_operands] = {};
};

struct Nest {
  int operands = 0;
  Operand operand[max_operands];
  int64_t base[max_operands] = {};
  Axis axis[3];  // axis[2] is the innermost
  bool plain = false;  // a sample is one run of at most a block, contiguous and in the accumulation type in all operands

  int64_t rows() const { return axis[0].count * axis[1].count; }
  int64_t pieces() const { return rows() * ((axis[2].count + block - 1) / block); }
  int64_t elements() const { return rows() * axis[2].count; }

  int64_t step(int a, int k, int64_t i) const {
    const Axis& ax = axis[a];
    return (ax.index && operand[k].whole ? int64_t(ax.index[i]) : i) * ax.stride[k];
  }
};

// Merges neighbouring axes that lie behind each other in every operand.
inline void collapse(Nest& nest) {
  for (int outer = 1; outer >= 0; --outer) {
    Axis &a = nest.axis[outer], &b = nest.axis[2];
    if (outer == 0 && nest.axis[1].count != 1) return;
    bool mergeable = !a.index && !b.index;
    for (int k = 0; k < nest.operands; ++k) mergeable = mergeable && (a.count == 1 || a.stride[k] == b.stride[k] * b.count);
    if (!mergeable) return;
    b.count *= a.count;
    a.count = 1;
    for (int k = 0; k < nest.operands; ++k) a.stride[k] = 0;
  }
}

template <class A>
bool is_plain(const Nest& nest) {
  const Axis& inner = nest.axis[2];
  bool plain = nest.rows() == 1 && inner.count > 0 && inner.count <= block && !inner.index;
  for (int k = 0; k < nest.operands; ++k)
    plain = plain && nest.operand[k].dtype == dtype_of<A>() && (inner.stride[k] == 1 || inner.count == 1);
  return plain && !nest.axis[0].index && !nest.axis[1].index;
}

// The elements of one sample that `split` transforms, or keeps, as one nest, or two for the rows of a checkerboard.
template <class A>
int make_nests(const Coupling& c, bool transformed, const Operand* operands, int count, Nest out[2]) {
  const bool checkered = c.split == Split::checkerboard || c.split == Split::checkerboard_swap;
  const bool second_half = (c.split == Split::channel) == transformed;
  const int64_t kept = c.channels - c.channels / 2;
  for (int phase = 0; phase < (checkered ? 2 : 1); ++phase) {
    Nest& nest = out[phase];
    nest = Nest();
    nest.operands = count;
    Axis channel, row, column;
    channel.count = c.channels;
    row.count = c.height;
    column.count = c.width;
    int64_t first_channel = 0, first_column = 0;
    if (c.split == Split::mask) {
      channel.count = transformed ? c.moved_count : c.channels - c.moved_count;
      channel.index = transformed ? c.moved : c.kept;
    } else if (checkered) {
      const int transformed_parity = c.split == Split::checkerboard ? 1 : 0;
      first_column = (phase + (transformed ? transformed_parity : 1 - transformed_parity)) & 1;
      row.count = (c.height - phase + 1) / 2;
      column.count = (c.width - first_column + 1) / 2;
    } else {
      first_channel = second_half ? kept : 0;
      channel.count = second_half ? c.channels - kept : kept;
    }
    const int64_t spread = checkered ? 2 : 1;
    bool channel_inside = true;
    for (int k = 0; k < count; ++k) {
      const Operand& o = operands[k];
      nest.operand[k] = o;
      channel.stride[k] = o.channel;
      row.stride[k] = o.row * spread;
      column.stride[k] = o.column * spread;
      nest.base[k] = (o.whole ? first_channel * o.channel : 0) + (checkered ? phase * o.row + first_column * o.column : 0);
      channel_inside = channel_inside && (o.channel == 1 || !o.whole);
    }
    const bool vector = c.height * c.width == 1;
    nest.axis[0] = channel_inside || vector ? row : channel;
    nest.axis[1] = channel_inside || vector ? column : row;
    nest.axis[2] = channel_inside || vector ? channel : column;
    collapse(nest);
    nest.plain = is_plain<A>(nest);
  }
  return checkered ? 2 : 1;
}

template <class A>
void load_run(const Operand& o, int64_t offset, int64_t stride, const int32_t* index, int64_t n, A* to) {
  with_dtype(o.dtype, [&](auto* type) {
    const auto* from = reinterpret_cast<decltype(type)>(o.data) + offset;
    if (index) {
      for (int64_t i = 0; i < n; ++i) to[i] = A(widen(from[index[i] * stride]));
    } else if (stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = A(widen(from[i]));
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = A(widen(from[i * stride]));
    }
  });
}

template <class A>
void store_run(const Operand& o, int64_t offset, int64_t stride, const int32_t* index, int64_t n, const A* from) {
  with_dtype(o.dtype, [&](auto* type) {
    auto* to = reinterpret_cast<decltype(type)>(o.data) + offset;
    if (index) {
      for (int64_t i = 0; i < n; ++i) narrow(from[i], to[index[i] * stride]);
    } else if (stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) narrow(from[i], to[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) narrow(from[i], to[i * stride]);
    }
  });
}

// Asks for the block at `p`, which comes next: the hardware's own prefetch stops at every page. Past the end it does nothing.
template <class A>
FLOWKERN_INLINE void prefetch_run(const A* p, bool to_write) {
  const char* bytes = reinterpret_cast<const char*>(p);
  for (size_t i = 0; i < block * sizeof(A); i += 64) {
    if (to_write) {
      __builtin_prefetch(bytes + i, 1);
    } else {
      __builtin_prefetch(bytes + i, 0);
    }
  }
}

// A run of one operand inside a nest: where it starts, and how it goes on.
struct Run {
  int64_t offset, stride;
  const int32_t* index;
};

inline Run run_at(const Nest& nest, int k, int64_t sample, int64_t row, int64_t start) {
  const Axis& inner = nest.axis[2];
  int64_t outside = sample * nest.operand[k].sample + nest.base[k];
  if (row) {  // small samples are one row: they need not wait for divisions
    const int64_t columns = nest.axis[1].count;
    outside += columns == 1 ? nest.step(0, k, row) : nest.step(0, k, row / columns) + nest.step(1, k, row % columns);
  } else {
    outside += nest.step(0, k, 0) + nest.step(1, k, 0);
  }
  if (inner.index && nest.operand[k].whole) return {outside, inner.stride[k], inner.index + start};
  return {outside + start * inner.stride[k], inner.stride[k], nullptr};
}

// Calls body(pointers, n) over the pieces [begin, end) of one sample's nest; the first `inputs` operands are read,
// the others written. Short rows are gathered until they fill a block.
template <class A, class Body>
void walk(const Nest& nest, int inputs, int64_t sample, int64_t begin, int64_t end, Body&& body) {
  A* pointer[max_operands];
  if (nest.plain) {  // small samples: the setup below would take longer than the work
    if (begin == end) return;
    for (int k = 0; k < nest.operands; ++k)
      pointer[k] = reinterpret_cast<A*>(nest.operand[k].data) + sample * nest.operand[k].sample + nest.base[k];
    return body(pointer, nest.axis[2].count);
  }
  A buffer[max_operands][block];
  const int64_t length = nest.axis[2].count, per_row = (length + block - 1) / block;
  // Rows that share a block.
  const int64_t together = per_row == 1 && length < 64 && nest.rows() > 1 ? block / length : 1;
  for (int64_t piece = begin; piece < end; piece += together) {
    const int64_t row = per_row == 1 ? piece : piece / per_row, start = (piece - row * per_row) * block;
    const int64_t n = length - start < block ? length - start : block;
    const int64_t rows = end - piece < together ? end - piece : together;
    bool direct[max_operands];
    for (int k = 0; k < nest.operands; ++k) {
      const Run run = run_at(nest, k, sample, row, start);
      direct[k] = rows == 1 && nest.operand[k].dtype == dtype_of<A>() && !run.index && (run.stride == 1 || n == 1);
      pointer[k] = direct[k] ? reinterpret_cast<A*>(nest.operand[k].data) + run.offset : buffer[k];
      if (direct[k] || k >= inputs) continue;
      for (int64_t r = 0; r < rows; ++r) {
        const Run at = run_at(nest, k, sample, row + r, start);
        load_run(nest.operand[k], at.offset, at.stride, at.index, n, buffer[k] + r * n);
      }
    }
    for (int k = 0; k < nest.operands; ++k)
      if (direct[k] && n == block) prefetch_run(pointer[k] + n, k >= inputs);
    body(pointer, rows * n);
    for (int k = inputs; k < nest.operands; ++k) {
      if (direct[k]) continue;
      for (int64_t r = 0; r < rows; ++r) {
        const Run at = run_at(nest, k, sample, row + r, start);
        store_run(nest.operand[k], at.offset, at.stride, at.index, n, buffer[k] + r * n);
      }
    }
  }
}

// Segment s of S of a nest's pieces.
inline int64_t segment_begin(const Nest& nest, int64_t s, int64_t segments) {
  return segments == 1 ? nest.pieces() * s : nest.pieces() * s / segments;
}

// A plain loop on purpose: the C library's memcpy turns to string instructions at these sizes, which stream worse.
template <class A>
FLOWKERN_INLINE void copy_run(const A* from, A* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

inline int64_t segments_of(const Coupling& c) {
  const int64_t sample = c.channels * c.height * c.width;
  return sample > segment ? (sample + segment - 1) / segment : 1;
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
