// PTX text, parsed into instructions.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "values.h"

namespace ptx {

using Lanes = u32;  // a bit for each thread of a warp
struct Block;
struct Warp;
using Action = std::function<void(Block&, Warp&, Lanes)>;

struct Operand {
  enum Kind { none, in_register, immediate, vector, address, nothing } kind = none;
  int reg = -1;     // the register, or the base of an address
  int second = -1;  // q of p|q
  u64 value = 0;    // the immediate, or the offset of an address
  bool negated = false;
  bool after_static = false;  // a symbol of dynamic shared memory, which begins where the static one ends
  std::vector<Operand> parts;
};

// What comes after an instruction: the next one, that at its target, nothing, or a turn of the other warps.
enum class Flow { next, branch, exit, barrier, poll };

struct Instruction {
  std::string text, opcode;
  int line = 0;
  std::vector<std::string> modifiers;
  std::vector<Operand> operands;
  int guard = -1;
  bool guard_negated = false;
  int target = -1;  // of a branch

  // What decoding adds.
  Flow flow = Flow::next;
  Action action;
  bool together = false;                    // the threads of a warp execute it as one
  int members = -1;                         // the operand that says which threads those are; all of them without it
  bool tensor_core = false;                 // may use registers of tensor-core work in flight
  bool copies = false;                      // a register, which is then as old as the one that it is a copy of
  bool packs = false;                       // two registers into one: of two f32 that are computed with as one, one may be idle
  std::vector<int> reads, writes;           // registers
};

struct Parameter {
  u32 offset, bytes;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  u32 parameter_bytes = 0, local_bytes = 0;
  int registers = 0;
  std::map<std::string, int> special;  // registers that hold %tid.x and its like
  std::vector<Instruction> instructions;
};

struct Module {
  std::string target;
  u32 static_shared = 0;
  std::map<std::string, Kernel> kernels;
  std::map<std::string, std::vector<u8>> globals;
};

// Raises Fault for what it does not understand, with the line and the instruction.
std::unique_ptr<Module> parse(const std::string& text);

// Fills in the action of an instruction and what depends on its kind. Raises Fault where there is none for it.
void decode(Instruction& instruction);

}  // namespace ptx
