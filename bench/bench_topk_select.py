"""topk_select against torch.topk on dense scores."""

import torch
from torch import Tensor

from qscope.ops import topk_select

from . import _floors
from ._case import OURS, Case, Provider, Sizes, actives, generator, name_of, tokens, widths
from ._checks import check_topk


def cases(device: str, quick: bool = False) -> list[Case]:
    """bfloat16 at every width; float32 at two, since its [N, F] scores are what qscope avoids making."""
    found = []
    for _, d_sae in widths(device, quick):
        for dtype in (torch.bfloat16, torch.float32):
            if dtype == torch.float32 and d_sae > 65536:
                continue
            N = tokens(device, quick) if device.startswith("cuda") else 256
            for k in actives(device, quick):
                found.append(_case(device, Sizes(N, 0, d_sae, k), dtype))
    return found


def _case(device: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    N, _, d_sae, k = sizes

    def inputs(seed: int) -> tuple[Tensor]:
        return (torch.randn(N, d_sae, generator=generator(device, seed), device=device).to(dtype),)

    def check(result: tuple[Tensor, Tensor], scores: Tensor, precision: str) -> None:
        check_topk(result, scores, k, 0.0)

    return Case(
        "topk_select",
        sizes,
        name_of(dtype),
        inputs,
        lambda i: i[0].float(),
        check,
        {
            "qscope": Provider(lambda i: lambda: topk_select(*i, k), OURS),
            "torch topk": Provider(lambda i: lambda: i[0].topk(k)),
        },
        _floors.select(N, d_sae, k, dtype.itemsize),
    )
