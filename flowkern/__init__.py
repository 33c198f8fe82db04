"""Fused kernels for the layers of normalizing flows and VAEs, with a pure-torch fallback for every one."""

from . import models as models, nn as nn, ops as ops
from ._core.backend import backend as backend
from ._core.op import OPS as OPS
from ._core.version import __version__ as __version__
from ._explain import explain as explain
from .models import load as load, save as save
