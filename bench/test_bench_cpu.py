"""The same cases under pytest-benchmark: python -m pytest bench/test_bench_cpu.py

For looking at one provider. Committed figures come from `python -m bench`, which interleaves the providers' rounds, so
that a slow spell of a shared machine falls on all of them and ratios stay right; pytest-benchmark times one after the
other.
"""

from functools import lru_cache
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark (pip install pytest-benchmark)")

from bench import OPS, cases
from bench._case import Case

CASES = [case for op in OPS for case in cases(op, "cpu", quick=True)]
PAIRS = [pytest.param(case, name, id=f"{case}-{name}".replace(" ", "_")) for case in CASES for name in case.providers]


@lru_cache(maxsize=1)
def prepared(index: int) -> tuple[Any, Any]:
    """Inputs and answer of one case, kept while its providers are measured."""
    inputs = CASES[index].inputs(0)
    return inputs, CASES[index].want(inputs)


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_provider(benchmark: Any, case: Case, name: str) -> None:
    provider = case.providers[name]
    if provider.missing:
        pytest.skip(f"{name}: {provider.missing}")
    inputs, want = prepared(CASES.index(case))
    call = provider.make(inputs)
    result = call()
    shown = result if provider.adapt is None else provider.adapt(result)
    (provider.check or case.check)(shown, want, provider.precision)
    benchmark.group = str(case)
    benchmark.pedantic(call, rounds=7, warmup_rounds=1)
