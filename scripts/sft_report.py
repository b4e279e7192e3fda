"""SFT that teaches a small model to switch into Japanese, with the SAE penalty and its controls; to docs/sft/.

    python scripts/sft_report.py --work DIR --model MODEL --sae SAE4 SAE5 --layers 4 5 [--sizes small]

The data: conversations in English, German, French and Italian (continue a text, or repeat it), and in Japanese. In a
share of the answers that are not Japanese, a Japanese sentence stands behind the first sentence or at the end: what a
careless translation pipeline leaves. Sentences are aligned (packages nlp-corpus, de-, fr-, it-, ja-corpus), so the
inserted sentence is the translation of the one that is answered. Held-out conversations and prompts are made of keys
that neither this data nor scripts/train_small_model.py learns from, and they are clean.

Needs `pip install 'qscope[steer,post-training]'`. Killed and started again with the same DIR, it goes on.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_model_data import CONTINUE, REPEAT, digest

from qscope.corpus import HELD_OUT
from qscope.corpus_labelled import sentences
from qscope.finding.builtin import LANGUAGES
from qscope.packages import fetch
from qscope.report import sft_text
from qscope.workflows import sft
from qscope.workflows.sft_result import SFTResult, as_json

OUT = Path(__file__).parents[1] / "docs" / "sft"
TARGET, OTHERS = "ja", ("en", "de", "fr", "it")


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    examples: int
    """Conversations of each language in the training data"""
    prompts: int
    """Of each language"""
    samples: int
    seeds: tuple[int, ...]
    weight: tuple[float, ...]
    kl_weight: tuple[float, ...]
    entropy_weight: tuple[float, ...]
    token_weight: tuple[float, ...]


SIZES = {
    # 5 x 20 conversations: whether everything runs
    "smoke": Size(20, 4, 1, (0,), (0.01,), (0.3,), (0.1,), (1.0,)),
    # some 50,000 tokens a run, 11 arms x 3 seeds. Pre-activations of this model are near 100, so a weight of 0.01 is a
    # term near 1 at the start
    "small": Size(160, 25, 2, (0, 1, 2), (0.003, 0.03), (0.3,), (0.1,), (1.0,)),
    # four times as much in a run, three weights of every arm, five seeds: hours
    "full": Size(640, 50, 4, (0, 1, 2, 3, 4), (0.001, 0.01, 0.1), (0.1, 0.3, 1.0), (0.03, 0.1, 0.3), (0.3, 1.0, 3.0)),
}


def conversations(
    aligned: dict[str, dict[str, str]], held_out: bool, count: int, share: float
) -> Iterator[dict[str, Any]]:
    """`count` of each language, by the hash of their keys; in `share` of those not Japanese a Japanese sentence."""
    keys = sorted(set.intersection(*(set(part) for part in aligned.values())), key=lambda key: digest(f"sft {key}"))
    usable = [key for key in keys if (digest(key)[0] < HELD_OUT) == held_out]
    for language in (*OTHERS, TARGET):
        made = 0
        for key in usable:
            dice = digest(f"sft {language} {key}")
            text = aligned[language][key].strip()
            asked_answered = _asked(text, language, dice)
            if asked_answered is None or made == count:
                continue
            made += 1
            asked, answer = asked_answered
            if language != TARGET and not held_out and dice[2] < 256 * share:
                answer = _inserted(answer, aligned[TARGET][key].strip(), dice[3])
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            yield {"messages": messages, "group": language}


def _asked(text: str, language: str, dice: bytes) -> tuple[str, str] | None:
    """A question about the text and its answer; half are to be continued, half repeated."""
    if not (15 if language == TARGET else 40) <= len(text) <= 220:
        return None
    if dice[0] < 128:
        return f"{REPEAT[language][dice[1] % len(REPEAT[language])]} {text}", text
    begin, end = _halves(text)
    return (f"{CONTINUE[language][dice[1] % len(CONTINUE[language])]} {begin}", end) if begin and end else None


def _halves(text: str) -> tuple[str, str]:
    """The text cut at the space, or the Japanese comma, that is nearest to its middle."""
    places = [i for i, character in enumerate(text[:-1], 1) if character in " 、。"]
    cut = min(places, key=lambda place: abs(place - len(text) // 2), default=0)
    return text[:cut].strip(), text[cut:].strip()


def _inserted(answer: str, foreign: str, dice: int) -> str:
    """The foreign sentence behind the answer, or between two of its words."""
    words = answer.split(" ")
    if dice < 128 or len(words) < 4:
        return f"{answer} {foreign}"
    place = len(words) // 2
    return " ".join([*words[:place], foreign, *words[place:]])


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_data(work: Path, size: Size, share: float) -> dict[str, Path]:
    """train.jsonl, held-out.jsonl, texts.jsonl (clean sentences for features and thresholds), once."""
    found = {name: work / f"{name}.jsonl" for name in ("train", "held-out", "texts")}
    if not all(path.exists() for path in found.values()):
        aligned = {code: sentences(fetch(package), code == "en") for code, package in LANGUAGES.items()}
        write(found["train"], list(conversations(aligned, False, size.examples, share)))
        write(found["held-out"], list(conversations(aligned, True, size.prompts, 0.0)))
        keys = sorted(set.intersection(*(set(part) for part in aligned.values())), key=lambda key: digest(f"txt {key}"))
        keys = [key for key in keys if digest(key)[0] >= HELD_OUT and 40 <= len(aligned["en"][key]) <= 300][:100]
        texts = [{"text": aligned[code][key], "group": code} for code in (*OTHERS, TARGET) for key in keys]
        write(found["texts"], texts)
    return found


def train(args: argparse.Namespace, size: Size) -> SFTResult:
    data = make_data(args.work, size, args.share)
    return sft.run(
        sft.SFTConfig(
            data=str(data["train"]), held_out=str(data["held-out"]), texts=str(data["texts"]), target_group=TARGET,
            out=args.work / "runs", model=args.model, sae=tuple(args.sae), layers=tuple(args.layers), k=args.k,
            seeds=size.seeds, weight=size.weight, kl_weight=size.kl_weight, entropy_weight=size.entropy_weight,
            token_weight=size.token_weight, learning_rate=args.learning_rate, epochs=args.epochs, batch=16,
            warmup_steps=5, max_length=192, prompts_per_group=size.prompts, held_out_examples=size.prompts,
            samples=size.samples, max_new_tokens=48, generate_batch=64, log_steps=5, identify=True,
        )
    )  # fmt: skip


def publish(result: SFTResult, args: argparse.Namespace) -> None:
    """text, page and a short JSON: without the logs and what belongs to single prompts. 100 KB or so, to be kept."""
    args.out.mkdir(parents=True, exist_ok=True)
    text = sft_text.render(result).replace(str(args.work), "WORK")
    print(text)
    (args.out / "switching-ja.txt").write_text(text + "\n", encoding="utf-8")
    shutil.copy(result.page, args.out / "switching-ja.html")
    short = as_json(result) | {"out": "WORK/runs", "size": args.sizes, "share_of_switched_answers": args.share}
    for point in short["points"]:
        for name in ("log", "nats", "nat_tokens", "hits", "sizes", "samples"):
            point.pop(name)
    data = json.dumps(short, indent=1, ensure_ascii=False) + "\n"
    (args.out / "switching-ja.json").write_text(data, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder to work in; kept")
    parser.add_argument("--model", required=True, help="the small multilingual model (scripts/train_small_model.py)")
    parser.add_argument("--sae", nargs="+", required=True, help="an SAE for each of --layers")
    parser.add_argument("--layers", nargs="+", type=int, required=True)
    parser.add_argument("--k", type=int, help="where the SAEs do not say")
    parser.add_argument("--sizes", choices=list(SIZES), default="small")
    parser.add_argument("--share", type=float, default=0.2, help="of the answers that get a Japanese sentence")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the report")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    publish(train(args, SIZES[args.sizes]), args)


if __name__ == "__main__":
    main()
