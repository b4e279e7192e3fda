"""The trainers that bench_train.py compares, each behind the same three calls.

Peers are driven through their public interface as their own training loops do, with the normalisation of the inputs
that their documentation recommends; what is common is in `Job`. On a GPU all multiply in bfloat16.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ._peers import problem

Batches = list[Tensor]
AUX_WEIGHT = 1 / 32


@dataclass(frozen=True)
class Job:
    """What every trainer is told."""

    d_in: int
    d_sae: int
    k: int
    batch: int
    steps: int
    dead_after: int
    """Tokens without firing after which a feature takes part in the AuxK loss"""
    lr_factor: float
    """Times each trainer's own automatic rate"""
    seed: int
    device: str

    @property
    def lr(self) -> float:
        """2e-4 / sqrt(F / 2^14), the rule that qscope, dictionary_learning and eai-sparsify share for Adam."""
        return self.lr_factor * 2e-4 / (self.d_sae / 2**14) ** 0.5

    @property
    def warmup(self) -> int:
        return min(1000, self.steps // 20)

    @property
    def decay(self) -> int:
        return self.steps // 5


class Codes(NamedTuple):
    """What an autoencoder says about tokens [n, D]."""

    x_hat: Tensor
    """[n, D]"""
    fired: Tensor
    """[F] bool: features above 0 for any of them"""


Model = tuple[Callable[[Tensor], Codes], Tensor]
"""The autoencoder as it stands, on activations as they come from the model, and its decoder rows [F, D]."""


class Contestant(Protocol):
    def step(self, x: Tensor) -> None: ...

    def model(self) -> Model: ...


def _fired(ids: Tensor, acts: Tensor, d_sae: int) -> Tensor:
    fired = torch.zeros(d_sae, dtype=torch.bool, device=ids.device)
    fired[ids[acts > 0].long()] = True
    return fired


def _autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16) if kind == "cuda" else contextlib.nullcontext()


def _qscope_trainer(job: Job, sample: Batches) -> Any:
    from qscope.training.recipe import Recipe
    from qscope.training.trainer import SAETrainer

    recipe = Recipe(
        d_sae=job.d_sae, k=job.k, seed=job.seed, lr=job.lr, warmup_steps=job.warmup, decay=job.decay / job.steps,
        dead_after_tokens=job.dead_after,
    )  # fmt: skip
    trainer = SAETrainer(recipe, job.d_in, device=job.device, total_steps=job.steps, batch_tokens=job.batch)
    trainer.initialise(torch.cat(sample))
    return trainer


class Qscope:
    """qscope.training.SAETrainer with the recipe's defaults."""

    def __init__(self, job: Job, sample: Batches) -> None:
        self.trainer = _qscope_trainer(job, sample)

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)

    def model(self) -> Model:
        sae = self.trainer.to_sae()

        def codes(x: Tensor) -> Codes:
            acts, ids = sae.encode_topk(x)
            return Codes(sae.decode(acts, ids), _fired(ids, acts, sae.d_sae))

        return codes, sae.W_dec


class DenseTorch:
    """The same recipe and the same first weights in dense PyTorch: autograd through a [N, F] matrix, torch's Adam."""

    def __init__(self, job: Job, sample: Batches) -> None:
        self.job, start = job, _qscope_trainer(job, sample)
        self.recipe, self.centre, self.scale = start.recipe, start.in_centre.float(), float(start.in_scale)
        first = {name: p.W.clone() for name, p in start.parameters.items()}
        self.W_enc, self.W_dec = first["W_enc"].requires_grad_(), first["W_dec"].requires_grad_()
        self.b_enc, self.b_dec = first["b_enc"][:, 0].requires_grad_(), first["b_dec"][0].requires_grad_()
        self.all = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        self.adam = torch.optim.Adam(self.all, lr=job.lr, betas=self.recipe.betas, eps=self.recipe.eps)
        self.silent = torch.zeros(job.d_sae, dtype=torch.int64, device=job.device)
        self.number = 0

    def step(self, x: Tensor) -> None:
        job, x = self.job, (x - self.centre) * self.scale
        self.number += 1
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.lr_at(self.number, job.steps)
        with _autocast(job.device):
            pre = F.linear(x, self.W_enc, self.b_enc).relu()
            acts = _keep(pre, job.k)
            error = x - (acts @ self.W_dec + self.b_dec)
            loss = error.square().sum() / (x - x.mean(0)).square().sum()
            dead = self.silent >= job.dead_after
            if bool(dead.any()):
                loss = loss + AUX_WEIGHT * self._aux(pre, dead, error.detach())
        loss.backward()
        with torch.no_grad():
            grad, W_dec = self.W_dec.grad, self.W_dec
            assert grad is not None
            grad -= (grad * W_dec).sum(1, keepdim=True) * W_dec
            torch.nn.utils.clip_grad_norm_(self.all, 1.0)
            self.adam.step()
            self.adam.zero_grad()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            self.silent = torch.where((acts > 0).any(0), 0, self.silent + len(x))

    def _aux(self, pre: Tensor, dead: Tensor, error: Tensor) -> Tensor:
        k = min(self.recipe.auxiliary_k(self.job.d_in), int(dead.sum()))
        guess = _keep(torch.where(dead, pre, 0), k) @ self.W_dec
        loss = (error - guess).square().sum() / (error - error.mean(0)).square().sum()
        return loss.nan_to_num(0.0)

    def model(self) -> Model:
        def codes(x: Tensor) -> Codes:
            acts = _keep(F.linear((x - self.centre) * self.scale, self.W_enc, self.b_enc).relu(), self.job.k)
            return Codes((acts @ self.W_dec + self.b_dec) / self.scale + self.centre, (acts > 0).any(0))

        return codes, self.W_dec.detach()


def _keep(pre: Tensor, k: int) -> Tensor:
    """Zero but for the k largest of each row."""
    top = pre.topk(k, dim=1, sorted=False)
    return torch.zeros_like(pre).scatter(1, top.indices, top.values)


class SaeLens:
    """sae_lens.SAETrainer.step on a TopKTrainingSAE, inputs scaled as its tutorials do (expected_average_only_in)."""

    def __init__(self, job: Job, sample: Batches) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(job.seed)
        config = TopKTrainingSAEConfig(
            job.d_in, job.d_sae, k=job.k, device=job.device, normalize_activations="expected_average_only_in"
        )
        settings = SAETrainerConfig(
            total_training_samples=job.steps * job.batch, train_batch_size_samples=job.batch, lr=job.lr,
            lr_end=job.lr / 10, lr_warm_up_steps=job.warmup, lr_decay_steps=job.decay, device=job.device,
            autocast=torch.device(job.device).type == "cuda", dead_feature_window=max(1, job.dead_after // job.batch),
        )  # fmt: skip
        given = iter(sample)
        self.trainer: Any = SAETrainer(settings, TopKTrainingSAE(config), given)
        self.trainer.activation_scaler.estimate_scaling_factor(job.d_in, given, len(sample))

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def model(self) -> Model:
        sae, scaler = self.trainer.sae, self.trainer.activation_scaler

        def codes(x: Tensor) -> Codes:
            acts = sae.encode(scaler.scale(x))
            return Codes(scaler.unscale(sae.decode(acts)), (acts > 0).any(0))

        return codes, sae.W_dec.detach()


class DictionaryLearning:
    """dictionary_learning's TopKTrainer.update, inputs divided by the root mean square norm (normalize_activations)."""

    def __init__(self, job: Job, sample: Batches) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer
        from dictionary_learning.training import get_norm_factor

        self.trainer: Any = TopKTrainer(
            steps=job.steps, activation_dim=job.d_in, dict_size=job.d_sae, k=job.k, layer=0, lm_name="none", lr=job.lr,
            warmup_steps=job.warmup, decay_start=job.steps - job.decay, seed=job.seed, device=job.device,
        )  # fmt: skip
        self.trainer.dead_feature_threshold = job.dead_after
        self.norm, self.number, self.device = get_norm_factor(sample, len(sample)), 0, job.device

    def step(self, x: Tensor) -> None:
        with _autocast(self.device):
            self.trainer.update(self.number, x / self.norm)
        self.number += 1

    def model(self) -> Model:
        autoencoder, norm = self.trainer.ae, self.norm

        def codes(x: Tensor) -> Codes:
            acts = autoencoder.encode(x / norm)
            return Codes(autoencoder.decode(acts) * norm, (acts > 0).any(0))

        return codes, autoencoder.decoder.weight.detach().T


class Sparsify:
    """eai-sparsify's SparseCoder with the loss and the steps of its Trainer, which reads a model, not activations.

    With Adam and its linear decay from the warm-up's end, or with the Trainer's default, schedule-free signum at
    5e-3 / sqrt(F / 2^14). AuxK, off there by default, is on with the weight that all others have.
    """

    def __init__(self, job: Job, sample: Batches, signum: bool = False) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        torch.manual_seed(job.seed)
        self.job, self.signum = job, signum
        self.coder: Any = SparseCoder(job.d_in, SparseCoderConfig(num_latents=job.d_sae, k=job.k), device=job.device)
        self.scheduler: Any = None
        if signum:
            from schedulefree import ScheduleFreeWrapper
            from sparsify.sign_sgd import SignSGD

            inner = SignSGD(self.coder.parameters(), lr=job.lr * 25)
            self.optimizer: Any = ScheduleFreeWrapper(inner, momentum=0.95)
            self.optimizer.train()
        else:
            from transformers import get_linear_schedule_with_warmup

            self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=job.lr)
            self.scheduler = get_linear_schedule_with_warmup(self.optimizer, job.warmup, job.steps)
        self.silent = torch.zeros(job.d_sae, dtype=torch.int64, device=job.device)
        self.fresh = True

    def step(self, x: Tensor) -> None:
        coder = self.coder
        if self.fresh:
            coder.b_dec.data = x.mean(0)
            self.fresh = False
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, dead_mask=self.silent > self.job.dead_after)
        (out.fvu + AUX_WEIGHT * out.auxk_loss).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        fired = torch.zeros_like(self.silent, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        self.silent += len(x)
        self.silent[fired] = 0

    def model(self) -> Model:
        def codes(x: Tensor) -> Codes:
            with self._averaged():
                out = self.coder.encode(x)
                x_hat = self.coder.decode(out.top_acts, out.top_indices)
                return Codes(x_hat, _fired(out.top_indices, out.top_acts, self.job.d_sae))

        with self._averaged():
            return codes, self.coder.W_dec.detach().clone()

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The weights that its Trainer would save: the schedule-free average, or simply the weights."""
        if self.signum:
            self.optimizer.eval()
        try:
            yield
        finally:
            if self.signum:
                self.optimizer.train()


def _signum(job: Job, sample: Batches) -> Contestant:
    return Sparsify(job, sample, signum=True)


OURS = "qscope"
TRAINERS: dict[str, Callable[[Job, Batches], Contestant]] = {
    OURS: Qscope,
    "torch dense": DenseTorch,
    "sae-lens": SaeLens,
    "dictionary_learning": DictionaryLearning,
    "eai-sparsify adam": Sparsify,
    "eai-sparsify signum": _signum,
}


def missing(name: str) -> str:
    """Why a trainer cannot run here; "" if it can. Imports it, so that its modules are no part of its memory."""
    package = name.split()[0]
    if name == OURS or package == "torch":
        return ""
    with contextlib.redirect_stdout(sys.stderr):
        why = problem(package)
        if not why and name == "eai-sparsify signum":
            importlib.import_module("schedulefree")  # comes with eai-sparsify, whose default optimiser needs it
    return why
