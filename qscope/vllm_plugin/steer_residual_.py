"""The operator that steers inside vLLM's compiled model: the residual of a block in its two parts, in place."""

import functools

import torch
from torch import Tensor

from qscope import native, ops  # noqa: F401  (importing ops registers qscope::steer_add_)

SCHEMA = (
    "steer_residual_(Tensor(a!) hidden, Tensor(b!) residual, Tensor bits, Tensor directions, Tensor settings,"
    " Tensor readers, Tensor gates, Tensor probes, Tensor probe_bias, Tensor(c!) acts, Tensor(d!) status) -> ()"
)

CALLS, READING = 0, 1
"""Places in `status`: forward passes so far; whether a request wants the probes' values (looked at on a CPU only)."""

_library = torch.library.Library("qscope", "FRAGMENT")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def steer_residual_(
    hidden: Tensor,
    residual: Tensor,
    bits: Tensor,
    directions: Tensor,
    settings: Tensor,
    readers: Tensor,
    gates: Tensor,
    probes: Tensor,
    probe_bias: Tensor,
    acts: Tensor,
    status: Tensor,
) -> None:
    """Steers h = hidden + residual, as `qscope.ops.steer_add_` does, where bits[n] says so; counts the pass.

    A vLLM block puts out h in two parts, which the next block adds. All reads (activations, conditions, probes) are of
    their sum, rounded to the model's dtype as the next block would round it. A token that is changed gets the steered
    sum as `hidden` and 0 as `residual`, so that the sum is rounded once; every other token keeps the bits of both.

    hidden, residual: [N, D] in one dtype, separate memory.
    bits: [T >= N] int32; bit s of bits[n]: direction s applies to token n. 0: the token is left alone.
    directions, readers, gates: [S <= 32, D] float32; settings: [S, 8] float32, as of steer_add_.
    probes: [R, D] float32, probe_bias: [R] float32, acts: [T, R] float32. acts[n] = relu(probes h[n] + probe_bias),
        of h before this call steers it; on a CPU only while status[READING] is not 0.
    status: [2] int32; 1 is added to status[CALLS].

    Everything is read from device memory: safe in a CUDA graph.
    """
    status[CALLS].add_(1)
    N, on_cpu = hidden.shape[0], hidden.device.type == "cpu"
    bits = bits[:N]
    reads = probes.shape[0] > 0 and not (on_cpu and not status[READING])
    steers = directions.shape[0] > 0 and not (on_cpu and not bits.any())  # a GPU must not be waited for
    if not (reads or steers):
        return
    h = hidden + residual
    if reads:
        torch.addmm(probe_bias, h.float(), probes.T, out=acts[:N])
        acts[:N].relu_()
    if not steers:
        return
    mask = (bits[:, None] & _powers(directions.shape[0], bits.device)) != 0
    fired = torch.empty(mask.shape, dtype=torch.uint8, device=mask.device)
    native.load(h.device.type)
    torch.ops.qscope.steer_add_(h, directions, settings, readers, gates, mask, fired)
    changed = fired.view(torch.bool).any(1, keepdim=True)
    torch.where(changed, h, hidden, out=hidden)
    residual.masked_fill_(changed, 0)


@functools.cache
def _powers(count: int, device: torch.device) -> Tensor:
    """Bit s at place s, int32. Kept: a step of a small batch is a matter of few launches."""
    return torch.ones((), dtype=torch.int32) << torch.arange(count, dtype=torch.int32).to(device)


_library.impl("steer_residual_", steer_residual_, "CompositeExplicitAutograd")


@torch.library.register_fake("qscope::steer_residual_", lib=_library)
def _(hidden: Tensor, residual: Tensor, *_: Tensor) -> None:
    torch._check(hidden.shape == residual.shape, lambda: "hidden and residual must have one shape")
