"""Checkpoints of a training run: complete or absent, never half.

    RUN/.lock                              held while a run is under way; the kernel frees it when a process dies
    RUN/checkpoints/step-00000200/
        checkpoint.json                    step, config, position of the log, sha256 and size of every other file,
                                           all values of the states that are no tensors
        trainer-0.safetensors, ...         tensors of each trainer's state
        stream.safetensors, rng.safetensors

A checkpoint is written beside its place (`.tmp-...`), every file and the folder fsynced, then renamed. What it
takes on the disk is checked before anything is touched. Old ones go only after the new one is in its place.
Nothing is pickled; loading executes nothing.
"""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qscope.errors import CheckpointError, StorageError
from qscope.files import (
    acquire_lock,
    differences,
    file_sha256,
    fsync_folder,
    size_problem,
    storage_error,
    sweep,
    tensor_parts,
    write_file,
)

FORMAT = "qscope-training"
VERSION = 1
FOLDER = "checkpoints"
MANIFEST = "checkpoint.json"

_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_TEMPORARY = re.compile(r"\.(tmp|old)-step-.*")
_FILE = re.compile(r"(trainer-\d+|stream|rng)\.safetensors")
_SLACK = 1 << 20  # bytes for the manifest, headers and the file system's own


@dataclass(frozen=True)
class Checkpoint:
    """What `load` returns. Tensors are on the host."""

    path: Path
    step: int
    trainers: dict[str, Any]
    """name -> what the trainer's `state_dict` gave"""
    stream: dict[str, Any]
    log_position: int
    """Bytes of the log that were written when it was saved: what follows them is to be cut off."""
    config: dict[str, Any]
    metric: float | None
    rng: dict[str, Any]

    def restore_rng(self) -> None:
        """Sets torch's global generators as they were (those of trainers and stream are in their states)."""
        torch.set_rng_state(self.rng["cpu"])
        if self.rng["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.rng["cuda"][: torch.cuda.device_count()])


@contextmanager
def locked(run: str | os.PathLike[str]) -> Iterator[Path]:
    """Takes a run's folder for this process, making it if need be. `StoreError` at once if another one holds it."""
    folder = Path(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    lock = acquire_lock(folder)
    try:
        yield folder
    finally:
        lock.release()


# --- saving ----------------------------------------------------------------------------------------------


def save(
    run: str | os.PathLike[str],
    step: int,
    trainers: Mapping[str, Any],
    stream: Mapping[str, Any],
    log_position: int,
    config: Mapping[str, Any],
    *,
    metric: float | None = None,
    keep_last: int = 2,
    keep_best: bool = False,
) -> Path:
    """Saves a checkpoint and removes those that are not to be kept. Call it inside `locked`.

    trainers, stream: states, nested dicts (keys str or int), lists and tuples of tensors and plain values.
    log_position: bytes of the log so far. config: JSON object that `load` compares.
    metric: figure of merit, lower is better, NaN and infinity count as none; `keep_best` keeps the checkpoint with
        the lowest beside the `keep_last` newest.

    Raises `StorageError` before anything is touched if the disk has too little room, and when a write fails, in
    which case every older checkpoint is still there; `CheckpointError` if the folder holds checkpoints of another
    config or of later steps; ValueError for a state that cannot be stored.
    """
    if keep_last < 1 or step < 0:
        raise ValueError(f"keep_last is {keep_last} and step {step}; at least 1 and 0 are accepted.")
    parent = Path(run) / FOLDER
    files, values = _split(trainers, stream)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "log_position": log_position,
        "config": _plain(config),
        "metric": metric if metric is not None and math.isfinite(metric) else None,
        "values": values,
    }
    _check_others(parent, step, content["config"])
    needed = sum(t.nbytes for tensors in files.values() for t in tensors.values()) + len(_json(content)) + _SLACK
    try:
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent, _TEMPORARY)
    except OSError as error:
        raise storage_error(error, parent) from error
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise StorageError(
            f"The checkpoint of step {step} takes {needed:,} bytes, and {free:,} are free where {parent} lies. The "
            "checkpoints that are there were not touched. Make room and run the same command again, or keep fewer."
        )
    target = _free_name(parent, step)
    temporary = parent / f".tmp-{target.name}"
    try:
        temporary.mkdir()
        written = {}
        for name, tensors in files.items():
            parts, size = tensor_parts(tensors, {"step": str(step)})
            written[name] = {"sha256": write_file(temporary / name, parts, size), "bytes": size}
        text = _sealed({**content, "files": written})
        write_file(temporary / MANIFEST, [text], len(text))
        fsync_folder(temporary)
        os.rename(temporary, target)
        fsync_folder(parent)
    except BaseException as error:
        with suppress(OSError):  # the first failure is the one to report
            shutil.rmtree(temporary)
        if isinstance(error, OSError):
            raise storage_error(error, target, needed) from error
        raise
    _prune(parent, target, keep_last, keep_best)
    return target


def _split(trainers: Mapping[str, Any], stream: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """(file name -> tensors, the values that are no tensors)."""
    rng = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }
    files: dict[str, dict[str, Tensor]] = {}
    values: dict[str, Any] = {"trainers": []}
    for number, (name, state) in enumerate(trainers.items()):
        tensors = files[f"trainer-{number}.safetensors"] = {}
        values["trainers"].append([name, pack(state, tensors)])
    for name, state in (("stream", stream), ("rng", rng)):
        tensors = files[f"{name}.safetensors"] = {}
        values[name] = pack(state, tensors)
    return files, values


def pack(value: Any, tensors: dict[str, Tensor], name: str = "state") -> Any:
    """`value` as JSON; its tensors go to `tensors`, by their place. `unpack` is the inverse."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return {"float": value.hex()}  # every bit, infinities and NaN too
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [pack(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]}
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, pack(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
    raise ValueError(
        f"A state holds {type(value).__name__} at {name}, which cannot be stored. Accepted: dicts with text or whole "
        "numbers as keys, lists, tuples, tensors, numbers, text, true, false and None."
    )


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `pack`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float.fromhex(content)
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    items = [unpack(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def _plain(config: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(dict(config), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"The config of a run cannot be kept as JSON: {error}.") from error


def _json(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _sealed(content: dict[str, Any]) -> bytes:
    """The manifest's bytes, with a hash of all else in it."""
    return _json({**content, "sha256": hashlib.sha256(_json(content)).hexdigest()})


def _check_others(parent: Path, step: int, config: Any) -> None:
    """Refuses to save among checkpoints that this run did not make: pruning would take them for its own."""
    for path in _all(parent):
        try:
            changed = differences(_manifest(path)["config"], config)
            later = _step_of(path) > step and _verified(path) is not None
        except CheckpointError:  # damaged: it names no run
            continue
        if changed:
            raise CheckpointError(_other_config(path, changed))
        if later:
            raise CheckpointError(
                f"{parent} already holds a checkpoint of step {_step_of(path)}, and one of step {step} was to be saved "
                "there. Resume the run that is there, or give another folder."
            )
        return


def _other_config(path: Path, changed: list[str]) -> str:
    return (
        f"{path} is of a run with another config: {'; '.join(changed[:12])}{'; ...' if changed[12:] else ''}. Use the "
        "old config to go on, or give another folder."
    )


def _free_name(parent: Path, step: int) -> Path:
    """A name for a checkpoint of `step`; one of the same step that is there keeps its own until it is pruned."""
    path, number = parent / f"step-{step:08d}", 0
    while path.exists():
        number += 1
        path = parent / f"step-{step:08d}-{number}"
    return path


def _prune(parent: Path, newest: Path, keep_last: int, keep_best: bool) -> None:
    """Removes what is older than the `keep_last` newest and not the best, and what is newer, which is damaged."""
    found = _all(parent)
    step = _step_of(newest)
    older = [path for path in found if _step_of(path) < step]
    keep = {newest, *older[: keep_last - 1]}
    if keep_best:
        best = _best_of([newest, *older])
        keep |= {best} if best is not None else set()
    for path in found:
        if path not in keep:
            _remove(path)


def _remove(path: Path) -> None:
    """Out of the way by one rename first: a checkpoint is never seen with some of its files gone."""
    old = path.with_name(f".old-{path.name}")
    try:
        os.rename(path, old)
        shutil.rmtree(old)
    except OSError as error:
        raise storage_error(error, path) from error


# --- loading ---------------------------------------------------------------------------------------------


def latest(run: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint that is whole (every file is read), None if there is none. Warns of damaged ones."""
    for path in _all(Path(run) / FOLDER):
        try:
            _verified(path)
            return path
        except CheckpointError as error:
            _warn(error)
    return None


def best(run: str | os.PathLike[str]) -> Path | None:
    """The checkpoint with the lowest metric, None if none has one."""
    return _best_of(_all(Path(run) / FOLDER))


def resume(run: str | os.PathLike[str], config: Mapping[str, Any]) -> Checkpoint | None:
    """The newest whole checkpoint, loaded; None if the run has none yet.

    A damaged one is passed over with a warning that says so. Raises CheckpointError if all are damaged, or if
    they are of a run with another config.
    """
    found = _all(Path(run) / FOLDER)
    for path in found:
        try:
            content = _verified(path)
        except CheckpointError as error:
            _warn(error)
            continue
        return _load(path, content, config)
    if found:
        raise CheckpointError(
            f"{len(found)} checkpoints are in {Path(run) / FOLDER}, and all of them are damaged. Restore one, or "
            "begin again in another folder."
        )
    return None


def load(path: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> Checkpoint:
    """One checkpoint. Raises CheckpointError if it is damaged, or if `config` is given and is not its own: the
    message names the fields that differ."""
    return _load(Path(path), _verified(Path(path)), config)


def _load(path: Path, content: dict[str, Any], config: Mapping[str, Any] | None) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    changed = [] if config is None else differences(content["config"], _plain(config))
    if changed:
        raise CheckpointError(_other_config(path, changed))
    try:
        tensors = {name: load_file(path / name) for name in content["files"]}
        values = content["values"]
        trainers = {
            name: unpack(state, tensors[f"trainer-{number}.safetensors"])
            for number, (name, state) in enumerate(values["trainers"])
        }
        stream, rng = (unpack(values[name], tensors[f"{name}.safetensors"]) for name in ("stream", "rng"))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Use an older checkpoint.") from error
    return Checkpoint(
        path, content["step"], trainers, stream, content["log_position"], content["config"], content["metric"], rng
    )


def _verified(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is what was written. Raises CheckpointError."""
    content = _manifest(path)
    for name, facts in content["files"].items():
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{path / MANIFEST} names the file {name!r}, which no checkpoint has.")
        problem = size_problem(path / name, facts["bytes"])
        if problem is None and _hash(path / name) != facts["sha256"]:
            problem = "its sha256 is not the one that was written"
        if problem:
            raise CheckpointError(f"{path / name} is damaged: {problem}. Use an older checkpoint.")
    return content


def _manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error}. Use an older checkpoint.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of a training run (no format {FORMAT!r}).")
    if not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise CheckpointError(
            f"{path} was written in format {content.get('version')}; this qscope reads up to {VERSION}. Use the newer "
            "qscope that wrote it."
        )
    seal = content.pop("sha256", None)
    if hashlib.sha256(_json(content)).hexdigest() != seal:
        raise CheckpointError(f"{path / MANIFEST} was changed after it was written. Use an older checkpoint.")
    return content


def _hash(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _all(parent: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    try:
        found = [(match, name) for name in os.listdir(parent) if (match := _NAME.fullmatch(name))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{parent} cannot be read: {error.strerror}.") from error
    found.sort(key=lambda item: (int(item[0][1]), int(item[0][2] or 0)), reverse=True)
    return [parent / name for _, name in found]


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _best_of(found: list[Path]) -> Path | None:
    """Lowest metric; of equal ones the newest."""
    metrics: list[tuple[float, int, Path]] = []
    for age, path in enumerate(found):
        with suppress(CheckpointError):
            metric = _manifest(path)["metric"]
            if metric is not None:
                metrics.append((metric, age, path))
    return min(metrics)[2] if metrics else None


def _warn(error: CheckpointError) -> None:
    warnings.warn(f"A damaged checkpoint is passed over; the one before it is used. {error}", stacklevel=3)
