"""What bench_train.py trains on: a planted dictionary, and residuals of the embedded model."""

import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qscope.training.buffer import Stream

LAYER = 15
_HELD_OUT = -1  # its batch number
_PLANTED_SEED = 7_919_000_000


class Source(Protocol):
    """Batches of activations, the same for whoever asks, and tokens that are in no batch."""

    d_in: int

    @property
    def truth(self) -> Tensor | None:
        """[F_true, D] unit rows, where they are known"""

    def batches(self, first: int, count: int) -> list[Tensor]:
        """Batches `first` to `first + count - 1`, [N, D] float32 each."""

    def held_out(self, tokens: int) -> Tensor: ...


@dataclass(frozen=True)
class PlantedSpec:
    """Sums of known features: `active` of `features` per token, the frequent ones (Zipf) more often, each with its own
    mean magnitude, around a constant offset. No noise: an SAE that knows the features reaches FVU 0."""

    d_in: int = 128
    features: int = 512
    active: int = 8
    zipf: float = 0.5
    magnitude_spread: float = 0.3
    """Standard deviation of the features' log mean magnitudes"""
    offset: float = 1.0
    """Norm of the mean offset, in units of sqrt(active), about the norm of a centred token"""


class Planted:
    """Made batch by batch from the seed and the number of the batch."""

    def __init__(self, spec: PlantedSpec, batch: int, seed: int, device: str) -> None:
        self.spec, self.batch, self.seed, self.device, self.d_in = spec, batch, seed, device, spec.d_in
        # Far from the seeds of the trainers: the same generator would start their dictionaries from the truth.
        generator = torch.Generator().manual_seed(_PLANTED_SEED + seed)
        rows = F.normalize(torch.randn(spec.features, spec.d_in, generator=generator), dim=1)
        offset = F.normalize(torch.randn(spec.d_in, generator=generator), dim=0)
        magnitude = (spec.magnitude_spread * torch.randn(spec.features, generator=generator)).exp()
        self.truth = rows.to(device)
        self.offset = (offset * spec.offset * spec.active**0.5).to(device)
        self.magnitude = magnitude.to(device)
        self.log_frequency = -spec.zipf * torch.arange(1, spec.features + 1, device=device).float().log()

    def batches(self, first: int, count: int) -> list[Tensor]:
        return [self._draw(number, self.batch) for number in range(first, first + count)]

    def held_out(self, tokens: int) -> Tensor:
        return self._draw(_HELD_OUT, tokens)

    def _draw(self, number: int, tokens: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(_PLANTED_SEED + self.seed * 1_000_003 + number + 2)
        size = (tokens, self.spec.features)
        gumbel = -torch.empty(size, device=self.device).exponential_(generator=generator).log()
        ids = (gumbel + self.log_frequency).topk(self.spec.active, dim=1).indices
        spread = torch.empty(ids.shape, device=self.device).exponential_(generator=generator)
        values = self.magnitude[ids] * (0.5 + 0.5 * spread)
        return F.embedding_bag(ids, self.truth, per_sample_weights=values, mode="sum") + self.offset


class Stored:
    """Rows of an .npy file [tokens, D] float16: the last `reserved` ones are held out."""

    truth = None

    def __init__(self, path: Path, batch: int, reserved: int, device: str) -> None:
        rows = np.load(path)
        self.rows, self.rest = rows[: len(rows) - reserved], rows[len(rows) - reserved :]
        self.batch, self.device, self.d_in = batch, device, rows.shape[1]

    def batches(self, first: int, count: int) -> list[Tensor]:
        found = []
        for number in range(first, first + count):
            rows = self.rows[number * self.batch : (number + 1) * self.batch]
            if len(rows) < self.batch:
                raise ValueError(f"batch {number} of {self.batch} tokens is past the end of {len(self.rows)} tokens.")
            found.append(torch.from_numpy(rows).to(self.device).float())
        return found

    def held_out(self, tokens: int) -> Tensor:
        return torch.from_numpy(self.rest[:tokens]).to(self.device).float()


def residuals(tokens: int, reserved: int, device: str) -> Path:
    """File of `tokens` shuffled residuals of the embedded model at block 15, then `reserved` of other documents.

    Made once and kept in qscope's cache. First tokens of windows and extreme norms are left out, as in training.
    """
    from qscope import embedded
    from qscope.files import cache_dir
    from qscope.model import load_model
    from qscope.training.activations import model_stream
    from qscope.training.text import TextFiles

    path = cache_dir() / "bench" / f"residuals-{LAYER}-{tokens}-{reserved}.npy"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(str(embedded.default_model_path()), device=device)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        lines = embedded.demo_text(Path(scratch) / "all.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        split = len(lines) * 7 // 8
        partial = Path(scratch) / "rows.npy"
        parts = []
        for name, documents, wanted in (("train", lines[:split], tokens), ("held-out", lines[split:], reserved)):
            text = Path(scratch) / f"{name}.jsonl"
            text.write_text("".join(documents), encoding="utf-8", newline="\n")
            buffer = min(wanted, 65536)
            stream = model_stream(model, tokenizer, TextFiles([text]), [LAYER], buffer_tokens=buffer, tokens=wanted)
            parts += [rows.half().cpu().numpy() for rows in _taken(stream, wanted, buffer // 4)]
        np.save(partial, np.concatenate(parts))
        os.replace(partial, path)
    return path


def _taken(stream: Stream, wanted: int, step: int) -> Iterator[Tensor]:
    for done in itertools.count(0, step):
        if done >= wanted:
            return
        yield stream.next(min(step, wanted - done))[LAYER]


@torch.no_grad()
def pca_fvu(source: Source, batches: int, held_out: Tensor, k: int) -> float:
    """FVU on the held-out tokens of the k principal components of the training batches: what k dense directions do."""
    total = torch.zeros(source.d_in, dtype=torch.float64, device=held_out.device)
    second = torch.zeros(source.d_in, source.d_in, dtype=torch.float64, device=held_out.device)
    count = 0
    for number in range(batches):
        x = source.batches(number, 1)[0].double()
        total, second, count = total + x.sum(0), second + x.T @ x, count + len(x)
    mean = total / count
    directions = torch.linalg.eigh(second / count - torch.outer(mean, mean)).eigenvectors[:, -k:]
    apart = held_out.double() - mean
    error = apart - (apart @ directions) @ directions.T
    about = held_out.double() - held_out.double().mean(0)
    return float(error.square().sum() / about.square().sum())
