// What the coupling ops are told besides their tensors. The numbers are the positions in flowkern.ops.SPLITS,
// in ScaleMap's kinds and in flowkern.ops.LAYOUTS.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace flowkern {

enum class Split : int { channel = 0, channel_swap = 1, checkerboard = 2, checkerboard_swap = 3, mask = 4 };

struct Coupling {
  int64_t batch = 0, channels = 0, height = 1, width = 1;
  Split split = Split::channel;
  const int32_t *moved = nullptr, *kept = nullptr;  // channel numbers, for Split::mask
  int64_t moved_count = 0;
  bool inverse = false;
  int threads = 1;
};

struct Affine : Coupling {
  int scale = 0, layout = 0;
  double a = 0, b = 0;
  bool shift_first = false;
};

}  // namespace flowkern
