"""Targets out of lists, rules and explanations."""

import pytest

from qscope import detectors
from qscope.classification.rule import Clause, FeatureRule, RuleSAE, Source
from qscope.errors import InputError
from qscope.synthesis.targets import Target, explained, from_rule, listed, relevant

SOURCE = Source("m", "a", "b", (RuleSAE(3, "c", 100, 8),), 64)


def rule(**changes):
    clauses = (Clause(3, 7, threshold=1.5, scale=4.0, meaning="insults"), Clause(3, 9))
    return FeatureRule(clauses, classes=("rude", "clean"), source=SOURCE, **changes)


def test_a_list():
    assert [t.key for t in listed(["3:7", "15:2401", "3:7"])] == [(3, 7), (15, 2401)]
    for wrong in ("7", "3:", "a:1", "3:-1", ""):
        with pytest.raises(InputError, match="layer:feature"):
            listed([wrong])


def test_a_rule_gives_features_classes_and_where_wanted_thresholds():
    loose, strict = from_rule(rule()), from_rule(rule(), thresholds=True)
    assert [(t.key, t.threshold, t.label, t.meaning) for t in loose] == [
        ((3, 7), 0.0, "rude", "insults"),
        ((3, 9), 0.0, "rude", None),
    ]
    assert [t.threshold for t in strict] == [1.5, 0.0]
    assert from_rule(rule(), label="harmful")[0].label == "harmful"
    with pytest.raises(InputError, match="pooling 'mean'"):
        from_rule(rule(pooling="mean"))


def test_relevance_is_judged_by_what_is_said():
    said = {(3, 7): "fires on insults such as idiot", (3, 8): "fires on numbers", (3, 9): "an insult"}
    assert len(relevant(said, detectors.parse("keywords:insult,insults"), 1.0)) == 2  # a score at tau is enough
    found = relevant(said, detectors.parse("keywords:insult,insults"), 0.5)
    assert [(t.key, t.relevance) for t in found] == [((3, 7), 1.0), ((3, 9), 1.0)]
    with pytest.raises(InputError, match="None of 3 explained features"):
        relevant(said, detectors.parse("keywords:music"), 0.5)


def test_meanings_are_added_and_not_replaced():
    found = explained([Target(3, 7, meaning="own"), Target(3, 9)], {(3, 7): "other", (3, 9): "this"})
    assert [t.meaning for t in found] == ["own", "this"]
