"""feature_stats_ (counts, sums, sums of squares, maxima; strongest contexts) against bincount and index_add_."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qscope import reference
from qscope.ops import feature_stats_

from . import _floors
from ._case import OURS, Case, Provider, Sizes, activations, actives, name_of, tokens, widths
from ._checks import close

CONTEXTS = 32
Inputs = tuple[Tensor, Tensor]
Tables = tuple[Tensor, ...]


def cases(device: str, quick: bool = False) -> list[Case]:
    """Statistics at every shape; the strongest contexts, which no peer keeps, once per width."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    found = []
    for D, d_sae in widths(device, quick):
        found += [_case(device, Sizes(tokens(device, quick), D, d_sae, k), dtype) for k in actives(device, quick)]
        found.append(_case(device, Sizes(tokens(device, quick), D, d_sae, 50), dtype, contexts=True))
    return found


def _tables(device: str, d_sae: int, contexts: bool) -> Tables:
    counts = torch.zeros(1, d_sae, dtype=torch.int64, device=device)
    sums = (torch.zeros(1, d_sae, dtype=torch.float64, device=device) for _ in range(2))
    tables = (counts, *sums, torch.zeros(1, d_sae, device=device))
    if not contexts:
        return tables
    shape = (d_sae, CONTEXTS)
    return *tables, torch.full(shape, -torch.inf, device=device), torch.full(shape, -1, device=device)


def _case(device: str, sizes: Sizes, dtype: torch.dtype, contexts: bool = False) -> Case:
    d_sae, k = sizes.F, sizes.K

    def want(i: Inputs) -> Tables:
        """The reference works on a CPU, where index_add_ adds one entry after the other."""
        tables = _tables("cpu", d_sae, contexts)
        first = torch.zeros((), dtype=torch.int64)
        reference.feature_stats_(i[0].cpu(), i[1].cpu(), *tables[:4], None, *(tables[4:] or (None, None)), first)
        return tuple(table.to(device) for table in tables)

    def check(result: Tables, answer: Tables, precision: str) -> None:
        names = ("count", "total", "total_sq", "peak", "top_values", "top_tokens")
        for name, got, right in zip(names, result, answer, strict=False):
            # Sums of float64 in another order; everything else is a count, a maximum or an id.
            close(name, got.view(right.shape), right, 1e-12 * right.abs() if name.startswith("total") else 0)

    def ours(i: Inputs) -> Callable[[], Tables]:
        tables = _tables(device, d_sae, contexts)
        first = torch.zeros((), dtype=torch.int64, device=device)

        def call() -> Tables:
            feature_stats_(*i, *tables[:4], None, *(tables[4:] or (None, None)), first)
            return tables

        return call

    peers = {
        "torch index_add_": Provider(lambda i: _index_add(i, _tables(device, d_sae, False))),
        "torch bincount": Provider(lambda i: _bincount(i, _tables(device, d_sae, False))),
    }
    state = 28 + (12 * CONTEXTS if contexts else 0)
    return Case(
        "feature_stats contexts" if contexts else "feature_stats",
        sizes,
        name_of(dtype),
        lambda seed: activations(device, seed, sizes, dtype),
        want,
        check,
        {"qscope": Provider(ours, OURS), **({} if contexts else peers)},
        _floors.feature_stats(sizes.N, d_sae, k, dtype.itemsize, state),
        in_place=True,
    )


def _live(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    acts, ids = i[0].flatten(), i[1].flatten().long()
    live = (acts > 0) & acts.isfinite()
    return live, torch.where(live, acts, 0).float(), ids


def _index_add(i: Inputs, tables: Tables) -> Callable[[], Tables]:
    count, total, total_sq, peak = (table.view(-1) for table in tables)

    def call() -> Any:
        live, values, ids = _live(i)
        count.index_add_(0, ids, live.long())
        total.index_add_(0, ids, values.double())
        total_sq.index_add_(0, ids, values.double() ** 2)
        peak.scatter_reduce_(0, ids, values, "amax")
        return tables

    return call


def _bincount(i: Inputs, tables: Tables) -> Callable[[], Tables]:
    count, total, total_sq, peak = (table.view(-1) for table in tables)

    def call() -> Any:
        live, values, ids = _live(i)
        size = len(count)
        count.add_(torch.bincount(ids[live], minlength=size))
        total.add_(torch.bincount(ids, values.double(), size))
        total_sq.add_(torch.bincount(ids, values.double() ** 2, size))
        peak.scatter_reduce_(0, ids, values, "amax")
        return tables

    return call
