// The nearest code of every row: a screen of all scores x.c - |c|^2 / 2 with a bound of its error, a second look in float32
// at the few codes that it leaves, and the definition in float64, which decides. The definition stands at the top of
// flowkern/ops/_nearest_code.py.
//
// The screen works on 32-bit words: float32 values, or pairs of bfloat16 where the processor multiplies those. Codes lie in
// panels, word by word, so that vectors run over the codes. Of its scores only the best of each tile is kept: of the codes
// that share a lane in a group of panels.
//
// Why no code is lost. Let x', c' be what the screen multiplies, and |x|, |c| bounds of the norms from above. Then a score is
// wrong by at most
//     |x - x'| |c| + (|x| + |x - x'|) |c - c'| + gamma (|x| |c| + |c|^2 / 2) + tiny (1 + |x| + |c|) + 2^-44 (|x|^2 + |c|^2):
// rounding to x' and c', all sums in whatever order, underflow (the products of bfloat16 take subnormal numbers for zeros),
// and the rounding of the definition itself. Where a sum could overflow, the norm is infinite, and so is the bound. A tile is
// left out only if the best of its scores and the bound stay below another score less its bound: any comparison with a NaN
// keeps it. Rows and codes are first moved and scaled alike, so that the codes lie around 0 and near 1: the bound grows with
// their norms. What that rounds is within gamma.

#include "matrix.h"

#if defined(__AVX512F__) && (__GNUC__ >= 10 || __clang_major__ >= 9)
#define FLOWKERN_PAIRS 1
#endif

namespace flowkern {
namespace FLOWKERN_ISA {
namespace {

constexpr int64_t width = lanes<float>;
constexpr int64_t panel_codes = 2 * width;
constexpr int64_t tile = 8;  // codes
constexpr int64_t group_codes = tile * width;
constexpr int64_t block_rows = 96;  // of a thread at a time: a multiple of max_rows
constexpr int64_t few_rows = 256;   // up to so many the threads share the codes
constexpr int64_t least_depth = 4;  // of pairs: with fewer entries the bound of bfloat16 leaves too many codes

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// --- the definition: two functions, so that no compiler makes one instruction of a product and a sum ---

__attribute__((noinline)) void squared_differences(const double* a, const double* b, int64_t n, double* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = (a[i] - b[i]) * (a[i] - b[i]);
}

__attribute__((noinline)) void squares(const double* a, int64_t n, double* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = a[i] * a[i];
}

int64_t power_of_two(int64_t n) {
  int64_t size = 1;
  while (size < n) size *= 2;
  return size;
}

__attribute__((noinline)) double halving_sum(double* s, int64_t n) {
  int64_t size = power_of_two(n);
  for (int64_t i = n; i < size; ++i) s[i] = 0;
  while (size > 1) {
    size /= 2;
    const double* other = s + size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) s[i] += other[i];
  }
  return s[0];
}

// --- rows and codes as Python holds them ---

struct Matrix {
  const Tensor& t;
  bool cosine;
  const float* centre = nullptr;  // may be none
  float scale = 1;

  int64_t count() const { return t.size[0]; }
  int64_t depth() const { return t.size[1]; }

  __attribute__((noinline)) void read(int64_t i, double* to) const {
    with_dtype(t.dtype, [&](auto* type) {
      load_run(reinterpret_cast<decltype(type)>(t.data) + i * t.stride[0], t.stride[1], nullptr, depth(), to);
    });
  }

  // Row i as the definition takes it. `spare` has room for the squares.
  __attribute__((noinline)) void exact(int64_t i, double* to, double* spare) const {
    read(i, to);
    if (!cosine) return;
    squares(to, depth(), spare);
    const double norm = std::sqrt(halving_sum(spare, depth()));
    if (norm == 0) return;
    for (int64_t j = 0; j < depth(); ++j) to[j] /= norm;
  }

  // Row i in float32, moved and scaled.
  __attribute__((noinline)) void rounded(int64_t i, float* to, double* spare) const {
    if (cosine || t.dtype == Dtype::float64) {
      exact(i, spare, spare + power_of_two(depth()));
      for (int64_t j = 0; j < depth(); ++j) to[j] = float((spare[j] - double(centre ? centre[j] : 0.f)) * double(scale));
      return;
    }
    with_dtype(t.dtype, [&](auto* type) {
      load_run(reinterpret_cast<decltype(type)>(t.data) + i * t.stride[0], t.stride[1], nullptr, depth(), to);
    });
    if (centre) {
#pragma omp simd
      for (int64_t j = 0; j < depth(); ++j) to[j] -= centre[j];
    }
#pragma omp simd
    for (int64_t j = 0; j < depth(); ++j) to[j] *= scale;
  }

  bool finite(int64_t i) const {
    const Buffer<double> row(depth());
    read(i, row);
    for (int64_t j = 0; j < depth(); ++j)
      if (!(std::fabs(row[j]) < HUGE_VAL)) return false;
    return true;
  }
};

double median(double* values, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    for (int64_t j = i; j > 0 && values[j] < values[j - 1]; --j) {
      const double v = values[j];
      values[j] = values[j - 1];
      values[j - 1] = v;
    }
  return values[count / 2];
}

// Where the codes lie: of a few of them, and medians, so that no outlier spoils it. Any centre and scale are right; they only
// make the bound small. Codes that lie around 0 as they are stay there, as moving them would cost their exact bfloat16.
struct Frame {
  static constexpr int64_t most = 15;
  Buffer<float> centre;
  bool moved = false;
  float scale = 1;

  explicit Frame(const Matrix& codes) : centre(codes.depth()) {
    const int64_t depth = codes.depth(), sampled = least(codes.count(), most);
    const Buffer<double> rows(most * depth), spare(power_of_two(depth));
    int64_t count = 0;
    for (int64_t i = 0; i < sampled; ++i) {
      const int64_t k = i * codes.count() / sampled;
      if (codes.finite(k)) codes.exact(k, rows + count++ * depth, spare);
    }
    if (!count) return;
    double some[most], norms[most] = {}, distances[most] = {}, from_zero = 0;
    for (int64_t j = 0; j < depth; ++j) {
      for (int64_t i = 0; i < count; ++i) some[i] = rows[i * depth + j];
      centre[j] = float(median(some, count));
      from_zero += double(centre[j]) * double(centre[j]);
      for (int64_t i = 0; i < count; ++i) {
        const double value = rows[i * depth + j], moved_by = value - double(centre[j]);
        norms[i] += value * value;
        distances[i] += moved_by * moved_by;
      }
    }
    const double spread = std::sqrt(median(distances, count));
    moved = std::sqrt(from_zero) > spread;
    const double size = moved ? spread : std::sqrt(median(norms, count));
    if (!(size > 0 && size < HUGE_VAL)) return;
    const int exponent = std::ilogb(size);
    scale = std::ldexp(1.f, exponent > 100 ? -100 : exponent < -100 ? 100 : -exponent);
  }

  void apply(Matrix& m) const {
    m.centre = moved ? centre + 0 : nullptr;
    m.scale = scale;
  }
};

// --- norms and bounds ---

struct Norms {
  float whole, lost;  // |v| and |v - v'|, from above; infinite where products could overflow
};

struct Screen {
  bool pairs;  // of bfloat16
  int64_t depth, words, row;  // numbers of a row: values, words, and words up to whole vectors
  float gamma, tiny;

  Screen(int64_t depth, bool pairs)
      : pairs(pairs), depth(depth), words(pairs ? (depth + 1) / 2 : depth), row(padded<float>(words)) {
    const double rounding = double(depth + 16) * 0x1p-23;
    gamma = float(rounding < 0.5 ? rounding / (1 - rounding) * 1.01 : HUGE_VAL);
    tiny = float(double(depth + 16) * 0x1p-125);
  }

  float from_above(float square) const {
    const float norm = std::sqrt(square + tiny) * (1 + gamma);
    return norm < 0x1p60f ? norm : HUGE_VALF;
  }

  // The words of a row of float32, which is padded with zeros; its norms, and its square.
  __attribute__((noinline)) Norms convert(const float* v, float* to, float* square) const {
    float whole = 0, lost = 0;
    std::memset(to, 0, size_t(row) * sizeof(float));
    if (pairs) {
      uint16_t* bits = reinterpret_cast<uint16_t*>(to);
#pragma omp simd reduction(+ : whole, lost)
      for (int64_t j = 0; j < depth; ++j) {
        bfloat16 near;
        narrow(v[j], near);
        bits[j] = near.bits;
        const float rest = v[j] - widen(near);
        whole += v[j] * v[j];
        lost += rest * rest;
      }
    } else {
#pragma omp simd reduction(+ : whole)
      for (int64_t j = 0; j < depth; ++j) {
        to[j] = v[j];
        whole += v[j] * v[j];
      }
    }
    *square = whole;
    return {from_above(whole), pairs ? from_above(lost) : 0.f};
  }
};

// The bound for one row: |c| (a + h |c|) + b |c - c'| + z.
struct Bound {
  float a, b, h, z;

  Bound(const Screen& s, Norms x, bool again) {
    constexpr float up = 1.0001f;  // the rounding of all this
    const float lost = again ? 0.f : x.lost;
    a = (lost + s.gamma * x.whole + s.tiny) * up;
    b = again ? 0.f : (x.whole + x.lost) * up;
    h = (s.gamma / 2 + 0x1p-44f) * up;
    z = (s.tiny * (1 + x.whole) + 0x1p-44f * x.whole * x.whole) * up;
  }

  template <class V>
  FLOWKERN_INLINE V operator()(V whole, V lost) const {
    return whole * (a + h * whole) + b * lost + z;
  }
};

// --- the screen ---

template <class V>
FLOWKERN_INLINE V greater(V a, V b) {
  return a > b ? a : b;
}

typedef int32_t Words __attribute__((vector_size(vector_bytes)));

// sum += the products of a word of one row with those of a vector of codes.
template <bool pairs>
FLOWKERN_INLINE void add_products(Vector<float>& sum, const float* word, Vector<float> codes) {
#ifdef FLOWKERN_PAIRS
  if constexpr (pairs) {
    const Words all = Words{} + bit_cast<int32_t>(*word);
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(all));
    return;
  }
#endif
  sum += *word * codes;
}

// The best scores of max_rows rows among the codes of a panel, or of it and of those before.
template <bool pairs>
void screen_panel(const Screen& s, const float* x, const float* panel, const float* shift, bool first, float* best) {
  Vector<float> sum[max_rows][2];
#pragma GCC unroll 12
  for (int r = 0; r < max_rows; ++r) {
    sum[r][0] = load(shift);
    sum[r][1] = load(shift + width);
  }
  for (int64_t k = 0; k < s.words; ++k, panel += panel_codes) {
    const Vector<float> left = load(panel), right = load(panel + width);
#pragma GCC unroll 12
    for (int r = 0; r < max_rows; ++r) {
      add_products<pairs>(sum[r][0], x + r * s.row + k, left);
      add_products<pairs>(sum[r][1], x + r * s.row + k, right);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < max_rows; ++r) {
    Vector<float> all = greater(sum[r][0], sum[r][1]);
    if (!first) all = greater(all, load(best + r * width));
    store<float>(all, best + r * width);
  }
}

uint64_t hash_of(const float* v, int64_t n) {
  uint64_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += uint64_t(bit_cast<uint32_t>(v[j])) * (0x9e3779b97f4a7c15u * uint64_t(2 * j + 1));
  return sum;
}

bool equal(const double* a, const double* b, int64_t n) {
  for (int64_t j = 0; j < n; ++j)
    if (!(a[j] == b[j])) return false;
  return true;
}

// The codebook: what is kept of it, and its panels, one after the other or one at a time.
struct Codes {
  Matrix matrix;
  Screen screen;
  int64_t groups;
  Buffer<float> shift, whole, lost;  // by code, by tile, by tile
  Buffer<uint64_t> hash;             // by code, as is
  Buffer<uint8_t> twin;              // whether it equals an earlier one

  Codes(const Matrix& m, bool pairs)
      : matrix(m), screen(m.depth(), pairs), groups(blocks_of(m.count(), group_codes)), shift(groups * group_codes),
        whole(groups * width), lost(groups * width), hash(m.count()), twin(m.count()) {}

  int64_t panel_words() const { return screen.row * panel_codes; }

  // Panel p of a group, and what is kept of its codes.
  void pack(int64_t group, int64_t p, float* panel) const {
    const Buffer<float> rows(panel_codes * screen.row), value(matrix.depth());
    const Buffer<double> spare(2 * power_of_two(matrix.depth()));
    float *all = whole + group * width, *rest = lost + group * width;
    for (int64_t i = 0; i < panel_codes; ++i) {
      const int64_t lane = i % width;
      const Norms norms = take(group * group_codes + p * panel_codes + i, rows + i * screen.row, value, spare);
      const bool start = p == 0 && i < width;
      all[lane] = start ? norms.whole : greater(norms.whole, all[lane]);
      rest[lane] = start ? norms.lost : greater(norms.lost, rest[lane]);
    }
    transpose<float>(rows, screen.row, panel_codes, screen.row, panel, panel_codes);
  }

  // The words, the shift and the norms of code k. One that is not there, or not finite, is zeros of score -infinity; one
  // whose square overflows too, but its infinite norm says that it must be looked at again.
  Norms take(int64_t k, float* words, float* value, double* spare) const {
    shift[k] = -HUGE_VALF;
    if (k < matrix.count()) {
      float square;
      matrix.rounded(k, value, spare);
      const Norms norms = screen.convert(value, words, &square);
      hash[k] = hash_of(value, matrix.depth());
      if (square < HUGE_VALF) {
        shift[k] = -square / 2;
        return norms;
      }
    }
    std::memset(words, 0, size_t(screen.row) * sizeof(float));
    return {k < matrix.count() && matrix.finite(k) ? HUGE_VALF : 0.f, 0.f};
  }

  // A code that equals an earlier one is never the answer.
  void find_twins() const {
    const int64_t slots = power_of_two(2 * matrix.count());
    const Buffer<int64_t> table(slots);
    const Buffer<double> own(matrix.depth()), other(matrix.depth());
    for (int64_t i = 0; i < slots; ++i) table[i] = -1;
    for (int64_t k = 0; k < matrix.count(); ++k) {
      int64_t slot = int64_t(hash[k] >> 32) & (slots - 1);
      twin[k] = 0;
      for (int differing = 0; differing < 8; slot = (slot + 1) & (slots - 1)) {
        if (table[slot] < 0) {
          table[slot] = k;
          break;
        }
        if (hash[table[slot]] != hash[k]) continue;
        matrix.read(k, own);
        matrix.read(table[slot], other);
        twin[k] = equal(own, other, matrix.depth());
        if (twin[k]) break;
        ++differing;
      }
    }
  }

  void compare(const float* x, int64_t rows, int64_t p, const float* panel, int64_t group, float* best) const {
    const float* start = shift + group * group_codes + p * panel_codes;
    for (int64_t r = 0; r < rows; r += max_rows) {
#ifdef FLOWKERN_PAIRS
      if (screen.pairs) {
        screen_panel<true>(screen, x + r * screen.row, panel, start, p == 0, best + r * width);
        continue;
      }
#endif
      screen_panel<false>(screen, x + r * screen.row, panel, start, p == 0, best + r * width);
    }
  }
};

// Some rows of x for the screen.
struct Rows {
  int64_t begin, count, room;  // room: whole blocks of max_rows
  Buffer<float> words;
  Buffer<Norms> norms;

  Rows(const Matrix& x, const Screen& s, int64_t begin, int64_t count)
      : begin(begin), count(count), room(blocks_of(count, max_rows) * max_rows), words(room * s.row), norms(count) {
    const Buffer<float> value(x.depth());
    const Buffer<double> spare(2 * power_of_two(x.depth()));
    for (int64_t r = 0; r < room; ++r) {
      float square;
      if (r < count) {
        x.rounded(begin + r, value, spare);
        norms[r] = s.convert(value, words + r * s.row, &square);
      } else {
        std::memset(words + r * s.row, 0, size_t(s.row) * sizeof(float));
      }
    }
  }
};

// --- what the screen leaves ---

float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

struct Decision {
  int64_t index = 0;
  double sqdist = HUGE_VAL;
  bool again = false;
};

class Judge {
 public:
  Judge(const Matrix& x, const Codes& codes)
      : x_(x), codes_(codes), upper_(codes.groups * width), row_(x.depth()), code_(x.depth()), exact_row_(x.depth()),
        exact_code_(x.depth()), spare_(2 * power_of_two(x.depth())), left_(codes.groups * group_codes),
        left_upper_(codes.groups * group_codes) {}

  // Of row i with its norms; best: of each group `step` apart.
  Decision operator()(int64_t i, Norms norms, const float* best, int64_t step) {
    Decision found;
    if (!(norms.whole < HUGE_VALF) && special(i, found)) return found;
    const float least_best = lower(Bound(codes_.screen, norms, false), best, step);
    x_.rounded(i, row_, spare_);
    x_.exact(i, exact_row_, spare_);
    const int64_t tiles = look_again(least_best, Bound(codes_.screen, norms, true));
    for (int64_t c = 0; c < count_; ++c)
      if (!(left_upper_[c] < left_lower_)) decide(left_[c], found);
    found.again = tiles > 1;
    return found;
  }

 private:
  // Whether the row is not finite, and then what its result is.
  bool special(int64_t i, Decision& found) {
    x_.read(i, exact_row_);
    bool infinite = false, nan = false;
    for (int64_t j = 0; j < x_.depth(); ++j) {
      infinite |= std::fabs(exact_row_[j]) == HUGE_VAL;
      nan |= exact_row_[j] != exact_row_[j];
    }
    if (nan) found.sqdist = NAN;
    return infinite || nan;
  }

  // What the greatest score is at least; on the way, what every tile's best is at most.
  float lower(const Bound& bound, const float* best, int64_t step) {
    Vector<float> low = Vector<float>{} - HUGE_VALF;
    for (int64_t g = 0; g < codes_.groups; ++g) {
      const Vector<float> score = load(best + g * step);
      const Vector<float> error = bound(load(codes_.whole + g * width), load(codes_.lost + g * width));
      low = greater(score - error, low);
      store<float>(score + error, upper_ + g * width);
    }
    float least_best = low[0];
    for (int l = 1; l < width; ++l) least_best = greater(low[l], least_best);
    return least_best;
  }

  // Scores in float32 of the codes in tiles that may hold the greatest one; how many tiles.
  int64_t look_again(float least_best, const Bound& bound) {
    count_ = 0;
    left_lower_ = -HUGE_VALF;
    int64_t tiles = 0;
    for (int64_t g = 0; g < codes_.groups; ++g) {
      const float* upper = upper_ + g * width;
      int any = 0;
      for (int l = 0; l < width; ++l) any |= !(upper[l] < least_best);
      for (int l = 0; any && l < width; ++l) {
        if (upper[l] < least_best) continue;
        ++tiles;
        const float error = bound(codes_.whole[g * width + l], 0.f);
        for (int64_t k = g * group_codes + l; k < least((g + 1) * group_codes, code_count()); k += width)
          if (!codes_.twin[k]) rescore(k, error);
      }
    }
    return tiles;
  }

  int64_t code_count() const { return codes_.matrix.count(); }

  void rescore(int64_t k, float error) {
    codes_.matrix.rounded(k, code_, spare_);
    const float score = dot(row_, code_, x_.depth()) + codes_.shift[k];
    left_lower_ = greater(score - error, left_lower_);
    left_[count_] = k;
    left_upper_[count_++] = score + error;
  }

  void decide(int64_t k, Decision& found) {
    codes_.matrix.exact(k, exact_code_, spare_);
    squared_differences(exact_row_, exact_code_, x_.depth(), spare_);
    const double d = halving_sum(spare_, x_.depth());
    if (d < found.sqdist || (d == found.sqdist && k < found.index)) {
      found.sqdist = d;
      found.index = k;
    }
  }

  const Matrix& x_;
  const Codes& codes_;
  Buffer<float> upper_, row_, code_;
  Buffer<double> exact_row_, exact_code_, spare_;
  Buffer<int64_t> left_;
  Buffer<float> left_upper_;
  int64_t count_ = 0;
  float left_lower_ = 0;
};

struct Results {
  const Tensor &index, &sqdist;
  Buffer<uint8_t> again;

  void write(int64_t i, const Decision& d) const {
    reinterpret_cast<int64_t*>(index.data)[i] = d.index;
    if (sqdist.dtype == Dtype::float64) {
      reinterpret_cast<double*>(sqdist.data)[i] = d.sqdist;
    } else {
      reinterpret_cast<float*>(sqdist.data)[i] = float(d.sqdist);
    }
    again[i] = d.again;
  }
};

// Few rows: each thread packs its share of the codes as it comes to it; then the rows are shared.
void by_codes(const Matrix& x, const Codes& codes, const Results& results, int threads) {
  const Rows rows(x, codes.screen, 0, x.count());
  const int64_t step = rows.room * width, work = rows.room * codes.matrix.count() * codes.screen.words / 16;
  const Buffer<float> best(codes.groups * step);
  parallel_for(codes.groups, work + codes.matrix.count() * codes.screen.words, threads, [&](int64_t g) {
    const Buffer<float> panel(codes.panel_words());
    for (int64_t p = 0; p < tile / 2; ++p) {
      codes.pack(g, p, panel);
      codes.compare(rows.words, rows.room, p, panel, g, best + g * step);
    }
  });
  codes.find_twins();
  constexpr int64_t together = 8;
  parallel_for(blocks_of(rows.count, together), work, threads, [&](int64_t task) {
    Judge judge(x, codes);
    for (int64_t r = task * together; r < least(rows.count, (task + 1) * together); ++r)
      results.write(r, judge(r, rows.norms[r], best + r * width, step));
  });
}

// Many rows: all panels are packed first, and every thread compares its rows with them.
void by_rows(const Matrix& x, const Codes& codes, const Results& results, int threads) {
  const int64_t words = codes.panel_words(), panels = tile / 2;
  const Buffer<float> packed(codes.groups * panels * words);
  parallel_for(codes.groups, codes.groups * panels * words, threads, [&](int64_t g) {
    for (int64_t p = 0; p < panels; ++p) codes.pack(g, p, packed + (g * panels + p) * words);
  });
  codes.find_twins();
  // The results of a row do not depend on the others: the blocks may be such that all threads have work.
  const int64_t share = blocks_of(blocks_of(x.count(), 2 * threads), max_rows) * max_rows, size = least(share, block_rows);
  parallel_for(blocks_of(x.count(), size), x.count() * codes.matrix.count() * codes.screen.words / 16, threads, [&](int64_t task) {
    const Rows rows(x, codes.screen, task * size, least(size, x.count() - task * size));
    const int64_t step = rows.room * width;
    const Buffer<float> best(codes.groups * step);
    for (int64_t g = 0; g < codes.groups; ++g)
      for (int64_t p = 0; p < panels; ++p)
        codes.compare(rows.words, rows.room, p, packed + (g * panels + p) * words, g, best + g * step);
    Judge judge(x, codes);
    for (int64_t r = 0; r < rows.count; ++r)
      results.write(rows.begin + r, judge(rows.begin + r, rows.norms[r], best + r * width, step));
  });
}

bool multiplies_pairs() {
#ifdef FLOWKERN_PAIRS
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

void nearest_code(In x, In codebook, bool cosine, bool pairs, Out index, Out sqdist, Out looked, int threads) {
  Matrix rows{x, cosine}, all{codebook, cosine};
  const Frame frame(all);
  frame.apply(rows);
  frame.apply(all);
  const Codes codes(all, pairs && multiplies_pairs() && all.depth() >= least_depth);
  const Results results{index, sqdist, Buffer<uint8_t>(rows.count())};
  (rows.count() <= few_rows ? by_codes : by_rows)(rows, codes, results, threads);
  int64_t again = 0;
  for (int64_t i = 0; i < rows.count(); ++i) again += results.again[i];
  *reinterpret_cast<int64_t*>(looked.data) = again;
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
