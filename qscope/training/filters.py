"""Which rows an SAE does not learn from: first tokens, extreme norms, NaN and infinity; all of them counted."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qscope.errors import InputError
from qscope.training.buffer import Point

NORM_MULTIPLE = 10.0
"""Of the running median: the "good default" of dictionary_learning; attention sinks lie 20 to 1000 times above it."""

_MEMORY = 100
"""Batches over which the median runs: a plain mean of their medians up to here, then an exponential one."""


class RowFilter:
    """Leaves out rows whose norm is not finite or extreme at any point, so that the points stay aligned.

    The decision is taken per point (its own running median, its own counts) and holds for all of them. The
    median of a batch counts before its rows are judged. Everything stays on the device: no call waits for it
    but `counts` and `state`.
    """

    def __init__(self, points: Sequence[Point], device: torch.device, multiple: float | None = NORM_MULTIPLE) -> None:
        if multiple is not None and not multiple > 1:
            raise InputError(f"The norm filter was given {multiple} times the median; more than 1, or none at all.")
        self.points, self.multiple = list(points), multiple
        self.medians = torch.zeros(len(self.points), device=device)
        """[P] float32, running"""
        self.batches = torch.zeros(len(self.points), dtype=torch.int64, device=device)
        """[P] batches that the median has seen"""
        self.nonfinite = torch.zeros_like(self.batches)
        """[P] rows that held a NaN or an infinity"""
        self.extreme = torch.zeros_like(self.batches)
        """[P] rows above the multiple"""
        self.kept = torch.zeros((), dtype=torch.int64, device=device)
        self.judged = torch.zeros_like(self.kept)

    def keep(self, x: Mapping[Point, Tensor], candidates: Tensor) -> Tensor:
        """x: point -> [M, D]; candidates: [M] bool, rows that count at all. Returns [M] bool on the device."""
        keep = candidates.clone()
        for i, point in enumerate(self.points):
            norms = torch.linalg.vector_norm(x[point], dim=1, dtype=torch.float32)
            finite = torch.isfinite(norms)
            self.nonfinite[i] += (candidates & ~finite).sum()
            keep &= finite
            if self.multiple is None:
                continue
            extreme = candidates & finite & (norms > self.multiple * self._median(i, norms, candidates & finite))
            self.extreme[i] += extreme.sum()
            keep &= ~extreme
        self.judged += candidates.sum()
        self.kept += keep.sum()
        return keep

    def _median(self, i: int, norms: Tensor, usable: Tensor) -> Tensor:
        """The running median of point i with this batch in it."""
        found = torch.where(usable, norms, float("nan")).nanmedian()
        known = ~found.isnan()
        self.batches[i] += known
        step = (found - self.medians[i]) / self.batches[i].clamp(1, _MEMORY)
        self.medians[i] += torch.where(known, step, 0)
        return self.medians[i]

    def counts(self) -> dict[str, Any]:
        """Rows judged and kept, and per point how many were left out for which reason (a row may count twice)."""
        per_point = {
            name: {str(point): int(n) for point, n in zip(self.points, values.tolist(), strict=True)}
            for name, values in (("nonfinite", self.nonfinite), ("extreme_norm", self.extreme))
        }
        return {"judged": int(self.judged), "kept": int(self.kept), **per_point}

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).to("cpu", copy=True) for name in _STATE}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in _STATE:
            getattr(self, name).copy_(state[name])


_STATE = ("medians", "batches", "nonfinite", "extreme", "kept", "judged")
