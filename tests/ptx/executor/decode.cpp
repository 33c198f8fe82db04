// What an instruction does, found by its opcode, and the registers that it reads and writes.
#include <set>

#include "form.h"

namespace ptx {
namespace {

void add_registers(std::vector<int>& to, const Operand& operand) {
  if (operand.reg >= 0) to.push_back(operand.reg);
  if (operand.second >= 0) to.push_back(operand.second);
  for (auto& part : operand.parts) add_registers(to, part);
}

// The first operand is what is written, but for those that write no register.
void find_registers(Instruction& instruction) {
  static const std::set<std::string> without = {"st",  "red",      "bar",     "barrier", "fence", "membar", "cp",
                                                "bra", "stmatrix", "mbarrier", "tcgen05", "wgmma", "nanosleep"};
  const auto has = [&](const char* name) {
    for (auto& m : instruction.modifiers)
      if (m == name) return true;
    return false;
  };
  const bool writes = !without.count(instruction.opcode) || has("try_wait") || (instruction.opcode == "tcgen05" && has("ld"));
  for (size_t i = 0; i < instruction.operands.size(); i++) {
    if (i == 0 && has("mma_async")) continue;  // its sum has checks of its own
    add_registers(i == 0 && writes ? instruction.writes : instruction.reads, instruction.operands[i]);
  }
  instruction.copies = instruction.opcode == "mov" && instruction.operands[1].kind == Operand::in_register;
  instruction.packs = instruction.opcode == "mov" && instruction.operands[1].kind == Operand::vector;
  if (instruction.guard >= 0) instruction.reads.push_back(instruction.guard);
}

}  // namespace

void decode(Instruction& instruction) {
  static const Decoders decoders = [] {
    Decoders all;
    for (auto part : {arithmetic_decoders, function_decoders, conversion_decoders, memory_decoders, warp_decoders, async_decoders,
                      tensor_core_decoders})
      all.merge(part());
    return all;
  }();
  Form form(instruction);
  const auto found = decoders.find(instruction.opcode);
  if (found == decoders.end()) form.unsupported();
  instruction.action = found->second(form);
  if (!form.rest().empty()) form.unsupported();
  find_registers(instruction);
}

}  // namespace ptx
