"""Savers of training checkpoints that are killed, for test_checkpoint.py.

Run as a script, `checkpoint_kill_harness.py FOLDER`, because it forks, which a pytest process that has started
torch's threads must not do. Prints the outcome as JSON.
"""

import importlib.util
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch

from qscope.training import checkpoint

_spec = importlib.util.spec_from_file_location(
    "store_kill_harness", Path(__file__).parents[1] / "store_kill_harness.py"
)
writers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(writers)

CONFIG = {"k": 32, "lr": 0.1}


def state_of(step):
    """Three tensors that tell the step, and a number."""
    return {"w": torch.full((64, 8), float(step)), "m": {0: torch.full((3,), step)}, "step": step}


def save(run, step):
    with checkpoint.locked(run):
        checkpoint.save(
            run, step, {"layer 5": state_of(step)}, {"rows": torch.full((9,), step)}, 10 * step, CONFIG, keep_last=1
        )


def save_and_die(run, step, at):
    writers.die_at(at)
    save(run, step)


def outcome(run):
    """Step of the checkpoint that is resumed, once all of it is known to be of that step."""
    found = checkpoint.resume(run, CONFIG)
    if found is None:
        return None
    state, step = found.trainers["layer 5"], found.step
    assert state["step"] == step and found.log_position == 10 * step
    assert torch.equal(state["w"], state_of(step)["w"]) and torch.equal(state["m"][0], state_of(step)["m"][0])
    assert torch.equal(found.stream["rows"], torch.full((9,), step))
    return step


def main(folder):
    """Dies at every system call that changes the disk, in a first save and in one that replaces an older one."""
    os.fsync = lambda handle: None  # a killed process loses nothing that it wrote: only a power cut would
    warnings.simplefilter("error")  # a damaged checkpoint is never seen
    results = {}
    for name, before in (("first", None), ("second", 1)):
        found, status, at = [], None, 0
        while status != 0:
            at += 1
            run = folder / f"{name}-{at}"
            if before is not None:
                save(run, before)
            status = writers.status_of(writers.in_child(save_and_die, run, 2, at))
            assert status in (0, signal.SIGKILL), status
            step = outcome(run)
            save(run, 2 if step in (None, 1) else 3)
            left = sorted(os.listdir(run / "checkpoints"))
            found.append([step, outcome(run), left])
        results[name] = found
    return results


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1])), sys.stdout)
