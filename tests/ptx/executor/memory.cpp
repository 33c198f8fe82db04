#include <algorithm>
#include <cstdio>

#include "block.h"

namespace ptx {
namespace {

std::string hexadecimal(u64 value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string name(const Stamp& stamp) {
  if (stamp.block == Stamp::kSeveral) return "several blocks";
  const std::string block = " of block " + std::to_string(stamp.block);
  if (stamp.warp == Stamp::kSeveral) return "several warps" + block;
  return (stamp.thread == Stamp::kSeveral ? "several threads" : "thread " + std::to_string(stamp.thread)) + block;
}

// Notes an access that nothing orders after an earlier one, and remembers it.
void check_order(Block& block, const Warp& warp, int lane, ByteState& state, const Stamp& now, Touch touch, bool same, const char* space) {
  const bool write = touch == Touch::write;
  const auto say = [&](const char* before, const Stamp& who, const char* after) {
    block.note("race", std::string(space) + " memory: " + before + name(who) + after, warp, lane);
  };
  if (state.writer.races(now) && !same) say("written by ", state.writer, write ? ", written again" : ", read");
  if (write && state.reader.races(now)) say("read by ", state.reader, ", written");
  if (write) state.writer = now;
  if (touch == Touch::read) state.reader.join(now);
}

}  // namespace

Region* Launch::region(u64 address, u32 bytes) {
  auto after = std::upper_bound(regions.begin(), regions.end(), address, [](u64 a, const Region& r) { return a < r.begin; });
  if (after == regions.begin()) return nullptr;
  Region& found = *--after;
  return address + bytes <= found.begin + found.bytes ? &found : nullptr;
}

Stamp Block::stamp(const Warp& warp, int lane) const {
  return {number, s16(warp.number), s16(warp.number * kLanes + lane), launch.epoch, warp.moment};
}

void Block::check_alignment(Warp& warp, int lane, u64 address, u32 bytes) {
  if (address % bytes) fault("misaligned access of " + std::to_string(bytes) + " bytes at " + hexadecimal(address), warp, lane);
}

u8* Block::global_at(Warp& warp, int lane, u64 address, u32 bytes, Touch touch) {
  Region* region = launch.region(address, bytes);
  if (!region)
    fault(std::string("out of bounds: ") + (touch == Touch::read ? "read" : "write") + " of global memory at " + hexadecimal(address), warp, lane);
  const Stamp now = stamp(warp, lane);
  for (u32 i = 0; i < bytes && touch != Touch::update; i++)
    check_order(*this, warp, lane, region->state(address - region->begin + i), now, touch, false, "global");
  return reinterpret_cast<u8*>(address);
}

u8* Block::shared_at(Warp& warp, int lane, u64 address, u32 bytes, Touch touch, const u8* value) {
  if (address + bytes > shared.size())
    fault("out of bounds: byte " + std::to_string(address) + " of " + std::to_string(shared.size()) + " of shared memory", warp, lane);
  const Stamp now = stamp(warp, lane);
  const bool write = touch == Touch::write;
  for (u32 i = 0; i < bytes && touch != Touch::update; i++) {
    SharedByte& state = shared_state[address + i];
    if (state.in_flight >= 0)
      note("in flight", "shared memory is accessed that thread " + std::to_string(state.in_flight) + " copies to", warp, lane);
    if (!write && !state.writer.anyone()) note("uninitialized", "shared memory is read that nobody wrote", warp, lane);
    // Triton lets several threads write what all of them hold.
    const bool same = write && value && state.writer.anyone() && state.in_flight < 0 && shared[address + i] == value[i];
    check_order(*this, warp, lane, state, now, touch, same, "shared");
    if (write) state.serial = launch.serial;
  }
  return &shared[address];
}

}  // namespace ptx
