"""The functional ops, one file each. Those that have kernels are in ``flowkern.OPS``, which generic tests walk over."""

from .._core.scale_map import LAYOUTS as LAYOUTS, ScaleMap as ScaleMap
from .._core.spline_map import SplineMap as SplineMap
from .._core.split import SPLITS as SPLITS, FeatureMask as FeatureMask
from ._additive_coupling import additive_coupling as additive_coupling
from ._affine_coupling import affine_coupling as affine_coupling
from ._dequantize import dequantize as dequantize
from ._discretized_logistic_mixture import (
    discretized_logistic_mixture as discretized_logistic_mixture,
    sample_discretized_logistic_mixture as sample_discretized_logistic_mixture,
)
from ._ema_update import ema_update as ema_update
from ._gaussian_kl import gaussian_kl as gaussian_kl
from ._invertible_linear import invertible_linear as invertible_linear
from ._masked_linear import masked_linear as masked_linear
from ._nearest_code import nearest_code as nearest_code
from ._plu_weight import plu_weight as plu_weight
from ._rational_quadratic_spline import rational_quadratic_spline as rational_quadratic_spline
from ._vector_quantize import vector_quantize as vector_quantize
from .autoregressive.degrees import DegreeMask as DegreeMask
from .autoregressive.inverse import autoregressive_inverse as autoregressive_inverse
from .autoregressive.network import AutoregressiveNetwork as AutoregressiveNetwork
