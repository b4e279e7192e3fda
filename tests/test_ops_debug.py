"""QSCOPE_DEBUG=1 looks at indices on a GPU. A stand-in tensor shows it where there is no GPU."""

import pytest
import torch

from qscope.ops._common import check_index_range


class OnGpu:
    """What check_index_range asks of a tensor, with is_cuda set."""

    is_cuda = True

    def __init__(self, *ids: int):
        ids = torch.tensor(ids, dtype=torch.int32)
        self.numel, self.min, self.max = ids.numel, ids.min, ids.max


@pytest.mark.parametrize(("ids", "wrong"), [((0, 4), False), ((), False), ((0, 5), True), ((-1, 3), True)])
def test_indices_are_looked_at_only_when_asked(monkeypatch, ids, wrong):
    for off in (None, "0", ""):
        monkeypatch.delenv("QSCOPE_DEBUG", raising=False) if off is None else monkeypatch.setenv("QSCOPE_DEBUG", off)
        check_index_range("op", "ids", OnGpu(*ids), 5)
    monkeypatch.setenv("QSCOPE_DEBUG", "1")
    if not wrong:
        return check_index_range("op", "ids", OnGpu(*ids), 5)
    with pytest.raises(IndexError, match=rf"op: ids holds {ids[0]}\.\.{ids[1]}; accepted is 0\.\.4"):
        check_index_range("op", "ids", OnGpu(*ids), 5)
