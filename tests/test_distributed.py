"""Joining other processes: what is refused, and one alone. What several do: tests/training/test_parallel.py."""

import pytest
import torch

from qscope import distributed
from qscope.distributed import Axis, Group
from qscope.errors import InputError

PLACE = {"RANK": "0", "WORLD_SIZE": "6", "LOCAL_RANK": "7", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def started(monkeypatch):
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)


def refused(match, device="cpu", **sizes):
    with pytest.raises(InputError, match=match), distributed.init(device, **sizes):
        pass
    assert not torch.distributed.is_initialized()


def test_without_torchrun_it_says_how_to_start(monkeypatch):
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    refused("RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set. .*torchrun --nproc-per-node N")


@pytest.mark.parametrize("sizes", [{"tp": 4}, {"dp": 2}, {"dp": 0, "tp": 6}, {"tp": 0}, {"spread": -1}, {"tp": 7}])
def test_sizes_must_make_up_the_processes(started, sizes):
    refused("a run of 6 processes", **sizes)


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_devices(started, device):
    refused("accepted are 'cpu' and 'cuda'", device)


def test_a_local_rank_without_a_gpu(started, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused("Local rank 7 has no GPU: torch sees 2", "cuda")


def test_processes_that_do_not_come(started):
    """Process 0 of 6 is alone: no one else joins within the timeout."""
    with (
        pytest.raises(distributed.GroupError, match=r"Process 0 of 6 could not join the others within 1 s"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("MASTER_PORT", "0")
        with distributed.init("cpu", timeout=1):
            pass
    assert not torch.distributed.is_initialized()


def test_an_axis_of_one_exchanges_nothing():
    axis, value = Axis(), torch.randn(3)
    for found in (axis.sum(value), axis.sum_(value), axis.broadcast(value), axis.any(value), axis.gather(value)[0]):
        assert found.data_ptr() == value.data_ptr()
    assert axis.objects({"a": 1}) == [{"a": 1}]
    axis.barrier()


def test_things_are_dealt_in_turn():
    group = Group(torch.device("cpu"), Axis(1, 3), Axis(1, 3), Axis(), Axis())
    assert [group.owner(i) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [i for i in range(7) if group.owns(i)] == [1, 4]
    assert group.leads and not group.first
