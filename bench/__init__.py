"""The benchmarks: one `bench_<op>.py` per operator with its cases, everything they share in `_*.py`.

Installed wheels carry this folder as `qscope._bench` (`qscope bench`); in a checkout, `python -m bench` runs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._case import Case

OPS = (
    "topk_encode",
    "topk_select",
    "sparse_decode",
    "decode_loss",
    "sparse_grads",
    "train_step",
    "steer_add",
    "feature_stats",
)


def cases(op: str, device: str, quick: bool = False) -> list[Case]:
    """The cases of one operator on one device; `quick` keeps the smallest shape only."""
    found: list[Case] = importlib.import_module(f".bench_{op}", __name__).cases(device, quick)
    return found
