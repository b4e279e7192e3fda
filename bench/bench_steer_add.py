"""steer_add_ against a plain copy of h and against adding one direction after the other. K counts the directions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qscope.ops import steer_add_

from . import _floors
from ._case import OURS, YARDSTICK, Case, Provider, Sizes, generator, widths
from ._checks import ROUNDING, close

COPY = "copy of h"
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def cases(device: str, quick: bool = False) -> list[Case]:
    """One token as in generation, and a large batch; plain directions, and directions gated by a feature."""
    found = []
    batches = (1, 8192) if device.startswith("cuda") else (1, 512)
    for D in sorted({D for D, _ in widths(device, quick)}):
        for N in batches:
            found += [_case(device, Sizes(N, D, 0, S)) for S in ((8,) if quick else (8, 32))]
            found.append(_case(device, Sizes(N, D, 0, 8), gated=True))
    return found


def _case(device: str, sizes: Sizes, gated: bool = False) -> Case:
    N, D, _, S = sizes

    def inputs(seed: int) -> Inputs:
        gen = generator(device, seed)
        h, directions, gates = (
            torch.randn(n, D, generator=gen, device=device).bfloat16() / scale
            for n, scale in ((N, 1.0), (S, D**0.5), (S, D**0.5))
        )
        settings = torch.zeros(S, 8, device=device)
        settings[:, 0] = torch.linspace(0.5, 2.0, S, device=device)  # constant: the strength
        settings[:, 7] = 1.0  # enabled
        if gated:
            settings[:, 4] = 1.0  # gate_on: where the gate's dot with h is above the threshold 0
        return h, directions, settings, gates

    def want(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """What to reach, the size of what was added, and how near each token is to a gate's threshold."""
        h, directions, settings, gates = (t.double() for t in i)
        strength = settings[:, 0].expand(N, S)
        dots = h @ gates.T
        if gated:
            strength = strength * (dots > 0)
        nearest = dots.abs().amin(1) if gated else torch.ones(N, device=device, dtype=torch.float64)
        return h + strength @ directions, h.abs() + strength @ directions.abs(), nearest

    def check(result: Tensor, answer: tuple[Tensor, Tensor, Tensor], precision: str) -> None:
        # One rounding, or one per direction and product; a gate this near its threshold may fall on either side.
        goal, size, nearest = answer
        roundings = 1 if precision == "once" else 2 * S + 1
        clear = nearest > (1e-4 if precision == "once" else 0.05)
        bound = (roundings * ROUNDING["bfloat16"] + 1e-5) * size
        close("h", result.double()[clear], goal[clear], bound[clear])

    def ours(i: Inputs) -> Callable[[], Tensor]:
        h, directions, settings, gates = i[0].clone(), *i[1:]

        def call() -> Tensor:
            steer_add_(h, directions, settings, gates=gates if gated else None)
            return h

        return call

    def eager(i: Inputs) -> Callable[[], Tensor]:
        h, directions, settings, gates = i[0].clone(), *i[1:]
        strengths = settings[:, 0].to(h.dtype)

        def call() -> Tensor:
            # Every gate reads h as it came in, hence all of them first.
            active = [h @ gates[s] > 0 for s in range(S)] if gated else None
            for s in range(S):
                step = strengths[s] * directions[s]
                h.add_(step if active is None else active[s][:, None] * step)
            return h

        return call

    def copy(i: Inputs) -> Callable[[], Tensor]:
        target = torch.empty_like(i[0])
        return lambda: target.copy_(i[0])

    def check_copy(result: Tensor, answer: Any, precision: str) -> None:
        assert bool((result.double().abs() <= answer[1]).all()), "the copy is none"

    return Case(
        "steer_add gated" if gated else "steer_add",
        sizes,
        "bfloat16",
        inputs,
        want,
        check,
        {
            "qscope": Provider(ours, OURS, "once"),
            "torch, one direction after the other": Provider(eager, precision="each"),
            COPY: Provider(copy, YARDSTICK, check=check_copy),
        },
        _floors.steer_add(N, D, 2),
        in_place=True,
    )
