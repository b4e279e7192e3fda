"""From rows to what a reader asks: how much faster than each peer, where we lose, and which bars are met."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ._results import Row

CASE = ("op", "mode", "N", "D", "F", "K", "dtype")


class Ratio(NamedTuple):
    """One of our providers against one peer at one case; above 1 we are faster."""

    ratio: float
    case: dict[str, object]
    ours: str
    ours_ms: float
    peer: str
    peer_ms: float
    fastest: float
    """The same ratio of the fastest rounds."""


class Gap(NamedTuple):
    """A provider without a time, and why."""

    case: dict[str, object]
    provider: str
    note: str


class BarResult(NamedTuple):
    """One bar at the shape where it is hardest."""

    name: str
    wanted: str
    measured: str
    """Value and shape; or why there is none."""
    met: bool | None
    """None where nothing was measured."""


@dataclass(frozen=True)
class Summary:
    """What the tables are written from."""

    ratios: list[Ratio]
    gaps: list[Gap]
    bars: list[BarResult]

    @property
    def losses(self) -> list[Ratio]:
        """Where a peer is faster."""
        return [ratio for ratio in self.ratios if ratio.ratio < 1]


def summary(rows: list[Row]) -> Summary:
    """Ratios in the order of the rows, gaps, and the bars of the device that was measured."""
    ratios = [ratio for case in _cases(rows) for ratio in _ratios(case)]
    gaps = [Gap(_name(r), r["provider"], r["note"]) for r in rows if r.get("p50_ms") is None and r.get("note")]
    return Summary(ratios, gaps, bars(rows))


def _name(row: Row) -> dict[str, object]:
    return {key: row.get(key) for key in CASE}


def _cases(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows that were timed side by side."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.get("p50_ms") is not None:
            groups.setdefault(tuple(row.get(key) for key in CASE), []).append(row)
    yield from groups.values()


def _ratios(case: list[Row]) -> Iterator[Ratio]:
    """The first of ours against every peer that is held to no less, then our other variants likewise.

    A bfloat16 result of ours is not compared with a float32 peer, or the other way round: both stand in cases of
    their own; an exact result beside bfloat16 peers is (it does more, and the table says which provider it is).
    """
    for mine in (row for row in case if row["role"] == "ours"):
        for peer in (row for row in case if row["role"] == "peer"):
            ratio = peer["p50_ms"] / mine["p50_ms"]
            fastest = peer["min_ms"] / mine["min_ms"]
            ours, theirs = (mine["provider"], mine["p50_ms"]), (peer["provider"], peer["p50_ms"])
            yield Ratio(ratio, _name(mine), *ours, *theirs, fastest)


# A bar's value at one case: p50 by provider -> number, or None where a provider is missing.
Value = Callable[[dict[str, Row]], float | None]


class Bar(NamedTuple):
    """A promise of docs/DESIGN.md, section 5."""

    name: str
    op: str
    value: Value
    limit: float
    at_least: bool
    where: Callable[[Row], bool] = lambda row: True
    unit: str = "x"


def _ms(rows: dict[str, Row], *names: str) -> float | None:
    """p50 of the first of these providers that was timed."""
    return next((rows[name]["p50_ms"] for name in names if name in rows), None)


def _faster(ours: str, peer: str) -> Value:
    def value(rows: dict[str, Row]) -> float | None:
        mine, theirs = _ms(rows, ours), _ms(rows, peer)
        return None if mine is None or theirs is None else theirs / mine

    return value


def _slower(ours: str, yardstick: str) -> Value:
    def value(rows: dict[str, Row]) -> float | None:
        ratio = _faster(ours, yardstick)(rows)
        return None if ratio is None else 1 / ratio

    return value


def _share(provider: str) -> Value:
    return lambda rows: rows[provider].get("share_of_floor") if provider in rows else None


def _large(row: Row) -> bool:
    return bool(row["N"] >= 8192)


def _dtype(name: str, more: Callable[[Row], bool] = lambda row: True) -> Callable[[Row], bool]:
    return lambda row: row["dtype"] == name and more(row)


def _step(row: Row) -> bool:
    return _large(row) and (row["D"], row["F"], row["K"]) == (4096, 65536, 100)


def _at(N: int, D: int, F: int) -> Callable[[Row], bool]:
    return _dtype("float32", lambda row: row["N"] >= N and (row["D"], row["F"]) == (D, F))


_BF16 = _dtype("bfloat16", _large)
_GEMM, _LINEAR, _PACKED = "matrix product alone", "torch linear+topk", "qscope exact, packed"

GPU_BARS = (
    Bar("encode bf16, share of the matrix product's rate", "topk_encode", _faster("qscope bf16", _GEMM), 0.88, True,
        _BF16),
    Bar("encode bf16 against linear + topk", "topk_encode", _faster("qscope bf16", _LINEAR), 1.5, True, _BF16),
    Bar("encode exact against float32 linear + topk", "topk_encode", _faster(_PACKED, _LINEAR), 5, True,
        _dtype("float32", _large)),
    Bar("encode exact beside our bf16 time", "topk_encode", _slower(_PACKED, "qscope bf16"), 1.35, False, _BF16),
    Bar("select, share of the copy bandwidth", "topk_select", _share("qscope"), 0.75, True, _large),
    Bar("decode, share of its gather floor", "sparse_decode", _share("qscope"), 0.70, True, _BF16),
    Bar("decode against embedding_bag", "sparse_decode", _faster("qscope", "embedding_bag"), 1, True, _large),
    Bar("decode against eai-sparsify", "sparse_decode", _faster("qscope", "eai-sparsify decode"), 1, True, _large),
    Bar("decode_loss beside decode", "decode_loss", _slower("qscope", "our sparse_decode alone"), 1.3, False, _large),
    Bar("training step against eai-sparsify, B, K=100", "train_step", _faster("qscope", "eai-sparsify"), 2, True,
        _step),
    Bar("training step against dense torch, B, K=100", "train_step", _faster("qscope", "torch dense"), 3, True, _step),
    Bar("steer_add beside a copy of h, N=8192", "steer_add", _slower("qscope", "copy of h"), 1.5, False, _large),
    Bar("steer_add at N=1 under graph replay", "steer_add",
        lambda rows: 1e3 * rows["qscope"]["p50_ms"] if "qscope" in rows else None, 6, False,
        lambda row: row["N"] == 1 and row["mode"] == "graph", " us"),
)  # fmt: skip
CPU_BARS = (
    Bar("encode exact against float32 linear + topk, 2048/32K, N >= 256", "topk_encode",
        _faster("qscope exact", _LINEAR), 3, True,
        _at(256, 2048, 32768)),
    Bar("the same with packed weights", "topk_encode", _faster(_PACKED, _LINEAR), 3, True, _at(256, 2048, 32768)),
    Bar("the same, 4096/64K, N >= 256", "topk_encode", _faster(_PACKED, _LINEAR), 3, True, _at(256, 4096, 65536)),
    Bar("exact, packed, against bfloat16 linear + topk, 2048/32K, N >= 256", "topk_encode",
        _faster(_PACKED, "torch linear+topk, cast to bf16 before"), 1, True, _at(256, 2048, 32768)),
    Bar("decode against embedding_bag", "sparse_decode", _faster("qscope", "embedding_bag"), 1, True),
)  # fmt: skip
_BAR_DEVICES = ("H100", "H200", "H20", "GH200")


def bars(rows: list[Row]) -> list[BarResult]:
    """Every bar of the measured device, at the case where it is hardest; none on a GPU that they were not set for."""
    device = next((row["device"] for row in rows if row.get("device")), None)
    if device is None:
        return []
    gpu = all(row.get("threads") is None for row in rows)
    if gpu and not any(name in device for name in _BAR_DEVICES):
        return []
    return [_measure(bar, rows) for bar in (GPU_BARS if gpu else CPU_BARS)]


def _measure(bar: Bar, rows: list[Row]) -> BarResult:
    wanted = f"{'>=' if bar.at_least else '<='} {bar.limit:g}{bar.unit}"
    found = []
    for case in _cases(row for row in rows if row["op"] == bar.op and bar.where(row)):
        value = bar.value({row["provider"]: row for row in case})
        if value is not None:
            found.append((value, _name(case[0])))
    if not found:
        return BarResult(bar.name, wanted, "not measured", None)
    # What replay takes is the work itself; eager times of short calls are those of launching them.
    replayed = [entry for entry in found if entry[1]["mode"] == "graph"] or found
    value, where = (min if bar.at_least else max)(replayed, key=lambda entry: entry[0])
    met = value >= bar.limit if bar.at_least else value <= bar.limit
    return BarResult(bar.name, wanted, f"{value:.3g}{bar.unit} at {describe(where)}", met)


def describe(case: dict[str, object]) -> str:
    """`N=8192 D=2048 F=32768 K=50 bfloat16 graph` of a case, without its operator."""
    sizes = [f"{key}={case[key]}" for key in ("N", "D", "F", "K") if case.get(key)]
    return " ".join([*sizes, str(case["dtype"]), str(case["mode"])])
