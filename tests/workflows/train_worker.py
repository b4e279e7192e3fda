"""One of several processes that torchrun starts for test_train_many.py: `train_worker.py RUNS OUTCOMES`.

RUNS: JSON, a list of [command line of qscope, step at which process 1 gets a SIGINT or null, port]. OUTCOMES.RANK:
JSON, for each of them the exit status and what was printed to standard output and standard error.
"""

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    # Operators import torch._dynamo at their first call, to tell it not to trace them: longer than all runs take.
    torch._disable_dynamo = lambda function=None, recursive=True: function or (lambda inner: inner)

from qscope.cli import dispatch
from qscope.workflows import train_job, train_log


class Interrupted(train_log.Window):
    at = None

    def add(self, stats):
        super().add(stats)
        if stats.step == self.at and os.environ["RANK"] == "1":
            Interrupted.at = None  # a second signal would stop this process at once
            signal.raise_signal(signal.SIGINT)


def outcome(command, interrupted_at, port):
    # torchrun's own store keeps the addresses of the run before
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    out, err = io.StringIO(), io.StringIO()
    train_job.Window = train_log.Window if interrupted_at is None else Interrupted
    Interrupted.at = interrupted_at
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = dispatch(command)
        except SystemExit as error:
            status = error.code
    if torch.distributed.is_initialized():  # a process that is interrupted ends without it
        torch.distributed.destroy_process_group()
    return status, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    torch.set_num_threads(1)
    outcomes = [outcome(*run) for run in json.loads(Path(sys.argv[1]).read_text())]
    Path(f"{sys.argv[2]}.{os.environ['RANK']}").write_text(json.dumps(outcomes))
