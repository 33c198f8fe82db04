"""Peak bytes of a call above its inputs and outputs."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch

from .timing import Call

__all__ = ["peak_extra_bytes"]


def peak_extra_bytes(call: Call, device: torch.device) -> int:
    """The most memory that the call holds at a time, above what it returns: what torch's allocators hand out."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        results = call()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del results
        return extra
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces every profile on stderr
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        results = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    del results
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak - held
