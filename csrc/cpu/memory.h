// How CPU kernels move runs of elements: from any dtype and stride into buffers of the accumulation type, and back.
//
// Tried and left out: stores that bypass the cache (a tie on one processor, 2-3 times slower on another) and prefetching
// the next block (3-7% faster on that one, 35% slower on the first): the hardware's own prefetch knows its machine best.
#pragma once

#include <cstdlib>

#include "common.h"

namespace flowkern {
namespace FLOWKERN_ISA {

constexpr int64_t block = 1024;  // elements a kernel sees at a time: buffers of them stay in the first cache

// Memory of a task, aligned to cache lines, not initialized. Throws std::bad_alloc, Python's MemoryError, if there is none.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t count) : raw_(count < most ? std::malloc(size_t(count) * sizeof(A) + 64) : nullptr) {
    if (!raw_) throw std::bad_alloc();
    const uintptr_t address = reinterpret_cast<uintptr_t>(raw_);
    data_ = reinterpret_cast<A*>((address + 63) & ~uintptr_t(63));
  }
  ~Buffer() { std::free(raw_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator A*() const { return data_; }

 private:
  static constexpr int64_t most = INT64_MAX / int64_t(sizeof(A)) - 64;
  void* raw_;
  A* data_;
};

struct Operand {
  char* data = nullptr;
  Dtype dtype = Dtype::float32;
  bool whole = false;  // x-like: channels are counted over the whole tensor
  int64_t sample = 0;  // strides in elements: from sample to sample,
  int64_t channel = 0, row = 0, column = 0;
};

template <size_t bytes>
struct UnsignedOf;
template <>
struct UnsignedOf<2> {
  using type = uint16_t;
};
template <>
struct UnsignedOf<4> {
  using type = uint32_t;
};
template <>
struct UnsignedOf<8> {
  using type = uint64_t;
};
template <size_t bytes>
using Unsigned = typename UnsignedOf<bytes>::type;

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
constexpr bool little_endian = false;
#else
constexpr bool little_endian = true;
#endif

// --- reading ---

template <class T, class A>
FLOWKERN_INLINE void load_run(const T* from, int64_t stride, const int32_t* index, int64_t n, A* to) {
  if (index) {
    for (int64_t i = 0; i < n; ++i) to[i] = A(widen(from[index[i] * stride]));
  } else if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = A(widen(from[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = A(widen(from[i * stride]));
  }
}

// The first or the second of each of n pairs.
template <class T, class A>
FLOWKERN_INLINE void load_half(const T* pairs, int which, int64_t n, A* to) {
  if constexpr (sizeof(T) == 8) {
    for (int64_t i = 0; i < n; ++i) to[i] = A(widen(pairs[2 * i + which]));
  } else {  // a pair is one integer of twice the size: whole vectors of them are loaded, and cut down
    using Pair = Unsigned<2 * sizeof(T)>;
    const int shift = int(8 * sizeof(T)) * (little_endian ? which : 1 - which);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      Pair pair;
      std::memcpy(&pair, pairs + 2 * i, sizeof(pair));
      to[i] = A(widen(bit_cast<T>(Unsigned<sizeof(T)>(pair >> shift))));
    }
  }
}

// `rows` runs of n elements, `row_step` apart, one behind the other into `to`.
template <class A>
void load_rows(const Operand& o, int64_t offset, int64_t stride, const int32_t* index, int64_t n, int64_t row_step, int64_t rows,
               A* to) {
  with_dtype(o.dtype, [&](auto* type) {
    const auto* from = reinterpret_cast<decltype(type)>(o.data) + offset;
    for (int64_t r = 0; r < rows; ++r) load_run(from + r * row_step, stride, index, n, to + r * n);
  });
}

// One colour of `rows` checkered rows of n pairs: of each pair the one numbered `which` in the first row, the other one in
// the second row, and so on.
template <class A>
void load_colour(const Operand& o, int64_t offset, int which, int64_t n, int64_t row_step, int64_t rows, A* to) {
  with_dtype(o.dtype, [&](auto* type) {
    const auto* from = reinterpret_cast<decltype(type)>(o.data) + offset;
    for (int64_t r = 0; r < rows; ++r, which ^= 1) {
      if (o.column == 1) {
        load_half(from + r * row_step, which, n, to + r * n);
      } else {
        load_run(from + r * row_step + which * o.column, 2 * o.column, nullptr, n, to + r * n);
      }
    }
  });
}

// --- writing ---

// A plain loop on purpose: the C library's memcpy turns to string instructions at these sizes, which stream worse.
template <class T>
FLOWKERN_INLINE void copy_run(const T* from, T* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

template <class T, class A>
FLOWKERN_INLINE void store_run(const A* from, T* to, int64_t stride, const int32_t* index, int64_t n) {
  if (index) {
    for (int64_t i = 0; i < n; ++i) narrow(from[i], to[index[i] * stride]);
  } else if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow(from[i], to[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) narrow(from[i], to[i * stride]);
  }
}

// The reverse of load_rows.
template <class A>
void store_rows(const Operand& o, int64_t offset, int64_t stride, const int32_t* index, int64_t n, int64_t row_step, int64_t rows,
                const A* from) {
  with_dtype(o.dtype, [&](auto* type) {
    auto* to = reinterpret_cast<decltype(type)>(o.data) + offset;
    for (int64_t r = 0; r < rows; ++r) store_run(from + r * n, to + r * row_step, stride, index, n);
  });
}

template <class T, class A>
FLOWKERN_INLINE void store_pairs(const A* first, const A* second, int64_t n, T* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    narrow(first[i], to[2 * i]);
    narrow(second[i], to[2 * i + 1]);
  }
}

// The reverse of load_colour for both colours: `own` is the one numbered `which` in the first row. `other_step`: n, or 0
// for a colour whose rows are all alike.
template <class A>
void store_colours(const Operand& o, int64_t offset, int which, int64_t n, int64_t row_step, int64_t rows, const A* own,
                   const A* other, int64_t other_step) {
  with_dtype(o.dtype, [&](auto* type) {
    auto* to = reinterpret_cast<decltype(type)>(o.data) + offset;
    for (int64_t r = 0; r < rows; ++r, which ^= 1) {
      const A *mine = own + r * n, *theirs = other + r * other_step;
      store_pairs(which ? theirs : mine, which ? mine : theirs, n, to + r * row_step);
    }
  });
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
