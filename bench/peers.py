"""Other libraries beside this one. Each registers itself with the subject it is compared in; a missing one is left out."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["installed", "peer", "peers_of"]

_PEERS: dict[str, dict[str, Callable[..., Any]]] = {}


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def peer(subject: str, package: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that registers what makes a package's variant in a subject."""

    def register(make: Callable[..., Any]) -> Callable[..., Any]:
        _PEERS.setdefault(subject, {})[package] = make
        return make

    return register


@functools.cache
def peers_of(subject: str) -> dict[str, Callable[..., Any]]:
    """What makes the variants of the packages that are installed, by package."""
    found = _PEERS.get(subject, {})
    for package in found:
        if not installed(package):
            print(f"{subject}: {package} is not installed (pip install {package}): it is left out", file=sys.stderr)
    return {package: make for package, make in found.items() if installed(package)}
