"""Clocks: CUDA events and graph replay on a GPU, wall clock on a CPU; rounds interleaved over the providers."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
# One replay must last long beside the microseconds that starting a graph takes.
GRAPH_MS, MOST_REPEATS = 0.4, 50


class Rotation:
    """Calls the same work on one input set after the other, so that small inputs are not found in L2 each time."""

    def __init__(self, calls: Sequence[Call]):
        self.calls, self.turn = calls, 0

    def __call__(self) -> Any:
        self.turn += 1
        return self.calls[self.turn % len(self.calls)]()


def once(call: Call, device: str) -> float:
    """Milliseconds of one call."""
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def interleaved(calls: dict[str, Call], device: str, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every round of every call, sorted. A slow spell of the machine falls on all of them.

    One untimed round first; then `rounds`, or as many (at least 3) as fit into `seconds`.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > deadline:
            break
        for name, call in calls.items():
            times[name].append(once(call, device))
    return {name: sorted(values) for name, values in times.items()}


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20 %, 50 % and 80 % points of sorted values."""
    p20, p50, p80 = (values[min(len(values) - 1, int(len(values) * q))] for q in (0.2, 0.5, 0.8))
    return p20, p50, p80


def captured(rotation: Rotation, eager_ms: float) -> tuple[Call, int, Any]:
    """Capture the calls into one CUDA graph: its replay, how many calls it holds, and the last call's result.

    Raises RuntimeError where the work cannot be captured, for example because it waits for the GPU. That is found in
    an eager call first: a capture that fails leaves torch's default generator of random numbers unusable.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        rotation()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    repeats = max(1, min(MOST_REPEATS, round(GRAPH_MS / max(eager_ms, 1e-3))))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(len(rotation.calls) + 1):
            rotation()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph, result = torch.cuda.CUDAGraph(), None
    rotation.turn = -1
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            result = rotation()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, repeats, result


def peak_mib(call: Call) -> float:
    """Most CUDA memory that one call holds above what was held before it, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def tensors(value: Any) -> Iterable[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def input_sets(first: tuple[Any, ...], device: str) -> int:
    """How many input sets to rotate among: together three times L2, at most 16; one on a CPU."""
    if not device.startswith("cuda"):
        return 1
    size = sum(t.numel() * t.element_size() for t in tensors(first))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 if size > 2 * cache else max(1, min(16, -(-3 * cache // max(size, 1))))


def copy_gbps(device: str) -> float:
    """GB/s of a large device copy, read and write counted: the ceiling of everything bound by memory."""
    gpu = device.startswith("cuda")
    source = torch.ones((1 << 30) if gpu else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device, 20 if gpu else 7, 1.0)["copy"]
    return 2 * source.numel() / quantiles(times)[1] / 1e6
