"""Evidence of planted features, against a slow plain reading of the same codes."""

import dataclasses

import numpy as np
import pytest

from qscope.errors import InputError
from qscope.explaining import contexts, sources
from qscope.explaining.contexts import Sampling, gather
from tests.explaining.planted_codes import BESIDE, CAPITAL, KING, KINGS, NOT, QUEENS, ROPE, SAE, SILENT, source

FEATURES = [KINGS, QUEENS, BESIDE, SILENT]


@pytest.fixture(scope="module")
def codes():
    return source()


@pytest.fixture(scope="module")
def found(codes):
    return dict(zip(FEATURES, gather(codes, 3, FEATURES, Sampling()), strict=True))


def activations(codes, feature: int) -> np.ndarray:
    values, indices, keep = codes.codes[3]
    return np.where((indices == feature) & keep[:, None], values, 0).sum(1)


def held_out(codes) -> np.ndarray:
    return contexts._mixed(codes.document << 32, 0) >> np.uint64(63) == 1


def test_counts_and_leading_tokens_are_those_of_a_plain_reading(codes, found):
    seen = ~held_out(codes) & codes.codes[3].keep
    assert 10 < len(set(codes.document[seen])) < 30  # both halves are there
    for feature, one in found.items():
        acts = activations(codes, feature)
        assert (one.count, one.counted) == ((acts > 0).sum(), codes.codes[3].keep.sum())
        assert one.largest == acts.max() and one.sae_sha256 == SAE
        mass = {t: float(acts[seen & (codes.token == t)].astype(np.float64).sum()) for t in set(codes.token.tolist())}
        best = sorted((t for t in mass if mass[t] > 0), key=lambda t: -mass[t])
        assert [t.token for t in one.top_tokens] == best
        for top in one.top_tokens:
            fired, occurred = (acts > 0) & seen & (codes.token == top.token), seen & (codes.token == top.token)
            assert top.count == fired.sum() and top.precision == fired.sum() / occurred.sum()
            assert top.share == pytest.approx(mass[top.token] / sum(mass.values()), rel=1e-12)  # order of a float64 sum
    assert {t.token for t in found[KINGS].top_tokens} == {KING, CAPITAL}


def test_the_strongest_passages_are_one_per_document_of_the_first_half(codes, found):
    out = held_out(codes)
    for feature in (KINGS, QUEENS, BESIDE):
        acts = np.where(out, 0, activations(codes, feature))
        per_document = {d: acts[codes.document == d].max() for d in set(codes.document.tolist())}
        best = sorted((d for d in per_document if per_document[d] > 0), key=lambda d: -per_document[d])[:10]
        assert [p.document for p in found[feature].strongest] == best
        for passage in found[feature].strongest:
            assert passage.activations[passage.centre] == pytest.approx(per_document[passage.document], rel=1e-7)


def test_passages_hold_the_tokens_and_activations_around_their_centre(codes, found):
    for feature, one in found.items():
        acts = activations(codes, feature)
        for passage in (*one.strongest, *one.positives, *one.negatives, *one.near):
            start = passage.document * 60 + passage.position
            low, high = max(start - 12, passage.document * 60), min(start + 13, (passage.document + 1) * 60)
            assert passage.tokens == tuple(codes.token[low:high].tolist())
            assert passage.activations == tuple(acts[low:high].tolist())
            assert passage.centre == start - low


def test_scores_see_only_the_second_half_and_sides_are_what_they_say(codes, found):
    out = set(codes.document[held_out(codes)].tolist())
    for one in found.values():
        for passage in (*one.positives, *one.negatives, *one.near):
            assert passage.document in out
        assert not {p.document for p in one.strongest} & out
        assert all(p.activations[p.centre] > 0 for p in one.positives)
        assert all(p.largest == 0 for p in (*one.negatives, *one.near))
        assert len({p.document for p in one.positives}) == len(one.positives)
    assert found[BESIDE].near and all(p.tokens[p.centre] == ROPE for p in found[BESIDE].near)
    assert all(p.tokens[p.centre - 1] == NOT or p.position == 0 for p in found[BESIDE].near)
    assert not found[KINGS].near  # it fires on each of its tokens
    assert not found[SILENT].positives and len(found[SILENT].negatives) == 20 and not found[SILENT].top_tokens


def test_positives_come_evenly_from_fifths_of_the_activation(codes):
    one = gather(codes, 3, [KINGS], Sampling(positives=5))[0]
    acts, out = activations(codes, KINGS), held_out(codes)
    hashed = contexts._mixed(np.arange(len(acts)), 1).astype(np.float64)  # one firing per document, by this hash
    sampled = []
    for d in sorted(set(codes.document[out].tolist())):
        rows = np.flatnonzero((codes.document == d) & (acts > 0))
        sampled += [acts[rows[np.argmin(hashed[rows])]]] if len(rows) else []
    fifths = np.array_split(np.sort(sampled)[::-1], 5)
    for passage, fifth in zip(one.positives, fifths, strict=True):
        assert fifth[-1] <= passage.activations[passage.centre] <= fifth[0]


def test_blocks_do_not_matter(codes, monkeypatch):
    """Passages that begin in one block and end in another are whole."""
    expected = gather(codes, 3, FEATURES)
    monkeypatch.setattr(sources, "ROWS", 7)
    for one, other in zip(gather(codes, 3, FEATURES[::-1])[::-1], expected, strict=True):
        assert (one.positives, one.negatives, one.near) == (other.positives, other.negatives, other.near)
        assert one.strongest == other.strongest and (one.count, one.counted) == (other.count, other.counted)
        for top, whole in zip(one.top_tokens, other.top_tokens, strict=True):
            assert (top.token, top.count) == (whole.token, whole.count)
            assert top.share == pytest.approx(whole.share, rel=1e-12)  # a float64 sum in another order


def test_evidence_has_one_hash_and_another_seed_other_halves(codes, found):
    again = gather(codes, 3, FEATURES)
    assert [one.sha256() for one in again] == [found[f].sha256() for f in FEATURES]
    other = gather(codes, 3, [KINGS], Sampling(seed=1))[0]
    assert other.sha256() != found[KINGS].sha256() and other.count == found[KINGS].count
    assert dataclasses.replace(again[0], count=1).sha256() != again[0].sha256()


def test_a_single_long_text_is_divided_by_blocks():
    codes = source()
    one_text = dataclasses.replace(codes, document=np.zeros_like(codes.document), position=np.arange(len(codes.token)))
    one = gather(one_text, 3, [KINGS])[0]
    assert len(one.strongest) > 1 and one.positives and one.negatives
    blocks = {p.position // contexts.UNIT_TOKENS for p in one.strongest}
    assert not blocks & {p.position // contexts.UNIT_TOKENS for p in (*one.positives, *one.negatives)}
    for passage in one.strongest:  # none reaches into another block
        low = passage.position - passage.centre
        assert low // contexts.UNIT_TOKENS == (low + len(passage.tokens) - 1) // contexts.UNIT_TOKENS


@pytest.mark.parametrize(
    ("layer", "features", "said"),
    [(2, [1], "there are the layers 3"), (3, [16], "features 0 to 15"), (3, [1, 1], "at most once")],
)
def test_what_is_not_there_is_refused(codes, layer, features, said):
    with pytest.raises(InputError, match=said):
        gather(codes, layer, features)


def test_numbers_that_cannot_be_are_refused(codes):
    with pytest.raises(InputError, match="window is 0"):
        Sampling(window=0)
    with pytest.raises(InputError, match="one row per token"):
        dataclasses.replace(codes, token=codes.token[1:])
