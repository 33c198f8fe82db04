// What Python calls.
#include <algorithm>

#include "block.h"

using namespace ptx;

namespace {

thread_local std::string said;  // by the last call

struct Extent {
  u64 begin, bytes;
};

// The arguments of a launch, as Python lays them out.
struct Request {
  const char* kernel;
  u32 grid[3], threads[3];
  u64 shared_bytes;
  const u8* parameters;
  u64 parameter_bytes;
  const Extent* regions;
  u64 region_count;
  Options options;
};

std::vector<Region> regions_of(const Module& module, const Request& request) {
  std::vector<Region> found;
  for (u64 i = 0; i < request.region_count; i++) found.push_back({request.regions[i].begin, request.regions[i].bytes, {}});
  for (auto& [_, bytes] : module.globals) found.push_back({u64(bytes.data()), bytes.size(), {}});
  std::sort(found.begin(), found.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  return found;
}

}  // namespace

extern "C" {

// What the last call had to say: an error, the layout of a kernel's parameters, or the notes of a launch.
const char* ptx_said() { return said.c_str(); }

void* ptx_parse(const char* text) {
  try {
    said.clear();
    return parse(text).release();
  } catch (const std::exception& error) {
    said = error.what();
    return nullptr;
  }
}

void ptx_free(void* module) { delete static_cast<Module*>(module); }

// Lines of "offset bytes", the whole size first.
bool ptx_parameters(void* module, const char* name) {
  const auto& kernels = static_cast<Module*>(module)->kernels;
  const auto found = kernels.find(name);
  if (found == kernels.end()) return false;
  said = "0 " + std::to_string(found->second.parameter_bytes);
  for (auto& p : found->second.parameters) said += "\n" + std::to_string(p.offset) + " " + std::to_string(p.bytes);
  return true;
}

// The notes, a line of "kind<tab>count<tab>first one" each. False if a fault ended the launch, which is then the last line.
bool ptx_launch(void* handle, const Request* request, u64* instructions) {
  const Module& module = *static_cast<Module*>(handle);
  Launch launch(module, module.kernels.at(request->kernel));
  launch.options = request->options;
  std::copy_n(request->grid, 3, launch.grid.begin());
  std::copy_n(request->threads, 3, launch.threads.begin());
  launch.thread_count = launch.threads[0] * launch.threads[1] * launch.threads[2];
  launch.shared_bytes = (module.static_shared + 15) / 16 * 16 + u32(request->shared_bytes);
  launch.parameters.assign(request->parameters, request->parameters + request->parameter_bytes);
  launch.regions = regions_of(module, *request);
  std::string fault;
  try {
    launch.run();
  } catch (const Fault& error) {
    fault = error.what();
  }
  said.clear();
  for (auto& [kind, note] : launch.notes) said += kind + "\t" + std::to_string(note.count) + "\t" + note.first + "\n";
  said += fault;
  *instructions = launch.executed;
  return fault.empty();
}

}  // extern "C"
