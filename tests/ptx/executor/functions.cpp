// Quotients, roots and elementary functions. The approximate ones are exact, or off by as much as the PTX ISA documents.
#include <algorithm>

#include "form.h"

namespace ptx {
namespace {

// +1 or -1, always the same for the same arguments of the same function.
f64 sign_of_error(const Options& options, u64 key) {
  key += 0x9e3779b97f4a7c15 * u64(options.seed + 1);
  key = (key ^ key >> 31) * 0xbf58476d1ce4e5b9;
  key = (key ^ key >> 27) * 0x94d049bb133111eb;
  return (key ^ key >> 31) & 1 ? 1 : -1;
}

// Of a float32 near x.
f64 unit_in_the_last_place(f64 x) {
  int exponent;
  std::frexp(x, &exponent);
  return std::ldexp(1.0, std::max(exponent - 24, -149));
}

struct Function {
  f64 (*exact)(f64);
  // The largest error of the approximation, by argument and value.
  f64 (*error)(f64 x, f64 y);
};

const std::map<std::string, Function> kFunctions = {
    {"ex2", {[](f64 x) { return std::exp2(x); }, [](f64 x, f64 y) { return x == std::floor(x) ? 0 : 1.5 * unit_in_the_last_place(y); }}},
    {"lg2",
     {[](f64 x) { return std::log2(x); },
      [](f64 x, f64 y) { return x == 1 ? 0 : 0x1p-22 * (x > 0.5 && x < 2 ? 1 : std::fabs(y)); }}},
    {"rcp", {[](f64 x) { return 1 / x; }, [](f64 x, f64 y) { return x == 1 ? 0 : unit_in_the_last_place(y); }}},
    {"rsqrt", {[](f64 x) { return 1 / std::sqrt(x); }, [](f64 x, f64 y) { return x == 1 ? 0 : 0x1p-22 / std::sqrt(3.5) * std::fabs(y); }}},
    {"sqrt", {[](f64 x) { return std::sqrt(x); }, [](f64 x, f64 y) { return x == 1 ? 0 : 0x1p-23 * std::fabs(y); }}},
    {"sin", {[](f64 x) { return std::sin(x); }, [](f64, f64) { return 0x1p-20; }}},
    {"cos", {[](f64 x) { return std::cos(x); }, [](f64, f64) { return 0x1p-20; }}},
    {"tanh", {[](f64 x) { return std::tanh(x); }, [](f64, f64 y) { return 0x1p-11 * std::fabs(y); }}},
};

// rcp.approx.ftz.f64 and rsqrt: the high halves of argument and result alone.
Action on_high_halves(const Form& form, const Function& function) {
  const Slot to = form.slot(0), from = form.slot(1);
  return [=](Block& block, Warp& warp, Lanes lanes) {
    for_each(lanes, [&](int lane) {
      const u64 high = from.bits(warp, lane) & 0xffffffff00000000;
      f64 x = from_bits<f64>(high);
      if (std::fabs(x) < 0x1p-1022) x = std::copysign(0.0, x);
      f64 y = function.exact(x);
      if (block.launch.options.approximate) y *= 1 + 0x1p-20 * sign_of_error(block.launch.options, high);
      u64 bits = to_bits(y) & 0xffffffff00000000;
      if (std::fabs(y) < 0x1p-1022) bits &= 1ull << 63;
      to.set(warp, lane, bits);
    });
  };
}

Action of_float32(const Form& form, const Function& function, bool flush, bool approximate, u64 salt) {
  const Slot to = form.slot(0), from = form.slot(1);
  return [=](Block& block, Warp& warp, Lanes lanes) {
    const Options& options = block.launch.options;
    for_each(lanes, [&](int lane) {
      const f32 x = flush ? flushed(from.get<f32>(warp, lane)) : from.get<f32>(warp, lane);
      f64 y = function.exact(f64(x));
      if (approximate && options.approximate && std::isfinite(y) && y != 0)
        y += sign_of_error(options, to_bits(x) | salt << 40) * function.error(f64(x), y);
      to.set(warp, lane, flush ? flushed(f32(y)) : f32(y));
    });
  };
}

Action elementary(Form& form) {
  const std::string name = form.instruction.opcode;
  const Function& function = kFunctions.at(name);
  const bool approximate = form.take("approx"), flush = form.take("ftz");
  if (!approximate) form.need({"rn"});
  const Type type = form.type();
  const bool root = name == "sqrt" || name == "rcp";
  if (type.is("f64") && !approximate && root) return lanewise<f64, f64>(form, function.exact);
  if (type.is("f64") && flush && (name == "rcp" || name == "rsqrt")) return on_high_halves(form, function);
  if (!type.is("f32") || (!approximate && !root)) form.unsupported();
  return of_float32(form, function, flush, approximate, u64(name[0] + 8 * name.back()));
}

// div.approx gives zero or NaN for large divisors, whose reciprocal it cannot hold.
f64 approximate_quotient(const Options& options, f32 x, f32 y, bool full) {
  const f64 quotient = f64(x) / f64(y);
  if (!full && std::fabs(y) > 0x1p126f && !std::isnan(quotient)) return std::isinf(x) ? NAN : std::copysign(0.0, quotient);
  if (!options.approximate || !std::isfinite(quotient) || quotient == 0 || quotient == 1) return quotient;
  return quotient + sign_of_error(options, to_bits(x) << 32 | to_bits(y)) * 1.5 * unit_in_the_last_place(quotient);
}

}  // namespace

Action divide_floats(Form& form) {
  const std::string how = form.one_of({"rn", "full", "approx"});
  const bool flush = form.take("ftz");
  const Type type = form.type();
  if (how == "rn" && !flush && type.is("f64")) return uniformly<f64, 2>(form, [](f64 a, f64 b) { return a / b; });
  if (how == "rn" && !flush && type.is("f32")) return uniformly<f32, 2>(form, [](f32 a, f32 b) { return a / b; });
  if (how == "rn" || how.empty() || !type.is("f32")) form.unsupported();
  const Slot to = form.slot(0), a = form.slot(1), b = form.slot(2);
  return [=](Block& block, Warp& warp, Lanes lanes) {
    for_each(lanes, [&](int lane) {
      f32 x = a.get<f32>(warp, lane), y = b.get<f32>(warp, lane);
      if (flush) x = flushed(x), y = flushed(y);
      const f32 q = f32(approximate_quotient(block.launch.options, x, y, how == "full"));
      to.set(warp, lane, flush ? flushed(q) : q);
    });
  };
}

Decoders function_decoders() {
  Decoders found;
  for (auto& [name, _] : kFunctions) found[name] = elementary;
  return found;
}

}  // namespace ptx
