"""python bench/bench_classify.py: what deciding text by a rule adds to the model's own forward pass.

Contestants, each over the same texts in the same batches, turn about: the model alone to the rule's deepest layer; with
the exported rule behind it (`qscope.RuleModule`, a row of the encoder per feature); with everything that `qscope
classify predict` does (decisions, evidence, JSON) on pre-activations; and the same on TopK membership, which encodes
with the whole SAE. The rule names features that fire in the texts, thresholds at their medians: what it finds does not
matter here. Checked first: the exported rule decides every text as predict does. Files:
bench/results/classify-<device>.json and .md. Exit status 1 where a check failed, or where the exported rule cost more
than 10 % of the model's time.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from qscope.classification import FeatureRule
    from qscope.workflows.classify_rules import Classifier
    from qscope.workflows.text_features import TokenTexts

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
BAR = 1.10
_KEY = ("model", "dtype", "layers", "features", "threads", "clock", "provider")


def main(arguments: list[str] | None = None) -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # spares an install; the imports below need it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, nargs="+", default=[15])
    parser.add_argument("--features", type=int, nargs="+", default=[1, 10], help="of a rule, in all")
    parser.add_argument("--tokens", type=int, default=2048, help="of the texts")
    parser.add_argument("--context-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=50.0, help="in all; at least three rounds of each are run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of one thread on a busy CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the result files")
    options = parser.parse_args(arguments)
    if not importlib.util.find_spec("transformers"):
        print("not measured: transformers is not installed")  # a machine for kernels alone may lack it
        return 0
    from bench._facts import common_facts, device_name, slug

    torch.set_num_threads(options.threads)
    facts, rows, faults = common_facts(options.device), [], []
    scene = Scene(options)
    for count in options.features:
        found, problems = scene.measure(count, options.seconds / len(options.features), options.rounds)
        rows += [facts | row for row in found]
        faults += problems
    path = options.out / f"classify-{slug(device_name(options.device))}.json"
    keep(path, rows)
    page = path.with_suffix(".md")
    page.write_text(markdown(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    print(page.read_text(encoding="utf-8"))
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0


class Scene:
    """The embedded model and SAEs, real text, and rules of different sizes."""

    def __init__(self, options: argparse.Namespace) -> None:
        from qscope import embedded
        from qscope.workflows.encode import EncodeConfig
        from qscope.workflows.encoder import load_encoder
        from qscope.workflows.text_features import tokenize_texts

        self.layers = tuple(sorted(options.layers))
        self.context_size, self.threads, self.clock = options.context_size, options.threads, options.clock
        self.encoder = load_encoder(
            EncodeConfig(text=(), layers=self.layers, context_size=options.context_size, device=options.device)
        )
        demo = embedded.demo_text(Path(embedded.cache_dir()) / "bench-classify-text.jsonl")
        texts, size = [], 0
        with open(demo, encoding="utf-8") as lines:
            for line in lines:
                texts.append(json.loads(line)["text"][:2000])
                size += min(options.context_size, len(texts[-1]) // 4)
                if size > options.tokens:
                    break
        self.texts: TokenTexts = tokenize_texts(self.encoder.tokenizer, texts, options.context_size)

    def rule(self, count: int, membership: Any) -> "FeatureRule":
        """Features that fire in the texts, as evenly among the layers as may be; thresholds are medians."""
        from qscope import embedded
        from qscope.classification import FeatureRule
        from qscope.classification.rule import Clause, RuleSAE, Source
        from qscope.workflows.classify_read import read_block

        encoder, clauses = self.encoder, []
        for place, layer in enumerate(self.layers):
            sae = encoder.saes[layer]
            every = {layer: list(range(sae.d_sae))}
            codes = read_block(encoder, every, self.texts.rows(range(min(8, len(self.texts)))), "topk", {}).codes[layer]
            often = codes.features[torch.from_numpy(codes.column).bincount().argsort(descending=True, stable=True)]
            share = len(range(place, count, len(self.layers)))
            for feature in often[:share].tolist():
                mine = codes.largest[codes.features[codes.column] == feature]
                clauses.append(Clause(layer, int(feature), float(statistics.median(mine.tolist()))))
        saes = tuple(RuleSAE(n, s.weight_hash(), s.d_sae, s.k, embedded.SAES) for n, s in encoder.saes.items())
        source = Source(
            embedded.DEFAULT_MODEL_NAME, encoder.model_sha256, encoder.tokenizer_sha256, saes, self.context_size,
            dtype=encoder.dtype,
        )  # fmt: skip
        return FeatureRule(tuple(clauses), membership=membership, classes=("yes", "no"), source=source)

    def measure(self, count: int, seconds: float, rounds: int) -> tuple[list[Row], list[str]]:
        from qscope.classification import RuleModule
        from qscope.workflows.classify_rules import Classifier
        from qscope.workflows.classify_serve_check import serving

        fast = Classifier(self.rule(count, "preact"), self.encoder)
        exact = Classifier(self.rule(count, "topk"), self.encoder)
        module = RuleModule.from_saes(fast.rule, self.encoder.saes, check=False)
        alone, served, decided = serving(fast, module, self.texts)
        contestants: dict[str, Callable[[], object]] = {
            "model alone": alone,
            "exported rule": served,
            "model alone, once more": alone,
            "predict, preact": lambda: said(fast, self.texts),
            "predict, topk": lambda: said(exact, self.texts),
        }
        clock = time.thread_time if self.clock == "cpu" else time.perf_counter
        times = turn_about(contestants, seconds, rounds, clock)
        expected = [row["positive"] for row in fast.rows(fast.read(self.texts))]
        wrong = sum(bool(a) != b for a, b in zip(decided.tolist(), expected, strict=True))
        faults = [f"the exported rule decides {wrong} of {len(expected)} texts otherwise than predict"] if wrong else []
        tokens, rows = int(self.texts.lengths.sum()), []
        for name, taken in times.items():
            pairs = [mine / model for mine, model in zip(taken, times["model alone"], strict=True)]
            rows.append(
                {
                    "model": self.encoder.model_name, "dtype": self.encoder.dtype, "layers": list(self.layers),
                    "features": count, "threads": self.threads, "clock": self.clock, "provider": name,
                    "texts": len(self.texts),
                    "tokens": tokens, "tokens_per_second": tokens / statistics.median(taken),
                    "ratio": statistics.median(pairs), "ratio_low": min(pairs), "ratio_high": max(pairs),
                    "rounds": len(taken), "correct": not wrong,
                }
            )  # fmt: skip
            if name == "exported rule" and rows[-1]["ratio"] > BAR:
                faults.append(
                    f"the exported rule of {count} features takes {rows[-1]['ratio']:.3f} of the model's time"
                )
        return rows, faults


def said(classifier: "Classifier", texts: "TokenTexts") -> str:
    """Everything that predict does with a block of texts."""
    return json.dumps(classifier.rows(classifier.read(texts)))


def turn_about(
    contestants: dict[str, Callable[[], object]],
    seconds: float,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each, round by round, after one call that is not measured; the order turns with every round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for work in contestants.values():
        work()
    began = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - began > seconds * number / (number + 1):
            break
        names = list(contestants)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            contestants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    return times


def keep(path: Path, rows: list[Row]) -> None:
    """Rows of earlier runs stay, but those that were measured again."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    fresh = {key(row) for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([r for r in before if key(r) not in fresh] + rows, indent=1) + "\n", encoding="utf-8")


def key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in _KEY)


def markdown(rows: list[Row]) -> str:
    """The page of a result file."""
    lines = [
        "# Deciding text by a rule, beside the model's own forward pass",
        "",
        f"{rows[0]['device']}, torch {rows[0]['torch']}. Time / time of the model alone to the rule's deepest layer,"
        " the median over rounds with the least and the most; bar for the exported rule: 1.10. `predict` also makes",
        "evidence and JSON. The model alone, once more, against itself: what its ratio differs from 1 is noise.",
        "",
        "| contestant | features | layers | time / model alone | tokens per second | rounds | same decisions |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
        lines.append(
            f"| {row['provider']} | {row['features']} | {' '.join(map(str, row['layers']))} | {ratio} | "
            f"{row['tokens_per_second']:,.0f} | {row['rounds']} | {'yes' if row['correct'] else 'NO'} |"
        )
    facts = (
        f"{rows[0]['threads']} threads, {rows[0]['clock']} time, {rows[0]['dtype']}, commit {rows[0]['commit'][:12]}"
    )
    changed = " with changes" if rows[0]["uncommitted"] == "yes" else ""
    return "\n".join([*lines, "", f"{facts}{changed}."]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
