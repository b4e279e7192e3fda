"""Footprints against Python sets: how they are made, cut, joined, counted and kept on disk."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope.coverage.footprints import FootprintCounts, Footprints
from qscope.errors import InputError, StorageError, StoreError
from qscope.finding.pooled import pool
from tests.coverage.drawn import F, as_sets, footprints

TOKENS, K, TEXTS = 40, 6, 12


def codes(seed):
    rng = np.random.default_rng(seed)
    text = np.sort(rng.integers(0, TEXTS, TOKENS))
    indices = np.argsort(rng.random((TOKENS, 30)), axis=1)[:, :K].astype(np.int32)
    acts = rng.integers(0, 5, (TOKENS, K)).astype(np.float32) / 4  # ties and zeros
    return acts, indices, text, rng.random(TOKENS) < 0.9


def by_hand(acts, indices, text, keep, pooling, threshold, top_n):
    sets = []
    for t in range(TEXTS):
        rows = np.flatnonzero((text == t) & keep)
        dense = np.zeros((len(rows), 30))
        for i, row in enumerate(rows):
            dense[i, indices[row]] = acts[row]
        if not len(rows):
            sets.append(set())
            continue
        value = {"any": dense.max(0), "mean": dense.mean(0), "last": dense[-1]}[pooling]
        found = sorted((j for j in range(30) if value[j] > threshold), key=lambda j: (-value[j], j))
        sets.append(set(found[:top_n]))
    return sets


@pytest.mark.parametrize("pooling", ["any", "mean", "last"])
@pytest.mark.parametrize("top_n", [None, 1, 3])
def test_footprints_of_codes_are_the_features_above_the_threshold(pooling, top_n):
    for seed, threshold in ((0, 0.0), (1, 0.25), (2, 0.5)):
        drawn = codes(seed)
        found = Footprints.from_codes(pool(*drawn, TEXTS), 30, pooling, threshold, top_n)
        assert as_sets(found) == by_hand(*drawn, pooling, threshold, top_n)
        assert all((np.diff(found.item(i)) > 0).all() for i in range(TEXTS))
        assert found.features.dtype == np.int32


def test_last_token_codes_give_the_same_as_pooled_ones():
    rng = np.random.default_rng(3)
    indices = np.argsort(rng.random((20, 30)), axis=1)[:, :K].astype(np.int32)
    acts = -np.sort(-rng.random((20, K)).astype(np.float32), axis=1)
    acts[4] = 0
    pooled = pool(acts, indices, np.arange(20), np.ones(20, bool), 20)
    for threshold, top_n in ((0.0, None), (0.5, None), (0.2, 2)):
        one = Footprints.from_topk(acts, indices, 30, threshold, top_n)
        other = Footprints.from_codes(pooled, 30, "last", threshold, top_n)
        assert np.array_equal(one.starts, other.starts) and np.array_equal(one.features, other.features)


@given(footprints(), st.data())
def test_rows_joins_and_counts_are_those_of_sets(found, data):
    sets = as_sets(found)
    index = np.array(data.draw(st.lists(st.integers(-len(sets), len(sets) - 1), max_size=9)), np.int64)
    assert as_sets(found.rows(index)) == [sets[i] for i in index]
    mask = np.arange(len(sets)) % 2 == 0
    assert as_sets(found.rows(mask)) == sets[::2]
    twice = Footprints.concatenate([found, found.rows(index)])
    assert as_sets(twice) == sets + [sets[i] for i in index]
    assert found.counts().tolist() == [sum(j in s for s in sets) for j in range(F)]
    assert found.present().tolist() == [any(j in s for s in sets) for j in range(F)]
    assert found.sizes.tolist() == [len(s) for s in sets]


@given(footprints(most=9), st.integers(0, 9))
def test_counts_of_chunks_add_up(found, cut):
    whole = FootprintCounts.of(found)
    parts = [found.rows(np.arange(len(found)) < cut), found.rows(np.arange(len(found)) >= cut)]
    added = sum(map(FootprintCounts.of, parts), FootprintCounts.empty(F))
    assert added.items == whole.items == len(found)
    assert np.array_equal(added.counts, whole.counts) and np.array_equal(whole.counts, found.counts())
    assert np.array_equal(added.sizes, whole.sizes)
    assert (added.sizes @ np.arange(F + 1), added.sizes.sum()) == (found.entries, len(found))


def test_counting_in_blocks_gives_the_same(monkeypatch):
    found = Footprints.from_topk(*codes(0)[:2], 30)
    whole = found.counts()
    monkeypatch.setattr("qscope.coverage.footprints._BLOCK", 7)
    assert np.array_equal(found.counts(), whole)


@settings(max_examples=20, deadline=None)  # fsync takes its time
@given(footprints())
def test_files_come_back_mapped(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("f") / "a.safetensors"
    found.save(path)
    again = Footprints.load(path)
    assert np.array_equal(again.starts, found.starts) and np.array_equal(again.features, found.features)
    assert again.d_sae == F and (found.entries == 0 or isinstance(again.features, np.memmap))
    assert as_sets(again.rows(np.arange(len(again)))) == as_sets(found)


def test_files_are_safetensors(tmp_path):
    from safetensors.numpy import load_file

    found = Footprints.from_sets([[1, 3], [], [0]], F)
    found.save(tmp_path / "a")
    held = load_file(tmp_path / "a")
    assert held["starts"].tolist() == [0, 2, 2, 3] and held["features"].tolist() == [1, 3, 0]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    found = Footprints.from_sets([[1, 3], [2], [0, 6]], F)
    found.save(path)
    good = path.read_bytes()
    data = len(good) - found.nbytes
    ids = data + found.starts.nbytes

    def changed(at, value, size):
        return good[:at] + value.to_bytes(size, "little", signed=True) + good[at + size :]

    bad = {
        "cut": good[:-1],
        "longer": good + b"\0",
        "empty": b"",
        "no header": good[:8],
        "huge header": (1 << 60).to_bytes(8, "little") + good[8:],
        "not JSON": good[:8] + b"x" + good[9:],
        "other SAE": good.replace(b'"d_sae":"7"', b'"d_sae":"6"'),
        "negative": changed(ids, -1, 4),
        "beyond": changed(ids + 16, 7, 4),
        "not ascending": changed(ids + 4, 1, 4),
        "starts fall": changed(data + 8, 4, 8),
        "starts begin late": changed(data, 1, 8),
    }
    for name, text in bad.items():
        path.write_bytes(text)
        with pytest.raises(StoreError, match=r"not a footprint file|could not be read"):
            pytest.fail(f"{name} was loaded: {Footprints.load(path).starts}")
    with pytest.raises(StoreError, match="could not be read"):
        Footprints.load(tmp_path / "missing")
    with pytest.raises(StorageError):
        found.save(tmp_path / "no folder" / "a")


def test_order_is_checked_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("qscope.coverage.footprints._BLOCK", 2)
    Footprints.from_sets([[1, 3, 5, 6], [0, 2]], F).save(tmp_path / "a")
    Footprints.load(tmp_path / "a")
    Footprints(np.array([0, 4]), np.array([1, 3, 2, 6], np.int32), F).save(tmp_path / "a")
    with pytest.raises(StoreError, match="ascending"):
        Footprints.load(tmp_path / "a")


def test_what_is_refused_says_what_is_accepted():
    drawn = pool(*codes(0), TEXTS)
    for threshold in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="accepted are numbers from 0"):
            Footprints.from_codes(drawn, 30, threshold=threshold)
    with pytest.raises(InputError, match="1 or more"):
        Footprints.from_codes(drawn, 30, top_n=0)
    with pytest.raises(InputError, match="d_sae"):
        Footprints.from_codes(drawn, 20)
    with pytest.raises(InputError, match="d_sae"):
        Footprints.from_topk(*codes(0)[:2], 20)
    with pytest.raises(InputError, match="ids outside 0 to 6"):
        Footprints.from_sets([[7]], F)
    with pytest.raises(InputError, match="same SAE"):
        Footprints.concatenate([Footprints.from_sets([[1]], F), Footprints.from_sets([[1]], 8)])
    with pytest.raises(InputError, match="same SAE"):
        Footprints.concatenate([])
    with pytest.raises(InputError, match="one SAE"):
        FootprintCounts.empty(3) + FootprintCounts.empty(4)
    with pytest.raises(InputError, match=r"N \+ 1"):
        Footprints(np.array([0, 1]), np.empty(0, np.int32), F)
