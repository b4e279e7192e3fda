"""The files and the result of `qscope synthesize`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qscope.files import write_file
from qscope.workflows import synthesize_measure as measure
from qscope.workflows.synthesize_inputs import Prepared
from qscope.workflows.synthesize_loop import FEATURE, RANDOM, Row
from qscope.workflows.synthesize_result import SynthesizeResult

if TYPE_CHECKING:
    from qscope.workflows.synthesize import SynthesizeConfig

EXAMPLES, RESULT, PAGE = "examples.jsonl", "synthesis.json", "synthesis.html"
_SHOWN = 40


def finish(
    config: "SynthesizeConfig", made: Prepared, rows: Sequence[Row], random: Sequence[Row], seconds: float
) -> SynthesizeResult:
    """Write the examples and the result."""
    loop, targets = made.loop, made.loop.targets
    compared = measure.Comparison(made.seed.fires, rows, random, made.pool.fires if made.pool is not None else None)
    support = made.seed.fires.sum(axis=0)
    records = [example(made, row) for row in rows if row["verdict"] == "kept"]
    path = config.out / EXAMPLES
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8", "replace")
    write_file(path, [data], len(data))
    result = SynthesizeResult(
        model=made.encoder.model_name,
        about=_about(config, made),
        notes=(*made.notes, *_notes(config, compared)),
        targets=measure.targets_found(
            targets, support, made.pool.fires.sum(axis=0) if made.pool is not None else None, rows, loop.given_up(rows)
        ),
        yields=(*measure.yields(FEATURE, rows), *measure.yields(RANDOM, random)),
        seed_texts=len(made.seed_texts),
        pool_texts=len(made.pool_texts),
        budget=config.budget,
        kept=compared.kept,
        attempts=compared.attempts,
        coverage_seed=compared.at(0, [FEATURE])[FEATURE],
        coverage=compared.at(compared.kept, [FEATURE, RANDOM, measure.NATURAL]),
        coverage_attempts=compared.at(compared.attempts, [measure.UNVERIFIED, RANDOM]),
        unverified_fire=compared.fire,
        curves=compared.curves(),
        calls=made.endpoint.counts.as_dict() if made.endpoint is not None else {},
        examples=str(path),
        html=str(config.out / PAGE),
        seconds=round(seconds, 1),
        shown=tuple(records[:: max(1, len(records) // _SHOWN)][:_SHOWN]),
    )
    text = json.dumps(asdict(result), indent=1, ensure_ascii=False, allow_nan=False).encode()
    write_file(config.out / RESULT, [text], len(text))
    return result


def example(made: Prepared, row: Row) -> dict[str, Any]:
    """A kept attempt as a line of the output: chat format, with where it comes from."""
    target = made.loop.targets[row["target"]]
    messages = [{"role": "user", "content": row["text"]}]
    if row.get("response"):
        messages.append({"role": "assistant", "content": row["response"]})
    return {
        "messages": messages,
        "text": row["text"],
        "label": target.label,
        "provenance": {
            "layer": target.layer,
            "feature": target.feature,
            "sae_sha256": made.encoder.saes[target.layer].weight_hash(),
            "activation": row["activation"],
            "threshold": target.threshold,
            "source": row["source"],
            "role": row["role"],
            "style": row["style"],
            "rewritten_from": row["from"],
            "answer": row.get("answer_role"),
            "prompt_id": row["prompt"],
            "attempt": row["attempt"],
            "seed": row["seed"],
        },
    }


def _about(config: "SynthesizeConfig", made: Prepared) -> dict[str, str]:
    saes = ", ".join(f"{layer} (sha256 {sae.weight_hash()[:12]})" for layer, sae in made.encoder.saes.items())
    return {
        "targets": str(len(made.loop.targets)),
        "layers": saes,
        "sources": ", ".join(config.sources),
        "generator": config.generator or made.encoder.model_name,
        "subject": config.about,
        "seed": str(config.seed),
    }


def _notes(config: "SynthesizeConfig", compared: measure.Comparison) -> list[str]:
    found = []
    if compared.kept < config.budget:
        found.append(
            f"{compared.kept} of {config.budget} examples were made: every target is fired by {config.support} texts, "
            f"or was given up after {config.retries} attempts in a row"
        )
    at = compared.at(compared.kept, [FEATURE, RANDOM, measure.NATURAL])
    better = [name for name in (RANDOM, measure.NATURAL) if at.get(name, 0.0) >= at[FEATURE]]
    found += [f"at {compared.kept} texts {name} covers no less than feature-driven" for name in better]
    return found
