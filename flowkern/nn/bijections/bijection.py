"""``Bijection``: what every invertible layer answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.distributions import constraints

Pair = tuple[torch.Tensor, torch.Tensor]

#: Runs one bijection inside a container: ``run(bijection, x, context)``, in the direction that the container walks.
Run = Callable[["Bijection", torch.Tensor, torch.Tensor | None], Pair]


class Replay(Protocol):
    """What ``Bijection.backward_step`` works with: the gradient on its way down, and where the step's randomness began."""

    def rewind(self) -> None:
        """Set the random state to that at the start of the step. It stands there when ``backward_step`` is called."""

    def differentiate(self, y: torch.Tensor, logabsdet: torch.Tensor, *inputs: torch.Tensor) -> None:
        """Exchange the gradient of y (and of logabsdet) for that of the inputs; parameters and context get theirs.

        ``inputs`` are leaves that all stand for the same x: the gradient of x is the sum of theirs. A step made of several
        parts calls this once for each, the last part first.
        """


class Bijection(nn.Module):
    """An invertible layer; derive from it to write your own.

    ``forward(x, context=None) -> (z, logabsdet)`` runs data to latent and ``inverse(z, context=None) -> (x, logabsdet)``
    back. ``logabsdet`` is log|det d out / d in| of the direction called: shape (B,), in nats, float64 if the input is,
    else float32. ``context`` is None or a (B, K) tensor; layers without parameters to condition ignore it.
    Not every x need have a z: for a sample with an element outside of ``domain``, logabsdet is -inf, z any finite value and
    their gradients zero, so that a flow gives it the density zero. NaN stays NaN.

    In a ``Compose`` with reversible memory a layer is undone by ``backward_step``, which has a default for any layer. What it
    asks of a layer is that ``forward`` and ``inverse`` depend on nothing but their arguments, the parameters and torch's
    random state. A layer (or a module in it) whose first forward in training mode sets its parameters says so by a method
    ``is_initialized() -> bool``. A container may have a method ``walk(x, context, inverse, run) -> (y, logabsdet)``
    that calls ``run`` for each of its bijections; each of them is then undone on its own.
    """

    #: What an element of x can be, and one of z; None where that is not known.
    domain: constraints.Constraint | None = constraints.real
    codomain: constraints.Constraint | None = constraints.real

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        raise NotImplementedError(f"{type(self).__name__} has no inverse")

    def backward_step(self, y: torch.Tensor, context: torch.Tensor | None, replay: Replay, inverse: bool = False) -> torch.Tensor:
        """From the output y of ``forward`` (of ``inverse``, if ``inverse``) back to its input, and the gradient with it.

        Called with gradients off; returns the input, without a graph, after it has told ``replay`` how y depends on it.
        The default undoes the step and then runs it again with gradients, which is two evaluations of any network
        inside. Override it where one will do: a coupling's network reads what is the same in y and in the input.
        """
        x = run(self, y, context, not inverse)[0].detach().requires_grad_()
        replay.rewind()
        with torch.enable_grad():
            replay.differentiate(*run(self, x, context, inverse), x)
        return x.detach()

    def join(self, following: Sequence[Bijection], inverse: bool) -> Joined | None:
        """This bijection and some of those that follow it in a ``Compose``, as one that does the same faster, or None.

        ``inverse`` is the direction in which it is to run. A ``Compose`` asks once, and again when its bijections are
        others or ``is_current`` is False. With reversible memory, and under ``torch.compile``, it runs the bijections themselves.
        """
        return None

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        """While it is open, a forward in training mode computes the same and leaves running statistics as they are."""
        return contextlib.nullcontext()

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of z without its batch dimension, for an x of that ``shape``. Raises ValueError if x does not fit."""
        return shape


def run(bijection: Bijection, x: torch.Tensor, context: torch.Tensor | None, inverse: bool) -> Pair:
    """The bijection's ``inverse`` or, by a call of the module, its ``forward``."""
    return bijection.inverse(x, context) if inverse else bijection(x, context)


def outermost(these: Iterable[constraints.Constraint | None]) -> constraints.Constraint | None:
    """The first of them, if the others are the whole real line; else None."""
    first, *others = [*these] or [constraints.real]
    return first if all(other is constraints.real for other in others) else None


class Joined(Bijection):
    """What ``Bijection.join`` makes of its neighbours ``members``: one bijection in their place, in one direction."""

    def __init__(self, members: Sequence[Bijection]):
        super().__init__()
        self.members = (*members,)  # no ModuleList: they belong to their Compose

    def is_current(self) -> bool:
        """Whether the members are still what this was made of."""
        return True
