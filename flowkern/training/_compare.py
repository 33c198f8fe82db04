"""What the fused kernels buy: a training step on the default backend against the one in plain torch."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from .. import models
from .._core import backend
from ..data import load, loader
from ..nn.densities.base import check_sizes
from ._evaluate import context_of, on_device, suited, usable_device
from ._plan import make_plan

Step = Callable[[], None]


def compare(
    source: str,
    data: str,
    *,
    size: int | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    rounds: int = 15,
    seconds: float = 0.3,
) -> str:
    """A table of the time and the memory of a training step, fused against ``FLOWKERN_BACKEND=torch``, on this machine.

    ``source`` is a checkpoint, or the name of a model in its default settings. A step is forward, backward and Adam.
    The backends take turns in ``rounds`` rounds of ``seconds`` each; the time is that of the fastest round, the one least
    disturbed by other work on the machine, and in brackets the median. The memory is the most that tensors take during
    a step, beyond the weights, the optimizer's state and the batch.

    Raises ValueError for unknown models, data or devices, for data that does not fit the model, and for an empty batch.
    """
    check_sizes(batch_size=batch_size)
    usable_device(device)
    values = load(data, size=size)
    model = models.load(source) if Path(source).exists() else make_plan(source, data).build(values)
    if model.shape != values.shape:
        raise ValueError(f"{source} is for samples of shape {model.shape}, and {values.name} has {values.shape}")
    model = model.to(device, torch.float32).train()
    batch = on_device(next(iter(loader(suited(values, model), "train", batch_size, seed=0))), model, device)
    x, context = batch.x, context_of(model, batch.labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=device == "cpu" or device.startswith("cuda"))

    def step() -> None:
        model.objective(x, context).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    backends = {"fused kernels": "auto", "plain torch": "torch"}
    times: dict[str, list[float]] = {name: [] for name in backends}
    memory = {}
    for name, asked in backends.items():
        with backend.backend(asked):
            step()
            memory[name] = _peak_bytes(step, x.device) / 2**20
    for _ in range(rounds):
        for name, asked in backends.items():
            with backend.backend(asked):
                times[name].append(1e3 * _seconds_per_step(step, seconds, x.device))

    parameters = sum(p.numel() for p in model.parameters())
    where = f"{torch.get_num_threads()} threads" if x.device.type == "cpu" else torch.cuda.get_device_name(x.device)
    lines = [f"a training step of {type(model).__name__} ({parameters:,} parameters) on {values.name}, batch {len(x)}, {where}:"]
    best = {name: min(times[name]) for name in backends}
    for name in backends:
        lines.append(f"  {name:<14}{best[name]:>9.2f} ms (median {statistics.median(times[name]):.2f}){memory[name]:>10.2f} MiB")
    fused, plain = backends
    lines.append(f"  {best[plain] / best[fused]:.2f} times as fast, {memory[fused] / memory[plain]:.2f} of the memory")
    return "\n".join(lines)


def _seconds_per_step(step: Step, seconds: float, device: torch.device) -> float:
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(5):
            step()
        steps += 5
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps


def _peak_bytes(step: Step, device: torch.device) -> int:
    """The most that tensors take during a step beyond what they took before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler's log of its own progress.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            step()
        record.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    # In the order of time, each event carries the change and the new total.
    changes = sorted((e["ts"], i, e["args"]["Bytes"]) for i, e in enumerate(events) if e.get("name") == "[memory]")
    total = peak = 0
    for _, _, change in changes:
        total += change
        peak = max(peak, total)
    return peak
