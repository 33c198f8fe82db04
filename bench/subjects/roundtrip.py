"""How exactly both directions of a trained MAF undo each other in float32: errors, and no times.

Ten layers are trained on digits, enlarged to 28 x 28 pixels, dequantized and taken through the logit as in the source. An error
is the largest over all test images and features, relative to the largest feature. Beside it stand what float64 reaches with the
same weights, and the limit: what rounding the values between both directions to float32 does, with all arithmetic in float64.

Source: Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation" (2017), section 4.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from flowkern import data, models, nn

from ..comparison import Options

__all__ = ["DEVICES", "TARGET", "RoundTrip", "comparisons", "measured"]

DEVICES = ("cpu",)
TARGET = 1e-4
QUICK: dict[str, Any] = {"side": 8, "hidden": (32, 32), "steps": 5, "samples": 20}
LEVELS, ALPHA = 256, 1e-6

Pair = tuple[torch.Tensor, torch.Tensor]
Map = Callable[[torch.Tensor], Pair]


def comparisons(options: Options) -> Iterator[str]:
    """A line for each way, there and back."""
    return map(str, measured(**(QUICK if options.quick else {})))


class RoundTrip(NamedTuple):
    """Errors of one way, there and back, relative to the largest value."""

    case: str
    way: str
    error: float
    in_float64: float
    limit: float

    def __str__(self) -> str:
        verdict = "reached" if self.error <= TARGET else "MISSED"
        figures = f"float32 {self.error:.1e} (target {TARGET:.0e}: {verdict}), float64 {self.in_float64:.1e}"
        return f"{self.case:28} {self.way:20} {figures}, rounding between alone {self.limit:.1e}"


def images(part: str, side: int) -> torch.Tensor:
    """Digits of a split as vectors, enlarged, dequantized and taken through the logit."""
    split = getattr(data.load("digits"), part)
    small = torch.from_numpy(split.values).float() / 16
    large = F.interpolate(small, (side, side), mode="bilinear", align_corners=False)
    noise = torch.rand(large.shape, generator=torch.Generator().manual_seed(len(split)))
    return nn.Logit(ALPHA)(((LEVELS - 1) * large).round().add(noise) / LEVELS)[0].flatten(1)


def trained(x: torch.Tensor, layers: int, hidden: tuple[int, ...], steps: int) -> models.MAF:
    """A MAF after some steps of Adam on the rows of x."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.MAF(x.shape[1], layers=layers, hidden=hidden)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(steps):
            loss = -model.log_prob(x[torch.randint(len(x), (100,))]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 50.0)
            optimizer.step()
    return model.requires_grad_(False)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, relative to the largest value."""
    return float((got.double() - expected.double()).abs().max() / expected.abs().max())


def there_and_back(case: str, way: str, there: tuple[Map, Map], back: tuple[Map, Map], x: torch.Tensor) -> RoundTrip:
    """Errors of x; of each direction the map in float32 and the one in float64."""
    error = relative(back[0](there[0](x)[0])[0], x)
    between = there[1](x.double())[0]
    in_float64, limit = (relative(back[1](z)[0], x) for z in (between, between.float().double()))
    return RoundTrip(case, way, error, in_float64, limit)


def measured(
    side: int = 28, layers: int = 10, hidden: tuple[int, ...] = (256, 256), steps: int = 400, samples: int = 200
) -> Iterator[RoundTrip]:
    """Both ways of a trained model: of test images, and of samples of the base."""
    model, x = trained(images("train", side), layers, hidden, steps), images("test", side)[:samples]
    exact = copy.deepcopy(model).double().bijection
    forward, inverse = (model.bijection.forward, exact.forward), (model.bijection.inverse, exact.inverse)
    case = f"{side * side}-{layers}x{'x'.join(map(str, hidden))}-steps{steps}"
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    yield there_and_back(case, "inverse(forward(x))", forward, inverse, x)
    yield there_and_back(case, "forward(inverse(z))", inverse, forward, z)
