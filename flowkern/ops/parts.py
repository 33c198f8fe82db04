"""What layers take of the ops besides the public functions."""

from ._affine_coupling import undo as undo_affine_coupling
from ._ema_update import update_averages_
from ._invertible_linear import undo as undo_invertible_linear
from ._logistic_mixture import SCALES, LogisticMixture
from ._plu_weight import compact_plu
from ._vector_quantize import pass_gradient

__all__ = [
    "SCALES",
    "LogisticMixture",
    "compact_plu",
    "pass_gradient",
    "undo_affine_coupling",
    "undo_invertible_linear",
    "update_averages_",
]
