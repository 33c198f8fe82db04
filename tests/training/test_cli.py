"""The command line: what it prints, and one clear line for what it cannot do."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

np = pytest.importorskip("numpy")

from training_runs import last, without_pictures  # noqa: E402

from flowkern import cli, data, models, training  # noqa: E402
from flowkern.training import _codecs  # noqa: E402

SMALL = ["--set=flatten=true", "--set=couplings=2", "--set=hidden=8", "--batch-size=250", "--epochs=1", "--draws=1"]


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> tuple[Path, str]:
    """A run and what it printed."""
    out, text = tmp_path_factory.mktemp("cli") / "deep" / "run", io.StringIO()
    with contextlib.redirect_stdout(text):
        assert cli.main(["train", "realnvp", "--data=digits", f"--out={out}", *SMALL]) == 0
    return out, text.getvalue()


@pytest.fixture
def run(printed) -> Path:
    return printed[0]


def test_train_prints_where_things_are(printed):
    out, text = printed
    for name in ("best.ckpt", "curve.png", "samples.png"):
        assert f"{out / name}" in text
        assert (out / name).exists()
    assert text.splitlines()[-1].startswith("test NLL: ")
    assert "nats" in text
    assert "bits/dim (447 samples, 1 draw)" in text


def refusal(capsys, *arguments: str) -> str:
    """The one line that a command prints as it fails with code 2."""
    capsys.readouterr()
    assert cli.main(list(map(str, arguments))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("flowkern: error: ")
    return lines[0]


def test_memory_and_parts_reach_the_run(tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    glow = ["train", "glow", "--data=digits", "--batch-size=250", "--epochs=1", "--draws=1", "--set=steps=1", "--set=hidden=4"]
    arguments = ["--memory=reversible", "--accumulate=2", "--channels-last", "--precision=bf16-mixed"]
    assert cli.main([*glow, *arguments, f"--out={tmp_path}"]) == 0
    content = last(tmp_path)
    config = content["model"]["config"]
    assert (config["memory"], config["steps"], config["hidden"]) == ("reversible", 1, 4)
    assert (content["plan"]["accumulate"], content["global_step"]) == (2, 4)


def test_eval_of_what_it_was_trained_on(run, capsys, monkeypatch):
    monkeypatch.setattr(_codecs, "CODECS", {"PNG": _codecs.CODECS["PNG"]})  # the quickest
    evaluate = ["eval", f"{run / 'best.ckpt'}", "--split=val", "--draws=2"]
    printed = []
    for more in ([], ["--data=digits"], ["--importance=2"]):
        assert cli.main([*evaluate, *more]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "RealNVP (best.ckpt), the bound " in printed[0]
    assert "(350 samples, 2 draws), an estimate by importance" in printed[2]
    assert "RealNVP (best.ckpt), the estimate by importance " in printed[2]


@pytest.mark.slow
def test_output_that_nobody_reads(run):
    """As in ``flowkern eval ... | head -0``."""
    command = f"{sys.executable} -m flowkern.cli eval {run / 'best.ckpt'} --split val --draws 1 --no-codecs | true"
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")


#: Runs one command after the other in a process, with "then" between them, up to the first that fails.
IN_TURN = """
import itertools, sys
from flowkern.cli import main
for between, command in itertools.groupby(sys.argv[1:], "then".__eq__):
    if not between and (code := main(list(command))):
        sys.exit(code)
"""

ASCII = [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]


@pytest.mark.slow
@pytest.mark.parametrize("environment", ASCII)
def test_names_that_are_no_text_on_a_terminal_of_ascii(tmp_path, environment):
    """Images, classes, data and checkpoints under such names: train, resume, evaluate and sample."""
    from PIL import Image

    root = tmp_path / os.fsdecode("d\xe9\u4e2d$x_$".encode() + b"\xff")
    for i in range(12):
        path = root / os.fsdecode((b"a\xfe", "\u4e2d".encode())[i % 2]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(path)
    (path.parent / os.fsdecode(b"\xfd.png")).write_text("no image")
    out = tmp_path / os.fsdecode(b"r\xff")
    train = ["train", "realnvp", f"--data=folder:{root}", "--size=8", f"--out={out}", "--draws=1", *SMALL[:3], "--conditional"]
    commands = [*train, "--batch-size=4", "--epochs=1", "then", *train, "--batch-size=4", "--epochs=2", "--resume", "then"]
    commands += ["eval", str(out / "best.ckpt"), "--draws=1", "then", "sample", str(out / "best.ckpt"), "-n", "4"]
    commands += ["-o", str(out / "x.png"), "--label", path.parent.name]
    how = {"capture_output": True, "encoding": "utf-8", "errors": "surrogateescape", "env": {**os.environ, **environment}}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", IN_TURN, *commands], **how)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("test NLL: ") == 3
    # In the C locale Python hands bytes that are no text on as they came.
    assert all(ord(c) < 128 or "LC_ALL" in environment for c in done.stdout + done.stderr)
    for plan in (models.read_checkpoint(out / "last.ckpt")["plan"], json.loads((out / "result.json").read_text())["plan"]):
        assert os.fsencode(plan["data"]) == os.fsencode(f"folder:{root}")
    assert (out / "x.png").exists()


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "", "meta", "xla", "0"])
def test_devices_that_are_not_there(run, tmp_path, capsys, device):
    sample = ["sample", run / "best.ckpt", "-o", tmp_path / "x.png"]
    for command in (sample, ["eval", run / "best.ckpt"], ["compare", "realnvp", "--data=digits"]):
        line = refusal(capsys, *command, f"--device={device}")
        assert f"device: expected one that torch can use here, got '{device}': " in line
    assert not (tmp_path / "x.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "tpu", "nonsense"])
def test_accelerators_that_are_not_there(tmp_path, capsys, accelerator):
    line = refusal(capsys, "train", "realnvp", "--data=digits", f"--out={tmp_path / 'run'}", f"--accelerator={accelerator}")
    assert "accelerator" in line
    assert "None" not in line
    assert not (tmp_path / "run").exists()


def test_eval(run, capsys):
    evaluate = ["eval", f"{run / 'best.ckpt'}", "--data=digits", "--split=val", "--draws=2"]
    assert cli.main(evaluate) == 0
    expected = training.evaluate(models.load(run / "best.ckpt"), data.load("digits"), "val", draws=2)
    first, empty, *table = capsys.readouterr().out.splitlines()
    assert (first, empty) == (f"val NLL: {expected}", "")
    assert table[0].split() == ["bits/dim,", "val", "split", "of", "digits", "350", "images"]
    assert table[1].split() == ["RealNVP", "(best.ckpt),", "the", "bound", f"{expected.bits_per_dim:.3f}"]
    assert [line.split(",")[0] for line in table[2::3]] == ["PNG", "WebP lossless"]
    assert cli.main([*evaluate, "--no-codecs"]) == 0
    assert capsys.readouterr().out == f"val NLL: {expected}\n"


def test_sample(run, tmp_path, capsys):
    from PIL import Image

    pictures = []
    for name, seed, temperature in (("a", 0, 1.0), ("b", 0, 1.0), ("c", 1, 1.0), ("d", 0, 0.5)):
        out = tmp_path / "new" / f"{name}.png"
        arguments = ["-n", "5", "-o", f"{out}", f"--seed={seed}", f"--temperature={temperature}"]
        assert cli.main(["sample", f"{run / 'best.ckpt'}", *arguments]) == 0
        with Image.open(out) as picture:
            # Two rows of three tiles, 8 x 8 with one pixel between them, eight times as large.
            assert picture.size == (8 * 28, 8 * 19)
            pictures.append(picture.tobytes())
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 3
    assert "5 samples in" in capsys.readouterr().out


def test_sample_of_a_saved_model(tmp_path):
    """A checkpoint of ``flowkern.models.save`` says nothing of the data: 256 levels are assumed."""
    models.save(models.RealNVP((3, 4, 4), couplings=1, hidden=4, depth=1), tmp_path / "m.ckpt")
    for name in ("x.png", "x.npy"):
        assert cli.main(["sample", f"{tmp_path / 'm.ckpt'}", "-n", "3", "-o", f"{tmp_path / name}"]) == 0
    assert np.load(tmp_path / "x.npy").shape == (3, 3, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=nope"], "data: unknown source 'nope'; expected one of digits, photos, folder:PATH"),
        (["--data=mnist:/no/such/place"], "/no/such/place does not exist"),
        (["--data=digits", "--set=foo=1"], "realnvp has no setting 'foo'; expected one of couplings"),
        (["--data=digits", "--set=foo"], "--set expects KEY=VALUE, got 'foo'"),
        (["--data=digits", "--set=hidden=wide"], "realnvp: setting 'hidden': expected int | None, got 'wide'"),
        (["--data=digits", "--set=zero_init=1"], "realnvp: setting 'zero_init': expected bool, got 1"),
        (["--data=digits", '--set=scale={"kind":"tanh"}'], "ScaleMap: 'tanh' needs its constant a > 0"),
        (["--data=digits", "--preset=x"], "has no 'x'; expected one of default, demo, recipe"),
        (["--data=digits", "--optimizer=sgd"], "optimizer: unknown name 'sgd'; expected one of adam, adamw, adamax"),
        (["--data=digits", "--size=16"], "only folder:PATH is resized"),
        (["--data=digits", "--precision=8"], "precision: unknown name '8'"),
        (["--data=digits", "--devices=x"], "should be an int"),
        (["--data=digits", "--strategy=x"], "invalid strategy name"),
        (["--data=digits", "--draws=0"], "draws: expected at least 1"),
        (["--data=digits", "--nodes=0"], "nodes: expected at least 1"),
        (["--data=digits", "--accumulate=0"], "accumulate: expected at least 1"),
        (["--data=digits", "--memory=store"], "realnvp has no setting 'memory'"),
        (["--data=digits", "--set=couplings=0"], "couplings: expected at least 1, got 0"),
        (["--data=digits", "--set=dropout=NaN"], "dropout: expected at least 0 and less than 1, got nan"),
        (["--data=digits", "--devices=99999"], "devices: expected at most"),
        (["--data=digits", "--workers=99999"], "workers: expected at most"),
        (["--data=digits", "--lr=inf"], "lr: expected more than 0, and finite, got inf"),
        (["--data=npy:tests"], "tests is not a file"),
        (["glow", "--data=digits", "--memory=little"], "memory: expected one of 'store', 'reversible', 'auto', got 'little'"),
        (["vae", "--data=digits", "--set=objective=iwae"], "vae: setting 'objective'"),
        (["vae", "--data=digits", "--prior=realnvp", "--set=flow_hidden=[]"], "flow_hidden: 'realnvp' needs at least one width"),
        (["vae", "--data=digits", "--set=hidden=7"], "vae: setting 'hidden'"),
        (["pixelvae", "--data=digits", '--set=pixelcnn={"levels": 3}'], "pixelcnn: levels follow from the other settings"),
        (["--data=digits", "--set=preprocess=7"], "realnvp: setting 'preprocess'"),
        (["--data=digits", "--set=scale=x"], "realnvp: setting 'scale'"),
        (["--data=digits", "--set=hidden=-3"], "hidden: expected at least 1, got -3"),
    ],
)
def test_train_refuses(tmp_path, capsys, arguments, message):
    model = ["realnvp"] if arguments[0].startswith("--") else []
    assert message in refusal(capsys, "train", f"--out={tmp_path / 'run'}", *model, *arguments)
    assert not (tmp_path / "run").exists()


def test_train_refuses_unknown_models_and_used_folders(run, tmp_path, capsys):
    assert "unknown name 'x'; expected one of " in refusal(capsys, "train", "x", "--data=digits", f"--out={tmp_path}")
    arguments = ["train", "realnvp", "--data=digits", f"--out={run}"]
    assert "holds a run already; --resume continues it" in refusal(capsys, *arguments)
    assert "cannot resume with lr 0.5 (the run has" in refusal(capsys, *arguments, "--resume", "--lr=0.5")
    assert "cannot resume with model 'nice'" in refusal(capsys, "train", "nice", *arguments[2:], "--resume")
    assert (run / "last.ckpt").exists()


def test_resume_takes_the_settings_of_the_run(tmp_path, capsys, monkeypatch):
    without_pictures(monkeypatch)
    resume = ["train", "realnvp", "--data=digits", f"--out={tmp_path / 'run'}", "--resume", "--draws=1"]
    assert cli.main([*resume, *SMALL]) == 0
    assert "holds nothing to resume: starting anew" in capsys.readouterr().out
    assert cli.main([*resume, "--epochs=2"]) == 0
    content = last(tmp_path / "run")
    assert (content["epoch"], content["plan"]["batch_size"]) == (1, 250)


def test_commands_refuse_foreign_checkpoints(run, tmp_path, capsys):
    (tmp_path / "cut.ckpt").write_bytes((run / "best.ckpt").read_bytes()[:1000])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    for name, reason in (("cut", "truncated"), ("text", "not written by flowkern"), ("foreign", "not written by flowkern")):
        path = tmp_path / f"{name}.ckpt"
        for arguments in (["eval", path, "--data=digits"], ["sample", path, "-o", tmp_path / "x.png"]):
            line = refusal(capsys, *arguments)
            assert f"{path}: " in line
            assert reason in line
    assert "No such file" in refusal(capsys, "eval", tmp_path / "none.ckpt", "--data=digits")
    assert "shape (1, 8, 8), and photos has (3, 32, 32)" in refusal(capsys, "eval", run / "best.ckpt", "--data=photos")
    assert "unknown file extension" in refusal(capsys, "sample", run / "best.ckpt", "-o", tmp_path / "x.foo")
    assert "label: the model takes none" in refusal(capsys, "sample", run / "best.ckpt", "-o", tmp_path / "x.png", "--label=3")
    assert "expected at least 1 sample" in refusal(capsys, "sample", run / "best.ckpt", "-o", tmp_path / "x.png", "-n", "0")
    assert not list(tmp_path.glob("*.png"))


def test_eval_refuses(run, capsys):
    for name, least in (("batch-size", "batch_size"), ("draws", "--draws"), ("importance", "--importance")):
        for value in (0, -3):
            line = refusal(capsys, "eval", run / "best.ckpt", "--data=digits", f"--{name}={value}")
            assert f"{least}: expected at least 1, got {value}" in line


@pytest.mark.parametrize("name", ["realnvp", "made", "vae", "vqvae"])
def test_temperatures_are_checked(tmp_path, capsys, name):
    settings = {"couplings": 1, "hidden": 4} if name == "realnvp" else {"levels": 17}
    models.save(models.build(name, {"shape": [1, 8, 8], **settings}), tmp_path / "m.ckpt")
    for temperature in ("-1", "nan", "inf"):
        line = refusal(capsys, "sample", tmp_path / "m.ckpt", "-o", tmp_path / "x.png", f"--temperature={temperature}")
        assert f"temperature: expected a number of at least 0, got {temperature}" in line
    assert not (tmp_path / "x.png").exists()


def test_limits_on_time_are_checked(tmp_path, capsys):
    for command in (["train", "realnvp", "--data=digits"], ["table", "digits"]):
        for minutes in ("0", "-1", "nan"):
            line = refusal(capsys, *command, f"--out={tmp_path / 'run'}", f"--max-minutes={minutes}")
            assert f"max_minutes: expected more than 0, got {minutes}" in line
    assert not (tmp_path / "run").exists()


def test_interrupt(run, capsys, monkeypatch):
    monkeypatch.setattr(training, "sample_nlls", mock.Mock(side_effect=KeyboardInterrupt))
    assert cli.main(["eval", f"{run / 'best.ckpt'}", "--data=digits"]) == 130
    assert capsys.readouterr().err == "flowkern: error: interrupted\n"


def test_failure_on_the_way(run, capsys, monkeypatch):
    monkeypatch.setattr(training, "train", mock.Mock(side_effect=training.Diverged("the loss is not finite at step 3")))
    arguments = ["train", "realnvp", "--data=digits", f"--out={run}", "--overwrite"]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err.startswith("flowkern: error: the loss is not finite at step 3")
    with pytest.raises(training.Diverged):
        cli.main(["--debug", *arguments])


def test_compare(run, capsys, monkeypatch):
    compare = training.compare
    monkeypatch.setattr(training, "compare", lambda *a, **k: compare(*a, **k, rounds=1, seconds=0.01))
    assert cli.main(["compare", f"{run / 'best.ckpt'}", "--data=digits", "--batch-size=16"]) == 0
    assert "batch 16" in capsys.readouterr().out
    assert "unknown name 'x'" in refusal(capsys, "compare", "x", "--data=digits")
    for size in (0, -2):
        line = refusal(capsys, "compare", "realnvp", "--data=digits", f"--batch-size={size}")
        assert f"batch_size: expected at least 1, got {size}" in line


def test_demo_trains_and_compares(run, tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(training, "train", lambda plan, out, **options: calls.append((plan, out, options)))
    monkeypatch.setattr(training, "compare", lambda source, data: f"table of {source}")
    assert cli.main(["demo", f"--out={tmp_path}", "--minutes=0.5"]) == 0
    plan, out, options = calls[0]
    assert (plan.model, plan.data, out, options) == ("realnvp", "digits", tmp_path, {"overwrite": True, "max_minutes": 0.5})
    assert f"table of {tmp_path / 'best.ckpt'}" in capsys.readouterr().out
