"""No package reaches into another one's private modules and names; what they share stands in ``flowkern/_core``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import python

ROOT = Path(__file__).parent.parent
#: The folders of the code, and the package that each one is.
PACKAGES = {"flowkern": ("flowkern",), "kernels/triton": ("flowkern", "kernels"), "bench": ("flowkern", "bench")}
SHARED = "_core"


def _files() -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Every file, with the package that it belongs to."""
    for folder, package in PACKAGES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file, (*package, *file.relative_to(ROOT / folder).parent.parts)


FILES = [*_files()]


def _imported(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The line and the full name of everything that a module of ``package`` imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            module = (*parent, *node.module.split(".")) if node.module else parent
            yield from ((node.lineno, (*module, alias.name)) for alias in node.names)


def _private_imports(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Those of another package's private modules and names; a package owns its modules and their names."""
    packages = {package for _, package in FILES}
    for line, name in _imported(source, package):
        private = [i for i, part in enumerate(name) if part.startswith("_") and not part.startswith("__") and part != SHARED]
        if name[0] != "flowkern" or not private:
            continue
        owner = name[: private[0]]
        if (owner if owner in packages else owner[:-1]) != package:
            yield f"line {line}: {'.'.join(name)}"


def test_no_package_imports_a_private_module_of_another() -> None:
    found = [
        f"{file.relative_to(ROOT)}, {line}" for file, package in FILES for line in _private_imports(file.read_text(), package)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("from ..ops._affine_coupling import undo", 1),
        ("from ..ops import _affine_coupling", 1),
        ("import flowkern.ops._affine_coupling", 1),
        ("from ..ops.autoregressive.network import _plan", 1),
        ("from ._flow import rows", 0),
        ("from .flow import _rows", 0),
        ("from .networks.conditioner import _check_context", 1),
        ("from .._core.checks import check_floating", 0),
        ("from torch._subclasses import FakeTensorMode", 0),
    ],
)
def test_the_check_sees_what_is_private(source: str, private: int) -> None:
    assert len([*_private_imports(source, ("flowkern", "nn"))]) == private


def test_importing_flowkern_is_light() -> None:
    """Neither the trainer's libraries nor Triton are loaded before they are used."""
    heavy = ["triton", "lightning", "matplotlib", "sklearn", "PIL", "rich"]
    code = f"import sys, flowkern; print([m for m in {heavy!r} if m in sys.modules])"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
