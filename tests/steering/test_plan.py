"""What the edits of a layer come to."""

import pytest
import torch

from qscope import ops
from qscope.steering.plan import Column, Columns

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("S", [1, 5, 32])
def test_additions_to_all_tokens_have_the_bits_of_the_operator(dtype, S):
    """Rows of a batch where only some tokens are chosen go through the operator: the others must not differ."""
    generator = torch.Generator().manual_seed(S)
    strengths = torch.randn(S, generator=generator).tolist()
    rows = torch.randn(S, 77, generator=generator)
    columns = Columns(
        [Column(i, 0, ops.SteerSetting.add(a), d) for i, (a, d) in enumerate(zip(strengths, rows, strict=True))],
        torch.device("cpu"),
    )
    h = torch.randn(3, 5, 77, generator=generator).to(dtype)
    found, expected = h.clone(), h.clone()
    columns.choose([True] * S, 3, 5)
    columns.apply(found, {}, True)
    directions, settings, _, _ = columns.tensors
    ops.steer_add_(expected, directions, settings)
    assert torch.equal(found.view(BITS[dtype]), expected.view(BITS[dtype]))
    assert bool(columns.harvest(3, 5).all()) and not torch.equal(found, h)


def test_strength_0_is_not_added_at_all():
    """-0 + 0 is +0: another bit."""
    columns = Columns([Column(0, 0, ops.SteerSetting.add(0.0), torch.ones(4))], torch.device("cpu"))
    columns.choose([True], 1, 1)
    assert not columns.live
