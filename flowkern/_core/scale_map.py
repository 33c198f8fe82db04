"""How a conditioner's output becomes a scale and a shift: ``ScaleMap`` and ``ParamLayout``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["KINDS", "LAYOUTS", "ParamLayout", "ScaleMap", "check_scale", "named_layout", "softplus"]

KINDS = ("exp", "sigmoid", "softplus", "tanh", "atan", "soft_clip")

#: Below it log softplus(u) is u to the last digit of a float64; softplus itself goes on to 0.
SOFTPLUS_TAIL = -40.0

#: Every layout of (scale, shift) in a conditioner's output; the position in this tuple is its code in the kernels.
LAYOUTS = (
    "scale_shift",
    "shift_scale",
    "interleaved_scale_shift",
    "interleaved_shift_scale",
    "pair_scale_shift",
    "pair_shift_scale",
)


@dataclass(frozen=True)
class ScaleMap:
    """How a raw network output u becomes a positive scale s. Build it with one of the class methods.

    =================== ======================================= ===========================
    map                 s                                       used by
    =================== ======================================= ===========================
    ``exp()``           exp(u)                                  RealNVP (Dinh et al. 2017), eq. 7
    ``sigmoid(b, eps)`` sigmoid(u + b) + eps                    Glow's code (Kingma and Dhariwal 2018)
    ``softplus(eps)``   softplus(u) + eps                       nflows' MAF
    ``tanh(c)``         exp(c tanh(u / c))                      RealNVP's bounded log-scale
    ``atan(c)``         exp(0.636 c atan(u))                    FrEIA
    ``soft_clip(m)``    exp(u / (1 + abs(u / log m)))           zuko
    =================== ======================================= ===========================
    """

    kind: str
    a: float = 0.0
    b: float = 0.0

    def __post_init__(self) -> None:
        self.__dict__["text"] = f"{self.a!r} {self.b!r}"  # no field: what is saved of a map are its kind and constants
        if self.kind not in KINDS:
            raise ValueError(f"ScaleMap: unknown kind {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.kind in ("tanh", "atan", "soft_clip") and not self.a > 0.0:
            raise ValueError(
                f"ScaleMap: {self.kind!r} needs its constant a > 0, got {self.a}; build it with ScaleMap.{self.kind}"
            )
        for name, value in (("a", self.a), ("b", self.b)):
            _check_constant(name, value, negative=(self.kind, name) == ("sigmoid", "a"))

    @classmethod
    def exp(cls) -> ScaleMap:
        return cls("exp")

    @classmethod
    def sigmoid(cls, bias: float = 2.0, eps: float = 0.0) -> ScaleMap:
        """sigmoid(u + bias) + eps. Raises ValueError for eps < 0, and for a constant that float32 does not hold."""
        return cls("sigmoid", _check_constant("bias", bias, negative=True), _check_constant("eps", eps))

    @classmethod
    def softplus(cls, eps: float = 1e-3) -> ScaleMap:
        """softplus(u) + eps. Raises ValueError for eps < 0, and for one that float32 does not hold."""
        return cls("softplus", _check_constant("eps", eps))

    @classmethod
    def tanh(cls, clamp: float) -> ScaleMap:
        """exp(clamp * tanh(u / clamp)): s lies in [exp(-clamp), exp(clamp)]. Raises ValueError unless 0 < clamp < infinity."""
        return cls("tanh", _check_constant("clamp", clamp, zero=False))

    @classmethod
    def atan(cls, clamp: float) -> ScaleMap:
        """exp(0.636 clamp atan(u)): s lies in about [exp(-clamp), exp(clamp)]. Raises ValueError unless 0 < clamp < infinity."""
        return cls("atan", _check_constant("clamp", clamp, zero=False))

    @classmethod
    def soft_clip(cls, minimum: float = 1e-3) -> ScaleMap:
        """exp(u / (1 + abs(u / log minimum))): s lies in [minimum, 1 / minimum]. Raises ValueError unless 0 < minimum < 1."""
        if not 0.0 < minimum < 1.0:
            raise ValueError(f"ScaleMap.soft_clip: minimum must lie between 0 and 1, got {minimum}")
        return cls("soft_clip", abs(math.log(minimum)))

    @classmethod
    def from_code(cls, code: int, a: float, b: float) -> ScaleMap:
        """The map that the kernels know as ``code`` with the constants ``a`` and ``b``."""
        return cls(KINDS[code], a, b)

    @property
    def code(self) -> int:
        """The map's number in the kernels."""
        return KINDS.index(self.kind)

    @property
    def constants(self) -> tuple[float, float]:
        """(a, b) for the kernels.

        ``torch.compile(dynamic=True)`` takes the numbers of an object for variables, and fails where two ops of a graph share
        one. Text is constant to it, and so are the numbers that it says.
        """
        if not torch.compiler.is_compiling():
            return self.a, self.b
        a, b = self.__dict__["text"].split()
        return float(a), float(b)

    def __call__(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(s, log s) of raw outputs u, elementwise, differentiable any number of times."""
        if self.kind == "sigmoid":
            v = u + self.a
            s = torch.sigmoid(v)
            return (s, F.logsigmoid(v)) if self.b == 0.0 else (s + self.b, self._log_of_sigmoid(v))
        if self.kind == "softplus":
            if self.a > 0.0:
                s = softplus(u) + self.a
                return s, s.log()
            return softplus(u), torch.where(u < SOFTPLUS_TAIL, u, softplus(u.clamp(min=SOFTPLUS_TAIL)).log())
        log_s = self._bounded_log(u)
        return log_s.exp(), log_s

    def reciprocal(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1 / s, log s), as ``self(u)``: a quotient by s would have a derivative that overflows long before 1 / s does."""
        if self.kind == "sigmoid" and self.b == 0.0:
            v = u + self.a
            return 1.0 + torch.exp(-v), F.logsigmoid(v)
        if self.kind in ("sigmoid", "softplus"):
            s, log_s = self(u)
            if self.kind == "softplus" and self.a == 0.0:
                tail = u < SOFTPLUS_TAIL
                return torch.where(tail, torch.exp(-log_s), s.masked_fill(tail, 1.0).reciprocal()), log_s
            return s.reciprocal(), log_s
        log_s = self._bounded_log(u)
        return torch.exp(-log_s), log_s

    def _bounded_log(self, u: torch.Tensor) -> torch.Tensor:
        """log s of the maps that are exp of something."""
        if self.kind == "exp":
            return u
        if self.kind == "tanh":
            return self.a * torch.tanh(u / self.a)
        if self.kind == "atan":
            return (0.636 * self.a) * torch.atan(u)
        # At the limit log s is the bound to the last digit; an infinite u would give inf / inf.
        most = self.a * (1e300 if u.dtype is torch.float64 else 1e30)
        u = F.hardtanh(u, -most, most)  # a clamp whose derivative is one op
        return u / torch.add(u.new_ones(()), u.abs(), alpha=1.0 / self.a)

    def _log_of_sigmoid(self, v: torch.Tensor) -> torch.Tensor:
        """log(sigmoid(v) + eps), which is small where s is near 1: there by its distance from 1."""
        above = v >= 0.0
        near = torch.log1p(self.b - torch.sigmoid(-v.masked_fill(~above, 0.0)))
        return torch.where(above, near, (torch.sigmoid(v) + self.b).log())


def softplus(u: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(u)). Above its threshold of 20 F.softplus returns u itself, off by up to 2e-9: too coarse for float64."""
    return torch.logaddexp(u, torch.zeros_like(u))


def _check_constant(name: str, value: float, *, zero: bool = True, negative: bool = False) -> float:
    """``value`` as a float. Raises ValueError for NaN and whatever else float32 does not hold, in which most kernels compute."""
    limits = torch.finfo(torch.float32)
    normal = limits.tiny <= abs(value) <= limits.max
    if not (normal or (zero and value == 0)) or (value < 0 and not negative):
        wanted = "a number" if negative else "a number of at least 0" if zero else "a positive number"
        raise ValueError(f"ScaleMap: {name}: expected {wanted} that float32 holds, got {value}")
    return float(value)


def check_scale(scale: ScaleMap) -> None:
    """Raises TypeError for anything but a ``ScaleMap``."""
    if not isinstance(scale, ScaleMap):
        raise TypeError(f"scale: expected an ops.ScaleMap, such as ScaleMap.tanh(2.0), got {scale!r}")


@dataclass(frozen=True)
class ParamLayout:
    """Where scale and shift lie in a conditioner's output; get one with ``named_layout``.

    Halves of the channel axis (``scale_shift``, ``shift_scale``), alternating channels (``interleaved_*``), or a
    trailing axis of 2 (``pair_*``).
    """

    name: str

    @property
    def code(self) -> int:
        """The layout's number in the kernels."""
        return LAYOUTS.index(self.name)

    def shape(self, x: Sequence[int], count: int) -> tuple[int, ...]:
        """The shape of ``params`` for ``count`` transformed channels of an x of shape (B, C, ...)."""
        if self.name.startswith("pair"):
            return (x[0], count, *x[2:], 2)
        return (x[0], 2 * count, *x[2:])

    def split(self, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (raw scale, shift) of ``params``."""
        half = params.shape[1] // 2
        if self.name.startswith("pair"):
            first, second = params.unbind(-1)
        elif self.name.startswith("interleaved"):
            first, second = params[:, 0::2], params[:, 1::2]
        else:
            first, second = params[:, :half], params[:, half:]
        return (first, second) if self.name.endswith("scale_shift") else (second, first)


_NAMED = {name: ParamLayout(name) for name in LAYOUTS}


def named_layout(name: str) -> ParamLayout:
    """The layout of that name. Raises ValueError for a name that is not in ``LAYOUTS``."""
    if name not in _NAMED:
        raise ValueError(f"layout: unknown name {name!r}; expected one of {', '.join(map(repr, LAYOUTS))}")
    return _NAMED[name]
