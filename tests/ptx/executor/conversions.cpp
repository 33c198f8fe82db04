// cvt, between all types.
#include "form.h"

namespace ptx {
namespace {

using Reader = f64 (*)(u64 bits);  // exact
using Writer = u64 (*)(f64 value);  // rounded to nearest

Reader reader_of(const Form& form, const Type& type) {
  if (type.is("f32")) return [](u64 b) { return f64(from_bits<f32>(b)); };
  if (type.is("f64")) return [](u64 b) { return from_bits<f64>(b); };
  if (type.is("f16")) return [](u64 b) { return f64(from_bits<f16>(b)); };
  if (type.is("bf16")) return [](u64 b) { return f64(f32(from_bits<bf16>(b))); };
  form.unsupported();
}
Writer writer_of(const Form& form, const Type& type) {
  if (type.is("f32")) return [](f64 x) { return to_bits(f32(x)); };
  if (type.is("f64")) return [](f64 x) { return to_bits(x); };
  if (type.is("f16")) return [](f64 x) { return to_bits(f16(x)); };
  if (type.is("bf16")) return [](f64 x) { return to_bits(bf16(x)); };
  form.unsupported();
}

f64 to_integer(f64 x, char mode) {
  return mode == 'z' ? std::trunc(x) : mode == 'm' ? std::floor(x) : mode == 'p' ? std::ceil(x) : std::nearbyint(x);
}

// What does not fit becomes the nearest value that does, NaN 0, or 2^63 in 64 bits.
u64 integer_of(f64 x, const Type& type) {
  const int bits = 8 * type.bytes;
  if (std::isnan(x)) return bits == 64 ? 1ull << 63 : 0;
  const bool is_signed = type.kind == 's';
  const f64 low = is_signed ? -std::ldexp(1.0, bits - 1) : 0, beyond = std::ldexp(1.0, is_signed ? bits - 1 : bits);
  const u64 mask = bits == 64 ? ~0ull : (1ull << bits) - 1;
  if (x >= beyond) return is_signed ? mask >> 1 : mask;
  if (x <= low) return (is_signed ? 1ull << (bits - 1) : 0);
  return (is_signed ? u64(s64(x)) : u64(x)) & mask;
}

// As 64 bits, the sign extended.
u64 extended(u64 bits, const Type& type) {
  const int unused = 64 - 8 * type.bytes;
  return type.kind == 's' ? u64(s64(bits << unused) >> unused) : bits << unused >> unused;
}

Action to_pair(Form& form, const Type& to) {
  const bool brain = to.is("bf16x2");
  if (!form.type().is("f32") || !form.take("rn") || form.operands() != 3) form.unsupported();
  return lanewise<u32, f32, f32>(form, [brain](f32 high, f32 low) {
    const auto bits = [brain](f32 x) { return u32(brain ? to_bits(bf16(x)) : to_bits(f16(x))); };
    return bits(high) << 16 | bits(low);
  });
}

// To nearest, ties away from zero, to the 10 bits that tensor cores look at.
Action to_tf32(Form& form) {
  form.need({"rna", "f32"});
  return lanewise<u32, u32>(form, [](u32 x) { return std::isfinite(from_bits<f32>(x)) ? (x + 0x1000) & 0xffffe000 : x; });
}

Action between_floats(Form& form, const Type& to, const Type& from) {
  const bool flush = form.take("ftz"), saturate = form.take("sat");
  const std::string integer = form.one_of({"rni", "rzi", "rmi", "rpi"});
  form.take("rn");
  const Reader read = reader_of(form, from);
  const Writer write = writer_of(form, to);
  return lanewise<u64, u64>(form, [=](u64 bits) {
    f64 x = read(bits);
    if (flush) x = f64(flushed(f32(x)));
    if (!integer.empty()) x = to_integer(x, integer[1]);
    if (saturate) x = !(x > 0) ? 0 : x > 1 ? 1 : x;
    const u64 result = write(x);
    return flush && to.bytes == 4 ? to_bits(flushed(from_bits<f32>(result))) : result;
  });
}

Action to_integer(Form& form, const Type& to, const Type& from) {
  const bool flush = form.take("ftz");
  const std::string mode = form.one_of({"rni", "rzi", "rmi", "rpi"});
  if (mode.empty()) form.unsupported();
  const Reader read = reader_of(form, from);
  return lanewise<u64, u64>(form, [=](u64 bits) {
    const f64 x = read(bits);
    return integer_of(to_integer(flush ? f64(flushed(f32(x))) : x, mode[1]), to);
  });
}

Action from_integer(Form& form, const Type& to, const Type& from) {
  form.need({"rn"});
  const bool is_signed = from.kind == 's';
  if (to.is("f32")) return lanewise<f32, u64>(form, [=](u64 b) { return is_signed ? f32(s64(extended(b, from))) : f32(extended(b, from)); });
  if (!to.is("f64") && from.bytes > 4) form.unsupported();  // it would be rounded twice
  const Writer write = writer_of(form, to);
  return lanewise<u64, u64>(form, [=](u64 b) { return write(is_signed ? f64(s64(extended(b, from))) : f64(extended(b, from))); });
}

Action convert(Form& form) {
  if (form.take("tf32")) return to_tf32(form);
  const Type to = form.type();
  if (to.two) return to_pair(form, to);
  const Type from = form.type();
  if (to.floating() && from.floating()) return between_floats(form, to, from);
  if (from.floating()) return to_integer(form, to, from);
  if (to.floating()) return from_integer(form, to, from);
  return lanewise<u64, u64>(form, [=](u64 b) { return extended(extended(b, from), to); });
}

}  // namespace

Decoders conversion_decoders() { return {{"cvt", convert}}; }

}  // namespace ptx
