// The values that registers hold, by the names of the PTX ISA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
using f16 = _Float16;

// What ends a launch, or the parse of a module.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class T>
T from_bits(u64 bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

template <class T>
u64 to_bits(T value) {
  u64 bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

// a + b in float64 such that a later rounding to fewer bits sees whether the sum was exact: rounded to odd.
inline f64 sum_to_odd(f64 a, f64 b) {
  const f64 sum = a + b, of_b = sum - a, lost = (a - (sum - of_b)) + (b - of_b);
  const u64 bits = to_bits(sum);
  if (!std::isfinite(sum) || lost == 0 || bits & 1) return sum;
  return from_bits<f64>((lost > 0) == (sum > 0) ? bits + 1 : bits - 1);
}

struct bf16 {
  u16 bits = 0;
  bf16() = default;
  bf16(f32 value) {
    const u32 b = u32(to_bits(value));
    bits = std::isnan(value) ? 0x7fff : u16((b + 0x7fff + (b >> 16 & 1)) >> 16);
  }
  bf16(f64 value) {  // to odd in float32 first, so that it is rounded once
    f32 near = f32(value);
    const u32 b = u32(to_bits(near));
    if (f64(near) != value && std::isfinite(near) && !(b & 1)) near = std::nextafterf(near, value > f64(near) ? INFINITY : -INFINITY);
    *this = bf16(near);
  }
  operator f32() const { return from_bits<f32>(u32(bits) << 16); }
};

// Two values in one register; the first one lies in its low half.
template <class T>
struct Two {
  T low, high;
};

// What arithmetic on T is computed in before it is rounded.
template <class T>
struct WideOf {
  using type = f32;
};
template <>
struct WideOf<f64> {
  using type = f64;
};
template <class T>
using Wide = typename WideOf<T>::type;

// A type of an instruction: its name, bytes, and what kind of number it is.
struct Type {
  std::string name;
  int bytes = 0;
  char kind = 0;     // 'b' bits, 'u' and 's' integers, 'f' floating, 'p' predicate
  bool two = false;  // a packed pair

  static bool parse(const std::string& name, Type& type);
  bool floating() const { return kind == 'f'; }
  bool is(const char* other) const { return name == other; }
};

inline bool Type::parse(const std::string& text, Type& type) {
  type = {text};
  std::string single = text;
  if (text.size() > 2 && text.compare(text.size() - 2, 2, "x2") == 0) {
    type.two = true;
    single.resize(text.size() - 2);
  }
  if (single == "pred") type.kind = 'p', type.bytes = 1;
  if (single == "bf16" || single == "f16") type.kind = 'f', type.bytes = 2;
  if (single == "f32" || single == "tf32") type.kind = 'f', type.bytes = 4;
  if (single == "f64") type.kind = 'f', type.bytes = 8;
  if (std::strchr("bus", single[0]) && (single.substr(1) == "8" || single.substr(1) == "16" || single.substr(1) == "32" || single.substr(1) == "64"))
    type.kind = single[0], type.bytes = std::stoi(single.substr(1)) / 8;
  if (type.two) type.bytes *= 2;
  return type.kind != 0;
}

}  // namespace ptx
