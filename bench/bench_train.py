"""python bench/bench_train.py: whole training runs of qscope and its peers on the same activations.

Tokens/s, peak memory, and how good the SAE is after the same tokens: on a planted dictionary, whose features are
known, and on residuals of the embedded model. `--sweep` finds every trainer's learning rate (not timed; any machine
load will do) and keeps the figures; without it the trainers are measured, each at its best rate of the last sweep.
Files: bench/results/train-<device>.json, .csv and .md. Exit status 1 where one of our own trainers failed.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from bench._train_run import Setting

ROOT = Path(__file__).resolve().parents[1]
FACTORS = (1.0, 3.0, 10.0, 25.0)


def settings(names: list[str], device: str, quick: bool) -> "list[Setting]":
    """The data sets and shapes; `quick` is for a test of seconds."""
    from bench._train_data import LAYER, PlantedSpec, residuals
    from bench._train_run import Setting

    cuda, found = device.startswith("cuda"), []
    if "planted" in names:
        spec = PlantedSpec(4096, 32768, 100) if cuda else PlantedSpec()
        shape = (4096, 65536, 100, 8192, 400 * 8192) if cuda else (128, 1024, 8, 1024, 200 * 1024)
        if quick:
            spec, shape = PlantedSpec(32, 64, 3), (32, 128, 3, 256, 200 * 256)
        found.append(Setting("planted", "planted", *shape, blocks=10, held_out=8192, planted=spec))
    if "residuals" in names:
        path = str(residuals(2560, 1024, device) if quick else residuals(160 * 1024, 16384, device))
        sizes = (1024, 32, 256, 2560) if quick else (16384 if cuda else 4096, 32, 1024, (160 if cuda else 64) * 1024)
        name = f"SmolLM2-135M residuals, block {LAYER}"
        found.append(Setting(name, path, 576, *sizes, blocks=5 if quick else 8, held_out=1024 if quick else 16384))
    return found


def main(arguments: list[str] | None = None) -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # spares an install; the imports below need it
    from bench import _train_run as runs
    from bench._facts import device_name, slug
    from bench._train_table import markdown

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", nargs="+", choices=("planted", "residuals"), default=["planted", "residuals"])
    parser.add_argument("--trainers", nargs="+", choices=runs.ALL, default=list(runs.ALL))
    parser.add_argument("--seeds", type=int, default=3, help="of the planted case; the residuals are run once")
    parser.add_argument("--sweep", action="store_true", help="find the learning rates instead of measuring")
    parser.add_argument("--lr-factors", nargs="+", type=float, default=list(FACTORS), help="what --sweep tries")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of every trainer")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the result files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = runs.Results(options.out / f"train-{slug(device_name(options.device))}.json")
    faults = []
    for setting in settings(options.data, options.device, options.quick):
        common = (options.device, options.threads, lambda text: print(text, flush=True))
        if options.sweep:
            rows = runs.sweep(setting, options.trainers, options.lr_factors, *common)
        else:
            rates, rows = runs.best_rates(results.rows, setting), []
            for seed in range(options.seeds if setting.data == "planted" else 1):
                rows += runs.measure(setting, options.trainers, rates, seed, *common)
                results.replace(rows)  # a run that is stopped keeps what it has
        results.replace(rows)
        faults += runs.faults(rows)
    page = results.path.with_suffix(".md")
    page.write_text(markdown(results.rows), encoding="utf-8")
    print(page)
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
