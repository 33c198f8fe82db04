// The entry points of the CUDA extension. Addresses, and the stream, are integers. No CUDA function is called before the first
// launch: the module can be imported where there is no GPU and no driver.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

namespace flowkern {

extern "C" const char* autoregressive_inverse_forward(uintptr_t z, int64_t z_row, int64_t z_column, uintptr_t x, int64_t x_row,
                                                      int64_t x_column, uintptr_t logabsdet, uintptr_t weights, uintptr_t biases,
                                                      uintptr_t contexts, int64_t context_row, uintptr_t table, uintptr_t constants,
                                                      uintptr_t scratch, int64_t batch, int64_t features, int64_t networks,
                                                      int64_t units, int64_t staged, bool wide, bool half_weights, int64_t tile,
                                                      int64_t blocks, int64_t shared, uintptr_t stream);

// What a launcher says went wrong becomes an exception.
template <class... Arguments>
auto checked(const char* (*launcher)(Arguments...)) {
  return [launcher](Arguments... arguments) {
    if (const char* error = launcher(arguments...)) throw std::runtime_error(error);
  };
}

}  // namespace flowkern

PYBIND11_MODULE(_native_cuda, m) {
  using namespace flowkern;
  m.doc() = "CUDA kernels of flowkern; call them through flowkern.ops.";
  m.attr("archs") = FLOWKERN_CUDA_ARCHS;  // the GPUs that it was built for, "80;90a;100"
  m.def("autoregressive_inverse_forward", checked(autoregressive_inverse_forward));
}
