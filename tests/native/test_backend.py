"""Which backend runs, what is said when one cannot, and bad names."""

from __future__ import annotations

import re

import pytest
import torch
from processes import python

import flowkern
from flowkern import OPS, nn, ops
from flowkern._core import backend as _backend

ENVIRONMENT = """
import importlib, os
for name in ("FLOWKERN_BACKEND", "FLOWKERN_ISA"):
    os.environ[name] = "mmx"
    try:
        import flowkern
    except ValueError as error:
        print(error)
    del os.environ[name]
os.environ["FLOWKERN_BACKEND"] = "torch"
import flowkern
print(flowkern.explain("affine_coupling"))
from flowkern._core import backend as _backend
for os.environ["FLOWKERN_ISA"] in _backend.native.isas() if _backend.native else []:
    print("chosen:", importlib.reload(_backend).native.isa())
"""


@pytest.mark.slow
def test_the_environment_chooses_backend_and_isa() -> None:
    """And importing the library fails where it names none of them."""
    done = python("-c", ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "backend: unknown name 'mmx'" in done.stdout
    assert "asked for 'torch'" in done.stdout
    assert "torch  serves" in done.stdout
    if _backend.native is not None:
        assert "FLOWKERN_ISA: this machine does not run 'mmx'" in done.stdout
        assert re.findall("chosen: (.*)", done.stdout) == [*_backend.native.isas()]


def test_unknown_names_are_named() -> None:
    with pytest.raises(ValueError, match="backend: unknown name 'cudnn'"), flowkern.backend("cudnn"):
        pass
    if _backend.native is not None:
        with pytest.raises(ValueError, match=r"FLOWKERN_ISA: this machine does not run 'mmx'; expected one of .*baseline"):
            _backend.native.use_isa("mmx")


@pytest.mark.skipif(_backend.interpreting(), reason="Triton's interpreter serves CPU tensors")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_explicit_backend_that_cannot_serve_raises_with_the_reason(name: str) -> None:
    with flowkern.backend(name), pytest.raises(RuntimeError, match=f"backend '{name}' was asked for but cannot serve: ."):
        ops.affine_coupling(torch.randn(2, 4), torch.randn(2, 4))


def test_the_context_restores_what_was_asked_for() -> None:
    before = _backend.requested()
    with flowkern.backend("torch"):
        assert _backend.requested() == "torch"
        with pytest.raises(KeyError), flowkern.backend("auto"):
            raise KeyError
        assert _backend.requested() == "torch"
    assert _backend.requested() == before


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_explain_lists_every_backend(op: flowkern._core.op.Op) -> None:
    sample = next(iter(op.samples("cpu", torch.float32)))
    for text in (flowkern.explain(op.name), flowkern.explain(op.function, *sample.args, **sample.kwargs)):
        assert all(name in text for name in _backend.BACKENDS)
        assert text.count("serves\n") + text.endswith("serves") == 1
    with pytest.raises(ValueError, match="explain: unknown op 'coupling'"):
        flowkern.explain("coupling")


def test_explain_tells_the_depth_of_networks() -> None:
    layer = nn.MaskedAutoregressive(10, (32, 32))
    text = flowkern.explain(ops.autoregressive_inverse, torch.randn(2, 10), layer.parameters_of_layers(), [layer.network])
    assert f"10 sequential steps for 10 features; {layer.network.used_weights:.1%} of the weights used" in text
    shallow = ops.AutoregressiveNetwork((1, 1, 2, 2, 3), ((1, 2),))
    assert "3 sequential steps for 5 features" in flowkern.explain("autoregressive_inverse", networks=shallow)


def test_without_the_extension_the_reference_runs_under_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "native", None)
    x, params = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    y, _ = ops.affine_coupling(x, params)
    assert "Coupling" not in type(y.grad_fn).__name__
    with flowkern.backend("cpp"), pytest.raises(RuntimeError, match="cannot serve"):
        ops.affine_coupling(x.detach(), params.detach())
