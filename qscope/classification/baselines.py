"""Classifiers that a rule of features has to be measured against, on the same splits.

Each factory binds arrays of all T texts; what a method learns (scales, vocabulary, weights, strength of the penalty)
comes from the training texts alone.
"""

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qscope.classification.methods import Learned, Method, Problem, sigmoid, sklearn
from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints, PooledCodes, Pooling

STRENGTHS = tuple(10.0**power for power in range(-4, 4))
"""C of the logistic regressions, from strong penalty to weak"""
FOLDS = 5
MAX_ITER = 1000
TERMS = 200_000
"""Most frequent n-grams that a TF-IDF vocabulary keeps"""
SCALE_QUANTILE = 0.99
_ROWS = 8192  # dense rows that are scored in float64 at once


def residual_probe(residual: npt.NDArray[np.float32], name: str = "linear probe") -> Method:
    """Logistic regression on one residual vector per text [T, D] (its mean or last token), standardised."""

    def learn(problem: Problem) -> Learned:
        mean, scale = _standard(residual[problem.train])
        rows = (residual[problem.train].astype(np.float64) - mean) / scale
        fitted = _logistic(rows, problem)
        weight = fitted.weight / scale
        return fitted.judge(_linear(residual, weight, fitted.bias - weight @ mean), problem)

    return Method(name, learn, "Logistic regression on the standardised residual; C by inner cross-validation")


def mean_difference(residual: npt.NDArray[np.float32], name: str = "difference of means") -> Method:
    """Projection of the standardised residual [T, D] on mean of a class - mean of the rest.

    Zero lies halfway between both means and the mean of the class at 1/2, so that several classes are comparable.
    """

    def learn(problem: Problem) -> Learned:
        mean, scale = _standard(residual[problem.train])
        rows = (residual[problem.train].astype(np.float64) - mean) / scale
        weights, biases = [], []
        for number in _targets(problem):
            own = problem.label[problem.train] == number
            if not own.any():
                weights.append(np.zeros(rows.shape[1]))
                biases.append(-np.inf)
                continue
            left, right = rows[own].mean(axis=0), rows[~own].mean(axis=0)
            direction = left - right
            length = float(direction @ direction) or 1.0
            weights.append(direction / length)
            biases.append(-float(direction @ (left + right)) / 2 / length)
        weight = np.array(weights) / scale
        scores = _linear(residual, weight, np.array(biases) - weight @ mean)
        return Learned(scores[:, 0] if problem.classes == 2 else scores)

    return Method(name, learn, "Projection of the standardised residual on the difference of the class means")


def tfidf(texts: Sequence[str], analyzer: Literal["word", "char"] = "word", name: str | None = None) -> Method:
    """TF-IDF of words and pairs of words, or of 2 to 5 characters within words; logistic regression."""
    settings: dict[str, Any] = (
        {"analyzer": "word", "ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"}
        if analyzer == "word"
        else {"analyzer": "char_wb", "ngram_range": (2, 5)}
    )

    def learn(problem: Problem) -> Learned:
        known = [texts[i] for i in problem.train]
        maker = sklearn("feature_extraction.text").TfidfVectorizer(
            sublinear_tf=True, min_df=2 if len(known) >= 100 else 1, max_features=TERMS, **settings
        )
        try:
            rows = maker.fit_transform(known)
        except ValueError as error:  # an empty vocabulary
            raise InputError(
                f"The {len(known)} training texts hold no {analyzer} n-gram to learn from ({error}). Give texts that "
                "have letters."
            ) from error
        fitted = _logistic(rows, problem)
        learned = fitted.judge(maker.transform(texts) @ fitted.weight.T + fitted.bias, problem)
        return learned._replace(facts={**learned.facts, "terms": rows.shape[1]})

    note = "words and pairs of words" if analyzer == "word" else "2 to 5 characters within words"
    return Method(
        name or f"TF-IDF ({analyzer})", learn, f"Logistic regression on TF-IDF of {note}; C by inner cross-validation"
    )


def sparse_features(codes: PooledCodes, pooling: Pooling = "any") -> Any:
    """scipy CSR [T, C] float64 of the pooled activations above 0; columns as `codes.features`."""
    value = codes.values(pooling)[0]
    shape = len(codes.tokens), len(codes.features)
    found = importlib.import_module("scipy.sparse").csr_array((value, (codes.text, codes.column)), shape=shape)
    found.eliminate_zeros()
    return found


def feature_probe(features: Any, name: str = "all SAE features") -> Method:
    """Logistic regression on all features, CSR [T, C], each divided by its largest value in the training texts."""

    def learn(problem: Problem) -> Learned:
        largest = features[problem.train].max(axis=0).toarray().ravel()
        used = np.flatnonzero(largest > 0)
        scaled = features[:, used].astype(np.float64)
        scaled.data /= largest[used][scaled.indices]
        fitted = _logistic(scaled[problem.train], problem)
        learned = fitted.judge(scaled @ fitted.weight.T + fitted.bias, problem)
        return learned._replace(facts={**learned.facts, "features": len(used)})

    return Method(
        name,
        learn,
        "Logistic regression on all SAE features, each divided by its largest training value; C by inner "
        "cross-validation",
    )


def random_features(
    features: Any,
    ids: Ints,
    k: int,
    draw: int = 0,
    min_texts: int = 5,
    decide: Literal["fires", "threshold"] = "fires",
    name: str | None = None,
) -> Method:
    """An OR rule of k features drawn among those that fire in at least `min_texts` training texts.

    Args:
        features: CSR [T, C] of pooled activations; ids: [C] of its columns.
        draw: number of the draw; for one draw the features of a smaller k are among those of a larger one.
        decide: fires: positive where one of them is above 0, as the rule of the paper; threshold: by the score, which
            is the largest activation / the 0.99 quantile of the feature's activations above 0 in the training texts.

    With several classes each has its own k features, the highest score decides, and where none fires the most frequent
    class of the training texts does. The method raises InputError if fewer than k features fire often enough.
    """

    def learn(problem: Problem) -> Learned:
        known = features[problem.train].tocsc()
        eligible = np.flatnonzero(np.diff(known.indptr) >= max(1, min_texts))
        targets = _targets(problem)
        if len(eligible) < k:
            raise InputError(
                f"{k} random features were asked for, and {len(eligible)} fire in at least {min_texts} of the "
                f"{len(problem.train)} training texts. Ask for fewer, or give more texts."
            )
        chosen = []
        columns = features.tocsc()
        scores = np.zeros((len(problem.label), len(targets)))
        for place, number in enumerate(targets):
            order = np.random.default_rng([problem.seed, draw, number]).permutation(eligible)
            chosen.append(ids[order[:k]].tolist())
            for column in order[:k]:
                active = known.data[known.indptr[column] : known.indptr[column + 1]]
                start, end = columns.indptr[column : column + 2]
                scaled = columns.data[start:end] / np.quantile(active, SCALE_QUANTILE)
                where = columns.indices[start:end]
                scores[where, place] = np.maximum(scores[where, place], scaled)
        facts = {"features": chosen[0] if problem.classes == 2 else chosen, "eligible": len(eligible)}
        if problem.classes == 2:
            fires = (scores[:, 0] > 0).astype(np.int64)
            return Learned(scores[:, 0], fires if decide == "fires" else None, None, facts)
        silent = scores.max(axis=1) <= 0
        return Learned(scores, np.where(silent, _most_frequent(problem), scores.argmax(axis=1)), None, facts)

    return Method(
        name or f"random features (K={k}, draw {draw + 1})",
        learn,
        f"OR rule of {k} features drawn among those that fire in at least {min_texts} training texts",
    )


def majority(name: str = "majority") -> Method:
    """The most frequent class of the training texts for every text, the lowest of equals; its share as probability."""

    def learn(problem: Problem) -> Learned:
        shares = np.bincount(problem.label[problem.train], minlength=problem.classes) / len(problem.train)
        constant = (
            np.full(len(problem.label), shares[1]) if problem.classes == 2 else np.tile(shares, (len(problem.label), 1))
        )
        decisions = np.full(len(problem.label), _most_frequent(problem))
        return Learned(constant, decisions, constant, {"class": _most_frequent(problem)})

    return Method(name, learn, "The most frequent class of the training texts, always")


# --- logistic regression -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fitted:
    weight: Floats
    """[1, D] for two classes, else [C', D] of the classes that occur in training"""
    bias: Floats
    classes: Ints
    """[C']"""
    facts: dict[str, Any]

    def judge(self, decision: Floats, problem: Problem) -> Learned:
        """Scores are log odds [T], or logits [T, C] that are -inf for classes without a training text."""
        if problem.classes == 2:
            return Learned(decision[:, 0], None, sigmoid(decision[:, 0]), self.facts)
        if decision.shape[1] == 1:  # two of the classes occur: log odds of the second
            decision = np.hstack([np.zeros_like(decision), decision])
        scores = np.full((len(decision), problem.classes), -np.inf)
        scores[:, self.classes] = decision
        probability = np.exp(scores - scores.max(axis=1, keepdims=True))
        return Learned(scores, None, probability / probability.sum(axis=1, keepdims=True), self.facts)


def _logistic(rows: Any, problem: Problem) -> _Fitted:
    """L2-penalised logistic regression (lbfgs, multinomial for several classes) of the training rows, dense or CSR."""
    label = problem.label[problem.train]
    strength, folds = _strength(rows, label, problem.seed)
    with warnings.catch_warnings():
        # said in facts["converged"], which reports can count, instead of on a terminal
        warnings.simplefilter("ignore", sklearn("exceptions").ConvergenceWarning)
        model = _model(strength).fit(rows, label)
    facts = {"C": strength, "folds": folds, "converged": bool(model.n_iter_.max() < MAX_ITER)}
    return _Fitted(model.coef_, model.intercept_, model.classes_.astype(np.int64), facts)


def _model(strength: float) -> Any:
    return sklearn("linear_model").LogisticRegression(C=strength, max_iter=MAX_ITER, warm_start=True)


def _strength(rows: Any, label: Ints, seed: int) -> tuple[float, int]:
    """(C with the least log loss on held-out folds, number of folds); the strongest penalty of equals.

    The grid is walked from the strong penalty, each fit starting at the one before, until the loss has risen twice in
    a row: what lies beyond overfits more and takes longest. Without two texts of each class C is 1, and folds 0.
    """
    folds = min(FOLDS, int(np.unique(label, return_counts=True)[1].min()))
    if folds < 2:
        return 1.0, 0
    split = sklearn("model_selection").StratifiedKFold(folds, shuffle=True, random_state=seed)
    parts = [(rows[fit], label[fit], rows[held], label[held]) for fit, held in split.split(label, label)]
    models = [_model(STRENGTHS[0]) for _ in parts]
    log_loss = sklearn("metrics").log_loss
    losses: list[float] = []
    for strength in STRENGTHS:
        found = []
        for model, (fit, fit_label, held, held_label) in zip(models, parts, strict=True):
            model.set_params(C=strength)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", sklearn("exceptions").ConvergenceWarning)  # its loss still counts
                model.fit(fit, fit_label)
            found.append(log_loss(held_label, model.predict_proba(held), labels=model.classes_) * len(held_label))
        losses.append(sum(found) / len(label))
        if len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
            break
    return STRENGTHS[int(np.argmin(losses))], folds


# --- small parts -------------------------------------------------------------------------------------------


def _targets(problem: Problem) -> list[int]:
    return [1] if problem.classes == 2 else list(range(problem.classes))


def _most_frequent(problem: Problem) -> int:
    return int(np.argmax(np.bincount(problem.label[problem.train], minlength=problem.classes)))


def _standard(rows: npt.NDArray[np.float32]) -> tuple[Floats, Floats]:
    """(mean, standard deviation, 1 where it is 0), each [D], in float64."""
    deviation = rows.std(axis=0, dtype=np.float64)
    return rows.mean(axis=0, dtype=np.float64), np.where(deviation > 0, deviation, 1.0)


def _linear(rows: npt.NDArray[np.float32], weight: Floats, bias: Floats) -> Floats:
    """[T, C] rows [T, D] @ weight [C, D].T + bias [C]."""
    found = np.empty((len(rows), len(weight)))
    for start in range(0, len(rows), _ROWS):
        block = slice(start, start + _ROWS)
        found[block] = rows[block].astype(np.float64) @ weight.T + bias
    return found
