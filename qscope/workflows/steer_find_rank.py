"""Codes to ranked features, the choice among them, and the steering spec."""

from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from qscope import embedded
from qscope._version import __version__
from qscope.errors import InputError
from qscope.finding import scores
from qscope.finding.diagnosis import diagnose
from qscope.finding.output_score import logit_lens, one_token_effect, typical_tokens
from qscope.finding.pooled import Floats, Ints
from qscope.finding.scores import METRICS, Sample, ranking
from qscope.finding.stability import (
    Agreement,
    Bootstrap,
    Interval,
    bootstrap,
    halves,
    split_agreement,
    top1_differences,
)
from qscope.steering.spec import Edit, SAEReference, SteeringSpec
from qscope.workflows.encoder import Encoder
from qscope.workflows.steer_find_read import LayerCodes, Tokens, contexts, scale, usable
from qscope.workflows.steer_find_result import (
    FeatureFound,
    HeldOut,
    LayerDiagnosis,
    LayerFound,
    SteerFindResult,
    UnusualFeature,
)
from qscope.workflows.steer_find_texts import PARAPHRASE, TEST, TRAIN, Texts

if TYPE_CHECKING:
    from qscope.workflows.steer_find import SteerFindConfig

DENSE = 0.1
SHARE = 0.3  # of the layer's median residual norm: how far target_change moves a token, for all features alike
TARGETS = 20


@dataclass(frozen=True)
class Found:
    """What was read: everything that ranking needs."""

    config: "SteerFindConfig"
    encoder: Encoder
    texts: Texts
    tokens: Tokens
    codes: dict[int, LayerCodes]

    @cached_property
    def counts(self) -> npt.NDArray[np.bool_]:
        return usable(self.tokens)

    def weight(self, part: int) -> Ints:
        """[T] 1 for the texts of a part that have a token that counts."""
        return (self.counts & (self.texts.part == part)).astype(np.int64)

    def rows(self, part: int, positive: bool) -> npt.NDArray[np.bool_]:
        """[N] tokens of one side of a part."""
        return ((self.texts.part == part) & (self.texts.positive == positive))[self.tokens.text]

    def notes(self) -> tuple[str, ...]:
        empty = int((~self.counts).sum())
        said = (f"{empty} texts without a token that counts were left out",) if empty else ()
        mismatches = {layer: text for layer, text in self.encoder.mismatches.items() if text}
        return self.texts.notes + said + tuple(f"layer {layer}: {text}" for layer, text in mismatches.items())

    def about(self) -> dict[str, str]:
        encoder, config = self.encoder, self.config
        return {
            "dtype": encoder.dtype,
            "features": encoder.precision,
            "device": encoder.device,
            "context": f"{config.context_size} tokens{' after a BOS' if config.bos else ''}",
            "pooling": config.pooling,
            "left out": f"{'' if config.bos else 'first and '}special tokens, shared {config.drop_shared}, prefix "
            f"{config.drop_prefix}",
            "seed": str(config.seed),
            "versions": f"qscope {__version__}, torch {torch.__version__}, "
            f"transformers {metadata.version('transformers')}",
        }


# --- ranking ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerScores:
    """All features of one layer on the training texts: [C] each."""

    sample: Sample
    eligible: npt.NDArray[np.bool_]
    score: Floats
    order: Ints
    """Columns, best first"""
    t: Floats
    p: Floats
    q: Floats
    """Of features that are not eligible: 1"""
    stable: Bootstrap | None
    halves: Agreement | None
    paraphrase: Agreement | None


def ranked(found: Found) -> SteerFindResult:
    """Rank the features of all layers, choose a layer and features, and make the spec."""
    config, train = found.config, found.weight(TRAIN)
    layers = _scored(found, train)
    by_any = {
        layer: (Sample(s.sample.codes, s.sample.positive, s.sample.group, "any"), s.eligible)
        for layer, s in layers.items()
    }
    tops = top1_differences(by_any, train, config.bootstrap, config.seed)
    targets = _targets(found)
    made = {
        layer: LayerFound(
            **_layer_facts(found, layer),
            ranked=int(s.eligible.sum()),
            significant=int((s.eligible & (s.q <= config.fdr) & (s.t > 0)).sum()),
            top1=tops[layer],
            features=_features(found, layer, s, train, targets),
            bootstrap=s.stable.agreement if s.stable else None,
            halves=s.halves,
            paraphrase=s.paraphrase,
        )
        for layer, s in layers.items()
    }
    layer, chosen = _choose(config, made)
    by = config.choose_by.replace("_", " ")
    most = "top1 difference of firing rates on the training texts" if by == "rank" else f"{by} of a feature"
    reason = (
        f"layer {layer} has the largest {most}; of its features that rise and are not dense, the first {len(chosen)} "
        f"by {by}"
    )
    strength = 1.0 if config.strength is None else config.strength
    spec = _spec(found, layer, [(f.feature, f.scale) for f in chosen], made[layer].residual_norm, strength)
    return SteerFindResult(
        model=found.encoder.model_name,
        about={"set": found.texts.name, **_sizes(found), "ranked by": config.metric, **found.about()},
        notes=found.notes(),
        layers={str(n): item for n, item in made.items()},
        diagnosis={},
        layer=layer,
        chosen=tuple(f.feature for f in chosen),
        reason=reason,
        targets=tuple(found.encoder.tokenizer.decode([i]) for i in targets),
        spec=spec,
        **_paths(config),
    )


def _scored(found: Found, train: Ints) -> dict[int, LayerScores]:
    config = found.config
    scored = {}
    for layer, codes in found.codes.items():
        sample = Sample(codes.pooled, found.texts.positive, found.texts.group, config.pooling)
        eligible = scores.texts_firing(sample, train) >= config.min_texts
        if not eligible.any():
            raise InputError(
                f"No feature of layer {layer} fires in {config.min_texts} of the {int(train.sum())} training texts. "
                "Give more texts or a smaller --min-texts."
            )
        score = METRICS[config.metric](sample, train)
        welch = scores.welch(sample, train)
        stable, split, other = _stability(found, sample, train, eligible)
        scored[layer] = LayerScores(
            sample, eligible, score, ranking(score, scores.mean_difference(sample, train), eligible), welch.t,
            scores.p_values(welch), np.ones(len(eligible)), stable, split, other,
        )  # fmt: skip
    q = scores.q_values(np.concatenate([s.p[s.eligible] for s in scored.values()]))
    start = 0
    for s in scored.values():
        size = int(s.eligible.sum())
        s.q[s.eligible] = q[start : start + size]
        start += size
    return scored


def _stability(
    found: Found, sample: Sample, train: Ints, eligible: npt.NDArray[np.bool_]
) -> tuple[Bootstrap | None, Agreement | None, Agreement | None]:
    config, stable, split, other = found.config, None, None, None
    again = found.weight(PARAPHRASE)
    if again.any():
        pairs = [(train, again)]
        other = split_agreement(sample, pairs, eligible, config.metric, config.top)
    if config.bootstrap:
        stable = bootstrap(sample, train, eligible, config.metric, config.top, config.bootstrap, config.seed)
        positive = int(train[sample.positive].sum())
        if min(positive, int(train.sum()) - positive) >= 2:
            pairs = list(halves(sample, train, max(1, config.bootstrap // 5), config.seed))
            split = split_agreement(sample, pairs, eligible, config.metric, config.top)
    return stable, split, other


def _features(found: Found, layer: int, s: LayerScores, train: Ints, targets: list[int]) -> tuple[FeatureFound, ...]:
    """The top features of one layer with everything that is said of them."""
    config, sample, codes = found.config, s.sample, found.codes[layer]
    best = s.order[: config.top]
    left, right = scores.means(sample, train), scores.rates(sample, train)
    density, area, nu = scores.densities(sample, train), scores.auroc(sample, train), scores.nu(sample, train)
    rows = found.rows(TRAIN, True)
    listed = []
    for c in best.tolist():
        feature = int(sample.codes.features[c])
        interval = Interval(float(s.score[c]), float(s.stable.low[c]), float(s.stable.high[c])) if s.stable else None
        listed.append(
            FeatureFound(
                feature=feature,
                mean_positive=float(left[0][c]),
                mean_negative=float(left[1][c]),
                mean_difference=float(left[0][c] - left[1][c]),
                rate_positive=float(right[0][c]),
                rate_negative=float(right[1][c]),
                rate_difference=float(right[0][c] - right[1][c]),
                auroc=float(area[c]),
                t=float(s.t[c]),
                p=float(s.p[c]),
                q=float(s.q[c]),
                nu=float(nu[c]),
                density_positive=float(density[0][c]),
                density_negative=float(density[1][c]),
                dense=bool(density[1][c] > DENSE),
                scale=scale(codes, feature, rows),
                score=interval,
                inclusion=float(s.stable.inclusion[c]) if s.stable else None,
                contexts=contexts(found.encoder, found.tokens, codes, feature, rows),
            )
        )
    listed = _with_held_out(found, sample, best, listed)
    return tuple(_with_output(found, layer, listed, targets))


def _with_held_out(found: Found, sample: Sample, best: Ints, listed: list[FeatureFound]) -> list[FeatureFound]:
    test = found.weight(TEST)
    if not test[sample.positive].any() or not test[~sample.positive].any():
        return listed
    figures = [f(sample, test)[best] for f in (scores.mean_difference, scores.rate_difference, scores.auroc)]
    return [replace(feature, held_out=HeldOut(*(float(x[i]) for x in figures))) for i, feature in enumerate(listed)]


# --- effect on the output --------------------------------------------------------------------------------


def named_targets(config: "SteerFindConfig", tokenizer: Any) -> list[int]:
    """Ids of --targets. Raises InputError for one that is not one token."""
    lists = [tokenizer(text, add_special_tokens=False).input_ids for text in config.targets]
    for text, ids in zip(config.targets, lists, strict=True):
        if len(ids) != 1:
            raise InputError(
                f"--targets {text!r} is {len(ids)} tokens of this tokenizer "
                f"({', '.join(repr(tokenizer.decode([i])) for i in ids)}); texts of one token are accepted. Mind "
                "the space before a word."
            )
    return [ids[0] for ids in lists]


def _targets(found: Found) -> list[int]:
    """Ids of the tokens that output scores are about."""
    config = found.config
    if not config.neutral_prompts:
        return []
    if config.targets:
        return named_targets(config, found.encoder.tokenizer)
    ids, keep = found.tokens.windows.token.astype(np.int64), found.tokens.keep
    positive, negative = (ids[keep & found.rows(TRAIN, side)] for side in (True, False))
    return [int(i) for i in typical_tokens(positive, negative, TARGETS)]


def _with_output(found: Found, layer: int, listed: list[FeatureFound], targets: list[int]) -> list[FeatureFound]:
    """Logit lens and one-token intervention of the features listed."""
    config, encoder, sae = found.config, found.encoder, found.encoder.saes[layer]
    if not config.neutral_prompts or not listed:
        return listed
    numbers = [f.feature for f in listed]
    lens = logit_lens(encoder.model, sae.W_dec.detach()[torch.tensor(numbers, device=sae.device)], targets)
    bos = [] if encoder.bos is None else [encoder.bos]
    prompts = [bos + encoder.tokenizer(p, add_special_tokens=False).input_ids for p in config.neutral_prompts]
    effect = one_token_effect(
        encoder.model,
        sae,
        layer,
        numbers,
        (SHARE * found.codes[layer].residual_norm / sae.W_dec[numbers].float().norm(dim=1)).tolist(),
        prompts,
        lens.tokens,
        targets,
        config.amplify,
    )
    return [
        replace(
            feature,
            lens=_words(encoder, lens.tokens[i]),
            lens_target=float(lens.target[i]) if targets else None,
            output_score=_finite(effect.output_score[i]),
            target_change=_finite(effect.target_change[i]) if targets else None,
        )
        for i, feature in enumerate(listed)
    ]


def _finite(value: float) -> float | None:
    """None for what a float16 model may answer to an intervention outside its range."""
    return float(value) if np.isfinite(value) else None


def _words(encoder: Encoder, ids: Ints) -> tuple[str, ...]:
    return tuple(encoder.tokenizer.decode([int(i)]) for i in ids[:10])


# --- choice and spec -------------------------------------------------------------------------------------


def _choose(config: "SteerFindConfig", made: dict[int, LayerFound]) -> tuple[int, list[FeatureFound]]:
    """A layer and its features: by rank, that with the largest top1 difference; else that of the strongest feature."""
    if config.choose_by == "rank":
        layer = max(made, key=lambda layer: (made[layer].top1.difference.value, -layer))
        return layer, _choose_features(config, layer, made[layer])
    fitting = {layer: _choose_features(config, layer, found) for layer, found in made.items() if _fitting(found)}
    if not fitting:
        return next((layer, _choose_features(config, layer, found)) for layer, found in made.items())
    layer = max(fitting, key=lambda layer: (getattr(fitting[layer][0], config.choose_by), -layer))
    return layer, fitting[layer]


def _fitting(found: LayerFound) -> list[FeatureFound]:
    return [f for f in found.features if f.mean_difference > 0 and not f.dense and f.scale]


def _choose_features(config: "SteerFindConfig", layer: int, found: LayerFound) -> list[FeatureFound]:
    fitting = _fitting(found)
    if not fitting:
        raise InputError(
            f"None of the top {config.top} features of layer {layer} is more active in the positive texts, and the "
            "others are dense. Give texts that differ more, or a larger --top."
        )
    if config.choose_by != "rank":
        values = [getattr(f, config.choose_by) for f in fitting]
        if None in values:
            raise InputError(
                f"--choose-by {config.choose_by} needs --prompts and target tokens, which are not there, or the model "
                "overflowed. Give them, or --dtype float32."
            )
        fitting = [fitting[i] for i in np.argsort([-v for v in values], kind="stable")]
    return fitting[: config.choose]


def _spec(
    found: Found, layer: int, features: list[tuple[int, float | None]], norm: float, strength: float
) -> dict[str, Any]:
    sae = found.encoder.saes[layer]
    edits = tuple(
        Edit(layer=layer, feature=feature, mode="add", strength=strength, unit="quantile", scale=size)
        for feature, size in features
    )
    where = "in the response" if found.config.response is not None else "in the positive training texts"
    note = (
        f"qscope steer find, {found.texts.name}: scale is the 0.99 quantile of the feature's activation over the "
        f"tokens at which it fires {where}; median residual norm of layer {layer}: {norm:.6g}"
    )
    saes = {layer: SAEReference(_source(found, layer), sae.weight_hash())}
    return SteeringSpec(edits, saes, found.encoder.model_name, note).to_json()


def _source(found: Found, layer: int) -> str:
    """The name by which `SAE.from_pretrained` finds the SAE of a layer again, as the user gave it."""
    names = found.config.sae or (embedded.SAES,)
    return names[0] if len(names) == 1 else names[list(found.encoder.saes).index(layer)]


def _layer_facts(found: Found, layer: int) -> dict[str, Any]:
    sae, codes = found.encoder.saes[layer], found.codes[layer]
    return {
        "sae": sae.card.source or f"sha256 {sae.weight_hash()[:12]}",
        "d_sae": sae.d_sae,
        "k": sae.k,
        "tokens": codes.facts,
        "residual_norm": codes.residual_norm,
        "mismatch": found.encoder.mismatches.get(layer),
    }


def _sizes(found: Found) -> dict[str, str]:
    texts, said = found.texts, {}
    for part, name in ((TRAIN, "training"), (TEST, "held-out"), (PARAPHRASE, "paraphrase")):
        sizes = texts.count(part, True), texts.count(part, False)
        if any(sizes):
            said[f"{name} texts"] = f"{sizes[0]} positive, {sizes[1]} negative"
    if len(texts.groups) > 1:
        said["negative groups"] = ", ".join(texts.groups)
    return said


def _paths(config: "SteerFindConfig") -> dict[str, str | None]:
    found = {"spec_path": config.spec, "html": config.html, "out": config.out}
    return {name: None if path is None else str(path) for name, path in found.items()}


# --- a bad case ------------------------------------------------------------------------------------------


def diagnosis(found: Found) -> SteerFindResult:
    """Rank the features of one response against the pool, at all layers; the spec suppresses the most unusual ones."""
    config = found.config
    if not found.counts[found.texts.positive].all():
        raise InputError(
            "The response has no token that counts; the first one and special ones do not. Give a longer one."
        )
    layers = {layer: _unusual(found, layer) for layer in found.codes}
    best: dict[int, list[UnusualFeature]] = {
        layer: [f for f in item.features if not f.dense and f.z > 0][: config.choose] for layer, item in layers.items()
    }
    layer = max(best, key=lambda n: (best[n][0].activation / layers[n].residual_norm if best[n] else -1.0, -n))
    strength = -1.0 if config.strength is None else config.strength
    if not best[layer]:
        raise InputError("No feature of the response is unusual: none is more active than in the neutral pool.")
    spec = _spec(found, layer, [(f.feature, f.scale) for f in best[layer]], layers[layer].residual_norm, strength)
    return SteerFindResult(
        model=found.encoder.model_name,
        about={"set": f"one response against {int((~found.texts.positive).sum())} neutral texts", **found.about()},
        notes=found.notes(),
        layers={},
        diagnosis={str(n): item for n, item in layers.items()},
        layer=layer,
        chosen=tuple(f.feature for f in best[layer]),
        reason=f"of each layer's most unusual feature that is not dense, that of layer {layer} has the largest "
        "activation in units of the residual norm",
        targets=(),
        spec=spec,
        **_paths(config),
    )


def _unusual(found: Found, layer: int) -> LayerDiagnosis:
    config, encoder, codes = found.config, found.encoder, found.codes[layer]
    response = int(np.flatnonzero(found.texts.positive)[0])
    d = diagnose(codes.pooled, response, config.pooling, found.counts)
    size = min(config.top, len(d.feature))
    lens: list[tuple[str, ...]] = [()] * size
    if config.neutral_prompts and size:
        sae = encoder.saes[layer]
        rows = sae.W_dec.detach()[torch.from_numpy(d.feature[:size]).to(sae.device)]
        lens = [_words(encoder, ids) for ids in logit_lens(encoder.model, rows, []).tokens]
    mine = found.rows(TRAIN, True)
    features = tuple(
        UnusualFeature(
            feature=int(d.feature[i]),
            activation=float(d.activation[i]),
            firing=float(d.firing[i]),
            z=float(d.z[i]),
            pool_mean=float(d.pool_mean[i]),
            pool_rate=float(d.pool_rate[i]),
            exceed=float(d.exceed[i]),
            dense=bool(d.pool_rate[i] > DENSE),
            scale=scale(codes, int(d.feature[i]), mine),
            lens=lens[i],
            contexts=contexts(encoder, found.tokens, codes, int(d.feature[i]), mine, 1),
        )
        for i in range(size)
    )
    return LayerDiagnosis(features=features, **_layer_facts(found, layer))
