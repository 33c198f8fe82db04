"""What ops promise besides their values, each held to the laws that it is registered with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparison import assert_same, call_of, change_samples, every_dtype, outputs_of, results, samples, serves, those_with
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from flowkern import OPS
from flowkern._core.op import Law, Op, Sample
from flowkern.ops import DegreeMask
from flowkern.ops.autoregressive import definition


def in_float64(sample: Sample) -> Sample:
    return Sample(sample.name, *tree_map_only(torch.Tensor, torch.Tensor.detach, call_of(sample, torch.float64)))


@those_with(Law.INVERTIBLE)
def test_the_inverse_is_exact(op: Op) -> None:
    for sample in map(in_float64, samples(op, torch.float64)):
        x, *rest = sample.args
        inverse = not sample.kwargs.get("inverse", False)
        y, logabsdet = op.function(x, *rest, **sample.kwargs)
        back, back_logabsdet = op.function(y, *rest, **{**sample.kwargs, "inverse": inverse})
        torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(back_logabsdet, -logabsdet)


@those_with(Law.LOG_DET)
def test_logabsdet_is_that_of_the_jacobian(op: Op) -> None:
    for sample in map(in_float64, samples(op, torch.float64, limit=160)):
        x, *rest = sample.args
        if not x.numel():
            continue
        _, logabsdet = op.function(x, *rest, **sample.kwargs)
        jacobian = torch.autograd.functional.jacobian(lambda x, s=sample: op.function(x, *s.args[1:], **s.kwargs)[0], x)
        for i in range(len(x)):
            own = jacobian[i].movedim(x.ndim - 1, 0)[i].reshape(x[i].numel(), -1)
            torch.testing.assert_close(torch.linalg.slogdet(own)[1], logabsdet[i])


@those_with(Law.SEEDED)
def test_equal_seeds_draw_equal_noise(op: Op) -> None:
    for sample in samples(op):
        if not sample.args[0].numel():
            continue

        def draw(sample: Sample = sample, **changed: Any) -> torch.Tensor:
            return op.function(*sample.args, **{**sample.kwargs, **changed})[0]

        seed, first = sample.kwargs["seed"], draw()
        assert torch.equal(draw(), first)
        number = int(seed)
        assert torch.equal(draw(seed=number), first)
        assert torch.equal(draw(seed=torch.tensor([number])), first)
        torch.manual_seed(4)
        drawn = draw(seed=None), draw(seed=None)
        torch.manual_seed(4)
        assert torch.equal(draw(seed=None), drawn[0])
        for other in (draw(seed=1234567), draw(offset=3), drawn[0]):
            assert not torch.equal(other, first)
        assert not torch.equal(*drawn)


@those_with(Law.SEEDED)
def test_noise_of_torch_does_not_depend_on_what_was_drawn(op: Op) -> None:
    """One number is taken from torch's generator, whatever the size."""
    sample = samples(op)[0]
    kwargs = {**sample.kwargs, "seed": None}
    torch.manual_seed(1)
    op.function(*sample.args, **kwargs)
    after = torch.randint(2**31, ())
    torch.manual_seed(1)
    op.function(*change_samples(op, lambda a: a.repeat(5, *[1] * (a.ndim - 1)), sample.args), **kwargs)
    assert torch.equal(torch.randint(2**31, ()), after)


@every_dtype
@those_with(Law.EXACT_INDEX)
def test_the_lowest_index_of_equal_distance(op: Op, dtype: torch.dtype, where: str) -> None:
    """Also where the dtype cannot tell codes apart: they are those that float64 finds, and a second copy is never taken."""
    for sample in samples(op, dtype, limit=2000)[: 2 if where == "triton" else None]:  # the interpreter takes its time
        x, codebook = sample.args
        place = [y.name for y in op.outputs].index("index")
        exact = outputs_of(op.reference, call_of(sample, torch.float64))[place]
        for codes in (codebook, codebook.repeat(2, 1), codebook.repeat_interleave(2, 0)):
            found = op.function(x, codes, **sample.kwargs)[place]
            assert torch.equal(found, 2 * exact if codes.shape != codebook.shape and torch.equal(codes[0], codes[1]) else exact)


def hidden_weights(sample: Sample) -> Iterator[tuple[int, torch.Tensor]]:
    """The number of each weight among the flattened arguments, and where a mask hides it."""
    if isinstance(sample.args[-1], list):
        networks = sample.args[-1]
        dense = [mask for network in networks for mask in definition.masks(network, torch.device("cpu"))]
    else:
        mask = sample.args[3]
        dense = [(mask if isinstance(mask, DegreeMask) else DegreeMask(*sample.args[3:], **sample.kwargs)).dense()]
    yield from ((1 + 2 * i, ~mask) for i, mask in enumerate(dense))


@those_with(Law.MASKED)
def test_masked_weights_do_not_matter(op: Op, where: str) -> None:
    if not serves(op, where):
        pytest.skip("the op has no kernel for it")
    for sample in samples(op):
        expected = results(op.function, sample)
        for value in (torch.inf, torch.nan):
            flat, spec = tree_flatten((sample.args, sample.kwargs))
            for i, hidden in hidden_weights(sample):
                flat[i] = flat[i].detach().masked_fill(hidden, value)
            actual = results(op.function, Sample(sample.name, *tree_unflatten(flat, spec)))
            torch.testing.assert_close(actual, expected)
            for i, hidden in hidden_weights(sample):
                assert (actual[len(op.outputs) + i][hidden] == 0).all()


@those_with(Law.SURROGATE)
def test_a_value_is_passed_as_it_is(op: Op) -> None:
    """The gradient of choice leaves the value's bits alone: those that no gradient is recorded for."""
    for sample in samples(op):
        assert_same(outputs_of(op.function, call_of(sample)), outputs_of(op.function, (sample.args, sample.kwargs)))


@pytest.mark.parametrize("law", list(Law), ids=lambda law: law.name)
def test_every_law_has_an_op(law: Law) -> None:
    assert any(law in op.laws for op in OPS.values())
