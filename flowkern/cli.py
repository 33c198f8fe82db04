"""The command line: ``flowkern train``, ``sample``, ``eval``, ``compare``, ``table``, ``demo``, ``bench`` and ``doctor``.

``bench``, ``doctor`` and ``--help`` need torch alone; the other commands need the extra ``flowkern[train]``.
"""

import argparse
import ctypes
import dataclasses
import errno
import io
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .models import MODELS

__all__ = ["main"]

_SOURCES = "digits, photos, folder:PATH, cifar10:PATH, mnist:PATH or npy:PATH"


# How the messages begin of errors that writing meets, on a full disk for one.
_OF_WRITING = tuple(f"[Errno {number}]" for number in (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EBADF))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 1 if it failed on the way, 2 if it could not be meant that way, 130 if interrupted."""
    if not _open_streams():
        return _fail("standard output is closed; > /dev/null is the way to see nothing of it", 2)
    ended: SystemExit | None = None
    code, message = 0, ""
    try:
        code, message = _outcome(sys.argv[1:] if argv is None else list(argv))
    except SystemExit as end:  # as after --help
        ended = end
    if (error := _unwritten(probe=message.startswith(_OF_WRITING))) is not None:
        # Whoever read this has enough, as head does; there is no more to say.
        ended, code, message = None, 1, "" if isinstance(error, BrokenPipeError) else f"standard output: {error.strerror}"
    if ended is not None:
        raise ended
    return _fail(message, code) if message else code


def _open_streams() -> bool:
    """Make the standard streams such that printing to them does not fail; False if standard output is closed."""
    # A closed one would be None, and the next file that is opened would get its number, and what libraries print.
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stdout is None:
        return False
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # Names of files need not be text, and a terminal may have ASCII alone.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    return True


def _unwritten(probe: bool) -> OSError | None:
    """Why what was printed could not be written, or None if it was; nothing more is then written, at exit neither.

    ``probe``: another line tells, where what could not be written is forgotten.
    """
    try:
        if probe:
            sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def _outcome(argv: list[str]) -> tuple[int, str]:
    """The exit code of a command, and what to say of it: nothing if all went well."""
    command = argv[1:] if argv[:1] == ["--debug"] else argv
    if command[:1] == ["bench"]:
        from .bench.__main__ import main as bench

        return bench(command[1:]), ""
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch without it; so is all of flowkern
    arguments = _parser().parse_args(argv)
    if arguments.debug:
        return arguments.run(arguments) or 0, ""
    try:
        return arguments.run(arguments) or 0, ""
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("flowkern"):
            raise
        missing = f'{error.name} is not installed; this command needs: pip install "flowkern[train]"'
        return 2, missing if error.name else str(error)
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        return 2, str(error) or type(error).__name__
    except BrokenPipeError:
        return 1, ""
    except KeyboardInterrupt:
        return 130, "interrupted"
    except MemoryError as error:
        return 1, f"out of memory: {error} (--debug shows where)"
    except Exception as error:
        what = str(error) if isinstance(error, RuntimeError | OSError) else f"{type(error).__name__}: {error}"
        return 1, f"{what} (--debug shows where)"


def _fail(message: str, code: int) -> int:
    print(f"flowkern: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flowkern", description="Normalizing flows and other density models on fused kernels.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], what: str, **options: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, **options)
        added.set_defaults(run=run)
        return added

    _add_train_arguments(command("train", _train, "train a model", argument_default=argparse.SUPPRESS))

    demo = command("demo", _demo, "train RealNVP on digits for about a minute, and compare the backends")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    demo.add_argument("--minutes", type=float, default=1.0, help="of training (1)")

    sample = command("sample", _sample, "draw samples from a checkpoint")
    sample.add_argument("checkpoint", type=Path)
    sample.add_argument("-n", type=int, default=64, help="how many (64)")
    sample.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="a picture, or .npy for the values")
    sample.add_argument("--temperature", type=float, default=1.0, help="of the base's standard deviation (1)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--label", help="class of a conditional model, by name or number (default: one after the other)")
    sample.add_argument("--device", default="cpu")

    evaluate = command("eval", _eval, "the NLL of data under a checkpoint, beside the size of PNG and WebP files")
    evaluate.add_argument("checkpoint", type=Path)
    evaluate.add_argument("--data", metavar="SOURCE", help=f"{_SOURCES} (those it was trained on)")
    evaluate.add_argument("--size", type=int, help="side of the images of folder:PATH (32)")
    evaluate.add_argument("--split", choices=("train", "val", "test"), default="test")
    evaluate.add_argument("--draws", type=int, default=20, help="of dequantization noise (20)")
    evaluate.add_argument("--batch-size", type=int, default=256)
    evaluate.add_argument("--importance", type=int, metavar="K", help="estimate the likelihood by K importance samples instead")
    codecs = "for images, also what PNG and lossless WebP need (yes)"
    evaluate.add_argument("--codecs", action=argparse.BooleanOptionalAction, default=True, help=codecs)
    evaluate.add_argument("--device", default="cpu")

    compare = command("compare", _compare, "step time and memory of the fused kernels against plain torch")
    compare.add_argument("model", help="a checkpoint, or the name of a model")
    compare.add_argument("--data", required=True, metavar="SOURCE", help=_SOURCES)
    compare.add_argument("--size", type=int, help="side of the images of folder:PATH (32)")
    compare.add_argument("--batch-size", type=int, default=64)
    compare.add_argument("--device", default="cpu")

    table = command("table", _table, "train the models side by side, a few seeds each, and print their likelihoods")
    table.add_argument("data", choices=("digits",))
    table.add_argument("--out", type=Path, default=Path("runs/table"), metavar="DIR", help="of runs, table and plot (runs/table)")
    table.add_argument("--seeds", type=int, default=5, help="how many (5)")
    table.add_argument("--rows", nargs="+", metavar="ROW", help="some rows only")
    table.add_argument("--max-minutes", type=float, metavar="M", help="of training for a single run; later calls can go on")

    commands.add_parser("bench", help="time and memory of every op; its options: flowkern bench --help")
    command("doctor", _doctor, "print versions, backends and devices")
    return parser


def _add_train_arguments(train: argparse.ArgumentParser) -> None:
    train.add_argument("model", help=f"{', '.join(MODELS)}, or prior of a vqvae")
    train.add_argument("checkpoint", nargs="?", default=None, type=Path, help="for prior: of a trained vqvae or vqvae2")
    train.add_argument("--data", metavar="SOURCE", help=f"{_SOURCES}; for prior by default what the vqvae was trained on")
    train.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder of the run")
    train.add_argument("--preset", help="named settings: default, or recipe (realnvp on digits as published)")
    train.add_argument("--set", action="append", metavar="KEY=VALUE", help="a setting of the model, e.g. --set hidden=128")
    train.add_argument("--memory", help="of the model: store, reversible or auto (short for --set memory=...)")
    train.add_argument("--prior", help="of a vae: standard, mixture, vamp, realnvp or maf (short for --set prior=...)")
    plan = train.add_argument_group("what decides the result (defaults come from the preset)")
    plan.add_argument("--size", type=int, help="side of the images of folder:PATH (32)")
    plan.add_argument("--conditional", action="store_true", help="give the model the labels")
    plan.add_argument("--seed", type=int, help="of weights, order and noise (0)")
    plan.add_argument("--epochs", type=int, help="at most so many")
    plan.add_argument("--patience", type=int, metavar="EPOCHS", help="stop after so many without improvement; 0: never")
    plan.add_argument("--batch-size", type=int, help="of a step, over all devices and parts together")
    plan.add_argument("--accumulate", type=int, metavar="N", help="take each batch in N parts: 1/N of the memory (1)")
    plan.add_argument("--lr", type=float, help="learning rate")
    plan.add_argument("--optimizer", help="adam, adamw or adamax")
    plan.add_argument("--weight-decay", type=float)
    plan.add_argument("--warmup", type=int, metavar="STEPS", help="of linear rise of the learning rate")
    plan.add_argument("--clip", type=float, metavar="NORM", help="largest norm of the gradient; 0: no limit")
    plan.add_argument("--ema", type=float, metavar="DECAY", help="of the average of the weights; 0: none")
    how = train.add_argument_group("how it runs")
    how.add_argument("--resume", action="store_true", help="continue from DIR/last.ckpt, if it is there")
    how.add_argument("--overwrite", action="store_true", help="start anew where DIR holds a run")
    how.add_argument("--max-minutes", type=float, metavar="M", help="stop after so much training in all")
    how.add_argument("--precision", help="32-true (default), bf16-mixed, 16-mixed or 64-true")
    how.add_argument("--accelerator", help="auto (default), cpu or gpu")
    how.add_argument("--channels-last", action="store_true", help="images in the channels_last memory format")
    how.add_argument("--devices", help="how many, or auto (1)")
    how.add_argument("--nodes", type=int, help="machines with so many devices each (1)")
    how.add_argument("--strategy", help="of Lightning, e.g. ddp (auto)")
    how.add_argument("--workers", type=int, help="processes that prepare batches (0)")
    how.add_argument("--checkpoint-steps", type=int, metavar="STEPS", help="between checkpoints (about every ten seconds)")
    how.add_argument("--draws", type=int, help="of noise for the test NLL (20)")


def _train(arguments: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(arguments).items() if name not in ("run", "debug")}
    config = dict(map(_setting, given.pop("set", [])))
    config |= {name: given.pop(name) for name in ("memory", "prior") if name in given}
    if config:
        given["config"] = config
    model, checkpoint = given.pop("model"), given.pop("checkpoint")
    if model == "prior" and checkpoint is None:
        raise ValueError("train prior: name the checkpoint of a vqvae or vqvae2")
    if model != "prior" and checkpoint is not None:
        raise ValueError(f"train {model}: takes no checkpoint, got {checkpoint}")
    if model != "prior" and "data" not in given:
        raise ValueError(f"train {model}: name the data (--data), one of {_SOURCES}")
    _start_training(model, given.pop("out"), given, checkpoint)


def _start_training(model: str, out: Path, given: dict[str, Any], checkpoint: Path | None = None) -> None:
    """Train as ``given``: fields of the plan and its preset, and options of ``training.train``.

    ``checkpoint`` is that of the VQ-VAE that a prior is for, else None.
    """
    from . import training

    planned = {"preset", *(field.name for field in dataclasses.fields(training.Plan))}
    options = {name: given.pop(name) for name in [*given] if name not in planned}
    if options.get("resume") and (out / "last.ckpt").exists():
        given.pop("preset", None)
        source = {"model": model} if checkpoint is None else {"autoencoder": str(checkpoint)}
        plan = training.resumed_plan(out, {**source, **given})
    elif checkpoint is not None:
        plan = training.make_prior_plan(checkpoint, **given)
    else:
        plan = training.make_plan(model, **given)
    _keep_pages()
    training.train(plan, out, **options)


def _keep_pages() -> None:
    """Let glibc keep freed blocks of any size, instead of getting fresh pages from the system in every step.

    Measured on RealNVP steps, 8x8 and 32x32 images: 2 to 6% less CPU time, at the same peak.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30)


def _setting(text: str) -> tuple[str, Any]:
    """``key=value`` with a JSON value, or a string where it is none."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set expects KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _demo(arguments: argparse.Namespace) -> None:
    given = {"data": "digits", "preset": "demo", "overwrite": True, "max_minutes": arguments.minutes}
    _start_training("realnvp", arguments.out, given)
    from .training import compare

    print()
    print(compare(str(arguments.out / "best.ckpt"), "digits"))


def _sample(arguments: argparse.Namespace) -> None:
    from . import training

    how = {name: getattr(arguments, name) for name in ("temperature", "seed", "label", "device")}
    training.save_samples(arguments.checkpoint, arguments.out, arguments.n, **how)
    print(f"{arguments.n} samples in {arguments.out}")


def _eval(arguments: argparse.Namespace) -> None:
    from . import data, models, training

    training.usable_device(arguments.device)
    for name in ("draws", "importance"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            raise ValueError(f"--{name}: expected at least 1, got {given}")
    model = models.load(arguments.checkpoint)
    source, size = arguments.data, arguments.size
    if source is None:
        content = models.read_checkpoint(arguments.checkpoint)
        source = training.trained_on(arguments.checkpoint, content)
        size = size or content["plan"].get("size")
    values = data.load(source, size=size)
    estimate = training.importance_nlls if arguments.importance else training.sample_nlls
    draws = training.needed_draws(model, values, arguments.importance or arguments.draws)
    how: dict[str, Any] = {"draws": draws, "batch_size": arguments.batch_size, "device": arguments.device, "bar": True}
    nll = estimate(model, values, arguments.split, **how)
    what = "estimate by importance" if arguments.importance else "bound" if draws > 1 else "NLL"
    score = training.Score.of(nll, values, draws)
    print(f"{arguments.split} NLL: {score}, an {what}" if arguments.importance else f"{arguments.split} NLL: {score}")
    name = f"{type(model).__name__} ({arguments.checkpoint.name}), the {what}"
    if arguments.codecs and (table := training.codec_table(nll.numpy(), values, arguments.split, name)):
        print(f"\n{table}")


def _compare(arguments: argparse.Namespace) -> None:
    from .training import compare

    _keep_pages()
    print(compare(arguments.model, arguments.data, size=arguments.size, batch_size=arguments.batch_size, device=arguments.device))


def _table(arguments: argparse.Namespace) -> int:
    from .training import table

    _keep_pages()
    how = {"seeds": arguments.seeds, "rows": arguments.rows, "max_minutes": arguments.max_minutes}
    try:
        print(table(arguments.data, arguments.out, **how))
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command continues from {arguments.out}", file=sys.stderr)
        return 130
    return 0


def _doctor(arguments: argparse.Namespace) -> None:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import flowkern

    from ._core import backend, nvrtc, op as _registry

    print(f"flowkern   {flowkern.__version__}")
    print(f"python     {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch      {torch.__version__}")
    for name in ("triton", "lightning"):
        try:
            print(f"{name:<11}{version(name)}")
        except PackageNotFoundError:
            print(f"{name:<11}not installed")
    isa = "none: " + backend._native_reason if backend.native is None else backend.native.isa()
    print(f"CPU        {torch.get_num_threads()} threads of {os.cpu_count()}, kernels for {isa}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            print(f"GPU {i}      {torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory >> 20} MiB")
    else:
        print("GPU        none that torch can use")
    print(f"CUDA       {'no kernels: ' + why if (why := nvrtc.missing()) else 'kernels by NVRTC ' + nvrtc.version()}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for op in _registry.OPS:
        for device in devices:
            print()
            print(flowkern.explain(op, torch.empty(0, device=device)))


if __name__ == "__main__":
    sys.exit(main())
