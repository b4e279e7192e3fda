"""python -m bench [--op NAME ...] [--device cpu|cuda] [--quick] [--out DIR] [--budget-s S] [--table]

Checks every provider of every case, times the right ones side by side, appends one row each to
DIR/<device>.csv and writes the table DIR/<device>.md. Exit status 1 where one of our own results was wrong.
"""

import argparse
import sys
from pathlib import Path

import torch

from qscope.report.bench_text import markdown

from . import OPS
from ._facts import device_name, slug
from ._results import read
from ._run import run
from ._summary import summary

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, help="which operators (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds per case (default: as many as fit)")
    parser.add_argument("--quick", action="store_true", help="the smallest shape only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--budget-s", type=float, help="begin no case after this many seconds")
    parser.add_argument("--table", action="store_true", help="only write the table of an existing CSV")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = options.out / f"{slug(device_name(options.device))}.csv"
    faults: list[str] = []
    if not options.table:
        done = run(
            tuple(options.op),
            options.device,
            quick=options.quick,
            rounds=options.rounds,
            budget_s=options.budget_s,
            csv=path,
            say=lambda line: print(line, flush=True),
        )
        faults = done.faults
    rows = read(path)
    if rows:
        path.with_suffix(".md").write_text(markdown(rows, summary(rows)), encoding="utf-8")
        print(path.with_suffix(".md"))
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
