"""What `qscope synthesize` prints."""

from qscope.report.evaluate_page import share
from qscope.report.steer_find_text import table
from qscope.report.synthesize_page import write
from qscope.workflows.synthesize_result import SynthesizeResult

MOST_TARGETS = 20


def render(result: SynthesizeResult) -> str:
    """Coverage at equal budget, yields, the targets with least support; writes the page."""
    lines = [f"{result.model}: " + ", ".join(f"{name} {value}" for name, value in result.about.items())]
    lines += [f"note: {note}" for note in result.notes]
    missing = sum(t.seed_support == 0 for t in result.targets)
    lines += [
        f"{missing} of {len(result.targets)} targets are fired by none of {result.seed_texts:,} seed texts; coverage "
        f"{share(result.coverage_seed)}",
        f"{result.kept} examples kept of {result.attempts} attempts (budget {result.budget})",
        "",
        f"coverage of the targets by the seed with {result.kept} texts:",
        *table([("coverage", "texts"), *((share(value), name) for name, value in result.coverage.items())]),
        f"with {result.attempts} texts that were not verified:",
        *table([("coverage", "texts"), *((share(value), name) for name, value in result.coverage_attempts.items())]),
    ]
    if result.unverified_fire is not None:
        lines.append(f"without verification {share(result.unverified_fire)} of the texts fire their target")
    lines += ["", *table(yield_rows(result)), "", *_targets(result)]
    if any(result.calls.values()):
        lines.append("endpoint, this run: " + ", ".join(f"{n} {name}" for name, n in result.calls.items() if n))
    page = write(result)
    return "\n".join([*lines, "", f"wrote {result.examples}", *([f"wrote {page}"] if page else [])])


def yield_rows(result: SynthesizeResult) -> list[tuple[str, ...]]:
    """A row per arm, source and role."""
    rows: list[tuple[str, ...]] = [("tried", "fire", "kept", "yield", "dropped", "")]
    for one in result.yields:
        kept = one.verdicts.get("kept", 0)
        dropped = ", ".join(f"{number} {name}" for name, number in one.verdicts.items() if name != "kept")
        fire = "\u2013" if one.role == "random" else share(one.fire / one.attempts)
        rows.append(
            (
                f"{one.attempts:,}", fire, f"{kept:,}", share(kept / one.attempts), dropped or "\u2013",
                f"{one.arm}, {one.source}, {one.role}",
            )
        )  # fmt: skip
    return rows


def _targets(result: SynthesizeResult) -> list[str]:
    ordered = sorted(result.targets, key=lambda t: (t.support, t.layer, t.feature))
    rows: list[tuple[str, ...]] = [("seed", "now", "tried", "kept", "target")]
    for t in ordered[:MOST_TARGETS]:
        said = f"{t.layer}:{t.feature}" + (f" {t.meaning[:60]}" if t.meaning else "") + (" (given up)" * t.given_up)
        rows.append((f"{t.seed_support:,}", f"{t.support:,}", f"{t.attempts:,}", f"{t.kept:,}", said))
    more = len(ordered) - MOST_TARGETS
    return [*table(rows), *([f"  and {more} more, in the page"] if more > 0 else [])]
