"""Training on several processes: the run of one process, told by one of them, and failing as one.

A batch of the plan is divided anew for each number of ranks and parts, see ``data.loader``: two ranks with batches of B/2
see the samples, in the order and with the noise, of one rank with batches of B.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

np = pytest.importorskip("numpy")

import training_ddp  # noqa: E402
from training_runs import assert_near, assert_same_weights, last, train  # noqa: E402

from flowkern import training  # noqa: E402
from flowkern.training._task import FlowTask  # noqa: E402

pytestmark = pytest.mark.slow

SCRIPT = training_ddp.__file__
TWO = {"devices": 2, "strategy": "ddp", "accelerator": "cpu"}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}

#: 331 of 1000 samples a batch: ranks and parts of unequal size, 7 in the last one.
FIELDS = {"data": "digits", "epochs": 2, "batch_size": 331, "lr": 1e-2, "warmup": 3, "ema": 0.9}
#: Without dropout, which draws other masks on each rank and for each part.
GLOW = {"model": "glow", "config": {"levels": 2, "steps": 2, "hidden": 8, "dropout": 0.0}, **FIELDS}
#: ActNorm starts from the first part.
PARTS = {**GLOW, "accumulate": 2}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -W ignore command`` to its end, on one thread."""
    whole = [sys.executable, "-W", "ignore", *command]
    return subprocess.run(whole, env=ONE_THREAD, capture_output=True, text=True, timeout=300, check=False)


def trained(folder: Path, plan: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """What each rank of a run saw."""
    folder.mkdir()
    done = run(SCRIPT, str(folder), json.dumps({"plan": plan, "options": options}))
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]


def curve(ranks: list[dict[str, Any]], parts: int = 1) -> list[float]:
    """The loss of each step: the mean over all ranks and parts."""
    sums = np.array([[total for total, _, _ in rank["train"]] for rank in ranks]).sum(0).reshape(-1, parts).sum(1)
    return (sums / [total for _, _, total in ranks[0]["train"]][::parts]).tolist()


def assert_ranks_agree(ranks: list[dict[str, Any]], state: str = "state") -> None:
    for name, value in ranks[0][state].items():
        assert torch.equal(ranks[1][state][name], value), f"{name} differs between the ranks"


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> list[dict[str, Any]]:
    """In this process."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_nll", "training_step", "on_train_end"):
            patch.setattr(FlowTask, name, getattr(FlowTask, name))  # which puts back what is patched there
        training_ddp.main(folder, {"plan": PARTS, "options": {"precision": "64-true"}})
    return [torch.load(folder / "rank0.pt")]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    plan = {**PARTS, "config": {**GLOW["config"], "memory": "reversible"}}
    return trained(tmp_path_factory.mktemp("two") / "run", plan, precision="64-true", **TWO)


def test_two_ranks_train_the_glow_of_one(two, one):
    """In float64 and two parts a batch: reversible on two ranks against storing on one.

    The sums of a batch differ in their order alone, 1e-16, and the inverses of reversible memory round as much. At the
    initialization the gradients of shifts vanish but for that rounding, which Adam, dividing by 1e-8, turns into 1e-9 of a
    weight in each of the first steps: hence 1e-6 for weights. The losses, of about 1e2, are sums of all weights' effects, which
    at a vanishing gradient are of second order: 1e-8 of a loss.
    """
    assert (len(one), len(two)) == (1, 2)
    assert [count for _, count, _ in two[0]["train"][:2]] == [83, 83]
    assert [count for _, count, _ in two[1]["train"][:2]] == [83, 82]
    assert len(curve(two, 2)) == 8
    assert curve(two, 2) == pytest.approx(curve(one, 2), rel=1e-8)
    assert curve(one, 2)[-2] < curve(one, 2)[0] - 10.0, "there is no curve to compare"
    assert_ranks_agree(two)
    assert_same_weights(one[0]["state"], two[0]["state"], 1e-6)
    assert one[0]["score"] == pytest.approx(two[0]["score"], rel=1e-6), "the averages of the weights differ"


def test_ranks_initialize_alike(two, one):
    """ActNorm starts from the statistics of both ranks, on both; compared after the first step, which is small."""
    initialized = [name for name in one[0]["first"] if name.endswith("actnorm.initialized")]
    assert len(initialized) == 4
    assert one[0]["first"][initialized[0].replace("initialized", "log_scale")].abs().min() > 0.1, "there is nothing to compare"
    for name in initialized:
        assert all(bool(rank["first"][name]) for rank in two)
    assert_ranks_agree(two, "first")
    assert_same_weights(one[0]["first"], two[0]["first"], 1e-6)


def test_one_rank_speaks_and_writes_and_validation_counts_each_image_once(tmp_path):
    """With bfloat16 networks, in channels_last."""
    plan = {**GLOW, "epochs": 1, "clip": 50.0}
    ranks = trained(tmp_path / "run", plan, precision="bf16-mixed", channels_last=True, checkpoint_steps=2, **TWO)
    out = tmp_path / "run" / "out"
    assert ranks[0]["printed"].count("test NLL") == 1
    assert ranks[1]["printed"] == ""
    assert {Path(path).suffix for path in ranks[0]["written"]} >= {".tmp", ".csv", ".png", ".json"}
    assert ranks[1]["written"] == []
    assert ranks[1]["score"] is None
    assert_ranks_agree(ranks)
    val = [entry for rank in ranks for entry in rank["val"]]
    assert sum(count for _, count, _ in val) == 350
    assert len(ranks[0]["val"]) == len(ranks[1]["val"]) == 1
    # What is logged went through sums in float32.
    logged = training.read_log(out / "log")["val_nll"][0][1]
    assert logged == pytest.approx(sum(total for total, _, _ in val) / 350, rel=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_diverges_ends_the_run(tmp_path, rank):
    """Not finite on one rank alone: both end soon, in failure, and that rank says why."""
    request = {"plan": GLOW, "options": {**TWO, "checkpoint_steps": 1}, "poison": [2, rank]}
    done = run(SCRIPT, str(tmp_path), json.dumps(request))
    assert done.returncode != 0
    assert "flowkern.training._evaluate.Diverged: the loss is not finite at step 2 (epoch 0)" in done.stderr
    content = last(tmp_path / "out")
    assert content["global_step"] == 2
    assert all(v.isfinite().all() for v in content["state_dict"].values() if v.is_floating_point())


def test_sigterm_amid_a_step_ends_the_run(tmp_path):
    """The step ends, its checkpoint is written, and no rank waits for the other."""
    done = run(SCRIPT, str(tmp_path), json.dumps({"plan": GLOW, "options": {**TWO, "checkpoint_steps": 1}, "terminate": 2}))
    assert done.returncode == 128 + signal.SIGTERM, done.stdout + done.stderr
    assert last(tmp_path / "out")["global_step"] == 3


def ranks_in_turn(task: Any, batch: Any, index: int) -> None:
    """The samples of a batch as two ranks number them together: those of the first, every other one, before the second's."""
    order = torch.cat([torch.arange(rank, len(batch.x), 2) for rank in range(2)])
    batch.x.copy_(batch.x[order])
    batch.labels.copy_(batch.labels[order])


def test_two_ranks_train_a_vqvae_and_its_prior(tmp_path, monkeypatch):
    """In float64, against one process with the same batches: 1e-9, as in test_training.py.

    k-means and the revival of codes draw vectors by their numbers, hence the order of the samples in the one process.
    """
    config = {"hidden": 4, "blocks": 1, "downsample": 1, "dim": 2, "codes": 8, "likelihood": "categorical", "dropout": 0.0}
    autoencoder = {**FIELDS, "model": "vqvae", "config": config}
    prior = {**autoencoder, "config": {**config, "prior": {"hidden": 4, "layers": 2, "dropout": 0.0}}}

    def following(run: Path) -> dict[str, Any]:
        return {**prior, "autoencoder": str(run / "best.ckpt")}

    request = {"plan": autoencoder, "then": {"prior": following(tmp_path / "out")}, "options": {"precision": "64-true", **TWO}}
    done = run(SCRIPT, str(tmp_path), json.dumps(request))
    assert done.returncode == 0, done.stdout + done.stderr
    start = FlowTask.on_train_batch_start
    monkeypatch.setattr(FlowTask, "on_train_batch_start", lambda *given: (start(*given), ranks_in_turn(*given))[0])
    for name, one, plan in (("", "one", autoencoder), ("prior", "one-prior", following(tmp_path / "one"))):
        train(training.make_plan(**plan), tmp_path / one, precision="64-true")
        ranks = [torch.load(tmp_path / f"{name}rank{rank}.pt") for rank in range(2)]
        assert ranks[0]["state"]["autoencoder.quantizer.steps"] == 8, "the prior leaves the codes as they are"
        assert_ranks_agree(ranks)
        assert_near(tmp_path / one, tmp_path / (name or "out"))


CONFIG = {"flatten": True, "couplings": 2, "hidden": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def realnvp(tmp_path_factory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("realnvp")
    plan = training.make_plan("realnvp", "digits", config=CONFIG, epochs=2, batch_size=331, ema=0.9)
    train(plan, out, precision="64-true")
    assert last(out)["global_step"] == 8
    return out


def command(out: Path, *more: str) -> list[str]:
    """The command line of the same run on several ranks."""
    arguments = [f"--out={out}", "--data=digits", "--batch-size=331", "--ema=0.9", "--strategy=ddp", "--accelerator=cpu"]
    arguments += [f"--set={name}={json.dumps(value)}" for name, value in CONFIG.items()]
    return ["train", "realnvp", *arguments, "--precision=64-true", "--draws=1", *more]


def test_two_ranks_of_the_command_line(tmp_path, realnvp):
    """Against one process: 1e-9, as in test_training.py."""
    done = run("-m", "flowkern.cli", *command(tmp_path, "--epochs=2", "--devices=2"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("test NLL") == 1, "only the first rank reports"
    assert_near(realnvp, tmp_path)


#: Trains for one epoch, and resumes for a second one.
TWICE = """
import sys
from flowkern.cli import main
sys.exit(main([*sys.argv[1:], "--epochs=1"]) or main([*sys.argv[1:], "--epochs=2", "--resume"]))
"""


def test_two_machines(tmp_path, realnvp):
    """Two ``torchrun``, as on two machines, train the run of one process, and resume it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "twice.py").write_text(TWICE)
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launch += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    script = [str(tmp_path / "twice.py"), *command(tmp_path / "two", "--nodes=2", "--devices=1")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    machines = [subprocess.Popen([*launch, f"--node-rank={node}", *script], env=ONE_THREAD, **pipes) for node in (0, 1)]
    try:
        outputs = [machine.communicate(timeout=300) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert outputs[1][0] == "", "the second machine speaks"
    assert "GLOBAL_RANK" not in outputs[0][1] + outputs[1][1], "Lightning speaks on every rank"
    assert outputs[0][0].count("test NLL") == 2
    assert_near(realnvp, tmp_path / "two")


def alive(pid: int) -> bool:
    """Whether a process, which need not be a child of this one, still runs; as a zombie it does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


#: At the start Python comes to SIGINT only when the wait in torch's store is over.
ENDS = [*itertools.product((signal.SIGKILL, signal.SIGTERM), ("start", "training")), (signal.SIGINT, "training")]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("sent", "where"), ENDS)
def test_no_rank_outlives_its_launcher(tmp_path, sent, where):
    """However that is ended: while it trains, and while it waits for another rank to come."""
    plan = {"model": "realnvp", "data": "digits", "epochs": 10**6, "config": {"flatten": True, "couplings": 2, "hidden": 8}}
    request = json.dumps({"plan": plan, "options": TWO, "stuck": where == "start"})
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": ONE_THREAD}
    # A shell starts background jobs with SIGINT ignored, and so do some that run tests.
    quiet["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    launcher = subprocess.Popen([sys.executable, "-W", "ignore", SCRIPT, str(tmp_path), request], **quiet)
    rank = 0
    try:
        awaited = [tmp_path / "rank-1"] + ([tmp_path / "rank-0"] if where == "training" else [])
        while not all(path.exists() for path in awaited):
            assert launcher.poll() is None, "it ended before it was ended"
            time.sleep(0.05)
        rank = int(awaited[0].read_text())
        assert rank != launcher.pid
        assert alive(rank)
        launcher.send_signal(sent)
        assert launcher.wait(timeout=120) != 0
        patience = 1200
        while alive(rank) and patience:
            patience -= 1
            time.sleep(0.1)
        assert patience, "the rank waits for its launcher"
    finally:
        launcher.kill()
        launcher.wait()
        if rank and alive(rank):
            os.kill(rank, signal.SIGKILL)
