// Products of matrices: mma of a warp, wgmma of four warps, tcgen05 with a memory of its own.
#include <algorithm>

#include "form.h"

namespace ptx {
namespace {

int bytes_of(const std::string& type) { return type == "tf32" ? 4 : 2; }
// Of 32 bytes in all: what one instruction multiplies.
int depth_of(const std::string& type) { return 32 / bytes_of(type); }

// An entry of a factor; of tf32 the last 13 bits are not looked at.
f64 entry(u32 bits, const std::string& type) {
  if (type == "tf32") return f64(from_bits<f32>(bits & 0xffffe000));
  return type == "bf16" ? f64(f32(from_bits<bf16>(bits))) : f64(from_bits<f16>(bits));
}

// x + sum of p as tensor cores may form it at worst: each term truncated at the 24th bit of the largest, the result as well.
f32 truncated_sum(f64 x, const f64* p, int n) {
  f64 largest = std::fabs(x);
  for (int i = 0; i < n; i++) largest = std::max(largest, std::fabs(p[i]));
  int exponent;
  std::frexp(largest, &exponent);
  const f64 unit = std::ldexp(1.0, exponent - 24);
  f64 sum = std::trunc(x / unit);
  for (int i = 0; i < n; i++) sum += std::trunc(p[i] / unit);
  sum *= unit;
  const f32 result = f32(sum);
  return std::fabs(f64(result)) > std::fabs(sum) ? std::nextafterf(result, 0) : result;
}

f32 sum_of(const Options& options, f64 x, const f64* p, int n) {
  bool special = !std::isfinite(x), zero = x == 0;
  for (int i = 0; i < n; i++) special = special || !std::isfinite(p[i]), zero = zero && p[i] == 0;
  if (options.truncate && !special && !zero) return truncated_sum(x, p, n);
  long double sum = x;
  for (int i = 0; i < n; i++) sum += p[i];
  return f32(sum);
}

void check_whole(Block& block, Warp& warp, Lanes lanes) {
  if (lanes != kAllLanes) block.fault("threads of the warp are missing", warp, __builtin_ctz(lanes));
}

// --- mma ---

// Where the entries of a fragment lie: lane l, which is g = l / 4 and t = l % 4, holds some of row (or column) g.
struct Place {
  int row, column;
};
Place place_of_a(int lane, int reg, int half, int bytes) {
  const int g = lane >> 2, t = lane & 3;
  return {g + (reg & 1) * 8, bytes == 4 ? t + (reg >> 1) * 4 : t * 2 + half + (reg >> 1) * 8};
}
Place place_of_b(int lane, int reg, int half, int bytes) {
  const int g = lane >> 2, t = lane & 3;
  return {bytes == 4 ? t + reg * 4 : t * 2 + half + reg * 8, g};
}
Place place_of_sum(int lane, int reg) { return {(lane >> 2) + (reg >> 1 & 1) * 8, (reg >> 2) * 8 + (lane & 3) * 2 + (reg & 1)}; }

Action multiply_warp(const std::string& type, const std::vector<Slot>& d, const std::vector<Slot>& a, const std::vector<Slot>& b,
                     const std::vector<Slot>& c) {
  const int bytes = bytes_of(type), depth = depth_of(type), halves = 4 / bytes;
  return [=](Block& block, Warp& warp, Lanes lanes) {
    check_whole(block, warp, lanes);
    f64 left[16][16], right[16][8];
    for (int lane = 0; lane < kLanes; lane++)
      for (int half = 0; half < halves; half++) {
        for (int i = 0; i < 4; i++) {
          const Place p = place_of_a(lane, i, half, bytes);
          left[p.row][p.column] = entry(a[size_t(i)].get<u32>(warp, lane) >> 16 * half, type);
        }
        for (int i = 0; i < 2; i++) {
          const Place p = place_of_b(lane, i, half, bytes);
          right[p.row][p.column] = entry(b[size_t(i)].get<u32>(warp, lane) >> 16 * half, type);
        }
      }
    f32 sums[kLanes][4];
    for (int lane = 0; lane < kLanes; lane++)
      for (int i = 0; i < 4; i++) {
        const Place p = place_of_sum(lane, i);
        f64 products[16];
        for (int k = 0; k < depth; k++) products[k] = left[p.row][k] * right[k][p.column];
        // In two halves: the hardware of sm_80 takes so many at once.
        const f32 sum = sum_of(block.launch.options, f64(c[size_t(i)].get<f32>(warp, lane)), products, block.launch.options.truncate ? depth / 2 : depth);
        sums[lane][i] = block.launch.options.truncate ? sum_of(block.launch.options, f64(sum), products + depth / 2, depth / 2) : sum;
      }
    for (int lane = 0; lane < kLanes; lane++)
      for (int i = 0; i < 4; i++) d[size_t(i)].set(warp, lane, sums[lane][i]);
  };
}

Action multiply_warp_f64(const Form& form) {
  const std::vector<Slot> d = slots(form.operand(0)), c = slots(form.operand(3));
  const Slot a = slots(form.operand(1))[0], b = slots(form.operand(2))[0];
  return [=](Block& block, Warp& warp, Lanes lanes) {
    check_whole(block, warp, lanes);
    f64 sums[kLanes][2];
    for (int lane = 0; lane < kLanes; lane++)
      for (int i = 0; i < 2; i++) {
        const int row = lane >> 2, column = 2 * (lane & 3) + i;
        f64 sum = c[size_t(i)].get<f64>(warp, lane);
        for (int k = 0; k < 4; k++) sum = std::fma(a.get<f64>(warp, 4 * row + k), b.get<f64>(warp, 4 * column + k), sum);
        sums[lane][i] = sum;
      }
    for (int lane = 0; lane < kLanes; lane++)
      for (int i = 0; i < 2; i++) d[size_t(i)].set(warp, lane, sums[lane][i]);
  };
}

Action multiply(Form& form) {
  form.need({"sync", "aligned", "row", "col"});
  form.instruction.together = true;
  if (form.take("m8n8k4")) {
    form.need({"f64", "f64", "f64", "f64"});
    return multiply_warp_f64(form);
  }
  form.need({"f32"});
  const std::string type = form.one_of({"bf16", "f16", "tf32"});
  form.need({type.c_str(), "f32", type == "tf32" ? "m16n8k8" : "m16n8k16"});
  return multiply_warp(type, slots(form.operand(0)), slots(form.operand(1)), slots(form.operand(2)), slots(form.operand(3)));
}

// --- matrices in shared memory ---

// A descriptor: where a matrix begins, and the distances of its groups of 8 rows or of 16 bytes.
struct Matrix {
  u64 start, leading, stride;
  u64 width;  // bytes of a row before the next one begins
  u64 swizzle;  // bits of the row that are added to those of the place in it
  u64 bytes;
  bool transposed;

  // Entry k of row `row`; transposed, they lie side by side in memory along rows.
  u64 address(u64 row, u64 k) const {
    if (!transposed) {
      const u64 group = start + row / 8 * stride, in = row % 8 * width;
      return swizzle ? swizzled(group + in + k * bytes) : group + in + k * bytes / 16 * leading + k * bytes % 16;
    }
    const u64 across = width / bytes;
    return swizzled(start + row / across * leading + k / 8 * stride + k % 8 * width + row % across * bytes);
  }
  u64 swizzled(u64 address) const { return address ^ (address >> 7 & swizzle) << 4; }
};

Matrix matrix_of(u64 descriptor, u64 layout, const Product& product, bool transposed) {
  const auto field = [&](int shift) { return (descriptor >> shift & 0x3fff) << 4; };
  static const u64 widths[] = {16, 128, 64, 32}, swizzles[] = {0, 7, 3, 1};
  if (descriptor >> 49 & 7) throw Fault("not supported: a base offset of a matrix descriptor");
  if (transposed && (layout == 0 || product.type == "tf32")) throw Fault("not supported: a transposed matrix that is not swizzled");
  return {field(0), field(16), field(32), widths[layout], swizzles[layout], u64(bytes_of(product.type)), transposed};
}

// Entries of a factor, whose bytes must have been written, waited for and fenced.
struct Reader {
  Block& block;
  Warp& warp;
  const Product& product;

  f64 operator()(u64 address) const {
    const u32 bytes = u32(bytes_of(product.type));
    address &= 0x3ffff;
    u32 value = 0;
    // wgmma reads until its warp waits for it; of tcgen05 a barrier in memory tells when it has read.
    const Touch touch = product.registers.empty() ? Touch::look : Touch::read;
    std::memcpy(&value, block.shared_at(warp, product.thread % kLanes, address, bytes, touch), bytes);
    const SharedByte& state = block.shared_state[address];
    if (state.serial > product.serial) say("in flight", "shared memory is written that a tensor core will read");
    const auto fence = [&](int thread) { return thread < 0 ? 0u : block.proxy_fence[size_t(thread)]; };
    if (state.writer.anyone() && fence(state.writer.thread) < state.serial && fence(product.thread) < state.serial)
      say("fence", "a tensor core reads what no fence.proxy.async follows");
    return entry(value, product.type);
  }
  void say(const char* kind, const char* detail) const { block.note(kind, detail, warp, product.thread % kLanes); }
};

struct Factors {
  std::vector<f64> a, b;  // [rows][depth], [columns][depth]
};

Factors read(Block& block, Warp& warp, const Product& product, u64 a_layout, u64 b_layout, int first_row) {
  // Notes name the product, not what waits for it.
  const Instruction* waits = std::exchange(block.launch.current, product.instruction);
  const Reader reader{block, warp, product};
  Factors found;
  for (int row = 0; row < product.rows && product.a_in.empty() && !product.a_in_tensor; row++) {
    const Matrix a = matrix_of(product.a, a_layout, product, product.a_transposed);
    for (int k = 0; k < product.depth; k++) found.a.push_back(reader(a.address(u64(first_row + row), u64(k))));
  }
  const Matrix b = matrix_of(product.b, b_layout, product, product.b_transposed);
  for (int column = 0; column < product.columns; column++)
    for (int k = 0; k < product.depth; k++) found.b.push_back(reader(b.address(u64(column), u64(k))));
  block.launch.current = waits;
  return found;
}

f32 entry_of_sum(const Options& options, const Product& product, const Factors& factors, int row, int column, f64 before) {
  f64 products[16];
  for (int k = 0; k < product.depth; k++)
    products[k] = product.sign * factors.a[size_t(row * product.depth + k)] * factors.b[size_t(column * product.depth + k)];
  return sum_of(options, product.accumulates ? before : 0, products, product.depth);
}

// --- wgmma: each of four warps computes 16 of 64 rows ---

Factors read_for_warp(Block& block, Warp& warp, const Product& product) {
  Factors found = read(block, warp, product, product.a >> 62, product.b >> 62, warp.number % 4 * 16);
  if (product.a_in.empty()) return found;
  const int bytes = bytes_of(product.type);
  found.a.resize(size_t(16 * product.depth));
  for (int lane = 0; lane < kLanes; lane++)
    for (int i = 0; i < 4; i++)
      for (int half = 0; half < 4 / bytes; half++) {
        const Place p = place_of_a(lane, i, half, bytes);
        found.a[size_t(p.row * product.depth + p.column)] = entry(product.a_in[size_t(lane)][size_t(i)] >> 16 * half, product.type);
      }
  return found;
}

void compute(Block& block, Warp& warp, const Product& product) {
  const Factors factors = read_for_warp(block, warp, product);
  for (int lane = 0; lane < kLanes; lane++)
    for (size_t i = 0; i < product.registers.size(); i++) {
      const Place p = place_of_sum(lane, int(i));
      u64& sum = warp.at(product.registers[i], lane);
      sum = to_bits(entry_of_sum(block.launch.options, product, factors, p.row, p.column, f64(from_bits<f32>(sum))));
    }
}

void wait_for_groups(Block& block, Warp& warp, int pending) {
  while (!warp.products.empty() && warp.products.front().group >= 0 && warp.product_groups - warp.products.front().group >= pending) {
    if (block.launch.options.lazy) compute(block, warp, warp.products.front());
    warp.products.pop_front();
  }
  std::fill(warp.in_flight.begin(), warp.in_flight.end(), 0);
  for (auto& product : warp.products)
    for (int reg : product.registers) warp.in_flight[size_t(reg)] = 1;
}

// wgmma.fence must stand between what the program writes to registers and their use by the tensor cores.
void check_fence(Block& block, Warp& warp, const std::vector<int>& registers) {
  for (int reg : registers)
    if (warp.written[size_t(reg)] > warp.product_fence) return block.note("fence", "a register of wgmma was written since wgmma.fence", warp, 0);
}
void check_sum(Block& block, Warp& warp, const Product& product) {
  std::vector<int> own = product.registers;  // not those of a product that is under way
  own.erase(std::remove_if(own.begin(), own.end(), [&](int reg) { return warp.in_flight[size_t(reg)]; }), own.end());
  check_fence(block, warp, own);
  for (int reg : product.registers)
    if (product.accumulates && warp.initialized[size_t(reg)] != kAllLanes)
      return block.note("uninitialized", "wgmma adds to a register that nothing wrote", warp, 0);
}
void check_factor(Block& block, Warp& warp, const std::vector<int>& registers) {
  check_fence(block, warp, registers);
  for (int reg : registers)
    if (warp.in_flight[size_t(reg)]) return block.note("in flight", "a register is read that a tensor core will write", warp, 0);
}

Action product_of_warps(Form& form) {
  form.need({"mma_async", "sync", "aligned", "f32"});
  const std::string type = form.one_of({"bf16", "f16", "tf32"});
  form.need({type.c_str()});
  if (form.rest().size() != 1) form.unsupported();
  Product model;
  model.type = type;
  model.rows = 16;
  model.depth = depth_of(type);
  const std::string shape = form.rest()[0];  // m64nNk16
  model.columns = std::stoi(shape.substr(shape.find('n') + 1));
  form.need({("m64n" + std::to_string(model.columns) + "k" + std::to_string(model.depth)).c_str()});
  for (auto& slot : slots(form.operand(0))) model.registers.push_back(slot.reg);
  if (int(model.registers.size()) != model.columns / 2) form.unsupported();
  const bool in_registers = form.operand(1).kind == Operand::vector;
  const std::vector<Slot> a = slots(form.operand(1));
  const Slot b = form.slot(2), accumulates = form.slot(3);
  model.sign = f64(s64(form.operand(4).value)) * f64(s64(form.operand(5).value));
  if (type != "tf32") {
    if (!in_registers) model.a_transposed = form.operand(6).value != 0;
    model.b_transposed = form.operand(in_registers ? 6 : 7).value != 0;
  }
  return [=](Block& block, Warp& warp, Lanes lanes) {
    check_whole(block, warp, lanes);
    Product product = model;
    product.serial = block.launch.serial;
    product.instruction = block.launch.current;
    product.thread = warp.number * kLanes;
    product.accumulates = accumulates.get<bool>(warp, 0);
    product.b = uniform(block, warp, lanes, b, "a descriptor");
    std::vector<int> read;
    if (in_registers) {
      for (int lane = 0; lane < kLanes; lane++)
        product.a_in.push_back({a[0].get<u32>(warp, lane), a[1].get<u32>(warp, lane), a[2].get<u32>(warp, lane), a[3].get<u32>(warp, lane)});
      for (auto& slot : a) read.push_back(slot.reg);
    } else {
      product.a = uniform(block, warp, lanes, a[0], "a descriptor");
    }
    check_sum(block, warp, product);
    check_factor(block, warp, read);
    if (block.launch.options.lazy) read_for_warp(block, warp, product);  // for the checks
    else compute(block, warp, product);
    for (int reg : product.registers) warp.in_flight[size_t(reg)] = 1, warp.initialized[size_t(reg)] = kAllLanes;
    warp.products.push_back(std::move(product));
  };
}

Action of_warps(Form& form) {
  form.instruction.together = form.instruction.tensor_core = true;
  if (form.take("fence")) {
    form.need({"sync", "aligned"});
    return [](Block& block, Warp& warp, Lanes) { warp.product_fence = block.launch.serial; };
  }
  if (form.take("commit_group")) {
    form.need({"sync", "aligned"});
    return [](Block&, Warp& warp, Lanes) {
      warp.product_groups++;
      for (auto& product : warp.products)
        if (product.group < 0) product.group = warp.product_groups;
    };
  }
  if (form.take("wait_group")) {
    form.need({"sync", "aligned"});
    const int pending = int(form.operand(0).value);
    return [=](Block& block, Warp& warp, Lanes) { wait_for_groups(block, warp, pending); };
  }
  return product_of_warps(form);
}

// --- tcgen05: one thread begins a product of the whole block, whose sum lies in tensor memory ---

constexpr u32 kTensorColumns = 512, kTensorLanes = 128;

TensorCell& cell(Block& block, u32 lane, u32 column) { return block.tensor[lane * kTensorColumns + column]; }
u32 tensor_lane(const Product& product, int row) { return u32(product.rows == 128 ? row : row / 16 * 32 + row % 16); }

template <class F>
void for_each_cell(Block& block, const Product& product, F f) {
  for (int row = 0; row < product.rows; row++)
    for (int column = 0; column < product.columns; column++)
      f(cell(block, tensor_lane(product, row), (product.tensor_address & 0xffff) + u32(column)), row, column);
}

u64 layout_of(u64 descriptor) {
  switch (descriptor >> 61) {
    case 0: return 0;
    case 2: return 1;
    case 4: return 2;
    case 6: return 3;
    default: throw Fault("not supported: a swizzle of 32-byte atoms");
  }
}

Factors read_for_block(Block& block, const Product& product) {
  Warp& warp = block.warps[size_t(product.thread / kLanes)];
  Factors found = read(block, warp, product, product.a_in_tensor ? 0 : layout_of(product.a), layout_of(product.b), 0);
  const int packed = 4 / bytes_of(product.type);
  for (int row = 0; row < product.rows && product.a_in_tensor; row++)
    for (int k = 0; k < product.depth; k++) {
      const TensorCell& c = cell(block, tensor_lane(product, row), u32(product.a & 0xffff) + u32(k / packed));
      if (!c.written) block.note("uninitialized", "tensor memory is read that nothing wrote", warp, product.thread % kLanes);
      found.a.push_back(entry(c.bits >> 16 * (k % packed), product.type));
    }
  return found;
}

void compute(Block& block, const Product& product) {
  const Factors factors = read_for_block(block, product);
  for_each_cell(block, product, [&](TensorCell& c, int row, int column) {
    c.bits = u32(to_bits(entry_of_sum(block.launch.options, product, factors, row, column, f64(from_bits<f32>(c.bits)))));
    c.written = true;
  });
}

// The instruction descriptor says sizes, types and which factors are transposed.
void describe(Block& block, Warp& warp, int lane, Product& product, u32 descriptor) {
  const u32 a_type = descriptor >> 7 & 7, b_type = descriptor >> 10 & 7, expected = product.type == "tf32" ? 2 : a_type & 1;
  if ((descriptor >> 4 & 3) != 1 || a_type != b_type || a_type != expected || descriptor >> 13 & 3)
    block.fault("not supported: this instruction descriptor", warp, lane);
  if (product.type != "tf32") product.type = a_type ? "bf16" : "f16";
  product.a_transposed = descriptor >> 15 & 1;
  product.b_transposed = descriptor >> 16 & 1;
  product.columns = int(descriptor >> 17 & 63) << 3;
  product.rows = int(descriptor >> 24 & 31) << 4;
  product.depth = depth_of(product.type);
  if (product.rows != 128 && product.rows != 64) block.fault("not supported: so many rows", warp, lane);
}

Action product_of_block(Form& form) {
  form.need({"cta_group::1"});
  const std::string kind = form.one_of({"kind::f16", "kind::tf32"});
  const bool in_tensor = form.operands() == 5 && form.operand(1).kind == Operand::address;
  if (kind.empty() || form.operands() != 5 || (!in_tensor && form.operand(1).kind != Operand::in_register)) form.unsupported();
  const Slot d = form.slot(0), a = form.slot(1), b = form.slot(2), descriptor = form.slot(3), accumulates = form.slot(4);
  return [=](Block& block, Warp& warp, Lanes lanes) {
    for_each(lanes, [&](int lane) {
      Product product;
      product.type = kind.substr(6);
      product.tensor_address = u32(d.address(warp, lane));
      product.a_in_tensor = in_tensor;
      product.a = in_tensor ? a.address(warp, lane) : a.bits(warp, lane);
      product.b = b.bits(warp, lane);
      describe(block, warp, lane, product, descriptor.get<u32>(warp, lane));
      product.accumulates = accumulates.get<bool>(warp, lane);
      product.serial = block.launch.serial;
      product.thread = warp.number * kLanes + lane;
      product.instruction = block.launch.current;
      if ((product.tensor_address & 0xffff) + u32(product.columns) > block.tensor_columns) block.fault("out of bounds: tensor memory", warp, lane);
      for_each_cell(block, product, [&](TensorCell& c, int, int) {
        if (product.accumulates && !c.written) block.note("uninitialized", "tensor memory is read that nothing wrote", warp, lane);
        c.in_flight = c.written = true;
      });
      if (block.launch.options.lazy) read_for_block(block, product);  // for the checks
      else compute(block, product);
      block.products.push_back(std::move(product));
    });
  };
}

Action allocate(Form& form) {
  form.need({"cta_group::1", "sync", "aligned", "b32"});
  form.take("shared::cta");
  form.instruction.together = true;
  const Slot at = form.slot(0), count = form.slot(1);
  return [=](Block& block, Warp& warp, Lanes lanes) {
    const int lane = __builtin_ctz(lanes);
    const u32 begin = block.tensor_columns;
    block.tensor_columns += count.get<u32>(warp, lane);
    if (block.tensor_columns > kTensorColumns) block.fault("out of bounds: tensor memory", warp, lane);
    block.tensor_allocations.insert(begin);
    std::memcpy(block.shared_at(warp, lane, at.address(warp, lane), 4, Touch::write), &begin, 4);
  };
}
Action release(Form& form) {
  form.need({"cta_group::1", "sync", "aligned", "b32"});
  form.instruction.together = true;
  const Slot address = form.slot(0);
  return [=](Block& block, Warp& warp, Lanes lanes) {
    const int lane = __builtin_ctz(lanes);
    if (!block.products.empty()) block.note("in flight", "tensor memory is released that a tensor core uses", warp, lane);
    if (!block.tensor_allocations.erase(address.get<u32>(warp, lane))) block.fault("tensor memory is released that was not allocated", warp, lane);
  };
}

Action commit(Form& form) {
  form.need({"cta_group::1", "mbarrier::arrive::one", "b64"});
  form.ignore({"shared::cluster", "shared::cta"});
  const Slot at = form.slot(0);
  return [=](Block& block, Warp& warp, Lanes lanes) {
    for_each(lanes, [&](int lane) {
      const u32 address = u32(at.address(warp, lane));
      if (!block.barriers.count(address)) block.fault("a barrier is arrived at that was not initialized", warp, lane);
      block.commit_count++;
      for (auto& product : block.products)
        if (product.group < 0) product.group = block.commit_count;
      block.commits.push_back({block.commit_count, address});
    });
  };
}

// Between registers and tensor memory: warp w owns the lanes from 32 (w % 4) on. In 16x32bx2 the upper half of a warp takes
// the lanes of the lower half, at columns further on.
template <bool loads>
Action transfer(Form& form) {
  form.need({"sync", "aligned", "b32"});
  form.instruction.together = true;
  const bool twice = form.take("16x32bx2");
  if (!twice) form.need({"32x32b"});
  const std::vector<Slot> registers = slots(loads ? form.operand(0) : form.operand(form.operands() - 1));
  form.need({("x" + std::to_string(registers.size())).c_str()});
  const Slot at = form.slot(loads);
  const u32 apart = twice ? u32(form.operand(loads + 1u).value) : 0;
  return [=](Block& block, Warp& warp, Lanes lanes) {
    check_whole(block, warp, lanes);
    const u32 address = u32(at.address(warp, 0)), first = address >> 16;
    if (first / 32 != u32(warp.number % 4)) block.fault("a warp accesses lanes of tensor memory that another one owns", warp, 0);
    for (int lane = 0; lane < kLanes; lane++) {
      const u32 row = first + u32(twice ? lane % 16 : lane), column = (address & 0xffff) + (twice && lane >= 16 ? apart : 0);
      if (row >= kTensorLanes || column + registers.size() > block.tensor_columns) block.fault("out of bounds: tensor memory", warp, lane);
      for (u32 i = 0; i < registers.size(); i++) {
        TensorCell& c = cell(block, row, column + i);
        if (c.in_flight) block.note("in flight", "tensor memory is accessed that a tensor core uses", warp, lane);
        if (loads && !c.written) block.note("uninitialized", "tensor memory is read that nothing wrote", warp, lane);
        if (loads) registers[i].set(warp, lane, c.bits);
        else c.bits = registers[i].get<u32>(warp, lane), c.written = true;
      }
    }
  };
}

Action of_block(Form& form) {
  if (form.take("alloc")) return allocate(form);
  if (form.take("dealloc")) return release(form);
  if (form.take("mma")) return product_of_block(form);
  if (form.take("commit")) return commit(form);
  if (form.take("ld")) return transfer<true>(form);
  if (form.take("st")) return transfer<false>(form);
  // Registers count as loaded at once: Triton's compiler uses them ahead of tcgen05.wait::ld.
  form.instruction.together = true;
  if (!form.take("wait::st") && !form.take("wait::ld")) form.need({"relinquish_alloc_permit", "cta_group::1"});
  form.need({"sync", "aligned"});
  return {};
}

}  // namespace

// Finishes the oldest work, up to the first arrival at this barrier.
void complete_commits(Block& block, u32 barrier) {
  const auto uses = [&](const auto& commit) { return commit.second == barrier; };
  if (std::none_of(block.commits.begin(), block.commits.end(), uses)) return;
  for (bool found = false; !found;) {
    const auto [number, at] = block.commits.front();
    block.commits.pop_front();
    for (; !block.products.empty() && block.products.front().group >= 0 && block.products.front().group <= number; block.products.pop_front()) {
      if (block.launch.options.lazy) compute(block, block.products.front());
      for_each_cell(block, block.products.front(), [](TensorCell& c, int, int) { c.in_flight = false; });
    }
    for (auto& product : block.products) for_each_cell(block, product, [](TensorCell& c, int, int) { c.in_flight = true; });
    Barrier& arrived = block.barriers[at];
    if (--arrived.pending == 0) arrived.phase ^= 1, arrived.pending = arrived.expected;
    found = at == barrier;
  }
}

Decoders tensor_core_decoders() { return {{"mma", multiply}, {"wgmma", of_warps}, {"tcgen05", of_block}}; }

}  // namespace ptx
