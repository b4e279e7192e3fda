"""What torch may do inside a matrix product, fixed for as long as one of ours is enqueued."""

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()


@contextlib.contextmanager
def fixed_matmul() -> Iterator[None]:
    """Matrix products that sum in float32, without TF32, whatever the caller has set; restores the settings.

    They belong to the process and are read when a product is enqueued: nothing waits for the GPU. Without the lock, one
    thread could restore TF32 while another computes.
    """
    matmul = torch.backends.cuda.matmul
    with _lock:
        # Assigning a bool would switch split-K back on; torch versions without that setting take only a bool.
        split_k = getattr(matmul, "allow_bf16_reduced_precision_reduction_split_k", None)
        reduced, fp32 = matmul.allow_bf16_reduced_precision_reduction, matmul.fp32_precision
        tf32 = fp32 not in ("none", "ieee")  # "none" is the default, IEEE: what need not change is not written
        matmul.allow_bf16_reduced_precision_reduction = False if split_k is None else (False, split_k)
        if tf32:
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.allow_bf16_reduced_precision_reduction = reduced if split_k is None else (reduced, split_k)
            if tf32:
                # What was read may come from torch.backends.fp32_precision: written here, it would no longer follow it.
                matmul.fp32_precision = "none"
                if matmul.fp32_precision != fp32:
                    matmul.fp32_precision = fp32
