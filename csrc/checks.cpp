#include "checks.h"

#include <stdexcept>
#include <string>

namespace flowkern {
namespace {

// Says what a table or a shape should have been.
[[noreturn]] void refuse(const char* name, const std::string& expected, int64_t got) {
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
}

// Refuses all but `count` numbers, one after the other in memory, from 0 to `end` - 1.
const int32_t* check_table(const char* name, const Tensor& t, int64_t count, int64_t end) {
  if (t.dims != 1 || t.dtype != Dtype::int32) throw std::invalid_argument(std::string(name) + ": expected one dimension of int32");
  if (t.size[0] != count) refuse(name, std::to_string(count) + " numbers", t.size[0]);
  if (count > 1 && t.stride[0] != 1) refuse(name, "stride 1", t.stride[0]);
  const int32_t* numbers = reinterpret_cast<const int32_t*>(t.data);
  bool outside = false;
  for (int64_t i = 0; i < count; ++i) outside |= (numbers[i] < 0) | (numbers[i] >= end);
  for (int64_t i = 0; outside; ++i)
    if (numbers[i] < 0 || numbers[i] >= end) refuse(name, "numbers from 0 to " + std::to_string(end - 1), numbers[i]);
  return numbers;
}

}  // namespace

void check_degrees(const Tensor& x, const Tensor& weight, const Tensor& reach, const Tensor& first, const Tensor& rows,
                   const Tensor& columns) {
  const int64_t outputs = weight.size[0], inputs = weight.size[1];
  if (x.size[1] != inputs) refuse("x", std::to_string(inputs) + " columns, as weight has", x.size[1]);
  const int32_t* ends = check_table("reach", reach, outputs, inputs + 1);
  bool falls = false;
  for (int64_t r = 1; r < outputs; ++r) falls |= ends[r] < ends[r - 1];
  if (falls) throw std::invalid_argument("reach: expected numbers that never fall, as those of sorted outputs");
  if (rows.data) check_table("rows", rows, outputs, outputs);
  if (columns.data) check_table("columns", columns, inputs, inputs);
  if (!first.data) return;
  const int32_t* begins = check_table("first", first, inputs, outputs + 1);
  for (int64_t c = 0; c < inputs; ++c) {
    const int64_t r = begins[c];
    if ((r > 0 && ends[r - 1] > c) || (r < outputs && ends[r] <= c)) refuse("first", "the first row of reach that sees a column", r);
  }
}

void check_permutation(const Tensor& permutation, int64_t count) {
  if (permutation.dims != 1 || permutation.dtype != Dtype::int64)
    throw std::invalid_argument("permutation: expected one dimension of int64");
  if (permutation.size[0] != count) refuse("permutation", std::to_string(count) + " rows", permutation.size[0]);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = reinterpret_cast<const int64_t*>(permutation.data)[i * permutation.stride[0]];
    if (row < 0 || row >= count) refuse("permutation", "row numbers under " + std::to_string(count), row);
  }
}

void check_mask(const Tensor& place, int64_t channels, int64_t per_channel, const Tensor& params) {
  if (place.dims != 1 || place.dtype != Dtype::int32) throw std::invalid_argument("place: expected one dimension of int32");
  if (place.size[0] != channels) refuse("place", std::to_string(channels) + " channels", place.size[0]);
  int64_t moved = 0, given = 1;
  for (int64_t i = 0; i < channels; ++i) moved += reinterpret_cast<const int32_t*>(place.data)[i * place.stride[0]] >= 0;
  for (int i = 0; i < params.dims; ++i) given *= params.size[i];
  if (given != per_channel * moved) refuse("place", "as many transformed channels as there are parameters for", moved);
}

}  // namespace flowkern
