"""What explanations are made of beside token codes: the store's tokenizer, raised tokens, codes of texts, rules."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch

from qscope import embedded
from qscope.classification.rule import FeatureRule, Rule
from qscope.data import batches
from qscope.errors import InputError
from qscope.explaining.journal import Explanation
from qscope.explaining.prompts import Decode
from qscope.explaining.sources import MemoryCodes, TokenCodes
from qscope.finding.output_score import logit_lens
from qscope.model import residuals
from qscope.store import FeatureStore
from qscope.store_packing import EXTREME_FACTOR
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import Encoder, LayerBuffer, load_encoder
from qscope.workflows.text_features import TokenTexts, windows_of

RAISED = 8  # tokens of each feature
_Dtype = Literal["bfloat16", "float16", "float32"]
_DTYPES: dict[str, _Dtype] = {name: name for name in get_args(_Dtype)}


def decoder(store: FeatureStore) -> Decode:
    """Token ids to text with the store's tokenizer, special tokens included."""
    tokenizer = store.tokenizer()
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=False))


def raised_tokens(
    store: FeatureStore,
    wanted: Mapping[int, Sequence[int]],
    lens: bool,
    model: str | None,
    sae: tuple[str, ...],
    device: str,
) -> tuple[dict[tuple[int, int], tuple[str, ...]], list[str]]:
    """((layer, feature) -> next tokens that it raises most, notes): decoder rows through the unembedding.

    wanted: layer -> features. Without model and SAE, only for the embedded model. Raises InputError where the model or
    an SAE is not the store's.
    """
    settings = store.settings
    if not lens:
        return {}, []
    if model is None and not sae and settings.model.name != embedded.DEFAULT_MODEL_NAME:
        return {}, [f"Raised tokens are not shown: give --model and --sae of {settings.model.name} to have them."]
    layers = tuple(sorted(wanted)) if len(sae) <= 1 else ()
    encoder = load_encoder(
        EncodeConfig(
            text=(),
            model=model,
            sae=sae,
            layers=layers,
            device=device,
            dtype=_DTYPES.get(settings.dtype, "auto"),
            allow_mismatch=True,
        )
    )
    if encoder.model_sha256 != settings.model.sha256:
        raise InputError(
            f"The store was made with {settings.model.name} (sha256 {settings.model.sha256[:12]}), and "
            f"{encoder.model_name} is another model (sha256 {encoder.model_sha256[:12]}). Give the store's with "
            "--model, or leave the raised tokens out with --no-lens."
        )
    found: dict[tuple[int, int], tuple[str, ...]] = {}
    for layer, features in wanted.items():
        own = encoder.saes.get(layer)
        given = "none" if own is None else f"sha256 {own.weight_hash()[:12]}"
        if own is None or own.weight_hash() != settings.sae(layer).sha256:
            raise InputError(
                f"The store's features of layer {layer} are of the SAE {settings.sae(layer).source or ''} (sha256 "
                f"{settings.sae(layer).sha256[:12]}), and --sae gives {given}. Give that SAE, or leave the raised "
                "tokens out with --no-lens."
            )
        rows = own.W_dec.detach()[torch.tensor(list(features), device=own.device)]
        for feature, top in zip(features, logit_lens(encoder.model, rows, ()).tokens, strict=True):
            found[layer, feature] = tuple(str(encoder.tokenizer.decode([t])) for t in top[:RAISED].tolist())
    return found, []


def token_codes(encoder: Encoder, texts: TokenTexts) -> MemoryCodes:
    """Codes of all tokens of the texts, to explain features from texts that are in no store.

    The tokens that count are those of `read_features`, extreme norms being told from the median of all texts here.
    Memory: 8 K bytes per token and layer.
    """
    windows = windows_of(texts)
    count = len(windows.token)
    buffers = {layer: LayerBuffer(count, sae) for layer, sae in encoder.saes.items()}
    for rows in batches(windows.starts, encoder.batch_tokens):
        ids, real, places = encoder.pad(windows, rows)
        found = residuals(encoder.model, ids, encoder.layers)
        for layer, buffer in buffers.items():
            hidden = found[layer][:, 1:] if encoder.bos is not None else found[layer]
            buffer.put(places, hidden[real], encoder.precision)
    document, position, token = (getattr(windows, name).astype(np.int64) for name in ("document", "position", "token"))
    keep = ~np.isin(token, np.array(sorted(encoder.tokenizer.all_special_ids), np.int64))
    if encoder.bos is None:
        keep &= position > 0
    codes = {}
    for layer, buffer in buffers.items():
        finite = np.isfinite(buffer.norms) & np.isfinite(buffer.top_acts).all(axis=1)
        bar = EXTREME_FACTOR * np.median(buffer.norms[finite]) if finite.any() else 0.0
        counted = keep & finite & (buffer.norms <= bar)
        codes[layer] = TokenCodes(buffer.top_acts, buffer.top_indices, counted)
    saes = {layer: (sae.weight_hash(), sae.d_sae) for layer, sae in encoder.saes.items()}
    return MemoryCodes(document, position, token, codes, saes)


def named_rule(rule: Rule, explanations: Mapping[tuple[int, int], Explanation]) -> Rule:
    """The rule with explanations as the meanings of its features; those without one keep what they have.

    explanations: as `qscope.explaining.journal.load_explanations` gives them. Raises InputError for those of another
    SAE than the rule's.
    """
    parts = (rule,) if isinstance(rule, FeatureRule) else rule.rules
    for part in parts:
        for clause in part.clauses:
            one = explanations.get((clause.layer, clause.feature))
            if one is not None:
                part.source.check_sae(clause.layer, one.made.sae_sha256)
    meanings = {key: one.text for key, one in explanations.items()}
    if isinstance(rule, FeatureRule):
        return rule.with_meanings(meanings)
    return replace(rule, rules=tuple(part.with_meanings(meanings) for part in rule.rules))
