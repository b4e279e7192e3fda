"""Reinforcement learning against endless repetition on a small real model, with all controls; written to docs/rl/.

    python scripts/rl_report.py --work DIR --model MODEL --sae SAE --layers 3 [--sizes standard]

Prompts are the beginnings of sentences in five languages, or of the texts of --texts; measured is on others. Arms and
seeds that are done are not run again, so it may be stopped, and started with more seeds. `quick` takes about 15 minutes
on two cores with a model of 7 to 15 million parameters, `standard` an hour; `tiny` only shows that it runs. Needs
`pip install 'qscope[post-training]'`.
"""

import argparse
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from qscope.finding import builtin
from qscope.report import rl_text
from qscope.workflows import rl
from qscope.workflows.steer_eval_inputs import read_texts

OUT = Path(__file__).parents[1] / "docs" / "rl"
ARMS: tuple[rl.Arm, ...] = ("vanilla", "sae", "random", "any", "loop", "overlong", "kl")


@dataclass(frozen=True)
class Sizes:
    steps: int
    seeds: tuple[int, ...]
    train: int
    """Training prompts"""
    held_out: int
    max_new_tokens: int
    group: int = 8
    prompts_per_step: int = 2


SIZES = {
    "tiny": Sizes(2, (0,), 16, 16, 64, group=4),
    "quick": Sizes(10, (0, 1, 2), 256, 96, 96, group=6),
    "standard": Sizes(40, (0, 1, 2), 512, 256, 128),
}


def beginning(text: str, words: int) -> str:
    """The first words; of text without spaces, as many characters times three."""
    parts = text.split()
    return " ".join(parts[:words]) if len(parts) > words else text[: 3 * words]


def texts(path: str | None, count: int) -> list[str]:
    """Different texts in an order that does not change: of a file, else sentences in five languages in turn."""
    if path is not None:
        found = list(dict.fromkeys(read_texts(path, "text", "--texts")))
    else:
        both = builtin.generate("language:en", count, 0)
        groups: dict[str, list[str]] = {}
        for item in (*both.positive, *both.negative):
            groups.setdefault(item.group, []).append(item.text)
        found = [text for row in zip(*groups.values(), strict=False) for text in row]
    random.Random(0).shuffle(found)
    return found


def write_inputs(work: Path, path: str | None, sizes: Sizes, words: int) -> None:
    """train.txt, held-out.txt and text.txt; no prompt twice, no text that a prompt begins."""
    found = texts(path, sizes.train + sizes.held_out + 400)
    held_texts, rest = found[:128], found[128:]
    prompts = list(dict.fromkeys(beginning(text, words) for text in rest))
    parts = {
        "text.txt": [" ".join(text.split()) for text in held_texts],
        "held-out.txt": prompts[: sizes.held_out],
        "train.txt": prompts[sizes.held_out : sizes.held_out + sizes.train],
    }
    work.mkdir(parents=True, exist_ok=True)
    for name, lines in parts.items():
        (work / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for inputs, journal and page")
    parser.add_argument("--out", type=Path, default=OUT, help="where page, table and result are put")
    parser.add_argument("--model", required=True)
    parser.add_argument("--sae", nargs="+", required=True)
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--features", type=int, nargs="*", default=[], help="where they are known; default: mined")
    parser.add_argument("--texts", help="file of texts, instead of sentences in five languages")
    parser.add_argument("--sizes", choices=SIZES, default="quick")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--words", type=int, default=5, help="of a text that make a prompt")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--chat", action="store_true")
    options = parser.parse_args()
    sizes = SIZES[options.sizes]
    write_inputs(options.work, options.texts, sizes, options.words)
    result = rl.run(
        rl.RLConfig(
            prompts=str(options.work / "train.txt"),
            held_out=str(options.work / "held-out.txt"),
            text=str(options.work / "text.txt"),
            out=options.work / "rl",
            model=options.model,
            sae=tuple(options.sae),
            layers=tuple(options.layers),
            features=tuple(options.features),
            arms=tuple(options.arms),
            seeds=tuple(options.seeds or sizes.seeds),
            steps=sizes.steps,
            group=sizes.group,
            prompts_per_step=sizes.prompts_per_step,
            max_new_tokens=sizes.max_new_tokens,
            prompt_tokens=64,
            temperature=options.temperature,
            mine_temperatures=(options.temperature, 0.4, 0.2, 0.0),
            learning_rate=options.learning_rate,
            copy_tokens=12,
            text_tokens=64,
            chat=options.chat,
        )
    )
    text = rl_text.render(result)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = [line for line in text.splitlines() if not line.startswith("wrote ")]
    (options.out / "table.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")
    for name in ("report.html", "result.json"):
        shutil.copy(options.work / "rl" / name, options.out / name)


if __name__ == "__main__":
    main()
