#include <algorithm>
#include <cctype>
#include <set>
#include <unordered_map>

#include "module.h"

namespace ptx {
namespace {

const std::set<std::string> kSpecial = {
    "%tid.x",    "%tid.y",    "%tid.z",    "%ntid.x", "%ntid.y",  "%ntid.z",        "%ctaid.x",       "%ctaid.y",       "%ctaid.z",
    "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid",  "%lanemask_lt",   "%lanemask_le",   "%lanemask_gt",   "%lanemask_ge",
    "%lanemask_eq"};

std::string trimmed(const std::string& s) {
  const size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

std::vector<std::string> words(const std::string& s) {
  std::vector<std::string> found;
  for (size_t a = 0; (a = s.find_first_not_of(" \t\r\n", a)) != std::string::npos;) {
    const size_t b = std::min(s.find_first_of(" \t\r\n", a), s.size());
    found.push_back(s.substr(a, b - a));
    a = b;
  }
  return found;
}

// At the commas that stand in no bracket.
std::vector<std::string> split(const std::string& s) {
  std::vector<std::string> found(1);
  int depth = 0;
  for (char c : s) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == ',' && depth == 0) found.emplace_back();
    else found.back() += c;
  }
  for (auto& part : found) part = trimmed(part);
  if (found.back().empty()) found.pop_back();
  return found;
}

// Comments become blanks, so that lines keep their numbers.
std::string without_comments(std::string text) {
  for (size_t i = 0; i + 1 < text.size(); i++) {
    if (text[i] != '/' || (text[i + 1] != '/' && text[i + 1] != '*')) continue;
    const bool line = text[i + 1] == '/';
    const size_t end = line ? text.find('\n', i) : text.find("*/", i + 2);
    const size_t stop = std::min(end == std::string::npos ? end : end + (line ? 0 : 2), text.size());
    for (; i < stop; i++)
      if (text[i] != '\n') text[i] = ' ';
  }
  return text;
}

bool number(std::string s, u64& value) {
  const bool negative = s[0] == '-';
  if (negative) s = s.substr(1);
  if (s.empty() || !isdigit(s[0])) return false;
  const char kind = s.size() > 1 ? char(tolower(s[1])) : 0;
  if (s[0] == '0' && (kind == 'f' || kind == 'd')) {
    value = std::stoull(s.substr(2), nullptr, 16) ^ (negative ? (kind == 'f' ? 1ull << 31 : 1ull << 63) : 0);
    return true;
  }
  if (s.back() == 'U') s.pop_back();
  if (s.find_first_not_of("0123456789abcdefABCDEFxX") != std::string::npos) return false;
  value = std::stoull(s, nullptr, 0);
  if (negative) value = -value;
  return true;
}

// A variable or a parameter: "[.extern] .shared .align 16 .b8 name[4][2]", ".param .u64 .ptr .global .align 1 name".
struct Declaration {
  std::string name;
  u32 align = 1, bytes = 0, element = 1;
  bool open = false;  // name[]: of unknown size

  explicit Declaration(const std::string& text) {
    bool typed = false, pointer = false;
    const auto all = words(text.substr(0, text.find('[')));
    for (size_t i = 0; i < all.size(); i++) {
      Type type;
      if (all[i] == ".ptr") pointer = true;  // what follows describes what it points to
      if (all[i] == ".align" && !pointer) align = u32(std::stoul(all[i + 1]));
      if (!typed && all[i][0] == '.' && Type::parse(all[i].substr(1), type)) typed = true, element = u32(type.bytes);
    }
    name = all.back();
    bytes = element;
    align = std::max(align, element);
    for (size_t a = text.find('['); a != std::string::npos; a = text.find('[', a + 1)) {
      const std::string inside = trimmed(text.substr(a + 1, text.find(']', a) - a - 1));
      open = open || inside.empty();
      bytes *= inside.empty() ? 0 : u32(std::stoul(inside));
    }
  }
};

u32 aligned(u32 offset, u32 align) { return (offset + align - 1) / align * align; }

struct Branch {
  int instruction;
  std::string label;
};

// Names between a brace and its partner.
struct Scope {
  std::unordered_map<std::string, int> registers, labels;
  std::vector<Branch> branches;  // to labels that have not been seen
};

class Parser {
 public:
  Parser(const std::string& text, Module& module) : text_(without_comments(text)), module_(module) {}

  void run() {
    while (skip_blanks()) {
      if (starts(".version") || starts(".address_size") || starts(".file") || starts(".target")) directive();
      else if (starts(".section")) braces();
      else top();
    }
    const u32 dynamic = aligned(module_.static_shared, 16);
    for (auto& [_, kernel] : module_.kernels)
      for (auto& instruction : kernel.instructions)
        for (auto& operand : instruction.operands)
          if (operand.after_static) operand.value += dynamic;
  }

 private:
  std::string text_;
  Module& module_;
  Kernel* kernel_ = nullptr;
  size_t at_ = 0;
  mutable size_t counted_ = 0;  // line_ is the line of this place
  mutable int line_ = 1;
  std::vector<Scope> scopes_;
  std::map<std::string, Operand> symbols_;  // addresses of variables

  [[noreturn]] void fail(const std::string& why) const {
    throw Fault("line " + std::to_string(line()) + ": " + why);
  }
  int line() const {
    for (; counted_ < std::min(at_, text_.size()); counted_++) line_ += text_[counted_] == '\n';
    return line_;
  }
  bool starts(const char* word) const { return text_.compare(at_, std::strlen(word), word) == 0; }
  bool skip_blanks() {
    at_ = std::min(text_.find_first_not_of(" \t\r\n;", at_), text_.size());
    return at_ < text_.size();
  }
  std::string until(const char* stops) {
    const size_t begin = at_;
    at_ = std::min(text_.find_first_of(stops, at_), text_.size());
    return trimmed(text_.substr(begin, at_ - begin));
  }
  void braces() {
    int depth = 0;
    for (at_ = text_.find('{', at_); at_ < text_.size(); at_++) {
      depth += (text_[at_] == '{') - (text_[at_] == '}');
      if (depth == 0) break;
    }
    at_++;
  }

  void directive() {
    const auto said = words(until("\n"));
    if (said[0] == ".target") module_.target = said[1].substr(0, said[1].find(','));
  }

  void top() {
    const std::string head = until("(;{=");
    if (head.find(".entry") != std::string::npos) return kernel(words(head).back());
    if (head.find(".func") != std::string::npos) return function();
    variable(head + (text_[at_] == '=' ? " " + until(";") : ""));
  }

  void function() {
    until("{;");
    if (at_ < text_.size() && text_[at_] == '{') fail("functions are not supported");
  }

  void variable(const std::string& text) {
    const Declaration d(text.substr(0, text.find('=')));
    const auto all = words(text);
    const auto has = [&](const char* word) { return std::count(all.begin(), all.end(), word) > 0; };
    Operand symbol;
    symbol.kind = Operand::immediate;
    if (has(".shared")) {
      symbol.after_static = d.open || has(".extern");
      if (!symbol.after_static) symbol.value = place(module_.static_shared, d);
    } else if (has(".local")) {
      symbol.value = place(kernel_->local_bytes, d);
    } else if (has(".global") || has(".const")) {
      symbol.value = u64(initialized(d, text).data());
    } else {
      fail("not understood: " + text);
    }
    symbols_[d.name] = symbol;
  }
  static u32 place(u32& end, const Declaration& d) {
    const u32 begin = aligned(end, d.align);
    end = begin + d.bytes;
    return begin;
  }
  std::vector<u8>& initialized(const Declaration& d, const std::string& text) {
    auto& bytes = module_.globals[d.name];
    bytes.assign(d.bytes, 0);
    const size_t open = text.find('{');
    if (open == std::string::npos) return bytes;
    u32 at = 0;
    for (auto& value : split(text.substr(open + 1, text.find('}') - open - 1))) {
      u64 bits;
      if (!number(value, bits) || at + d.element > d.bytes) fail("not understood: " + text);
      std::memcpy(&bytes[at], &bits, d.element);
      at += d.element;
    }
    return bytes;
  }

  void kernel(const std::string& name) {
    kernel_ = &module_.kernels[name];
    kernel_->name = name;
    at_++;
    for (auto& text : split(until(")"))) {
      const Declaration d(text);
      Operand symbol;
      symbol.kind = Operand::immediate;
      symbol.value = place(kernel_->parameter_bytes, d);
      symbols_[d.name] = symbol;
      kernel_->parameters.push_back({u32(symbol.value), d.bytes});
    }
    until("{");
    body();
    for (auto& instruction : kernel_->instructions) decode(instruction);
  }

  void body() {
    do {
      if (!skip_blanks()) fail("the text ends inside a kernel");
      if (text_[at_] == '{') at_++, scopes_.emplace_back();
      else if (text_[at_] == '}') at_++, close();
      else if (starts(".loc") && isspace(text_[at_ + 4])) until("\n");
      else if (!label()) statement();
    } while (!scopes_.empty());
  }

  void close() {
    Scope scope = std::move(scopes_.back());
    scopes_.pop_back();
    for (auto& branch : scope.branches) {
      const auto found = scope.labels.find(branch.label);
      if (found != scope.labels.end()) kernel_->instructions[size_t(branch.instruction)].target = found->second;
      else if (scopes_.empty()) fail("no label " + branch.label);
      else scopes_.back().branches.push_back(branch);
    }
  }

  bool label() {
    size_t end = at_;
    while (end < text_.size() && (isalnum(text_[end]) || std::strchr("_$%", text_[end]))) end++;
    if (end == at_ || text_[end] != ':') return false;
    scopes_.back().labels[text_.substr(at_, end - at_)] = int(kernel_->instructions.size());
    at_ = end + 1;
    return true;
  }

  void statement() {
    if (starts(".reg")) return registers(until(";"));
    if (starts(".pragma")) return void(until(";"));
    if (text_[at_] == '.') return variable(until(";"));
    instruction();
  }

  void registers(const std::string& text) {
    const std::string names = text.substr(text.find(words(text)[1]) + words(text)[1].size());
    for (auto& name : split(names)) {
      const size_t bracket = name.find('<');
      if (bracket == std::string::npos) scopes_.back().registers[name] = kernel_->registers++;
      else
        for (int i = 0, n = std::stoi(name.substr(bracket + 1)); i < n; i++)
          scopes_.back().registers[name.substr(0, bracket) + std::to_string(i)] = kernel_->registers++;
    }
  }

  void instruction() {
    Instruction i;
    i.line = line();
    i.text = until(";");
    std::replace_if(i.text.begin(), i.text.end(), [](char c) { return isspace(c); }, ' ');
    std::string rest = i.text;
    if (rest[0] == '@') {
      const size_t end = rest.find(' ');
      i.guard_negated = rest[1] == '!';
      i.guard = named(rest.substr(1 + i.guard_negated, end - 1 - i.guard_negated));
      if (i.guard < 0) fail("unknown predicate: " + i.text);
      rest = trimmed(rest.substr(end));
    }
    const size_t end = std::min(rest.find(' '), rest.size());
    opcode(i, rest.substr(0, end));
    rest = trimmed(rest.substr(end));
    if (i.opcode == "bra") scopes_.back().branches.push_back({int(kernel_->instructions.size()), rest});
    else
      for (auto& text : split(rest)) i.operands.push_back(operand(text));
    kernel_->instructions.push_back(std::move(i));
  }

  // "ld.shared::cta.b32": a modifier may hold "::", never ".".
  static void opcode(Instruction& i, const std::string& text) {
    size_t begin = text.find('.');
    i.opcode = text.substr(0, begin);
    while (begin != std::string::npos) {
      const size_t end = text.find('.', begin + 1);
      i.modifiers.push_back(text.substr(begin + 1, end == std::string::npos ? end : end - begin - 1));
      begin = end;
    }
  }

  int named(const std::string& name) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      if (auto found = scope->registers.find(name); found != scope->registers.end()) return found->second;
    if (!kSpecial.count(name)) return -1;
    const auto [place, isnew] = kernel_->special.try_emplace(name, kernel_->registers);
    if (isnew) kernel_->registers++;
    return place->second;
  }

  Operand operand(const std::string& text) {
    Operand o;
    if (text == "_") {
      o.kind = Operand::nothing;
    } else if (text[0] == '{') {
      o.kind = Operand::vector;
      for (auto& part : split(text.substr(1, text.size() - 2))) o.parts.push_back(operand(part));
    } else if (text[0] == '[') {
      o = address(trimmed(text.substr(1, text.size() - 2)));
    } else if (text[0] == '!') {
      o = operand(text.substr(1));
      o.negated = true;
    } else if (size_t bar = text.find('|'); bar != std::string::npos) {
      o = operand(trimmed(text.substr(0, bar)));
      if (const std::string q = trimmed(text.substr(bar + 1)); q != "_") o.second = named(q);
    } else {
      o = single(text);
    }
    return o;
  }

  Operand single(const std::string& text) {
    Operand o;
    if ((o.reg = named(text)) >= 0) o.kind = Operand::in_register;
    else if (number(text, o.value)) o.kind = Operand::immediate;
    else if (text == "WARP_SZ") o.kind = Operand::immediate, o.value = 32;
    else if (auto found = symbols_.find(text); found != symbols_.end()) o = found->second;
    else fail("unknown name " + text);
    return o;
  }

  Operand address(const std::string& text) {
    const size_t sign = text.find_first_of("+-", 1);
    Operand o = single(trimmed(text.substr(0, sign)));
    u64 offset = 0;
    if (sign != std::string::npos && !number(trimmed(text.substr(sign + 1)), offset)) fail("unknown offset " + text);
    o.value += sign != std::string::npos && text[sign] == '-' ? -offset : offset;
    o.kind = Operand::address;
    return o;
  }
};

}  // namespace

std::unique_ptr<Module> parse(const std::string& text) {
  auto module = std::make_unique<Module>();
  Parser(text, *module).run();
  return module;
}

}  // namespace ptx
