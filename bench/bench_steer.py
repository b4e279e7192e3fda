"""python bench/bench_steer.py: what steering adds to the time of a generated token, beside what others take for it.

On a CPU with the embedded model; on a GPU with a random Llama of Qwen3-1.7B's shape in bfloat16 (no download), also
with a static cache and CUDA graphs as `generate` compiles them. Every case is checked first: all contestants give the
same tokens in float32. Files: bench/results/steer-<device>.json and .md. Exit status 1 where a check failed, or where
qscope took more than 2 % per token with CUDA graphs.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from bench._steer_peers import Attach, Case, Scene

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
BAR = 1.02
MOST_GRAPHS = 4
"""torch.compile gives up after eight versions of a function; a good one needs one or two."""
_KEY = ("model", "dtype", "mode", "threads", "clock", "case", "provider")


def main(arguments: list[str] | None = None) -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # spares an install; the imports below need it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=("embedded", "random", "tiny"), help="default: embedded; random on a GPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32; bfloat16 on a GPU")
    parser.add_argument("--modes", nargs="+", choices=("eager", "graphs"), help="default: eager; both on a GPU")
    parser.add_argument("--cases", nargs="+", help="default: all; of mode graphs, those without exact gate")
    parser.add_argument("--tokens", type=int, default=32, help="generated in every timed call")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each case; at least three rounds are run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of one thread on a busy CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the result files")
    options = parser.parse_args(arguments)
    if problem := _problem():
        print(f"not measured: {problem}")
        return 0
    from bench._facts import device_name, slug
    from bench._steer_peers import cases
    from bench._steer_table import markdown

    torch.set_num_threads(options.threads)
    cuda = options.device.startswith("cuda")
    model = options.model or ("random" if cuda else "embedded")
    dtype = options.dtype or ("bfloat16" if cuda else "float32")
    scene = make_scene(model, options.device, options.tokens)
    path = options.out / f"steer-{slug(device_name(options.device))}.json"
    about = {
        "model": model,
        "dtype": dtype,
        "prompt_tokens": prompt(scene.model).shape[1],
        "new_tokens": options.tokens,
        "clock": options.clock,
    }
    chosen = [case for case in cases(scene) if not options.cases or case.name in options.cases]
    faults, good = check(scene.model, chosen, options.tokens)
    scene.model.to(getattr(torch, dtype))
    for mode in options.modes or (("eager", "graphs") if cuda else ("eager",)):
        for case in good:
            if mode == "graphs" and "exact" in case.name and not options.cases:
                continue
            rows = [about | row for row in measure(scene, case, mode, options)]
            faults += [f for row in rows if (f := too_slow(row))]
            keep(path, rows)
    if path.exists():
        page = path.with_suffix(".md")
        page.write_text(markdown(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
        print(page)
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _problem() -> str:
    """A machine for kernels alone may lack it."""
    return "" if importlib.util.find_spec("transformers") else "transformers is not installed"


# --- the model and what it is steered with -------------------------------------------------------------------


def make_scene(name: str, device: str, tokens: int) -> "Scene":
    """The model in float32 on the device, an SAE of its middle layer, features, gates, vectors, from fixed seeds."""
    from bench._steer_peers import Scene
    from qscope.model import num_layers, residual_width, residuals
    from qscope.sae import SAE

    generator = torch.Generator().manual_seed(0)
    if name == "embedded":
        from qscope import embedded
        from qscope.model import load_model

        model, _ = load_model(embedded.default_model_path(), device=device, dtype="float32")
        sae, layer = SAE.from_pretrained(embedded.DEFAULT_SAE, device=device), embedded.DEFAULT_LAYER
    else:
        model = random_model(name, device)
        layer, width = num_layers(model) // 2, residual_width(model)
        F = 16 * width
        W = torch.nn.functional.normalize(torch.randn(F, width, generator=generator), dim=1)
        sae = SAE(W, W.clone(), torch.zeros(F), torch.zeros(width), k=50).requires_grad_(False).eval().to(device)
    text = generate(model, tokens, "eager")
    every = residuals(model, text, range(num_layers(model)))
    h = every[layer][0, 1:].float()
    acts, indices = sae.encode_topk(h)
    seen = indices.flatten().long().bincount(minlength=sae.d_sae)
    often = int((seen / len(h) - 0.7).abs().argmin())
    values = torch.where(indices == often, acts, 0).sum(-1)
    read = h @ sae.W_enc[often].float() + sae.b_enc[often].float()
    features = torch.randperm(sae.d_sae, generator=generator)[:32].tolist()
    norms = sae.W_dec[features].float().norm(dim=1)
    strengths = (0.3 * h.norm(dim=1).median() / norms).tolist()
    drawn = torch.randn(len(every), residual_width(model), generator=generator)
    sizes = torch.tensor([float(every[i][0, 1:].norm(dim=1).median()) for i in range(len(every))])
    vectors = torch.nn.functional.normalize(drawn, dim=1) * (0.05 * sizes)[:, None]
    gates = ((often, float(read.median())), (often, max(0.0, float(values.median()))))
    return Scene(model, sae, layer, tuple(features), tuple(strengths), *gates, vectors)


def random_model(name: str, device: str) -> Any:
    """`random`: Qwen3-1.7B's shape; `tiny`: for a test of seconds. Weights of a fixed seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        vocab_size=32768,
    )  # fmt: skip
    if name == "tiny":
        shape = dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=512,
        )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=4096))
    return model.float().eval().requires_grad_(False)


def prompt(model: Any) -> torch.Tensor:
    """[1, 16] token ids, the same for all."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, min(model.config.vocab_size, 30_000), (1, 16), generator=generator).to(model.device)


def generate(model: Any, tokens: int, mode: str) -> torch.Tensor:
    """Greedy, exactly `tokens` of them. On a GPU, `generate` compiles the decoding of a static cache by itself."""
    ids = prompt(model)
    options = {"cache_implementation": "static"} if mode == "graphs" else {}
    with torch.no_grad():
        found: torch.Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            use_cache=True, pad_token_id=0, **options,
        )  # fmt: skip
    return found


# --- checking and timing -------------------------------------------------------------------------------------


def check(model: Any, cases: "Sequence[Case]", tokens: int) -> "tuple[list[str], list[Case]]":
    """(what is wrong, the cases in which nothing is), in float32."""
    from bench._steer_peers import OURS, missing

    plain = generate(model, tokens, "eager")
    faults, good = [], []
    for case in cases:
        texts = {}
        for name, attach in case.contestants.items():
            if not missing(name):
                with attach():
                    texts[name] = generate(model, tokens, "eager")
        wrong = [name for name, text in texts.items() if not torch.equal(text, texts[OURS])]
        if torch.equal(texts[OURS], plain):
            faults.append(f"{case.name}: the steered text is the unsteered one, so nothing can be compared")
        elif wrong:
            faults.append(f"{case.name}: {', '.join(wrong)} gave other tokens than qscope")
        else:
            good.append(case)
    return faults, good


def measure(scene: "Scene", case: "Case", mode: str, options: argparse.Namespace) -> list[Row]:
    """A row for every contestant of a case."""
    from bench._facts import common_facts
    from bench._steer_peers import PACKAGES, UNSTEERED, missing, version

    attached: dict[str, Attach] = {"unsteered": contextlib.nullcontext, UNSTEERED: contextlib.nullcontext}
    attached |= {name: attach for name, attach in case.contestants.items() if not missing(name)}
    if mode == "graphs":  # every contestant is compiled, which takes a minute; others' hooks are not made for it
        attached = {name: attach for name, attach in attached.items() if name not in PACKAGES}
    rounds = interleaved if mode == "eager" else between
    compiled: dict[str, int] = {}
    call = functools.partial(timed, scene.model, options.tokens, mode, options.clock)
    times = rounds(attached, call, options.rounds, options.seconds, compiled)
    rows = []
    for name in [n for n in (UNSTEERED, *case.contestants) if n in times or missing(n)]:
        row: Row = {"mode": mode, "case": case.name, "provider": name, "version": version(name), "note": missing(name)}
        if not row["note"]:
            base, mine = times["unsteered"], times[name]
            ratio = statistics.median(m / b for m, b in zip(mine, base, strict=True))
            row |= {"ratio": ratio, "ratio_min": min(mine) / min(base), "ms": statistics.median(mine)}
            row |= {"ms_min": min(mine), "unsteered_ms": statistics.median(base), "rounds": len(mine)}
            row |= {"compiled": compiled.get(name)}
            print(f"{mode}, {case.name}, {name}: {ratio:.3f}x, of minima {row['ratio_min']:.3f}x", flush=True)
        rows.append(row | common_facts(options.device))
    return rows


def timed(model: Any, tokens: int, mode: str, clock: str) -> float:
    """Milliseconds per generated token of one call."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    begin = now()
    generate(model, tokens, mode)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return (now() - begin) * 1e3 / tokens


def interleaved(
    attached: "dict[str, Attach]", call: Callable[[], float], rounds: int, seconds: float, compiled: dict[str, int]
) -> dict[str, list[float]]:
    """Every contestant once a round, beginning with another one each time; attaching is not timed."""
    times: dict[str, list[float]] = {name: [] for name in attached}
    names, deadline = list(attached), time.perf_counter() + seconds
    for done in range(-1, rounds):
        if done >= 3 and time.perf_counter() > deadline:
            break
        for i in range(len(names)):
            name = names[(done + i) % len(names)]
            with attached[name]():
                found = call()
            if done >= 0:  # the first round warms up
                times[name].append(found)
    return times


def between(
    attached: "dict[str, Attach]", call: Callable[[], float], rounds: int, seconds: float, compiled: dict[str, int]
) -> dict[str, list[float]]:
    """Contestants one after the other, for attaching makes torch compile again; the plain model first and last."""
    from bench._steer_peers import UNSTEERED

    names = ["unsteered", *(name for name in attached if name not in ("unsteered", UNSTEERED)), UNSTEERED]
    times: dict[str, list[float]] = {}
    for name in names:
        before = graphs_compiled()
        times[name] = _block(attached[name], call, rounds, seconds / len(names))
        compiled[name] = graphs_compiled() - before
    least = min(map(len, times.values()))
    return {name: values[:least] for name, values in times.items()}


def graphs_compiled() -> int:
    """How many graphs torch.compile has made in this process: one for the decoding of each contestant."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else int(utils.counters["stats"]["unique_graphs"])


def _block(attach: "Attach", call: Callable[[], float], rounds: int, seconds: float) -> list[float]:
    with attach():
        for _ in range(3):  # compiles, records the graphs, replays them
            call()
        deadline, found = time.perf_counter() + seconds, []
        while len(found) < 3 or (len(found) < rounds and time.perf_counter() < deadline):
            found.append(call())
    return found


def too_slow(row: Row) -> str:
    """Why a row of ours fails mode graphs on a GPU; "" if it does not."""
    from bench._steer_peers import OURS

    if row["provider"] != OURS or row["mode"] != "graphs" or row["threads"] is not None or row["note"]:
        return ""
    if row["compiled"] > MOST_GRAPHS:
        return f"{row['case']}: torch compiled the decoding {row['compiled']} times, so it goes without CUDA graphs"
    if min(row["ratio"], row["ratio_min"]) > BAR:
        return f"{row['case']}: {row['ratio']:.3f}x per token with CUDA graphs; at most {BAR}x is the bar"
    return ""


def keep(path: Path, rows: list[Row]) -> None:
    """Put the rows into the file, in place of those of the same case and contestant."""
    held: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    new = {tuple(row[name] for name in _KEY) for row in rows}
    held = [row for row in held if tuple(row[name] for name in _KEY) not in new]
    shown = [{n: float(f"{v:.5g}") if isinstance(v, float) else v for n, v in row.items()} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held + shown, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
