// What is known of each byte of memory: who wrote it and who read it, and whether an access now is ordered after that.
#pragma once

#include <memory>
#include <vector>

#include "values.h"

namespace ptx {

// Shared and local memory as generic addresses.
constexpr u64 kSharedWindow = 1ull << 60, kLocalWindow = 1ull << 61;

// How memory is accessed: atomic updates are in order with all else, and what only looks is not remembered.
enum class Touch { read, write, update, look };

// Who accesses memory, and when. Barriers of a block begin a new epoch, those of a warp a new moment.
struct Stamp {
  static constexpr int kNobody = -1, kSeveral = -2;
  s32 block = kNobody;
  s16 warp = 0, thread = 0;
  u32 epoch = 0, moment = 0;

  bool anyone() const { return block != kNobody; }
  // Whether nothing orders this access before a later one.
  bool races(const Stamp& later) const {
    if (!anyone()) return false;
    if (block != later.block) return true;
    if (epoch != later.epoch) return false;
    if (warp != later.warp) return true;
    return moment == later.moment && thread != later.thread;
  }
  // Both readers as one.
  void join(const Stamp& later) {
    if (!races(later)) *this = later;
    else if (block != later.block) block = kSeveral;
    else if (warp != later.warp) warp = kSeveral;
    else thread = kSeveral;
  }
};

struct ByteState {
  Stamp writer, reader;
};

// The storage of a tensor, or a global variable of the module.
struct Region {
  u64 begin, bytes;
  std::vector<std::unique_ptr<ByteState[]>> pages;  // made when they are touched

  static constexpr u64 kPage = 4096;
  ByteState& state(u64 offset) {
    if (pages.empty()) pages.resize(bytes / kPage + 1);
    auto& page = pages[offset / kPage];
    if (!page) page = std::make_unique<ByteState[]>(kPage);
    return page[offset % kPage];
  }
};

struct SharedByte : ByteState {
  u32 serial = 0;     // of the instruction that wrote it
  s32 in_flight = -1;  // the thread whose asynchronous copy will write it
};

}  // namespace ptx
