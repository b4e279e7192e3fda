"""python bench/bench_feature_penalty.py: what the SASFT penalty adds to a training step, beside a dense encode.

Two random Qwen3 models: a small one (about 7M parameters, 8 x 256 tokens) and one of the shape of Qwen3-1.7B with as
many blocks as --blocks says (a vocabulary of 8,192 instead of 151,936: a shorter step, so a harder bar). Rounds of a
plain step, a step with the penalty, and a step with the same penalty through all F = 32,768 pre-activations, in turn.
A step is forward, loss, backward and AdamW. Losses have to agree. Files: bench/results/feature-penalty-<device>.json
and .md. Exit status 1 where the losses differ or the penalty takes more than 5 % of a step.

`alone` is the penalty's own forward and backward on residuals at hand, as a share of the shortest plain step: what
other work on the machine disturbs least, and what the bar is checked on. `paired` is the median over rounds of the
step with divided by the step without, minus 1.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
F, S, BAR = 32_768, 2, 0.05
PLAIN, OURS, DENSE = "plain step", "qscope.FeaturePenalty", "dense encode"


def main(arguments: list[str] | None = None) -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # spares an install; the imports below need it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("small", "1.7b"), default=["small", "1.7b"])
    parser.add_argument("--blocks", type=int, default=2, help="of the large model, which has 28")
    parser.add_argument("--large-tokens", type=int, default=256, help="of a sequence of the large model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dense-rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the result files")
    options = parser.parse_args(arguments)
    from bench._facts import common_facts, device_name, slug

    rows = [row for name in options.models for row in measure(name, options)]
    facts = common_facts(options.device)
    path = options.out / f"feature-penalty-{slug(device_name(options.device))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [{n: float(f"{v:.4g}") if isinstance(v, float) else v for n, v in row.items()} | facts for row in rows]
    path.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    page = path.with_suffix(".md")
    page.write_text(markdown(shown), encoding="utf-8")
    print(page.read_text(encoding="utf-8"))
    faults = [f"{r['model']}: {r['provider']} gave another loss" for r in rows if not r["correct"]]
    faults += [
        f"{r['model']}: the penalty takes {r['alone']:.1%} of a step; the bar is {BAR:.0%}"
        for r in rows
        if r["provider"] == OURS and r["alone"] > BAR
    ]
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


def model_of(name: str, options: argparse.Namespace) -> tuple[nn.Module, int, int]:
    """(model, sequences, tokens of each)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    small = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, head_dim=64)
    large = dict(hidden_size=2048, intermediate_size=6144, num_attention_heads=16, head_dim=128)
    sizes = small | {"num_key_value_heads": 2} if name == "small" else large | {"num_key_value_heads": 8}
    if name != "small":
        sizes |= {"num_hidden_layers": options.blocks}
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=8192, tie_word_embeddings=True, use_cache=False, **sizes)  # type: ignore[arg-type]
    model: nn.Module = Qwen3ForCausalLM(config).to(options.device).train()
    return model, *((8, 256) if name == "small" else (1, options.large_tokens))


class Dense:
    """The same loss through every pre-activation, as `sae.encode` would give them, of hooks that keep the residual."""

    def __init__(self, W_enc: Tensor, b_enc: Tensor, layers: list[int], features: tuple[int, ...]) -> None:
        self.W_enc, self.b_enc, self.layers, self.features = W_enc, b_enc, layers, list(features)

    def loss(self, residual: dict[int, Tensor]) -> Tensor:
        total = self.b_enc.new_zeros(())
        for layer in self.layers:
            x = residual[layer].flatten(0, 1)
            excess = (torch.addmm(self.b_enc, x, self.W_enc.T))[:, self.features].relu()
            total = total + excess.sum() / excess.numel()
        return total


def measure(name: str, options: argparse.Namespace) -> list[Row]:
    from qscope.post_training.attach import Residuals
    from qscope.post_training.penalty import FeaturePenalty

    model, sequences, length = model_of(name, options)
    D, blocks = model.config.hidden_size, model.config.num_hidden_layers
    layers, features = [blocks - 2, blocks - 1], tuple(range(S))
    gen = torch.Generator().manual_seed(0)
    W = (torch.randn(F, D, generator=gen) / D**0.5).to(options.device)
    b = torch.zeros(F, device=options.device)
    penalty = FeaturePenalty.from_directions({n: W[:S] for n in layers})
    dense = Dense(W, b, layers, features)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = torch.randint(0, 8192, (sequences, length), generator=gen).to(options.device)
    groups = torch.zeros(sequences, dtype=torch.int64, device=options.device)
    losses: dict[str, float] = {}

    def step(term: Callable[[], Tensor] | None) -> None:
        loss = model(input_ids=ids, labels=ids).loss
        if term is not None:
            loss = loss + term()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def with_penalty() -> None:
        with penalty.attach(model):
            step(lambda: penalty.loss(groups))

    def with_dense() -> None:
        residuals = Residuals(model, layers)
        try:
            step(lambda: dense.loss(residuals.take()))
        finally:
            residuals.detach()

    runs = {PLAIN: lambda: step(None), OURS: with_penalty, DENSE: with_dense}
    times: dict[str, list[float]] = {provider: [] for provider in runs}
    for round_ in range(options.rounds + 1):
        for provider, run in runs.items():
            if provider == DENSE and round_ > options.dense_rounds:
                continue
            seconds = timed(run, options.device)
            if round_:  # the first one warms up
                times[provider].append(seconds)
    x = {n: torch.randn(sequences, length, D, device=options.device, requires_grad=True) for n in layers}
    alone = {
        OURS: lambda: _penalty_loss(penalty, x, groups),
        DENSE: lambda: dense.loss(x),
    }
    rows = []
    best = min(times[PLAIN])
    for provider, taken in times.items():
        pairs = [t / p - 1 for t, p in zip(taken, times[PLAIN], strict=False)]
        row: Row = {
            "model": f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {blocks} blocks",
            "tokens": f"{sequences} x {length}",
            "provider": provider,
            "step": statistics.median(taken),
            "paired": statistics.median(pairs),
            "rounds": len(taken),
            "alone": 0.0,
            "largest_bytes": 0,
            "correct": True,
        }
        if provider in alone:
            seconds, largest, value = own_cost(alone[provider], options.device, 10 if provider == OURS else 1)
            row |= {"alone": seconds / best, "largest_bytes": largest}
            losses[provider] = value
            row["correct"] = abs(value - losses[OURS]) <= 1e-5 * losses[OURS]
        rows.append(row)
    return rows


def _penalty_loss(penalty: Any, x: dict[int, Tensor], groups: Tensor) -> Tensor:
    """`penalty.loss` on residuals at hand."""

    class Given:
        def take(self) -> dict[int, Tensor]:
            return x

    penalty._attached = Given()
    try:
        return penalty.loss(groups)
    finally:
        penalty._attached = None


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor made, what operators do inside left aside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(t.nbytes for t in tree_iter(out) if isinstance(t, Tensor))])
        return out


def own_cost(loss: Callable[[], Tensor], device: str, repeats: int) -> tuple[float, int, float]:
    """(median seconds of forward and backward, bytes of the largest tensor that they make, the loss)."""
    with Largest() as largest:
        value = loss()
        value.backward()
    return (
        statistics.median(timed(lambda: loss().backward(), device) for _ in range(repeats)),
        largest.bytes,
        value.item(),
    )


def timed(run: Callable[[], None], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def markdown(rows: list[Row]) -> str:
    first = rows[0]
    lines = [
        f"# The feature penalty on {first['device']}",
        "",
        f"torch {first['torch']}, python {first['python']}, {first['threads']} threads, commit {first['commit']}. "
        f"float32; 2 layers, {S} features each; dense: F = {F:,}.",
        "",
        "A step is forward, loss, backward and AdamW. `alone`: the term's own forward and backward on residuals at",
        "hand, as a share of the shortest plain step; `paired`: median over rounds of the step with it over the step",
        "without, minus 1, disturbed by other work on the machine. `largest tensor` is the largest that the term",
        "makes: the gradient of one layer's residual, or all pre-activations. The large model is cut to the blocks",
        "given; nothing is extrapolated: with more blocks the step is longer and the term the same.",
        "",
        "| model | tokens | contestant | step, s | paired | alone | largest tensor, bytes | rounds | same loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        measured = r["provider"] != PLAIN
        lines.append(
            f"| {r['model']} | {r['tokens']} | {r['provider']} | {r['step']:.3f} | "
            + (f"{r['paired']:+.1%} | {r['alone']:.2%} | {r['largest_bytes']:,}" if measured else "- | - | -")
            + f" | {r['rounds']} | {'yes' if r['correct'] else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
