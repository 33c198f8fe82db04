"""Fixtures for the tests of layers: one thread, and two processes of one group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import layers
import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _two_processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(layers.WORLD, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def in_two_processes(_two_processes: ProcessPoolExecutor, tmp_path: Path) -> Callable[[Callable[[int], Any]], list[Any]]:
    """Calls a function of a module with its rank, in two processes at once, and returns what it returned to each of them."""

    def call(function: Callable[[int], Any]) -> list[Any]:
        ranks = [_two_processes.submit(layers.in_group, function, rank, tmp_path) for rank in range(layers.WORLD)]
        return [layers.unpacked(rank.result()) for rank in ranks]

    return call
