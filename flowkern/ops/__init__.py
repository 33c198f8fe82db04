"""The functional ops. One file each; every op is in ``flowkern.OPS``."""

from ._additive_coupling import additive_coupling as additive_coupling
from ._affine_coupling import affine_coupling as affine_coupling
from ._parametrization import LAYOUTS as LAYOUTS
from ._parametrization import ScaleMap as ScaleMap
from ._split import SPLITS as SPLITS
from ._split import FeatureMask as FeatureMask
