// y = x + t on the transformed elements, or x - t for the inverse: one pass over the data.

#include "coupling.h"

namespace flowkern {
namespace FLOWKERN_ISA {
namespace {

template <class A>
void forward(const Coupling& c, const Tensor& x, const Tensor& shift, const Tensor& y) {
  const Operand moved_operands[] = {operand(x, true), operand(shift, false), operand(y, true)};
  const Operand kept_operands[] = {moved_operands[0], moved_operands[2]};
  Nest moved[2], kept[2];
  const int nests = make_nests<A>(c, true, moved_operands, 2, 3, moved);
  const int kept_nests = make_nests<A>(c, false, kept_operands, 1, 2, kept);
  const int64_t segments = segments_of(c);
  const A sign = c.inverse ? A(-1) : A(1);
  parallel_for(c.batch * segments, c.batch * c.channels * c.height * c.width, c.threads, [&](int64_t task) {
    const int64_t sample = task / segments, s = task % segments;
    for (int k = 0; k < nests; ++k) {
      walk<A>(moved[k], 2, sample, segment_begin(moved[k], s, segments), segment_begin(moved[k], s + 1, segments),
              Body<A>([&](A* const* p, int64_t n) {
#pragma omp simd
                for (int64_t i = 0; i < n; ++i) p[2][i] = p[0][i] + sign * p[1][i];
              }));
      if (k >= kept_nests) continue;
      walk<A>(kept[k], 1, sample, segment_begin(kept[k], s, segments), segment_begin(kept[k], s + 1, segments),
              Body<A>([](A* const* p, int64_t n) { copy_run(p[0], p[1], n); }));
    }
  });
}

}  // namespace

void additive_coupling(In x, In shift, In place, int split, bool inverse, Out y, int threads) {
  const Coupling c(x, place, shift, 1, split, inverse, threads);
  if (x.dtype == Dtype::float64 || shift.dtype == Dtype::float64) {
    forward<double>(c, x, shift, y);
  } else {
    forward<float>(c, x, shift, y);
  }
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
