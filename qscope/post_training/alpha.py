"""Thresholds and features of the SASFT penalty, estimated from texts of each group."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qscope.data import Piece, batches, tokenize
from qscope.errors import InputError
from qscope.files import write_file
from qscope.finding.pooled import PooledCodes
from qscope.finding.scores import Sample, nu, ranking
from qscope.model import num_layers, residual_width, residuals
from qscope.post_training.rows import Rows, check_rows, names
from qscope.sae import SAE

_FORMAT = 1


@dataclass(frozen=True)
class AlphaLayer:
    """Thresholds of one layer, and the rows that they were estimated for."""

    values: Tensor
    """[G, S] float32"""
    fingerprint: str
    """`Rows.fingerprint()`"""
    features: tuple[int, ...] | None
    sae_hash: str | None


@dataclass(frozen=True)
class Alpha:
    """Mean pre-activation of each feature (or direction) on the texts of each group."""

    groups: tuple[str, ...]
    tokens: tuple[int, ...]
    """[G] tokens that were averaged"""
    left_out: int
    """Tokens whose residual was not finite"""
    layers: dict[int, AlphaLayer]

    @property
    def values(self) -> dict[int, Tensor]:
        """layer -> [G, S] float32"""
        return {layer: one.values for layer, one in self.layers.items()}

    def check(self, rows: Mapping[int, Rows]) -> None:
        """InputError unless this was estimated for just these rows."""
        if set(rows) != set(self.layers):
            raise InputError(
                f"alpha was estimated for the layers {sorted(self.layers)}, and the penalty reads {sorted(rows)}. "
                "Estimate it for the layers of the penalty."
            )
        for layer, one in rows.items():
            own = self.layers[layer]
            if own.sae_hash != one.sae_hash:
                shown = ["no SAE (directions)" if h is None else f"{h[:16]}..." for h in (own.sae_hash, one.sae_hash)]
                raise InputError(
                    f"alpha of layer {layer} was estimated with the SAE {shown[0]}, and the penalty reads {shown[1]}: "
                    "its feature ids may mean other things. Estimate alpha with the SAE of the penalty."
                )
            if own.fingerprint != one.fingerprint():
                what = "these directions" if one.features is None else f"the features {list(one.features)}"
                raise InputError(
                    f"alpha of layer {layer} was not estimated for {what}"
                    + (f" but for {list(own.features)}" if own.features is not None else "")
                    + ". Estimate it for the rows of the penalty, in the same order."
                )

    def save(self, path: str | Path) -> Path:
        """Writes it as JSON, atomically. Raises StorageError when the disk refuses."""
        layers = {
            layer: {
                "features": one.features,
                "sae_hash": one.sae_hash,
                "rows_sha256": one.fingerprint,
                "alpha": one.values.tolist(),
            }
            for layer, one in self.layers.items()
        }
        data = _file_model()(
            format=_FORMAT, groups=self.groups, tokens=self.tokens, left_out=self.left_out, layers=layers
        )
        text = data.model_dump_json(indent=1).encode()
        write_file(Path(path), [text], len(text))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Alpha":
        """Raises InputError for a file that `save` did not write."""
        import pydantic

        try:
            data = _file_model().model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}. Give a file that Alpha.save wrote.") from error
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(
                f"{path} holds no thresholds: {where}: {first['msg']}. Give a file that Alpha.save wrote."
            ) from error
        layers = {}
        for layer, one in data.layers.items():
            width = len(one.alpha[0]) if one.alpha else 0
            if len(one.alpha) != len(data.groups) or not width or any(len(row) != width for row in one.alpha):
                raise InputError(f"{path}: alpha of layer {layer} is not a row of numbers for each of its groups.")
            layers[layer] = AlphaLayer(torch.tensor(one.alpha), one.rows_sha256, one.features, one.sae_hash)
        return cls(data.groups, data.tokens, data.left_out, layers)


def _file_model() -> Any:
    """The file as a pydantic model; pydantic is imported where a file is read or written."""
    import pydantic

    class Layer(pydantic.BaseModel, extra="forbid"):
        features: tuple[int, ...] | None
        sae_hash: str | None
        rows_sha256: str
        alpha: list[list[pydantic.FiniteFloat]]

    class AlphaFile(pydantic.BaseModel, extra="forbid"):
        format: int = pydantic.Field(ge=_FORMAT, le=_FORMAT)
        groups: tuple[str, ...] = pydantic.Field(min_length=1)
        tokens: tuple[int, ...]
        left_out: int
        layers: dict[int, Layer] = pydantic.Field(min_length=1)

    return AlphaFile


def estimate(
    model: Any,
    tokenizer: Any,
    rows: Mapping[int, Rows],
    texts: Mapping[str, Sequence[str]],
    *,
    context_size: int = 512,
    batch_tokens: int = 1024,
) -> Alpha:
    """Mean of <x, W[s]> + b[s] over the tokens of each group's texts (alpha of SASFT; Qwen-Scope 7.3).

    The first token of each text, and of each further window of `context_size` tokens, is dropped: it is an attention
    sink. Tokens are averaged, not texts; sums are float64.

    Args:
        rows: layer -> Rows, from `qscope.post_training.rows.sae_rows` or `direction_rows`.
        texts: group -> its texts; the order of the groups is that of alpha's rows.

    Raises InputError for a group without text (or with texts of one token only), named, and rows that do not fit.
    """
    check_rows(rows, residual_width(model), num_layers(model))
    means: dict[int, list[Tensor]] = {layer: [] for layer in rows}
    counts, left_out = [], 0
    for group, own in _checked(texts).items():
        sums = {layer: torch.zeros(len(one.b), dtype=torch.float64) for layer, one in rows.items()}
        tokens = 0
        for found, dropped in _residuals(model, tokenizer, own, tuple(rows), context_size, batch_tokens):
            left_out += dropped
            tokens += len(next(iter(found.values())))
            for layer, x in found.items():
                W, b = rows[layer].W.to(x.device), rows[layer].b.to(x.device)
                sums[layer] += (x.float() @ W.T + b).sum(0, dtype=torch.float64).cpu()
        _check_tokens(group, tokens)
        counts.append(tokens)
        for layer in rows:
            means[layer].append(sums[layer] / tokens)
    layers = {
        layer: AlphaLayer(torch.stack(means[layer]).float(), one.fingerprint(), one.features, one.sae_hash)
        for layer, one in rows.items()
    }
    return Alpha(tuple(texts), tuple(counts), left_out, layers)


@dataclass(frozen=True)
class Mined:
    """Features that belong to a group."""

    features: dict[int, tuple[int, ...]]
    """layer -> ids, largest nu first"""
    nu: dict[int, tuple[float, ...]]
    """The same order: mean activation on the group's tokens - mean over the other groups of theirs"""


def mine(
    model: Any,
    tokenizer: Any,
    saes: Mapping[int, SAE],
    texts: Mapping[str, Sequence[str]],
    target: str,
    count: int = 2,
    *,
    context_size: int = 512,
    batch_tokens: int = 1024,
) -> Mined:
    """The `count` features of each layer with the largest nu for `target` (SASFT; Qwen-Scope 7.3; 2 in their code).

    Tokens count as in `estimate`. Raises InputError for a group without text, for an unknown target, for a single
    group, and where fewer than `count` features have a nu above 0.
    """
    if target not in texts or len(texts) < 2:
        raise InputError(
            f"Features of the group {target!r} were asked for, with texts of {names(texts)}. Give texts of that group "
            "and of at least one other."
        )
    groups = tuple(_checked(texts))
    totals = {layer: np.zeros((len(groups), sae.d_sae)) for layer, sae in saes.items()}
    tokens = np.zeros(len(groups), np.int64)
    for row, group in enumerate(groups):
        for found, _ in _residuals(model, tokenizer, texts[group], tuple(saes), context_size, batch_tokens):
            tokens[row] += len(next(iter(found.values())))
            for layer, x in found.items():
                acts, ids = saes[layer].encode_topk(x.to(saes[layer].device))
                weights = acts.double().clamp(min=0).flatten().cpu().numpy()
                totals[layer][row] += np.bincount(ids.flatten().cpu().numpy(), weights, saes[layer].d_sae)
        _check_tokens(group, int(tokens[row]))
    features, values = {}, {}
    for layer in sorted(saes):
        features[layer], values[layer] = _largest(totals[layer], tokens, groups.index(target), count, layer, target)
    return Mined(features, values)


def _largest(
    totals: Any, tokens: Any, own: int, count: int, layer: int, target: str
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The features with the largest nu; each group stands for one text of `qscope.finding`."""
    active = np.flatnonzero(totals.any(0))
    column, text = np.nonzero(totals[:, active].T)
    total = totals[text, active[column]]
    codes = PooledCodes(active, column, text, total, np.zeros(len(text), np.int64), total, total, tokens)
    one = np.ones(len(tokens), np.int64)
    scores = nu(Sample(codes, np.arange(len(tokens)) == own, np.arange(len(tokens))), one)
    best = ranking(scores, totals[own, active], scores > 0)[:count]
    if len(best) < count:
        raise InputError(
            f"{count} features of layer {layer} were asked for, and {len(best)} fire more on {target!r} than on the "
            "other groups. Give more text, another layer or a smaller count."
        )
    return tuple(int(i) for i in active[best]), tuple(float(v) for v in scores[best])


# --- reading texts -------------------------------------------------------------------------------------------


def _checked(texts: Mapping[str, Sequence[str]]) -> Mapping[str, Sequence[str]]:
    empty = [group for group, own in texts.items() if not any(text.strip() for text in own)]
    if empty or not texts:
        raise InputError(
            f"There is no text of {'any group' if not texts else f'the group {names(map(repr, empty))}'}. Thresholds "
            "and features need some for every group; give texts or leave the group out."
        )
    return texts


def _check_tokens(group: str, tokens: int) -> None:
    if tokens == 0:
        raise InputError(
            f"The texts of the group {group!r} hold no token that counts: the first of each is dropped, and so are "
            "tokens whose residual is not finite. Give longer texts."
        )


def _residuals(
    model: Any, tokenizer: Any, texts: Sequence[str], layers: tuple[int, ...], context_size: int, batch_tokens: int
) -> Iterator[tuple[dict[int, Tensor], int]]:
    """Batch by batch: (layer -> [n, D] of the tokens that count, tokens left out as not finite)."""
    windows = tokenize(tokenizer, [Piece(i, text) for i, text in enumerate(texts)], context_size, (-1, 0))
    device = next(model.parameters()).device
    for rows in batches(windows.starts, batch_tokens):
        starts, ends = windows.starts[rows], windows.starts[rows + 1]
        offsets = np.arange(int((ends - starts).max()))
        real = offsets[None, :] < (ends - starts)[:, None]
        ids = np.zeros(real.shape, np.int64)
        ids[real] = windows.token[(starts[:, None] + offsets[None, :])[real]]
        real[:, 0] = False
        keep = torch.from_numpy(real).to(device)
        with _evaluating(model):
            found = residuals(model, torch.from_numpy(ids).to(device), layers)
        kept = {layer: x[keep] for layer, x in found.items()}
        finite = torch.stack([x.isfinite().all(1) for x in kept.values()]).all(0)
        yield {layer: x[finite] for layer, x in kept.items()}, int((~finite).sum())


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout; the model's modules are as they were afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
