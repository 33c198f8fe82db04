"""A model of a few lines, declared in one place: presets, the plan, training, checkpoints and the command line know it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch

import flowkern
from flowkern import cli, models, training


@pytest.fixture
def toy() -> Iterator[type[models.Model]]:
    @models.model("toy", presets={"digits": {"config": {"sharpness": 2.0}, "lr": 0.05, "epochs": 2}})
    class Toy(models.DiscreteModel):
        """Independent categorical pixels."""

        def __init__(
            self, shape: Sequence[int], *, levels: int = 256, sharpness: float | None = None, context: int | None = None
        ):
            super().__init__()
            self.shape, self.levels, self.context = tuple(shape), levels, None
            self.sharpness = 1.0 if sharpness is None else sharpness
            self.settle(sharpness=self.sharpness)
            self.logits = torch.nn.Parameter(torch.zeros(*self.shape, levels))

        def log_mass(self, v: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
            log_p = (self.sharpness * self.logits).log_softmax(-1).expand(len(v), *self.logits.shape)
            return log_p.gather(-1, v[..., None]).flatten(1).sum(1)

        def draw(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
            return torch.distributions.Categorical(logits=self.sharpness * self.logits).sample((n,))

        def pictures(
            self, x: torch.Tensor, other: torch.Tensor, context: torch.Tensor | None, contexts: torch.Tensor | None
        ) -> Iterator[models.Picture]:
            yield models.Picture("toys.png", torch.cat([x, other]), "images and others like them")

        def remarks(self, x: torch.Tensor) -> list[str]:
            return [f"seen: {len(x)} images"]

    yield Toy
    del models.MODELS["toy"], models.PRESETS["toy", "digits"]


def test_trains_by_the_command_line(toy, tmp_path, capsys) -> None:
    assert cli.main(["train", "toy", "--data", "digits", "--out", str(tmp_path), "--draws", "1"]) == 0
    printed = capsys.readouterr().out
    picture = f"images and others like them in {tmp_path / 'toys.png'}"
    for line in ("toy (1,088 parameters) on digits", picture, "seen: 447 images"):
        assert line in printed
    model = flowkern.load(tmp_path / "best.ckpt")
    assert type(model) is toy
    assert model.config == {"shape": [1, 8, 8], "levels": 17, "sharpness": 2.0, "context": None}
    log = training.read_log(tmp_path / "log")["val_nll"]
    assert len(log) == 2
    assert log[-1][1] < log[0][1] < 64 * math.log(17.0)
    assert {"samples.png", "toys.png"} <= {path.name for path in tmp_path.iterdir()}
    assert cli.main(["sample", str(tmp_path / "best.ckpt"), "-o", str(tmp_path / "x.npy"), "-n", "2"]) == 0
    assert cli.main(["train", "toy", "--data", "digits", "--set", "blunt=1", "--out", str(tmp_path / "2")]) == 2
    assert "toy has no setting 'blunt'; expected one of levels, sharpness" in capsys.readouterr().err


def test_a_configuration_is_what_the_constructor_was_given(toy) -> None:
    assert toy((1, 2, 2), levels=3).config == {"shape": [1, 2, 2], "levels": 3, "sharpness": 1.0, "context": None}
    assert models.build("toy", toy((1, 2, 2), levels=3).config).config == toy((1, 2, 2), levels=3).config
    assert models.PRESETS["toy", "digits"] == {"sharpness": 2.0}

    class Sharp(toy):
        def __init__(self, shape: Sequence[int]):
            super().__init__(shape, levels=2, sharpness=9.0)

    assert Sharp((1, 1, 1)).config == {"shape": [1, 1, 1], "levels": 2, "sharpness": 9.0, "context": None}
    with pytest.raises(TypeError, match=r"expected one of flowkern\.models"):
        models.save(Sharp((1, 1, 1)), "none.ckpt")


def test_declarations_that_are_refused(toy) -> None:
    with pytest.raises(ValueError, match="the name 'toy' is taken by Toy"):
        models.model("toy")
    with pytest.raises(TypeError, match="every argument of a model needs a name"):

        @models.model("loose")
        class Loose(models.Model):
            def __init__(self, shape: Sequence[int], **options: int):
                super().__init__()

    assert "loose" not in models.MODELS
