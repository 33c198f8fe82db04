"""The command line without the extra ``flowkern[train]``, and with standard streams that are closed, full or read by nobody."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import flowkern
from flowkern import cli
from flowkern._core import backend as _backend, nvrtc

EXTRA = ("lightning", "numpy", "matplotlib", "PIL", "rich", "sklearn")

#: Runs the command line in a process in which the packages of the extra cannot be found.
BARE = """
import sys, warnings
warnings.simplefilter("ignore")

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {extra!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
from flowkern.cli import main
for arguments in {commands!r}:
    try:
        print("exit", main(arguments))
    except SystemExit as end:
        print("exit", end.code)
"""


@pytest.mark.slow
def test_doctor_and_help_need_no_extra():
    commands = [["--help"], ["doctor"], ["train", "nice", "--data=digits", "--out=x"], ["eval", "x.ckpt", "--data=digits"]]
    script = BARE.format(extra=EXTRA, commands=commands)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert [line for line in done.stdout.splitlines() if line.startswith("exit")] == ["exit 0", "exit 0", "exit 2", "exit 2"]
    assert "usage: flowkern" in done.stdout
    assert f"torch      {torch.__version__}" in done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 2, done.stderr
    assert all(line.endswith('is not installed; this command needs: pip install "flowkern[train]"') for line in errors)


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"flowkern   {flowkern.__version__}" in printed
    assert f"{torch.get_num_threads()} threads" in printed
    assert (_backend.native.isa() if _backend.native else "none: ") in printed
    assert (
        f"CUDA       {'no kernels: ' + nvrtc.missing() if nvrtc.missing() else 'kernels by NVRTC ' + nvrtc.version()}" in printed
    )
    for op in (*flowkern.OPS, "autoregressive_inverse", "masked_linear"):
        assert flowkern.explain(op) in printed


def test_usage(capsys):
    for command, code in (([], 2), (["--debug", "bench", "--help"], 0)):
        with pytest.raises(SystemExit) as end:
            cli.main(command)
        assert end.value.code == code
        printed = capsys.readouterr()
        assert "usage: " in (printed.err if code else printed.out)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoryError("of 8 GiB"), 1, "out of memory: of 8 GiB (--debug shows where)"),
        (KeyError("epochs"), 1, "KeyError: 'epochs' (--debug shows where)"),
        (AssertionError("Torch not compiled"), 1, "AssertionError: Torch not compiled (--debug shows where)"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device (--debug shows where)"),
        (IsADirectoryError(21, "Is a directory", "x"), 2, "[Errno 21] Is a directory: 'x'"),
        (ModuleNotFoundError("needs torch_xla"), 2, "needs torch_xla"),
        (ValueError(), 2, "ValueError"),
    ],
)
def test_whatever_is_raised_is_a_line(capsys, monkeypatch, error, code, line):
    monkeypatch.setattr(cli, "_doctor", mock.Mock(side_effect=error))
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == f"flowkern: error: {line}\n"


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """What ``flowkern command`` does in a shell, with redirections as they stand in there."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    line = f"{sys.executable} -W ignore -m flowkern.cli {command}"
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True)


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
CLOSED = "flowkern: error: standard output is closed; > /dev/null is the way to see nothing of it\n"
FULL = "flowkern: error: standard output: No space left on device\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("train nice --data digits --out {out} >&-", 2, CLOSED),
        pytest.param("doctor > /dev/full", 1, FULL, marks=needs_full),
        ("--help | true; exit ${{PIPESTATUS[0]}}", 1, ""),
        ("eval /no/such.ckpt 2>&- <&-", 2, ""),  # without an answer to an error there is its code
    ],
)
def test_streams_of_a_shell(tmp_path, command, code, error):
    done = shell(command.format(out=tmp_path / "run"))
    assert (done.returncode, done.stdout, done.stderr) == (code, "", error)
    assert not (tmp_path / "run").exists()


def unread() -> Any:
    """The end of a pipe whose other one is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full(buffering: int = -1) -> Any:
    return io.TextIOWrapper(open("/dev/full", "wb", buffering), write_through=buffering == 0)


@pytest.mark.parametrize(
    ("command", "output", "code", "error"),
    [
        (["--help"], lambda: None, 2, CLOSED),
        (["bench", "--help"], lambda: None, 2, CLOSED),
        pytest.param(["doctor"], lambda: full(0), 1, FULL, marks=needs_full),  # as under PYTHONUNBUFFERED
        pytest.param(["--help"], full, 1, FULL, marks=needs_full),
        (["doctor"], unread, 1, ""),
    ],
)
def test_output_that_goes_nowhere(monkeypatch, capsys, command, output, code, error):
    """Of what a process would do, without its exit."""
    stream = output()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert cli.main(command) == code
    if stream is not None:
        stream.close()
    assert capsys.readouterr().err == error


def test_other_streams_may_be_closed(monkeypatch, capsys):
    for name in ("stdin", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out
    for stream in (sys.stdin, sys.stderr):
        stream.close()
