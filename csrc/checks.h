// The kernels go where tables say that come as tensors, and so hold whatever their owner wrote: they are looked at first. All of
// these raise std::invalid_argument, which Python sees as a ValueError.
#pragma once

#include "tensor.h"

namespace flowkern {

// For tables that no degrees have, as flowkern/ops/autoregressive/degrees.py defines them. `first`, `rows` and `columns` may
// be absent.
void check_degrees(const Tensor& x, const Tensor& weight, const Tensor& reach, const Tensor& first, const Tensor& rows,
                   const Tensor& columns);

// Unless a permutation names a row of a matrix for each of its rows.
void check_permutation(const Tensor& permutation, int64_t count);

// Unless a mask has a place for each channel, and `params` has `per_channel` numbers for each that is transformed.
void check_mask(const Tensor& place, int64_t channels, int64_t per_channel, const Tensor& params);

}  // namespace flowkern
