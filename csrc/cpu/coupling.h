// Couplings on any strides: the elements that a split transforms (or keeps) as nests of at most three loops.
//
// A nest is a set of elements of one sample, addressed alike in several operands: the whole tensors (x, y and their
// gradients) and the conditioner's parts (scale, shift and theirs). `walk` hands a kernel contiguous runs in the
// accumulation type: straight from memory where that is what lies there, else through small buffers.
#pragma once

#include "../checks.h"
#include "memory.h"

namespace flowkern {
namespace FLOWKERN_ISA {

// The numbers are the positions in flowkern.ops.SPLITS; a mask comes after them.
enum class Split : int { channel = 0, channel_swap = 1, checkerboard = 2, checkerboard_swap = 3, mask = 4 };

// What a coupling of x does. A mask comes as the place of each channel among the transformed ones, -1 for one that is kept;
// `params` has `per_channel` numbers for each transformed element.
struct Coupling {
  int64_t batch, channels, height, width;
  Split split;
  bool inverse;
  int threads;
  const int32_t *moved = nullptr, *kept = nullptr;  // channel numbers, for Split::mask
  int64_t moved_count = 0;
  Buffer<int32_t> order;  // the channels that a mask transforms, and then those that it keeps

  Coupling(const Tensor& x, const Tensor& place, const Tensor& params, int64_t per_channel, int split, bool inverse, int threads)
      : batch(x.size[0]),
        channels(x.size[1]),
        height(x.dims >= 4 ? x.size[2] : 1),
        width(x.dims >= 4 ? x.size[3] : 1),
        split(static_cast<Split>(split)),
        inverse(inverse),
        threads(threads),
        order(place.data ? channels : 0) {
    if (!place.data) return;
    check_mask(place, channels, per_channel * batch * height * width, params);
    const auto kept_at = [&](int64_t i) { return reinterpret_cast<const int32_t*>(place.data)[i * place.stride[0]] < 0; };
    for (int64_t i = 0; i < channels; ++i)
      if (!kept_at(i)) order[moved_count++] = int32_t(i);
    int64_t count = moved_count;
    for (int64_t i = 0; i < channels; ++i)
      if (kept_at(i)) order[count++] = int32_t(i);
    moved = order;
    kept = order + moved_count;
  }
};

constexpr int max_operands = 7;
constexpr int64_t segment = 65536;  // elements of a sample that are one task, whatever the number of threads

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
  // All rows of a checkerboard, with the colour that is not the nest's (walk_colours). `first`: which one of a pair is the
  // nest's in row 0.
  bool checkered = false;
  int first = 0;

  int64_t rows() const { return axis[0].count * axis[1].count; }
  int64_t pieces() const { return rows() * ((axis[2].count + block - 1) / block); }
  int64_t elements() const { return rows() * axis[2].count; }

  int64_t step(int a, int k, int64_t i) const {
    const Axis& ax = axis[a];
    return (ax.index && operand[k].whole ? int64_t(ax.index[i]) : i) * ax.stride[k];
  }
};

// Whether axis b lies behind axis a in every operand, so that both are one.
inline bool continues(const Nest& nest, const Axis& a, const Axis& b) {
  bool yes = !a.index && !b.index;
  for (int k = 0; k < nest.operands; ++k) yes = yes && (a.count == 1 || a.stride[k] == b.stride[k] * b.count);
  return yes;
}

// Merges neighbouring axes, the inner ones first; what is left outside goes to axis 1 where it can.
inline void collapse(Nest& nest) {
  Axis &outer = nest.axis[0], &middle = nest.axis[1], &inner = nest.axis[2];
  const auto merge = [&](Axis& a, Axis& b) {
    b.count *= a.count;
    a = Axis();
  };
  if (continues(nest, middle, inner)) merge(middle, inner);
  if (middle.count == 1 && continues(nest, outer, inner)) merge(outer, inner);
  if (middle.count == 1 && !outer.index) {
    middle = outer;
    outer = Axis();
  } else if (continues(nest, outer, middle)) {
    merge(outer, middle);
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

// Whether both colours of a checkerboard can go in one walk: their rows must be rows of pairs in memory.
inline bool pairs_colours(const Coupling& c, const Operand* outputs, int count) {
  bool pairs = c.width % 2 == 0 && c.width > 0;
  for (int k = 0; k < count; ++k) pairs = pairs && outputs[k].column == 1 && outputs[k].channel != 1;
  return pairs;
}

inline Nest checkered_nest(const Coupling& c, const Operand* operands, int count) {
  Nest nest;
  nest.operands = count;
  nest.checkered = true;
  nest.first = c.split == Split::checkerboard ? 1 : 0;
  const int64_t counts[] = {c.channels, c.height, c.width / 2};
  for (int a = 0; a < 3; ++a) nest.axis[a].count = counts[a];
  for (int k = 0; k < count; ++k) {
    const Operand& o = nest.operand[k] = operands[k];
    const int64_t strides[] = {o.channel, o.row, 2 * o.column};
    for (int a = 0; a < 3; ++a) nest.axis[a].stride[k] = strides[a];
  }
  return nest;
}

// The elements of one sample that `split` transforms, or keeps, as one nest, or two for the rows of a checkerboard.
// Those that a checkerboard keeps need none where they go along with the transformed ones.
template <class A>
int make_nests(const Coupling& c, bool transformed, const Operand* operands, int inputs, int count, Nest out[2]) {
  const bool checkered = c.split == Split::checkerboard || c.split == Split::checkerboard_swap;
  const bool second_half = (c.split == Split::channel) == transformed;
  const int64_t kept = c.channels - c.channels / 2;
  if (checkered && pairs_colours(c, operands + inputs, count - inputs)) {
    out[0] = checkered_nest(c, operands, count);
    return transformed ? 1 : 0;
  }
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

// Calls f(run, r, same, step) for stretches of `same` rows, r rows behind the first, that lie `step` apart.
template <class F>
FLOWKERN_INLINE void each_stretch(const Nest& nest, int k, int64_t sample, int64_t row, int64_t rows, int64_t start, F&& f) {
  const int64_t columns = nest.axis[1].count;
  for (int64_t r = 0; r < rows;) {
    const int64_t left = columns - (row + r) % columns, same = rows - r < left ? rows - r : left;
    f(run_at(nest, k, sample, row + r, start), r, same, nest.axis[1].stride[k]);
    r += same;
  }
}

// What a walk does with each piece: f(pointers, n), whatever the type of f, so that a walk is compiled once.
template <class A>
struct Body {
  const void* f;
  void (*call)(const void* f, A* const* pointer, int64_t n);

  template <class F>
  explicit Body(const F& function)
      : f(&function), call([](const void* g, A* const* pointer, int64_t n) { (*static_cast<const F*>(g))(pointer, n); }) {}
  void operator()(A* const* pointer, int64_t n) const { call(f, pointer, n); }
};

// walk (below) for all rows of a checkerboard: in the other colour the first output takes over operand 0 and the other
// outputs are zero. So memory is passed through once, in order.
template <class A>
void walk_colours(const Nest& nest, int inputs, int64_t sample, int64_t begin, int64_t end, const Body<A>& body) {
  static const A zeros[block] = {};
  A buffer[max_operands][block], kept[block], *pointer[max_operands];
  const int64_t length = nest.axis[2].count, per_row = (length + block - 1) / block, height = nest.axis[1].count;
  const int64_t together = per_row == 1 ? block / length : 1;
  for (int k = 0; k < nest.operands; ++k) pointer[k] = buffer[k];
  for (int64_t piece = begin; piece < end; piece += together) {
    const int64_t row = piece / per_row, start = (piece - row * per_row) * block;
    const int64_t n = length - start < block ? length - start : block;
    const int64_t rows = end - piece < together ? end - piece : together;
    const auto which = [&](int64_t r) { return (nest.first + int((row + r) % height)) & 1; };
    const auto load = [&](int k, int other, A* to) {
      each_stretch(nest, k, sample, row, rows, start, [&](const Run& at, int64_t r, int64_t same, int64_t step) {
        load_colour(nest.operand[k], at.offset, which(r) ^ other, n, step, same, to + r * n);
      });
    };
    for (int k = 0; k < inputs; ++k) load(k, 0, buffer[k]);
    load(0, 1, kept);
    body(pointer, rows * n);
    for (int k = inputs; k < nest.operands; ++k) {
      each_stretch(nest, k, sample, row, rows, start, [&](const Run& at, int64_t r, int64_t same, int64_t step) {
        const A* other = k == inputs ? kept + r * n : zeros;
        store_colours(nest.operand[k], at.offset, which(r), n, step, same, buffer[k] + r * n, other, k == inputs ? n : 0);
      });
    }
  }
}

// Calls body(pointers, n) over the pieces [begin, end) of one sample's nest; the first `inputs` operands are read,
// the others written. Short rows are gathered until they fill a block.
template <class A>
void walk(const Nest& nest, int inputs, int64_t sample, int64_t begin, int64_t end, const Body<A>& body) {
  A* pointer[max_operands];
  if (nest.plain) {  // small samples: the setup below would take longer than the work
    if (begin == end) return;
    for (int k = 0; k < nest.operands; ++k)
      pointer[k] = reinterpret_cast<A*>(nest.operand[k].data) + sample * nest.operand[k].sample + nest.base[k];
    return body(pointer, nest.axis[2].count);
  }
  if (nest.checkered) return walk_colours<A>(nest, inputs, sample, begin, end, body);
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
      direct[k] = false;
      if (rows == 1 && nest.operand[k].dtype == dtype_of<A>()) {
        const Run run = run_at(nest, k, sample, row, start);
        direct[k] = !run.index && (run.stride == 1 || n == 1);
        pointer[k] = reinterpret_cast<A*>(nest.operand[k].data) + run.offset;
      }
      if (direct[k]) continue;
      pointer[k] = buffer[k];
      if (k >= inputs) continue;
      each_stretch(nest, k, sample, row, rows, start, [&](const Run& at, int64_t r, int64_t same, int64_t step) {
        load_rows(nest.operand[k], at.offset, at.stride, at.index, n, step, same, buffer[k] + r * n);
      });
    }
    body(pointer, rows * n);
    for (int k = inputs; k < nest.operands; ++k) {
      if (direct[k]) continue;
      each_stretch(nest, k, sample, row, rows, start, [&](const Run& at, int64_t r, int64_t same, int64_t step) {
        store_rows(nest.operand[k], at.offset, at.stride, at.index, n, step, same, buffer[k] + r * n);
      });
    }
  }
}

// Segment s of S of a nest's pieces.
inline int64_t segment_begin(const Nest& nest, int64_t s, int64_t segments) {
  return segments == 1 ? nest.pieces() * s : nest.pieces() * s / segments;
}

inline int64_t segments_of(const Coupling& c) {
  const int64_t sample = c.channels * c.height * c.width;
  return sample > segment ? (sample + segment - 1) / segment : 1;
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
