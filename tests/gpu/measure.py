"""Time, memory, launches and synchronisations of a function, on a GPU; in a rehearsal what the CPU has of them."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]
WARM_UP = 2  # rounds before the first that counts


def medians_ms(
    works: dict[str, Work], device: str, *, repeat: int = 15, before: Work = lambda: None
) -> dict[str, float]:
    """Milliseconds of each, the median of ``repeat`` rounds in which they take turns (clocks and heat drift).

    ``before`` runs ahead of every one of them and is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(WARM_UP + repeat):
        for name, work in works.items():
            before()
            took = _once_ms(work, device)
            if number >= WARM_UP:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def _once_ms(work: Work, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a copy within the device's memory, read and written ones together."""
    source = torch.zeros(1 << (30 if device == "cuda" else 24), dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    return 2e3 * len(source) / medians_ms({"copy": lambda: copy.copy_(source)}, device)["copy"]


def peak_bytes(work: Work, device: str) -> float:
    """Bytes above those held before at the work's highest point; 0 on the CPU, which keeps no such count."""
    if device == "cpu":
        work()
        return 0.0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def saved_bytes(work: Work) -> float:
    """Bytes of all distinct storages that the work's graph keeps for its backward."""
    saved: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        saved[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        kept = work()
    del kept
    return float(sum(saved.values()))


@dataclass(frozen=True)
class Counts:
    """``launches`` are kernels; on the CPU calls of torch's operators, so that the profiler is exercised."""

    launches: int
    copies: int
    synchronisations: int


def count(work: Work, device: str) -> Counts:
    """What the work launches once it is warm, and how often torch makes the host wait for the device in it."""
    work()
    events = _profiled(work, device)
    if device == "cpu":
        return Counts(sum(event.name.startswith("aten::") for event in events), 0, 0)
    on_device = [event.name for event in events if _is_kernel(event)]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in on_device)
    return Counts(len(on_device) - copies, copies, _synchronisations(work))


def _synchronisations(work: Work) -> int:
    mode: Any = torch.cuda.set_sync_debug_mode
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mode("warn")
        try:
            work()
        finally:
            mode("default")
    # the first use in a process also warns that the mode is a prototype, in words with "synchronizing"
    return sum("called a synchronizing" in str(warning.message) for warning in told)


def top_kernels(work: Work, device: str) -> list[tuple[str, float, int]]:
    """Name, milliseconds and number of all kernels (on the CPU: operators), summed by name, the longest first."""
    totals: dict[str, tuple[float, int]] = {}
    for event in _profiled(work, device):
        if device == "cpu" or _is_kernel(event):
            spent, number = totals.get(event.name, (0.0, 0))
            took = event.self_cpu_time_total if device == "cpu" else event.time_range.elapsed_us()
            totals[event.name] = spent + took / 1e3, number + 1
    ranked = sorted(totals.items(), key=lambda item: -item[1][0])
    return [(name, spent, number) for name, (spent, number) in ranked]


def _is_kernel(event: Any) -> bool:
    """Or a copy; not a range that somebody marked."""
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def _profiled(work: Work, device: str) -> list[Any]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    return list(profiler.events() or [])
