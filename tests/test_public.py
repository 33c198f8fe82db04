"""Every public name of version 0.1.0 is still there, and is still called as it was: ``public_0.1.0.json`` lists them."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

#: Module -> name (or class and method) -> parameters as (name, kind, default or None), or None for what is not called.
STORED: dict[str, dict[str, list[tuple[str, str, str | None]] | None]] = json.loads(
    Path(__file__).with_name("public_0.1.0.json").read_text()
)

#: What was changed on purpose, and the changelog says: (module, name, parameter) -> its default now.
CHANGED = {("flowkern.nn", "AffineCoupling", "scale"): f"ScaleMap(kind='soft_clip', a={math.log(1e3)!r}, b=0.0)"}


def parameters(function: Callable[..., Any]) -> list[tuple[str, str, str | None]]:
    """(name, kind, default) of each parameter, the default as text without addresses; None stands for no default."""
    found = []
    for p in inspect.signature(function).parameters.values():
        default = None if p.default is p.empty else re.sub(r" at 0x\w+", "", repr(p.default))
        found.append((p.name, p.kind.name, default))
    return found


def refused(before: list[tuple[str, str, str | None]], now: list[tuple[str, str, str | None]]) -> list[str]:
    """What a caller of before would notice: parameters that are gone, moved, renamed or have another default."""
    known = {name: (kind, default) for name, kind, default in now}
    loose = {kind for _, kind, _ in now}
    found = []
    for name, kind, default in before:
        if name in known and known[name] == (kind, default):
            continue
        if not (name not in known and kind == "KEYWORD_ONLY" and "VAR_KEYWORD" in loose):
            found.append(f"{name}: was {kind} {default}, is {known.get(name)}")
    by_position = [name for name, kind, _ in before if kind.startswith("POSITIONAL")]
    if [name for name, kind, _ in now if kind.startswith("POSITIONAL")][: len(by_position)] != by_position:
        found.append(f"by position it took {', '.join(by_position)}")
    old = {name for name, _, _ in before}
    found += [
        f"{name}: is new, and must be given" for name, kind, d in now if name not in old and d is None and "VAR" not in kind
    ]
    return found


@pytest.mark.parametrize("module", STORED)
def test_names_and_signatures_of_0_1_0(module: str) -> None:
    if module in ("flowkern.training", "flowkern.data"):
        for package in ("numpy", "rich", "matplotlib", "PIL"):
            pytest.importorskip(package)
    imported = importlib.import_module(module)
    changes = []
    for path, before in STORED[module].items():
        value: Any = imported
        for name in path.split("."):
            value = getattr(value, name, None)
        if value is None:
            changes.append(f"{path} is gone")
        elif before is not None:
            expected = [(name, kind, CHANGED.get((module, path, name), default)) for name, kind, default in before]
            changes += [f"{path}: {change}" for change in refused(expected, parameters(value))]
    assert not changes, "\n".join(changes)


def test_what_a_caller_would_notice() -> None:
    def before(x, y=1, *, z=2): ...

    def more(x, y=1, w=None, *, z=2, v=3): ...

    def gone(x, *, z=2): ...

    def moved(y=1, x=0, *, z=2): ...

    def needed(x, y=1, *, z=2, v): ...

    def other(x, y=1, *, z=3): ...

    def loose(x, y=1, **options): ...

    for function, changes in ((before, 0), (more, 0), (loose, 0), (gone, 2), (moved, 2), (needed, 1), (other, 1)):
        assert len(refused(parameters(before), parameters(function))) == changes, function.__name__
