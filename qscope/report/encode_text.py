"""The lines that `qscope encode` ends with."""

from qscope.workflows.encode import EncodeResult

STAGES = {"load": "load", "tokenize": "tokenise", "model": "model", "encode": "encode", "write": "write"}


def render(result: EncodeResult) -> str:
    """What was written, what was left out, and where the time went."""
    where = result.store or result.activations
    lines = [
        f"{where}: {result.tokens:,} tokens of {result.documents:,} documents in {result.shards} shards"
        + (f", {result.resumed_shards} of them from an earlier run" if result.resumed_shards else "")
    ]
    for layer, facts in result.layers.items():
        nnz, nan, extreme = (int(facts[name] or 0) for name in ("nnz", "nan_rows", "extreme_rows"))
        fit = "" if facts["fvu"] is None else f", FVU {facts['fvu']:.3f} on a sample of each shard"
        lines.append(
            f"layer {layer}: {nnz / max(1, result.tokens - nan):.1f} active features a token{fit}; "
            f"{extreme:,} tokens of extreme norm flagged, {nan:,} NaN"
        )
    left_out = {name: n for name, n in result.counts.items() if n and name != "documents"}
    if left_out:
        lines.append("input: " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in left_out.items()))
    if result.run_tokens:
        split = ", ".join(f"{STAGES[s]} {t:.1f} s" for s, t in result.seconds.items() if s in STAGES)
        lines.append(f"this run: {result.run_tokens:,} tokens, {result.tokens_per_second:,.0f} tokens/s ({split})")
    if result.activations is not None and result.store is not None:
        lines.append(f"activations of the same tokens: {result.activations}")
    if result.store is not None:
        lines.append(f"next: qscope inspect {result.store} --html features.html")
    return "\n".join(lines)
