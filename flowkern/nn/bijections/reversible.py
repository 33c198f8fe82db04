"""Backpropagation through a chain of bijections in memory that does not grow with its length.

The chain is cut into segments, each one autograd Function that saves its input and its output alone. Its backward
starts at the output and goes back bijection by bijection: ``Bijection.backward_step`` rebuilds the state before it and
differentiates the one step between the two. Inner states of a segment and activations of networks exist for one step at a time.

Every segment's end is an exact anchor, and the errors of the inverses do not go beyond it. They are watched in two places.
The rebuilt input of a segment is compared with the saved one, element by element. An inner state can have lost digits that the
input has again: so now and then the forward keeps a few samples' values of each inner state, and the backward compares them
with the rebuilt ones. An inner loss in other samples, or in a run that is not watched, is seen when its turn comes.

Source: Gomez et al., "The Reversible Residual Network: Backpropagation Without Storing Activations" (2017), section 3; that
inverses can explode: Behrmann et al., "Understanding and Mitigating Exploding Inverses in Invertible Neural Networks" (2021).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from ..._core.checks import accumulation_dtype
from ..._core.state import changed
from .bijection import Bijection, Pair, run
from .drift import drift, evenly, spot

MEMORY = ("store", "reversible", "auto")

#: Segments of a chain where no ``anchors`` are given: few, for memory, and more than one, so that DDP can overlap.
SEGMENTS = 4

#: Inner states are watched in the first run and in about one of so many. On an accelerator so are the anchors, because reading
#: the drift waits for the device.
WATCH_EVERY = 16

#: Roundings of an element, one after the other, that are no drift.
ROUNDINGS = 32

State = tuple[torch.Tensor, ...]
Indexed = tuple[int, Bijection]


def walk(
    bijections: Iterable[Bijection],
    x: torch.Tensor,
    context: torch.Tensor | None,
    inverse: bool,
    total: torch.Tensor | None = None,
) -> Pair:
    """The bijections one after the other, in the order given, and their logabsdet added to ``total``, by plain autograd."""
    total = x.new_zeros(x.shape[0], dtype=accumulation_dtype(x)) if total is None else total
    for bijection in bijections:
        x, logabsdet = run(bijection, x, context, inverse)
        total = total + logabsdet
    return x, total


class Keeper:
    """How one ``Compose`` keeps memory: runs its chain in segments, watches the drift and, for ``"auto"``, gives up.

    The arguments are those of ``Compose``, with a memory that is not ``"store"``.
    """

    def __init__(self, memory: str, anchors: int | None, drift: float | None):
        self.memory, self.anchors, self.drift = memory, anchors, drift
        self.stores = False  # "auto" has given up
        self._warned = False
        self._runs: dict[tuple[int, bool], int] = {}

    def run(
        self, chain: Sequence[Indexed], x: torch.Tensor, total: torch.Tensor, context: torch.Tensor | None, inverse: bool
    ) -> Pair:
        """The chain in the order given, its logabsdet added to ``total``; the places in the Compose are for messages.

        Raises RuntimeError for ``"reversible"`` where gradients cannot be had that way.
        """
        bijections = [bijection for _, bijection in chain]
        if self.stores or torch.compiler.is_exporting():
            return walk(bijections, x, context, inverse, total)
        steps = [_Step(index, bijection) for index, bijection in chain]
        if waiting := [i for i, step in enumerate(steps) if step.waits_for_data()]:
            _initialize(steps[: waiting[-1] + 1], x, context, inverse)
        if obstacle := _obstacle(steps, inverse):
            if self.memory == "reversible":
                raise RuntimeError(f"Compose: memory='reversible' cannot serve here: {obstacle}; use memory='store' or 'auto'")
            return walk(bijections, x, context, inverse, total)
        length = self.anchors or -(-len(steps) // SEGMENTS)
        key = id(bijections[0]), inverse
        turn = self._runs[key] = self._runs.get(key, -1) + 1
        for start in range(0, len(steps), length):
            segment = _Segment(steps[start : start + length], x.device, inverse, turn)
            x, total = _Reversible.apply(self, segment, x, total, context, *segment.parameters)
        return x, total

    def report(self, segment: _Segment, problem: str) -> None:
        """Warn once that the segment's gradients are off, or that ``"auto"`` stores from now on."""
        if self.memory == "auto":
            self.stores = True
            remedy = "its gradients are computed from the exact state, and activations are stored from now on"
        else:
            remedy = "its gradients are off; use a bounded scale, more anchors, memory='auto' or memory='store'"
        if not self._warned:
            self._warned = True
            warnings.warn(f"Compose: {segment.describe()}: {problem}; {remedy}", RuntimeWarning, stacklevel=2)


class _Step:
    """One bijection of a chain, with what is in it as of now."""

    def __init__(self, index: int, bijection: Bijection):
        self.index, self.bijection = index, bijection
        self.modules = list(bijection.modules())
        self.parameters = _parameters(self.modules)
        self.trained = [p for p in self.parameters if p.requires_grad]

    def waits_for_data(self) -> bool:
        """Whether a forward in training mode would set parameters from its data."""
        if any(is_lazy(p) for p in self.parameters):
            return True
        return any(map(_waits_for_data, self.modules))


def _waits_for_data(module: nn.Module) -> bool:
    """Whether the module says that its next forward in training mode sets its parameters."""
    is_initialized = getattr(type(module), "is_initialized", None)
    return module.training and is_initialized is not None and not is_initialized(module)


def _parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    unique = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    return list(unique.values())


def _initialize(steps: Sequence[_Step], x: torch.Tensor, context: torch.Tensor | None, inverse: bool) -> None:
    """Run what waits for data, and all before it, leaving random states and running statistics alone."""
    segment = _Segment(steps, x.device, inverse)
    with torch.no_grad(), _kept_random_state(x.device), segment.again():
        walk([step.bijection for step in steps], x, context, inverse)


def _obstacle(steps: Sequence[_Step], inverse: bool) -> str | None:
    """Why the chain must be stored, if it must."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    for step in steps:
        name = f"bijection {step.index} ({type(step.bijection).__name__})"
        if not inverse and type(step.bijection).inverse is Bijection.inverse:
            return f"{name} has no inverse"
        for p in step.trained:
            if not p.is_leaf:
                return f"a parameter of {name} is not a leaf (torch.func.functional_call puts such ones in)"
            if p._backward_hooks:
                return f"a parameter of {name} has a hook on its gradient, which would run twice"
    return None


class _Segment:
    """Neighbouring steps of a chain, and the circumstances under which they were run."""

    def __init__(self, steps: Sequence[_Step], device: torch.device, inverse: bool, turn: int = 0):
        self.steps, self.device, self.inverse, self.turn = steps, device, inverse, turn
        self.parameters = list({id(p): p for step in steps for p in step.trained}.values())
        kinds = {device.type, "cpu"} - {"meta"}
        #: (device, whether it is on, its dtype)
        self.autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self.states: list[State] = []  # the random state before each step, and after the last
        self.versions: list[int] = []
        self.watched = evenly(turn) * WATCH_EVERY < 1.0
        self.spots: list[torch.Tensor] = []  # of the state before each step but the first, if they are watched

    def describe(self) -> str:
        first, last = (f"{step.index} ({type(step.bijection).__name__})" for step in (self.steps[0], self.steps[-1]))
        return f"bijection {first}" if len(self.steps) == 1 else f"bijections {first} to {last}"

    def epsilon(self, dtype: torch.dtype) -> float:
        """Of the coarsest dtype at work: that of the state, of the parameters, or of autocast."""
        dtypes = {dtype, *(p.dtype for step in self.steps for p in step.parameters)}
        dtypes |= {lower for _, enabled, lower in self.autocast if enabled}
        return max(torch.finfo(d).eps for d in dtypes if d.is_floating_point)

    @property
    def random(self) -> bool:
        """Whether a step drew random numbers."""
        return self.states[0] is not self.states[-1]

    def remember(self) -> None:
        state = _random_state(self.device)
        if self.states and all(map(torch.equal, state, self.states[-1])):
            state = self.states[-1]
        self.states.append(state)

    def run(self, x: torch.Tensor, total: torch.Tensor, context: torch.Tensor | None) -> Pair:
        """Forward, without gradients, taking notes for the way back."""
        with self.as_it_was():
            for position, step in enumerate(self.steps):
                self.remember()
                if self.watched and position:
                    self.spots.append(spot(x, self.turn + position))
                x, logabsdet = run(step.bijection, x, context, self.inverse)
                total = total + logabsdet
        self.remember()
        self.versions = [_version(p) for step in self.steps for p in step.parameters]
        return x, total

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        """The autocast state of the forward. Its cache of weights stays off: those cast without gradients have no graph."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """As it was, and nothing changes by running a second time."""
        modules = (m for step in self.steps for m in step.modules)
        with self.as_it_was(), _frozen_statistics(modules):
            yield

    @contextlib.contextmanager
    def as_given(self) -> Iterator[None]:
        """What waits for data goes on waiting: an inverse took it as it was, and is undone by a forward."""
        with contextlib.ExitStack() as stack:
            for step in self.steps:
                for module in filter(_waits_for_data, step.modules):
                    stack.enter_context(changed(module, "training", False))
            yield

    def check_parameters(self) -> None:
        """Raises RuntimeError if the layers do not hold the parameters of the forward any more, or other values in them."""
        for step in self.steps:
            now = _parameters(step.modules)
            if len(now) != len(step.parameters) or any(a is not b for a, b in zip(now, step.parameters, strict=True)):
                raise RuntimeError(
                    f"Compose: the parameters of bijection {step.index} ({type(step.bijection).__name__}) were replaced between "
                    "forward and backward, which must run it again; use memory='store'"
                )
        if self.versions != [_version(p) for step in self.steps for p in step.parameters]:
            raise RuntimeError(
                f"Compose: a parameter of {self.describe()} was modified in place between forward and backward, "
                "which must run them again; call backward first, or use memory='store'"
            )

    def rewind(self, position: int) -> None:
        if self.random:
            _set_random_state(self.device, self.states[position])


def _version(p: torch.Tensor) -> int:
    return -1 if p.is_inference() else p._version


class _Replay:
    """One backward of a segment. See ``Replay``."""

    def __init__(self, segment: _Segment, context: torch.Tensor | None, grad: torch.Tensor | None, total: torch.Tensor | None):
        self.segment = segment
        self.grad, self.grad_logabsdet = grad, total
        self.context = context
        self.collected: dict[int, torch.Tensor] = {}  # id of a parameter (or the context) -> its gradient
        self.position = 0
        self.spots: list[torch.Tensor] = []  # of the rebuilt states, the last first

    def undo(self, y: torch.Tensor) -> torch.Tensor:
        """From the output of the segment to its rebuilt input, with the spots of the states between if they are watched."""
        for position in reversed(range(len(self.segment.steps))):
            self.position = position
            self.rewind()
            y = self.segment.steps[position].bijection.backward_step(y, self.context, self, self.segment.inverse)
            if self.segment.watched and position:
                self.spots.append(spot(y, self.segment.turn + position))
        return y

    def rewind(self) -> None:
        self.segment.rewind(self.position)

    def differentiate(self, y: torch.Tensor, logabsdet: torch.Tensor, *inputs: torch.Tensor) -> None:
        self.grad = self._pull(y, logabsdet, inputs, self.segment.steps[self.position].trained)

    def _pull(
        self, y: torch.Tensor, logabsdet: torch.Tensor, inputs: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]
    ) -> torch.Tensor | None:
        """The gradient of the inputs, summed; those of the parameters and the context are collected."""
        pairs = [(t, g) for t, g in ((y, self.grad), (logabsdet, self.grad_logabsdet)) if g is not None and t.requires_grad]
        if not pairs:
            return None
        more = [*parameters]
        if self.context is not None and self.context.requires_grad:
            more.append(self.context)
        outputs, gradients = zip(*pairs, strict=True)
        pulled = torch.autograd.grad(outputs, (*inputs, *more), gradients, allow_unused=True)
        for tensor, g in zip(more, pulled[len(inputs) :], strict=True):
            if g is not None:
                self.collected[id(tensor)] = self.collected[id(tensor)] + g if id(tensor) in self.collected else g
        of_inputs = [g for g in pulled[: len(inputs)] if g is not None]
        return sum(of_inputs[1:], of_inputs[0]) if of_inputs else None

    def from_the_start(self, x: torch.Tensor) -> None:
        """The segment's gradients with everything stored, from its exact input."""
        start = x.detach().requires_grad_(x.is_floating_point())
        y, total = start, x.new_zeros(x.shape[0], dtype=accumulation_dtype(x))
        with torch.enable_grad():
            for position, step in enumerate(self.segment.steps):
                self.segment.rewind(position)
                y, logabsdet = run(step.bijection, y, self.context, self.segment.inverse)
                total = total + logabsdet
        self.collected.clear()
        self.grad = self._pull(y, total, (start,), self.segment.parameters)


class _Reversible(torch.autograd.Function):
    """One segment: (x, total) -> (y, total + logabsdet). The parameters are inputs, so that their hooks see the gradients."""

    @staticmethod
    def forward(
        ctx: Any, keeper: Keeper, segment: _Segment, x: torch.Tensor, total: torch.Tensor, context: torch.Tensor | None, *_: Any
    ) -> Pair:
        ctx.set_materialize_grads(False)
        y, total = segment.run(x, total, context)
        ctx.save_for_backward(x, y, context)
        ctx.keeper, ctx.segment = keeper, segment
        return y, total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, grad_total: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Compose: reversible memory has no derivative of its derivative (create_graph=True); use memory='store'"
            )
        segment: _Segment = ctx.segment
        x, y, context = ctx.saved_tensors
        segment.check_parameters()
        if context is not None:
            context = context.detach().requires_grad_(ctx.needs_input_grad[4])
        replay = _Replay(segment, context, grad, grad_total)
        kept = _kept_random_state(x.device) if segment.random else contextlib.nullcontext()
        with segment.again(), segment.as_given(), kept:
            _undo(ctx.keeper, replay, x, y.detach())
        gradients = [replay.collected.get(id(p)) for p in segment.parameters]
        return None, None, replay.grad, grad_total, replay.collected.get(id(context)), *gradients


def _undo(keeper: Keeper, replay: _Replay, x: torch.Tensor, y: torch.Tensor) -> None:
    """Back to the segment's input, watching how far the rebuilt states are from the exact ones."""
    grad = replay.grad
    try:
        rebuilt = replay.undo(y)
        problem = _drift(keeper, replay, rebuilt, x.detach())
    except NotImplementedError as error:
        if keeper.memory != "auto":
            raise
        problem = str(error)
    if problem is not None:
        keeper.report(replay.segment, problem)
        if keeper.memory == "auto":
            replay.grad = grad
            replay.from_the_start(x)


def _drift(keeper: Keeper, replay: _Replay, rebuilt: torch.Tensor, exact: torch.Tensor) -> str | None:
    """What is wrong with the rebuilt states, if they are further from the exact ones than the bound."""
    segment = replay.segment
    if exact.is_meta or not exact.is_floating_point() or not (segment.watched or exact.is_cpu):
        return None
    epsilon = segment.epsilon(exact.dtype)
    # The largest drift that passes, and the relative error that is rounding alone.
    bound = epsilon**0.5 if keeper.drift is None else keeper.drift
    kept = min(bound, ROUNDINGS * epsilon)
    found, where = drift(rebuilt, exact, bound, kept), "the rebuilt input"
    if found is None and replay.spots:
        inner, exact = torch.cat(replay.spots, 1), torch.cat(segment.spots[::-1], 1)
        found, where = drift(inner, exact, bound, kept), "a rebuilt state inside"
    return None if found is None else f"{where} is off by {found:.1e} of its spread, more than {bound:.1e}"


def generators(device: torch.device) -> list[tuple[Any, tuple[torch.device, ...]]]:
    """The modules with the random states that a step may draw from, the CPU's and the device's, and how to name the device."""
    if device.type in ("cpu", "meta"):
        return [(torch, ())]
    return [(torch, ()), (torch.get_device_module(device), () if device.type == "mps" else (device,))]


def _random_state(device: torch.device) -> State:
    return tuple(module.get_rng_state(*which) for module, which in generators(device))


def _set_random_state(device: torch.device, states: State) -> None:
    for (module, which), state in zip(generators(device), states, strict=True):
        module.set_rng_state(state, *which)


@contextlib.contextmanager
def _kept_random_state(device: torch.device) -> Iterator[None]:
    state = _random_state(device)
    try:
        yield
    finally:
        _set_random_state(device, state)


@contextlib.contextmanager
def _frozen_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Normalization layers normalize as they would, and leave their running statistics alone."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if isinstance(module, Bijection):
                stack.enter_context(module.frozen())
            elif module.training and isinstance(module, _BatchNorm) and module.track_running_stats:
                # In training mode such a layer normalizes by its batch and knows no running statistics.
                stack.enter_context(changed(module, "track_running_stats", False))
            elif module.training and isinstance(module, _InstanceNorm) and module.track_running_stats:
                stack.enter_context(changed(module, "momentum", 0.0))
        yield
