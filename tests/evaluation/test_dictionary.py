"""Decoder cosines and matchings against dense float64, and against brute force."""

import itertools

import pytest
import torch

from qscope.errors import InputError
from qscope.evaluation import dictionary
from qscope.evaluation.dictionary import decoder_cosines, greedy_match, hungarian_match, nearest, stability, unit_rows


def weights(count, width=10, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[None, 3], ids=["one block", "blocks of 3"])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr("qscope.evaluation.dictionary.reference.rows_per_block", lambda *_: request.param)


def test_cosines_of_one_decoder(blocks):
    W, E = 3 * weights(50), weights(50, seed=1)
    W[7] = -2 * W[3]  # opposite is not near
    W[9] = 0.5 * W[20]  # a duplicate is
    found = decoder_cosines(E, W)
    unit = torch.nn.functional.normalize(W.double(), dim=1)
    cosines = unit @ unit.T
    best = cosines.fill_diagonal_(-2).amax(1)
    # float32 dots of unit rows of width 10
    assert found.mean == pytest.approx(float(best.mean()), abs=1e-6)
    assert found.median == pytest.approx(float(best.median()), abs=1e-6)
    assert found.largest == pytest.approx(1.0, abs=1e-6)
    assert found.above_09 == float((best > 0.9).double().mean()) >= 2 / 50
    assert found.histogram == torch.histc(best.clamp(0, 1), 20, 0, 1).int().tolist()
    assert found.norm_smallest == pytest.approx(float(W.double().norm(dim=1).min()))
    assert found.encoder_cosine == pytest.approx(
        float(torch.cosine_similarity(E.double(), W.double()).mean()), abs=1e-6
    )


def test_nearest_takes_the_lowest_of_equals_and_a_single_row_has_none(blocks):
    other = unit_rows(torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
    value, index = nearest(other[2:4], other)
    assert index.tolist() == [1, 0] and value.tolist() == [1.0, 1.0]
    assert nearest(other[:1])[0].tolist() == [0.0]


def brute_greedy(cosines):
    pairs, free = [], cosines.clone()
    for _ in range(min(cosines.shape)):
        at = int(free.flatten().argmax())  # first of equals
        i, j = divmod(at, free.shape[1])
        pairs.append((i, j))
        free[i], free[:, j] = -torch.inf, -torch.inf
    return sorted(pairs)


@pytest.mark.parametrize("held", [1 << 24, 100], ids=["held", "swept"])
@pytest.mark.parametrize(("F", "G"), [(30, 30), (21, 40), (40, 21), (1, 1)])
def test_greedy_takes_the_largest_cosine_again_and_again(F, G, held, monkeypatch, blocks):
    monkeypatch.setattr(dictionary, "HELD", held)
    one, other = unit_rows(weights(F, 4)), unit_rows(weights(G, 4, seed=1))
    mine, theirs = greedy_match(one, other)
    assert list(zip(mine.tolist(), theirs.tolist(), strict=True)) == brute_greedy(one @ other.T)


@pytest.mark.parametrize("held", [1 << 24, 0], ids=["held", "swept"])
def test_greedy_takes_the_lowest_of_equals(held, monkeypatch, blocks):
    monkeypatch.setattr(dictionary, "HELD", held)
    mine, theirs = greedy_match(torch.ones(9, 1), torch.ones(9, 1))
    assert mine.tolist() == theirs.tolist() == list(range(9))


def test_hungarian_has_the_largest_sum():
    one, other = unit_rows(weights(6, 3, seed=8)), unit_rows(weights(6, 3, seed=108))
    mine, theirs = hungarian_match(one, other)
    cosines = one @ other.T
    best = max(sum(float(cosines[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(6)))
    assert float(cosines[mine, theirs].sum()) == pytest.approx(best, abs=1e-5)
    greedy = greedy_match(one, other)
    assert float(cosines[greedy[0], greedy[1]].sum()) < best - 1e-3  # else this test tells nothing


@pytest.mark.parametrize("matching", ["greedy", "hungarian"])
def test_a_shuffled_noisy_copy_is_found_again(matching):
    """Half of the features are kept, in another order and scale; the other half is new."""
    W, order = weights(40, 64), torch.randperm(40, generator=torch.Generator().manual_seed(2))
    other = 2.5 * W[order]
    new = order >= 20
    other[new] = weights(40, 64, seed=3)[new]
    found = stability(W, W, other, other, "copy", matching)
    assert (found.matched, found.matched_share) == (40, 0.5)
    one, two = unit_rows(W), unit_rows(other)
    mine, theirs = (greedy_match if matching == "greedy" else hungarian_match)(one, two)
    kept = mine < 20
    assert torch.equal(order[theirs[kept]], mine[kept])
    assert found.matched_cosine == pytest.approx(float((one[mine] * two[theirs]).sum(1).mean()), abs=1e-6)
    assert found.mean_max_cosine == pytest.approx(float((one @ two.T).amax(1).mean()), abs=1e-6)
    assert found.mean_max_cosine_reverse == pytest.approx(float((one @ two.T).amax(0).mean()), abs=1e-6)
    assert found.histogram[19] == 20 and sum(found.histogram) == 40


def test_encoder_cosine_is_of_the_same_pairs():
    W, order = weights(20, 64), torch.randperm(20, generator=torch.Generator().manual_seed(2))
    E = weights(20, 64, seed=5)
    assert stability(E, W, E[order], W[order], "copy").matched_encoder_cosine == pytest.approx(1.0, abs=1e-6)


def test_refuses_nan_and_too_many_for_hungarian(monkeypatch):
    W = weights(5)
    with pytest.raises(InputError, match="NaN or infinite"):
        stability(W, W, W, W * torch.nan, "broken")
    monkeypatch.setattr(dictionary, "MOST_HUNGARIAN", 4)
    with pytest.raises(InputError, match="--matching greedy"):
        stability(W, W, W, W, "large", "hungarian")
