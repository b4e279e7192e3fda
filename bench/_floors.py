"""The least work each operator can do, in FLOP and bytes; formulas of the reference notes on kernels, section 2.

A floor is a sequence of stages; each takes the longer of its matrix product and its traffic. The rates are never
constants: the harness measures a large copy and the matrix product alone in the same run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

INDEX = 4  # bytes of an int32 id
FP32 = 4
# Below this many tokens an encode waits for W_enc, not for the tensor cores: the two meet near 184 tokens on an H200.
GEMM_BOUND_TOKENS = 256


@dataclass(frozen=True)
class Stage:
    """Work that runs at once: `flop` of matrix product against `bytes` of memory traffic."""

    flop: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Floor:
    """What the operator has to do at least, stage after stage."""

    stages: Sequence[Stage]
    flop: float = 0.0
    """All arithmetic, for the TFLOP/s column, also where a stage is bound by traffic."""

    @property
    def bytes(self) -> float:
        return sum(stage.bytes for stage in self.stages)

    def ms(self, copy_gbps: float, gemm_tflops: float | None) -> float | None:
        """Milliseconds at the measured rates; None where a matrix product is needed and was not measured."""
        total = 0.0
        for stage in self.stages:
            if stage.flop and gemm_tflops is None:
                return None
            product = stage.flop / (gemm_tflops * 1e9) if gemm_tflops else 0.0
            total += max(product, stage.bytes / (copy_gbps * 1e6))
        return total


def gemm_flop(N: int, D: int, F: int) -> float:
    """One matrix product [N, D] x [D, F]."""
    return 2.0 * N * D * F


def encode_bytes(N: int, D: int, F: int, K: int, itemsize: int, value: int = FP32) -> float:
    """Compulsory traffic: x and W_enc once, values and ids out (the bias is below one per mille)."""
    return float(N * D * itemsize + F * D * itemsize + N * K * (value + INDEX))


def select_bytes(N: int, F: int, K: int, itemsize: int) -> float:
    """One read of the scores, values and ids out."""
    return float(N * F * itemsize + N * K * (itemsize + INDEX))


def gather_bytes(N: int, D: int, K: int, itemsize: int) -> float:
    """Every selected row once per token: the traffic of a decode that shares nothing between tokens."""
    return float(N * K * D * itemsize)


def steer_bytes(N: int, D: int, itemsize: int) -> float:
    """h read and written."""
    return 2.0 * N * D * itemsize


def touched_rows(N: int, F: int, K: int) -> float:
    """Features that occur among N * K uniform ones, expected."""
    return F * (1.0 - (1.0 - 1.0 / F) ** (N * K))


def encode(N: int, D: int, F: int, K: int, itemsize: int, value: int = FP32) -> Floor:
    flop = gemm_flop(N, D, F)
    product = flop if N >= GEMM_BOUND_TOKENS else 0.0
    return Floor([Stage(product, encode_bytes(N, D, F, K, itemsize, value))], flop)


def select(N: int, F: int, K: int, itemsize: int) -> Floor:
    return Floor([Stage(bytes=select_bytes(N, F, K, itemsize))])


def decode(N: int, D: int, K: int, itemsize: int) -> Floor:
    """The gather; ids, values and the output are below 2 / K of it."""
    return Floor([Stage(bytes=gather_bytes(N, D, K, itemsize))], 2.0 * N * K * D)


def decode_loss(N: int, D: int, K: int, itemsize: int) -> Floor:
    """One gather serves the reconstruction, the loss and the gradient of the values; x is read, x_hat written."""
    return Floor([Stage(bytes=gather_bytes(N, D, K, itemsize) + 2.0 * N * D * itemsize)], 4.0 * N * K * D)


def sparse_grads(N: int, D: int, F: int, K: int, itemsize: int) -> Floor:
    """A gather of g and one of x, and two float32 gradients [F, D] written."""
    traffic = 2 * gather_bytes(N, D, K, itemsize) + 2.0 * F * D * FP32
    return Floor([Stage(bytes=traffic)], 4.0 * N * K * D)


def row_update_bytes(N: int, D: int, F: int, K: int) -> float:
    """Touched rows of both matrices: weight and two moments, float32, read and written: 24 bytes a parameter."""
    return 24.0 * 2 * touched_rows(N, F, K) * D


def train_step(N: int, D: int, F: int, K: int, itemsize: int) -> Floor:
    """Encode, one decode gather, two gradient gathers, one fused row update; no dense gradient is written."""
    gathers = 3 * gather_bytes(N, D, K, itemsize)
    stages = [*encode(N, D, F, K, itemsize).stages, Stage(bytes=gathers), Stage(bytes=row_update_bytes(N, D, F, K))]
    return Floor(stages, gemm_flop(N, D, F) + 8.0 * N * K * D)


def steer_add(N: int, D: int, itemsize: int) -> Floor:
    return Floor([Stage(bytes=steer_bytes(N, D, itemsize))])


def feature_stats(N: int, F: int, K: int, value: int, state: int) -> Floor:
    """Values and ids read; the touched entries of the tables (`state` bytes a feature) read and written."""
    return Floor([Stage(bytes=N * K * float(value + INDEX) + 2.0 * touched_rows(N, F, K) * state)])
