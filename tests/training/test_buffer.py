"""The shuffle buffer and the row filter: every row once, in a reproducible order, to the bit after a restore."""

import importlib.util
import itertools
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from qscope.errors import InputError
from qscope.training import checkpoint
from qscope.training.buffer import ShuffledStream
from qscope.training.filters import RowFilter

_spec = importlib.util.spec_from_file_location("supply", Path(__file__).with_name("supply.py"))
supply = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(supply)
tiny = supply.tiny
batches = supply.batches
equal = supply.equal
stream_of = supply.stream_of


class Counting:
    """A producer of the numbers 0, 1, 2 ... as rows, in parts of uneven length."""

    def __init__(self, total, seed=0, max_rows=32):
        self.widths, self.dtype, self.device, self.max_rows = {0: 2, 1: 1}, torch.float32, torch.device("cpu"), max_rows
        self.total, self.at, self.seed = total, 0, seed

    @property
    def done(self):
        return self.at >= self.total

    def check(self, n_tokens):
        pass

    def produce(self, room):
        while room >= self.max_rows and not self.done:
            count = min(1 + (7 * self.at + self.seed) % self.max_rows, self.total - self.at)
            numbers = torch.arange(self.at, self.at + count, dtype=torch.float32)[:, None]
            self.at += count
            room -= count
            yield {0: torch.cat([numbers, -numbers], 1), 1: numbers * 2}

    def settings(self):
        return {"total": self.total}

    def state(self):
        return {"at": self.at}

    def restore(self, state):
        self.at = state["at"]

    def counts(self):
        return {}


# --- the buffer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "capacity", "n"), [(1000, 64, 8), (1000, 128, 64), (999, 100, 7), (50, 256, 10)])
def test_every_row_is_served_exactly_once_and_points_stay_aligned(total, capacity, n):
    stream = ShuffledStream(Counting(total), capacity)
    found = batches(stream, n)
    served = torch.cat([batch[0][:, 0] for batch in found])
    assert len(served) == total // n * n == stream.served and stream.left == total % n
    rest = stream.next(stream.left)[0][:, 0] if stream.left else served[:0]
    assert torch.cat([served, rest]).sort().values.tolist() == list(range(total))
    for batch in found:
        assert torch.equal(batch[0][:, 1], -batch[0][:, 0]) and torch.equal(batch[1][:, 0], 2 * batch[0][:, 0])


def test_the_order_is_mixed_over_the_whole_buffer_and_depends_on_the_seed_alone():
    """First batches of a full buffer: a uniform sample of 512 numbers; half of them lie below 256 within 5 sigma."""
    firsts = {}
    for seed in range(20):
        firsts[seed] = ShuffledStream(Counting(5000, max_rows=1), 512, seed).next(256)[0][:, 0]
        low = int((firsts[seed] < 256).sum())
        assert abs(low - 128) < 5 * (256 * 0.25 * 0.5) ** 0.5, "hypergeometric: variance n/4 * (1 - n/N)"
    again = ShuffledStream(Counting(5000, max_rows=1), 512, 3).next(256)[0][:, 0]
    assert torch.equal(again, firsts[3])
    assert len({tuple(first.tolist()) for first in firsts.values()}) == 20
    # Rows may stay for long, but none older than the refills in which all were mixed can leave early or late in order.
    stream = ShuffledStream(Counting(5000, max_rows=1), 512)
    served = torch.cat([batch[0][:, 0] for batch in batches(stream, 64)])
    delay = torch.arange(len(served)) - served
    assert delay.min() > -512 and delay.max() > 256, "at most a buffer ahead of its turn; some rows wait for long"


def test_memory_is_what_the_formula_says():
    stream = ShuffledStream(Counting(1000), 128)
    assert stream.memory() == 128 * (2 + 1) * 4
    stream.next(8)
    assert sum(rows.nbytes for rows in stream.state()["rows"].values()) == stream.left * 3 * 4 <= stream.memory()


@pytest.mark.parametrize("n", [7, 64])
def test_a_restored_buffer_goes_on_to_the_bit_from_every_cut(n):
    whole, states = [], []
    stream = ShuffledStream(Counting(700, seed=1), 128, seed=9)
    with pytest.raises(StopIteration):
        while True:
            states.append((stream.state(), stream.left))
            whole.append(stream.next(n))
    lefts = [left for _, left in states]
    assert n == 64 or (min(lefts[1:-5]) < 64 < max(lefts)), "cuts right before a refill and after one"
    for cut, (state, left) in enumerate(states):
        other = ShuffledStream(Counting(700, seed=1), 128, seed=9)
        other.next(n)  # whatever it did before is forgotten
        other.restore(state)
        assert other.left == left
        assert equal(batches(other, n), whole[cut:]), cut
        assert other.served == stream.served


def test_a_state_is_not_changed_by_what_follows(tiny):
    stream = stream_of(tiny)
    stream.next(8)
    state = stream.state()
    copy = deepcopy(state)
    found = batches(stream, 200)
    for name in ("rows", "producer"):
        first, second = {}, {}
        assert checkpoint.pack(state[name], first) == checkpoint.pack(copy[name], second)
        assert all(torch.equal(first[place], second[place]) for place in first)
    other = stream_of(tiny)
    other.restore(state)
    assert equal(batches(other, 200), found)


def test_impossible_requests():
    with pytest.raises(InputError, match="at least 64"):
        ShuffledStream(Counting(10), 63)
    stream = ShuffledStream(Counting(1000), 100)
    for n in (0, 51):
        with pytest.raises(InputError, match="Accepted: 1 to 50"):
            stream.next(n)


def test_a_failed_refill_cannot_be_saved():
    class Failing(Counting):
        def produce(self, room):
            yield from itertools.islice(super().produce(room), 1)
            raise InputError("broken text")

    stream = ShuffledStream(Failing(1000), 128)
    with pytest.raises(InputError, match="broken text"):
        stream.next(8)
    with pytest.raises(RuntimeError, match="earlier state"):
        stream.state()


# --- the filter ------------------------------------------------------------------------------------------


def test_planted_rows_are_left_out_at_all_points_and_counted_at_theirs():
    generator = torch.Generator().manual_seed(0)
    x = {5: torch.randn(400, 64, generator=generator), 9: torch.randn(400, 64, generator=generator)}
    candidates = torch.ones(400, dtype=torch.bool)
    candidates[[0, 100]] = False
    x[5][3, 7] = float("nan")
    x[5][4, 0] = float("inf")
    x[9][4, 1] = -float("inf")
    x[5][[20, 21, 22]] *= 20  # norms of 64 normal numbers lie within 40 % of the median
    x[9][[22, 23]] *= 1000
    x[9][[30]] *= 6
    x[5][100] = float("nan")  # no candidates: not counted
    x[5][0] *= 1000
    found = RowFilter([5, 9], torch.device("cpu"))
    keep = found.keep(x, candidates)
    assert (~keep).nonzero().flatten().tolist() == [0, 3, 4, 20, 21, 22, 23, 100]
    assert found.counts() == {
        "judged": 398,
        "kept": 392,
        "nonfinite": {"5": 2, "9": 1},
        "extreme_norm": {"5": 3, "9": 2},
    }
    # In bfloat16, too; without a norm filter only what is not finite goes.
    found = RowFilter([5, 9], torch.device("cpu"), None)
    keep = found.keep({point: rows.bfloat16() for point, rows in x.items()}, candidates)
    assert (~keep).nonzero().flatten().tolist() == [0, 3, 4, 100]


def test_the_median_runs():
    """A mean of the batches' medians for 100 batches, an exponential mean after; a batch of NaN does not count."""
    generator = torch.Generator().manual_seed(1)
    found = RowFilter([0], torch.device("cpu"), 2.0)
    expected = seen = 0
    for turn in range(150):
        x = torch.rand(11, 1, generator=generator) + 1 + turn / 50
        if turn == 70:
            x[:] = float("nan")
        keep = found.keep({0: x}, torch.ones(11, dtype=torch.bool))
        if turn != 70:
            seen += 1
            expected += (float(x.median()) - expected) / min(seen, 100)
            assert keep.tolist() == (x[:, 0] <= 2 * expected).tolist()
        assert float(found.medians[0]) == pytest.approx(expected, rel=1e-5)
    for wrong in (1.0, -3.0, float("nan")):
        with pytest.raises(InputError, match="more than 1"):
            RowFilter([0], torch.device("cpu"), wrong)


def test_no_refill_for_rows_that_nobody_will_ask_for():
    """What is left covers what is still to be served: another forward pass would be for nothing."""
    producer = Counting(4000)
    stream = ShuffledStream(producer, capacity=200, tokens=150)
    stream.next(10)
    made = producer.at
    assert made >= 150
    for _ in range(14):
        stream.next(10)
    assert stream.served == 150 and producer.at == made
