// Loads and stores, atomics, and the 8 x 8 matrices of ldmatrix and stmatrix.
#include "form.h"

namespace ptx {
namespace {

enum class Space { generic, global, shared, local, parameters };

Space space_of(Form& form) {
  if (form.take("global") || form.take("const")) return Space::global;
  if (form.take("shared") || form.take("shared::cta")) return Space::shared;
  if (form.take("local")) return Space::local;
  return form.take("param") || form.take("param::entry") ? Space::parameters : Space::generic;
}

struct Access {
  Space space;
  u32 bytes;
  Touch touch;
};

u8* place(Block& block, Warp& warp, int lane, Access access, u64 address, const u8* value = nullptr) {
  if (access.space == Space::generic) {
    access.space = address >= kLocalWindow ? Space::local : address >= kSharedWindow ? Space::shared : Space::global;
    if (access.space != Space::global) address &= kSharedWindow - 1;
  }
  block.check_alignment(warp, lane, address, access.bytes);
  if (access.space == Space::global) return block.global_at(warp, lane, address, access.bytes, access.touch);
  if (access.space == Space::shared) return block.shared_at(warp, lane, address, access.bytes, access.touch, value);
  const bool local = access.space == Space::local;
  const u64 size = local ? block.launch.kernel.local_bytes : block.launch.parameters.size();
  if (address + access.bytes > size) block.fault(std::string("out of bounds: ") + (local ? "local memory" : "parameters"), warp, lane);
  return local ? &warp.local[size_t(lane) * size + address] : &block.launch.parameters[address];
}

int vector_of(Form& form) { return form.take("v2") ? 2 : form.take("v4") ? 4 : form.take("v8") ? 8 : 1; }

// What says where data may be cached, or that nobody else writes it.
void ignore_hints(Form& form) {
  form.ignore({"ca", "cg", "cs", "lu", "wb", "wt", "nc", "weak", "volatile", "L1::evict_first", "L1::evict_last", "L1::no_allocate",
               "L2::evict_first", "L2::evict_last", "L2::64B", "L2::128B", "L2::256B"});
}

Action load(Form& form) {
  const Space space = space_of(form);
  ignore_hints(form);
  const int count = vector_of(form);
  const Type type = form.type();
  const std::vector<Slot> to = slots(form.operand(0));
  const Slot from = form.slot(1);
  if (int(to.size()) != count) form.unsupported();
  const int bytes = type.bytes, unused = type.kind == 's' ? 64 - 8 * bytes : 0;
  const Access access{space, u32(bytes * count), Touch::read};
  return [=](Block& block, Warp& warp, Lanes lanes) {
    for_each(lanes, [&](int lane) {
      const u8* at = place(block, warp, lane, access, from.address(warp, lane));
      for (int i = 0; i < count; i++) {
        u64 value = 0;
        std::memcpy(&value, at + i * bytes, size_t(bytes));
        to[size_t(i)].set(warp, lane, u64(s64(value << unused) >> unused));
      }
    });
  };
}

Action store(Form& form) {
  const Space space = space_of(form);
  ignore_hints(form);
  const int count = vector_of(form);
  const Type type = form.type();
  const Slot to = form.slot(0);
  const std::vector<Slot> from = slots(form.operand(1));
  if (int(from.size()) != count || space == Space::parameters) form.unsupported();
  const int bytes = type.bytes;
  const Access access{space, u32(bytes * count), Touch::write};
  return [=](Block& block, Warp& warp, Lanes lanes) {
    for_each(lanes, [&](int lane) {
      u8 value[64];
      for (int i = 0; i < count; i++) {
        const u64 bits = from[size_t(i)].bits(warp, lane);
        std::memcpy(value + i * bytes, &bits, size_t(bytes));
      }
      std::memcpy(place(block, warp, lane, access, to.address(warp, lane), value), value, access.bytes);
    });
  };
}

Action convert_address(Form& form) {
  const bool to = form.take("to");
  const Space space = space_of(form);
  form.type();
  const u64 window = space == Space::shared ? kSharedWindow : space == Space::local ? kLocalWindow : 0;
  return lanewise<u64, u64>(form, [=](u64 address) { return to ? address - window : address + window; });
}

// The sum, extreme or exchange that an atomic instruction writes.
template <class T>
T updated(const std::string& operation, T before, T value, T other) {
  if (operation == "add") return T(before + value);
  if (operation == "min") return value < before ? value : before;
  if (operation == "max") return value > before ? value : before;
  if (operation == "cas") return before == value ? other : before;
  if constexpr (std::is_integral_v<T>) {
    if (operation == "and") return before & value;
    if (operation == "or") return before | value;
    if (operation == "xor") return before ^ value;
  }
  return value;  // exch
}

template <class T>
Action update(const Form& form, Space space, const std::string& operation, bool returns) {
  const Slot to = returns ? form.slot(0) : Slot(), at = form.slot(returns), value = form.slot(returns + 1u);
  const Slot other = operation == "cas" ? form.slot(3) : Slot();
  const Access access{space, sizeof(T), Touch::update};
  return [=](Block& block, Warp& warp, Lanes lanes) {
    for_each(lanes, [&](int lane) {
      u8* place_ = place(block, warp, lane, access, at.address(warp, lane));
      T before;
      std::memcpy(&before, place_, sizeof(T));
      const T after = updated(operation, before, value.get<T>(warp, lane), other.get<T>(warp, lane));
      std::memcpy(place_, &after, sizeof(T));
      if (returns) to.set(warp, lane, before);
    });
  };
}

template <bool returns>
Action atomic(Form& form) {
  form.ignore({"relaxed", "acquire", "release", "acq_rel", "gpu", "cta", "sys"});
  const Space space = space_of(form);
  const std::string operation = form.one_of({"add", "min", "max", "exch", "cas", "and", "or", "xor"});
  const Type type = form.type();
  if (operation.empty()) form.unsupported();
  if (type.is("f32")) return update<f32>(form, space, operation, returns);
  if (type.is("f64")) return update<f64>(form, space, operation, returns);
  const bool is_signed = type.kind == 's';
  if (type.floating() || type.bytes < 4) form.unsupported();
  if (type.bytes == 4) return is_signed ? update<s32>(form, space, operation, returns) : update<u32>(form, space, operation, returns);
  return is_signed ? update<s64>(form, space, operation, returns) : update<u64>(form, space, operation, returns);
}

// Lane l holds the entries (l / 4, 2 (l % 4)) and the next one of each matrix, or those of its transpose; lane 8 i + r has the
// address of row r of matrix i.
template <bool loads>
Action matrices(Form& form) {
  form.need({"sync", "aligned", "m8n8", "b16"});
  if (!form.take("shared")) form.need({"shared::cta"});
  const int count = form.take("x4") ? 4 : form.take("x2") ? 2 : (form.need({"x1"}), 1);
  const bool transposed = form.take("trans");
  const std::vector<Slot> registers = slots(form.operand(!loads));
  const Slot rows = form.slot(loads);
  if (int(registers.size()) != count) form.unsupported();
  form.instruction.together = true;
  return [=](Block& block, Warp& warp, Lanes lanes) {
    if (lanes != kAllLanes) block.fault("threads of the warp are missing", warp, __builtin_ctz(lanes));
    for (int i = 0; i < count; i++)
      for (int lane = 0; lane < kLanes; lane++) {
        u32 value = loads ? 0 : u32(registers[size_t(i)].bits(warp, lane));
        for (int half = 0; half < 2; half++) {
          const int along = 2 * (lane & 3) + half, across = lane >> 2;
          const u64 row = rows.address(warp, 8 * i + (transposed ? along : across));
          block.check_alignment(warp, lane, row, 16);
          u16 entry = u16(value >> 16 * half);
          u8* at = block.shared_at(warp, lane, row + 2 * u64(transposed ? across : along), 2, loads ? Touch::read : Touch::write, reinterpret_cast<u8*>(&entry));
          if (loads) std::memcpy(&entry, at, 2), value |= u32(entry) << 16 * half;
          else std::memcpy(at, &entry, 2);
        }
        if (loads) registers[size_t(i)].set(warp, lane, value);
      }
  };
}

}  // namespace

Decoders memory_decoders() {
  return {{"ld", load},          {"st", store},        {"cvta", convert_address},      {"atom", atomic<true>},
          {"red", atomic<false>}, {"ldmatrix", matrices<true>}, {"stmatrix", matrices<false>}};
}

}  // namespace ptx
