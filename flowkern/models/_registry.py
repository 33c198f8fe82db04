"""The models by name, and their named settings: each model declares both where it is defined."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .._core.named import Named
from ..nn.densities.base import check_name
from ._model import Model

M = TypeVar("M", bound=Model)

#: Every model by the name that checkpoints and the command line use.
MODELS: dict[str, type[Model]] = {}

#: Named settings: (model, preset) -> keyword arguments of the model's constructor, besides the shape.
PRESETS: dict[tuple[str, str], dict[str, Any]] = {}


def model(name: str, *, presets: Mapping[str, Mapping[str, Any]] | None = None) -> Callable[[type[M]], type[M]]:
    """Declare a class to be the model ``name``: ``build``, checkpoints and ``flowkern train`` then know it.

    The constructor's arguments are the model's ``config``, as JSON has them: a setting needs to be named nowhere else.

    Args:
        name: in ``MODELS``, in checkpoints and on the command line.
        presets: settings by the kind of the data that they are for, as ``"digits"``, or by that and a name, as
            ``"digits-recipe"``. Each holds fields of ``training.Plan``; the field ``config`` holds arguments of the constructor.

    Raises ValueError for a name that is taken, and TypeError for a constructor whose arguments have no names.
    """
    if name in MODELS:
        raise ValueError(f"model: the name {name!r} is taken by {MODELS[name].__name__}")

    def declare(cls: type[M]) -> type[M]:
        cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]
        cls.presets = {preset: dict(fields) for preset, fields in (presets or {}).items()}
        MODELS[name] = cls
        PRESETS.update({(name, preset): fields["config"] for preset, fields in cls.presets.items() if "config" in fields})
        return cls

    return declare


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that leaves its arguments in ``self.config``, unless that of a subclass has left its own."""
    signature = inspect.signature(init)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()):
        raise TypeError(f"{init.__qualname__}: every argument of a model needs a name, got {signature}")

    @functools.wraps(init)
    def __init__(self: Model, *args: Any, **kwargs: Any) -> None:
        outermost = "config" not in self.__dict__
        if outermost:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            self.config = {key: plain(value) for key, value in list(bound.arguments.items())[1:]}
        init(self, *args, **kwargs)
        if outermost:
            self.settle(shape=[*self.shape], context=self.context)

    return __init__


def plain(value: Any, *, saved: bool = False) -> Any:
    """A copy of the value as JSON has it: what is ``Named`` as its config, another dataclass as a dict, a sequence as a list.

    An object of a class without a name stays what it is, unless the copy is to be ``saved``: then it raises TypeError.
    """
    if isinstance(value, Named):
        return value.config() if saved or value.kind is not None else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: plain(element, saved=saved) for key, element in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(element, saved=saved) for element in value]
    return value


def build(name: str, config: Mapping[str, Any]) -> Model:
    """The model of that name with that configuration (its ``config``, or any keyword arguments of its constructor).

    Raises ValueError for an unknown name and for a configuration that the model refuses, TypeError for unknown keywords.
    """
    check_name("model", name, MODELS)
    return MODELS[name](**config)


def name_of(model: Model) -> str:
    """The model's name in ``MODELS``. Raises TypeError if it has none."""
    for name, cls in MODELS.items():
        if type(model) is cls:
            return name
    raise TypeError(f"model: expected one of flowkern.models ({', '.join(MODELS)}), got {type(model).__name__}")
