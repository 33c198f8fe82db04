// Copies to shared memory that run beside the program, the fences of the asynchronous proxy, and barriers in memory.
#include "form.h"

namespace ptx {
namespace {

// --- cp.async ---

void put(Block& block, const Copy& copy) {
  std::memset(&block.shared[copy.to], 0, copy.bytes);
  std::memcpy(&block.shared[copy.to], reinterpret_cast<const void*>(copy.from), copy.from_bytes);
}

void begin(Block& block, Warp& warp, int lane, const Copy& copy) {
  block.check_alignment(warp, lane, copy.to, copy.bytes);
  block.check_alignment(warp, lane, copy.from, copy.bytes);
  if (copy.from_bytes > copy.bytes) block.fault("cp.async reads more than it writes", warp, lane);
  if (copy.from_bytes) block.global_at(warp, lane, copy.from, copy.from_bytes, Touch::read);
  u8* to = block.shared_at(warp, lane, copy.to, copy.bytes, Touch::write);
  if (block.launch.options.lazy) std::memset(to, 0xff, copy.bytes);
  else put(block, copy);
  for (u32 i = 0; i < copy.bytes; i++) block.shared_state[copy.to + i].in_flight = warp.number * kLanes + lane;
  warp.loose[size_t(lane)].push_back(copy);
}

void complete(Block& block, Warp& warp, int lane, const Copy& copy) {
  for (u32 i = 0; i < copy.bytes; i++) block.shared_state[copy.to + i].in_flight = -1;
  block.shared_at(warp, lane, copy.to, copy.bytes, Touch::write);
  if (block.launch.options.lazy) put(block, copy);
}

void commit(Warp& warp, Lanes lanes) {
  for_each(lanes, [&](int lane) { warp.groups[size_t(lane)].push_back(std::exchange(warp.loose[size_t(lane)], {})); });
}
void wait(Block& block, Warp& warp, Lanes lanes, size_t pending) {
  for_each(lanes, [&](int lane) {
    for (auto& groups = warp.groups[size_t(lane)]; groups.size() > pending; groups.pop_front())
      for (auto& copy : groups.front()) complete(block, warp, lane, copy);
  });
}

Action copy(Form& form) {
  form.need({"async"});
  if (form.take("commit_group")) return [](Block&, Warp& warp, Lanes lanes) { commit(warp, lanes); };
  if (form.take("wait_group")) {
    const size_t pending = form.operand(0).value;
    return [=](Block& block, Warp& warp, Lanes lanes) { wait(block, warp, lanes, pending); };
  }
  if (form.take("wait_all")) return [](Block& block, Warp& warp, Lanes lanes) {
    commit(warp, lanes);
    wait(block, warp, lanes, 0);
  };
  form.ignore({"ca", "cg", "L2::64B", "L2::128B", "L2::256B"});
  if (!form.take("shared")) form.need({"shared::cta"});
  form.need({"global"});
  const Slot to = form.slot(0), from = form.slot(1), bytes = form.slot(2), from_bytes = form.slot(form.operands() > 3 ? 3 : 2);
  return [=](Block& block, Warp& warp, Lanes lanes) {
    for_each(lanes, [&](int lane) {
      const u32 n = bytes.get<u32>(warp, lane);
      begin(block, warp, lane, {u32(to.address(warp, lane)), n, from.address(warp, lane), from_bytes.get<u32>(warp, lane)});
    });
  };
}

// --- fences ---

Action fence(Form& form) {
  if (form.take("proxy")) {
    form.need({"async"});
    form.ignore({"shared::cta", "global"});
    return [](Block& block, Warp& warp, Lanes lanes) {
      for_each(lanes, [&](int lane) { block.proxy_fence[size_t(warp.number * kLanes + lane)] = block.launch.serial; });
    };
  }
  form.ignore({"acq_rel", "sc", "cta", "gpu", "sys", "gl"});
  return {};
}

// --- barriers in memory ---

Action barrier(Form& form) {
  if (!form.take("shared::cta")) form.need({"shared"});
  form.need({"b64"});
  if (form.take("init")) {
    const Slot at = form.slot(0), count = form.slot(1);
    return [=](Block& block, Warp& warp, Lanes lanes) {
      for_each(lanes, [&](int lane) {
        const u32 address = u32(at.address(warp, lane));
        const int expected = count.get<s32>(warp, lane);
        block.check_alignment(warp, lane, address, 8);
        block.shared_at(warp, lane, address, 8, Touch::write);
        block.barriers[address] = {expected, expected, 0};
      });
    };
  }
  if (form.take("inval")) {
    const Slot at = form.slot(0);
    return [=](Block& block, Warp& warp, Lanes lanes) {
      for_each(lanes, [&](int lane) {
        for (auto& [_, used] : block.commits)
          if (used == u32(at.address(warp, lane))) block.note("in flight", "a barrier ends that a tensor core will arrive at", warp, lane);
        block.barriers.erase(u32(at.address(warp, lane)));
      });
    };
  }
  form.need({"try_wait", "parity"});
  form.instruction.flow = Flow::poll;
  const Slot done = form.slot(0), at = form.slot(1), parity = form.slot(2);
  return [=](Block& block, Warp& warp, Lanes lanes) {
    warp.polled = true;
    for_each(lanes, [&](int lane) {
      const u32 address = u32(at.address(warp, lane));
      const auto found = block.barriers.find(address);
      if (found == block.barriers.end()) block.fault("a barrier is waited for that was not initialized", warp, lane);
      const int phase = parity.get<s32>(warp, lane) & 1;
      if ((found->second.phase & 1) == phase) complete_commits(block, address);
      const bool complete = (found->second.phase & 1) != phase;
      done.set(warp, lane, complete);
      warp.polled = warp.polled && !complete;
    });
  };
}

}  // namespace

void check_exit(Block& block, Warp& warp, Lanes lanes) {
  for_each(lanes, [&](int lane) {
    for (auto& group : warp.groups[size_t(lane)])
      if (!group.empty()) block.note("in flight", "a thread ends whose copies were not waited for", warp, lane);
    if (!warp.loose[size_t(lane)].empty()) block.note("in flight", "a thread ends whose copies are in no group", warp, lane);
  });
  if (!warp.products.empty() && lanes) block.note("in flight", "a warp ends whose products were not waited for", warp, __builtin_ctz(lanes));
}

Decoders async_decoders() { return {{"cp", copy}, {"fence", fence}, {"membar", fence}, {"mbarrier", barrier}}; }

}  // namespace ptx
