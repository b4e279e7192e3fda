"""h[n] += sum_s c[n, s] * directions[s], in place."""

import torch
from torch import Tensor

from qscope.reference._workspace import rows_per_block


def steer_add_(
    h: Tensor,
    directions: Tensor,
    settings: Tensor,
    readers: Tensor | None,
    gates: Tensor | None,
    mask: Tensor | None,
    fired: Tensor | None,
) -> None:
    """Steer h [N, D] along directions [S, D] by the rules in settings [S, 8] (see qscope.ops.steer_add_).

    Columns of settings: constant, slope, reader_bias, rectify, gate_on, gate_bias, gate_threshold, enabled.
    Everything is computed in float32 from h as it comes in; a pair whose coefficient is 0 adds nothing, and a
    row without any other is not changed by a bit. `fired` [N, S] uint8 tells the pairs that were applied.
    """
    (N, D), S = h.shape, directions.shape[0]
    if S == 0 or N == 0:
        return
    step = rows_per_block(D, 8)
    for begin in range(0, N, step):
        block = h[begin : begin + step]
        allowed = None if mask is None else mask[begin : begin + step].reshape(len(block), -1) != 0
        x = block.float().contiguous()  # the bits of a product can depend on strides
        c = _coefficients(x, settings, readers, gates, allowed)
        applies = c != 0
        if fired is not None:
            fired[begin : begin + step].copy_(applies)
        delta = torch.zeros_like(x)
        for s in range(S):
            delta += torch.where(applies[:, s, None], c[:, s, None] * directions[s].float(), 0.0)
        steered = (x + delta).to(h.dtype)
        block.copy_(torch.where(applies.any(1, keepdim=True), steered, block))


def _coefficients(
    x: Tensor, settings: Tensor, readers: Tensor | None, gates: Tensor | None, allowed: Tensor | None
) -> Tensor:
    """c [n, S] for x [n, D] float32."""
    constant, slope, reader_bias, rectify, gate_on, gate_bias, gate_threshold, enabled = settings.unbind(1)
    c = constant.expand(x.shape[0], -1)
    if readers is not None:
        read = x @ readers.float().T + reader_bias
        read = torch.where(rectify != 0, read.relu(), read)
        c = torch.where(slope != 0, c + slope * read, c)
    live = (enabled != 0).expand_as(c)
    if gates is not None:
        live = live & ((gate_on == 0) | (x @ gates.float().T + gate_bias > gate_threshold))
    if allowed is not None:
        live = live & allowed
    return torch.where(live, c, 0.0)
