// Integers, floating-point sums and products, comparisons, bits.
#include <algorithm>
#include <cfenv>

#include "form.h"

namespace ptx {
namespace {

// --- floating-point operations of one type, also in pairs ---

// f computes in Wide<T>; the result is rounded to T.
template <class T, size_t count, class F>
Action rounded(const Form& form, F f) {
  return uniformly<T, count>(form, [f](auto... x) { return T(f(Wide<T>(x)...)); });
}
template <class T, size_t count, class F>
Action in_pairs(const Form& form, F f) {
  return uniformly<Two<T>, count>(form, [f](auto... x) { return Two<T>{T(f(Wide<T>(x.low)...)), T(f(Wide<T>(x.high)...))}; });
}

template <size_t count, class F>
Action floating(Form& form, const Type& type, F f) {
  const bool flush = form.take("ftz");
  if (flush && !type.is("f32")) form.unsupported();
  if (type.is("f32") && flush) return rounded<f32, count>(form, [f](auto... x) { return flushed(f(flushed(x)...)); });
  if (type.is("f32")) return rounded<f32, count>(form, f);
  if (type.is("f64")) return rounded<f64, count>(form, f);
  if (type.is("f16")) return rounded<f16, count>(form, f);
  if (type.is("bf16")) return rounded<bf16, count>(form, f);
  if (type.is("f32x2")) return in_pairs<f32, count>(form, f);
  if (type.is("f16x2")) return in_pairs<f16, count>(form, f);
  if (type.is("bf16x2")) return in_pairs<bf16, count>(form, f);
  form.unsupported();
}

// a b + c, rounded once. For 16 bits the product is exact in float64, and the sum rounded to odd.
f32 fused(f32 a, f32 b, f32 c) { return std::fma(a, b, c); }
f64 fused(f64 a, f64 b, f64 c) { return std::fma(a, b, c); }
template <class T>
T fused16(T a, T b, T c) {
  return T(sum_to_odd(f64(f32(a)) * f64(f32(b)), f64(f32(c))));
}

template <class T>
T fminimum(T a, T b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b) || a < b) return a;
  return a == b && std::signbit(a) ? a : b;
}
template <class T>
T fmaximum(T a, T b) {
  return -fminimum(T(-a), T(-b));
}
template <class T>
T canonical_nan() {
  return sizeof(T) == 4 ? T(from_bits<f32>(0x7fffffff)) : T(NAN);
}

// --- sums and products ---

int rounding(Form& form) {
  const std::string mode = form.one_of({"rn", "rz", "rm", "rp"});
  return mode == "rz" ? FE_TOWARDZERO : mode == "rm" ? FE_DOWNWARD : mode == "rp" ? FE_UPWARD : FE_TONEAREST;
}

// In another rounding mode than the compiler thinks of: nothing may move out of the two calls.
template <class F>
auto directed(int mode, F f) {
  return [mode, f](f32 a, f32 b, f32 c = 0) {
    volatile f32 x = a, y = b, z = c;
    std::fesetround(mode);
    volatile f32 result = f(x, y, z);
    std::fesetround(FE_TONEAREST);
    return f32(result);
  };
}

template <class F>
Action binary(Form& form, F f) {
  const int mode = rounding(form);
  const Type type = form.type();
  if (!type.floating()) return integers<2>(form, type, [f](auto a, auto b) { return f(u64(a), u64(b)); });
  if (mode != FE_TONEAREST && type.is("f32"))
    return uniformly<f32, 2>(form, directed(mode, [f](f32 a, f32 b, f32) { return f(a, b); }));
  if (mode != FE_TONEAREST) form.unsupported();
  if (!form.typed()) return floating<2>(form, type, f);
  // add.f32.bf16: the first operand is narrower.
  const Type narrow = form.type();
  if (!type.is("f32")) form.unsupported();
  if (narrow.is("bf16")) return lanewise<f32, bf16, f32>(form, [f](f32 a, f32 b) { return f(a, b); });
  if (narrow.is("f16")) return lanewise<f32, f16, f32>(form, [f](f32 a, f32 b) { return f(a, b); });
  form.unsupported();
}
Action add(Form& form) {
  if (form.take("s16x2") || form.take("u16x2"))
    return uniformly<Two<u16>, 2>(form, [](Two<u16> a, Two<u16> b) { return Two<u16>{u16(a.low + b.low), u16(a.high + b.high)}; });
  return binary(form, [](auto a, auto b) { return a + b; });
}
Action subtract(Form& form) { return binary(form, [](auto a, auto b) { return a - b; }); }

__int128 wide_product(s64 a, s64 b) { return __int128(a) * b; }
unsigned __int128 wide_product(u64 a, u64 b) { return static_cast<unsigned __int128>(a) * b; }

// Twice as wide as the factors, of 16 or 32 bits.
u64 whole_product(u64 a, u64 b, const Type& type) {
  const int unused = 64 - 8 * type.bytes;
  const u64 product = type.kind == 's' ? u64((s64(a << unused) >> unused) * (s64(b << unused) >> unused))
                                       : (a << unused >> unused) * (b << unused >> unused);
  return type.bytes == 2 ? u32(product) : product;
}

Action multiply(Form& form) {
  const std::string part = form.one_of({"wide", "hi", "lo"});
  if (part.empty()) return binary(form, [](auto a, auto b) { return a * b; });
  const Type type = form.type();
  const int bits = 8 * type.bytes;
  if (part == "lo") return integers<2>(form, type, [](auto a, auto b) { return u64(a) * u64(b); });
  if (part == "hi") return integers<2>(form, type, [bits](auto a, auto b) { return u64(wide_product(a, b) >> bits); });
  return lanewise<u64, u64, u64>(form, [type](u64 a, u64 b) { return whole_product(a, b, type); });
}

Action multiply_add(Form& form) {
  const std::string part = form.one_of({"wide", "lo"});
  if (part.empty()) form.unsupported();
  const Type type = form.type();
  if (part == "lo") return integers<3>(form, type, [](auto a, auto b, auto c) { return u64(a) * u64(b) + u64(c); });
  const u64 mask = type.bytes == 2 ? 0xffffffff : ~0ull;
  return lanewise<u64, u64, u64, u64>(form, [type, mask](u64 a, u64 b, u64 c) { return (whole_product(a, b, type) + c) & mask; });
}

Action fma_(Form& form) {
  const int mode = rounding(form);
  const Type type = form.type();
  if (mode != FE_TONEAREST) {
    if (!type.is("f32")) form.unsupported();
    return uniformly<f32, 3>(form, directed(mode, [](f32 a, f32 b, f32 c) { return std::fma(a, b, c); }));
  }
  if (form.typed()) {  // fma.f32.bf16: the factors are narrower
    const Type narrow = form.type();
    if (!type.is("f32")) form.unsupported();
    if (narrow.is("bf16")) return lanewise<f32, bf16, bf16, f32>(form, [](f32 a, f32 b, f32 c) { return std::fma(a, b, c); });
    if (narrow.is("f16")) return lanewise<f32, f16, f16, f32>(form, [](f32 a, f32 b, f32 c) { return std::fma(a, b, c); });
    form.unsupported();
  }
  if (type.is("f16")) return uniformly<f16, 3>(form, fused16<f16>);
  if (type.is("bf16")) return uniformly<bf16, 3>(form, fused16<bf16>);
  const auto pair = [](auto a, auto b, auto c) { return decltype(a){fused16(a.low, b.low, c.low), fused16(a.high, b.high, c.high)}; };
  if (type.is("f16x2")) return uniformly<Two<f16>, 3>(form, pair);
  if (type.is("bf16x2")) return uniformly<Two<bf16>, 3>(form, pair);
  return floating<3>(form, type, [](auto a, auto b, auto c) { return fused(a, b, c); });
}

// --- integer division: by zero it is noted ---

template <class T>
T quotient(T a, T b, bool remainder) {
  if (b == 0) return remainder ? a : T(-1);
  if (std::is_signed_v<T> && b == T(-1)) return remainder ? 0 : T(-u64(a));
  return remainder ? a % b : a / b;
}
template <bool remainder>
Action divide_integers(Form& form) {
  const Type type = form.type();
  const Action divide = integers<2>(form, type, [](auto a, auto b) { return quotient(a, b, remainder); });
  const Slot by = form.slot(2);
  const u64 mask = ~0ull >> (64 - 8 * type.bytes);
  return [=](Block& block, Warp& warp, Lanes lanes) {
    for_each(lanes, [&](int lane) {
      if (!(by.bits(warp, lane) & mask)) block.note("division", "an integer is divided by zero", warp, lane);
    });
    divide(block, warp, lanes);
  };
}

// --- extremes, signs ---

template <bool largest>
Action extreme(Form& form) {
  const bool nan = form.take("NaN");
  const Type type = form.type();
  if (!type.floating()) return integers<2>(form, type, [](auto a, auto b) { return largest ? std::max(a, b) : std::min(a, b); });
  const auto two = [nan](auto a, auto b) {
    using T = decltype(a);
    if (nan && (std::isnan(a) || std::isnan(b))) return canonical_nan<T>();
    return largest ? fmaximum(a, b) : fminimum(a, b);
  };
  if (form.operands() == 4 && !type.is("f32")) form.unsupported();
  if (form.operands() == 4) return uniformly<f32, 3>(form, [two](f32 a, f32 b, f32 c) { return two(two(a, b), c); });
  return floating<2>(form, type, two);
}

// By the bits: signs of NaN change, too.
template <class F>
Action on_sign(Form& form, F f) {
  const bool flush = form.take("ftz");
  const Type type = form.type();
  const int bits = 8 * type.bytes;
  const u64 sign = type.two ? 1ull << (bits - 1) | 1ull << (bits / 2 - 1) : 1ull << (bits - 1);
  return lanewise<u64, u64>(form, [=](u64 x) {
    if (flush) x = to_bits(flushed(from_bits<f32>(x)));
    return f(x, sign);
  });
}
Action absolute(Form& form) {
  if (form.rest().back()[0] == 's') return integers<1>(form, form.type(), [](auto a) { return s64(a) < 0 ? -u64(a) : u64(a); });
  return on_sign(form, [](u64 x, u64 sign) { return x & ~sign; });
}
Action negate(Form& form) {
  if (form.rest().back()[0] == 's') return integers<1>(form, form.type(), [](auto a) { return -u64(a); });
  return on_sign(form, [](u64 x, u64 sign) { return x ^ sign; });
}
Action copysign_(Form& form) {
  const u64 sign = form.type().is("f64") ? 1ull << 63 : 1ull << 31;
  return lanewise<u64, u64, u64>(form, [sign](u64 a, u64 b) { return (b & ~sign) | (a & sign); });
}
Action test_property(Form& form) {
  const std::string kind = form.one_of({"finite", "infinite", "notanumber", "number"});
  const auto test = [kind](auto x) {
    if (kind == "finite") return std::isfinite(x);
    if (kind == "infinite") return std::isinf(x);
    return std::isnan(x) == (kind == "notanumber");
  };
  if (form.type().is("f64")) return lanewise<bool, f64>(form, test);
  return lanewise<bool, f32>(form, test);
}

// --- bits ---

template <class F>
Action logical(Form& form, F f) {
  if (form.take("pred")) return lanewise<bool, bool, bool>(form, [f](bool a, bool b) { return bool(f(u64(a), u64(b)) & 1); });
  const u64 mask = (form.type().bytes == 8 ? ~0ull : 0xffffffff);
  return lanewise<u64, u64, u64>(form, [f, mask](u64 a, u64 b) { return f(a, b) & mask; });
}
Action and_(Form& form) { return logical(form, [](u64 a, u64 b) { return a & b; }); }
Action or_(Form& form) { return logical(form, [](u64 a, u64 b) { return a | b; }); }
Action xor_(Form& form) { return logical(form, [](u64 a, u64 b) { return a ^ b; }); }
Action not_(Form& form) {
  if (form.take("pred")) return lanewise<bool, bool>(form, [](bool a) { return !a; });
  return integers<1>(form, form.type(), [](auto a) { return ~a; });
}

template <bool left>
Action shift(Form& form) {
  const Type type = form.type();
  const u32 bits = 8 * u32(type.bytes), unused = 64 - bits;
  if (left) return lanewise<u64, u64, u32>(form, [=](u64 a, u32 by) { return by < bits ? a << by << unused >> unused : 0; });
  if (type.kind == 's')
    return lanewise<u64, u64, u32>(form, [=](u64 a, u32 by) {
      return u64(s64(a << unused) >> unused >> std::min(by, 63u)) << unused >> unused;
    });
  return lanewise<u64, u64, u32>(form, [=](u64 a, u32 by) { return by < bits ? a << unused >> unused >> by : 0; });
}
Action funnel_shift(Form& form) {
  const bool left = form.take("l"), wraps = form.take("wrap");
  if (!left) form.need({"r"});
  if (!wraps) form.need({"clamp"});
  form.need({"b32"});
  return lanewise<u32, u32, u32, u32>(form, [=](u32 low, u32 high, u32 by) {
    by = wraps ? by & 31 : std::min(by, 32u);
    const u64 both = u64(high) << 32 | low;
    return left ? u32((both << by) >> 32) : u32(both >> by);
  });
}

Action extract(Form& form) {
  const Type type = form.type();
  const u64 bits = 8 * u64(type.bytes);
  const bool is_signed = type.kind == 's';
  return lanewise<u64, u64, u32, u32>(form, [=](u64 value, u32 begin, u32 count) {
    begin &= 255;
    count &= 255;
    const bool negative = is_signed && count && (value >> std::min<u64>(begin + count - 1, bits - 1) & 1);
    u64 result = 0;
    for (u32 i = 0; i < bits; i++) result |= u64(i < count && begin + i < bits ? value >> (begin + i) & 1 : negative) << i;
    return result;
  });
}
Action insert(Form& form) {
  const u64 bits = u64(form.type().bytes) * 8;
  return lanewise<u64, u64, u64, u32, u32>(form, [bits](u64 what, u64 into, u32 begin, u32 count) {
    for (u64 i = begin & 255, n = std::min<u64>(i + (count & 255), bits), j = 0; i < n; i++, j++)
      into = (into & ~(1ull << i)) | (what >> j & 1) << i;
    return into;
  });
}
Action permute(Form& form) {
  form.need({"b32"});
  return lanewise<u32, u32, u32, u32>(form, [](u32 a, u32 b, u32 selector) {
    const u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
      const u32 choice = selector >> 4 * i & 15;
      u32 byte = u32(bytes >> 8 * (choice & 7)) & 255;
      if (choice & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << 8 * i;
    }
    return result;
  });
}
Action any_of_three(Form& form) {
  form.need({"b32"});
  return lanewise<u32, u32, u32, u32, u32>(form, [](u32 a, u32 b, u32 c, u32 table) {
    u32 result = 0;
    for (u32 i = 0; i < 8; i++)
      if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
  });
}
Action count_ones(Form& form) {
  const bool wide = form.type().bytes == 8;
  return lanewise<u32, u64>(form, [wide](u64 a) { return u32(__builtin_popcountll(wide ? a : u32(a))); });
}
Action count_zeros(Form& form) {
  const bool wide = form.type().bytes == 8;
  return lanewise<u32, u64>(form, [wide](u64 a) { return wide ? (a ? __builtin_clzll(a) : 64) : u32(a) ? __builtin_clz(u32(a)) : 32; });
}
Action reverse(Form& form) {
  form.need({"b32"});
  return uniformly<u32, 1>(form, [](u32 a) {
    u32 result = 0;
    for (int i = 0; i < 32; i++) result |= (a >> i & 1) << (31 - i);
    return result;
  });
}

// --- comparisons and choices ---

enum class Compare { eq, ne, lt, le, gt, ge, num, nan };

struct Comparison {
  Compare how = Compare::eq;
  bool if_nan = false;  // what it says of unordered numbers

  template <class T>
  bool operator()(T a, T b) const {
    if (!(a == a) || !(b == b)) return if_nan;
    switch (how) {
      case Compare::eq: return a == b;
      case Compare::ne: return a != b;
      case Compare::lt: return a < b;
      case Compare::le: return a <= b;
      case Compare::gt: return a > b;
      case Compare::ge: return a >= b;
      default: return how == Compare::num;
    }
  }
};

Comparison comparison(Form& form) {
  static const std::pair<const char*, Compare> names[] = {
      {"eq", Compare::eq}, {"ne", Compare::ne}, {"lt", Compare::lt}, {"le", Compare::le}, {"gt", Compare::gt}, {"ge", Compare::ge},
      {"lo", Compare::lt}, {"ls", Compare::le}, {"hi", Compare::gt}, {"hs", Compare::ge}};
  if (form.take("num")) return {Compare::num, false};
  if (form.take("nan")) return {Compare::nan, true};
  for (auto& [name, how] : names) {
    if (form.take(name)) return {how, false};
    if (form.take(name + std::string("u"))) return {how, true};
  }
  form.unsupported();
}

// Writes p and q, its opposite, after combining each with a third predicate.
template <class T, class Read>
Action compared(const Form& form, const Comparison& compare, const std::string& combine, Read read) {
  const Slot to = form.slot(0), a = form.slot(1), b = form.slot(2), third = combine.empty() ? Slot() : form.slot(3);
  Slot opposite;
  opposite.reg = form.operand(0).second;
  return [=](Block&, Warp& warp, Lanes lanes) {
    for_each(lanes, [&](int lane) {
      bool yes = compare(read(a.get<T>(warp, lane)), read(b.get<T>(warp, lane))), no = !yes;
      const bool c = combine.empty() || third.get<bool>(warp, lane);
      if (combine == "and") yes = yes && c, no = no && c;
      if (combine == "or") yes = yes || c, no = no || c;
      if (combine == "xor") yes = yes != c, no = no != c;
      to.set(warp, lane, yes);
      opposite.set(warp, lane, no);
    });
  };
}
// setp.bf16x2 p|q: a predicate for each half.
template <class T>
Action compared_in_pairs(const Form& form, const Comparison& compare) {
  const Slot low = form.slot(0), a = form.slot(1), b = form.slot(2);
  Slot high;
  high.reg = form.operand(0).second;
  return [=](Block&, Warp& warp, Lanes lanes) {
    for_each(lanes, [&](int lane) {
      const auto x = a.get<Two<T>>(warp, lane), y = b.get<Two<T>>(warp, lane);
      low.set(warp, lane, compare(f32(x.low), f32(y.low)));
      high.set(warp, lane, compare(f32(x.high), f32(y.high)));
    });
  };
}
Action set_predicate(Form& form) {
  const std::string combine = form.one_of({"and", "or", "xor"});
  const Comparison compare = comparison(form);
  const bool flush = form.take("ftz");
  const Type type = form.type();
  if ((flush && !type.is("f32")) || (type.two && !combine.empty())) form.unsupported();
  if (type.is("f32")) return compared<f32>(form, compare, combine, [flush](f32 x) { return flush ? flushed(x) : x; });
  if (type.is("f64")) return compared<f64>(form, compare, combine, [](f64 x) { return x; });
  if (type.is("f16")) return compared<f16>(form, compare, combine, [](f16 x) { return f32(x); });
  if (type.is("bf16")) return compared<bf16>(form, compare, combine, [](bf16 x) { return f32(x); });
  if (type.is("f16x2")) return compared_in_pairs<f16>(form, compare);
  if (type.is("bf16x2")) return compared_in_pairs<bf16>(form, compare);
  const int unused = 64 - 8 * type.bytes;
  if (type.kind == 's') return compared<u64>(form, compare, combine, [unused](u64 x) { return s64(x << unused) >> unused; });
  return compared<u64>(form, compare, combine, [unused](u64 x) { return x << unused >> unused; });
}

Action select(Form& form) {
  form.type();
  return lanewise<u64, u64, u64, bool>(form, [](u64 a, u64 b, bool first) { return first ? a : b; });
}

// mov packs and unpacks vectors, too.
Action move(Form& form) {
  const Type type = form.type();
  if (type.kind == 'p') return lanewise<bool, bool>(form, [](bool a) { return a; });
  const Operand &to = form.operand(0), &from = form.operand(1);
  const u64 mask = type.bytes == 8 ? ~0ull : (1ull << 8 * type.bytes) - 1;
  if (to.kind != Operand::vector && from.kind != Operand::vector) return lanewise<u64, u64>(form, [mask](u64 a) { return a & mask; });
  const bool packs = from.kind == Operand::vector;
  const std::vector<Slot> parts = slots(packs ? from : to);
  const Slot whole = packs ? to : from;
  const int bits = 8 * type.bytes / int(parts.size());
  const u64 part_mask = (1ull << bits) - 1;
  return [=](Block&, Warp& warp, Lanes lanes) {
    for_each(lanes, [&](int lane) {
      u64 all = packs ? 0 : whole.bits(warp, lane);
      for (size_t i = 0; i < parts.size(); i++) {
        if (packs) all |= (parts[i].bits(warp, lane) & part_mask) << int(i) * bits;
        else parts[i].set(warp, lane, all >> int(i) * bits & part_mask);
      }
      if (packs) whole.set(warp, lane, all);
    });
  };
}

}  // namespace

Decoders arithmetic_decoders() {
  return {{"add", add},
          {"sub", subtract},
          {"mul", multiply},
          {"mad", multiply_add},
          {"fma", fma_},
          {"rem", divide_integers<true>},
          {"div", [](Form& form) { return form.rest().back()[0] == 'f' ? divide_floats(form) : divide_integers<false>(form); }},
          {"min", extreme<false>},
          {"max", extreme<true>},
          {"abs", absolute},
          {"neg", negate},
          {"copysign", copysign_},
          {"testp", test_property},
          {"and", and_},
          {"or", or_},
          {"xor", xor_},
          {"not", not_},
          {"shl", shift<true>},
          {"shr", shift<false>},
          {"shf", funnel_shift},
          {"bfe", extract},
          {"bfi", insert},
          {"prmt", permute},
          {"lop3", any_of_three},
          {"popc", count_ones},
          {"clz", count_zeros},
          {"brev", reverse},
          {"setp", set_predicate},
          {"selp", select},
          {"mov", move}};
}

}  // namespace ptx
