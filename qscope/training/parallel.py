"""What many processes that train one SAE have to agree on. `Alone` is one process, `Together` a group of them.

Along `dp` each process has its slice of every batch and all features that its `tp` place has; along `tp` each has the
rows first..last-1 of every parameter, and the same tokens as the others.

Cost per step and process, beside some numbers: dp, one sum of the gradients (each number sent twice); tp, one gather of
the K candidates of each token and one sum of x_hat [N, D] (and as much for AuxK, and per prefix).
"""

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qscope.distributed import Group, GroupError
from qscope.errors import InputError
from qscope.ops import decode_loss, sparse_dot, topk_encode, topk_select
from qscope.ops.sparse_grads import SparseGrads
from qscope.reference.decode_loss import total_variance
from qscope.training.buffer import Point

CHECK_EVERY = 100
"""Steps between two comparisons of what processes hold alike."""

State = dict[str, Tensor | int | float]


class SupportsState(Protocol):
    def state_dict(self) -> State: ...


class Found(NamedTuple):
    """The largest features of each token."""

    acts: Tensor
    """[N, K]: 0 where the feature belongs to another process"""
    ids: Tensor
    """[N, K] int32: rows of this process' parameters"""
    every: Tensor
    """[N, K]: values also of those features"""


class Decoded(NamedTuple):
    """A reconstruction against its target; see `qscope.ops.decode_loss`."""

    error: Tensor
    sq_err: Tensor
    act_grads: Tensor


class Alone:
    """One process: nothing is exchanged."""

    def rows(self, d_sae: int) -> slice:
        """The features whose rows are held here."""
        return slice(0, d_sae)

    def features(self, here: int) -> int:
        """Size of the dictionary of which `here` features are held here."""
        return here

    def prefixes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """How many of the first features are held here, for each size."""
        return sizes

    def tokens(self, here: int) -> int:
        """Tokens of a batch of which `here` are."""
        return here

    def over_tokens(self, value: Tensor) -> Tensor:
        """The sum over processes with other tokens."""
        return value

    def over_features(self, value: Tensor) -> Tensor:
        """The sum over processes with other features."""
        return value

    def over_all(self, value: Tensor) -> Tensor:
        """The sum over processes with other tokens or other features."""
        return self.over_tokens(self.over_features(value))

    def any_token(self, flags: Tensor) -> Tensor:
        """Whether a flag is set for the tokens of any process."""
        return flags

    def count(self, here: int) -> int:
        """The sum of counts of features."""
        return here

    def batch(self, values: Tensor) -> tuple[Tensor, int]:
        """The rows [N, ..] of all tokens, and which of them is the first of this process."""
        return values, 0

    def variance(self, y: Tensor) -> Tensor:
        """sum_n ||y[n] - mean||^2 of the batch on all processes, float64."""
        return total_variance(y)

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, precision: str) -> Found:
        acts, ids = topk_encode(x, W_enc, b_enc, k, precision)
        return Found(acts, ids, acts)

    def decode(self, acts: Tensor, ids: Tensor, W_dec: Tensor, b_dec: Tensor | None, target: Tensor) -> Decoded:
        out = decode_loss(acts, ids, W_dec, b_dec, target)
        return Decoded(out.error, out.sq_err, out.act_grads)

    def sum_gradients(self, grads: SparseGrads, log_threshold: Tensor | None) -> None:
        """Makes them those of all tokens, in place."""

    def same(self, value: Tensor) -> Tensor:
        """The value of the leading process, of whatever length it is."""
        return value

    def check_batch(self, x: Tensor, batch_tokens: int) -> None:
        """Raises InputError for a slice that is not this process'."""

    def check(self, step: int, x: Tensor, alike: Mapping[str, Tensor], split: Mapping[str, Tensor]) -> None:
        """Raises GroupError if processes differ in what they should hold alike."""

    def whole(self, here: Tensor) -> Tensor:
        """The rows of all features from those of this process."""
        return here

    def whole_list(self, here: Tensor) -> Tensor:
        """Ids of features from those that each process lists by its own rows, ascending."""
        return here

    def own_list(self, ids: Tensor) -> Tensor:
        """Inverse of `whole_list`."""
        return ids

    def collect(self, here: Tensor) -> Tensor:
        """`whole`, for the process that leads the group, on its host; anything for the others."""
        return here

    @property
    def leads(self) -> bool:
        return True


ALONE = Alone()


class Together(Alone):
    """A group of processes that train one SAE with d_sae features."""

    def __init__(self, group: Group, d_sae: int) -> None:
        if d_sae < group.tp.size:
            raise InputError(
                f"d_sae={d_sae} features cannot be spread over tp={group.tp.size} processes; use fewer processes."
            )
        self.group, self.d_sae = group, d_sae
        self.dp, self.tp = group.dp, group.tp
        bounds = [d_sae * place // self.tp.size for place in range(self.tp.size + 1)]
        self.sizes = [b - a for a, b in pairwise(bounds)]
        self.first, self.last = bounds[self.tp.rank], bounds[self.tp.rank + 1]

    # --- which part is here ------------------------------------------------------------------------------

    def rows(self, d_sae: int) -> slice:
        return slice(self.first, self.last)

    def features(self, here: int) -> int:
        return self.d_sae

    def prefixes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(max(size - self.first, 0), self.last - self.first) for size in sizes)

    def tokens(self, here: int) -> int:
        return here * self.dp.size

    def check_batch(self, x: Tensor, batch_tokens: int) -> None:
        if len(x) * self.dp.size != batch_tokens:
            raise InputError(
                f"this process was given {len(x)} tokens; of batch_tokens={batch_tokens} on dp={self.dp.size} "
                f"processes each gets {batch_tokens / self.dp.size:g}, the same number."
            )

    # --- sums over the batch and the features ------------------------------------------------------------

    def over_tokens(self, value: Tensor) -> Tensor:
        return self.dp.sum(value)

    def over_features(self, value: Tensor) -> Tensor:
        return self.tp.sum(value)

    def any_token(self, flags: Tensor) -> Tensor:
        return self.dp.any(flags)

    def count(self, here: int) -> int:
        return sum(self.tp.objects(here))

    def batch(self, values: Tensor) -> tuple[Tensor, int]:
        return self.dp.gather(values).flatten(0, 1), self.dp.rank * len(values)

    def variance(self, y: Tensor) -> Tensor:
        """From each process' mean and variance about it; slices are of equal length."""
        if self.dp.size == 1:
            return total_variance(y)
        means = self.dp.gather(y.mean(0, dtype=torch.float64))
        about_means = (means - means.mean(0)).square().sum() * len(y)
        return self.dp.sum(total_variance(y)) + about_means

    def sum_gradients(self, grads: SparseGrads, log_threshold: Tensor | None) -> None:
        for total in (*grads, log_threshold):
            if total is not None:
                self.dp.sum_(total)
        # Every process of an axis has the same error, but may have summed its rows in another order.
        grads.b_dec.copy_(self.tp.broadcast(grads.b_dec))

    # --- forward -----------------------------------------------------------------------------------------

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, precision: str) -> Found:
        """Each process finds its k largest; the k largest of all are among them. Only values are exchanged: ranks hold
        ascending features and lists put the lowest id of equal values first, so the place in the joined list
        decides ties as ids would."""
        if self.tp.size == 1:
            return super().encode(x, W_enc, b_enc, k, precision)
        acts, ids = _padded_encode(x, W_enc, b_enc, k, precision)
        joined = self.tp.gather(acts).transpose(0, 1).reshape(len(x), -1)
        every, place = topk_select(joined, k)
        at = place - self.tp.rank * k
        own = (at >= 0) & (at < k) & (every != 0)
        ids = ids.gather(1, at.clamp(0, k - 1).long()).masked_fill(~own, 0)
        return Found(every.masked_fill(~own, 0), ids, every)

    def decode(self, acts: Tensor, ids: Tensor, W_dec: Tensor, b_dec: Tensor | None, target: Tensor) -> Decoded:
        """Every process decodes its own features; the first one adds the bias and subtracts the target."""
        if self.tp.size == 1:
            return super().decode(acts, ids, W_dec, b_dec, target)
        start, bias = (target, b_dec) if self.tp.rank == 0 else (torch.zeros_like(target), None)
        if len(W_dec):
            part = decode_loss(acts, ids, W_dec, bias, start).error
        else:
            part = -start.float() if bias is None else bias - start.float()
        error = self.tp.sum_(part.contiguous())
        act_grads = sparse_dot(error, ids, W_dec).mul_(2) if len(W_dec) else error.new_zeros(acts.shape)
        return Decoded(error, error.square().sum(1), act_grads)

    # --- keeping alike -----------------------------------------------------------------------------------

    def same(self, value: Tensor) -> Tensor:
        shape = self.dp.objects(self.tp.objects(tuple(value.shape))[0])[0]
        return self.group.team_broadcast(value if value.shape == shape else value.new_empty(shape))

    def check(self, step: int, x: Tensor, alike: Mapping[str, Tensor], split: Mapping[str, Tensor]) -> None:
        """alike: equal on all processes. split: rows of features, equal along dp. After the first step and every
        `CHECK_EVERY`: it waits for the device."""
        if step != 1 and step % CHECK_EVERY:
            return
        values = {"batch": x, **alike, **split}
        prints = torch.stack([fingerprint(value) for value in values.values()])
        found = self.tp.gather(self.dp.gather(prints))  # [tp, dp, values], so that all processes stop together
        along_tp, along_dp = (found != found[:1]).any(1).any(0), (found != found[:, :1]).any(1).any(0)
        wrong = [
            name
            for name, tp, dp in zip(values, along_tp.tolist(), along_dp.tolist(), strict=True)
            if (tp and name not in split) or (dp and name != "batch")
        ]
        if wrong:
            raise GroupError(
                f"After step {step} the processes that train one SAE no longer hold the same {', '.join(wrong)}. They "
                "must be given one recipe, along tp the same tokens, and run on the same kind of device. Go on from "
                "the last checkpoint; if it happens again, a device computes wrongly."
            )

    # --- whole tensors -----------------------------------------------------------------------------------

    def whole(self, here: Tensor) -> Tensor:
        if self.tp.size == 1:
            return here
        most = max(self.sizes)
        padded = here.new_zeros(most, *here.shape[1:])
        padded[: len(here)] = here
        parts = self.tp.gather(padded)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def whole_list(self, here: Tensor) -> Tensor:
        if self.tp.size == 1:
            return here
        lists = self.tp.objects((here + self.first).tolist())
        return torch.tensor(list(chain.from_iterable(lists)), dtype=here.dtype, device=here.device)

    def own_list(self, ids: Tensor) -> Tensor:
        return ids[(ids >= self.first) & (ids < self.last)] - self.first

    @property
    def leads(self) -> bool:
        return self.group.leads

    def collect(self, here: Tensor) -> Tensor:
        """Through a bounded piece of device memory."""
        if self.dp.rank != 0 or self.tp.size == 1:
            return here
        if self.tp.rank != 0:
            for part in _blocks(here):
                self.tp.send(part, 0)
            return here
        out = torch.empty(self.d_sae, *here.shape[1:], dtype=here.dtype)
        out[: len(here)] = here
        start = len(here)
        for rank, size in enumerate(self.sizes[1:], start=1):
            for part in _blocks(out[start : start + size]):
                part.copy_(self.tp.receive(torch.empty_like(part, device=here.device), rank))
            start += size
        return out


def _padded_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, precision: str) -> tuple[Tensor, Tensor]:
    """topk_encode of fewer than k features too: -1, below all values after ReLU, in their place."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    here = min(k, len(W_enc))
    if here == k:
        return topk_encode(x, W_enc, b_enc, k, precision)
    acts = torch.full((len(x), k), -1.0, dtype=dtype, device=x.device)
    ids = torch.zeros(len(x), k, dtype=torch.int32, device=x.device)
    if here:
        acts[:, :here], ids[:, :here] = topk_encode(x, W_enc, b_enc, here, precision)
    return acts, ids


def _blocks(rows: Tensor) -> Sequence[Tensor]:
    """Views of at most 2^24 numbers, or one row."""
    if rows.numel() == 0 or rows.dim() == 0:
        return [rows] * rows.numel()
    return rows.split(max(1, (1 << 24) // rows[0].numel()))


def fingerprint(value: Tensor) -> Tensor:
    """[] int64 that changes with every bit of the value, and with the order of rows."""
    rows = value.flatten(1) if value.dim() > 1 else value.reshape(-1, 1)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = rows.contiguous().view(kinds[rows.element_size()]).sum(1, dtype=torch.int64)
    places = torch.arange(len(sums), device=sums.device)
    return (sums * (places * 0x9E3779B2 + 1)).sum()


# --- what a workflow of many processes needs besides -----------------------------------------------------


def slice_of(batch: Mapping[Point, Tensor], group: Group) -> dict[Point, Tensor]:
    """This process' rows of a batch that every process has: the dp-th of dp equal parts."""
    found = {}
    for point, rows in batch.items():
        if len(rows) % group.dp.size:
            raise InputError(f"{len(rows)} tokens cannot be dealt to dp={group.dp.size} processes in equal parts.")
        size = len(rows) // group.dp.size
        found[point] = rows[group.dp.rank * size : (group.dp.rank + 1) * size]
    return found


def collect_states(group: Group, names: Sequence[str], trainers: Mapping[str, SupportsState]) -> dict[str, State]:
    """`state_dict` of every trainer, on process 0, which saves them; an empty dict on the others.

    names: of all trainers, in one order everywhere; number i belongs to `group.owner(i)`. trainers: those of this
    process. All processes must call it. Process 0 needs room on its host for all states.
    """
    found = {}
    for number, name in enumerate(names):
        state = trainers[name].state_dict() if group.owns(number) else {}
        if group.leads:
            state = _brought(group, state, group.owner(number))
        if group.first:
            found[name] = state
    return found


def _brought(group: Group, state: State, owner: int) -> State:
    """The owner's state on the first process along `spread`; nothing on the others."""
    axis = group.spread
    facts = axis.objects(
        {
            name: (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
    )[owner]
    if owner == 0:
        return state if axis.rank == 0 else {}
    moved: State = {}
    for name, fact in facts.items():
        if axis.rank == owner and isinstance(value := state[name], Tensor):
            for part in _blocks(value):
                axis.send(part.to(group.device), 0)
        elif axis.rank == 0:
            moved[name] = _received(group, fact, owner) if isinstance(fact, tuple) else fact
    return moved


def _received(group: Group, fact: tuple[torch.dtype, tuple[int, ...]], owner: int) -> Tensor:
    dtype, shape = fact
    out = torch.empty(shape, dtype=dtype)
    for part in _blocks(out):
        part.copy_(group.spread.receive(torch.empty_like(part, device=group.device), owner))
    return out
