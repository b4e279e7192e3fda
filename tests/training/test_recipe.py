import dataclasses

import pytest

from qscope.errors import InputError
from qscope.training import Recipe


def test_defaults_are_the_cited_ones():
    recipe = Recipe(d_sae=2**16, k=50)
    assert recipe.peak_lr == pytest.approx(1e-4)
    assert (recipe.aux_weight, recipe.dead_after_tokens, recipe.grad_clip) == (1 / 32, 10_000_000, 1.0)
    assert recipe.auxiliary_k(768) == 256 and recipe.auxiliary_k(100) == 50 and recipe.auxiliary_k(1) == 1
    assert Recipe(d_sae=64, k=2, lr=0.5, k_aux=7).auxiliary_k(768) == 7


def test_rate_rises_stays_and_falls():
    recipe = Recipe(d_sae=2**14, k=8, warmup_steps=10, decay=0.25)
    rates = [recipe.lr_at(step, 200) / 2e-4 for step in range(1, 201)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert set(rates[9:150]) == {1.0}
    assert rates[150:] == pytest.approx([left / 51 for left in range(50, 0, -1)])
    flat = Recipe(d_sae=2**14, k=8, warmup_steps=0, decay=0.0)
    assert [flat.lr_at(step, 5) for step in range(1, 6)] == [2e-4] * 5


def test_warmup_follows_the_length_of_the_run():
    recipe = Recipe(d_sae=64, k=2)
    assert (recipe.warmup(100_000), recipe.warmup(500), recipe.warmup(10)) == (1000, 25, 0)


def test_sizes_of_the_nested_dictionaries():
    assert Recipe(d_sae=64, k=2).nested == (64,)
    assert Recipe(d_sae=64, k=2, objective="matryoshka").nested == (4, 8, 16, 32, 64)
    assert Recipe(d_sae=5, k=2, objective="matryoshka").nested == (1, 2, 5)
    assert Recipe(d_sae=64, k=2, objective="batch_topk", prefixes=(7, 20)).nested == (7, 20, 64)
    assert Recipe(d_sae=64, k=2, objective="batch_topk", prefixes=(64,)).nested == (64,)


def test_width_of_the_selection():
    assert Recipe(d_sae=4096, k=100).width == 100
    assert Recipe(d_sae=4096, k=32, multi_topk=True).width == 128 and Recipe(d_sae=20, k=8, multi_topk=True).width == 20
    assert Recipe(d_sae=4096, k=100, objective="batch_topk").width == 256
    assert Recipe(d_sae=4096, k=10, objective="batch_topk").width == 40
    assert Recipe(d_sae=4096, k=10, objective="jumprelu").width == 256
    assert Recipe(d_sae=4096, k=10, objective="jumprelu", row_limit=99).width == 99


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": 65}, "k=65; accepted is 1 to d_sae=64"),
        ({"k": 0}, "k=0"),
        ({"objective": "relu"}, "'batch_topk', 'matryoshka', 'jumprelu'"),
        ({"objective": "jumprelu", "multi_topk": True}, "belongs to 'topk'"),
        ({"prefixes": (8,)}, "only 'matryoshka' and 'batch_topk'"),
        ({"objective": "matryoshka", "prefixes": (8, 8)}, "ascending sizes"),
        ({"objective": "matryoshka", "prefixes": ()}, "ascending sizes"),
        ({"objective": "matryoshka", "prefixes": (8, 65)}, "d_sae=64"),
        ({"objective": "batch_topk", "d_sae": 999, "k": 300}, "at most 256"),
        ({"objective": "jumprelu", "row_limit": 257, "d_sae": 999}, "row_limit=257; accepted is k=4 to 256"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"aux_weight": -1.0}, "aux_weight"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"decay": 1.5}, "decay"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"normalize_activations": "layer_norm"}, "'unit', 'sqrt_d', 'none'"),
        ({"dead_every": 0}, "dead_every"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused(change, named):
    with pytest.raises(InputError, match=r"accepted|asked|given") as caught:
        dataclasses.replace(Recipe(d_sae=64, k=4), **change)
    assert named in str(caught.value)
