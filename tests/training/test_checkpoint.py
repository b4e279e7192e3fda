"""Training checkpoints: what was saved comes back to the bit; damage, kills and full disks lose nothing."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from qscope.errors import CheckpointError, StorageError, StoreError
from qscope.training import checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = {"layers": [5, 9], "recipe": {"k": 32, "lr": 2e-4}, "seed": 0}
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}


def save(run, step, **options):
    trainers = {"layer 5": {"w": torch.full((50, 7), float(step))}, "layer 9": {"w": torch.full((3,), -step)}}
    return checkpoint.save(run, step, trainers, {"at": step}, 100 * step, CONFIG, **options)


def steps(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(a, b):
    """Equal in type, structure and bits."""
    assert type(a) is type(b), (a, b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        bits = [[bytes(item.reshape(1).view(torch.uint8).tolist()) for item in x.clone().flatten()] for x in (a, b)]
        assert bits[0] == bits[1]
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, float):
        assert a.hex() == b.hex()
    else:
        assert a == b


def test_a_state_comes_back_to_the_bit(tmp_path):
    wild = torch.tensor([math.nan, -math.inf, -0.0, 1e-45, 3.4e38])
    state = {
        "weights": torch.randn(5, 6).T,  # not contiguous
        "adam": {0: {"step": torch.tensor(7.0)}, 1: {"step": torch.tensor(8, dtype=torch.int64)}},
        "kinds": [wild.to(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)],
        "whole": tuple(torch.arange(3, dtype=d) for d in (torch.int64, torch.int32, torch.uint8, torch.int8)),
        "mask": torch.tensor([True, False]),
        "empty": [torch.zeros(0, 4), torch.from_numpy(np.zeros(5)[5:].copy())],
        "one": torch.arange(6.0)[1::5],  # of six, with their stride
        "numbers": [1, -(2**70), 0.1, -0.0, math.inf, -math.inf, math.nan, True, None, "naïve\n"],
        "nothing": {},
    }
    shared = torch.arange(4.0)
    path = checkpoint.save(tmp_path, 3, {"a": state, "b/../c": [shared, shared[1:]]}, state, 12345, CONFIG, metric=0.25)
    found = checkpoint.load(path, CONFIG)
    same(found.trainers, {"a": state, "b/../c": [shared, shared[1:]]})
    same(found.stream, state)
    assert (found.step, found.log_position, found.config, found.metric) == (3, 12345, CONFIG, 0.25)
    assert checkpoint.latest(tmp_path) == path


def test_the_global_generator_goes_on_where_it_was(tmp_path):
    torch.manual_seed(5)
    torch.rand(3)
    path = save(tmp_path, 1)
    expected = torch.rand(4)
    torch.manual_seed(6)
    checkpoint.load(path).restore_rng()
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [object()]}, r"object at state\.a\.0"),
        ({"a": {(1, 2): 3}}, r"dict at state\.a"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path, value, message):
    save(tmp_path, 1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, 2, {"a": value}, {}, 0, CONFIG)
    assert contents(tmp_path) == before


def test_nothing_saved_is_no_checkpoint(tmp_path):
    assert checkpoint.resume(tmp_path, CONFIG) is None
    assert checkpoint.latest(tmp_path) is None and checkpoint.best(tmp_path) is None


# --- which are kept --------------------------------------------------------------------------------------


def test_the_last_n_and_the_best_are_kept(tmp_path):
    for step, metric in enumerate([0.9, 0.3, math.nan, 0.5, 0.4, None], 1):
        save(tmp_path, step, metric=metric, keep_last=2, keep_best=True)
    assert steps(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    assert checkpoint.best(tmp_path).name == "step-00000002"
    save(tmp_path, 7, metric=0.2, keep_last=1, keep_best=True)
    assert steps(tmp_path) == ["step-00000007"]
    save(tmp_path, 123456789, keep_last=3)
    assert steps(tmp_path) == ["step-00000007", "step-123456789"]
    assert checkpoint.latest(tmp_path).name == "step-123456789"


def test_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = checkpoint.save(tmp_path, 2, {"new": torch.ones(1)}, {}, 0, CONFIG)
    assert steps(tmp_path) == ["step-00000001", path.name] and path.name == "step-00000002-1"
    assert list(checkpoint.resume(tmp_path, CONFIG).trainers) == ["new"]


# --- damage ----------------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", ["trainer-0", "trainer-1", "stream", "rng", "checkpoint"])
def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(tmp_path, file, how):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    DAMAGE[how](newest / f"{file}.{'json' if file == 'checkpoint' else 'safetensors'}")
    with pytest.warns(UserWarning, match=rf"damaged checkpoint is passed over.*step-00000002.*{file}") as caught:
        found = checkpoint.resume(tmp_path, CONFIG)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert found.step == 1 and found.trainers["layer 5"]["w"][0, 0] == 1
    with pytest.warns(UserWarning):
        assert checkpoint.latest(tmp_path).name == "step-00000001"
    with pytest.raises(CheckpointError):
        checkpoint.load(newest)
    # The run goes on: the damaged one never counts as one of the last two, and goes.
    save(tmp_path, 2)
    assert steps(tmp_path) == ["step-00000001", "step-00000002-1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.resume(tmp_path, CONFIG).step == 2


def test_a_damaged_later_step_is_removed_by_the_next_save(tmp_path):
    save(tmp_path, 1)
    flip(save(tmp_path, 5) / "stream.safetensors")
    save(tmp_path, 3)
    assert steps(tmp_path) == ["step-00000001", "step-00000003"]


def test_all_damaged_is_an_error(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, step) / "trainer-0.safetensors")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=r"2 checkpoints .* all of them are damaged"):
        checkpoint.resume(tmp_path, CONFIG)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    path = save(tmp_path, 1)
    content = json.loads((path / "checkpoint.json").read_bytes())
    content.pop("sha256")
    content["files"]["../../secret"] = {"bytes": 1, "sha256": "0" * 64}
    (path / "checkpoint.json").write_bytes(checkpoint._sealed(content))
    with pytest.raises(CheckpointError, match="which no checkpoint has"):
        checkpoint.load(path)


def test_a_newer_format_is_refused(tmp_path):
    path = save(tmp_path, 1)
    content = json.loads((path / "checkpoint.json").read_bytes())
    content.pop("sha256")
    (path / "checkpoint.json").write_bytes(checkpoint._sealed({**content, "version": 2}))
    with pytest.raises(CheckpointError, match="format 2; this qscope reads up to 1"):
        checkpoint.load(path)


# --- other runs ------------------------------------------------------------------------------------------


def test_another_config_is_refused_naming_the_fields(tmp_path):
    path = save(tmp_path, 4)
    before = contents(tmp_path)
    other = {"layers": [5, 7], "recipe": {"k": 64, "lr": 2e-4}, "seed": 0, "new": 1}
    fields = r"layers\[1\]: 9 -> 7; recipe\.k: 32 -> 64; new: absent -> 1\."
    for use in (
        lambda: checkpoint.load(path, other),
        lambda: checkpoint.resume(tmp_path, other),
        lambda: checkpoint.save(tmp_path, 5, {}, {}, 0, other),
    ):
        with pytest.raises(CheckpointError, match=fields):
            use()
    assert contents(tmp_path) == before


def test_a_run_that_did_not_resume_cannot_prune_a_later_checkpoint(tmp_path):
    save(tmp_path, 4)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="already holds a checkpoint of step 4, and one of step 1"):
        save(tmp_path, 1)
    assert contents(tmp_path) == before


HOLD = """
import sys, time
from qscope.training import checkpoint
with checkpoint.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_at_once_are_refused_and_a_killed_one_frees_the_folder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], env=ENV, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    start = time.monotonic()
    with pytest.raises(StoreError, match="is being written by another process"), checkpoint.locked(tmp_path):
        pass
    assert time.monotonic() - start < 5
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with checkpoint.locked(tmp_path) as folder:
        assert folder == tmp_path


# --- killed and starved ----------------------------------------------------------------------------------


def test_death_at_every_system_call_leaves_a_loadable_checkpoint(tmp_path):
    script = Path(__file__).with_name("checkpoint_kill_harness.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=ENV, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout).items():
        assert len(found) > 30
        seen = [step for step, _, _ in found]
        before = None if name == "first" else 1
        turn = seen.index(2)
        assert seen == [before] * turn + [2] * (len(seen) - turn), "the old one, then, from one call on, the new one"
        assert 20 < turn < len(seen) - (name == "second")
        for step, after, left in found:
            assert after == (2 if step == before else 3)
            assert left == [f"step-0000000{after}"], "no litter, and keep_last=1 is obeyed"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", [1, 2, 4, 7, 8])
def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch, number, call):
    save(tmp_path, 1)
    before = contents(tmp_path)
    write, count = os.write, [0]

    def full(handle, data):
        count[0] += 1
        if count[0] == call:
            write(handle, bytes(data)[: len(data) // 2])
            raise OSError(number, os.strerror(number))
        return write(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match="could not be written"):
            save(tmp_path, 2, keep_last=1)
    assert count[0] >= call and contents(tmp_path) == before
    save(tmp_path, 2, keep_last=1)
    assert steps(tmp_path) == ["step-00000002"]


def test_too_little_room_is_refused_before_anything_is_touched(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = contents(tmp_path)
    usage = checkpoint.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
        patch.setattr(checkpoint, "tensor_parts", None)  # nothing may even be prepared
        with pytest.raises(StorageError, match=r"step 2 takes 1,0[\d,]+ bytes, and 1,048,576 are free.*not touched"):
            save(tmp_path, 2, keep_last=1)
    assert contents(tmp_path) == before and steps(tmp_path) == ["step-00000001"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system; other tests stand in for a full disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    state = {"w": torch.arange(650_000.0)}  # 2.6 MB

    def write(step):
        checkpoint.save(small_disk, step, {"a": {**state, "step": step}}, {}, 0, CONFIG, keep_last=3)

    write(1)
    write(2)
    before = contents(small_disk)
    with pytest.raises(StorageError, match="The checkpoint of step 3 takes"):
        write(3)
    assert contents(small_disk) == before
    # Somebody else fills the disk between the check and the write.
    real = checkpoint.shutil.disk_usage(small_disk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda path: real._replace(free=1 << 40))
        with pytest.raises(StorageError, match="the disk is full"):
            write(3)
    assert contents(small_disk) == before
    assert checkpoint.resume(small_disk, CONFIG).trainers["a"]["step"] == 2
