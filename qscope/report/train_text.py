"""What `qscope train` prints."""

from qscope.report.evaluate_page import num, share
from qscope.report.train_page import write
from qscope.workflows.train import TrainResult


def render(result: TrainResult) -> str:
    """A line per SAE, what was left out, where the time went; writes the page."""
    early = "" if result.complete else ", stopped early"
    earlier = f", {result.resumed_step:,} of the steps by an earlier run" if result.resumed_step else ""
    lines = [
        f"{result.out}: {len(result.saes)} trained on {result.tokens:,} tokens, {result.steps:,} steps{early}{earlier}"
    ]
    width = max(map(len, result.saes))
    for name, sae in result.saes.items():
        found = sae.figures
        lines.append(
            f"  {name:{width}}  {sae.d_sae:,} features, k = {sae.k}: FVU {num(found.get('fvu'))}, loss "
            f"{num(found.get('loss'))}, L0 {num(found.get('l0'), 1)}, dead {share(found.get('dead_share', 0.0))}"
        )
    lines += [f"left out: {', '.join(parts)}" for parts in (_left_out(result),) if parts]
    if result.run_tokens:
        split = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
        lines.append(f"this run: {result.run_tokens:,} tokens, {result.tokens_per_second:,.0f} tokens/s ({split})")
    lines.append(f"wrote {write(result)}")
    return "\n".join(lines + _next(result))


def _left_out(result: TrainResult) -> list[str]:
    found = [("first of a window or separator", result.counts.get("dropped_first", 0))]
    for key, name in (("nonfinite", "NaN or infinite"), ("extreme_norm", "of extreme norm")):
        found += [(f"{name} at {point}", n) for point, n in result.counts.get(key, {}).items()]
    return [f"{n:,} {name}" for name, n in found if n]


def _next(result: TrainResult) -> list[str]:
    """The command that measures what was trained, where it can."""
    layers: dict[str, list[str]] = {}
    for name, sae in result.saes.items():
        folder, _, last = name.rpartition("/")
        if last == f"layer{sae.point}":
            layers.setdefault(folder, []).append(sae.point)
    if not layers:
        return []
    folder, found = next(iter(layers.items()))
    where = f"{result.out}/{folder}" if folder else result.out
    return [f"next: qscope evaluate --sae {where} --layers {' '.join(found)} --html evaluation.html"]
