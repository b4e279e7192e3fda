"""Whether a run has diverged, as its window of figures tells."""

import json
import math

import pytest
import torch

from qscope.errors import InputError
from qscope.training import StepStats
from qscope.workflows import train_log


def fed(losses, window=None):
    window = window or train_log.Window(torch.device("cpu"), 10.0)
    for step, loss in enumerate(losses, start=1):
        names = ("fvu", "l0", "aux", "dead_share", "grad_norm", "overflow", "skipped")
        rest = {name: torch.ones(()) for name in names}
        window.add(StepStats(step=step, tokens=step, lr=0.1, loss=torch.tensor(float(loss)), **rest))
    return window


@pytest.mark.parametrize("good", [1, 5, 8, 20, 60])
def test_divergence_within_the_first_line_is_noticed(good):
    """No line was written yet; the mean of the line that follows would be 100 times the losses before."""
    window = fed([1.0] * good + [200.0] * 40)
    assert window.stands() == (40, 1.0)
    window.line()
    assert fed([200.0] * 60, window).stands() == (100, 1.0)


def test_the_lowest_mean_is_that_of_eight_steps_and_not_of_one():
    low = [0.5, 0.1, 0.5, 0.1, 0.5, 0.1, 0.5, 0.1]
    window = fed([2.0] * 8 + low[:-1])
    assert float(window.best) == 2.0
    assert float(fed(low[-1:], window).best) == pytest.approx(0.3)
    window.line()
    assert fed([2.9, 3.1, 3.1], window).stands() == (2, pytest.approx(0.3))


def test_steps_that_are_not_finite_are_in_no_mean():
    window = fed([math.nan, math.inf])
    assert window.stands() == (2, math.inf)
    assert fed([3.0], window).stands() == (0, 3.0)
    assert float(fed([1.0, math.nan] * 7, window).best) == pytest.approx(10 / 8)


def test_a_restored_window_goes_on_alike():
    losses = [2.0, 1.0, 0.5, 0.25, 0.5, 1.0, math.nan, 0.75, 0.5, 9.0, 0.4, 0.3]
    whole, half = fed(losses), train_log.Window(torch.device("cpu"), 10.0)
    half.restore(fed(losses[:5]).state())
    fed(losses[5:], half)
    assert half.stands() == whole.stands() and half.line() == whole.line()
    assert all(torch.equal(half.state()[name], value) for name, value in whole.state().items())


@pytest.mark.parametrize("line", [b"{\n", b"3\n", b'{"sae": "layer0"}\n', b"\xff\n"])
def test_a_damaged_line_is_named_and_a_half_written_one_is_left_out(tmp_path, line):
    whole = json.dumps({"sae": "layer0", "step": 1} | dict.fromkeys(train_log.FIGURES, 0.5)).encode() + b"\n"
    (tmp_path / train_log.FILE).write_bytes(whole + line[:-1])
    assert [record["fvu"] for record in train_log.read(tmp_path)] == [0.5]
    (tmp_path / train_log.FILE).write_bytes(whole + line + whole)
    with pytest.raises(InputError, match=r"Line 2 of .* is damaged"):
        list(train_log.read(tmp_path))
