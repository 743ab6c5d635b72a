"""Times of works in turn, and rows of them as benchmarks keep them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def alternating(works: dict[str, Callable[[], Any]], rounds: int, warmup: int = 5) -> dict[str, list[float]]:
    """Times the works in turn, so that what else the machine does hits all of them alike."""
    for work in works.values():
        for _ in range(warmup):
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    return times


def row(name: str, times: list[float], unit: str = "s", baseline: float | None = None) -> dict[str, Any]:
    value = statistics.median(times)
    quartiles = statistics.quantiles(times, n=4)
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "quartiles": [quartiles[0], quartiles[2]],
        "baseline": baseline,
        "ratio": None if baseline is None else value / baseline,
    }
