"""Layers of normalizing flows: bijections, base distributions, conditioner networks, and ``Flow`` that joins them."""

from ._base import Base as Base
from ._base import DiagonalNormal as DiagonalNormal
from ._base import Mixture as Mixture
from ._base import StandardNormal as StandardNormal
from ._bijection import Bijection as Bijection
from ._compose import Compose as Compose
from ._conditioner import ACTIVATIONS as ACTIVATIONS
from ._conditioner import MLP as MLP
from ._conditioner import Parallel as Parallel
from ._conditioner import ResNet as ResNet
from ._coupling import AdditiveCoupling as AdditiveCoupling
from ._coupling import AffineCoupling as AffineCoupling
from ._flow import Flow as Flow
from ._flow import bits_per_dim as bits_per_dim
from ._multiscale import MultiScale as MultiScale
from ._permutation import Permutation as Permutation
from ._preprocess import Logit as Logit
from ._preprocess import Rescale as Rescale
from ._preprocess import Scaling as Scaling
from ._squeeze import Flatten as Flatten
from ._squeeze import Squeeze as Squeeze
