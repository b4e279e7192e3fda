"""The trainer of one sparse autoencoder: initialise, step, save and restore, hand out the SAE."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qscope.checkpoints import SAECard
from qscope.distributed import Group
from qscope.errors import InputError
from qscope.ops import row_adam_, sparse_dot
from qscope.ops._common import FLOATS, MAX_CUDA_K
from qscope.reference import rows_per_block
from qscope.sae import SAE
from qscope.training import initial, losses
from qscope.training.losses import Loss, Penalty, Weights
from qscope.training.parallel import ALONE, Alone, State, Together
from qscope.training.parameter import Parameter
from qscope.training.recipe import Recipe


@dataclass
class StepStats:
    """One step. Tensors are scalars on the device of the trainer: nothing waits for it until `log`."""

    step: int
    tokens: int
    """Tokens seen, this step included"""
    lr: float
    loss: Tensor
    """What was minimised, the weighted AuxK included"""
    fvu: Tensor
    """Fraction of variance unexplained of this batch, sum ||x - x_hat||^2 / sum ||x - mean||^2, before the update"""
    l0: Tensor
    """Mean number of values above 0 per token"""
    aux: Tensor
    """Weighted AuxK loss, 0 while no feature is dead"""
    dead_share: Tensor
    """Features that have not fired for dead_after_tokens, of all"""
    grad_norm: Tensor
    """Of all gradients together, before clipping"""
    overflow: Tensor
    """Tokens of this batch that may have lost features to the limit per token (batch_topk, jumprelu)"""
    skipped: Tensor
    """Decoder rows that should have been updated and were not, because the batch was not finite"""

    def log(self) -> dict[str, float]:
        """Plain numbers; waits for the device once."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        names = [name for name, value in values.items() if isinstance(value, Tensor)]
        numbers = torch.stack([values[name].double() for name in names]).tolist()
        return values | dict(zip(names, numbers, strict=True))


class SAETrainer:
    """Trains one SAE (or transcoder) as its recipe says, a batch of activations at a time.

    The trainer works on (x - centre) * scale, with the centre the geometric median and the scale measured on the
    sample given to `initialise`, both constant from then on: gradients of the encoder are not dominated by
    the mean activation. `to_sae` and `export` fold both into the weights, exactly: the function is
    pre = W_enc x + b_enc, x_hat = W_dec^T acts + b_dec without any subtraction or scaling, and at the start
    b_dec = centre and b_enc = -W_enc b_dec. Decoder rows have norm 1 throughout.

    A batch whose loss is not finite changes no weight; the loss and `skipped` show it. Two trainers that are given
    the same batches on the same hardware hold the same bits, also with `state_dict` and `load_state_dict` in between.

    Args:
        recipe: what to train.
        d_in: width of the activations that are encoded.
        d_out: width of what is reconstructed, for a transcoder of another width than d_in.
        device: where the weights live; batches must be there.
        total_steps: length of the run, for the learning rate.
        batch_tokens: tokens per step, all processes together.
        group: the processes that train it together (`qscope.distributed.init`): along dp each is given its slice of the
            batch, along tp each holds its part of the features. Every method is then to be called by all of them,
            `initialise` with the sample of the first one counting for all.
    """

    def __init__(
        self,
        recipe: Recipe,
        d_in: int,
        *,
        d_out: int | None = None,
        device: torch.device | str = "cpu",
        total_steps: int,
        batch_tokens: int,
        group: Group | None = None,
    ) -> None:
        self.recipe, self.d_in, self.d_out = recipe, d_in, d_in if d_out is None else d_out
        self.device, self.group = torch.device(device), group
        self.total_steps, self.batch_tokens = total_steps, batch_tokens
        if total_steps < 1 or batch_tokens < 2 or self.d_in < 1 or self.d_out < 1:
            given = f"total_steps={total_steps}, batch_tokens={batch_tokens}, d_in={d_in}, d_out={d_out}"
            raise InputError(f"{given}; at least 1 step of 2 tokens and widths of at least 1 are needed.")
        self.across: Alone = ALONE if group is None else Together(group, recipe.d_sae)
        if recipe.warmup(total_steps) >= total_steps > 1:
            raise InputError(
                f"warmup_steps={recipe.warmup_steps} leaves nothing of total_steps={total_steps}; make it smaller, "
                "or None for a twentieth of the steps."
            )
        if self.device.type == "cuda" and recipe.width > MAX_CUDA_K:
            raise InputError(
                f"k={recipe.k}, multi_topk={recipe.multi_topk} selects {recipe.width} features per token; a GPU "
                f"takes {MAX_CUDA_K}. Make k smaller or train on a CPU."
            )
        self.precision = recipe.precision or ("bf16" if self.device.type == "cuda" else "exact")
        self.step_number, self.tokens = 0, 0
        self.parameters: dict[str, Parameter] = {}

    # --- start -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """First weights, centre and scale from a sample [M, D] of the activations (and targets of a transcoder).

        M of some thousands is enough; the median is taken of the first 32,768. Leave extreme norms out, as from
        the batches.
        """
        x = self._checked(sample, self.d_in, "the sample")[: initial.MEDIAN_ROWS].float()
        y = x if target is None else self._checked(target, self.d_out, "the sample's target")[: len(x)].float()
        if len(y) != len(x) or not bool(x.isfinite().all() and y.isfinite().all()):
            raise InputError("the sample must be finite, and its target of the same length; leave such tokens out.")
        if target is None and self.d_out != self.d_in:
            raise InputError(f"d_out={self.d_out} differs from d_in={self.d_in}, but the sample has no target.")
        self.transcoder = target is not None
        x, y = self.across.same(x), self.across.same(y)
        self.in_centre, self.in_scale, unit = self._measured(x)
        self.out_centre, self.out_scale = self.in_centre.clone(), self.in_scale.clone()
        if self.transcoder:
            self.out_centre, self.out_scale, _ = self._measured(y)
        recipe, x = self.recipe, self._inputs(x)
        if self.transcoder:
            W_enc, W_dec = initial.transcoder(x, self._targets(y), recipe.d_sae, recipe.k, recipe.seed)
        else:
            W_enc, W_dec = initial.tied(x, recipe.d_sae, recipe.k, recipe.seed, recipe.encoder_scale)
        first = {"W_enc": W_enc, "W_dec": W_dec}
        first["b_enc"] = torch.zeros(recipe.d_sae, 1, device=self.device)
        first["b_dec"] = torch.zeros(1, self.d_out, device=self.device)
        self.bandwidth = torch.tensor(recipe.bandwidth * unit, dtype=torch.float64)
        if recipe.objective == "jumprelu":
            start = initial.jumprelu_threshold(x[:4096], W_enc, first["b_enc"][:, 0], recipe.k, recipe.width)
            first["log_threshold"] = torch.full((recipe.d_sae, 1), math.log(start), device=self.device)
        rows = self.across.rows(recipe.d_sae)
        first = {name: self.across.same(W) for name, W in first.items()}
        start_log = first.get("log_threshold", torch.zeros(1))
        self.first_threshold = start_log.flatten()[0].double().exp().cpu()
        self._allocate({name: W if name == "b_dec" else W[rows] for name, W in first.items()})

    def _measured(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """Centre [D] and scale [], float32 numbers kept as float64, and the mean norm that results."""
        centre = initial.geometric_median(x).float().double()
        norm = initial.mean_norm(x, centre)
        if not norm > 0:
            raise InputError("all activations of the sample are equal; there is nothing to learn from it.")
        wanted = {"sqrt_d": x.shape[1] ** 0.5, "unit": 1.0, "none": norm}[self.recipe.normalize_activations]
        return centre, torch.tensor(wanted / norm, dtype=torch.float32).double(), wanted

    def _allocate(self, first: dict[str, Tensor]) -> None:
        copies = self.precision == "bf16"
        self.parameters = {
            name: Parameter(W, copies and name in ("W_enc", "W_dec"), self.recipe.ema is not None)
            for name, W in first.items()
        }
        self.silent = torch.zeros(len(first["W_enc"]), dtype=torch.int64, device=self.device)
        self.moved = torch.full_like(self.silent, -(1 << 40))  # the step of each feature's last gradient
        self.dead, self.dead_in_all = torch.zeros(0, dtype=torch.int64, device=self.device), 0
        self.threshold = torch.full((), torch.nan, device=self.device)

    # --- one step ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, x: Tensor, target: Tensor | None = None) -> StepStats:
        """One update from the batch x [N, D_in], and for a transcoder target [N, D_out]; float32, bfloat16 or float16.

        Raises InputError for a batch that does not fit, before the run is initialised or after its last step.
        """
        self._check_step(x, target)
        recipe, across = self.recipe, self.across
        self.step_number += 1
        tokens = across.tokens(len(x))
        self.tokens += tokens
        lr = recipe.lr_at(self.step_number, self.total_steps)
        inputs = self._inputs(x)
        y = inputs if target is None else self._targets(target)
        if self.precision == "bf16":
            inputs = inputs.bfloat16()
        loss = self._objective(inputs, y, self._weights())
        self._count_silent(loss, tokens)
        aux = self._add_aux(loss, inputs)
        across.sum_gradients(loss.grads, loss.log_threshold)
        loss.touched = across.any_token(loss.touched)
        norm = self._gradient_norm(loss)
        minimised = across.over_tokens(loss.loss) + loss.penalty + aux
        self._update(loss, lr, norm, minimised.isfinite() & norm.isfinite())
        across.check(self.step_number, x, *self._comparable())
        stale = self.parameters["W_dec"].last_step != self.step_number
        return StepStats(
            step=self.step_number,
            tokens=self.tokens,
            lr=lr,
            loss=minimised,
            fvu=across.over_tokens(loss.fvu),
            l0=across.over_all((loss.codes.acts > 0).sum()) / tokens,
            aux=aux,
            dead_share=across.over_features((self.silent >= recipe.dead_after_tokens).sum()) / recipe.d_sae,
            grad_norm=norm,
            overflow=across.over_tokens(loss.codes.overflow),
            skipped=across.over_features((loss.touched & stale).sum()),
        )

    def _objective(self, x: Tensor, y: Tensor, w: Weights) -> Loss:
        recipe, across = self.recipe, self.across
        scale = 1 / across.variance(y).float()
        if recipe.objective == "jumprelu":
            target = recipe.k if recipe.l0_penalty == "target" else None
            return losses.jumprelu_loss(
                x, w, self.parameters["log_threshold"].W[:, 0], y, scale, bandwidth=float(self.bandwidth),
                penalty=Penalty(recipe.l0_weight, target), limit=recipe.width, precision=self.precision,
                across=across,
            )  # fmt: skip
        if recipe.objective == "batch_topk":
            codes, smallest = losses.select_batch_topk(x, w, recipe.k, recipe.width, self.precision, across)
            self._track_threshold(smallest)
        else:
            codes = losses.select_topk(x, w, recipe.width, self.precision, across)
        if recipe.multi_topk:
            return losses.multi_topk_loss(codes, w, x, y, scale, recipe.k, across)
        if len(recipe.nested) > 1:
            return losses.nested_loss(codes, w, x, y, scale, recipe.nested, across)
        return losses.reconstruction_loss(codes, w, x, y, scale, across)

    def _add_aux(self, loss: Loss, x: Tensor) -> Tensor:
        """The AuxK loss; its gradients are added to those of the dead rows."""
        recipe = self.recipe
        self._list_dead()
        if recipe.aux_weight == 0 or self.dead_in_all == 0:
            return torch.zeros((), device=self.device)
        k = recipe.auxiliary_k(self.d_out)
        value, grads, reached = losses.aux_loss(
            x, self._weights(), self.dead, loss.error, k, recipe.aux_weight, self.precision, self.across,
            self.dead_in_all,
        )  # fmt: skip
        for name in ("W_enc", "W_dec", "b_enc"):  # the ids are distinct, so these sums have one order
            total = getattr(loss.grads, name)
            total.index_copy_(0, self.dead, total[self.dead] + getattr(grads, name))
        loss.touched.index_copy_(0, self.dead, loss.touched[self.dead] | reached)
        return self.across.over_tokens(value)

    def _gradient_norm(self, loss: Loss) -> Tensor:
        """Of all gradients, without the part parallel to decoder rows, which the update removes."""
        g, W_dec = loss.grads, self.parameters["W_dec"].W
        each = torch.arange(len(W_dec), dtype=torch.int32, device=self.device)[:, None]
        along = sparse_dot(g.W_dec, each, W_dec)[:, 0] / torch.linalg.vector_norm(W_dec, dim=1)
        rows = torch.linalg.vector_norm(g.W_dec, dim=1).square() - along.square()
        squares = [rows.clamp_min(0).sum(), torch.linalg.vector_norm(g.W_enc, dim=1).square().sum()]
        squares += [t.square().sum() for t in (g.b_enc, g.b_dec, loss.log_threshold) if t is not None]
        stacked = torch.stack(squares)
        together = self.across.over_features(stacked)
        together[3] = stacked[3]  # b_dec is held alike, not in parts
        return together.sum().sqrt()

    def _update(self, loss: Loss, lr: float, norm: Tensor, usable: Tensor) -> None:
        recipe, grads = self.recipe, loss.grads
        # row_adam_ leaves a row as it is if its gradient is not finite: a broken batch is made to reach every row.
        limit = torch.inf if recipe.grad_clip is None else recipe.grad_clip
        factor = torch.where(usable, (limit / (norm + 1e-6)).clamp(max=1.0), torch.nan)
        every = torch.ones(1, dtype=torch.bool, device=self.device)
        self.moved = torch.where(loss.touched, self.step_number, self.moved)
        moving = self.step_number - self.moved <= recipe.momentum_steps
        given = {"W_dec": grads.W_dec, "W_enc": grads.W_enc, "b_enc": grads.b_enc[:, None], "b_dec": grads.b_dec[None]}
        if loss.log_threshold is not None:
            given["log_threshold"] = loss.log_threshold[:, None]
        for name, grad in given.items():
            p = self.parameters[name]
            # A threshold moves by about lr a step, as where it is learnt itself (dictionary_learning, which did badly
            # with logs). With lr on the log it moves a fifth as far or less, and L0 follows the encoder.
            rate = lr / float(self.first_threshold) if name == "log_threshold" else lr
            row_adam_(
                p.W, grad, p.exp_avg, p.exp_avg_sq, p.last_step, every if name == "b_dec" else moving,
                self.step_number, rate, beta1=recipe.betas[0], beta2=recipe.betas[1], eps=recipe.eps,
                grad_scale=factor, unit_rows=name == "W_dec", shadow=p.shadow,
            )  # fmt: skip
            if p.ema is not None and recipe.ema is not None:
                p.ema.lerp_(p.W, 1 - recipe.ema)

    # --- statistics over the batch -----------------------------------------------------------------------

    def _count_silent(self, loss: Loss, tokens: int) -> None:
        """Tokens since each feature fired last."""
        fired = self.across.any_token(losses.fired(loss.codes.acts, loss.codes.ids, len(self.silent)))
        self.silent = torch.where(fired, 0, self.silent + tokens)

    def _list_dead(self) -> None:
        """Look every few steps which features are dead, and not before one can be: it waits for the device."""
        recipe = self.recipe
        if self.tokens >= recipe.dead_after_tokens and self.step_number % recipe.dead_every == 0:
            self.dead = (self.silent >= recipe.dead_after_tokens).nonzero()[:, 0]
            self.dead_in_all = self.across.count(len(self.dead))

    def _track_threshold(self, smallest: Tensor) -> None:
        """Running mean of the smallest active value of a batch: BatchTopK's threshold at inference."""
        beta = self.recipe.threshold_beta
        mixed = torch.where(self.threshold.isnan(), smallest, beta * self.threshold + (1 - beta) * smallest)
        self.threshold = torch.where(smallest.isfinite(), mixed, self.threshold)

    # --- results -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def export(self) -> dict[str, Tensor]:
        """Weights for activations as they come from the model, float32: W_enc [F, D_in], b_enc [F], W_dec [F, D_out],
        b_dec [D_out], and where the objective has one, threshold: [F] for jumprelu (acts = pre where pre > threshold),
        [] for batch_topk (the same, for all features). With `ema` the running means, decoder rows back at norm 1."""
        self._check_ready("export")
        best = {name: p.best if name == "b_dec" else self.across.whole(p.best) for name, p in self.parameters.items()}
        ratio = float(self.in_scale / self.out_scale)
        W_enc = best["W_enc"].clone() if ratio == 1.0 else best["W_enc"] * ratio
        W_dec = best["W_dec"].clone()
        if self.recipe.ema is not None:
            W_dec /= torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny)
        step = rows_per_block(self.d_in, torch.float64.itemsize)
        shifts = [(part.double() @ self.in_centre) for part in best["W_enc"].split(step)]
        b_enc = (best["b_enc"][:, 0].double() - torch.cat(shifts) * self.in_scale) / self.out_scale
        b_dec = best["b_dec"][0].double() / self.out_scale + self.out_centre
        found = {"W_enc": W_enc, "b_enc": b_enc.float(), "W_dec": W_dec, "b_dec": b_dec.float()}
        if self.recipe.objective == "jumprelu":
            found["threshold"] = (best["log_threshold"][:, 0].double().exp() / self.out_scale).float()
        if self.recipe.objective == "batch_topk":
            found["threshold"] = (self.threshold.double() / self.out_scale).float()
        return found

    def to_sae(self, card: SAECard | None = None) -> SAE:
        """The SAE as it is now, see `export`: frozen, in eval mode.

        A BatchTopK SAE is given out as a TopK SAE with its mean k: the same weights, another rule of selection (its
        own, a threshold, is in `export`).

        Raises InputError for a transcoder and for jumprelu: a qscope.SAE selects the k largest and reconstructs what it
        reads.
        """
        self._check_ready("to_sae")
        if self.transcoder:
            raise InputError(
                "a transcoder reconstructs another point than it reads, which a qscope.SAE cannot; export()"
            )
        if self.recipe.objective == "jumprelu":
            raise InputError(
                "a qscope.SAE keeps the k largest features of a token, but this one was trained with a threshold per "
                "feature (jumprelu). export() gives its weights and thresholds."
            )
        found = self.export()
        sae = SAE(found["W_enc"], found["W_dec"], found["b_enc"], found["b_dec"], k=self.recipe.k, card=card)
        return sae.requires_grad_(False).eval()

    # --- save and restore --------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Everything that later steps depend on: tensors and plain numbers by name. The tensors are the live ones, so
        write or clone them before the next step. Of a group, the leading process (`Group.leads`) gets all features
        and the others an empty dict; any number of processes can load it, one too."""
        self._check_ready("state_dict")
        state: State = {
            "step": self.step_number,
            "tokens": self.tokens,
            "total_steps": self.total_steps,
            "batch_tokens": self.batch_tokens,
            "transcoder": int(self.transcoder),
        }
        for name, p in self.parameters.items():
            collected = p.tensors() if name == "b_dec" else self._collected(p.tensors())
            state |= {f"{name}.{part}": tensor for part, tensor in collected.items()}
        state |= {name: getattr(self, name) for name in self._loose()}
        state |= self._collected({"silent": self.silent, "moved": self.moved})
        state["dead"] = self.across.whole_list(self.dead)
        return state if self.across.leads else {}

    def _collected(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.across.collect(tensor) for name, tensor in tensors.items()}

    @staticmethod
    def _loose() -> tuple[str, ...]:
        return (
            "silent", "moved", "dead", "threshold", "in_centre", "in_scale", "out_centre", "out_scale", "bandwidth",
            "first_threshold",
        )  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict` of a trainer of the same recipe, sizes and length; copies the tensors.

        Raises InputError naming what is missing, unknown or of another size; the trainer is then unchanged.
        """
        F, recipe = self.recipe.d_sae, self.recipe
        sizes: dict[str, tuple[int, ...]] = {
            "W_enc": (F, self.d_in),
            "W_dec": (F, self.d_out),
            "b_enc": (F, 1),
            "b_dec": (1, self.d_out),
        }
        if recipe.objective == "jumprelu":
            sizes["log_threshold"] = (F, 1)
        self._check_state(state, sizes)
        rows = self.across.rows(F)
        here = {name: size if name == "b_dec" else (rows.stop - rows.start, *size[1:]) for name, size in sizes.items()}
        self._allocate({name: torch.zeros(size, device=self.device) for name, size in here.items()})
        for name, p in self.parameters.items():
            for part, tensor in p.tensors().items():
                tensor.copy_(_tensor(state, f"{name}.{part}")[slice(None) if name == "b_dec" else rows])
            p.refresh()
        for name in self._loose():
            place = "cpu" if name in ("in_scale", "out_scale", "bandwidth", "first_threshold") else self.device
            setattr(self, name, _tensor(state, name).to(place, copy=True))
        self.silent, self.moved = self.silent[rows].clone(), self.moved[rows].clone()
        self.dead_in_all = len(self.dead)
        self.dead = self.across.own_list(self.dead)
        self.step_number, self.tokens = int(state["step"]), int(state["tokens"])
        self.transcoder = bool(state["transcoder"])

    def _check_state(self, state: State, sizes: dict[str, tuple[int, ...]]) -> None:
        parts = ("W", "exp_avg", "exp_avg_sq", "last_step", *(() if self.recipe.ema is None else ("ema",)))
        wanted = {f"{name}.{part}": (size if part != "last_step" else size[:1]) for name, size in sizes.items()
                  for part in parts}  # fmt: skip
        numbers = {"step", "tokens", "total_steps", "batch_tokens", "transcoder"}
        names = wanted.keys() | numbers | set(self._loose())
        if state.keys() != names:
            missing, unknown = sorted(names - state.keys()), sorted(state.keys() - names)
            raise InputError(f"the state is of another recipe: missing {missing}, unknown {unknown}.")
        for name, size in wanted.items():
            found = tuple(_tensor(state, name).shape)
            if found != size:
                raise InputError(f"the state's {name} is {list(found)}; this trainer's is {list(size)}.")
        for name in ("total_steps", "batch_tokens"):
            if state[name] != getattr(self, name):
                raise InputError(f"the state is of a run with {name}={state[name]}, not {getattr(self, name)}.")

    # --- small things ------------------------------------------------------------------------------------

    def _weights(self) -> Weights:
        p = self.parameters
        return Weights(p["W_enc"].used, p["b_enc"].W[:, 0], p["W_dec"].used, p["b_dec"].W[0])

    def _inputs(self, x: Tensor) -> Tensor:
        return (x.float() - self.in_centre.float()) * float(self.in_scale)

    def _targets(self, y: Tensor) -> Tensor:
        return (y.float() - self.out_centre.float()) * float(self.out_scale)

    def _comparable(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What all processes of a group hold alike, and what those with other tokens do."""
        p = {f"{name}.{part}": tensor for name, p in self.parameters.items() for part, tensor in p.tensors().items()}
        alike = {name: p.pop(name) for name in list(p) if name.startswith("b_dec")}
        alike |= {name: getattr(self, name) for name in ("threshold", "in_centre", "out_centre")}
        return alike, p | {"silent": self.silent, "moved": self.moved}

    def _check_ready(self, what: str) -> None:
        if not self.parameters:
            raise InputError(f"{what}: the trainer has no weights yet; call initialise or load_state_dict first.")

    def _check_step(self, x: Tensor, target: Tensor | None) -> None:
        self._check_ready("step")
        self._checked(x, self.d_in, "the batch")
        if (target is not None) != self.transcoder:
            given = "has" if target is not None else "has no"
            raise InputError(f"the batch {given} target, but the sample that the trainer was initialised with differs.")
        if target is not None and len(self._checked(target, self.d_out, "the target")) != len(x):
            raise InputError(f"the batch has {len(x)} tokens, its target {len(target)}.")
        self.across.check_batch(x, self.batch_tokens)
        if self.step_number >= self.total_steps:
            raise InputError(f"the run of total_steps={self.total_steps} is over; its learning rate has reached 0.")

    def _checked(self, x: Tensor, width: int, what: str) -> Tensor:
        if x.dim() != 2 or x.shape[1] != width or len(x) < 2 or x.dtype not in FLOATS:
            given = f"{list(x.shape)} {x.dtype}"
            raise InputError(f"{what} is {given}; it must be [N >= 2, {width}] float32, bfloat16 or float16.")
        if x.device.type != self.device.type:
            raise InputError(f"{what} is on {x.device}, the trainer on {self.device}; move it there first.")
        return x


def _tensor(state: State, name: str) -> Tensor:
    value = state[name]
    if not isinstance(value, Tensor):
        raise InputError(f"the state's {name} is {type(value).__name__}, not a tensor.")
    return value
