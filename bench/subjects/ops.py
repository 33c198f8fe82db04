"""The ops of ``flowkern.OPS`` beside plain torch code, torch.compile of that, and a copy of the bytes that must move.

The plain code is that of ``bench/baselines.py``. All are held against float64: plain code may be off by some roundings, the op
by twice as much as the plain code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from flowkern import OPS
from flowkern._core import philox
from flowkern._core.op import Law, Op

from ..baselines import BASELINES
from ..cases import BOTH, CASES, Case, cases_of
from ..comparison import COMPILED, EAGER, FLOWKERN, Comparison, Options, Tensors, WrongResult, check, poisoned
from ..timing import Call, Graph, input_sets

__all__ = ["PAGES", "Problem", "compared", "comparisons"]

PAGES = ("fresh", "retained")
_SEED = 7


def comparisons(options: Options, names: tuple[str, ...] = ()) -> Iterator[Comparison]:
    """Those of the ops named, or of all."""
    for name in names or CASES:
        for case in cases_of(name, options.device):
            for direction in case.directions if options.wants(case.name) else ():
                yield compared(name, case, direction, options)


def compared(name: str, case: Case, direction: str, options: Options) -> Comparison:
    """The variants of one case of an op in one direction, the plain code first: it is what the others are held against."""
    op, device = OPS[name], torch.device(options.device)
    first = Problem(op, case, direction, device)
    sets = input_sets(first.traffic or 0.0) if device.type == "cuda" else 1
    others = [Problem(op, case, direction, device, seed) for seed in range(1, sets)]
    truth = _TRUTHS.get(name, _by_reference)(first)
    functions = {EAGER: BASELINES[name](*first.args, **case.kwargs), FLOWKERN: op.function}
    if case.compiles and (options.compile == "all" or (options.compile == "large" and not case.small)):
        torch._dynamo.reset()
        functions[COMPILED] = torch.compile(functions[EAGER], fullgraph=True, dynamic=False)
    allowed: list[float] = []

    def errors(variant: str, results: Tensors) -> list[float]:
        # Products of masked matrices sum in another order than plain code: they are held as that is.
        as_plain = variant != FLOWKERN or Law.MASKED in op.laws
        return check(*truth(results), None if as_plain else allowed)

    def checked(variant: str, call: Call) -> str:
        if variant != EAGER and not allowed:
            raise WrongResult("the plain code that it is held against failed")
        with poisoned() if variant == FLOWKERN else nullcontext():
            results = first.checked(functions[variant])()
        found = errors(variant, results)
        if variant == EAGER:
            allowed[:] = found
        return ""

    def verify(variant: str, graph: Graph) -> None:
        """A graph draws noise of its own, so that it is looked at only where there is none."""
        if variant in functions and not first.seeded:
            first.poison(graph.results[0])
            graph.replay()
            errors(variant, graph.results[0])

    return Comparison(
        case=case.name,
        direction=direction,
        calls={variant: first.call(function) for variant, function in functions.items()},
        against=EAGER,
        check=checked,
        traffic=first.traffic,
        seconds=2.0 if case.small else 5.0,  # which are thousands of samples
        target=case.target(direction, options.pages if options.device == "cpu" else "cold"),
        rotated={variant: [p.call(function) for p in others] for variant, function in functions.items()} if others else {},
        verify=verify,
    )


class Problem:
    """A case with its inputs drawn: ``call(function)`` is the call to measure, and returns all that it computed."""

    def __init__(self, op: Op, case: Case, direction: str, device: torch.device, seed: int = 0):
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        self.op, self.case, self.direction = op, case, direction
        args = case.inputs(draw)
        constants = {id(args[i]) for i in case.constants}

        def leaf(a: Any) -> Any:
            if not isinstance(a, torch.Tensor):
                return a
            return a.detach().requires_grad_(direction == BOTH and a.is_floating_point() and id(a) not in constants)

        self.args = tree_map(leaf, args)
        traffic = None if case.traffic is None else case.traffic(*self.args)
        self.traffic = None if traffic is None else sum(traffic) if direction == BOTH else traffic[0]
        self.seeded = Law.SEEDED in op.laws
        self.gradients: Tensors = ()
        if direction == BOTH:
            with torch.no_grad():
                outputs = _tuple(op.reference(*self.args, **case.kwargs))
            self.gradients = tuple(torch.empty_like(y).normal_(generator=generator) for y in outputs if y.is_floating_point())

    def call(self, function: Callable[..., Any], **kwargs: Any) -> Call:
        """``function`` on the inputs; with the backward, also the gradients of the inputs that have one."""
        return self._call(function, self.args, self.gradients, {**self.case.kwargs, **kwargs})

    def checked(self, function: Callable[..., Any]) -> Call:
        """The same with noise that is known, where the op draws some: plain code is given that of the op."""
        if not self.seeded:
            return self.call(function)
        return self.call(function, **({"seed": _SEED} if function is self.op.function else {"noise": self._noise()}))

    def _noise(self) -> torch.Tensor:
        """That of the op: normal numbers for floating inputs, uniform ones for integers."""
        x = self.args[0]
        seed, shape = philox.as_seed(_SEED, x.device), (x.shape[0], x.shape[1:].numel())
        if x.is_floating_point():
            return philox.normal(seed, 0, *shape, torch.float64).view(x.shape).to(x.dtype)
        return ((philox.bits(seed, 0, *shape) >> 8).double() * 2.0**-24 + 2.0**-25).float().view(x.shape)

    def exact(self) -> Tensors:
        """What the reference computes of the same inputs in float64."""
        kwargs: dict[str, Any] = {**self.case.kwargs, **({"seed": _SEED} if self.seeded else {})}
        if not self.args[0].is_floating_point() and self.seeded:
            kwargs["dtype"] = torch.float64
        gradients = tuple(g.double() for g in self.gradients)
        return self._call(self.op.reference, tree_map(_double, self.args), gradients, kwargs)()

    def poison(self, results: Tensors) -> None:
        """Fills the results with NaN, but for those that are views of what was given, and for integers."""
        given = [a for a in (*tree_leaves(self.args), *self.gradients) if isinstance(a, torch.Tensor)]
        taken = {a.untyped_storage().data_ptr() for a in given}
        for result in results:
            if result.is_floating_point() and result.untyped_storage().data_ptr() not in taken:
                result.detach().fill_(float("nan"))

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], gradients: Tensors, kwargs: dict[str, Any]) -> Call:
        if self.direction != BOTH:
            return lambda: _tuple(function(*args, **kwargs))
        leaves = tuple(a for a in tree_leaves(args) if isinstance(a, torch.Tensor) and a.requires_grad)
        recorded: list[int] = []
        given: list[torch.Tensor] = []

        def run() -> Tensors:
            outputs = _tuple(function(*args, **kwargs))
            if not recorded:  # which outputs record gradients is the same at each call
                recorded.extend(i for i, y in enumerate(outputs) if y.requires_grad)
                places = [i for i, y in enumerate(outputs) if y.is_floating_point()]
                given.extend(gradients[places.index(i)] for i in recorded)
            return *outputs, *torch.autograd.grad([outputs[i] for i in recorded], leaves, given)

        return run


def _double(a: Any) -> Any:
    if not (isinstance(a, torch.Tensor) and a.is_floating_point()):
        return a
    return a.detach().double().requires_grad_(a.requires_grad)


def _tuple(outputs: Any) -> Tensors:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


Truth = Callable[[Tensors], tuple[Tensors, Tensors]]


def _by_reference(problem: Problem) -> Truth:
    """(the floating results, what they are in float64)."""
    exact = problem.exact()
    return lambda results: (results, exact)


def _by_distances(problem: Problem) -> Truth:
    """Of searches: distances in float64, as far as two codes are equally near to rounding either is right."""
    x, codebook = (a.detach().double() for a in problem.args)
    norms = codebook.square().sum(1)
    nearest = torch.cat([torch.addmm(norms, block, codebook.t(), alpha=-2.0).min(1).values for block in x.split(256)])
    nearest += x.square().sum(1)

    def truth(results: Tensors) -> tuple[Tensors, Tensors]:
        found = (x - codebook[results[0]]).square().sum(1)
        return (found.float(), results[1]), (nearest, nearest)

    return truth


def _by_codes(problem: Problem) -> Truth:
    """Of quantizers: as ``_by_distances`` for the index, and the rest with the codes that were found."""
    distances = _by_distances(problem)

    def quantize(x: torch.Tensor, codebook: torch.Tensor, *, index: torch.Tensor) -> Tensors:
        code = codebook[index]
        loss = (code - x.detach()).square().mean() + 0.25 * (x - code.detach()).square().mean()
        return x + (code - x).detach(), loss

    def truth(results: Tensors) -> tuple[Tensors, Tensors]:
        quantized, index, *rest = results
        (found, _), (nearest, _) = distances((index, index))
        gradients = tuple(g.double() for g in problem.gradients)
        exact = problem._call(partial(quantize, index=index), tree_map(_double, problem.args), gradients, {})()
        return (found, quantized, *rest), (nearest, *exact)

    return truth


#: How results are held against float64 where it is not simply that of the reference.
_TRUTHS: dict[str, Callable[[Problem], Truth]] = {"nearest_code": _by_distances, "vector_quantize": _by_codes}
