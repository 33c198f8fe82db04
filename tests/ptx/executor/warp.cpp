// Control flow, barriers, and what the threads of a warp do together.
#include <algorithm>

#include "form.h"

namespace ptx {
namespace {

// The last operand says which threads take part.
void together(Form& form) {
  form.instruction.together = true;
  form.instruction.members = int(form.operands()) - 1;
}

Action jump(Form& form) {
  form.take("uni");
  form.instruction.flow = Flow::branch;
  return {};
}
Action leave(Form& form) {
  form.instruction.flow = Flow::exit;
  return {};
}

Action wait_for_block(Form& form) {
  if (form.take("warp")) {
    form.need({"sync"});
    together(form);
    return [](Block&, Warp& warp, Lanes) { warp.moment++; };
  }
  form.need({"sync"});
  form.take("aligned");
  form.take("cta");
  form.instruction.together = true;
  form.instruction.flow = Flow::barrier;
  const Slot id = form.slot(0);
  const bool counted = form.operands() > 1;
  const Slot count = counted ? form.slot(1) : Slot();
  return [=](Block& block, Warp& warp, Lanes lanes) {
    const u64 which = uniform(block, warp, lanes, id, "the barrier");
    if (counted && uniform(block, warp, lanes, count, "the count") != block.launch.thread_count)
      block.fault("not supported: a barrier of some warps", warp, 0);
    if (!block.arrived.empty() && which != block.barrier) block.fault("deadlock: warps wait at different barriers", warp, 0);
    block.barrier = which;
    block.arrived.push_back(warp.number);
    warp.state = Warp::waiting;
  };
}

Action shuffle(Form& form) {
  form.need({"sync"});
  const std::string mode = form.one_of({"bfly", "idx", "up", "down"});
  form.need({"b32"});
  together(form);
  const Slot to = form.slot(0), from = form.slot(1), by = form.slot(2), clamp = form.slot(3);
  Slot inside;
  inside.reg = form.operand(0).second;
  return [=](Block& block, Warp& warp, Lanes lanes) {
    std::array<u32, kLanes> values{};
    for_each(lanes, [&](int lane) { values[size_t(lane)] = from.get<u32>(warp, lane); });
    for_each(lanes, [&](int lane) {
      const int b = int(by.get<u32>(warp, lane) & 31), c = int(clamp.get<u32>(warp, lane));
      const int segment = c >> 8 & 31, least = lane & segment, most = least | ((c & 31) & ~segment);
      int source = mode == "bfly" ? lane ^ b : mode == "up" ? lane - b : mode == "down" ? lane + b : least | (b & ~segment);
      const bool valid = mode == "up" ? source >= most : source <= most;
      if (!valid) source = lane;
      if (!(lanes >> source & 1)) block.note("shuffle", "a lane is read that takes no part", warp, lane);
      to.set(warp, lane, values[size_t(source)]);
      inside.set(warp, lane, valid);
    });
  };
}

Action reduce(Form& form) {
  form.need({"sync"});
  const std::string how = form.one_of({"add", "min", "max", "and", "or", "xor"});
  const bool nan = form.take("NaN");
  const Type type = form.type();
  together(form);
  const Slot to = form.slot(0), from = form.slot(1);
  const auto combined = [=](u32 a, u32 b) -> u32 {
    if (type.is("f32")) {
      const f32 x = from_bits<f32>(a), y = from_bits<f32>(b);
      if (std::isnan(x) || std::isnan(y)) return nan ? 0x7fffffff : std::isnan(x) ? b : a;
      return (x < y || (x == y && std::signbit(x))) == (how == "min") ? a : b;
    }
    if (how == "add") return a + b;
    if (how == "and") return a & b;
    if (how == "or") return a | b;
    if (how == "xor") return a ^ b;
    const bool less = type.kind == 's' ? s32(a) < s32(b) : a < b;
    return less == (how == "min") ? a : b;
  };
  if (how.empty() || (type.floating() && !type.is("f32"))) form.unsupported();
  return [=](Block&, Warp& warp, Lanes lanes) {
    u32 result = from.get<u32>(warp, __builtin_ctz(lanes));
    for_each(lanes & (lanes - 1), [&](int lane) { result = combined(result, from.get<u32>(warp, lane)); });
    for_each(lanes, [&](int lane) { to.set(warp, lane, result); });
  };
}

Action vote(Form& form) {
  form.need({"sync"});
  const std::string how = form.one_of({"ballot", "all", "any", "uni"});
  form.type();
  together(form);
  const Slot to = form.slot(0), from = form.slot(1);
  return [=](Block&, Warp& warp, Lanes lanes) {
    Lanes yes = 0;
    for_each(lanes, [&](int lane) { yes |= Lanes(from.get<bool>(warp, lane)) << lane; });
    const u32 result = how == "ballot" ? yes : how == "any" ? yes != 0 : yes == lanes || (how == "uni" && yes == 0);
    for_each(lanes, [&](int lane) { to.set(warp, lane, result); });
  };
}

Action elect(Form& form) {
  form.need({"sync"});
  together(form);
  const Slot leader = form.slot(0);
  Slot chosen;
  chosen.reg = form.operand(0).second;
  return [=](Block&, Warp& warp, Lanes lanes) {
    const int first = __builtin_ctz(lanes);
    for_each(lanes, [&](int lane) {
      leader.set(warp, lane, u32(first));
      chosen.set(warp, lane, lane == first);
    });
  };
}

Action active_mask(Form& form) {
  form.need({"b32"});
  const Slot to = form.slot(0);
  return [=](Block&, Warp& warp, Lanes lanes) { for_each(lanes, [&](int lane) { to.set(warp, lane, lanes); }); };
}

Action trap(Form&) {
  return [](Block& block, Warp& warp, Lanes lanes) { block.fault("trap", warp, __builtin_ctz(lanes)); };
}
Action nothing(Form& form) {
  form.type();
  return {};
}

}  // namespace

Decoders warp_decoders() {
  return {{"bra", jump},  {"ret", leave},      {"exit", leave},  {"bar", wait_for_block}, {"barrier", wait_for_block}, {"shfl", shuffle},
          {"redux", reduce}, {"vote", vote}, {"elect", elect}, {"activemask", active_mask}, {"trap", trap}, {"nanosleep", nothing}};
}

}  // namespace ptx
