// How instructions are decoded: a decoder takes the modifiers that it knows, and what it leaves is not supported.
#pragma once

#include <initializer_list>
#include <utility>

#include "block.h"

namespace ptx {

class Form {
 public:
  explicit Form(Instruction& instruction) : instruction(instruction), rest_(instruction.modifiers) {}

  Instruction& instruction;

  bool take(const std::string& modifier) {
    for (size_t i = 0; i < rest_.size(); i++)
      if (rest_[i] == modifier) return rest_.erase(rest_.begin() + long(i)), true;
    return false;
  }
  // Those that change nothing here.
  void ignore(std::initializer_list<const char*> modifiers) {
    for (auto m : modifiers) take(m);
  }
  void need(std::initializer_list<const char*> modifiers) {
    for (auto m : modifiers)
      if (!take(m)) unsupported();
  }
  // The first of these that is there; empty if none is.
  std::string one_of(std::initializer_list<const char*> modifiers) {
    for (auto m : modifiers)
      if (take(m)) return m;
    return "";
  }
  // The next of the types; there must be one.
  Type type() {
    Type found;
    for (auto& m : rest_)
      if (Type::parse(m, found)) return take(std::string(m)), found;
    unsupported();
  }
  bool typed() const {
    Type found;
    for (auto& m : rest_)
      if (Type::parse(m, found)) return true;
    return false;
  }
  const std::vector<std::string>& rest() const { return rest_; }
  const Operand& operand(size_t i) const {
    if (i >= instruction.operands.size()) unsupported();
    return instruction.operands[i];
  }
  size_t operands() const { return instruction.operands.size(); }
  Slot slot(size_t i) const { return operand(i); }

  [[noreturn]] void unsupported() const {
    throw Fault("line " + std::to_string(instruction.line) + ": not supported: " + instruction.text);
  }

 private:
  std::vector<std::string> rest_;
};

using Decoder = Action (*)(Form&);
using Decoders = std::map<std::string, Decoder>;

Decoders arithmetic_decoders();
Decoders function_decoders();
Decoders conversion_decoders();
Decoders memory_decoders();
Decoders warp_decoders();
Decoders async_decoders();
Decoders tensor_core_decoders();
Action divide_floats(Form& form);

inline f32 flushed(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// The action of an instruction that computes an R from operands of types A in each lane: R f(A...).
template <class R, class... A, class F, size_t... n>
Action lanewise(const Form& form, F f, std::index_sequence<n...>) {
  const Slot to = form.slot(0);
  const std::array<Slot, sizeof...(A)> from{form.slot(n + 1)...};
  return [=](Block&, Warp& warp, Lanes lanes) {
    for_each(lanes, [&](int lane) { to.set<R>(warp, lane, f(from[n].template get<A>(warp, lane)...)); });
  };
}
template <class R, class... A, class F>
Action lanewise(const Form& form, F f) {
  return lanewise<R, A...>(form, f, std::index_sequence_for<A...>());
}

template <class T, size_t>
using Always = T;
// One type for the result and all `count` operands.
template <class T, size_t count, class F>
Action uniformly(const Form& form, F f) {
  return [&]<size_t... n>(std::index_sequence<n...>) { return lanewise<T, Always<T, n>...>(form, f); }(std::make_index_sequence<count>());
}

// Integers of all widths are computed with in 64 bits: f takes s64, or u64 where the type is unsigned.
template <size_t count, class F>
Action integers(const Form& form, const Type& type, F f) {
  if (type.two || type.floating()) form.unsupported();
  const int unused = 64 - 8 * type.bytes;
  if (type.kind == 's')
    return uniformly<u64, count>(form, [f, unused](auto... x) { return u64(f((s64(x << unused) >> unused)...)) << unused >> unused; });
  return uniformly<u64, count>(form, [f, unused](auto... x) { return u64(f((x << unused >> unused)...)) << unused >> unused; });
}

}  // namespace ptx
