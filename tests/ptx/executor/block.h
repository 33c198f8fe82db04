// A launch, its blocks and their warps: all state that instructions change.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "memory.h"
#include "module.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr Lanes kAllLanes = ~0u;

template <class F>
void for_each(Lanes lanes, F f) {
  for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}

// Set by name from Python, in this order.
struct Options {
  s64 seed = 1;
  s64 shuffle = 0;      // blocks and warps in random order, which change at random
  s64 approximate = 0;  // approximate instructions are off by what is documented
  s64 truncate = 0;     // sums of tensor cores are truncated to 24 bits
  s64 lazy = 1;         // asynchronous work is done when it is waited for, else when it is issued
  s64 limit = 0;        // of warp instructions
};

struct Copy {
  u32 to, bytes;
  u64 from;
  u32 from_bytes;  // the rest is zeros
};

// A product of matrices that a tensor core computes while the program goes on.
struct Product {
  int rows = 0, columns = 0, depth = 0;
  std::string type;  // of both factors
  u64 a = 0, b = 0;  // descriptors of matrices in shared memory
  bool a_transposed = false, b_transposed = false, accumulates = false;
  f64 sign = 1;
  std::vector<int> registers;            // wgmma: those of the sum
  std::vector<std::array<u32, 4>> a_in;  // wgmma: A by lanes, where it comes in registers
  u32 tensor_address = 0;                // tcgen05: where the sum lies
  bool a_in_tensor = false;              // tcgen05: A lies in tensor memory too, and `a` is where
  u32 serial = 0;
  int group = -1, thread = 0;
  const Instruction* instruction = nullptr;
};

struct Warp {
  enum State { running, waiting, done };
  int number = 0;
  State state = running;
  std::vector<u64> registers;      // 32 lanes of each
  std::vector<Lanes> initialized;  // for each register
  std::vector<u8> local;           // for each lane
  Lanes live = 0;
  bool converged = true;
  int pc = 0;                      // of all lanes while converged
  std::array<int, kLanes> pcs{};   // else
  u32 moment = 0;                  // barriers of the warp so far
  bool polled = false;             // its last turn ended with a barrier that is not complete

  // cp.async, by lane: what is in no group yet, and the groups.
  std::array<std::vector<Copy>, kLanes> loose;
  std::array<std::deque<std::vector<Copy>>, kLanes> groups;

  // wgmma.
  std::deque<Product> products;
  int product_groups = 0;
  u32 product_fence = 0;           // the serial of the last one
  std::vector<u32> written;        // the serial of each register's last writer
  std::vector<u8> in_flight;       // registers that tensor cores will write

  u64& at(int reg, int lane) { return registers[size_t(reg) * kLanes + size_t(lane)]; }
};

struct Barrier {  // mbarrier
  int expected = 0, pending = 0, phase = 0;
};

struct TensorCell {
  u32 bits = ~0u;  // a NaN
  bool written = false, in_flight = false;
};

struct Launch;

struct Block {
  Launch& launch;
  int number = 0;
  std::array<u32, 3> index{};
  std::vector<Warp> warps;
  std::vector<u8> shared;
  std::vector<SharedByte> shared_state;
  std::vector<u32> proxy_fence;  // the serial of each thread's last one
  std::map<u32, Barrier> barriers;
  std::vector<int> arrived;      // warps that wait at the barrier of the block
  u64 barrier = 0;               // which one of 16

  // tcgen05.
  std::vector<TensorCell> tensor;
  std::set<u32> tensor_allocations;
  u32 tensor_columns = 0;
  std::deque<Product> products;
  std::deque<std::pair<int, u32>> commits;  // (number, mbarrier)
  int commit_count = 0;

  explicit Block(Launch& launch) : launch(launch) {}
  void run();

  Stamp stamp(const Warp& warp, int lane) const;
  // Where a lane's access goes, once it was checked. `value`: what it will write.
  u8* global_at(Warp& warp, int lane, u64 address, u32 bytes, Touch touch);
  u8* shared_at(Warp& warp, int lane, u64 address, u32 bytes, Touch touch, const u8* value = nullptr);
  void check_alignment(Warp& warp, int lane, u64 address, u32 bytes);

  void note(const char* kind, const std::string& detail, const Warp& warp, int lane);
  [[noreturn]] void fault(const std::string& what, const Warp& warp, int lane);
  std::string where(const Warp& warp, int lane) const;

 private:
  void start();
  void step(Warp& warp);
  int next_group(Warp& warp, Lanes& lanes);
  void execute(Warp& warp, const Instruction& instruction, int pc, Lanes lanes);
  void check_registers(Warp& warp, const Instruction& instruction, Lanes lanes, Lanes active);
  void branch(Warp& warp, const Instruction& instruction, int pc, Lanes lanes, Lanes active);
  void leave(Warp& warp, Lanes lanes);
  void reconverge(Warp& warp);
  void release_barrier();
};

struct Note {
  u64 count = 0;
  std::string first;
};

struct Launch {
  const Module& module;
  const Kernel& kernel;
  Options options;
  std::array<u32, 3> grid{}, threads{};
  u32 thread_count = 0, shared_bytes = 0;
  std::vector<u8> parameters;
  std::vector<Region> regions;  // by address
  std::map<std::string, Note> notes;
  std::mt19937_64 random;
  const Instruction* current = nullptr;
  u32 serial = 0;  // of the instruction that runs
  u32 epoch = 0;   // barriers of blocks so far
  u64 executed = 0;

  Launch(const Module& module, const Kernel& kernel) : module(module), kernel(kernel) {}
  void run();
  Region* region(u64 address, u32 bytes);
};

// A register or an immediate, as instructions read and write it.
struct Slot {
  int reg = -1;
  u64 value = 0;
  bool negated = false;

  Slot() = default;
  Slot(const Operand& o) : reg(o.reg), value(o.value), negated(o.negated) {}

  u64 bits(Warp& warp, int lane) const { return reg >= 0 ? warp.at(reg, lane) : value; }
  u64 address(Warp& warp, int lane) const { return (reg >= 0 ? warp.at(reg, lane) : 0) + value; }
  template <class T>
  T get(Warp& warp, int lane) const {
    return from_bits<T>(bits(warp, lane));
  }
  template <class T>
  void set(Warp& warp, int lane, T result) const {
    if (reg >= 0) warp.at(reg, lane) = to_bits(result);
  }
};
template <>
inline bool Slot::get<bool>(Warp& warp, int lane) const {
  return bool(bits(warp, lane) & 1) != negated;
}

std::vector<Slot> slots(const Operand& operand);  // of a vector, or one alone

// The value of an operand that must be the same in all lanes.
u64 uniform(Block& block, Warp& warp, Lanes lanes, const Slot& slot, const char* what);

// Asynchronous work that other files begin.
void complete_commits(Block& block, u32 barrier);
void check_exit(Block& block, Warp& warp, Lanes lanes);

}  // namespace ptx
