// Random numbers from counters: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
// flowkern/_core/philox.py says which number belongs to which element.
#pragma once

#include "memory.h"

namespace flowkern {
namespace FLOWKERN_ISA {

constexpr int64_t group = 64;  // elements that 16 counters serve: word w of counter i goes to element 16 w + i

struct Philox {
  uint32_t key[2], offset[2];

  Philox(const Tensor& seed, int64_t stream) {
    const uint64_t s = *reinterpret_cast<const uint64_t*>(seed.data);
    key[0] = uint32_t(s);
    key[1] = uint32_t(s >> 32);
    offset[0] = uint32_t(uint64_t(stream));
    offset[1] = uint32_t(uint64_t(stream) >> 32);
  }

  // Of elements [64 g, 64 g + 64) of a sample.
  FLOWKERN_INLINE void bits(int64_t sample, int64_t g, uint32_t* out) const {
#pragma omp simd
    for (int i = 0; i < 16; ++i) {
      uint32_t c0 = uint32_t(16 * g) + uint32_t(i), c1 = uint32_t(sample), c2 = offset[0], c3 = offset[1];
      uint32_t k0 = key[0], k1 = key[1];
      for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(b >> 32) ^ c1 ^ k0;
        c2 = uint32_t(a >> 32) ^ c3 ^ k1;
        c1 = uint32_t(b);
        c3 = uint32_t(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      out[i] = c0;
      out[16 + i] = c1;
      out[32 + i] = c2;
      out[48 + i] = c3;
    }
  }
};

FLOWKERN_INLINE double sqrt_(double x) { return __builtin_sqrt(x); }
FLOWKERN_INLINE float sqrt_(float x) { return __builtin_sqrtf(x); }

// cos and sin of pi a, for |a| <= 1.
FLOWKERN_INLINE void cos_sin_pi(double a, double& c, double& s) {
  c = std::cos(a * 3.141592653589793);
  s = std::sin(a * 3.141592653589793);
}

FLOWKERN_INLINE void cos_sin_pi(float a, float& c, float& s) {
  const float shifted = 2.f * a + 12582912.f;  // rounds to a number of quarters of a turn, as in exp_
  const int32_t quarter = bit_cast<int32_t>(shifted) - 0x4b400000;
  const float x = (a - 0.5f * (shifted - 12582912.f)) * 3.14159265f, z = x * x;
  float p = 1.f / 362880.f;
  p = p * z + -1.f / 5040.f;
  p = p * z + 1.f / 120.f;
  p = p * z + -1.f / 6.f;
  const float sine = p * z * x + x;
  float q = -1.f / 3628800.f;
  q = q * z + 1.f / 40320.f;
  q = q * z + -1.f / 720.f;
  q = q * z + 1.f / 24.f;
  q = q * z + -0.5f;
  const float cosine = q * z + 1.f;
  const bool odd = quarter & 1;
  const float first = odd ? sine : cosine, second = odd ? cosine : sine;
  c = (quarter + 1) & 2 ? -first : first;
  s = quarter & 2 ? -second : second;
}

// Standard normal noise of elements [start, start + n) of a sample, whole groups of it; start is a multiple of a group.
template <class A>
void normal_noise(const Philox& philox, int64_t sample, int64_t start, int64_t n, A* to) {
  for (int64_t g = 0; g * group < n; ++g) {
    uint32_t bits[group];
    philox.bits(sample, start / group + g, bits);
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t* word = bits + 32 * pair;
      A* out = to + g * group + 32 * pair;
#pragma omp simd
      for (int i = 0; i < 16; ++i) {
        const A radius = sqrt_(A(-2) * log_(A(word[i]) * A(0x1p-32) + A(0x1p-33)));
        A c, s;
        cos_sin_pi(A(int32_t(word[16 + i])) * A(0x1p-31), c, s);
        out[i] = radius * c;
        out[16 + i] = radius * s;
      }
    }
  }
}

// Elements [start, start + n) of a sample of a (B, N) tensor: where they lie, or in `buffer`.
template <class A>
struct Piece {
  const Tensor& t;
  int64_t sample, start, n;
  A* buffer;

  bool direct() const { return t.dtype == dtype_of<A>() && (t.stride[1] == 1 || n == 1); }
  int64_t offset() const { return sample * t.stride[0] + start * t.stride[1]; }
  A* at() const { return direct() ? reinterpret_cast<A*>(t.data) + offset() : buffer; }
  Operand operand() const {
    Operand o;
    o.data = t.data;
    o.dtype = t.dtype;
    return o;
  }
  const A* read() const {
    if (!direct()) load_rows(operand(), offset(), t.stride[1], nullptr, n, 0, 1, buffer);
    return at();
  }
  void write() const {
    if (!direct()) store_rows(operand(), offset(), t.stride[1], nullptr, n, 0, 1, buffer);
  }
};

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
