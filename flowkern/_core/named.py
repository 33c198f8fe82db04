"""Objects that a configuration describes by a name and settings, so that a checkpoint can hold them without code."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch

__all__ = ["Named"]

N = TypeVar("N", bound="Named")


class Named:
    """The base of a family of classes with names: ``class Cubic(nn.Transformer, kind="cubic")``.

    An object is described by ``{"kind": name, **settings}``, and ``Family.of`` builds it from that, or from the
    name alone. Its settings are the arguments of its constructor, which it keeps as attributes of the same names; a class that
    does not overrides ``settings``.
    """

    kind: ClassVar[str | None] = None
    #: The classes of the family by their names.
    kinds: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = kind  # a class derived from one with a name has none: it is something else
        if Named in cls.__bases__:
            cls.kinds = {}
        elif kind is not None:
            cls.kinds[kind] = cls

    def settings(self) -> dict[str, Any]:
        """The arguments that the constructor makes an equal object of. Raises TypeError if an attribute for one is missing."""
        if type(self).__init__ in (object.__init__, torch.nn.Module.__init__):
            return {}
        found = {}
        for name in [*inspect.signature(type(self).__init__).parameters][1:]:
            if not hasattr(self, name):
                kept = f"no attribute for the argument {name!r} of its constructor"
                raise TypeError(f"{type(self).__name__}: {kept}; keep it, or override settings()")
            value = getattr(self, name)
            found[name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
        return found

    def config(self) -> dict[str, Any]:
        """``{"kind": name, **settings}``. Raises TypeError for a class without a name."""
        if self.kind is None:
            name = type(self).__name__
            raise TypeError(f'{name}: it has no name to be saved by; declare it as class {name}(..., kind="...")')
        return {"kind": self.kind, **self.settings()}

    @classmethod
    def of(cls: type[N], given: N | Mapping[str, Any] | str) -> N:
        """``given`` itself, or the object of that ``config``, or that of that name with its default settings.

        Raises TypeError for anything else, ValueError for an unknown name.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            given = {"kind": given}
        if not isinstance(given, Mapping) or "kind" not in given:
            expected = f"a {cls.__name__}, its config {{'kind': ..., **settings}} or its name"
            raise TypeError(f"{cls.__name__.lower()}: expected {expected}, got {given!r}")
        settings = dict(given)
        kind = settings.pop("kind")
        if kind not in cls.kinds:
            raise ValueError(f"{cls.__name__.lower()}: unknown kind {kind!r}; expected one of {', '.join(map(repr, cls.kinds))}")
        return cls.kinds[kind](**settings)
