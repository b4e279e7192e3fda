"""One of two processes that train one step together; started by test_trl_sft.py."""

import sys
from pathlib import Path

import torch

from tests.post_training.test_trl_sft import change, make, terms


def main() -> None:
    folder = Path(sys.argv[1])
    # 2 processes x 2 examples x 2 micro-batches: the eight examples of one step
    trainer = make("trl", folder, terms(), batch=2, accumulate=2, ddp_backend="gloo")
    step = change(trainer)
    logged = trainer.state.log_history[0]
    if trainer.accelerator.is_main_process:
        found = {"step": step, "penalty": logged["term/penalty"], "token": logged["term/token"]}
        torch.save(found, folder / "step.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
