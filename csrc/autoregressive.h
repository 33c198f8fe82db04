// What the autoregressive inverse is told besides its state: one of these for each network of the chain.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace flowkern {

struct Autoregressive {
  const Tensor* tensors = nullptr;  // weight and bias of each linear layer
  Tensor context;                   // (B, units of the first layer), or not given
  const int32_t* table = nullptr;   // the plan: flowkern/ops/autoregressive/cpp.py says how it is laid out
  double a = 0, b = 0;              // the constants of the scale map
};

}  // namespace flowkern
