// A tensor as Python hands it over: an address, a dtype, sizes and strides. No torch header is involved.
#pragma once

#include <cstdint>

namespace flowkern {

enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3, int32 = 4, int64 = 5, uint8 = 6 };

constexpr int max_dims = 5;

struct Tensor {
  char* data = nullptr;  // null: an optional tensor that was not given
  Dtype dtype = Dtype::float32;
  int dims = 0;
  int64_t size[max_dims] = {};
  int64_t stride[max_dims] = {};  // in elements
};

// A tensor that is written. One of shape (0,) is not wanted, and has no address.
struct Output : Tensor {};

// An argument of an op that its CPU kernel does not need.
struct Unused {};

}  // namespace flowkern
