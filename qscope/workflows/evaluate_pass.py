"""One reading of the text for `qscope evaluate`: what is fitted, what is measured, and what is spliced in.

The first `fit_tokens` tokens give the mean, the PCA and the usual norm of each layer; the document in which they end
is left, so nothing measured was fitted. The next `loss_tokens` (in whole contexts) go through the whole model, once
as it is and once for every replacement; the rest through it as far as the deepest layer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qscope.data import ReadCounts, TextOptions, Windows, batches, find_sources, read_pieces, text_shards, tokenize
from qscope.errors import InputError, ModelError
from qscope.evaluation.fidelity import LEFT_OUT, ORDINARY, SET_ASIDE, Fidelity
from qscope.evaluation.moments import Basis, Moments
from qscope.evaluation.splice import VARIANTS, SpliceSums, bypassed, next_token_losses, spliced
from qscope.model import capture, decoder_layers, residuals
from qscope.sae import SAE
from qscope.store_packing import EXTREME_FACTOR
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import Encoder

if TYPE_CHECKING:
    from qscope.workflows.evaluate import EvaluateConfig

SCOPES = ("ordinary", "all")
LOGIT_BYTES = {False: 1 << 28, True: 1 << 31}  # of one variant's logits in float32, on a CPU and on a GPU


@dataclass(frozen=True)
class TokenCounts:
    """Tokens that were measured at one layer. Ordinary tokens are neither sinks nor first."""

    measured: int
    ordinary: int
    sinks: int
    """Norm above 10 times the median norm of the fitted tokens: attention sinks."""
    first: int
    """First token of a context (none with --bos, where the BOS is that and is not measured)."""
    first_sinks: int
    """Both."""
    nan_rows: int
    """Not finite, or with a reconstruction that is not; left out of everything."""
    set_aside_variance: float
    """1 - sum ||x - mean||^2 over the ordinary tokens / the same over all: what sinks and first tokens carry."""
    norm_median: float
    """Of the fitted tokens."""
    fitted: int
    """Tokens on which mean, PCA and median norm were fitted, none of them measured."""
    fitted_ordinary: int


# --- text ------------------------------------------------------------------------------------------------


def token_windows(encoder: Encoder, config: EncodeConfig) -> Iterator[Windows]:
    """Windows of the whole text, shard by shard; a document that spans shards keeps its number."""
    options = TextOptions(field=config.field)
    pieces = read_pieces(find_sources(config.text, options), options, ReadCounts())
    carry = (0, 0)
    for shard in text_shards(pieces, config.shard_bytes):
        windows = tokenize(encoder.tokenizer, shard.pieces, config.context_size, carry)
        if len(windows.token):
            carry = (int(windows.document[-1]), int(windows.position[-1]) + 1)
            yield windows


def parts(shards: Iterable[Windows], fit: int, measure: int) -> Iterator[tuple[str, Windows]]:
    """The first `fit` tokens and, from the next document on, `measure` tokens: ("fit" or "measure", windows) in order.

    The last window of each part is cut to its size. A part may come in several pieces.
    """
    left = {name: count for name, count in (("fit", fit), ("measure", measure)) if count}
    avoid = None  # the document in which the fit ended
    for windows in shards:
        starts = windows.starts
        at, count = 0, len(starts) - 1
        while left and at < count:
            if int(windows.document[starts[at]]) == avoid:
                at += 1
                continue
            name = next(iter(left))
            stop = min(count, int(np.searchsorted(starts, starts[at] + left[name])))
            bounds = starts[at : stop + 1].copy()
            bounds[-1] = min(bounds[-1], starts[at] + left[name])
            yield name, windows._replace(starts=bounds)
            left[name] -= int(bounds[-1] - bounds[0])
            if not left[name]:
                del left[name]
                avoid = int(windows.document[bounds[-1] - 1]) if name == "fit" else None
            at = stop
        if not left:
            return


# --- one layer -------------------------------------------------------------------------------------------


class LayerPass:
    """What is kept of one layer while the text is read: 16 D^2 bytes while the PCA is fitted, then 60 d_sae."""

    def __init__(self, sae: SAE, precision: str, recall_tokens: int) -> None:
        self.sae, self.precision = sae, precision
        self.norms: list[Tensor] = []
        self.median = 0.0
        self.moments: tuple[Moments, Moments] | None = None
        self.bases: dict[str, Basis] = {}
        self.fitted = (0, 0)  # tokens, ordinary ones
        self.fidelity: Fidelity | None = None
        self.sums = {scope: SpliceSums() for scope in SCOPES}
        self.sinks = self.first = self.first_sinks = 0
        self.wanted = recall_tokens
        self.sample: list[Tensor] = []

    def group(self, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """([n] int32 group, [n] bool extreme norm) of residuals x [n, D]; first: [n] bool."""
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        sinks = norms > EXTREME_FACTOR * self.median
        group = torch.where(sinks | first, SET_ASIDE, ORDINARY)
        return torch.where(norms.isfinite(), group, LEFT_OUT).int(), sinks & norms.isfinite()

    def fit(self, x: Tensor, first: Tensor) -> None:
        """One batch of the first part. Sinks are told by the median of the norms so far, which is near its end soon."""
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        self.norms.append(norms[norms.isfinite()].cpu())
        seen = torch.cat(self.norms)
        self.median = float(seen.median()) if len(seen) else 0.0
        group, _ = self.group(x, first)
        if self.moments is None:
            own = x[group == ORDINARY].double()
            shift = own.mean(0) if len(own) else torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            self.moments = (Moments(shift), Moments(shift))
        for which in (ORDINARY, SET_ASIDE):
            self.moments[which].add(x[group == which])

    def finish_fit(self, layer: int) -> None:
        ordinary = 0 if self.moments is None else self.moments[ORDINARY].count
        if self.moments is None or ordinary <= self.sae.k:
            raise InputError(
                f"The PCA of rank {self.sae.k} at layer {layer} was to be fitted on {ordinary} ordinary tokens; more "
                "than the rank are needed. Give more text or a larger --fit-tokens."
            )
        own, aside = self.moments
        self.fitted = (own.count + aside.count, own.count)
        self.bases = {"ordinary": own.principal(self.sae.k), "all": (own + aside).principal(self.sae.k)}
        self.moments = None
        self.fidelity = Fidelity(self.sae.d_sae, (self.bases["ordinary"], self.bases["all"]))

    def measure(self, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """One batch: x [n, D] -> (reconstruction [n, D], group [n])."""
        assert self.fidelity is not None
        if self.wanted > 0:
            self.sample.append(x[: self.wanted].clone())
            self.wanted -= len(self.sample[-1])
        acts, indices = self.sae.encode_topk(x, precision=self.precision)
        x_hat = self.sae.decode(acts, indices)
        group, sinks = self.group(x, first)
        group[~x_hat.isfinite().all(1)] = LEFT_OUT
        kept = group != LEFT_OUT
        self.sinks += int((sinks & kept).sum())
        self.first += int((first & kept).sum())
        self.first_sinks += int((sinks & first & kept).sum())
        self.fidelity.add(x, x_hat, acts, indices, group)
        return x_hat, group

    def token_counts(self) -> TokenCounts:
        assert self.fidelity is not None
        ordinary, aside = (int(count) for count in self.fidelity.sums[:, 0].tolist())
        return TokenCounts(
            measured=ordinary + aside,
            ordinary=ordinary,
            sinks=self.sinks,
            first=self.first,
            first_sinks=self.first_sinks,
            nan_rows=self.fidelity.left_out,
            set_aside_variance=self.fidelity.set_aside_variance(),
            norm_median=self.median,
            fitted=self.fitted[0],
            fitted_ordinary=self.fitted[1],
        )


# --- the whole pass --------------------------------------------------------------------------------------


class Pass:
    """The model, and the layers looked at."""

    def __init__(self, encoder: Encoder, config: "EvaluateConfig") -> None:
        self.encoder, self.config = encoder, config
        self.model = encoder.model
        self.blocks = decoder_layers(self.model)
        self.layers = {
            layer: LayerPass(sae, config.precision, config.recall_tokens) for layer, sae in sorted(encoder.saes.items())
        }
        vocabulary = self.model.get_input_embeddings().num_embeddings
        most = LOGIT_BYTES[next(self.model.parameters()).is_cuda] // (4 * vocabulary)
        self.loss_batch = max(1, min(encoder.batch_tokens, most))
        self.shortcut: dict[int, bool] = {}
        self.as_tuple: list[bool] = []

    def run(self, shards: Iterable[Windows], bar: Any) -> None:
        """Read everything that the config asks for."""
        fitted = measured = 0
        for name, windows in parts(shards, self.config.fit_tokens, self.config.measured):
            size = int(windows.starts[-1] - windows.starts[0])
            if name == "fit":
                fitted += size
                self.read("fit", windows, bar)
                continue
            if not measured:
                self.finish_fit()
            # Whole windows, so that the same tokens are measured whatever --loss-tokens is.
            wanted = max(0, self.config.loss_tokens - measured)
            split = min(len(windows.starts) - 1, int(np.searchsorted(windows.starts - windows.starts[0], wanted)))
            self.read("loss", windows._replace(starts=windows.starts[: split + 1]), bar)
            self.read("rest", windows._replace(starts=windows.starts[split:]), bar)
            measured += size
        if not measured:
            raise InputError(
                f"The text ended after {fitted} tokens, and the first {self.config.fit_tokens} (and the rest of the "
                "document in which they end) only serve to fit the mean and the PCA. Give more text, or fewer "
                "--fit-tokens."
            )

    def read(self, name: str, windows: Windows, bar: Any) -> None:
        """All batches of some windows."""
        size = self.loss_batch if name == "loss" else self.encoder.batch_tokens
        for rows in batches(windows.starts, size):
            ids, real, places = self.encoder.pad(windows, rows)
            try:
                self.batch(name, ids, real)
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"A batch of {ids.shape[0]} x {ids.shape[1]} tokens did not fit into the device's memory. Try "
                    f"--batch-tokens {max(1, size // 2)} or a smaller --context-size."
                ) from error
            bar.update(len(places))

    def finish_fit(self) -> None:
        for layer, found in self.layers.items():
            found.finish_fit(layer)

    def batch(self, name: str, ids: Tensor, real: Tensor) -> None:
        """ids: [B, S], with a BOS in front where asked for; real: [B, S without BOS]."""
        if self.encoder.bos is not None:
            real = torch.cat([torch.zeros_like(real[:, :1]), real], 1)
        first = torch.zeros_like(real)
        first[:, 0] = True  # a BOS is not real, so nothing comes of this
        if name == "loss":
            with capture(self.model, self.layers) as residual:
                logits = self.logits(ids)
            clean = Clean.of(ids, real, logits)
        else:
            residual = residuals(self.model, ids, self.layers)
        for layer, found in self.layers.items():
            x = residual[layer][real]
            if name == "fit":
                found.fit(x, first[real])
                continue
            x_hat, group = found.measure(x, first[real])
            if name == "loss":
                self.splice(layer, ids, real, residual[layer], clean, x_hat, group)

    def logits(self, ids: Tensor) -> Tensor:
        """[B, S, V] of the model."""
        with torch.no_grad():
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return found

    def splice(
        self, layer: int, ids: Tensor, real: Tensor, hidden: Tensor, clean: "Clean", x_hat: Tensor, group: Tensor
    ) -> None:
        """Losses with the residuals of ordinary tokens, and with those of all, replaced in every way."""
        found, x = self.layers[layer], hidden[real]
        for scope in SCOPES:
            chosen = group == ORDINARY if scope == "ordinary" else group != LEFT_OUT
            basis = found.bases[scope]
            losses = {}
            for name in VARIANTS:
                new, row = hidden.clone(), x.clone()
                row[chosen] = replacement(name, x, x_hat, basis)[chosen].to(row.dtype)
                new[real] = row
                losses[name] = clean.compare(self.replaced_logits(layer, ids, new, clean))
            found.sums[scope].add(clean.entropy, losses, int(chosen.sum()))

    def replaced_logits(self, layer: int, ids: Tensor, hidden: Tensor, clean: "Clean") -> Tensor:
        """Logits with `hidden` [B, S, D] as the output of block `layer`.

        What stands before the block no longer matters, so it is passed over where that was seen to change nothing.
        """
        if layer not in self.shortcut:
            self.shortcut[layer] = self.shortcut_holds(layer, ids, clean)
        block = self.blocks[layer]
        if not self.shortcut[layer]:
            with spliced(block, hidden):
                return self.logits(ids)
        before: list[nn.Module] = list(self.blocks[:layer])
        with bypassed(before, self.as_tuple[:layer]), spliced(block, hidden):
            return self.logits(ids)

    def shortcut_holds(self, layer: int, ids: Tensor, clean: "Clean") -> bool:
        """Whether the block's own output, spliced in behind blocks that are passed over, gives the clean logits."""
        if not self.as_tuple:
            self.as_tuple = output_kinds(self.blocks, lambda: self.logits(ids[:1, :2]))
        with capture(self.model, [layer], stop=True) as own:
            self.logits(ids)
        self.shortcut[layer] = True
        return torch.equal(clean.pick(self.replaced_logits(layer, ids, own[layer], clean)), clean.logits)


def replacement(name: str, x: Tensor, x_hat: Tensor, basis: Basis) -> Tensor:
    """[n, D]: what stands for the residuals x in a variant of the splice."""
    if name == "sae":
        return x_hat
    if name == "zero":
        return torch.zeros_like(x)
    return basis.mean.expand_as(x) if name == "mean" else basis.reconstruct(x)


def output_kinds(blocks: nn.ModuleList, run: Any) -> list[bool]:
    """Whether each block puts out a tuple, seen while `run()` calls the model."""
    kinds = dict.fromkeys(range(len(blocks)), False)
    handles = [
        block.register_forward_hook(lambda _m, _i, output, n=n: kinds.update({n: isinstance(output, tuple)}))
        for n, block in enumerate(blocks)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(kinds.values())


@dataclass
class Clean:
    """Predictions of the untouched model on one batch."""

    logits: Tensor
    """[n, V], of the positions that have a next token"""
    targets: Tensor
    """[n] int64"""
    entropy: Tensor
    """[n] float64"""
    next_real: Tensor
    """[B, S - 1] bool"""

    @classmethod
    def of(cls, ids: Tensor, real: Tensor, logits: Tensor) -> "Clean":
        follows = real[:, 1:]
        targets, picked = ids[:, 1:][follows], logits[:, :-1][follows]
        return cls(picked, targets, next_token_losses(picked, targets)[0], follows)

    def pick(self, logits: Tensor) -> Tensor:
        return logits[:, :-1][self.next_real]

    def compare(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy, KL from these predictions), [n] each."""
        return next_token_losses(self.pick(logits), self.targets, self.logits)
