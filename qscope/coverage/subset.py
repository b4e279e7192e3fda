"""The smallest part of a benchmark that still fires most of its features."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from qscope.coverage.footprints import Footprints, Ids
from qscope.errors import InputError
from qscope.finding.pooled import Ints


@dataclass(frozen=True)
class Cover:
    """Items in the order in which they were picked."""

    items: Ints
    """[c] places in the benchmark"""
    gains: Ints
    """[c] features that the item added: never rising"""
    covered: Ints
    """[c] features that the items so far fire"""
    wanted: int
    """Features that were asked for"""
    features: int
    """|F(D)|"""

    @property
    def share(self) -> float:
        """Of the features, how many the items fire; nan where the benchmark fires none."""
        return int(self.gains.sum()) / self.features if self.features else float("nan")

    @property
    def reached(self) -> bool:
        return int(self.gains.sum()) >= self.wanted


def smallest_cover(footprints: Footprints, share: float = 1.0, most: int | None = None) -> Cover:
    """Greedily picks the item that adds most features, until `share` of all features or `most` items; ties lowest item.

    After b items, at least 1 - (1 - 1/b)^b > 1 - 1/e of what the best b items fire is covered (Nemhauser, Wolsey and
    Fisher 1978). For a share, at most H(s) times the fewest possible items are picked, s being the largest footprint
    and H(s) = 1 + 1/2 + ... + 1/s <= 1 + ln s (Wolsey 1982).

    The picks are those of lazy greedy (Minoux 1978). All gains are kept exact instead, through an index from features
    to items: each id of each footprint is taken off once, so the work is bounded by the entries, which a heap's is not.
    Besides the footprints it takes 12 bytes an id.
    """
    if not 0 < share <= 1:
        raise InputError(f"The share to keep is {share}; accepted are numbers above 0 and up to 1.")
    if most is not None and most < 1:
        raise InputError(
            f"At most {most} items were asked for; accepted is 1 or more, or none for as many as it takes."
        )
    firing, begins = _items_by_feature(footprints)
    gain = footprints.sizes.astype(np.int32)
    features = int((np.diff(begins) > 0).sum())
    wanted = math.ceil(Fraction(repr(float(share))) * features)  # 0.55 of 100 is 55, in binary it is a bit more
    missing = np.ones(footprints.d_sae, np.bool_)
    items: list[int] = []
    gains: list[int] = []
    covered = 0
    while covered < wanted and (most is None or len(items) < most):
        best = int(gain.argmax())  # the first of equal ones
        ids = footprints.item(best)
        new = ids[missing[ids]]
        missing[new] = False
        items.append(best)
        gains.append(len(new))
        covered += len(new)
        for feature in new.tolist():
            gain[firing[begins[feature] : begins[feature + 1]]] -= 1
    added = np.array(gains, np.int64)
    return Cover(np.array(items, np.int64), added, np.cumsum(added), wanted, features)


def _items_by_feature(footprints: Footprints) -> tuple[Ids, Ints]:
    """(items [M] sorted by feature, begins [F + 1]): feature j is fired by items[begins[j] : begins[j + 1]]."""
    begins = np.zeros(footprints.d_sae + 1, np.int64)
    np.cumsum(footprints.counts(), out=begins[1:])
    order = np.argsort(footprints.features, kind="stable")
    return footprints.owners().astype(np.int32)[order], begins
