// The one list of native entry points: X(name, parameters) for each. An entry takes what the schema of the op of its name says, in
// that order, then what the op returns, then the number of threads. csrc/bindings.cpp declares, collects and binds them once for
// each instruction set; csrc/cpu defines them.
#pragma once

#include "tensor.h"

namespace flowkern {

using In = const Tensor&;  // without an address where an optional tensor was not given
using Out = const Output&;

// One network of a chain for the autoregressive inverse.
struct Autoregressive {
  const Tensor* tensors = nullptr;  // weight and bias of each linear layer
  Tensor context;                   // (B, units of the first layer), or not given
  const int32_t* table = nullptr;   // the plan: flowkern/ops/autoregressive/cpp.py says how it is laid out
  double a = 0, b = 0;              // the constants of the scale map
};

// Those that Python's values are handed to as they are.
#define FLOWKERN_PLAIN_ENTRIES(X)                                                                                               \
  X(additive_coupling, In x, In shift, In place, int split, bool inverse, Out y, int threads)                                   \
  X(affine_coupling, In x, In params, In place, int split, int scale, double a, double b, int layout, bool shift_first,         \
    bool inverse, Out y, Out logabsdet, int threads)                                                                            \
  X(affine_coupling_backward, In x, In params, In grad, In grad_logabsdet, In place, int split, int scale, double a, double b,  \
    int layout, bool shift_first, bool inverse, Out dx, Out dparams, int threads)                                               \
  X(dequantize, In v, In seed, int64_t offset, int64_t levels, double alpha, Unused dtype, Out x, Out logabsdet, int threads)   \
  X(discretized_logistic_mixture, In x, In params, int64_t levels, bool compat, Out log_prob, int threads)                      \
  X(discretized_logistic_mixture_backward, In x, In params, In grad, int64_t levels, bool compat, Out log_prob, Out gradient,   \
    int threads)                                                                                                                \
  X(gaussian_kl, In mean, In log_scale, In seed, int64_t offset, Out z, Out kl, int threads)                                    \
  X(gaussian_kl_backward, In mean, In log_scale, In seed, int64_t offset, In grad, In grad_kl, Out dmean, Out dlog_scale,       \
    int threads)                                                                                                                \
  X(invertible_linear, In x, In weight, In bias, In weight_inverse, In known, bool inverse, Unused invert, Out y,               \
    Out logabsdet, Out found, int threads)                                                                                      \
  X(invertible_linear_backward, In x, In weight, In bias, In weight_inverse, In known, bool inverse, Unused needs_x,            \
    Unused needs_weight, In grad, In grad_logabsdet, Out dx, Out dweight, Out dbias, Out dknown, int threads)                   \
  X(masked_linear, In x, In weight, In bias, In reach, In first, In rows, In columns, Unused panels, Out y, int threads)        \
  X(masked_linear_backward, In grad, In x, In weight, In bias, In reach, In first, In rows, In columns, Unused panels,          \
    Unused needs_x, Unused needs_weight, Unused needs_bias, Out dx, Out dweight, Out dbias, int threads)                        \
  X(nearest_code, In x, In codebook, bool cosine, bool pairs, Out index, Out sqdist, Out looked, int threads)                   \
  X(plu_weight, In lower, In upper, In log_diagonal, In sign, In permutation, Out weight, int threads)                          \
  X(plu_weight_backward, In grad, In lower, In upper, In log_diagonal, In sign, In permutation, Out dlower, Out dupper,         \
    Out dlog_diagonal, int threads)                                                                                             \
  X(rational_quadratic_spline, In x, In params, In bounds, int bins, int tails, int kind, double low, double high,              \
    double min_width, double min_height, double min_derivative, double inverse_slope, double inverse_divisor, int parity,       \
    bool inverse, Out y, Out logabsdet, int threads)                                                                            \
  X(rational_quadratic_spline_backward, In x, In params, In grad, In grad_logabsdet, In bounds, int bins, int tails, int kind,  \
    double low, double high, double min_width, double min_height, double min_derivative, double inverse_slope,                  \
    double inverse_divisor, int parity, bool inverse, Out dx, Out dparams, int threads)

// Those that take networks.
#define FLOWKERN_ENTRIES(X)                                                                                                     \
  FLOWKERN_PLAIN_ENTRIES(X)                                                                                                     \
  X(autoregressive_inverse, const Autoregressive* networks, int64_t count, In z, Out x, Out logabsdet, int threads)             \
  X(autoregressive_inverse_backward, const Autoregressive& network, In grad, In grad_log, In x, Out z, Out dz,                  \
    const Tensor* values, const Tensor* grads, int threads)

}  // namespace flowkern
