"""Many processes train what one does: data parallel, features sharded, both, layers spread; lost processes; resuming.

The checks are in parallel_worker.py; the processes are started once per number of them, on a CPU with gloo.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qscope import native
from qscope.training import checkpoint, parallel

WORKER = Path(__file__).with_name("parallel_worker.py")
_spec = importlib.util.spec_from_file_location("parallel_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)
ROOT = Path(__file__).parents[2]


def environment(**more):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def processes(count, *arguments):
    """Started by hand, to see how each one ends; torchrun ends the others when one does."""
    native.load()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    places = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), *map(str, arguments)], env=environment(RANK=str(rank), **places),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for rank in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def of_two(folder):
    native.load()
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*start, str(WORKER), "two", str(folder)], env=environment(), cwd=ROOT, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((folder / "two.json").read_text())


@pytest.fixture(scope="module")
def of_four(of_two, folder):
    """After the two, whose checkpoints these resume."""
    started = processes(4, "four", folder)
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4, "\n".join(said)[-3000:]
    return json.loads((folder / "four.json").read_text())


@pytest.mark.parametrize("check", worker.names_of("two"))
def test_two_processes(of_two, check):
    assert not of_two[check], "\n".join(of_two[check])


@pytest.mark.parametrize("check", worker.names_of("four"))
def test_four_processes(of_four, check):
    assert not of_four[check], "\n".join(of_four[check])


@pytest.mark.parametrize("saved", ["world2-tp2", "world4-tp2"])
def test_one_process_goes_on_from_a_checkpoint_of_several(of_four, folder, saved):
    sample, batches = worker.data("batch")
    alone = worker.trainer("batch", None, sample)
    want = worker.run(alone, batches)
    again = worker.trainer("batch")
    again.load_state_dict(checkpoint.load(checkpoint.latest(folder / saved)).trainers["sae"])
    worker.compare_logs(worker.run(again, batches[worker.HALF :]), want[worker.HALF :])
    worker.compare_states(again.state_dict(), alone.state_dict())


def lost(how, folder):
    """What process 0 says when process 1 is lost, and the seconds until it does."""
    first, second = processes(2, how, folder)
    try:
        assert second.stdout.readline() == "lost\n"
        begin = time.monotonic()
        _, said = first.communicate(timeout=60)
        waited = time.monotonic() - begin
    finally:
        second.kill()
        second.communicate(timeout=60)
    assert first.returncode == 2 and "Traceback" not in said, said
    (message,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Process 0 of 2 waited for another one" in message and "goes on from the last checkpoint" in message
    return waited


def test_a_process_that_ends_stops_the_run_and_the_checkpoint_resumes(tmp_path):
    """Noticed at once, not after the timeout of 60 s; one paragraph, exit status 2; one process goes on."""
    assert lost("end", tmp_path) < 30
    saved = checkpoint.resume(tmp_path, {})
    assert saved.step == worker.HALF
    sample, batches = worker.data("topk")
    alone, again = worker.trainer("topk", None, sample), worker.trainer("topk")
    want = worker.run(alone, batches)
    again.load_state_dict(saved.trainers["sae"])
    worker.compare_logs(worker.run(again, batches[worker.HALF :]), want[worker.HALF :])


def test_a_process_that_does_not_answer_stops_the_run_after_the_timeout(tmp_path):
    """Of 3 s."""
    assert 2 < lost("hang", tmp_path) < 30


def test_fingerprint_tells_every_bit_and_the_order_of_rows():
    value = torch.randn(5, 4)
    seen = {int(parallel.fingerprint(value))}
    other = value.clone()
    other.view(torch.int32)[3, 2] ^= 1
    seen |= {int(parallel.fingerprint(t)) for t in (other, value.flip(0), -value, value.bfloat16())}
    assert len(seen) == 5
    assert int(parallel.fingerprint(value.clone())) in seen
    for empty in (torch.zeros(0, 3), torch.tensor(0.0), torch.zeros(2, dtype=torch.bool)):
        assert int(parallel.fingerprint(empty)) == 0
