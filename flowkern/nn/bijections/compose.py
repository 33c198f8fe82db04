"""Bijections one after the other."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributions import constraints

from ..._core.checks import accumulation_dtype
from .bijection import Bijection, Joined, Pair, outermost
from .reversible import MEMORY, Keeper, walk


class Compose(Bijection):
    """z = f_n(... f_2(f_1(x))); logabsdet is the sum of theirs. The inverse runs them backwards.

    The context goes to each of them. Shapes as the first takes and the last gives. Neighbours that ``join``
    run as one: autoregressive layers and the permutations between them are one call of ``ops.autoregressive_inverse``.

    Args:
        memory: how gradients come about.

            - ``"store"``: autograd keeps the activations of every bijection, so memory grows with their number.
            - ``"reversible"``: the activations are dropped; the backward pass rebuilds each bijection's input from its
              output and runs its network once more. Memory does not grow with their number, and a step takes 4/3 of the time.
            - ``"auto"``: as ``"reversible"``, until that turns out not to serve; then as ``"store"``.
        anchors: keep an exact state every so many bijections; None for four. Fewer take less memory, more stop errors earlier.
        drift: the error of a rebuilt element, relative to its distance from the middle of its feature (an index of dimension 1)
            or to the feature's spread over the batch, whichever is larger, above which a RuntimeWarning says which bijections
            it comes from and how large it is, once; ``"auto"`` then computes these gradients from the exact state and stores
            from there on. Errors of 32 roundings of the element itself are none. None for the square root of the epsilon of the
            coarsest dtype at work: 3e-4 for float32, 9e-2 for networks in bfloat16, whose own rounding is what their
            rebuilt inputs differ by. All elements are compared at every anchor; between anchors, those of a few samples in the
            first run and in about one of sixteen. On an accelerator that is when the anchors are compared too, because reading
            the drift waits for the device.

    What holds for reversible memory, in ``forward`` and in ``inverse`` alike:

    - z is that of ``"store"`` bit for bit, logabsdet up to the order of its sum (in nested Composes), and gradients equal
      its gradients up to the rounding of the inverses.
    - Any bijection with an exact inverse serves. Nested Composes count as their bijections (their own settings are not used),
      a ``MultiScale`` as its levels'.
    - Dropout draws the same mask again; batch normalization uses the same batch and updates its running statistics once;
      autocast is as it was in the forward; layers that initialize from data (``ActNorm``) do so before.
      Networks with other state that a forward changes (spectral normalization) are not reproduced; the drift tells.
    - The parameters are inputs of a few autograd Functions, so that frozen ones are skipped and DDP overlaps. Their values
      must stay until the backward pass; RuntimeError otherwise.
    - There is no second derivative: RuntimeError with ``create_graph=True``. Inside ``torch.func`` transforms and
      forward-mode differentiation, with parameters that have a hook on their gradient, and for a bijection without
      inverse, ``"auto"`` stores and ``"reversible"`` raises RuntimeError.
    - Under ``torch.compile`` the graph breaks at the Compose, which then runs as it is; networks inside that were wrapped in
      ``torch.compile`` themselves are compiled whole. Without gradients nothing breaks.

    Raises ValueError for an unknown ``memory``, ``anchors`` below 1 and a ``drift`` that is not positive, and TypeError for a
    layer that is not a ``Bijection`` where memory is not ``"store"``.

    Source: Gomez et al., "The Reversible Residual Network" (2017), section 3.
    """

    def __init__(self, *bijections: Bijection, memory: str = "store", anchors: int | None = None, drift: float | None = None):
        super().__init__()
        if memory not in MEMORY:
            raise ValueError(f"memory: expected one of {', '.join(map(repr, MEMORY))}, got {memory!r}")
        if anchors is not None and anchors < 1:
            raise ValueError(f"anchors: expected at least 1, or None, got {anchors}")
        if drift is not None and not drift > 0.0:
            raise ValueError(f"drift: expected a positive number, or None, got {drift}")
        others = [b for b in bijections if not isinstance(b, Bijection)]
        if others and memory != "store":
            raise TypeError(f"Compose: memory={memory!r} needs every layer to be a Bijection, got {type(others[0]).__name__}")
        self.bijections = nn.ModuleList(bijections)
        self.memory, self.anchors, self.drift = memory, anchors, drift
        self._keeper = None if memory == "store" else Keeper(memory, anchors, drift)
        self._joined: dict[bool, tuple[list[int], list[Bijection]]] = {}

    @property
    def domain(self) -> constraints.Constraint | None:  # type: ignore[override]
        return outermost(getattr(b, "domain", None) for b in self.bijections)

    @property
    def codomain(self) -> constraints.Constraint | None:  # type: ignore[override]
        return outermost(getattr(b, "codomain", None) for b in reversed(self.bijections))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        for bijection in self.bijections:
            shape = cast(Bijection, bijection).output_shape(shape)
        return shape

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self._run(x, context, inverse=False)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self._run(z, context, inverse=True)

    def _run(self, x: torch.Tensor, context: torch.Tensor | None, inverse: bool) -> Pair:
        if self._keeper is None or not torch.is_grad_enabled():
            return walk(self._ordered(inverse), x, context, inverse)
        return _run_reversible(self._keeper, self, x, context, inverse)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and files have no use for what can be found again.
        return {**self.__dict__, "_joined": {}}

    def _ordered(self, inverse: bool) -> Sequence[Bijection]:
        bijections = [*cast(Sequence[Bijection], self.bijections)]
        if not torch.compiler.is_compiling() and any(_joins(b) for b in bijections):
            bijections = self._with_joined(bijections, inverse)
        return bijections[::-1] if inverse else bijections

    def _with_joined(self, bijections: list[Bijection], inverse: bool) -> list[Bijection]:
        """The bijections in the order of ``forward``, neighbours that join for this direction as one."""
        key = [*map(id, bijections)]
        known, found = self._joined.get(inverse, ([], []))
        if known == key and all(b.is_current() for b in found if isinstance(b, Joined)):
            return found
        found, i = [], 0
        while i < len(bijections):
            joined = bijections[i].join(bijections[i + 1 :], inverse) if _joins(bijections[i]) else None
            found.append(bijections[i] if joined is None else joined)
            i += 1 if joined is None else len(joined.members)
        if len(found) < len(bijections):
            self._joined[inverse] = key, found
        return found

    def extra_repr(self) -> str:
        return "" if self.memory == "store" else f"memory={self.memory!r}, anchors={self.anchors}, drift={self.drift}"


def _joins(bijection: nn.Module) -> bool:
    return getattr(type(bijection), "join", Bijection.join) is not Bijection.join


def _flattened(bijection: Bijection) -> Iterator[Bijection]:
    """The bijections that a Compose stands for, those of Composes in it included, in the order of forward."""
    if not isinstance(bijection, Compose) or type(bijection).forward is not Compose.forward:
        yield bijection
        return
    for inner in bijection.bijections:
        yield from _flattened(cast(Bijection, inner))


# Compiling what is inside piece by piece would draw other dropout masks in the forward than in the backward, which is eager.
@torch._disable_dynamo
def _run_reversible(keeper: Keeper, bijection: Bijection, x: torch.Tensor, context: torch.Tensor | None, inverse: bool) -> Pair:
    """Chains of bijections go to the keeper; a container among them walks, and each of its parts comes here again."""
    total = x.new_zeros(x.shape[0], dtype=accumulation_dtype(x))
    chain: list[tuple[int, Bijection]] = []

    def flush() -> None:
        nonlocal x, total
        if chain:
            x, total = keeper.run(chain, x, total, context, inverse)
            chain.clear()

    indexed = [*enumerate(_flattened(bijection))]
    for index, inner in reversed(indexed) if inverse else indexed:
        walk_through = getattr(type(inner), "walk", None)
        if walk_through is None:
            chain.append((index, inner))
            continue
        flush()
        x, logabsdet = walk_through(inner, x, context, inverse, lambda part, h, c: _run_reversible(keeper, part, h, c, inverse))
        total = total + logabsdet
    flush()
    return x, total
