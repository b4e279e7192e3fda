"""Processes that work on one run together, started by torchrun: torch.distributed with a device mesh of three axes.

    torchrun --nproc-per-node 8 ...        with init("cuda", spread=2, dp=2, tp=2) as group:

`spread`: processes along it work on different things (SAEs of different layers). `dp`: on different tokens of a batch.
`tp`: on different features of one SAE. World rank = (spread * dp_size + dp) * tp_size + tp, so that the processes of
one SAE are neighbours.

Sums have a fixed order, that of the ranks: the same bits on every process and in every run. Tensors travel as bytes, so
every dtype does on every backend (gloo on a CPU, nccl on a GPU).
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from qscope import native
from qscope.errors import InputError, QscopeError

__all__ = ["Axis", "Group", "GroupError", "init", "leave"]

AXES = ("spread", "dp", "tp")
BLOCK = 1 << 24
"""Numbers that are exchanged at once: a sum of any size takes two copies of a block, no more."""
SMALL = 1 << 12
"""Numbers up to which every process adds all terms itself; a longer sum is cut, each process adds its part."""

T = TypeVar("T")
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


class GroupError(QscopeError):
    """The processes of a run have lost one of them, or no longer agree."""

    seen = False
    """Whether there was one in this process, which then cannot be tidied up."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        GroupError.seen = True


def leave(status: int) -> NoReturn:
    """End this process. After a GroupError without Python's way out: tearing gloo down aborts the process where a
    request to the lost one is outstanding, and its exit status is lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    if GroupError.seen:
        os._exit(status)
    sys.exit(status)


class Axis:
    """The processes along one axis of the mesh that this one exchanges with. Every method is to be called by all of
    them, in the same order. An axis of one process exchanges nothing and returns what it was given.

    Raises GroupError when a process is gone or does not answer in time.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    def gather(self, value: Tensor) -> Tensor:
        """The values of all processes, stacked in the order of ranks: [size, *shape]; shapes must be equal."""
        if self.size == 1:
            return value[None]
        out = value.new_empty(self.size, *value.shape)
        self._run(_gather, _bytes(out), _bytes(value))
        return out

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, in the dtype of the value, in the order of ranks."""
        return value if self.size == 1 else self.sum_(value.clone(memory_format=torch.contiguous_format))

    def sum_(self, value: Tensor) -> Tensor:
        """`sum` in place; the value must be contiguous."""
        if self.size > 1:
            for part in value.view(-1).split(BLOCK):
                part.copy_(self._sum_of(part))
        return value

    def any(self, flags: Tensor) -> Tensor:
        """Whether a flag is set in any process."""
        return flags if self.size == 1 else self.gather(flags).any(0)

    def broadcast(self, value: Tensor, source: int = 0) -> Tensor:
        """The value of the process `source`; shapes and dtypes must be equal."""
        if self.size == 1:
            return value
        out = value.clone(memory_format=torch.contiguous_format)
        self._run(partial(dist.broadcast, group_src=source), _bytes(out))
        return out

    def send(self, value: Tensor, target: int) -> None:
        self._run(partial(dist.send, group_dst=target), _bytes(value))

    def receive(self, like: Tensor, source: int) -> Tensor:
        """What `source` sends, written into `like`, which must be contiguous."""
        self._run(partial(dist.recv, group_src=source), _bytes(like))
        return like

    def objects(self, value: T) -> list[T]:
        """Plain Python values of all processes, in the order of ranks; waits for the device."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self._run(dist.all_gather_object, found, value)
        return found

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self.objects(None)

    def _sum_of(self, part: Tensor) -> Tensor:
        if part.numel() <= SMALL:
            return _in_order(self.gather(part))
        padded = torch.nn.functional.pad(part, (0, -part.numel() % self.size))
        terms = torch.empty_like(padded)
        self._run(dist.all_to_all_single, _bytes(terms), _bytes(padded))
        own = _in_order(terms.view(self.size, -1))
        return self.gather(own).view(-1)[: part.numel()]

    def _run(self, collective: Callable[..., Any], *tensors: Any) -> None:
        try:
            collective(*tensors, group=self._group)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = _reason(error)
            raise GroupError(
                f"Process {dist.get_rank()} of {dist.get_world_size()} waited for another one that has ended or does "
                f"not answer ({reason}). The run stops; the message of the process that ended first says why. Start "
                "the same command again: it goes on from the last checkpoint, also with another number of processes."
            ) from error


def _reason(error: RuntimeError) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.partition(" This is typically")[0].rstrip(".")[:300]  # gloo goes on with general advice


def _bytes(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)


def _in_order(terms: Tensor) -> Tensor:
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


@dataclass(frozen=True)
class Group:
    """This process among the others."""

    device: torch.device
    world: Axis
    spread: Axis
    dp: Axis
    tp: Axis

    @property
    def first(self) -> bool:
        """Whether this is the one process that writes files and prints."""
        return self.world.rank == 0

    @property
    def leads(self) -> bool:
        """Whether this is the first of the processes that train the same SAE."""
        return self.dp.rank == 0 and self.tp.rank == 0

    def owner(self, index: int) -> int:
        """Which place along `spread` works on the thing with this number: they are dealt in turn."""
        return index % self.spread.size

    def owns(self, index: int) -> bool:
        return self.owner(index) == self.spread.rank

    def team_broadcast(self, value: Tensor) -> Tensor:
        """The value of the process that leads those that train the same SAE."""
        return self.dp.broadcast(self.tp.broadcast(value))


@contextmanager
def init(
    device: str = "cpu", *, spread: int = 1, dp: int | None = None, tp: int = 1, timeout: float = 600.0
) -> Iterator[Group]:
    """Join the other processes that torchrun started, and part from them at the end of the block.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl), which takes the GPU of the local rank.
        spread, dp, tp: sizes of the axes; their product is the number of processes. dp None: what is left.
        timeout: seconds after which a process that does not answer is given up. Longer than the longest time between
            two exchanges: a forward pass of the model, writing a checkpoint. A process that ends is noticed at once
            with gloo; with nccl torch's watchdog ends the others after this time, and torchrun ends them at once.

    Raises InputError without torchrun's environment or for sizes that do not fit; GroupError if the others do not come.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise InputError(
            f"Several processes were asked for, but {', '.join(missing)} is not set. Start the command with "
            "torchrun --nproc-per-node N, which sets them."
        )
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sizes = _sizes(world, spread, dp, tp)
    place = _device(device)
    native.load(place.type)  # may compile: the others are not to wait for it in the middle of an exchange
    try:
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout),
            device_id=place if place.type == "cuda" else None,
        )
        group = mesh_of(place, sizes)
    except RuntimeError as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        reason = _reason(error)
        raise GroupError(
            f"Process {rank} of {world} could not join the others within {timeout:g} s ({reason}). All of them must be "
            "started, on machines that reach MASTER_ADDR."
        ) from error
    # No tidying after an error: it would wait for processes that wait for this one. The process ends, and they notice.
    yield group
    group.world.barrier()
    dist.destroy_process_group()


def mesh_of(device: torch.device, sizes: tuple[int, int, int]) -> Group:
    """The group of sizes (spread, dp, tp) of the processes that have been joined already."""
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    axes = [Axis(mesh.get_local_rank(name), mesh.size(i), mesh.get_group(name)) for i, name in enumerate(AXES)]
    return Group(device, Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD), *axes)


def _sizes(world: int, spread: int, dp: int | None, tp: int) -> tuple[int, int, int]:
    rest = world // (spread * tp) if spread >= 1 and tp >= 1 else 0
    if dp is None:
        dp = rest
    if min(spread, dp, tp) < 1 or spread * dp * tp != world:
        raise InputError(
            f"spread={spread}, dp={dp}, tp={tp} were asked for in a run of {world} processes; each must be at least 1 "
            f"and their product {world}."
        )
    return spread, dp, tp


def _device(device: str) -> torch.device:
    kind = torch.device(device)
    if kind.type not in ("cpu", "cuda") or kind.index is not None:
        raise InputError(f"device={device!r}; accepted are 'cpu' and 'cuda', the GPU of each local rank.")
    if kind.type == "cpu":
        return kind
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise InputError(
            f"Local rank {local} has no GPU: torch sees {torch.cuda.device_count()}. Start at most that many processes "
            "per machine, or use device 'cpu'."
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
