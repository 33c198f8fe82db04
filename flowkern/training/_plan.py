"""What a training run does: ``Plan``, and the presets that fill one in."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import models
from ..data import Dataset
from ..nn.densities.base import check_sizes

OPTIMIZERS = ("adam", "adamw", "adamax")


@dataclass(frozen=True)
class Plan:
    """Everything that decides the weights that a run ends with. JSON-able; every checkpoint holds it.

    Args:
        model: a name in ``flowkern.models.MODELS``.
        data: a source of ``flowkern.data.load``, and ``size`` for it.
        config: keyword arguments of the model's constructor, besides shape and context.
        autoencoder: the checkpoint from which a VQ-VAE with a prior takes its autoencoder, or None.
        conditional: give the model the labels, one-hot, as its context.
        seed: of the weights, the order of the samples and all noise.
        epochs: at most so many; fewer if the validation NLL has not improved for ``patience`` of them (0: never stop).
        batch_size: of a step, over all devices and accumulated parts together.
        accumulate: the parts that a batch is taken in, one after the other, before its step: 1 / ``accumulate`` of the memory for
            activations. The gradient is that of the whole batch; layers that start from data (``ActNorm``) take the first part.
        lr, optimizer, weight_decay: of Adam, AdamW or Adamax.
        warmup: steps over which the learning rate rises linearly to ``lr``.
        clip: the gradient's largest norm; 0 for no limit.
        ema: decay of the exponential moving average of the weights, which is then what is evaluated; 0 for none.
    """

    model: str
    data: str
    size: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    autoencoder: str | None = None
    conditional: bool = False
    seed: int = 0
    epochs: int = 100
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    optimizer: str = "adam"
    weight_decay: float = 0.0
    warmup: int = 0
    clip: float = 0.0
    ema: float = 0.0
    patience: int = 0

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Plan)
        for each in dataclasses.fields(self):
            if not _is_a(value := getattr(self, each.name), hints[each.name]):
                raise ValueError(f"{each.name}: expected {each.type}, got {value!r}")
        check_sizes(epochs=self.epochs, batch_size=self.batch_size, accumulate=self.accumulate)
        for name in ("weight_decay", "warmup", "clip", "ema", "patience", "seed"):
            check_sizes(0, **{name: getattr(self, name)})
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate: expected at most batch_size ({self.batch_size}), got {self.accumulate}")
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr: expected more than 0, and finite, got {self.lr}")
        if self.weight_decay == math.inf:
            raise ValueError(f"weight_decay: expected a finite number, got {self.weight_decay}")
        if not self.ema < 1.0:
            raise ValueError(f"ema: expected a decay below 1, got {self.ema}")
        if self.seed >= 2**63:
            raise ValueError(f"seed: expected less than 2^63, got {self.seed}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: unknown name {self.optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")

    @property
    def evaluation_batch(self) -> int:
        """Twice what is in memory at once in training: without gradients there is room."""
        return max(1, 2 * self.batch_size // self.accumulate)

    def build(self, data: Dataset) -> models.Model:
        """A new model for the data; flows of images get a logit in front unless ``config`` says how to preprocess.

        Raises ValueError for labels that are not there and for a configuration that the model refuses.
        """
        if self.conditional and not data.classes:
            raise ValueError(f"conditional: {data.name} has no labels")
        context = len(data.classes) if self.conditional else None
        defaults = models.MODELS[self.model].config_for(data.levels)
        try:
            model = models.build(self.model, {**defaults, "shape": list(data.shape), "context": context, **self.config})
        except TypeError as error:
            raise ValueError(f"{self.model}: a setting has the wrong type: {error}") from error
        except (LookupError, AttributeError, ArithmeticError, RuntimeError, StopIteration) as error:
            what = f"{type(error).__name__} {error}".strip()
            raise ValueError(f"{self.model}: the settings do not make a model: {what}") from error
        if model.context not in (None, len(data.classes)):
            raise ValueError(f"{self.model}: the model is for {model.context} classes, and {data.name} has {len(data.classes)}")
        return model


#: Laid under every preset "default".
_DEFAULT: dict[str, Any] = {"warmup": 100, "clip": 100.0, "ema": 0.999, "patience": 20}


def _by_kind(declared: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(kind of data, preset, fields of ``Plan``) of what a model has ``declared``."""
    for key, fields in declared.items():
        kind, _, preset = key.partition("-")
        yield kind, preset or "default", fields


#: (model, data, preset) -> fields of ``Plan``. A "default" of model and data is laid over the one of ("*", "*").
PRESETS: dict[tuple[str, str, str], dict[str, Any]] = {("*", "*", "default"): _DEFAULT}
PRESETS |= {(m, kind, preset): f for m, cls in models.MODELS.items() for kind, preset, f in _by_kind(cls.presets)}


def _preset(declared: Mapping[str, dict[str, Any]], model: str, kind: str, preset: str) -> dict[str, Any]:
    """Fields of ``Plan`` from what a model has ``declared``. Raises ValueError for a preset that is not there for the data."""
    known: dict[str, dict[str, Any]] = {"default": {}}
    known |= {name: fields for of, name, fields in _by_kind(declared) if of == kind}
    if preset not in known:
        raise ValueError(f"preset: {model} on {kind} has no {preset!r}; expected one of {', '.join(known)}")
    return {**(_DEFAULT if preset == "default" else {}), **known[preset]}


def make_plan(model: str, data: str, *, preset: str = "default", **given: Any) -> Plan:
    """The plan of a preset with some fields given; ``config`` is laid over the preset's, key by key.

    Raises ValueError for an unknown model, preset, field or setting of the model, and for values out of range.
    """
    if model not in models.MODELS:
        raise ValueError(f"model: unknown name {model!r}; expected one of {', '.join(models.MODELS)}")
    fields = _preset(models.MODELS[model].presets, model, data.partition(":")[0], preset)
    config = {**fields.pop("config", {}), **given.pop("config", {})}
    check_config(model, config)
    return Plan(**(fields | {"model": model, "data": data, "config": config} | given))


def make_prior_plan(checkpoint: str | os.PathLike[str], *, preset: str = "default", **given: Any) -> Plan:
    """The plan of a prior over the codes of a trained VQ-VAE: a VQ-VAE again, with that autoencoder and a ``PixelCNN``.

    Fields are given as to ``make_plan``, by default the data of the checkpoint; ``config`` holds settings of the prior.

    Raises ValueError for a checkpoint of another model or one that does not name its data, and as ``make_plan``.
    """
    content = models.read_checkpoint(checkpoint)
    name, config, stored = content["model"]["name"], content["model"]["config"], content.get("plan", {})
    takers = [other for other, cls in models.MODELS.items() if cls.prior_presets is not None]
    if name not in takers:
        raise ValueError(f"{checkpoint} holds a {name}, which has no codes: a prior is for a {' or '.join(takers)}")
    models.load(checkpoint)  # refuses weights that do not fit, before another model is built by their configuration
    data = given.pop("data", None) or trained_on(checkpoint, content)
    kind = data.partition(":")[0]
    fields = _preset(models.MODELS[name].prior_presets or {}, "prior", kind, preset)
    prior = {**fields.pop("config", {}), **given.pop("config", {})}
    check_config("pixelcnn", prior, "prior", ("levels", "condition"))
    # Given on its own, the size of a folder's images is that of the run before.
    fields |= {"size": stored.get("size")} if data == stored.get("data") else {}
    config = {key: value for key, value in config.items() if key not in ("shape", "levels", "context")}
    config |= {"prior": prior}
    return Plan(**(fields | {"model": name, "data": data, "config": config, "autoencoder": str(checkpoint)} | given))


def trained_on(checkpoint: str | os.PathLike[str], content: Mapping[str, Any]) -> str:
    """The source of the data that a checkpoint with this content was trained on. Raises ValueError if it does not say."""
    data = content.get("plan", {}).get("data")
    if not isinstance(data, str):
        raise ValueError(f"{checkpoint} does not say what it was trained on: name the data (--data)")
    return data


def check_config(model: str, config: Mapping[str, Any], name: str | None = None, fixed: Sequence[str] = ()) -> None:
    """Raise ValueError, about ``name`` or the model, for a key that its constructor does not take or that is ``fixed``.

    And for a value of another type than the constructor says.
    """
    taken = ("shape", "context", *fixed)
    known = {key: p for key, p in inspect.signature(models.MODELS[model]).parameters.items() if key not in taken}
    hints = typing.get_type_hints(models.MODELS[model].__init__)
    for key, value in config.items():
        if key not in known:
            raise ValueError(f"{name or model} has no setting {key!r}; expected one of {', '.join(known)}")
        if not _is_a(value, hints[key]):
            raise ValueError(f"{name or model}: setting {key!r}: expected {known[key].annotation}, got {value!r}")


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of the type of an annotation. A whole number is a float too, and a bool is no number."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, argument) for argument in arguments)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if origin is Sequence:
        return isinstance(value, (list, tuple)) and all(_is_a(element, arguments[0]) for element in value)
    return isinstance(value, origin or hint)


def differences(given: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """The fields of ``given`` that a run's plan ``stored`` has otherwise, with both values; "" if there are none."""
    changed = {name: value for name, value in given.items() if value != stored.get(name)}
    return ", ".join(f"{name} {value!r} (the run has {stored.get(name)!r})" for name, value in changed.items())


def read_run(path: Path) -> dict[str, Any]:
    """The content of the checkpoint of a training run. Raises ValueError, naming ``path``, for any other."""
    content = models.read_checkpoint(path)
    kinds = {"plan": dict, "data": dict, "callbacks": dict, "loops": dict, "optimizer_states": list, "lr_schedulers": list}
    if wrong := [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]:
        raise ValueError(f"{path} is not the checkpoint of a training run: {', '.join(wrong)} missing")
    try:
        Plan(**content["plan"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the checkpoint of a training run: plan: {error}") from error
    return content


def resumed_plan(out: Path, given: Mapping[str, Any]) -> Plan:
    """The plan of the run in ``out``. ``given`` may repeat its fields; only ``epochs`` may differ, the others are fixed.

    Raises ValueError with every field that differs, and for a checkpoint that is not whole.
    """
    stored = read_run(out / "last.ckpt")["plan"]
    if "autoencoder" in given and "config" in given:
        given = {**given, "config": {"prior": {**(stored["config"].get("prior") or {}), **given["config"]}}}
    fixed = {**{name: value for name, value in given.items() if name != "epochs"}, "config": given.get("config", {})}
    known = {**stored, "config": {key: stored["config"].get(key) for key in fixed["config"]}}
    if changed := differences(fixed, known):
        raise ValueError(f"{out} cannot resume with {changed}")
    return Plan(**(stored | ({"epochs": given["epochs"]} if "epochs" in given else {})))
