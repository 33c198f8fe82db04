#include <algorithm>
#include <numeric>

#include "block.h"

namespace ptx {
namespace {

u64 special(const std::string& name, const Block& block, int thread) {
  const auto& size = block.launch.threads;
  const u32 t = u32(thread), lane = t % kLanes;
  const u64 below = (1ull << lane) - 1, upto = (2ull << lane) - 1;
  const u32 place[3] = {t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
  const size_t axis = size_t(name.back() - 'x');
  if (name.compare(0, 5, "%tid.") == 0) return place[axis];
  if (name.compare(0, 6, "%ntid.") == 0) return size[axis];
  if (name.compare(0, 7, "%ctaid.") == 0) return block.index[axis];
  if (name.compare(0, 8, "%nctaid.") == 0) return block.launch.grid[axis];
  if (name == "%laneid") return lane;
  if (name == "%warpid") return t / kLanes;
  if (name == "%lanemask_lt") return below;
  if (name == "%lanemask_le") return upto;
  if (name == "%lanemask_eq") return upto ^ below;
  if (name == "%lanemask_ge") return u32(~below);
  return u32(~upto);  // %lanemask_gt
}

}  // namespace

std::string Block::where(const Warp& warp, int lane) const {
  const Instruction* at = launch.current;
  return "thread " + std::to_string(warp.number * kLanes + lane) + " of block " + std::to_string(number) +
         (at ? ", line " + std::to_string(at->line) + ": " + at->text.substr(0, 120) : "");
}

void Block::note(const char* kind, const std::string& detail, const Warp& warp, int lane) {
  const std::string at = launch.current ? std::to_string(launch.current->line) : "0";
  Note& found = launch.notes[kind + std::string(", line ") + at];
  if (found.count++ == 0) found.first = detail + "; " + where(warp, lane);
}

void Block::fault(const std::string& what, const Warp& warp, int lane) { throw Fault(what + "; " + where(warp, lane)); }

void Launch::run() {
  random.seed(u64(options.seed));
  std::vector<u32> order(grid[0] * grid[1] * grid[2]);
  std::iota(order.begin(), order.end(), 0);
  if (options.shuffle) std::shuffle(order.begin(), order.end(), random);
  for (u32 number : order) {
    Block block(*this);
    block.number = int(number);
    block.index = {number % grid[0], number / grid[0] % grid[1], number / grid[0] / grid[1]};
    epoch++;
    block.run();
  }
}

void Block::start() {
  const Kernel& kernel = launch.kernel;
  const size_t count = (launch.thread_count + kLanes - 1) / kLanes, registers = size_t(kernel.registers);
  shared.assign(launch.shared_bytes, 0xff);
  shared_state.assign(launch.shared_bytes, {});
  proxy_fence.assign(count * kLanes, 0);
  if (launch.module.target.compare(0, 5, "sm_10") == 0) tensor.assign(128 * 512, {});
  warps.resize(count);
  for (size_t i = 0; i < count; i++) {
    Warp& warp = warps[i];
    warp.number = int(i);
    warp.registers.assign(registers * kLanes, 0xcccccccccccccccd);
    warp.initialized.assign(registers, 0);
    warp.written.assign(registers, 0);
    warp.in_flight.assign(registers, 0);
    warp.local.assign(size_t(kernel.local_bytes) * kLanes, 0xcc);
    const u32 threads = std::min(launch.thread_count - u32(i) * kLanes, u32(kLanes));
    warp.live = threads == kLanes ? kAllLanes : (1u << threads) - 1;
    for (auto& [name, reg] : kernel.special) {
      warp.initialized[size_t(reg)] = kAllLanes;
      for (int lane = 0; lane < kLanes; lane++) warp.at(reg, lane) = special(name, *this, warp.number * kLanes + lane);
    }
  }
}

void Block::run() {
  start();
  std::vector<size_t> order(warps.size());
  std::iota(order.begin(), order.end(), 0);
  const auto is = [](Warp::State state) { return [state](const Warp& w) { return w.state == state; }; };
  int idle = 0;  // turns of all warps in which none did more than poll
  while (!std::all_of(warps.begin(), warps.end(), is(Warp::done))) {
    if (launch.options.shuffle) std::shuffle(order.begin(), order.end(), launch.random);
    bool progress = false;
    for (size_t i : order) {
      if (warps[i].state != Warp::running) continue;
      step(warps[i]);
      progress = progress || !warps[i].polled;
    }
    idle = progress ? 0 : idle + 1;
    if (std::none_of(warps.begin(), warps.end(), is(Warp::running))) release_barrier();
    if (idle > 8) fault("deadlock: all warps wait", warps[0], 0);
  }
}

void Block::release_barrier() {
  if (arrived.empty()) return;
  const size_t done = size_t(std::count_if(warps.begin(), warps.end(), [](const Warp& w) { return w.state == Warp::done; }));
  if (done) note("barrier", "some warps wait at a barrier, others have ended", warps[size_t(arrived[0])], 0);
  for (int i : arrived) warps[size_t(i)].state = Warp::running;
  arrived.clear();
  launch.epoch++;
}

// The lanes at the lowest place that may go on, and that place.
int Block::next_group(Warp& warp, Lanes& lanes) {
  if (warp.converged) return lanes = warp.live, warp.pc;
  for (Lanes rest = warp.live; rest;) {
    int pc = INT32_MAX;
    for_each(rest, [&](int lane) { pc = std::min(pc, warp.pcs[size_t(lane)]); });
    lanes = 0;
    for_each(rest, [&](int lane) { lanes |= Lanes(warp.pcs[size_t(lane)] == pc) << lane; });
    const Instruction& next = launch.kernel.instructions[size_t(pc)];
    Lanes needed = next.together ? warp.live : 0;
    if (next.together && next.members >= 0)
      needed &= Lanes(Slot(next.operands[size_t(next.members)]).bits(warp, __builtin_ctz(lanes)));
    if (!(needed & ~lanes)) return pc;
    rest &= ~lanes;
  }
  fault("deadlock: threads of a warp wait at different places", warp, __builtin_ctz(warp.live));
}

// Until the warp ends, waits, or another one shall go on.
void Block::step(Warp& warp) {
  warp.polled = false;
  while (true) {
    Lanes lanes = 0;
    const int pc = next_group(warp, lanes);
    if (size_t(pc) >= launch.kernel.instructions.size()) fault("the kernel ends without ret", warp, 0);
    const Instruction& instruction = launch.kernel.instructions[size_t(pc)];
    execute(warp, instruction, pc, lanes);
    if (warp.state != Warp::running) return;
    if (instruction.flow == Flow::poll && warp.polled) return;
    if (launch.options.shuffle && (launch.random() & 15) == 0) return void(warp.polled = false);
  }
}

void Block::execute(Warp& warp, const Instruction& instruction, int pc, Lanes lanes) {
  launch.current = &instruction;
  launch.serial++;
  if (++launch.executed > u64(launch.options.limit)) fault("the limit of instructions is reached", warp, __builtin_ctz(lanes));
  Lanes active = lanes;
  if (instruction.guard >= 0)
    for_each(lanes, [&](int lane) {
      if (bool(warp.at(instruction.guard, lane) & 1) == instruction.guard_negated) active &= ~(1u << lane);
    });
  check_registers(warp, instruction, lanes, active);
  const auto advance = [&](int to, Lanes which) {
    if (warp.converged) warp.pc = to;
    else for_each(which, [&](int lane) { warp.pcs[size_t(lane)] = to; });
  };
  if (instruction.flow == Flow::branch) branch(warp, instruction, pc, lanes, active);
  else advance(pc + 1, lanes);
  if (instruction.flow == Flow::exit) leave(warp, active);
  else if (active && instruction.action) instruction.action(*this, warp, active);
  if (warp.live && !warp.converged) reconverge(warp);
}

void Block::check_registers(Warp& warp, const Instruction& instruction, Lanes lanes, Lanes active) {
  for (int reg : instruction.reads) {
    const Lanes needed = reg == instruction.guard ? lanes : active, missing = needed & ~warp.initialized[size_t(reg)];
    if (missing && (!instruction.packs || reg == instruction.guard)) {
      note("uninitialized", "a register is read that nothing wrote", warp, __builtin_ctz(missing));
      warp.initialized[size_t(reg)] |= missing;
    }
    if (warp.in_flight[size_t(reg)] && active && !instruction.tensor_core)
      note("in flight", "a register is read that a tensor core will write", warp, __builtin_ctz(active));
  }
  if (!active) return;
  Lanes holds = instruction.packs ? 0 : ~Lanes(0);  // where a part of a packed register has been written: nothing may read the others
  if (instruction.packs)
    for (int reg : instruction.reads) holds |= warp.initialized[size_t(reg)];
  for (int reg : instruction.writes) {
    Lanes& initialized = warp.initialized[size_t(reg)];
    initialized = (initialized & ~active) | (active & holds);
    if (instruction.tensor_core) continue;
    warp.written[size_t(reg)] = instruction.copies ? warp.written[size_t(instruction.reads[0])] : launch.serial;
    if (warp.in_flight[size_t(reg)]) note("in flight", "a register is written that a tensor core will write", warp, __builtin_ctz(active));
  }
}

void Block::branch(Warp& warp, const Instruction& instruction, int pc, Lanes lanes, Lanes active) {
  if (warp.converged && (active == lanes || !active)) return void(warp.pc = active ? instruction.target : pc + 1);
  if (warp.converged) {
    warp.converged = false;
    warp.pcs.fill(pc);
  }
  for_each(lanes, [&](int lane) { warp.pcs[size_t(lane)] = active >> lane & 1 ? instruction.target : pc + 1; });
}

void Block::leave(Warp& warp, Lanes lanes) {
  check_exit(*this, warp, lanes);
  warp.live &= ~lanes;
  if (!warp.live) warp.state = Warp::done;
}

void Block::reconverge(Warp& warp) {
  const int pc = warp.pcs[size_t(__builtin_ctz(warp.live))];
  bool same = true;
  for_each(warp.live, [&](int lane) { same = same && warp.pcs[size_t(lane)] == pc; });
  if (same) warp.converged = true, warp.pc = pc;
}

u64 uniform(Block& block, Warp& warp, Lanes lanes, const Slot& slot, const char* what) {
  const u64 value = slot.bits(warp, __builtin_ctz(lanes));
  for_each(lanes, [&](int lane) {
    if (slot.bits(warp, lane) != value) block.fault(std::string(what) + " differs between the threads of a warp", warp, lane);
  });
  return value;
}

std::vector<Slot> slots(const Operand& operand) {
  if (operand.kind != Operand::vector) return {Slot(operand)};
  return {operand.parts.begin(), operand.parts.end()};
}

}  // namespace ptx
