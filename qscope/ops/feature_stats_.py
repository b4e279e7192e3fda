"""Streaming statistics of features: how often each fired, sums, largest activations and where they were."""

import torch
from torch import Tensor

from qscope import reference
from qscope.ops._common import call, check_devices, check_float, check_indices, check_sizes, operator, shape_of

MAX_CONTEXTS = 64


def feature_stats_(
    top_acts: Tensor,
    top_indices: Tensor,
    count: Tensor,
    total: Tensor,
    total_sq: Tensor,
    peak: Tensor,
    groups: Tensor | None = None,
    top_values: Tensor | None = None,
    top_tokens: Tensor | None = None,
    first_token: Tensor | int = 0,
) -> None:
    """Add a batch of sparse codes to statistics per feature (and per group of tokens), in place.

        count[g, f] += 1;  total[g, f] += a;  total_sq[g, f] += a^2;  peak[g, f] = max(peak[g, f], a)

    over the entries a = top_acts[n, k] with top_indices[n, k] = f and groups[n] = g, if a is finite and above 0: what
    the ReLU has cut off, rows of NaN and infinities are left out. So is a token whose group is not in 0..G-1; use -1
    to mask tokens.

    top_values[f], top_tokens[f] are the M largest entries of feature f, of all groups that count, largest first, equal
    ones by lowest token; token n of this batch has id first_token + n. Empty slots hold -inf and -1.

    Integers are exact. Sums are chains of float64 additions in ascending token order, which go on from what the
    tables hold: the result is the same to the bit however a stream is cut into batches (in order), on a CPU for any
    number of threads, and on a GPU from run to run. Nothing waits for a GPU; a CUDA graph replays with what the tensors
    hold then. On a GPU the workspace is at most 64 N K + 16 G F bytes.

    Args:
        top_acts: [N, K], float32, bfloat16 or float16.
        top_indices: features, [N, K], int32 or int64. That of an entry which does not count may be anything.
        count: [G, F] int64, zeros at the start. Like all tables below: contiguous.
        total, total_sq: [G, F] float64, zeros at the start.
        peak: [G, F] float32, zeros at the start.
        groups: label of each token, [N] int32, or None: all tokens belong to the one group of [1, F] tables.
        top_values: [F, M] float32, -inf at the start, M <= 64; or None.
        top_tokens: [F, M] int64, -1 at the start; given if top_values is.
        first_token: id of the batch's first token; [] int64 tensor, or a number (frozen into a CUDA graph).

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit.
        IndexError: an entry that counts has a feature outside 0..F-1 (CPU; a GPU leaves it out).
    """
    op = "feature_stats_"
    check_float(op, "top_acts", top_acts, "[N, K]")
    check_indices(op, "top_indices", top_indices)
    given = f"top_acts [N, K] is {shape_of(top_acts)}, top_indices [N, K] is {shape_of(top_indices)}"
    check_sizes(op, given, *zip(top_acts.shape, top_indices.shape, strict=True))
    if count.dim() != 2 or (groups is None and count.shape[0] != 1):
        expected = "[1, F], because groups is None" if groups is None else "[G, F]"
        raise ValueError(f"{op}: count has shape {shape_of(count)}; it must be {expected}.")
    (G, F), N = count.shape, top_acts.shape[0]
    _check_table(op, "count", count, (G, F), torch.int64)
    _check_table(op, "total", total, (G, F), torch.float64)
    _check_table(op, "total_sq", total_sq, (G, F), torch.float64)
    _check_table(op, "peak", peak, (G, F), torch.float32)
    if groups is not None and (groups.shape != (N,) or groups.dtype != torch.int32):
        raise ValueError(f"{op}: groups is {shape_of(groups)} {groups.dtype}; it must be [{N}] int32, one per token.")
    if (top_values is None) != (top_tokens is None):
        raise ValueError(f"{op}: only one of top_values and top_tokens is given; give both or neither.")
    if top_values is not None and top_tokens is not None:
        M = top_values.shape[-1] if top_values.dim() == 2 else 0
        if M > MAX_CONTEXTS:
            raise ValueError(f"{op}: top_values is {shape_of(top_values)}; at most {MAX_CONTEXTS} columns are kept.")
        _check_table(op, "top_values", top_values, (F, M), torch.float32)
        _check_table(op, "top_tokens", top_tokens, (F, M), torch.int64)
    if not isinstance(first_token, Tensor):
        first_token = torch.full((), first_token, dtype=torch.int64, device=top_acts.device)
    if first_token.dim() or first_token.dtype != torch.int64:
        raise ValueError(
            f"{op}: first_token is {shape_of(first_token)} {first_token.dtype}; accepted is a number or a [] int64."
        )
    check_devices(op, top_acts, top_indices, count, total, total_sq, peak, groups, top_values, top_tokens, first_token)
    with torch.no_grad():  # codes may come from a forward pass that is being differentiated
        call(_op, top_acts, top_indices, count, total, total_sq, peak, groups, top_values, top_tokens, first_token)


def fired_bitmap(count: Tensor) -> Tensor:
    """Which features fired, packed: bit f % 32 of word [g, f // 32] is set if count[g, f] > 0.

    count [G, F] int64 -> [G, ceil(F / 32)] int32; bits past F are 0. The union of two corpora is `a | b`.

    Raises:
        ValueError: count is not [G, F].
    """
    if count.dim() != 2:
        raise ValueError(f"fired_bitmap: count has shape {shape_of(count)}; it must be [G, F].")
    G, F = count.shape
    words = -(-F // 32)
    fired = torch.nn.functional.pad(count > 0, (0, words * 32 - F)).view(G, words, 32)
    weights = torch.ones(32, dtype=torch.int32, device=count.device) << torch.arange(
        32, dtype=torch.int32, device=count.device
    )
    return (fired * weights).sum(-1, dtype=torch.int32)


def _check_table(op: str, name: str, table: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if table.shape != shape or table.dtype != dtype:
        given = f"{shape_of(table)} {table.dtype}"
        raise ValueError(f"{op}: {name} is {given}; it must be {list(shape)} {dtype}.")
    if not table.is_contiguous():
        raise ValueError(f"{op}: {name} has strides {table.stride()}; it is written in place and must be contiguous.")


_op = operator(
    reference.feature_stats_,
    schema=(
        "(Tensor top_acts, Tensor top_indices, Tensor(a!) count, Tensor(b!) total, Tensor(c!) total_sq, "
        "Tensor(d!) peak, Tensor? groups, Tensor(e!)? top_values, Tensor(f!)? top_tokens, Tensor first_token) -> ()"
    ),
)


@_op.register_fake
def _(
    top_acts: Tensor,
    top_indices: Tensor,
    count: Tensor,
    total: Tensor,
    total_sq: Tensor,
    peak: Tensor,
    groups: Tensor | None,
    top_values: Tensor | None,
    top_tokens: Tensor | None,
    first_token: Tensor,
) -> None:
    torch._check(top_acts.shape == top_indices.shape, lambda: "top_acts and top_indices must both be [N, K]")
    torch._check(count.shape == total.shape == total_sq.shape == peak.shape, lambda: "the tables must all be [G, F]")


@_op.register_kernel("cuda")
def _(
    top_acts: Tensor,
    top_indices: Tensor,
    count: Tensor,
    total: Tensor,
    total_sq: Tensor,
    peak: Tensor,
    groups: Tensor | None,
    top_values: Tensor | None,
    top_tokens: Tensor | None,
    first_token: Tensor,
) -> None:
    from qscope_kernels.feature_stats import feature_stats_ as launch  # triton is imported only when a GPU is used

    launch(top_acts, top_indices, count, total, total_sq, peak, groups, top_values, top_tokens, first_token)
