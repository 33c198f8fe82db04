"""The steps of CONTRIBUTING.md, followed with the code that stands there: an op, a transformer, a model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from flowkern import models, nn

ROOT = Path(__file__).parents[1]


def code_of(path: str) -> str:
    """The block of CONTRIBUTING.md that begins with a file's name."""
    found = re.search(
        rf"^ *```python\n( *# {re.escape(path)}\n.*?)^ *```$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M | re.S
    )
    assert found is not None
    return textwrap.dedent(found[1])


def defined(path: str) -> dict[str, Any]:
    """What the code of a file defines, in a module of its own."""
    names: dict[str, Any] = {"__name__": Path(path).stem}
    exec(compile(code_of(path), path, "exec"), names)
    return names


@pytest.mark.slow
def test_a_new_op_is_held_by_the_generic_tests(tmp_path: Path) -> None:
    """In a copy of the library without its kernels, so that nothing is compiled."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for source, place in (("flowkern", ""), ("kernels/triton", "kernels"), ("bench", "bench")):
        shutil.copytree(ROOT / source, tmp_path / "flowkern" / place, ignore=ignored, dirs_exist_ok=True)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # An editable install would lend the copy its extension, which has no entry for the op.
    (tmp_path / "flowkern/_native.py").write_text("raise ImportError('this copy has no kernels')\n")
    (tmp_path / "flowkern/ops/_average.py").write_text(code_of("flowkern/ops/_average.py"))
    with open(tmp_path / "flowkern/ops/__init__.py", "a") as exports:
        exports.write("from ._average import average as average\n")
    generic = ("test_values", "test_memory", "test_transforms", "test_laws", "test_gradients")
    files = [str(tmp_path / "tests" / "ops" / f"{name}.py") for name in generic]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "average", *files]
    ran = subprocess.run(command, cwd=tmp_path, env={**env, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None
    assert int(passed[1]) >= 5


def log_det(layer: nn.Bijection, x: torch.Tensor) -> torch.Tensor:
    """log|det| of the Jacobian at one sample."""
    return torch.linalg.slogdet(torch.autograd.functional.jacobian(lambda v: layer(v[None])[0][0], x))[1]


def test_a_new_transformer_serves_couplings_and_autoregressive_layers() -> None:
    transformer = defined("flowkern/nn/transformers/shrink.py")["Shrink"]()
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64)
    layers = nn.Coupling(nn.MLP(3, 3, zero_init=False), transformer), nn.Autoregressive(6, transformer, hidden=(16,))
    for layer in layers:
        layer.double()
        y, logabsdet = layer(x)
        back, other = layer.inverse(y)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(other, -logabsdet)
        torch.testing.assert_close(logabsdet, torch.stack([log_det(layer, row) for row in x]))
        assert not torch.equal(x, y)


def test_a_new_model_is_built_saved_loaded_and_trained(tmp_path: Path) -> None:
    declared = defined("flowkern/models/_toy.py")["Toy"]
    try:
        model = models.build("toy", {"shape": [6], "hidden": 8})
        assert isinstance(model, declared)
        x = torch.randn(5, 6)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        before = -model.log_prob(x).mean()
        before.backward()
        optimizer.step()
        assert -model.log_prob(x).mean() < before
        models.save(model, tmp_path / "toy.ckpt")
        loaded = models.load(tmp_path / "toy.ckpt")
        assert isinstance(loaded, declared)
        assert torch.equal(loaded.log_prob(x), model.log_prob(x))
    finally:
        models.MODELS.pop("toy")
        models.PRESETS.pop(("toy", "digits"))
