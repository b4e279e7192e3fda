"""Steering the embedded model towards three behaviours, measured beside what needs no SAE; written to docs/steering/.

    python scripts/steering_report.py --work DIR [--only french]

For each behaviour: features are found on training texts (`qscope steer find`, the layer too), the spec is run on
prompts that are in none of them (`qscope steer eval`), with difference of means, PCA and probe fitted on the same
training texts. Needs `pip install 'qscope[demo,steer]'`. Killed and started again with the same DIR, it goes on.
About half an hour on two cores.
"""

import argparse
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from qscope.report import steer_eval_page, steer_eval_text, steer_find_page
from qscope.steering import SteeringSpec
from qscope.workflows import steer_eval, steer_find
from qscope.workflows.steer_eval_result import SteerEvalResult
from qscope.workflows.steer_find_texts import TRAIN, gather

OUT = Path(__file__).parents[1] / "docs" / "steering"

PROMPTS = """\
My favourite day of the week is
The best thing about the old town is
My grandmother always told me that
When we arrived at the beach, we saw
The teacher walked into the room and said
In the garden behind the house there was
The history of this small village begins
Yesterday evening my friends and I decided to
A good cup of coffee starts with
The new library opened its doors and
Before going to sleep the child asked for
The captain looked at the dark clouds and
On the way to the market she met
Every morning the baker puts
What I remember most about that summer is
The train was late again, so
"""


@dataclass(frozen=True)
class Behaviour:
    name: str
    builtin: str
    """What `qscope steer find --builtin` compares"""
    detector: str
    instruction: str
    """What the prompt-only arm says"""


BEHAVIOURS = (
    Behaviour("french", "language:fr/en", "language:fr", "Continue the text in French."),
    Behaviour("numbers", "topic:math/everyday", r"regex:\d", "Continue the text with a calculation, in numbers."),
    Behaviour(
        "scripture",
        "style:scripture/novel",
        "keywords:thou,thee,thy,ye,unto,hath,saith,lord,god,israel,shalt",
        "Continue the text in the style of the King James Bible.",
    ),
)


def find(behaviour: Behaviour, work: Path) -> steer_find.SteerFindConfig:
    """Features of all three layers of the embedded suite; the effect on the next token chooses layer and feature."""
    config = steer_find.SteerFindConfig(
        builtin=behaviour.builtin,
        layers=(7, 15, 23),
        count=80,
        context_size=64,
        bootstrap=100,
        choose_by="target_change",
        spec=work / f"{behaviour.name}-found.json",
        out=work / f"{behaviour.name}-features.json",
        html=work / f"{behaviour.name}-features.html",
    )
    if not (work / f"{behaviour.name}-features.html").exists():
        steer_find_page.write(steer_find.run(config))
    return config


def spec_of(behaviour: Behaviour, work: Path) -> Path:
    """The spec that was found, with its strength as a share of the residual norm, as that of the baselines."""
    result = json.loads((work / f"{behaviour.name}-features.json").read_text())
    spec = SteeringSpec.load(work / f"{behaviour.name}-found.json")
    norm = result["layers"][str(result["layer"])]["residual_norm"]
    edits = tuple(dataclasses.replace(edit, unit="residual", scale=norm, strength=0.4) for edit in spec.edits)
    return dataclasses.replace(spec, edits=edits).save(work / f"{behaviour.name}-spec.json")


def training_texts(config: steer_find.SteerFindConfig, behaviour: Behaviour, work: Path) -> tuple[str, str]:
    """Files of the texts that the features were ranked on, for the baselines; without those `find` kept out."""
    texts = gather(config)
    names = []
    for side, positive in (("positive", True), ("negative", False)):
        folder = work / f"{behaviour.name}-{side}"
        folder.mkdir(exist_ok=True)
        chosen = [t.text for t, p, part in zip(texts.all, texts.positive, texts.part, strict=True)
                  if p == positive and part == TRAIN]  # fmt: skip
        path = folder / "texts.txt"
        path.write_text("\n".join(" ".join(text.split()) for text in chosen) + "\n", encoding="utf-8")
        names.append(str(path))
    return names[0], names[1]


def evaluate(behaviour: Behaviour, config: steer_find.SteerFindConfig, work: Path) -> SteerEvalResult:
    positive, negative = training_texts(config, behaviour, work)
    prompts = work / "prompts.txt"
    prompts.write_text(PROMPTS)
    return steer_eval.run(
        steer_eval.SteerEvalConfig(
            spec=spec_of(behaviour, work),
            prompts=str(prompts),
            detector=behaviour.detector,
            out=work / f"{behaviour.name}-eval",
            strengths=(0.4, 0.75, 1.0, 1.5),
            positive=positive,
            negative=negative,
            instruction=(behaviour.instruction,),
            max_new_tokens=20,
            neutral_texts=8,
            neutral_tokens=64,
            questions=16,
            context_size=64,
            random_features=1,
            random_directions=1,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder to work in; kept")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the reports")
    parser.add_argument("--only", choices=[b.name for b in BEHAVIOURS], help="one behaviour")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for behaviour in BEHAVIOURS:
        if args.only not in (None, behaviour.name):
            continue
        config = find(behaviour, args.work)
        result = evaluate(behaviour, config, args.work)
        steer_eval_page.write(result)
        text = steer_eval_text.render(result)
        print(text, flush=True)
        (args.out / f"{behaviour.name}.txt").write_text(text.replace(str(args.work), "WORK") + "\n", encoding="utf-8")
        for source, name in (
            (args.work / f"{behaviour.name}-eval" / "report.html", f"{behaviour.name}.html"),
            (args.work / f"{behaviour.name}-features.html", f"{behaviour.name}-features.html"),
            (args.work / f"{behaviour.name}-spec.json", f"{behaviour.name}-spec.json"),
        ):
            shutil.copy(source, args.out / name)


if __name__ == "__main__":
    main()
