"""python bench/bench_coverage.py: footprints counted, unioned and compared; peers: NumPy sets, bitmaps, scipy.sparse.

A million items of K = 100 in 50 benchmarks (the bar: 60 s), then a small suite where bitmaps fit. The ids are
Zipf-like with a fixed seed. All contestants have to give the same numbers. Files:
bench/results/coverage-<device>.json and .md. Exit status 1 where one did not, or the bar was missed.
"""

import argparse
import functools
import heapq
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
Result = tuple[Any, ...]
F, K = 131_072, 100
BAR = 60.0
OURS = "qscope"
COUNTED, PAIRED = "counted", "unioned and overlapped in pairs"


def main(arguments: list[str] | None = None) -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # spares an install; the imports below need it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmarks", type=int, default=50)
    parser.add_argument(
        "--items", type=int, default=20_000, help="of a benchmark on average; from half to one and a half of it"
    )
    parser.add_argument("--small-items", type=int, default=250, help="the same, where bitmaps are kept too")
    parser.add_argument("--cover-items", type=int, default=100_000, help="of which the smallest subset is taken")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the result files")
    options = parser.parse_args(arguments)
    from bench._facts import common_facts, device_name, slug

    large, seconds = footprints(options.benchmarks, options.items)
    small, _ = footprints(options.benchmarks, options.small_items)
    rows = alone(large, seconds) + compared(large, small, options.rounds) + covers(options)
    faults = [f"{row['case']}: {row['provider']} gave other numbers" for row in rows if row.get("correct") is False]
    bar = sum(row["seconds"] for row in rows if row.get("in_bar"))
    if bar > BAR:
        faults.append(f"counted, unioned and overlapped in {bar:.1f} s; at most {BAR:.0f} s is the bar")
    facts = common_facts("cpu") | {"numpy": np.__version__, "scipy": _version("scipy")}
    path = options.out / f"coverage-{slug(device_name('cpu'))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [{n: float(f"{v:.5g}") if isinstance(v, float) else v for n, v in row.items()} | facts for row in rows]
    path.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    page = path.with_suffix(".md")
    page.write_text(markdown(shown), encoding="utf-8")
    print(page)
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _version(package: str) -> str | None:
    return metadata.version(package) if importlib.util.find_spec(package) else None


# --- the input -----------------------------------------------------------------------------------------------


def codes(benchmark: int, items: int) -> tuple[Any, Any]:
    """(top_acts [items, K], top_indices): Zipf-like ids, all different in a row; half of them the benchmark's own."""
    rng = np.random.default_rng((7, benchmark))
    place = _places(benchmark % 5, items)
    names = np.random.default_rng(7).permutation(F)
    own = np.random.default_rng(8).permutation(F)[: F // 2]
    names[own] = names[rng.permutation(own)]
    acts = rng.random((items, K), dtype=np.float32) + 0.1
    return acts, names[place].astype(np.int32)


@functools.lru_cache(maxsize=5)
def _places(seed: int, items: int) -> Any:
    """[items, K] ranks in falling order of frequency, rising in a row; drawing them takes longer than what is timed."""
    weight = np.minimum(1 / np.arange(1, F - K + 1), 0.02)
    edges = np.cumsum(weight / weight.sum())
    drawn = np.random.default_rng((6, seed)).random((items, K))
    place = np.minimum(np.searchsorted(edges, (np.arange(K) + drawn) / K), F - K - 1)
    return np.maximum.accumulate(place - np.arange(K), axis=1) + np.arange(K)


def footprints(benchmarks: int, items: int) -> tuple[list[Any], float]:
    """(Footprints of each benchmark, seconds that making them from the codes took)."""
    from qscope.coverage import Footprints

    made, seconds = [], 0.0
    for i, size in enumerate(np.linspace(0.5 * items, 1.5 * items, benchmarks).astype(int)):
        acts, ids = (part[:size] for part in codes(i, items * 3 // 2))
        begin = time.perf_counter()
        made.append(Footprints.from_topk(acts, ids, F))
        seconds += time.perf_counter() - begin
    return made, seconds


# --- qscope alone, at full size ------------------------------------------------------------------------------


def alone(made: list[Any], seconds: float) -> list[Row]:
    from qscope.coverage import Suite, measures

    size = _size(made)
    rows = [_alone(size, "footprints from top-k codes", seconds, True)]
    suite, seconds = _timed(lambda: Suite.of({str(i): part for i, part in enumerate(made)}))
    rows.append(_alone(size, "counted", seconds, True))
    pairs = list(zip(suite.counts, suite.items.tolist(), strict=True))
    named: dict[str, tuple[Callable[[], Any], bool]] = {
        "unioned": (suite.union, True),
        "overlaps of all pairs": (suite.overlaps, True),
        "size-matched overlaps, one size": (lambda: suite.size_matched(int(suite.items.min()) // 2), True),
        "size-matched overlaps, each pair's size": (suite.size_matched, True),
        "what each adds, and the order of adding": (lambda: (suite.marginal(), suite.order()), False),
        "redundancy": (lambda: [measures.redundancy(m, N) for m, N in pairs], False),
        "saturation curves, up to 64 sizes": (
            lambda: [measures.saturation(m, N, measures.curve_sizes(N)) for m, N in pairs],
            False,
        ),
    }
    for name, (call, in_bar) in named.items():
        _, seconds = _timed(call)
        rows.append(_alone(size, name, seconds, in_bar))
    return rows


def _size(made: list[Any]) -> str:
    return f"{len(made)} benchmarks, {sum(map(len, made)):,} items"


def _alone(size: str, case: str, seconds: float, in_bar: bool) -> Row:
    print(f"{case}: {seconds:.3f} s", flush=True)
    return {"part": "alone", "size": size, "case": case, "provider": OURS, "seconds": seconds, "in_bar": in_bar}


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    found = call()
    return found, time.perf_counter() - begin


# --- everybody, on a smaller suite ---------------------------------------------------------------------------


def compared(large: list[Any], small: list[Any], rounds: int) -> list[Row]:
    """At full size without bitmaps, which would take 16 kB an item, and on a small suite with them."""
    bitmaps = [packed(part) for part in small]
    bits: dict[str, dict[str, Callable[[], Result]]] = {
        COUNTED: {"packed bitmaps": lambda: (np.stack([_unpacked_counts(one) for one in bitmaps]),)},
        PAIRED: {"packed bitmaps": lambda: _bitmap_pairs(bitmaps)},
    }
    return _compared(large, {}, 1) + _compared(small, bits, rounds)


def _compared(made: list[Any], more: dict[str, dict[str, Callable[[], Result]]], rounds: int) -> list[Row]:
    cases: dict[str, dict[str, Callable[[], Result]]] = {
        COUNTED: {
            OURS: lambda: (np.stack([part.counts() for part in made]),),
            "NumPy sets": lambda: (np.stack([_unique_counts(part) for part in made]),),
        },
        PAIRED: {OURS: lambda: _ours_pairs(made), "NumPy sets": lambda: _set_pairs(made)},
    }
    if _version("scipy") is not None:
        cases[COUNTED]["scipy.sparse"] = lambda: (np.stack([_indicator(part).sum(axis=0).A1 for part in made]),)
        cases[PAIRED]["scipy.sparse"] = lambda: _sparse_pairs(made)
    return [row for case, ours in cases.items() for row in race(_size(made), case, ours | more.get(case, {}), rounds)]


def race(size: str, case: str, contestants: dict[str, Callable[[], Result]], rounds: int) -> list[Row]:
    """Every contestant once a round, beginning with another one each time; the first round's results are compared."""
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, Result] = {}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            result, seconds = _timed(contestants[name])
            times[name].append(seconds)
            found.setdefault(name, result)
    correct = {name: _same(found[OURS], found[name]) for name in names}
    rows = []
    for name in names:
        ratio = statistics.median(t / o for t, o in zip(times[name], times[OURS], strict=True))
        print(f"{case}, {name}: {ratio:.2f}x of qscope's time", flush=True)
        row: Row = {"part": "compared", "size": size, "case": case, "provider": name, "correct": correct[name]}
        row |= {"ratio": ratio, "ratio_min": min(times[name]) / min(times[OURS]), "rounds": rounds}
        rows.append(row | {"seconds": statistics.median(times[name]), "seconds_min": min(times[name])})
    return rows


def _same(one: Result, other: Result) -> bool:
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one, other, strict=True))


def packed(part: Any) -> Any:
    """[items, F / 8] uint8: a bitmap per item."""
    bits = np.zeros((len(part), F // 8), np.uint8)
    np.bitwise_or.at(bits, (part.owners(), part.features // 8), (128 >> (part.features % 8)).astype(np.uint8))
    return bits


def _unique_counts(part: Any) -> Any:
    counts = np.zeros(F, np.int64)
    ids, many = np.unique(part.features, return_counts=True)
    counts[ids] = many
    return counts


def _unpacked_counts(bits: Any) -> Any:
    return sum(np.unpackbits(bits[i : i + 100], axis=1).sum(axis=0, dtype=np.int64) for i in range(0, len(bits), 100))


def _indicator(part: Any) -> Any:
    from scipy.sparse import csr_matrix

    return csr_matrix((np.ones(part.entries, np.int32), part.features, part.starts), shape=(len(part), F))


def _ours_pairs(made: list[Any]) -> Result:
    from qscope.coverage.suite import pair_counts

    sets = np.stack([part.present() for part in made])
    return sets.any(axis=0).sum(), pair_counts(sets)


def _set_pairs(made: list[Any]) -> Result:
    sets = [np.unique(part.features) for part in made]
    common = _pairs(len(made), lambda a, b: len(np.intersect1d(sets[a], sets[b], assume_unique=True)))
    return len(np.unique(np.concatenate(sets))), common


def _bitmap_pairs(bitmaps: list[Any]) -> Result:
    sets = [np.bitwise_or.reduce(bits, axis=0) for bits in bitmaps]
    common = _pairs(len(sets), lambda a, b: int(np.bitwise_count(sets[a] & sets[b]).sum(dtype=np.int64)))
    return int(np.bitwise_count(np.bitwise_or.reduce(sets)).sum(dtype=np.int64)), common


def _sparse_pairs(made: list[Any]) -> Result:
    from scipy.sparse import csr_matrix, vstack

    sets = vstack([csr_matrix(_indicator(part).sum(axis=0) > 0, dtype=np.int32) for part in made])
    return int((sets.sum(axis=0).A1 > 0).sum()), (sets @ sets.T).toarray()


def _pairs(B: int, common: Callable[[int, int], int]) -> Any:
    found = np.zeros((B, B))
    for a in range(B):
        for b in range(a + 1):
            found[a, b] = found[b, a] = common(a, b)
    return found


# --- the smallest subset -------------------------------------------------------------------------------------


def covers(options: argparse.Namespace) -> list[Row]:
    from qscope.coverage import Footprints, smallest_cover

    made = Footprints.from_topk(*codes(0, options.cover_items), F)
    size, share = f"{options.cover_items:,} items", 0.9

    def ours() -> Result:
        return (smallest_cover(made, share).items,)

    wanted = smallest_cover(made, share).wanted
    contestants = {OURS: ours, "lazy greedy, heap": lambda: (np.array(list(lazy(made, wanted))),)}
    return race(size, "items that keep 90 % of the features", contestants, 1)


def lazy(made: Any, wanted: int) -> Iterator[int]:
    """Minoux's lazy greedy, gains by NumPy."""
    heap = [(-int(size), i) for i, size in enumerate(made.sizes)]
    heapq.heapify(heap)
    missing, covered = np.ones(F, np.bool_), 0
    while covered < wanted:
        _, i = heap[0]
        ids = made.item(i)
        gain = int(missing[ids].sum())
        heapq.heapreplace(heap, (-gain, i))
        if heap[0][1] == i:  # still the first with its true gain, ties by the lowest item
            heapq.heappop(heap)
            missing[ids] = False
            covered += gain
            yield i


# --- the page ------------------------------------------------------------------------------------------------

_ABOUT = """\
`ratio` is the median over rounds of a contestant's time divided by qscope's in the same round, above 1 where qscope is
faster; `of minima` divides the shortest times, which other work on the machine disturbs least. At full size there is
one round. Every contestant starts from footprints in its own form (flat ids; packed bitmaps built beforehand) and has
to give qscope's numbers exactly."""


def markdown(rows: list[Row]) -> str:
    about = rows[-1]
    versions = f"numpy {about['numpy']}, scipy {about['scipy']}, python {about['python']}"
    changed = " with changes" if about["uncommitted"] == "yes" else ""
    shown = [row for row in rows if row["part"] == "compared"]
    bar = sum(row["seconds"] for row in rows if row.get("in_bar"))
    lines = [f"# Coverage on {about['device']}", "", f"{versions}, {about['threads']} threads, commit "]
    lines[-1] += f"{about['commit'][:24]}{changed}. F = {F:,}, K = {K}, Zipf-like ids of a fixed seed."
    lines += ["", _ABOUT, "", "## Where qscope loses", ""]
    lost = [r for r in shown if r["ratio"] < 1 and r["ratio_min"] < 1]
    lines += [f"- {r['case']}: {r['provider']} takes {r['ratio']:.2f}x of qscope's time" for r in lost] or ["Nowhere."]
    lines += ["", "## Beside others", "", "| ratio | of minima | case | contestant | seconds | items | same numbers |"]
    lines.append("| --- " * 7 + "|")
    for row in shown:
        cells = [f"{row['ratio']:.2f}x", f"{row['ratio_min']:.2f}x", row["case"], row["provider"]]
        cells += [f"{row['seconds']:.3f}", row["size"], "yes" if row["correct"] else "NO"]
        lines.append(f"| {' | '.join(cells)} |")
    alone = [row for row in rows if row["part"] == "alone"]
    lines += ["", f"## {alone[0]['size']}, qscope alone", ""]
    lines += [f"Counted, unioned and overlapped (marked) in {bar:.1f} s; the bar is {BAR:.0f} s.", ""]
    lines += ["| seconds | step | in the bar |", "| --- | --- | --- |"]
    lines += [f"| {r['seconds']:.3f} | {r['case']} | {'yes' if r['in_bar'] else ''} |" for r in alone]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
